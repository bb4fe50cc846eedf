from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from fedcmr.shared.case import LV
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import MASKS_NAME
from fedcmr.simulations.hospital import POPULATIONS, write_hospital
from fedcmr.simulations.scanners.acquisition import SCANNERS

NUM_SLICES, NUM_PHASES = 6, 8
TYPE_1 = {
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "ImageType",
    "ScanningSequence",
    "SequenceVariant",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelData",
}
TYPE_2 = {
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "SeriesNumber",
    "InstanceNumber",
    "PositionReferenceIndicator",
    "Manufacturer",
    "ScanOptions",
    "MRAcquisitionType",
    "RepetitionTime",
    "EchoTime",
    "EchoTrainLength",
    "SliceThickness",
    "TriggerTime",
}


def write(folder: Path, vendor: str, num_patients: int = 1, seed: int = 0, num_processes: int = 1) -> None:
    write_hospital(folder, vendor, num_patients, NUM_SLICES, NUM_PHASES, seed, "study", num_processes)


def read(study: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(study.rglob("*.dcm"))]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hospitals")
    for vendor in SCANNERS:
        write(root / vendor, vendor)
    return {vendor: root / vendor / "study-0000" for vendor in SCANNERS}


@pytest.mark.parametrize("vendor", SCANNERS)
def test_every_slice_and_phase_is_a_complete_mr_image(hospitals, vendor):
    images = read(hospitals[vendor])
    assert len(images) == NUM_SLICES * NUM_PHASES
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    assert sorted(image.InstanceNumber for image in images) == list(range(1, len(images) + 1))
    for image in images:
        assert image.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
        assert image.SOPClassUID == image.file_meta.MediaStorageSOPClassUID == pydicom.uid.MRImageStorage
        assert image.Manufacturer == SCANNERS[vendor].manufacturer
        assert all(image.get(name) not in (None, "") for name in TYPE_1)
        assert all(name in image for name in TYPE_2)
        assert image.pixel_array.shape == SCANNERS[vendor].shape
        assert image.pixel_array.max() < 2**image.BitsStored
        assert image.SOPInstanceUID.is_valid


@pytest.mark.parametrize("vendor", SCANNERS)
def test_positions_and_trigger_times_form_a_grid(hospitals, vendor):
    images = read(hospitals[vendor])
    places = {(tuple(image.ImagePositionPatient), float(image.TriggerTime)) for image in images}
    assert len(places) == NUM_SLICES * NUM_PHASES
    assert len({position for position, _ in places}) == NUM_SLICES
    times = sorted({time for _, time in places})
    assert len(times) == NUM_PHASES
    assert times[0] == 0 and times[-1] < images[0].NominalInterval
    by_instance = sorted(images, key=lambda image: image.InstanceNumber)
    same_slice = by_instance[0].ImagePositionPatient == by_instance[1].ImagePositionPatient
    assert same_slice != SCANNERS[vendor].phase_major


@pytest.mark.parametrize("vendor", SCANNERS)
def test_masks_lie_where_the_images_say(hospitals, vendor):
    images = read(hospitals[vendor])
    nifti = nib.load(hospitals[vendor] / MASKS_NAME)
    masks = np.asarray(nifti.dataobj)
    rows, columns = SCANNERS[vendor].shape
    assert masks.shape == (columns, rows, NUM_SLICES, NUM_PHASES) and masks.dtype == np.uint8
    times = sorted({float(image.TriggerTime) for image in images})
    contrasts = []
    for image in images:
        across, down = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
        first = np.array(image.ImagePositionPatient, float)
        row, column = rows - 3, 5
        lps = first + image.PixelSpacing[0] * row * down + image.PixelSpacing[1] * column * across
        index = np.linalg.inv(nifti.affine) @ [-lps[0], -lps[1], lps[2], 1]
        np.testing.assert_allclose(index[:2], [column, row], atol=1e-3)
        z = round(index[2])
        assert index[2] == pytest.approx(z, abs=1e-3)
        mask = masks[:, :, z, times.index(float(image.TriggerTime))].T
        if (mask == LV).sum() > 200:
            contrasts.append(image.pixel_array[mask == LV].mean() / image.pixel_array[mask == 2].mean())
    assert min(contrasts) > 1.5  # the mask of another slice, phase or turn would not fit every image


def test_identity_is_invented_and_present(hospitals):
    names = set()
    for study in hospitals.values():
        image = read(study)[0]
        names.add(str(image.PatientName))
        assert image.PatientID.startswith("study-")
        assert len(image.PatientBirthDate) == 8
        assert 17 <= int(image.StudyDate[:4]) - int(image.PatientBirthDate[:4]) <= 90
    assert all("^" in name for name in names)


def test_same_seed_gives_the_same_files_with_any_number_of_processes(hospitals, tmp_path):
    write(tmp_path, "GE", num_patients=2, num_processes=2)
    ours, theirs = read(tmp_path / "study-0000"), read(hospitals["GE"])
    for a, b in zip(ours, theirs, strict=True):
        assert a == b
    assert (tmp_path / "study-0001" / MASKS_NAME).is_file()
    assert not np.array_equal(ours[0].pixel_array, read(tmp_path / "study-0001")[0].pixel_array)


def test_another_seed_gives_other_pixels(hospitals, tmp_path):
    write(tmp_path, "GE", seed=1)
    assert not np.array_equal(read(tmp_path / "study-0000")[0].pixel_array, read(hospitals["GE"])[0].pixel_array)


def test_restart_keeps_finished_studies_and_redoes_unfinished_ones(tmp_path):
    kept, left = tmp_path / "study-0000", tmp_path / "study-0001.partial"
    kept.mkdir()
    (kept / "finished").touch()
    left.mkdir()
    (left / "rubbish").touch()
    write(tmp_path, "GE", num_patients=2)
    assert [path.name for path in kept.iterdir()] == ["finished"]
    assert not left.exists()
    assert len(read(tmp_path / "study-0001")) == NUM_SLICES * NUM_PHASES
    assert not list((tmp_path / "study-0001").rglob("rubbish"))


def test_vendor_without_a_scanner_is_refused(tmp_path):
    with pytest.raises(UserError, match="Canon"):
        write(tmp_path, "Canon")
    assert not list(tmp_path.iterdir())


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="taken"):
        write(tmp_path / "taken", "GE")


def test_every_scanner_has_a_population_of_its_own():
    assert POPULATIONS.keys() == SCANNERS.keys()
    assert len({tuple(population.shares.values()) for population in POPULATIONS.values()}) == len(POPULATIONS)


def test_a_full_disk_is_one_short_line(tmp_path, monkeypatch):
    """pydicom raises an OSError without a number, whose text holds a traceback."""

    def full(*_):
        raise OSError("With tag (7FE0,0010) got exception: No space left\nTraceback (most recent call last): ...")

    monkeypatch.setattr("fedcmr.simulations.hospital.write_dicom", full)
    with pytest.raises(UserError, match="is the disk full") as caught:
        write_hospital(tmp_path, "GE", 1, 6, 8, seed=0, prefix="full")
    assert "Traceback" not in str(caught.value)
