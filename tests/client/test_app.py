import json
import os
import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from flwr.app import Context, Message, Metadata, RecordDict

from fedcmr.client import app as client_app
from fedcmr.client import ledger as client_ledger
from fedcmr.client import policy, subject, training
from fedcmr.client.app import app, site_folder
from fedcmr.client.code_hash import code_sha256
from fedcmr.client.deployment.connection import examine
from fedcmr.client.error_log import LOG_NAME as ERROR_LOG
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import load_site
from fedcmr.client.training import fine_tune
from fedcmr.shared.case import ES, LV, NOT_DRAWN, load_cases, save_case
from fedcmr.shared.privacy import Mechanism, Release, epsilon
from fedcmr.shared.privacy_filter import PrivacyFilter
from fedcmr.shared.records import CODES, INTERNAL_ERROR, OK, decode, pack_request
from tests.wire_request import usual_request

CANARY = "patient-4711"


@pytest.fixture
def site(make_study):
    """A site's folder, with a policy of epsilon 8."""
    return make_study().path / "sites" / "a"


@pytest.fixture
def arrays(prior):
    return {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}


@pytest.fixture
def request_of(prior):
    def make(**changes):
        request = usual_request(prior_sha256=prior.sha256)
        if changes.get("task") == "statistics":
            changes = {"server_round": 1, "max_grad_norm": 4.0, "local_steps": 2} | changes
        return replace(request, **changes)

    return make


def ask(site, content, node_config=None):
    """The ClientApp's reply, as Flower would call it."""
    metadata = Metadata(1, "m1", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type="train")
    context = Context(
        1, 2, {"site": str(site), "device": "cpu"} if node_config is None else node_config, RecordDict(), {}
    )
    return app(Message(content, metadata=metadata), context)


def code_of(reply):
    assert not reply.has_error()
    assert set(reply.content["reply"]) == {"site", "code"}
    code = reply.content["reply"]["code"]
    assert set(reply.content) == ({"reply", "arrays"} if code == OK else {"reply"})
    return code


def test_gradients_come_back_in_the_shapes_of_the_trainable_part(site, arrays, request_of):
    reply = ask(site, pack_request(arrays, request_of()))
    assert code_of(reply) == OK
    shapes = {name: array.shape for name, array in arrays.items()}
    update = decode(reply.content["arrays"], shapes)
    assert any(np.abs(array).max() > 0 for array in update.values())


def test_statistics_come_back_in_the_shape_of_the_style_vector(site, arrays, request_of, prior):
    reply = ask(site, pack_request(arrays, request_of(task="statistics")))
    assert code_of(reply) == OK
    shape = (1, len(prior.style_mean))
    decode(reply.content["arrays"], {"style_mean": shape, "style_square": shape})


def test_the_ledger_says_that_shapes_left_too(site, arrays, request_of):
    assert code_of(ask(site, pack_request(arrays, request_of(task="statistics", with_shape=True)))) == OK
    assert [charge["task"] for charge in Ledger(site / "ledger").charges()] == ["statistics of style and shape"]


def test_check_says_what_a_study_may_ask_for(site):
    def what_leaves(**changes):
        known = load_site(site)
        settings = replace(known, policy=replace(known.policy, **changes))
        return next(one.text for one in examine(settings) if one.name == "what leaves")

    assert "shapes of the hearts" in what_leaves() and "style by vendor" in what_leaves()
    assert "epsilon 3 together" in what_leaves(max_epsilon=3.0) and "WITHOUT" not in what_leaves()
    assert "WITHOUT noise" in what_leaves(allow_without_privacy=True)


