"""Synthetic cases in nnU-Net v2's raw format, which `fedcmr-client prepare --format nnunet` reads too.

    Dataset901_SyntheticCardiacMRI/
      imagesTr/<pseudonym>_<ed|es>_0000.nii.gz   float32 in [0, 1], axes (x, y, z)
      labelsTr/<pseudonym>_<ed|es>.nii.gz        uint8: 0 background, 1 RV, 2 myocardium, 3 LV
      dataset.json                               channel, labels, number of images, as nnU-Net wants them
      splits_final.json                          five folds by patient; goes to nnU-Net's folder of preprocessed data
      cases.csv                                  name, patient, phase, vendor (the style), ef_fraction

https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md. One image per phase: nnU-Net has no
notion of a patient, and would spread the two phases over training and validation without the splits.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcmr.server.dataset.folds import NUM_FOLDS, folds
from fedcmr.server.dataset.nifti import write_nifti
from fedcmr.shared.case import BACKGROUND, LV, MYO, PHASE_NAMES, RV, Case

DATASET_NAME = "Dataset901_SyntheticCardiacMRI"
"""nnU-Net tells data sets by their number, of which those from 1 to 10 are the Medical Segmentation Decathlon's."""
FILE_ENDING = ".nii.gz"
LABELS = {"background": BACKGROUND, "RV": RV, "myocardium": MYO, "LV": LV}


def export_nnunet(folder: Path, cases: Sequence[Case], terms: str) -> None:
    """Write `folder/Dataset901_SyntheticCardiacMRI`.

    Args:
        folder: For example RUN/synthetic/nnunet.
        cases: The cases.
        terms: Terms of use, for `dataset.json`.
    """
    root = folder / DATASET_NAME
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    rows = []
    for case in cases:
        for phase, name in enumerate(PHASE_NAMES):
            identifier = f"{case.info.pseudonym}_{name}"
            write_nifti(root / "imagesTr" / f"{identifier}_0000{FILE_ENDING}", case.frames[phase], case)
            write_nifti(root / "labelsTr" / f"{identifier}{FILE_ENDING}", case.masks[phase], case)
            rows.append([identifier, case.info.pseudonym, name, case.info.vendor, f"{case.info.ef:.6g}"])
    _write_json(root / "dataset.json", _description(len(rows), terms))
    _write_json(root / "splits_final.json", _splits(cases))
    with (root / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "patient", "phase", "vendor", "ef_fraction"])
        writer.writerows(rows)


def _description(num_images: int, terms: str) -> dict[str, Any]:
    """`dataset.json`; what nnU-Net does not ask for comes last."""
    return {
        "channel_names": {"0": "MRI"},  # any name but CT makes nnU-Net normalise each image by itself
        "labels": LABELS,
        "numTraining": num_images,
        "file_ending": FILE_ENDING,
        "name": DATASET_NAME.partition("_")[2],
        "description": "Synthetic short-axis cardiac MRI at end-diastole and end-systole; see DATASHEET.md",
        "licence": terms,
    }


def _splits(cases: Sequence[Case]) -> list[dict[str, list[str]]]:
    """Names of the images to train on and to validate with, fold by fold; a fold without patients is left out."""
    fold_of = folds(cases)
    splits = []
    for fold in range(min(NUM_FOLDS, len(cases))):
        parts: dict[str, list[str]] = {"train": [], "val": []}
        for pseudonym, own in fold_of.items():
            parts["val" if own == fold else "train"] += [f"{pseudonym}_{name}" for name in PHASE_NAMES]
        splits.append(parts)
    return splits


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
