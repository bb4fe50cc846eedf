"""`fedcmr-client join`: Flower's SuperNode with the right flags, started again when it ends.

The site calls out only: the SuperNode requests work from the coordinator, over TLS. What it listens on is this
machine's own loopback, for the executor that runs the ClientApp and is known by a secret: another program of this
machine could otherwise take the site's work, and answer in its name.
"""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fedcmr.client.deployment.clientapp import SITE_VARIABLE
from fedcmr.client.deployment.commands import write_commands
from fedcmr.client.deployment.connection import LOOPBACK, address_of, authority_of, examine
from fedcmr.client.deployment.node_key import checked_node_key
from fedcmr.client.policy import SiteSettings
from fedcmr.shared.errors import UserError
from fedcmr.shared.progress import console

BIN = Path(sys.executable).parent
WAITS_S = (5.0, 15.0, 30.0, 60.0)
"""Before each new start; a node that died keeps its lease for a minute, in which Flower refuses it (code 305)."""
STEADY_S = 300.0
"""A SuperNode that ran so long starts the waits from the first."""
STOP_S = 20.0
EXECUTOR_POLL_S = "0.2"
"""How often the executor requests work from the SuperNode next to it; Flower's own pause is a second."""
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
"""prctl(2), on Linux."""


def join(site: SiteSettings, preforked: bool = True) -> None:
    """Run the SuperNode until SIGTERM or SIGINT.

    Args:
        site: Its settings.
        preforked: Keep the libraries loaded between messages: see `fedcmr.client.deployment.preforked`.

    Raises:
        UserError: The site is not ready: everything that is not is named.
    """
    troubles = [f"{found.name}: {found.text}" for found in examine(site) if not found.ok]
    if troubles:
        raise UserError("the site cannot join: " + "; ".join(troubles))
    os.umask(0o077)  # Flower's own files, and whatever a library leaves behind
    over = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: over.set())
    failures = 0
    while not over.is_set():
        started = time.monotonic()
        code = _run_once(site, over, preforked)
        if over.is_set():
            return
        failures = 0 if time.monotonic() - started > STEADY_S else failures
        wait_s = WAITS_S[min(failures, len(WAITS_S) - 1)]
        failures += 1
        console.print(f"the SuperNode ended with code {code}; it starts again in {wait_s:.0f} s", highlight=False)
        over.wait(wait_s)


def _run_once(site: SiteSettings, over: threading.Event, preforked: bool) -> int:
    """One SuperNode and its executor, from their start to the end of either."""
    environment = _environment(site)
    # The path of a Unix socket is short, and a site's folder may not be.
    with tempfile.TemporaryDirectory(prefix="fedcmr-") as temporary:
        worker, secret = Path(temporary) / "worker", Path(temporary) / "secret"
        write_commands(_commands(site), worker)
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        port = _free_port()
        commands = (
            [[sys.executable, "-P", "-m", "fedcmr.client.deployment.preforked", str(worker)]] if preforked else []
        )
        commands += [_supernode(site, port, secret), _executor(port, secret)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        cwd=site.folder,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                        preexec_fn=_end_with_parent,
                    )
                )
            needed = processes[-2:]
            while all(process.poll() is None for process in needed) and not over.wait(0.2):
                pass
            ended = [process.returncode for process in needed if process.returncode is not None]
        finally:
            for process in reversed(processes):
                _end(process)
    return ended[0] if ended else 0


def _supernode(site: SiteSettings, port: int, secret: Path) -> list[str]:
    """The SuperNode, which starts nothing itself: on its own port, an executor that knows the secret takes its work."""
    host, server_port = address_of(site)
    return [
        "flower-supernode",
        "--superlink",
        f"[{host}]:{server_port}" if ":" in host else f"{host}:{server_port}",
        "--root-certificates",
        str(authority_of(site)),
        "--auth-supernode-private-key",
        str(checked_node_key(site.folder)),
        "--isolation",
        "process",
        "--superexec-auth-secret-file",
        str(secret),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--node-config",
        f'site="{site.folder}"',
    ]


def _executor(port: int, secret: Path) -> list[str]:
    """What takes the SuperNode's work and starts a ClientApp for it."""
    return [
        "flower-superexec",
        "--insecure",
        "--runtime-api-address",
        f"127.0.0.1:{port}",
        "--superexec-auth-secret-file",
        str(secret),
    ]


def _free_port() -> int:
    """For the SuperNode's own service, on this machine's loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(site: SiteSettings) -> dict[str, str]:
    """Flower's home in the site's folder, and in front of the PATH the commands that check bundles and refuse."""
    path = os.pathsep.join([str(_commands(site)), str(BIN), os.environ.get("PATH", "")])
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *LOOPBACK]))
    return os.environ | {
        "no_proxy": direct,
        "NO_PROXY": direct,
        "FLWR_HOME": str(site.folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": EXECUTOR_POLL_S,
        SITE_VARIABLE: str(site.folder),
        "PATH": path,
    }


def _commands(site: SiteSettings) -> Path:
    """Where those commands lie."""
    folder = site.folder / "flwr" / "bin"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _end_with_parent() -> None:
    """In a child before its command: where `join` is killed, a SuperNode left behind would hold the site's lease."""
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The SuperNode and all below it: a ClientApp of a SuperNode that is gone has nobody to reply to."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.5)  # for those below it
    process.wait()