def test_a_site_that_draws_in_part_releases_statistics_and_no_gradients(site, arrays, request_of):
    """What a gradient would be charged for and could hold nothing of is refused before the charge."""
    for case in load_cases(site / "train"):
        masks = case.masks.copy()
        masks[ES][masks[ES] != LV] = NOT_DRAWN
        save_case(site / "train", replace(case, masks=masks))
    index = site / "train" / "cases.csv"
    os.utime(index, ns=(1, 1))  # read anew by this process, which knows the folder from other tests
    least = load_site(site).policy.min_patients
    (finding,) = [one for one in examine(load_site(site)) if one.name == "cases"]
    assert (
        finding.ok
        and "for statistics of style and shape only: gradients are refused, too few are drawn whole" in finding.text
    )
    assert code_of(ask(site, pack_request(arrays, request_of(task="statistics")))) == OK
    spent = Ledger(site / "ledger").releases()
    assert code_of(ask(site, pack_request(arrays, request_of()))) == "too-few-patients"
    assert Ledger(site / "ledger").releases() == spent
    for case in load_cases(site / "train")[:least]:
        save_case(
            site / "train", replace(case, masks=np.where(case.masks == NOT_DRAWN, 0, case.masks).astype(np.uint8))
        )
    os.utime(index, ns=(2, 2))
    assert code_of(ask(site, pack_request(arrays, request_of()))) == OK


def test_each_adapter_has_its_own_names_and_shapes(site, arrays, request_of, prior):
    part = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable("lora").items()}
    reply = ask(site, pack_request(part, request_of(adapter="lora")))
    assert code_of(reply) == OK
    decode(reply.content["arrays"], {name: array.shape for name, array in part.items()})
    assert code_of(ask(site, pack_request(part, request_of(server_round=3)))) == "bad-request"
    assert code_of(ask(site, pack_request(arrays, request_of(server_round=3, adapter="lora")))) == "bad-request"


def test_statistics_are_charged_as_two_step_mean(site, arrays, request_of):
    assert code_of(ask(site, pack_request(arrays, request_of(task="statistics")))) == OK
    assert Ledger(site / "ledger").releases() == [Release(4.0, 1.0, 2)]


def test_a_release_is_charged_before_training_and_once(site, arrays, request_of, monkeypatch):
    ledger = Ledger(site / "ledger")
    charged_at_training = []

    def spy(*args, **kwargs):
        charged_at_training.extend(ledger.releases())
        return fine_tune(*args, **kwargs)

    monkeypatch.setattr(training, "fine_tune", spy)
    content = pack_request(arrays, request_of(local_steps=2))
    first = ask(site, content)
    assert charged_at_training == [Release(4.0, 1.0, 2)]
    again = ask(site, content)
    assert first.content["arrays"] == again.content["arrays"], "a repeated message must not draw new noise"
    assert len(charged_at_training) == 1, "nor train again"
    assert ledger.releases() == [Release(4.0, 1.0, 2)]


def test_training_that_failed_is_an_answer_for_ever(site, arrays, request_of, monkeypatch):
    """A failure tells something of the patients: it costs one charge and cannot be drawn again."""

    def interrupted(*args, **kwargs):
        raise MemoryError(CANARY)

    content = pack_request(arrays, request_of())
    with monkeypatch.context() as patch:
        patch.setattr(training, "fine_tune", interrupted)
        assert code_of(ask(site, content)) == INTERNAL_ERROR
    assert [code_of(ask(site, content)) for _ in range(3)] == [INTERNAL_ERROR] * 3
    (charge,) = Ledger(site / "ledger").charges()
    assert (charge["failure"], charge["reply"]) == (INTERNAL_ERROR, None)
    assert code_of(ask(site, pack_request(arrays, request_of(server_round=3)))) == OK, "the study continues"


@pytest.mark.parametrize("num_patients", [2, 5])
def test_a_request_that_is_too_large_for_the_machine_does_not_tell_who_was_sampled(
    make_study, arrays, request_of, monkeypatch, num_patients
):
    """Every patient's work runs out of memory: each answer is noise alone, whoever was there, and is charged."""

    def out_of_memory(generator, patient, *args):
        if patient.name:
            raise MemoryError
        return real(generator, patient, *args)

    real = training.patient_gradient
    monkeypatch.setattr(training, "patient_gradient", out_of_memory)
    site = make_study(num_patients=num_patients, min_patients=2, min_sample_rate=0.1).path / "sites" / "a"
    for server_round in range(2, 12):  # that nobody is sampled in any of them has a chance of one in a million
        request = request_of(server_round=server_round, sample_rate=0.5, noise_multiplier=90.0)
        assert code_of(ask(site, pack_request(arrays, request))) == OK
    assert len(Ledger(site / "ledger").charges()) == 10
    assert "a patient's gradient failed" in (site / ERROR_LOG).read_text()


