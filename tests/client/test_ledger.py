import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcmr.client import hash_chained_log
from fedcmr.client import ledger as client_ledger
from fedcmr.client.hash_chained_log import HashChainedLog
from fedcmr.client.ledger import (
    LEDGER_NAME,
    REPLIES_NAME,
    BudgetExhausted,
    Ledger,
    LedgerError,
    WorkFailed,
    dataset_of,
    default_replica,
)
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PREPARED_NAME
from fedcmr.shared.privacy import Release, epsilon
from fedcmr.shared.privacy_filter import PrivacyFilter, renyi_order
from tests.client.ledger_rounds import DELTA, RELEASE, charge

ROOT = Path(__file__).resolve().parents[2]


# What is spent


def test_a_new_ledger_has_spent_nothing(folder):
    assert Ledger(folder).releases() == []
    assert Ledger(folder).spent(DELTA) == 0
    assert Ledger(folder).cached_reply("run", 1) is None


def test_spending_adds_up_over_rounds_runs_and_restarts_and_never_falls(folder):
    releases = [Release(5.0, 1.0, 1), Release(4.0, 1.0, 2), Release(4.0, 0.5, 3), Release(20.0, 1.0, 1)]
    spent = [0.0]
    for server_round, release in enumerate(releases, start=1):
        ledger = Ledger(folder)
        ledger.reserve(f"run {server_round % 2}", server_round, release, DELTA, 100)
        spent.append(Ledger(folder).spent(DELTA))
    assert Ledger(folder).releases() == releases
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(PrivacyFilter().of(releases, DELTA)[0])


def test_the_cap_is_never_exceeded_and_a_refusal_costs_nothing(folder):
    cap = 4.0
    for server_round in range(1, 20):
        before = Ledger(folder).spent(DELTA)
        try:
            charge(folder, server_round, cap=cap)
        except BudgetExhausted as error:
            assert error.code == "budget-exhausted"
            assert Ledger(folder).spent(DELTA) == before
            break
    else:
        pytest.fail("the budget never ran out")
    assert 0 < before <= cap
    assert epsilon([*Ledger(folder).releases(), RELEASE], DELTA)[0] > cap
    charge(folder, 99, Release(1000.0, 1.0, 1), cap=cap)  # something smaller still fits


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_a_cap_that_allows_nothing_allows_nothing(folder, cap):
    with pytest.raises(BudgetExhausted):
        Ledger(folder).reserve("run", 1, RELEASE, DELTA, cap)
    assert Ledger(folder).releases() == []


def test_a_release_without_noise_costs_everything(folder):
    silent = Release(0.0, 1.0, 1)
    with pytest.raises(BudgetExhausted):
        Ledger(folder).reserve("run", 1, silent, DELTA, 1e9)
    Ledger(folder).reserve("run", 1, silent, DELTA, float("inf"))
    with pytest.raises(BudgetExhausted):
        Ledger(folder).reserve("run", 2, RELEASE, DELTA, 1e9)


# Repeated messages


def test_a_charge_whose_process_died_before_its_commit_has_failed_for_ever(folder):
    """It is not trained again: whether it died may have been for a patient's sake."""
    Ledger(folder).reserve("run", 1, RELEASE, DELTA, 100)
    for _ in range(3):
        with pytest.raises(WorkFailed) as caught:
            Ledger(folder).reserve("run", 1, RELEASE, DELTA, 100)
        assert caught.value.code == "internal-error"
    assert Ledger(folder).releases() == [RELEASE]
    assert [charge["failure"] for charge in Ledger(folder).charges()] == ["internal-error"]
    assert [json.loads(line)["kind"] for line in lines_of(folder)] == ["open", "charge", "failure"]


