"""How a site stands in its studies, from its own files alone: joined or not, answered, refused, what is left."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from fedcmr.client.budget import open_ledger, open_test_ledger
from fedcmr.client.deployment.joining import read_state
from fedcmr.client.error_log import Entry, read_entries
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import SiteSettings
from fedcmr.client.refusals import MEANINGS


def read_status(site: SiteSettings) -> dict[str, Any]:
    """Facts ready for JSON.

    Returns:
        `site`; `join`, what the `join` that runs last told, or None; `runs`, for each run in the order of its first
        charge how many rounds were `answered` or `failed` and when the last was charged; `refused`, for each code how
        often and when last, and `rehearsed` likewise; `budget` and, where test patients were evaluated on,
        `test_budget`. Rounds without privacy are charged to nothing and are not in `runs`.

    Raises:
        LedgerError: The ledger cannot be trusted.
    """
    _, ledger = open_ledger(site.folder)
    test_ledger = open_test_ledger(site)
    entries = read_entries(site.folder)
    there = site.ledger_path.exists()
    return {
        "site": site.name,
        "join": read_state(site),
        "runs": _runs(ledger) if there else {},
        "refused": _counts([entry for entry in entries if not entry.rehearsed]),
        "rehearsed": _counts([entry for entry in entries if entry.rehearsed]),
        "budget": _budget(site, ledger if there else None),
        "test_budget": None if test_ledger is None else _budget(site, test_ledger),
    }


def print_status(status: dict[str, Any], console: Console) -> None:
    """The same for a reader."""
    join = status["join"]
    table = Table("", f"site {status['site']}")
    table.add_row("join", "does not run" if join is None else f"{join['state']} (since {_minute(join['since'])} UTC)")
    for run_id, run in status["runs"].items():
        failed = f", {run['failed']} failed" if run["failed"] else ""
        table.add_row(f"run {run_id}", f"{run['answered']} rounds answered{failed}, last {_minute(run['last'])} UTC")
    if not status["runs"]:
        table.add_row("runs", "nothing was released")
    for title, key in (("budget", "budget"), ("test patients", "test_budget")):
        budget = status[key]
        if budget is not None:
            spent = "without bound" if budget["epsilon"] is None else f"{budget['epsilon']:.2f}"
            left = f"{budget['epsilon_left']:.2f} left"
            table.add_row(title, f"epsilon {spent} of {budget['max_epsilon']:g} spent, {left}")
    console.print(table)
    if status["refused"] or status["rehearsed"]:
        refused = Table("refused", "times", "last (UTC)", "meaning", "remedy")
        for title, key in (("", "refused"), (" (rehearsed)", "rehearsed")):
            for code, count in status[key].items():
                meaning, remedy = MEANINGS.get(code, ("", "errors.log in the site's folder says more"))
                refused.add_row(f"{code}{title}", str(count["times"]), _minute(count["last"]), meaning, remedy)
        console.print(refused)


def _runs(ledger: Ledger) -> dict[str, dict[str, Any]]:
    runs: dict[str, dict[str, Any]] = {}
    for charge in ledger.charges():
        run = runs.setdefault(charge["run_id"], {"answered": 0, "failed": 0, "last": ""})
        run["answered"] += charge["reply"] is not None
        run["failed"] += charge["failure"] is not None
        run["last"] = charge["time"]
    return runs


def _counts(entries: list[Entry]) -> dict[str, dict[str, Any]]:
    counts: dict[str, dict[str, Any]] = {}
    for entry in entries:
        times = counts[entry.code]["times"] if entry.code in counts else 0
        counts[entry.code] = {"times": times + 1, "last": entry.time}
    return counts


def _budget(site: SiteSettings, ledger: Ledger | None) -> dict[str, float | None]:
    """What was spent, at the policy's delta, and what is left."""
    spent = 0.0 if ledger is None else ledger.spent(site.policy.max_delta)
    cap = site.policy.max_epsilon
    epsilon = spent if math.isfinite(spent) else None
    return {"epsilon": epsilon, "max_epsilon": cap, "epsilon_left": max(0.0, cap - spent)}


def _minute(time: str) -> str:
    """2026-11-21T03:12:21+00:00 -> 2026-11-21 03:12."""
    return time[:16].replace("T", " ")