def test_work_that_takes_too_long_is_refused_before_its_charge_or_stopped_after_it(
    make_study, arrays, request_of, monkeypatch
):
    site = make_study(max_seconds=0.001).path / "sites" / "a"
    content = pack_request(arrays, request_of(local_steps=100, noise_multiplier=100.0))
    assert code_of(ask(site, content)) == "time-above-cap"
    assert Ledger(site / "ledger").releases() == []
    monkeypatch.setattr(client_app, "estimated_seconds", lambda *_: 0.0)  # what a busier machine would have told
    assert [code_of(ask(site, content)) for _ in range(2)] == [INTERNAL_ERROR] * 2
    assert len(Ledger(site / "ledger").charges()) == 1


def test_what_the_time_estimate_says_does_not_depend_on_the_patients(make_study, arrays, request_of, monkeypatch):
    asked = []
    monkeypatch.setattr(
        client_app,
        "estimated_seconds",
        lambda *given: asked.append((given[1].name.partition(",")[0], given[3].divisor)) or 0.0,
    )
    site = make_study(num_patients=9).path / "sites" / "a"
    assert code_of(ask(site, pack_request(arrays, request_of()))) == OK
    assert asked == [("norm_affine", load_site(site).nominal_patients)]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"noise_multiplier": 50.0, "sample_rate": 0.5}, "sample-rate-below-minimum"),
        ({"noise_multiplier": 1e6}, "noise-above-cap"),
        ({"noise_multiplier": 90.0, "local_steps": 10_000}, "steps-above-cap"),
        ({"noise_multiplier": 90.0, "num_views": 4096}, "views-above-cap"),
    ],
)
def test_requests_that_cost_a_site_much_and_no_epsilon_are_refused_by_default(site, arrays, request_of, changes, code):
    assert code_of(ask(site, pack_request(arrays, request_of(**changes)))) == code
    assert Ledger(site / "ledger").releases() == []


def test_two_hundred_unlike_releases_leave_the_next_round_as_cheap_as_the_first(tmp_path, monkeypatch):
    """Under a policy that lets them: what counts is how often the accountant is asked, not the clock."""
    terms = {"max_epsilon": 8.0, "max_delta": 1e-3, "min_sample_rate": 0.1}
    asked = []
    cost = PrivacyFilter.cost
    monkeypatch.setattr(PrivacyFilter, "cost", lambda self, release: asked.append(release) or cost(self, release))
    monkeypatch.setattr("os.fsync", lambda _: None)
    calls = []
    for number in range(202):
        honest = number in (0, 201)
        release = Release(8.0, 1.0, 1) if honest else Release(400.0 + number, 0.5, 1)
        ledger = Ledger(tmp_path / "ledger", policy=terms)
        asked.clear()
        ledger.reserve(f"{number:08x}", 1, release, 1e-3, 8.0)
        ledger.commit(f"{number:08x}", 1, b"update")
        calls.append(len(asked))
    assert set(calls) == {1}
    assert 0.2 < Ledger(tmp_path / "ledger").spent(1e-3) < 8


def test_another_round_is_charged_until_the_budget_ends(site, arrays, request_of):
    codes = [
        code_of(ask(site, pack_request(arrays, request_of(server_round=r, noise_multiplier=1.0, local_steps=3))))
        for r in range(2, 6)
    ]
    assert codes[0] == OK and codes[-1] == "budget-exhausted"
    assert Ledger(site / "ledger").spent(1e-3) <= 8.0


