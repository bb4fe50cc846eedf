"""The card next to a trained ResNet50: its training data, its tests, and its limitations.

The questions are those of Mitchell et al. (2019), https://arxiv.org/abs/1810.03993. What a card states about the
training is also in the header of the weights' file, so that a lost card can be written again.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from fedcmr.server.evaluation.categories import CATEGORIES, category_of
from fedcmr.server.formatting import describe_scans
from fedcmr.server.front_matter import front_matter
from fedcmr.server.settings import RegressionConfig
from fedcmr.server.tasks.facts import versions
from fedcmr.shared import checkpoint
from fedcmr.shared.case import Case
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.tasks.ejection_fraction.network import load_regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef

NOT_TESTED = "Not tested yet: `fedcmr-server evaluate --model {name} --test DIR...` measures its errors."
HEAD = {
    "license": "other",
    "license_name": "see-training-data",
    "tags": ["medical", "cardiac-mri", "ejection-fraction", "regression", "resnet50", "monai", "synthetic-data"],
    "metrics": ["mae", "r_squared"],
}
"""For Hugging Face's Hub; the terms of the weights are those of what they were trained on."""
COLUMNS = {
    "patients": ("n_patients", "{:d}"),
    "MAE, points": ("mae_points", "{:.1f}"),
    "r²": ("r2", "{:.2f}"),
    "bias, points": ("bias_points", "{:.1f}"),
    "right class": ("category_agreement", "{:.0%}"),
}


def training_facts(cases: Sequence[Case], config: RegressionConfig, seed: int, data: str) -> dict[str, Any]:
    """What a card states about a training, as the header of the weights' file keeps it.

    About the training patients it has counts only, by vendor and class of ejection fraction.

    Args:
        cases: What it was trained on; those without an ejection fraction do not count.
        config: Its settings.
        seed: Its seed.
        data: One sentence or more on what the cases are, and on what the weights may disclose of them.
    """
    efs = [patient_ef(case) for case in cases]
    known = [(case.info.vendor, ef) for case, ef in zip(cases, efs, strict=True) if math.isfinite(ef)]
    classes = np.bincount(category_of(np.array([ef for _, ef in known])), minlength=len(CATEGORIES))
    return {
        "trained_on": len(known),
        "vendors": dict(sorted(Counter(vendor for vendor, _ in known).items())),
        "classes": dict(zip(CATEGORIES, classes.tolist(), strict=True)),
        "data": data,
        "seed": seed,
        "settings": asdict(config),
        "versions": versions(),
    }


def write_model_card(
    weights: Path,
    scores: Mapping[str, Any] | None = None,
    uncertainty: Mapping[str, Any] | None = None,
    test_sets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path | None:
    """Write the card of a file of `save_regressor` next to it, ending in .md.

    Args:
        weights: The file; its header holds `training_facts`.
        scores: {test set: {vendor or "all": `score`}}; None where it was not tested.
        uncertainty: {test set: `coverage`}.
        test_sets: {test set: its provenance}, as in report.json.

    Returns:
        The card; None, and nothing is written, for weights of a version that kept no `training_facts`.

    Raises:
        UserError: The weights cannot be read.
    """
    _, facts = checkpoint.load(weights)
    if "settings" not in facts:
        return None
    path = weights.with_suffix(".md")
    write_atomically(path, _card(weights, facts, scores or {}, uncertainty or {}, test_sets or {}).encode())
    return path


def _card(
    weights: Path,
    facts: Mapping[str, Any],
    scores: Mapping[str, Any],
    uncertainty: Mapping[str, Any],
    test_sets: Mapping[str, Mapping[str, Any]],
) -> str:
    """The card's text."""
    model = load_regressor(weights)
    return f"""{front_matter(HEAD)}
# Model card: {weights.name}

A ResNet50 (MONAI) that predicts the left ventricle's ejection fraction from pairs of end-diastolic and end-systolic
short-axis slices. Research software, not a medical device.

## Details

- Input: slice pairs of 64 x 64 pixels in [-1, 1], the ventricle in the middle; no mask. `fedcmr-server evaluate` makes
  them from prepared cases.
- Output: the patient's ejection fraction, the mean over the stack's middle slices and over
  {facts["settings"]["num_tta"]} rotations, with the standard deviation of its error; LV areas of both phases.
- SHA-256: {hashlib.sha256(weights.read_bytes()).hexdigest()}
- Made with {facts["versions"]}; seed {facts["seed"]}.

## Training data

{facts["data"]}

- {facts["trained_on"]} patients: {_counts(facts["vendors"])}.
- Ejection fraction: {_counts(facts["classes"])} (at most 40 %, between, at least 50 %);
  mean {model.mean_ef.item():.2f}.

Settings, as `configs/default.yaml` explains them under `regression`:

```yaml
{OmegaConf.to_yaml(OmegaConf.create(dict(facts["settings"]))).strip()}
```

## Evaluation

{_evaluation(weights.name, scores, test_sets)}

{_uncertainty(model.sd_floor.item(), uncertainty)}

## Uses

- Intended: research on how models trained on synthetic hearts generalise across vendors; a baseline to compare with.
- Not intended: diagnosis or any decision about a patient; other views than short-axis cine; children, congenital heart
  disease, implants, which it has not been tested on.
- Classes of the ejection fraction follow from the value alone: they do not say whether a patient has
  heart failure.

## Limits

- Few test patients make wide intervals; a vendor without test patients above has not been tested.
- A network that was right on these patients may be wrong on other scanners. Test it at home before relying on it:
  `fedcmr-server evaluate` sends nothing.
"""


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{num} {name}" for name, num in counts.items())


def _evaluation(name: str, scores: Mapping[str, Any], test_sets: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of every test set and vendor; 95 % intervals where there are any."""
    if not scores:
        return NOT_TESTED.format(name=name)
    kinds = "; ".join(f"{test_set}, {describe_scans(entry)}" for test_set, entry in test_sets.items())
    lines = [
        f"On patients that were held out{f' ({kinds})' if kinds else ''}; 95 % intervals over patients.",
        "",
        f"| test set | vendor | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for test_set, vendors in scores.items():
        for vendor, figures in vendors.items():
            cells = [_cell(figures, key, form) for key, form in COLUMNS.values()]
            lines.append(f"| {test_set} | {vendor} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figures: Mapping[str, Any], key: str, form: str) -> str:
    value, limits = figures[key], figures["ci95"].get(key)
    if value is None:
        return "undefined"
    interval = f" ({form.format(limits[0])} to {form.format(limits[1])})" if limits else ""
    return form.format(value) + interval


def _uncertainty(sd_floor: float, uncertainty: Mapping[str, Any]) -> str:
    """The predictive uncertainty, and whether it is calibrated."""
    if math.isnan(sd_floor):
        return "It was not calibrated and predicts no uncertainty."
    lines = [f"Its predicted SD is at least {100 * sd_floor:.1f} points."]
    for test_set, figures in uncertainty.items():
        shares = [f"{row['observed']:.0%} (nominal {row['nominal']:.0%})" for row in figures["coverage"]]
        lines.append(f"Observed coverage on {test_set}, {figures['n_patients']} patients: {', '.join(shares)}.")
    return "\n".join(lines)
