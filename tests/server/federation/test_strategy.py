from dataclasses import asdict, replace

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from scipy.stats import trim_mean

from fedcmr.server.federation import strategy as strategy_module
from fedcmr.server.federation.federate import federate
from fedcmr.server.federation.participation import participation, sentences
from fedcmr.server.federation.round import Replies, run_round
from fedcmr.server.federation.senders import BUNDLE_REFUSED, Reply, write_nodes
from fedcmr.server.federation.state import FederationState, initial_state, read_study
from fedcmr.server.federation.vendor_styles import STYLE_STD_RANGE
from fedcmr.shared import checkpoint
from fedcmr.shared.adapters import EARLIER_NAMES
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy import Release, epsilon
from fedcmr.shared.privacy_filter import PrivacyFilter
from fedcmr.shared.records import OK, Request, encode, pack_reply, update_shapes

SITES = {"a": "Siemens", "b": "Philips", "c": "GE"}
DELTA = 1e-3


class ScriptedGrid:
    """A grid whose sites answer as the test says: `script(site, request, arrays) -> RecordDict | Error | None`."""

    def __init__(self, script, sites=SITES):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.script = script
        self.site_of = dict(enumerate(sites, start=2))
        self.requests: list[Request] = []

    def get_node_ids(self):
        return list(self.site_of)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{message.metadata.dst_node_id}"
            request = Request.from_config(message.content["config"])
            self.requests.append(request)
            content = self.script(self.site_of[message.metadata.dst_node_id], request, message.content["arrays"])
            if content is not None:
                replies.append(Message(content, reply_to=message))
        return reversed(replies)


def update_of(request, arrays, value):
    """An update of which every entry is `value`."""
    trainable = {name: array.shape for name, array in arrays.items()}
    shapes = update_shapes(request.task, trainable, 1, 11, request.shape_size)
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}, shapes


def agree(value=0.01):
    """A script: every site answers every request."""

    def script(site, request, arrays):
        return pack_reply(site, OK, *update_of(request, arrays, value))

    return script


@pytest.fixture
def study(make_study):
    """A run folder without patients: the sites of these tests are scripted."""
    return make_study("federation.adapter=norm_affine", num_patients=0)


def newest(run):
    return FederationState.load_newest(run.path / "checkpoints")


def test_aggregation_is_the_plain_mean_and_its_moving_average(study, prior):
    values = {"a": 0.01, "b": 0.04, "c": 0.1}
    decay = study.config.federation.ema_decay
    federate(ScriptedGrid(lambda site, *args: agree(values[site])(site, *args)), study, prior)
    state = newest(study)
    start = {name: value.detach().numpy() for name, value in prior.generator.trainable().items()}
    ema = 0.0
    for server_round in (1, 2):  # two rounds of gradients, each moves every entry by the mean of the updates
        ema = decay * ema + (1 - decay) * server_round * 0.05
    for name, array in start.items():
        np.testing.assert_allclose(state.arrays[name], array + 0.1, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.ema[name], array + ema, rtol=1e-5, atol=1e-6)
    published, metadata = checkpoint.load(study.path / "generator.safetensors")
    for name in start:
        np.testing.assert_array_equal(published[f"trainable/{name}"], state.ema[name])
    assert metadata["prior_sha256"] == prior.sha256


def test_statistics_become_each_vendors_own_distribution(make_study, prior):
    """Without noise there is nothing to draw together; the last variance is beyond what a vendor can have."""
    study = make_study("privacy.enabled=false", num_patients=0)
    statistics = {"a": (0.5, 1.0), "b": (0.2, 0.01), "c": (0.0, 50.0)}

    def script(site, request, arrays):
        if request.task == "statistics":
            _, shapes = update_of(request, arrays, 0)
            mean, square = (np.full((1, 11), value, np.float32) for value in statistics[site])
            return pack_reply(site, OK, {"style_mean": mean, "style_square": square}, shapes)
        return agree()(site, request, arrays)

    federate(ScriptedGrid(script), study, prior)
    state = newest(study)
    np.testing.assert_allclose(state.style_mean["Siemens"], 0.5)
    np.testing.assert_allclose(state.style_std["Siemens"], np.sqrt(1.0 - 0.25), rtol=1e-6)
    np.testing.assert_allclose(state.style_std["Philips"], STYLE_STD_RANGE[0], rtol=1e-6)
    np.testing.assert_allclose(state.style_std["GE"], STYLE_STD_RANGE[1], rtol=1e-6)


