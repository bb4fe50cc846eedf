"""An archive that speaks DIMSE: C-FIND with C-GET, or with C-MOVE to this machine (PS3.4, C.4)."""

import socket
import ssl
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from fedcmr.client.archive.archive import Answered, Broken, Level
from fedcmr.client.archive.credentials import Certificates
from fedcmr.client.archive.fetching import SOP_CLASSES
from fedcmr.client.ingest.dicom.pixels import DECODERS
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_opener

CONNECT_S = 10.0
MAX_PDU_BYTES = 131_072
UNCOMPRESSED = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91")
SYNTAXES = (*UNCOMPRESSED, *(syntax for syntax in DECODERS if syntax not in LOSSY), *LOSSY)
"""Those that can be read here, lossy ones last: they are taken where the archive itself has nothing better."""
SUCCESS, PENDING = 0x0000, (0xFF00, 0xFF01)
REFUSED, OUT_OF_RESOURCES, NOT_EXPECTED = 0x0122, 0xA700, 0xA900
BUSY = (0xA700, 0xA701, 0xA702)
UNKNOWN_DESTINATION = 0xA801
TRANSIENT = 2
CALLING_UNKNOWN, CALLED_UNKNOWN = 3, 7
"""Result and diagnostics of A-ASSOCIATE-RJ (PS3.8, 9.3.4)."""


