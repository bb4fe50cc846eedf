"""Importing from an archive: `python -m fedcmr.simulations.benchmarks.archive --studies 12 200`.

An Orthanc on this machine is filled with simulated studies, which `fedcmr-client import` brings back by each protocol.
Measured are seconds, the most memory of the command and all its children together, and the most that lay on the disk
next to the cases; the cases must be those of `fedcmr-client prepare` on the same files, byte for byte. The more studies
there are, the longer it takes; memory and disk should stay.
"""

import argparse
import json
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from fedcmr.shared.case import INDEX_NAME
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.console import plain_console
from fedcmr.shared.cores import num_cores
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.file_names import MASKS_NAME
from fedcmr.shared.version import add_version
from fedcmr.simulations.benchmarks.orthanc import CLIENT_AET, Orthanc
from fedcmr.simulations.benchmarks.stages import watched
from fedcmr.simulations.hospital import write_hospital
from fedcmr.simulations.scanners.acquisition import SCANNERS

PROTOCOLS = ("dicomweb", "get", "move")
SAMPLE_INTERVAL_S = 0.2
MIB = 2**20
console = plain_console()


@dataclass(frozen=True)
class Measurement:
    """One import.

    Attributes:
        protocol: One of `PROTOCOLS`; "files" is `prepare` on the files themselves.
        num_studies: That were in the archive.
        num_cases: That came of them.
        seconds: Of the whole command.
        peak_memory_mib: Of the command and its children together.
        peak_disk_mib: Of the folder next to the cases.
        study_mib: Of the largest study.
        is_identical: Whether the cases are those of the files, byte for byte.
    """

    protocol: str
    num_studies: int
    num_cases: int
    seconds: float
    peak_memory_mib: float
    peak_disk_mib: float
    study_mib: float
    is_identical: bool


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m fedcmr.simulations.benchmarks.archive",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("--studies", type=int, nargs="+", default=[12], metavar="N", help="(default: 12)")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="(default: all)")
    parser.add_argument("--slices", type=int, default=8, help="of each study (default: %(default)s)")
    parser.add_argument("--phases", type=int, default=15, help="of each slice (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if min(options.studies) < len(SCANNERS):
        raise UserError(f"--studies: expected at least {len(SCANNERS)}, one of each vendor, got {min(options.studies)}")
    measurements: list[Measurement] = []
    for num_studies in options.studies:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for one in measure(Path(folder), num_studies, options.protocols, options.slices, options.phases):
                measurements.append(one)
                if options.json:  # as they come: hundreds of studies take hours on busy cores
                    content = json.dumps([asdict(each) for each in measurements], indent=2) + "\n"
                    write_atomically(options.json, content.encode())
    table = Table(
        "protocol", "studies", "cases", "seconds", "memory, MiB", "disk, MiB", "a study, MiB", "as from files"
    )
    for one in measurements:
        sizes = [f"{value:.0f}" for value in (one.seconds, one.peak_memory_mib)]
        sizes += [f"{value:.1f}" for value in (one.peak_disk_mib, one.study_mib)]
        table.add_row(one.protocol, str(one.num_studies), str(one.num_cases), *sizes, str(one.is_identical))
    console.print(table)
    if not all(one.is_identical for one in measurements):
        raise UserError("an import gives other cases than the same files")


def measure(
    folder: Path, num_studies: int, protocols: list[str], num_slices: int, num_phases: int
) -> Iterator[Measurement]:
    """Fill an archive, and bring its studies back by each protocol.

    Args:
        folder: An empty one to work in.
        num_studies: Shared out among the vendors.
        protocols: Of `PROTOCOLS`.
        num_slices: Of each study.
        num_phases: Of each slice.
    """
    scans = folder / "scans"
    for number, vendor in enumerate(SCANNERS):
        num_patients = len(range(number, num_studies, len(SCANNERS)))
        write_hospital(scans / vendor, vendor, num_patients, num_slices, num_phases, 0, vendor, num_cores())
    for path in scans.rglob(MASKS_NAME):
        path.unlink()  # an archive holds no NIfTI
    studies = {path.parent for path in scans.rglob("*.dcm")}
    study_mib = max(sum(path.stat().st_size for path in study.rglob("*.dcm")) for study in studies) / MIB
    key = folder / "pseudonym.key"
    key.touch(0o600)
    key.write_text(secrets.token_hex(32), encoding="ascii")
    client = [sys.executable, "-m", "fedcmr.client.cli"]
    files = folder / "files"
    command = [*client, "prepare", "--format", "dicom", str(scans), str(files), "--key", str(key)]
    seconds, peak_kb = watched(command, "fedcmr-client prepare", SAMPLE_INTERVAL_S)
    yield Measurement("files", num_studies, _num_cases(files), seconds, peak_kb / 1024, 0.0, study_mib, True)
    with Orthanc(folder / "archive") as orthanc:
        orthanc.store(sorted(scans.rglob("*.dcm")))
        listed = folder / "list.txt"
        uids = [orthanc.ask("GET", f"/studies/{one}")["MainDicomTags"]["StudyInstanceUID"] for one in orthanc.studies()]
        listed.write_text("\n".join(uids), encoding="ascii")
        for protocol in protocols:
            destination = folder / protocol / "train"
            own = CLIENT_AET if protocol == "get" else f"{CLIENT_AET}:{orthanc.receiving_port}"
            where = (
                ["--dicomweb", orthanc.url] if protocol == "dicomweb" else ["--dimse", orthanc.dimse, "--own-aet", own]
            )
            command = [*client, "import", str(destination), *where, "--query", f"list={listed}", "--key", str(key)]
            with _disk_watched(destination.with_name("train.fetching")) as peak_bytes:
                seconds, peak_kb = watched(command, "fedcmr-client import", SAMPLE_INTERVAL_S)
            yield Measurement(
                protocol,
                num_studies,
                _num_cases(destination),
                seconds,
                peak_kb / 1024,
                peak_bytes[0] / MIB,
                study_mib,
                _content(destination) == _content(files),
            )


@contextmanager
def _disk_watched(folder: Path) -> Iterator[list[int]]:
    """The most bytes that files of a folder have had together, in a list of one number that grows."""
    peak, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(SAMPLE_INTERVAL_S):
            peak[0] = max(peak[0], _size(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


def _size(folder: Path) -> int:
    """Bytes of the files below a folder whose files come and go."""
    total = 0
    try:
        for path in folder.rglob("*"):
            total += path.lstat().st_size
    except OSError:
        pass
    return total


def _num_cases(folder: Path) -> int:
    return len(list((folder / "cases").glob("*.npz")))


def _content(folder: Path) -> dict[str, bytes]:
    """Index and cases."""
    paths = [folder / INDEX_NAME, *(folder / "cases").glob("*.npz")]
    return {path.name: path.read_bytes() for path in paths}


if __name__ == "__main__":
    raise SystemExit(main())
