"""Whether a site can take part: settings, data, key, code, disk, the way to the coordinator; each with its remedy."""

import base64
import datetime
import json
import shlex
import shutil
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from cryptography import x509

from fedcmr.client.code_hash import code_sha256
from fedcmr.client.deployment.node_key import checked_node_key
from fedcmr.client.evaluation_patients import PREDICTIONS_NAME, check_test_folder, test_dataset
from fedcmr.client.ledger import LEDGER_NAME, REPLICA_SUFFIXES, dataset_of, default_replica
from fedcmr.client.policy import SITE_FILE, SiteSettings
from fedcmr.client.trainable import GRADIENT, LEFT_OUT, STYLE, trainable
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import OTHERS, open_to_others, private_folder
from fedcmr.shared.seen import check_unseen, seen_by

TIMEOUT_S = 10.0
AHEAD_S, BEHIND_S = 6.0, 240.0
"""Flower signs the time of a node's messages, and takes 5 s from the future and 300 s from the past; HTTP's dates are
whole seconds."""
LOOPBACK = ("127.0.0.1", "localhost")
"""Reached without a proxy, whatever the environment says: a SuperNode's own children call it there."""
MIN_FREE_BYTES = 2 * 2**30
WARN_DAYS = 30
MAX_LINE_BYTES = 1 << 16
EXPIRED = 10
"""X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        text: What was found, or what is wrong and its remedy.
        ok: Whether the site can take part with it.
        passing: Whether it may be right in a while without anybody's doing at this site.
    """

    name: str
    text: str
    ok: bool = True
    passing: bool = False


class NotReached(UserError):  # noqa: N818
    """The coordinator's machine, or the way there, does not answer: it may not be up yet."""


def examine(site: SiteSettings) -> list[Finding]:
    """Look at everything; nothing is changed, and nothing but a TLS handshake leaves the site."""
    steps: list[tuple[str, Callable[[SiteSettings], str]]] = [
        ("cases", _cases),
        ("test patients", _test),
        ("what leaves", _what_leaves),
        ("prior", _prior),
        ("permissions", _permissions),
        ("ledger", _ledger),
        ("key", lambda site: str(checked_node_key(site.folder))),
        ("code", _code),
        ("disk", _disk),
    ]
    return [*(_finding(site, name, step) for name, step in steps), *examine_way(site)]


def examine_way(site: SiteSettings) -> list[Finding]:
    """Look at the way to the coordinator alone; what lies behind one who is not reached is not looked at."""
    findings = [_finding(site, "coordinator", _coordinator)]
    for name, step in (("certificate", _certificate), ("clock", _clock)):
        if not findings[0].ok:
            text = "not known: the coordinator is not reached"
            findings.append(Finding(name, text, ok=False, passing=findings[0].passing))
        else:
            findings.append(_finding(site, name, step))
    return findings


def _finding(site: SiteSettings, name: str, step: Callable[[SiteSettings], str]) -> Finding:
    try:
        return Finding(name, step(site))
    except UserError as error:
        return Finding(name, str(error), ok=False, passing=isinstance(error, NotReached))


def address_of(site: SiteSettings) -> tuple[str, int]:
    """The coordinator's host and port.

    Raises:
        UserError: site.yaml names none.
    """
    host, _, port = (site.coordinator or "").rpartition(":")
    if not host or not port.isdecimal():
        got = "none" if site.coordinator is None else repr(site.coordinator)
        raise UserError(
            f"{site.folder / 'site.yaml'}: expected coordinator: HOST:PORT, as the coordinator gives it, got {got}"
        )
    return host.strip("[]"), int(port)