@pytest.mark.parametrize("where", ["load_site", "Request", "cached_patients", "refusal", "private_update", "Ledger"])
def test_an_exceptions_text_never_leaves_the_site(site, arrays, request_of, monkeypatch, where):
    def broken(*args, **kwargs):
        raise RuntimeError(CANARY)

    if where == "Request":
        monkeypatch.setattr(client_app.Request, "from_config", broken)
    else:
        monkeypatch.setattr(subject if hasattr(subject, where) else client_app, where, broken)
    reply = ask(site, pack_request(arrays, request_of()))
    assert code_of(reply) == ("data-unreadable" if where == "cached_patients" else INTERNAL_ERROR)
    assert CANARY not in repr(reply) and CANARY not in str(vars(reply))
    assert CANARY not in repr(vars(reply.content["reply"]))
    if where != "load_site":
        assert CANARY in (site / "errors.log").read_text(), "the site's own people should find it"


def test_a_text_that_no_file_can_hold_still_becomes_a_code(site, arrays, request_of, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError(f"{CANARY} in a file named \udcff")

    monkeypatch.setattr(training, "fine_tune", broken)
    assert code_of(ask(site, pack_request(arrays, request_of()))) == INTERNAL_ERROR
    assert CANARY in (site / ERROR_LOG).read_text()
    assert (site / ERROR_LOG).stat().st_mode & 0o077 == 0, "it may hold what a patient brought"


@pytest.mark.parametrize("smuggled", ["extra", "dtype", "shape", "nan"])
def test_an_update_off_the_allow_list_does_not_leave(site, arrays, request_of, monkeypatch, smuggled):
    def crooked(*args, **kwargs):
        update = fine_tune(*args, **kwargs)
        name = next(iter(update))
        if smuggled == "extra":
            update["num_patients"] = np.array([40], np.float32)
        elif smuggled == "dtype":
            update[name] = update[name].astype(np.float64)
        elif smuggled == "shape":
            update[name] = update[name][None]
        else:
            update[name] = np.full_like(update[name], np.nan)
        return update

    monkeypatch.setattr(training, "fine_tune", crooked)
    assert code_of(ask(site, pack_request(arrays, request_of()))) == INTERNAL_ERROR


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"noise_multiplier": 0.1}, "noise-below-minimum"),
        ({"target_delta": 0.01}, "delta-above-cap"),
        ({"max_grad_norm": 100.0}, "clip-above-cap"),
        ({"private": False}, "privacy-off-not-allowed"),
        ({"prior_sha256": "00" * 32}, "prior-mismatch"),
        ({"noise_multiplier": 0.3, "local_steps": 50}, "budget-exhausted"),
    ],
)
def test_the_policy_refuses_with_a_code_and_charges_nothing(site, arrays, request_of, changes, code):
    assert code_of(ask(site, pack_request(arrays, request_of(**changes)))) == code
    assert Ledger(site / "ledger").releases() == []


@pytest.fixture
def trainings(monkeypatch):
    """One entry per training."""
    calls = []

    def spy(*args, **kwargs):
        calls.append(args)
        return fine_tune(*args, **kwargs)

    monkeypatch.setattr(training, "fine_tune", spy)
    return calls


def test_a_reset_ledger_trains_nothing(site, arrays, request_of, trainings):
    """Without the ledger's folder a fresh one would start at zero."""
    assert code_of(ask(site, pack_request(arrays, request_of()))) == OK
    shutil.rmtree(site / "ledger")
    for server_round in (2, 3):
        assert code_of(ask(site, pack_request(arrays, request_of(server_round=server_round)))) == "ledger-corrupt"
    assert len(trainings) == 1
    assert "--repair" in (site / ERROR_LOG).read_text()
    Ledger(site / "ledger").repair()
    assert code_of(ask(site, pack_request(arrays, request_of(server_round=3)))) == OK
    assert Ledger(site / "ledger").releases() == [request_of().mechanism.release] * 2


