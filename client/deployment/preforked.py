"""The pre-forked worker: a process that has the libraries loaded and forks for every message.

Flower starts `flwr-clientapp` anew for every message, and its imports are most of a short round. The command of that
name (`fedcmr.client.deployment.commands`) hands its arguments to this process, where a child takes them. Only libraries
are loaded beforehand: the child reads the policy, checks the bundle and imports its code as a process of its own would.
Without this process the command is one. Nothing here reaches into Flower.
"""

import importlib
import json
import os
import signal
import socket
import sys
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
