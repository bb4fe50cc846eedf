"""Writes `report.json` and, from it, the page `report.html`: one file, no network, no script."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from server.report import figures
from server.report.audit import audit_tables, read_audit
from server.report.figures import HUMAN_POINTS
from server.report.models import MAIN_MODEL, family_of, model_name, model_rank
from server.report.overlays import OverlayRow, colour_bar, overlay_sheet
from server.report.pictures import Extreme, Row, SampleSheet
from server.saliency import MAX_CASES, SYNTHETIC, Look
from shared.checkpoint import write_atomically
from shared.resources import resource

FEW_PATIENTS = 10
"""Below this a row of the table is an illustration, and the page says so."""


@dataclass(frozen=True)
class Answers:
    """A model's answers on one test set: vendors, true and predicted ejection fractions, each of length N."""

    vendors: Sequence[str]
    true: Sequence[float]
    predicted: Sequence[float]


@dataclass(frozen=True)
class ReportInputs:
    """What the page shows beyond `report.json`.

    Attributes:
        predictions: {model: {test set: its answers}}.
        samples: {vendor: pictures}.
        best: Test patients whom the main model read best.
        worst: Test patients whom it read worst.
        curves: {model: (steps, losses)}.
        show_real: Whether test patients' pictures may appear: where they are simulated or it was allowed.
        saliency: {vendor: rows of pictures of where the main model looks}.
    """

    predictions: Mapping[str, Mapping[str, Answers]] = field(default_factory=dict)
    samples: Mapping[str, SampleSheet] = field(default_factory=dict)
    best: Sequence[Extreme] = ()
    worst: Sequence[Extreme] = ()
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    show_real: bool = False
    saliency: Mapping[str, Sequence[OverlayRow]] = field(default_factory=dict)


def build_report(report: Mapping[str, Any], inputs: ReportInputs, folder: Path) -> None:
    """Write `folder/report.json` and `folder/report.html`, each whole or not at all.

    Args:
        report: The design's contract: study, privacy, regression, baselines, synthetic, timing, settings, versions;
            `simulated`, whether the hospitals' patients were simulated. What JSON cannot hold (NaN) becomes null.
        inputs: Predictions, pictures and curves for the figures.
        folder: The run folder; its `audit.json`, if there is one, becomes a section.
    """
    values = as_json(report)
    audit = read_audit(folder)
    if audit is not None:
        values["audit"] = as_json(audit)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(folder / "report.json", text.encode())
    write_atomically(folder / "report.html", render_page(values, inputs).encode())


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


