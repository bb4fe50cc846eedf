"""The same apps under Flower's own simulation: `flwr run`, with Ray, through a SuperLink of this test's own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from shared import checkpoint
from shared.run_folder import load_run
from simulations.grid import make_grid, run_server_app

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SMALL = (
    "synthesis.num_cases=6", "synthesis.num_steps=1", "regression.num_steps=2", "regression.batch_size=4",
    "regression.num_tta=1", "evaluation.baselines=[]", "evaluation.num_bootstrap=100",
)  # fmt: skip


@pytest.fixture
def superlink(tmp_path):
    """A simulating SuperLink on a free port, and the environment in which `flwr` calls it `test`."""
    pytest.importorskip("ray", reason="flwr[simulation] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "superlink.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "superlink.log").read_text()
                time.sleep(0.1)
        yield environment
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def flwr_run(environment, run_path):
    """`flwr run`, as the README has it; what it printed."""
    done = subprocess.run(
        ["flwr", "run", str(ROOT), "test", "--stream", "--federation-config",
         "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2", "--run-config", f'run-dir="{run_path}"'],
        env=environment, capture_output=True, text=True, timeout=240, cwd=run_path,
    )  # fmt: skip
    return done.stdout + done.stderr


def structure(value):
    """The keys of nested dicts."""
    return {key: structure(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_flwr_run_gives_what_the_in_process_grid_gives(make_study, write_cases, superlink, tmp_path):
    run = make_study(*SMALL)
    write_cases(run.path / "test" / "hospitals", "GE", 3, seed=9)
    shutil.copytree(run.path, tmp_path / "in_process")
    shown = flwr_run(superlink, run.path)
    assert "round 3 of 3: 3 of 3 sites" in shown, shown[-3000:]
    assert (run.path / "report.html").is_file(), shown[-3000:]

    reference = load_run(tmp_path / "in_process")
    with make_grid(reference, reference.config) as grid:
        run_server_app(grid, {"run-dir": str(reference.path)})
    reports = [json.loads((path / "report.json").read_text()) for path in (run.path, reference.path)]
    assert structure(reports[0]) == structure(reports[1])
    assert reports[0]["privacy"]["epsilon"] == pytest.approx(reports[1]["privacy"]["epsilon"], rel=1e-9)
    generators = [checkpoint.load(path / "generator.safetensors")[0] for path in (run.path, reference.path)]
    assert {n: a.shape for n, a in generators[0].items()} == {n: a.shape for n, a in generators[1].items()}
