"""`fedcmr-client import`: its options, and what it prints."""

import argparse
import logging
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from fedcmr.client.deidentify import KEY_NAME, read_key
from fedcmr.client.ingest.options import add_case_options
from fedcmr.client.ingest.refused_list import LIST_NAME
from fedcmr.shared.command_parser import CommandParser
from fedcmr.shared.console import plain_console
from fedcmr.shared.errors import UserError
from fedcmr.shared.progress import LOG_INTERVAL_S

if TYPE_CHECKING:
    from fedcmr.client.archive.archive import Archive
    from fedcmr.client.archive.finding import Found
    from fedcmr.client.archive.patience import Patience
    from fedcmr.client.archive.query import Query

console = plain_console()
PATIENCE_S, TIMEOUT_S = 300.0, 120.0
OWN_AET = "FEDCMR"
AE_TITLE = re.compile(r"[\x21-\x5b\x5d-\x7e]([\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?")
"""One to sixteen characters, none of them a backslash or a blank at an end (PS3.5, 6.2)."""
TALKATIVE = ("pynetdicom", "pydicom", "dicomweb_client", "urllib3", "retrying")
"""Loggers whose messages may quote what an archive sends, or hide the one line of an error behind many."""


def add_import(commands: "argparse._SubParsersAction[CommandParser]", positive: Callable[[str], int]) -> None:
    """Add the command.

    Args:
        commands: Subcommands of the parser.
        positive: Parses a whole number from 1.
    """
    sub = commands.add_parser(
        "import",
        help="scans of the hospital's archive (PACS) -> cases without identifiers",
        description="Asks the archive for cardiac MR studies, fetches one after the other, makes a case of each as "
        "'prepare --format dicom' does, and throws the originals away. Repeat an interrupted call to resume.",
    )
    sub.add_argument("destination", type=Path, metavar="DST", help="folder of cases to make, or to resume")
    archive = sub.add_mutually_exclusive_group(required=True)
    archive.add_argument(
        "--dicomweb",
        metavar="URL",
        help="the archive's DICOMweb service: what stands before /studies; it is reached through the proxy that "
        "HTTPS_PROXY names, if any, unless NO_PROXY lists its host",
    )
    archive.add_argument("--dimse", metavar="AET@HOST:PORT", help="the archive's DICOM service: C-FIND with C-GET")
    sub.add_argument(
        "--query",
        required=True,
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="which studies; they fit all keys that are given: date=FROM..TO (2020, 2020-01 or 2020-01-31), "
        "vendor=Siemens,Philips, description=cardiac,heart (one of these in the study's description), list=FILE of "
        "accession numbers or study UIDs, one a line, or a CSV with a column AccessionNumber or StudyInstanceUID; "
        "date or list is required",
    )
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="only count what would be fetched, by vendor and year; fetch and write nothing",
    )
    sub.add_argument("--keep", type=Path, metavar="DIR", help="keep the originals, with all that names the patients")
    sub.add_argument(
        "--retry-refused", action="store_true", help="fetch studies again that were fetched before and refused"
    )
    sub.add_argument(
        "--own-aet",
        metavar="NAME[:PORT]",
        default=OWN_AET,
        help="with --dimse, the name by which the archive knows this machine (default: %(default)s); with :PORT images "
        "come by C-MOVE to this port instead of C-GET",
    )
    sub.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="authority of the archive's certificate (PEM); with --dimse turns TLS on",
    )
    sub.add_argument("--client-cert", type=Path, metavar="FILE", help="this site's certificate for TLS (PEM)")
    sub.add_argument("--client-key", type=Path, metavar="FILE", help="its key, readable by this user alone")
    login = sub.add_mutually_exclusive_group()
    login.add_argument(
        "--token-file", type=Path, metavar="FILE", help="with --dicomweb, a bearer token, readable by this user alone"
    )
    login.add_argument(
        "--login-file",
        type=Path,
        metavar="FILE",
        help="with --dicomweb, USER:PASSWORD, readable by this user alone (default: the host's entry in ~/.netrc)",
    )
    sub.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="longest silence of the archive, which may have to get a study from tape (default: %(default)g)",
    )
    sub.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_S,
        metavar="SECONDS",
        help="how long to try again while the archive is not reached (default: %(default)g)",
    )
    add_case_options(sub, positive)
    sub.set_defaults(command=_import)


def _import(options: argparse.Namespace) -> None:
    """Look at the options, then find and fetch."""
    from fedcmr.client.archive.patience import Patience
    from fedcmr.client.archive.query import parse_query

    query = parse_query(options.query)
    for name in ("timeout", "patience"):
        if not 0 <= getattr(options, name) < float("inf") or (name == "timeout" and options.timeout == 0):
            raise UserError(f"--{name}: expected seconds, got {getattr(options, name):g}")
    key = None if options.key is None else read_key(options.key)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's quote values
        archive = _archive(options)
        try:
            patience = Patience(options.dicomweb or options.dimse, options.patience)
            _run(options, archive, patience, query, key)
        finally:
            archive.close()


