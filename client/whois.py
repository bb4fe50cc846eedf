"""Who is behind a pseudonym: for whoever holds the site's key and the scans.

No file links pseudonyms and patients. The scans are read again, and each study's pseudonym is computed with the key.
"""

import hmac
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcmr.client.deidentify import KEY_CHECK, pseudonym
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
        place: Where the study lies, and what its files call it.
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
        destination: The folder that `prepare` made.
        pseudonyms: As in `cases.csv`, `check.html` or a file's name.
        key: The one that the folder was prepared with.
        sources: Folders of scans; by default those that the folder was prepared from.
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
    if not sources:
        raise UserError(f"{destination} does not note which scans it was prepared from: give them with --source")
    layout = LAYOUTS[settings["format"]]
    options = Options(
        settings.get("folds"),
        None if settings.get("labels") is None else {int(n): label for n, label in settings["labels"].items()},
        bool(settings.get("one_study_one_patient")),
        bool(settings.get("issuers_differ")),
        settings.get("axes"),
    )
    found: dict[str, list[Place]] = {name: [] for name in pseudonyms}
    with Workers(num_processes) as workers:
        for source in sources:
            if not source.is_dir():
                raise UserError(f"{source}, which holds the scans, is not there: mount it, or give it with --source")
            for study in layout.find(source, options, workers).studies:
                names = {pseudonym(key, study.spelt, study.study), pseudonym(key, study.patient)}
                for name in names & found.keys():
                    found[name].append(study.place)
    return [Traced(name, place) for name, places in found.items() for place in _once(places)]


def _once(places: Iterable[Place]) -> list[Place]:
    """Each place once, also where one folder of scans lies within another."""
    return list(dict.fromkeys(places))


def _settings(destination: Path) -> dict[str, Any]:
    """What `prepared.json` says."""
    path = destination / PREPARED_NAME
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{destination} was not made by 'fedcmr-client prepare'") from None
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict) or settings.get("format") not in LAYOUTS:
        raise UserError(f"{path} is damaged or of another version")
    return settings
