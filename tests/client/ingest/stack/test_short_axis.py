"""Which images form the stack: headers invented here, as scanners and archives mix them."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedcmr.client.ingest.dicom.grouping import group_studies
from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.reasons import REASONS, Unusable
from fedcmr.client.ingest.stack.even_stack import even_run, is_complete
from fedcmr.client.ingest.stack.short_axis import Stack, find_stack
from fedcmr.shared.orientation import BASE_TO_APEX

NUM_PHASES, NUM_SLICES, SPACING_MM = 20, 9, 9.0
COLUMN_AXIS = np.cross(BASE_TO_APEX, [0.0, 0.0, 1.0]) / np.linalg.norm(np.cross(BASE_TO_APEX, [0.0, 0.0, 1.0]))
ROW_AXIS = np.cross(BASE_TO_APEX, COLUMN_AXIS)
SERIES = itertools.count(1)


def image(z: float, t: int, **values: object) -> Header:
    """Phase `t` of the short-axis slice `z` spacings from the base."""
    turned = math.radians(values.pop("turned_deg", 0.0))
    row = math.cos(turned) * ROW_AXIS + math.sin(turned) * BASE_TO_APEX
    normal = np.cross(COLUMN_AXIS, row)
    fields = {
        "path": Path("x"),
        "PatientID": "ID",
        "StudyInstanceUID": "1.2",
        "SeriesInstanceUID": "1.2.1",
        "SOPInstanceUID": f"1.2.{z}.{t}",
        "Manufacturer": "SIEMENS",
        "MagneticFieldStrength": 1.5,
        "ImagePositionPatient": tuple(z * SPACING_MM * normal - 90 * row - 90 * COLUMN_AXIS),
        "ImageOrientationPatient": (*COLUMN_AXIS, *row),
        "PixelSpacing": (1.5, 1.5),
        "Rows": 120,
        "Columns": 120,
        "TriggerTime": t * 42.0,
        "InstanceNumber": float(t + 1),
        "EchoTime": 1.2,
        "SeriesNumber": 10.0,
    }
    fields |= {name: value(z, t) if callable(value) else value for name, value in values.items()}
    return Header(**fields)  # type: ignore[arg-type]


def series(places, num_phases=NUM_PHASES, **values: object) -> list[Header]:
    """All phases at each place, in one series."""
    values = {"SeriesInstanceUID": f"1.2.{next(SERIES)}"} | values
    return [image(z, t, **values) for z in places for t in range(num_phases)]


def stack(num_slices=NUM_SLICES, **values: object) -> list[Header]:
    return series(range(num_slices), **values)


def find(*parts: list[Header]) -> tuple[Stack, Counter[str]]:
    """The stack among parts that come in any order."""
    images = list(itertools.chain(*parts))
    random.Random(0).shuffle(images)
    return find_stack(images)


def code(*parts: list[Header]) -> str:
    with pytest.raises(Unusable) as error:
        find(*parts)
    return error.value.code


def uids(found: Stack) -> set[str]:
    return {one.SeriesInstanceUID for position in found.images for one in position}


def long_axis(name: str) -> list[Header]:
    return series([0], SeriesInstanceUID=name, ImageOrientationPatient=(*COLUMN_AXIS, *BASE_TO_APEX))


def assert_is(found: Stack, num_slices=NUM_SLICES, num_phases=NUM_PHASES) -> None:
    """Every slice in its place, every phase in its order."""
    expected = [[(z, t) for t in range(num_phases)] for z in range(num_slices)]
    shape = [[tuple(map(int, one.SOPInstanceUID.split(".")[2:4])) for one in position] for position in found.images]
    assert shape == expected


@pytest.mark.parametrize("images_per_series", ["all", "a slice", "a phase's slices"])
def test_a_stack_may_be_spread_over_series_in_any_way_that_keeps_slices_whole(images_per_series):
    uid = {"all": "1.2.1", "a slice": lambda z, t: f"1.2.{z}", "a phase's slices": lambda z, t: f"1.2.{z // 4}"}
    number = lambda z, t: 10.0 + z  # noqa: E731
    found, left_out = find(stack(SeriesInstanceUID=uid[images_per_series], SeriesNumber=number))
    assert_is(found)
    assert left_out == {}
    assert np.allclose(found.affine[:3, 2], SPACING_MM * BASE_TO_APEX)


def test_what_else_a_cardiac_study_holds_is_left_out_and_counted_by_reason():
    others = {
        "2-chamber": long_axis("1.3.1"),
        "4-chamber": long_axis("1.3.2"),
        "localiser": series([2, 4, 6], 1, SeriesInstanceUID="1.3.3"),
        "late enhancement": series(range(9), 1, SeriesInstanceUID="1.3.4", ScanningSequence=("GR", "IR")),
        "perfusion": series([2, 4, 6], 50, SeriesInstanceUID="1.3.5", TriggerTime=lambda z, t: 900.0 * t),
        "T1 map": series([2, 4, 6], 8, SeriesInstanceUID="1.3.6", InversionTime=lambda z, t: 100.0 + 80 * t),
        "T2* map": series([2, 4, 6], 8, SeriesInstanceUID="1.3.7", EchoTime=lambda z, t: 2.0 * (t + 1)),
        "phase contrast": series(range(9), SeriesInstanceUID="1.3.8", ImageType=("ORIGINAL", "PRIMARY", "P")),
        "real-time": series(range(9), 60, SeriesInstanceUID="1.3.9", TriggerTime=lambda z, t: 60.0 * t),
        "map in words": series(range(9), SeriesInstanceUID="1.3.10", ImageType=("DERIVED", "PRIMARY", "T1_MAP")),
        "tagging": series([2, 4, 6], SeriesInstanceUID="1.3.11", EchoTime=3.6, SeriesNumber=99.0),
        "axial cine": series(range(9), SeriesInstanceUID="1.3.12", ImageOrientationPatient=(1, 0, 0, 0, 1, 0)),
    }
    found, left_out = find(stack(), *others.values())
    assert_is(found)
    assert uids(found) == uids(find(stack(SeriesInstanceUID=next(iter(uids(found)))))[0])
    assert left_out == {"other-orientation": 3, "not-cine": 8, "repeated-slices": 1}
    assert set(left_out) <= set(REASONS)


@pytest.mark.parametrize("kind", ["perfusion", "maps", "axial"])
def test_no_cine_is_made_of_what_is_none(kind):
    images = {
        "perfusion": series([2, 4, 6], 50, TriggerTime=lambda z, t: 900.0 * t),
        "maps": series([2, 4, 6], 8, EchoTime=lambda z, t: 2.0 * (t + 1)),
        "axial": series(range(9), ImageOrientationPatient=(1, 0, 0, 0, 1, 0)),
    }
    assert code(images[kind]) == "no-short-axis-cine"


@pytest.mark.parametrize("claimed, is_cine", [(2.0, True), (math.nan, False), (20.0, False)])
def test_two_images_at_a_place_are_a_cine_only_where_they_say_that_the_cycle_has_two(claimed, is_cine):
    pair = series(range(NUM_SLICES), 2, CardiacNumberOfImages=claimed, TriggerTime=math.nan)
    if is_cine:
        assert_is(find(pair)[0], num_phases=2)
    else:
        assert code(pair) == "no-short-axis-cine"


def test_a_whole_cine_wins_over_a_copy_of_two_of_its_phases():
    pair = series(range(NUM_SLICES), 2, CardiacNumberOfImages=2.0, SeriesNumber=99.0)
    whole = stack()
    found, left_out = find(whole, pair)
    assert uids(found) == {whole[0].SeriesInstanceUID} and left_out == {"not-cine": 1}


# Repeats


def test_of_a_stack_scanned_twice_the_last_counts():
    first, second = stack(SeriesNumber=10.0), stack(SeriesNumber=14.0)
    found, left_out = find(first, second)
    assert uids(found) == {second[0].SeriesInstanceUID}
    assert left_out == {"repeated-slices": 1}


def test_of_a_stack_planned_again_at_another_angle_the_last_counts_and_parts_are_not_mixed():
    first, second = stack(SeriesNumber=10.0), stack(SeriesNumber=14.0, turned_deg=6.0)
    found, left_out = find(first, second)
    assert uids(found) == {second[0].SeriesInstanceUID}
    assert left_out == {"other-orientation": 1}


def test_a_stack_planned_again_may_reach_a_slice_less_far():
    first, second = stack(SeriesNumber=10.0), series(range(1, 9), SeriesNumber=14.0, turned_deg=4.0)
    assert_is(find(first, second)[0])


def test_a_slice_scanned_again_replaces_the_first_try():
    tries = stack(SeriesInstanceUID=lambda z, t: f"1.2.{z}", SeriesNumber=lambda z, t: 10.0 + z)
    again = series([4], SeriesNumber=30.0)
    found, left_out = find(tries, again)
    assert_is(found)
    assert again[0].SeriesInstanceUID in uids(found)
    assert "1.2.4" not in uids(found)
    assert left_out == {"repeated-slices": 1}


@pytest.mark.parametrize("as_one_series", [True, False])
def test_slices_scanned_again_as_a_later_series_replace_those_of_a_whole_series(as_one_series):
    whole = stack(SeriesNumber=10.0)
    uid = "1.5.1" if as_one_series else lambda z, t: f"1.5.{z}"
    found, left_out = find(whole, series([1, 2, 3], SeriesInstanceUID=uid, SeriesNumber=lambda z, t: 30.0 + z))
    assert_is(found)
    later = {z for z, position in enumerate(found.images) if position[0].SeriesInstanceUID.startswith("1.5.")}
    assert later == {1, 2, 3}
    assert left_out == {}
    earlier, _ = find(whole, series([1, 2, 3], SeriesInstanceUID=uid, SeriesNumber=2.0))
    assert uids(earlier) == {whole[0].SeriesInstanceUID}


@pytest.mark.parametrize("number", [math.nan, 10.0], ids=["without numbers", "of one number"])
def test_where_the_numbers_of_series_do_not_tell_the_time_of_day_does(number):
    whole = stack(SeriesNumber=number, AcquisitionTime=101500.5)
    again = series([1, 2, 3], SeriesNumber=number, AcquisitionTime=102030.0)
    found, _ = find(whole, again)
    assert_is(found)
    later = {z for z, position in enumerate(found.images) if position[0] in again}
    assert later == {1, 2, 3}
    second = stack(SeriesNumber=number, AcquisitionTime=102030.0)
    assert uids(find(whole, second)[0]) == {second[0].SeriesInstanceUID}


def test_a_repeat_under_stress_replaces_nothing():
    rest = stack(SeriesInstanceUID=lambda z, t: f"1.2.{z}", SeriesNumber=lambda z, t: 10.0 + z)
    stress = series(
        [2, 4, 6], SeriesInstanceUID=lambda z, t: f"1.4.{z}", SeriesNumber=40.0, TriggerTime=lambda z, t: t * 24.0
    )
    found, _ = find(rest, stress)
    assert not any(uid.startswith("1.4") for uid in uids(found))


def test_another_sequence_replaces_nothing():
    cine = stack(SeriesInstanceUID=lambda z, t: f"1.2.{z}", SeriesNumber=lambda z, t: 10.0 + z)
    tagged = series([2, 4, 6], SeriesInstanceUID=lambda z, t: f"1.4.{z}", SeriesNumber=40.0, EchoTime=3.6)
    found, left_out = find(cine, tagged)
    assert not any(uid.startswith("1.4") for uid in uids(found))
    assert left_out == {"repeated-slices": 3}


def test_a_coarser_stack_scanned_later_does_not_go_before_a_fine_one():
    fine, coarse = stack(SeriesNumber=10.0), stack(SeriesNumber=20.0, PixelSpacing=(2.5, 2.5), Rows=72, Columns=72)
    assert uids(find(fine, coarse)[0]) == {fine[0].SeriesInstanceUID}


def test_a_larger_stack_far_from_the_hearts_axis_does_not_go_before_the_short_axis():
    other = series(range(12), SeriesNumber=20.0, turned_deg=30.0)
    found, left_out = find(stack(), other)
    assert_is(found)
    assert left_out == {"other-orientation": 1}


def test_repeats_that_nothing_tells_apart_are_refused():
    assert code(stack(SeriesNumber=math.nan), stack(SeriesNumber=math.nan)) == "ambiguous-stack"
    assert code(stack(SeriesNumber=7.0), stack(SeriesNumber=7.0)) == "ambiguous-stack"


def test_of_two_acquisitions_in_one_series_the_last_counts():
    twice = [
        replace(
            one,
            InstanceNumber=one.InstanceNumber + 100 * k,
            SOPInstanceUID=f"{one.SOPInstanceUID}.{k}",
            TriggerTime=one.TriggerTime * (1 + 0.03 * k),
        )
        for one in stack()
        for k in (0, 1)
    ]
    found, _ = find(twice)
    assert_is(found)
    assert all(one.SOPInstanceUID.endswith(".1") for position in found.images for one in position)


def test_of_two_acquisitions_in_one_series_the_last_counts_though_its_beat_was_shorter():
    twice = [
        replace(one, InstanceNumber=one.InstanceNumber + 100 * k, SOPInstanceUID=f"{one.SOPInstanceUID}.{k}")
        for one in stack()
        for k in (0, 1)
        if k == 0 or one.TriggerTime < (NUM_PHASES - 1) * 42.0
    ]
    found, _ = find(twice)
    assert_is(found, num_phases=NUM_PHASES - 1)
    assert all(one.SOPInstanceUID.endswith(".1") for position in found.images for one in position)


# Places


@pytest.mark.parametrize("missing", [1, 4, 7])
def test_a_missing_slice_is_refused(missing):
    assert code([one for one in stack() if f".{missing}." not in one.SOPInstanceUID[3:6]]) == "uneven-spacing"


@pytest.mark.parametrize("extra", [-0.5, 3.5, 8.4])
def test_a_slice_between_others_or_overlapping_the_ends_is_left_out(extra):
    found, left_out = find(stack(), series([extra]))
    assert_is(found)
    assert left_out == {"repeated-slices": 1}


@pytest.mark.parametrize("beyond", [10.0, 12.5])
def test_a_slice_beyond_a_gap_shows_that_one_is_missing(beyond):
    slices = [series([z], SeriesNumber=float(z)) for z in (*range(NUM_SLICES), beyond)]
    assert code(*slices) == "uneven-spacing"


def test_the_scanners_own_stack_counts_next_to_a_slice_far_off():
    assert_is(find(stack(), series([12.5]))[0])


def test_uneven_and_too_few_slices_are_refused():
    assert code(series([0, 1, 2.4, 3.1, 5, 5.6])) == "uneven-spacing"
    assert code(series([0, 1])) == "no-short-axis-cine"


def test_shifted_slices_are_refused():
    shifted = [
        replace(one, ImagePositionPatient=tuple(np.array(one.ImagePositionPatient) + 9 * ROW_AXIS))
        if one.SOPInstanceUID.startswith("1.2.4.")
        else one
        for one in stack()
    ]
    assert code(shifted) == "slices-not-aligned"


@pytest.mark.parametrize("difference", [{"Rows": 128}, {"turned_deg": 5.0}, {"PixelSpacing": (1.3, 1.3)}])
def test_a_stack_in_two_parts_of_other_matrix_or_orientation_is_refused(difference):
    upper, lower = series(range(6)), series(range(6, 9), **difference)
    assert code(upper, lower) == "mixed-geometry"
    assert code(upper, lower, long_axis("1.3.1")) == "mixed-geometry"


@pytest.mark.parametrize("places", [[-1.3], [-1.2, -1.9, -2.6]], ids=["a valve's cine", "a stack along its annulus"])
def test_a_valves_cine_beyond_the_base_continues_no_stack(places):
    found, left_out = find(stack(), series(places, SeriesNumber=30.0, turned_deg=15.0))
    assert_is(found)
    assert left_out == {"other-orientation": 1}
    tilted = series([-1, -2], SeriesInstanceUID="1.2.50", turned_deg=12.0)
    assert code(stack(SeriesInstanceUID="1.2.50"), tilted) == "mixed-geometry"


def test_slices_a_hair_off_are_one_stack():
    rng = np.random.default_rng(0)
    wobble = {z: z + rng.uniform(-0.02, 0.02) for z in range(NUM_SLICES)}
    jittered = [replace(image(wobble[z], t), SOPInstanceUID=f"1.2.{z}.{t}") for z in wobble for t in range(NUM_PHASES)]
    assert_is(find(jittered)[0])


def test_axes_written_with_few_digits_are_one_stack():
    def coarse(z, t):
        return tuple(round(float(x) + 1e-3 * (-1) ** (z + t), 2) for x in (*COLUMN_AXIS, *ROW_AXIS))

    assert len({coarse(z, t) for z in range(2) for t in range(2)}) > 1
    assert_is(find(stack(ImageOrientationPatient=coarse))[0])


def longest_even(depths: list[float], deviation: float) -> int:
    """By trying every set of places."""
    best = 1
    for size in range(2, len(depths) + 1):
        for chosen in itertools.combinations(depths, size):
            gaps = np.diff(chosen)
            if gaps.min() >= 2 and gaps.max() <= 25 and np.ptp(gaps) <= deviation * gaps.mean():
                best = size
    return best


def test_the_even_run_is_as_long_as_any_set_of_even_places():
    rng = np.random.default_rng(1)
    for _ in range(40):
        depths = sorted({*np.round(np.arange(rng.integers(3, 6)) * 8.0, 3), *np.round(rng.uniform(0, 50, 4), 3)})
        kept = [depths[index] for index in even_run(depths)]
        # The search allows a little less or more than equal gaps: between the strict and the loose count.
        assert longest_even(depths, 0.02) <= len(kept) <= longest_even(depths, 0.45)
        assert kept == sorted(kept)
    assert even_run([]) == [] and even_run([3.0]) == [0]
    assert is_complete([0, 8, 16, 24, 28, 32], [0, 1, 2, 3, 5])
    assert not is_complete([0, 8, 16, 24, 48], [0, 1, 2, 3])


# Phases


def test_beats_of_other_length_are_joined_by_rank():
    found, _ = find(stack(TriggerTime=lambda z, t: t * (38.0 + z)))
    assert_is(found)


@pytest.mark.parametrize("constant", [0.0, 500.0, math.nan])
@pytest.mark.parametrize("phase_major", [False, True])
def test_where_times_are_constant_or_missing_numbers_count(constant, phase_major):
    number = (lambda z, t: 1.0 + t * NUM_SLICES + z) if phase_major else (lambda z, t: 1.0 + z * NUM_PHASES + t)
    assert_is(find(stack(TriggerTime=constant, InstanceNumber=number))[0])


def test_times_go_before_numbers_in_whatever_order_these_run():
    numbers = random.Random(1).sample(range(1000), 500)
    assert_is(find(stack(InstanceNumber=lambda z, t: float(numbers[z * NUM_PHASES + t])))[0])
    assert_is(find(stack(InstanceNumber=lambda z, t: 1000.0 - z * NUM_PHASES - t))[0])


@pytest.mark.parametrize(
    "elements",
    [
        {"TriggerTime": math.nan, "InstanceNumber": math.nan},
        {"TriggerTime": 0.0, "InstanceNumber": 1.0},
        {"TriggerTime": 0.0, "InstanceNumber": lambda z, t: float(t * t)},
        {"TriggerTime": lambda z, t: t // 2 * 80.0, "InstanceNumber": math.nan},
        {"TriggerTime": lambda z, t: t // 2 * 80.0, "InstanceNumber": lambda z, t: float(t * 7 % 20)},
    ],
    ids=["nothing", "constant", "uneven numbers", "ties without numbers", "ties against the numbers"],
)
def test_an_order_that_nothing_tells_is_refused(elements):
    assert code(stack(**elements)) == "ambiguous-phase-order"


def test_equal_times_next_to_numbers_that_agree_are_an_order():
    assert_is(find(stack(TriggerTime=lambda z, t: t // 2 * 80.0))[0])


@pytest.mark.parametrize("elements", [{}, {"TriggerTime": 0.0}], ids=["times", "numbers"])
def test_slices_may_lack_the_end_of_a_long_beat_as_prospective_triggering_does(elements):
    short = [one for one in stack(**elements) if one.SOPInstanceUID not in ("1.2.3.19", "1.2.5.19", "1.2.5.18")]
    assert_is(find(short)[0], num_phases=NUM_PHASES - 2)


@pytest.mark.parametrize(
    "gone",
    [("3.7",), ("3.0",), ("3.17", "3.18", "3.19")],
    ids=["in the middle", "the first", "three of the last"],
)
def test_missing_phases_are_refused(gone):
    assert (
        code([one for one in stack() if one.SOPInstanceUID not in {f"1.2.{name}" for name in gone}]) == "uneven-phases"
    )


# Studies


def test_images_without_a_patient_join_the_studys_patient_and_no_other(tmp_path):
    named, blank = image(0, 0), image(0, 1, PatientID=" ")
    lonely = [image(0, t, PatientID="", StudyInstanceUID=f"1.{study}") for study in (7, 8) for t in (0, 1)]
    refused = group_studies([named, blank, *lonely])
    assert (list(refused.studies), refused.refused) == ([("ID", "1.2")], {"no-patient-id": 2})
    grouped = group_studies([named, blank, *lonely], one_study_one_patient=True)
    assert {key: len(images) for key, images in grouped.studies.items()} == {
        ("ID", "1.2"): 2,
        ("1.7", "1.7"): 2,
        ("1.8", "1.8"): 2,
    }
    assert not grouped.refused


def test_a_study_of_two_patients_is_refused_and_others_go_on():
    grouped = group_studies([image(0, 0), image(0, 1, PatientID="ID-2"), image(0, 0, StudyInstanceUID="1.9")])
    assert (list(grouped.studies), grouped.refused) == ([("ID", "1.9")], {"mixed-patients": 1})


def test_any_mixture_of_headers_ends_with_a_stack_or_a_code():
    rng = random.Random(3)
    odd = {
        "TriggerTime": [math.nan, 0.0, 1e7, -5.0],
        "InstanceNumber": [math.nan, 1.0, -3.0],
        "SeriesNumber": [math.nan],
        "EchoTime": [math.nan, 0.0, 9.0],
        "Rows": [1, 4096],
        "PixelSpacing": [(1e-6, 1e-6), (1e3, 1.0)],
        "ImagePositionPatient": [(0.0, 0.0, 0.0), (1e7, -1e7, 1e7)],
        "ImageType": [("",), ("P",)],
        "ImageOrientationPatient": [(1, 0, 0, 0, 1, 0), (0, 0, 1, 0, 1, 0)],
        "SeriesInstanceUID": ["9", "8"],
    }
    for _ in range(150):
        images = stack(5, num_phases=8)
        share = rng.choice([0.01, 0.1, 0.5, 1.0])
        for name in rng.sample(sorted(odd), rng.randint(1, 4)):
            images = [replace(one, **{name: rng.choice(odd[name])}) if rng.random() < share else one for one in images]
        try:
            found, _ = find(images)
        except Unusable:
            continue
        assert len({len(position) for position in found.images}) == 1
        assert np.isfinite(found.affine).all()
