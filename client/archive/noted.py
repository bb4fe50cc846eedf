"""Whose studies an import has fetched: noted for the site itself, sealed with the key of its pseudonyms.

`prepare` needs no such note, for its scans stay where they are. An import throws them away, and the archive is not
always there: what the site's list of refused studies tells, and what `whois` computes pseudonyms from, is kept here.
"""

import base64
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcmr.client.ingest.places import Place
from fedcmr.client.ingest.refused_list import Row

PURPOSE = b"fedcmr: notes of an import"


@dataclass(frozen=True)
class Named:
    """A study as its files name it.

    Attributes:
        spelt: The patient's number as there.
        patient: The same brought to one spelling.
        study: StudyInstanceUID.
        place: Where it is, and what its files call it.
    """

    spelt: str = field(repr=False)
    patient: str = field(repr=False)
    study: str = field(repr=False)
    place: Place = field(repr=False)


@dataclass(frozen=True)
class Noted:
    """What is noted of a study that was fetched.

    Attributes:
        studies: What looked like a study with a short-axis cine in it.
        rows: Its lines in the list of what was refused or passed over.
    """

    studies: tuple[Named, ...] = field(default=(), repr=False)
    rows: tuple[Row, ...] = field(default=(), repr=False)


class Seal:
    """Encrypts notes and decrypts them (Fernet: AES-128-CBC and HMAC-SHA256).

    Guarantees: without the site's key a sealed note says nothing but how long it is, and cannot be changed unnoticed.
    Not covered: whoever has the key and the notes knows every patient behind the cases, without the scans.
    """

    def __init__(self, key: bytes) -> None:
        """Derive a key of its own (RFC 5869): pseudonyms, which others see, are computed with the site's."""
        derived = HKDF(SHA256(), length=32, salt=None, info=PURPOSE).derive(key)
        self._fernet = Fernet(base64.urlsafe_b64encode(derived))

    def close(self, noted: Noted) -> str:
        """The note as a text that says nothing."""
        # A number need not be UTF-8 in a damaged file: JSON writes lone surrogates as escapes, and reads them again.
        return self._fernet.encrypt(json.dumps(asdict(noted)).encode("ascii")).decode("ascii")

    def open(self, sealed: str) -> Noted | None:
        """The note, or None where it was sealed with another key, or is damaged."""
        try:
            content: dict[str, Any] = json.loads(self._fernet.decrypt(sealed.encode()))
        except (InvalidToken, ValueError):
            return None
        studies = (Named(**{**one, "place": Place(**one["place"])}) for one in content["studies"])
        rows = (Row(what, code, Place(**place), number) for what, code, place, number in content["rows"])
        return Noted(tuple(studies), tuple(rows))
