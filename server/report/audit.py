"""Results of `fedcmr-audit`, as text and tables for the HTML report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmr.shared.errors import UserError

AUDIT_NAME = "audit.json"
BUILD_NAMES = {
    "sound": "as it is",
    "noise_off": "broken on purpose: no noise",
    "clip_off": "broken on purpose: no clip",
    "slices_as_unit": "broken on purpose: slices for patients",
    "ledger_reset": "broken on purpose: a ledger that forgets",
}


@dataclass(frozen=True)
class AuditTable:
    """One audit in the report.

    Attributes:
        title: Title of the audit.
        text: What was done and how to read it.
        headings: Headings of the columns.
        rows: As many cells each; the first names the row.
    """

    title: str
    text: str
    headings: list[str]
    rows: list[list[str]]


def read_audit(folder: Path) -> Mapping[str, Any] | None:
    """A run's `audit.json`; None where nobody has audited it.

    Raises:
        UserError: The file is no JSON object.
    """
    path = folder / AUDIT_NAME
    if not path.exists():
        return None
    try:
        audit = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(audit, dict):
            raise ValueError
    except ValueError:
        raise UserError(f"{path} is no JSON object: remove it and repeat 'fedcmr-audit'") from None
    return audit


def audit_tables(audit: Mapping[str, Any]) -> list[AuditTable]:
    """The audits that were made, in a fixed order.

    Raises:
        UserError: The file is of another version.
    """
    makers: dict[str, Callable[[Any], AuditTable]] = {
        "canaries": _canaries,
        "membership": _membership,
        "copies": _copies,
    }
    try:
        return [make(audit[name]) for name, make in makers.items() if name in audit]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise UserError(f"{AUDIT_NAME} is of another version: remove it and repeat 'fedcmr-audit'") from None


def canary_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the audit with canaries can refute and what it cannot, in sentences."""
    lines = []
    if any(row["verdict"] == "finds what is not there" for row in rows):
        lines.append(
            "The control finds what is not there: the audit itself is broken, and its other lines prove nothing."
        )
    row = rows[0]
    lines.append(
        f"{row['num_guesses']} guesses refute a claim below {row['highest_provable']:.2f} at best, whatever is broken."
    )
    lines += [
        f"{BUILD_NAMES[row['build']].capitalize()}: not refuted at {row['claimed_epsilon']:.2f}. What was released "
        f"refutes claims below {row['lower_bound']:.2f}."
        for row in rows
        if row["build"] != "sound" and row["verdict"] == "not refuted"
    ]
    if row["family"] == "gaussian":
        lines.append(
            "A claim is taken for that of the Gaussian mechanism, which is what full batches of patients make."
        )
    return lines


def membership_lines(attacks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each attack that finds something where there is nothing."""
    return [
        f"{name}: it distinguishes members from members (AUC {row['control_auc']:.2f}, p {row['p_control']:.2g}), so "
        "that what it finds is not membership alone."
        for name, row in attacks.items()
        if not row["control_holds"]
    ]


def _canaries(rows: list[Mapping[str, Any]]) -> AuditTable:
    return AuditTable(
        "Who took part?",
        " ".join(
            [
                "Invented patients at invented sites took part in the study's training, each by the toss "
                "of a coin. From "
                "what the sites released the tosses were guessed; so many right guesses need at least the "
                "epsilon given, "
                "with 95 % confidence (Mahloujifar et al. 2024). A bound above the claim refutes it; one below is "
                "evidence, no proof. In the control all took part, whatever the toss: there is nothing to "
                "find. What is "
                "tested is the training code with the study's noise, not a site's installation.",
                *canary_lines(rows),
            ]
        ),
        ["site", "ε claimed", "ε at least", "right guesses", "verdict"],
        [
            [
                "control: all took part" if row["control"] else BUILD_NAMES.get(row["build"], str(row["build"])),
                "-" if row["control"] else f"{row['claimed_epsilon']:.2f}",
                f"{row['lower_bound']:.2f}",
                f"{row['num_correct']} of {row['num_guesses']}",
                row["verdict"],
            ]
            for row in rows
        ],
    )


def _membership(attacks: Mapping[str, Mapping[str, Any]]) -> AuditTable:
    return AuditTable(
        "Who trained the generator?",
        " ".join(
            [
                "Three attacks try to distinguish patients who trained from others of the same hospitals. AUC is "
                "the chance that "
                "one who trained is ranked higher: 0.5 is guessing. Then the share of them found where 1 "
                "in 100 others is "
                "accused, and how far the most exposed one stands out, next to the most conspicuous of "
                "those who did not "
                "train. The control ranks members against members, where there is nothing to find.",
                *membership_lines(attacks),
            ]
        ),
        ["attack", "patients", "AUC", "found at 1 %", "most exposed, SD", "control: AUC (p)"],
        [
            [
                name,
                f"{row['num_members']} and {row['num_others']}",
                _interval(row["auc"], row["auc_ci95"]),
                _interval(row["tpr"], row["tpr_ci95"]),
                f"{row['largest_member']:.1f} / {row['largest_other']:.1f}",
                f"{row['control_auc']:.2f} ({row['p_control']:.2g})",
            ]
            for name, row in attacks.items()
        ],
    )


def _copies(row: Mapping[str, Any]) -> AuditTable:
    num_images = row.get("num_images") or row["num_pictures"]  # its name in files of earlier versions
    return AuditTable(
        "Are there copies?",
        f"Each of {num_images} synthetic images was compared with {row['num_training']} training and "
        f"{row['num_held_out']} held-out patients, whatever the rotation or the hand. The share that is nearer to a "
        "training patient is 0.5 when nothing is copied. A copy is an image nearer to a training patient than half "
        "the smallest distance between two people.",
        ["share nearer to training", "copies", "as near to a held-out patient"],
        [[_interval(row["share"], row["share_ci95"]), f"{row['num_copies']}", f"{row['num_near_held_out']}"]],
    )


def _interval(value: float, bounds: list[float]) -> str:
    low, high = bounds
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
