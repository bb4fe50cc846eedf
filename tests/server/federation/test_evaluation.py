"""The server's side of federated evaluation, and a whole study whose test patients are all at the sites."""

import json

import numpy as np
import pytest

from fedcmr.client.ledger import Ledger
from fedcmr.server.deployment.coordinator import Coordinator
from fedcmr.server.deployment.runs import make_run
from fedcmr.server.federation.evaluation import check_answers, federated_results, federated_table, make_request
from fedcmr.server.federation.senders import BUNDLE_REFUSED, Reply, reply_of
from fedcmr.server.federation.state import StudySite
from fedcmr.server.report.summary import headline, key_figures
from fedcmr.shared.errors import UserError
from fedcmr.shared.records import pack_reply, pack_sums
from fedcmr.shared.tasks.ejection_fraction.sums import SUMS
from fedcmr.simulations.grid import make_grid, run_server_app
from fedcmr.simulations.summary import print_summary
from tests.conftest import NOMINAL_PATIENTS, give_test_patients

SHAPES = {"Siemens": (len(SUMS),)}
SITES = {name: StudySite({"Siemens": 40}, 40) for name in ("a", "b", "c")}


def believed(*contents):
    """Replies of a grid that does not know its nodes."""
    return [Reply(None, content) for content in contents]


def answer(site: str, form: str = "private", values=(20, 1, 1.2, 0.2, 10, 6)):
    return pack_sums(site, form, {"Siemens": np.array(values, np.float32)}, SHAPES)


def test_every_site_of_the_study_is_told_of():
    answers = check_answers(believed(answer("a"), pack_reply("b", "no-evaluation")), SITES)
    assert {name: found["code"] for name, found in answers.items()} == {
        "a": "ok",
        "b": "no-evaluation",
        "c": "no-answer",
    }
    assert answers["a"]["form"] == "private"


@pytest.mark.parametrize("trick", ["twice", "stranger", "shape", "form", "small-group", "code"])
def test_an_answer_that_is_not_as_it_should_be_is_dropped(trick):
    contents = [answer("a")]
    if trick == "twice":
        contents.append(answer("a"))
    elif trick == "stranger":
        contents = [answer("mallory")]
    elif trick == "shape":
        contents = [pack_sums("a", "private", {"GE": np.zeros(6, np.float32)}, {"GE": (6,)})]
    elif trick == "form":
        contents[0]["reply"]["form"] = "exact"
    elif trick == "small-group":
        contents = [answer("a", "table", (3, 0, 0, 0, 1, 1))]
    elif trick == "code":
        contents[0]["reply"]["code"] = "<script>"
    expected = "no-answer" if trick == "stranger" else "dropped"
    assert check_answers(believed(*contents), SITES)["a"] == {"code": expected}


def test_an_answer_is_the_sites_whose_key_sent_it():
    """Site a answers as b and leaves b's own answer as it is; c lets no code run."""
    nodes = {2: "a", 3: "b", 4: "c"}
    own = answer("b", values=(10, 1, 1.2, 0.2, 10, 6))
    sent = [(2, answer("b"), ""), (3, own, ""), (4, None, BUNDLE_REFUSED)]
    found = check_answers([reply_of(*reply, nodes) for reply in sent], SITES)
    assert found["a"] == {"code": "names-another-site"} and found["c"] == {"code": "code-not-allowed"}
    assert found["b"]["code"] == "ok" and found["b"]["sums"]["Siemens"][0] == 10

    sent = [(2, pack_reply("unknown", "settings-unreadable"), ""), (3, {}, ""), (9, answer("c"), "")]
    found = check_answers([reply_of(*reply, nodes) for reply in sent], SITES)
    assert found == {"a": {"code": "settings-unreadable"}, "b": {"code": "dropped"}, "c": {"code": "no-answer"}}


def test_sites_add_up_and_a_group_left_out_is_behind_no_figure(tmp_path, make_study):
    run = make_study()
    kept = {
        "task": "ejection_fraction",
        "model_sha256": "a" * 64,
        "noise_multiplier": 0.5,
        "delta": 1e-3,
        "epsilon": 7.0,
        "accountant": "prv",
        "sites": {
            "a": {"code": "ok", "form": "table", "sums": {"Siemens": [20, 1, 1.2, 0.2, 10, 6]}},
            "b": {"code": "ok", "form": "table", "sums": {"Siemens": [10, 0.5, 0.9, 0.1, 5, 3], "GE": [0] * 6}},
            "c": {"code": "no-answer"},
        },
    }
    (run.path / "federated_evaluation.json").write_text(json.dumps(kept))
    results = federated_results(run)
    assert set(results["vendors"]) == {"Siemens", "all"} and results["privacy"] is None
    assert results["vendors"]["all"]["mae_points"] == pytest.approx(100 * 2.1 / 30)
    assert results["vendors"]["all"]["n_patients"] == 30 and results["vendors"]["all"]["sites"] == ["a", "b"]
    assert "c: no-answer" in federated_table(results).caption


