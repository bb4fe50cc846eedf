"""A site's answer about its own test patients: in the form that its policy says, charged first, and no patient's."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.common.serde import message_to_proto

from fedcmr.client import evaluation
from fedcmr.client.app import app
from fedcmr.client.evaluation_patients import read_test_set
from fedcmr.client.ledger import Ledger, dataset_of
from fedcmr.client.policy import load_site
from fedcmr.shared.case import load_case, read_index, write_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy import Release
from fedcmr.shared.records import INTERNAL_ERROR, OK, EvaluationRequest, arrays_sha256, pack_request
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, from_arrays, to_arrays
from tests.conftest import NOMINAL_PATIENTS

NUM_TEST = 6


pytestmark = pytest.mark.usefixtures("tiny_evaluations")


@pytest.fixture
def site(make_study, write_cases):
    """A site of Siemens scans with six test patients and the policy that a site has unless it says otherwise."""
    folder = make_study().path / "sites" / "a"
    write_cases(folder / "test", "Siemens", NUM_TEST, seed=50, prefix="t")
    change(folder, "test: null", 'test: "test"')
    return folder


def change(folder, before, after):
    text = (folder / "site.yaml").read_text()
    assert before in text
    (folder / "site.yaml").write_text(text.replace(before, after))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return to_arrays(Regressor().eval())


def request_for(model, **changes):
    request = EvaluationRequest(
        task="ejection_fraction",
        run_id="0123456789abcdef",
        model_sha256=arrays_sha256(model),
        noise_multiplier=0.6,
        target_delta=1e-3,
        num_tta=1,
        sites="",
    )
    return replace(request, **changes)


def ask(site, model, **changes):
    """The reply as Flower would get it."""
    metadata = Metadata(1, "m1", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type="evaluate")
    context = Context(1, 2, {"site": str(site), "device": "cpu"}, RecordDict(), {})
    reply = app(Message(pack_request(model, request_for(model, **changes)), metadata=metadata), context)
    assert not reply.has_error()
    return reply


def code_of(reply):
    record = reply.content["reply"]
    if record["code"] != OK:
        assert set(record) == {"site", "code"} and set(reply.content) == {"reply"}
    return record["code"]


def sums_of(reply):
    assert set(reply.content) == {"reply", "arrays"} and set(reply.content["reply"]) == {"site", "code", "form"}
    assert set(reply.content["arrays"]) == {"Siemens"}
    return reply.content["reply"]["form"], reply.content["arrays"]["Siemens"].numpy()


def test_the_default_policy_never_lets_plain_sums_out(site, model):
    form, sums = sums_of(ask(site, model))
    assert form == "private" and sums.shape == (6,)
    assert not np.array_equal(sums, np.round(sums, 3)), "noise has more digits"
    (charge,) = Ledger(site / "test_ledger").charges()
    assert charge["release"] == {"noise_multiplier": 0.6, "sample_rate": 1.0, "num_steps": 1}
    assert not (site / "ledger" / "ledger.jsonl").exists(), "the training patients' ledger is another"


def test_a_repeated_request_gets_the_same_bytes_and_another_model_is_another_charge(site, model):
    first, again = (sums_of(ask(site, model))[1] for _ in range(2))
    assert np.array_equal(first, again)
    assert len(Ledger(site / "test_ledger").charges()) == 1
    other = {name: array + np.float32(0.01) for name, array in model.items()}
    change(site, "max_epsilon: 8.0", "max_epsilon: 50.0")
    assert not np.array_equal(first, sums_of(ask(site, other))[1])
    assert len(Ledger(site / "test_ledger").charges()) == 2


def test_the_ledger_of_test_patients_has_the_site_s_cap(site, model):
    assert code_of(ask(site, model)) == OK
    other = {name: array + np.float32(0.01) for name, array in model.items()}
    assert code_of(ask(site, other)) == "budget-exhausted"
    assert len(Ledger(site / "test_ledger").charges()) == 1


@pytest.mark.parametrize(
    ("noise", "delta", "code"), [(0.2, 1e-3, "noise-below-minimum"), (0.6, 0.01, "delta-above-cap")]
)
def test_what_goes_beyond_the_policy_is_refused_and_charges_nothing(site, model, noise, delta, code):
    assert code_of(ask(site, model, noise_multiplier=noise, target_delta=delta)) == code
    assert not (site / "test_ledger").exists()


def test_a_site_that_does_not_evaluate_says_so(site, model):
    change(site, 'evaluation: "private"', "evaluation: off")
    assert code_of(ask(site, model)) == "no-evaluation"
    change(site, "evaluation: off", 'evaluation: "private"')
    change(site, 'test: "test"', "test: null")
    assert code_of(ask(site, model)) == "no-evaluation"


def test_the_plain_table_is_that_of_the_patients_and_small_groups_are_not_in_it(site, model):
    change(site, 'evaluation: "private"', 'evaluation: "table"')
    form, sums = sums_of(ask(site, model))
    cases = [load_case(site / "test", info) for info in read_index(site / "test")]
    errors = np.array([predict(from_arrays(model), [case], 1).ef[0] - case.info.ef for case in cases])
    assert form == "table"
    assert sums[:4] == pytest.approx([6, errors.sum(), np.abs(errors).sum(), (errors**2).sum()], abs=1e-3)
    write_index(site / "test", [case.info for case in cases[:4]])
    assert not sums_of(ask(site, model))[1].any()


def test_who_is_in_the_training_folder_is_not_tested(site):
    infos = read_index(site / "test")
    trained = read_index(site / "train")[0]
    write_index(site / "test", [replace(infos[0], group=trained.group), *infos[1:]])
    found = read_test_set(load_site(site))
    assert len(found.patients) == NUM_TEST - 1 and found.left_out == {"in-training": 1}


def test_folders_of_two_keys_cannot_be_told_apart_and_are_refused(site, model):
    for name, key in (("train", "a"), ("test", "b")):
        (site / name / "prepared.json").write_text(json.dumps({"key_check": key}))
    assert code_of(ask(site, model)) == "data-unreadable"
    with pytest.raises(UserError, match="same --key"):
        read_test_set(load_site(site))


def test_cases_that_cannot_be_used_change_nothing_but_a_count_at_the_site(site, model):
    infos = read_index(site / "test")
    (site / "test" / "cases" / f"{infos[0].pseudonym}.npz").write_bytes(b"torn")
    write_index(site / "test", [*infos[:1], replace(infos[1], vendor="GE"), *infos[2:]])
    assert code_of(ask(site, model)) == OK
    (path,) = (site / "evaluation").iterdir()
    assert json.loads(path.read_text())["left_out"] == {"case-unreadable": 1, "vendor-not-declared": 1}


def test_predictions_of_patients_stay_in_a_file_of_the_site_s_own(site, model):
    reply = ask(site, model)
    (path,) = (site / "evaluation").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    rows = json.loads(path.read_text())["patients"]
    assert [row["patient"] for row in rows] == [f"t0{number}" for number in range(NUM_TEST)]
    sent = message_to_proto(reply).SerializeToString() + b"".join(
        array.data for array in reply.content["arrays"].values()
    )
    for row in rows:
        for value in (row["true"], row["predicted"], row["predicted"] - row["true"]):
            assert np.float32(value).tobytes() not in sent and np.float64(value).tobytes() not in sent
        assert row["patient"].encode() not in sent


def test_a_private_answer_has_the_same_bytes_whatever_the_patients(site, model):
    sizes = set()
    change(site, "max_epsilon: 8.0", "max_epsilon: 50.0")
    for number, kept in enumerate((NUM_TEST, 1, 0)):
        write_index(site / "test", read_index(site / "test")[:kept])
        reply = ask(site, model, run_id=f"{number:016x}")
        assert code_of(reply) == OK
        sizes.add(
            len(message_to_proto(reply).SerializeToString())
            + sum(len(array.data) for array in reply.content["arrays"].values())
        )
    assert len(sizes) == 1


@pytest.mark.parametrize("trick", ["nan", "larger", "name", "hash"])
def test_what_is_no_model_is_refused_before_anything_is_charged(site, model, trick):
    name = sorted(model)[0]
    hostile = dict(model)
    if trick == "nan":
        hostile[name] = model[name] * np.float32("nan")
    elif trick == "larger":
        hostile[name] = np.zeros((5000, 1000), np.float32)
    elif trick == "name":
        hostile["network.hook"] = hostile.pop(name)
    changes = {"model_sha256": "0" * 64} if trick == "hash" else {}
    assert code_of(ask(site, hostile, **changes)) == "bad-request"
    assert not (site / "test_ledger").exists() and not (site / "evaluation").exists()


def test_a_model_whose_predictions_are_no_numbers_is_answered_like_any_other(site, model):
    hostile = {name: np.full_like(array, 1e38) for name, array in model.items()}
    change(site, "max_epsilon: 8.0", "max_epsilon: 50.0")
    form, sums = sums_of(ask(site, hostile))
    assert form == "private" and np.isfinite(sums).all()
    change(site, 'evaluation: "private"', 'evaluation: "table"')
    _, table = sums_of(ask(site, hostile))
    assert np.isfinite(table).all() and abs(table[1]) <= NUM_TEST


def test_a_prediction_that_fails_is_one_patient_s_largest_error_and_no_refusal(site, model, monkeypatch):
    real = evaluation.predict

    def failing(network, cases, *rest):
        if cases[0].info.pseudonym == "t02":
            raise RuntimeError("out of memory")
        return real(network, cases, *rest)

    monkeypatch.setattr(evaluation, "predict", failing)
    assert code_of(ask(site, model)) == OK
    (path,) = (site / "evaluation").iterdir()
    assert [row["predicted"] is None for row in json.loads(path.read_text())["patients"]] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for the seconds that each patient takes, and where it stood when work ended."""
    clock = SimpleNamespace(now=0.0, per_patient=0.0, ends=[])
    real = evaluation.predict

    def predict_slowly(*arguments):
        clock.now += clock.per_patient
        return real(*arguments)

    times = SimpleNamespace(
        monotonic=lambda: clock.now, perf_counter=lambda: clock.now, sleep=lambda s: clock.ends.append(clock.now + s)
    )
    monkeypatch.setattr(evaluation, "predict", predict_slowly)
    monkeypatch.setattr(evaluation, "time", times)
    monkeypatch.setattr(evaluation, "STEP_S", 20.0)
    return clock