def test_a_restored_backup_trains_nothing(site, tmp_path, arrays, request_of, trainings):
    assert code_of(ask(site, pack_request(arrays, request_of()))) == OK
    shutil.copytree(site / "ledger", tmp_path / "backup")
    assert code_of(ask(site, pack_request(arrays, request_of(server_round=3)))) == OK
    shutil.rmtree(site / "ledger")
    shutil.copytree(tmp_path / "backup", site / "ledger")
    for server_round in (2, 3, 4):
        assert code_of(ask(site, pack_request(arrays, request_of(server_round=server_round)))) == "ledger-corrupt"
    assert len(trainings) == 2


def test_a_replayed_round_gives_the_same_bytes_and_a_raised_one_is_charged_up_to_the_cap(
    site, arrays, request_of, trainings
):
    """More steps or less noise under the name of a round that was answered: a release of its own."""
    content = pack_request(arrays, request_of())
    first = ask(site, content)
    spent, codes = [Ledger(site / "ledger").spent(1e-3)], []
    for changes in (
        {"local_steps": 2},
        {"noise_multiplier": 2.0},
        {"noise_multiplier": 1.0},
        {"noise_multiplier": 0.5, "local_steps": 99},
    ):
        codes.append(code_of(ask(site, pack_request(arrays, request_of(**changes)))))
        spent.append(Ledger(site / "ledger").spent(1e-3))
        assert ask(site, content).content["arrays"] == first.content["arrays"]
        assert Ledger(site / "ledger").spent(1e-3) == spent[-1], "a replay is free"
    assert codes == [OK, OK, OK, "budget-exhausted"]
    assert spent == sorted(spent) and spent[-1] <= 8
    assert len(trainings) == len(Ledger(site / "ledger").releases()) == 4


def test_the_budget_is_counted_at_the_stricter_delta(site, arrays, request_of):
    """The site's is 1e-3: a request for 1e-6 is counted at 1e-6, and one for 1e-2 refused, see below."""
    request = request_of(target_delta=1e-6)
    assert code_of(ask(site, pack_request(arrays, request))) == OK
    (charge,) = Ledger(site / "ledger").charges()
    assert charge["epsilon"] == epsilon([request.mechanism.release], 1e-6)[0]
    assert (charge["delta"], charge["task"]) == (1e-6, "gradients")


def test_cases_of_another_key_need_another_ledger(site, arrays, request_of):
    assert code_of(ask(site, pack_request(arrays, request_of()))) == OK
    (site / "train" / "prepared.json").write_text(json.dumps({"key_check": "another"}))
    assert code_of(ask(site, pack_request(arrays, request_of(server_round=3)))) == "ledger-corrupt"
    (site / "train" / "prepared.json").write_text("{}")
    assert code_of(ask(site, pack_request(arrays, request_of(server_round=3)))) == "data-unreadable"


def test_the_second_copy_of_the_ledger_is_where_the_site_wants_it(site, tmp_path, arrays, request_of):
    settings = (site / policy.SITE_FILE).read_text()
    place = tmp_path / "copy.jsonl"
    (site / policy.SITE_FILE).write_text(settings.replace("ledger_replica: null", f"ledger_replica: {place}"))
    assert code_of(ask(site, pack_request(arrays, request_of()))) == OK
    assert place.read_bytes() == (site / "ledger" / client_ledger.LEDGER_NAME).read_bytes()


def test_a_site_answers_with_code_that_it_lists_and_no_other(make_study, arrays, request_of):
    site = make_study(allowed_code_sha256=["0" * 64]).path / "sites" / "a"
    assert code_of(ask(site, pack_request(arrays, request_of()))) == "code-not-allowed"
    assert code_sha256() in (site / ERROR_LOG).read_text(), "the site's own people learn what to review"
    assert Ledger(site / "ledger").releases() == []
    settings = (site / policy.SITE_FILE).read_text()
    (site / policy.SITE_FILE).write_text(settings.replace("0" * 64, code_sha256()))
    assert code_of(ask(site, pack_request(arrays, request_of()))) == OK


