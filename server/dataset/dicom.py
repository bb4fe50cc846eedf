"""Synthetic cases as DICOM; every file states that it is synthetic.

    <pseudonym>/ed_<slice>.dcm, es_<slice>.dcm      MR Image Storage (PS3.3 A.4, C.8.3), a series per phase
    <pseudonym>/masks/ed.dcm, es.dcm                their masks: see `dicom_segmentation`

A series per phase, because readers such as SimpleITK take a series for one volume: with both phases in one they find
twice the slices at half the distance. The files contain no invented facts: no scanner's name, serial number, date, echo
time or trigger time. `fedcmr-client prepare --format dicom` reads the folder as it is.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from fedcmr.server.dataset.dicom_segmentation import export_masks
from fedcmr.server.dataset.geometry import lps_affine
from fedcmr.server.dataset.making import DRAWN, Making
from fedcmr.shared.case import PHASE_NAMES, Case
from fedcmr.shared.provenance import EXPORTER

TITLES = ("end-diastole", "end-systole")
MAX_STORED = 4095
"""Stored pixel value of a frame's 1.0: 12 bits, as scanners write."""


def export_case(folder: Path, case: Case, making: Making = DRAWN) -> list[Path]:
    """Write `folder/<pseudonym>/{ed,es}_<slice>.dcm` and `masks/{ed,es}.dcm`.

    Args:
        folder: Of all cases' files.
        case: A synthetic case.
        making: How it was made, which its files say.

    Returns:
        The images, ED then ES, slices in the case's order.
    """
    name = case.info.pseudonym
    (folder / name).mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(case.frames.tobytes() + name.encode()).hexdigest()
    levels = ("study", "frame of reference", *(f"series of {phase_name}" for phase_name in PHASE_NAMES))
    uids = {level: generate_uid(entropy_srcs=[content, level]) for level in levels}
    paths: list[Path] = []
    phases: list[list[FileDataset]] = []
    for phase, phase_name in enumerate(PHASE_NAMES):
        phases.append([])
        for index, frame in enumerate(case.frames[phase]):
            dataset = _image(case, making, frame, phase, index, uids)
            dataset.SOPInstanceUID = generate_uid(entropy_srcs=[content, phase_name, str(index)])
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            path = folder / name / f"{phase_name}_{index:02d}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            paths.append(path)
            phases[phase].append(dataset)
    export_masks(folder / name / "masks", case, phases)
    return paths


def _image(
    case: Case, making: Making, frame: NDArray[np.float32], phase: int, index: int, uids: Mapping[str, str]
) -> FileDataset:
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
    dataset.PatientComments = making.comment()

    dataset.StudyInstanceUID = uids["study"]
    dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.StudyID = "1"
    dataset.StudyDescription = "Synthetic cardiac MR"
    dataset.Modality = "MR"
    dataset.SeriesInstanceUID = uids[f"series of {PHASE_NAMES[phase]}"]
    dataset.SeriesNumber = phase + 1
    dataset.SeriesDescription = f"Synthetic {TITLES[phase]}, short axis, style of {case.info.vendor}"
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
    dataset.InstanceNumber = phase * num_slices + index + 1  # counts on: it tells which phase was first
    dataset.AcquisitionNumber = 1
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC"]
    dataset.DerivationDescription = making.derivation()
    dataset.ImageComments = f"{TITLES[phase].capitalize()}; synthetic"
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