@pytest.mark.parametrize(
    ("kept", "per_patient", "end"),
    [(NUM_TEST, 3.0, 40), (1, 3.0, 40), (0, 3.0, 40), (NUM_TEST, 6.6, 40), (NUM_TEST, 6.8, 60)],
)
def test_when_a_private_answer_comes_tells_of_patients_only_past_what_was_expected(
    site, model, clock, monkeypatch, kept, per_patient, end
):
    monkeypatch.setattr(evaluation, "expected_seconds", lambda *_: 36.0)
    write_index(site / "test", read_index(site / "test")[:kept])
    clock.per_patient = per_patient
    assert code_of(ask(site, model)) == OK
    assert clock.ends == [pytest.approx(end)]


def test_what_is_expected_comes_from_invented_patients_and_a_public_number(site, model, clock):
    clock.per_patient = 2.0
    for kept in (NUM_TEST, 1):
        write_index(site / "test", read_index(site / "test")[:kept])
        found = evaluation.expected_seconds(load_site(site), from_arrays(model), 1, torch.device("cpu"))
        assert found == evaluation.SPARE * NOMINAL_PATIENTS * 2.0


def test_a_plain_table_waits_for_no_step(site, model, clock):
    change(site, 'evaluation: "private"', 'evaluation: "table"')
    assert code_of(ask(site, model)) == OK and clock.ends == []


