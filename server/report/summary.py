"""Summary of a report: the headline, the findings that qualify it, and the key figures."""

from collections.abc import Mapping
from typing import Any

from fedcmr.server.evaluation.disclosure import OTHERS
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.formatting import HUMAN_POINTS, figure, interval, listed, patients, signed
from fedcmr.server.report.provenance import adjective

Report = Mapping[str, Any]


def headline(report: Report) -> str:
    """The study's main result in one sentence."""
    score = _overall(report)
    if score is None and (federated := report.get("federated_evaluation")):
        return _federated_headline(federated)
    if score is None or score["mae_points"] is None:
        if score and score["n_patients"]:
            return (
                "This run has no result: the network's predictions are not finite, for "
                f"{score.get('n_undefined') or 'some'} of {_patients(report)}."
            )
        if any(entry.get("too_few") for entry in report["provenance"]["test_sets"].values()):
            return "This run shows no result: its test patients are too few for a figure that discloses none of them."
        return "This run has no result: no test patient has both a true and a predicted ejection fraction."
    sentence = (
        f"Trained on synthetic hearts alone, the network misses the ejection fraction of {_patients(report)} "
        f"by {score['mae_points']:.1f} points on average"
    )
    guess = _overall(report, "predict_the_mean")
    if guess and guess["mae_points"] is not None and score["mae_points"] >= guess["mae_points"]:
        return f"{sentence}, no better than one guess for everybody."
    return f"{sentence}."


def _federated_headline(federated: Mapping[str, Any]) -> str:
    """The main result of a study whose test patients are all at the sites."""
    score = federated["vendors"].get("all")
    if score is None or score["mae_points"] is None:
        known = [name for name, values in federated["vendors"].items() if values["mae_points"] is not None]
        if known:
            return f"The sites' sums over their own test patients give a mean error for {listed(known)} alone."
        return "This run has no result: the sites' sums over their test patients give no mean error."
    low, high = score["ci95"]["mae_points"]
    return (
        "Trained on synthetic hearts alone, the network misses the ejection fraction of the sites' own test patients "
        f"by {score['mae_points']:.1f} points on average (95 % interval {low:.1f} to {high:.1f})."
    )


def findings(report: Report) -> list[str]:
    """What a reader should know with the headline, each one sentence."""
    score = _overall(report)
    if score is None or score["mae_points"] is None:
        return [_privacy(report)]
    bounds = score["ci95"]["mae_points"]
    sentences = [from_the_sites(report)]
    sentences.append(f"The 95 % interval over patients is {interval(bounds, 1)} points." if bounds else "")
    guess = _overall(report, "predict_the_mean")
    if guess and guess["mae_points"] is not None:
        better = bounds is not None and bounds[1] < guess["mae_points"]
        verdict = "clearly more" if better else "which the network does not clearly beat"
        sentences.append(f"Guessing the mean for everybody would miss by {guess['mae_points']:.1f} points, {verdict}.")
    vendors = {
        name: values["mae_points"]
        for name, values in _main_tables(report).items()
        if name != "all" and values["mae_points"] is not None
    }
    if len(vendors) > 1:
        best, worst = min(vendors, key=lambda name: vendors[name]), max(vendors, key=lambda name: vendors[name])
        sentences.append(f"It does best on {best} ({vendors[best]:.1f}) and worst on {worst} ({vendors[worst]:.1f}).")
    sentences.append(_other_test_sets(report))
    sentences.append(f"Experienced readers differ by {HUMAN_POINTS[0]} to {HUMAN_POINTS[1]} points.")
    sentences.append(_privacy(report))
    return [sentence for sentence in sentences if sentence]


def from_the_sites(report: Report) -> str:
    """What the hospitals bring over the public prior alone, on the main test set; empty where that was not tested."""
    found = ((report.get("prior_differences") or {}).get(_main_test_set(report)) or {}).get("all") or {}
    difference, bounds = found.get("difference_points"), found.get("ci95")
    if difference is None or not bounds:
        return ""
    compared = f"(patient by patient, 95 % interval {signed(bounds[0], 1)} to {signed(bounds[1], 1)})"
    if bounds[0] <= 0 <= bounds[1]:
        return (
            "What the hospitals bring over the public prior alone: nothing that can be seen, "
            f"{signed(difference, 1)} points of error {compared}."
        )
    kind = "less" if difference < 0 else "more"
    return (
        f"What the hospitals bring over the public prior alone: {abs(difference):.1f} points {kind} error {compared}."
    )


def key_figures(report: Report) -> list[tuple[str, str, str]]:
    """The key figures at the top: value, unit or name, explanation."""
    score = _overall(report) or ((report.get("federated_evaluation") or {}).get("vendors") or {}).get("all") or {}
    epsilon = report["privacy"]["epsilon"]
    mae, r2 = score.get("mae_points"), score.get("r2")
    spent = "privacy spent per patient; smaller is stronger"
    return [
        (figure(mae, 1), "" if mae is None else "points", "mean absolute error of the ejection fraction"),
        (figure(r2, 2), "r²", "share of the variance explained; 1 is perfect, 0 a constant guess"),
        ("none", "", "privacy guaranteed: the sites trained without it")
        if epsilon is None
        else (f"{epsilon:.2f}", "epsilon", spent),
        (f"{report['synthetic']['n_cases']}", "cases", "synthetic patients it was trained on"),
    ]


def _main_test_set(report: Report) -> str | None:
    """The test set with the most patients."""
    sets = report["regression"]
    return max(sets, key=lambda name: sets[name]["all"]["n_patients"], default=None)


def _main_tables(report: Report, model: str = MAIN_MODEL) -> Mapping[str, Any]:
    """A model's scores on the main test set."""
    tables = report["regression"] if model == MAIN_MODEL else report["baselines"].get(model, {})
    return tables.get(_main_test_set(report), {})


def _overall(report: Report, model: str = MAIN_MODEL) -> Mapping[str, Any] | None:
    return _main_tables(report, model).get("all")


def _patients(report: Report) -> str:
    """Patients of the main test set: "20 real Siemens patients", "45 simulated patients of the test set hospitals"."""
    tables = _main_tables(report)
    vendors = [name for name in tables if name != "all"]
    kind = adjective(report["provenance"]["test_sets"][_main_test_set(report)])
    vendor = f" {vendors[0]}" if len(vendors) == 1 and vendors[0] not in ("unknown", OTHERS) else ""
    num = tables["all"]["n_patients"]
    where = f" of the test set {_main_test_set(report)}" if len(report["regression"]) > 1 else ""
    return f"{num} {kind}{vendor} patient{'' if num == 1 else 's'}{where}"


def _other_test_sets(report: Report) -> str:
    """The errors on all test sets but the main one."""
    others = {name: tables["all"] for name, tables in report["regression"].items() if name != _main_test_set(report)}
    errors = [
        f"{figure(score['mae_points'], 1)} on {name} ({patients(score['n_patients'])})"
        for name, score in others.items()
    ]
    return f"On other test sets it misses by {listed(errors)}." if errors else ""


def _privacy(report: Report) -> str:
    epsilon = report["privacy"]["epsilon"]
    if epsilon is None:
        return "No privacy was guaranteed to the sites' patients."
    return f"No site's patient spent more than epsilon {epsilon:.2f}."
