"""Synthetic cases as DICOM; every file states that it is synthetic.

MR Image Storage (PS3.3 A.4, C.8.3), one file per slice and phase, one series per case, and next to them the masks as
NIfTI, as `fedcmr-client prepare --format dicom` reads them. The files contain no invented facts: no scanner's name,
serial number, date, echo time or trigger time.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from fedcmr.server.dataset.geometry import lps_affine
from fedcmr.server.dataset.nifti import write_nifti
from fedcmr.shared.case import Case
from fedcmr.shared.file_names import MASKS_NAME
from fedcmr.shared.provenance import EXPORTER

MAX_STORED = 4095
"""Stored pixel value of a frame's 1.0: 12 bits, as scanners write."""


def export_case(folder: Path, case: Case) -> list[Path]:
    """Write `folder/<pseudonym>/{ed,es}_<slice>.dcm` and `masks.nii.gz`, axes (x, y, z, phase).

    Returns:
        The DICOM files, ED then ES, slices in the case's order.
    """
    name = case.info.pseudonym
    (folder / name).mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(case.frames.tobytes() + name.encode()).hexdigest()
    uids = {level: generate_uid(entropy_srcs=[content, level]) for level in ("study", "series", "frame of reference")}
    paths = []
    for phase, phase_name in enumerate(("ed", "es")):
        for index, frame in enumerate(case.frames[phase]):
            dataset = _image(case, frame, phase, index, uids)
            dataset.SOPInstanceUID = generate_uid(entropy_srcs=[content, phase_name, str(index)])
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            path = folder / name / f"{phase_name}_{index:02d}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            paths.append(path)
    write_nifti(folder / name / MASKS_NAME, case.masks, case)
    return paths


def _image(case: Case, frame: NDArray[np.float32], phase: int, index: int, uids: Mapping[str, str]) -> FileDataset:
    """One slice of one phase; attributes in the order of PS3.3's modules."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)

    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = MRImageStorage
    dataset.SyntheticData = "YES"  # (0008,001C), SOP Common, PS3.3 C.12.1

    dataset.PatientName = f"SYNTHETIC^{case.info.pseudonym}"
    dataset.PatientID = case.info.pseudonym
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.PatientComments = "Synthetic image, not a person"

    dataset.StudyInstanceUID = uids["study"]
    dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.StudyID = "1"
    dataset.StudyDescription = "Synthetic cardiac MR"
    dataset.Modality = "MR"
    dataset.SeriesInstanceUID = uids["series"]
    dataset.SeriesNumber = 1
    dataset.SeriesDescription = f"Synthetic short axis, style of {case.info.vendor}"
    dataset.BodyPartExamined = "HEART"
    dataset.PatientPosition = "HFS"

    dataset.FrameOfReferenceUID = uids["frame of reference"]
    dataset.PositionReferenceIndicator = ""
    # The device is this software; the vendor whose style was requested is in the series' description.
    dataset.Manufacturer = EXPORTER
    dataset.ManufacturerModelName = "synthetic image generator"
    dataset.SoftwareVersions = version("fedcmr")

    num_slices = case.frames.shape[1]
    dataset.ContentDate = dataset.ContentTime = ""  # the series is ordered in time (C.7.6.1), at no time of any day
    dataset.InstanceNumber = phase * num_slices + index + 1
    dataset.AcquisitionNumber = 1
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC"]
    dataset.DerivationDescription = "Rendered by a generative model over a parametric heart"
    dataset.ImageComments = f"{('End-diastole', 'End-systole')[phase]}; synthetic"
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"

    affine = lps_affine(case)
    column_mm, row_mm, slice_mm = np.linalg.norm(affine[:3, :3], axis=0)
    dataset.PixelSpacing = _decimals([row_mm, column_mm])
    dataset.SliceThickness = dataset.SpacingBetweenSlices = _decimals([slice_mm])[0]
    dataset.ImageOrientationPatient = _decimals([*affine[:3, 0] / column_mm, *affine[:3, 1] / row_mm])
    dataset.ImagePositionPatient = _decimals(affine[:3] @ [0, 0, index, 1])
    dataset.TemporalPositionIdentifier = phase + 1
    dataset.NumberOfTemporalPositions = 2
    dataset.CardiacNumberOfImages = 2  # end-diastole and end-systole only

    dataset.ScanningSequence = "RM"  # research mode: none of the defined sequences took place
    dataset.SequenceVariant = "NONE"
    dataset.ScanOptions = dataset.MRAcquisitionType = ""
    dataset.RepetitionTime = dataset.EchoTime = dataset.EchoTrainLength = None

    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = frame.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = MAX_STORED / 2, MAX_STORED
    dataset.PixelData = np.round(frame * MAX_STORED).astype("<u2").tobytes()
    return dataset


def _decimals(values: Sequence[float] | NDArray[np.float64]) -> list[str]:
    """Decimal strings of at most 16 characters (PS3.5, 6.2): positions to a nanometre, direction cosines to 1e-9."""
    return [f"{value:.9f}" if abs(value) < 1 else f"{value:.6f}" for value in values]
