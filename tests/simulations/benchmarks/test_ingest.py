"""The benchmark of reading reads what it says it reads."""

import json

import pydicom
import pytest

from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.simulations.benchmarks import ingest
from fedcmr.simulations.benchmarks.ingest_reading import (
    compress,
    convert,
    images_per_second,
    peak_memory,
    read_as_prepare,
    read_bare,
    write_studies,
)
from fedcmr.simulations.benchmarks.ingest_seeds import NUM_PHASES, NUM_SLICES, write_seeds


def test_written_studies_are_different_patients_and_all_usable(tmp_path):
    write_studies(tmp_path / "scans", 100)
    found = find_dicom(tmp_path / "scans")
    num = -(-100 // (NUM_SLICES * NUM_PHASES))
    assert (len(found.studies), found.refused, found.left_out) == (num, {}, {})
    assert len({study.patient for study in found.studies}) == len({study.study for study in found.studies}) == num


@pytest.mark.parametrize("layout", ["dicom", "plain"])
def test_both_loops_read_every_image_and_the_share_is_their_quotient(tmp_path, layout):
    num = 2 * NUM_SLICES * NUM_PHASES
    source = tmp_path / "dicom"
    write_studies(source, num)
    if layout == "plain":
        source = tmp_path / "plain"
        convert(tmp_path / "dicom", source)
    figures = images_per_second(source, 1, 1, layout)
    assert (figures["num_images"], figures["num_files"]) == (num, num if layout == "dicom" else 2)
    assert figures["share"] == pytest.approx(figures["prepare"] / figures["bare"])
    assert read_bare([str(path) for path in source.rglob("*.*")]) == num
    with Workers(1) as workers:
        assert read_as_prepare(source, workers, layout) == num


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
    write_studies(tmp_path / "scans", 3 * NUM_SLICES * NUM_PHASES, masks=True)
    figures = peak_memory(tmp_path / "scans", tmp_path / "cases", 1)
    assert (figures["num_files"], figures["num_cases"]) == (3 * NUM_SLICES * NUM_PHASES, 3)
    assert 40 < figures["peak_mib"] < 2000


def test_the_fuzz_command_prints_and_keeps_its_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        ["ingest", "fuzz", "--num", "40", "--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")],
    )
    assert ingest.main() == 0
    assert sum(json.loads((tmp_path / "figures.json").read_text())["fuzz"].values()) == 40
    out = capsys.readouterr().out
    assert "met by all of 40" in out and all(layout in out for layout in LAYOUTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]
