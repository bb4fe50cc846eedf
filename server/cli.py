"""`fedcmr-server`: what the study's coordinator does besides the federation itself."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fedcmr.server.command_line import SettingsParser
from fedcmr.server.delivery import cli as delivery
from fedcmr.server.deployment import cli as deployment
from fedcmr.server.formatting import seconds
from fedcmr.server.settings import Config, load
from fedcmr.shared.case import VENDORS
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.console import plain_console
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.site_facts import vendor_argument
from fedcmr.shared.version import add_version

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    command: Command = options.command
    return run_command(lambda: command(options))


def _parser() -> SettingsParser:
    """Commands and their options."""
    parser = SettingsParser(prog="fedcmr-server", description=__doc__.replace("`", ""))
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Command, text: str, more: str, settings: bool = False, config: str = "default"
    ) -> SettingsParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}")
        sub.set_defaults(command=command)
        if settings:
            sub.add_config(config)
            sub.add_settings()
        return sub

    again = "The same command again resumes where it stopped."
    sub = add(
        "pretrain",
        _pretrain,
        "train the public prior on simulated hearts, and on public scans",
        f"No patient of a site is involved and no privacy is spent. {again}",
        settings=True,
    )
    sub.add_argument("--out", type=Path, required=True, help="the prior's file, ending in .safetensors")
    sub.add_argument(
        "--public",
        type=Path,
        nargs="+",
        default=[],
        metavar="CASES",
        help="folders of prepared cases of public data sets to learn from, beside simulated hearts",
    )
    sub.add_argument("--minutes", type=_positive_float, help="stop by then (default: train pretrain.num_steps)")

    sub = add(
        "segmenter",
        _segmenter,
        "train the public segmenter that measures generated images",
        f"On simulated hearts only, so that it is an independent evaluator. {again}",
        settings=True,
    )
    sub.add_argument("--out", type=Path, required=True, help="the segmenter's file, ending in .safetensors")
    sub.add_argument("--minutes", type=_positive_float, help="stop by then (default: train all its steps)")

    sub = add(
        "synthesize",
        _synthesize,
        "sample labelled synthetic patients from a finished run",
        "Costs no further privacy: whatever is made from the generator is covered.",
    )
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder with generator.safetensors")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the data set")
    sub.add_argument("--cases", type=_positive, metavar="N", help="number of patients (default: the run's)")
    sub.add_argument(
        "--vendor",
        action="append",
        type=vendor_argument,
        metavar="V",
        help=f"in this style only, may be given again; one of {', '.join(VENDORS)}",
    )
    sub.add_argument("--seed", type=_whole, help="of shapes and noise (default: the run's, which repeats its hearts)")
    sub.add_argument("--dicom", action="store_true", help="also write DICOM that is marked as synthetic")
    sub.add_argument("--nifti", action="store_true", help="also write NIfTI, as 'prepare --format plain' reads it")
    sub.add_argument(
        "--nnunet", action="store_true", help="also write raw data of nnU-Net v2, and datalist.json for MONAI"
    )

    sub = add(
        "train",
        _train,
        "train a task's network on folders of cases",
        "A ResNet50 that predicts the ejection fraction, or a U-Net that finds the ventricles and the muscle. Cases "
        f"without the labels that the task learns are left out and counted. {again}",
        settings=True,
    )
    sub.add_argument("--task", default="ejection_fraction", help="ejection_fraction (default) or segmentation")
    sub.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR", help="folders of cases")
    sub.add_argument("--out", type=Path, required=True, metavar="MODEL", help="new file, ending in .safetensors")

    sub = add(
        "evaluate",
        _evaluate,
        "test a trained network on folders of cases, vendor by vendor",
        "The model's file knows its task. Ejection fraction: errors and agreement of classes with 95 % intervals over "
        "patients, also by field strength, pathology and sex where known, next to those of guessing the mean. "
        "Segmentation: overlap, distance of borders, and errors of the ejection fraction. Nothing is sent, and "
        "no image and no patient's own value is written: a site can evaluate at home and give away no more "
        "than the table it chooses. Groups of fewer than 5 patients are joined, and the figures of patients that "
        "are not simulated are rounded.",
        settings=True,
    )
    sub.add_argument("--model", type=Path, required=True, metavar="MODEL", help="file that 'train' or a run wrote")
    sub.add_argument("--test", type=Path, nargs="+", required=True, metavar="DIR", help="folders of cases")
    sub.add_argument("--json", action="store_true", help="print JSON, in the shape of report.json")
    sub.add_argument("--csv", type=Path, metavar="PATH", help="also write every figure as a line of this CSV file")

    sub = add(
        "report",
        _report,
        "write report.json, report.csv and report.html of a run again",
        "From what the run folder holds; nothing is trained.",
    )
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder")

    for group in (deployment, delivery):
        group.add_commands(add, _positive)
    return parser


def _pretrain(options: argparse.Namespace) -> None:
    """Train the prior."""
    from fedcmr.server.generation.pretraining import pretrain

    config = _config(options)
    _check_suffix(options.out)
    limit = f"{config.pretrain.num_steps} steps" if options.minutes is None else f"{options.minutes:g} minutes"
    print(f"training the public prior, {limit} -> {options.out}", file=sys.stderr)
    pretrain(config, options.out, options.minutes, options.public)
    print(f"wrote {options.out}")


def _segmenter(options: argparse.Namespace) -> None:
    """Train the segmenter."""
    from fedcmr.server.tasks.segmentation.training import PUBLIC, train_segmenter

    config = _config(options)
    _check_suffix(options.out)
    limit = f"{PUBLIC.num_steps} steps" if options.minutes is None else f"{options.minutes:g} minutes"
    print(f"training the segmenter, {limit} -> {options.out}", file=sys.stderr)
    train_segmenter(options.out, config.seed, pick_device(config.device), options.minutes)
    print(f"wrote {options.out}")


def _synthesize(options: argparse.Namespace) -> None:
    """Sample from a run's generator into a folder of its own."""
    from fedcmr.server.dataset.datasheet import study_facts
    from fedcmr.server.dataset.writer import write_release
    from fedcmr.server.federation.outcome import origin, privacy_spent
    from fedcmr.server.generation.synthesis import load_shared_generator, synthesize
    from fedcmr.server.run_folder import load_run
    from fedcmr.server.tasks.segmentation.training import measured_ef
    from fedcmr.shared.models.prior import load_prior
    from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter

    run = load_run(options.run)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"{options.out} exists: give a new or empty folder as --out")
    synthesis = replace(run.config.synthesis, dicom=options.dicom, nifti=options.nifti, nnunet=options.nnunet)
    if options.cases:
        synthesis = replace(synthesis, num_cases=options.cases)
    if options.vendor:
        synthesis = replace(synthesis, vendor_shares=dict.fromkeys(options.vendor, 1.0))
    config = replace(run.config, seed=run.config.seed if options.seed is None else options.seed, synthesis=synthesis)
    prior = load_prior(run.prior_path())
    generator = run.path / "generator.safetensors"
    shared = load_shared_generator(generator, prior)
    print(f"{config.synthesis.num_cases} synthetic patients -> {options.out}", file=sys.stderr)
    made = synthesize(prior, shared, config.synthesis, sorted(shared.styles), config.seed, config.device)
    measured = measured_ef(load_segmenter().to(pick_device(config.device)), made.cases)
    facts = study_facts(run.path.resolve().name, config, prior, generator, privacy_spent(run), *origin(run))
    exports = (synthesis.dicom, synthesis.nifti, synthesis.nnunet)
    write_release(options.out, made.cases, made.requested_efs, measured, facts, *exports)
    print(f"wrote {len(made.cases)} cases to {options.out}; read its DATASHEET.md before giving it away")


