"""How well a ResNet50 trained on synthetic data alone predicts the ejection fraction, next to its competitors.

`python -m fedcmr.simulations.benchmarks.utility --config acdc --seeds 3 data_root=/data/acdc` runs the study once per
seed in `DIR/<config>-seed<k>`, with every row as a baseline, and prints three tables: figures per row and vendor,
differences to the main row, and with `--mnms` the predictions on the patients of an M&Ms folder. The same command
resumes where it was interrupted and adds the rows or seeds that are new; `fedcmr-server report` then writes a seed's
own page again.

Seeds vary the privacy noise, the synthetic hearts and the ResNet50, never the patients: all use the cases that the
first one prepared. A row's figure is the mean over seeds of that seed's figure on all test patients. Its 95 % interval
is the percentile interval over `evaluation.num_bootstrap` resamples of the patients: a resample draws the same
patients, with replacement, for every seed and row, and averages the seeds' figures on them. So it shows what other
patients would change; what other seeds would is the standard deviation next to it. A difference is taken patient by
patient: the mean over seeds of the main row's absolute error minus that of the other row, averaged over the patients
of a resample.

A row that is a study of its own needs about 0.2 GB of disk per seed.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedcmr.client.ingest.prepare import prepare
from fedcmr.server.command_line import SettingsParser
from fedcmr.server.evaluation.score import METRICS, Score
from fedcmr.server.evaluation.tables import paired_table, table
from fedcmr.server.experiments.models import read_predictions
from fedcmr.server.experiments.names import MAIN_MODEL, model_name, model_rank
from fedcmr.server.federation.outcome import privacy_spent
from fedcmr.server.federation.state import read_study
from fedcmr.server.run_folder import REGRESSOR_NAME, RunFolder, load_run
from fedcmr.server.settings import BASELINES, load
from fedcmr.shared.case import load_cases
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import load_regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef
from fedcmr.shared.version import add_version
from fedcmr.simulations.benchmarks.seeds import (
    default_rows,
    model_seconds,
    models_of,
    prepare_seeds,
    run_seeds,
    with_rows,
)

MAX_ABOVE_POOLED, MAX_COST_OF_LEAVING_OUT = 2.0, 3.0
"""EF points that the project allows itself where several vendors take part: main row - pooled real cases, per vendor,
and study without a vendor's only site - main row, for that vendor's patients."""
PIPE_WIDTH = 130
"""Columns where there is no terminal."""

Predictions = dict[str, dict[str, dict[str, Any]]]
"""{model: {test set: vendors, true, predicted}}, as a run folder holds them."""


def main() -> int:
    """Run the studies, print the tables, write JSON on request."""
    what, _, details = __doc__.partition("\n\n")
    parser = SettingsParser(
        prog="python -m fedcmr.simulations.benchmarks.utility",
        description=what,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("--config", default="default", help="name or path (default: %(default)s)")
    parser.add_argument(
        "--seeds",
        type=_positive,
        default=3,
        metavar="N",
        help="that many seeds, from the config's on (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        metavar="A,B",
        help=f"next to the main one, of {', '.join(BASELINES)}, epsilon_VALUE "
        "(default: all that differ from each other)",
    )
    parser.add_argument(
        "--jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="seeds at a time, each on its share of the cores (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks"),
        metavar="DIR",
        help="receives the run folders (default: %(default)s)",
    )
    parser.add_argument("--mnms", type=Path, metavar="DIR", help="also predict the patients of this M&Ms folder")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    parser.add_settings()
    options = parser.parse_args()
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    # The rows take the place of the baselines below; until then evaluation.cross_vendor may need one of them.
    config = load(options.config, ["evaluation.baselines=[pooled_real]", *options.settings])
    # As fedcmr-simulate does: the folders' own settings are read from other working directories too.
    config.prior = config.prior and str(Path(config.prior).resolve())
    config.data_root = config.data_root and str(Path(config.data_root).resolve())
    rows = default_rows(config) if options.rows is None else [row for row in options.rows.split(",") if row]
    config = replace(config, evaluation=with_rows(config.evaluation, rows))
    if options.mnms and not options.mnms.is_dir():
        raise UserError(f"--mnms {options.mnms} is not a folder: give the one that holds the CSV of M&Ms")
    paths = prepare_seeds(config, options.out, Path(options.config).stem, options.seeds)
    models = models_of(config, load_run(paths[0]).site_names())
    run_seeds(paths, models, options.jobs)

    runs = [load_run(path) for path in paths]
    sites = {name: ", ".join(site.vendors) for name, site in read_study(runs[0]).items()}
    num_bootstrap = config.evaluation.num_bootstrap
    figures = {
        "config": options.config,
        "seeds": [run.config.seed for run in runs],
        "num_bootstrap": num_bootstrap,
        "privacy": [privacy_spent(run) for run in runs],
        "test_sets": compare([read_predictions(run) for run in runs], models, sites, num_bootstrap, config.seed),
        "seconds": {model: [round(model_seconds(run, model)) for run in runs] for model in models},
        "mnms": illustrate(runs, options.mnms, options.out / "mnms" / "cases") if options.mnms else [],
    }
    _print(figures)
    if options.json:
        write_atomically(options.json, (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())


def compare(
    seeds: Sequence[Predictions], models: Sequence[str], sites: Mapping[str, str], num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """All figures of all rows.

    Args:
        seeds: Each seed's predictions.
        models: The rows, the main one among them.
        sites: The vendor of each site.
        num_bootstrap: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        {test set: {"rows": {model: {vendor or "all": score over seeds, with "per_seed"}}, "main_minus": {model:
        {vendor or "all": paired difference to the main row, with "required"}}}}.

    Raises:
        UserError: The seeds' patients differ.
    """
    figures = {}
    for test_set, patients in seeds[0][MAIN_MODEL].items():
        true, vendors = patients["true"], patients["vendors"]
        predicted = {}
        for model in sorted(models, key=model_rank):
            answers = [predictions[model][test_set] for predictions in seeds]
            if any((answer["true"], answer["vendors"]) != (true, vendors) for answer in answers):
                raise UserError(f"{model}: the test patients of the seeds differ: give a new folder as --out")
            predicted[model] = np.array([answer["predicted"] for answer in answers])
        rows, differences = {}, {}
        for model, values in predicted.items():
            rows[model] = table(true, values, vendors, num_bootstrap, seed)
            each = [table(true, of_seed, vendors, num_bootstrap, seed) for of_seed in values]
            for vendor, score in rows[model].items():
                score["per_seed"] = {name: [of_seed[vendor][name] for of_seed in each] for name in METRICS}
            if model == MAIN_MODEL:
                continue
            differences[model] = paired_table(true, predicted[MAIN_MODEL], values, vendors, num_bootstrap, seed)
            for vendor, difference in differences[model].items():
                difference["required"] = requirement(model, vendor, difference["difference_points"], sites)
        figures[test_set] = {"rows": rows, "main_minus": differences}
    return figures


def requirement(model: str, vendor: str, main_minus: float | None, sites: Mapping[str, str]) -> dict[str, Any] | None:
    """What the project requires of a difference: {"limit": for the reader, "met"}; None where it requires nothing.

    Args:
        model: The row.
        vendor: Whose patients, or "all".
        main_minus: The main row's mean absolute error minus this row's, EF points.
        sites: The vendor of each site.
    """
    if len(set(sites.values())) < 2 or main_minus is None:
        return None
    if model == "pooled_real" and vendor != "all":
        return {"limit": f"<= {MAX_ABOVE_POOLED:g}", "met": main_minus <= MAX_ABOVE_POOLED}
    left_out = sites.get(model.removeprefix("without_")) if model.startswith("without_") else None
    if left_out == vendor and list(sites.values()).count(vendor) == 1:
        return {"limit": f">= -{MAX_COST_OF_LEAVING_OUT:g}", "met": main_minus >= -MAX_COST_OF_LEAVING_OUT}
    return None


def illustrate(runs: Sequence[RunFolder], source: Path, cases_folder: Path) -> list[dict[str, Any]]:
    """Every seed's main ResNet50 on the patients of an M&Ms folder, in EF as a fraction; too few for a score."""
    prepare(source, cases_folder, "mnms", num_processes=os.cpu_count() or 1)
    cases = load_cases(cases_folder)
    answers = []
    for run in runs:
        device = pick_device(run.config.device)
        model = load_regressor(run.path / REGRESSOR_NAME)
        answers.append(predict(model, cases, run.config.regression.num_tta, device).ef)
    return [
        {"patient": k + 1, "vendor": case.info.vendor, "true": patient_ef(case), "predicted": list(of_patient)}
        for k, (case, of_patient) in enumerate(zip(cases, np.stack(answers, axis=1), strict=True))
    ]


