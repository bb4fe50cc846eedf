"""Whose contours the report shows and what they look like, on squares drawn here."""

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.server.experiments.models import model_path, save_predictions
from fedcmr.server.experiments.models import test_sets as held_out_sets
from fedcmr.server.report import contours
from fedcmr.server.report.build import ReportInputs, build_report
from fedcmr.server.report.collect import _outlined
from fedcmr.server.report.contours import (
    NUM_SLICES,
    OutlinedPatient,
    best_and_worst,
    in_words,
    outline_sheet,
    outlined_patients,
    outlines,
)
from fedcmr.server.tasks.segmentation.scores import per_patient
from fedcmr.shared.case import LV, MYO, NOT_DRAWN, RV, load_cases
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter, save_segmenter
from tests.server.report.report_study import bare_report, full_study

SVG = "{http://www.w3.org/2000/svg}"


def squares() -> np.ndarray:
    labels = np.zeros((64, 64), np.uint8)
    labels[10:40, 20:50], labels[16:34, 26:44], labels[12:30, 8:20] = MYO, LV, RV
    return labels


def patient(**changes) -> OutlinedPatient:
    labels = np.broadcast_to(squares(), (3, 2, 64, 64))
    images = np.full(labels.shape, 0.5)
    return replace(OutlinedPatient("Best", "GE", images, labels, labels, (2.0, 2.0), "Dice: LV 1.00"), **changes)


