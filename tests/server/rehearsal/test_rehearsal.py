"""A rehearsal finds what would stop a study, charges nothing, and lets nothing of a patient out."""

import hashlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.common.serde import message_to_proto

from fedcmr.client import rehearsal as client_rehearsal
from fedcmr.client import training
from fedcmr.client.app import app
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import load_site, write_site
from fedcmr.server.federation.senders import Reply, write_nodes
from fedcmr.server.federation.state import initial_state, make_request, read_study
from fedcmr.server.rehearsal.outcomes import Outcome, check_rehearsal
from fedcmr.server.rehearsal.rehearsal import FILE_NAME, plan, show
from fedcmr.shared.case import INDEX_NAME
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy import Release
from fedcmr.shared.records import OK, pack_rehearsal, pack_rehearsal_reply, read_planned, update_shapes
from fedcmr.simulations import cli as simulations_cli
from fedcmr.simulations.grid import make_grid, run_server_app

SMALL = (
    "federation.adapter=norm_affine",
    "federation.num_rounds=3",
    "federation.local_steps=1",
    "federation.num_views=1",
    "synthesis.num_cases=3",
    "synthesis.num_slices=2",
    "synthesis.num_steps=1",
    "regression.num_steps=2",
    "regression.batch_size=2",
    "regression.num_tta=1",
    "evaluation.baselines=[]",
    "evaluation.num_bootstrap=100",
)


@pytest.fixture
def study(make_study, write_cases):
    """A study of three sites with test patients, small enough to be run."""

    def make(*overrides, **options):
        run = make_study(*SMALL, *overrides, **options)
        write_cases(run.path / "test" / "hospitals", "GE", 2, seed=9)
        return run

    return make


def rehearse(run):
    """The facts that the ServerApp finds over the in-process grid."""
    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path), "rehearsal": True})
    return json.loads((run.path / FILE_NAME).read_text())


