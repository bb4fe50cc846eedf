"""The rehearsal of an evaluation at the sites: it decides as a site would, charges nothing and sees no patient."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, RecordDict

from fedcmr.client import evaluation
from fedcmr.client import rehearsal as client_rehearsal
from fedcmr.client.app import app
from fedcmr.client.evaluation_patients import check_test_folder
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import load_site
from fedcmr.server.federation.senders import Reply
from fedcmr.server.rehearsal.outcomes import NO_ANSWER, Outcome, outcomes
from fedcmr.server.rehearsal.rehearsal import FILE_NAME, show
from fedcmr.shared.case import INDEX_NAME, read_index, write_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy import Release
from fedcmr.shared.records import (
    OK,
    EvaluationRequest,
    arrays_sha256,
    pack_rehearsal_reply,
    pack_rehearsed_evaluation,
    pack_rehearsed_sums,
    pack_request,
)
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, to_arrays
from fedcmr.simulations.grid import make_grid, run_server_app
from tests.conftest import NOMINAL_PATIENTS, give_test_patients
from tests.server.rehearsal.test_rehearsal import SMALL

NOISE = 0.6


pytestmark = pytest.mark.usefixtures("tiny_evaluations")


@pytest.fixture
def site(make_study):
    run = make_study()
    give_test_patients(run, {"a": "private"})
    return run.path / "sites" / "a"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return to_arrays(Regressor().eval())


def request_for(model, **changes):
    request = EvaluationRequest("ejection_fraction", "0123456789abcdef", arrays_sha256(model), NOISE, 1e-3, 1, "")
    return replace(request, **changes)


def send(site, content, kind="query"):
    metadata = Metadata(1, "m1", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type=kind)
    context = Context(1, 2, {"site": str(site), "device": "cpu"}, RecordDict(), {})
    reply = app(Message(content, metadata=metadata), context)
    assert not reply.has_error()
    return reply.content


def rehearse(site, model, **changes):
    return send(site, pack_rehearsed_evaluation(model, request_for(model, **changes)))


def change(site, before, after):
    text = (site / "site.yaml").read_text()
    assert before in text
    (site / "site.yaml").write_text(text.replace(before, after))


def ledger_of(site):
    settings = load_site(site)
    return Ledger(settings.test_ledger_path, settings.test_replica_path, check_test_folder(settings))


@pytest.mark.parametrize("form", ["private", "table"])
def test_zeros_leave_and_no_patient_is_looked_at(site, model, monkeypatch, form):
    change(site, 'evaluation: "private"', f'evaluation: "{form}"')
    seen, real = [], evaluation.predict

    def watched(network, cases, *rest):
        seen.extend(cases)
        return real(network, cases, *rest)

    monkeypatch.setattr(evaluation, "predict", watched)
    monkeypatch.setattr(evaluation, "read_test_set", None)
    reply = rehearse(site, model)
    assert set(reply) == {"rehearsal", "arrays"} and set(reply["arrays"]) == {"Siemens"}
    values = dict(reply["rehearsal"])
    assert values.pop("seconds") >= 0 and values == {"site": "a", "code": OK, "form": form}
    assert not reply["arrays"]["Siemens"].numpy().any() and reply["arrays"]["Siemens"].shape == (6,)
    assert {case.info.pseudonym for case in seen} == {"nobody"} and len(seen) == 2 + NOMINAL_PATIENTS
    assert ledger_of(site).charges() == [] and not (site / "evaluation").exists()


def test_an_answer_is_the_same_whoever_the_test_patients_are(site, model, monkeypatch):
    monkeypatch.setattr(client_rehearsal.time, "monotonic", lambda: 0.0)
    infos, answers = read_index(site / "test"), []
    for kept in (12, 1, 0):
        write_index(site / "test", infos[:kept])
        reply = rehearse(site, model)
        answers.append((dict(reply["rehearsal"]), reply["arrays"]["Siemens"].data))
    assert answers[0][0] == {"site": "a", "code": OK, "form": "private", "seconds": 0.0}
    assert answers[1:] == answers[:1] * 2


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("off", "no-evaluation"),
        ("no-folder", "no-evaluation"),
        ("cases", "data-unreadable"),
        ("pin", "code-not-allowed"),
        ("facts", "facts-differ"),
        ("noise", "noise-below-minimum"),
        ("time", "time-above-cap"),
        ("spent", "budget-exhausted"),
        ("ledger", "ledger-corrupt"),
        ("model", "bad-request"),
        ("request", "bad-request"),
    ],
)
def test_a_site_decides_as_it_would(site, model, damage, code):
    content = pack_rehearsed_evaluation(model, request_for(model, sites="b: GE=6; 6" if damage == "facts" else ""))
    changes = {
        "off": ('evaluation: "private"', "evaluation: off"),
        "no-folder": ('test: "test"', "test: null"),
        "pin": ("allowed_code_sha256: []", f'allowed_code_sha256: ["{"0" * 64}"]'),
        "noise": ("min_noise_multiplier: 0.3", "min_noise_multiplier: 0.7"),
        "time": ("max_seconds: 7200.0", "max_seconds: 1.0e-15"),
    }
    if damage in changes:
        change(site, *changes[damage])
    elif damage == "cases":
        (site / "test" / INDEX_NAME).unlink()
    elif damage in ("spent", "ledger"):
        ledger_of(site).reserve("another", 1, Release(0.6, 1.0, 1), 1e-3, 100)
        if damage == "ledger":
            (site / "test_ledger" / "ledger.jsonl").unlink()
    elif damage == "model":
        del content["arrays"]
    elif damage == "request":
        content["rehearsed-evaluation"] = ConfigRecord({"task": "ejection_fraction"})
    reply = send(site, content)
    assert set(reply) == {"rehearsal"} and dict(reply["rehearsal"]) == {"site": "a", "code": code}
    if code not in ("no-evaluation", "ledger-corrupt", "bad-request", "data-unreadable", "facts-differ"):
        assert send(site, pack_request(model, request_for(model)), "evaluate")["reply"]["code"] == code


def test_what_was_answered_before_costs_nothing(site, model):
    assert send(site, pack_request(model, request_for(model)), "evaluate")["reply"]["code"] == OK
    assert rehearse(site, model)["rehearsal"]["code"] == OK
    assert rehearse(site, model, run_id="fedcba9876543210")["rehearsal"]["code"] == "budget-exhausted"
    assert len(ledger_of(site).charges()) == 1


def test_a_version_without_this_rehearsal_takes_it_for_nothing_else(site, model):
    content = pack_rehearsed_evaluation(model, request_for(model))
    assert "config" not in content and "planned" not in content
    assert send(site, content, "evaluate")["reply"]["code"] == "bad-request"
    assert send(site, content, "train")["reply"]["code"] == "bad-request"


def test_only_zeros_in_a_known_form_leave_and_only_these_are_taken():
    shapes = {"a": {"Siemens": (6,)}}
    with pytest.raises(ValueError, match="form"):
        pack_rehearsed_sums("a", "exact", shapes["a"], 1.0)
    forms = ("private", "table")

    def code_of(content):
        return outcomes([Reply(None, content)], shapes, forms)[0]["a"].code

    good = pack_rehearsed_sums("a", "table", shapes["a"], 1.26)
    assert outcomes([Reply(None, good)], {**shapes, "b": {}}, forms) == (
        {"a": Outcome(OK, 1.3, "table"), "b": Outcome(NO_ANSWER)},
        [],
    )
    assert outcomes([Reply(None, good)] * 2, shapes, forms)[0]["a"].code == "not usable"
    assert code_of(pack_rehearsal_reply("a", OK, shapes["a"], 1.0)) == "not usable", "an answer to something else"
    good["rehearsal"]["form"] = "exact"
    assert code_of(good) == "not usable"
    good["rehearsal"]["form"] = "table"
    good["arrays"] = ArrayRecord({"Siemens": Array(np.ones(6, np.float32))})
    assert code_of(good) == "not usable"


@pytest.fixture
def study(make_study):
    """Builds a study whose test patients are all at the sites, with a policy for each."""

    def make(policies):
        run = make_study(*SMALL, "evaluation.federated=true", min_patients=2)
        give_test_patients(run, policies)
        with make_grid(run) as grid:
            run_server_app(grid, {"run-dir": str(run.path), "rehearsal": True})
        return run, json.loads((run.path / FILE_NAME).read_text())

    return make


def test_the_coordinator_sees_who_would_judge_the_model_and_at_what_cost(study, capsys):
    run, facts = study({"a": "private", "b": "table", "c": "off"})
    found = facts["evaluation"]
    assert {name: (site["code"], site["form"]) for name, site in found["sites"].items()} == {
        "a": (OK, "private"),
        "b": (OK, "table"),
        "c": ("no-evaluation", None),
    }
    assert facts["reasons"] == [] and facts["unnamed"] == [] and 7 < found["epsilon"] <= 8
    for name in "abc":
        for kind in ("ledger", "test_ledger"):
            assert Ledger(run.path / "sites" / name / kind).charges() == []
    show(facts)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{found['epsilon']:.2f} at {found['delta']:g}" in shown and "no-evaluation" in shown
    assert (
        "2 of 3 sites would evaluate the model on their own test patients" in shown and "the study can start" in shown
    )


def test_an_evaluation_that_no_site_would_answer_fails_the_rehearsal(study):
    _, facts = study({"a": "off"})
    assert all(site["codes"]["statistics"] == OK for site in facts["sites"].values())
    with pytest.raises(UserError, match=r"no site would evaluate the model .*b: no-evaluation"):
        show(facts)
