"""One patient in every layout that `prepare` reads, with the file that the fuzzer damages there."""

import gzip
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedcmr.simulations.benchmarks.ingest_seeds import (
    COLUMN_AXIS,
    NORMAL,
    NUM_PHASES,
    PIXEL_MM,
    ROW_AXIS,
    SLICE_MM,
    STUDY_NUMBER,
    beating_heart,
    write_seeds,
)

ED, ES = 0, NUM_PHASES // 2
LABELS = {0: 0, 1: 1, 2: 2, 3: 3}
FROM_LV = np.array([0, 3, 2, 1], np.uint8)
"""Labels of M&Ms, which count from the left ventricle."""
AFFINE = np.diag([-1, -1, 1, 1]) @ np.vstack(
    [np.column_stack([COLUMN_AXIS * PIXEL_MM, ROW_AXIS * PIXEL_MM, NORMAL * SLICE_MM, np.zeros(3)]), [0, 0, 0, 1]]
)
NUM_POINTS = 40


@dataclass(frozen=True)
class Form:
    """A folder of one patient, one file of which is to be damaged.

    Attributes:
        layout: A key of `fedcmr.client.ingest.layouts.kinds.LAYOUTS`.
        name: Of the kind of file that is damaged.
        files: Contents by path below the folder.
        damaged: A path among them.
        choices: What `prepare` is told; a table of ejection fractions as its path below the folder.
    """

    layout: str
    name: str
    files: Mapping[str, bytes] = field(repr=False)
    damaged: str
    choices: Mapping[str, Any] = field(default_factory=dict)


def forms() -> list[Form]:
    """Every layout with every kind of file that is read in it, the same in every call."""
    images, labels = beating_heart()
    with tempfile.TemporaryDirectory() as folder:
        return [
            *_dicom(Path(folder)),
            *_sunnybrook(Path(folder)),
            *_plain(images, labels),
            *_nnunet(images, labels),
            *_acdc(images, labels),
            *_mnms(images, labels),
            *_mnms2(images, labels),
        ]


def nifti(
    array: NDArray[Any],
    kind: str = "1",
    slope: float | None = None,
    affine: NDArray[np.float64] = AFFINE,
) -> bytes:
    """A NIfTI file of an array (..., Z, H, W).

    Args:
        array: Its numbers.
        kind: "1" or "2" for the version, with ">" before it for big endian.
        slope: Of stored numbers, where they are scaled.
        affine: To RAS+ millimetres.
    """
    header = nibabel.Nifti2Header if kind.endswith("2") else nibabel.Nifti1Header
    image = (nibabel.Nifti2Image if kind.endswith("2") else nibabel.Nifti1Image)(
        array.T, affine, header(endianness=">" if kind.startswith(">") else "<")
    )
    image.header.set_data_dtype(array.dtype)
    if slope is not None:
        image.header.set_slope_inter(slope, 0.0)
    return image.to_bytes()


def packed(content: bytes) -> bytes:
    """Compressed, without the time."""
    return gzip.compress(content, mtime=0)


def _dicom(folder: Path) -> list[Form]:
    """Classic images with masks, one of them in several transfer syntaxes; one Enhanced file; a segmentation."""
    seeds = write_seeds(folder / "seeds")
    study = {f"study/{path.name}": path.read_bytes() for path in sorted(seeds.study.iterdir())}
    mask = {"study/masks.nii.gz": seeds.masks["masks.nii.gz"]}
    made = [
        Form("dicom", name, {**study, **mask, "study/1-2.dcm": content}, "study/1-2.dcm")
        for name, content in seeds.classic.items()
    ]
    for name, content in seeds.whole.items():
        made.append(Form("dicom", name, {"study/one.dcm": content, **mask}, "study/one.dcm"))
    for name, content in seeds.masks.items():
        made.append(Form("dicom", name, {**study, f"study/{name}": content}, f"study/{name}"))
    made.append(Form("dicom", "no masks", study, "study/1-2.dcm"))
    table = f"patient,ef_percent\nseed-{STUDY_NUMBER},55.5\nother-{STUDY_NUMBER},61\n".encode()
    files = {"scans/one.dcm": seeds.whole["enhanced"], "scans/masks.nii.gz": seeds.masks["masks.nii.gz"]}
    made.append(Form("dicom", "table of EFs", {**files, "ef.csv": table}, "ef.csv", {"ef_table": "ef.csv"}))
    return made


