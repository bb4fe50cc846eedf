"""The disks of a site and of the server fill up during a deployed study; with space again it continues as if not."""

import pytest

from fedcmr.client.ledger import Ledger
from fedcmr.shared.records import UNCHARGED_CODES
from tests.deployment.conftest import PATIENCE_S, change_site, rounds, start_run, wait_for

pytestmark = pytest.mark.engine

NUM_ROUNDS = 5
RUN_PAGES = 65536
"""256 MiB: the ResNet50 alone takes 94."""


def test_a_study_outlives_full_disks(deployed, small_disk, fill, tmp_path):
    """Site c has no room for its ledger in the first round, the server none for its run folder later on."""
    run, disk = small_disk(tmp_path / "run", RUN_PAGES), small_disk(tmp_path / "site")
    deployed.renew()
    change_site(deployed.sites["c"], ledger=str(disk / "ledger"))
    settings = ("--set", *deployed.settings, f"federation.num_rounds={NUM_ROUNDS}")
    fill(disk, 0)
    with deployed.joined("a", "b", "c"):
        first = start_run(deployed, run, "--test", deployed.test, *settings)
        wait_for(lambda: rounds(run), "the first round")
        fill(disk, None)
        wait_for(lambda: rounds(run)[-1]["answered"] == ["a", "b", "c"], "a round with the site that has room again")
        fill(run, 0)
        assert first.wait(timeout=PATIENCE_S) == 2
        assert "No space left on device" in run.with_suffix(".log").read_text()
        assert len(rounds(run)) < NUM_ROUNDS
        fill(run, None)
        second = start_run(deployed, run, "--resume")
        assert second.wait(timeout=PATIENCE_S) == 0, run.with_suffix(".log").read_text()[-3000:]

    lines = rounds(run)
    assert [line["round"] for line in lines] == list(range(1, NUM_ROUNDS + 1))
    assert lines[0]["answered"] == ["a", "b"] and lines[0]["refused"]["c"] in UNCHARGED_CODES
    assert lines[-1]["answered"] == ["a", "b", "c"]
    ledgers = {"a": deployed.sites["a"] / "ledger", "b": deployed.sites["b"] / "ledger", "c": disk / "ledger"}
    for name, ledger in ledgers.items():
        charged = [charge["round"] for charge in Ledger(ledger).charges()]
        assert charged == [line["round"] for line in lines if name in line["answered"]], "each answer once, no other"
    assert (run / "report.html").is_file()