def test_work_that_failed_is_noted_and_cannot_be_committed(folder):
    ledger = Ledger(folder)
    ledger.reserve("run", 1, RELEASE, DELTA, 100)
    ledger.fail("run", 1)
    for finish in (lambda: ledger.commit("run", 1, b"update"), lambda: ledger.fail("run", 1)):
        with pytest.raises(ValueError, match="without a reply"):
            finish()
    with pytest.raises(WorkFailed):
        ledger.reserve("run", 1, RELEASE, DELTA, 100)
    charge(folder, 2)
    assert Ledger(folder).cached_reply("run", 1) is None
    assert Ledger(folder).releases() == [RELEASE, RELEASE], "and stays charged"


def test_a_committed_round_answers_with_the_same_bytes(folder):
    charge(folder, 1)
    assert Ledger(folder).cached_reply("run", 1) == b"update of round 1"
    assert Ledger(folder).cached_reply("run", 1, RELEASE) == b"update of round 1"
    assert Ledger(folder).cached_reply("run", 2) is None
    assert Ledger(folder).cached_reply("other run", 1) is None
    assert Ledger(folder).releases() == [RELEASE]


def test_a_changed_request_of_the_same_round_is_charged_anew(folder):
    changed = Release(3.0, 1.0, 2)
    charge(folder, 1)
    assert Ledger(folder).cached_reply("run", 1, changed) is None
    charge(folder, 1, changed)
    assert Ledger(folder).releases() == [RELEASE, changed]


def test_training_again_after_a_commit_is_charged_anew(folder):
    charge(folder, 1)
    charge(folder, 1)
    assert Ledger(folder).releases() == [RELEASE, RELEASE]


def test_a_reply_belongs_to_the_charge_it_was_trained_under(folder):
    noisy = Release(50.0, 1.0, 1)
    first, second = Ledger(folder), Ledger(folder)
    first.reserve("run", 1, RELEASE, DELTA, 100)
    second.reserve("run", 1, noisy, DELTA, 100)
    first.commit("run", 1, b"costly")  # must not be booked on the cheap charge
    second.commit("run", 1, b"cheap")
    assert Ledger(folder).cached_reply("run", 1, RELEASE) == b"costly"
    assert Ledger(folder).cached_reply("run", 1, noisy) == b"cheap"
    assert Ledger(folder).releases() == [RELEASE, noisy]


def test_a_commit_without_a_charge_is_refused(folder):
    with pytest.raises(ValueError, match="without a reply"):
        Ledger(folder).commit("run", 1, b"update")


def test_a_reply_whose_file_is_gone_or_changed_is_not_sent(folder):
    charge(folder, 1)
    (reply,) = (folder / REPLIES_NAME).iterdir()
    reply.write_bytes(b"something else")
    assert Ledger(folder).cached_reply("run", 1) is None
    reply.unlink()
    assert Ledger(folder).cached_reply("run", 1) is None


# Two at once

RESERVE = """
import sys
from pathlib import Path
from fedcmr.client.ledger import BudgetExhausted, Ledger
from fedcmr.shared.privacy import Release
print("ready", flush=True)
sys.stdin.readline()
try:
    Ledger(Path(sys.argv[1])).reserve(sys.argv[2], 1, Release(2.0, 1.0, 2), 1e-3, float(sys.argv[3]))
    print("charged")
except BudgetExhausted:
    print("refused")
"""


def test_processes_that_reserve_at_once_cannot_pass_the_cap_together(folder):
    cap = 1.01 * epsilon([RELEASE], DELTA)[0]  # room for one
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RESERVE, str(folder), f"run {number}", str(cap)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert answers == ["charged", "refused"]
    assert Ledger(folder).releases() == [RELEASE]
    assert Ledger(folder).spent(DELTA) <= cap


# What a ledger belongs to


def lines_of(folder: Path) -> list[bytes]:
    return (folder / LEDGER_NAME).read_bytes().splitlines()