def svg_of(uri: str) -> ElementTree.Element:
    return ElementTree.fromstring(base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")))  # noqa: S314


def test_each_vendor_has_its_best_and_its_worst_patient():
    vendors = ["GE", "GE", "GE", "Philips", "Siemens", "Siemens", "Canon"]
    overlap = np.array([0.7, 0.9, 0.8, 0.5, np.nan, 0.6, np.nan])
    assert best_and_worst(vendors, overlap) == [("Best", 1), ("Worst", 0), ("Worst", 3), ("Worst", 5)]
    assert best_and_worst([], np.zeros(0)) == []


def test_a_contour_runs_half_a_pixel_around_its_structure():
    cavity, muscle, right = outlines(squares())
    for line, (top, bottom, left, last) in (
        (cavity, (16, 33, 26, 43)),
        (muscle, (10, 39, 20, 49)),
        (right, (12, 29, 8, 19)),
    ):
        assert line[:, 1].min() == top - 0.5 and line[:, 1].max() == bottom + 0.5
        assert line[:, 0].min() == left - 0.5 and line[:, 0].max() == last + 0.5
        assert (line[0] == line[-1]).all(), "closed"


def test_what_nobody_drew_has_no_contour():
    labels = squares()
    labels[labels != LV] = NOT_DRAWN
    (cavity,) = outlines(labels)
    assert cavity[:, 0].max() == 43.5
    assert outlines(np.full((8, 8), NOT_DRAWN, np.uint8)) == []


def test_readers_and_network_differ_in_colour_and_in_style_and_lie_on_the_image():
    """Columns of 2.5 mm and rows of 3 mm: the picture is as wide and as high in millimetres as what it shows."""
    found = np.roll(patient().found, 4, axis=3)
    panels = svg_of(outline_sheet(patient(found=found, pixel_mm=(3.0, 2.5)))).findall(f"{SVG}svg")
    assert len(panels) == 3 * 2
    for panel in panels:
        assert float(panel.get("width")) == pytest.approx(float(panel.get("height")), abs=4)
        readers, network = (
            [path for path in panel.findall(f"{SVG}path") if path.get("stroke") == colour]
            for colour in (contours.READERS, contours.FOUND)
        )
        assert [path.get("stroke-dasharray") for path in (*readers, *network)] == [None, contours.DASH]
        x = [[float(v) for v in re.findall(r"[M ]([\d.]+),", path.get("d"))] for path in (*readers, *network)]
        assert np.subtract(x[1], x[0]) == pytest.approx(10.0, abs=0.011)


def test_the_figures_are_those_of_what_is_drawn():
    values = {"dice/lv": 0.911, "dice/myo": 0.8, "dice/rv": np.nan, "dice/mean": np.nan, "ef_bias_points": -3.21}
    values |= {"num_phases/lv": 2, "num_phases/myo": 1, "num_phases/rv": 0, "num_phases/mean": 0, "num_phases/ef": 1}
    assert in_words(values) == "Dice: LV 0.91, muscle 0.80; EF \u22123.2 points"
    assert in_words(values | {"ef_bias_points": np.nan}).endswith("EF undefined: no cavity found")
    assert in_words(values | {"num_phases/ef": 0}) == "Dice: LV 0.91, muscle 0.80"


@pytest.fixture
def run(make_study, write_cases):
    """Five test patients of a vendor, on whom a segmenter's predictions are known: the first is the best."""
    run = make_study("tasks=[ejection_fraction,segmentation]")
    folder = run.path / "test" / "hospitals" / "a"
    write_cases(folder, "GE", 5, seed=3)
    torch.manual_seed(0)
    save_segmenter(model_path(run, "segmentation", "synthetic_only"), Segmenter().eval(), {})
    cases = load_cases(folder)
    found = [torch.from_numpy(np.roll(case.masks, shift, axis=3)) for shift, case in enumerate(cases)]
    rows = {name: column.tolist() for name, column in per_patient(cases, found).items()}
    save_predictions(run, "segmentation/synthetic_only", [("hospitals", cases)], {"hospitals": rows})
    return run


def predictions_of(run):
    path = run.path / "private" / "predictions" / "segmentation" / "synthetic_only.json"
    return json.loads(path.read_text())


def test_the_patients_are_chosen_by_what_was_predicted_and_shown_with_what_the_segmenter_finds(run):
    best, worst = outlined_patients(run, held_out_sets(run, "segmentation"), predictions_of(run))
    cases = load_cases(run.path / "test" / "hospitals" / "a")
    for shown, case in ((best, cases[0]), (worst, cases[4])):
        assert shown.images.shape == shown.drawn.shape == shown.found.shape
        assert len(shown.images) <= NUM_SLICES and shown.vendor == "GE" and shown.figures.startswith("Dice: LV 0")
        z = next(z for z in range(case.frames.shape[1]) if np.array_equal(case.frames[:, z], shown.images[0]))
        assert np.array_equal(case.masks[:, z], shown.drawn[0])
        assert case.info.pseudonym not in repr(shown)
    assert (best.kind, worst.kind) == ("Best", "Worst")


def test_contours_of_other_patients_and_without_a_segmenter_are_left_out(run):
    others = {"hospitals": {**predictions_of(run)["hospitals"], "vendors": ["GE"] * 4}}
    assert outlined_patients(run, held_out_sets(run, "segmentation"), others) == []
    model_path(run, "segmentation", "synthetic_only").unlink()
    assert outlined_patients(run, held_out_sets(run, "segmentation"), predictions_of(run)) == []


@pytest.mark.slow
def test_real_patients_are_shown_only_where_that_is_allowed(run, tmp_path):
    assert _outlined(run, predictions_of(run), shown=[]) == []
    assert len(_outlined(run, predictions_of(run), shown=["hospitals"])) == 2
    report, inputs = full_study()
    build_report(report, inputs, tmp_path)
    assert (tmp_path / "report.html").read_text().count("<figcaption>Worst</figcaption>") == 3
    build_report(report, ReportInputs(**{**vars(inputs), "shown": []}), tmp_path)
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<h2 id="segmentation">') : page.index('<h2 id="privacy">')]
    assert "<figcaption>" not in section and "data:image" not in section
    assert "are left out: they are real" in section


def test_a_study_without_a_segmentation_shows_no_contours(tmp_path):
    build_report(bare_report(simulated=True), ReportInputs(outlined=[patient()], shown=["acdc"]), tmp_path)
    assert "Best and worst contours" not in (tmp_path / "report.html").read_text()
