"""Damaged files through `prepare`: each ends as a case, with a reason code, or with one line about a table.

A file is damaged in a folder that holds one patient, and the folder goes the whole way from finding its studies to a
folder of cases that can be read again, in a child process of `prepare`'s own kind.
"""

import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from fedcmr.client.ingest.layouts.ef_table import read_ef_table, with_ejection_fractions
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.prepare import Choices, Preparation, make_case
from fedcmr.client.ingest.prepare import Job as CaseJob
from fedcmr.client.ingest.reasons import REASONS, Unusable
from fedcmr.client.ingest.refused_list import write_list
from fedcmr.client.ingest.sandbox import Item, Result, Workers
from fedcmr.shared.case import CASE_SIZE, load_cases
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PRIVATE_NAME
from fedcmr.shared.progress import track
from fedcmr.shared.tasks.segmentation.segmenter import Architecture, Segmenter, save_segmenter
from fedcmr.simulations.benchmarks.ingest_damage import damage
from fedcmr.simulations.benchmarks.ingest_folders import Form, forms
from fedcmr.simulations.benchmarks.ingest_seeds import STUDY_NUMBER

CASE = "case"
ONE_LINE = "one line"
"""The outcome of a table, or of another file for the whole folder, that a data manager has to correct first."""
FAILURES = frozenset({"unexpected-error", "parser-crashed", "too-slow"})
"""Codes with which the sandbox holds what the reader did not expect: there should be none."""
SECONDS = 20.0
"""For one file; all that are small end within a second."""
WHOLE_EVERY = 10
"""One file of so many goes the whole way into a folder of cases, which takes three times as long."""
FAILED_NAME = "failed"
SEGMENTER_NAME = "segmenter.safetensors"
KEY = bytes(range(32))
FILES_PER_BATCH = 8
OF_THE_PATIENT = re.compile("|".join(STUDY_NUMBER[i : i + 5] for i in range(len(STUDY_NUMBER) - 4)))
"""Every name, number and UID of the patient holds the number; a part of it in a message is one that was quoted."""


@dataclass(frozen=True)
class Job:
    """A file to damage.

    Attributes:
        folder: Where `write_forms` has put the good files.
        index: Of the form.
        content: The damaged file; None for what `damaged` makes of seed and number.
        number: Of the file.
        seed: Of the run.
    """

    folder: str
    index: int
    number: int = 0
    seed: int = 0
    content: bytes | None = field(default=None, repr=False)


def fuzz(folder: Path, num: int, seed: int, num_processes: int = 1) -> Counter[tuple[str, str, str]]:
    """Damage files and prepare them.

    Args:
        folder: An empty one for the files; those over which the reader fails stay in `FAILED_NAME`
            below it.
        num: Number of damaged files.
        seed: Decides every byte.
        num_processes: Child processes.

    Returns:
        Number of files by (layout, form, outcome); an outcome is "case", "one line" or a reason code.
    """
    kinds = forms()
    write_forms(folder / "forms", kinds)
    counts: Counter[tuple[str, str, str]] = Counter()
    with Workers(num_processes, seconds=SECONDS) as workers:
        jobs = (Job(str(folder / "forms"), number % len(kinds), number, seed) for number in range(num))
        outcomes = workers.map(outcome, jobs, batch_size=FILES_PER_BATCH)
        for number, result in enumerate(track(outcomes, "preparing damaged files", total=num)):
            form = kinds[number % len(kinds)]
            code = result.code if isinstance(result, Unusable) else result
            counts[form.layout, form.name, code] += 1
            if code in FAILURES:
                path = folder / FAILED_NAME / f"{number}-{form.layout}-{Path(form.damaged).name}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(damaged(kinds, number, seed))
    return counts


def damaged(kinds: list[Form], number: int, seed: int) -> bytes:
    """The content of a run's damaged file."""
    form = kinds[number % len(kinds)]
    others = [one.files[one.damaged] for one in kinds]
    return damage(form.files[form.damaged], others, random.Random(f"{seed}/{number}"))


def write_forms(folder: Path, kinds: list[Form]) -> None:
    """Write the good files, once for all children."""
    for index, form in enumerate(kinds):
        for name, content in form.files.items():
            path = folder / str(index) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    # A tiny one, for scans that have no masks or have lost them: the shipped one takes a third of a second.
    save_segmenter(folder / SEGMENTER_NAME, Segmenter(Architecture(width=2)), {})


