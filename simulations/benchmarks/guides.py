"""What a guide is worth: public scans that are bent, drawings, or none; and whether the generator should go over them.

    python -m fedcmr.simulations.benchmarks.guides --guides DIR... --test DIR --out DIR

Every row is a synthetic set of the public prior only, with hearts of the same seed. A segmenter learns from each for
the same number of steps, and from the guides' own scans; it is tested on patients who are none of the guides. Beside
it stands how far the images are from these patients' (the measures of a report's fidelity). Sets and segmenters stay
in `--out`: the same command goes on where it was interrupted. Choices are made with it, so the test patients are
development ones.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedcmr.server.command_line import SettingsParser
from fedcmr.server.evaluation.fidelity.measure import OWN, Effort, measure_fidelity
from fedcmr.server.experiments.preconditions import check_patients_unseen
from fedcmr.server.generation.guide_scans import read_guides
from fedcmr.server.generation.synthesis import synthesize
from fedcmr.server.settings import Config, load
from fedcmr.server.tasks.segmentation.scores import paired_dice, per_patient, score_values
from fedcmr.server.tasks.segmentation.training import train_on_cases
from fedcmr.shared.case import INDEX_NAME, UNKNOWN, Case, load_cases, save_case, write_index
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.tasks.segmentation.inference import predict_masks
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter, save_segmenter
from fedcmr.shared.tasks.segmentation.teaching import is_segmented
from fedcmr.shared.version import add_version

DRAWN, REAL = "drawn", "real scans"
SETS: dict[str, dict[str, Any]] = {
    DRAWN: {"guides": []},
    "pure noise": {"guides": [], "t_start": 0.0, "num_steps": 8},
    "scans": {"num_steps": 0},
    "scans, gone over": {"num_steps": 2, "t_start": 0.9},
}
"""Row -> settings of `synthesis`."""
SMALL = ("width=16", "size_px=64", "crop_px=64", "pixel_mm=2", "loss=fixed", "num_steps=800")
"""The segmenters' settings, of the shipped prior's grid, where none are given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0, or 2 with one line on bad input."""
    parser = SettingsParser(
        prog="python -m fedcmr.simulations.benchmarks.guides",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("--guides", type=Path, nargs="+", required=True, metavar="DIR", help="public prepared cases")
    parser.add_argument("--test", type=Path, required=True, metavar="DIR", help="development patients, no guides")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="sets, segmenters and guides.json")
    parser.add_argument("--num", type=int, default=240, help="hearts of a set (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the real-or-synthetic networks (default: as a report)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows to make besides the first")
    parser.add_settings()
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def synthetic_set(name: str, config: Config, num: int, out: Path) -> tuple[list[Case], float | None]:
    """The cases of a row, and the seconds that a heart took; None for those that were there."""
    folder = out / name.replace(", ", "_").replace(" ", "_")
    if (folder / INDEX_NAME).is_file():
        return load_cases(folder), None
    settings = replace(config.synthesis, num_cases=num, **SETS[name])
    prior = load_prior(None if config.prior is None else Path(config.prior))
    began = time.monotonic()
    made = synthesize(prior, None, settings, [UNKNOWN], config.seed, config.device, f"making {name}").cases
    seconds = (time.monotonic() - began) / num
    for case in made:
        save_case(folder, case)
    write_index(folder, [case.info for case in made])
    return made, seconds


def compare(
    config: Config, test: Path, out: Path, num: int, effort: Effort, only: Sequence[str]
) -> list[dict[str, Any]]:
    """One row a set: `name`, `dice` and `ef_mae_points` of the segmenter with intervals, `difference` to the first."""
    device = pick_device(config.device)
    tests = [case for case in load_cases(test) if is_segmented(case)]
    if not tests:
        raise UserError(f"{test} holds no case with complete masks: nothing can be tested there")
    groups, rows = [""] * len(tests), []
    options = (groups, config.evaluation.num_bootstrap, config.seed)
    first = None
    grid = load_prior(None if config.prior is None else Path(config.prior)).grid
    for name in [DRAWN, *(row for row in [*SETS, REAL] if row != DRAWN and (not only or row in only))]:
        seconds = None
        if name == REAL:
            cases = [case for folder in config.synthesis.guides for case in load_cases(folder)]
        else:
            cases, seconds = synthetic_set(name, config, num, out)
        path = out / f"{name.replace(', ', '_').replace(' ', '_')}.safetensors"
        if not path.is_file():
            model = train_on_cases(
                cases,
                config.segmentation,
                config.seed,
                device,
                path.with_suffix(".checkpoint"),
                f"learning from {name}",
            )
            save_segmenter(path, model, {"trained_on": name})
        values = per_patient(tests, predict_masks(load_segmenter(path).to(device), tests))
        first = values if first is None else first
        figures = score_values(values, *options)["all"]
        row = {
            "name": name,
            "num_cases": len(cases),
            "seconds_per_heart": seconds,
            **{part: figures[part] for part in ("dice", "ef_mae_points", "ef_bias_points", "ci95")},
            "difference": paired_dice(values, first, *options)["all"],
        }
        if name != REAL and effort.num_steps:
            group = measure_fidelity({"test": tests}, {"test": cases}, {}, grid, effort)["groups"].get("test")
            row["fidelity"] = None if group is None else group["comparisons"]
        rows.append(row)
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    shown = Table("made from", "Dice", "points over the first", "EF MAE", "bias", "FRD", "AUC heart", "AUC image")
    for row in rows:
        difference, own = row["difference"], (row.get("fidelity") or {}).get(OWN, {})
        low, high = difference["ci95"] or (float("nan"),) * 2
        change = "-" if row is rows[0] else f"{difference['difference_points']:+.1f} ({low:+.1f} to {high:+.1f})"
        numbers = (row["ef_mae_points"], row["ef_bias_points"], own.get("frd"))
        ends = [f"{own[key]:.2f}" if own.get(key) is not None else "-" for key in ("auc_heart", "auc_image")]
        shown.add_row(
            row["name"],
            f"{row['dice']['mean']:.3f}",
            change,
            *("-" if number is None else f"{number:.1f}" for number in numbers),
            *ends,
        )
    return shown


def _run(options: argparse.Namespace) -> None:
    given = [f"synthesis.guides=[{','.join(str(folder.resolve()) for folder in options.guides)}]"]
    config = load("default", [*given, *(f"segmentation.{setting}" for setting in SMALL), *options.settings])
    unknown = sorted({*options.only} - {*SETS, REAL})
    if unknown:
        raise UserError(f"--only: expected some of {', '.join([*SETS, REAL])}, got {unknown[0]}")
    if options.num < 8:
        raise UserError(f"--num: expected >= 8, got {options.num}")
    check_patients_unseen(config, [options.test])
    options.out.mkdir(parents=True, exist_ok=True)
    effort = Effort(seed=config.seed) if options.steps is None else Effort(num_steps=options.steps, seed=config.seed)
    rows = compare(config, options.test, options.out, options.num, effort, options.only)
    guides = read_guides(config.synthesis.guides)
    facts = {"num_guides": len(guides.scans) if guides else 0, "torch_threads": torch.get_num_threads()}
    path = options.out / "guides.json"
    write_atomically(path, (json.dumps({**facts, "rows": rows}, indent=2) + "\n").encode())
    Console(width=max(Console().width, 120)).print(table_of(rows))
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
