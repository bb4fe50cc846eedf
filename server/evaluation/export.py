"""Scores as a flat table, one figure a line, for spreadsheets and for statistics programs."""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from fedcmr.server.evaluation.score import METRICS, Score

COLUMNS = ("model", "test_set", "group_kind", "group", "metric", "value", "low", "high")
"""`low` and `high` are the 95 % interval; what is undefined is an empty cell."""
COUNTS = ("n_patients", "n_undefined")


def as_csv(report: Mapping[str, Any]) -> str:
    """All scores of a report as CSV, with `COLUMNS` on the first line.

    Args:
        report: `regression`, `baselines` and `subgroups` in the shape of report.json; the first is called "model".
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for model, sets in {"model": report["regression"], **report["baselines"]}.items():
        for test_set, scores in sets.items():
            for group, values in scores.items():
                kind = "all" if group == "all" else "vendor"
                writer.writerows((model, test_set, kind, group, *row) for row in _figures(values))
    for test_set, facts in report["subgroups"].items():
        for fact, scores in facts.items():
            for group, values in scores.items():
                writer.writerows(("model", test_set, fact, group, *row) for row in _figures(values))
    return text.getvalue()


def _figures(values: Score) -> Iterator[tuple[str, float | str, float | str, float | str]]:
    """Metric, value, low and high of every figure of a score."""
    for name in COUNTS:
        yield name, values[name], "", ""
    for name in METRICS:
        low, high = values["ci95"][name] or ("", "")
        yield name, "" if values[name] is None else values[name], low, high
