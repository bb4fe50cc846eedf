"""How far synthetic hearts are from real ones: the measures of a report's fidelity, for folders of cases.

    python -m fedcmr.simulations.benchmarks.fidelity --synthetic DIR --real Siemens DIR --real GE DIR... --json FILE

A group is compared with the synthetic cases of its own vendors, or with all of them where there are none. `--prior`
takes a synthetic set of the public prior only, which every group is compared with. Figures of fewer than eight
patients are not given.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedcmr.server.evaluation.fidelity.anatomy import QUANTITIES
from fedcmr.server.evaluation.fidelity.discriminator import NUM_STEPS
from fedcmr.server.evaluation.fidelity.measure import NUM_DRAWS, Effort, measure_fidelity
from fedcmr.server.formatting import figure, interval
from fedcmr.shared.case import Case, load_cases
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.version import add_version
from fedcmr.shared.views import Grid, grid_of

console = Console(highlight=False)
COLUMNS = {"frd": 1, "kid": 2, "precision": 2, "recall": 2, "auc_heart": 2, "auc_image": 2}
"""Metrics of the first table with their digits."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m fedcmr.simulations.benchmarks.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("--synthetic", type=Path, required=True, metavar="DIR", help="synthetic cases, all on one grid")
    parser.add_argument("--prior", type=Path, metavar="DIR", help="synthetic cases of the public prior only")
    parser.add_argument(
        "--real",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "DIR"),
        help="a group's name and the folders of its real cases; may be given several times",
    )
    parser.add_argument(
        "--steps", type=int, default=NUM_STEPS, help="of the real-or-synthetic networks, 0: none (default: %(default)s)"
    )
    parser.add_argument("--draws", type=int, default=NUM_DRAWS, help="of halves of patients (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of draws and networks (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    for name, least in (("steps", 0), ("draws", 2), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}: expected >= {least}, got {getattr(options, name)}")
    real: dict[str, list[Case]] = {}
    for name, *folders in options.real:
        if not folders or name in real:
            raise UserError(f"--real {name}: expected a name of its own for every group, then its folders")
        real[name] = [case for folder in folders for case in load_cases(folder)]
    made = load_cases(options.synthetic)
    grid = common_grid(made, options.synthetic)
    synthetic = {name: synthetic_of(cases, made) for name, cases in real.items()}
    prior = load_cases(options.prior) if options.prior else []
    effort = Effort(num_steps=options.steps, num_draws=options.draws, seed=options.seed)
    found = measure_fidelity(real, synthetic, dict.fromkeys(real, prior), grid, effort)
    for table in tables(found):
        console.print(table)
    for name, why in found["not_measured"].items():
        console.print(f"{name}: not measured, {why}")
    if options.json:
        write_atomically(options.json, (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())


def common_grid(cases: list[Case], folder: Path) -> Grid:
    """The grid of synthetic cases, on which everything is compared.

    Raises:
        UserError: There is no case, or they are not all on one square grid.
    """
    grids = {(case.frames.shape[2:], grid_of(case)) for case in cases}
    if len(grids) == 1:
        ((height, width), (row_mm, column_mm)) = grids.pop()
        if height == width and row_mm == column_mm:
            return Grid(height, row_mm)
    raise UserError(f"{folder}: expected synthetic cases that are all on one square grid, give such a folder")


def synthetic_of(real: list[Case], synthetic: list[Case]) -> list[Case]:
    """The synthetic cases of a group's vendors; all of them where there are none."""
    vendors = {case.info.vendor for case in real}
    return [case for case in synthetic if case.info.vendor in vendors] or synthetic


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """The block as two tables: distances, then anatomy."""
    distances = Table("group", "compared", *COLUMNS, title="images", title_justify="left")
    hearts = Table(
        "group", "hearts", *QUANTITIES, title="anatomy: mean (SD), Wasserstein distance", title_justify="left"
    )
    for key, group in found["groups"].items():
        name = f"{key}: {group['n_patients']},\n{group['n_half']} a side"
        for comparison, row in group["comparisons"].items():
            cells = [_cell(row, metric, digits) for metric, digits in COLUMNS.items()]
            distances.add_row(name, comparison, *cells)
        for role, row in group["anatomy"].items():
            values = [(row[f"{key}_mean"], row[f"{key}_sd"]) for key in QUANTITIES]
            cells = ["-" if mean is None else f"{figure(mean, 1)} ({figure(sd, 1)})" for mean, sd in values]
            hearts.add_row(name, f"{role}: {row['n_patients']}", *cells)
        for comparison, row in group["comparisons"].items():
            cells = [_cell(row, f"wasserstein_{key}", 1) for key in QUANTITIES]
            hearts.add_row(name, f"distance, {comparison}", *cells)
    yield distances
    yield hearts


def _cell(row: Mapping[str, Any], metric: str, digits: int) -> str:
    """A figure and, below it, its interval; a dash where it was not measured."""
    if row.get(metric) is None:
        return "-"
    bounds = interval(row["ci95"][metric], digits)
    return figure(row[metric], digits) + (f"\n{bounds}" if bounds else "")


if __name__ == "__main__":
    raise SystemExit(main())