def _sunnybrook(folder: Path) -> list[Form]:
    """The published folders: images by the table's number, contours by the original one."""
    study = sorted(write_seeds(folder / "sunnybrook").study.iterdir())
    files, contours = {}, {}
    angles = np.linspace(0, 2 * np.pi, NUM_POINTS, endpoint=False)
    for index, path in enumerate(study):
        z, t = divmod(index, NUM_PHASES)
        files[f"SCD_IMAGES/SCD{STUDY_NUMBER}/CINESAX/IM-0003-{index + 1:04d}.dcm"] = path.read_bytes()
        radius = (5 + z / 2) * (0.6 if t == ES else 1.0)
        for side, reach in {"i": radius, "o": radius + 3}.items():
            if t in (ED, ES) and (side == "i" or t == ED):
                points = zip(23 + reach * np.cos(angles), 21 + reach * np.sin(angles), strict=True)
                text = "".join(f"{x:.2f} {y:.2f}\r\n" for x, y in points).encode()
                contours[f"SC-HF-I-{STUDY_NUMBER}/contours-manual/IM-0001-{index + 1:04d}-{side}contour-manual.txt"] = (
                    text
                )
    table = f"PatientID,OriginalID,Gender,Age,Pathology\nSCD{STUDY_NUMBER},SC-HF-I-{STUDY_NUMBER},Male,61,HF\n".encode()
    files |= {**contours, "scd_patientdata.csv": table}
    inner, outer = (next(path for path in contours if f"-{side}contour" in path) for side in "io")
    image = next(path for path in files if path.endswith(f"{NUM_PHASES:04d}.dcm"))
    names = {"image": image, "inner contour": inner, "outer contour": outer, "table": "scd_patientdata.csv"}
    return [Form("sunnybrook", name, files, path) for name, path in names.items()]


def _plain(images: NDArray[np.int16], labels: NDArray[np.uint8]) -> list[Form]:
    """A cine with masks; two phases; a cine without masks; the table."""
    name = f"P{STUDY_NUMBER}"
    labelled = labels.copy()
    labelled[[t for t in range(NUM_PHASES) if t not in (ED, ES)]] = 0
    table = f"name,patient,vendor,field_strength_t,ef_percent\n{name},{name},Siemens,1.5,55.5\n".encode()
    cine = {
        f"frames/{name}.nii.gz": packed(nifti(images)),
        f"masks/{name}.nii.gz": packed(nifti(labelled)),
        "cases.csv": table,
    }
    alone = {path: content for path, content in cine.items() if not path.startswith("masks")}
    phases = {
        f"{kind}/{name}_{phase}.nii": nifti(array[t], slope=slope)
        for kind, array, slope in (("frames", images.astype(np.int16), 0.5), ("masks", labels, None))
        for phase, t in (("ed", ED), ("es", ES))
    }
    explained = {"labels": LABELS}
    return [
        Form("plain", "cine.nii.gz", cine, f"frames/{name}.nii.gz", explained),
        Form("plain", "mask.nii.gz", cine, f"masks/{name}.nii.gz", explained),
        Form("plain", "phase.nii", phases, f"frames/{name}_es.nii", explained),
        Form("plain", "phase's mask.nii", phases, f"masks/{name}_ed.nii", explained),
        Form("plain", "no masks", alone, f"frames/{name}.nii.gz"),
        Form("plain", "short axis given", cine, f"frames/{name}.nii.gz", {**explained, "axes": "short-axis"}),
        Form("plain", "table", cine, "cases.csv", explained),
    ]


