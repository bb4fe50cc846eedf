"""A site's own status: from its own files alone, and right after every kind of answer."""

import json

import pytest

from fedcmr.client import error_log
from fedcmr.client.cli import main
from fedcmr.client.deployment import joining
from fedcmr.client.deployment.answers import Answers
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import SiteSettings, load_site, write_site
from fedcmr.shared.privacy import Release

RELEASE = Release(4.0, 1.0, 2)


@pytest.fixture
def site(tmp_path):
    write_site(tmp_path / "site", SiteSettings("a", {"GE": 9}, 9, test="test"))
    return load_site(tmp_path / "site")


def answered(ledger, run_id, server_round):
    with ledger.working():
        ledger.reserve(run_id, server_round, RELEASE, 1e-3, 100, task="statistics")
        ledger.commit(run_id, server_round, b"reply")


def failed(ledger, run_id, server_round):
    with ledger.working():
        ledger.reserve(run_id, server_round, RELEASE, 1e-3, 100, task="gradients")
        ledger.fail(run_id, server_round)


def status(site, capsys):
    assert main(["status", str(site.folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_site_that_has_done_nothing_says_so_and_gets_no_ledger(site, capsys):
    found = status(site, capsys)
    assert found["join"] is None and found["runs"] == {} and found["refused"] == {}
    assert found["budget"] == {"epsilon": 0.0, "max_epsilon": 8.0, "epsilon_left": 8.0}
    assert not site.ledger_path.exists()
    assert main(["status", str(site.folder)]) == 0
    shown = capsys.readouterr().out
    assert "does not run" in shown and "nothing was released" in shown


def test_rounds_refusals_and_budget_are_those_of_its_files(site, capsys):
    ledger = Ledger(site.ledger_path)
    answered(ledger, "first", 1)
    answered(ledger, "first", 2)
    failed(ledger, "second", 1)
    for code in ("budget-exhausted", "rehearsal: too-few-patients", "budget-exhausted"):
        error_log.note(site.folder, code)
    found = status(site, capsys)
    assert {run: (facts["answered"], facts["failed"]) for run, facts in found["runs"].items()} == {
        "first": (2, 0),
        "second": (0, 1),
    }
    assert {code: count["times"] for code, count in found["refused"].items()} == {"budget-exhausted": 2}
    assert list(found["rehearsed"]) == ["too-few-patients"]
    spent = ledger.spent(site.policy.max_delta)
    assert found["budget"]["epsilon"] == spent and found["budget"]["epsilon_left"] == 8 - spent
    assert main(["status", str(site.folder)]) == 0
    shown = capsys.readouterr().out
    assert (
        "2 rounds answered" in shown and "1 failed" in shown and "budget-exhausted" in shown and "(rehearsed)" in shown
    )


def test_entries_are_read_from_both_logs_with_tracebacks_between_them(site):
    try:
        raise ValueError("2026-11-30T10:00:00+00:00 not-an-entry")
    except ValueError:
        error_log.note(site.folder, "internal-error")
    (site.folder / error_log.LOG_NAME).rename(site.folder / error_log.EARLIER_NAME)
    error_log.note(site.folder, "facts-differ")
    assert [entry.code for entry in error_log.read_entries(site.folder)] == ["internal-error", "facts-differ"]


def test_a_join_that_runs_is_seen_and_keeps_a_second_one_out(site, capsys):
    held = joining.lock(site)
    joining.tell_state(site, "online: all is well")
    assert status(site, capsys)["join"]["state"] == "online: all is well"
    with pytest.raises(Exception, match="is joined already"):
        joining.lock(site)
    held.close()
    assert not [path for path in (site.folder / "flwr").iterdir() if path.stat().st_mode & 0o077]
    assert status(site, capsys)["join"] is None, "what an ended one told is not how the site stands"
    joining.lock(site).close()


def test_what_is_answered_is_told_as_it_happens(site):
    ledger = Ledger(site.ledger_path)
    answered(ledger, "earlier", 1)
    error_log.note(site.folder, "facts-differ")
    answers = Answers(site, lambda line: None)
    assert list(answers.new()) == [], "what was before is not told again"
    answered(ledger, "run", 2)
    failed(ledger, "run", 3)
    error_log.note(site.folder, "budget-exhausted")
    error_log.note(site.folder, "rehearsal: budget-exhausted")
    refused, rehearsed, told = list(answers.new())
    assert refused.startswith("refused a request: budget-exhausted: the release would pass") and "Remedy: " in refused
    assert rehearsed.startswith("refused a rehearsed request: budget-exhausted")
    assert told.startswith("answered round 2 of run run: statistics; epsilon spent so far ")
    assert list(answers.new()) == []
    answered(Ledger(site.test_ledger_path), "run", 1)
    assert [line.split(",")[0] for line in answers.new()] == ["answered evaluation on test patients"]
