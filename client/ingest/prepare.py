"""The loop from scans to a folder of cases: resumable, in child processes, without identifiers."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedcmr.client.deidentify import KEY_CHECK, pseudonym, read_or_make_key
from fedcmr.client.ingest.burned_in import SUSPECTED, suspect
from fedcmr.client.ingest.cine import Study
from fedcmr.client.ingest.destination import FROM_FILES, REFUSED_NAME, Destination, write_json
from fedcmr.client.ingest.displaced import fit_of_contours
from fedcmr.client.ingest.identity import Identity
from fedcmr.client.ingest.layouts.ef_table import names_of, read_ef_table, with_ejection_fractions
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.layouts.layout import Options
from fedcmr.client.ingest.normalise import normalise
from fedcmr.client.ingest.places import Place, Tally
from fedcmr.client.ingest.plausibility import check_masks
from fedcmr.client.ingest.reasons import REASONS, Unusable
from fedcmr.client.ingest.refused_list import LIST_NAME, remember_source, write_list
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.shared.case import UNKNOWN, Case, CaseInfo, contours_of, save_case
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PREPARED_NAME
from fedcmr.shared.progress import track
from fedcmr.shared.provenance import PRIVATE_REAL, SIMULATED_SCANS, Provenance, from_json, public

MAX_REASONS = 5
"""Reasons in the one line of an error."""
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
    from. `private/refused.csv` lists which studies of `source` were refused or passed over in part.

    Guarantees: no name, number, date, UID or path of the source gets into the destination, a message or a log, but for
    the folder `private`, which is for the site's account alone and holds no pseudonym. Not covered: what the pixels
    show.

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
    check_source(source, destination)
    choices = Choices(
        layout,
        folds=folds,
        labels=labels,
        ef_table=ef_table,
        provenance=provenance,
        vendor=vendor,
        one_study_one_patient=one_study_one_patient,
        issuers_differ=issuers_differ,
        keep_suspected=keep_suspected,
        contours=contours,
        segmenter=segmenter,
        axes=axes,
    )
    with Preparation(destination, choices, key, num_processes) as preparation:
        with _readable(destination):
            remember_source(destination, source)
        added = preparation.add(source)
        summary = preparation.finish(added.refused, added.left_out, added.unused_rows.total())
        with _readable(destination):
            write_list(destination, source, added.refused, added.left_out, added.unused_rows)
    if not summary.num_cases:
        which = f"; which ones: {destination / LIST_NAME}" if summary.refused or summary.left_out else ""
        raise UserError(f"{source} holds no usable {layout} patient ({why_none(summary, destination)}){which}")
    return summary


def check_source(source: Path, destination: Path) -> None:
    """Whether scans can be read from one folder and cases written to the other.

    Raises:
        UserError: They cannot.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give the one that holds the scans")
    if source.resolve() in (destination.resolve(), *destination.resolve().parents):
        raise UserError(f"{destination} lies inside {source}: choose a destination outside the scans")


def why_none(summary: Summary, destination: Path) -> str:
    """Why there is no case, in words, the most frequent reasons first."""
    why = [*Counter(summary.refused).most_common(), *Counter(summary.left_out).most_common()]
    reasons = "; ".join(f"{code} {number}: {REASONS[code]}" for code, number in why[:MAX_REASONS])
    more = f"; and {len(why) - MAX_REASONS} more, see {destination / REFUSED_NAME}" if len(why) > MAX_REASONS else ""
    return f"{reasons or 'nothing of this layout'}{more}"