def test_another_data_set_needs_another_ledger(folder):
    Ledger(folder, dataset="one").reserve("run", 1, RELEASE, DELTA, 100)
    for server_round in (1, 2):
        with pytest.raises(LedgerError, match="name another 'ledger'"):
            Ledger(folder, dataset="two").reserve("run", server_round, RELEASE, DELTA, 100)
    Ledger(folder, dataset="one").reserve("run", 2, RELEASE, DELTA, 100)
    assert Ledger(folder).releases() == [RELEASE, RELEASE], "it can be read without its data"


def test_a_data_set_is_told_by_the_key_of_its_pseudonyms_and_stays_as_patients_are_added(tmp_path):
    def prepared(name: str, **settings: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / PREPARED_NAME).write_text(json.dumps(settings))
        return tmp_path / name

    one = dataset_of(prepared("one", key_check="k1", format="dicom"))
    assert one == dataset_of(prepared("again", key_check="k1", format="acdc"))
    assert one != dataset_of(prepared("other", key_check="k2", format="dicom"))
    assert dataset_of(tmp_path) == dataset_of(tmp_path / "absent") != one
    with pytest.raises(UserError, match="prepare the folder again"):
        dataset_of(prepared("bad", format="dicom"))


def test_every_change_of_the_policy_is_noted_before_the_charge_it_allows(folder):
    for server_round, cap in enumerate((4.0, 4.0, 50.0), start=1):
        ledger = Ledger(folder, policy={"max_epsilon": cap})
        ledger.reserve("run", server_round, Release(3.0, 1.0, 1), DELTA, cap)
    kinds = [(json.loads(line)["kind"], json.loads(line).get("policy")) for line in lines_of(folder)]
    assert kinds == [
        ("open", {"max_epsilon": 4.0}),
        ("charge", None),
        ("charge", None),
        ("policy", {"max_epsilon": 50.0}),
        ("charge", None),
    ]


# What it costs


def test_a_ledger_of_the_format_before_goes_on_with_all_it_has_spent(folder):
    """Its lines hold no costs and no filter: the releases tell them."""
    policy = {"max_epsilon": 8.0, "max_delta": DELTA, "min_sample_rate": 1.0}
    old = [Release(4.0, 1.0, 2), Release(3.0, 0.5, 3)]
    ledger = Ledger(folder, policy=policy)
    for number, release in enumerate(old, start=1):
        ledger.reserve("run", number, release, DELTA, 8)
    new_keys = ("mu_squared", "renyi", "order", "carried")
    entries = [json.loads(line) for line in lines_of(folder)]
    entries = [{k: v for k, v in entry.items() if k not in new_keys} for entry in entries if entry["kind"] != "policy"]
    entries[0]["format"], entries[0]["policy"] = 2, {"max_epsilon": 8.0, "max_delta": DELTA}
    shutil.rmtree(folder)
    default_replica(folder).unlink()
    log = HashChainedLog(folder / LEDGER_NAME, default_replica(folder))
    with log.locked() as lines:
        for entry in entries:
            log.append(lines, {key: value for key, value in entry.items() if key != "previous"})

    renyi = PrivacyFilter(renyi_order(8.0, DELTA))
    assert Ledger(folder).releases() == old
    assert Ledger(folder).spent(DELTA) == pytest.approx(renyi.of(old, DELTA)[0])
    Ledger(folder, policy=policy).reserve("run", 3, old[0], DELTA, 8)
    assert Ledger(folder).spent(DELTA) == pytest.approx(renyi.of([*old, old[0]], DELTA)[0])
    assert Ledger(folder).account(DELTA)[1] == renyi.accountant, "what was sampled once is still counted as it was"


