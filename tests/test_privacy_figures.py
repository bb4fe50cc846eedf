"""Privacy is counted as it was before: plans, epsilons and ledgers of earlier versions, figure for figure.

The figures and `tests/client/ledgers_of_0_1` were written by the code before requests, charges and training shared one
`Mechanism`. The ledgers' patients are invented.
"""

import shutil
from dataclasses import asdict, astuple
from pathlib import Path

import pytest

from fedcmr.client.budget import read_budget
from fedcmr.client.ledger import Ledger, WorkFailed
from fedcmr.client.policy import SitePolicy, SiteSettings
from fedcmr.client.release import Refused, charged
from fedcmr.server.federation.adapters import plan_adapter
from fedcmr.server.settings import load
from fedcmr.shared.adapters import ADAPTERS
from fedcmr.shared.privacy import Mechanism, Release, epsilon
from fedcmr.shared.privacy_filter import filter_of
from fedcmr.shared.records import Request
from tests.wire_request import usual_request

LEDGERS = Path(__file__).parent / "client" / "ledgers_of_0_1"
RUN = "0123456789abcdef"
DATASET = "0" * 64
STATISTICS, NORM_AFFINE = ADAPTERS[:2]

PLANS = [
    # overrides; adapter; the releases; epsilon of them fixed in advance, and by the filter that a site counts with
    ((), STATISTICS, [(0.6801391361716438, 1.0, 2)], 7.979855133476192, 7.979855133476192),
    (
        (),
        NORM_AFFINE,
        [(0.9618619906746602, 1.0, 2), (2.150788796121809, 1.0, 10)],
        7.979855133476192,
        7.97985513347619,
    ),
    (
        ("privacy.sample_rate=0.5",),
        NORM_AFFINE,
        [(1.1616392740347585, 1.0, 2), (1.298752191037613, 0.5, 10)],
        6.893046218967554,
        7.980272122473545,
    ),
    (
        ("privacy.statistics_share=0.2", "privacy.target_epsilon=3"),
        NORM_AFFINE,
        [(3.2867372646190414, 1.0, 2), (3.6746839739349455, 1.0, 10)],
        2.9925014763849567,
        2.9925014763849567,
    ),
]


@pytest.mark.parametrize(("overrides", "adapter", "releases", "fixed", "filtered"), PLANS)
def test_a_study_plans_the_same_noise_for_the_same_epsilon(overrides, adapter, releases, fixed, filtered):
    config = load("default", overrides)
    privacy, num_rounds = config.privacy, config.federation.num_rounds - 1
    plan = list(plan_adapter(adapter, privacy, num_rounds * config.federation.local_steps, num_rounds).values())
    for release, expected in zip(plan, releases, strict=True):
        assert astuple(release) == pytest.approx(expected, rel=1e-12)
    counted = [Release(*release) for release in releases]
    assert epsilon(counted, privacy.target_delta)[0] == pytest.approx(fixed, rel=1e-12)
    how = filter_of(privacy.sample_rate, privacy.target_epsilon, privacy.target_delta)
    assert how.of(counted, privacy.target_delta)[0] == pytest.approx(filtered, rel=1e-12)


def test_a_request_is_one_mechanism_from_the_wire_to_the_charge():
    request = usual_request(
        run_id=RUN,
        adapter=NORM_AFFINE,
        noise_multiplier=2.5,
        sample_rate=0.5,
        max_grad_norm=0.03,
        local_steps=2,
        learning_rate=3.0,
        num_views=8,
    )
    mechanism = Request.from_config(request.to_config()).mechanism.at(40)
    assert asdict(mechanism) == {
        "noise_multiplier": 2.5,
        "sample_rate": 0.5,
        "num_steps": 2,
        "max_grad_norm": 0.03,
        "target_delta": 1e-3,
        "private": True,
        "nominal_patients": 40,
    }
    assert mechanism.release == Release(2.5, 0.5, 2)


