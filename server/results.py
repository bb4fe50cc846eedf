"""Collects what a run folder holds into `report.json` and the report's pictures."""

import csv
import json
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.evaluation import as_text_table, table
from server.regression import middle_slices
from server.release import LABELS_NAME
from server.report.build import MAIN_MODEL, Answers, ReportInputs, SampleSheet, build_report
from shared import checkpoint
from shared.case import Case, load_cases
from shared.config import Config, dump
from shared.run_folder import RunFolder
from shared.views import slice_pairs

NUM_SAMPLES = 5
"""Patients per vendor on a sample sheet."""
LIBRARIES = ("fedcmr", "flwr", "torch", "monai", "opacus", "numpy")

Scores = dict[str, dict[str, Any]]
"""{test set: {vendor or "all": figures}}."""


def write_report(run: RunFolder, config: Config, test_sets: list[tuple[str, list[Case]]]) -> None:
    """Write `report.json` and `report.html`."""
    predictions = read_predictions(run)
    scores = {model: score_sets(sets, config) for model, sets in predictions.items()}
    synthetic = load_cases(run.path / "synthetic")
    requested, measured = _labels(run)
    vendors = [case.info.vendor for case in synthetic]
    report = {
        "study": run.path.resolve().name,
        "simulated": config.hospitals.source == "phantom",
        "privacy": privacy_spent(run),
        "regression": scores.get(MAIN_MODEL, {}),
        "baselines": {model: score for model, score in scores.items() if model != MAIN_MODEL},
        "synthetic": {
            "n_cases": len(synthetic),
            "per_vendor": {vendor: vendors.count(vendor) for vendor in sorted(set(vendors))},
            "requested_ef": requested,
            "measured_ef": measured,
        },
        "timing": timing(run),
        "settings": dump(config),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }
    inputs = ReportInputs(
        predictions={
            model: {name: Answers(**answers) for name, answers in sets.items()} for model, sets in predictions.items()
        },
        samples=_samples(synthetic, [case for _, cases in test_sets for case in cases]),
        curves=_curves(run),
        requested_efs=requested,
        measured_efs=measured,
        show_real=config.hospitals.source == "phantom",
    )
    build_report(report, inputs, run.path)


def privacy_spent(run: RunFolder) -> dict[str, Any]:
    """The report's `privacy`, from what the server asked of every site; epsilon is None where privacy was off."""
    _, metadata = checkpoint.load(run.path / "generator.safetensors")
    sites = {
        name: {"epsilon": site["epsilon"], "steps": site["steps"], "refused": len(site["refused"])}
        for name, site in metadata["sites"].items()
    }
    spent = [site["epsilon"] for site in sites.values() if site["epsilon"] is not None]
    accountants = sorted({site["accountant"] for site in metadata["sites"].values() if site["accountant"]})
    return {
        "unit": "one patient at one site, added or removed",
        "accountant": ", ".join(accountants) or None,
        "delta": metadata["delta"],
        "epsilon": max(spent, default=None),
        "sites": sites,
    }


def timing(run: RunFolder) -> dict[str, Any]:
    """Seconds per stage and round, bytes per site and round."""
    rounds = [line for line in run.metrics() if line.get("stage") == "federation" and "round" in line]
    num_sites = max(1, len(run.site_names()))
    return {
        "seconds_per_stage": run.stage_seconds(),
        "seconds_per_round": [line["elapsed_s"] for line in rounds],
        "bytes_per_site_and_round": {
            direction: max((line[f"bytes_{direction}"] for line in rounds), default=0) // num_sites
            for direction in ("up", "down")
        },
    }


def read_predictions(run: RunFolder) -> dict[str, dict[str, dict[str, Any]]]:
    """{model: {test set: vendors, true, predicted}}, the main model first."""
    paths = sorted((run.path / "predictions").glob("*.json"), key=lambda path: (path.stem != MAIN_MODEL, path.stem))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def score_sets(sets: dict[str, dict[str, Any]], config: Config) -> Scores:
    """One model's figures on every test set."""
    num_bootstrap, seed = config.evaluation.num_bootstrap, config.seed
    return {name: table(a["true"], a["predicted"], a["vendors"], num_bootstrap, seed) for name, a in sets.items()}


def results_table(run: RunFolder) -> Any:
    """The results of a finished run for the terminal, a `rich` table."""
    report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    models = {MAIN_MODEL: report["regression"], **report["baselines"]}
    several = len(report["regression"]) > 1
    rows = {
        model.replace("_", " ") + (f", {name}" if several else ""): scores
        for model, sets in models.items()
        for name, scores in sets.items()
    }
    return as_text_table("ejection fraction of held-out patients", rows)


def _labels(run: RunFolder) -> tuple[list[float], list[float]]:
    """Requested ejection fractions and the labels, which are measured on the masks, from the release."""
    with (run.path / "synthetic" / LABELS_NAME).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [float(row["ef_requested"]) for row in rows], [float(row["ef"]) for row in rows]


def _curves(run: RunFolder) -> dict[str, tuple[list[float], list[float]]]:
    """{model: (steps, losses)}."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for line in run.metrics():
        if line.get("stage") == "training":
            steps, losses = curves.setdefault(line["model"], ([], []))
            steps.append(line["step"])
            losses.append(line["loss"])
    return curves


def _samples(synthetic: list[Case], real: list[Case]) -> dict[str, SampleSheet]:
    """Mid-stack pictures of the first patients of every vendor, synthetic and real."""
    sheets = {}
    for vendor in sorted({case.info.vendor for case in synthetic}):
        pictures = _mid_pictures(synthetic, vendor)
        if pictures is not None:
            sheets[vendor] = SampleSheet(pictures, _mid_pictures(real, vendor))
    return sheets


def _mid_pictures(cases: list[Case], vendor: str) -> NDArray[np.float32] | None:
    """Shape (N, 2, 64, 64) in [0, 1]; None where the vendor has no case."""
    chosen = [case for case in cases if case.info.vendor == vendor][:NUM_SAMPLES]
    if not chosen:
        return None
    stacks = [slice_pairs(case)[0] for case in chosen]
    middles = [stack[middle_slices(len(stack))] for stack in stacks]
    return np.stack([((middle[len(middle) // 2] + 1) / 2).numpy() for middle in middles])
