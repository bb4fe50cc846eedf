"""Collects what a run folder holds into `report.json` and the report's images."""

import csv
import json
import math
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

from omegaconf import OmegaConf

from fedcmr.server.dataset.making import kept_making
from fedcmr.server.dataset.writer import LABELS_NAME
from fedcmr.server.evaluation.coverage import coverage
from fedcmr.server.evaluation.disclosure import joined, published
from fedcmr.server.evaluation.score import Score, score
from fedcmr.server.evaluation.subgroups import SubgroupTables, subgroup_tables
from fedcmr.server.evaluation.tables import as_text_table
from fedcmr.server.experiments.combined_ef import combined_scores, read_weight
from fedcmr.server.experiments.cross_vendor import cross_vendor_scores
from fedcmr.server.experiments.federated_segmenter import segmenter_differences
from fedcmr.server.experiments.fidelity import fidelity_block
from fedcmr.server.experiments.models import TestSets, read_predictions, table_of, test_provenances
from fedcmr.server.experiments.models import test_sets as held_out_sets
from fedcmr.server.experiments.names import MAIN_MODEL, model_name, model_rank
from fedcmr.server.experiments.site_gain import differences_to_prior
from fedcmr.server.federation.evaluation import federated_results
from fedcmr.server.federation.outcome import participants, privacy_spent, releases
from fedcmr.server.federation.participation import sentences
from fedcmr.server.federation.state import read_study
from fedcmr.server.report.build import ReportInputs, SetPredictions, build_report
from fedcmr.server.report.contours import OutlinedPatient, outlined_patients
from fedcmr.server.report.images import NUM_LARGE, Extreme, SampleSheet, extremes, sample_sheets
from fedcmr.server.report.overlays import overlay_rows
from fedcmr.server.run_folder import REGRESSOR_NAME, RunFolder
from fedcmr.server.settings import MAIN_TASK, Config, dump
from fedcmr.server.tasks.ejection_fraction.model_card import write_model_card
from fedcmr.server.tasks.ejection_fraction.saliency import score_attributions, study_attributions
from fedcmr.server.tasks.registry import TASKS, tasks_of
from fedcmr.shared.case import Case, load_cases
from fedcmr.shared.provenance import Provenance
from fedcmr.shared.tasks.ejection_fraction.sums import MIN_GROUP
from fedcmr.shared.views import Grid

LIBRARIES = ("fedcmr", "flwr", "torch", "monai", "opacus", "numpy")

Scores = dict[str, dict[str, Any]]
"""{test set: {vendor or "all": figures}}."""