def authority_of(site: SiteSettings) -> Path:
    """The file of the study's certificate authority.

    Raises:
        UserError: site.yaml names none, or it holds no certificate.
    """
    if site.authority_path is None:
        raise UserError(f"{site.folder / 'site.yaml'}: expected authority: the coordinator's ca.crt, got none")
    try:
        x509.load_pem_x509_certificate(site.authority_path.read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{site.authority_path} holds no certificate: copy the coordinator's ca.crt there") from None
    return site.authority_path


def copy_authority(source: Path, site: Path) -> str:
    """Copy the authority's certificate into the site's folder; returns its name there.

    Raises:
        UserError: It is none, or the folder holds another one.
    """
    try:
        content = source.read_bytes()
        x509.load_pem_x509_certificate(content)
    except (OSError, ValueError):
        raise UserError(f"--authority {source} holds no certificate: give the coordinator's ca.crt") from None
    path = site / "ca.crt"
    if path.exists() and path.read_bytes() != content:
        raise UserError(f"{path} is another authority's: a site has one coordinator, take a new folder")
    private_folder(site)
    path.write_bytes(content)
    return path.name


def replica_of(site: SiteSettings) -> Path:
    """The file of the ledger's second copy."""
    return site.replica_path or default_replica(site.ledger_path)


def _test_replica_of(site: SiteSettings) -> Path:
    """The same for the ledger of the test patients."""
    return site.test_replica_path or default_replica(site.test_ledger_path)


def _prior(site: SiteSettings) -> str:
    """That the public prior is readable, and that nobody whom it has seen is taken for a private or test patient."""
    if site.prior_path is None:
        return "the one that ships, which has learnt from no patient"
    has_seen = seen_by(site.prior_path)
    for folder in (site.data_path, site.test_path):
        if folder is not None:
            check_unseen(has_seen, folder)
    return f"{site.prior_path}, has learnt from {len(has_seen)} public patients, and from none of the site's"


def _cases(site: SiteSettings) -> str:
    found = trainable(site.data_path, site.vendors, site.policy.contours)
    least = site.policy.min_patients
    reasons = "; ".join(f"{code} {number}: {LEFT_OUT[code]}" for code, number in found.left_out.items())
    if found.num_patients < least:
        raise UserError(
            f"{site.data_path} has fewer patients that can be trained on than policy.min_patients, {least}"
            + (f" ({reasons})" if reasons else "")
        )
    if "vendor-not-declared" in found.left_out:
        raise UserError(
            f"{site.data_path} contradicts the vendors of site.yaml, {', '.join(site.vendor_names)} ({reasons})"
        )
    absent = [vendor for vendor in site.vendor_names if vendor not in found.vendors]
    if absent:
        raise UserError(
            f"site.yaml declares {', '.join(absent)}, of which {site.data_path} has no case that can be "
            "trained on: take it out of 'vendors', there and at the coordinator"
        )
    in_part = found.num_patients - len(found.whole)
    only = "gradients are refused, too few are drawn whole" if len(found.whole) < least else f"no {GRADIENT}"
    return (
        f"patients that can be trained on: at least policy.min_patients, {least}"
        + (f"; {in_part} of them drawn in part, for {STYLE} only: {only}" if in_part else "")
        + (f"; left out: {reasons}" if reasons else "")
    )


def _permissions(site: SiteSettings) -> str:
    """What is about patients is this account's alone, also where it was made under another umask or copied."""
    parts = [site.data_path, site.ledger_path, replica_of(site), site.folder / SITE_FILE]
    if site.test_path is not None:
        parts += [site.test_path, site.test_ledger_path, site.folder / PREDICTIONS_NAME]
    wide = {part: found for part in parts if (found := open_to_others([part]))}
    if site.folder.stat().st_mode & OTHERS:
        wide[site.folder] = [site.folder]
    if wide:
        number = sum(map(len, wide.values()))
        raise UserError(
            f"other accounts may use {number} files or folders about patients: remedy: 'chmod -R go= "
            f"{shlex.join(map(str, wide))}'"
        )
    return "the site's folder, cases and ledger are this account's alone"


def _ledger(site: SiteSettings) -> str:
    """Whether the ledger's two copies can be lost, or taken back to an earlier state, apart from each other."""
    ledger, replica = site.ledger_path, replica_of(site)
    stray = _other_ledgers(site)
    if stray:
        raise UserError(
            f"{stray[0]} has charged releases of these patients, and is not the ledger that site.yaml "
            "names: put it back, or name it as 'ledger'; what it has charged is spent"
        )
    if not replica.parent.is_dir():
        raise UserError(f"{replica.parent}: expected the folder of 'ledger_replica', got none; mount or make it")
    if site.ledger_same_disk:
        return "both copies may be on one disk (ledger_same_disk): a restored backup of it forgets what was spent"
    remedy = (
        "name a file on another disk as 'ledger_replica' in site.yaml or, where no backup of that disk is ever put "
        "back, set ledger_same_disk: true"
    )
    copies = [(ledger, replica)] + ([(site.test_ledger_path, _test_replica_of(site))] if site.test else [])
    for ledger, replica in copies:
        if replica.resolve().is_relative_to(site.folder.resolve()):
            raise UserError(
                f"the ledger's second copy {replica} lies in the site's own folder, and is restored with it: {remedy}"
            )
        # Where the files are, not the links to them.
        first, second = (_nearest(path.resolve()).stat().st_dev for path in (ledger / LEDGER_NAME, replica))
        if first == second:
            raise UserError(
                f"the ledger {ledger} and its second copy {replica} are on one file system, which is "
                f"restored as a whole: {remedy}"
            )
    return f"its second copy is on another file system, {replica_of(site)}"


def _other_ledgers(site: SiteSettings) -> list[Path]:
    """Files in the site's folder that a ledger over the same data set has written, and that site.yaml does not name."""
    known = {site.ledger_path / LEDGER_NAME, replica_of(site)}
    known |= {site.test_ledger_path / LEDGER_NAME, _test_replica_of(site)}
    found = [
        *site.folder.glob(f"*/{LEDGER_NAME}"),
        *(path for suffix in REPLICA_SUFFIXES for path in site.folder.glob(f"*{suffix}")),
    ]
    datasets = {dataset_of(site.data_path), test_dataset(dataset_of(site.data_path))}
    return [path for path in sorted(found) if path not in known and _dataset_in(path) in datasets]


def _dataset_in(path: Path) -> str | None:
    """The data set that a ledger was opened for, by its first line."""
    try:
        with path.open("rb") as file:
            return str(json.loads(file.readline(MAX_LINE_BYTES))["dataset"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there: a ledger is made on first use."""
    return folder if folder.exists() else _nearest(folder.parent)


def _test(site: SiteSettings) -> str:
    """The test patients, in the form in which the policy lets their sums out."""
    if site.test_path is None or site.policy.evaluation == "off":
        return "none: studies are not evaluated here" if site.test_path is None else "policy.evaluation is off"
    check_test_folder(site)
    return {
        "private": "sums with noise leave the site, charged to test_ledger",
        "table": "PLAIN sums of groups of 5 or more leave the site, as often as requested: policy.evaluation is table",
    }[site.policy.evaluation]


def _what_leaves(site: SiteSettings) -> str:
    """What a study may ask for, for the reader who signs; which of it a study does ask for, its coordinator says."""
    policy = site.policy
    noise = f"each with noise, of epsilon {policy.max_epsilon:g} together at most (policy.max_epsilon)"
    if policy.allow_without_privacy:
        noise += "; and WITHOUT noise to a study that wants none: policy.allow_without_privacy"
    return (
        "round 1: mean and spread of the images' style by vendor and, in a study with federation.shape, of the "
        "shapes of the hearts; later rounds: one mean gradient over all patients, of the generator or the segmenter; "
        f"{noise}. No image and no record of a patient"
    )


def _code(site: SiteSettings) -> str:
    allowed = site.policy.allowed_code_sha256
    if not allowed:
        raise UserError(
            "policy.allowed_code_sha256 is empty, so no code is let in: add what 'fedcmr-client code' "
            "prints for the version that you have reviewed"
        )
    if code_sha256() in allowed:
        return "this version is listed"
    return f"{len(allowed)} listed, not the one installed here: bundles of a listed one will run"


def _disk(site: SiteSettings) -> str:
    free = shutil.disk_usage(site.folder).free
    if free < MIN_FREE_BYTES:
        raise UserError(f"{site.folder}: expected {MIN_FREE_BYTES / 2**30:.0f} GiB free, got {free / 2**30:.1f}")
    return f"{free / 2**30:.0f} GiB free"


def _coordinator(site: SiteSettings) -> str:
    host, port = address_of(site)
    proxy = proxy_of(host)
    way = _through(proxy)
    connection = HTTPConnection(*_first_hop(host, port, proxy), timeout=TIMEOUT_S)
    try:
        _tunnel(connection, host, port, proxy)
        connection.connect()
    except OSError as error:
        raise NotReached(
            f"{host}:{port} is not reached{way} ({error.strerror or error}): is the name right, may this "
            "machine call out to it, does the coordinator's gateway run?"
        ) from None
    finally:
        connection.close()
    return f"{host}:{port} is reached{way}"


def _certificate(site: SiteSettings) -> str:
    host, port = address_of(site)
    connection = _secured(site)
    try:
        connection.connect()
        der = connection.sock.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == EXPIRED:
            raise UserError(
                f"the certificate of {host}:{port} has expired: ask the coordinator to renew it with "
                "'fedcmr-server init'; or is this machine's clock wrong?"
            ) from None
        raise UserError(
            f"{host}:{port} is not the study's server ({error.verify_message}): do not join; compare "
            f"{site.authority_path} with the coordinator's by telephone"
        ) from None
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"{host}:{port} speaks no TLS ({error.strerror or error})") from None
    finally:
        connection.close()
    assert der is not None
    left = x509.load_der_x509_certificate(der).not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    ask = ": ask the coordinator to renew it" if left.days < WARN_DAYS else ""
    return f"of the study's authority, valid for {left.days} more days{ask}"


def _clock(site: SiteSettings) -> str:
    host, port = address_of(site)
    try:
        connection = _secured(site)
        connection.request("HEAD", "/")
        date = connection.getresponse().headers["Date"]
        connection.close()
        server = parsedate_to_datetime(date)
    except (OSError, HTTPException, TypeError, ValueError):
        raise UserError(f"{host}:{port} does not tell the time: see the findings above") from None
    skew = (datetime.datetime.now(datetime.UTC) - server).total_seconds()
    if not -BEHIND_S <= skew <= AHEAD_S:
        raise UserError(f"this clock is {skew:+.0f} s off the coordinator's: set it by NTP, here or there")
    return "agrees with the coordinator's"


def proxy_of(host: str) -> SplitResult | None:
    """The proxy that the environment names for TLS to this host, as the SuperNode and gRPC follow it; None for none.

    Raises:
        UserError: It is no proxy that opens a plain connection and passes TLS on.
    """
    text = getproxies().get("https")
    if not text or host in LOOPBACK or proxy_bypass(host):
        return None
    proxy = urlsplit(text if "://" in text else f"http://{text}")
    try:
        known = proxy.scheme == "http" and bool(proxy.hostname) and proxy.port is not None
    except ValueError:
        known = False
    if not known:
        raise UserError("https_proxy: expected http://HOST:PORT, the address of a proxy that passes TLS on")
    return proxy


def way_to(site: SiteSettings) -> str:
    """The coordinator's address and the proxy on the way there, in words: "study.example.org:443 directly".

    Raises:
        UserError: site.yaml names no address, or the environment a proxy of another kind.
    """
    host, port = address_of(site)
    proxy = proxy_of(host)
    return f"{host}:{port}" + (f"{_through(proxy)} (https_proxy)" if proxy else " directly, no proxy is named")


def _through(proxy: SplitResult | None) -> str:
    return f" through the proxy {proxy.hostname}:{proxy.port}" if proxy else ""


def _first_hop(host: str, port: int, proxy: SplitResult | None) -> tuple[str, int]:
    """Where the connection itself goes."""
    return (host, port) if proxy is None else (str(proxy.hostname), int(proxy.port or 0))


def _tunnel(connection: HTTPConnection, host: str, port: int, proxy: SplitResult | None) -> None:
    """Have a proxy pass the connection on."""
    if proxy is None:
        return
    headers = {}
    if proxy.username:
        secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
    connection.set_tunnel(host, port, headers)


def _secured(site: SiteSettings) -> HTTPSConnection:
    """A connection over TLS to the coordinator, not yet opened."""
    host, port = address_of(site)
    proxy = proxy_of(host)
    connection = HTTPSConnection(*_first_hop(host, port, proxy), timeout=TIMEOUT_S, context=_trusting(site))
    _tunnel(connection, host, port, proxy)
    return connection


def _trusting(site: SiteSettings) -> ssl.SSLContext:
    """TLS that trusts the study's authority and nobody else."""
    context = ssl.create_default_context(cafile=str(authority_of(site)))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
