"""The page's maps lie where the network attributions, and the section is there only when there is something to tell."""

import base64
import io
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from fedcmr.server.report.build import ReportInputs, build_report
from fedcmr.server.report.overlays import (
    MAX_OPACITY,
    NUM_SHOWN,
    OUTLINE,
    ZOOM,
    colour_bar,
    overlay,
    overlay_rows,
    overlay_sheet,
)
from fedcmr.server.tasks.ejection_fraction.saliency import Attribution
from tests.server.report.report_study import bare_report

REPORT = bare_report(simulated=False)
SCORE = {"n_patients": 12, "share_in_heart": 0.814, "area_share": 0.352, "ci95": [0.78, 0.85]}
GREY = np.full((64, 64), 0.4)
NOWHERE = np.zeros((64, 64), bool)


def attribution(vendor: str, ef: float) -> Attribution:
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[:, 20:40, 20:40] = 3
    return Attribution(vendor, ef, 0.8, 0.3, np.stack([GREY, GREY]), np.ones((64, 64)), masks)


def page_of(folder, report=REPORT, inputs=ReportInputs()) -> str:  # noqa: B008
    build_report(report, inputs, folder)
    return (folder / "report.html").read_text()


def test_places_of_no_saliency_stay_grey_and_the_strongest_place_has_the_last_colour():
    heat = np.zeros((64, 64))
    heat[8:16, 40:56] = 5
    shown = overlay(GREY, heat, NOWHERE)
    assert shown.shape == (ZOOM * 64, ZOOM * 64, 3)
    np.testing.assert_allclose(shown[ZOOM * 20 :], 0.4)
    expected = (1 - MAX_OPACITY) * 0.4 + MAX_OPACITY * np.array(matplotlib.colormaps["inferno"](1.0)[:3])
    np.testing.assert_allclose(shown[ZOOM * 12, ZOOM * 48], expected, atol=1e-6)
    np.testing.assert_allclose(overlay(GREY, 1000 * heat, NOWHERE), shown, err_msg="every pair has its own scale")
    np.testing.assert_allclose(overlay(GREY, np.zeros((64, 64)), NOWHERE), 0.4)


def test_the_outline_surrounds_the_heart_and_covers_nothing_else():
    heart = NOWHERE.copy()
    heart[20:40, 10:30] = True
    shown = overlay(GREY, np.zeros((64, 64)), heart)
    outlined = np.isclose(shown, OUTLINE).all(axis=2)
    rows, columns = np.nonzero(outlined)
    assert (rows.min(), rows.max()) == (ZOOM * 20, ZOOM * 40 - 1)
    assert (columns.min(), columns.max()) == (ZOOM * 10, ZOOM * 30 - 1)
    assert not outlined[ZOOM * 22 : ZOOM * 38, ZOOM * 12 : ZOOM * 28].any()
    np.testing.assert_allclose(shown[~outlined], 0.4)


def test_the_scale_gets_lighter_all_the_way():
    """So that it is read in grey, and without telling red from green, too."""
    heat = np.tile(np.linspace(0, 1, 64), (64, 1))
    luminance = overlay(GREY, heat, NOWHERE)[64] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance[ZOOM * 20 : -2 * ZOOM]) > -1e-3).all() and luminance[-1] > luminance[0] + 0.2
    assert colour_bar().startswith("linear-gradient(90deg, rgb(102 102 102)")


def test_a_sheet_has_a_column_per_patient_and_end_diastole_above_end_systole():
    patients = []
    for shade in (0.2, 0.6):
        masks = np.zeros((2, 64, 64), np.uint8)
        pair = np.stack([np.full((64, 64), shade), np.full((64, 64), shade + 0.2)])
        patients.append(Attribution("GE", 0.5, 0.8, 0.3, pair, np.zeros((64, 64)), masks))
    sheet = imread(io.BytesIO(base64.b64decode(overlay_sheet(patients).split(",")[1])))
    middles = sheet[[ZOOM * 32, -ZOOM * 32]][:, [ZOOM * 32, -ZOOM * 32], 0]
    np.testing.assert_allclose(middles, [[0.2, 0.6], [0.4, 0.8]], atol=0.01)
    assert sheet.shape[2] == 4 and (sheet[:, ZOOM * 65, 3] == 0).all(), "gaps are transparent"


def test_rows_span_the_ejection_fractions_real_ones_first_and_only_when_they_may():
    efs = np.linspace(0.1, 0.7, 13)
    attributions = {
        "synthetic": [attribution(v, ef) for v in ("GE", "Philips") for ef in efs[::-1]],
        "a": [attribution("GE", 0.5)],
        "b": [attribution("GE", 0.2), attribution("Siemens", math.nan)],
    }
    rows = overlay_rows(attributions, ["a", "b"])
    assert {vendor: [row.kind for row in found] for vendor, found in rows.items()} == {
        "GE": ["real", "synthetic"],
        "Philips": ["synthetic"],
        "Siemens": ["real"],
    }
    assert [each.ef for each in rows["GE"][0].attributions] == [0.2, 0.5]
    assert [each.ef for each in rows["GE"][1].attributions] == pytest.approx(np.linspace(0.1, 0.7, NUM_SHOWN))
    assert {row.kind for found in overlay_rows(attributions, []).values() for row in found} == {"synthetic"}
    assert overlay_rows({}, ["a"]) == {}


def test_report_shows_the_shares_of_the_json_and_says_what_is_undefined(tmp_path):
    nothing = {"n_patients": 0, "share_in_heart": None, "area_share": None, "ci95": None}
    scores = {"synthetic": {"GE": SCORE, "all": SCORE}, "acdc <2>": {"GE": SCORE, "Siemens": nothing, "all": SCORE}}
    page = page_of(tmp_path, {**REPORT, "saliency": scores})
    section = page[page.index('id="saliency"') :].split("</section>")[0]
    assert section.count("81\u00a0%") == 3 and section.count("35\u00a0%") == 3, "one vendor is not repeated as all"
    assert "78\u00a0% to 85\u00a0%" in section and section.count("undefined") == 2
    assert "acdc &lt;2&gt;" in section and "<img" not in section


@pytest.mark.parametrize("report", [REPORT, {**REPORT, "saliency": {}}], ids=["older-run", "no-regressor"])
def test_without_maps_there_is_no_section(tmp_path, report):
    assert "Where the network attributions" not in page_of(tmp_path, report)


def test_images_of_real_patients_need_leave(tmp_path):
    rows = overlay_rows(
        {"synthetic": [attribution("GE", 0.5)], "acdc": [attribution("GE", 0.4), attribution("Siemens", 0.3)]}, ["acdc"]
    )
    report = {**REPORT, "saliency": {"synthetic": {"GE": SCORE, "all": SCORE}}}
    hidden = page_of(tmp_path / "hidden", report, ReportInputs(saliency=rows))
    shown = page_of(tmp_path / "shown", report, ReportInputs(saliency=rows, shown=["acdc"]))
    assert (hidden.count("the heart outlined"), shown.count("the heart outlined")) == (1, 3)
    assert ">Siemens<" not in hidden and "Images of the test patients of acdc are left out" in hidden
