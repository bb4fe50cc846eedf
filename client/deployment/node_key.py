"""The key by which the server knows a site: made at the site, and only its public half leaves it."""

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedcmr.shared.errors import UserError

KEY_NAME = "node_key"


def make_node_key(site: Path) -> Path:
    """Write `node_key` (ECDSA P-384, in OpenSSH's format, for this user's eyes only) and `node_key.pub`.

    A key that is there stays: the coordinator has registered it.

    Returns:
        The public key's file.
    """
    path, public = site / KEY_NAME, site / f"{KEY_NAME}.pub"
    if path.exists() and public.exists():
        return public
    key = ec.generate_private_key(ec.SECP384R1())
    text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(text)
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    return public


def checked_node_key(site: Path) -> Path:
    """The private key's file.

    Raises:
        UserError: It is missing, or others can read it.
    """
    path = site / KEY_NAME
    if not path.is_file():
        raise UserError(f"{path} is missing: 'fedcmr-client key {site}' makes it; the coordinator registers its .pub")
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by others: remedy: 'chmod 600 {path}'")
    return path
