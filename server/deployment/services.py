"""Flower's SuperLink and the ServerApp's executor as background processes of the coordinator's machine.

The SuperLink uses TLS, identifies its sites by their keys, starts no ServerApp itself (process isolation: only an
executor with the secret may), installs nothing at run time and sends no telemetry. An executor that fails is started
again (`fedcmr.server.deployment.executor`).
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedcmr.server.deployment.authority import write_secret
from fedcmr.server.deployment.coordinator import Coordinator
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError

SUPERLINK, EXECUTOR = "superlink", "superexec"
SERVERAPP = b"flwr-serverapp"
BIN = Path(sys.executable).parent
CONNECTION = "study"
START_S, STOP_S, POLL_S, WATCH_S = 90.0, 15.0, 0.2, 1.0
SECRET_NAME, NODES_NAME = "superexec.secret", "nodes.json"
REGISTERED = re.compile(r"SuperNode (\d+) registered")


def environment(coordinator: Coordinator) -> dict[str, str]:
    """Environment variables for all of Flower's commands."""
    return os.environ | {
        "FLWR_HOME": str(coordinator.flwr_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def start(coordinator: Coordinator) -> None:
    """Start what is not running, wait until it is healthy, and register every site with Flower.

    Raises:
        UserError: A service did not start; the message names its log.
    """
    for name in ("logs", "pids", "flwr"):
        (coordinator.folder / name).mkdir(mode=0o700, exist_ok=True)
    secret = coordinator.folder / SECRET_NAME
    if not secret.exists():
        write_secret(secret, secrets.token_hex(32).encode())
    _write_connection(coordinator)
    folder, address = coordinator.folder, coordinator.superlink
    _launch(
        coordinator,
        SUPERLINK,
        [
            "flower-superlink",
            "--host",
            coordinator.host,
            "--port",
            str(coordinator.superlink_port),
            "--ssl-ca-certfile",
            str(coordinator.ca),
            "--ssl-certfile",
            str(folder / "server.crt"),
            "--ssl-keyfile",
            str(folder / "server.key"),
            "--enable-supernode-auth",
            "--database",
            str(folder / "state.db"),
            "--isolation",
            "process",
            "--superexec-auth-secret-file",
            str(secret),
            "--disable-runtime-dependency-installation",
            "--health-server-address",
            f"127.0.0.1:{coordinator.health_port}",
        ],
    )
    _wait_until_healthy(coordinator)
    _launch(
        coordinator,
        EXECUTOR,
        [
            sys.executable,
            "-m",
            "fedcmr.server.deployment.executor",
            "flower-superexec",
            "--root-certificates",
            str(coordinator.ca),
            "--runtime-api-address",
            address,
            "--superexec-auth-secret-file",
            str(secret),
        ],
    )
    tell_flower(coordinator)


def watch(coordinator: Coordinator, over: threading.Event) -> None:
    """Stop the services when `over` is set; for a supervisor that starts everything again when one of them ends.

    Raises:
        UserError: One has ended; the other is then stopped.
    """
    while not over.wait(WATCH_S):
        for name in (SUPERLINK, EXECUTOR):
            if running_pid(coordinator, name) is None:
                stop(coordinator)
                raise UserError(
                    f"{name} has ended, and the services with it: the end of {_log_file(coordinator, name)} says why; "
                    "start them again, then 'fedcmr-server run --resume'"
                )
    stop(coordinator)


def stop(coordinator: Coordinator) -> list[str]:
    """Stop the running services, the executor first; returns their names."""
    ended = []
    for name in (EXECUTOR, SUPERLINK):
        pid = running_pid(coordinator, name)
        if pid is not None:
            _end(pid)
            ended.append(name)
        _pid_file(coordinator, name).unlink(missing_ok=True)
    return ended


def running_pid(coordinator: Coordinator, name: str) -> int | None:
    """A service's process id; None where it does not run, also where another process now has that id."""
    try:
        noted = json.loads(_pid_file(coordinator, name).read_text(encoding="utf-8"))
        pid, started = int(noted["pid"]), noted["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if start_time(pid) == started else None


def serverapp_runs(coordinator: Coordinator) -> bool:
    """Whether the executor runs a ServerApp: `flwr-serverapp` is started in its process group."""
    executor = running_pid(coordinator, EXECUTOR)
    if executor is None:
        return False
    for process in Path("/proc").glob("[0-9]*"):
        fields = _fields(int(process.name))
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if fields is not None and int(fields[2]) == executor and SERVERAPP in command:
            return True
    return False


def healthy(coordinator: Coordinator, timeout_s: float = 2.0) -> bool:
    """Whether the SuperLink reports that it is serving (grpc.health.v1)."""
    with grpc.insecure_channel(f"127.0.0.1:{coordinator.health_port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def flwr(coordinator: Coordinator, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run one of Flower's own commands to its end; returns it with its output."""
    return subprocess.run(
        [f"{BIN}/flwr", *arguments],
        env=environment(coordinator),
        capture_output=True,
        text=True,
        cwd=coordinator.folder,
        check=False,
    )


def tell_flower(coordinator: Coordinator) -> None:
    """Register the sites that the running SuperLink does not know yet; it keeps the keys in its database.

    Raises:
        UserError: Flower refuses a key.
    """
    nodes = node_ids(coordinator)
    for name in coordinator.sites():
        if name in nodes:
            continue
        done = flwr(coordinator, "supernode", "register", str(coordinator.public_key(name)), CONNECTION)
        shown = done.stdout + done.stderr
        found = REGISTERED.search(shown)
        if found is None:
            raise UserError(f"Flower did not register site {name}: {shown.strip()[-300:]}")
        nodes[name] = found[1]
        write_atomically(coordinator.folder / NODES_NAME, json.dumps(nodes).encode())


def forget_site(coordinator: Coordinator, name: str) -> None:
    """Remove a site's key from Flower and from the folder: its SuperNode is refused from the next message on.

    Raises:
        UserError: There is no such site, or Flower cannot be reached or refuses.
    """
    if name not in coordinator.sites():
        raise UserError(f"{coordinator.folder} has no site {name!r}: it has {', '.join(coordinator.sites()) or 'none'}")
    nodes = node_ids(coordinator)
    if name in nodes:
        if not healthy(coordinator):
            raise UserError(f"Flower knows the key of {name}: 'fedcmr-server start {coordinator.folder}', then again")
        done = flwr(coordinator, "supernode", "unregister", nodes[name], CONNECTION)
        if done.returncode:
            raise UserError(f"Flower did not unregister {name}: {(done.stdout + done.stderr).strip()[-300:]}")
        del nodes[name]
        write_atomically(coordinator.folder / NODES_NAME, json.dumps(nodes).encode())
    for path in (coordinator.public_key(name), coordinator.folder / "sites" / f"{name}.json"):
        path.unlink(missing_ok=True)


def node_ids(coordinator: Coordinator) -> dict[str, str]:
    """Flower's node id of every site that is registered with it."""
    path = coordinator.folder / NODES_NAME
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _write_connection(coordinator: Coordinator) -> None:
    """Write the file in which `flwr` finds the SuperLink's address."""
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{coordinator.superlink}"\n'
        f"root-certificates = {json.dumps(str(coordinator.ca))}\n"
    )
    write_atomically(coordinator.flwr_home / "config.toml", text.encode())


def _launch(coordinator: Coordinator, name: str, command: list[str]) -> None:
    """Start a service in a session of its own, unless it runs already."""
    if running_pid(coordinator, name) is not None:
        return
    with _log_file(coordinator, name).open("ab") as log:
        process = subprocess.Popen(
            command,
            env=environment(coordinator),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=coordinator.folder,
        )
    noted = {"pid": process.pid, "started": start_time(process.pid)}
    write_atomically(_pid_file(coordinator, name), json.dumps(noted).encode())


def _wait_until_healthy(coordinator: Coordinator) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and running_pid(coordinator, SUPERLINK) is not None:
        if healthy(coordinator):
            return
        time.sleep(POLL_S)
    stop(coordinator)
    log = _log_file(coordinator, SUPERLINK)
    raise UserError(f"the SuperLink did not start: the end of {log} says why; is a port of coordinator.yaml in use?")


def _end(pid: int) -> None:
    """Send SIGTERM to a service and its children, then SIGKILL where it does not end."""
    for sign, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        try:
            os.killpg(pid, sign)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if start_time(pid) is None:
                return
            time.sleep(POLL_S)


def start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks (field 22 of /proc/PID/stat); None for one that has ended."""
    fields = _fields(pid)
    return None if fields is None else fields[19]


def _fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on: state, parent, process group, ...; None for an ended process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields


def _pid_file(coordinator: Coordinator, name: str) -> Path:
    return coordinator.folder / "pids" / f"{name}.json"


def _log_file(coordinator: Coordinator, name: str) -> Path:
    return coordinator.folder / "logs" / f"{name}.log"
