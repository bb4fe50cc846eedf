"""Who may fetch: a token for each site, of which the coordinator's folder keeps only the SHA-256.

Tokens have 256 random bits, so a plain hash is enough: they cannot be guessed or recovered from the file.
"""

import hashlib
import hmac
import json
import secrets
from pathlib import Path

from fedcmr.server.deployment.authority import write_secret
from fedcmr.shared.errors import UserError
from fedcmr.shared.records import SITE_NAME

TOKENS_NAME = "tokens.json"
PREFIX = "fedcmr_"
"""Prefix by which people and secret scanners recognise a token."""


class TokenBook:
    """The tokens of a coordinator's folder, read again when their file changes: a revoked one is refused at once."""

    def __init__(self, folder: Path):
        self._path = tokens_path(folder)
        self._read_from: tuple[int, int, int] | None = None
        self._hashes: dict[str, str] = {}

    def site_of(self, token: str) -> str | None:
        """The site of this token; None for an unknown one, and for any while the file cannot be read."""
        digest = _digest(token)
        found = None
        # Every entry is compared in constant time, so that the duration discloses nothing about any hash.
        for site, known in self._current().items():
            if hmac.compare_digest(digest, known):
                found = site
        return found

    def _current(self) -> dict[str, str]:
        try:
            state = self._path.stat()
            version = (state.st_mtime_ns, state.st_size, state.st_ino)
            if version != self._read_from:
                self._hashes, self._read_from = read_tokens(self._path), version
        except (OSError, UserError):
            self._hashes, self._read_from = {}, None
        return self._hashes


def tokens_path(folder: Path) -> Path:
    """The tokens' file in a coordinator's folder."""
    return folder / "delivery" / TOKENS_NAME


def read_tokens(path: Path) -> dict[str, str]:
    """SHA-256 of every site's token, in hexadecimal digits.

    Raises:
        UserError: The file cannot be read, has another format, or other users can read it.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise UserError(f"{path} can be read by others: correct it with 'chmod 600 {path}'")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not all(SITE_NAME.fullmatch(site) and len(bytes.fromhex(digest)) == 32 for site, digest in values.items()):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path} is missing: 'fedcmr-server token' makes it with the first site's token") from None
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{path} cannot be read: expected site names and SHA-256s; restore or remove it") from None
    return dict(values)


def issue_token(folder: Path, site: str) -> str:
    """A new token for a site; an earlier one of the same site is refused from now on.

    Returns:
        The token. It is stored nowhere else: a site that loses it needs a new one.

    Raises:
        UserError: The name is not valid, or the file cannot be read.
    """
    if not SITE_NAME.fullmatch(site):
        raise UserError(f"Expected --site to match {SITE_NAME.pattern}, got {site!r}.")
    token = PREFIX + secrets.token_urlsafe(32)
    _write(folder, _read_or_empty(folder) | {site: _digest(token)})
    return token


def revoke_token(folder: Path, site: str) -> None:
    """Revoke a site's token; its running streams end too.

    Raises:
        UserError: The site has none.
    """
    known = _read_or_empty(folder)
    if site not in known:
        raise UserError(f"{tokens_path(folder)}: site {site!r} has no token; with one: {', '.join(sorted(known))}")
    del known[site]
    _write(folder, known)


def _read_or_empty(folder: Path) -> dict[str, str]:
    path = tokens_path(folder)
    return read_tokens(path) if path.exists() else {}


def _write(folder: Path, hashes: dict[str, str]) -> None:
    path = tokens_path(folder)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_secret(path, json.dumps(hashes, indent=2, sort_keys=True).encode())


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