def test_a_vendor_whose_sites_are_silent_keeps_the_priors_styles(study, prior):
    def script(site, request, arrays):
        value = 1.0 if request.task == "statistics" else 0.01
        return None if site == "c" and request.task == "statistics" else agree(value)(site, request, arrays)

    federate(ScriptedGrid(script), study, prior)
    state = newest(study)
    assert (state.style_mean["GE"] == 0).all() and (state.style_std["GE"] == 1).all()
    assert (state.style_mean["Siemens"] > 0).all()


def test_the_adapter_of_low_rank_updates_is_aggregated_and_published_under_its_own_names(make_study, prior):
    run = make_study("federation.adapter=lora", num_patients=0)
    grid = ScriptedGrid(agree(0.01))
    federate(grid, run, prior)
    published, metadata = checkpoint.load(run.path / "generator.safetensors")
    part = prior.generator.trainable("lora")
    assert {name.partition("/")[2] for name in published if name.startswith("trainable/")} == set(part)
    decay = run.config.federation.ema_decay
    for name in part:  # B starts at zero; two rounds of 0.01 each
        expected = (1 - decay) * (decay * 0.01 + 0.02)
        np.testing.assert_allclose(published[f"trainable/{name}"], expected, rtol=1e-5)
    assert metadata["adapter"] == "lora" and {request.adapter for request in grid.requests} == {"lora"}
    assert [line["adapter"] for line in run.metrics()] == ["lora"] * 3
    log = (run.path / "log.txt").read_text()
    assert "adapter lora: " in log and "as federation.adapter says" in log


def test_the_adapter_of_statistics_ends_after_them_with_the_whole_budget_spent(make_study, prior):
    run = make_study("federation.adapter=statistics", num_patients=0)
    grid = ScriptedGrid(agree(1.0))  # well above the noise, or it is drawn to the public mean
    federate(grid, run, prior)
    assert {request.task for request in grid.requests} == {"statistics"} and len(grid.requests) == len(SITES)
    spent, _ = epsilon([grid.requests[0].mechanism.release], DELTA)
    assert 0.98 * run.config.privacy.target_epsilon <= spent <= run.config.privacy.target_epsilon
    published, metadata = checkpoint.load(run.path / "generator.safetensors")
    assert (metadata["adapter"], metadata["num_rounds"]) == ("statistics", 1)
    for name, value in prior.generator.trainable("statistics").items():
        np.testing.assert_array_equal(published[f"trainable/{name}"], value.detach().numpy())
    assert (published["code_mean/GE"] > 0).all()
    federate(ScriptedGrid(agree()), run, prior)  # finished: nothing is asked again
    assert [line["round"] for line in run.metrics()] == [1]


def test_left_to_itself_a_study_takes_the_adapter_its_sites_can_pay_for(make_study, prior):
    """Five patients a site cannot pay for steps at epsilon 0.1; without noise the highest adapter is free."""
    run = make_study("federation.adapter=auto", "privacy.target_epsilon=0.1", num_patients=0)
    state = initial_state(run.config, prior, read_study(run))
    assert state.adapter == "statistics" and "signal to noise" in state.choice
    assert "the 3 rounds of federation.num_rounds become 1" in state.described(run.config)
    run.config.privacy.enabled = False
    state = initial_state(run.config, prior, read_study(run))
    assert state.adapter == "lora" and state.described(run.config) == state.choice


