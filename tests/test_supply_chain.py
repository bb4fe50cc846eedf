"""What is installed is locked and can be listed; no file holds a secret; known vulnerabilities end the tests."""

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from detect_secrets import SecretsCollection
from detect_secrets.settings import default_settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYTHONS = ("3.11", "3.12", "3.13")


def locked() -> list[Requirement]:
    """The lock's packages; one may stand there twice, for different versions of Python."""
    lines = [line.removesuffix("\\") for line in LOCK.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    return [Requirement(line) for line in lines]


def locked_version(name: str, python: str) -> str | None:
    """The version that a machine with Linux and this Python gets."""
    environment = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux"}
    found = [
        str(one.specifier).removeprefix("==")
        for one in locked()
        if canonicalize_name(one.name) == canonicalize_name(name)
        and (one.marker is None or one.marker.evaluate(environment))
    ]
    assert len(found) <= 1, f"{name} is locked twice for Python {python}"
    return found[0] if found else None


def wanted() -> list[Requirement]:
    """Dependencies of the project, of its tests and of its build."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["dev"] + settings["build-system"]["requires"]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_every_dependency_is_locked_inside_its_range(requirement):
    if requirement.name == "torch":
        torch = re.search(r"^TORCH := torch==(\S+)$", MAKEFILE, re.MULTILINE)
        assert torch is not None and torch[1] in requirement.specifier
        assert locked_version("torch", "3.11") is None, "the builds of one version differ from index to index"
        return
    for python in PYTHONS:
        found = locked_version(requirement.name, python)
        assert found is not None, f"{requirement} is not locked for Python {python}: run 'make lock'"
        assert requirement.specifier.contains(found, prereleases=True), f"{requirement} got {found}: run 'make lock'"


def test_every_locked_package_has_hashes_and_comes_from_any_index():
    blocks = re.split(r"\n(?=[A-Za-z0-9])", LOCK)[1:]
    assert len(blocks) == len(locked()) > 100
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    assert not re.search(r"://|--(index|extra-index|find-links|trusted-host)| @ |^/|\s/", LOCK), "a host or a path"


def test_the_makefile_installs_nothing_but_the_lock():
    recipe = MAKEFILE.split("\n.venv/.installed:")[1].split("\n\n")[0]
    installs = [line for line in recipe.splitlines() if "pip install" in line]
    assert 'install --quiet "$(TORCH)"' in installs[0]
    assert "--require-hashes --no-deps --requirement requirements.lock" in installs[1]
    assert "--no-deps --no-build-isolation" in installs[2] and len(installs) == 3


@pytest.mark.slow
def test_the_bill_of_materials_is_valid_and_names_what_counts(tmp_path):
    """By the command of `make sbom`, which ends with an error where CycloneDX's own schema is not met."""
    recipe = MAKEFILE.split("\nsbom: venv\n")[1].split("\n\n")[0].replace("\\\n", " ")
    command = recipe.splitlines()[0].split()
    assert command[0] == "$(BIN)/cyclonedx-py" and command[-1] == ".venv" and "--no-validate" not in command
    command[0], command[-1] = str(Path(sys.executable).parent / "cyclonedx-py"), sys.prefix
    command[command.index("--output-file") + 1] = str(tmp_path / "sbom.json")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    bill = json.loads((tmp_path / "sbom.json").read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "fedcmr"
    components = {component["name"]: component["version"] for component in bill["components"]}
    for name in ("flwr", "torch", "opacus"):
        assert components[name] == version(name)


def tracked() -> list[str]:
    """The files that git knows; without git every file outside what is ignored."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return listed.stdout.splitlines()
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and "/." not in str(path)]


NO_TEXT = re.compile(
    r"requirements\.lock|docs/notebook\.ipynb|tests/client/ledgers_of_0_1/.*|tests/test_recorded_weights\.py"
)
"""Hashes, and images as base64, which resemble secrets."""


def secrets_in(folder: Path, names: list[str]) -> list[str]:
    """What looks like a secret, as "file:line type"."""
    secrets = SecretsCollection(root=str(folder))
    with default_settings():
        for name in names:
            secrets.scan_file(name)
    return [f"{path}:{secret.line_number} {secret.type}" for path, secret in secrets]


@pytest.mark.slow
def test_no_file_holds_a_secret():
    names = [name for name in tracked() if (ROOT / name).is_file() and not NO_TEXT.fullmatch(name)]
    assert len(names) > 300
    assert secrets_in(ROOT, names) == []


def test_a_secret_would_be_found(tmp_path):
    marker = "-----BEGIN " + "PRIVATE KEY-----\n"
    (tmp_path / "a.py").write_text(f'KEY = """{marker}"""\n', encoding="utf-8")
    assert secrets_in(tmp_path, ["a.py"]) == ["a.py:1 Private Key"]


@pytest.fixture
def vulnerabilities() -> Iterator[tuple[str, dict[str, list[str]]]]:
    """A service of known vulnerabilities on this machine, by OSV's protocol: its URL, and package -> identifiers."""
    known: dict[str, list[str]] = {}

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name, asked = query["package"]["name"], query["version"]
            ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999"}]}]
            affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": ranges, "versions": [asked]}]
            found = [
                {
                    "id": one,
                    "modified": "2026-01-01T00:00:00Z",
                    "published": "2026-01-01T00:00:00Z",
                    "affected": affected,
                }
                for one in known.get(name, [])
            ]
            body = json.dumps({"vulns": found} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", known
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def step(url: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ".ci/vulnerabilities.py", "-s", "osv", "--osv-url", url]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_known_vulnerability_ends_the_tests(vulnerabilities):
    url, known = vulnerabilities
    known |= {"requests": ["PYSEC-2018-28"]}
    done = step(url)
    assert done.returncode == 1, "the locked requests is said to be vulnerable too"
    assert "requests" in done.stdout and "PYSEC-2018-28, fixed in 999" in done.stdout


def test_unreachable_vulnerability_data_is_told_and_ends_nothing():
    done = step("http://127.0.0.1:9")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1 and "not checked" in done.stdout
