"""`fedcmr-client join`: Flower's SuperNode with the right flags, started again when it ends, and told in plain words.

The site calls out only: the SuperNode requests work from the coordinator, over TLS. What it listens on is this
machine's own loopback, for the executor that runs the ClientApp and is known by a secret: another program of this
machine could otherwise take the site's work, and answer in its name.
"""

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedcmr.client.deployment import joining
from fedcmr.client.deployment.answers import Answers
from fedcmr.client.deployment.clientapp import SITE_VARIABLE
from fedcmr.client.deployment.commands import write_commands
from fedcmr.client.deployment.connection import (
    LOOPBACK,
    Finding,
    address_of,
    authority_of,
    examine,
    examine_way,
    way_to,
)
from fedcmr.client.deployment.node_key import checked_node_key
from fedcmr.client.deployment.supernode_log import SuperNodeLog
from fedcmr.client.policy import SiteSettings
from fedcmr.shared.errors import UserError
from fedcmr.shared.free_ports import free_ports
from fedcmr.shared.progress import console

BIN = Path(sys.executable).parent
WAITS_S = (5.0, 15.0, 30.0, 60.0)
"""Before each new start; a node that died keeps its lease for a minute, in which Flower refuses it (code 305)."""
STEADY_S = 300.0
"""A SuperNode that ran so long starts the waits from the first."""
STOP_S = 20.0
WAIT_MINUTES, RETRY_S = 60.0, 10.0
"""How long `join` waits for a coordinator that is not up yet, and how often it looks."""
ONLINE = "online: the coordinator knows this site, and its requests are answered as site.yaml allows"
EXECUTOR_POLL_S = "0.2"
"""How often the executor requests work from the SuperNode next to it; Flower's own pause is a second."""
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
"""prctl(2), on Linux."""


def join(site: SiteSettings, preforked: bool = True, wait_minutes: float = WAIT_MINUTES) -> None:
    """Run the SuperNode until SIGTERM or SIGINT.

    Args:
        site: Its settings.
        preforked: Keep the libraries loaded between messages: see `fedcmr.client.deployment.preforked`.
        wait_minutes: How long to wait for a coordinator that is not reached before the first connection.

    Raises:
        UserError: The site is not ready: everything that is not is named. Or it is joined already.
    """
    findings = examine(site)
    _refuse(found for found in findings if not found.passing)
    with joining.lock(site):
        os.umask(0o077)  # Flower's own files, and whatever a library leaves behind
        over = threading.Event()
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda *_: over.set())
        _say(f"site {site.name} calls {way_to(site)}")
        _wait_for_coordinator(site, over, findings, wait_minutes)
        threading.Thread(target=Answers(site, _say).follow, args=(over,), daemon=True).start()
        log = SuperNodeLog(joining.home_of(site), lambda: _tell(site, ONLINE))
        failures, told = 0, None
        while not over.is_set():
            started = time.monotonic()
            code = _run_once(site, over, preforked, log)
            if over.is_set():
                break
            failures = 0 if time.monotonic() - started > STEADY_S else failures
            wait_s = WAITS_S[min(failures, len(WAITS_S) - 1)]
            failures += 1
            reason = log.reason() or _unreached(site) or f"it ended with code {code}, and {log.path} says why"
            if reason != told:  # the same reason is told once, however often it is tried
                _tell(site, f"not connected: {reason}. It is tried again until it is stopped")
            told = reason
            over.wait(wait_s)
    _say("left the study: it may be joined again at any time")


def _refuse(findings: Iterable[Finding]) -> None:
    troubles = [f"{found.name}: {found.text}" for found in findings if not found.ok]
    if len(troubles) == 1:
        raise UserError(f"the site cannot join: {troubles[0]}")
    if troubles:
        for trouble in troubles:
            _say(trouble)
        raise UserError(
            f"the site cannot join: {len(troubles)} things have to be put right first, they are listed above"
        )


def _wait_for_coordinator(
    site: SiteSettings, over: threading.Event, findings: Sequence[Finding], wait_minutes: float
) -> None:
    """Wait while nothing is wrong but that the coordinator is not reached.

    Raises:
        UserError: The time is over, or something else is wrong by now.
    """
    deadline = time.monotonic() + 60 * wait_minutes
    waits = False
    while any(found.passing for found in findings) and not over.is_set():
        unreached = next(found.text for found in findings if found.passing)
        if time.monotonic() >= deadline:
            raise UserError(f"the site cannot join: coordinator: {unreached}; waited {wait_minutes:g} minutes (--wait)")
        if not waits:
            _tell(site, f"waiting for the coordinator, {wait_minutes:g} minutes at most (--wait): {unreached}")
        waits = True
        over.wait(min(RETRY_S, max(0.0, deadline - time.monotonic())))
        findings = examine_way(site)
        _refuse(found for found in findings if not found.passing)


def _unreached(site: SiteSettings) -> str | None:
    """Why the coordinator is not reached now; None where it is."""
    return next((found.text for found in examine_way(site) if not found.ok), None)


def _tell(site: SiteSettings, state: str) -> None:
    """Tell how the site stands, here and to `fedcmr-client status`."""
    joining.tell_state(site, state)
    _say(state)


def _say(text: str) -> None:
    console.print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True)


def _run_once(site: SiteSettings, over: threading.Event, preforked: bool, log: SuperNodeLog) -> int:
    """One SuperNode and its executor, from their start to the end of either."""
    environment = _environment(site)
    # The path of a Unix socket is short, and a site's folder may not be.
    with tempfile.TemporaryDirectory(prefix="fedcmr-") as temporary:
        worker, secret = Path(temporary) / "worker", Path(temporary) / "secret"
        write_commands(_commands(site), worker)
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        [port] = free_ports(1)  # for the SuperNode's own service
        commands = (
            [[sys.executable, "-P", "-m", "fedcmr.client.deployment.preforked", str(worker)]] if preforked else []
        )
        commands += [_supernode(site, port, secret), _executor(port, secret)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    cwd=site.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
                assert process.stdout is not None
                log.follow(process.stdout)
                processes.append(process)
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
