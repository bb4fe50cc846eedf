"""What a site has spent, what is left, and the history of its releases, from its ledger."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import SiteSettings, load_site
from fedcmr.shared.adapters import present_name


def open_ledger(site: Path) -> tuple[SiteSettings, Ledger]:
    """A site's settings and its ledger, for reading and repair.

    Raises:
        UserError: The settings cannot be read.
    """
    settings = load_site(site)
    return settings, Ledger(settings.ledger_path, settings.replica_path)


def open_test_ledger(settings: SiteSettings) -> Ledger | None:
    """The ledger of a site's test patients; None where nothing was ever charged to it."""
    ledger = Ledger(settings.test_ledger_path, settings.test_replica_path)
    return ledger if settings.test_ledger_path.exists() else None


def read_budget(settings: SiteSettings, ledger: Ledger) -> dict[str, Any]:
    """Spent, left and history, ready for JSON; infinity becomes None.

    Epsilon is at the policy's `max_delta` throughout. `history` has one entry per charge, with epsilon after it, and
    `changes` those lines that are no release: how the ledger was opened, new policies, repairs.

    Raises:
        LedgerError: The ledger cannot be trusted.
    """
    delta, cap = settings.policy.max_delta, settings.policy.max_epsilon
    charges = ledger.charges()
    history = [
        {
            "time": charge["time"],
            "run_id": charge["run_id"],
            "round": charge["round"],
            "task": present_name(charge["task"]),
            **charge["release"],
            "committed": charge["reply"] is not None,
            "failed": charge["failure"] is not None,
            "epsilon_after": _finite(after),
        }
        for charge, after in zip(charges, ledger.epsilons(delta), strict=True)
    ]
    spent, accountant = ledger.account(delta)
    return {
        "site": settings.name,
        "num_releases": len(charges),
        "num_steps": sum(charge["release"]["num_steps"] for charge in charges),
        "delta": delta,
        "accountant": accountant,
        "epsilon": _finite(spent),
        "max_epsilon": cap,
        "epsilon_left": max(0.0, cap - spent),
        "history": history,
        "changes": [
            {key: value for key, value in entry.items() if key in ("time", "kind", "policy")}
            for entry in ledger.changes()
        ],
    }


def print_budget(budget: dict[str, Any], console: Console) -> None:
    """The same for a reader, one line per charge."""
    table = Table("", budget["site"])
    table.add_row("releases", f"{budget['num_releases']}, {budget['num_steps']} steps")
    table.add_row("epsilon spent", f"{_number(budget['epsilon'])} at delta {budget['delta']:g}, {budget['accountant']}")
    table.add_row("the site's cap", f"{budget['max_epsilon']:g}")
    table.add_row("left", f"{budget['epsilon_left']:.3f}")
    console.print(table)
    if budget["history"]:
        history = Table("time (UTC)", "run", "round", "what", "answer", "epsilon after")
        for charge in budget["history"]:
            answer = "kept" if charge["committed"] else "failed" if charge["failed"] else "none"
            what = f"{charge['task']}: {charge['num_steps']} x noise {charge['noise_multiplier']:.4g}"
            what += "" if charge["sample_rate"] == 1 else f", rate {charge['sample_rate']:.3g}"
            history.add_row(
                _minute(charge["time"]),
                charge["run_id"],
                str(charge["round"]),
                what,
                answer,
                _number(charge["epsilon_after"]),
            )
        console.print(history)
    for change in budget["changes"]:
        policy = change.get("policy", {})
        terms = ", ".join(f"{key} {policy[key]:g}" for key in ("max_epsilon", "max_delta") if key in policy)
        console.print(f"{_minute(change['time'])} {change['kind']}{': ' + terms if terms else ''}", highlight=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "without bound" if value is None else f"{value:.3f}"


def _minute(time: str) -> str:
    """2026-11-21T03:12:21+00:00 -> 2026-11-21 03:12."""
    return time[:16].replace("T", " ")