def render_page(report: Mapping[str, Any], inputs: ReportInputs) -> str:
    """The page as HTML."""
    folder = resource("server/report/template.html").parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"figure": _figure, "percent": _percent, "seconds": _seconds, "size": _size}
    groups = groups_of(report)
    # The figure is read at a glance: models that a study has several of are in the table alone.
    table_only = [model_name(key) for key in sorted(report["baselines"], key=model_rank) if family_of(key)]
    return environment.get_template("template.html").render(
        report=report,
        headline=headline(report),
        findings=findings(report),
        tiles=_tiles(report),
        groups=groups,
        few=[name for name, scores in groups.items() if _num_patients(scores) < FEW_PATIENTS],
        error_figure=figures.error_intervals(_scores_of_all_but(groups, table_only)) if groups else None,
        table_only=table_only,
        scatters=_scatters(inputs),
        extremes=_extremes(inputs),
        show_real=inputs.show_real,
        sheets=_sheets(inputs),
        requested_figure=_requested_figure(report),
        curve_figure=figures.training_curves(
            {model_name(key): inputs.curves[key] for key in sorted(inputs.curves, key=model_rank)}
        )
        if inputs.curves
        else None,
        overlays=_overlays(inputs),
        colour_bar=colour_bar(),
        saliency_cases=MAX_CASES,
        audits=audit_tables(report["audit"]) if "audit" in report else [],
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


def headline(report: Mapping[str, Any]) -> str:
    """The study's answer in one sentence."""
    score = _overall(report)
    if score is None or score["mae_points"] is None:
        return "This run has no result: no test patient has both a true and a predicted ejection fraction."
    who = f"{score['n_patients']} {_kind(report)} patient{'s' if score['n_patients'] != 1 else ''}"
    mae = f"{score['mae_points']:.1f} points"
    return f"Trained on synthetic hearts alone, the network misses the ejection fraction of {who} by {mae} on average."


def findings(report: Mapping[str, Any]) -> list[str]:
    """What a reader should know beside the headline, each one sentence."""
    score, sentences = _overall(report), []
    if score is not None and score["mae_points"] is not None:
        if interval := score["ci95"]["mae_points"]:
            sentences.append(f"The 95 % interval over patients is {interval[0]:.1f} to {interval[1]:.1f} points.")
        guess = _overall(report, "predict_the_mean")
        if guess and guess["mae_points"] is not None:
            better = interval is not None and interval[1] < guess["mae_points"]
            verdict = "clearly more" if better else "which the network does not clearly beat"
            sentences.append(
                f"Guessing the mean for everybody would miss by {guess['mae_points']:.1f} points, {verdict}."
            )
        vendors = {name: values["mae_points"] for name, values in _main_tables(report).items()
                   if name != "all" and values["mae_points"] is not None}  # fmt: skip
        if len(vendors) > 1:
            best, worst = min(vendors, key=lambda name: vendors[name]), max(vendors, key=lambda name: vendors[name])
            sentences.append(
                f"It does best on {best} ({vendors[best]:.1f}) and worst on {worst} ({vendors[worst]:.1f})."
            )
        sentences.append(f"Experienced readers differ by {HUMAN_POINTS[0]} to {HUMAN_POINTS[1]} points.")
    return sentences


def _main_tables(report: Mapping[str, Any], model: str = MAIN_MODEL) -> Mapping[str, Any]:
    """The scores on the test set with the most patients."""
    tables = report["regression"] if model == MAIN_MODEL else report["baselines"].get(model, {})
    return max(tables.values(), key=lambda scores: scores["all"]["n_patients"], default={})


def _overall(report: Mapping[str, Any], model: str = MAIN_MODEL) -> Mapping[str, Any] | None:
    return _main_tables(report, model).get("all")


def _kind(report: Mapping[str, Any]) -> str:
    return "simulated" if report.get("simulated") else "real"


def _num_patients(scores: Mapping[str, Mapping[str, Any]]) -> int:
    return max(values["n_patients"] for values in scores.values())


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures at the top: value, unit or name, explanation."""
    score = _overall(report) or {}
    epsilon = report["privacy"]["epsilon"]
    mae, r2 = score.get("mae_points"), score.get("r2")
    return [
        (_figure(mae, 1), "" if mae is None else "points", "mean absolute error of the ejection fraction"),
        (_figure(r2, 2), "r²", "share of the variance explained; 1 is perfect, 0 a constant guess"),
        ("none" if epsilon is None else f"{epsilon:.2f}", "epsilon", "privacy spent per patient; smaller is stronger"),
        (f"{report['synthetic']['n_cases']}", "cases", "synthetic patients it was trained on"),
    ]


def _scatters(inputs: ReportInputs) -> list[tuple[str, str, int]]:
    """One plot of the main model per test set and vendor: its name, picture and number of patients."""
    plots = []
    answers_of = inputs.predictions.get(MAIN_MODEL, {})
    for test_set, answers in answers_of.items():
        for vendor in sorted(set(answers.vendors)):
            chosen = [i for i, name in enumerate(answers.vendors) if name == vendor]
            true, predicted = ([values[i] for i in chosen] for values in (answers.true, answers.predicted))
            name = vendor if len(answers_of) == 1 else f"{test_set}, {vendor}"
            plots.append((name, figures.scatter(true, predicted), len(chosen)))
    return plots


def _scores_of_all_but(
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]], left_out: Sequence[str]
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The groups without some models, by their names."""
    return {
        group: {model: score for model, score in scores.items() if model not in left_out}
        for group, scores in groups.items()
    }


def _extremes(inputs: ReportInputs) -> list[tuple[str, list[tuple[Extreme, str]]]]:
    """Best and worst cases with their pictures, where they may be shown."""
    named = (("Best cases", inputs.best), ("Worst cases", inputs.worst))
    return [
        (name, [(case, figures.sample_sheet(case.pictures)) for case in cases])
        for name, cases in named
        if inputs.show_real and cases
    ]


def _sheets(inputs: ReportInputs) -> list[tuple[str, list[tuple[str, Row, str]]]]:
    """Per vendor its rows, the real one first: "real" or "synthetic", the row, its picture."""
    sheets = []
    for vendor, sheet in sorted(inputs.samples.items()):
        rows = [("real", sheet.real if inputs.show_real else None), ("synthetic", sheet.synthetic)]
        sheets.append(
            (vendor, [(kind, row, figures.sample_sheet(row.pictures)) for kind, row in rows if row is not None])
        )
    return sheets


def _overlays(inputs: ReportInputs) -> list[tuple[str, list[tuple[str, Sequence[Look], str]]]]:
    """Per vendor its rows, the real one first: "real" or "synthetic", the patients, their picture."""
    allowed = {
        vendor: [row for row in rows if row.kind == SYNTHETIC or inputs.show_real]
        for vendor, rows in inputs.saliency.items()
    }
    return [
        (vendor, [(row.kind, row.looks, overlay_sheet(row.looks)) for row in rows])
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


def _figure(value: float | None, digits: int) -> str:
    """A number with a true minus sign and no negative zero; what is undefined says so."""
    if value is None:
        return "undefined"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\u2212")


def _percent(fraction: float) -> str:
    """Whole per cent; the space does not break."""
    return f"{round(100 * fraction) + 0}\u00a0%".replace("-", "\u2212")


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 100 else f"{value / 60:.1f} min"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"
