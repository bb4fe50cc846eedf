"""A thousand damaged files: each ends as a case of the declared shape and finite values, or with a code."""

import random
from collections import Counter

import numpy as np
import pytest

from fedcmr.client.ingest.reasons import REASONS, Unusable
from fedcmr.simulations.benchmarks import ingest_fuzz
from fedcmr.simulations.benchmarks.ingest_fuzz import CASE, FAILURES, Job, damage, fuzz, outcome
from fedcmr.simulations.benchmarks.ingest_seeds import write_seeds
from tests.client.ingest.dicom_files import compress


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return write_seeds(tmp_path_factory.mktemp("seeds"))


def job(seeds, path) -> Job:
    return Job(str(path), str(seeds.study), path.name.startswith("masks"))


@pytest.mark.slow
def test_a_thousand_damaged_files_end_as_cases_or_codes(tmp_path, seeds):
    counts = fuzz(tmp_path, 1000, seed=1)
    outcomes: Counter[str] = Counter()
    for (_, code), number in counts.items():
        outcomes[code] += number
    assert sum(outcomes.values()) == 1000
    assert not set(outcomes) & FAILURES, f"kept in {tmp_path}: {outcomes}"
    assert set(outcomes) <= set(REASONS) | {CASE}
    # Damage of every depth, or the test says little: many still become a case, and the others end in many ways.
    assert 50 < outcomes[CASE] < 700
    assert len(outcomes) > 15
    assert {form for form, _ in counts} == set(seeds.all())


@pytest.mark.slow
@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1"])
def test_damaged_lossless_jpeg_ends_as_an_image_or_a_code(tmp_path, seeds, syntax):
    """What only GDCM writes; in this process, so that a decoder that dies is seen."""
    compress(seeds.study / "1-2.dcm", tmp_path / "good.dcm", syntax)
    good = (tmp_path / "good.dcm").read_bytes()
    assert outcome(job(seeds, tmp_path / "good.dcm")) == CASE
    for number in range(40):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(damage(good, [good], random.Random(number)))
        try:
            assert outcome(job(seeds, path)) == CASE
        except Unusable as unusable:
            assert unusable.code in REASONS


@pytest.mark.slow
def test_undamaged_every_seed_is_a_case(tmp_path, seeds):
    for name, content in seeds.all().items():
        path = tmp_path / name.replace(" ", "-")
        path.write_bytes(content)
        assert outcome(job(seeds, path)) == CASE, name


def test_what_the_reader_must_hold_is_looked_at(tmp_path, seeds, monkeypatch):
    """A reader that lets NaN through, or fails in a way of its own, is found."""
    path = tmp_path / "one.dcm"
    path.write_bytes(seeds.classic["explicit"])
    good = ingest_fuzz.read_stack

    def with_nan(*arguments):
        cine = good(*arguments)
        cine.images[0, 0, 3, 3] = np.nan
        return cine

    monkeypatch.setattr(ingest_fuzz, "read_stack", with_nan)
    with pytest.raises(AssertionError):
        outcome(job(seeds, path))
    monkeypatch.setattr(ingest_fuzz, "read_stack", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outcome(job(seeds, path))


def test_a_seed_decides_every_byte(seeds):
    others = list(seeds.all().values())
    twice = [damage(seeds.classic["rle"], others, random.Random("7/3")) for _ in range(2)]
    assert twice[0] == twice[1] != seeds.classic["rle"]
    changed = sum(damage(others[0], others, random.Random(number)) != others[0] for number in range(200))
    assert changed > 180


def test_masks_with_an_empty_axis_are_no_stack(tmp_path, seeds):
    """Found by the benchmark's longer run."""
    content = bytearray(seeds.masks["masks.nii"])
    content[44:46] = bytes(2)  # the second of the axes' lengths
    (tmp_path / "masks.nii").write_bytes(content)
    with pytest.raises(Unusable, match="not-a-stack"):
        outcome(job(seeds, tmp_path / "masks.nii"))
