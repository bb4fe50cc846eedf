"""A site's ledger beside a study's report: the coordinator's list of releases is a third copy, kept by somebody else.

Both copies of a ledger may be taken back to an older state, for example with a restored machine, and then agree with
each other. What the site has sent since is known to the coordinators of its studies.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.ledger import Ledger
from shared.errors import UserError
from shared.records import OK

MAX_BYTES = 64 * 2**20
"""Of a report; a large one has a hundredth of it."""


@dataclass(frozen=True)
class Comparison:
    """What the report and the ledger say of one run, each by its rounds.

    Attributes:
        run_id: Of the run.
        agreed: Answered according to the report, and charged in the ledger.
        forgotten: Answered according to the report, and not in the ledger: it has forgotten them.
        uncertain: Without an answer that the coordinator could read, and not in the ledger: nothing may have left.
        unreported: In the ledger, and not in the report.
    """

    run_id: str
    agreed: list[int]
    forgotten: list[int]
    uncertain: list[int]
    unreported: list[int]


def compare(site: str, ledger: Ledger, path: Path) -> Comparison:
    """Compare the ledger with a study's `report.json`.

    Args:
        site: The site's name in the study.
        ledger: Of the site.
        path: The report.

    Raises:
        UserError: It is no report, is of a study without privacy, or does not name the site.
        LedgerError: The ledger cannot be trusted.
    """
    run_id, reported = _read(path, site)
    charged = [(charge["round"], charge["release"]) for charge in ledger.charges() if charge["run_id"] == run_id]
    agreed, forgotten, uncertain = [], [], []
    for entry in reported:
        if any(entry["round"] == number and _same(entry["release"], release) for number, release in charged):
            agreed.append(entry["round"])
        elif entry["code"] == OK:
            forgotten.append(entry["round"])
        elif entry["charged"]:
            uncertain.append(entry["round"])
    rounds = {entry["round"] for entry in reported}
    unreported = _rounds(number for number, _ in charged if number not in rounds)
    return Comparison(run_id, _rounds(agreed), _rounds(forgotten), _rounds(uncertain), unreported)


def complain(found: Comparison, ledger: Ledger) -> None:
    """Nothing where the ledger has all that the report says was answered.

    Raises:
        UserError: It has forgotten releases; with the run and the rounds.
    """
    if found.forgotten:
        raise UserError(
            f"{ledger.folder}: expected the releases of run {found.run_id}, rounds {_words(found.forgotten)}, which "
            "the report says this site has answered, got none: the ledger was taken back to an older state. The site "
            "must not take part until it is restored as of its last run; what is not found again was spent all the same"
        )


def describe(found: Comparison) -> list[str]:
    """The comparison in lines for a reader."""
    lines = [f"run {found.run_id}: {len(found.agreed)} releases are in the report and in the ledger"]
    if found.uncertain:
        lines.append(f"rounds {_words(found.uncertain)}: the coordinator has no answer and counts them all the same; "
                     "they are not in the ledger, so nothing was sent")  # fmt: skip
    if found.unreported:
        lines.append(f"rounds {_words(found.unreported)}: charged here and not in the report; ask the coordinator why")
    return lines


def _read(path: Path, site: str) -> tuple[str, list[dict[str, Any]]]:
    """The report's run and its entries for the site."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: expected a study's report.json, got no such file")
        privacy = json.loads(path.read_bytes())["privacy"]
        run_id, releases = str(privacy["run_id"]), privacy["releases"]
        if releases is None:
            raise UserError(f"{path}: the study was trained without privacy, so no ledger was charged")
        if site not in releases:
            raise UserError(f"{path}: expected a report that names this site, {site}, got {len(releases)} other sites")
        entries = [
            {"round": int(entry["round"]), "code": str(entry["code"]), "charged": bool(entry["charged"]),
             "release": dict(entry["release"])}
            for entry in releases[site]
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: expected the report.json of a study, with 'privacy' and its 'releases'; ask the "
                        "coordinator to write it again with this version") from None  # fmt: skip
    return run_id, entries


def _same(reported: dict[str, Any], charged: dict[str, Any]) -> bool:
    """Whether two releases agree in all that both of them tell: a later version may tell more."""
    common = reported.keys() & charged.keys()
    return bool(common) and all(reported[key] == charged[key] for key in common)


def _rounds(numbers: Iterable[int]) -> list[int]:
    return sorted(set(numbers))


def _words(rounds: list[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    parts: list[list[int]] = []
    for number in rounds:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
