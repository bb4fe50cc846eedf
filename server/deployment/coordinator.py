"""The coordinator's folder: what a study between institutions needs on the server's side.

DIR/coordinator.yaml             name, addresses, ports
DIR/ca.crt, ca.key               the study's certificate authority; every site gets ca.crt
DIR/server.crt, server.key       the server's own certificate
DIR/superexec.secret             lets the ServerApp's executor in, and no other
DIR/sites/NAME.pub, NAME.json    registered sites: public key, vendors, nominal patients
DIR/gateway/nginx.conf          what sites reach, see gateway.py
DIR/flwr/, state.db              Flower's home and database
DIR/logs/, pids/                 logs and process ids of the running services
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedcmr.server.deployment.ports import DELIVERY_PORT, GATEWAY_PORT, HEALTH_PORT, SUPERLINK_PORT
from fedcmr.server.federation.state import StudySite, study_site
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.records import SITE_NAME
from fedcmr.shared.settings_file import check_keys, read_settings
from fedcmr.shared.site_facts import check_vendors

COORDINATOR_FILE = "coordinator.yaml"
STUDY_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
TEMPLATE = """\
# The coordinator's settings. Ports may be changed while the services are stopped.
name: {name}
addresses: {addresses}   # names and IP addresses that the server's certificate is valid for
superlink_port: {superlink_port}   # SuperLink, over TLS: sites, flwr and the executor
delivery_port: {delivery_port}   # service of the synthetic data, over TLS, on this machine behind the gateway
gateway_port: {gateway_port}   # of the gateway, the one port that sites call; after a change: fedcmr-server gateway
health_port: {health_port}   # its health service (grpc.health.v1, no TLS), on this machine only
# Where the SuperLink listens: 127.0.0.1 behind a gateway. At 0.0.0.0 whoever reaches the port can run code at sites.
host: {host}
"""


@dataclass(frozen=True)
class Coordinator:
    """The settings in `coordinator.yaml`; `TEMPLATE` explains each key.

    Attributes:
        folder: The coordinator's folder; not a key of the file.
    """

    name: str
    addresses: list[str] = field(default_factory=list)
    superlink_port: int = SUPERLINK_PORT
    health_port: int = HEALTH_PORT
    gateway_port: int = GATEWAY_PORT
    delivery_port: int = DELIVERY_PORT
    host: str = "127.0.0.1"
    folder: Path = Path()

    def __post_init__(self) -> None:
        if not STUDY_NAME.fullmatch(self.name):
            raise UserError(f"Expected name to match {STUDY_NAME.pattern}, got {self.name!r}.")
        ports = {key: getattr(self, key) for key in ("superlink_port", "health_port", "gateway_port", "delivery_port")}
        for key, port in ports.items():
            if not 1 <= port <= 65535:
                raise UserError(f"Expected {key} in 1..65535, got {port!r}.")
        if len(set(ports.values())) < len(ports):
            raise UserError(f"Expected {', '.join(ports)} to differ, got {', '.join(map(str, ports.values()))}.")

    @property
    def superlink(self) -> str:
        """Where the SuperLink is reached from this machine."""
        return f"127.0.0.1:{self.superlink_port}"

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    @property
    def flwr_home(self) -> Path:
        """FLWR_HOME for all of Flower's processes here."""
        return self.folder / "flwr"

    def sites(self) -> dict[str, StudySite]:
        """The registered sites and their public facts, by name.

        Raises:
            UserError: A site's file cannot be read.
        """
        sites = {}
        for path in sorted((self.folder / "sites").glob("*.json")):
            try:
                facts = json.loads(path.read_text(encoding="utf-8"))
                sites[path.stem] = study_site(facts)
            except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}: expected vendors and nominal_patients; register the site again") from None
        return sites

    def public_key(self, site: str) -> Path:
        """A registered site's public key."""
        return self.folder / "sites" / f"{site}.pub"


def write_coordinator(coordinator: Coordinator) -> None:
    """Write `coordinator.yaml` with its comments."""
    values = {key: json.dumps(value) for key, value in asdict(coordinator).items() if key != "folder"}
    write_atomically(coordinator.folder / COORDINATOR_FILE, TEMPLATE.format(**values).encode())


def load_coordinator(folder: Path) -> Coordinator:
    """Read the settings of a folder that `fedcmr-server init` made.

    Raises:
        UserError: The file is missing, or has an unknown key or an invalid value.
    """
    path = folder / COORDINATOR_FILE
    if not path.exists():
        raise UserError(f"{path} is missing: make the folder with 'fedcmr-server init'")
    node = read_settings(path, Coordinator)
    check_keys(node, Coordinator, str(path), no_keys=("folder",))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Coordinator), node)
        settings = cast(Coordinator, OmegaConf.to_object(merged))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    return Coordinator(**{**vars(settings), "folder": folder.resolve()})


def register_site(coordinator: Coordinator, name: str, public_key: str, facts: StudySite) -> None:
    """Keep a site's public key and facts; Flower gets them at the next `start`, or now by `services.tell_flower`.

    Args:
        coordinator: The study's coordinator.
        name: Name of the site, as in its site.yaml.
        public_key: One line in OpenSSH's format, an ECDSA key.
        facts: Vendors, nominal patients and provenance, public and agreed before the study.

    Raises:
        UserError: The name or key is not as expected, or belongs to another site.
    """
    if not SITE_NAME.fullmatch(name):
        raise UserError(f"Expected the site's name to match {SITE_NAME.pattern}, got {name!r}.")
    check_vendors(facts.vendors, facts.nominal_patients)
    parts = public_key.split()
    if len(parts) < 2 or not parts[0].startswith("ecdsa-sha2-nistp"):
        raise UserError(f"{name}: expected the public key that 'fedcmr-client init' wrote (ecdsa-sha2-nistp384 ...)")
    for other in coordinator.sites():
        same = coordinator.public_key(other).read_text(encoding="utf-8").split()[:2] == parts[:2]
        if same != (other == name):
            reason = "has that key already" if same else "is registered with another key: remove it first"
            raise UserError(f"site {other} {reason}")
    folder = coordinator.folder / "sites"
    folder.mkdir(exist_ok=True)
    write_atomically(coordinator.public_key(name), f"{parts[0]} {parts[1]}\n".encode())
    write_atomically(folder / f"{name}.json", json.dumps(asdict(facts)).encode())
