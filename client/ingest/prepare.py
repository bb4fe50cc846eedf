"""The loop from a folder of scans to a folder of cases: resumable, in one process or several, without identifiers."""

import json
import logging
import multiprocessing
import signal
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from client.deidentify import pseudonym, read_or_make_key
from client.ingest.acdc import find_acdc
from client.ingest.cine import Findings, Study
from client.ingest.dicom import find_dicom
from client.ingest.mnms import find_mnms
from client.ingest.normalise import normalise
from client.ingest.reasons import Unusable
from shared.case import INDEX_NAME, Case, CaseInfo, read_index, save_case, write_index
from shared.errors import UserError
from shared.progress import track

Layout = Literal["dicom", "acdc", "mnms"]
SETTINGS_NAME = "prepared.json"
REFUSED_NAME = "refused.json"


@dataclass(frozen=True)
class Summary:
    """What `prepare` did.

    Attributes:
        num_cases: Cases in the destination.
        num_new: Those of them that this call wrote.
        refused: Studies refused, by reason code.
        left_out: Files, or series of a usable study, that belong to no short-axis cine, by reason code.
    """

    num_cases: int
    num_new: int
    refused: dict[str, int]
    left_out: dict[str, int]


def prepare(
    source: Path,
    destination: Path,
    layout: Layout,
    *,
    folds: Collection[int] | None = None,
    key: bytes | None = None,
    num_processes: int = 1,
) -> Summary:
    """Turn every usable study below `source` into a case in `destination`.

    A case that is already there is kept, so an interrupted call is repeated to go on, and new scans can be added.
    Besides the cases the folder gets `refused.json`, counts by reason code, and `prepared.json`, the settings.

    Guarantees: no name, number, date, UID or path of the source gets into the destination, a message or a log.
    Not covered: what the pixels show.

    Args:
        source: The scans; only read.
        destination: A folder to make, or one that an earlier call made with the same settings.
        layout: How the scans are stored.
        folds: For ACDC, the patients to keep: see `find_acdc`.
        key: Secret for the pseudonyms; by default `pseudonym.key` beside `destination`, made on first use.
        num_processes: Worker processes; 1 works in this one.

    Raises:
        UserError: There is no usable patient, or the folders cannot be used.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give the one that holds the scans")
    if source.resolve() in (destination.resolve(), *destination.resolve().parents):
        raise UserError(f"{destination} lies inside {source}: choose a destination outside the scans")
    try:
        key = read_or_make_key(destination.resolve().parent) if key is None else key
        chosen = None if folds is None else sorted(folds)
        known = _open_destination(
            destination, {"format": layout, "folds": chosen, "key_check": pseudonym(key, "key check")}
        )
        with _silent():
            findings = _find(source, layout, folds)
        work = [(pseudonym(key, s.patient, s.study), pseudonym(key, s.patient), s) for s in findings.studies]
        work = [job for job in work if job[0] not in known]
        num_known, refused = len(known), Counter(findings.refused)
        for result in track(_results(work, destination, num_processes), "preparing cases", total=len(work)):
            if isinstance(result, str):
                refused[result] += 1
            else:
                known[result.pseudonym] = result
                write_index(destination, list(known.values()))
        summary = Summary(len(known), len(known) - num_known, dict(refused), dict(findings.left_out))
        _write_json(destination / REFUSED_NAME, {"studies": summary.refused, "left_out": summary.left_out})
    except OSError as error:
        # Only the reason: the error's own text may hold a path below the source.
        reason = error.strerror or "input/output error"
        raise UserError(f"cannot read {source} or write {destination}: {reason}") from None
    if not known:
        counts = ", ".join(f"{code} {count}" for code, count in sorted({**summary.left_out, **summary.refused}.items()))
        raise UserError(f"{source} holds no usable {layout} patient ({counts or 'nothing of this layout'})")
    return summary


def _find(source: Path, layout: Layout, folds: Collection[int] | None) -> Findings:
    """The layout's reader."""
    if layout == "acdc":
        return find_acdc(source, folds)
    if folds is not None:
        raise ValueError(f"Expected folds with the layout acdc only, got {layout}.")
    return find_mnms(source) if layout == "mnms" else find_dicom(source)


def _open_destination(destination: Path, settings: dict[str, Any]) -> dict[str, CaseInfo]:
    """Make the folder, or go on in one with the same settings; returns the cases that are there."""
    path = destination / SETTINGS_NAME
    if destination.exists() and not path.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is not empty and was not made by 'prepare': choose another destination")
    known: dict[str, CaseInfo] = {}
    if (destination / INDEX_NAME).exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is damaged: choose another destination") from None
        different = [name for name in settings if earlier.get(name) != settings[name]]
        if different:
            names = ", ".join(different)
            raise UserError(f"{destination} was prepared with another {names}: choose another destination")
        infos = read_index(destination)
        known = {i.pseudonym: i for i in infos if (destination / "cases" / f"{i.pseudonym}.npz").is_file()}
    destination.mkdir(parents=True, exist_ok=True)
    _write_json(path, settings)
    return known


def _results(work: Sequence[tuple[str, str, Study]], destination: Path, num_processes: int) -> Iterator[CaseInfo | str]:
    """A row of the index or a reason code per study, as they are finished."""
    one = partial(_prepare_one, destination=destination)
    if num_processes == 1:
        yield from map(one, work)
        return
    with multiprocessing.get_context("spawn").Pool(num_processes, _ignore_interrupts) as pool:
        yield from pool.imap_unordered(one, work)


def _prepare_one(work: tuple[str, str, Study], destination: Path) -> CaseInfo | str:
    """Read, normalise and save one study."""
    name, group, study = work
    try:
        with _silent():
            cine = study.read()
            arrays = normalise(cine)
    except Unusable as unusable:
        return unusable.code
    except Exception:
        # A reader's own exception may hold a path or a value of the patient: nothing of it is shown.
        return "unexpected-error"
    info = CaseInfo(name, cine.vendor, cine.field_strength_t, arrays.ef, group)
    save_case(destination, Case(info, arrays.frames, arrays.masks, arrays.spacing_mm))
    return info


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing that pydicom or nibabel say gets out: their warnings and log lines quote values of the header."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel.global")]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


def _ignore_interrupts() -> None:
    """In a worker: Ctrl-C is the parent's to answer, it ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file atomically."""
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial_path.replace(path)
