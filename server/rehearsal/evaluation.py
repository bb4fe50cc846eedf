"""Rehearsal of an evaluation at the sites: would each test the model on its own patients, and at what cost?

A site replies as it would in the study, with zeros for sums, after a test on invented patients
(`fedcmr.client.rehearsal`).
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from fedcmr.server.federation.evaluation import OF_FORM, make_request, spent
from fedcmr.server.federation.state import StudySite
from fedcmr.server.federation.strategy import SitesByFlower
from fedcmr.server.rehearsal.outcomes import outcomes
from fedcmr.server.settings import Config
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.records import OK, PRIVATE, arrays_sha256
from fedcmr.shared.tasks.ejection_fraction.sums import SUMS


def rehearse_evaluation(
    connected: SitesByFlower,
    node_ids: Iterable[int],
    run_id: str,
    config: Config,
    sites: Mapping[str, StudySite],
    arrays: Arrays,
) -> dict[str, Any]:
    """Let these sites rehearse the evaluation on their test patients that the run would request.

    Args:
        connected: How the sites are reached.
        node_ids: Flower's ids of the connected nodes.
        run_id: Id of the rehearsal.
        config: Settings of the study.
        sites: Sites of the study by name.
        arrays: A model of the right shapes.

    Returns:
        `sites` ({name: code, seconds, form}), `unnamed` (codes without a site), `elapsed_s` until all had replied,
        and what a private reply would charge: `epsilon` at `delta`.
    """
    request = make_request(run_id, config, sites, arrays_sha256(arrays))
    started = time.monotonic()
    replies = connected.rehearse_evaluation(request, arrays, node_ids)
    elapsed_s = round(time.monotonic() - started, 1)
    shapes = {name: {vendor: (len(SUMS),) for vendor in site.vendors} for name, site in sites.items()}
    found, unnamed = outcomes(replies, shapes, tuple(OF_FORM))
    return {
        "sites": {name: outcome._asdict() for name, outcome in found.items()},
        "unnamed": unnamed,
        "elapsed_s": elapsed_s,
        "epsilon": spent(config, request)[0],
        "delta": request.target_delta,
    }


def reason(facts: Mapping[str, Any]) -> str | None:
    """Why the evaluation would fail: no site would reply. A single site that does not take part is no reason."""
    if any(site["code"] == OK for site in facts["sites"].values()):
        return None
    codes = ", ".join(f"{name}: {site['code']}" for name, site in facts["sites"].items())
    return f"evaluation.federated is true, and no site would evaluate the model on its own test patients ({codes})"


def table(facts: Mapping[str, Any]) -> Table:
    """A table of the sites and their own test patients."""
    shown = Table("site", "own test patients", "code", "time", "would charge them")
    for name, site in facts["sites"].items():
        ok = site["code"] == OK
        charge = f"{facts['epsilon']:.2f} at {facts['delta']:g}" if site["form"] == PRIVATE else "nothing"
        shown.add_row(
            name,
            OF_FORM[site["form"]] if ok else "not evaluated",
            site["code"],
            f"{site['seconds']:g} s" if ok else "not known",
            charge,
        )
    return shown
