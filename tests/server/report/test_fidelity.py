"""The report's section on fidelity: its tables, what could not be measured, and whose images it shows."""

import re

from fedcmr.server.report.build import render_html
from fedcmr.server.report.images import NUM_LARGE, Row, SampleSheet, sample_sheets
from fedcmr.shared.views import Grid
from tests.server.disc_case import disc_case
from tests.server.report.report_study import fidelity_block, study


def section(block, **changes):
    report, inputs = study(simulated=False)
    inputs = type(inputs)(**{**vars(inputs), **changes})
    page = render_html(report if block is None else {**report, "fidelity": block}, inputs)
    found = re.search(r'<section aria-labelledby="fidelity">.*?</section>', page, re.DOTALL)
    return found.group() if found else ""


def test_every_comparison_has_a_row_with_its_intervals_and_the_own_one_stands_out():
    text = section(fidelity_block())
    assert text.count("synthetic, and other vendors' patients".replace("'", "&#39;")) == 2
    assert (
        '<tr class="main"><th scope="row">synthetic, and Siemens patients</th><td>31.4<small>31.3 to 31.5</small>'
        in text
    )
    assert "<td>−0.02<small>−0.12 to 0.08</small></td>" in text
    assert "130.2 ± 41.0" in text and "Siemens, 15 patients; 7 a side" in text
    halves = re.search(r"one half of the Siemens patients.*?</tr>", text, re.DOTALL).group()
    assert halves.count("<td>–</td>") == 2  # no network is asked
    assert text.count("Wasserstein distance, public prior only") == 2
    assert "Not measured for GE: fewer than 8 test patients" in text


def test_a_run_that_measured_nothing_has_no_section_and_one_without_test_patients_says_why():
    assert section(None) == ""
    text = section({**fidelity_block(), "test_sets": [], "groups": {}, "not_measured": {}})
    assert "no test patient is with the coordinator" in text and "<table" not in text


def test_real_patients_are_shown_large_only_where_they_may_be():
    images = study()[1].samples["GE"].real.images[:2]
    sheet = {"GE": SampleSheet(Row(images, [0.2, 0.6]), Row(images, [0.2, 0.6]))}
    assert section(fidelity_block(), large=sheet, shown=[]).count("<img") == 1
    assert section(fidelity_block(), large=sheet, shown=["hospitals"]).count("<img") == 2


def test_large_images_are_few_and_on_the_grid_of_the_comparison():
    made, real = ([disc_case(f"p{i}", 0.2 + i / 20, seed=i + seed) for i in range(6)] for seed in (0, 50))
    sheet = sample_sheets(made, real, NUM_LARGE, Grid(96, 1.25))["Siemens"]
    assert sheet.real is not None
    assert sheet.synthetic.images.shape == sheet.real.images.shape == (NUM_LARGE, 2, 96, 96)
