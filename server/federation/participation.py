"""Who took part in a study, who refused and with which code, and who was silent: for report, terminal and status."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedcmr.server.formatting import listed
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.style import MEAN_KEY, STD_KEY


@dataclass(frozen=True)
class Attendance:
    """One site's replies over a study.

    Attributes:
        answered: Rounds with a usable reply that counted: the round had its quorum.
        not_counted: Rounds with a usable reply that fell short of the quorum, and so changed nothing.
        refused: Rounds by the code with which the site refused.
        dropped: Rounds by the reason for which its reply was not used.
        silent: Rounds without a reply under its name.
    """

    answered: int = 0
    not_counted: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    silent: int = 0


def attendance(rounds: Iterable[Mapping[str, Any]], sites: Iterable[str]) -> dict[str, Attendance]:
    """Every site's part in the rounds so far.

    Args:
        rounds: As in `metrics.jsonl`: `answered`, `refused` and `dropped` ({site: code}), `missing` to the quorum.
        sites: Names of the registered sites.
    """
    lines = list(rounds)
    found = {}
    for site in sorted(sites):
        answered = [not line.get("missing") for line in lines if site in line["answered"]]
        refused = Counter(line["refused"][site] for line in lines if site in line["refused"])
        dropped = Counter(line["dropped"][site] for line in lines if site in line["dropped"])
        heard = len(answered) + refused.total() + dropped.total()
        found[site] = Attendance(
            sum(answered), len(answered) - sum(answered), dict(refused), dict(dropped), max(0, len(lines) - heard)
        )
    return found


def participation(rounds: Sequence[Mapping[str, Any]], sites: Iterable[str]) -> dict[str, Any]:
    """The report's account of the rounds and of every site.

    Returns:
        `num_rounds`; `took_part` and `did_not_take_part`, names; `refused`, {site: codes}; `attendance`,
        {site: the fields of `Attendance`}.
    """
    found = attendance(rounds, sites)
    return {
        "num_rounds": len(rounds),
        "took_part": [site for site, part in found.items() if part.answered],
        "did_not_take_part": [site for site, part in found.items() if not part.answered],
        "refused": {site: sorted(part.refused) for site, part in found.items() if part.refused},
        "attendance": {site: asdict(part) for site, part in found.items()},
    }


def prior_styles(arrays: Arrays) -> list[str]:
    """The vendors whose style comes from no site: mean and spread in `generator.safetensors` are still the prior's."""
    return sorted(
        vendor
        for name, mean in arrays.items()
        if name.startswith(f"{MEAN_KEY}/")
        and not mean.any()
        and (arrays[f"{STD_KEY}/{(vendor := name.partition('/')[2])}"] == 1).all()
    )


def sentences(part: Mapping[str, Any], styles: Sequence[str] = ()) -> list[str]:
    """Who took part, in words, and for each site what kept it away.

    Args:
        part: What `participation` returned.
        styles: What `prior_styles` returned.
    """
    num_rounds, took_part, away = part["num_rounds"], part["took_part"], part["did_not_take_part"]
    if not num_rounds:
        return ["No round is on record: who took part is not known."]
    num_sites = len(took_part) + len(away)
    lines = [
        f"{len(took_part)} of {num_sites} registered sites took part in {_rounds(num_rounds)}"
        f"{': ' + listed(took_part) if took_part else ''}."
    ]
    for site, facts in part["attendance"].items():
        gone = _what_happened(facts)
        if not facts["answered"]:
            lines.append(f"{site} did not take part: {gone}.")
        elif gone:
            lines.append(f"{site} missed rounds: {gone}.")
    if styles:
        lines.append(f"No site gave the style of {listed(styles)}: it is the public prior's.")
    return lines


def _what_happened(facts: Mapping[str, Any]) -> str:
    """Why a site has not replied in every round; empty where it has."""
    parts = [f"refused {_rounds(num)} ({code})" for code, num in facts["refused"].items()]
    parts += [f"its answer was not usable in {_rounds(num)} ({reason})" for reason, num in facts["dropped"].items()]
    parts += [f"silent in {_rounds(facts['silent'])}"] if facts["silent"] else []
    parts += [f"answered {_rounds(facts['not_counted'])} below the quorum"] if facts["not_counted"] else []
    return ", ".join(parts)


def _rounds(num: int) -> str:
    return f"{num} round{'' if num == 1 else 's'}"