def test_a_bad_reply_is_dropped_and_the_round_goes_on(make_study, prior):
    study = make_study("federation.adapter=norm_affine", "federation.min_sites=1", num_patients=0)

    def script(site, request, arrays):
        reply = agree(0.06)(site, request, arrays)
        if site == "b" and request.task == "gradients":
            bad, _ = update_of(request, arrays, np.nan)
            reply["arrays"] = encode(bad)
        if site == "c" and request.task == "gradients":
            return Error(code=1, reason="patient-4711")
        return reply

    federate(ScriptedGrid(script), study, prior)
    state = newest(study)
    assert state.rounds[1]["answered"] == ["a"]
    assert state.rounds[1]["dropped"] == {"b": "non-finite", "unknown": "client-error"}
    bias = prior.generator.trainable()["out.0.bias"].detach().numpy()
    np.testing.assert_allclose(state.arrays["out.0.bias"], bias + 0.12, rtol=1e-5, atol=1e-6)
    assert "4711" not in (study.path / "log.txt").read_text() + (study.path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("code", [3, 4, 5])
def test_a_site_that_flower_gave_up_is_silent_and_counts_as_charged(study, prior, code):
    def script(site, request, arrays):
        late = site == "c" and request.task == "gradients"
        return Error(code=code, reason="expired") if late else agree()(site, request, arrays)

    federate(ScriptedGrid(script), study, prior)
    state = newest(study)
    assert state.rounds[1]["answered"] == ["a", "b"]
    assert (state.rounds[1]["silent"], state.rounds[1]["dropped"]) == (1, {})
    assert [(entry["code"], entry["charged"]) for entry in state.releases["c"]] == [
        (OK, True),
        *[("no-answer", True)] * 2,
    ]


def test_a_round_without_a_usable_answer_keeps_the_arrays(study, prior):
    def script(site, request, arrays):
        return None if request.server_round == 2 else agree()(site, request, arrays)

    federate(ScriptedGrid(script), study, prior)
    before, after = (checkpoint.load(checkpoint.round_path(study.path / "checkpoints", r)) for r in (1, 2))
    for name, array in before[0].items():
        np.testing.assert_array_equal(after[0][name], array)
    assert after[1]["rounds"][1]["silent"] == 3


def test_when_all_sites_refuse_the_run_ends_with_their_codes(study, prior):
    def script(site, request, arrays):
        return pack_reply(site, "budget-exhausted" if site == "a" else "prior-mismatch")

    with pytest.raises(UserError, match=r"round 1 \(a: budget-exhausted, b: prior-mismatch, c: prior-mismatch\)"):
        federate(ScriptedGrid(script), study, prior)
    assert newest(study).server_round == 0, "a refused round may be asked for again"


def test_a_run_in_which_nothing_was_usable_ends_with_an_error(study, prior):
    def script(site, request, arrays):
        return pack_reply(site, "budget-exhausted") if site == "a" else RecordDict()

    with pytest.raises(UserError, match=r"quorum of 2.*a did not take part: refused 2 rounds \(budget-exhausted\)"):
        federate(ScriptedGrid(script), study, prior)
    assert not (study.path / "generator.safetensors").exists()


def test_epsilon_counts_every_request_that_was_not_refused(study, prior):
    def script(site, request, arrays):
        if request.server_round == 2 and site == "a":
            return pack_reply(site, "budget-exhausted")
        if request.server_round == 2 and site == "b":
            return RecordDict()  # broken: it may have been charged
        return agree()(site, request, arrays)

    grid = ScriptedGrid(script)
    federate(grid, study, prior)
    state = newest(study)
    statistics, gradients = grid.requests[0].mechanism.release, grid.requests[-1].mechanism.release
    assert gradients.num_steps == study.config.federation.local_steps
    epsilons = state.epsilons(DELTA)
    assert epsilons["a"] == PrivacyFilter().of([statistics, gradients], DELTA)
    assert epsilons["b"] == epsilons["c"] == PrivacyFilter().of([statistics, gradients, gradients], DELTA)
    assert epsilons["c"][0] <= study.config.privacy.target_epsilon
    assert [entry["code"] for entry in state.releases["a"]] == [OK, "budget-exhausted", OK]
    assert state.rounds[-1]["epsilon"] == epsilons["c"][0]


def test_another_sites_claim_cannot_hide_a_release(study, prior):
    """Site c says that a refused; a's own answer was charged all the same."""

    def script(site, request, arrays):
        if site == "c" and request.server_round == 2:
            return pack_reply("a", "budget-exhausted")
        return agree()(site, request, arrays)

    federate(ScriptedGrid(script), study, prior)
    state = newest(study)
    assert state.rounds[1]["answered"] == ["b"]
    assert [entry["charged"] for entry in state.releases["a"]] == [True, True, True]
    assert [entry["code"] for entry in state.releases["c"]] == [OK, "no-answer", OK]


@pytest.fixture
def known(study):
    """A study that knows which node is whose."""
    write_nodes(study, {site: str(node) for node, site in ScriptedGrid(None).site_of.items()})
    return study


@pytest.mark.parametrize("forged", ["ok", "budget-exhausted"])
@pytest.mark.parametrize("named", ["answers", "silent"])
def test_a_site_cannot_answer_in_the_name_of_another_one(known, prior, forged, named):
    """Site c says that it is b. Neither b's own answer nor its silence, nor what it is charged, is changed by that."""

    def script(site, request, arrays):
        if site == "c" and forged == "ok":
            return pack_reply("b", OK, *update_of(request, arrays, 0.5))
        if site == "c":
            return pack_reply("b", forged)
        return None if site == "b" and named == "silent" else agree(0.06)(site, request, arrays)

    known.config.federation.min_sites = 1
    federate(ScriptedGrid(script), known, prior)
    state = newest(known)
    answered = ["a", "b"] if named == "answers" else ["a"]
    for line in state.rounds:
        assert (line["answered"], line["refused"]) == (answered, {})
        assert line["dropped"] == {"c": "names-another-site"} and line["silent"] == 2 - len(answered)
    bias = prior.generator.trainable()["out.0.bias"].detach().numpy()
    np.testing.assert_allclose(state.arrays["out.0.bias"], bias + 0.12, rtol=1e-5, atol=1e-6)
    own = OK if named == "answers" else "no-answer"
    for site, code in (("b", own), ("c", "dropped-names-another-site")):
        assert [(entry["code"], entry["charged"]) for entry in state.releases[site]] == [(code, True)] * 3
    assert state.epsilons(DELTA)["b"] == state.epsilons(DELTA)["c"] == state.epsilons(DELTA)["a"]


def test_a_site_that_lets_no_code_run_is_named_with_its_refusal_and_charged_nothing(known, prior):
    """Any other error of a client may follow a charge: it is dropped under the site's name, and counts."""

    def script(site, request, arrays):
        if site == "b":
            return Error(code=2, reason=BUNDLE_REFUSED)
        if site == "c" and request.server_round == 2:
            return Error(code=2, reason="<class 'ValueError'>:<'patient-4711'>")
        return agree()(site, request, arrays)

    known.config.federation.min_sites = 1
    federate(ScriptedGrid(script), known, prior)
    state = newest(known)
    assert [line["refused"] for line in state.rounds] == [{"b": "code-not-allowed"}] * 3
    assert [line["dropped"] for line in state.rounds] == [{}, {"c": "client-error"}, {}]
    assert not any(line["silent"] for line in state.rounds)
    assert [entry["charged"] for entry in state.releases["b"]] == [False] * 3
    assert [entry["charged"] for entry in state.releases["c"]] == [True] * 3
    lines = sentences(participation(state.rounds, SITES))
    assert "b did not take part: refused 3 rounds (code-not-allowed)." in lines
    assert "4711" not in "".join((known.path / name).read_text() for name in ("log.txt", "metrics.jsonl"))


def test_when_no_site_lets_the_code_run_the_run_ends_with_their_names(known, prior):
    with pytest.raises(UserError, match="a: code-not-allowed, b: code-not-allowed, c: code-not-allowed"):
        federate(ScriptedGrid(lambda *_: Error(code=2, reason=BUNDLE_REFUSED)), known, prior)


def test_a_refusal_without_a_name_is_its_senders(known, prior):
    def script(site, request, arrays):
        return pack_reply("unknown", "settings-unreadable") if site == "c" else agree()(site, request, arrays)

    federate(ScriptedGrid(script), known, prior)
    assert [line["refused"] for line in newest(known).rounds] == [{"c": "settings-unreadable"}] * 3


def test_a_node_that_is_no_site_of_the_study_is_not_asked_and_its_answer_is_dropped(study, prior, monkeypatch):
    """A site that was registered again meanwhile would be charged for answers that nobody takes for its own."""
    monkeypatch.setattr(strategy_module, "NODE_WAIT_S", 0.0)
    write_nodes(study, {"a": "2", "b": "3"})
    grid = ScriptedGrid(agree())
    federate(grid, study, prior)
    assert len(grid.requests) == 2 * 3 and newest(study).rounds[0]["answered"] == ["a", "b"]

    (study.path / "generator.safetensors").unlink()
    for path in (study.path / "checkpoints").iterdir():
        path.unlink()

    class Intruder(ScriptedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages, timeout=timeout))
            for reply in replies:
                if reply.metadata.src_node_id == 3:
                    reply.metadata.__dict__["_src_node_id"] = 9
            return replies

    study.config.federation.min_sites = 1
    federate(Intruder(agree()), study, prior)
    state = newest(study)
    assert [line["answered"] for line in state.rounds] == [["a"]] * 3
    assert state.rounds[0]["dropped"] == {"unknown": "node-not-in-study"}
    assert all(entry["charged"] for entry in state.releases["b"]), "it may have been charged"


