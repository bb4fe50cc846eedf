"""`croissant.json` of a synthetic data set: what programs that look for data sets can read of it.

Croissant 1.0 with its vocabulary for responsible AI (RAI 1.0), https://docs.mlcommons.org/croissant/docs/. It says less
than `DATASHEET.md`, in the same words; nothing in it is a date, an address or a person.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcmr.server.dataset.making import making_of
from fedcmr.server.dataset.nnunet import DATASET_NAME
from fedcmr.shared.case import INDEX_NAME
from fedcmr.shared.file_names import DATASHEET_NAME

CROISSANT_NAME = "croissant.json"
CONFORMS_TO = ("http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0")
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The one that the specification gives, word for word: readers compare it."""
FILES = {
    INDEX_NAME: ("text/csv", "Index: pseudonym, vendor (the style), ef, group, contours"),
    "labels.csv": ("text/csv", "Labels of each patient"),
    DATASHEET_NAME: ("text/markdown", "Datasheet: how the set was made, its privacy, uses, terms and limits"),
}
FILE_SETS = {
    "cases": ("cases/*.npz", "application/zip", "Frames, masks and spacing_mm of a patient, NumPy arrays"),
    "dicom": ("dicom/*/*.dcm", "application/dicom", "MR images, a series per phase, SyntheticData = YES"),
    "dicom-masks": ("dicom/*/masks/*.dcm", "application/dicom", "DICOM segmentations of these images"),
    "nifti-frames": ("nifti/frames/*.nii.gz", "application/gzip", "Frames as NIfTI, axes (x, y, z, phase)"),
    "nifti-masks": ("nifti/masks/*.nii.gz", "application/gzip", "Masks as NIfTI, the same axes"),
    "nnunet-images": (
        f"nnunet/{DATASET_NAME}/imagesTr/*.nii.gz",
        "application/gzip",
        "Images for nnU-Net, one a phase",
    ),
    "nnunet-labels": (f"nnunet/{DATASET_NAME}/labelsTr/*.nii.gz", "application/gzip", "Their labels"),
}
FIELDS = {
    "pseudonym": ("sc:Text", "Name of the synthetic patient, and of its files"),
    "vendor": ("sc:Text", "Vendor in whose style the images were rendered; no scanner of theirs took part"),
    "ef": ("sc:Float", "Ejection fraction of the masks, in [0, 1]"),
    "ef_requested": ("sc:Float", "Ejection fraction that was requested of the heart"),
    "ef_measured": ("sc:Float", "Ejection fraction that an independent segmenter finds on the image; empty for none"),
    "lv_ed_ml": ("sc:Float", "Volume of the left cavity at end-diastole, in millilitres"),
    "lv_es_ml": ("sc:Float", "Volume of the left cavity at end-systole, in millilitres"),
}
"""The columns of `labels.csv`."""


def write_croissant(folder: Path, columns: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Write `folder/croissant.json` of what is in the folder.

    Args:
        folder: The data set, all but this file and the checksums.
        columns: Those of `labels.csv`.
        facts: As for `datasheet`.
    """
    content = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": list(CONFORMS_TO),
        "name": "synthetic-cardiac-mri",
        "description": f'Synthetic short-axis cardiac MRI of the study "{facts["study"]}", at end-diastole and '
        "end-systole, with masks and the ejection fraction that follows from them.",
        "license": one_line(facts["terms"]),
        "keywords": ["cardiac MRI", "synthetic data", "segmentation", "ejection fraction", "differential privacy"],
        "isLiveDataset": False,
        **_responsible_ai(facts),
        "distribution": [*_file_objects(folder), *_file_sets(folder)],
        "recordSet": [_labels(columns)],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / CROISSANT_NAME).write_text(text + "\n", encoding="utf-8")


def one_line(text: str) -> str:
    """A text of several lines as one."""
    return " ".join(text.split())


def _responsible_ai(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the vocabulary asks for and the set can answer."""
    epsilon, delta = (facts["privacy"].get(name) for name in ("epsilon", "delta"))
    covered = (
        "The generator was trained without differential privacy: images may resemble patients of its training."
        if epsilon is None
        else f"The generator is differentially private: epsilon {epsilon:.2f} at delta {delta:g}, per patient and site."
    )
    return {
        "rai:dataCollection": one_line(f"{making_of(facts).sentence()} {facts['prior']} {facts['real_data']}"),
        "rai:dataAnnotationProtocol": making_of(facts).annotation(),
        "rai:dataUseCases": [
            "Training and testing of methods that measure the left ventricle; teaching; software tests.",
            "Not for diagnosis, evidence about patients, vendors or diseases, or in place of a test on real scans.",
        ],
        "rai:dataBiases": [
            "Ejection fractions are spread evenly on purpose; prevalences, ages and sexes are not modelled.",
            "A vendor's style is what the sites with that vendor's scanners contributed.",
        ],
        "rai:dataLimitations": [
            "Two phases of the cycle, short axis only; no flow, no late enhancement, no implants, few artefacts.",
            "A method that works on these images must be tested on real scans before anybody relies on it.",
        ],
        "rai:personalSensitiveInformation": [f"No image's file names a person, site or scanner. {covered}"],
        "rai:dataReleaseMaintenancePlan": "A folder is not changed once it is written; a release replaces it whole.",
    }


def _file_objects(folder: Path) -> list[dict[str, Any]]:
    """The single files, with their checksums."""
    return [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "description": description,
            "contentUrl": name,
            "contentSize": f"{(folder / name).stat().st_size} B",
            "encodingFormat": mime,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name, (mime, description) in FILES.items()
    ]


def _file_sets(folder: Path) -> list[dict[str, Any]]:
    """The kinds of files of which there are many; each one's checksum is in `SHA256SUMS`."""
    return [
        {
            "@type": "cr:FileSet",
            "@id": name,
            "name": name,
            "description": f"{description}; checksums are in SHA256SUMS",
            "encodingFormat": mime,
            "includes": pattern,
        }
        for name, (pattern, mime, description) in FILE_SETS.items()
        if any(folder.glob(pattern))
    ]


def _labels(columns: Sequence[str]) -> dict[str, Any]:
    """The rows of `labels.csv`."""
    return {
        "@type": "cr:RecordSet",
        "@id": "patients",
        "name": "patients",
        "description": "A row of labels.csv for each synthetic patient",
        "key": {"@id": "patients/pseudonym"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"patients/{column}",
                "name": column,
                "description": FIELDS[column][1],
                "dataType": FIELDS[column][0],
                "source": {"fileObject": {"@id": "labels.csv"}, "extract": {"column": column}},
            }
            for column in columns
        ],
    }
