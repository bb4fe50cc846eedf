"""The wheel is one name and needs no checkout: installed anywhere, each command finds what it comes with."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OWN = ("client", "server", "shared", "simulations", "configs")
"""Folders that a user may have, too."""


def build(source: Path, out: Path) -> Path:
    """The wheel of a checkout or of an sdist, by pip, with what is installed here."""
    command = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, cwd=out.parent, check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("built") / "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of an installation: the wheel's, and before the others' on the path."""
    folder = tmp_path_factory.mktemp("installed") / "site-packages"
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture(params=["an empty folder", "a folder with a shared/ of its own"])
def place(request, tmp_path) -> Path:
    if request.param != "an empty folder":
        for name in OWN:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise SystemExit('not the right package')")
            (tmp_path / name / "default.yaml").write_text("not: the settings\n")
    return tmp_path


def run(*command: str | Path, path: Path, place: Path) -> str:
    """What a command prints in some folder, with an installation in front of the test's own."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_one_package_and_its_description(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {"fedcmr", f"fedcmr-{PROJECT['version']}.dist-info"}
    assert len(set(names)) == len(names) and not [name for name in names if "__pycache__" in name]
    expected = {
        path.relative_to(ROOT).as_posix()
        for name in OWN
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name.removeprefix("fedcmr/") for name in names if name.startswith("fedcmr/")}
    assert packed == expected | {"__init__.py", "py.typed"}


def test_the_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "docs/deployment.md", "docs/privacy.md", "tests/test_wheel.py"} <= names
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(build(source, tmp_path / "wheel")) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
        assert all(first.read(name) == second.read(name) for name in first.namelist())


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_a_command_answers_wherever_it_is_called(command, installed, place):
    assert f"usage: {command}" in run(installed / "bin" / command, "--help", path=installed, place=place)
    version = run(installed / "bin" / command, "--version", path=installed, place=place)
    assert version == f"{command} {PROJECT['version']}\n"


def test_a_command_is_also_a_module(installed, place):
    for module in sorted(script.partition(":")[0] for script in PROJECT["scripts"].values()):
        assert "usage: fedcmr-" in run(sys.executable, "-m", module, "--help", path=installed, place=place)


FINDS = """
import sys
from pathlib import Path
from fedcmr.client.check import html_report
from fedcmr.client.deployment.install import TEMPLATES as AT_SITES
from fedcmr.server.deployment.gateway import TEMPLATES as AT_THE_COORDINATOR
from fedcmr.server.report.build import resource
from fedcmr.server.settings import load
from fedcmr.shared.models.prior import SHIPPED_PRIOR, load_prior
from fedcmr.shared.tasks.segmentation.segmenter import SHIPPED_SEGMENTER

assert load("smoke").hospitals.num_train == 6
assert len(load_prior(None).sha256) == 64
found = [SHIPPED_PRIOR, SHIPPED_SEGMENTER, resource("server/report/template.html"), resource(html_report.TEMPLATE)]
found += [AT_SITES / "Dockerfile.j2", AT_THE_COORDINATOR / "nginx.conf.j2"]
assert all(path.is_file() for path in found), found
code = [Path(m.__file__) for name, m in sys.modules.items() if name.split(".")[0] == "fedcmr"]
for path in [*code, *found]:
    print(path)
"""


def test_weights_templates_and_settings_are_found(installed, place):
    paths = run(sys.executable, "-c", FINDS, path=installed, place=place).split("\n")[:-1]
    assert len(paths) > 30 and all(Path(path).is_relative_to(installed / "fedcmr") for path in paths), paths


def test_flowers_bundle_in_front_of_the_wheel_wins_for_its_code(installed, tmp_path):
    """What is no code, and so not in the bundle, is found in the wheel."""
    bundle = tmp_path / "bundle"
    for name in ("client", "server", "shared", "fedcmr"):
        for path in (ROOT / name).rglob("*.py"):
            if "simulations" not in path.parts and not path.parent.is_symlink():
                target = bundle / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(bundle)!r})\n"
        "from fedcmr.shared.models.prior import SHIPPED_PRIOR, load_prior\n"
        "import fedcmr.client.app\n"
        "assert load_prior(None).sha256\n"
        "print(*{m.__file__ for name, m in sys.modules.items() if name.split('.')[0] == 'fedcmr'}, sep='\\n')\n"
        "print(SHIPPED_PRIOR)"
    )
    *modules, prior = run(sys.executable, "-c", code, path=installed, place=tmp_path).split("\n")[:-1]
    assert len(modules) > 20 and all(Path(module).is_relative_to(bundle) for module in modules), modules
    assert Path(prior).is_relative_to(installed)
