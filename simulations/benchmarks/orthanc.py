"""A real archive on this machine: Orthanc with DICOMweb and DIMSE, on loopback and in a folder of its own.

    with Orthanc(folder) as archive:
        archive.store(paths)
        archive.url, archive.dimse          # for `fedcmr-client import --dicomweb` and `--dimse`

Orthanc is GPL-3.0, a program of its own; Debian's packages are `orthanc` and `orthanc-dicomweb`.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import requests

from fedcmr.shared.errors import UserError
from fedcmr.shared.free_ports import free_ports

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
LOOPBACK = "127.0.0.1"
AET, CLIENT_AET = "ORTHANC", "FEDCMR"
START_S = 60.0


def find_orthanc() -> str | None:
    """The program's path, or None; Debian keeps it where an account's PATH does not lead."""
    return shutil.which("Orthanc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))


class Orthanc:
    """A server that lives as long as the `with` block; what it stores stays in its folder.

    Attributes:
        receiving_port: Where it looks for `CLIENT_AET` when it is asked to move images there.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        """Prepare a server.

        Args:
            folder: Of its storage; made where it is missing.
            settings: Options of Orthanc's configuration that replace those here.
        """
        program = find_orthanc()
        if program is None or not PLUGIN.is_file():
            raise UserError("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
        self.program, self.folder = program, folder
        self.http_port, self.dicom_port, self.receiving_port = free_ports(3)
        self.auth: tuple[str, str] | None = next(iter(settings.get("RegisteredUsers", {}).items()), None)
        folder.mkdir(parents=True, exist_ok=True)
        configuration = {
            "Name": "archive",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "Plugins": [str(PLUGIN)],
            "HttpPort": self.http_port,
            "HttpBindAddresses": [LOOPBACK],
            "DicomPort": self.dicom_port,
            "DicomAet": AET,
            "DicomCheckCalledAet": True,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": self.auth is not None,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "DicomModalities": {"fedcmr": [CLIENT_AET, LOOPBACK, self.receiving_port]},
            **settings,
        }
        self.configuration = folder / "orthanc.json"
        self.configuration.write_text(json.dumps(configuration), encoding="utf-8")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> str:
        """Address of its own REST interface."""
        return f"http://{LOOPBACK}:{self.http_port}"

    @property
    def url(self) -> str:
        """Root of its DICOMweb service."""
        return f"{self.root}/dicom-web"

    @property
    def dimse(self) -> str:
        """AET@HOST:PORT."""
        return f"{AET}@{LOOPBACK}:{self.dicom_port}"

    def start(self) -> None:
        """Start the server, and wait until both of its ports answer."""
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [self.program, str(self.configuration)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_S
        for port in (self.http_port, self.dicom_port):
            while True:
                try:
                    socket.create_connection((LOOPBACK, port), timeout=1.0).close()
                    break
                except OSError:
                    if self.process.poll() is not None or time.monotonic() > deadline:
                        self.stop()
                        raise UserError(f"Orthanc does not start: see {self.folder / 'log.txt'}") from None
                    time.sleep(0.1)

    def stop(self) -> None:
        """End the server in order."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def kill(self) -> None:
        """End the server as a power cut does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def __enter__(self) -> "Orthanc":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, method: str, path: str, content: bytes | None = None) -> Any:
        """One request to its own REST interface; returns what it answers in JSON."""
        session = requests.Session()
        session.trust_env = False
        answer = session.request(method, f"{self.root}{path}", data=content, auth=self.auth, timeout=60)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def store(self, paths: Iterable[Path]) -> None:
        """Put files into the archive."""
        for path in paths:
            self.ask("POST", "/instances", path.read_bytes())

    def studies(self) -> list[str]:
        """Its own names of the studies that it holds."""
        return [str(one) for one in self.ask("GET", "/studies")]
