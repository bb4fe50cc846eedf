"""The delta of a study, and the epsilons that it reports."""

import json
from dataclasses import replace

import pytest

from fedcmr.server.federation.outcome import privacy_spent
from fedcmr.server.federation.state import FederationState, check_delta, initial_state, read_study
from fedcmr.server.settings import PrivacyConfig
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy import epsilon
from fedcmr.shared.privacy_filter import PrivacyFilter, renyi_order


def test_a_study_whose_delta_is_too_large_for_a_site_is_refused_with_the_sites_name():
    privacy = PrivacyConfig(target_delta=1e-3)
    check_delta(privacy, {"a": 100, "b": 20})
    with pytest.raises(UserError, match=r"privacy.target_delta: .* site big with 130 of them 0.000769, got 0.001"):
        check_delta(privacy, {"a": 100, "big": 130})
    check_delta(replace(privacy, enabled=False), {"big": 130})


def answered(config, prior, run):
    """The state of a run in which every site was charged for every round."""
    state = initial_state(config, prior, read_study(run))
    for site in ("a", "b", "c"):
        state.releases[site] = [
            {"round": number, "task": task, "code": "ok", "charged": True, "release": vars(release)}
            for number, (task, release) in enumerate(state.plan.items(), start=1)
        ]
    return state


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_study_reports_what_a_site_counts_at_its_delta_and_at_a_smaller_one(make_study, prior, rate):
    run = make_study(f"privacy.sample_rate={rate}", "federation.adapter=norm_affine")
    state = answered(run.config, prior, run)
    order = None if rate == 1 else renyi_order(8.0, 1e-3)
    assert state.order == order
    spent, accountant = PrivacyFilter(order).of(list(state.plan.values()), 1e-3)
    assert 7.9 < spent <= 8, "an honest study is within the cap of a site that counts alike"
    assert state.epsilons(1e-3)["a"] == (pytest.approx(spent), accountant)
    assert epsilon(list(state.plan.values()), 1e-3)[0] <= spent * (1 + 1e-6)
    state.publish(run.path / "generator.safetensors", {site: ["GE"] for site in "abc"}, 1e-3)
    privacy = privacy_spent(run)
    smaller = PrivacyFilter(order).of(list(state.plan.values()), 1e-5)[0]
    assert privacy["epsilon"] == pytest.approx(spent) and privacy["epsilon_at_1e-5"] == pytest.approx(smaller)
    assert privacy["sites"]["b"]["epsilon_at_1e-5"] == pytest.approx(smaller) and smaller > spent
    assert json.dumps(privacy)
    state.save(run.path / "checkpoints")
    assert FederationState.load_newest(run.path / "checkpoints").order == order
