"""The section on fidelity: how far each vendor's synthetic hearts are from its test patients, in rows and words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedcmr.server.evaluation.fidelity.anatomy import QUANTITIES
from fedcmr.server.evaluation.fidelity.measure import HALVES, OTHERS, OWN, PRIOR_ONLY
from fedcmr.server.formatting import figure, listed

DISTANCES = {
    "frd": ("Fréchet radiomics<br>distance", 1),
    "kid": ("kernel<br>distance", 2),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
    "auc_heart": ("AUC,<br>heart alone", 2),
    "auc_image": ("AUC,<br>whole image", 2),
}
"""Columns of the first table: heading, digits."""
ANATOMY = {
    "lv_ed_ml": "LV volume<br>at ED, ml",
    "lv_es_ml": "LV volume<br>at ES, ml",
    "mass_g": "myocardial<br>mass, g",
    "wall_mm": "wall thickness<br>at ED, mm",
}
"""Columns of the second table."""


@dataclass(frozen=True)
class FidelityRow:
    """A row of either table.

    Attributes:
        name: What was compared, or whose hearts.
        cells: For each column a figure in words and its interval, either of them empty.
        is_main: Whether it is about the study's synthetic hearts and this vendor's patients.
    """

    name: str
    cells: list[tuple[str, str]]
    is_main: bool = False


@dataclass(frozen=True)
class VendorFidelity:
    """A vendor's rows.

    Attributes:
        vendor: Its name.
        n_patients: Test patients.
        n_half: Patients a side of a comparison.
        distances: Rows of the first table.
        anatomy: Rows of the second one.
    """

    vendor: str
    n_patients: int
    n_half: int
    distances: list[FidelityRow]
    anatomy: list[FidelityRow]


def vendor_rows(block: Mapping[str, Any]) -> list[VendorFidelity]:
    """The tables of report.json's `fidelity`, vendor by vendor."""
    return [
        VendorFidelity(vendor, group["n_patients"], group["n_half"], _distances(vendor, group), _anatomy(group))
        for vendor, group in block["groups"].items()
    ]


def why_not_measured(block: Mapping[str, Any]) -> list[str]:
    """A sentence for each reason why vendors, or all of them, have no figures."""
    if not block["test_sets"]:
        return [
            "Not measured: no test patient is with the coordinator. Those at the sites never leave them, so that their "
            "scans cannot be compared with synthetic ones."
        ]
    reasons: dict[str, list[str]] = {}
    for vendor, why in block["not_measured"].items():
        reasons.setdefault(why, []).append(vendor)
    return [f"Not measured for {listed(vendors)}: {why}." for why, vendors in reasons.items()]


def _distances(vendor: str, group: Mapping[str, Any]) -> list[FidelityRow]:
    names = {
        OWN: f"synthetic, and {vendor} patients",
        OTHERS: "synthetic, and other vendors' patients",
        HALVES: f"one half of the {vendor} patients, and the other",
        PRIOR_ONLY: f"public prior only, and {vendor} patients",
    }
    digits = {metric: places for metric, (_, places) in DISTANCES.items()}
    return [
        FidelityRow(names[name], [_cell(row, metric, digits[metric]) for metric in DISTANCES], name == OWN)
        for name, row in group["comparisons"].items()
    ]


def _anatomy(group: Mapping[str, Any]) -> list[FidelityRow]:
    names = {"real": "test patients", "synthetic": "synthetic", PRIOR_ONLY: "public prior only"}
    rows = []
    for role, row in group["anatomy"].items():
        values = [(row[f"{key}_mean"], row[f"{key}_sd"]) for key in QUANTITIES]
        cells = [("–" if mean is None else f"{figure(mean, 1)} ± {figure(sd, 1)}", "") for mean, sd in values]
        rows.append(FidelityRow(f"{names[role]}, mean ± SD", cells))
    compared = {
        OWN: "synthetic from test patients",
        PRIOR_ONLY: "public prior only from them",
        HALVES: "halves of them",
    }
    for name, what in compared.items():
        if name not in group["comparisons"]:
            continue
        row = group["comparisons"][name]
        cells = [_cell(row, f"wasserstein_{key}", 1) for key in QUANTITIES]
        rows.append(FidelityRow(f"Wasserstein distance, {what}", cells, name == OWN))
    return rows


def _cell(row: Mapping[str, Any], metric: str, digits: int) -> tuple[str, str]:
    """A figure and its interval in words; a dash where it was not measured."""
    if row.get(metric) is None:
        return "–", ""
    low, high = row["ci95"].get(metric) or (None, None)
    return figure(row[metric], digits), "" if low is None else f"{figure(low, digits)} to {figure(high, digits)}"
