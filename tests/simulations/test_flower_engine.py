"""The same apps under Flower's own simulation: `flwr run`, with Ray, through a SuperLink of this test's own."""

import json
import shutil

import pytest

from fedcmr.server.deployment.services import start_time
from fedcmr.server.run_folder import load_run
from fedcmr.shared import checkpoint
from fedcmr.simulations import flower_engine
from fedcmr.simulations import run as run_module
from fedcmr.simulations.flower_engine import simulating_superlink
from fedcmr.simulations.grid import make_grid, run_server_app

pytestmark = pytest.mark.engine

SMALL = (
    "synthesis.num_cases=6",
    "synthesis.num_steps=1",
    "regression.num_steps=2",
    "regression.batch_size=4",
    "regression.num_tta=1",
    "evaluation.baselines=[]",
    "evaluation.num_bootstrap=100",
)


@pytest.fixture
def engine(tmp_path):
    """A simulating SuperLink on a free port."""
    pytest.importorskip("ray", reason="flwr[simulation] is not installed")
    with simulating_superlink(tmp_path / "engine") as running:
        yield running


def structure(value):
    """The keys of nested dicts."""
    return {key: structure(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_flwr_run_gives_what_the_in_process_grid_gives(make_study, write_cases, engine, tmp_path):
    run = make_study(*SMALL)
    write_cases(run.path / "test" / "hospitals", "GE", 3, seed=9)
    shutil.copytree(run.path, tmp_path / "in_process")
    shown = engine.run(run.path, num_sites=3, num_cores=2, timeout_s=480)
    assert "round 3 of 3: 3 of 3 sites" in shown, shown[-3000:]
    assert (run.path / "report.html").is_file(), shown[-3000:]

    reference = load_run(tmp_path / "in_process")
    with make_grid(reference) as grid:
        run_server_app(grid, {"run-dir": str(reference.path)})
    reports = [json.loads((path / "report.json").read_text()) for path in (run.path, reference.path)]
    assert structure(reports[0]) == structure(reports[1])
    assert reports[0]["privacy"]["epsilon"] == pytest.approx(reports[1]["privacy"]["epsilon"], rel=1e-9)
    generators = [checkpoint.load(path / "generator.safetensors")[0] for path in (run.path, reference.path)]
    assert {n: a.shape for n, a in generators[0].items()} == {n: a.shape for n, a in generators[1].items()}


def test_the_command_runs_a_study_under_flower_and_leaves_no_process(make_study, write_cases, monkeypatch, capfd):
    pytest.importorskip("ray", reason="flwr[simulation] is not installed")
    run = make_study(*SMALL, "federation.num_rounds=2")
    write_cases(run.path / "test" / "hospitals", "GE", 3, seed=9)
    run.mark_done("prepare", 1.0)
    pids = []
    until_up = flower_engine._wait_until_up
    monkeypatch.setattr(
        flower_engine, "_wait_until_up", lambda process, *rest: (pids.append(process.pid), until_up(process, *rest))
    )
    monkeypatch.setattr(run_module, "SITE_STAGES", ())
    done = run_module.simulate(run.config, run.path, "synthesis", under_flower=True)
    assert done.is_done("synthesis") and not done.is_done("regressor")
    assert len(pids) == 1 and start_time(pids[0]) is None
    assert "round 2 of 2: 3 of 3 sites" in capfd.readouterr().err