def _train(options: argparse.Namespace) -> None:
    """Train a task's network on folders of cases."""
    from fedcmr.server.tasks.facts import of_folders
    from fedcmr.server.tasks.folders import training_cases
    from fedcmr.server.tasks.registry import task_named

    config, task = _config(options), task_named(options.task)
    device = pick_device(config.device)
    _check_suffix(options.out)
    if options.out.exists():
        raise UserError(f"{options.out} exists: give a new file as --out")
    cases = training_cases(task, options.data)
    print(f"{len(cases)} cases, {task.num_steps(config)} steps -> {options.out}", file=sys.stderr)
    unfinished = options.out.with_name(options.out.stem + ".unfinished.safetensors")
    begun = time.monotonic()
    model = task.train(cases, config, device, checkpoint=unfinished)
    taken = f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    print(f"{taken}, trained in {seconds(time.monotonic() - begun)}", file=sys.stderr)
    card = task.save(options.out, model, cases, config, of_folders(options.data))
    print(f"wrote {options.out} and its card {card}")


def _evaluate(options: argparse.Namespace) -> None:
    """Print a model's scores on every test folder."""
    from fedcmr.server.evaluation.export import as_csv
    from fedcmr.server.tasks.folders import evaluate_folders
    from fedcmr.server.tasks.registry import task_of_model

    config = _config(options)
    if options.csv and (options.csv.suffix != ".csv" or not options.csv.parent.is_dir()):
        raise UserError(f"Expected --csv to be a file ending in .csv in an existing folder, got {options.csv}.")
    task = task_of_model(options.model)
    report = evaluate_folders(task, task.load(options.model), options.test, config, pick_device(config.device))
    if options.csv:
        write_atomically(options.csv, as_csv(report).encode())
    if options.json:
        print(json.dumps(report, indent=2, allow_nan=False))
        return
    console = plain_console()
    for folder in options.test:
        for table in task.tables(report, str(folder)):
            console.print(table)


def _report(options: argparse.Namespace) -> None:
    """Write a run's report again."""
    from fedcmr.server.run_folder import load_run
    from fedcmr.server.study import Study, report

    run = load_run(options.run)
    report(Study(run))
    print(f"wrote {run.path / 'report.html'}, and report.json and report.csv next to it")


def _config(options: argparse.Namespace) -> Config:
    return load(options.config, options.settings)


def _check_suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise UserError(f"Expected --out to end in .safetensors, got {path}.")


def _whole(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    """A whole number from 1."""
    if _whole(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _positive_float(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
