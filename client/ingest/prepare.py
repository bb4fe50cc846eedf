"""The loop from a folder of scans to a folder of cases: resumable, in child processes, without identifiers."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedcmr.client.deidentify import pseudonym, read_or_make_key
from fedcmr.client.ingest.burned_in import SUSPECTED, suspect
from fedcmr.client.ingest.cine import Study
from fedcmr.client.ingest.layouts.ef_table import names_of, read_ef_table, with_ejection_fractions
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.layouts.layout import Options
from fedcmr.client.ingest.normalise import normalise
from fedcmr.client.ingest.plausibility import check_masks
from fedcmr.client.ingest.reasons import REASONS, Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.shared.case import (
    INDEX_NAME,
    UNKNOWN,
    Case,
    CaseInfo,
    contours_of,
    load_case,
    read_index,
    save_case,
    write_index,
)
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PREPARED_NAME
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.progress import track
from fedcmr.shared.provenance import PRIVATE_REAL, SIMULATED_SCANS, Provenance, from_json, public

REFUSED_NAME = "refused.json"
DETAILS_NAME = "details.json"
MAX_REASONS = 5
"""Reasons in the one line of an error."""
FROM_FILES = "provenance_from_files"
"""In `prepared.json`: nobody said where the scans come from, so that it depends on what all of them say."""
SAVE_INTERVAL_S = 2.0
"""What a crash can cost: cases that the index does not name yet are made again."""


@dataclass(frozen=True)
class Summary:
    """What `prepare` did.

    Attributes:
        num_cases: Cases in the destination.
        num_new: Those of them that this call wrote.
        refused: Studies refused, by reason code.
        left_out: Files, or series of a usable study, that belong to no short-axis cine, by reason code.
        warnings: Cases that were made all the same, by reason code.
        provenance: Where the scans come from, as the destination records it.
    """

    num_cases: int
    num_new: int
    refused: dict[str, int]
    left_out: dict[str, int]
    warnings: dict[str, int]
    provenance: Provenance


@dataclass(frozen=True)
class Prepared:
    """What a child process returns for a study: the row of its case, and an entry of `details.json`."""

    info: CaseInfo
    details: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A study with the names that its case will have."""

    pseudonym: str
    group: str
    study: Study = field(repr=False)


