"""Federated evaluation: the trained model goes to the sites, and sums over their own test patients come back.

Each site's policy says in which form: with noise, charged to its ledger of test patients, or as a plain table. The
figures of all sites together are computed again whenever a report is written, which costs no privacy.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fedcmr.server.evaluation.from_sums import figures
from fedcmr.server.federation.noise_plan import least_noise
from fedcmr.server.federation.senders import Reply, read_nodes
from fedcmr.server.federation.state import StudySite, read_study
from fedcmr.server.federation.strategy import Grid, SitesByFlower
from fedcmr.server.run_folder import REGRESSOR_NAME, RunFolder
from fedcmr.server.settings import Config
from fedcmr.shared import checkpoint
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.privacy_filter import filter_of
from fedcmr.shared.records import (
    ARRAYS,
    CODES,
    EJECTION_FRACTION,
    MAX_TTA,
    OK,
    PLAIN,
    PRIVATE,
    REPLY,
    EvaluationRequest,
    arrays_sha256,
    decode,
)
from fedcmr.shared.site_facts import facts_line
from fedcmr.shared.tasks.ejection_fraction.network import load_regressor, to_arrays
from fedcmr.shared.tasks.ejection_fraction.sums import MIN_GROUP, SUMS, from_private

STAGE = "federated_evaluation"
FILE_NAME = "federated_evaluation.json"
"""File of a run folder with the request and each site's reply as it came."""
NO_ANSWER = "no-answer"
OF_FORM = {PRIVATE: "sums with noise", PLAIN: "plain table, not private"}


def evaluate_at_sites(grid: Grid, run: RunFolder) -> None:
    """Send the main model to every connected site and keep the replies in `federated_evaluation.json`.

    A site that gets the request again after an interruption sends the same bytes again and is not charged again.
    """
    config, sites = run.config, read_study(run)
    arrays = to_arrays(load_regressor(run.path / REGRESSOR_NAME))
    _, metadata = checkpoint.load(run.path / "generator.safetensors")
    request = make_request(metadata["run_id"], config, sites, arrays_sha256(arrays))
    connected = SitesByFlower(grid, config.federation, len(sites), read_nodes(run))
    answers = check_answers(connected.evaluate(request, arrays), sites)
    epsilon, accountant = spent(config, request)
    kept = {
        "task": request.task,
        "model_sha256": request.model_sha256,
        "noise_multiplier": request.noise_multiplier,
        "delta": request.target_delta,
        "epsilon": epsilon,
        "accountant": accountant,
        "sites": answers,
    }
    write_atomically(run.path / FILE_NAME, (json.dumps(kept, indent=1, allow_nan=False) + "\n").encode())
    run.log("federated evaluation: " + ", ".join(f"{name}: {_outcome(answer)}" for name, answer in answers.items()))


def make_request(run_id: str, config: Config, sites: Mapping[str, StudySite], model_sha256: str) -> EvaluationRequest:
    """The request to every site, with the least noise that stays within the target epsilon."""
    target = _target_epsilon(config)
    return EvaluationRequest(
        task=EJECTION_FRACTION,
        run_id=run_id,
        model_sha256=model_sha256,
        noise_multiplier=least_noise(target, config.privacy.target_delta, config.privacy.sample_rate),
        target_delta=float(config.privacy.target_delta),
        num_tta=min(config.regression.num_tta, MAX_TTA),
        sites="\n".join(facts_line(name, s.vendors, s.nominal_patients) for name, s in sorted(sites.items())),
    )


def spent(config: Config, request: EvaluationRequest) -> tuple[float, str]:
    """Epsilon of a private reply at a site without earlier requests, and the name of the accountant."""
    target, delta = _target_epsilon(config), request.target_delta
    return filter_of(config.privacy.sample_rate, target, delta).of([request.mechanism.release], delta)


def _target_epsilon(config: Config) -> float:
    return config.evaluation.federated_epsilon or config.privacy.target_epsilon


