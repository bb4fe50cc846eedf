"""A site as a service of its own machine: a hardened systemd unit, or a container without privileges."""

import ipaddress
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from fedcmr.client.deidentify import KEY_NAME as PSEUDONYM_KEY
from fedcmr.client.deployment.connection import address_of
from fedcmr.client.deployment.node_key import KEY_NAME
from fedcmr.client.policy import SITE_FILE, SiteSettings
from fedcmr.shared.errors import UserError
from fedcmr.shared.service_files import check_account, check_paths, render

Kind = Literal["systemd", "compose"]
TEMPLATES = Path(__file__).parent / "templates"
UNIT = "fedcmr-site.service"
CONTAINER_ID = 10001
"""User id in the container where root owns the site's folder: no account of a usual system has it."""


def service_files(
    site: SiteSettings, kind: Kind, user: str, program: Path, allow: Sequence[str] = ()
) -> dict[str, str]:
    """The files of one kind of service, by name.

    Args:
        site: Whose service it is; its folder is as the machine of the service sees it.
        kind: "systemd": one unit. "compose": a Dockerfile, a compose file, and what keeps all else out of the image.
        user: The account that a unit runs as; a container runs as whoever owns the site's folder.
        program: `fedcmr-client`, as the machine of the service sees it; for a unit.
        allow: Addresses or networks that a unit may call, of the coordinator; empty: the coordinator's own, where
            site.yaml gives an address in place of a name, and otherwise any.

    Raises:
        UserError: The site names no coordinator, or a path or the account cannot be used.
    """
    if site.coordinator is None:
        raise UserError(f"{site.folder / SITE_FILE}: expected coordinator: HOST:PORT, got null: nothing to join")
    check_account(user)
    folder = site.folder
    outside = [path for path in _written(site) if not path.is_relative_to(folder)]
    read_only = [path for path in _read(site) if path != folder]
    check_paths([folder, *outside, *read_only, *([program] if kind == "systemd" else [])], kind == "systemd")
    values: dict[str, Any] = {
        "name": site.name,
        "coordinator": site.coordinator,
        "folder": str(folder),
        "user": user,
        "program": str(program),
        "read_write": [str(path) for path in outside],
        "read_only": [str(path) for path in read_only],
        "hidden": [str(path) for path in _hidden(site)],
        "allowed": _addresses(allow) or _own_address(site),
    }
    if kind == "systemd":
        return {UNIT: render(TEMPLATES, f"{UNIT}.j2", values)}
    # A mount needs a place: where the key is not in the folder, there is nothing to hide.
    values |= _image(folder) | {"hidden": [str(path) for path in _hidden(site) if path.exists()]}
    return {
        "Dockerfile": render(TEMPLATES, "Dockerfile.j2", values),
        ".dockerignore": render(TEMPLATES, "dockerignore.j2", values),
        "compose.yaml": render(TEMPLATES, "compose.yaml.j2", values),
    }


def next_steps(site: SiteSettings, kind: Kind, user: str, out: Path) -> str:
    """What is left for the site's administrator, as commands."""
    image = _image(site.folder)
    account = f"{user}:{user}" if kind == "systemd" else f"{image['uid']}:{image['gid']}"
    outside = [str(path) for path in _written(site) if not path.is_relative_to(site.folder)]
    read = [str(path) for path in _read(site) if not path.is_relative_to(site.folder)]
    lines = ["as root:"]
    if kind == "systemd":
        lines.append(f"useradd --system --shell /usr/sbin/nologin {user}")
    lines.append(f"chown -R {account} {site.folder}")
    if outside:
        lines.append(f"# let {account} write to {' '.join(outside)}, which must be there")
    if read:
        lines.append(f"# let {account} read {' '.join(read)}")
    if kind == "systemd":
        lines += [
            f"cp {out / UNIT} /etc/systemd/system/",
            "systemctl daemon-reload",
            f"systemctl enable --now {UNIT.removesuffix('.service')}",
        ]
    else:
        lines += [
            f"cp {image['wheel']} {out}/    # of the release, or made in a checkout by 'pip wheel --no-deps .'",
            f"cd {out} && docker compose build && docker compose up --detach",
        ]
    return "\n  ".join(lines)


def installed_program() -> Path:
    """`fedcmr-client` next to this Python."""
    return Path(sys.executable).with_name("fedcmr-client")


def _written(site: SiteSettings) -> list[Path]:
    """Folders that a SuperNode of the site writes to."""
    replica = [] if site.replica_path is None else [site.replica_path.parent]
    test_ledger = [] if site.test_path is None else [site.test_ledger_path]
    return list(dict.fromkeys(_normal(path) for path in [site.ledger_path, *test_ledger, *replica]))


def _read(site: SiteSettings) -> list[Path]:
    """What it needs and must not change: code that runs there cannot loosen the site's policy."""
    paths = [
        site.folder / SITE_FILE,
        site.folder / KEY_NAME,
        site.authority_path,
        site.data_path,
        site.prior_path,
        site.test_path,
    ]
    return list(dict.fromkeys(_normal(path) for path in paths if path is not None))


def _hidden(site: SiteSettings) -> list[Path]:
    """Where `prepare` leaves the key of the pseudonyms: next to the cases, which is the site's folder in most sites."""
    places = [site.folder, site.data_path.parent, *([] if site.test_path is None else [site.test_path.parent])]
    return list(dict.fromkeys(_normal(place / PSEUDONYM_KEY) for place in places))


def _addresses(texts: Sequence[str]) -> list[str]:
    """Addresses and networks as systemd takes them.

    Raises:
        UserError: One is none.
    """
    try:
        return [str(ipaddress.ip_network(text)) for text in texts]
    except ValueError as error:
        raise UserError(f"--allow: {error}: expected an address such as 192.0.2.7 or 2001:db8::/32") from None


def _own_address(site: SiteSettings) -> list[str]:
    """The coordinator's, where site.yaml gives no name."""
    host = address_of(site)[0]
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        return []


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path))


def _image(folder: Path) -> dict[str, Any]:
    """Versions of what is installed here, which is what was tested, and the container's user."""
    owner = folder.stat() if folder.exists() else None
    ids = (owner.st_uid, owner.st_gid) if owner is not None and owner.st_uid else (CONTAINER_ID, CONTAINER_ID)
    fedcmr = version("fedcmr")
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": version("torch").partition("+")[0],
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 4 // 5 // 2**20,
        "version": fedcmr,
        "wheel": f"fedcmr-{fedcmr}-py3-none-any.whl",
        "uid": ids[0],
        "gid": ids[1],
    }
