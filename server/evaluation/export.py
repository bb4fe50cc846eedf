"""Scores as a tidy CSV, one figure a line, for spreadsheets and for statistics programs."""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = ("model", "test_set", "group_kind", "group", "metric", "value", "low", "high")
"""`low` and `high` are the 95 % interval; what is undefined is an empty cell."""
OF_THE_MODEL = ("regression", "segmentation")
"""Parts of report.json that hold the figures of the tested model by test set and vendor, one for each task."""

Figure = tuple[str, int | float | None, int | float | None, int | float | None]
"""Metric, value, low and high."""


def as_csv(report: Mapping[str, Any]) -> str:
    """All scores of a report as CSV, with `COLUMNS` on the first line.

    Args:
        report: Parts of report.json: `OF_THE_MODEL`, `baselines` and `subgroups`, where present. The figures of the
            first are listed as those of "model".
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    tested = [("model", report[part]) for part in OF_THE_MODEL if part in report]
    for model, sets in [*tested, *(report.get("baselines") or {}).items()]:
        for test_set, scores in sets.items():
            for group, values in scores.items():
                kind = "all" if group == "all" else "vendor"
                writer.writerows((model, test_set, kind, group, *row) for row in figures_of(values))
    for test_set, facts in (report.get("subgroups") or {}).items():
        for fact, scores in facts.items():
            for group, values in scores.items():
                writer.writerows(("model", test_set, fact, group, *row) for row in figures_of(values))
    return text.getvalue()


def figures_of(score: Mapping[str, Any]) -> Iterator[Figure]:
    """Every number of a score, in its order; those of a mapping are named "<metric>_<key>".

    Intervals are in the score's `ci95`, of the same shape, or next to each number as `<metric>_ci95`.
    """
    intervals = score.get("ci95")
    for name, value in score.items():
        if name.endswith("ci95"):
            continue
        bounds = intervals.get(name) if isinstance(intervals, Mapping) else score.get(f"{name}_ci95")
        if isinstance(value, Mapping):
            for key, figure in value.items():
                if _is_number(figure):
                    low, high = (bounds or {}).get(key) or (None, None)
                    yield f"{name}_{key}", figure, low, high
        elif _is_number(value):
            low, high = bounds or (None, None)
            yield name, value, low, high


def _is_number(value: Any) -> bool:
    """Whether a value is a figure; None is an undefined one."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
