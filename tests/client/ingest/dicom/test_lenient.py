"""What the standard, or common sense, asks of a reader: forms that scanners and archives write and others read."""

import gzip

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.uid import JPEG2000Lossless, RLELossless

from fedcmr.client.ingest.dicom.copies import without_copies
from fedcmr.client.ingest.dicom.pixels import read_pixels
from fedcmr.client.ingest.dicom.reader import find_dicom, read_file
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from tests.client.ingest.dicom_files import (
    NUM_PHASES,
    NUM_SLICES,
    beating_heart,
    image_dataset,
    write_enhanced,
    write_image,
    write_study,
)

PIXELS = np.arange(12 * 10, dtype=np.int16).reshape(12, 10)


# without the preamble


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_a_data_set_without_its_preamble_is_read(tmp_path, implicit, little, meta):
    dataset = image_dataset(PIXELS)
    if meta:
        syntax = {(True, True): "", (False, True): ".1", (False, False): ".2"}[implicit, little]
        dataset.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2{syntax}"
    else:
        del dataset.file_meta
    if not little:
        dataset.PixelData = PIXELS.astype(">i2").tobytes()
        dataset["PixelData"].VR = "OW"
    pydicom.dcmwrite(tmp_path / "a", dataset, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
    (tmp_path / "marked").write_bytes(b"DICM" + (tmp_path / "a").read_bytes())
    for name in ("a", "marked") if meta else ("a",):
        assert (tmp_path / name).read_bytes()[128:132] != b"DICM"
        (header,) = read_file(tmp_path / name)
        assert np.array_equal(read_pixels(header), PIXELS)


@pytest.mark.parametrize("content", [b"\x08\0\x05\0CS\x0a\0ISO_IR 100", b"\2\0\0\0" + bytes(40), b"\x08\0\x16\0" * 90])
def test_what_merely_begins_like_a_data_set_is_none(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(Unusable, match="not-dicom"):
        read_file(tmp_path / "a")


@pytest.mark.parametrize("mark", [b"PK\3\4", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\7", b"\x1f\x8b\x08"])
def test_an_archive_is_called_one_whatever_its_name(tmp_path, mark):
    (tmp_path / "1234567").write_bytes(mark + bytes(300))
    with pytest.raises(Unusable, match="archive"):
        read_file(tmp_path / "1234567")


# pixels


@pytest.mark.parametrize("num_bytes", [1, 2, 20, 238])
def test_padding_after_the_pixels_is_passed_over(tmp_path, num_bytes):
    write_image(tmp_path / "a", PIXELS, PixelData=PIXELS.tobytes() + bytes(num_bytes))
    (header,) = read_file(tmp_path / "a")
    assert np.array_equal(read_pixels(header), PIXELS)


def test_a_second_frame_after_the_pixels_is_no_padding(tmp_path):
    write_image(tmp_path / "a", PIXELS, PixelData=PIXELS.tobytes() * 2)
    with pytest.raises(Unusable, match="unreadable-pixels"):
        read_file(tmp_path / "a")


def test_no_frames_means_one(tmp_path):
    write_image(tmp_path / "a", PIXELS, NumberOfFrames=0)
    (header,) = read_file(tmp_path / "a")
    assert np.array_equal(read_pixels(header), PIXELS)


@pytest.mark.parametrize("has_table", [True, False])
def test_frames_of_several_fragments_are_told_apart(tmp_path, has_table):
    def compressed(dataset: Dataset, _: object) -> None:
        settings = {
            "rows": dataset.Rows,
            "columns": dataset.Columns,
            "samples_per_pixel": 1,
            "number_of_frames": 1,
            "bits_allocated": 16,
            "bits_stored": 16,
            "pixel_representation": 1,
            "photometric_interpretation": "MONOCHROME2",
        }
        size = dataset.Rows * dataset.Columns * 2
        frames = [dataset.PixelData[at : at + size] for at in range(0, len(dataset.PixelData), size)]
        encoder = get_encoder(JPEG2000Lossless)
        streams = [
            encoder.encode(np.frombuffer(one, "<i2").reshape(dataset.Rows, dataset.Columns), **settings)
            for one in frames
        ]
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset.PixelData = encapsulate(streams, fragments_per_frame=3, has_bot=has_table)
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True

    write_enhanced(tmp_path / "a.dcm", change=compressed)
    images, _ = beating_heart()
    headers = read_file(tmp_path / "a.dcm")
    for (z, t), header in zip(np.ndindex(NUM_SLICES, NUM_PHASES), headers, strict=True):
        if z == t % NUM_SLICES:
            assert np.array_equal(read_pixels(header), images[t, z])


# Enhanced files of one phase


def write_enhanced_files(folder, places_of_file, **elements) -> None:
    """The study as several Enhanced files without trigger delays; elements are functions of the file's number."""
    for number, places in enumerate(places_of_file):

        def change(dataset, frames, places=places, number=number) -> None:
            for name, value in elements.items():
                if name == "TemporalPositionIndex":
                    for frame, (_, t) in zip(frames, places, strict=True):
                        frame.FrameContentSequence[0].TemporalPositionIndex = value(number, t)
                else:
                    setattr(dataset, name, value(number))
            for frame in frames:
                del frame.CardiacSynchronizationSequence
                if "TemporalPositionIndex" not in elements:
                    del frame.FrameContentSequence[0].TemporalPositionIndex
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.9.{number}"

        write_enhanced(folder / f"{number:03d}.dcm", order=places, change=change)


IMAGE_BY_IMAGE = [[place] for place in np.ndindex(NUM_SLICES, NUM_PHASES)]
PHASE_BY_PHASE = [[(z, t) for z in range(NUM_SLICES)] for t in range(NUM_PHASES)]


@pytest.mark.slow
@pytest.mark.parametrize("places", [IMAGE_BY_IMAGE, PHASE_BY_PHASE], ids=["a file per image", "a file per volume"])
@pytest.mark.parametrize(
    "elements",
    [
        {"TemporalPositionIndex": lambda number, t: t + 1},
        {"InstanceNumber": lambda number: number + 1},
        {"TemporalPositionIndex": lambda number, t: 1, "InstanceNumber": lambda number: number + 1},
    ],
    ids=["temporal position", "the files' numbers", "positions that say nothing"],
)
def test_enhanced_files_of_one_phase_each_are_put_in_order(tmp_path, places, elements):
    write_enhanced_files(tmp_path, places, **elements)
    (study,) = find_dicom(tmp_path).studies
    assert np.array_equal(study.read().images, beating_heart()[0])


def test_a_single_frame_has_the_number_that_the_standard_gives_it(tmp_path):
    write_enhanced_files(tmp_path, [[(0, 3)]], TemporalPositionIndex=lambda number, t: t + 1)
    (header,) = read_file(tmp_path / "000.dcm")
    assert header.InstanceNumber == 4


# masks


@pytest.mark.parametrize("names", [["masks.nii"], ["Masks.NII.GZ"], ["masks.nii", "masks.nii.gz"]], ids=str)
def test_masks_may_be_unpacked_or_in_capitals(tmp_path, names):
    write_study(tmp_path)
    packed = (tmp_path / "masks.nii.gz").read_bytes()
    (tmp_path / "masks.nii.gz").unlink()
    for name in names:
        (tmp_path / name).write_bytes(packed if name.lower().endswith(".gz") else gzip.decompress(packed))
    found = find_dicom(tmp_path)
    assert found.left_out == ({"duplicate": 1} if len(names) > 1 else {})
    assert np.array_equal(found.studies[0].read().masks, beating_heart()[1])


# copies


def compress_all(folder) -> None:
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.save_as(path)


def rename_all(folder) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.77.{number}"
        dataset.SeriesInstanceUID = "1.2.3.78"
        dataset.save_as(path)


def reword_all(folder) -> None:
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.InstitutionName, dataset.TriggerTime = "another", f"{float(dataset.TriggerTime) + 0.01:.2f}"
        dataset.save_as(path)


@pytest.mark.parametrize("change", [compress_all, rename_all, reword_all])
def test_an_image_is_a_copy_by_pixels_and_place_whatever_its_bytes_and_uid(tmp_path, change):
    write_study(tmp_path / "first", masks=False)
    write_study(tmp_path / "second", masks=False)
    change(tmp_path / "second")
    found = find_dicom(tmp_path)
    (study,) = found.studies
    assert found.left_out == {"duplicate": NUM_SLICES * NUM_PHASES}
    assert np.array_equal(study.read().images, beating_heart()[0])


def test_one_uid_for_all_images_is_no_copy(tmp_path):
    write_study(tmp_path, masks=False, SOPInstanceUID="1.2.3.4")
    found = find_dicom(tmp_path)
    assert (found.refused, found.left_out) == ({}, {})
    assert np.array_equal(found.studies[0].read().images, beating_heart()[0])


def test_other_pixels_of_one_uid_place_and_time_refuse_the_study_and_others_go_on(tmp_path):
    write_study(tmp_path / "a", masks=False)
    write_study(tmp_path / "b", masks=False, study="1.2.9", patient="ID-2")
    path = tmp_path / "a" / "037.dcm"
    dataset = pydicom.dcmread(path)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(tmp_path / "a" / "other.dcm")
    found = find_dicom(tmp_path)
    assert (found.refused, found.left_out, len(found.studies)) == ({"conflicting-copies": 1}, {}, 1)


def test_repeats_with_other_pixels_stay_and_copies_of_a_multi_frame_file_count_once(tmp_path):
    images, _ = beating_heart()
    for name, pixels in (("a", images[0, 0]), ("b", images[1, 0])):
        write_image(tmp_path / name, pixels, SOPInstanceUID=f"1.2.{ord(name)}", InstanceNumber=1, TriggerTime=0)
    write_enhanced(tmp_path / "c")
    write_enhanced(tmp_path / "d")
    headers = [header for name in "abcd" for header in read_file(tmp_path / name)]
    with Workers() as workers:
        distinct = without_copies(headers, workers)
    assert [header.path.name for header in distinct.images[:2]] == ["a", "b"]
    assert (len(distinct.images), len(distinct.copies), distinct.conflicting) == (
        2 + NUM_SLICES * NUM_PHASES,
        1,
        frozenset(),
    )


def test_nothing_is_read_of_images_that_are_alone(tmp_path, monkeypatch):
    write_study(tmp_path, masks=False, skip=[(z, None) for z in range(1, NUM_SLICES)])
    headers = [header for path in sorted(tmp_path.iterdir()) for header in read_file(path)]
    with Workers() as workers:
        monkeypatch.setattr(workers, "map", lambda function, items, **_: iter([function(item) for item in items]))
        monkeypatch.setattr(
            "fedcmr.client.ingest.dicom.copies.read_pixels", lambda image: pytest.fail("pixels of a single image")
        )
        assert without_copies(headers, workers).images == headers
