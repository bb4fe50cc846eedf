"""What the hospitals bring is the difference to the public prior alone, patient by patient, and is said first."""

import numpy as np
import pytest

from fedcmr.server.experiments.site_gain import differences_to_prior
from fedcmr.server.report.build import as_json
from fedcmr.server.report.summary import findings, from_the_sites
from fedcmr.server.report.tidy_csv import tidy_rows
from fedcmr.server.settings import load
from tests.server.report.report_study import study

CONFIG = load("default", ["evaluation.num_bootstrap=500"])


def predictions(shift: float, num: int = 40) -> dict:
    """A network that misses everybody by 10 points and by chance, and one that misses by `shift` points less."""
    rng = np.random.default_rng(0)
    true = rng.uniform(0.2, 0.7, num)
    vendors = ["GE", "Philips"] * (num // 2)
    hard = true + 0.1 + rng.normal(0, 0.02, num)

    def rows(predicted):
        return {"hospitals": {"vendors": vendors, "true": true.tolist(), "predicted": predicted.tolist()}}

    return {"synthetic_only": rows(hard - shift / 100 + rng.normal(0, 0.002, num)), "prior_only": rows(hard)}


def report_of(shift: float) -> dict:
    report = study(simulated=True)[0]
    return as_json(report | {"prior_differences": differences_to_prior(predictions(shift), CONFIG)})


def test_it_is_paired_and_by_vendor():
    found = differences_to_prior(predictions(3.0), CONFIG)["hospitals"]
    assert set(found) == {"GE", "Philips", "all"} and found["all"]["n_patients"] == 40
    assert found["all"]["difference_points"] == pytest.approx(-3.0, abs=0.1)
    low, high = found["all"]["ci95"]
    assert high - low < 0.3, "what makes a patient hard for both does not widen it"


def test_without_the_baseline_nothing_is_said():
    alone = {"synthetic_only": predictions(3.0)["synthetic_only"]}
    assert differences_to_prior(alone, CONFIG) == {}
    assert from_the_sites(as_json(study(simulated=True)[0])) == ""


@pytest.mark.parametrize(
    ("shift", "text"),
    [
        (3.0, "What the hospitals bring over the public prior alone: 3.0 points less error (patient by patient, 95 %"),
        (-2.0, "What the hospitals bring over the public prior alone: 2.0 points more error (patient by patient, 95 %"),
        (0.0, "What the hospitals bring over the public prior alone: nothing that can be seen, "),
    ],
)
def test_it_is_said_first_in_these_words(shift, text):
    assert findings(report_of(shift))[0].startswith(text)


def test_it_is_in_the_csv():
    rows = [row for row in tidy_rows(report_of(3.0)) if row[0] == "results minus public prior only"]
    assert {row[3] for row in rows} == {"GE", "Philips", "all"} and any("difference_points" in row for row in rows)
