"""Stacks that are drawn in part: which phases count, what is unknown, and what a site can use such a patient for."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from fedcmr.client.check.contact_sheet import image_of
from fedcmr.client.check.folder import check
from fedcmr.client.check.html_report import facts, render_html
from fedcmr.client.check.report import as_json
from fedcmr.client.cli import main
from fedcmr.client.ingest.centring import find_frames
from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.drawn import with_not_drawn
from fedcmr.client.ingest.layouts.plain import find_plain, parse_labels
from fedcmr.client.ingest.normalise import normalise
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.trainable import described, trainable
from fedcmr.client.training import load_patients
from fedcmr.shared.case import (
    CASE_PIXEL_MM,
    CASE_SIZE,
    ED,
    ES,
    LV,
    MYO,
    NOT_DRAWN,
    RV,
    contours_of,
    load_cases,
    read_index,
)
from fedcmr.shared.ejection_fraction import ejection_fraction
from tests.client.ingest.layouts.test_labels import AXES, LABELS, beat, loop_ef, write_csv, write_nifti, write_plain

KEY = b"k" * 32
SLICE_FIRST_MM = (9.0, 1.5, 1.5)


def cine_of(masks: np.ndarray, images: np.ndarray | None = None, **known) -> Cine:
    images = beat()[0] if images is None else images
    axes = AXES[[2, 1, 0]]
    return Cine(images.astype(np.float32), masks, SLICE_FIRST_MM, axes, "GE", 1.5, **known)


def only(labels: np.ndarray, phases: tuple[int, ...]) -> np.ndarray:
    """The labels of some phases, zeros in the others."""
    kept = np.zeros_like(labels)
    kept[list(phases)] = labels[list(phases)]
    return kept


def two_slices_of_another_phase(masks, labels):
    masks[1, 1:3] = labels[1, 1:3]


def all_but_the_apex_of_another_phase(masks, labels):
    masks[3, 1:] = labels[3, 1:]


def the_cavity_of_a_slice(masks, labels):
    masks[3, 1][labels[3, 1] == LV] = LV


def the_cavity_of_a_whole_phase(masks, labels):
    masks[3][labels[3] == LV] = LV


@pytest.mark.parametrize(
    "more",
    [
        two_slices_of_another_phase,
        all_but_the_apex_of_another_phase,
        the_cavity_of_a_slice,
        the_cavity_of_a_whole_phase,
    ],
)
def test_a_third_phase_that_is_drawn_in_part_changes_nothing(more):
    labels = beat()[1]
    masks = only(labels, (0, 2))
    more(masks, labels)
    assert find_frames(cine_of(masks)) == (0, 2)
    found = normalise(cine_of(masks))
    assert found.ef == pytest.approx(loop_ef(labels[0], labels[2]))
    assert contours_of(found.masks) == "drawn"


def test_a_whole_cine_that_is_drawn_has_its_largest_and_smallest_ventricle():
    assert find_frames(cine_of(beat()[1])) == (0, 2)


def test_what_nobody_drew_is_unknown_pixel_by_pixel():
    labels = beat()[1][[0, 2]]
    labels[ED][labels[ED] == RV] = 0  # as Sunnybrook: no right ventricle, the muscle at end-diastole alone
    labels[ES][labels[ES] != LV] = 0
    marked = with_not_drawn(labels)
    for before, after in zip(labels.ravel(), marked.ravel(), strict=True):
        assert after == (before or NOT_DRAWN)
    whole = beat()[1][[0, 2]]
    np.testing.assert_array_equal(with_not_drawn(whole), whole)
    whole[ES] = labels[ES]
    marked = with_not_drawn(whole)
    np.testing.assert_array_equal(marked[ED], whole[ED])  # each frame is held to what is drawn of it
    assert set(np.unique(marked[ES])) == {LV, NOT_DRAWN}


@pytest.mark.parametrize(("emptied", "unknown"), [((1,), [1]), ((0,), []), ((0, 1, 2), [0, 1, 2])])
def test_slices_that_were_passed_over_are_unknown_and_leave_no_ejection_fraction(emptied, unknown):
    """A gap, or most of the slices; the base alone moves away from end-systole's slices."""
    labels = beat()[1][[0, 2]]
    labels[ES, list(emptied)] = 0
    marked = with_not_drawn(labels)
    assert [z for z in range(4) if (marked[ES, z] == NOT_DRAWN).all()] == unknown
    assert (marked[ES] == NOT_DRAWN).any(axis=(1, 2)).sum() == len(unknown)
    assert np.isnan(ejection_fraction(marked)) == bool(unknown)
    if not unknown:
        assert ejection_fraction(marked) == pytest.approx(loop_ef(labels[0], labels[1]))


