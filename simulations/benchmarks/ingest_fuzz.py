"""Damaged files through the reader: each ends as a case or as a reason code."""

import random
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.dicom.grouping import group_studies
from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.dicom.reader import read_file, read_stack
from fedcmr.client.ingest.dicom.segmentation import Segmentation, choose
from fedcmr.client.ingest.normalise import normalise
from fedcmr.client.ingest.plausibility import check_masks
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.client.ingest.stack.short_axis import Stack, find_stack
from fedcmr.shared.case import CASE_SIZE, Case, CaseInfo
from fedcmr.shared.progress import track
from fedcmr.simulations.benchmarks.ingest_seeds import Seeds, write_seeds

CASE = "case"
FAILURES = frozenset({"unexpected-error", "parser-crashed", "too-slow"})
"""Codes with which the sandbox holds what the reader did not expect: there should be none."""
SECONDS = 20.0
"""For one file; all that are small end within a tenth."""
LENGTHS = (0, 1, 2, 7, 0xFF, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
NUMBERS = (b"nan", b"1e400", b"-1e308", b"0", b"-0", b"inf", b"\\\\", b"1_0", b"\xff\xfe", b"9" * 16)
PLACES = (b"DICM", b"\x08\x00", b"\x10\x00", b"\x18\x00", b"\x20\x00", b"\x28\x00", b"\xfe\xff\x00\xe0", b"\xe0\x7f")
"""Near them lie lengths, representations and values: groups, items, pixels."""


@dataclass(frozen=True)
class Job:
    """A damaged file, and the folder of the study that it belongs to."""

    path: str
    study: str
    is_mask: bool


def fuzz(folder: Path, num: int, seed: int, num_processes: int = 1) -> Counter[tuple[str, str]]:
    """Damage files and read them.

    Args:
        folder: An empty one for the files; those over which the reader fails stay there.
        num: Number of damaged files.
        seed: Decides every byte.
        num_processes: Child processes.

    Returns:
        Number of files by (form, outcome); an outcome is "case" or a reason code.
    """
    seeds = write_seeds(folder / "seeds")
    forms = sorted(seeds.all())
    counts: Counter[tuple[str, str]] = Counter()
    with Workers(num_processes, seconds=SECONDS) as workers:
        jobs = _jobs(folder, seeds, forms, num, seed)
        outcomes = workers.map(outcome, jobs, batch_size=8)
        for number, result in enumerate(track(outcomes, "reading damaged files", total=num)):
            code = result.code if isinstance(result, Unusable) else result
            counts[forms[number % len(forms)], code] += 1
            if code not in FAILURES:
                _path(folder, forms, number).unlink()
    return counts


def _path(folder: Path, forms: list[str], number: int) -> Path:
    """Path of a damaged file; NIfTI readers go by the name's end."""
    form = forms[number % len(forms)]
    return folder / f"{number}-{form.replace(' ', '-')}"


def _jobs(folder: Path, seeds: Seeds, forms: list[str], num: int, seed: int) -> Iterator[Job]:
    """Write the damaged files as they are requested."""
    originals = seeds.all()
    others = list(originals.values())
    for number in range(num):
        form = forms[number % len(forms)]
        path = _path(folder, forms, number)
        path.write_bytes(damage(originals[form], others, random.Random(f"{seed}/{number}")))
        yield Job(str(path), str(seeds.study), form.startswith("masks"))


def damage(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to four changes: flipped bytes, lengths, numbers, cuts, doubled, lost or foreign parts."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not changed:
            break
        rng.choice(CHANGES)(changed, others, rng)
    return bytes(changed)


def _place(content: bytearray, rng: random.Random) -> int:
    """Half of all places lie where the structure is, near something that begins an element; the others anywhere."""
    if rng.random() < 0.5:
        found = content.find(rng.choice(PLACES), rng.randrange(len(content)))
        if found >= 0:
            return min(found + rng.randrange(12), len(content) - 1)
    if rng.random() < 0.5:
        return rng.randrange(min(len(content), 2000))
    return rng.randrange(len(content))


def _flip(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    for _bit in range(rng.choice((1, 2, 16))):
        content[_place(content, rng)] ^= 1 << rng.randrange(8)


def _set_bytes(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    at = _place(content, rng)
    content[at : at + rng.choice((1, 2, 4))] = rng.randbytes(rng.choice((1, 2, 4)))


def _set_length(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    at, value = _place(content, rng), rng.choice(LENGTHS)
    wide = struct.pack(rng.choice("<>") + "I", value)
    content[at : at + 4] = wide if rng.random() < 0.5 else wide[:2]


def _set_number(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    at, number = _place(content, rng), rng.choice(NUMBERS)
    content[at : at + len(number)] = number


def _cut(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    del content[_place(content, rng) :]


def _lose(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    at = _place(content, rng)
    del content[at : at + rng.choice((1, 2, 8, 200))]


def _double(content: bytearray, _: list[bytes], rng: random.Random) -> None:
    at = _place(content, rng)
    part = content[at : at + rng.choice((2, 8, 200, 2000))]
    content[at:at] = part * rng.choice((1, 1, 40))


def _splice(content: bytearray, others: list[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    start = rng.randrange(len(other))
    at = _place(content, rng)
    content[at:] = other[start:]


CHANGES = (_flip, _flip, _flip, _set_bytes, _set_length, _set_number, _cut, _lose, _double, _splice)


def outcome(job: Job) -> str:
    """Read a damaged file in the place of its good one, as far as a case; runs in a child process.

    Raises:
        Unusable: It ends with a code.
    """
    pristine = _study(job.study)
    mask_file, chosen = None, None
    if job.is_mask:
        images, mask_file = pristine, Path(job.path)
    else:
        found = read_file(job.path)
        if isinstance(found, Segmentation):
            images, chosen = pristine, found
        elif len(found) == 1:
            place = found[0].SOPInstanceUID
            images = [one for one in pristine if one.SOPInstanceUID != place] + found
        else:
            images = found
    grouped = group_studies(images)
    # What says it is of another study stands next to the good one, and counts like that.
    members = max(grouped.studies.values(), key=len, default=[])
    if not members:
        raise Unusable(next(iter(grouped.refused)))
    stack = find_stack(members)[0]
    assert len({len(position) for position in stack.images}) == 1
    segmentations = () if chosen is None else choose([chosen], stack)[0]
    _check_case(stack, read_stack(stack, mask_file, segmentations))
    return CASE


def _check_case(stack: Stack, cine: Cine) -> None:
    """Continue as `prepare` does, and hold what it must hold."""
    first, num_phases = stack.images[0][0], len(stack.images[0])
    assert cine.images.shape == (num_phases, len(stack.images), first.Rows, first.Columns)
    assert np.isfinite(cine.images).all()
    check_masks(cine)
    arrays = normalise(cine)
    assert arrays.frames.shape == (2, len(stack.images), CASE_SIZE, CASE_SIZE)
    Case(CaseInfo("p0", "unknown", 1.5, arrays.ef, "p0"), arrays.frames, arrays.masks, arrays.spacing_mm)


@lru_cache(maxsize=1)
def _study(folder: str) -> list[Header]:
    """The headers of the good study, read once in a child."""
    headers: list[Header] = []
    for path in sorted(Path(folder).iterdir()):
        found = read_file(path)
        assert isinstance(found, list)
        headers += found
    return headers