def interrupted_at(server_round):
    """A script that stops the server in a round, after one site has answered."""

    def script(site, request, arrays):
        if request.server_round == server_round and site == "b":
            raise KeyboardInterrupt
        return agree(0.01 * request.server_round)(site, request, arrays)

    return script


def test_an_interrupted_run_repeats_only_its_last_round_under_the_same_run_id(study, prior):
    with pytest.raises(KeyboardInterrupt):
        federate(ScriptedGrid(interrupted_at(3)), study, prior)
    grid = ScriptedGrid(interrupted_at(99))
    federate(grid, study, prior)
    assert {request.server_round for request in grid.requests} == {3}
    first = checkpoint.load(checkpoint.round_path(study.path / "checkpoints", 0))[1]
    assert {request.run_id for request in grid.requests} == {first["run_id"]}
    assert newest(study).plan["statistics"] == Release(**first["plan"]["statistics"])
    assert [line["round"] for line in study.metrics()] == [1, 2, 3]


def in_earlier_words(metadata):
    """A checkpoint's metadata as the first version wrote it."""
    names = {new: old for old, new in EARLIER_NAMES.items()}
    earlier = {key: value for key, value in metadata.items() if key != "adapter"}
    return earlier | {
        "rung": names[metadata["adapter"]],
        "plan": {names.get(task, task): release for task, release in earlier["plan"].items()},
        "releases": {
            site: [entry | {"task": names.get(entry["task"], entry["task"])} for entry in entries]
            for site, entries in earlier["releases"].items()
        },
        "rounds": [
            {key: value for key, value in line.items() if key != "adapter"} | {"rung": names[line["adapter"]]}
            for line in earlier["rounds"]
        ],
    }


