"""Writes `report.json` and, from it, `report.csv` and `report.html`: one HTML file, no network, no script."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedcmr.server import formatting
from fedcmr.server.evaluation.from_sums import SWAMPED_POINTS
from fedcmr.server.evaluation.score import FEW_PATIENTS
from fedcmr.server.experiments.names import MAIN_MODEL, family_of, model_name, model_rank
from fedcmr.server.formatting import HUMAN_POINTS, figure
from fedcmr.server.report import figures, provenance
from fedcmr.server.report.agreement import bland_altman, scatter
from fedcmr.server.report.audit import audit_tables, read_audit
from fedcmr.server.report.contours import FOUND, READERS, OutlinedPatient, outline_sheet
from fedcmr.server.report.cross_vendor import KINDS, cross_vendor_parts, cross_vendor_sentences, trained_on
from fedcmr.server.report.fidelity import ANATOMY, DISTANCES, vendor_rows, why_not_measured
from fedcmr.server.report.images import Extreme, Row, SampleSheet
from fedcmr.server.report.limitations import limitations, not_run_note
from fedcmr.server.report.overlays import OverlayRow, colour_bar, overlay_sheet
from fedcmr.server.report.summary import findings, headline, key_figures
from fedcmr.server.report.tidy_csv import as_csv
from fedcmr.server.report.uncertainty import calibration, uncertainties
from fedcmr.server.settings import MAIN_TASK
from fedcmr.server.tasks.ejection_fraction.saliency import MAX_CASES, SYNTHETIC, Attribution
from fedcmr.server.tasks.registry import TASKS
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.resources import resource
from fedcmr.shared.tasks.ejection_fraction.sums import MIN_GROUP


@dataclass(frozen=True)
class SetPredictions:
    """A model's predictions on one test set.

    Attributes:
        vendors: Shape (N,).
        true: Shape (N,), ejection fractions.
        predicted: Shape (N,).
        sd: Shape (N,), the predicted standard deviation of each error, as a fraction; None where the model gives none.
    """

    vendors: Sequence[str]
    true: Sequence[float]
    predicted: Sequence[float]
    sd: Sequence[float | None] | None = None


@dataclass(frozen=True)
class ReportInputs:
    """What the HTML report shows beyond `report.json`.

    Attributes:
        predictions: {model: {test set: its predictions}}.
        samples: {vendor: images}.
        best: Test patients with the smallest errors of the main model.
        worst: Test patients with its largest errors.
        curves: {model: (steps, losses)}.
        shown: The test sets whose patients' images may appear: they are simulated, or it was allowed.
        saliency: {vendor: rows of saliency maps of the main model}.
        outlined: Test patients whose contours are shown, those of a vendor one after the other.
        large: {vendor: images on the generator's grid}, of the section on fidelity.
    """

    predictions: Mapping[str, Mapping[str, SetPredictions]] = field(default_factory=dict)
    samples: Mapping[str, SampleSheet] = field(default_factory=dict)
    best: Sequence[Extreme] = ()
    worst: Sequence[Extreme] = ()
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    shown: Collection[str] = ()
    saliency: Mapping[str, Sequence[OverlayRow]] = field(default_factory=dict)
    outlined: Sequence[OutlinedPatient] = ()
    large: Mapping[str, SampleSheet] = field(default_factory=dict)


@dataclass(frozen=True)
class PatientPlots:
    """The patients of one vendor.

    Attributes:
        name: Vendor, and test set where there are several.
        num: How many patients.
        scatter: Predicted against true.
        bland_altman: Difference against mean.
        with_sd: Whether the scatter plot has bars of one standard deviation.
    """

    name: str
    num: int
    scatter: str
    bland_altman: str
    with_sd: bool


def build_report(report: Mapping[str, Any], inputs: ReportInputs, folder: Path) -> None:
    """Write `report.json`, `report.csv` and `report.html` into a folder, each whole or not at all.

    Args:
        report: The design's contract: study, privacy, regression, baselines, synthetic, timing, settings, versions;
            `simulated`, whether all sites' scans and all test patients are recorded as simulated; `provenance`, where
            those of each come from, and who took part. What JSON cannot hold (NaN) becomes null.
            `prior_differences`, {test set: {vendor | "all": paired difference to the baseline `prior_only`}}.
            `combined_ef`, the weight of `fedcmr.server.experiments.combined_ef` with its `test_sets`, {test set: {way:
            {vendor | "all": figures}}}, and `differences`, {test set: {way: {vendor | "all": paired difference}}}.
            Where they are known: `matrix`, {"synthetic" | "real": {vendor | "all" | "without <vendor>": {test vendor |
            "all": score}}}; `matrix_differences`, {kind: {"without <vendor>": {test vendor | "all": paired difference
            to "all"}}}; `segmentation`, {test set: {vendor | "all": figures of `score_masks`}}; `tasks`, {task: its
            other models' `baselines`, {model: as `segmentation`}, `matrix`, as above, and `differences` of the tuned
            segmenter's Dice to the public one's, {test set: {vendor | "all": paired difference}}}; `subgroups`, {test
            set: {fact: {group: score}}}; `uncertainty`, {test set: {n_patients,
            mean_sd_points, rank_correlation, coverage: [{nominal, observed, ci95}]}}; `fidelity`, what
            `fedcmr.server.evaluation.fidelity.measure` returns, with the `test_sets` and whether these are `simulated`.
        inputs: Predictions, images and curves for the figures.
        folder: The run folder; its `audit.json`, if there is one, becomes a section.
    """
    values = as_json(report)
    audit = read_audit(folder)
    if audit is not None:
        values["audit"] = as_json(audit)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(folder / "report.json", text.encode())
    write_atomically(folder / "report.csv", as_csv(values).encode())
    write_atomically(folder / "report.html", render_html(values, inputs).encode())


def as_json(value: Any) -> Any:
    """Plain dicts, lists and numbers; NaN and infinities, which JSON lacks, become None."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def render_html(report: Mapping[str, Any], inputs: ReportInputs) -> str:
    """The HTML report: `template.html` with a file for each section, those of the tasks from the tasks' folders."""
    folder = resource("server/report/template.html").parent
    environment = Environment(
        loader=FileSystemLoader([folder, folder.parent / "tasks"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": formatting.figure,
        "signed": formatting.signed,
        "interval": formatting.interval,
        "percent": formatting.percent,
        "seconds": formatting.seconds,
        "size": formatting.size,
        "patients": formatting.patients,
        "scans": formatting.describe_scans,
        "model": model_name,
        "training_set": trained_on,
    }
    groups, fidelity = groups_of(report), report.get("fidelity")
    # The figure is read at a glance: models that a study has several of are in the table alone.
    table_only = [model_name(key) for key in sorted(report["baselines"], key=model_rank) if family_of(key)]
    return environment.get_template("template.html").render(
        report=report,
        task_sections=[section for task in TASKS.values() if (section := task.report_section(report))],
        headline=headline(report),
        findings=findings(report),
        key_figures=key_figures(report),
        groups=groups,
        federated=report.get("federated_evaluation"),
        min_group=MIN_GROUP,
        swamped=figure(SWAMPED_POINTS, 0),
        with_categories=any("category_agreement" in score for scores in groups.values() for score in scores.values()),
        few=[name for name, scores in groups.items() if _num_patients(scores) < FEW_PATIENTS],
        error_figure=figures.error_intervals(_scores_of_all_but(groups, table_only)) if groups else None,
        table_only=table_only,
        not_run_note=not_run_note(report),
        cross_vendor=cross_vendor_parts(report),
        training_data=KINDS,
        cross_vendor_sentences=cross_vendor_sentences(report),
        plots=_plots(report, inputs),
        extremes=_extremes(inputs),
        outlined=_outlined(inputs),
        contour_colours=(READERS, FOUND),
        took_part=provenance.took_part(report),
        shapes_of_hearts=provenance.shapes_of_hearts(report),
        not_all_took_part=provenance.not_all_took_part(report),
        site_rows=provenance.site_rows(report),
        terms=provenance.terms_of(report),
        hidden=provenance.hidden_sets(report, inputs.shown),
        test_patients=provenance.test_patients_of(report, inputs.shown),
        uncovered=_uncovered(report),
        subgroups={name: facts for name, facts in (report.get("subgroups") or {}).items() if facts},
        uncertainties=uncertainties(report),
        calibration_figure=calibration(report),
        sheets=_sheets(inputs.samples, inputs),
        large_sheets=_sheets(inputs.large, inputs),
        fidelity_rows=vendor_rows(fidelity) if fidelity else [],
        fidelity_gaps=why_not_measured(fidelity) if fidelity else [],
        fidelity_headings=[heading for heading, _ in DISTANCES.values()],
        anatomy_headings=list(ANATOMY.values()),
        requested_figure=_requested_figure(report),
        curve_figures={name: figures.training_curves(curves) for name, curves in _curves(inputs).items()},
        stages=_stages(report),
        overlays=_overlays(inputs),
        colour_bar=colour_bar(),
        saliency_cases=MAX_CASES,
        audits=audit_tables(report["audit"]) if "audit" in report else [],
        limitations=limitations(report, inputs.shown),
        human=HUMAN_POINTS,
        few_patients=FEW_PATIENTS,
    )


def groups_of(report: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Scores regrouped for tables and figures: {group of test patients: {model's name: score}}, the main model first.

    The groups are every test set's vendors and, where it has several, all of them together.
    """
    baselines = report["baselines"]
    models = {MAIN_MODEL: report["regression"], **{key: baselines[key] for key in sorted(baselines, key=model_rank)}}
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    test_sets = report["regression"]
    for test_set, scores in test_sets.items():
        vendors = [vendor for vendor in scores if vendor != "all" or len(scores) > 2]
        for vendor in vendors:
            name = "all vendors" if vendor == "all" else vendor
            groups[name if len(test_sets) == 1 else f"{test_set}: {name}"] = {
                model_name(model): tables[test_set][vendor]
                for model, tables in models.items()
                if vendor in tables.get(test_set, {})
            }
    return groups


def _plots(report: Mapping[str, Any], inputs: ReportInputs) -> list[PatientPlots]:
    """The main model's patients, per test set and vendor; a test set of few patients is one plot.

    Private patients are in none: a mark is a patient's ejection fraction.
    """
    plots = []
    marked = provenance.per_patient_sets(report)
    predictions = {name: found for name, found in inputs.predictions.get(MAIN_MODEL, {}).items() if name in marked}
    for test_set, values in predictions.items():
        vendors = sorted(set(values.vendors))
        for vendor in vendors if len(values.vendors) >= FEW_PATIENTS or len(vendors) == 1 else ["all"]:
            chosen = [i for i, name in enumerate(values.vendors) if vendor in (name, "all")]
            true, predicted = ([efs[i] for i in chosen] for efs in (values.true, values.predicted))
            sd = None if values.sd is None else [values.sd[i] for i in chosen]
            score = report["regression"].get(test_set, {}).get(vendor)
            name = "all vendors" if vendor == "all" else vendor
            plots.append(
                PatientPlots(
                    name if len(predictions) == 1 else f"{test_set}, {name}",
                    len(chosen),
                    scatter(true, predicted, sd),
                    bland_altman(true, predicted, score),
                    sd is not None,
                )
            )
    return plots


def _uncovered(report: Mapping[str, Any]) -> list[str]:
    """The models of the report that used the sites' scans otherwise than by the study's own updates."""
    own = (MAIN_MODEL, "prior_only", "predict_the_mean")
    models = [model_name(key) for key in sorted(report["baselines"], key=model_rank) if key not in own]
    return models + (["the cross-vendor evaluation of real scans"] if (report.get("matrix") or {}).get("real") else [])


def _curves(inputs: ReportInputs) -> dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]]:
    """Training curves by task and model's name, without those that a study has several of: they would hide the others.

    The keys of the main task's models have no task's name before them.
    """
    by_task: dict[str, list[str]] = {}
    for key in inputs.curves:
        task, _, _ = key.partition("/")
        by_task.setdefault(task if task in TASKS else MAIN_TASK, []).append(key)
    found = {}
    for task in [name for name in TASKS if name in by_task]:
        keys = {key.removeprefix(f"{task}/"): key for key in by_task[task]}
        shown = [model for model in sorted(keys, key=model_rank) if not family_of(model) and "/" not in model]
        found[task] = {model_name(model): inputs.curves[keys[model]] for model in shown}
    return {task: curves for task, curves in found.items() if curves}


def _stages(report: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by the stages' names; the many trainings of the cross-vendor evaluation are one."""
    stages: dict[str, float] = {}
    for stage, duration in report["timing"]["seconds_per_stage"].items():
        part = stage.rpartition("/")[0] or stage
        name = part.replace("matrix/", "cross-vendor/").replace("_", " ").replace("/", ", ")
        stages[name] = stages.get(name, 0.0) + duration
    return stages


def _num_patients(scores: Mapping[str, Mapping[str, Any]]) -> int:
    return max(values["n_patients"] for values in scores.values())


def _scores_of_all_but(
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]], left_out: Sequence[str]
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The groups without some models, by their names."""
    return {
        group: {model: score for model, score in scores.items() if model not in left_out}
        for group, scores in groups.items()
    }


def _extremes(inputs: ReportInputs) -> list[tuple[str, list[tuple[Extreme, str]]]]:
    """Best and worst cases with their images, where they may be shown."""
    named = (("Best cases", inputs.best), ("Worst cases", inputs.worst))
    return [
        (name, [(case, figures.sample_sheet(case.images)) for case in cases])
        for name, cases in named
        if inputs.shown and cases
    ]


def _outlined(inputs: ReportInputs) -> list[tuple[str, list[tuple[OutlinedPatient, str]]]]:
    """Per vendor the patients whose contours are shown, with their images, where they may be."""
    by_vendor: dict[str, list[tuple[OutlinedPatient, str]]] = {}
    for patient in inputs.outlined if inputs.shown else ():
        by_vendor.setdefault(patient.vendor, []).append((patient, outline_sheet(patient)))
    return list(by_vendor.items())


def _sheets(samples: Mapping[str, SampleSheet], inputs: ReportInputs) -> list[tuple[str, list[tuple[str, Row, str]]]]:
    """Per vendor its rows, the real one first: "real" or "synthetic", the row, its image."""
    sheets = []
    for vendor, sheet in sorted(samples.items()):
        rows = [("real", sheet.real if inputs.shown else None), ("synthetic", sheet.synthetic)]
        sheets.append(
            (vendor, [(kind, row, figures.sample_sheet(row.images)) for kind, row in rows if row is not None])
        )
    return sheets


def _overlays(inputs: ReportInputs) -> list[tuple[str, list[tuple[str, Sequence[Attribution], str]]]]:
    """Per vendor its rows, the real one first: "real" or "synthetic", the patients, their image."""
    allowed = {
        vendor: [row for row in rows if row.kind == SYNTHETIC or inputs.shown]
        for vendor, rows in inputs.saliency.items()
    }
    return [
        (vendor, [(row.kind, row.attributions, overlay_sheet(row.attributions)) for row in rows])
        for vendor, rows in allowed.items()
        if rows
    ]


def _requested_figure(report: Mapping[str, Any]) -> str | None:
    """Requested against measured EF of the synthetic cases; None where nobody measured them."""
    synthetic = report["synthetic"]
    if not synthetic.get("agreement") or not synthetic["agreement"]["n_patients"]:
        return None
    pairs = zip(synthetic["requested_ef"], synthetic["measured_ef"], strict=True)
    requested, measured = zip(*((a, b) for a, b in pairs if b is not None), strict=True)
    return figures.requested_against_measured(requested, measured, synthetic["agreement"])