def test_beyond_the_image_is_background_only_where_all_is_drawn():
    images, labels = beat()
    corner = (..., slice(20, 90), slice(20, 90))  # 105 mm: a case shows 160
    images, masks = images[corner], only(labels, (0, 2))[corner]
    outside = np.ones((CASE_SIZE, CASE_SIZE), bool)
    outside[20:-20, 20:-20] = False
    whole = normalise(cine_of(masks, images))
    assert not whole.masks[:, :, outside].any()
    masks = masks.copy()
    masks[2][masks[2] != LV] = 0
    part = normalise(cine_of(masks, images))
    assert not part.masks[ED][:, outside].any() and (part.masks[ES][:, outside] == NOT_DRAWN).all()
    assert set(np.unique(part.masks[ES])) == {LV, NOT_DRAWN}
    assert (part.masks[ES] == LV).sum() == (whole.masks[ES] == LV).sum() and part.ef == whole.ef


@pytest.mark.parametrize("drawn", ["ed", "es"])
def test_one_drawn_phase_is_what_its_file_is_called_and_a_table_gives_the_ejection_fraction(tmp_path, drawn):
    images, labels = beat()
    phases = {"ed": 1, "es": 0}  # called the wrong way round: the name counts, not the blood
    for phase, index in phases.items():
        write_nifti(tmp_path / "in" / "frames" / f"A_{phase}.nii.gz", images[index].T)
    write_nifti(tmp_path / "in" / "masks" / f"A_{drawn}.nii.gz", (labels[phases[drawn]] == LV).astype(np.uint8).T)
    write_csv(tmp_path / "table.csv", [["patient", "ef_percent"], ["A", "41"]])
    prepare(tmp_path / "in", tmp_path / "out", "plain", labels=parse_labels("lv=1"), key=KEY)
    with_table = {"labels": parse_labels("lv=1"), "key": KEY, "ef_table": tmp_path / "table.csv"}
    prepare(tmp_path / "in", tmp_path / "told", "plain", **with_table)
    (case,), (told_case,) = (load_cases(tmp_path / name) for name in ("out", "told"))
    assert np.isnan(case.info.ef) and told_case.info.ef == 0.41 and case.info.contours == "partial"
    here, there = (ED, ES) if drawn == "ed" else (ES, ED)
    assert (case.masks[there] == NOT_DRAWN).all() and set(np.unique(case.masks[here])) == {LV, NOT_DRAWN}
    area_mm2 = 1.5**2 * (labels[phases[drawn]] == LV).sum()
    assert (case.masks[here] == LV).sum() * CASE_PIXEL_MM**2 == pytest.approx(area_mm2, rel=0.01)


def test_one_drawn_phase_of_a_cine_is_the_end_that_its_blood_is_nearer_to():
    labels = beat()[1]
    assert find_frames(cine_of(only(labels, (0,)))) == (0, 2)
    ed, es = find_frames(cine_of(only(labels, (3,))))  # the fourth phase is next to the smallest ventricle
    assert (ed, es) == (0, 3)


def test_a_number_can_stand_for_what_was_not_drawn(tmp_path):
    images, labels = beat()
    numbers = np.where(labels == 0, 9, labels).astype(np.uint8)
    numbers[2] = np.where(labels[2] == LV, LV, 9)
    numbers[0][labels[0] == 0] = 0
    write_nifti(tmp_path / "frames" / "A.nii.gz", images[[0, 2]].T)
    write_nifti(tmp_path / "masks" / "A.nii.gz", numbers[[0, 2]].T)
    read = find_plain(tmp_path, parse_labels("rv=1,myo=2,lv=3,undrawn=9")).studies[0].read
    found = normalise(read())
    assert set(np.unique(found.masks[ED])) == {0, RV, MYO, LV} and set(np.unique(found.masks[ES])) == {LV, NOT_DRAWN}