def test_a_run_may_have_as_many_rounds_as_the_site_allows(make_study, arrays, request_of):
    site = make_study(max_rounds=2).path / "sites" / "a"
    codes = [code_of(ask(site, pack_request(arrays, request_of(server_round=number)))) for number in (2, 3)]
    assert codes == [OK, "rounds-exhausted"]
    assert len(Ledger(site / "ledger").releases()) == 1


def test_a_study_without_privacy_needs_the_sites_consent_and_is_deterministic(make_study, arrays, request_of):
    site = make_study(allow_without_privacy=True).path / "sites" / "a"
    content = pack_request(arrays, request_of(private=False, noise_multiplier=0.0))
    first, again = ask(site, content), ask(site, content)
    assert code_of(first) == OK
    assert first.content["arrays"] == again.content["arrays"]
    assert Ledger(site / "ledger").releases() == []


def test_bad_requests_are_answered_with_a_code(site, arrays, request_of):
    content = pack_request(arrays, request_of())
    del content["config"]["seed"]
    assert code_of(ask(site, content)) == "bad-request"
    assert code_of(ask(site, RecordDict())) == "bad-request"
    wrong = {**arrays, "extra": np.zeros(1, np.float32)}
    assert code_of(ask(site, pack_request(wrong, request_of()))) == "bad-request"
    assert Ledger(site / "ledger").releases() == []


def test_unusable_sites_are_answered_with_a_code(site, arrays, request_of):
    content = pack_request(arrays, request_of())
    assert code_of(ask(site, content, {})) == "settings-unreadable"
    assert code_of(ask(site.parent, content)) == "settings-unreadable"
    (site / "ledger").mkdir(exist_ok=True)
    (site / "ledger" / client_ledger.LEDGER_NAME).write_text("{}\n")
    assert code_of(ask(site, content)) == "ledger-corrupt"
    (site / "train" / "cases.csv").unlink()
    assert code_of(ask(site, content)) == "data-unreadable"
    (site / policy.SITE_FILE).write_text("name: [1\n")
    assert code_of(ask(site, content)) == "settings-unreadable"


def test_in_flowers_own_simulation_a_node_is_a_site_by_its_number(make_study):
    run = make_study()
    folders = [site_folder({"partition-id": index}, {"run-dir": str(run.path)}) for index in range(3)]
    assert [folder.name for folder in folders] == ["a", "b", "c"]
    with pytest.raises(IndexError):
        site_folder({"partition-id": 3}, {"run-dir": str(run.path)})


def test_every_code_of_policy_and_ledger_may_leave():
    codes = {client_ledger.BudgetExhausted.code, client_ledger.LedgerError.code}
    for release in (Release(0.0, 1.0, 1), Release(1.0, 1.0, 1)):
        for private in (True, False):
            for delta in (1e-3, 0.5):
                for num_patients in (0, 10):
                    for norm in (1.0, 1e9):
                        mechanism = Mechanism(
                            **asdict(release), max_grad_norm=norm, target_delta=delta, private=private
                        )
                        code = policy.refusal(policy.SitePolicy(), mechanism, num_patients=num_patients)
                        codes |= {code} - {None}
    assert len(codes) >= 7
    assert codes <= CODES
    assert json.dumps(sorted(codes))


OPENED: list[str] | None = None


def watch(event, arguments):
    if OPENED is not None and event in ("open", "os.scandir", "os.listdir"):
        OPENED.append(str(arguments[0]))


@pytest.mark.parametrize("task", ["statistics", "gradients"])
def test_the_sites_list_of_refused_studies_is_never_opened_for_an_answer(site, arrays, request_of, monkeypatch, task):
    private = site / "train" / "private"
    private.mkdir()
    (private / "refused.csv").write_text(CANARY)
    sys.addaudithook(watch)  # for good: Python takes none away
    monkeypatch.setitem(globals(), "OPENED", [])
    reply = ask(site, pack_request(arrays, request_of(task=task)))
    assert code_of(reply) == OK
    assert any("cases" in path for path in OPENED) and not any(str(private) in path for path in OPENED)
