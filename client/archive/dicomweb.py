"""An archive that speaks DICOMweb: QIDO-RS and WADO-RS (PS3.18, 10.6 and 10.4)."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from dicomweb_client.api import DICOMwebClient
from pydicom.datadict import tag_for_keyword
from pydicom.uid import ExplicitVRLittleEndian

from fedcmr.client.archive.archive import Answered, Broken, Level
from fedcmr.client.archive.credentials import Certificates
from fedcmr.client.archive.multipart import boundary_of, save_parts
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_opener

LEVELS: tuple[Level, ...] = ("STUDY", "SERIES", "IMAGE")
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
CONNECT_S = 10.0
PAGE = 500
"""Rows of an answer to ask for at once."""
CHUNK_BYTES = 2**20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BUSY = (408, 429, 502, 503, 504)
"""Statuses of a server, or of a proxy before it, that may answer later."""
TUNNEL = re.compile(r"Tunnel connection failed: ([0-9]{3})")
"""How `http.client` says what a proxy answers to CONNECT."""


class _Session(requests.Session):
    """A session whose own certificates and credentials go before those that the environment names."""

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        settings = dict(super().merge_environment_settings(url, proxies, stream, verify, cert))
        if self.verify is not True:
            settings["verify"] = self.verify
        parts = urlsplit(str(url))
        if parts.scheme == "http" and parts.hostname in LOOPBACK:
            settings["proxies"] = {}  # a proxy would read the secret that may go to this machine in clear
        return settings


class _Bearer(requests.auth.AuthBase):
    """A token in every request; as `auth`, so that a netrc does not replace it."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class DicomWebArchive:
    """An archive by the root of its DICOMweb service."""

    def __init__(
        self,
        url: str,
        certificates: Certificates,
        token: str | None = None,
        login: tuple[str, str] | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: What stands before `/studies`.
            certificates: For TLS.
            token: Bearer token; None for none.
            login: User and password; None for those of the account's netrc, if it names the host.
            timeout_s: Longest silence.

        Raises:
            UserError: The address cannot be one, or credentials would travel in clear.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise UserError("--dicomweb: expected https://HOST/PATH, without user, password or query")
        self.url = url.rstrip("/")
        session = _Session()
        session.auth = _Bearer(token) if token is not None else login
        session.verify = True if certificates.ca is None else str(certificates.ca)
        if certificates.certificate is not None:
            session.cert = (str(certificates.certificate), str(certificates.key))
        secret = session.auth is not None or requests.utils.get_netrc_auth(url) is not None
        if secret and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise UserError("--dicomweb: expected https:// with a token or a password, which http sends in clear")
        self.session, self.timeout = session, (CONNECT_S, timeout_s)
        self.client = DICOMwebClient(self.url, session, permissive_uid=True, timeout=self.timeout)
        self.client.set_http_retry_params(retry=False)  # `Patience` repeats

    def find(self, level: Level, match: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """See `Archive`."""
        above = {"STUDY": (), "SERIES": ("StudyInstanceUID",), "IMAGE": ("StudyInstanceUID", "SeriesInstanceUID")}[
            level
        ]
        uids = [match[keyword] for keyword in above]
        filters = {keyword: value for keyword, value in match.items() if value and keyword not in above}
        fields = [keyword for keyword, value in match.items() if not value]
        search: Any = {
            "STUDY": self.client.search_for_studies,
            "SERIES": self.client.search_for_series,
            "IMAGE": self.client.search_for_instances,
        }[level]
        own = UIDS[len(above)]
        seen: set[str] = set()
        while True:
            # Pages until one brings nothing new: servers have limits of their own, and some pass over the offset.
            try:
                page = search(*uids, fields=fields, search_filters=filters, limit=PAGE, offset=len(seen))
            except (requests.RequestException, ValueError) as error:
                raise self._trouble(error, level) from None
            rows = [_texts(one, match) for one in page if isinstance(one, dict)]
            rows = [row for row in rows if row.get(own) and row[own] not in seen]
            if not rows:
                return
            seen |= {row[own] for row in rows}
            yield from rows

    def fetch(
        self, study_uid: str, series_uid: str, wanted: Collection[str], folder: Path, uncompressed: bool = False
    ) -> None:
        """See `Archive`."""
        for syntax in (str(ExplicitVRLittleEndian),) if uncompressed else ("*", str(ExplicitVRLittleEndian)):
            try:
                with self.session.get(
                    self.where(study_uid, series_uid),
                    headers={"Accept": f'multipart/related; type="application/dicom"; transfer-syntax={syntax}'},
                    stream=True,
                    timeout=self.timeout,
                ) as answer:
                    if answer.status_code in (400, 406) and syntax == "*":
                        continue  # a server from before `*` was in the standard: the default is lossless as well
                    answer.raise_for_status()
                    self._save(answer, folder)
                    return
            except requests.RequestException as error:
                raise self._trouble(error, "IMAGE") from None

    def _save(self, answer: requests.Response, folder: Path) -> None:
        """Write what a server sends; some send a single image as it is."""
        content_type = answer.headers.get("Content-Type", "")
        boundary = boundary_of(content_type)
        chunks = answer.iter_content(CHUNK_BYTES)
        if boundary is not None:
            save_parts(chunks, boundary, folder)
        elif content_type.lower().startswith("application/dicom"):
            with open(folder / "000000.dcm", "wb", opener=private_opener) as file:
                for chunk in chunks:
                    file.write(chunk)
        elif answer.status_code != 204:
            raise Answered("archive-error", "no DICOM in its answer", passing=True)

    def where(self, study_uid: str, series_uid: str = "") -> str:
        """See `Archive`."""
        return f"{self.url}/studies/{study_uid}" + (f"/series/{series_uid}" if series_uid else "")

    def close(self) -> None:
        """See `Archive`."""
        self.session.close()

    def _trouble(self, error: Exception, level: Level) -> Exception:
        """What a failed request means, without the address asked: it holds the study's UID."""
        if isinstance(error, requests.exceptions.SSLError):
            return self._untrusted(str(error))
        if isinstance(error, requests.exceptions.ProxyError):
            return self._by_proxy(str(error))
        if isinstance(error, requests.exceptions.ConnectTimeout):
            return Broken("no answer to the connection")
        if isinstance(error, requests.exceptions.Timeout):
            return Broken(f"silent for {self.timeout[1]:g} s")
        if isinstance(error, requests.HTTPError) and error.response is not None:
            if error.response.status_code == 400 and "SSL certificate" in error.response.text[:CHUNK_BYTES]:
                return self._wants_certificate()  # as nginx says it, after the handshake
            return self._answer(error.response.status_code, level)
        if isinstance(error, (requests.exceptions.JSONDecodeError, ValueError)):
            return self._no_search("its answer is no JSON")
        text = str(error).lower()
        if "alert" in text:
            return self._untrusted(text)
        refused = "refused" if "refused" in text else None
        unknown = "unknown host" if "name or service" in text or "resolve" in text else None
        return Broken(refused or unknown or self._cut_off())

    def _cut_off(self) -> str:
        """A connection that ends without an answer."""
        # TLS 1.3: some gateways say nothing to whoever has shown the wrong certificate.
        asks = "; if it asks for a certificate of this site, give --client-cert and --client-key as it wants them"
        return "the connection broke" + (asks if self.url.startswith("https") else "")

    def _by_proxy(self, text: str) -> Exception:
        """What failed on the way through the proxy that the environment names."""
        parts = urlsplit(self.url)
        address = urlsplit(requests.utils.select_proxy(self.url, requests.utils.get_environ_proxies(self.url)) or "")
        # Without user and password, which its address may hold.
        where = f"{address.hostname}:{address.port}" if address.port else address.hostname
        given = {name.upper() for name, value in os.environ.items() if value}
        named = "ALL_PROXY" if f"{parts.scheme}_proxy".upper() not in given else f"{parts.scheme}_proxy".upper()
        proxy = f"the proxy {where}, which {named} names,"
        past = f"; where {parts.hostname} is reached without it, set NO_PROXY={parts.hostname}"
        answer = TUNNEL.search(text)
        status = 0 if answer is None else int(answer[1])
        if status == 407:
            return UserError(f"{proxy} asks who you are (HTTP 407): put USER:PASSWORD@ before {where} in {named}{past}")
        if status and status not in BUSY:
            return UserError(f"{proxy} refuses to connect to {parts.netloc} (HTTP {status}): have it allowed{past}")
        if status:
            return Broken(f"{proxy} answers HTTP {status}{past}")
        lower = text.lower()
        if "aborted" in lower or "reset" in lower or "remote end closed" in lower or "eof occurred" in lower:
            return Broken(f"by way of {proxy.removesuffix(',')}: {self._cut_off()}{past}")
        return Broken(f"{proxy} does not answer{past}")

    def _answer(self, status: int, level: Level) -> Exception:
        """What an HTTP status means."""
        if status == 401:
            return UserError(
                f"{self.url} asks who you are (HTTP 401): give --token-file or --login-file, or an entry in ~/.netrc; "
                "where one is given it is wrong or has run out"
            )
        if status == 407:
            return self._by_proxy("Tunnel connection failed: 407")
        if status == 403:
            return UserError(f"{self.url} does not allow it (HTTP 403): ask for the right to search and retrieve")
        if status in BUSY:
            return Broken(f"HTTP {status}")
        if level == "STUDY" and (status in (404, 405, 501) or status // 100 == 3):
            return self._no_search(f"HTTP {status}")
        if status in (404, 410):
            return Answered("study-vanished", f"HTTP {status}")
        return Answered("archive-error", f"HTTP {status}", passing=status >= 500)

    def _no_search(self, why: str) -> UserError:
        return UserError(
            f"{self.url} answers no search for studies (QIDO-RS; {why}): give the root of the DICOMweb service, what "
            "stands before /studies; or, where the archive has none, use --dimse"
        )

    def _wants_certificate(self) -> UserError:
        return UserError(
            f"{self.url} asks for a certificate of this site, or does not take the one given: give --client-cert and "
            "--client-key, signed by an authority that the archive trusts"
        )

    def _untrusted(self, text: str) -> Exception:
        """A failed handshake."""
        lower = text.lower()
        if "alert" in lower:
            return self._wants_certificate()
        if "wrong_version_number" in lower or "wrong version number" in lower or "record layer" in lower:
            return UserError(f"{self.url} speaks no TLS: is the port right, or is it http://?")
        why = "has expired" if "expired" in lower else "is of another name" if "mismatch" in lower else "is not trusted"
        return UserError(
            f"{self.url}: the server's certificate {why}: give the authority of the archive with --ca FILE, and its "
            "name as the certificate has it; nothing was sent"
        )


def _texts(row: Mapping[str, Any], match: Mapping[str, str]) -> dict[str, str]:
    """The wanted values of a row of DICOM JSON (PS3.18, F.2)."""
    texts = {}
    for keyword in match:
        tag = tag_for_keyword(keyword)
        assert tag is not None
        element = row.get(f"{tag:08X}")
        values = element.get("Value") if isinstance(element, dict) else None
        if isinstance(values, list):
            texts[keyword] = "\\".join(str(value) for value in values if isinstance(value, (str, int, float)))
    return texts
