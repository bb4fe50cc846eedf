"""A process that has the libraries loaded and forks for every message: what each round saves is the seconds of imports.

Flower starts `flwr-clientapp` anew for every message. `SHIM` is a command of that name which hands its arguments to the
process that `main` runs, where a child takes them from there. Only libraries are loaded beforehand: the child reads the
policy, judges the bundle and imports its code as a process of its own would. Without the process, the command is one.
"""

import importlib
import json
import os
import signal
import socket
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import FrameType

LIBRARIES = (
    "torch",
    "monai.networks.nets",
    "opacus.accountants",
    "scipy.stats",
    "safetensors.numpy",
    "omegaconf",
    "flwr.supernode.cli",
    "flwr.clientapp",
    "flwr.app",
)
"""What takes long and is nobody's code but the site's own installation."""
MAX_MESSAGE = 65536
APP_COMMANDS = "flwr-"
"""How the commands that run an app are called; the services are flower-*."""

SHIM = '''\
#!{python} -IS
"""flwr-clientapp: handed to the process that has the libraries loaded, or else run here."""
import json, os, socket, sys

try:
    link = socket.socket(socket.AF_UNIX)
    link.connect({socket!r})
except OSError:
    os.execv({python!r}, [{python!r}, "-P", "-m", "fedcmr.client.deployment.clientapp", *sys.argv[1:]])
socket.send_fds(link, [json.dumps(sys.argv[1:]).encode()], [1, 2])
sys.exit(int(link.recv(16) or b"1"))
'''

REFUSAL = '''\
#!{python} -IS
"""{name}, which no site has approved: refused in a way that Flower can tell the server of, where there is one."""
import os, sys

if {name!r} == "flwr-agentapp":
    command = "from fedcmr.client.deployment.clientapp import refuse_agent; refuse_agent()"
    os.execv({python!r}, [{python!r}, "-P", "-c", command, *sys.argv[1:]])
sys.exit("{name}: refused: this site runs a ClientApp that it has approved, and nothing else")
'''


def write_refusals(folder: Path, name: str) -> None:
    """Write, in place of every command by which Flower starts an app, one that refuses.

    The server says what kind of app a run is, and Flower 1.42 has six kinds, each with a command. A SuperNode starts
    an agent at the server's word.

    Args:
        folder: In front of the PATH.
        name: Of the one command that `write_shim` writes.
    """
    for command in distribution("flwr").entry_points.select(group="console_scripts"):
        if command.name.startswith(APP_COMMANDS) and command.name != name:
            path = folder / command.name
            path.write_text(REFUSAL.format(python=sys.executable, name=command.name), encoding="utf-8")
            path.chmod(0o700)


def write_shim(path: Path, address: Path) -> None:
    """Write the command that hands over to the process at `address`, a Unix socket."""
    path.write_text(SHIM.format(python=sys.executable, socket=str(address)), encoding="utf-8")
    path.chmod(0o700)


def main() -> None:
    """Load the libraries, then fork for whoever connects to the socket that the command line names."""
    address = Path(sys.argv[1])
    for name in LIBRARIES:
        importlib.import_module(name)
    address.unlink(missing_ok=True)
    signal.signal(signal.SIGCHLD, _reap)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        while True:
            link, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                _answer(link)
            link.close()


def _answer(link: socket.socket) -> None:
    """In the child: run the command with the caller's arguments and outputs, tell its exit code, and end."""
    code = 1
    try:
        content, descriptors, _, _ = socket.recv_fds(link, MAX_MESSAGE, 2)
        for number, descriptor in enumerate(descriptors, start=1):
            os.dup2(descriptor, number)
        sys.argv = ["flwr-clientapp", *json.loads(content)]
        from fedcmr.client.deployment.clientapp import main as clientapp

        clientapp()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        link.send(str(code).encode())
        os._exit(code)


def _reap(_signal: int, _frame: FrameType | None) -> None:
    """Let ended children go."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