def _nnunet(images: NDArray[np.int16], labels: NDArray[np.uint8]) -> list[Form]:
    """A raw data set with its description and a table."""
    description = {
        "channel_names": {"0": "cine"},
        "labels": {"background": 0, "RV": 1, "MYO": 2, "LV": 3},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    files = {"dataset.json": json.dumps(description, indent=1).encode()}
    rows = ["name,phase,patient,vendor,field_strength_t"]
    for phase, t in (("ed", ED), ("es", ES)):
        name = f"P{STUDY_NUMBER}_{phase}"
        files[f"imagesTr/{name}_0000.nii.gz"] = packed(nifti(images[t].astype(np.float32)))
        files[f"labelsTr/{name}.nii.gz"] = packed(nifti(labels[t]))
        rows.append(f"{name},{phase},P{STUDY_NUMBER},Philips,3")
    table = {"cases.csv": "\r\n".join(rows).encode()}
    image, label = f"imagesTr/P{STUDY_NUMBER}_es_0000.nii.gz", f"labelsTr/P{STUDY_NUMBER}_ed.nii.gz"
    return [
        Form("nnunet", "image.nii.gz", files, image),
        Form("nnunet", "label.nii.gz", files, label),
        Form("nnunet", "dataset.json", files, "dataset.json"),
        Form("nnunet", "table", files | table, "cases.csv"),
    ]


def _acdc(images: NDArray[np.int16], labels: NDArray[np.uint8]) -> list[Form]:
    """Two frames with masks, compressed and unpacked, whose headers know no axes."""
    lost, made = np.diag([PIXEL_MM, PIXEL_MM, SLICE_MM, 1.0]), []
    folder = f"patient{STUDY_NUMBER}"
    for suffix, write in ((".nii.gz", packed), (".nii", bytes)):
        files = {f"{folder}/Info.cfg": b"ED: 1\nES: 4\nGroup: DCM\nHeight: 184.0\nNbFrame: 6\nWeight: 95.0\n"}
        for frame, t in ((1, ED), (4, ES)):
            stem = f"{folder}/{folder}_frame{frame:02d}"
            files[f"{stem}{suffix}"] = write(nifti(images[t], affine=lost))
            files[f"{stem}_gt{suffix}"] = write(nifti(labels[t], affine=lost))
        stem = f"{folder}/{folder}_frame01"
        made += [
            Form("acdc", f"frame{suffix}", files, f"{stem}{suffix}"),
            Form("acdc", f"mask{suffix}", files, f"{stem}_gt{suffix}"),
        ]
    return [*made, Form("acdc", "Info.cfg", files, f"{folder}/Info.cfg")]


def _mnms(images: NDArray[np.int16], labels: NDArray[np.uint8]) -> list[Form]:
    """A cine and its masks as NIfTI-2, and the table."""
    code = f"C{STUDY_NUMBER}"
    image, mask = f"{code}/{code}_sa.nii.gz", f"{code}/{code}_sa_gt.nii"
    table = (
        f"External code,VendorName,Vendor,Centre,ED,ES,Age,Pathology,Sex\n{code},Canon,D,5,{ED},{ES},61,DCM,F\n"
    ).encode()
    files = {image: packed(nifti(images, "2")), mask: nifti(FROM_LV[labels].astype(np.float64), "2"), "info.csv": table}
    names = {"cine.nii.gz": image, "mask.nii": mask, "table": "info.csv"}
    return [Form("mnms", name, files, path) for name, path in names.items()]


def _mnms2(images: NDArray[np.int16], labels: NDArray[np.uint8]) -> list[Form]:
    """Two phases with masks, big endian, and the table."""
    files = {"dataset_information.csv": f"SUBJECT_CODE;DISEASE;VENDOR;FIELD\n{STUDY_NUMBER};HCM;GE;1,5\n".encode()}
    for phase, t in (("ED", ED), ("ES", ES)):
        stem = f"{STUDY_NUMBER}/{STUDY_NUMBER}_SA_{phase}"
        files[f"{stem}.nii.gz"] = packed(nifti(images[t], ">1"))
        files[f"{stem}_gt.nii.gz"] = packed(nifti(FROM_LV[labels[t]], ">1"))
    names = {"phase.nii.gz": f"{stem}.nii.gz", "mask.nii.gz": f"{stem}_gt.nii.gz", "table": "dataset_information.csv"}
    return [Form("mnms2", name, files, path) for name, path in names.items()]
