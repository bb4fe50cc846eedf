"""What the hospitals bring: the study's network beside one that learnt from the public prior alone, patient by patient.

The baseline `prior_only` is the same study without any site. What it reaches is the public prior's merit; the rest is
what the sites' private releases have taught.
"""

from collections.abc import Mapping
from typing import Any

from fedcmr.server.evaluation.tables import paired_table
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.settings import Config

PRIOR_ONLY = "prior_only"


def differences_to_prior(predictions: Mapping[str, Mapping[str, Mapping[str, Any]]], config: Config) -> dict[str, Any]:
    """How much larger the network's error is with the sites than without them, in EF points; below 0 they help.

    Args:
        predictions: {model: {test set: its "vendors", "true" and "predicted"}} of the ejection fraction, as they may be
            published.
        config: Resamples of the intervals and the seed are used.

    Returns:
        {test set: what `paired_table` returns}; empty where the study has no such baseline.
    """
    with_sites, without = predictions.get(MAIN_MODEL, {}), predictions.get(PRIOR_ONLY, {})
    return {
        name: paired_table(
            rows["true"],
            rows["predicted"],
            without[name]["predicted"],
            rows["vendors"],
            config.evaluation.num_bootstrap,
            config.seed,
        )
        for name, rows in with_sites.items()
        if name in without
    }
