"""A site's answer to a round for the segmenter: the same order, caps, ledger and way out as for the generator."""

import os
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Context, Message, Metadata, RecordDict

from fedcmr.client import subject
from fedcmr.client.app import app
from fedcmr.client.ledger import Ledger
from fedcmr.client.training import private_steps
from fedcmr.shared.case import load_cases, write_index
from fedcmr.shared.privacy import Release
from fedcmr.shared.records import INTERNAL_ERROR, OK, Request, decode, pack_rehearsal, pack_request
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter, public_sha256
from tests.wire_request import usual_request


@pytest.fixture
def site(make_study):
    return make_study(max_epsilon=8.0).path / "sites" / "a"


@pytest.fixture
def arrays():
    return {name: value.detach().numpy().copy() for name, value in load_segmenter().trainable().items()}


def request_of(**changes):
    return usual_request(task="segmenter", prior_sha256=public_sha256(), **changes)


def ask(site, content, message_type="train"):
    metadata = Metadata(1, "m1", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type=message_type)
    return app(
        Message(content, metadata=metadata), Context(1, 2, {"site": str(site), "device": "cpu"}, RecordDict(), {})
    )


def code_of(reply):
    code = reply.content["reply"]["code"]
    assert set(reply.content) == ({"reply", "arrays"} if code == OK else {"reply"})
    return code


def test_the_update_comes_back_in_the_shapes_of_the_segmenters_part(site, arrays):
    reply = ask(site, pack_request(arrays, request_of()))
    assert code_of(reply) == OK
    update = decode(reply.content["arrays"], {name: array.shape for name, array in arrays.items()})
    assert any(np.abs(array).max() > 0 for array in update.values())


def test_the_round_is_charged_before_the_work_and_once(site, arrays, monkeypatch):
    ledger, charged = Ledger(site / "ledger"), []

    def spy(*given):
        charged.append(ledger.releases())
        return private_steps(*given)

    monkeypatch.setattr(subject, "private_steps", spy)
    content = pack_request(arrays, request_of(local_steps=2))
    first, again = ask(site, content), ask(site, content)
    assert charged == [[Release(4.0, 1.0, 2)]]
    assert first.content["arrays"] == again.content["arrays"], "a repeated message must not draw new noise"
    assert [charge["task"] for charge in ledger.charges()] == ["segmenter"]


def test_rounds_for_generator_and_segmenter_spend_one_budget(site, arrays, prior):
    part = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}
    of_generator = usual_request(prior_sha256=prior.sha256, noise_multiplier=1.0, local_steps=2)
    assert code_of(ask(site, pack_request(part, of_generator))) == OK
    spent = Ledger(site / "ledger").spent(1e-3)
    content = pack_request(arrays, request_of(server_round=3, noise_multiplier=1.0, local_steps=2))
    assert code_of(ask(site, content)) == OK
    assert Ledger(site / "ledger").spent(1e-3) > spent
    content = pack_request(arrays, request_of(server_round=4, noise_multiplier=1.0, local_steps=4))
    assert code_of(ask(site, content)) == "budget-exhausted"


@pytest.mark.parametrize("smuggled", ["extra", "dtype", "shape", "nan"])
def test_an_update_off_the_allow_list_does_not_leave(site, arrays, monkeypatch, smuggled):
    def crooked(*given):
        update = private_steps(*given)
        name = next(iter(update))
        if smuggled == "extra":
            update["num_patients"] = np.array([40], np.float32)
        else:
            odd = {"dtype": update[name].astype(np.float64), "shape": update[name][None], "nan": update[name] * np.nan}
            update[name] = odd[smuggled]
        return update

    monkeypatch.setattr(subject, "private_steps", crooked)
    assert code_of(ask(site, pack_request(arrays, request_of()))) == INTERNAL_ERROR


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prior_sha256": "00" * 32}, "prior-mismatch"),
        ({"noise_multiplier": 0.1}, "noise-below-minimum"),
        ({"target_delta": 0.01}, "delta-above-cap"),
        ({"max_grad_norm": 100.0}, "clip-above-cap"),
        ({"private": False}, "privacy-off-not-allowed"),
        ({"noise_multiplier": 0.3, "local_steps": 50}, "budget-exhausted"),
        ({"noise_multiplier": 90.0, "num_views": 4096}, "views-above-cap"),
        ({"sites": "another|GE=5|5"}, "facts-differ"),
    ],
)
def test_the_site_refuses_with_the_usual_codes_and_charges_nothing(site, arrays, changes, code):
    request = request_of()
    assert code_of(ask(site, pack_request(arrays, replace(request, **changes)))) == code
    assert Ledger(site / "ledger").releases() == []


def test_the_generators_fingerprint_and_arrays_are_not_the_segmenters(site, arrays, prior):
    part = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}
    assert code_of(ask(site, pack_request(part, request_of()))) == "bad-request"
    of_prior = replace(request_of(), prior_sha256=prior.sha256)
    assert code_of(ask(site, pack_request(arrays, of_prior))) == "prior-mismatch"


def test_a_site_whose_contours_a_program_found_teaches_no_segmenter_and_is_not_charged(site, arrays):
    infos = [replace(case.info, contours="auto") for case in load_cases(site / "train")]
    write_index(site / "train", infos)
    os.utime(site / "train" / "cases.csv", ns=(1, 1))  # read anew by this process
    assert code_of(ask(site, pack_request(arrays, request_of()))) == "too-few-patients"
    assert Ledger(site / "ledger").releases() == []


def test_a_rehearsal_answers_zeros_and_reads_no_patients_work(site, arrays, monkeypatch):
    seen = []
    monkeypatch.setattr(subject, "private_steps", lambda *given: seen.extend(given[1]) or private_steps(*given))
    reply = ask(site, pack_rehearsal(arrays, request_of(), [Release(4.0, 1.0, 1)]), "query")
    assert reply.content["rehearsal"]["code"] == OK
    update = decode(reply.content["arrays"], {name: array.shape for name, array in arrays.items()})
    assert not any(array.any() for array in update.values())
    assert len(seen) == 5 and not any(patient.name or patient.images.any() for patient in seen)
    assert Ledger(site / "ledger").releases() == []


def test_the_wire_form_has_no_new_field_so_that_an_earlier_site_refuses_the_task_alone():
    """Such a site reads the request as it always did, finds a task that it does not know, and answers bad-request."""
    generators = set(usual_request().to_config())
    config = dict(request_of().to_config())
    assert set(config) == generators
    with pytest.raises(ValueError, match="within its ranges"):
        Request.from_config(config | {"task": "a task of a later version"})
