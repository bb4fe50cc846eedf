"""What makes a good segmenter: its network, its loss, or what it was trained on.

`python -m fedcmr.simulations.benchmarks.segmentation networks --train DIR... --test DIR... --out DIR` trains one
segmenter per network on the same cases and tests all of them on the same patients; `losses` does the same with every
loss, and `sources` with real cases, synthetic ones, synthetic and then real ones, and none at all (the public
segmenter, which has seen rendered hearts only). The last row of `networks` is the mean of all networks' probabilities.
`--minutes` gives each training the same time, else all take `segmentation.num_steps` steps. Trained segmenters stay in
`--out`: the same command resumes where it was interrupted. `--start` goes on from the segmenters of an earlier `--out`,
with a learning rate that begins anew; their minutes count. `--only` names some of the rows, so that several machines
or cores can share the trainings.

Without `--test` the training patients are divided into `--folds`: each is tested by a segmenter that has not seen it.
So a choice can be made on development patients alone.

A difference is taken patient by patient: the row's mean Dice minus that of the first row. Times are those of the
trainings here, on however many cores torch may use.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedcmr.client.trainable import group_of
from fedcmr.server.command_line import SettingsParser
from fedcmr.server.evaluation.score import mean_interval
from fedcmr.server.settings import SEGMENTATION_LOSSES, Config, load
from fedcmr.server.tasks.folders import training_cases
from fedcmr.server.tasks.registry import task_named
from fedcmr.server.tasks.segmentation.scores import per_patient, score_values
from fedcmr.server.tasks.segmentation.training import dice, train_on_cases
from fedcmr.shared import checkpoint
from fedcmr.shared.case import ED, Case, load_cases
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.tasks.segmentation.inference import predict_masks
from fedcmr.shared.tasks.segmentation.networks.kinds import NETWORKS
from fedcmr.shared.tasks.segmentation.segmenter import (
    SHIPPED_SEGMENTER,
    Segmenter,
    load_segmenter,
    save_segmenter,
)
from fedcmr.shared.tasks.segmentation.teaching import is_segmented
from fedcmr.shared.version import add_version

DEFAULT_WIDTHS = {"unet": 24, "mednext": 32, "mmnet": 16}
"""What each network is by default here: MedNeXt of size S, the others of about its time per step or less."""

MEAN = "mean of all"
"""Of all networks that have been trained."""

Row = dict[str, object]


@dataclass(frozen=True)
class Candidate:
    """One row: a name, how to get its segmenter, and the file that it is kept in, if it has one of its own."""

    name: str
    make: Callable[[], Segmenter]
    path: Path | None = SHIPPED_SEGMENTER


@dataclass(frozen=True)
class Fold:
    """What is trained on and what is tested on: everything at once, or one part of a cross-validation.

    Attributes:
        train: Real cases.
        tests: Name -> test patients.
        out: Where the trained segmenters are kept.
    """

    train: Sequence[Case]
    tests: dict[str, list[Case]]
    out: Path


class MeanOfSegmenters(Segmenter):
    """The mean of several segmenters' probabilities; all have the grid of the first."""

    def __init__(self, members: Sequence[Segmenter]) -> None:
        super().__init__(members[0].architecture)
        self.network = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """As of `Segmenter`: logarithms of the mean probabilities."""
        return torch.stack([member(images).log_softmax(2) for member in self.network]).logsumexp(0)  # type: ignore


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0, or 2 with one line on bad input."""
    return run_command(lambda: _run(_parser().parse_args(arguments)))


def candidates(
    what: str,
    fold: Fold,
    synthetic: Sequence[Case],
    config: Config,
    device: torch.device,
    minutes: float | None,
    start: Path | None = None,
) -> Iterator[Candidate]:
    """The rows of a comparison, the first of which the others are compared with.

    Args:
        what: "networks", "losses" or "sources".
        fold: Who trains.
        synthetic: Synthetic cases, for "sources".
        config: Settings.
        device: Where to train.
        minutes: Of each training; None takes `segmentation.num_steps` steps.
        start: The folder of an earlier comparison, from whose segmenters of the same names the trainings go on.
    """
    real = fold.train

    def trained(
        name: str, cases: Sequence[Case], first: Callable[[], Segmenter] | None = None, **changes: object
    ) -> Candidate:
        settings = replace(config.segmentation, **changes)  # type: ignore[arg-type]
        path = fold.out / f"{name.replace(' ', '_')}.safetensors"

        def make() -> Segmenter:
            if path.is_file():
                return load_segmenter(path)
            unfinished = path.with_suffix(".checkpoint")
            begun = start / path.name if start else None
            earlier_min = 0.0
            if begun is not None and begun.is_file():
                earlier_min = float(checkpoint.load_metadata(begun).get("minutes", 0))
                initial: Segmenter | None = load_segmenter(begun)
            else:
                initial = first() if first else None
            # Another seed than the earlier training's, whose views it would see again otherwise.
            seed = config.seed + (earlier_min > 0)
            model = train_on_cases(
                cases, settings, seed, device, unfinished, f"training {name}", None, initial, minutes
            )
            assert model.elapsed_s is not None, "it was trained here"
            taken_min = earlier_min + model.elapsed_s / 60
            save_segmenter(path, model, {"minutes": taken_min, "settings": asdict(settings)})
            return load_segmenter(path)

        return Candidate(name, make, path)

    if what == "networks":
        rows = [trained(network, real, network=network, width=DEFAULT_WIDTHS[network]) for network in NETWORKS]
        yield from rows

        def mean() -> Segmenter:
            there = [row.make() for row in rows if row.path is not None and row.path.is_file()]
            return MeanOfSegmenters(there or [row.make() for row in rows]).eval()

        yield Candidate(MEAN, mean, None)
    elif what == "losses":
        for loss in SEGMENTATION_LOSSES:
            yield trained(loss, real, loss=loss)
    else:
        if real:
            yield trained("real pooled", real)
        if synthetic:
            first = trained("synthetic only", synthetic)
            yield first
            if real:
                yield trained("synthetic then real", real, first.make)
        yield Candidate("rendered only", load_segmenter)


def compare(folds: Sequence[Sequence[Candidate]], tests: Sequence[dict[str, list[Case]]], config: Config) -> list[Row]:
    """Train and test every candidate; see `table_of` for what a row holds.

    Args:
        folds: The candidates of every fold, the same in each.
        tests: The test patients of every fold, by the same names; a test set's figures are of those of all folds.
        config: Settings.
    """
    device = pick_device(config.device)
    results: list[Row] = []
    first: dict[str, NDArray[np.float64]] = {}
    for of_folds in zip(*folds, strict=True):
        models = [candidate.make().to(device) for candidate in of_folds]
        minutes = [_minutes_of(candidate) for candidate in of_folds]
        row: Row = {
            "name": of_folds[0].name,
            "network": asdict(models[0].architecture),
            "parameters": sum(parameter.numel() for parameter in models[0].parameters()),
            "minutes": math.fsum(minutes) if all(minutes) else None,
            "test": {},
        }
        for name in tests[0]:
            cases = [case for of_fold in tests for case in of_fold[name]]
            begun = time.monotonic()
            found = [
                labels
                for model, of_fold in zip(models, tests, strict=True)
                for labels in predict_masks(model, of_fold[name])
            ]
            seconds = (time.monotonic() - begun) / len(cases)
            values = per_patient(cases, found)
            figures = score_values(values, [case.info.vendor for case in cases], config.evaluation.num_bootstrap, 0)
            mean = values["dice/mean"]
            difference = mean - first.setdefault(name, mean)
            interval = mean_interval(difference, config.evaluation.num_bootstrap, config.seed)
            row["test"][name] = {  # type: ignore[index]
                **figures["all"],
                "lv_dice_at_ed": float(np.mean(_lv_at_ed(cases, found))),
                "difference": float(difference.mean()),
                "difference_ci95": interval,
                "seconds_per_stack": seconds,
            }
        results.append(row)
    return results


def divided(cases: Sequence[Case], num_folds: int) -> list[tuple[list[Case], list[Case]]]:
    """Training and test patients of every fold of a cross-validation; the scans of a patient are in one fold.

    Raises:
        UserError: There are fewer patients than folds.
    """
    patients = sorted({group_of(case.info) for case in cases})
    if not 2 <= num_folds <= len(patients):
        raise UserError(f"--folds is {num_folds}: with {len(patients)} training patients take 2 to {len(patients)}")
    number = {patient: i % num_folds for i, patient in enumerate(patients)}
    of_case = [number[group_of(case.info)] for case in cases]
    return [
        (
            [case for case, n in zip(cases, of_case, strict=True) if n != k],
            [case for case, n in zip(cases, of_case, strict=True) if n == k and is_segmented(case)],
        )
        for k in range(num_folds)
    ]


def _minutes_of(candidate: Candidate) -> float:
    """Minutes that a segmenter's training took; 0 where it was not trained here."""
    return float(checkpoint.load_metadata(candidate.path).get("minutes", 0)) if candidate.path else 0.0


