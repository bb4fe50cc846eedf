"""Programs that some tests need, each with its Debian package; `python3 tests/tools.py` names the missing packages.

A browser opens and prints the reports, pdftotext reads the print, dciodvfy checks the DICOM export, nginx is the
gateway of a deployment, openssl speaks old TLS to it, systemd-analyze checks the units, Orthanc is the archive of a
hospital. A test that needs one says `@pytest.mark.tool("nginx")`.
"""

import os
import shutil
from pathlib import Path

PACKAGES = {
    "chromium": "chromium",
    "pdftotext": "poppler-utils",
    "dciodvfy": "dicom3tools",
    "nginx": "nginx",
    "openssl": "openssl",
    "systemd-analyze": "systemd",
    "Orthanc": "orthanc",
    "libOrthancDicomWeb.so": "orthanc-dicomweb",
}
ORTHANC_PLUGINS = Path("/usr/share/orthanc/plugins")
REQUIRED = "FEDCMR_REQUIRE_TOOLS"
"""With this variable set a missing program fails a test instead of skipping it, as with `make test` as root."""


def find(program: str) -> str | None:
    """The program's path, or None; Debian keeps servers, and Orthanc's plug-ins, where no account's PATH leads."""
    plugin = ORTHANC_PLUGINS / program
    if plugin.is_file():
        return str(plugin)
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    return shutil.which(program, path=path)


def packages(programs: tuple[str, ...]) -> list[str]:
    """The Debian packages of those that are missing."""
    return [PACKAGES[program] for program in programs if find(program) is None]


if __name__ == "__main__":
    print(*packages(tuple(PACKAGES)))
