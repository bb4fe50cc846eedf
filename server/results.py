"""Collects what a run folder holds into `report.json` and the report's pictures."""

import json
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.evaluation import table
from server.report.build import ReportInputs, SampleSheet, build_report
from shared import checkpoint
from shared.anatomy import ejection_fraction
from shared.case import Case, load_cases
from shared.config import Config, dump
from shared.run_folder import RunFolder

MAIN_MODEL = "synthetic_only"
"""The model the study is about: trained on the private federation's synthetic cases alone."""


def privacy_spent(run: RunFolder) -> dict[str, Any]:
    """The report's `privacy`, from what the server asked of every site: epsilon None where privacy was off."""
    _, metadata = checkpoint.load(run.path / "generator.safetensors")
    sites = {
        name: {"epsilon": site["epsilon"], "steps": site["steps"], "refused": len(site["refused"])}
        for name, site in metadata["sites"].items()
    }
    spent = [site["epsilon"] for site in sites.values() if site["epsilon"] is not None]
    accountants = sorted({site["accountant"] for site in metadata["sites"].values() if site["accountant"]})
    return {
        "unit": "one patient at one site, added or removed",
        "accountant": "+".join(accountants) or None,
        "delta": metadata["delta"],
        "epsilon": max(spent, default=None),
        "sites": sites,
    }


def collect(run: RunFolder, config: Config) -> dict[str, Any]:
    """`report.json` as the design's contract has it."""
    scores = {path.stem: _scores(json.loads(path.read_text()), config) for path in _prediction_files(run)}
    rounds = [line for line in run.metrics() if line.get("stage") == "federation" and "round" in line]
    num_sites = max(1, len(privacy_spent(run)["sites"]))
    synthetic = load_cases(run.path / "synthetic")
    vendors = [case.info.vendor for case in synthetic]
    return {
        "study": run.path.resolve().name,
        "privacy": privacy_spent(run),
        "regression": scores.get(MAIN_MODEL, {}),
        "baselines": {name: value for name, value in scores.items() if name != MAIN_MODEL},
        "synthetic": {
            "n_cases": len(synthetic),
            "per_vendor": {vendor: vendors.count(vendor) for vendor in sorted(set(vendors))},
            "ef": _requested_against_measured(run, synthetic),
        },
        "timing": {
            "seconds_per_stage": run.stage_seconds(),
            "seconds_per_round": [line["elapsed_s"] for line in rounds],
            "bytes_per_site_and_round": {
                "up": max((line["bytes_up"] for line in rounds), default=0) // num_sites,
                "down": max((line["bytes_down"] for line in rounds), default=0) // num_sites,
            },
        },
        "settings": dump(config),
        "versions": {"python": platform.python_version(),
                     **{name: version(name) for name in ("fedcmr", "flwr", "torch", "monai", "opacus")}},
    }  # fmt: skip
