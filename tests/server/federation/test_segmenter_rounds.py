"""Rounds for the public segmenter: after the generator's, within the same epsilon, and resumed like any other."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from fedcmr.server.federation.federate import federate
from fedcmr.server.federation.noise_plan import SegmenterPart, plan_noise
from fedcmr.server.federation.state import FEDERATED_SEGMENTER_NAME, FederationState, initial_state, read_study
from fedcmr.server.settings import load
from fedcmr.shared import checkpoint
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy_filter import filter_of
from fedcmr.shared.records import SEGMENTER
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter, public_sha256
from tests.server.federation.test_strategy import ScriptedGrid, agree, newest

ON = ("tasks=[ejection_fraction,segmentation]", "federation.segmenter_rounds=2")


@pytest.fixture
def study(make_study):
    return make_study(*ON, "federation.adapter=norm_affine", num_patients=0)


@pytest.mark.parametrize("adapter", ["statistics", "norm_affine", "lora"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_whole_run_stays_within_the_target_epsilon(make_study, prior, adapter, sample_rate, share):
    run = make_study(
        *ON,
        f"federation.adapter={adapter}",
        f"privacy.sample_rate={sample_rate}",
        f"privacy.segmenter_share={share}",
        num_patients=0,
    )
    config = run.config
    state = initial_state(config, prior, read_study(run))
    entries = []
    for number in range(1, state.num_rounds(config) + 1):
        task = state.task_of(number, config)
        rounds = {"statistics": 1, "gradients": 2, "segmenter": 2}[task]
        release = replace(state.plan[task], num_steps=state.plan[task].num_steps // rounds)
        entries.append({"charged": True, "release": asdict(release)})
    epsilons = replace(state, releases={"a": entries}).epsilons(1e-3)
    assert 0.98 * config.privacy.target_epsilon <= epsilons["a"][0] <= config.privacy.target_epsilon


def test_the_segmenters_share_is_of_the_whole_budget():
    plan = plan_noise(8, 1e-3, 1.0, 10, 0.5, 5, SegmenterPart(0.4, 2, 4))
    parts = [plan.statistics, plan.gradients, plan.segmenter]
    mu_squared = np.array([part.num_steps / part.noise_multiplier**2 for part in parts])
    np.testing.assert_allclose(mu_squared / mu_squared.sum(), [0.3, 0.3, 0.4], rtol=1e-6)
    assert 0.99 * 8 <= filter_of(1.0, 8, 1e-3).of(parts, 1e-3)[0] <= 8
    with pytest.raises(ValueError, match="num_rounds that divides"):
        SegmenterPart(0.4, 3, 4)


def test_the_rounds_come_after_the_generators_and_send_the_segmenters_part(study, prior):
    grid = ScriptedGrid(agree())
    federate(grid, study, prior)
    requests = grid.requests[::3]
    assert [request.task for request in requests] == ["statistics", "gradients", "gradients", "segmenter", "segmenter"]
    last, privacy = requests[-1], study.config.privacy
    assert (last.prior_sha256, last.max_grad_norm) == (public_sha256(), privacy.segmenter_clip)
    assert last.learning_rate == study.config.federation.segmenter_learning_rate
    assert {requests[index].prior_sha256 for index in range(3)} == {prior.sha256}
    state = newest(study)
    tasks = [entry["task"] for entry in state.releases["a"]]
    assert tasks[3:] == [SEGMENTER, SEGMENTER]
    assert [line["task"] for line in study.rounds()] == [request.task for request in requests]
    assert "round 5 of 5 (segmenter): 3 of 3 sites" in (study.path / "log.txt").read_text()


def test_the_published_segmenter_is_the_public_one_but_for_the_averaged_part(study, prior):
    federate(ScriptedGrid(agree(0.01)), study, prior)
    public, tuned = load_segmenter(), load_segmenter(study.path / FEDERATED_SEGMENTER_NAME)
    # Two rounds of +0.01 under a decay of one half: 0.5 * (0.5 * 0.01) + 0.5 * 0.02
    moved = 0.0125
    trained = public.trainable()
    for name, value in tuned.network.state_dict().items():
        difference = (value - public.network.state_dict()[name]).float().numpy()
        np.testing.assert_allclose(difference, moved if name in trained else 0, atol=2e-3 if name in trained else 0)
    facts = checkpoint.load_metadata(study.path / FEDERATED_SEGMENTER_NAME)
    spent = newest(study).max_epsilon(1e-3)
    assert (
        facts["private"]
        and facts["epsilon_of_the_whole_run"] == spent <= 8
        and facts["public_sha256"] == public_sha256()
    )


def test_an_interrupted_run_resumes_to_the_same_segmenter(study, make_study, prior, tmp_path):
    whole = ScriptedGrid(agree())
    federate(whole, study, prior)
    expected, published = newest(study), (study.path / FEDERATED_SEGMENTER_NAME).read_bytes()
    for file in (study.path / "checkpoints").glob("round_0005*"):
        file.unlink()
    (study.path / FEDERATED_SEGMENTER_NAME).unlink()
    again = ScriptedGrid(agree())
    federate(again, study, prior)
    assert {request.server_round for request in again.requests} == {5}, "a finished round is not asked for again"
    resumed = newest(study)
    assert again.requests[0] == whole.requests[-1] and resumed.releases == expected.releases
    for ours, theirs in ((resumed.segmenter, expected.segmenter), (resumed.segmenter_ema, expected.segmenter_ema)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(array, theirs[name]) for name, array in ours.items())
    assert (study.path / FEDERATED_SEGMENTER_NAME).read_bytes() == published


def test_a_checkpoint_of_another_public_segmenter_ends_with_a_line(study, prior, monkeypatch):
    state = initial_state(study.config, prior, read_study(study))
    replace(state, segmenter_sha256="00" * 32).save(study.path / "checkpoints")
    with pytest.raises(UserError, match="another public segmenter"):
        federate(ScriptedGrid(agree()), study, prior)


def test_without_the_setting_nothing_is_requested_planned_or_written(make_study, prior):
    run = make_study("federation.adapter=norm_affine", num_patients=0)
    grid = ScriptedGrid(agree())
    federate(grid, run, prior)
    assert {request.task for request in grid.requests} == {"statistics", "gradients"}
    state = newest(run)
    assert set(state.plan) == {"statistics", "gradients"} and state.segmenter == {} == state.segmenter_ema
    assert not (run.path / FEDERATED_SEGMENTER_NAME).exists()


def test_a_checkpoint_of_an_earlier_version_is_continued(make_study, prior):
    run = make_study("federation.adapter=norm_affine", num_patients=0)
    folder = run.path / "checkpoints"
    initial_state(run.config, prior, read_study(run)).save(folder)
    (path,) = folder.glob("*.safetensors")
    arrays, metadata = checkpoint.load(path)
    del metadata["segmenter_sha256"]
    checkpoint.save(path, arrays, metadata)
    assert FederationState.load_newest(folder).segmenter_sha256 == ""
    federate(ScriptedGrid(agree()), run, prior)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("federation.segmenter_rounds=1", "tasks to hold segmentation"),
        ("federation.segmenter_rounds=-1", "federation.segmenter_rounds >= 0"),
        ("federation.segmenter_learning_rate=0", "federation.segmenter_learning_rate > 0"),
        ("privacy.segmenter_share=1", r"privacy.segmenter_share in \(0, 1\)"),
        ("privacy.segmenter_clip=0", "privacy.segmenter_clip > 0"),
    ],
)
def test_settings_out_of_range_are_one_line(setting, message):
    with pytest.raises(UserError, match=message):
        load("default", [setting])