def ledgers(run):
    """SHA-256 of every file of the sites' ledgers that holds anything."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for site in (run.path / "sites").iterdir()
        for path in [*site.glob("ledger/**/*"), *site.glob("ledger.*")]
        if path.is_file() and path.stat().st_size
    }


def change(folder, **changes):
    settings = replace(load_site(folder), **changes)
    (folder / "site.yaml").unlink()
    write_site(folder, settings)


@pytest.mark.slow
def test_a_rehearsal_charges_nothing_and_the_study_runs_afterwards(study, capsys):
    run = study()
    other = Ledger(run.path / "sites" / "a" / "ledger", dataset=hashlib.sha256(b"fedcmr data set ").hexdigest())
    other.reserve("another", 1, Release(30.0, 1.0, 1), 1e-3, 100)
    before = ledgers(run)
    facts = rehearse(run)
    assert ledgers(run) == before and len(before) == 2
    assert not (run.path / "checkpoints").exists() and not run.metrics()
    assert facts["reasons"] == [] and facts["connected"] == 3 and facts["unnamed"] == []
    for site in facts["sites"].values():
        assert site["codes"] == {"statistics": OK, "gradients": OK} and set(site["seconds"]) == {
            "statistics",
            "gradients",
        }
    assert facts["coordinator"]["test_sets"] == {"hospitals": 2}
    show(facts)
    assert "the study can start" in capsys.readouterr().out

    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path)})
    report = json.loads((run.path / "report.json").read_text())
    for name, site in report["privacy"]["sites"].items():
        assert facts["sites"][name]["epsilon"] == pytest.approx(site["epsilon"], rel=1e-6), (
            "what it said is what it cost"
        )


def test_a_plan_is_what_the_rounds_release(study, prior):
    run = study()
    sites = read_study(run)
    state = initial_state(run.config, prior, sites)
    requests = {request.task: request for request in (make_request(run.config, state, n, sites) for n in (1, 3))}
    planned = plan(requests, {"statistics": 1, "gradients": 2})
    rounds = [make_request(run.config, state, n, sites).mechanism.release for n in (1, 2, 3)]
    assert sum(release.num_steps for release in planned) == sum(release.num_steps for release in rounds)
    assert {release.noise_multiplier for release in planned} == {release.noise_multiplier for release in rounds}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("cases", "data-unreadable"),
        ("few", "too-few-patients"),
        ("facts", "facts-differ"),
        ("pin", "code-not-allowed"),
        ("noise", "noise-below-minimum"),
        ("rounds", "rounds-exhausted"),
        ("spent", "budget-exhausted"),
        ("ledger", "ledger-corrupt"),
    ],
)
def test_what_would_stop_a_site_is_found(study, write_cases, damage, code):
    run = study("federation.min_sites=3")
    folder = run.path / "sites" / "b"
    site = load_site(folder)
    if damage == "cases":
        (folder / "train" / INDEX_NAME).unlink()
    elif damage == "few":
        write_cases(folder / "train", "Philips", 3, seed=1)
    elif damage == "facts":
        change(folder, nominal_patients=8, vendors={"Philips": 8})
    elif damage == "pin":
        change(folder, policy=replace(site.policy, allowed_code_sha256=["0" * 64]))
    elif damage == "noise":
        change(folder, policy=replace(site.policy, min_noise_multiplier=90.0))
    elif damage == "rounds":
        change(folder, policy=replace(site.policy, max_rounds=2))
    else:
        # The first round alone would still fit: it is the whole study that does not.
        ledger = Ledger(folder / "ledger", dataset=hashlib.sha256(b"fedcmr data set ").hexdigest())
        ledger.reserve("another", 1, Release(1.5, 1.0, 1), 1e-3, 100)
        if damage == "ledger":
            (folder / "ledger" / "ledger.jsonl").unlink()
    facts = rehearse(run)
    assert facts["sites"]["b"]["codes"]["gradients"] == code
    assert facts["sites"]["a"]["codes"] == {"statistics": OK, "gradients": OK}
    with pytest.raises(UserError, match=f"the study cannot start: .*2 of the 3 sites .*b: {code}"):
        show(facts)


@pytest.mark.slow
def test_a_study_that_has_its_quorum_can_start_without_a_site(study):
    run = study("federation.min_sites=2")
    (run.path / "sites" / "b" / "train" / INDEX_NAME).unlink()
    facts = rehearse(run)
    assert facts["reasons"] == [] and facts["sites"]["b"]["codes"]["statistics"] == "data-unreadable"


def test_missing_test_patients_are_told(make_study):
    with pytest.raises(UserError, match="holds no test patients"):
        show(rehearse(make_study(*SMALL)))


def ask(site, content):
    metadata = Metadata(1, "m1", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type="query")
    return app(
        Message(content, metadata=metadata), Context(1, 2, {"site": str(site), "device": "cpu"}, RecordDict(), {})
    )


@pytest.fixture
def rehearsal_of(study, prior):
    """A site's folder, and the content of a rehearsal of a round of gradients."""
    run = study()
    state = initial_state(run.config, prior, read_study(run))
    request = make_request(run.config, state, 2, read_study(run))
    return run.path / "sites" / "a", pack_rehearsal(state.arrays, request, [request.mechanism.release]), request


def test_an_answer_has_the_same_bytes_whoever_the_patients_are(rehearsal_of, write_cases, monkeypatch):
    site, content, _ = rehearsal_of
    monkeypatch.setattr(client_rehearsal.time, "monotonic", lambda: 0.0)
    answers = []
    for count, seed in ((5, 0), (5, 7), (6, 3), (40, 4)):
        write_cases(site / "train", "Siemens", count, seed)
        reply = ask(site, content)
        arrays = b"".join(array.data for array in reply.content["arrays"].values())
        answers.append((message_to_proto(reply).metadata.message_type, arrays, dict(reply.content["rehearsal"])))
    assert answers[0][2] == {"site": "a", "code": OK, "seconds": 0.0}
    assert all(answer == answers[0] for answer in answers)


def test_the_work_sees_no_patient(rehearsal_of, monkeypatch):
    site, content, _ = rehearsal_of
    seen = []
    fine_tune = training.fine_tune

    def watched(generator, patients, *rest):
        seen.extend(patients)
        return fine_tune(generator, patients, *rest)

    monkeypatch.setattr(training, "fine_tune", watched)
    assert ask(site, content).content["rehearsal"]["code"] == OK
    assert len(seen) == load_site(site).nominal_patients
    assert not any(
        patient.name or patient.images.any() or patient.masks.any() or patient.styles.any() for patient in seen
    )