def write_report(
    run: RunFolder, test_sets: list[tuple[str, list[Case]]], seconds_per_stage: Mapping[str, float]
) -> None:
    """Write `report.json`, `report.csv` and `report.html`, and the main model's card with its figures.

    Args:
        run: The run.
        test_sets: The main task's held-out patients.
        seconds_per_stage: Of every finished stage, by its name.
    """
    config = run.config
    others = {name: read_predictions(run, name) for name in tasks_of(config) if name != MAIN_TASK}
    names = [name for name, _ in test_sets]
    names += sorted({name for models in others.values() for by_set in models.values() for name in by_set} - {*names})
    sets = test_provenances(run, names)
    too_few = [name for name, cases in test_sets if not sets[name].is_simulated and len(cases) < MIN_GROUP]
    test_sets = [(name, cases) for name, cases in test_sets if name not in too_few]

    def enough(name: str, values: Mapping[str, Any]) -> bool:
        return name not in sets or sets[name].is_simulated or len(values["vendors"]) >= MIN_GROUP

    def publishable(task_name: str, by_set: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        kept = {name: values for name, values in by_set.items() if name not in too_few and enough(name, values)}
        return {name: _disclosable(task_name, values) for name, values in kept.items()}

    predictions = {model: publishable(MAIN_TASK, by_set) for model, by_set in read_predictions(run).items()}
    scores = score_models(run, MAIN_TASK, predictions)
    synthetic = load_cases(run.path / "synthetic")
    labels = _labels(run)
    vendors = [case.info.vendor for case in synthetic]
    attributions = study_attributions(run, synthetic, test_sets)
    sites = read_study(run)
    combined = _combined_ef(run, test_sets, predictions.get(MAIN_MODEL, {}), others, publishable, sets)
    report = {
        "study": run.path.resolve().name,
        "simulated": all(part.is_simulated for part in (*sets.values(), *(site.provenance for site in sites.values()))),
        "provenance": {
            "sites": {name: site.provenance.as_json() for name, site in sites.items()},
            "test_sets": {name: part.as_json() | {"too_few": name in too_few} for name, part in sets.items()},
            **participants(run, sites),
        },
        "privacy": {**privacy_spent(run), **releases(run)},
        "regression": scores.get(MAIN_MODEL, {}),
        "baselines": {model: score for model, score in scores.items() if model != MAIN_MODEL},
        "prior_differences": differences_to_prior(predictions, config),
        "uncertainty": _uncertainty(predictions.get(MAIN_MODEL, {})),
        **_cross_vendor(run, publishable),
        **_other_tasks(run, others, publishable),
        **({"combined_ef": combined} if combined else {}),
        **({"federated_evaluation": federated} if (federated := federated_results(run)) else {}),
        "subgroups": _subgroups(predictions.get(MAIN_MODEL, {}), test_sets, config),
        "synthetic": {
            "n_cases": len(synthetic),
            "per_vendor": {vendor: vendors.count(vendor) for vendor in sorted(set(vendors))},
            "making": kept_making(run.path).facts(),
            **labels,
            "agreement": _agreement(labels, config),
        },
        **fidelity_block(run),
        "saliency": score_attributions(attributions, config.evaluation.num_bootstrap, config.seed),
        "timing": {"seconds_per_stage": dict(seconds_per_stage), **traffic(run)},
        "settings": _settings(run),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }
    report = _published(report, sets)
    allowed = config.evaluation.show_real_images
    shown = [(name, cases) for name, cases in test_sets if allowed or sets[name].is_simulated]
    best, worst = _extremes(predictions.get(MAIN_MODEL, {}), shown)
    may_be_shown = [case for _, cases in shown for case in cases]
    inputs = ReportInputs(
        predictions={
            model: {name: SetPredictions(**values) for name, values in by_set.items()}
            for model, by_set in predictions.items()
        },
        samples=sample_sheets(synthetic, may_be_shown),
        large=_large(report, synthetic, may_be_shown),
        best=best,
        worst=worst,
        curves=_curves(run),
        shown=[name for name, _ in shown],
        saliency=overlay_rows(attributions, {name for name, _ in shown}),
        outlined=_outlined(run, others.get("segmentation", {}).get(MAIN_MODEL, {}), {name for name, _ in shown}),
    )
    build_report(report, inputs, run.path)
    weights = run.path / REGRESSOR_NAME
    if weights.is_file():
        write_model_card(weights, report["regression"], report["uncertainty"], report["provenance"]["test_sets"])


def _large(report: Mapping[str, Any], synthetic: list[Case], real: list[Case]) -> dict[str, SampleSheet]:
    """A few patients on the grid of the measured fidelity; none where it was not measured."""
    block = report.get("fidelity")
    return sample_sheets(synthetic, real, NUM_LARGE, Grid(**block["grid"])) if block and block["groups"] else {}


def _disclosable(task_name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A test set's predictions with small groups of patients joined, and without what no figure may cover."""
    vendors = joined(values["vendors"])
    rest = {name: column for name, column in values.items() if name != "vendors"}
    return {"vendors": vendors, **TASKS[task_name].disclosable(rest, vendors)}


def _settings(run: RunFolder) -> str:
    """The settings as YAML; without `hospitals`, which says who is simulated, where the sites are elsewhere."""
    if run.site_names():
        return dump(run.config)
    return OmegaConf.to_yaml({name: value for name, value in asdict(run.config).items() if name != "hospitals"})


def _uncertainty(by_set: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The main model's predicted SD against its errors, for each test set where it predicts one."""
    measured = {name: coverage(a["true"], a["predicted"], a["sd"]) for name, a in by_set.items() if "sd" in a}
    return {name: figures for name, figures in measured.items() if figures}


def _published(report: dict[str, Any], sets: Mapping[str, Provenance]) -> dict[str, Any]:
    """The report's tables as they may be published; those with real patients are rounded."""
    real = [name for name, part in sets.items() if not part.is_simulated]

    def by_test_set(tables: Mapping[str, Any]) -> dict[str, Any]:
        return {name: published(values, rounded=name in real) for name, values in tables.items()}

    tables = ("regression", "prior_differences", "uncertainty", "subgroups", "saliency")
    parts = {name: by_test_set(report[name]) for name in tables}
    parts["baselines"] = {model: by_test_set(tables) for model, tables in report["baselines"].items()}
    for name, others in (report.get("tasks") or {}).items():
        part = TASKS[name].part
        parts[part] = by_test_set(report[part])
        parts.setdefault("tasks", {})[name] = {
            "baselines": {model: by_test_set(tables) for model, tables in others["baselines"].items()},
            **{key: published(others[key], rounded=bool(real)) for key in others if key != "baselines"},
        }
    for name in ("matrix", "matrix_differences"):
        if name in report:
            parts[name] = published(report[name], rounded=bool(real))
    if "combined_ef" in report:
        combined = {key: by_test_set(report["combined_ef"][key]) for key in ("test_sets", "differences")}
        parts["combined_ef"] = report["combined_ef"] | combined
    uncertainty = parts["uncertainty"]
    few = [name for name in uncertainty if name in real and uncertainty[name]["n_patients"] < MIN_GROUP]
    parts["uncertainty"] = {name: figures for name, figures in uncertainty.items() if name not in few}
    return report | parts


def _cross_vendor(
    run: RunFolder, publishable: Callable[[str, dict[str, Any]], dict[str, Any]], task_name: str = MAIN_TASK
) -> dict[str, Any]:
    """A task's `matrix` and `matrix_differences`, where rows were trained."""
    scores, differences = cross_vendor_scores(run, partial(publishable, task_name), task_name)
    return {"matrix": scores, "matrix_differences": differences} if scores else {}


def _other_tasks(
    run: RunFolder,
    predictions: Mapping[str, dict[str, dict[str, dict[str, Any]]]],
    publishable: Callable[[str, dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """The parts of the tasks besides the main one: the trained network's figures, and in `tasks` all others."""
    parts: dict[str, Any] = {}
    for name, models in predictions.items():
        shown = {model: publishable(name, by_set) for model, by_set in models.items()}
        scores = score_models(run, name, shown)
        parts[TASKS[name].part] = scores.pop(MAIN_MODEL, {})
        parts.setdefault("tasks", {})[name] = {"baselines": scores, **_cross_vendor(run, publishable, name)}
        if differences := segmenter_differences(shown, run.config):
            parts["tasks"][name]["differences"] = differences
    return parts


def _combined_ef(
    run: RunFolder,
    test_sets: TestSets,
    main: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]],
    publishable: Callable[[str, dict[str, Any]], dict[str, Any]],
    sets: Mapping[str, Provenance],
) -> dict[str, Any] | None:
    """The ejection fraction by segmentation and by both networks; None where the study has no weight for them."""
    facts = read_weight(run)
    raw = others.get("segmentation", {}).get(MAIN_MODEL)
    if facts is None or not raw:
        return None
    masks, masked = publishable("segmentation", raw), dict(held_out_sets(run, "segmentation"))
    found = {
        name: combined_scores(
            facts["weight"], cases, main[name], masked[name], masks[name], run.config, not sets[name].is_simulated
        )
        for name, cases in test_sets
        if name in main and name in masks and name in masked
    }
    return {
        **facts,
        "test_sets": {name: parts[0] for name, parts in found.items() if parts},
        "differences": {name: parts[1] for name, parts in found.items() if parts},
        "left_out": [name for name, parts in found.items() if not parts],
    }


def who_took_part(run: RunFolder) -> list[str]:
    """The sentences that a finished run ends with on the terminal."""
    report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    part = report.get("provenance")  # a report of an earlier version has none
    return sentences(part, part["styles_of_the_prior"]) if part else []


def traffic(run: RunFolder) -> dict[str, Any]:
    """Seconds per round, bytes per site and round."""
    rounds = run.rounds()
    num_sites = max(1, len(run.site_names()))
    return {
        "seconds_per_round": [line["elapsed_s"] for line in rounds],
        "bytes_per_site_and_round": {
            direction: max((line[f"bytes_{direction}"] for line in rounds), default=0) // num_sites
            for direction in ("up", "down")
        },
    }


def score_models(
    run: RunFolder, task_name: str, predictions: Mapping[str, dict[str, dict[str, Any]]]
) -> dict[str, Scores]:
    """{model: its figures on every test set}, for the models of a task."""
    task = TASKS[task_name]
    return {
        model: {name: dict(table_of(task, rows, run.config)) for name, rows in by_set.items()}
        for model, by_set in predictions.items()
    }


def results_table(run: RunFolder) -> Any:
    """The results of a finished run for the terminal, a `rich` table."""
    report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    models = {MAIN_MODEL: report["regression"], **report["baselines"]}
    several = len(report["regression"]) > 1
    rows = {
        model_name(model) + (f", {name}" if several else ""): scores
        for model, sets in sorted(models.items(), key=lambda item: model_rank(item[0]))
        for name, scores in sets.items()
    }
    return as_text_table("ejection fraction of held-out patients", rows)


def _labels(run: RunFolder) -> dict[str, list[float] | None]:
    """Ejection fractions of the synthetic cases: requested, of the masks, and measured on the images.

    The last is NaN where no left ventricle was found, and None for a release older than the measurement.
    """
    with (run.path / "synthetic" / LABELS_NAME).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {"requested_ef": "ef_requested", "mask_ef": "ef", "measured_ef": "ef_measured"}
    return {
        name: [float(row[column] or "nan") for row in rows] if rows and column in rows[0] else None
        for name, column in columns.items()
    }


def _agreement(labels: dict[str, list[float] | None], config: Config) -> Score | None:
    """`score` of the measured against the requested ejection fractions, where a left ventricle was found."""
    requested, measured = labels["requested_ef"], labels["measured_ef"]
    if requested is None or measured is None:
        return None
    found = [(wanted, seen) for wanted, seen in zip(requested, measured, strict=True) if math.isfinite(seen)]
    true, predicted = ([pair[i] for pair in found] for i in (0, 1))
    return score(true, predicted, config.evaluation.num_bootstrap, config.seed)


def _subgroups(
    by_set: dict[str, dict[str, Any]], test_sets: list[tuple[str, list[Case]]], config: Config
) -> dict[str, SubgroupTables]:
    """The main model's figures by field strength, pathology and sex on every test set that its predictions are of."""
    num_bootstrap, seed = config.evaluation.num_bootstrap, config.seed
    return {
        name: subgroup_tables(cases, by_set[name]["true"], by_set[name]["predicted"], num_bootstrap, seed)
        for name, cases in test_sets
        if name in by_set and _are_of(by_set[name], cases)
    }


def _are_of(predictions: dict[str, Any], cases: list[Case]) -> bool:
    """Whether a test set's predictions are those of these patients, in their order: they name nobody."""
    efs = [case.info.ef for case in cases]
    return predictions["true"] == efs and len(predictions["predicted"]) == len(efs)


def _extremes(
    by_set: dict[str, dict[str, Any]], test_sets: list[tuple[str, list[Case]]]
) -> tuple[list[Extreme], list[Extreme]]:
    """The main model's best and worst test patients; none where the predictions are not those of the patients."""
    cases = [case for name, cases in test_sets if name in by_set for case in cases]
    known = [name for name, _ in test_sets if name in by_set]
    true, predicted = ([value for name in known for value in by_set[name][key]] for key in ("true", "predicted"))
    if true != [case.info.ef for case in cases]:
        return [], []
    return extremes(cases, predicted)


def _outlined(run: RunFolder, by_set: Mapping[str, dict[str, Any]], shown: Collection[str]) -> list[OutlinedPatient]:
    """The main segmenter's best and worst test patients of each vendor, of the sets whose images may be shown."""
    if not any(name in shown for name in by_set):
        return []
    sets: TestSets = [(name, cases) for name, cases in held_out_sets(run, "segmentation") if name in shown]
    return outlined_patients(run, sets, by_set)


def _curves(run: RunFolder) -> dict[str, tuple[list[float], list[float]]]:
    """{model: (steps, losses)}."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for line in run.metrics():
        if line.get("stage") == "training":
            steps, losses = curves.setdefault(line["model"], ([], []))
            steps.append(line["step"])
            losses.append(line["loss"])
    return curves