def prepare(
    source: Path,
    destination: Path,
    layout: str,
    *,
    folds: Collection[int] | None = None,
    labels: Mapping[int, int] | None = None,
    ef_table: Path | None = None,
    key: bytes | None = None,
    num_processes: int = 1,
    provenance: Provenance | None = None,
    vendor: str | None = None,
    one_study_one_patient: bool = False,
    issuers_differ: bool = False,
    keep_suspected: bool = False,
    contours: str = "drawn",
    segmenter: Path | None = None,
    axes: str | None = None,
) -> Summary:
    """Turn every usable study below `source` into a case in `destination`.

    A case that is already there is kept, so an interrupted call resumes when it is repeated, and new scans can be
    added. What was refused is tried again. Besides the cases the folder gets `refused.json`, counts by reason code,
    `details.json`, what a case does not hold of its scan, and `prepared.json`, the settings and where the scans come
    from.

    Guarantees: no name, number, date, UID or path of the source gets into the destination, a message or a log.
    Not covered: what the pixels show.

    Args:
        source: The scans; only read.
        destination: A folder to make, or one that an earlier call made with the same settings.
        layout: How the scans are stored, a key of `LAYOUTS`.
        folds: For ACDC, the patients to keep: see `find_acdc`.
        labels: For the plain layout, what the masks' numbers mean: see `plain.parse_labels`.
        ef_table: A CSV of ejection fractions, for scans without masks: see `read_ef_table`.
        key: Secret for the pseudonyms; by default `pseudonym.key` next to `destination`, made on first use.
        num_processes: Child processes that read the scans.
        vendor: Vendor of the scanners, one of `fedcmr.shared.case.VENDORS`, for scans that name none; it overrides
            nothing that the scans say. Cases of an earlier call that had none get it too.
        one_study_one_patient: For DICOM, take each study without a PatientID for a patient of its own; otherwise such
            studies are refused.
        issuers_differ: For DICOM, take a PatientID of another issuer for another patient; otherwise a number is one
            patient whoever issued it.
        keep_suspected: Keep cases whose scans seem to show letters, with a warning: for whoever has looked at them.
            Otherwise such studies are refused, and cases of an earlier call that were warned of are removed.
        contours: "drawn" for those of the scans alone, or "auto" to have a segmenter find what nobody drew.
        segmenter: File of the segmenter for that and for finding the heart; None for the one that ships.
        axes: For the plain layout, "short-axis" where every stack is one, seen from the apex, and some headers lost it.
        provenance: Where the scans come from; None: what the layout says, private unless it is a public set's own. For
            DICOM then simulated where every file of every case says that this project's generator made it.

    Raises:
        UserError: There is no usable patient, or the folders, the table or the labels cannot be used.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give the one that holds the scans")
    if source.resolve() in (destination.resolve(), *destination.resolve().parents):
        raise UserError(f"{destination} lies inside {source}: choose a destination outside the scans")
    if contours not in ("drawn", "auto"):
        raise ValueError(f"Expected contours drawn or auto, got {contours!r}.")
    if segmenter is not None:
        from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter  # with torch, which takes seconds

        load_segmenter(segmenter)  # a file that is none must not cost every case
    kind = LAYOUTS[layout]
    options = Options(folds, labels, one_study_one_patient, issuers_differ, axes)
    for name in options.given():
        if name not in kind.takes:
            raise UserError(f"--{name.replace('_', '-')} means nothing in the layout {layout}: leave it out")
    implied = PRIVATE_REAL if kind.public_set is None else public(kind.public_set)
    table = None if ef_table is None else read_ef_table(ef_table)
    try:
        key = read_or_make_key(destination.resolve().parent) if key is None else key
        settings = {
            "format": layout,
            "folds": None if folds is None else sorted(folds),
            "labels": None if labels is None else {str(number): labels[number] for number in sorted(labels)},
            # With the key: a table of a few patients could be guessed from a plain hash.
            "ef_table": None if table is None else pseudonym(key, json.dumps(sorted(table.items()))),
            "key_check": pseudonym(key, "key check"),
            "provenance": (implied if provenance is None else provenance).as_json(),
            "one_study_one_patient": one_study_one_patient or None,
            "issuers_differ": issuers_differ or None,
            "axes": axes,
            "contours": None if contours == "drawn" else contours,
            "segmenter": None if segmenter is None else hashlib.sha256(segmenter.read_bytes()).hexdigest(),
        }
        if provenance is None and layout == "dicom":
            settings[FROM_FILES] = True
        known, details, record = _open_destination(destination, settings, vendor)
        if not keep_suspected:
            _remove_suspected(destination, known, details)
        num_known = len(known)
        with Workers(num_processes) as workers:
            findings = kind.find(source, options, workers)
            studies = findings.studies if table is None else with_ejection_fractions(findings.studies, table)
            # By its own spelling, so that a folder of an earlier version, which knew no other, keeps its cases.
            jobs = [Job(pseudonym(key, s.spelt, s.study), pseudonym(key, s.patient), s) for s in studies]
            for job in jobs:
                if job.pseudonym in known:
                    known[job.pseudonym] = replace(known[job.pseudonym], group=job.group)
            jobs = [job for job in jobs if job.pseudonym not in known or _lacks_vendor(known[job.pseudonym], vendor)]
            refused = Counter(findings.refused)
            one = partial(
                prepare_one,
                destination=destination,
                expects_ef=table is not None,
                vendor=vendor,
                keep_suspected=keep_suspected,
                contours=contours,
                segmenter=None if segmenter is None else segmenter.resolve(),
            )
            saved_at = time.monotonic()
            try:
                for result in track(workers.map(one, jobs, ordered=False), "preparing cases", total=len(jobs)):
                    if isinstance(result, Unusable):
                        refused[result.code] += 1
                        continue
                    known[result.info.pseudonym] = result.info
                    details[result.info.pseudonym] = result.details
                    if time.monotonic() - saved_at > SAVE_INTERVAL_S:
                        _save(destination, known, details)
                        saved_at = time.monotonic()
            finally:
                if known or (destination / INDEX_NAME).exists():
                    _save(destination, known, details)
        warnings = Counter(code for name in known for code in details.get(name, {}).get("warnings", []))
        if table is not None:
            warnings["unused-row"] = len(set(table) - {name for study in studies for name in names_of(study)})
        if FROM_FILES in record and known and all(details.get(name, {}).get("synthetic") is True for name in known):
            record["provenance"] = SIMULATED_SCANS.as_json()
            _write_json(destination / PREPARED_NAME, record)
        summary = Summary(
            len(known),
            len(known) - num_known,
            dict(+refused),
            dict(+findings.left_out),
            dict(+warnings),
            from_json(record["provenance"]),
        )
        counts = {"studies": summary.refused, "left_out": summary.left_out, "warnings": summary.warnings}
        _write_json(destination / REFUSED_NAME, counts)
    except OSError as error:
        # Only the reason: the error's own text may hold a path below the source.
        reason = error.strerror or "input/output error"
        raise UserError(f"cannot read {source} or write {destination}: {reason}") from None
    if not known:
        why = [*refused.most_common(), *(+findings.left_out).most_common()]
        reasons = "; ".join(f"{code} {number}: {REASONS[code]}" for code, number in why[:MAX_REASONS])
        more = (
            f"; and {len(why) - MAX_REASONS} more, see {destination / REFUSED_NAME}" if len(why) > MAX_REASONS else ""
        )
        raise UserError(f"{source} holds no usable {layout} patient ({reasons or 'nothing of this layout'}{more})")
    return summary


def prepare_one(
    job: Job,
    destination: Path,
    expects_ef: bool = False,
    vendor: str | None = None,
    keep_suspected: bool = False,
    contours: str = "drawn",
    segmenter: Path | None = None,
) -> Prepared:
    """Read, check, normalise and save one study; runs in a child process.

    Raises:
        Unusable: The study cannot become a case.
    """
    cine = job.study.read()
    suspected = suspect(cine)
    if suspected and not keep_suspected:
        raise Unusable(SUSPECTED)
    check_masks(cine)
    arrays = normalise(cine, segmenter)
    warnings = [SUSPECTED] if suspected else []
    warnings += job.study.warnings
    warnings += arrays.warnings
    if vendor is not None and not cine.says_vendor:
        cine = replace(cine, vendor=vendor)
        warnings.append("vendor-given")
    elif vendor is not None and cine.vendor not in (UNKNOWN, vendor):
        warnings.append("vendor-contradicted")
    if cine.vendor == UNKNOWN:
        warnings.append("unknown-vendor")
    drawn = contours_of(arrays.masks)
    if drawn == "partial":
        warnings.append("partly-drawn")
    if expects_ef and math.isnan(arrays.ef):
        warnings.append("no-ejection-fraction")
    patient = (cine.vendor, cine.field_strength_t, arrays.ef, job.group, cine.sex, cine.pathology)
    case = Case(CaseInfo(job.pseudonym, *patient, drawn), arrays.frames, arrays.masks, arrays.spacing_mm)
    if contours == "auto" and drawn != "drawn":
        # torch takes seconds to load, which scans with masks need not wait for.
        from fedcmr.client.ingest.auto_contours import with_contours

        case, code = with_contours(case, segmenter)
        warnings += [code] if code else []
    save_case(destination, case)
    phases = {"num_phases": len(cine.images), "ed_phase": arrays.ed, "es_phase": arrays.es}
    synthetic = {"synthetic": True} if job.study.is_synthetic else {}
    return Prepared(case.info, {**phases, **synthetic, "warnings": warnings})


def _lacks_vendor(info: CaseInfo, vendor: str | None) -> bool:
    """Whether a case is to be made again because its vendor may now be known."""
    return vendor is not None and info.vendor == UNKNOWN


def _open_destination(
    destination: Path, settings: dict[str, Any], vendor: str | None
) -> tuple[dict[str, CaseInfo], dict[str, dict[str, Any]], dict[str, Any]]:
    """Make the folder, or resume in one with the same settings.

    Returns:
        The cases that are there, their details, and what `prepared.json` now says. Where the files decide on the
        provenance it says private, and so it stays until all cases have been read.
    """
    path = destination / PREPARED_NAME
    if destination.exists() and not path.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is not empty and was not made by 'prepare': choose another destination")
    known: dict[str, CaseInfo] = {}
    details: dict[str, dict[str, Any]] = {}
    given: set[str] = set()
    if (destination / INDEX_NAME).exists():
        earlier = {"provenance": PRIVATE_REAL.as_json(), **_read_json(path)}
        if FROM_FILES not in earlier:
            settings.pop(FROM_FILES, None)  # it was given on the command line, or the files were not read
        elif settings["provenance"] == PRIVATE_REAL.as_json():
            earlier["provenance"] = PRIVATE_REAL.as_json()  # what files say is no statement
        different = [name for name in settings if name != FROM_FILES and earlier.get(name) != settings[name]]
        if different:
            names = ", ".join(different)
            raise UserError(f"{destination} was prepared with another {names}: choose another destination")
        given = set(earlier.get("vendors_given", []))
        infos = read_index(destination)
        there = [i for i in infos if (destination / "cases" / f"{i.pseudonym}.npz").is_file()]
        known = {i.pseudonym: i if i.contours else _with_contours(destination, i) for i in there}
        if (destination / DETAILS_NAME).exists():
            details = {name: entry for name, entry in _read_json(destination / DETAILS_NAME).items() if name in known}
    private_folder(destination)
    record = {**settings, "vendors_given": sorted(given | ({vendor} if vendor else set()))}
    _write_json(path, record)
    return known, details, record


def _with_contours(destination: Path, info: CaseInfo) -> CaseInfo:
    """The row with what its masks are, which an earlier version did not write; as it is where the case is damaged."""
    try:
        return load_case(destination, info).info
    except UserError:
        return info


def _remove_suspected(destination: Path, known: dict[str, CaseInfo], details: dict[str, dict[str, Any]]) -> None:
    """Take out what an earlier call kept although its scans seem to show letters: nobody says that they were seen."""
    for name in [name for name in known if SUSPECTED in details.get(name, {}).get("warnings", [])]:
        (destination / "cases" / f"{name}.npz").unlink(missing_ok=True)
        del known[name], details[name]


def _save(destination: Path, known: Mapping[str, CaseInfo], details: Mapping[str, Any]) -> None:
    """Write the index, and before it what it leads to."""
    _write_json(destination / DETAILS_NAME, details)
    write_index(destination, list(known.values()))


def _read_json(path: Path) -> dict[str, Any]:
    """A small JSON file that an earlier call wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: choose another destination")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
