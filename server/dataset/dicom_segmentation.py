"""The masks of a synthetic case as DICOM segmentations (PS3.3 A.51, C.8.20), one for each phase, written by highdicom.

Each refers to the images of its phase frame by frame, so that 3D Slicer and OHIF lay it over them.
"""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import highdicom
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from fedcmr.shared.case import LV, MYO, PHASE_NAMES, RV, Case
from fedcmr.shared.provenance import EXPORTER

NO_DATE, NO_TIME = "19000101", "000000"
"""Where the standard wants a date: a dummy, as PS3.15 E.1 has them, so that equal cases make equal files."""
NO_NUMBER = "none"
"""DeviceSerialNumber (0018,1000), which a segmentation must have: no device made it."""
SEGMENTS = {
    LV: ("Left ventricle", codes.SCT.LeftVentricle, (219, 93, 70)),
    MYO: ("LV myocardium", codes.SCT.LeftVentricleMyocardium, (86, 180, 233)),
    RV: ("Right ventricle", codes.SCT.RightVentricle, (240, 228, 66)),
}
"""Label, coded property type (PS3.16 CID 7166: SNOMED CT) and colour (sRGB), in the order of the segments' numbers."""


def export_masks(folder: Path, case: Case, images: Sequence[Sequence[Dataset]]) -> list[Path]:
    """Write `folder/ed.dcm` and `folder/es.dcm`.

    Args:
        folder: The folder, which is made.
        case: Whose masks they are.
        images: Shape (2, Z), the images of both phases as they were written.

    Returns:
        The files; of a phase without any label there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(case.masks.tobytes() + case.info.pseudonym.encode()).hexdigest()
    paths = []
    for phase, name in enumerate(PHASE_NAMES):
        known = [label for label in SEGMENTS if (case.masks[phase] == label).any()]
        if not known:
            continue
        dataset = highdicom.seg.Segmentation(
            source_images=list(images[phase]),
            pixel_array=_planes(case, phase, known),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_described(number, label) for number, label in enumerate(known, start=1)],
            series_instance_uid=generate_uid(entropy_srcs=[content, name, "series"]),
            series_number=len(PHASE_NAMES) + phase + 1,
            sop_instance_uid=generate_uid(entropy_srcs=[content, name, "instance"]),
            instance_number=1,
            manufacturer=EXPORTER,
            manufacturer_model_name="synthetic image generator",
            software_versions=version("fedcmr"),
            device_serial_number=NO_NUMBER,
            content_label="SYNTHETIC",
            content_description="Masks that the synthetic image was rendered over",
            series_description=f"Masks, {name.upper()}",
            content_date=NO_DATE,
            content_time=NO_TIME,
        )
        _take_out_what_differs(dataset, generate_uid(entropy_srcs=[content, name, "dimensions"]))
        dataset.SyntheticData = "YES"  # (0008,001C), SOP Common, PS3.3 C.12.1
        paths.append(folder / f"{name}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def _planes(case: Case, phase: int, labels: Sequence[int]) -> NDArray[np.uint8]:
    """One plane per segment, shape (Z, H, W, segments)."""
    return np.stack([case.masks[phase] == label for label in labels], axis=-1).astype(np.uint8)


def _described(number: int, label: int) -> highdicom.seg.SegmentDescription:
    """A segment's label and codes; a program made it, and no algorithm read it off the image."""
    name, code, colour = SEGMENTS[label]
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=code,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="parametric heart", family=codes.DCM.DeformableModels, version=version("fedcmr")
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*colour),
    )


def _take_out_what_differs(dataset: Dataset, uid: str) -> None:
    """Remove the time of writing, and give the dimensions a UID that follows from the case, not a random one."""
    del dataset.InstanceCreationDate, dataset.InstanceCreationTime
    for item in dataset.ContributingEquipmentSequence:
        if "ContributionDateTime" in item:
            del item.ContributionDateTime
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid
