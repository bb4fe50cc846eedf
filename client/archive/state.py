"""Which studies of an archive have been through `prepare`, and what became of them: one line each, added at the end.

All that is known of a study stands in its one line, so that a crash leaves all of it or nothing.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcmr.client.ingest.identity import Identity
from fedcmr.shared.file_names import PRIVATE_NAME
from fedcmr.shared.permissions import private_folder, private_opener

STATE_NAME = f"{PRIVATE_NAME}/import.jsonl"


@dataclass(frozen=True)
class Record:
    """What became of a study.

    Attributes:
        study: Keyed hash of its UID: without the site's key it says nothing.
        cases: Pseudonyms of its cases.
        refused: Studies refused, by reason code.
        left_out: Files, or series of a usable study, by reason code.
        identities: What it says about its patient, keyed, by pseudonym of the case.
        sealed: What `noted.Seal` made of the names in it.
    """

    study: str
    cases: tuple[str, ...] = ()
    refused: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    identities: Mapping[str, Identity] = field(default_factory=dict, repr=False)
    sealed: str = field(default="", repr=False)


class ImportState:
    """The records of a folder of cases.

    A line that was cut by a crash, or that cannot be read, stands for a study that is fetched again.
    """

    def __init__(self, folder: Path) -> None:
        """Read what earlier calls wrote; the last line of a study counts."""
        self.path = folder / STATE_NAME
        self.records: dict[str, Record] = {}
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            content = b""
        self.is_cut = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            record = _parsed(line)
            if record is not None:
                self.records[record.study] = record

    def add(self, record: Record) -> None:
        """Write a record, and have it on the disk before this returns."""
        self.records[record.study] = record
        private_folder(self.path.parent)
        with open(self.path, "ab", opener=private_opener) as file:
            file.write((b"\n" if self.is_cut else b"") + _line(record))
            file.flush()
            os.fsync(file.fileno())
        self.is_cut = False


def _line(record: Record) -> bytes:
    identities = {
        name: {
            "patient": one.patient,
            "number": one.number,
            "names": sorted(one.names),
            "birth_dates": sorted(one.birth_dates),
            "sexes": sorted(one.sexes),
            "persons": sorted(map(list, one.persons)),
            "issuers": sorted(one.issuers),
        }
        for name, one in record.identities.items()
    }
    content = {
        "study": record.study,
        "cases": list(record.cases),
        "refused": dict(record.refused),
        "left_out": dict(record.left_out),
        "identities": identities,
        "sealed": record.sealed,
    }
    return json.dumps(content, sort_keys=True).encode() + b"\n"


def _parsed(line: bytes) -> Record | None:
    """A record, or None for a line that is none."""
    try:
        content: dict[str, Any] = json.loads(line)
        identities = {
            str(name): Identity(
                str(one["patient"]),
                str(one["number"]),
                frozenset(map(str, one["names"])),
                frozenset(map(str, one["birth_dates"])),
                frozenset(map(str, one["sexes"])),
                frozenset((str(person), str(birth_date)) for person, birth_date in one["persons"]),
                frozenset(map(str, one["issuers"])),
            )
            for name, one in content["identities"].items()
        }
        refused, left_out = (
            {str(code): int(number) for code, number in content[kind].items()} for kind in ("refused", "left_out")
        )
        cases = tuple(map(str, content["cases"]))
        return Record(str(content["study"]), cases, refused, left_out, identities, str(content["sealed"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