@dataclass(frozen=True)
class Choices:
    """What a user may say about how scans become cases; `prepare` says what each means."""

    layout: str
    folds: Collection[int] | None = None
    labels: Mapping[int, int] | None = None
    ef_table: Path | None = None
    provenance: Provenance | None = None
    vendor: str | None = None
    one_study_one_patient: bool = False
    issuers_differ: bool = False
    keep_suspected: bool = False
    contours: str = "drawn"
    segmenter: Path | None = None
    axes: str | None = None

    def options(self) -> Options:
        """What the layout has to know.

        Raises:
            UserError: Something means nothing in this layout.
        """
        options = Options(**{one.name: getattr(self, one.name) for one in fields(Options)})
        for name in options.given():
            if name not in LAYOUTS[self.layout].takes:
                raise UserError(f"--{name.replace('_', '-')} means nothing in the layout {self.layout}: leave it out")
        return options

    def settings(self, key: bytes, table: Mapping[str, float] | None) -> dict[str, Any]:
        """What all cases of a folder have in common, as `prepared.json` keeps it."""
        public_set = LAYOUTS[self.layout].public_set
        implied = PRIVATE_REAL if public_set is None else public(public_set)
        settings: dict[str, Any] = {
            "format": self.layout,
            "folds": None if self.folds is None else sorted(self.folds),
            "labels": None
            if self.labels is None
            else {str(number): self.labels[number] for number in sorted(self.labels)},
            # With the key: a table of a few patients could be guessed from a plain hash.
            "ef_table": None if table is None else pseudonym(key, json.dumps(sorted(table.items()))),
            "key_check": pseudonym(key, KEY_CHECK),
            "provenance": (implied if self.provenance is None else self.provenance).as_json(),
            "one_study_one_patient": self.one_study_one_patient or None,
            "issuers_differ": self.issuers_differ or None,
            "axes": self.axes,
            "contours": None if self.contours == "drawn" else self.contours,
            "segmenter": None if self.segmenter is None else hashlib.sha256(self.segmenter.read_bytes()).hexdigest(),
        }
        if self.provenance is None and self.layout == "dicom":
            settings[FROM_FILES] = True
        return settings


@dataclass(frozen=True)
class Added:
    """What became of one folder of scans.

    Attributes:
        cases: Pseudonyms of its cases, those that were there before among them.
        refused: Studies refused, by reason code.
        left_out: As in `Summary`.
        identities: What its usable studies say about their patients, by pseudonym of the case.
        studies: Those that looked usable from outside.
        unused_rows: Rows of the table of ejection fractions without a study.
    """

    cases: list[str]
    refused: Tally = field(repr=False)
    left_out: Tally = field(repr=False)
    identities: dict[str, Identity]
    studies: list[Study] = field(repr=False)
    unused_rows: Tally = field(repr=False)