def test_a_checkpoint_of_an_earlier_version_resumes_in_todays_words(study, prior):
    with pytest.raises(KeyboardInterrupt):
        federate(ScriptedGrid(interrupted_at(3)), study, prior)
    before = newest(study)
    for path in (study.path / "checkpoints").iterdir():
        arrays, metadata = checkpoint.load(path)
        checkpoint.save(path, arrays, in_earlier_words(metadata))
    resumed = newest(study)
    assert asdict(resumed).keys() == asdict(before).keys() and resumed.plan == before.plan
    assert (resumed.adapter, resumed.releases, resumed.rounds) == (before.adapter, before.releases, before.rounds)
    grid = ScriptedGrid(interrupted_at(99))
    federate(grid, study, prior)
    assert {(request.server_round, request.adapter) for request in grid.requests} == {(3, "norm_affine")}


def test_a_resumed_run_equals_an_uninterrupted_one(study, prior):
    federate(ScriptedGrid(interrupted_at(99)), study, prior)
    whole = newest(study)
    for path in (study.path / "checkpoints").iterdir():
        path.unlink()
    for stop in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            federate(ScriptedGrid(interrupted_at(stop)), study, prior)
    federate(ScriptedGrid(interrupted_at(99)), study, prior)
    resumed = newest(study)
    for name, array in whole.ema.items():
        np.testing.assert_array_equal(resumed.ema[name], array)