def check_answers(replies: Iterable[Reply], sites: Mapping[str, StudySite]) -> dict[str, dict[str, Any]]:
    """Every site of the study with its reply: its `code` and, where that is ok, `form` and `sums` by vendor.

    A malformed reply counts as `dropped`, and so do all replies of a site that sent several. Where a reply has no
    content to check, its code says why: see `Reply`.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for reply in replies:
        if reply.content is None:
            name, answer = reply.site or "", {"code": reply.code}
        else:
            name, answer = _check_answer(reply.content, sites, reply.site)
        found.setdefault(name, []).append(answer)
    return {
        name: {"code": NO_ANSWER}
        if name not in found
        else found[name][0]
        if len(found[name]) == 1
        else {"code": "dropped"}
        for name in sites
    }


def _check_answer(
    content: Mapping[str, Any], sites: Mapping[str, StudySite], sender: str | None
) -> tuple[str, dict[str, Any]]:
    """The site of a reply, "" where it is not in the study, and the checked content."""
    reply = content.get(REPLY)
    if not isinstance(reply, Mapping):
        return sender or "", {"code": "dropped"}
    site = sender or reply.get("site")
    if not isinstance(site, str) or site not in sites:
        return "", {}
    code, form = reply.get("code"), reply.get("form")
    if code != OK:
        refused = isinstance(code, str) and code in CODES and set(reply) == {"site", "code"} and set(content) == {REPLY}
        return site, {"code": code if refused else "dropped"}
    try:
        if form not in OF_FORM or set(reply) != {"site", "code", "form"}:
            raise ValueError("keys")
        arrays = decode(content[ARRAYS], {vendor: (len(SUMS),) for vendor in sites[site].vendors})
    except (KeyError, TypeError, ValueError):
        return site, {"code": "dropped"}
    sums = {vendor: [float(value) for value in row] for vendor, row in arrays.items()}
    if form == PLAIN and not all(row[0] == 0 or row[0] >= MIN_GROUP for row in sums.values()):
        return site, {"code": "dropped"}
    return site, {"code": OK, "form": form, "sums": sums}


def federated_results(run: RunFolder) -> dict[str, Any] | None:
    """`federated_evaluation` of `report.json`; None where no request was sent.

    Returns:
        The request (`task`, `model_sha256`), `sites` ({name: {code, form}}), `privacy` of the private replies (epsilon,
        delta, accountant, unit; None where there are none), and `vendors` ({vendor or "all": `figures` and `sites`, the
        names of the sites whose patients they include}). A site that shows no group of patients is in none of them.
    """
    path = run.path / FILE_NAME
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    groups: dict[str, list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]] = {}
    for site, answer in kept["sites"].items():
        for vendor, sums, noise in _plain_sums(answer, kept["noise_multiplier"]):
            for group in (vendor, "all"):
                groups.setdefault(group, []).append((site, sums, noise))
    vendors = sorted(set(groups) - {"all"}) + ["all"] * ("all" in groups)
    private = any(answer.get("form") == PRIVATE for answer in kept["sites"].values())
    return {
        "task": kept["task"],
        "model_sha256": kept["model_sha256"],
        "sites": {site: {"code": answer["code"], "form": answer.get("form")} for site, answer in kept["sites"].items()},
        "privacy": {
            "unit": "one test patient at one site, added or removed",
            "epsilon": kept["epsilon"],
            "delta": kept["delta"],
            "accountant": kept["accountant"],
        }
        if private
        else None,
        "vendors": {
            group: {
                **figures(
                    np.sum([sums for _, sums, _ in groups[group]], axis=0),
                    np.sum([noise for *_, noise in groups[group]], axis=0),
                ),
                "sites": sorted({site for site, *_ in groups[group]}),
            }
            for group in vendors
        },
    }


def _plain_sums(
    answer: Mapping[str, Any], noise_multiplier: float
) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """A site's vendors with their sums and the covariance of the noise in them, without the groups that it left out."""
    rows = {vendor: np.array(row) for vendor, row in (answer.get("sums") or {}).items()}
    if answer.get("form") == PRIVATE:
        sums, noise = from_private(rows, noise_multiplier)
        return [(vendor, row, noise) for vendor, row in sums.items()]
    return [(vendor, row, np.zeros((len(SUMS), len(SUMS)))) for vendor, row in rows.items() if row[0] > 0]


def federated_table(results: Mapping[str, Any]) -> Table:
    """The figures for the terminal, 95 % intervals in brackets, and below them who replied and in which form."""
    table = Table(
        title="ejection fraction of the sites' own test patients, at the sites",
        title_justify="left",
        caption="; ".join(f"{site}: {_outcome(answer)}" for site, answer in results["sites"].items()),
        caption_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in ("vendor", "n", "MAE, EF points", "bias", "MSE", "r2"):
        table.add_column(heading, justify="left" if heading == "vendor" else "right", no_wrap=True)
    digits = {"mae_points": 1, "bias_points": 1, "mse": 4, "r2": 2}
    for vendor, scores in results["vendors"].items():
        num = "unknown" if scores["n_patients"] is None else f"{scores['n_patients']}"
        table.add_row(vendor, num, *(_cell(scores, name, places) for name, places in digits.items()))
    return table


def _cell(scores: Mapping[str, Any], name: str, digits: int) -> str:
    if scores[name] is None:
        return "unknown"
    low, high = scores["ci95"][name]
    return f"{scores[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _outcome(answer: Mapping[str, Any]) -> str:
    """A site's reply, in words."""
    return OF_FORM[answer["form"]] if answer["code"] == OK else str(answer["code"])