@pytest.fixture
def site(tmp_path):
    """A drawn patient, one as Sunnybrook draws, one with the cavity at end-diastole alone, one without contours."""
    root = tmp_path / "in"
    write_plain(root, ["whole", "part", "half"])
    write_plain(root, ["none"], masks=False)
    labels = beat(1)[1]
    masks = only(labels, (0, 2))
    masks[masks == RV] = 0
    masks[2][masks[2] == MYO] = 0
    write_nifti(root / "masks" / "part.nii.gz", masks.T)
    labels = beat(2)[1]
    write_nifti(root / "masks" / "half.nii.gz", np.where(only(labels, (0,)) == LV, LV, 0).astype(np.uint8).T)
    write_csv(root / "cases.csv", [["name", "vendor"], *[[name, "GE"] for name in ("whole", "part", "half", "none")]])
    summary = prepare(root, tmp_path / "out", "plain", labels=LABELS, key=KEY)
    assert (summary.num_cases, summary.refused, summary.warnings) == (4, {}, {"partly-drawn": 2, "heart-by-motion": 1})
    return tmp_path / "out"


@pytest.mark.slow
def test_the_index_says_where_the_masks_come_from_and_an_index_without_the_column_is_read(site, tmp_path):
    with (site / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["contours"] for row in rows) == ["", "drawn", "partial", "partial"]
    known = [(info.pseudonym, info.contours) for info in read_index(site)]
    with (site / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "contours"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert [(case.info.pseudonym, case.info.contours) for case in load_cases(site)] == known
    prepare(tmp_path / "in", site, "plain", labels=LABELS, key=KEY)  # resumed: nothing is new
    assert [(info.pseudonym, info.contours) for info in read_index(site)] == known
    rows[0]["contours"] = "by hand"
    with (site / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(Exception, match="line 2 is not a case's row"):
        read_index(site)


@pytest.mark.slow
def test_check_counts_what_is_drawn_and_what_each_patient_can_be_used_for(site, capsys):
    report = check(site)
    assert report.contours == {"drawn": 1, "partial": 2, "none": 1}
    assert report.uses == {"statistics of style and shape": 3, "generator gradients": 1, "EF test": 2}
    assert dict(facts(report))["contours"] == "drawn 1 patient, drawn in part 2, none 1"
    assert as_json(report)["uses"] == json.loads(json.dumps(report.uses))
    assert report.not_trained == {"no-masks": 1} and not report.num_unusable
    assert dict(facts(report))["can be used for"] == (
        "statistics of style and shape: 3 patients; generator gradients: 1; EF test: 2"
    )
    assert main(["check", str(site), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contours"] == report.contours
    sentence = described(trainable(site))
    assert (
        "3 patients can be trained on (GE 3), 2 of them drawn in part: for statistics of style and shape only"
        in sentence
    )


@pytest.mark.slow
def test_the_page_shades_what_nobody_drew(site):
    by_kind = {}
    for case in load_cases(site):
        by_kind.setdefault(case.info.contours, image_of(case).contours)
    assert "undrawn" in by_kind["partial"] and "undrawn" not in by_kind["drawn"] and by_kind[""] == {}
    page = render_html(check(site))
    assert page.count('class="undrawn" d="M') >= 2 and "drawn in part" in page and "not drawn: unknown" in page


@pytest.mark.slow
def test_patients_drawn_in_part_have_a_style_and_no_slice_for_the_generator(site, prior):
    patients = {patient.name: patient for patient in load_patients(site, prior, ("GE",))}
    cases = {case.info.group: case for case in load_cases(site) if case.info.contours}
    assert set(patients) == set(cases) and len(patients) == 3
    for name, patient in patients.items():
        whole = cases[name].info.contours == "drawn"
        assert (len(patient.images) > 0) == whole and not (patient.masks == NOT_DRAWN).any()
        assert patient.measured.all() == whole and patient.known.all()


@pytest.mark.slow
def test_a_case_with_another_label_is_none(site):
    case = load_cases(site)[0]
    masks = case.masks.copy()
    masks[0, 0, 0, 0] = 4
    with pytest.raises(ValueError, match=r"labels 0\.\.3 or 255, got 4"):
        replace(case, masks=masks)
