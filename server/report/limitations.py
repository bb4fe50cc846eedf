"""Limitations of a report: what was not run, what may not be shown, and what so few patients cannot show."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fedcmr.server.evaluation.disclosure import OTHERS
from fedcmr.server.evaluation.score import FEW_PATIENTS
from fedcmr.server.formatting import listed, patients
from fedcmr.server.report.provenance import hidden_sets, per_patient_sets, simulated_sets

EXPECTED_BASELINES = {
    "predict_the_mean": "guessing the mean",
    "prior_only": "the public prior only",
    "local_only": "each site alone",
    "pooled_real": "the sites' real scans pooled",
}
"""Baselines that every reader expects, by their name in the settings."""
SMALL_TEST_SET = 100
"""Patients below which the report says what so few can show."""


def baselines_not_run(report: Mapping[str, Any]) -> list[str]:
    """Those of `EXPECTED_BASELINES` that this run does not have, by their names in the settings."""
    return [
        name
        for name in EXPECTED_BASELINES
        if not any(key == name or key.startswith(f"{name}_") for key in report["baselines"])
    ]


def limitations(report: Mapping[str, Any], shown: Collection[str]) -> list[str]:
    """One sentence or two for each thing that the report does not show.

    Args:
        report: As in report.json.
        shown: The test sets whose patients' images may appear.
    """
    return list(_limitations(report, shown))


def _limitations(report: Mapping[str, Any], shown: Collection[str]) -> Iterator[str]:
    if report["simulated"]:
        yield "How it does on people: the hospitals' patients were simulated too."
    elif drawn := simulated_sets(report):
        yield f"How it does on people, by the test patients of {listed(drawn)}: these were simulated."
    for test_set, tables in report["regression"].items():
        yield from _few(test_set, tables)
    replies = (report.get("federated_evaluation") or {}).get("sites") or {}
    if silent := [site for site, reply in replies.items() if reply["code"] != "ok"]:
        yield f"How it does on test patients of {listed(silent)}: see their replies above."
    if missing := baselines_not_run(report):
        yield (
            f"Not run: {listed([EXPECTED_BASELINES[name] for name in missing])}. A run with "
            f"evaluation.baselines=[{','.join(EXPECTED_BASELINES)}], in a folder of its own, has them; "
            "each site alone and pooled scans only fedcmr-simulate can have."
        )
    if not report.get("matrix"):
        yield (
            "How a network trained on one vendor's hearts does on another vendor's patients: the cross-vendor "
            "evaluation was not run. A run with evaluation.cross_vendor=[synthetic], in a folder of its own, has it."
        )
    if not report.get("fidelity"):
        yield (
            "How far the synthetic hearts are from real ones in image and anatomy: it was not measured. A run with "
            "evaluation.fidelity=true, in a folder of its own, has it."
        )
    if not report.get("uncertainty"):
        yield "Whether the network's predictive uncertainty is calibrated: it was not measured."
    if hidden := hidden_sets(report, shown):
        yield (
            f"Images of the real test patients of {listed(hidden)}: nobody has allowed them. Where they may be "
            "shown, evaluation.show_real_images=true shows them."
        )
    if apart := [name for name in report["regression"] if name not in per_patient_sets(report)]:
        yield f"Patient by patient: the test patients of {listed(apart)} are private; only groups have figures here."
    yield "Other vendors, field strengths or diseases than those of the test patients."
    yield "That an error is harmless: a mean error says little about the worst patient. See the plots."
    if "audit" not in report:
        yield (
            "Attacks on the trained network; the guarantee above is a proof about the sites' updates, not a "
            "measurement."
            if report["privacy"]["epsilon"] is not None
            else "Attacks on the trained network: nobody has audited this run."
        )
    yield "Anything for diagnosis."


def _few(test_set: str, tables: Mapping[str, Any]) -> Iterator[str]:
    """What a small test set cannot show."""
    num = tables["all"]["n_patients"]
    vendors = {name: score["n_patients"] for name, score in tables.items() if name != "all"}
    if num < FEW_PATIENTS:
        yield f"A result on {test_set}: {patients(num)}, an illustration and no measurement."
    elif len(vendors) == 1 and OTHERS not in vendors:
        few = ", and so few say little about rare hearts" if num < SMALL_TEST_SET else ""
        (vendor,) = vendors
        yield f"Anything about other vendors on {test_set}: its {patients(num)} come from one vendor, {vendor}{few}."
    elif num < SMALL_TEST_SET:
        each = listed([f"{count} {name}" for name, count in vendors.items()])
        yield (
            f"Small differences between vendors on {test_set}: of {patients(num)} ({each}), so few that what lies "
            "within the intervals may be chance."
        )


def not_run_note(report: Mapping[str, Any]) -> str:
    """The expected baselines that are missing in the table; empty where it has all."""
    missing = baselines_not_run(report)
    return f"Not run: {listed([EXPECTED_BASELINES[name] for name in missing])}." if missing else ""
