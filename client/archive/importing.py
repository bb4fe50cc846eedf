"""The loop from an archive to a folder of cases: study by study, resumable, one study on the disk at a time."""

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedcmr.client.archive.archive import Archive, NotFetched
from fedcmr.client.archive.fetching import Fetched, fetch_study
from fedcmr.client.archive.finding import Found, FoundStudy
from fedcmr.client.archive.noted import Named, Noted, Seal
from fedcmr.client.archive.patience import Patience
from fedcmr.client.archive.state import ImportState, Record
from fedcmr.client.deidentify import pseudonym
from fedcmr.client.ingest.burned_in import SUSPECTED
from fedcmr.client.ingest.destination import Destination
from fedcmr.client.ingest.identity import IDENTITY_WARNINGS, identity_warnings
from fedcmr.client.ingest.places import Place, Tally
from fedcmr.client.ingest.prepare import Added, Choices, Preparation, Summary, why_none
from fedcmr.client.ingest.refused_list import LEFT_OUT, LIST_NAME, NOT_FETCHED, REFUSED, Row, rows_of, write_rows
from fedcmr.shared.case import UNKNOWN
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import make_private, private_folder

Progress = Callable[[int, int], None]
"""Told how many of how many studies are done."""


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        summary: As of `prepare`, over all that was ever imported into the folder.
        num_fetched: Studies that this call fetched.
        not_fetched: Studies that the archive did not hand over to this call, by reason code; `summary.refused` has
            them too.
    """

    summary: Summary
    num_fetched: int
    not_fetched: dict[str, int]


def study_name(key: bytes, uid: str) -> str:
    """How the state, and the folder of kept originals, call a study."""
    return pseudonym(key, "study of an archive", uid)


def import_studies(
    archive: Archive,
    found: Found,
    patience: Patience,
    destination: Path,
    choices: Choices,
    *,
    key: bytes | None = None,
    num_processes: int = 1,
    keep: Path | None = None,
    retry_refused: bool = False,
    progress: Progress = lambda done, total: None,
) -> Imported:
    """Fetch studies one by one, make cases of each as `prepare` does, and throw the originals away.

    A study that has been through this is not fetched again. What was fetched lies in a folder of this account alone
    next to `destination`, on its disk, for no longer than its case takes; what a killed call left there is removed by
    the next one.

    `private/refused.csv` in the destination lists what was refused or passed over of all that was ever fetched into it,
    and which studies this call asked for in vain; it is written anew however a call ends but by `kill -9`.

    Guarantees: no name, number, date or UID of a study gets into the destination or a message, but for the folder
    `private`, which is for the site's account alone: there `refused.csv` names patients, and `import.jsonl` does to
    whoever has the key. Not covered: what the pixels show; `keep`.

    Args:
        archive: Where from.
        found: The studies.
        patience: With the archive.
        destination: A folder to make, or one that an earlier call or `prepare --format dicom` made.
        choices: How scans become cases.
        key: Secret for the pseudonyms, as for `prepare`.
        num_processes: Child processes that read the scans.
        keep: Folder that receives the originals of every study that was fetched; None throws them away.
        retry_refused: Fetch studies again that were fetched and refused.
        progress: Is told after every study.

    Raises:
        UserError: There is no case in the end, the archive is not reached any more, or the folders cannot be used.
    """
    if keep is not None and keep.resolve() in (destination.resolve(), *destination.resolve().parents):
        raise UserError(f"--keep {keep}: expected a folder that does not hold {destination}")
    if keep is not None and destination.resolve() in keep.resolve().parents:
        raise UserError(f"--keep {keep}: expected a folder outside {destination}, which holds no identifiers")
    with (
        _scratch(destination) as scratch,
        Preparation(destination, choices, key, num_processes) as preparation,
    ):
        state, seal = ImportState(destination), Seal(preparation.key)
        not_fetched = Tally()
        not_fetched.add_all(found.skipped)
        num_fetched = 0
        try:
            for number, study in enumerate(found.studies, start=1):
                name = study_name(preparation.key, study.uid)
                if not _is_done(state.records.get(name), preparation.destination, choices, retry_refused):
                    try:
                        record = _import_one(archive, study, name, scratch / name, preparation, patience, seal)
                    except NotFetched as error:
                        not_fetched.add(error.code, _place_of(archive, study))
                    else:
                        num_fetched += 1
                        if keep is not None:
                            _keep(scratch / name, keep / name)
                        state.add(record)
                    shutil.rmtree(scratch / name, ignore_errors=True)
                progress(number, len(found.studies))
        finally:  # also for an archive that is gone: the site's people read the list before they try again
            summary = _account(preparation, state, not_fetched)
            write_rows(destination, _rows(state, seal, not_fetched))
    if not summary.num_cases:
        which = f"; which ones: {destination / LIST_NAME}" if summary.refused or summary.left_out else ""
        raise UserError(f"the archive has no usable patient for this query ({why_none(summary, destination)}){which}")
    return Imported(summary, num_fetched, dict(+not_fetched))


def _is_done(record: Record | None, destination: Destination, choices: Choices, retry_refused: bool) -> bool:
    """Whether fetching a study again would change nothing."""
    if record is None:
        return False
    infos = [destination.known.get(name) for name in record.cases]
    if any(info is None or (choices.vendor is not None and info.vendor == UNKNOWN) for info in infos):
        return False
    return not record.refused or not (retry_refused or (choices.keep_suspected and SUSPECTED in record.refused))


def _import_one(
    archive: Archive,
    study: FoundStudy,
    name: str,
    folder: Path,
    preparation: Preparation,
    patience: Patience,
    seal: Seal,
) -> Record:
    """Fetch one study and make its case."""
    fetched = fetch_study(archive, study.uid, folder, preparation.workers, patience)
    added = preparation.add(private_folder(folder))
    added.left_out.add_all(fetched.left_out)
    identities = {case: one.keyed(preparation.key) for case, one in added.identities.items() if case in added.cases}
    sealed = seal.close(_noted(archive, study, fetched, added))
    return Record(name, tuple(added.cases), dict(+added.refused), dict(+added.left_out), identities, sealed)


def _place_of(archive: Archive, study: FoundStudy) -> Place:
    """Where a study is, as far as the archive says it."""
    return Place(archive.where(study.uid), accession=study.accession, study=study.uid)


def _noted(archive: Archive, study: FoundStudy, fetched: Fetched, added: Added) -> Noted:
    """What became of a study, by where it is in the archive and no longer by where its files were."""
    places = [place for _, place in added.refused.places] + [one.place for one in added.studies]
    patient = next((place.patient for place in places if place.patient), "")
    whole = replace(_place_of(archive, study), patient=patient)

    def named(place: Place) -> Place:
        """With what a file that cannot be parsed does not say itself."""
        return Place(
            place.path,
            place.patient or whole.patient,
            place.accession or whole.accession,
            place.study or whole.study,
        )

    def where(row: Row) -> str:
        """The address of the series whose folder a line is about, or of the study."""
        folders = (Path(row.place.path), *Path(row.place.path).parents)
        series = [uid for folder, uid in fetched.series.items() if folder in folders and row.what == LEFT_OUT]
        return archive.where(study.uid, *series)

    refused, left_out = Tally(), Tally()
    for tally, counted in ((refused, added.refused), (left_out, added.left_out)):
        for code, place in counted.places:
            tally.add(code, named(place))
    rows = (row._replace(place=replace(row.place, path=where(row))) for row in rows_of(refused, left_out))
    studies = (
        Named(one.spelt, one.patient, one.study, replace(named(one.place), path=whole.path)) for one in added.studies
    )
    return Noted(tuple(studies), tuple(rows))


def _rows(state: ImportState, seal: Seal, not_fetched: Tally) -> Iterator[Row]:
    """The list of what was refused or passed over: as many as are counted, also where a note is damaged."""
    for record in state.records.values():
        noted = seal.open(record.sealed)
        if noted is not None:
            yield from noted.rows
            continue
        for what, counts in ((REFUSED, record.refused), (LEFT_OUT, record.left_out)):
            yield from (Row(what, code, Place(), number) for code, number in counts.items())
    yield from (Row(NOT_FETCHED, code, place) for code, place in not_fetched.places)


def _account(preparation: Preparation, state: ImportState, not_fetched: Counter[str]) -> Summary:
    """The end: what depends on all studies together, and the counts over all of them."""
    refused, left_out = Counter(not_fetched), Counter[str]()
    for record in state.records.values():
        refused.update(record.refused)
        left_out.update(record.left_out)
    known, details = preparation.destination.known, preparation.destination.details
    identities = {
        name: one for record in state.records.values() for name, one in record.identities.items() if name in known
    }
    for name, codes in identity_warnings(identities, preparation.choices.issuers_differ).items():
        entry = details.get(name)
        if entry is not None:
            # In the order in which `prepare` notes them when it sees all studies at once.
            warnings = [code for code in entry["warnings"] if code not in IDENTITY_WARNINGS]
            first = 1 if warnings[:1] == [SUSPECTED] else 0
            entry["warnings"] = [*warnings[:first], *codes, *warnings[first:]]
    preparation.destination.save()
    return preparation.finish(refused, left_out)


@contextmanager
def _scratch(destination: Path) -> Iterator[Path]:
    """A folder for what is fetched, next to the destination, empty before and gone after.

    Raises:
        UserError: Another import into the same destination has it.
    """
    folder = private_folder(destination.resolve().with_name(f"{destination.resolve().name}.fetching"))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another import into {destination} is at work: wait for it, or end it") from None
        for left in folder.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _keep(folder: Path, target: Path) -> None:
    """Move a study's originals to where they are kept, whole or not at all."""
    private_folder(target.parent)
    partial = target.with_name(target.name + ".partial")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    shutil.move(folder, partial)
    make_private(partial)
    partial.rename(target)
