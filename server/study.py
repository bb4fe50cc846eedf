"""From the shared generator to the report: synthesis, the regressor, the server's baselines, evaluation.

Every stage is done once: what is finished is read back, so that an interrupted study goes on where it stopped.
"""

import json
from collections.abc import Sequence
from typing import Any

from server.datasheet import study_facts
from server.evaluation import predict_the_mean
from server.regression import predict, save_regressor, train_regressor
from server.release import write_release
from server.report.build import MAIN_MODEL
from server.results import privacy_spent, write_report
from server.segmentation import load_segmenter, measured_ef
from server.synthesis import SharedGenerator, load_shared_generator, synthesize
from shared.case import INDEX_NAME, Case, load_cases
from shared.checkpoint import write_atomically
from shared.config import Config
from shared.device import pick_device
from shared.errors import UserError
from shared.networks.generator import Prior
from shared.run_folder import RunFolder


def finish_study(run: RunFolder, config: Config, prior: Prior) -> None:
    """Everything after the last round: synthesis, regressor, the baselines that need no site, the report.

    Raises:
        UserError: There are no test patients, or a file of an earlier stage cannot be read.
    """
    test_sets(run)
    shared = load_shared_generator(run.path / "generator.safetensors", prior)
    with run.stage("synthesis") as to_do:
        if to_do:
            _release(run, config, prior, shared)
    with run.stage("regressor") as to_do:
        if to_do:
            train_and_predict(run, config, MAIN_MODEL, load_cases(run.path / "synthetic"))
    if "predict_the_mean" in config.evaluation.baselines:
        with run.stage("predict_the_mean") as to_do:
            if to_do:
                efs = [case.info.ef for case in load_cases(run.path / "synthetic")]
                answers = {name: predict_the_mean(efs, len(cases)) for name, cases in test_sets(run)}
                save_predictions(run, "predict_the_mean", answers)
    if "prior_only" in config.evaluation.baselines:
        with run.stage("prior_only") as to_do:
            if to_do:
                vendors = sorted(shared.codes)
                synthetic = synthesize(prior, None, config.synthesis, vendors, config.seed, config.device,
                                       "painting with the prior alone")  # fmt: skip
                train_and_predict(run, config, "prior_only", synthetic.cases)
    with run.stage("report") as to_do:
        if to_do:
            write_report(run, config, test_sets(run))


def train_and_predict(run: RunFolder, config: Config, model_name: str, cases: Sequence[Case]) -> None:
    """Train a ResNet50 on cases and keep its weights, its training curve and its answers on every test set."""
    device = pick_device(config.device)
    curve: list[tuple[int, float]] = []
    checkpoints = run.path / "checkpoints"
    model = train_regressor(
        cases, config.regression, config.seed, device, checkpoints / f"regressor_{model_name}.safetensors",
        f"training {model_name}", log=lambda step, loss: curve.append((step, loss)),
    )  # fmt: skip
    main = model_name == MAIN_MODEL
    path = run.path / "regressor.safetensors" if main else checkpoints / f"{model_name}.safetensors"
    save_regressor(path, model, {"model": model_name, "trained_on": len(cases), "seed": config.seed})
    for step, loss in curve:
        run.metric({"stage": "training", "model": model_name, "step": step, "loss": round(loss, 6)})
    answers = {name: predict(model, held_out, config.regression.num_tta, device) for name, held_out in test_sets(run)}
    save_predictions(run, model_name, answers)


def save_predictions(run: RunFolder, model_name: str, answers: dict[str, Any]) -> None:
    """Write `predictions/<model>.json`: per test set the vendors, true and predicted ejection fractions."""
    rows = {
        name: {
            "vendors": [case.info.vendor for case in cases],
            "true": [case.info.ef for case in cases],
            "predicted": [float(value) for value in answers[name]],
        }
        for name, cases in test_sets(run)
    }
    path = run.path / "predictions" / f"{model_name}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(rows, indent=1).encode())


def test_sets(run: RunFolder) -> list[tuple[str, list[Case]]]:
    """Every held-out set by name: the cases of all folders below `test/<name>` whose ejection fraction is known.

    Raises:
        UserError: There is none.
    """
    sets = []
    for folder in sorted(path for path in (run.path / "test").glob("*") if path.is_dir()):
        cases = [case for index in sorted(folder.rglob(INDEX_NAME)) for case in load_cases(index.parent)]
        known = [case for case in cases if case.info.ef == case.info.ef]
        if known:
            sets.append((folder.name, known))
    if not sets:
        raise UserError(f"{run.path / 'test'} holds no test patients: run 'fedcmr-simulate --until prepare' first")
    return sets


def _release(run: RunFolder, config: Config, prior: Prior, shared: SharedGenerator) -> None:
    """Sample the synthetic data set, measure what the pictures show, and write it with labels and datasheet."""
    synthetic = synthesize(prior, shared, config.synthesis, sorted(shared.codes), config.seed, config.device)
    measured = measured_ef(load_segmenter().to(pick_device(config.device)), synthetic.cases)
    generator = run.path / "generator.safetensors"
    facts = study_facts(run.path.resolve().name, config, prior.sha256, generator, privacy_spent(run))
    write_release(run.path / "synthetic", synthetic.cases, synthetic.requested_efs, measured, facts,
                  config.synthesis.dicom, config.synthesis.nifti)  # fmt: skip