def test_a_mechanism_divides_by_a_sites_own_number_or_not_at_all():
    mechanism = Mechanism(2.5, 0.5, 2, max_grad_norm=0.03, target_delta=1e-3)
    with pytest.raises(ValueError, match="nominal_patients"):
        _ = mechanism.divisor
    assert mechanism.at(40).divisor == 40
    assert mechanism.at(40).release == mechanism.release, "epsilon does not depend on it"


@pytest.fixture
def old_ledger(tmp_path):
    """A ledger as an earlier version left it: `of(name)` -> ledger. The replies' files are gone."""

    def of(name):
        folder = tmp_path / name / "ledger"
        folder.mkdir(parents=True)
        shutil.copy(LEDGERS / f"{name}.jsonl", folder / "ledger.jsonl")
        shutil.copy(LEDGERS / f"{name}.jsonl", folder.with_name("ledger.witness"))
        rate = {"gaussian": 1.0, "renyi": 0.5}[name]
        return Ledger(folder, dataset=DATASET, policy=asdict(SitePolicy(min_sample_rate=rate)))

    return of


@pytest.mark.parametrize(
    ("name", "epsilons", "at_small_delta"),
    [
        ("gaussian", [2.185347672747589, 2.8883897079022343, 3.503633899502877, 4.0641603584253305], 5.575230671753286),
        ("renyi", [3.3301313177967717, 3.462978868939033, 3.595826420081294, 3.7286739712235555], 6.031259064217601),
    ],
)
def test_an_earlier_ledger_opens_and_sums_to_the_same_epsilon(old_ledger, name, epsilons, at_small_delta):
    ledger = old_ledger(name)
    assert ledger.epsilons(1e-3) == pytest.approx(epsilons, rel=1e-12)
    assert ledger.spent(1e-3) == pytest.approx(epsilons[-1], rel=1e-12)
    assert ledger.spent(1e-5) == pytest.approx(at_small_delta, rel=1e-12)
    assert ledger.releases()[0] == Release(1.9, 1.0, 2) and len(ledger.releases()) == 4


def test_the_budget_names_an_earlier_ledgers_tasks_in_todays_words(old_ledger):
    ledger = old_ledger("gaussian")
    site = SiteSettings("a", {"GE": 40}, 40)
    assert [line["task"] for line in read_budget(site, ledger)["history"]] == ["statistics", *["gradients"] * 3]


@pytest.mark.parametrize("name", ["gaussian", "renyi"])
@pytest.mark.parametrize("server_round", [3, 4])
def test_an_earlier_ledger_does_no_work_twice(old_ledger, name, server_round):
    """Round 3 has failed and round 4 was interrupted: the same request gets the same failure, and costs nothing."""
    ledger = old_ledger(name)
    rate = {"gaussian": 1.0, "renyi": 0.5}[name]
    mechanism = Mechanism(2.5, rate, 2, max_grad_norm=0.03, target_delta=1e-3)
    before = ledger.spent(1e-3)
    with pytest.raises(WorkFailed):
        ledger.reserve(RUN, server_round, mechanism.release, 1e-3, 8.0)
    with pytest.raises(Refused, match="internal-error"):
        charged(ledger, (RUN, server_round), mechanism, pytest.fail, cap=8.0)
    assert ledger.spent(1e-3) == before and len(ledger.charges()) == 4


def test_an_earlier_ledger_goes_on(old_ledger):
    ledger = old_ledger("gaussian")
    mechanism = Mechanism(2.5, 1.0, 2, max_grad_norm=0.03, target_delta=1e-3)
    assert charged(ledger, (RUN, 5), mechanism, lambda: b"update", cap=8.0, task="gradients") == b"update"
    releases = [Release(1.9, 1.0, 2)] + [Release(2.5, 1.0, 2)] * 4
    assert ledger.spent(1e-3) == pytest.approx(epsilon(releases, 1e-3)[0], rel=1e-9)
    with pytest.raises(Refused, match="budget-exhausted"):
        charged(ledger, (RUN, 6), mechanism, pytest.fail, cap=ledger.spent(1e-3))