def _lv_at_ed(cases: Sequence[Case], found: Sequence[torch.Tensor]) -> list[float]:
    """Dice of the left ventricle's cavity at end-diastole, of each patient's whole stack."""
    return [dice(labels[ED], torch.from_numpy(case.masks[ED]))["lv"] for case, labels in zip(cases, found, strict=True)]


def table_of(results: Sequence[Row], test: str) -> Table:
    """One test set's rows for the terminal."""
    shown = Table(title=test, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("")
    for heading in (
        "parameters",
        "minutes",
        "LV",
        "MYO",
        "RV",
        "mean",
        "difference",
        "LV at ED",
        "HD95 LV, mm",
        "EF MAE",
        "s a stack",
    ):
        shown.add_column(heading, justify="right")
    for row in results:
        figures = row["test"][test]  # type: ignore[index]
        overlap = figures["dice"]
        low, high = figures["difference_ci95"] or (float("nan"),) * 2
        mae, distance = figures["ef_mae_points"], figures["hd95_mm"]["lv"]
        shown.add_row(
            str(row["name"]),
            f"{row['parameters']:,}",
            "-" if row["minutes"] is None else f"{row['minutes']:.0f}",
            *(f"{overlap[name]:.3f}" for name in ("lv", "myo", "rv", "mean")),
            f"{figures['difference']:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{figures['lv_dice_at_ed']:.3f}",
            "-" if distance is None else f"{distance:.1f}",
            "-" if mae is None else f"{mae:.1f}",
            f"{figures['seconds_per_stack']:.2f}",
        )
    return shown


def _run(options: argparse.Namespace) -> None:
    config = load(options.config, options.settings)
    device = pick_device(config.device)
    task = task_named("segmentation")
    real = training_cases(task, options.train)
    synthetic = training_cases(task, options.synthetic)
    if not real and (options.what != "sources" or not synthetic):
        raise UserError(
            "no training cases: give folders of cases with --train"
            + (" or --synthetic" if options.what == "sources" else "")
        )
    if options.test:
        tests = {folder.name: [case for case in load_cases(folder) if is_segmented(case)] for folder in options.test}
        for folder in options.test:
            if not tests[folder.name]:
                raise UserError(f"{folder} holds no case with complete masks: nothing can be tested there")
        folds = [Fold(real, tests, options.out)]
    else:
        parts = divided(real, options.folds)
        folds = [Fold(train, {"held out": test}, options.out / f"fold{k}") for k, (train, test) in enumerate(parts)]
    for fold in folds:
        fold.out.mkdir(parents=True, exist_ok=True)
    rows = [
        _only(
            list(candidates(options.what, fold, synthetic, config, device, options.minutes, options.start)),
            options.only,
        )
        for fold in folds
    ]
    results = compare(rows, [fold.tests for fold in folds], config)
    facts = {"what": options.what, "num_training_cases": len(real), "num_synthetic_cases": len(synthetic)}
    facts["folds"] = None if options.test else options.folds
    facts["minutes"] = options.minutes
    facts["torch_threads"] = torch.get_num_threads()
    path = options.out / f"{options.what}.json"
    write_atomically(path, (json.dumps({**facts, "rows": results}, indent=2) + "\n").encode())
    console = Console(width=max(Console().width, 130))  # a narrower terminal wraps lines, not cells
    for name in folds[0].tests:
        console.print(table_of(results, name))
    print(f"wrote {path}")


def _only(rows: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    """The rows of these names, all where there are none.

    Raises:
        UserError: There is no such row.
    """
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise UserError(f"--only: expected some of {', '.join(known)}, got {name}")
    return [row for row in rows if not names or row.name in names]


def _parser() -> argparse.ArgumentParser:
    parser = SettingsParser(prog="segmentation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("networks", "losses", "sources"))
    parser.add_argument("--train", type=Path, nargs="*", default=[], metavar="DIR", help="folders of real cases")
    parser.add_argument(
        "--synthetic", type=Path, nargs="*", default=[], metavar="DIR", help="folders of synthetic cases"
    )
    parser.add_argument("--test", type=Path, nargs="+", default=[], metavar="DIR", help="folders of test patients")
    parser.add_argument(
        "--folds", type=int, default=3, metavar="N", help="parts of a cross-validation, without --test (default: 3)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="trained segmenters and the figures")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows to make (default: all)")
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from the segmenters there")
    parser.add_argument("--minutes", type=float, help="of each training (default: segmentation.num_steps)")
    parser.add_argument("--config", default="default", help="name or path of a config")
    parser.add_settings()
    add_version(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
