"""Tokens by which sites may fetch: shown once, and kept as hashes only."""

import hashlib
import hmac
import json
import secrets
from pathlib import Path

from server.deployment.authority import write_secret
from shared.errors import UserError
from shared.records import SITE_NAME

TOKENS_NAME = "delivery/tokens.json"


def issue_token(folder: Path, site: str) -> str:
    """A new token for a site; an earlier one of the same site is void from now on.

    Args:
        folder: The coordinator's; `delivery/tokens.json` in it holds the SHA-256 of every site's token.
        site: Its name.
    """
    if not SITE_NAME.fullmatch(site):
        raise UserError(f"Expected the site's name to match {SITE_NAME.pattern}, got {site!r}.")
    token = secrets.token_urlsafe(32)
    _write(folder, {**read_tokens(folder), site: _digest(token)})
    return token


def revoke_token(folder: Path, site: str) -> None:
    """Void a site's token.

    Raises:
        UserError: It has none.
    """
    tokens = read_tokens(folder)
    if tokens.pop(site, None) is None:
        raise UserError(f"{folder / TOKENS_NAME}: site {site} has no token")
    _write(folder, tokens)


def read_tokens(folder: Path) -> dict[str, str]:
    """{site: SHA-256 of its token}; empty where none was issued.

    Raises:
        UserError: The file cannot be read.
    """
    path = folder / TOKENS_NAME
    try:
        return {str(site): str(digest) for site, digest in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path} cannot be read: restore it, or remove it and issue the tokens anew") from None


def site_of(folder: Path, token: str) -> str | None:
    """Whose token this is; None for nobody's. Takes as long for a wrong one as for a right one."""
    digest, found = _digest(token), None
    for site, known in read_tokens(folder).items():
        if hmac.compare_digest(digest, known):
            found = site
    return found


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _write(folder: Path, tokens: dict[str, str]) -> None:
    (folder / TOKENS_NAME).parent.mkdir(exist_ok=True, mode=0o700)
    write_secret(folder / TOKENS_NAME, json.dumps(tokens, indent=2).encode())
