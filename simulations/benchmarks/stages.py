"""Time and memory of each stage of a study: `python -m fedcmr.simulations.benchmarks.stages --config NAME`."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedcmr.server.command_line import SettingsParser
from fedcmr.server.run_folder import load_run
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.version import add_version

SAMPLE_INTERVAL_S = 0.5
GRACE_S = 5.0
"""For a command to end by itself after an interruption."""


def main() -> int:
    """Run a study in a new folder and print what each stage took."""
    parser = SettingsParser(prog="python -m fedcmr.simulations.benchmarks.stages", description=__doc__)
    add_version(parser)
    parser.add_argument("--config", default="default", help="name or path (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="run folder, new or empty (default: a temporary one)")
    parser.add_settings()
    options = parser.parse_args()
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary) / "run"
        command = [sys.executable, "-m", "fedcmr.simulations.cli", "--config", options.config, "--out", str(out)]
        total, peak_kb = watched([*command, *options.settings], "fedcmr-simulate")
        stages = load_run(out).stage_seconds()
    table = Table(title=f"fedcmr-simulate --config {options.config}", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for stage, seconds in stages.items():
        table.add_row(stage, f"{seconds:.0f}", f"{100 * seconds / total:.0f} %")
    table.add_row("all, with start-up", f"{total:.0f}", "100 %")
    console = Console()
    console.print(table)
    console.print(f"peak memory of all processes together: {peak_kb / 2**20:.2f} GiB")


def watched(command: Sequence[str], name: str, interval_s: float = SAMPLE_INTERVAL_S) -> tuple[float, int]:
    """Run a command: its seconds, and the most memory in KiB that it and all below it had together.

    The command does not outlive an interruption of this process.

    Raises:
        UserError: It failed.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak_kb = 0
    try:
        while process.poll() is None:
            peak_kb = max(peak_kb, memory_kb(process.pid))
            time.sleep(interval_s)
    except KeyboardInterrupt:
        try:
            process.wait(GRACE_S)  # a terminal's Ctrl-C has reached it as well, a supervisor's SIGTERM has not
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise
    if process.returncode != 0:
        raise UserError(f"{name} ended with exit code {process.returncode}: see its message above")
    return time.monotonic() - started, peak_kb


def memory_kb(pid: int) -> int:
    """Proportional memory of a process and all below it, in KiB (Linux); shared pages count once."""
    total, open_pids = 0, [pid]
    while open_pids:
        current = open_pids.pop()
        try:
            lines = Path(f"/proc/{current}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for task in Path(f"/proc/{current}/task").iterdir():
                open_pids += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, StopIteration):  # it ended meanwhile
            continue
    return total


if __name__ == "__main__":
    sys.exit(main())
