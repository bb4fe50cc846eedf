"""The commands by which Flower starts apps, as a site has them: one checks a bundle before it runs, all others refuse.

Flower starts an app by the name of its command, on the PATH, for every message anew. The folder with these commands
is in front of the PATH of everything that `fedcmr-client join` starts.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

CLIENTAPP = "flwr-clientapp"
APP_COMMANDS = "flwr-"
"""How the commands that run an app are called; the services are flower-*."""

CHECKED = '''\
#!{python} -IS
"""{name}: Flower's own command, with the bundle checked before it is unpacked, in the pre-forked worker or here."""
import json, os, socket, sys

try:
    link = socket.socket(socket.AF_UNIX)
    link.connect({address!r})
except OSError:
    os.execv({python!r}, [{python!r}, "-P", "-m", "fedcmr.client.deployment.clientapp", *sys.argv[1:]])
socket.send_fds(link, [json.dumps(sys.argv[1:]).encode()], [1, 2])
sys.exit(int(link.recv(16) or b"1"))
'''

REFUSED = '''\
#!{python} -IS
"""{name}, which no site has approved: refused in a way that Flower can tell the server of, where there is one."""
import os, sys

if {name!r} == "flwr-agentapp":
    command = "from fedcmr.client.deployment.clientapp import refuse_agent; refuse_agent()"
    os.execv({python!r}, [{python!r}, "-P", "-c", command, *sys.argv[1:]])
sys.exit("{name}: refused: this site runs a ClientApp that it has approved, and nothing else")
'''


def write_commands(folder: Path, worker: Path) -> None:
    """Write a command in place of every one by which Flower starts an app.

    The server says what kind of app a run is, and Flower 1.42 has six kinds, each with a command. A SuperNode starts
    an agent at the server's word.

    Args:
        folder: In front of the PATH.
        worker: The Unix socket of the pre-forked worker; where nobody listens, the command runs by itself.
    """
    names = {command.name for command in distribution("flwr").entry_points.select(group="console_scripts")}
    for name in {name for name in names if name.startswith(APP_COMMANDS)} | {CLIENTAPP}:
        path = folder / name
        text = CHECKED if name == CLIENTAPP else REFUSED
        path.write_text(text.format(python=sys.executable, name=name, address=str(worker)), encoding="utf-8")
        path.chmod(0o700)
