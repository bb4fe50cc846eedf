"""The committed code is what the .proto gives, and it runs with the libraries that are installed."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedcmr.shared.case import CaseInfo
from fedcmr.shared.delivery.contract import matches
from fedcmr.shared.delivery.delivery_pb2 import Selection

ROOT = Path(__file__).resolve().parents[3]
PROTO = Path("shared/delivery/delivery.proto")


def test_the_committed_code_is_what_the_proto_gives(tmp_path):
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    target = tmp_path / "fedcmr" / PROTO  # as the import name sees it
    target.parent.mkdir(parents=True)
    target.write_bytes((ROOT / PROTO).read_bytes())
    command = next(line for line in target.read_text().splitlines() if "-m grpc_tools.protoc" in line)
    arguments = command.lstrip("/ ").split()
    assert arguments.pop(0) == "python"
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    made = {path.name: path.read_text() for path in target.parent.iterdir()}
    assert set(made) == {"delivery.proto", "delivery_pb2.py", "delivery_pb2.pyi", "delivery_pb2_grpc.py"}
    for name, text in made.items():
        assert (ROOT / PROTO.parent / name).read_text() == text, f"{name}: run the command in {PROTO} and commit"


def test_the_code_is_no_newer_than_the_lowest_library_that_may_be_installed():
    """A library that is older than the code made for it refuses it."""
    lowest = {}
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        found = re.fullmatch(r"(grpcio|protobuf)>=([\d.]+),<\d+", line)
        if found:
            lowest[found[1]] = [int(part) for part in found[2].split(".")]
    messages = (ROOT / PROTO.parent / "delivery_pb2.py").read_text()
    stubs = (ROOT / PROTO.parent / "delivery_pb2_grpc.py").read_text()
    made_for = {
        "protobuf": re.search(r"Protobuf Python Version: ([\d.]+)", messages)[1],
        "grpcio": re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", stubs)[1],
    }
    for name, version in made_for.items():
        parts = [int(part) for part in version.split(".")]
        assert lowest[name] >= parts[: len(lowest[name])], name


def test_what_a_selection_matches():
    info = CaseInfo("p", "GE", 1.5, 0.4, "p")
    unknown = CaseInfo("q", "GE", 1.5, float("nan"), "q")
    assert matches(info, Selection()) and matches(unknown, Selection())
    assert matches(info, Selection(vendors=["GE", "Canon"])) and not matches(info, Selection(vendors=["Canon"]))
    assert matches(info, Selection(min_ef=0.4, max_ef=0.4)) and not matches(info, Selection(min_ef=0.41))
    assert matches(info, Selection(max_ef=0.4)) and not matches(info, Selection(max_ef=0.0))
    assert not matches(unknown, Selection(min_ef=0.0)) and not matches(unknown, Selection(max_ef=1.0))
