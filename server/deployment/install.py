"""The coordinator's services as hardened systemd units: SuperLink and executor, delivery, and the gateway before them.

There is no compose file: `fedcmr-server start` runs several processes that share a folder and its secrets, which one
unit holds together and a container image would only wrap once more.
"""

import shutil
import sys
from pathlib import Path

from fedcmr.server.deployment.coordinator import Coordinator
from fedcmr.shared.service_files import check_account, check_paths, render

TEMPLATES = Path(__file__).parent / "templates"
LOGROTATE = "fedcmr.logrotate"
FILES = ("fedcmr-coordinator.service", "fedcmr-gateway.service", LOGROTATE)
DELIVERY = "fedcmr-delivery.service"
NGINX = "/usr/sbin/nginx"
"""Its path on Debian; the folder is often not in the PATH of an account without root."""


def service_files(
    coordinator: Coordinator, user: str, program: Path, nginx: Path, delivered: Path | None = None
) -> dict[str, str]:
    """The units and the rotation of their logs, by file name.

    Args:
        coordinator: The study's coordinator, with its folder's path on the machine of the services.
        user: The account that owns the folder and runs everything, nginx too.
        program: Path of `fedcmr-server` on that machine.
        nginx: Path of nginx on that machine.
        delivered: Folder of the run whose synthetic cases a delivery unit serves; None for no such unit.

    Raises:
        UserError: A path or the account cannot be used.
    """
    check_account(user)
    check_paths([coordinator.folder, program, nginx, *([delivered] if delivered else [])], seen_by_service=True)
    values = {
        "folder": str(coordinator.folder),
        "name": coordinator.name,
        "user": user,
        "program": str(program),
        "nginx": str(nginx),
        "run": str(delivered),
        "loopback": coordinator.host in ("127.0.0.1", "::1", "localhost"),
        "delivery_port": coordinator.delivery_port,
    }
    return {file: render(TEMPLATES, f"{file}.j2", values) for file in (*FILES, *([DELIVERY] if delivered else []))}


def next_steps(coordinator: Coordinator, user: str, out: Path, delivers: bool = False) -> str:
    """The remaining steps for the administrator, as commands."""
    return "\n  ".join(
        [
            "as root:",
            f"useradd --system --shell /usr/sbin/nologin {user}",
            f"chown -R {user}:{user} {coordinator.folder}",
            f"cp {out}/*.service /etc/systemd/system/",
            f"install -m 644 {out / LOGROTATE} /etc/logrotate.d/fedcmr",
            "systemctl disable --now nginx    # Debian's own, which would hold the port",
            "systemctl daemon-reload",
            f"systemctl enable --now fedcmr-coordinator fedcmr-gateway{' fedcmr-delivery' if delivers else ''}",
        ]
    )


def installed_programs() -> tuple[Path, Path]:
    """`fedcmr-server` next to this Python, and nginx."""
    return Path(sys.executable).with_name("fedcmr-server"), Path(shutil.which("nginx") or NGINX)
