"""The recipe benchmark: rows differ in one part, networks are kept, and figures are those of the definition."""

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from fedcmr.server.settings import AugmentationConfig, load
from fedcmr.shared.case import load_cases
from fedcmr.simulations.benchmarks.recipe import FULL, compare, main, recipes

pytestmark = pytest.mark.slow


def test_every_row_leaves_one_part_out():
    rows = recipes(load("default", []).regression)
    whole = rows.pop(FULL)
    parts = []
    for row in rows.values():
        settings = asdict(row.config) | {"seed": row.seed}
        changed = [
            key for key, value in (asdict(whole.config) | {"seed": whole.seed}).items() if settings[key] != value
        ]
        assert len(changed) == 1
        off = {f.name for f in fields(AugmentationConfig) if not getattr(row.config.augmentation, f.name)}
        parts.append(off)
        kept = {f.name: getattr(whole.config.augmentation, f.name) for f in fields(AugmentationConfig) if f.name in off}
        assert replace(row.config.augmentation, **kept) == whole.config.augmentation
    assert set.union(*parts) == {f.name for f in fields(AugmentationConfig)}, "every augmentation is left out by a row"


def test_figures_are_those_of_the_definition(tmp_path, write_cases):
    write_cases(tmp_path, "GE", 5, 0)
    cases = load_cases(tmp_path)
    true = np.array([case.info.ef for case in cases])
    found = compare(cases, {FULL: list(true + 0.05), "seed 1": list(true - 0.02)}, load("default", []))
    assert found[FULL]["score"]["mae_points"] == pytest.approx(5)
    assert found["seed 1"]["score"]["bias_points"] == pytest.approx(-2)
    assert found["seed 1"]["minus_full"]["difference_points"] == pytest.approx(-3)


def test_the_command_keeps_its_networks(tmp_path, write_cases, monkeypatch, capsys):
    for name, seed in (("synthetic", 1), ("dev", 2)):
        write_cases(tmp_path / name, "GE", 4, seed)
    arguments = [
        "recipe",
        "--synthetic",
        str(tmp_path / "synthetic"),
        "--test",
        str(tmp_path / "dev"),
        "--out",
        str(tmp_path / "out"),
        "--rows",
        "seed 1;no rotations at test time",
        "--json",
        str(tmp_path / "r.json"),
        "--set",
        "regression.num_steps=1",
        "regression.batch_size=2",
        "device=cpu",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    networks = sorted((tmp_path / "out").iterdir())
    assert len(networks) == 2, "the row without rotations asks the full recipe's network"
    written = [path.stat().st_mtime_ns for path in networks]
    figures = json.loads((tmp_path / "r.json").read_text())["dev"]
    assert list(figures) == [FULL, "seed 1", "no rotations at test time"]
    assert main() == 0
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").iterdir())] == written
    monkeypatch.setattr("sys.argv", [*arguments, "--rows", "more luck"])
    assert main() == 2
    assert "--rows names 'more luck'" in capsys.readouterr().err