def test_a_rehearsal_sent_as_a_round_is_refused_and_charges_nothing(rehearsal_of):
    site, content, _ = rehearsal_of
    metadata = Metadata(1, "m1", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type="train")
    context = Context(1, 2, {"site": str(site), "device": "cpu"}, RecordDict(), {})
    reply = app(Message(content, metadata=metadata), context)
    assert reply.content["reply"]["code"] == "bad-request"
    assert not (site / "ledger" / "ledger.jsonl").exists()


@pytest.mark.parametrize(
    "change_to",
    [
        {},
        {"sample-rate": [2.0]},
        {"num-steps": [0]},
        {"noise-multiplier": [0.0]},
        {"num-steps": [1] * 2},
        {"more": [1]},
    ],
)
def test_a_plan_out_of_range_is_refused(rehearsal_of, change_to):
    site, content, _ = rehearsal_of
    record = dict(content["planned"]) | change_to if change_to else {}
    with pytest.raises(ValueError):
        read_planned(record)
    del content["planned"]
    assert ask(site, content).content["rehearsal"]["code"] == "bad-request"


def test_only_zeros_leave_and_only_zeros_are_taken(rehearsal_of):
    _, content, request = rehearsal_of
    shapes = update_shapes(request.task, {name: tuple(array.shape) for name, array in content["arrays"].items()}, 1, 11)
    good = pack_rehearsal_reply("a", OK, shapes, 1.26)
    assert check_rehearsal(Reply(None, good), {"a": shapes}) == ("a", Outcome(OK, 1.3))
    assert not any(array.numpy().any() for array in good["arrays"].values())
    for bad in ({"code": "a text"}, {"code": OK, "seconds": -1.0}, {"code": OK, "seconds": float("nan")}):
        with pytest.raises(ValueError):
            pack_rehearsal_reply("a", bad["code"], shapes, bad.get("seconds"))
    first = next(iter(shapes))
    array = np.zeros(shapes[first], np.float32)
    array.flat[0] = 1
    good["arrays"][first] = type(good["arrays"][first])(array)
    assert check_rehearsal(Reply(None, good), {"a": shapes})[1] == Outcome("not usable")
    assert check_rehearsal(Reply("a", RecordDict()), {"a": shapes}) == ("a", Outcome("not usable"))
    unnamed = Reply("a", pack_rehearsal_reply("unknown", "settings-unreadable"))
    assert check_rehearsal(unnamed, {"a": shapes}) == ("a", Outcome("settings-unreadable"))
    refused = Reply("a", None, "code-not-allowed")
    assert check_rehearsal(refused, {"a": shapes}) == ("a", Outcome("code-not-allowed"))


def test_a_rehearsal_tells_a_site_by_its_node(study, monkeypatch):
    """With the numbers of a and b exchanged each answers in the name of the other one; c is not in the list."""
    monkeypatch.setattr("fedcmr.server.federation.strategy.NODE_WAIT_S", 0.0)
    run = study("federation.min_sites=1")
    write_nodes(run, {"a": "3", "b": "2"})
    facts = rehearse(run)
    codes = {name: set(site["codes"].values()) for name, site in facts["sites"].items()}
    assert codes == {"a": {"names-another-site"}, "b": {"names-another-site"}, "c": {"no answer"}}
    assert facts["connected"] == 2 and facts["reasons"]


@pytest.mark.slow
def test_the_simulation_rehearses_too(tmp_path, tiny_prior, monkeypatch, capsys):
    settings = [
        *SMALL,
        "hospitals.num_train=2",
        "hospitals.num_test=2",
        "hospitals.vendors=[GE]",
        "device=cpu",
        "federation.min_sites=1",
        f"prior={tiny_prior}",
    ]
    monkeypatch.setattr(
        sys, "argv", ["fedcmr-simulate", "--config", "smoke", "--out", str(tmp_path / "run"), "--rehearsal", *settings]
    )
    assert simulations_cli.main() == 0
    assert "the study can start" in capsys.readouterr().out
    assert not (tmp_path / "run" / "generator.safetensors").exists()
