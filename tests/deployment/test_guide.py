"""docs/deployment.md against the code: its commands are understood, its tables hold every code."""

import re
import shlex
from pathlib import Path

import pytest

from fedcmr.client import cli as client_cli
from fedcmr.server import cli as server_cli
from fedcmr.server.deployment.gateway import Limits
from fedcmr.shared.records import CODES, OK

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
PARSERS = {"fedcmr-client": client_cli._parser, "fedcmr-server": server_cli._parser}
BLOCKS = "".join(re.findall(r"^```\n(.*?)^```$", GUIDE, re.M | re.S)).replace("\\\n", "")
COMMANDS = re.findall(r"^(fedcmr-(?:client|server) [a-z][^#\n]*)", BLOCKS, re.M)
INLINE = re.findall(r"`(fedcmr-(?:client|server) \w+)[^`]*`", GUIDE)


def understood(command: str) -> None:
    program, *arguments = shlex.split(command)
    PARSERS[program]().parse_args(arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guide_is_understood(command):
    understood(command)


@pytest.mark.parametrize("command", sorted(set(INLINE)))
def test_a_command_in_its_text_is_there(command):
    with pytest.raises(SystemExit) as end:
        understood(f"{command} --help")
    assert end.value.code == 0


def test_the_guide_has_the_commands_of_every_step():
    assert len(COMMANDS) >= 14 and len(INLINE) >= 8


def test_every_refusal_has_its_line_with_a_remedy():
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| [^|]+ \| ([^|]+) \|$", GUIDE, re.M))
    assert set(rows) == CODES - {OK}
    assert all(rows.values())


def test_every_reason_to_drop_an_answer_is_explained():
    federation = ROOT / "server" / "federation"
    source = (federation / "validation.py").read_text() + (federation / "strategy.py").read_text()
    reasons = set(re.findall(r'dropped="([a-z-]+)"', source))
    records = (ROOT / "shared" / "records.py").read_text()
    reasons |= set(re.findall(r'raise ValueError\("([a-z-]+)"\)', records))
    section = GUIDE[GUIDE.index("What the coordinator drops") :]
    assert reasons and all(f"`{reason}`" in section for reason in reasons), reasons


def test_the_limit_it_names_is_the_gateways():
    assert f"a request above {Limits().max_body_bytes // 2**20} MB" in GUIDE
