"""What `fedcmr-audit` found, in words and tables for the report's page."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError

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
    """One audit on the page.

    Attributes:
        title: Of the audit.
        text: What was done and how to read it.
        headings: Of the columns.
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
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{AUDIT_NAME} is of another version: remove it and repeat 'fedcmr-audit'") from None


def _canaries(rows: list[Mapping[str, Any]]) -> AuditTable:
    return AuditTable(
        "Who took part?",
        "Invented patients took part in a site's training, each by the toss of a coin. From what the site released the "
        "tosses were guessed; so many right guesses need at least the epsilon given, with 95 % confidence (Steinke et "
        "al. 2023). A bound above the claim refutes it; one below is evidence, no proof.",
        ["site", "ε claimed", "ε at least", "right guesses"],
        [
            [BUILD_NAMES.get(row["build"], str(row["build"])), f"{row['claimed_epsilon']:.2f}",
             f"{row['lower_bound']:.2f}", f"{row['num_correct']} of {row['num_guesses']}"]
            for row in rows
        ],
    )  # fmt: skip


def _membership(attacks: Mapping[str, Mapping[str, Any]]) -> AuditTable:
    return AuditTable(
        "Who trained the generator?",
        "Three attacks try to tell patients who trained from others of the same hospitals. AUC is the chance that one "
        "who trained is ranked higher: 0.5 is guessing. Then the share of them found where 1 in 100 others is accused, "
        "and how far the most exposed one stands out, beside the most conspicuous of those who did not train.",
        ["attack", "patients", "AUC", "found at 1 %", "most exposed, sd"],
        [
            [name, f"{row['num_members']} and {row['num_others']}", _interval(row["auc"], row["auc_ci95"]),
             _interval(row["tpr"], row["tpr_ci95"]), f"{row['largest_member']:.1f} / {row['largest_other']:.1f}"]
            for name, row in attacks.items()
        ],
    )  # fmt: skip


def _copies(row: Mapping[str, Any]) -> AuditTable:
    return AuditTable(
        "Are there copies?",
        f"Each of {row['num_pictures']} synthetic pictures was compared with {row['num_training']} training and "
        f"{row['num_held_out']} held-out patients, whatever the rotation or the hand. The share that is nearer to a "
        "training patient is 0.5 when nothing is copied. A copy is a picture nearer to a training patient than half "
        "the smallest distance between two people.",
        ["share nearer to training", "copies", "as near to a held-out patient"],
        [[_interval(row["share"], row["share_ci95"]), f"{row['num_copies']}", f"{row['num_near_held_out']}"]],
    )


def _interval(value: float, bounds: list[float]) -> str:
    low, high = bounds
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
