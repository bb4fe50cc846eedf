"""Flower's own simulation (Ray), in processes of its own: the apps of `fedcmr.simulations.grid`, with many sites."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedcmr.shared.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
START_S, STOP_S = 180.0, 10.0
CONNECTION = "simulation"


@dataclass(frozen=True)
class Engine:
    """A running SuperLink that simulates its SuperNodes.

    Attributes:
        pid: Its process; the ServerApp's is below it.
        environment: In which `flwr` knows it as `simulation`.
    """

    pid: int
    environment: dict[str, str]

    def run(
        self,
        run_folder: Path,
        num_sites: int,
        num_cores: int,
        timeout_s: float | None = None,
        until: str = "",
        stream: bool = False,
    ) -> str:
        """`flwr run` of a study whose cases are prepared; returns what it showed.

        Args:
            run_folder: With `config.yaml`, `study.json` and `sites/`; node k is the k-th site by name.
            num_sites: SuperNodes, one per site.
            num_cores: For all ClientApps together; each takes one.
            timeout_s: None waits for ever.
            until: The last stage to do; empty for all.
            stream: Whether its output goes to the standard error output as it comes; nothing is returned then.
        """
        federation = f"num-supernodes={num_sites} client-resources-num-cpus=1 init-args-num-cpus={num_cores}"
        command = [
            "flwr",
            "run",
            str(ROOT),
            CONNECTION,
            "--stream",
            "--federation-config",
            federation,
            "--run-config",
            f'run-dir="{run_folder.resolve()}" until="{until}"',
        ]
        done = subprocess.run(
            command,
            env=self.environment,
            stdout=sys.stderr if stream else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            cwd=run_folder,
            check=False,
        )
        return done.stdout or ""


@contextmanager
def simulating_superlink(folder: Path) -> Iterator[Engine]:
    """A SuperLink on a free port of this machine, with its settings and log in `folder`; ends with the block.

    Raises:
        UserError: This is no source checkout, Ray is not installed, or the SuperLink did not start.
    """
    if not (ROOT / "pyproject.toml").is_file():
        raise UserError(f"{ROOT} has no pyproject.toml: Flower packs its app from a source checkout, use one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home, log_path = folder / "flwr", folder / "superlink.log"
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until_up(process, port, log_path)
        yield Engine(process.pid, environment)
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_up(process: "subprocess.Popen[bytes]", port: int, log_path: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise UserError(f"Flower's SuperLink did not start, see {log_path}; is flwr[simulation] installed?")
