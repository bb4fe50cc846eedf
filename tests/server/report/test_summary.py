"""Headline, findings and limitations, in every case that a run can end in."""

import pytest

from fedcmr.server.evaluation.tables import table
from fedcmr.server.report.build import as_json
from fedcmr.server.report.limitations import limitations, not_run_note
from fedcmr.server.report.summary import findings, headline, key_figures
from fedcmr.server.report.uncertainty import calibration, verdict
from tests.server.report.report_study import study

NAN = float("nan")


def scored(true, predicted, vendors):
    return table(true, predicted, vendors, 100, 0)


def report_with(simulated=True, **changes) -> dict:
    report = study(simulated)[0] | changes
    (origin,) = set(map(tuple, (entry.items() for entry in report["provenance"]["test_sets"].values())))
    report["provenance"]["test_sets"] = {name: dict(origin) for name in report["regression"]}
    return as_json(report)


def test_a_good_result():
    assert headline(report_with()) == (
        "Trained on synthetic hearts alone, the network misses the ejection fraction of 45 simulated patients by 5.7 "
        "points on average."
    )


def test_a_result_no_better_than_one_guess_says_so():
    report = report_with()
    guess = report["baselines"]["predict_the_mean"]["hospitals"]["all"]
    guess["mae_points"] = report["regression"]["hospitals"]["all"]["mae_points"]
    assert headline(report).endswith("points on average, no better than one guess for everybody.")
    assert "which the network does not clearly beat" in " ".join(findings(report))


def test_one_vendor_and_one_patient_are_named():
    sets = {"acdc": scored([0.5], [0.6], ["Siemens"])}
    report = report_with(regression=sets, baselines={}, simulated=False)
    assert "of 1 real Siemens patient by 10.0 points" in headline(report)
    assert not any("interval" in sentence or "It does best" in sentence for sentence in findings(report))


def test_several_test_sets_are_distinguished():
    sets = {
        "mnms": scored([0.5, 0.4], [0.6, 0.4], ["GE", "Philips"]),
        "acdc": scored([0.5, 0.3, 0.2], [0.6, 0.3, 0.2], ["Siemens"] * 3),
    }
    report = report_with(regression=sets, baselines={})
    assert "of 3 simulated Siemens patients of the test set acdc by 3.3 points" in headline(report)
    assert "On other test sets it misses by 5.0 on mnms (2 patients)." in findings(report)


@pytest.mark.parametrize(
    ("regression", "text"),
    [
        ({}, "no test patient has both"),
        ({"acdc": scored([], [], [])}, "no test patient has both"),
        ({"acdc": scored([0.5, 0.4], [NAN, 0.4], ["GE", "GE"])}, "predictions are not finite"),
    ],
    ids=["no-test-set", "no-patient", "not-a-number"],
)
def test_without_a_result_the_headline_says_why(regression, text):
    report = report_with(regression=regression, baselines={})
    assert headline(report).startswith("This run has no result:") and text in headline(report)
    assert [value for value, _, _ in key_figures(report)[:2]] == ["undefined", "undefined"]


def test_privacy_and_its_absence_are_reported():
    assert "No site's patient spent more than epsilon 7.96." in findings(report_with())
    report = report_with()
    report["privacy"]["epsilon"] = None
    assert "No privacy was guaranteed to the sites' patients." in findings(report)
    assert key_figures(report)[2] == ("none", "", "privacy guaranteed: the sites trained without it")
    assert "the guarantee above" not in " ".join(limitations(report, shown=["hospitals", "mnms", "acdc"]))


def test_baselines_that_were_not_run_are_named_with_how_to_run_them():
    report = report_with()
    assert not_run_note(report) == "Not run: each site alone and the sites' real scans pooled."
    listed = " ".join(limitations(report, shown=["hospitals", "mnms", "acdc"]))
    assert "Not run: each site alone and the sites' real scans pooled." in listed
    assert "evaluation.baselines=[predict_the_mean,prior_only,local_only,pooled_real]" in listed
    score = report["baselines"]["prior_only"]
    full = report_with(baselines=report["baselines"] | {"local_only_1-ge": score, "pooled_real": score})
    assert not_run_note(full) == "" and "Not run" not in " ".join(
        limitations(full, shown=["hospitals", "mnms", "acdc"])
    )


def test_what_few_patients_cannot_tell_is_said_in_words():
    def listed(vendors):
        sets = {"acdc": scored([0.5] * len(vendors), [0.6] * len(vendors), vendors)}
        return " ".join(limitations(report_with(regression=sets), shown=["hospitals", "mnms", "acdc"]))

    assert "its 20 patients come from one vendor, Siemens, and so few say little" in listed(["Siemens"] * 20)
    assert "A result on acdc: 3 patients, an illustration" in listed(["GE", "Philips", "Siemens"])
    assert "of 30 patients (10 GE and 20 Philips)" in listed(["GE"] * 10 + ["Philips"] * 20)
    assert "its 150 patients come from one vendor, GE." in listed(["GE"] * 150)
    assert "on acdc" not in listed(["GE"] * 60 + ["Philips"] * 60)


def test_hidden_images_and_missing_parts_are_named():
    listed = " ".join(limitations(report_with(), shown=[]))
    for text in (
        "evaluation was not run",
        "uncertainty is calibrated: it was not measured",
        "patients were simulated too",
        "Attacks on the trained network",
    ):
        assert text in listed, text
    listed = " ".join(limitations(report_with(simulated=False), shown=[]))
    assert "evaluation.show_real_images=true" in listed and "simulated" not in listed
    listed = " ".join(
        limitations(
            report_with(matrix={"real": {}}, uncertainty={"a": {}}, audit={}), shown=["hospitals", "mnms", "acdc"]
        )
    )
    for text in ("show_real_images", "evaluation was not run", "uncertainty", "Attacks"):
        assert text not in listed, text


@pytest.mark.parametrize(
    ("observed", "ci95", "text"),
    [
        (0.76, [0.62, 0.87], "too narrow, the predicted SD"),
        (0.99, [0.95, 1.0], "too wide, the predicted SD"),
        (0.88, [0.8, 0.95], "within chance of the nominal coverage"),
        (0.88, None, "intervals is 88\u00a0%."),
    ],
)
def test_calibration_is_reported_by_the_ninety_per_cent_interval(observed, ci95, text):
    rows = [{"nominal": 0.5, "observed": 0.1, "ci95": [0.0, 0.2]}, {"nominal": 0.9, "observed": observed, "ci95": ci95}]
    assert text in verdict(rows) and "Coverage of the 90\u00a0%" in verdict(rows)


def test_without_a_measured_coverage_there_is_neither_verdict_nor_figure():
    rows = [{"nominal": 0.9, "observed": None, "ci95": None}]
    assert verdict(rows) == verdict([]) == ""
    assert calibration({"uncertainty": {"acdc": {"coverage": rows}}}) is calibration({}) is None