@pytest.mark.parametrize("form", ["private", "table"])
def test_what_would_take_too_long_is_refused_before_a_patient_is_looked_at(site, model, monkeypatch, form):
    seen = []
    monkeypatch.setattr(evaluation, "predict", lambda _, cases, *rest: seen.extend(cases) or 1 / 0)
    change(site, 'evaluation: "private"', f'evaluation: "{form}"')
    change(site, "max_seconds: 7200.0", "max_seconds: 1.0e-15")
    assert code_of(ask(site, model)) == "time-above-cap"
    assert {case.info.pseudonym for case in seen} == {"nobody"}
    assert not (site / "test_ledger").exists() and not (site / "evaluation").exists()


def test_work_past_the_deadline_has_failed_for_good(site, model, clock, monkeypatch):
    monkeypatch.setattr(evaluation, "expected_seconds", lambda *_: 0.0)  # what a busier machine would not have told
    change(site, "max_seconds: 7200.0", "max_seconds: 10.0")
    clock.per_patient = 4.0
    assert code_of(ask(site, model)) == INTERNAL_ERROR
    assert clock.now == 12.0, "the patients after the deadline are not evaluated"
    change(site, "max_seconds: 10.0", "max_seconds: 7200.0")
    assert code_of(ask(site, model)) == INTERNAL_ERROR and clock.now == 12.0
    (charge,) = Ledger(site / "test_ledger").charges()
    assert charge["failure"] == INTERNAL_ERROR and not (site / "evaluation").exists()


def test_a_plain_table_past_the_deadline_does_not_leave(site, model, clock, monkeypatch):
    monkeypatch.setattr(evaluation, "expected_seconds", lambda *_: 0.0)
    change(site, 'evaluation: "private"', 'evaluation: "table"')
    change(site, "max_seconds: 7200.0", "max_seconds: 10.0")
    clock.per_patient = 4.0
    assert code_of(ask(site, model)) == INTERNAL_ERROR
    change(site, "max_seconds: 10.0", "max_seconds: 7200.0")
    assert code_of(ask(site, model)) == OK


def test_a_patient_scanned_twice_is_one_patient(site, model):
    infos = read_index(site / "test")
    write_index(site / "test", [replace(infos[0], group=infos[1].group), *infos[1:]])
    change(site, 'evaluation: "private"', 'evaluation: "table"')
    assert sums_of(ask(site, model))[1][0] == NUM_TEST - 1


def test_the_site_s_own_people_see_both_budgets(site, model, capsys):
    from fedcmr.client.cli import main

    ask(site, model)
    shutil.copytree(site / "test_ledger", site / "elsewhere")  # an unused folder next to changes nothing
    assert main(["budget", str(site), "--json"]) == 0
    budget = json.loads(capsys.readouterr().out)
    assert budget["num_releases"] == 0 and budget["test"]["num_releases"] == 1 and 0 < budget["test"]["epsilon"] < 8
    assert main(["budget", str(site)]) == 0
    assert "test patients" in capsys.readouterr().out


def test_one_ledger_does_not_serve_for_training_and_test_patients(site, model):
    """Also where somebody has confused the two keys of site.yaml."""
    training = Ledger(site / "test_ledger", dataset=dataset_of(site / "train"))
    training.reserve("0123456789abcdef", 1, Release(4.0, 1.0, 1), 1e-3, 8.0)
    assert code_of(ask(site, model)) == "ledger-corrupt"
