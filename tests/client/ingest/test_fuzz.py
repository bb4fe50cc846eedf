"""A thousand damaged files of all layouts: each ends as a case, with a code, or with one line."""

import random
from collections import Counter

import pytest

from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.reasons import REASONS, Unusable
from fedcmr.shared.errors import UserError
from fedcmr.simulations.benchmarks import ingest_fuzz
from fedcmr.simulations.benchmarks.ingest_damage import damage, is_text
from fedcmr.simulations.benchmarks.ingest_folders import forms
from fedcmr.simulations.benchmarks.ingest_fuzz import (
    CASE,
    FAILED_NAME,
    FAILURES,
    ONE_LINE,
    WHOLE_EVERY,
    Job,
    fuzz,
    outcome,
    write_forms,
)
from tests.client.ingest.dicom_files import compress


@pytest.fixture(scope="module")
def kinds():
    return forms()


@pytest.fixture(scope="module")
def good(tmp_path_factory, kinds):
    folder = tmp_path_factory.mktemp("fuzz") / "forms"
    write_forms(folder, kinds)
    return folder


def index_of(kinds, layout, name) -> int:
    return next(index for index, form in enumerate(kinds) if (form.layout, form.name) == (layout, name))


def job(good, kinds, layout, name, content, number=1) -> Job:
    return Job(str(good), index_of(kinds, layout, name), number, content=content)


@pytest.mark.slow
def test_a_thousand_damaged_files_end_as_cases_or_codes_or_one_line(tmp_path, kinds):
    counts = fuzz(tmp_path, 1000, seed=1)
    outcomes: Counter[str] = Counter()
    for (_, _, code), number in counts.items():
        outcomes[code] += number
    assert sum(outcomes.values()) == 1000
    assert not set(outcomes) & FAILURES, f"kept in {tmp_path / FAILED_NAME}: {outcomes}"
    assert set(outcomes) <= set(REASONS) | {CASE, ONE_LINE}
    # Damage of every depth, or the test says little: many still become a case, and the others end in many ways.
    assert 100 < outcomes[CASE] < 700
    assert outcomes[ONE_LINE] > 20
    assert len(outcomes) > 15
    assert {(layout, name) for layout, name, _ in counts} == {(form.layout, form.name) for form in kinds}


def test_every_layout_has_a_form_for_each_kind_of_file_that_it_reads(kinds):
    assert {form.layout for form in kinds} == set(LAYOUTS)
    with_table = {form.layout for form in kinds if is_text(form.files[form.damaged])}
    assert with_table == set(LAYOUTS)
    for layout in set(LAYOUTS) - {"sunnybrook"}:  # whose masks are lists of points
        suffixes = {form.damaged.rpartition(".")[2] for form in kinds if form.layout == layout}
        assert "gz" in suffixes, layout


@pytest.mark.slow
@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1"])
def test_damaged_lossless_jpeg_ends_as_an_image_or_a_code(tmp_path, good, kinds, syntax):
    """What only GDCM writes; in this process, so that a decoder that dies is seen."""
    form = kinds[index_of(kinds, "dicom", "explicit")]
    (tmp_path / "plain.dcm").write_bytes(form.files[form.damaged])
    compress(tmp_path / "plain.dcm", tmp_path / "good.dcm", syntax)
    content = (tmp_path / "good.dcm").read_bytes()
    assert outcome(job(good, kinds, "dicom", "explicit", content)) == CASE
    for number in range(40):
        changed = damage(content, [content], random.Random(number))
        try:
            assert outcome(job(good, kinds, "dicom", "explicit", changed)) == CASE
        except Unusable as unusable:
            assert unusable.code in REASONS


@pytest.mark.slow
def test_undamaged_every_form_is_a_case(good, kinds):
    for number in (1, WHOLE_EVERY):
        for form in kinds:
            assert outcome(job(good, kinds, form.layout, form.name, form.files[form.damaged], number)) == CASE, form


def test_what_the_reader_must_hold_is_looked_at(good, kinds, monkeypatch):
    """A reader that fails in a way of its own, would end `prepare`, or quotes the patient is found."""
    form = kinds[index_of(kinds, "acdc", "frame.nii")]
    one = job(good, kinds, "acdc", "frame.nii", form.files[form.damaged])

    def raising(error):
        def make_case(*_, **__):
            raise error

        monkeypatch.setattr(ingest_fuzz, "make_case", make_case)

    for error, found in (
        (ZeroDivisionError(), ZeroDivisionError),
        (OSError(5, "Input/output error"), AssertionError),
        (UserError("a table is damaged"), AssertionError),
        (UserError(f"{good.parent} holds patient7391846"), AssertionError),
    ):
        raising(error)
        with pytest.raises(found):
            outcome(one)


def test_a_seed_decides_every_byte(kinds):
    assert kinds == forms()
    others = [form.files[form.damaged] for form in kinds]
    for content in others:
        twice = [damage(content, others, random.Random("7/3")) for _ in range(2)]
        assert twice[0] == twice[1]
        changed = sum(damage(content, others, random.Random(number)) != content for number in range(20))
        assert changed >= 10


def test_masks_with_an_empty_axis_are_no_stack(good, kinds):
    """Found by the benchmark's longer run."""
    form = kinds[index_of(kinds, "dicom", "masks.nii")]
    content = bytearray(form.files[form.damaged])
    content[44:46] = bytes(2)  # the second of the axes' lengths
    with pytest.raises(Unusable, match="not-a-stack"):
        outcome(job(good, kinds, "dicom", "masks.nii", bytes(content)))