class DimseArchive:
    """An archive by its application entity. Every question has an association of its own: archives end idle ones."""

    def __init__(
        self,
        aet: str,
        host: str,
        port: int,
        own_aet: str,
        own_port: int | None,
        certificates: Certificates,
        timeout_s: float = 120.0,
    ) -> None:
        """Connect to nothing yet.

        Args:
            aet: The archive's application entity title.
            host: Its name or address.
            port: Likewise.
            own_aet: By which the archive knows this machine.
            own_port: Where to receive what C-MOVE sends; None for C-GET, which needs no port.
            certificates: TLS where there are any.
            timeout_s: Longest silence.

        Raises:
            UserError: The certificates do not do for this.
        """
        self.aet, self.host, self.port, self.own_aet, self.own_port = aet, host, port, own_aet, own_port
        self.timeout_s = timeout_s
        self.tls = certificates.client_context() if certificates.given else None
        self.server_tls = certificates.server_context() if certificates.given and own_port is not None else None
        self.inbox = _Inbox()
        self.server: Any = None

    @property
    def address(self) -> str:
        """For messages."""
        return f"{self.aet}@{self.host}:{self.port}"

    def find(self, level: Level, match: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """See `Archive`."""
        model = StudyRootQueryRetrieveInformationModelFind
        identifier = Dataset()
        identifier.QueryRetrieveLevel = level
        if not all(value.isascii() for value in match.values()):
            identifier.SpecificCharacterSet = "ISO_IR 192"
        for keyword, value in match.items():
            setattr(identifier, keyword, value)
        with self._associated([build_context(model)]) as association:
            for status, row in association.send_c_find(identifier, model):
                code = self._status_of(status)
                if code in PENDING:
                    if row is not None:
                        yield {keyword: _text(row.get(keyword)) for keyword in match}
                elif code != SUCCESS:
                    raise Answered("archive-error", f"C-FIND status {code:04X}", passing=True)

    def fetch(
        self, study_uid: str, series_uid: str, wanted: Collection[str], folder: Path, uncompressed: bool = False
    ) -> None:
        """See `Archive`."""
        identifier = Dataset()
        identifier.QueryRetrieveLevel = "SERIES"
        identifier.StudyInstanceUID, identifier.SeriesInstanceUID = study_uid, series_uid
        self.inbox.open(folder, wanted)
        try:
            if self.own_port is None:
                self._get(identifier, UNCOMPRESSED if uncompressed else SYNTAXES)
            else:
                self._move(identifier, UNCOMPRESSED if uncompressed else SYNTAXES)
        finally:
            self.inbox.close()
        if self.inbox.error is not None:
            raise self.inbox.error

    def _get(self, identifier: Dataset, syntaxes: Collection[str]) -> None:
        """Images over the association that asks for them (PS3.4, C.4.3)."""
        model = StudyRootQueryRetrieveInformationModelGet
        # A context for each syntax, so that the archive may send every image as it is.
        contexts = [build_context(one, syntax) for one in SOP_CLASSES for syntax in syntaxes]
        roles = [build_role(UID(one), scp_role=True) for one in SOP_CLASSES]
        with self._associated([build_context(model), *contexts], roles, self.inbox.receive) as association:
            if not any(one.abstract_syntax == model for one in association.accepted_contexts):
                raise UserError(f"{self.address} has no C-GET: give --own-aet NAME:PORT, and images come by C-MOVE")
            self._finish(association.send_c_get(identifier, model))

    def _move(self, identifier: Dataset, syntaxes: Collection[str]) -> None:
        """Images over an association that the archive opens to this machine (PS3.4, C.4.2)."""
        self._listen(syntaxes)
        model = StudyRootQueryRetrieveInformationModelMove
        try:
            with self._associated([build_context(model)]) as association:
                num_failed = self._finish(association.send_c_move(identifier, self.own_aet, model))
        except Answered:
            num_failed = 1
            if self.inbox.was_called:
                raise
        if num_failed and not self.inbox.was_called:
            raise UserError(
                f"{self.address} does not connect to {self.own_aet} at port {self.own_port} of this machine: it needs "
                "this machine's address and that port under this name, and the way there must be open"
                + (", with TLS" if self.server_tls is not None else "")
            )

    def _finish(self, responses: Iterator[tuple[Dataset, Dataset | None]]) -> int:
        """Wait for the end of a retrieval; returns the number of images that the archive could not send."""
        num_failed = 0
        for status, _ in responses:
            code = self._status_of(status)
            num_failed = int(status.get("NumberOfFailedSuboperations") or 0)
            if code == UNKNOWN_DESTINATION:
                raise UserError(
                    f"{self.address} does not know {self.own_aet} as a destination: register this name there, with "
                    f"this machine's address and port {self.own_port}"
                )
            # Whether all images have come is for the caller to see: a warning (B000) may say so of unwanted ones too.
            if code >= OUT_OF_RESOURCES and code not in PENDING and code != 0xB000:
                if code in BUSY and num_failed:
                    return num_failed
                raise Answered("archive-error", f"status {code:04X}", passing=True)
        return num_failed

    def _status_of(self, status: Dataset) -> int:
        """A status; an empty one stands for an association that the archive has ended, or a silence."""
        code = status.get("Status")
        if code is None:
            raise Broken(
                f"{self.aet} ends the association, or is silent for {self.timeout_s:g} s: does it know {self.own_aet} "
                "(--own-aet), and may that query and retrieve?"
            )
        return int(code)

    def _entity(self) -> Any:
        entity = AE(self.own_aet)
        entity.maximum_pdu_size = MAX_PDU_BYTES
        entity.connection_timeout = CONNECT_S
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = self.timeout_s
        return entity

    @contextmanager
    def _associated(
        self, contexts: list[PresentationContext], roles: list[Any] | None = None, receive: Any = None
    ) -> Iterator[Association]:
        """An association for one question.

        Raises:
            Broken: It does not come about, which may pass.
            UserError: It does not, for a reason that somebody has to correct.
        """
        association = self._entity().associate(
            self.host,
            self.port,
            contexts,
            ae_title=self.aet,
            ext_neg=roles,
            evt_handlers=[] if receive is None else [(evt.EVT_C_STORE, receive)],
            tls_args=None if self.tls is None else (self.tls, self.host),
        )
        if not association.is_established:
            raise self._why_not(association)
        try:
            yield association
            association.release()
        finally:
            if association.is_established:
                association.abort()

    def _why_not(self, association: Association) -> Exception:
        """Why an association did not come about."""
        if association.is_rejected:
            answer: Any = association.acceptor.primitive
            if answer.result == TRANSIENT:
                return Broken("it takes no more associations now")
            if answer.diagnostic == CALLED_UNKNOWN:
                return UserError(f"{self.host}:{self.port} is not {self.aet}: give --dimse the archive's own AE title")
            if answer.diagnostic == CALLING_UNKNOWN:
                return UserError(
                    f"{self.address} does not know {self.own_aet}: register this name there, or give the registered "
                    "one with --own-aet"
                )
            return UserError(f"{self.address} rejects the association: is {self.own_aet} registered there (--own-aet)?")
        try:
            with socket.create_connection((self.host, self.port), timeout=CONNECT_S) as plain:
                if self.tls is not None:
                    with self.tls.wrap_socket(plain, server_hostname=self.host):
                        pass
        except ssl.SSLCertVerificationError as error:
            return UserError(
                f"{self.address}: the archive's certificate is not trusted ({error.verify_message}): give its "
                "authority with --ca FILE, and its name as the certificate has it; nothing was sent"
            )
        except ssl.SSLError:
            return UserError(f"{self.address} speaks no TLS: is the port right? Leave --ca out for plain DICOM")
        except OSError as error:
            return Broken(error.strerror or str(error))
        return Broken("it ends the connection: does it expect TLS (--ca), or a certificate (--client-cert)?")

    def _listen(self, syntaxes: Collection[str]) -> None:
        """Receive what the archive sends, for as long as this object is in use."""
        if self.server is not None:
            self.server.shutdown()
        entity = self._entity()
        entity.require_called_aet = True
        for one in SOP_CLASSES:
            entity.add_supported_context(one, list(syntaxes))
        try:
            self.server = entity.start_server(
                ("", self.own_port),
                block=False,
                ssl_context=self.server_tls,
                evt_handlers=[(evt.EVT_C_STORE, self.inbox.receive), (evt.EVT_CONN_OPEN, self.inbox.note_call)],
            )
        except OSError as error:
            raise UserError(
                f"--own-aet: port {self.own_port} of this machine cannot be opened ({error.strerror}): end the other "
                "program, or have another port registered at the archive"
            ) from None

    def where(self, study_uid: str, series_uid: str = "") -> str:
        """See `Archive`."""
        return f"{self.address} study {study_uid}" + (f" series {series_uid}" if series_uid else "")

    def close(self) -> None:
        """See `Archive`."""
        if self.server is not None:
            self.server.shutdown()
            self.server = None


class _Inbox:
    """Writes the images that are wanted, as they come: their bytes are not looked at in this process."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.wanted: set[str] = set()
        self.number = 0
        self.error: OSError | None = None
        self.was_called = False
        """Whether the archive has ever connected to this machine."""

    def open(self, folder: Path, wanted: Collection[str]) -> None:
        self.wanted, self.number, self.error, self.folder = set(wanted), 0, None, folder

    def close(self) -> None:
        self.folder = None

    def note_call(self, event: evt.Event) -> None:
        """Handle the opening of a connection to this machine."""
        self.was_called = True

    def receive(self, event: evt.Event) -> int:
        """Handle a C-STORE; returns its status. Anybody can connect to a port, so nothing but the wanted is taken."""
        request: Any = event.request
        folder, uid = self.folder, str(request.AffectedSOPInstanceUID)
        if folder is None or uid not in self.wanted:
            return NOT_EXPECTED
        try:
            with open(folder / f"{self.number:06d}.dcm", "wb", opener=private_opener) as file:
                file.write(event.encoded_dataset())
        except OSError as error:
            self.error = error
            return OUT_OF_RESOURCES
        self.wanted.discard(uid)
        self.number += 1
        return SUCCESS


def _text(value: Any) -> str:
    """A value of an answer as text; several with a backslash between them."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        return "\\".join(map(str, value))
    return str(value)