def test_a_new_run_needs_test_patients_somewhere(tmp_path):
    folder = tmp_path / "study"
    (folder / "sites").mkdir(parents=True)
    (folder / "sites" / "a.json").write_text(json.dumps({"vendors": {"GE": 40}, "nominal_patients": 40}))
    coordinator = Coordinator("study", folder=folder)
    with pytest.raises(UserError, match=r"--test.*evaluation.federated=true"):
        make_run(coordinator, tmp_path / "run", "smoke", [], [])
    with pytest.raises(UserError, match="the services do not run"):
        make_run(coordinator, tmp_path / "run", "smoke", ["evaluation.federated=true"], [])


@pytest.fixture
def finished(make_study, tiny_evaluations):
    """A study without any test patient at the coordinator: a is private, b gives its table, c evaluates nothing."""
    run = make_study(
        "evaluation.federated=true",
        "evaluation.baselines=[predict_the_mean]",
        "federation.num_rounds=2",
        "federation.adapter=norm_affine",
        "synthesis.num_cases=4",
        "synthesis.num_steps=1",
        "regression.num_steps=2",
        "regression.batch_size=4",
        "regression.num_tta=1",
        "evaluation.num_bootstrap=100",
        min_patients=2,
    )
    give_test_patients(run, {"a": "private", "b": "table", "c": "off"})
    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path.resolve())})
    return run


@pytest.mark.slow
def test_a_study_is_evaluated_where_its_test_patients_are(finished, capsys):
    report = json.loads((finished.path / "report.json").read_text())
    found = report["federated_evaluation"]
    assert report["regression"] == {} and NOMINAL_PATIENTS < 12
    assert found["sites"] == {
        "a": {"code": "ok", "form": "private"},
        "b": {"code": "ok", "form": "table"},
        "c": {"code": "no-evaluation", "form": None},
    }
    philips = found["vendors"]["Philips"]
    kept = json.loads(next((finished.path / "sites" / "b" / "evaluation").iterdir()).read_text())["patients"]
    errors = 100 * np.array([row["predicted"] - row["true"] for row in kept])
    assert philips["n_patients"] == 12 and philips["sites"] == ["b"]
    assert philips["mae_points"] == pytest.approx(np.abs(errors).mean(), abs=0.02)
    assert philips["bias_points"] == pytest.approx(errors.mean(), abs=0.02)
    assert "GE" not in found["vendors"]

    (charge,) = Ledger(finished.path / "sites" / "a" / "test_ledger").charges()
    assert charge["epsilon"] == pytest.approx(found["privacy"]["epsilon"]) and charge["epsilon"] <= 8
    assert not (finished.path / "sites" / "b" / "test_ledger").exists()
    page = (finished.path / "report.html").read_text()
    for sentence in ("On the sites’ own test patients", "sums with noise", "not private", "No\n  test patient’s scan"):
        assert sentence in page
    assert "ejection fraction of the sites' own test patients" in page or "ejection fraction of the sites&#39;" in page
    assert "results at the sites" in (finished.path / "report.csv").read_text()
    print_summary(finished)
    assert "a: sums with noise; b: plain table, not private; c: no-evaluation" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.slow
def test_the_stage_is_done_once_and_asked_again_it_charges_nothing(finished):
    before = (finished.path / "federated_evaluation.json").read_bytes()
    lines = (finished.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"federated_evaluation"' not in line]
    assert len(kept) == len(lines) - 1
    (finished.path / "metrics.jsonl").write_text("".join(kept))  # as after a crash before the line was written
    with make_grid(finished) as grid:
        run_server_app(grid, {"run-dir": str(finished.path.resolve())})
    assert (finished.path / "federated_evaluation.json").read_bytes() == before
    assert len(Ledger(finished.path / "sites" / "a" / "test_ledger").charges()) == 1


@pytest.mark.slow
def test_the_noise_asked_for_is_that_of_the_target(finished):
    config = finished.config
    config.evaluation.federated_epsilon = 2.0
    request = make_request("0123456789abcdef", config, SITES, "a" * 64)
    from fedcmr.shared.privacy import epsilon

    assert 1.97 <= epsilon([request.mechanism.release], request.target_delta)[0] <= 2.0


def test_the_headline_says_what_the_sites_sums_give(make_study):
    unknown = {"mae_points": None, "r2": None, "n_patients": None}
    known = {"mae_points": 6.04, "ci95": {"mae_points": [4.96, 7.1]}, "r2": 0.71, "n_patients": 45}
    report = {
        "regression": {},
        "baselines": {},
        "privacy": {"epsilon": 7.98},
        "synthetic": {"n_cases": 600},
        "federated_evaluation": {"vendors": {"GE": known, "all": known}, "sites": {}},
    }
    assert "by 6.0 points on average (95 % interval 5.0 to 7.1)" in headline(report)
    assert key_figures(report)[0][:2] == ("6.0", "points") and key_figures(report)[1][0] == "0.71"
    report["federated_evaluation"]["vendors"]["all"] = unknown
    assert "a mean error for GE alone" in headline(report)
    report["federated_evaluation"]["vendors"] = {}
    assert "no result" in headline(report)
