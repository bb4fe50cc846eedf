"""A small study in every form that `prepare` reads: what the fuzzer damages."""

import gzip
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite, uid
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    SegmentationStorage,
)

from fedcmr.shared.case import LV, MYO, RV

NUM_PHASES, NUM_SLICES, SIZE, PIXEL_MM, SLICE_MM = 6, 3, 40, 3.5, 10.0
COLUMN_AXIS, ROW_AXIS = np.array([0.8, 0.0, 0.6]), np.array([0.36, 0.8, -0.48])
NORMAL = np.cross(COLUMN_AXIS, ROW_AXIS)
STUDY_NUMBER = "7391846"
"""Part of every identifier, so that replacing it in the bytes makes another patient's study of the same length."""
UID = f"1.2.826.0.1.3680043.10.{STUDY_NUMBER}"
COMPRESSED = {"rle": RLELossless, "jpeg-ls": JPEGLSLossless, "jpeg-2000": JPEG2000Lossless}


@dataclass(frozen=True)
class Seeds:
    """Files to damage, and the study that they belong to.

    Attributes:
        study: A folder with the study as plain classic files `z-t.dcm`.
        classic: One of its images in several transfer syntaxes, by name.
        whole: Files that are a study by themselves.
        masks: Files with the study's masks.
    """

    study: Path
    classic: dict[str, bytes] = field(default_factory=dict)
    whole: dict[str, bytes] = field(default_factory=dict)
    masks: dict[str, bytes] = field(default_factory=dict)

    def all(self) -> dict[str, bytes]:
        """All of them."""
        return self.classic | self.whole | self.masks


def write_seeds(folder: Path) -> Seeds:
    """Write the study and every form of it."""
    images, labels = beating_heart()
    seeds = Seeds(folder / "study")
    seeds.study.mkdir(parents=True)
    for z, t in np.ndindex(NUM_SLICES, NUM_PHASES):
        _write(seeds.study / f"{z}-{t}.dcm", _classic(images, z, t))
    one = _classic(images, 1, 2)
    for name, syntax in {"explicit": ExplicitVRLittleEndian, "implicit": ImplicitVRLittleEndian}.items():
        seeds.classic[name] = _bytes(folder, one, syntax)
    big = _classic(images, 1, 2)
    big.PixelData = images[2, 1].astype(">i2").tobytes()
    seeds.classic["big endian"] = _bytes(folder, big, ExplicitVRBigEndian)
    for name, syntax in COMPRESSED.items():
        packed = _classic(images, 1, 2)
        packed.compress(syntax, generate_instance_uid=False)
        seeds.classic[name] = _bytes(folder, packed, syntax)
    seeds.whole["enhanced"] = _bytes(folder, _enhanced(images), ExplicitVRLittleEndian)
    seeds.masks["seg.dcm"] = _bytes(folder, _segmentation(labels), ExplicitVRLittleEndian)
    affine = np.diag([-1, -1, 1, 1]) @ np.vstack(
        [
            np.column_stack([COLUMN_AXIS * PIXEL_MM, ROW_AXIS * PIXEL_MM, NORMAL * SLICE_MM, _corner(0)]),
            [0, 0, 0, 1],
        ]
    )
    nibabel.save(nibabel.Nifti1Image(labels.transpose(3, 2, 1, 0), affine), folder / "masks.nii")
    seeds.masks["masks.nii"] = (folder / "masks.nii").read_bytes()
    seeds.masks["masks.nii.gz"] = gzip.compress(seeds.masks["masks.nii"], mtime=0)
    return seeds


def beating_heart() -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Images and labels, shape (T, Z, H, W): a disc in a ring next to a second disc."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    masks = np.zeros((NUM_PHASES, NUM_SLICES, SIZE, SIZE), np.uint8)
    for t, z in np.ndindex(NUM_PHASES, NUM_SLICES):
        squeeze = 0.5 - 0.5 * np.cos(2 * np.pi * t / NUM_PHASES)
        to_lv, to_rv = np.hypot(rows - 20, columns - 22), np.hypot(rows - 14, columns - 14)
        masks[t, z, to_rv < (5 + z / 2) * (1 - 0.25 * squeeze)] = RV
        masks[t, z, to_lv < (5 + z / 2) * (1 - 0.4 * squeeze) + 3] = MYO
        masks[t, z, to_lv < (5 + z / 2) * (1 - 0.4 * squeeze)] = LV
    noise = np.random.default_rng(0).normal(0, 4, masks.shape)
    return (np.array([60, 300, 110, 320])[masks] + noise).round().astype(np.int16), masks


def _corner(z: int) -> NDArray[np.float64]:
    """Centre of a slice's first pixel in LPS millimetres."""
    return z * SLICE_MM * NORMAL - PIXEL_MM * SIZE / 2 * (ROW_AXIS + COLUMN_AXIS)


