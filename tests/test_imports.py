"""Imports point one way: shared <- client, shared <- server, all <- simulations; flwr in five kinds of file only."""

import ast
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


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_roots(path: Path) -> set[str]:
    """First names of everything a file imports; a relative import counts as its own package."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: imports are absolute, from the root"
            roots.add((node.module or "").split(".")[0])
    return roots


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    package = path.relative_to(ROOT).parts[0]
    assert (imported_roots(path) & set(PACKAGES)) <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_flower_stays_at_the_edge(path: Path):
    if path.name not in FLOWER_FILES:
        assert "flwr" not in imported_roots(path)


@pytest.mark.parametrize("package", sorted({path.parent for path in sources()}), ids=lambda p: str(p.relative_to(ROOT)))
def test_package_inits_import_nothing(package: Path):
    init = package / "__init__.py"
    assert init.is_file()
    body = ast.parse(init.read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{init} holds more than its docstring"


def test_the_simulated_hospitals_share_no_code_with_the_prior():
    """No hospital may be the public prior in disguise."""
    for name in ("phantom", "torso", "scanner", "hospital"):
        tree = ast.parse((ROOT / "simulations" / f"{name}.py").read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not modules & {"server.rendering", "server.pretraining", "shared.anatomy", "shared.networks.generator"}


def test_flower_leaves_no_source_out_of_its_bundle():
    """It takes test_*.py for tests, also inside a package that `fab-include` names: sites would refuse the rest."""
    left_out = [path for path in sources() if path.name.startswith("test_") or path.name.endswith("_test.py")]
    assert left_out == []
