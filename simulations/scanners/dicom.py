"""A simulated scan as classic MR Image Storage, one file per slice and phase, with its vendor's habits.

Modelled: all type 1 and 2 attributes of the MR Image IOD (PS3.3, A.4), the vendor's names, order of instances, file
names, stored bits and number formats, and an invented identity for de-identification to remove.
Not modelled: private elements, Enhanced multi-frame objects, compression, the irregular exports of real archives.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from fedcmr.simulations.patients.heart import Patient
from fedcmr.simulations.scanners.acquisition import Acquisition, Scanner

HYDROGEN_MHZ_PER_T = 42.577
FAMILY_NAMES = ("Phantom", "Invented", "Testperson", "Mockup", "Nobody", "Specimen", "Fabricated", "Simulacra")
GIVEN_NAMES = {"F": ("Ada", "Berta", "Clara", "Dora", "Emma"), "M": ("Aldo", "Bruno", "Carl", "Dario", "Emil")}


@dataclass(frozen=True)
class Habits:
    """How a vendor writes a classic MR image.

    Attributes:
        image_type: ImageType (0008,0008); likewise `scanning_sequence`, `sequence_variant`, `scan_options`.
        bits_stored: 12 or 16.
        segment_lines: k-space lines per heartbeat and phase; RepetitionTime holds their sum (Siemens) or one of them.
        trigger_decimals: Decimal places of TriggerTime.
        series_number: SeriesNumber of the cine stack.
        file_name: Path inside the study, of `series` and `instance`.
    """

    image_type: list[str]
    scanning_sequence: str | list[str]
    sequence_variant: str | list[str]
    scan_options: str | list[str]
    bits_stored: int
    segment_lines: int
    trigger_decimals: int
    series_number: int
    file_name: str


HABITS = {
    "SIEMENS": Habits(
        ["ORIGINAL", "PRIMARY", "M", "RETRO", "NORM", "DIS2D"],
        "GR",
        "SK",
        ["CG", "PER"],
        12,
        15,
        1,
        12,
        "series{series:04d}/IM-{series:04d}-{instance:04d}.dcm",
    ),
    "Philips Medical Systems": Habits(
        ["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"],
        "GR",
        ["SS", "SK"],
        "CG",
        12,
        1,
        2,
        701,
        "DICOM/IM_{instance:05d}.dcm",
    ),
    "GE MEDICAL SYSTEMS": Habits(
        ["ORIGINAL", "PRIMARY", "OTHER"],
        "GR",
        ["SS", "SK"],
        ["FAST_GEMS", "CG"],
        16,
        1,
        0,
        6,
        "s{series:05d}/i{instance:07d}.MRDC.dcm",
    ),
}


def write_dicom(
    folder: Path, patient: Patient, scanner: Scanner, scan: Acquisition, identifier: str, rng: np.random.Generator
) -> None:
    """Write a study's files under `folder`.

    Args:
        folder: The study's folder.
        patient: Age, sex and size go into the header.
        scanner: Names and order of the vendor.
        scan: What was acquired.
        identifier: Invented PatientID; it also seeds the UIDs, so that the same study gets the same ones.
        rng: Draws the invented name and dates.
    """
    habits = HABITS[scanner.manufacturer]
    header = _header(patient, scanner, scan, habits, identifier, rng)
    num_phases, num_slices = scan.frames.shape[:2]
    order = np.arange(num_slices)[::-1] if scanner.apex_first else np.arange(num_slices)
    normal = np.cross(scan.stack.row_direction, scan.stack.column_direction)
    (folder / habits.file_name.format(series=habits.series_number, instance=1)).parent.mkdir(parents=True)
    for place, z in enumerate(order):
        position = scan.stack.first_pixel_mm[z]
        header.ImagePositionPatient = _decimals(position)
        header.SliceLocation = _decimals([position @ normal])[0]
        for phase in range(num_phases):
            instance = 1 + (phase * num_slices + place if scanner.phase_major else place * num_phases + phase)
            header.SOPInstanceUID = generate_uid(entropy_srcs=[identifier, "image", str(instance)])
            header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
            header.InstanceNumber = instance
            header.AcquisitionNumber = int(place + 1)
            header.TriggerTime = f"{scan.trigger_time_ms[phase]:.{habits.trigger_decimals}f}"
            if scanner.phase_major:
                header.TemporalPositionIdentifier = phase + 1
            pixels = scan.frames[phase, z]
            header.SmallestImagePixelValue, header.LargestImagePixelValue = int(pixels.min()), int(pixels.max())
            header.PixelData = pixels.astype("<u2", copy=False).tobytes()
            path = folder / habits.file_name.format(series=habits.series_number, instance=instance)
            dcmwrite(path, header, enforce_file_format=True)


def _header(
    patient: Patient, scanner: Scanner, scan: Acquisition, habits: Habits, identifier: str, rng: np.random.Generator
) -> Dataset:
    """What all instances of a study share."""
    stack = scan.stack
    year, month, day = int(rng.integers(2016, 2023)), int(rng.integers(1, 13)), int(rng.integers(1, 29))
    date = f"{year:04d}{month:02d}{day:02d}"
    time = f"{rng.integers(8, 18):02d}{rng.integers(60):02d}{rng.integers(60):02d}"
    window = int(np.percentile(scan.frames[0], 99))

    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.MediaStorageSOPClassUID = MRImageStorage
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # Patient, Study (PS3.3, C.7.1 and C.7.2)
    header.SpecificCharacterSet = "ISO_IR 100"
    header.PatientName = f"{rng.choice(FAMILY_NAMES)}^{rng.choice(GIVEN_NAMES[patient.sex])}"
    header.PatientID = identifier
    header.PatientBirthDate = f"{year - patient.age_years - 1:04d}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
    header.PatientSex = patient.sex
    header.PatientAge = f"{patient.age_years:03d}Y"
    header.PatientSize = f"{patient.height_m:.2f}"
    header.PatientWeight = f"{patient.weight_kg:.1f}"
    header.StudyInstanceUID = generate_uid(entropy_srcs=[identifier, "study"])
    header.StudyDate = header.SeriesDate = header.AcquisitionDate = header.ContentDate = date
    header.StudyTime = header.SeriesTime = header.AcquisitionTime = header.ContentTime = time
    header.StudyID = str(rng.integers(1000, 9999))
    header.AccessionNumber = f"A{rng.integers(10**6, 10**7)}"
    header.ReferringPhysicianName = "Invented^Physician"
    header.StudyDescription = "Cardiac MRI (simulated)"
    # Series, Frame of Reference, Equipment (C.7.3, C.7.4, C.7.5)
    header.Modality = "MR"
    header.SeriesInstanceUID = generate_uid(entropy_srcs=[identifier, "series"])
    header.SeriesNumber = habits.series_number
    header.SeriesDescription = header.ProtocolName = scanner.series_description
    header.BodyPartExamined = "HEART"
    header.PatientPosition = "HFS"
    header.FrameOfReferenceUID = generate_uid(entropy_srcs=[identifier, "frame of reference"])
    header.PositionReferenceIndicator = ""
    header.Manufacturer = scanner.manufacturer
    header.ManufacturerModelName = scanner.model
    header.SoftwareVersions = scanner.software
    header.InstitutionName = "Simulated hospital"
    header.DeviceSerialNumber = "00000"
    # Image plane and MR image (C.7.6.2, C.8.3.1)
    header.SOPClassUID = MRImageStorage
    header.ImageType = habits.image_type
    header.PixelSpacing = _decimals([stack.pixel_mm] * 2)
    header.ImageOrientationPatient = _decimals([*stack.row_direction, *stack.column_direction])
    header.SliceThickness = _decimals([stack.thickness_mm])[0]
    header.SpacingBetweenSlices = _decimals([stack.spacing_mm])[0]
    header.ScanningSequence = habits.scanning_sequence
    header.SequenceVariant = habits.sequence_variant
    header.ScanOptions = habits.scan_options
    header.SequenceName = scanner.sequence_name
    header.MRAcquisitionType = "2D"
    header.RepetitionTime = f"{scan.echo_spacing_ms * habits.segment_lines:.3f}"
    header.EchoTime = f"{scan.echo_spacing_ms / 2:.3f}"
    header.EchoTrainLength = 1
    header.NumberOfAverages = 1
    header.FlipAngle = f"{scan.flip_angle_deg:.0f}"
    header.MagneticFieldStrength = f"{scanner.field_strength_t:g}"
    header.ImagingFrequency = f"{scanner.field_strength_t * HYDROGEN_MHZ_PER_T:.3f}"
    header.ImagedNucleus = "1H"
    header.ReceiveCoilName = scanner.receive_coil
    rows, columns = scanner.shape
    header.AcquisitionMatrix = [0, round(columns * scanner.sampled[1]), round(rows * scanner.sampled[0]), 0]
    header.InPlanePhaseEncodingDirection = "COL"
    header.NominalInterval = round(scan.interval_ms)
    header.HeartRate = round(patient.heart_rate_bpm)
    header.CardiacNumberOfImages = len(scan.frames)
    if scanner.phase_major:
        header.NumberOfTemporalPositions = len(scan.frames)
    # Image pixel, VOI LUT (C.7.6.3, C.11.2)
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.Rows, header.Columns = rows, columns
    header.BitsAllocated = 16
    header.BitsStored, header.HighBit = habits.bits_stored, habits.bits_stored - 1
    header.PixelRepresentation = 0
    header.WindowCenter, header.WindowWidth = window // 2, window
    header.LossyImageCompression = "00"
    return header


def _decimals(values: NDArray[np.float64] | list[float]) -> list[str]:
    """Decimal strings of at most 16 characters (PS3.5, 6.2): positions to a nanometre, direction cosines to 1e-9."""
    return [f"{value:.9f}" if abs(value) < 1 else f"{value:.6f}" for value in values]
