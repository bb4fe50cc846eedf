"""A MONAI datalist over the images of the nnU-Net export: what `load_decathlon_datalist` and Auto3DSeg read.

Paths are relative to the data set's folder, as `base_dir` wants them. Auto3DSeg takes `fold` for its cross-validation.
https://docs.monai.io/en/stable/apps.html and https://github.com/Project-MONAI/tutorials/tree/main/auto3dseg.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fedcmr.server.dataset.folds import folds
from fedcmr.server.dataset.nnunet import DATASET_NAME, FILE_ENDING, LABELS
from fedcmr.shared.case import PHASE_NAMES, Case

DATALIST_NAME = "datalist.json"


def write_datalist(folder: Path, cases: Sequence[Case]) -> None:
    """Write `folder/datalist.json`, an entry per phase.

    Args:
        folder: The data set's, with `nnunet/` in it.
        cases: Those of the export.
    """
    root, fold_of = f"nnunet/{DATASET_NAME}", folds(cases)
    training = [
        {
            "image": f"{root}/imagesTr/{case.info.pseudonym}_{phase}_0000{FILE_ENDING}",
            "label": f"{root}/labelsTr/{case.info.pseudonym}_{phase}{FILE_ENDING}",
            "patient": case.info.pseudonym,
            "phase": phase,
            "vendor": case.info.vendor,
            "ef": round(case.info.ef, 6),
            "fold": fold_of[case.info.pseudonym],
        }
        for case in cases
        for phase in PHASE_NAMES
    ]
    content = {
        "name": DATASET_NAME.partition("_")[2],
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(number): name for name, number in LABELS.items()},
        "numTraining": len(training),
        "training": training,
    }
    (folder / DATALIST_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