def test_a_full_disk_ends_the_run_and_the_round_is_asked_again_under_the_same_run_id(study, prior, small_disk, fill):
    disk = small_disk(study.path / "checkpoints")

    def script(site, request, arrays):
        if request.server_round == 2:
            fill(disk, 0)
        return agree()(site, request, arrays)

    with pytest.raises(OSError, match="No space left on device"):
        federate(ScriptedGrid(script), study, prior)
    fill(disk, None)
    before = newest(study)
    assert before.server_round == 1 and [entry["round"] for entry in before.releases["a"]] == [1]
    grid = ScriptedGrid(agree())
    federate(grid, study, prior)
    assert {(request.server_round, request.run_id) for request in grid.requests} == {
        (2, before.run_id),
        (3, before.run_id),
    }
    assert [entry["round"] for entry in newest(study).releases["a"]] == [1, 2, 3]


def test_a_truncated_newest_checkpoint_costs_one_round(study, prior):
    federate(ScriptedGrid(agree()), study, prior)
    path = checkpoint.round_path(study.path / "checkpoints", 3)
    path.write_bytes(path.read_bytes()[:100])
    grid = ScriptedGrid(agree())
    federate(grid, study, prior)
    assert {request.server_round for request in grid.requests} == {3}


def test_a_line_lost_between_checkpoint_and_metrics_is_written_on_resume(study, prior):
    federate(ScriptedGrid(agree()), study, prior)
    lines = (study.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (study.path / "metrics.jsonl").write_text("".join(lines[:-1]))
    federate(ScriptedGrid(agree()), study, prior)
    assert [line["round"] for line in study.metrics()] == [1, 2, 3]


def test_another_prior_does_not_continue_a_run(study, prior):
    federate(ScriptedGrid(agree()), study, prior)
    other = replace(prior, sha256="00" * 32)
    with pytest.raises(UserError, match="another prior"):
        federate(ScriptedGrid(agree()), study, other)


def test_the_whole_runs_noise_meets_the_target(study, prior):
    grid = ScriptedGrid(agree())
    federate(grid, study, prior)
    per_site = [request.mechanism.release for request in grid.requests[:: len(SITES)]]
    spent, _ = epsilon(per_site, DELTA)
    assert 0.98 * study.config.privacy.target_epsilon <= spent <= study.config.privacy.target_epsilon


def test_without_privacy_nothing_is_claimed(make_study, prior):
    run = make_study("privacy.enabled=false", num_patients=0)
    grid = ScriptedGrid(agree())
    federate(grid, run, prior)
    assert not any(request.private for request in grid.requests)
    metadata = checkpoint.load(run.path / "generator.safetensors")[1]
    assert metadata["private"] is False
    assert all(site["epsilon"] is None for site in metadata["sites"].values())
    assert "no privacy" in (run.path / "log.txt").read_text()


def test_a_round_does_not_wait_for_ever_for_a_site(study, prior, monkeypatch):
    monkeypatch.setattr(strategy_module, "NODE_WAIT_S", 0.02)
    monkeypatch.setattr(strategy_module, "NODE_POLL_S", 0.01)
    federate(ScriptedGrid(agree(), sites=["a", "c"]), study, prior)
    state = newest(study)
    assert state.rounds[0]["answered"] == ["a", "c"]
    assert "b" not in state.releases


def test_a_round_below_its_quorum_changes_nothing_and_is_charged(make_study, prior):
    study = make_study("federation.adapter=norm_affine", "federation.min_sites=2", num_patients=0)

    def script(site, request, arrays):
        if request.server_round == 2 and site != "a":
            return None if site == "b" else RecordDict()
        return agree()(site, request, arrays)

    federate(ScriptedGrid(script), study, prior)
    before, after = (checkpoint.load(checkpoint.round_path(study.path / "checkpoints", r)) for r in (1, 2))
    for name, array in before[0].items():
        np.testing.assert_array_equal(after[0][name], array)
    state = newest(study)
    assert [entry["missing"] for entry in state.rounds] == [0, 1, 0]
    assert [entry["charged"] for entry in state.releases["a"]] == [True, True, True]
    assert "1 short of the quorum, nothing changed" in (study.path / "log.txt").read_text()


def test_statistics_below_the_quorum_leave_the_priors_styles(make_study, prior):
    study = make_study("federation.adapter=norm_affine", "federation.min_sites=2", num_patients=0)

    def script(site, request, arrays):
        return None if request.server_round == 1 and site != "a" else agree()(site, request, arrays)

    federate(ScriptedGrid(script), study, prior)
    assert all((code == 0).all() for code in newest(study).style_mean.values())


def test_a_run_that_never_had_its_quorum_ends_with_an_error(make_study, prior):
    study = make_study("federation.adapter=norm_affine", "federation.min_sites=3", num_patients=0)
    with pytest.raises(UserError, match="fewer usable answers than the quorum of 3"):
        federate(ScriptedGrid(lambda site, *args: None if site == "c" else agree()(site, *args)), study, prior)
    assert not (study.path / "generator.safetensors").exists()


def test_sites_below_the_quorum_are_not_asked(make_study, prior, monkeypatch):
    """Their answers would be charged for nothing."""
    study = make_study("federation.min_sites=2", "federation.reply_timeout_s=0.05", num_patients=0)
    monkeypatch.setattr(strategy_module, "NODE_WAIT_S", 0.01)
    monkeypatch.setattr(strategy_module, "NODE_POLL_S", 0.01)
    grid = ScriptedGrid(agree(), sites=["a"])
    with pytest.raises(UserError, match="1 of the 2 sites it takes connected within"):
        federate(grid, study, prior)
    assert grid.requests == [] and newest(study).server_round == 0


@pytest.mark.parametrize("setting", ["federation.min_sites=4", "federation.trim=2"])
def test_a_quorum_beyond_the_study_is_refused(make_study, prior, setting):
    study = make_study(setting, num_patients=0)
    with pytest.raises(UserError, match="need more answers than the study has sites, 3"):
        federate(ScriptedGrid(agree()), study, prior)


def test_the_trimmed_mean_is_scipys_and_outlives_a_plausible_liar(prior, make_study):
    study = make_study("federation.adapter=norm_affine", num_patients=0)
    rng = np.random.default_rng(0)
    state = initial_state(study.config, prior, read_study(study))
    start = {name: array.copy() for name, array in state.arrays.items()}
    sites = "abcde"
    updates = {
        site: {name: rng.normal(size=array.shape).astype(np.float32) for name, array in start.items()} for site in sites
    }
    state = state.after_gradients(updates, 0.0, trim=1)
    for name, array in start.items():
        expected = trim_mean(np.stack([updates[site][name] for site in sites]), 0.2, axis=0)
        np.testing.assert_allclose(state.arrays[name] - array, expected, atol=1e-6)
        np.testing.assert_array_equal(state.ema[name], state.arrays[name])
    honest = {site: {name: np.full_like(array, 0.01) for name, array in start.items()} for site in "ab"}
    lying = {"c": {name: np.full_like(array, 100.0) for name, array in start.items()}}
    state = initial_state(study.config, prior, read_study(study))
    state = state.after_gradients(honest | lying, 0.0, trim=1)
    for name, array in start.items():
        np.testing.assert_allclose(state.arrays[name], array + 0.01, atol=1e-6)


def test_without_any_site_the_run_ends_with_a_line(make_study, prior, monkeypatch):
    run = make_study("federation.reply_timeout_s=0.03", num_patients=0)
    monkeypatch.setattr(strategy_module, "NODE_POLL_S", 0.01)
    with pytest.raises(UserError, match="no site connected"):
        federate(ScriptedGrid(agree(), sites=[]), run, prior)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        '{"sites": {}}',
        '{"sites": {"a": {"vendor": "GE"}}}',
        '{"sites": {"a": {"vendor": "GE", "nominal_patients": 0}}}',
    ],
)
def test_an_unusable_study_file_is_a_users_error(study, text):
    path = study.path / "study.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"study\.json"):
        read_study(study)