def _header(sop_class: str, number: int, **elements: object) -> Dataset:
    """What all objects share."""
    dataset = Dataset()
    values = {
        "SOPClassUID": sop_class,
        "SOPInstanceUID": f"{UID}.9.{number}",
        "PatientID": f"seed-{STUDY_NUMBER}",
        "Modality": "MR",
        "StudyInstanceUID": f"{UID}.1",
        "SeriesInstanceUID": f"{UID}.2",
        "SeriesNumber": 7,
        "Manufacturer": "SIEMENS",
        "MagneticFieldStrength": "1.5",
        "Rows": SIZE,
        "Columns": SIZE,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        **elements,
    }
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def _classic(images: NDArray[np.int16], z: int, t: int) -> Dataset:
    """One slice and phase as MR Image Storage."""
    number = 1 + z * NUM_PHASES + t
    dataset = _header(
        MRImageStorage,
        number,
        InstanceNumber=number,
        TriggerTime=f"{t * 120.5:.1f}",
        EchoTime="1.2",
        ImageType=["ORIGINAL", "PRIMARY", "M"],
        PixelSpacing=[PIXEL_MM, PIXEL_MM],
        ImagePositionPatient=[f"{x:.5f}" for x in _corner(z)],
        ImageOrientationPatient=[*COLUMN_AXIS, *ROW_AXIS],
    )
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PixelData = images[t, z].astype("<i2").tobytes()
    return dataset


def _enhanced(images: NDArray[np.int16]) -> Dataset:
    """The study as one Enhanced MR file."""
    places = list(np.ndindex(NUM_SLICES, NUM_PHASES))
    dataset = _header(EnhancedMRImageStorage, 500, NumberOfFrames=len(places))
    kind = _item(FrameType=["ORIGINAL", "PRIMARY", "CINE", "NONE"], ComplexImageComponent="MAGNITUDE")
    dataset.SharedFunctionalGroupsSequence = [
        _item(
            PlaneOrientationSequence=[_item(ImageOrientationPatient=[*COLUMN_AXIS, *ROW_AXIS])],
            PixelMeasuresSequence=[_item(PixelSpacing=[PIXEL_MM, PIXEL_MM])],
            MRImageFrameTypeSequence=[kind],
            MREchoSequence=[_item(EffectiveEchoTime=1.2)],
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        _item(
            PlanePositionSequence=[_item(ImagePositionPatient=[float(x) for x in _corner(z)])],
            CardiacSynchronizationSequence=[_item(NominalCardiacTriggerDelayTime=t * 120.5)],
            FrameContentSequence=[_item(TemporalPositionIndex=t + 1, InStackPositionNumber=z + 1)],
        )
        for z, t in places
    ]
    dataset.PixelData = np.stack([images[t, z] for z, t in places]).astype("<i2").tobytes()
    return dataset


def _segmentation(labels: NDArray[np.uint8]) -> Dataset:
    """The masks as a binary DICOM segmentation of the classic images."""
    coded = {LV: codes.SCT.LeftVentricle, MYO: codes.SCT.LeftVentricleMyocardium, RV: codes.SCT.RightVentricle}
    dataset = _header(
        SegmentationStorage,
        600,
        Modality="SEG",
        SegmentationType="BINARY",
        BitsAllocated=1,
        BitsStored=1,
        HighBit=0,
        PixelRepresentation=0,
        SeriesInstanceUID=f"{UID}.3",
        ReferencedSeriesSequence=[_item(SeriesInstanceUID=f"{UID}.2")],
    )
    dataset.SegmentSequence = [
        _item(
            SegmentNumber=label,
            SegmentLabel=f"segment {label}",
            SegmentedPropertyTypeCodeSequence=[
                _item(CodeValue=code.value, CodingSchemeDesignator=code.scheme_designator, CodeMeaning=code.meaning)
            ],
        )
        for label, code in coded.items()
    ]
    dataset.SharedFunctionalGroupsSequence = [
        _item(
            PlaneOrientationSequence=[_item(ImageOrientationPatient=[*COLUMN_AXIS, *ROW_AXIS])],
            PixelMeasuresSequence=[_item(PixelSpacing=[PIXEL_MM, PIXEL_MM])],
        )
    ]
    frames, planes = [], []
    for z, t in np.ndindex(NUM_SLICES, NUM_PHASES):
        source = _item(
            ReferencedSOPClassUID=MRImageStorage, ReferencedSOPInstanceUID=f"{UID}.9.{1 + z * NUM_PHASES + t}"
        )
        for label in coded:
            frames.append(
                _item(
                    DerivationImageSequence=[_item(SourceImageSequence=[source])],
                    PlanePositionSequence=[_item(ImagePositionPatient=[float(x) for x in _corner(z)])],
                    SegmentIdentificationSequence=[_item(ReferencedSegmentNumber=label)],
                )
            )
            planes.append(labels[t, z] == label)
    dataset.NumberOfFrames = len(frames)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.PixelData = np.packbits(np.stack(planes), bitorder="little").tobytes()
    return dataset


def _item(**elements: object) -> Dataset:
    """An item of a sequence."""
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item


def _bytes(folder: Path, dataset: Dataset, syntax: str) -> bytes:
    """A file's content in a transfer syntax."""
    path = folder / "one.dcm"
    _write(path, dataset, syntax)
    content = path.read_bytes()
    path.unlink()
    return content


def _write(path: Path, dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> None:
    """Write a file with its meta information."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dcmwrite(path, dataset, enforce_file_format=True)
