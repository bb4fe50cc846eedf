"""The report shows what `fedcmr-audit` left in the run folder, and nothing where nobody audited."""

import json

import pytest

from server.report.audit import audit_tables, read_audit
from server.report.build import ReportInputs, build_report
from shared.errors import UserError

REPORT = {
    "study": "s", "simulated": True, "regression": {}, "baselines": {}, "settings": "seed: 0\n", "versions": {},
    "privacy": {"unit": "one patient", "accountant": "prv", "delta": 1e-3, "epsilon": 7.9, "sites": {}},
    "synthetic": {"n_cases": 0, "per_vendor": {}, "requested_ef": None, "measured_ef": None, "agreement": None},
    "timing": {"seconds_per_stage": {}, "seconds_per_round": [], "bytes_per_site_and_round": {"up": 1, "down": 1}},
}  # fmt: skip
AUDIT = {
    "canaries": [
        {"build": "noise_off", "claimed_epsilon": 0.998, "lower_bound": 1.92, "num_correct": 24, "num_guesses": 24}
    ],
    "membership": {
        "SimA <1>": {
            "num_members": 300, "num_others": 299, "auc": 0.512, "auc_ci95": [0.47, 0.55], "tpr": 0.01,
            "tpr_ci95": [0.0, 0.03], "largest_member": 2.9, "largest_other": 3.1,
        }
    },
    "copies": {
        "num_pictures": 3600, "num_training": 120, "num_held_out": 45, "share": 0.553, "share_ci95": [0.466, 0.64],
        "num_copies": 0, "num_near_held_out": 2,
    },
}  # fmt: skip


def test_the_page_shows_the_audits_of_the_folder(tmp_path):
    (tmp_path / "audit.json").write_text(json.dumps(AUDIT))
    build_report(REPORT, ReportInputs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    for text in ("Attacks on the claim", "broken on purpose: no noise", "24 of 24", "SimA &lt;1&gt;",
                 "0.51 (0.47 to 0.55)", "300 and 299", "0.55 (0.47 to 0.64)"):  # fmt: skip
        assert text in page, text
    assert json.loads((tmp_path / "report.json").read_text())["audit"] == AUDIT


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
