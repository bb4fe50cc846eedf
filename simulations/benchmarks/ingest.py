"""How `prepare` reads: `python -m fedcmr.simulations.benchmarks.ingest speed | memory | fuzz`.

    speed     images per second, against a bare loop of pydicom or nibabel over the same files in the same run
    memory    peak of all processes together, by number of files
    fuzz      damaged files of every layout, each of which must end as a case, with a reason code or with one line

Files are simulated scans, written first into a temporary folder (`--folder` chooses another disk; `fuzz` is fastest in
memory, such as /dev/shm).
"""

import argparse
import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from rich.console import Console
from rich.table import Table

from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.file_names import MASKS_NAME
from fedcmr.shared.version import add_version
from fedcmr.simulations.benchmarks.ingest_fuzz import FAILED_NAME, fuzz
from fedcmr.simulations.benchmarks.ingest_reading import (
    compress,
    convert,
    images_per_second,
    peak_memory,
    write_studies,
)
from fedcmr.simulations.hospital import write_hospital

MIN_SHARE = 0.8
"""Share of the bare loop's images per second, required of each process."""
MAX_GROWTH = 1.25
"""Limit on the growth of peak memory from the fewest to the most files: constant but for the headers kept."""
SYNTAXES = {"explicit": ExplicitVRLittleEndian, "rle": RLELossless, "jpeg-2000": JPEG2000Lossless}
NIFTI = "nifti"
"""The same images as compressed NIfTI in the plain layout, a file a cine."""

console = Console(highlight=False)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m fedcmr.simulations.benchmarks.ingest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("speed", help="images per second against a bare loop")
    sub.add_argument("--patients", type=int, default=2, help="of each vendor, 225 files each (default: %(default)s)")
    sub.add_argument("--num-processes", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    sub.add_argument("--repeats", type=int, default=3, help="the median counts (default: %(default)s)")
    sub.add_argument(
        "--syntax",
        nargs="+",
        choices=(*SYNTAXES, NIFTI),
        default=["explicit", NIFTI],
        help="transfer syntaxes of DICOM, or nifti (default: explicit nifti)",
    )
    sub.set_defaults(command=_speed)
    sub = commands.add_parser("memory", help="peak memory by number of files")
    sub.add_argument("--num", type=int, nargs="+", default=[1000, 20_000], help="files (default: 1000 20000)")
    sub.add_argument("--num-processes", type=int, default=1, help="(default: %(default)s)")
    sub.add_argument("--masks", action="store_true", help="with masks, so that no segmenter looks for the heart")
    sub.set_defaults(command=_memory)
    sub = commands.add_parser("fuzz", help="damaged files")
    sub.add_argument("--num", type=int, default=10_000, help="files (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=1, help="decides every byte (default: %(default)s)")
    sub.add_argument("--num-processes", type=int, default=1, help="(default: %(default)s)")
    sub.add_argument("--keep", type=Path, metavar="DIR", help="copy the files there over which a reader failed")
    sub.set_defaults(command=_fuzz)
    for sub in commands.choices.values():
        sub.add_argument("--folder", type=Path, help="where to put the files (default: the temporary folder)")
        sub.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    """One command in a folder of its own, its figures kept."""
    figures: dict[str, Any] = {"machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0]}}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        try:
            figures |= options.command(options, Path(folder))
        except OSError as error:
            raise UserError(f"{folder} cannot be used: {error.strerror or 'input/output error'}") from None
    if options.json:
        write_atomically(options.json, (json.dumps(figures, indent=2) + "\n").encode())


def _speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images per second, `prepare`'s reading and the bare loop in turn."""
    for vendor in ("Siemens", "Philips", "GE"):
        write_hospital(folder / "explicit" / vendor, vendor, options.patients, 9, 25, 1, vendor.lower())
    for masks in folder.rglob(MASKS_NAME):
        masks.unlink()  # the bare loop reads none
    figures: dict[str, Any] = {"min_share": MIN_SHARE, "speed": []}
    table = Table("transfer syntax", "processes", "prepare, images/s", "bare loop, images/s", "share")
    for syntax in options.syntax:
        source = folder / syntax
        if syntax == NIFTI:
            convert(folder / "explicit", source)
        elif syntax != "explicit":
            compress(folder / "explicit", source, SYNTAXES[syntax])
        for num_processes in options.num_processes:
            row = {"syntax": syntax, "num_processes": num_processes}
            layout = "plain" if syntax == NIFTI else "dicom"
            row |= images_per_second(source, num_processes, options.repeats, layout)
            figures["speed"].append(row)
            table.add_row(
                syntax, str(num_processes), *(f"{row[name]:.0f}" for name in ("prepare", "bare")), f"{row['share']:.2f}"
            )
    console.print(table)
    worst = min(row["share"] for row in figures["speed"])
    met = "met" if worst >= MIN_SHARE else "missed"
    console.print(f"required: at least {MIN_SHARE} of the bare loop's; {met} with {worst:.2f}")
    return figures


def _memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak memory of `fedcmr-client prepare` and all processes below it."""
    figures: dict[str, Any] = {"max_growth": MAX_GROWTH, "memory": []}
    table = Table("files", "cases", "peak, MiB", "files/s, to cases")
    for num_files in sorted(options.num):
        source = folder / f"scans-{num_files}"
        write_studies(source, num_files, options.masks)
        row = peak_memory(source, folder / f"cases-{num_files}", options.num_processes)
        figures["memory"].append(row)
        table.add_row(*(f"{row[name]:.0f}" for name in ("num_files", "num_cases", "peak_mib", "files_per_second")))
    console.print(table)
    growth = figures["memory"][-1]["peak_mib"] / figures["memory"][0]["peak_mib"]
    met = "met" if growth <= MAX_GROWTH else "missed"
    console.print(f"required: at most {MAX_GROWTH} times as much for most files as for fewest; {met} with {growth:.2f}")
    return figures | {"growth": growth}


def _fuzz(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Damaged files by layout, form and outcome."""
    counts = fuzz(folder, options.num, options.seed, options.num_processes)
    layouts: dict[str, Counter[str]] = defaultdict(Counter)
    for (layout, _, outcome), number in counts.items():
        layouts[layout][outcome] += number
    layouts["all"] = sum(layouts.values(), Counter[str]())
    table = Table("layout", "outcome", "files", "share")
    for layout, outcomes in layouts.items():
        for outcome, number in outcomes.most_common():
            table.add_row(layout, outcome, str(number), f"{number / outcomes.total():.1%}")
        table.add_section()
    console.print(table)
    failed = sorted((folder / FAILED_NAME).iterdir()) if (folder / FAILED_NAME).exists() else []
    if options.keep and failed:
        options.keep.mkdir(parents=True, exist_ok=True)
        for path in failed:
            shutil.copy(path, options.keep)
    met = f"missed by {len(failed)}" if failed else "met by all"
    console.print(f"required: a case, a code that names what is wrong, or one line; {met} of {options.num}")
    found = {f"{layout}, {form}: {outcome}": number for (layout, form, outcome), number in sorted(counts.items())}
    return {"num": options.num, "seed": options.seed, "num_failed": len(failed), "fuzz": found}


if __name__ == "__main__":
    raise SystemExit(main())
