"""The report shows what `fedcmr-audit` left in the run folder, and nothing where nobody audited."""

import json

import pytest

from fedcmr.server.report.audit import audit_tables, read_audit
from fedcmr.server.report.build import ReportInputs, build_report
from fedcmr.shared.errors import UserError
from tests.server.report.report_study import bare_report

REPORT = bare_report(simulated=True)
AUDIT = {
    "canaries": [
        {
            "build": build,
            "control": control,
            "claimed_epsilon": 7.98,
            "lower_bound": bound,
            "num_correct": correct,
            "num_guesses": 500,
            "highest_provable": 8.51,
            "verdict": verdict,
            "family": "gaussian",
        }
        for build, control, bound, correct, verdict in (
            ("sound", False, 1.93, 430, "not refuted"),
            ("sound", True, 0.0, 251, "finds nothing"),
            ("noise_off", False, 8.51, 500, "refuted"),
            ("clip_off", False, 2.1, 440, "not refuted"),
        )
    ],
    "membership": {
        "SimA <1>": {
            "num_members": 300,
            "num_others": 299,
            "auc": 0.512,
            "auc_ci95": [0.47, 0.55],
            "tpr": 0.01,
            "tpr_ci95": [0.0, 0.03],
            "largest_member": 2.9,
            "largest_other": 3.1,
            "control_auc": 0.48,
            "p_control": 0.4,
            "control_holds": True,
        }
    },
    "copies": {
        "num_pictures": 3600,
        "num_training": 120,
        "num_held_out": 45,
        "share": 0.553,
        "share_ci95": [0.466, 0.64],
        "num_copies": 0,
        "num_near_held_out": 2,
    },
}


def test_the_page_shows_the_audits_of_the_folder(tmp_path):
    (tmp_path / "audit.json").write_text(json.dumps(AUDIT))
    build_report(REPORT, ReportInputs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    for text in (
        "Attacks on the claim",
        "broken on purpose: no noise",
        "500 of 500",
        "control: all took part",
        "251 of 500",
        "finds nothing",
        "500 guesses refute a claim below 8.51 at best",
        "Broken on purpose: no clip: not refuted at 7.98. What was released refutes claims below 2.10.",
        "0.48 (0.4)",
        "SimA &lt;1&gt;",
        "0.51 (0.47 to 0.55)",
        "300 and 299",
        "0.55 (0.47 to 0.64)",
    ):
        assert text in page, text
    assert json.loads((tmp_path / "report.json").read_text())["audit"] == AUDIT


def test_a_control_that_finds_something_takes_the_rest_back():
    """In the report as on the terminal."""
    rows = [{**row, "verdict": "finds what is not there"} if row["control"] else row for row in AUDIT["canaries"]]
    assert "The control finds what is not there" in audit_tables({"canaries": rows})[0].text
    assert "The control finds" not in audit_tables(AUDIT)[0].text
    attack = {**AUDIT["membership"]["SimA <1>"], "control_auc": 0.8, "p_control": 1e-5, "control_holds": False}
    assert (
        "SimA: it distinguishes members from members (AUC 0.80, p 1e-05)"
        in audit_tables({"membership": {"SimA": attack}})[0].text
    )
    assert "it distinguishes members from members" not in audit_tables(AUDIT)[1].text


def test_without_an_audit_there_is_no_section(tmp_path):
    build_report(REPORT, ReportInputs(), tmp_path)
    assert "Attacks on the claim" not in (tmp_path / "report.html").read_text()
    assert read_audit(tmp_path) is None and audit_tables({}) == []


def test_a_damaged_audit_file_is_named(tmp_path):
    (tmp_path / "audit.json").write_text("[")
    with pytest.raises(UserError, match="no JSON object"):
        build_report(REPORT, ReportInputs(), tmp_path)
    with pytest.raises(UserError, match="another version"):
        audit_tables({"copies": {"share": 1}})
    with pytest.raises(UserError, match="another version"):
        audit_tables({"canaries": [{"build": "sound", "claimed_epsilon": 7.98, "lower_bound": 1.0}]})
