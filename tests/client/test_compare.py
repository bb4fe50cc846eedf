"""The coordinator's list of releases finds what a ledger has forgotten, also where both of its copies went back."""

import json
import shutil
from dataclasses import asdict

import pytest

from fedcmr.client.cli import main
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import SiteSettings, load_site, write_site
from fedcmr.shared.privacy import Release

RELEASE = Release(4.0, 1.0, 1)


def entry(number, code="ok", charged=True, release=RELEASE):
    return {"round": number, "task": "gradients", "code": code, "charged": charged, "release": asdict(release)}


@pytest.fixture
def site(tmp_path):
    """A site that has answered rounds 1 and 2 of a run, and one round of another."""
    folder = tmp_path / "site"
    write_site(folder, SiteSettings("north", {"GE": 40}, 40, ledger_same_disk=True))
    ledger = Ledger(folder / "ledger")
    for run, number in (("run", 1), ("other", 1), ("run", 2)):
        ledger.reserve(run, number, RELEASE, 1e-3, 100)
        ledger.commit(run, number, b"update")
    return folder


@pytest.fixture
def report(tmp_path):
    def write(*entries, run_id="run", site="north"):
        path = tmp_path / "report.json"
        path.write_text(json.dumps({"privacy": {"run_id": run_id, "releases": {site: list(entries), "south": []}}}))
        return path

    return write


def compared(site, path, capsys, *options):
    code = main(["budget", str(site), "--compare", str(path), *options])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_ledger_that_has_all_of_it_is_in_order(site, report, capsys):
    code, out, _ = compared(site, report(entry(1), entry(2), entry(3, "budget-exhausted", False)), capsys)
    assert code == 0 and "2 releases are in the report and in the ledger" in out


def test_a_ledger_that_was_taken_back_is_found_out(site, report, capsys, tmp_path):
    shutil.copytree(site, tmp_path / "backup")
    ledger = Ledger(site / "ledger")
    for number in (3, 4, 6):
        ledger.reserve("run", number, RELEASE, 1e-3, 100)
        ledger.commit("run", number, b"update")
    path = report(*(entry(number) for number in (1, 2, 3, 4, 6)))
    assert compared(site, path, capsys)[0] == 0
    shutil.rmtree(site)
    shutil.copytree(tmp_path / "backup", site)
    assert main(["budget", str(site)]) == 0, "the two copies agree with each other"
    code, _, error = compared(site, path, capsys)
    assert code == 2 and "run run, rounds 3-4, 6," in error and error.count("\n") == 1


def test_a_release_of_other_noise_is_not_the_same(site, report, capsys):
    code, _, error = compared(site, report(entry(1), entry(2, release=Release(0.5, 1.0, 1))), capsys)
    assert code == 2 and "rounds 2," in error


def test_what_nobody_received_is_no_alarm(site, report, capsys):
    code, out, _ = compared(site, report(entry(1), entry(2), entry(3, "no-answer")), capsys)
    assert code == 0 and "rounds 3: the coordinator has no answer" in out


def test_what_the_coordinator_does_not_tell_is_shown(site, report, capsys):
    code, out, _ = compared(site, report(entry(1)), capsys, "--json")
    assert code == 0
    assert json.loads(out) == {
        "run_id": "run",
        "agreed": [1],
        "forgotten": [],
        "uncertain": [],
        "unreported": [2],
        "evaluation": None,
    }


@pytest.mark.parametrize("form", ["private", "table"])
def test_a_forgotten_evaluation_is_found_out_too(site, report, capsys, form):
    """It stands in the ledger of the test patients, where it was private."""
    path = report(entry(1), entry(2))
    answers = {"north": {"code": "ok", "form": form}, "south": {"code": "no-answer", "form": None}}
    evaluation = {"task": "ejection_fraction", "model_sha256": "ab" * 32, "sites": answers}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"federated_evaluation": evaluation}))
    code, out, error = compared(site, path, capsys)
    if form == "table":
        assert code == 0 and "evaluation" not in out
        return
    assert code == 2 and "not in their ledger" in out
    assert "test_ledger" in error and "the evaluation of run run" in error and error.count("\n") == 1
    ledger = Ledger(load_site(site).test_ledger_path)
    ledger.reserve(f"run-ejection_fraction-{'ab' * 8}", 1, RELEASE, 1e-3, 100)
    ledger.commit(f"run-ejection_fraction-{'ab' * 8}", 1, b"sums")
    code, out, _ = compared(site, path, capsys)
    assert code == 0 and "is in the report and in their ledger" in out


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "report.json"),
        ("[" * 100_000, "report.json"),
        ("{}", "report.json"),
        ('{"privacy": {"run_id": "r", "releases": null}}', "without privacy"),
        ('{"privacy": {"run_id": "r", "releases": {"south": []}}}', "names this site, north"),
        ('{"privacy": {"run_id": "r", "releases": {"north": [{"round": "x"}]}}}', "report.json"),
        ('{"privacy": {"run_id": "r", "releases": {"north": 3}}}', "report.json"),
        (
            '{"privacy": {"run_id": "r", "releases": {"north": []}}, "federated_evaluation": {"sites": 3}}',
            "report.json",
        ),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(site, tmp_path, capsys, text, part):
    (tmp_path / "report.json").write_text(text)
    code, _, error = compared(site, tmp_path / "report.json", capsys)
    assert code == 2 and part in error and error.count("\n") == 1
    (tmp_path / "report.json").unlink()
    assert compared(site, tmp_path / "report.json", capsys)[0] == 2
