"""A site's ledger next to a study's report: the coordinator's list of releases is a third copy, kept by somebody else.

Both copies of a ledger may be taken back to an older state, for example with a restored machine, and then agree with
each other. What the site has sent since is known to the coordinators of its studies.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import SiteSettings
from fedcmr.shared.errors import UserError
from fedcmr.shared.records import OK, PRIVATE, evaluation_run

MAX_BYTES = 64 * 2**20
"""Size of the largest report that is read; a large one has a hundredth of it."""


@dataclass(frozen=True)
class Comparison:
    """What the report and the ledger say of one run, each by its rounds.

    Attributes:
        run_id: Name of the run.
        agreed: Answered according to the report, and charged in the ledger.
        forgotten: Answered according to the report, and not in the ledger: it has forgotten them.
        uncertain: Without an answer that the coordinator could read, and not in the ledger: nothing may have left.
        unreported: In the ledger, and not in the report.
        evaluation: True or False, whether the ledger of test patients has the private evaluation that the site has
            answered according to the report; None where it has answered none.
    """

    run_id: str
    agreed: list[int]
    forgotten: list[int]
    uncertain: list[int]
    unreported: list[int]
    evaluation: bool | None


def compare(site: str, ledger: Ledger, test_ledger: Ledger | None, path: Path) -> Comparison:
    """Compare a site's ledgers with a study's `report.json`.

    Args:
        site: The site's name in the study.
        ledger: The site's ledger of training patients.
        test_ledger: The ledger of its test patients; None where nothing was charged to one.
        path: The report.

    Raises:
        UserError: It is no report, is of a study without privacy, or does not name the site.
        LedgerError: The ledger cannot be trusted.
    """
    run_id, reported, name = _read(path, site)
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
    evaluation = None
    if name is not None:
        evaluations = [] if test_ledger is None else test_ledger.charges()
        evaluation = any(charge["run_id"] == name for charge in evaluations)
    return Comparison(run_id, _rounds(agreed), _rounds(forgotten), _rounds(uncertain), unreported, evaluation)


def complain(found: Comparison, settings: SiteSettings) -> None:
    """Nothing where the site's ledgers have all that the report says was answered.

    Raises:
        UserError: It has forgotten releases; with the run and the rounds.
    """
    folder, what = None, ""
    if found.forgotten:
        folder, what = settings.ledger_path, f"the releases of run {found.run_id}, rounds {_listed(found.forgotten)},"
    elif found.evaluation is False:
        folder, what = settings.test_ledger_path, f"the evaluation of run {found.run_id},"
    if folder is not None:
        raise UserError(
            f"{folder}: expected {what} which the report says this site has answered, got none: the ledger was taken "
            "back to an older state. The site must not take part until it is restored as of its last run; what is not "
            "found again was spent all the same"
        )


def describe(found: Comparison) -> list[str]:
    """The comparison in lines for a reader."""
    lines = [f"run {found.run_id}: {len(found.agreed)} releases are in the report and in the ledger"]
    if found.evaluation is not None:
        where = "in the report and in" if found.evaluation else "in the report and not in"
        lines.append(f"the evaluation of its test patients is {where} their ledger")
    if found.uncertain:
        lines.append(
            f"rounds {_listed(found.uncertain)}: the coordinator has no answer and counts them all the same; "
            "they are not in the ledger, so nothing was sent"
        )
    if found.unreported:
        lines.append(f"rounds {_listed(found.unreported)}: charged here and not in the report; ask the coordinator why")
    return lines


def _read(path: Path, site: str) -> tuple[str, list[dict[str, Any]], str | None]:
    """The report's run, its entries for the site, and under which name a private evaluation of the site was charged."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: expected a study's report.json, got no such file")
        report = json.loads(path.read_bytes())
        privacy = report["privacy"]
        run_id, releases = str(privacy["run_id"]), privacy["releases"]
        if releases is None:
            raise UserError(f"{path}: the study was trained without privacy, so no ledger was charged")
        if site not in releases:
            raise UserError(f"{path}: expected a report that names this site, {site}, got {len(releases)} other sites")
        entries = [
            {
                "round": int(entry["round"]),
                "code": str(entry["code"]),
                "charged": bool(entry["charged"]),
                "release": dict(entry["release"]),
            }
            for entry in releases[site]
        ]
        evaluation = report.get("federated_evaluation") or {"sites": {}}
        answered = evaluation["sites"].get(site, {})
        private = (answered.get("code"), answered.get("form")) == (OK, PRIVATE)
        name = evaluation_run(run_id, str(evaluation["task"]), str(evaluation["model_sha256"])) if private else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: expected the report.json of a study, with 'privacy' and its 'releases'; ask the "
            "coordinator to write it again with this version"
        ) from None
    return run_id, entries, name


def _same(reported: dict[str, Any], charged: dict[str, Any]) -> bool:
    """Whether two releases agree in all that both of them tell: a later version may tell more."""
    common = reported.keys() & charged.keys()
    return bool(common) and all(reported[key] == charged[key] for key in common)


def _rounds(numbers: Iterable[int]) -> list[int]:
    return sorted(set(numbers))


def _listed(rounds: list[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    parts: list[list[int]] = []
    for number in rounds:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
