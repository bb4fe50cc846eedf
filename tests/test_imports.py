"""Imports point one way: shared <- client, shared <- server, all <- simulations; flwr in five kinds of file only."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shared", "client", "server", "simulations")
MAY_IMPORT = {
    "shared": {"shared"},
    "client": {"shared", "client"},
    "server": {"shared", "server"},
    "simulations": set(PACKAGES),
}
FLOWER_FILES = {"clientapp.py", "app.py", "strategy.py", "records.py", "grid.py"}
SERVER_FLOORS = (
    ("settings", "formatting", "front_matter", "command_line"),
    ("run_folder",),
    ("training", "evaluation"),
    ("generation", "federation"),
    ("dataset",),
    ("tasks",),
    ("experiments",),
    ("report", "rehearsal"),
    ("study", "deployment"),
    ("app", "delivery"),
    ("cli",),
)
"""What lies in `server/`, from the ground up: nothing imports from its own floor or a higher one."""


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@cache
def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, and of what it imports from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: imports are absolute, from the import name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module(path: Path) -> str:
    return ".".join(("fedcmr", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    names = [name.split(".") for name in imported(path)]
    assert not {first for first, *_ in names} & set(PACKAGES), "the one import name is fedcmr"
    own = {name[1] for name in names if name[0] == "fedcmr"}
    assert own <= MAY_IMPORT[path.relative_to(ROOT).parts[0]]


def test_no_import_goes_in_a_circle():
    modules = {module(path): path for path in sources()}
    uses = {
        name: {
            other
            for other in modules
            if other in imported(path) or any(found.rpartition(".")[0] == other for found in imported(path))
        }
        for name, path in modules.items()
    }
    left = dict(uses)
    while free := [name for name, others in left.items() if not others & left.keys() - {name}]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_every_arrow_in_the_server_points_down():
    floor = {name: number for number, names in enumerate(SERVER_FLOORS) for name in names}
    assert {path.stem for path in (ROOT / "server").iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__init__",
        "__pycache__",
    } == floor.keys(), "a new folder gets a floor"
    for path in (ROOT / "server").rglob("*.py"):
        own = path.relative_to(ROOT / "server").with_suffix("").parts[0]
        for other in {name.split(".")[2] for name in imported(path) if name.startswith("fedcmr.server.")} - {own}:
            assert floor[other] < floor[own], f"{path.relative_to(ROOT)} imports upward from {other}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_flower_stays_at_the_edge(path: Path):
    if path.name not in FLOWER_FILES:
        assert "flwr" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("package", sorted({path.parent for path in sources()}), ids=lambda p: str(p.relative_to(ROOT)))
def test_package_inits_import_nothing(package: Path):
    init = package / "__init__.py"
    assert init.is_file()
    body = ast.parse(init.read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{init} holds more than its docstring"


def test_the_simulated_hospitals_share_no_code_with_the_prior():
    """No hospital may be the public prior in disguise."""
    paths = [*(ROOT / "simulations" / "patients").glob("*.py"), *(ROOT / "simulations" / "scanners").glob("*.py")]
    for path in [*paths, ROOT / "simulations" / "hospital.py"]:
        assert not any(name.startswith(("fedcmr.server", "fedcmr.shared.models")) for name in imported(path)), path


def test_flower_leaves_no_source_out_of_its_bundle():
    """It takes test_*.py for tests, also inside a package that `fab-include` names: sites would refuse the rest."""
    left_out = [path for path in sources() if path.name.startswith("test_") or path.name.endswith("_test.py")]
    assert left_out == []
