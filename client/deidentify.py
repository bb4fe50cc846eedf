"""Pseudonyms by keyed hash: the same patient always gets the same one, and only the site's key links the two."""

import hashlib
import hmac
import os
import secrets
import unicodedata
from pathlib import Path

from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.plain_files import read_plain

KEY_NAME = "pseudonym.key"
KEY_BYTES = 32
MAX_KEY_BYTES = 4096
KEY_CHECK = "key check"
"""What a prepared folder holds the pseudonym of, so that another key is told from its own."""


def pseudonym(key: bytes, *identity: str) -> str:
    """HMAC-SHA256 (RFC 2104) of what identifies a patient or a study, cut to 64 bits.

    Guarantees: without the key a pseudonym says nothing about the identity, also to someone who can list all patient
    numbers of a hospital. Not covered: whoever holds the key can confirm a guess, so the key stays at the site.

    Args:
        key: The site's secret.
        identity: For example the PatientID, or the PatientID and the StudyInstanceUID.
    """
    # A file's name need not be UTF-8: Python then holds lone surrogates, over which a strict encoder stumbles, aloud.
    text = "\0".join(identity).encode("utf-8", "surrogatepass")
    digest = hmac.new(key, text, hashlib.sha256).hexdigest()
    return f"p{digest[:16]}"


def same_patient(patient_id: str) -> str:
    """What a PatientID (0010,0020; PS3.3 C.7.1.1) has in common with the same number spelt otherwise.

    Systems pad a number with zeros or spaces and hang the issuer behind it: `0012345`, `12345` and `12345^MRN` are one
    patient, whose scans are clipped as one. Letters count, also their case; a letter and its accent are one, written
    together or apart.
    """
    patient_id = unicodedata.normalize("NFC", patient_id)
    number = next((part.strip() for part in patient_id.split("^") if part.strip()), "")
    return number.lstrip("0") or number[:1]


def read_key(path: Path) -> bytes:
    """The key in a file of hexadecimal digits.

    Raises:
        UserError: There is no such file, or it holds no key.
    """
    try:
        key = bytes.fromhex(read_plain(path, MAX_KEY_BYTES).decode("ascii").strip())
    except FileNotFoundError:
        raise UserError(f"key file {path} does not exist: give the one that earlier cases were prepared with") from None
    except (OSError, ValueError):
        raise UserError(f"key file {path} is not readable hexadecimal text") from None
    if len(key) < KEY_BYTES:
        raise UserError(f"key file {path} holds {len(key)} bytes, expected at least {KEY_BYTES}")
    return key


def read_or_make_key(folder: Path) -> bytes:
    """The site's key `folder/pseudonym.key`, made on first use and readable by its owner only."""
    path = folder / KEY_NAME
    private_folder(folder)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_key(path)
    key = secrets.token_bytes(KEY_BYTES)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key.hex() + "\n")
    return key
