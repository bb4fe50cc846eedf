"""Who the site is for its archive: certificates, a token or a password, each from a file of this account alone."""

import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import OTHERS
from fedcmr.shared.plain_files import read_plain

MAX_SECRET_BYTES = 16_384
TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Certificates:
    """Files for TLS, in PEM.

    Attributes:
        ca: Authorities that are trusted, instead of the system's.
        certificate: Of this site, for an archive that asks for one.
        key: Of the certificate.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        """Look at the files before anything is connected."""
        if (self.certificate is None) != (self.key is None):
            raise UserError("--client-cert and --client-key belong together: give both or none")
        if self.key is not None:
            _check_private(self.key, "--client-key")
        self.client_context()

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return self.ca is not None or self.certificate is not None

    def client_context(self) -> ssl.SSLContext:
        """TLS to a server whose name and authority are checked.

        Raises:
            UserError: A file cannot be read, or is none.
        """
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
        except (OSError, ssl.SSLError):
            raise UserError(f"--ca {self.ca}: expected certificates in PEM") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return self._with_certificate(context)

    def server_context(self) -> ssl.SSLContext:
        """TLS for an archive that connects to this machine; it has to show a certificate where `ca` is given.

        Raises:
            UserError: There is no certificate of this site.
        """
        if self.certificate is None:
            raise UserError(
                "--own-aet NAME:PORT over TLS: expected --client-cert and --client-key too, because the archive "
                "connects to this machine; or leave :PORT out, and images come over this machine's own connection"
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca is not None:
            context.load_verify_locations(cafile=str(self.ca))
            context.verify_mode = ssl.CERT_REQUIRED
        return self._with_certificate(context)

    def _with_certificate(self, context: ssl.SSLContext) -> ssl.SSLContext:
        if self.certificate is not None:
            try:
                context.load_cert_chain(str(self.certificate), str(self.key), password="")
            except (OSError, ssl.SSLError):
                raise UserError(
                    f"--client-cert {self.certificate}, --client-key {self.key}: expected a certificate and its key in "
                    "PEM, without a password"
                ) from None
        return context


def read_token(path: Path) -> str:
    """The bearer token of a file (RFC 6750).

    Raises:
        UserError: The file cannot be read, others can read it too, or it holds no token.
    """
    token = _read_secret(path, "--token-file")
    if not TOKEN.fullmatch(token):
        raise UserError(f"--token-file {path}: expected one line, the token alone")
    return token


def read_login(path: Path) -> tuple[str, str]:
    """User and password of a file that holds USER:PASSWORD (RFC 7617).

    Raises:
        UserError: The file cannot be read, others can read it too, or it holds something else.
    """
    user, colon, password = _read_secret(path, "--login-file").partition(":")
    if not (user and colon and password) or not (user + password).isprintable():
        raise UserError(f"--login-file {path}: expected one line, USER:PASSWORD")
    return user, password


def _read_secret(path: Path, option: str) -> str:
    """The text of a small file of this account alone."""
    _check_private(path, option)
    try:
        return read_plain(path, MAX_SECRET_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{option} {path}: expected a readable text file") from None


def _check_private(path: Path, option: str) -> None:
    """Refuse a secret that others can read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}: give a file that this account can read") from None
    if mode & OTHERS:
        raise UserError(f"{option} {path} can be read by others: correct it with 'chmod 600 {path}'")
