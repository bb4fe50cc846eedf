"""The cross-vendor evaluation: networks trained on one vendor, on all, or on all but one, and tested on each.

Every row is a training of its own for each of the study's tasks, on a part of the same cases and with the same number
of steps. The row of all vendors is the study's own model of that kind, which is not trained twice.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedcmr.server.experiments.models import predictions_folder, table_of, train_models
from fedcmr.server.experiments.names import ALL, MAIN_MODEL, WITHOUT
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import MAIN_TASK
from fedcmr.server.tasks.registry import TASKS
from fedcmr.shared.case import Case

WHOLE = {"synthetic": MAIN_MODEL, "real": "pooled_real"}
"""The study's model that was trained on all vendors' cases of a kind."""
NO_PATIENTS: dict[str, list[Any]] = {"vendors": [], "true": [], "predicted": []}

Predictions = dict[str, dict[str, Any]]
"""{test set: predictions of a model}."""
Table = dict[str, dict[str, Any]]
"""{trained on: {test vendor or "all": score or difference}}."""


def training_sets(vendors: Iterable[str]) -> dict[str, set[str]]:
    """The parts of the cases that a row is trained on: {row: its vendors}, without the row of all.

    With two vendors, all but one is the other vendor alone and not a row of its own. With one vendor there is no row
    besides all.
    """
    names = sorted(set(vendors))
    alone = {name: {name} for name in names} if len(names) > 1 else {}
    without = {f"{WITHOUT}{name}": {*names} - {name} for name in names} if len(names) > 2 else {}
    return alone | without


def train_cross_vendor(run: RunFolder, kind: str, cases: Sequence[Case]) -> None:
    """Train every row but that of all vendors, for every task; each is a stage of the run.

    Args:
        run: The run; receives `matrix/<kind>/<row>.json` in each task's `predictions_folder`.
        kind: "synthetic" or "real".
        cases: All cases of that kind.
    """
    for row, vendors in training_sets(case.info.vendor for case in cases).items():
        part = [case for case in cases if case.info.vendor in vendors]
        train_models(run, f"matrix/{kind}/{row}", partial(list, part), real=kind == "real")


def cross_vendor_scores(
    run: RunFolder, publishable: Callable[[Predictions], Predictions], task_name: str = MAIN_TASK
) -> tuple[dict[str, Table], dict[str, Table]]:
    """What was trained so far for a task: scores by kind, and what leaving a vendor out costs, paired by patient.

    Args:
        run: The run.
        publishable: Selects, from a model's predictions on every test set, those that may be published, small groups
            joined.
        task_name: One of `TASKS`.

    Returns:
        `matrix` and `matrix_differences` of report.json; empty where no row was trained, the latter also where the
        task compares no models patient by patient.
    """
    scores: dict[str, Table] = {}
    differences: dict[str, Table] = {}
    task, config, folder = TASKS[task_name], run.config, predictions_folder(run, task_name)
    for kind, model in WHOLE.items():
        paths = {path.stem: path for path in (folder / "matrix" / kind).glob("*.json")}
        whole = folder / f"{model}.json"
        if not paths or not whole.is_file():
            continue
        rows = {name: _pooled(path, publishable) for name, path in sorted({ALL: whole, **paths}.items())}
        if task_name == MAIN_TASK:  # shown even where every test patient is at a site
            rows = {name: NO_PATIENTS | row for name, row in rows.items()}
        elif not all(row.get("vendors") for row in rows.values()):
            continue
        scores[kind] = {name: dict(table_of(task, row, config)) for name, row in rows.items()}
        paired = {
            name: task.paired_table(row, rows[ALL], row["vendors"], config)
            for name, row in rows.items()
            if name.startswith(WITHOUT)
        }
        differences[kind] = {name: dict(row) for name, row in paired.items() if row is not None}
    return scores, {kind: rows for kind, rows in differences.items() if rows}


def _pooled(path: Path, publishable: Callable[[Predictions], Predictions]) -> dict[str, list[Any]]:
    """Predictions on all test sets together, groups joined per set, so that no two tables differ by a few patients."""
    sets = list(publishable(json.loads(path.read_text(encoding="utf-8"))).values())
    keys = [key for key in (sets[0] if sets else ()) if all(key in values for values in sets)]
    return {key: [value for values in sets for value in values[key]] for key in keys}
