"""The loop from an archive to a folder of cases: study by study, resumable, one study on the disk at a time."""

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedcmr.client.archive.archive import Archive, NotFetched
from fedcmr.client.archive.fetching import fetch_study
from fedcmr.client.archive.finding import Found, FoundStudy
from fedcmr.client.archive.patience import Patience
from fedcmr.client.archive.state import ImportState, Record
from fedcmr.client.deidentify import pseudonym
from fedcmr.client.ingest.burned_in import SUSPECTED
from fedcmr.client.ingest.destination import Destination
from fedcmr.client.ingest.identity import IDENTITY_WARNINGS, identity_warnings
from fedcmr.client.ingest.prepare import Choices, Preparation, Summary, why_none
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

    Guarantees: no name, number, date or UID of a study gets into the destination or a message. Not covered: what the
    pixels show; `keep`.

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
        state = ImportState(destination)
        not_fetched = Counter(found.skipped)
        num_fetched = 0
        for number, study in enumerate(found.studies, start=1):
            name = study_name(preparation.key, study.uid)
            if not _is_done(state.records.get(name), preparation.destination, choices, retry_refused):
                try:
                    record = _import_one(archive, study, name, scratch / name, preparation, patience)
                except NotFetched as error:
                    not_fetched[error.code] += 1
                else:
                    num_fetched += 1
                    if keep is not None:
                        _keep(scratch / name, keep / name)
                    state.add(record)
                shutil.rmtree(scratch / name, ignore_errors=True)
            progress(number, len(found.studies))
        summary = _account(preparation, state, not_fetched)
    if not summary.num_cases:
        raise UserError(f"the archive has no usable patient for this query ({why_none(summary, destination)})")
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
    archive: Archive, study: FoundStudy, name: str, folder: Path, preparation: Preparation, patience: Patience
) -> Record:
    """Fetch one study and make its case."""
    left_in_archive = fetch_study(archive, study.uid, folder, preparation.workers, patience)
    added = preparation.add(private_folder(folder))
    left_out = added.left_out + left_in_archive
    identities = {case: one.keyed(preparation.key) for case, one in added.identities.items() if case in added.cases}
    return Record(name, tuple(added.cases), dict(+added.refused), dict(+left_out), identities)


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
