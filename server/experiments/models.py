"""The study's models: trained on cases, tested on every test patient, their predictions kept."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.run_folder import REGRESSOR_NAME, RunFolder
from fedcmr.server.settings import Config
from fedcmr.server.tasks.ejection_fraction.calibration import train_calibrated
from fedcmr.server.tasks.ejection_fraction.model_card import training_facts
from fedcmr.shared.case import INDEX_NAME, Case, load_cases
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import save_regressor

TestSets = list[tuple[str, list[Case]]]
"""Held-out patients by the name of their set."""
OF_SYNTHETIC = """Synthetic patients only. What they owe to patients at the sites is bounded by the privacy of the study
that made them; the data set's datasheet gives it."""
OF_SITES = """The sites' own scans, pooled, without privacy: the weights may disclose whoever was scanned. They are a
baseline for the machine that made them."""


def train_and_predict(
    run: RunFolder, config: Config, model_name: str, cases: Sequence[Case], real: bool = False
) -> None:
    """Train a ResNet50 on cases and keep its weights, its training curve and its predictions on every test set.

    Args:
        run: The run.
        config: Its settings.
        model_name: Names the files; may hold slashes.
        cases: What to train on.
        real: Whether these are the sites' own scans.
    """
    device = pick_device(config.device)
    curve: list[tuple[int, float]] = []
    checkpoints = run.path / "checkpoints"
    model = train_calibrated(
        cases,
        config.regression,
        config.seed,
        device,
        checkpoint=checkpoints / f"regressor_{model_name.replace('/', '_')}.safetensors",
        description=f"training {model_name}",
        log=lambda step, loss: curve.append((step, loss)),
    )
    main = model_name == MAIN_MODEL
    path = run.path / REGRESSOR_NAME if main else checkpoints / f"{model_name}.safetensors"
    private_folder(path.parent)
    facts = training_facts(cases, config.regression, config.seed, OF_SITES if real else OF_SYNTHETIC)
    save_regressor(path, model, {"model": model_name, **facts})
    for step, loss in curve:
        run.metric({"stage": "training", "model": model_name, "step": step, "loss": round(loss, 6)})
    held_out = test_sets(run)
    predictions = {name: predict(model, patients, config.regression.num_tta, device) for name, patients in held_out}
    save_predictions(
        run,
        model_name,
        held_out,
        {name: found.ef for name, found in predictions.items()},
        {name: found.sd for name, found in predictions.items()},
    )


def save_predictions(
    run: RunFolder,
    model_name: str,
    held_out: TestSets,
    predicted: Mapping[str, Any],
    sd: Mapping[str, Any] | None = None,
) -> None:
    """Write `private/predictions/<model>.json`, for this account alone.

    Per test set it holds the vendors, the true and predicted ejection fractions, and the SD of the latter.

    Args:
        run: The run.
        model_name: May hold slashes: folders below `private/predictions`.
        held_out: `test_sets(run)`.
        predicted: {test set: shape (N,)}, ejection fractions.
        sd: {test set: shape (N,)}, the predicted standard deviation of each error; None where the model predicts none.
    """
    rows: dict[str, dict[str, list[Any]]] = {
        name: {
            "vendors": [case.info.vendor for case in cases],
            "true": [case.info.ef for case in cases],
            "predicted": [float(value) for value in predicted[name]],
        }
        for name, cases in held_out
    }
    for name, values in (sd or {}).items():
        rows[name]["sd"] = [float(value) for value in values]
    path = predictions_folder(run) / f"{model_name}.json"
    private_folder(path.parent)
    write_atomically(path, json.dumps(rows, indent=1).encode())


def predictions_folder(run: RunFolder) -> Path:
    """Where the models' predictions for single patients lie, apart from the report that may be shared."""
    return run.path / "private" / "predictions"


def test_sets(run: RunFolder) -> TestSets:
    """Every held-out set by name: the cases of all folders below `test/<name>` whose ejection fraction is known.

    Raises:
        UserError: There is none, and the sites do not evaluate on theirs either.
    """
    sets = []
    for folder in sorted(path for path in (run.path / "test").glob("*") if path.is_dir()):
        cases = [case for index in sorted(folder.rglob(INDEX_NAME)) for case in load_cases(index.parent)]
        known = [case for case in cases if case.info.ef == case.info.ef]
        if known:
            sets.append((folder.name, known))
    if not sets and not run.config.evaluation.federated:
        raise UserError(f"{run.path / 'test'} holds no test patients: run 'fedcmr-simulate --until prepare' first")
    return sets
