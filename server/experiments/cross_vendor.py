"""The cross-vendor evaluation: a ResNet50 trained on one vendor, on all, or on all but one, and tested on each.

Every row is a training of its own, on a part of the same cases and with the same number of steps. The row of all
vendors is the study's own model of that kind, which is not trained twice.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedcmr.server.evaluation.tables import paired_table, table
from fedcmr.server.experiments.models import predictions_folder, train_and_predict
from fedcmr.server.experiments.names import ALL, MAIN_MODEL, WITHOUT
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import Config
from fedcmr.shared.case import Case

WHOLE = {"synthetic": MAIN_MODEL, "real": "pooled_real"}
"""The study's model that was trained on all vendors' cases of a kind."""

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


def train_cross_vendor(run: RunFolder, config: Config, kind: str, cases: Sequence[Case]) -> None:
    """Train every row but that of all vendors; each is a stage of the run.

    Args:
        run: The run; receives `private/predictions/matrix/<kind>/<row>.json`.
        config: Its settings.
        kind: "synthetic" or "real".
        cases: All cases of that kind.
    """
    for row, vendors in training_sets(case.info.vendor for case in cases).items():
        with run.stage(f"matrix/{kind}/{row}") as to_do:
            if to_do:
                part = [case for case in cases if case.info.vendor in vendors]
                train_and_predict(run, config, f"matrix/{kind}/{row}", part, real=kind == "real")


def cross_vendor_scores(
    run: RunFolder, config: Config, publishable: Callable[[Predictions], Predictions]
) -> tuple[dict[str, Table], dict[str, Table]]:
    """What was trained so far: scores by kind, and what leaving a vendor out costs, paired by patient.

    Args:
        run: The run.
        config: Its settings.
        publishable: Selects, from a model's predictions on every test set, those that may be published, small groups
            joined.

    Returns:
        `matrix` and `matrix_differences` of report.json; empty where no row was trained.
    """
    scores: dict[str, Table] = {}
    differences: dict[str, Table] = {}
    num_bootstrap, seed = config.evaluation.num_bootstrap, config.seed
    for kind, model in WHOLE.items():
        paths = {path.stem: path for path in (predictions_folder(run) / "matrix" / kind).glob("*.json")}
        whole = predictions_folder(run) / f"{model}.json"
        if not paths or not whole.is_file():
            continue
        rows = {name: _pooled(path, publishable) for name, path in sorted({ALL: whole, **paths}.items())}
        scores[kind] = {
            name: table(row["true"], row["predicted"], row["vendors"], num_bootstrap, seed)
            for name, row in rows.items()
        }
        differences[kind] = {
            name: paired_table(
                row["true"], row["predicted"], rows[ALL]["predicted"], row["vendors"], num_bootstrap, seed
            )
            for name, row in rows.items()
            if name.startswith(WITHOUT)
        }
    return scores, {kind: rows for kind, rows in differences.items() if rows}


def _pooled(path: Path, publishable: Callable[[Predictions], Predictions]) -> dict[str, list[Any]]:
    """Predictions on all test sets together, groups joined per set, so that no two tables differ by a few patients."""
    sets = publishable(json.loads(path.read_text(encoding="utf-8"))).values()
    return {key: [value for values in sets for value in values[key]] for key in ("vendors", "true", "predicted")}