def test_the_first_round_asks_for_statistics_under_their_own_clip(study, prior):
    grid = ScriptedGrid(agree())
    federate(grid, study, prior)
    first, second = grid.requests[0], grid.requests[3]
    privacy = study.config.privacy
    assert (first.task, first.max_grad_norm, first.local_steps) == ("statistics", privacy.statistics_clip, 2)
    assert (second.task, second.max_grad_norm) == ("gradients", privacy.max_grad_norm)


class Direct:
    """The sites of a script without Flower: each record that it would send is handed over as it is."""

    def __init__(self, script):
        self.script = script

    def train(self, request, arrays):
        replies = [Reply(None, self.script(site, request, encode(arrays))) for site in SITES]
        return Replies(len(SITES), replies)


def test_rounds_without_flower_give_what_rounds_by_flower_give(study, prior):
    """A refusal, an update that is not finite, and honest ones: the same states and the same line of every round."""

    def script(site, request, arrays):
        reply = agree(0.01 * request.server_round)(site, request, arrays)
        if (site, request.server_round) == ("c", 2):
            return pack_reply(site, "budget-exhausted")
        if (site, request.server_round) == ("b", 3):
            reply["arrays"] = encode(update_of(request, arrays, np.nan)[0])
        return reply

    study.config.federation.min_sites = 2
    sites = read_study(study)
    federate(ScriptedGrid(script), study, prior)
    by_flower = newest(study)
    state = replace(initial_state(study.config, prior, sites), run_id=by_flower.run_id)
    for line in by_flower.rounds:
        before = {name: array.copy() for name, array in state.arrays.items()}
        after, happened = run_round(state, sites, study.config, Direct(script).train)
        assert happened.attendance().items() <= line.items()
        for name, array in before.items():
            np.testing.assert_array_equal(state.arrays[name], array, "the state before a round is left as it was")
        state = after
    assert state.releases == by_flower.releases and state.server_round == by_flower.server_round
    for ours, theirs in (
        (state.arrays, by_flower.arrays),
        (state.ema, by_flower.ema),
        (state.style_std, by_flower.style_std),
    ):
        assert ours.keys() == theirs.keys()
        for key, array in ours.items():
            np.testing.assert_array_equal(array, theirs[key])


def test_a_round_that_all_refuse_leaves_the_state_as_it_was(study, prior):
    state = initial_state(study.config, prior, read_study(study))
    refuse = Direct(lambda site, *_: pack_reply(site, "budget-exhausted"))
    with pytest.raises(UserError, match="all sites refused round 1"):
        run_round(state, read_study(study), study.config, refuse.train)
    assert state.releases == {} and state.server_round == 0