def _run(
    options: argparse.Namespace, archive: "Archive", patience: "Patience", query: "Query", key: bytes | None
) -> None:
    """Find, show, and unless it is a dry run fetch."""
    from fedcmr.client.archive.finding import find_studies
    from fedcmr.client.archive.importing import import_studies
    from fedcmr.client.ingest.account import print_account
    from fedcmr.client.ingest.prepare import Choices

    console.print(f"asking {patience.address} for MR studies", soft_wrap=True)
    found = find_studies(archive, query, patience)
    _print_found(found)
    if options.dry_run:
        _print_done(found, options.destination, key)
        return
    if not found.studies and not options.destination.exists():
        raise UserError("the archive has no study for this query: try it wider with --dry-run")
    choices = Choices(
        "dicom",
        vendor=options.vendor,
        one_study_one_patient=options.one_study_one_patient,
        keep_suspected=options.keep_suspected,
        contours=options.contours,
        segmenter=options.segmenter,
    )
    console.print(f"importing -> {options.destination}", soft_wrap=True)
    imported = import_studies(
        archive,
        found,
        patience,
        options.destination,
        choices,
        key=key,
        num_processes=options.num_processes,
        keep=options.keep,
        retry_refused=options.retry_refused,
        progress=_Progress().tell,
    )
    console.print(f"studies fetched: {imported.num_fetched}, not fetched: {sum(imported.not_fetched.values())}")
    print_account(imported.summary, options.destination, console, imported.not_fetched)


class _Progress:
    """A line every few seconds; bars are for each study alone."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        if time.monotonic() - self.last > LOG_INTERVAL_S:
            self.last = time.monotonic()
            print(f"importing studies: {done} of {total}", file=sys.stderr, flush=True)


def _print_found(found: "Found") -> None:
    """Numbers of studies and images by vendor and year, and of those that cannot be had."""
    from fedcmr.client.ingest.reasons import REASONS

    studies: Counter[tuple[str, str]] = Counter()
    images: Counter[tuple[str, str]] = Counter()
    for study in found.studies:
        place = study.vendor, study.year or "unknown"
        studies[place] += 1
        images[place] += study.num_images
    table = Table("vendor", "year", "studies", "MR images")
    for place in sorted(studies):
        table.add_row(*place, str(studies[place]), str(images[place]))
    table.add_row("all", "", str(studies.total()), str(images.total()))
    console.print(table)
    for code, number in sorted(found.skipped.items()):
        console.print(f"cannot be fetched: {number} {code}: {REASONS[code]}", soft_wrap=True)


def _print_done(found: "Found", destination: Path, key: bytes | None) -> None:
    """How many of the studies an earlier call has fetched; nothing is written."""
    from fedcmr.client.archive.importing import study_name
    from fedcmr.client.archive.state import ImportState

    key_file = destination.resolve().parent / KEY_NAME
    if key is None and key_file.exists():
        key = read_key(key_file)
    records = ImportState(destination).records if key is not None else {}
    done = sum(key is not None and study_name(key, study.uid) in records for study in found.studies)
    if found.skipped:
        console.print(f"the import itself lists which ones they are in {destination / LIST_NAME}", soft_wrap=True)
    console.print(f"{done} of the studies above were fetched before; a dry run fetches and writes nothing")


def _archive(options: argparse.Namespace) -> "Archive":
    """The archive that the options name; not yet connected."""
    from fedcmr.client.archive.credentials import Certificates, read_login, read_token

    certificates = Certificates(options.ca, options.client_cert, options.client_key)
    if options.dicomweb is not None:
        from fedcmr.client.archive.dicomweb import DicomWebArchive

        if options.own_aet != OWN_AET:
            raise UserError("--own-aet means nothing with --dicomweb: leave it out")
        token = None if options.token_file is None else read_token(options.token_file)
        login = None if options.login_file is None else read_login(options.login_file)
        return DicomWebArchive(options.dicomweb, certificates, token, login, options.timeout)
    # Imported here: pynetdicom takes a while to load, and no other command needs it.
    from fedcmr.client.archive.dimse import DimseArchive

    if options.token_file is not None or options.login_file is not None:
        raise UserError("--token-file and --login-file mean nothing with --dimse: leave them out")
    aet, at, address = options.dimse.partition("@")
    host, _, port = address.rpartition(":")
    if not (at and host and _is_port(port) and AE_TITLE.fullmatch(aet)):
        raise UserError(f"--dimse: expected AET@HOST:PORT, got {options.dimse!r}")
    own_aet, colon, own_port = options.own_aet.partition(":")
    if not AE_TITLE.fullmatch(own_aet) or (colon and not _is_port(own_port)):
        raise UserError(f"--own-aet: expected NAME or NAME:PORT, a name of at most 16, got {options.own_aet!r}")
    return DimseArchive(
        aet, host.strip("[]"), int(port), own_aet, int(own_port) if colon else None, certificates, options.timeout
    )


def _is_port(text: str) -> bool:
    return text.isdecimal() and 1 <= int(text) <= 65535
