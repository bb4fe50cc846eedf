"""The public segmenter and the one that the sites have tuned, on the study's test patients.

Both are rows of the segmentation's baselines. Their difference is taken patient by patient: what the sites' rounds have
brought, whatever the study's own segmenter learns from synthetic hearts.
"""

from collections.abc import Mapping
from typing import Any

from fedcmr.server.experiments.models import model_key, save_predictions, test_sets
from fedcmr.server.experiments.names import FEDERATED_SEGMENTER, PUBLIC_SEGMENTER
from fedcmr.server.federation.state import FEDERATED_SEGMENTER_NAME
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import Config
from fedcmr.server.tasks.registry import TASKS
from fedcmr.server.tasks.segmentation.scores import paired_dice
from fedcmr.shared.device import pick_device
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter

STAGE = "federated_segmenter"
TASK = "segmentation"


def test_segmenters(run: RunFolder) -> None:
    """Keep what both segmenters find on every test set of the segmentation.

    Raises:
        UserError: A segmenter cannot be read.
    """
    task, config, device = TASKS[TASK], run.config, pick_device(run.config.device)
    held_out = test_sets(run, TASK)
    paths = {PUBLIC_SEGMENTER: None, FEDERATED_SEGMENTER: run.path / FEDERATED_SEGMENTER_NAME}
    for name, path in paths.items():
        model = load_segmenter(path)
        values = {
            test_set: task.per_patient(cases, task.predict(model, cases, config, device))
            for test_set, cases in held_out
        }
        save_predictions(run, model_key(TASK, name), held_out, values)


def segmenter_differences(predictions: Mapping[str, Mapping[str, Mapping[str, Any]]], config: Config) -> dict[str, Any]:
    """What the sites' rounds have changed, for `tasks` of report.json.

    Args:
        predictions: {model: {test set: its vendors, and what `per_patient` returned}}, as they may be published.
        config: Resamples of the intervals and the seed are used.

    Returns:
        {test set: {vendor | "all": what `paired_dice` returns}}; empty where the study has no such rounds.
    """
    tuned, public = (predictions.get(name, {}) for name in (FEDERATED_SEGMENTER, PUBLIC_SEGMENTER))
    return {
        name: paired_dice(rows, public[name], rows["vendors"], config.evaluation.num_bootstrap, config.seed)
        for name, rows in tuned.items()
        if name in public
    }
