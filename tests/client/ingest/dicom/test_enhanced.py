"""Enhanced multi-frame MR: the same heart as in classic images, frame by frame, or a reason."""

import math

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from fedcmr.client.ingest.dicom.pixels import read_pixels
from fedcmr.client.ingest.dicom.reader import find_dicom, read_file
from fedcmr.client.ingest.normalise import normalise
from fedcmr.client.ingest.reasons import Unusable
from tests.client.ingest.dicom_files import (
    COLUMN_AXIS,
    NUM_PHASES,
    NUM_SLICES,
    ROW_AXIS,
    beating_heart,
    write_enhanced,
    write_image,
    write_study,
)

ALL = list(np.ndindex(NUM_SLICES, NUM_PHASES))


def case_of(folder):
    (study,) = find_dicom(folder).studies
    cine = study.read()
    return cine, normalise(cine)


def assert_same_as_classic(tmp_path, **settings):
    """One Enhanced file gives the case that the classic export gives."""
    write_study(tmp_path / "classic")
    write_enhanced(tmp_path / "enhanced" / "all.dcm", **settings)
    (tmp_path / "classic" / "masks.nii.gz").rename(tmp_path / "enhanced" / "masks.nii.gz")
    cine, case = case_of(tmp_path / "enhanced")
    (tmp_path / "enhanced" / "masks.nii.gz").rename(tmp_path / "classic" / "masks.nii.gz")
    expected_cine, expected = case_of(tmp_path / "classic")
    assert np.array_equal(cine.images, expected_cine.images)
    assert np.array_equal(cine.masks, expected_cine.masks)
    assert np.allclose(cine.axes, expected_cine.axes)
    assert (cine.vendor, cine.field_strength_t) == (expected_cine.vendor, expected_cine.field_strength_t)
    assert np.array_equal(case.frames, expected.frames)
    assert case.ef == expected.ef


@pytest.mark.parametrize("per_frame_only", [False, True])
@pytest.mark.parametrize(
    "order",
    [
        ALL,
        sorted(ALL, key=lambda place: (place[1], place[0])),
        [ALL[i] for i in np.random.default_rng(0).permutation(40)],
    ],
    ids=["slice by slice", "phase by phase", "in no order"],
)
def test_one_file_gives_the_same_case_as_classic_images(tmp_path, per_frame_only, order):
    assert_same_as_classic(tmp_path, per_frame_only=per_frame_only, order=order)


def test_classic_images_that_a_pacs_has_put_together_give_the_same_case(tmp_path):
    assert_same_as_classic(tmp_path, legacy=True)


def test_without_trigger_delays_the_temporal_position_orders_the_phases(tmp_path):
    def change(_, frames):
        for frame in frames:
            del frame.CardiacSynchronizationSequence

    assert_same_as_classic(tmp_path, change=change)


def test_without_any_time_the_order_of_the_frames_does(tmp_path):
    def change(_, frames):
        for frame in frames:
            frame.CardiacSynchronizationSequence[0].NominalCardiacTriggerDelayTime = 0.0
            frame.FrameContentSequence[0].TemporalPositionIndex = 1  # as some scanners write it

    assert_same_as_classic(tmp_path, change=change)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_frames_are_the_same_as_uncompressed_ones(tmp_path, syntax):
    write_enhanced(tmp_path / "plain")
    dataset = pydicom.dcmread(tmp_path / "plain")
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(tmp_path / "compressed")
    expected = beating_heart()[0]
    for header, (z, t) in zip(read_file(tmp_path / "compressed"), ALL, strict=True):
        assert np.array_equal(read_pixels(header), expected[t, z])


def test_each_slice_may_be_a_file_of_its_own(tmp_path):
    for z in range(NUM_SLICES):
        order = [(z, t) for t in range(NUM_PHASES)]
        write_enhanced(
            tmp_path / f"{z}.dcm", order=order, SOPInstanceUID=f"1.2.3.9.{z}", SeriesInstanceUID=f"1.2.3.{z}"
        )
    (study,) = find_dicom(tmp_path).studies
    assert np.array_equal(study.read().images, beating_heart()[0])


def test_a_header_tells_of_its_frame(tmp_path):
    write_enhanced(tmp_path / "a")
    headers = read_file(tmp_path / "a")
    assert [header.frame for header in headers] == list(range(len(ALL)))
    assert [header.TriggerTime for header in headers[:3]] == [0, 90.5, 181]
    assert [header.InstanceNumber for header in headers[:3]] == [1, 2, 3]
    assert headers[0].ImageType == ("ORIGINAL", "PRIMARY", "CINE", "NONE", "MAGNITUDE")
    assert np.allclose(headers[9].ImageOrientationPatient, [*COLUMN_AXIS, *ROW_AXIS])
    assert {(h.SOPInstanceUID, h.Manufacturer, h.MagneticFieldStrength) for h in headers} == {
        ("1.2.3.9", "Philips Healthcare", 1.5)
    }


def test_echo_inversion_and_scale_are_those_of_the_frame(tmp_path):
    def change(_, frames):
        for number, frame in enumerate(frames):
            echo, modifier, scale = Dataset(), Dataset(), Dataset()
            echo.EffectiveEchoTime = 1.5 + number
            modifier.InversionTimes, modifier.InversionRecovery = [200.0 + number], "YES"
            scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = str(number + 1), "-5", "US"
            frame.MREchoSequence = Sequence([echo])
            frame.MRModifierSequence = Sequence([modifier])
            frame.PixelValueTransformationSequence = Sequence([scale])

    write_enhanced(tmp_path / "a", change=change)
    headers = read_file(tmp_path / "a")
    assert (headers[3].EchoTime, headers[3].InversionTime, headers[3].ScanningSequence) == (4.5, 203, ("IR",))
    assert np.array_equal(read_pixels(headers[3]), beating_heart()[0][3, 0] * 4.0 - 5)


def remove_position(_, frames):
    del frames[7].PlanePositionSequence


def remove_orientation(dataset, _):
    del dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence


def remove_a_frame(dataset, frames):
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames[:-1])


def remove_groups(dataset, _):
    del dataset.PerFrameFunctionalGroupsSequence


def flatten(dataset, _):
    dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0, 2]


def stop_the_scale(_, frames):
    scale = Dataset()
    scale.RescaleSlope, scale.RescaleIntercept = "0", "0"
    frames[7].PixelValueTransformationSequence = Sequence([scale])


def drop_pixels(dataset, _):
    dataset.PixelData = dataset.PixelData[: len(dataset.PixelData) // 40]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("unplaced-frames", remove_position),
        ("unplaced-frames", remove_orientation),
        ("unplaced-frames", remove_a_frame),
        ("unplaced-frames", remove_groups),
        ("no-geometry", flatten),
        ("unreadable-pixels", stop_the_scale),
        ("unreadable-pixels", drop_pixels),
    ],
)
def test_a_file_is_never_used_in_part(tmp_path, reason, change):
    write_enhanced(tmp_path / "a", change=change)
    with pytest.raises(Unusable, match=reason):
        read_file(tmp_path / "a")


def test_colour_maps_are_left_out(tmp_path):
    write_enhanced(tmp_path / "a", SOPClassUID="1.2.840.10008.5.1.4.1.1.4.3")
    with pytest.raises(Unusable, match="not-grayscale"):
        read_file(tmp_path / "a")


def test_a_classic_image_without_times_says_so(tmp_path):
    write_image(tmp_path / "a", np.zeros((8, 8)))
    (header,) = read_file(tmp_path / "a")
    assert header.frame is None
    assert math.isnan(header.TriggerTime)
