"""The coordinator's services as hardened systemd units: SuperLink and executor, and the gateway before them.

There is no compose file: `fedcmr-server start` runs several processes that share a folder and its secrets, which one
unit holds together and a container image would only wrap once more.
"""

import shutil
import sys
from pathlib import Path

from shared.service_files import check_account, check_paths, render

TEMPLATES = Path(__file__).parent / "templates"
FILES = ("fedcmr-coordinator.service", "fedcmr-gateway.service", "fedcmr.logrotate")
NGINX = "/usr/sbin/nginx"
"""Where Debian has it; an account without root often lacks the folder in its PATH."""


def service_files(folder: Path, name: str, user: str, program: Path, nginx: Path) -> dict[str, str]:
    """The units and the rotation of their logs, by file name.

    Args:
        folder: The coordinator's, as the machine of the services sees it.
        name: The study's.
        user: The account that owns the folder and runs everything, nginx too.
        program: `fedcmr-server`, as that machine sees it.
        nginx: The same of nginx.

    Raises:
        UserError: A path or the account cannot be used.
    """
    check_account(user)
    check_paths([folder, program, nginx], seen_by_service=True)
    values = {"folder": str(folder), "name": name, "user": user, "program": str(program), "nginx": str(nginx)}
    return {file: render(TEMPLATES, f"{file}.j2", values) for file in FILES}


def next_steps(folder: Path, user: str, out: Path) -> str:
    """What is left for the administrator, as commands."""
    return "\n  ".join([
        "as root:",
        f"useradd --system --shell /usr/sbin/nologin {user}",
        f"chown -R {user}:{user} {folder}",
        f"cp {out}/*.service /etc/systemd/system/",
        f"install -m 644 {out / FILES[2]} /etc/logrotate.d/fedcmr",
        "systemctl disable --now nginx    # Debian's own, which would hold the port",
        "systemctl daemon-reload",
        "systemctl enable --now fedcmr-coordinator fedcmr-gateway",
    ])  # fmt: skip


def installed_programs() -> tuple[Path, Path]:
    """`fedcmr-server` beside this Python, and nginx."""
    return Path(sys.executable).with_name("fedcmr-server"), Path(shutil.which("nginx") or NGINX)
