"""The cross-vendor evaluation in the report: its colours, its gaps and its sentences."""

import base64
import re

import pytest

from fedcmr.server.report.build import build_report
from fedcmr.server.report.cross_vendor import cross_vendor_parts, cross_vendor_sentences, trained_on
from fedcmr.server.report.heat_map import NUM_STEPS, STEPS, _luminance, colour_range, heat_map, step_of
from tests.server.report.report_study import full_study, study


def cell(error, n=15, bounds=None):
    figures = dict.fromkeys(("r2", "bias_points", "loa_low_points", "loa_high_points"))
    return {"n_patients": n, "mae_points": error, **figures, "ci95": {"mae_points": bounds}}


def svg_of(image: str) -> str:
    return base64.b64decode(image.partition("base64,")[2]).decode()


TABLE = {
    "GE": {"GE": cell(3.0, bounds=[2.0, 4.0]), "Siemens": cell(7.04, bounds=[6.0, 8.0]), "all": cell(5.0)},
    "Siemens": {"GE": cell(5.0), "Siemens": cell(4.0, bounds=[3.5, 4.5]), "all": cell(4.5)},
    "without GE": {"GE": cell(5.0), "Siemens": cell(4.0)},
    "without Siemens": {"GE": cell(3.0), "Siemens": cell(None)},
    "all": {"GE": cell(3.2), "Siemens": cell(3.8), "all": cell(3.5, bounds=[3.0, 4.0])},
}


def test_the_sentences_give_the_figures():
    sentences = cross_vendor_sentences({"matrix": {"synthetic": TABLE}})
    assert sentences == [
        "Trained on synthetic hearts of GE alone, the network misses Siemens patients by 7.0 points (6.0 to 8.0), the "
        "widest of all pairs; trained on those of Siemens, by 4.0 points (3.5 to 4.5).",
        "Leaving a vendor out changes the error of its own patients, in points: GE +1.8.",
    ]


def test_a_paired_difference_is_given_with_its_interval_and_what_may_be_chance():
    differences = {
        "without GE": {"GE": {"n_patients": 9, "difference_points": 1.9, "ci95": [0.4, 3.0]}},
        "without Philips": {"Philips": {"n_patients": 9, "difference_points": -0.6, "ci95": [-1.1, -0.2]}},
        "without Siemens": {"Siemens": {"n_patients": 9, "difference_points": -0.3, "ci95": [-1.0, 0.2]}},
    }
    report = {
        "matrix": {"synthetic": TABLE | {"without Philips": {}}, "real": {"all": TABLE["all"]}},
        "matrix_differences": {"synthetic": differences},
    }
    sentences = cross_vendor_sentences(report)
    assert (
        "GE +1.9 (+0.4 to +3.0), Philips −0.6 (−1.1 to −0.2) and Siemens −0.3 (−1.0 to +0.2; may be chance)."
        in sentences[1]
    )
    assert sentences[2] == (
        "Trained on all vendors' real scans, the same network misses by 3.5 points (3.0 to 4.0); on their synthetic "
        "hearts, by 3.5 points (3.0 to 4.0)."
    )


@pytest.mark.parametrize("evaluations", [None, {}, {"synthetic": {}}, {"synthetic": {"all": {"all": cell(None)}}}])
def test_where_there_is_no_figure_there_is_no_sentence(evaluations):
    assert cross_vendor_sentences({"matrix": evaluations}) == []


def test_rows_and_columns_are_named_and_gaps_are_marked():
    report = {
        "matrix": {"synthetic": {key: {k: v for k, v in cells.items() if k != "all"} for key, cells in TABLE.items()}}
    }
    del report["matrix"]["synthetic"]["Siemens"]["GE"]
    (part,) = cross_vendor_parts(report)
    texts = re.findall(r">([^<>\n]+)</text>", svg_of(part.image))
    for name in ("GE alone", "all but Siemens", "all vendors", "n = 15", "7.0", "6.0–8.0", "not run", "undefined"):
        assert name in texts, name
    assert texts.count("not run") == texts.count("undefined") == 1
    assert trained_on("without GE") == "all but GE"
    assert [(row.trained_on, row.tested_on) for row in part.rows[:3]] == [
        ("GE alone", "GE"),
        ("GE alone", "Siemens"),
        ("Siemens alone", "Siemens"),
    ]


def test_a_vendors_own_patients_are_framed():
    rows = {"GE alone": {"GE": cell(3.0), "Siemens": cell(4.0)}}
    ink = "stroke: var(--ink)"
    framed, bare = (svg_of(heat_map(rows, own, (3.0, 7.0))) for own in ({"GE alone": "GE"}, {}))
    assert framed.count(ink) == bare.count(ink) + 1


def test_a_larger_error_stands_out_more_in_light_and_in_dark():
    cells = STEPS[:NUM_STEPS]

    def luminance(colour: str) -> float:
        return _luminance([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])

    light, dark = ([luminance(step[column]) for step in cells] for column in (2, 3))
    assert light == sorted(light, reverse=True) and dark == sorted(dark)
    for column, shades in ((2, light), (3, dark)):
        for shade, word in zip(shades, STEPS[NUM_STEPS:], strict=True):
            bright, deep = sorted((shade, luminance(word[column])), reverse=True)
            assert (bright + 0.05) / (deep + 0.05) >= 3.9, "contrast of a figure on its cell (WCAG 2.2)"


def test_colours_span_the_errors_but_never_blow_up_small_ones():
    assert colour_range([3.0, 9.0]) == (3.0, 9.0) and colour_range([3.0, 3.1]) == (3.0, 7.0)
    assert [step_of(error, (3.0, 9.0)) for error in (2.0, 3.0, 8.99, 9.0, 12.0)] == [0, 0, 8, 8, 8]


@pytest.mark.slow
def test_the_page_has_heat_map_table_and_differences(tmp_path):
    report, inputs = full_study()
    build_report(report, inputs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Trained on one vendor, tested on another" in page and "evaluation was not run" not in page.replace(
        "\n", " "
    )
    score = report["matrix"]["synthetic"]["Siemens"]["GE"]
    assert f"{score['ci95']['mae_points'][0]:.1f} to {score['ci95']['mae_points'][1]:.1f}" in page
    assert "difference to<br>all vendors" in page
    build_report(*study(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Trained on one vendor" not in page and "the cross-vendor evaluation was not run" in page
