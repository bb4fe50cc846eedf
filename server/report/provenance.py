"""Whose scans a report is about: simulated, of a public data set, or private; and what of them the report shows."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcmr.server.federation.participation import sentences
from fedcmr.server.formatting import describe_scans, listed
from fedcmr.shared.provenance import MIXED, PUBLIC, SIMULATED

Report = Mapping[str, Any]


@dataclass(frozen=True)
class SiteRow:
    """A registered site in the table of who took part.

    Attributes:
        name: Name of the site.
        scans: Where its scans come from.
        answered: Rounds in which it replied and that counted.
        refused: How often it refused, by reason code, as text; empty where it did not.
        others: Rounds in which it was silent, or its reply was not used, as text; empty where there was none.
    """

    name: str
    scans: str
    answered: int
    refused: str
    others: str


def adjective(entry: Mapping[str, Any]) -> str:
    """What patients of this provenance are called before the noun."""
    return {SIMULATED: "simulated", MIXED: "real and simulated"}.get(entry["kind"], "real")


def test_patients_of(report: Report, shown: Collection[str]) -> str:
    """The caption above images of the test sets that may be shown, pooled by vendor."""
    kinds = {adjective(entry) for name, entry in report["provenance"]["test_sets"].items() if name in shown}
    if kinds == {"simulated"}:
        return "Test patients of the simulated hospital"
    return "Real test patients" if kinds == {"real"} else "Test patients, real and simulated"


def hidden_sets(report: Report, shown: Collection[str]) -> list[str]:
    """The test sets whose images the report leaves out."""
    return [name for name in report["provenance"]["test_sets"] if name not in shown]


def per_patient_sets(report: Report) -> list[str]:
    """The test sets whose patients may each be a mark in a plot: simulated, or of a public data set."""
    sets = report["provenance"]["test_sets"]
    return [name for name, entry in sets.items() if entry["kind"] in (SIMULATED, PUBLIC)]


def simulated_sets(report: Report) -> list[str]:
    """The test sets that are simulated throughout."""
    return [name for name, entry in report["provenance"]["test_sets"].items() if entry["kind"] == SIMULATED]


def took_part(report: Report) -> list[str]:
    """Who took part and who did not, a sentence each."""
    return sentences(report["provenance"], report["provenance"]["styles_of_the_prior"])


def shapes_of_hearts(report: Report) -> str:
    """Whose hearts the synthetic ones resemble, in a sentence."""
    released = report["provenance"].get("populations", [])  # missing in reports of earlier versions
    if not released:
        return "The shapes come from a public model of the heart; no site has released any."
    others = [vendor for vendor in report["synthetic"]["per_vendor"] if vendor not in released]
    cost = "without privacy" if report["privacy"]["epsilon"] is None else "within the privacy that is stated above"
    sentence = (
        f"The hearts of {listed(released)} are drawn so that their shapes have the mean and the spread that the sites "
        f"with these scanners released of their own patients, {cost}; none is the heart of one of them."
    )
    return f"{sentence} Those of {listed(others)} come from the public model alone." if others else sentence


def not_all_took_part(report: Report) -> bool:
    """Whether a site missed a round, or a vendor's style is the prior's: the report then says so at the top."""
    part = report["provenance"]
    missed = any(facts["answered"] < part["num_rounds"] for facts in part["attendance"].values())
    return bool(missed or part["styles_of_the_prior"])


def site_rows(report: Report) -> list[SiteRow]:
    """Every registered site."""
    rows = []
    for name, entry in report["provenance"]["sites"].items():
        facts = report["provenance"]["attendance"][name]
        others = [f"{num} × {reason}" for reason, num in facts["dropped"].items()]
        others += [f"{facts['silent']} × silent"] if facts["silent"] else []
        others += [f"{facts['not_counted']} × below the quorum"] if facts["not_counted"] else []
        refused = ", ".join(f"{num} × {code}" for code, num in facts["refused"].items())
        rows.append(SiteRow(name, describe_scans(entry), facts["answered"], refused, ", ".join(others)))
    return rows


def terms_of(report: Report) -> Sequence[str]:
    """The terms of the public data sets behind the sites, the test sets and the guides, once each."""
    part = report["provenance"]
    entries = [*part["sites"].values(), *part["test_sets"].values()]
    of_guides = (report["synthetic"].get("making") or {}).get("terms", [])
    texts = [text for entry in entries for text in entry["terms"].split("; ") if text]
    return list(dict.fromkeys([*texts, *of_guides]))