def test_the_filter_is_noted_before_the_first_charge_and_again_when_the_policy_changes(folder):
    strict = {"max_epsilon": 8.0, "max_delta": DELTA, "min_sample_rate": 1.0}
    loose = strict | {"min_sample_rate": 0.1}
    smaller = loose | {"max_epsilon": 1.0}
    for number, policy in enumerate((strict, strict, loose, smaller), start=1):
        Ledger(folder, policy=policy).reserve("run", number, Release(30.0, 1.0, 1), DELTA, 8)
    noted = [entry for entry in map(json.loads, lines_of(folder)) if "order" in entry]
    orders = [None, renyi_order(8.0, DELTA), renyi_order(1.0, DELTA)]
    assert [entry["order"] for entry in noted] == orders and orders[1] != orders[2]
    carried = [number * order / 2 / 30**2 for number, order in ((2, orders[1]), (3, orders[2]))]
    assert [entry["carried"] for entry in noted] == pytest.approx([0, *carried])
    costs = [(entry["mu_squared"], entry["renyi"]) for entry in map(json.loads, lines_of(folder)) if "renyi" in entry]
    assert costs[0] == costs[1] == (pytest.approx(1 / 900), None)
    assert costs[2] == pytest.approx((1 / 900, orders[1] / 1800))


def test_a_charge_only_adds_up_what_earlier_ones_cost(folder, monkeypatch):
    """However many and whatever they are, the accountant is asked about the new one alone: no request is made slow."""
    policy = {"max_epsilon": 8.0, "max_delta": DELTA, "min_sample_rate": 0.1}
    for number in range(1, 13):
        Ledger(folder, policy=policy).reserve("run", number, Release(500.0 + number, 0.5, 1), DELTA, 8)
    asked = []
    cost = PrivacyFilter.cost
    monkeypatch.setattr(PrivacyFilter, "cost", lambda self, release: asked.append(release) or cost(self, release))
    Ledger(folder, policy=policy).reserve("run", 13, RELEASE, DELTA, 8)
    Ledger(folder).spent(DELTA)
    assert asked == [RELEASE]


# The clock


@pytest.fixture
def clock(monkeypatch):
    """`clock(hours)` sets the time to that many hours after some midnight."""

    def set_clock(hours: float) -> None:
        now = datetime(2030, 1, 1, tzinfo=UTC) + timedelta(hours=hours)
        monkeypatch.setattr(client_ledger, "_utc_now", lambda: now)

    return set_clock


def test_a_clock_that_went_back_is_refused_with_the_mend(folder, clock):
    clock(10)
    charge(folder, 1)
    clock(9)
    with pytest.raises(LedgerError, match="set the clock"):
        Ledger(folder).reserve("run", 2, RELEASE, DELTA, 100)
    assert Ledger(folder).releases() == [RELEASE]
    assert Ledger(folder).cached_reply("run", 1) == b"update of round 1", "what has left may leave again"
    clock(10)
    charge(folder, 2)


def test_a_clock_that_is_right_again_after_a_line_from_the_future_is_accepted_by_repair(folder, clock):
    clock(1e5)
    charge(folder, 1)
    clock(0)
    with pytest.raises(LedgerError, match="--repair"):
        Ledger(folder).reserve("run", 2, RELEASE, DELTA, 100)
    Ledger(folder).repair()
    charge(folder, 2)
    assert Ledger(folder).releases() == [RELEASE, RELEASE]


def test_what_network_time_corrects_is_no_clock_that_went_back_and_times_never_fall(folder, clock):
    clock(1)
    charge(folder, 1)
    clock(1 - 0.5 / 60)
    charge(folder, 2)
    times = [json.loads(line)["time"] for line in lines_of(folder)]
    assert times == sorted(times)


def test_a_long_ledger_is_read_without_copying_what_came_before_with_every_line(folder, monkeypatch):
    """That took the square of the number of lines: twenty seconds a round after five thousand cheap requests."""
    ledger = Ledger(folder)
    for number in range(1, 21):
        ledger.reserve("run", number, Release(100.0, 1.0, 1), 1e-3, 8)
    copied = []

    class Counted(hash_chained_log.Lines):
        def __setattr__(self, name, value):
            if name == "content":
                copied.append(len(value))
            super().__setattr__(name, value)

    monkeypatch.setattr(hash_chained_log, "Lines", Counted)
    assert len(ledger.charges()) == 20
    assert sum(copied) <= (folder / LEDGER_NAME).stat().st_size