def outcome(job: Job) -> str:
    """Prepare a folder with its damaged file; runs in a child process.

    Raises:
        Unusable: It ends with a code.
    """
    kinds = _forms()
    form = kinds[job.index]
    source = _copy(job.folder, job.index)
    path = source / form.damaged
    path.unlink(missing_ok=True)  # and not written over: the good file has the same inode
    path.write_bytes(damaged(kinds, job.number, job.seed) if job.content is None else job.content)
    told: dict[str, Any] = {**form.choices, "segmenter": Path(job.folder) / SEGMENTER_NAME}
    if "ef_table" in told:
        told["ef_table"] = source / told["ef_table"]
        source = source / "scans"
    choices = Choices(form.layout, **told)
    try:
        code = (prepared if job.number % WHOLE_EVERY == 0 else read)(source, choices)
    except UserError as error:
        message = str(error)
        assert str(path.parent) in message or str(source) in message, "names the file"
        assert not OF_THE_PATIENT.search(message.replace(str(path), "").replace(str(source), "")), "quotes the patient"
        return ONE_LINE
    if code != CASE:
        raise Unusable(code)
    return code


@lru_cache(maxsize=1)
def _forms() -> list[Form]:
    """The forms, made once in a child."""
    return forms()


@cache
def _copy(folder: str, index: int) -> Path:
    """A form's folder for this process alone."""
    own = Path(folder).parent / f"process-{os.getpid()}" / str(index)
    shutil.copytree(Path(folder) / str(index), own / "scans", copy_function=os.link)
    return own / "scans"


def read(source: Path, choices: Choices) -> str:
    """What `prepare` makes of a folder, as far as the case.

    Returns:
        "case", or the reason code of what was left out or refused.

    Raises:
        UserError: As `prepare` does.
    """
    table = None if choices.ef_table is None else read_ef_table(choices.ef_table)
    findings = LAYOUTS[choices.layout].find(source, choices.options(), InThisProcess())
    studies = findings.studies if table is None else with_ejection_fractions(findings.studies, table)
    refused = findings.refused
    for study in studies:
        make = partial(make_case, expects_ef=table is not None, segmenter=choices.segmenter)
        made = _called(make, CaseJob("p0", "p0", study))
        if isinstance(made, Unusable):
            refused.add(made.code, study.place)
        else:
            assert made[0].frames.shape[-2:] == (CASE_SIZE, CASE_SIZE)
    return _first([*findings.left_out, *refused])


def prepared(source: Path, choices: Choices) -> str:
    """The same the whole way into a folder of cases, which must be readable and name nobody."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        destination = Path(folder) / "cases"
        with Preparation(destination, choices, KEY) as preparation:
            preparation.workers = InThisProcess()
            added = preparation.add(source)
            summary = preparation.finish(added.refused, added.left_out, added.unused_rows.total())
            write_list(destination, source, added.refused, added.left_out, added.unused_rows)
        assert set(summary.warnings) <= set(REASONS)
        assert len(load_cases(destination) if summary.num_cases else []) == summary.num_cases
        for path in destination.rglob("*"):
            if path.is_file() and PRIVATE_NAME not in path.relative_to(destination).parts and path.suffix != ".npz":
                assert STUDY_NUMBER not in path.read_text(encoding="utf-8"), "quotes the patient"
        return _first([*summary.left_out, *summary.refused])


def _first(codes: list[str]) -> str:
    assert set(codes) <= set(REASONS)
    return codes[0] if codes else CASE


class InThisProcess(Workers):
    """Calls the function here, in a process that is a child already: what it does not expect ends the whole call."""

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], *, batch_size: int = 1
    ) -> Iterator[Result | Unusable]:
        """See `Workers.map`."""
        return (_called(function, item) for item in items)

    def as_finished(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result | Unusable]]:
        """See `Workers.as_finished`."""
        return ((number, _called(function, item)) for number, item in enumerate(items))


def _called(function: Callable[[Item], Result], item: Item) -> Result | Unusable:
    """A result, or the code of `Unusable`."""
    try:
        return function(item)
    except Unusable as unusable:
        return Unusable(unusable.code)
    except MemoryError:
        return Unusable("too-large")
    except OSError as error:  # which would end `prepare` for all patients
        raise AssertionError("a damaged file is no trouble with the disk") from error