class Preparation:
    """Scans on their way into a folder of cases: all in one folder, or study by study.

        with Preparation(destination, Choices("dicom")) as preparation:
            for source in sources:
                added = preparation.add(source)
            summary = preparation.finish(refused, left_out)

    Attributes:
        destination: The folder of cases.
        key: Secret of the pseudonyms.
    """

    def __init__(self, destination: Path, choices: Choices, key: bytes | None = None, num_processes: int = 1) -> None:
        """Open or make the destination.

        Raises:
            UserError: It, the table, the segmenter or the options cannot be used.
        """
        if choices.contours not in ("drawn", "auto"):
            raise ValueError(f"Expected contours drawn or auto, got {choices.contours!r}.")
        if choices.segmenter is not None:
            from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter  # with torch, which takes seconds

            load_segmenter(choices.segmenter)  # a file that is none must not cost every case
        self.choices, self.options = choices, choices.options()
        self.table = None if choices.ef_table is None else read_ef_table(choices.ef_table)
        with _readable(destination):
            self.key = read_or_make_key(destination.resolve().parent) if key is None else key
            self.destination = Destination.open(destination, choices.settings(self.key, self.table), choices.vendor)
            if not choices.keep_suspected:
                self.destination.remove_suspected()
        self.num_known = len(self.destination.known)
        self.workers = Workers(num_processes)

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.close()

    def add(self, source: Path) -> Added:
        """Make cases of the usable studies below a folder, and save the index.

        Raises:
            UserError: The source cannot be read, or the destination not written.
        """
        known, details = self.destination.known, self.destination.details
        with _readable(self.destination.folder, source):
            findings = LAYOUTS[self.choices.layout].find(source, self.options, self.workers)
            studies = findings.studies if self.table is None else with_ejection_fractions(findings.studies, self.table)
            # By its own spelling, so that a folder of an earlier version, which knew no other, keeps its cases.
            found = [Job(pseudonym(self.key, s.spelt, s.study), pseudonym(self.key, s.patient), s) for s in studies]
            for job in found:
                if job.pseudonym in known:
                    known[job.pseudonym] = replace(known[job.pseudonym], group=job.group)
            jobs = [job for job in found if job.pseudonym not in known or self._lacks_vendor(known[job.pseudonym])]
            refused = findings.refused
            segmenter = self.choices.segmenter
            one = partial(
                prepare_one,
                destination=self.destination.folder,
                expects_ef=self.table is not None,
                vendor=self.choices.vendor,
                keep_suspected=self.choices.keep_suspected,
                contours=self.choices.contours,
                segmenter=None if segmenter is None else segmenter.resolve(),
            )
            saved_at = time.monotonic()
            try:
                results = self.workers.as_finished(one, jobs)
                for number, result in track(results, "preparing cases", total=len(jobs)):
                    if isinstance(result, Unusable):
                        refused.add(result.code, jobs[number].study.place)
                        continue
                    known[result.info.pseudonym] = result.info
                    details[result.info.pseudonym] = result.details
                    if time.monotonic() - saved_at > SAVE_INTERVAL_S:
                        self.destination.save()
                        saved_at = time.monotonic()
            finally:
                self.destination.save()
        unused = Tally()
        for patient in sorted(set(self.table or {}) - {name for study in studies for name in names_of(study)}):
            unused.add("unused-row", Place(patient=patient))
        return Added(
            [job.pseudonym for job in found if job.pseudonym in known],
            refused,
            findings.left_out,
            {job.pseudonym: job.study.identity for job in found if job.study.identity is not None},
            studies,
            unused,
        )

    def _lacks_vendor(self, info: CaseInfo) -> bool:
        """Whether a case is to be made again because its vendor may now be known."""
        return self.choices.vendor is not None and info.vendor == UNKNOWN

    def finish(self, refused: Mapping[str, int], left_out: Mapping[str, int], num_unused_rows: int = 0) -> Summary:
        """Record where the scans come from and why others became no case.

        Args:
            refused: Studies refused by all that was added, by reason code.
            left_out: As in `Summary`.
            num_unused_rows: Number of rows of the table of ejection fractions without a study.
        """
        known, details, record = self.destination.known, self.destination.details, self.destination.record
        warnings = Counter(code for name in known for code in details.get(name, {}).get("warnings", []))
        if self.table is not None:
            warnings["unused-row"] = num_unused_rows
        with _readable(self.destination.folder):
            if FROM_FILES in record and known and all(details.get(name, {}).get("synthetic") is True for name in known):
                record["provenance"] = SIMULATED_SCANS.as_json()
                write_json(self.destination.folder / PREPARED_NAME, record)
            summary = Summary(
                len(known),
                len(known) - self.num_known,
                dict(+Counter(refused)),
                dict(+Counter(left_out)),
                dict(+warnings),
                from_json(record["provenance"]),
            )
            counts = {"studies": summary.refused, "left_out": summary.left_out, "warnings": summary.warnings}
            write_json(self.destination.folder / REFUSED_NAME, counts)
        return summary


@contextmanager
def _readable(destination: Path, source: Path | None = None) -> Iterator[None]:
    """Turns what the disk refuses into one line, without the error's own text: it may hold a path below the source."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "input/output error"
        what = f"write {destination}" if source is None else f"read {source} or write {destination}"
        raise UserError(f"cannot {what}: {reason}") from None


def prepare_one(
    job: Job,
    destination: Path,
    expects_ef: bool = False,
    vendor: str | None = None,
    keep_suspected: bool = False,
    contours: str = "drawn",
    segmenter: Path | None = None,
) -> Prepared:
    """Make a study's case and save it; runs in a child process.

    Raises:
        Unusable: The study cannot become a case.
    """
    case, details = make_case(job, expects_ef, vendor, keep_suspected, contours, segmenter)
    save_case(destination, case)
    return Prepared(case.info, details)


def make_case(
    job: Job,
    expects_ef: bool = False,
    vendor: str | None = None,
    keep_suspected: bool = False,
    contours: str = "drawn",
    segmenter: Path | None = None,
) -> tuple[Case, dict[str, Any]]:
    """Read, check and normalise one study: its case, and the entry of `details.json`.

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
    fit = fit_of_contours(cine)
    if fit is not None and fit.is_displaced:
        warnings.append("contours-displaced")
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
    phases = {"num_phases": len(cine.images), "ed_phase": arrays.ed, "es_phase": arrays.es}
    synthetic = {"synthetic": True} if job.study.is_synthetic else {}
    return case, {**phases, **synthetic, "warnings": warnings}