def _print(figures: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    num_seeds = len(figures["seeds"])
    for test_set, of_set in figures["test_sets"].items():
        title = (
            f"{figures['config']}: test set {test_set}, mean over {num_seeds} seed(s) and 95 % interval over patients"
        )
        console.print(title, highlight=False)
        console.print(_figures_table(of_set["rows"], figures["seconds"]))
        console.print(
            f"MAE of {model_name(MAIN_MODEL)} minus that of another row, EF points; below 0 it is the better one",
            highlight=False,
        )
        console.print(_differences_table(of_set["main_minus"]))
    spent = [privacy["epsilon"] for privacy in figures["privacy"] if privacy["epsilon"] is not None]
    if spent:
        delta = figures["privacy"][0]["delta"]
        console.print(
            f"epsilon of the main row: {max(spent):.2f} at delta {delta:g} in each seed, as if that one "
            "alone were published",
            highlight=False,
        )
    if figures["mnms"]:
        console.print("M&Ms patients, ejection fraction in %: an illustration, too few for a score", highlight=False)
        console.print(_illustration_table(figures["mnms"]))


def _figures_table(rows: Mapping[str, Mapping[str, Score]], seconds: Mapping[str, list[float]]) -> Table:
    shown = Table()
    for heading in ("trained on", "vendor"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("n", "MAE, EF points", "SD of seeds", "r2", "MSE", "bias", "s per seed"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for model, scores in rows.items():
        for vendor in _shown_vendors(scores):
            score, first = scores[vendor], vendor == _shown_vendors(scores)[0]
            maes = [mae for mae in score["per_seed"]["mae_points"] if mae is not None]
            shown.add_row(
                model_name(model) if first else "",
                vendor,
                str(score["n_patients"]),
                _with_interval(score["mae_points"], score["ci95"]["mae_points"], 1),
                f"{statistics.stdev(maes):.1f}" if len(maes) > 1 else "-",
                _with_interval(score["r2"], score["ci95"]["r2"], 2),
                _with_interval(score["mse"], None, 4),
                _with_interval(score["bias_points"], None, 1),
                f"{statistics.mean(seconds[model]):.0f}" if first else "",
            )
        shown.add_section()
    return shown


def _differences_table(main_minus: Mapping[str, Mapping[str, Score]]) -> Table:
    shown = Table()
    for heading in ("minus", "vendor"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("n", "difference", "required", "met"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for model, differences in main_minus.items():
        for vendor in _shown_vendors(differences):
            values, first = differences[vendor], vendor == _shown_vendors(differences)[0]
            required = values["required"]
            shown.add_row(
                model_name(model) if first else "",
                vendor,
                str(values["n_patients"]),
                _with_interval(values["difference_points"], values["ci95"], 1),
                required["limit"] if required else "",
                ("yes" if required["met"] else "no") if required else "",
            )
        shown.add_section()
    return shown


def _illustration_table(patients: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table()
    for heading in ("patient", "vendor", "true", "predicted", "by seed"):
        shown.add_column(heading, justify="left" if heading == "vendor" else "right")
    for row in patients:
        percent = [100 * value for value in row["predicted"]]
        shown.add_row(
            str(row["patient"]),
            row["vendor"],
            f"{100 * row['true']:.1f}",
            f"{statistics.mean(percent):.1f}",
            ", ".join(f"{value:.1f}" for value in percent),
        )
    return shown


def _shown_vendors(scores: Mapping[str, Any]) -> list[str]:
    """All of them is a line of its own only where there are several."""
    return [vendor for vendor in scores if vendor != "all" or len(scores) > 2]


def _with_interval(value: float | None, limits: Sequence[float] | None, digits: int) -> str:
    """A figure with its interval; a dash where it is undefined."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" [{limits[0]:.{digits}f}, {limits[1]:.{digits}f}]" if limits else "")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
