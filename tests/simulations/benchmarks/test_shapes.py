"""The benchmark of released shapes: what it compares, and that a release brings drawn hearts nearer to the patients."""

import sys

import numpy as np
import pytest

from fedcmr.server.generation import population
from fedcmr.shared.shape import GEOMETRY_NAMES
from fedcmr.simulations.benchmarks import shapes
from fedcmr.simulations.benchmarks.shapes import PATIENTS, USUAL, compare, distances, main


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    monkeypatch.setattr(population, "POOL_SIZE", 150)
    monkeypatch.setattr(population, "REFINED_SIZE", 100)
    monkeypatch.setattr(population, "_pools", {})
    monkeypatch.setattr(population, "_populations", {})
    monkeypatch.setattr(shapes, "NUM_HEARTS", 40)


def test_distances_are_means_over_what_both_know():
    drawn = np.zeros((50, len(GEOMETRY_NAMES)))
    patients = np.full((20, len(GEOMETRY_NAMES)), 2.0)
    patients[:, 3:] = np.nan
    found = distances(drawn, patients)
    assert set(found) == {*GEOMETRY_NAMES[:3], "mean"} and found["mean"] == pytest.approx(2.0)


@pytest.mark.slow
def test_a_release_without_noise_brings_hearts_nearer(write_cases, tmp_path):
    for part, seed in (("train", 1), ("test", 2)):
        write_cases(tmp_path / part, "GE", 12, seed=seed)
    rows = compare([("GE", tmp_path / "train", tmp_path / "test")], [float("inf")])["GE"]
    assert list(rows) == [USUAL, "released without noise", PATIENTS]
    assert rows["released without noise"]["mean"] < 0.8 * rows[USUAL]["mean"]


def test_another_vendors_folder_is_refused(write_cases, tmp_path, monkeypatch, capsys):
    write_cases(tmp_path / "a", "GE", 3, seed=1)
    monkeypatch.setattr(sys, "argv", ["shapes", "--site", "Siemens", str(tmp_path / "a"), str(tmp_path / "a")])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds no case of Siemens" in error
