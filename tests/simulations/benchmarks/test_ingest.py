"""The benchmark of reading reads what it says it reads."""

import json

import pydicom
import pytest

from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.simulations.benchmarks import ingest
from fedcmr.simulations.benchmarks.ingest_reading import (
    compress,
    files_per_second,
    peak_memory,
    read_as_prepare,
    read_bare,
    write_studies,
)
from fedcmr.simulations.benchmarks.ingest_seeds import NUM_PHASES, NUM_SLICES, write_seeds


def test_written_studies_are_different_patients_and_all_usable(tmp_path):
    write_studies(tmp_path / "scans", 100)
    found = find_dicom(tmp_path / "scans")
    assert (len(found.studies), found.refused, found.left_out) == (5, {}, {})
    assert len({study.patient for study in found.studies}) == len({study.study for study in found.studies}) == 5


def test_both_loops_read_every_file_and_the_share_is_their_quotient(tmp_path):
    write_studies(tmp_path / "scans", 48)
    figures = files_per_second(tmp_path / "scans", num_processes=1, repeats=1)
    assert figures["num_files"] == 48
    assert figures["share"] == pytest.approx(figures["prepare"] / figures["bare"])
    assert read_bare([str(path) for path in (tmp_path / "scans").rglob("*.dcm")]) == 48
    with Workers(1) as workers:
        assert read_as_prepare(tmp_path / "scans", workers) == 48


def test_compressed_copies_hold_the_same_pixels(tmp_path):
    write_seeds(tmp_path / "seeds")
    compress(tmp_path / "seeds" / "study", tmp_path / "packed", pydicom.uid.RLELossless)
    for path in (tmp_path / "packed").iterdir():
        one, other = pydicom.dcmread(path), pydicom.dcmread(tmp_path / "seeds" / "study" / path.name)
        assert one.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless
        assert one.SOPInstanceUID == other.SOPInstanceUID
        assert (one.pixel_array == other.pixel_array).all()


@pytest.mark.slow
def test_memory_is_that_of_a_run_that_made_every_case(tmp_path):
    write_studies(tmp_path / "scans", 3 * NUM_SLICES * NUM_PHASES)
    figures = peak_memory(tmp_path / "scans", tmp_path / "cases", 1)
    assert (figures["num_files"], figures["num_cases"]) == (3 * NUM_SLICES * NUM_PHASES, 3)
    assert 40 < figures["peak_mib"] < 2000


def test_the_fuzz_command_prints_and_keeps_its_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        ["ingest", "fuzz", "--num", "30", "--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")],
    )
    assert ingest.main() == 0
    assert sum(json.loads((tmp_path / "figures.json").read_text())["fuzz"].values()) == 30
    assert "30" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]
