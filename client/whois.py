"""Who is behind a pseudonym: for whoever holds the site's key.

No file links pseudonyms and patients. Each study's pseudonym is computed with the key, from the scans that `prepare`
was given, which are read again, and from what an import has noted, which that key alone opens.
"""

import hmac
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcmr.client.archive.noted import Named, Seal
from fedcmr.client.archive.state import ImportState
from fedcmr.client.deidentify import KEY_CHECK, pseudonym
from fedcmr.client.ingest.cine import Study
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.layouts.layout import Options
from fedcmr.client.ingest.places import Place
from fedcmr.client.ingest.refused_list import sources_of
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PREPARED_NAME

PSEUDONYM = re.compile(r"p[0-9a-f]{16}")


@dataclass(frozen=True)
class Traced:
    """A study behind a pseudonym.

    Attributes:
        pseudonym: As it was asked for, of a case or of a patient.
        place: Where the study lies, of an import where the archive has it; and what its files call it.
    """

    pseudonym: str
    place: Place = field(repr=False)


def trace(
    destination: Path,
    pseudonyms: Sequence[str],
    key: bytes,
    sources: Sequence[Path] = (),
    num_processes: int = 1,
) -> list[Traced]:
    """The studies behind pseudonyms of cases, and all studies behind those of patients (`group` in `cases.csv`).

    Args:
        destination: The folder that `prepare` or `import` made.
        pseudonyms: As in `cases.csv`, `check.html` or a file's name.
        key: The one that the folder was prepared with.
        sources: Folders of scans, read besides what imports have noted; by default those that the folder was prepared
            from.
        num_processes: Child processes that read the headers.

    Returns:
        In the order of the pseudonyms; nothing for one that no study has.

    Raises:
        UserError: Another key, a text that is no pseudonym, or a folder that cannot be read.
    """
    settings = _settings(destination)
    if not hmac.compare_digest(str(settings.get("key_check")), pseudonym(key, KEY_CHECK)):
        raise UserError(f"{destination} was prepared with another key: give the right one with --key")
    for name in pseudonyms:
        if not PSEUDONYM.fullmatch(name):
            raise UserError("expected pseudonyms as in cases.csv, p and 16 of 0-9 and a-f; got something else")
    sources = [*(sources or sources_of(destination))]
    state = ImportState(destination)
    if not sources and not state.records:
        raise UserError(f"{destination} does not note which scans it was prepared from: give them with --source")
    found: dict[str, list[Place]] = {name: [] for name in pseudonyms}
    studies: list[Named | Study] = [*_imported(state, key), *_in_scans(sources, settings, num_processes)]
    for study in studies:
        for name in {pseudonym(key, study.spelt, study.study), pseudonym(key, study.patient)} & found.keys():
            found[name].append(study.place)
    return [Traced(name, place) for name, places in found.items() for place in _once(places)]


def _imported(state: ImportState, key: bytes) -> Iterator[Named]:
    """The studies that imports have noted; a note that is damaged is passed over."""
    seal = Seal(key)
    for record in state.records.values():
        noted = seal.open(record.sealed)
        yield from () if noted is None else noted.studies


def _in_scans(sources: Iterable[Path], settings: dict[str, Any], num_processes: int) -> Iterator[Study]:
    """The studies of folders of scans.

    Raises:
        UserError: A folder is not there.
    """
    layout = LAYOUTS[settings["format"]]
    options = Options(
        settings.get("folds"),
        None if settings.get("labels") is None else {int(n): label for n, label in settings["labels"].items()},
        bool(settings.get("one_study_one_patient")),
        bool(settings.get("issuers_differ")),
        settings.get("axes"),
    )
    with Workers(num_processes) as workers:
        for source in sources:
            if not source.is_dir():
                raise UserError(f"{source}, which holds the scans, is not there: mount it, or give it with --source")
            yield from layout.find(source, options, workers).studies


def _once(places: Iterable[Place]) -> list[Place]:
    """Each place once, also where one folder of scans lies within another."""
    return list(dict.fromkeys(places))


def _settings(destination: Path) -> dict[str, Any]:
    """What `prepared.json` says."""
    path = destination / PREPARED_NAME
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{destination} was not made by 'fedcmr-client prepare' or 'import'") from None
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict) or settings.get("format") not in LAYOUTS:
        raise UserError(f"{path} is damaged or of another version")
    return settings
