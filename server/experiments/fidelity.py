"""The study's synthetic hearts against its test patients, vendor by vendor, next to hearts of the public prior only.

Test patients are the coordinator's. Where some are real, the simulated ones are left out: a vendor's figures are of one
kind. Patients who never leave their site cannot be compared with anything.
"""

import json
from dataclasses import replace
from typing import Any

from fedcmr.server.evaluation.disclosure import published
from fedcmr.server.evaluation.fidelity.measure import Effort, measure_fidelity
from fedcmr.server.experiments.models import test_provenances, test_sets
from fedcmr.server.generation.synthesis import synthesize
from fedcmr.server.run_folder import RunFolder
from fedcmr.shared.case import Case, load_cases
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.permissions import private_folder

STAGE = "fidelity"
PATH = "private/fidelity.json"
"""File of a run folder with the figures as they were measured, before any is rounded."""
NUM_PRIOR_ONLY = 40
"""Hearts of the public prior only, the same for every vendor: its styles are nobody's."""


def compare_with_test_patients(run: RunFolder, prior: Prior) -> None:
    """Measure the study's synthetic set and keep the figures in `PATH`."""
    config, held_out = run.config, test_sets(run)
    kinds = test_provenances(run, [name for name, _ in held_out])
    real = [name for name, _ in held_out if not kinds[name].is_simulated]
    used = [(name, cases) for name, cases in held_out if name in real or not real]
    by_vendor = _by_vendor([case for _, cases in used for case in cases])
    prior_only: list[Case] = []
    if by_vendor and "prior_only" in config.evaluation.baselines:
        few = replace(config.synthesis, num_cases=NUM_PRIOR_ONLY, vendor_shares={})
        doing = "rendering with the public prior only"
        prior_only = synthesize(prior, None, few, sorted(by_vendor)[:1], config.seed, config.device, doing).cases
    found = measure_fidelity(
        by_vendor,
        _by_vendor(load_cases(run.path / "synthetic")),
        dict.fromkeys(by_vendor, prior_only),
        prior.grid,
        Effort(num_bootstrap=config.evaluation.num_bootstrap, seed=config.seed),
    )
    facts = {"test_sets": [name for name, _ in used], "simulated": bool(used) and not real, **found}
    path = run.path / PATH
    private_folder(path.parent)
    write_atomically(path, (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode())


def fidelity_block(run: RunFolder) -> dict[str, Any]:
    """{"fidelity": the figures as they may be published}, those of real patients rounded; empty where none are there.

    No figure is of fewer than `MIN_PATIENTS` patients (`fedcmr.server.evaluation.fidelity.measure`), so that no group
    has to be joined with another.
    """
    path = run.path / PATH
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    groups = {
        name: {
            **group,
            **{part: published(group[part], rounded=not found["simulated"]) for part in ("comparisons", "anatomy")},
        }
        for name, group in found["groups"].items()
    }
    return {"fidelity": {**found, "groups": groups}}


def _by_vendor(cases: list[Case]) -> dict[str, list[Case]]:
    vendors = sorted({case.info.vendor for case in cases})
    return {vendor: [case for case in cases if case.info.vendor == vendor] for vendor in vendors}
