"""Scores of several groups of patients at once: vendor by vendor, for programs and for the terminal."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fedcmr.server.evaluation.score import FEW_PATIENTS, Score, paired_difference, score


def table(
    true: NDArray[np.floating] | Sequence[float],
    predicted: NDArray[np.floating] | Sequence[float],
    vendors: Sequence[str],
    num_bootstrap: int,
    seed: int,
) -> dict[str, Score]:
    """`score` of each vendor's patients, in alphabetical order, then of "all"."""
    truth, guess = np.asarray(true), np.asarray(predicted)
    groups = vendor_groups(vendors)
    if not len(truth) == guess.shape[-1] == len(vendors):
        raise ValueError(f"Expected equal lengths, got {len(truth)}, {guess.shape[-1]} and {len(vendors)} vendors.")
    return {name: score(truth[chosen], guess[..., chosen], num_bootstrap, seed) for name, chosen in groups.items()}


def paired_table(
    true: NDArray[np.floating] | Sequence[float],
    predicted: NDArray[np.floating] | Sequence[float],
    other: NDArray[np.floating] | Sequence[float],
    vendors: Sequence[str],
    num_bootstrap: int,
    seed: int,
) -> dict[str, Score]:
    """`paired_difference` of each vendor's patients, in alphabetical order, then of "all"."""
    truth, guess, against = np.asarray(true), np.asarray(predicted), np.asarray(other)
    return {
        name: paired_difference(truth[chosen], guess[..., chosen], against[..., chosen], num_bootstrap, seed)
        for name, chosen in vendor_groups(vendors).items()
    }


def vendor_groups(vendors: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Which patients are a vendor's, shape (N,) for each in alphabetical order, then "all" of them."""
    names = np.asarray(vendors)
    return {**{str(name): names == name for name in np.unique(names)}, "all": np.ones(len(names), bool)}


def predict_the_mean(training_efs: Sequence[float], num_patients: int) -> NDArray[np.float64]:
    """The baseline without an image: the mean ejection fraction of the training labels for every patient."""
    return np.full(num_patients, float(np.mean(training_efs)))


def as_text_table(title: str, rows: Mapping[str, Mapping[str, Score]], grouped_by: str = "vendor") -> Table:
    """Scores for the terminal, 95 % intervals in brackets; those of the other figures are in JSON and CSV.

    Groups of fewer than `FEW_PATIENTS` show no r2: among so few it may be any number. The last two columns are the
    share of patients in the right class of ejection fraction and its weighted kappa.

    Args:
        title: Title of the table.
        rows: {model, test set or fact: what `table` returned, or the groups of one fact of `subgroup_tables`}.
        grouped_by: Heading of the column of groups.
    """
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", grouped_by):
        shown.add_column(heading, no_wrap=True)
    for heading in ("n", "MAE, EF points", "r2", "bias", "MSE", "EF class", "kappa"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, scores in rows.items():
        for group, values in scores.items():
            label = name if group == next(iter(scores)) else ""
            mae = _cell(values, "mae_points", 1, interval=True)
            r2 = _cell(values, "r2", 2, interval=True) if values["n_patients"] >= FEW_PATIENTS else "-"
            bias, mse = _cell(values, "bias_points", 1), _cell(values, "mse", 4)
            right, kappa = _cell(values, "category_agreement", 2), _cell(values, "category_kappa", 2)
            shown.add_row(label, group, _num_patients(values), mae, r2, bias, mse, right, kappa)
        shown.add_row()
    return shown


def _num_patients(values: Score) -> str:
    """Number of patients, and for how many of them the prediction is not finite."""
    undefined = values.get("n_undefined", 0)
    return f"{values['n_patients']}" + (f", {undefined} undefined" if undefined else "")


def _cell(values: Score, metric: str, digits: int, interval: bool = False) -> str:
    """A figure, with its interval on request; a dash where it is undefined or the report older than the metric."""
    value = values.get(metric)
    if value is None:
        return "-"
    limits = values["ci95"][metric] if interval else None
    shown = f" [{limits[0]:.{digits}f}, {limits[1]:.{digits}f}]" if limits else ""
    return f"{value:.{digits}f}{shown}"
