"""The outcome of a federation, from its files: privacy spent, releases, who took part and with whose scans."""

from collections.abc import Iterable
from typing import Any

from fedcmr.server.federation.participation import participation, prior_styles
from fedcmr.server.federation.state import read_study
from fedcmr.server.run_folder import RunFolder
from fedcmr.shared import checkpoint
from fedcmr.shared.provenance import Provenance
from fedcmr.shared.records import SEGMENTER, SHAPE_MEAN


def privacy_spent(run: RunFolder) -> dict[str, Any]:
    """The report's `privacy`, from the requests to every site; epsilon is None where privacy was off.

    `segmenter_rounds` is there only where such rounds were requested: they are part of the same epsilon.
    """
    _, metadata = checkpoint.load(run.path / "generator.safetensors")
    sites = {
        name: {
            "epsilon": site["epsilon"],
            "epsilon_at_1e-5": site.get("epsilon_at_1e-5"),
            "steps": site["steps"],
            "refused": len(site["refused"]),
        }
        for name, site in metadata["sites"].items()
    }
    spent = [site["epsilon"] for site in sites.values() if site["epsilon"] is not None]
    smaller = [site["epsilon_at_1e-5"] for site in sites.values() if site["epsilon_at_1e-5"] is not None]
    tuning = {
        entry["round"]
        for site in metadata["sites"].values()
        for entry in site.get("releases") or ()  # not in files of earlier versions
        if entry["task"] == SEGMENTER and entry["charged"]
    }
    accountants = sorted({site["accountant"] for site in metadata["sites"].values() if site["accountant"]})
    return {
        "unit": "one patient at one site, added or removed",
        "accountant": ", ".join(accountants) or None,
        "delta": metadata["delta"],
        "epsilon": max(spent, default=None),
        "epsilon_at_1e-5": max(smaller, default=None),
        "sites": sites,
        **({"segmenter_rounds": len(tuning)} if tuning else {}),
    }


def releases(run: RunFolder) -> dict[str, Any]:
    """The releases that 'fedcmr-client budget SITE --compare report.json' compares with a site's ledger."""
    _, metadata = checkpoint.load(run.path / "generator.safetensors")
    releases = {name: site["releases"] for name, site in metadata["sites"].items()}
    return {"run_id": metadata["run_id"], "releases": releases if metadata["private"] else None}


def origin(run: RunFolder) -> tuple[list[Provenance], list[str], list[str]]:
    """For the datasheet: the provenance of the participating sites' scans, and the vendors without a site's style.

    Behind them the vendors whose sites released the shapes of their hearts.

    Where no round is on record, every site counts as participating.
    """
    sites = read_study(run)
    part = participants(run, sites)
    names = part["took_part"] if part["num_rounds"] else list(sites)
    return [sites[name].provenance for name in names], part["styles_of_the_prior"], part["populations"]


def participants(run: RunFolder, sites: Iterable[str]) -> dict[str, Any]:
    """`participation`, `styles_of_the_prior` and `populations`: vendors whose hearts are drawn as sites released them.

    The generator's own record takes precedence over the run's log.
    """
    arrays, metadata = checkpoint.load(run.path / "generator.safetensors")
    rounds = metadata.get("rounds") or run.rounds()
    populations = sorted(name.partition("/")[2] for name in arrays if name.startswith(f"{SHAPE_MEAN}/"))
    return {
        **participation(rounds, sites),
        "styles_of_the_prior": prior_styles(arrays),
        "populations": populations,
    }
