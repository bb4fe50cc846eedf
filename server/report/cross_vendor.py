"""The cross-vendor evaluation: what a network that trained on one vendor, on all, or on all but one makes of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedcmr.server.experiments.names import ALL, WITHOUT
from fedcmr.server.formatting import figure, interval, listed, signed
from fedcmr.server.report.heat_map import colour_range, heat_map

KINDS = {"synthetic": "synthetic hearts", "real": "real scans"}
"""What a matrix was trained on."""

Cells = Mapping[str, Mapping[str, Any]]
"""{test vendor or "all": score}."""


@dataclass(frozen=True)
class MatrixRow:
    """Of the table below a heat map.

    Attributes:
        trained_on: In words.
        tested_on: Vendor, or all of them.
        score: Its figures.
        difference: Of the error, patient by patient, to that of the network trained on all vendors; None where unknown.
    """

    trained_on: str
    tested_on: str
    score: Mapping[str, Any]
    difference: Mapping[str, Any] | None


@dataclass(frozen=True)
class MatrixPart:
    """One kind of training data on the page.

    Attributes:
        title: Of the part.
        picture: The heat map.
        rows: Of the table.
    """

    title: str
    picture: str
    rows: list[MatrixRow]


def matrix_parts(report: Mapping[str, Any]) -> list[MatrixPart]:
    """The matrices of `report.json` as heat maps, on one colour scale, and tables; none where none was run."""
    matrices = _matrices(report)
    differences = report.get("matrix_differences") or {}
    errors = [
        score["mae_points"]
        for matrix in matrices.values()
        for cells in matrix.values()
        for score in cells.values()
        if score and score["mae_points"] is not None
    ]
    limits = colour_range(errors)
    return [
        MatrixPart(
            f"Trained on {KINDS[kind]}", _picture(matrix, limits), list(_rows(matrix, differences.get(kind) or {}))
        )
        for kind, matrix in matrices.items()
    ]


def matrix_sentences(report: Mapping[str, Any]) -> list[str]:
    """What the matrices say, in plain words."""
    matrices, differences = _matrices(report), report.get("matrix_differences") or {}
    sentences = []
    for kind, matrix in matrices.items():
        sentences.append(_farthest(kind, matrix))
        sentences.append(_left_out(kind, matrix, differences.get(kind) or {}, named=len(matrices) > 1))
    sentences.append(_against_real(matrices))
    return [sentence for sentence in sentences if sentence]


def trained_on(key: str) -> str:
    """A training set's name for the reader."""
    if key == ALL:
        return "all vendors"
    return f"all but {key.removeprefix(WITHOUT)}" if key.startswith(WITHOUT) else f"{key} alone"


def _matrices(report: Mapping[str, Any]) -> dict[str, Mapping[str, Cells]]:
    """Those that were run, in a fixed order."""
    matrices = report.get("matrix") or {}
    return {kind: matrices[kind] for kind in KINDS if matrices.get(kind)}


def _order(key: str) -> tuple[int, str]:
    """Single vendors, then all but one, then all."""
    return (2 if key == ALL else 1 if key.startswith(WITHOUT) else 0), key


def _tested_on(key: str) -> str:
    return "all vendors" if key == ALL else key


def _test_groups(matrix: Mapping[str, Cells]) -> list[str]:
    return sorted({group for cells in matrix.values() for group in cells}, key=_order)


def _picture(matrix: Mapping[str, Cells], limits: tuple[float, float]) -> str:
    groups = _test_groups(matrix)
    names = {group: f"{group}\nn = {_num_patients(matrix, group)}" for group in groups}
    rows = {
        trained_on(key): {names[group]: matrix[key].get(group) for group in groups}
        for key in sorted(matrix, key=_order)
    }
    return heat_map(rows, {trained_on(group): names[group] for group in groups if group != ALL}, limits)


def _num_patients(matrix: Mapping[str, Cells], group: str) -> int:
    return max((cells[group]["n_patients"] for cells in matrix.values() if cells.get(group)), default=0)


def _rows(matrix: Mapping[str, Cells], differences: Mapping[str, Cells]) -> Iterator[MatrixRow]:
    for key in sorted(matrix, key=_order):
        for group in sorted(matrix[key], key=_order):
            if score := matrix[key][group]:
                yield MatrixRow(trained_on(key), _tested_on(group), score, (differences.get(key) or {}).get(group))


def _error(matrix: Mapping[str, Cells], key: str, group: str) -> float | None:
    score = matrix.get(key, {}).get(group)
    return score["mae_points"] if score else None


def _points(score: Mapping[str, Any]) -> str:
    """An error with its interval."""
    bounds = interval(score["ci95"]["mae_points"], 1)
    return f"{figure(score['mae_points'], 1)} points" + (f" ({bounds})" if bounds else "")


def _farthest(kind: str, matrix: Mapping[str, Cells]) -> str:
    """The vendor that a network trained on another reads worst."""
    vendors = [key for key in matrix if _order(key)[0] == 0]
    pairs = {
        (key, group): error
        for key in vendors
        for group in matrix[key]
        if group not in (ALL, key) and (error := _error(matrix, key, group)) is not None
    }
    if not pairs:
        return ""
    key, group = max(pairs, key=lambda pair: pairs[pair])
    own = ""
    if _error(matrix, group, group) is not None:
        own = f"; trained on those of {group}, by {_points(matrix[group][group])}"
    return (
        f"Trained on {KINDS[kind]} of {key} alone, the network misses {group} patients by "
        f"{_points(matrix[key][group])}, the widest of all pairs{own}."
    )


def _left_out(kind: str, matrix: Mapping[str, Cells], differences: Mapping[str, Cells], named: bool) -> str:
    """What it costs each vendor's patients that their vendor stays away."""
    costs = []
    for key in sorted(matrix):
        vendor = key.removeprefix(WITHOUT)
        if not key.startswith(WITHOUT):
            continue
        paired = (differences.get(key) or {}).get(vendor)
        without, whole = _error(matrix, key, vendor), _error(matrix, ALL, vendor)
        if paired and paired["difference_points"] is not None:
            bounds = paired["ci95"]
            chance = "; may be chance" if bounds and bounds[0] <= 0 <= bounds[1] else ""
            inside = f" ({signed(bounds[0], 1)} to {signed(bounds[1], 1)}{chance})" if bounds else ""
            costs.append(f"{vendor} {signed(paired['difference_points'], 1)}{inside}")
        elif without is not None and whole is not None:
            costs.append(f"{vendor} {signed(without - whole, 1)}")
    if not costs:
        return ""
    what = f"Leaving a vendor out of the {KINDS[kind]}" if named else "Leaving a vendor out"
    return f"{what} changes the error of its own patients, in points: {listed(costs)}."


def _against_real(matrices: Mapping[str, Mapping[str, Cells]]) -> str:
    """All vendors together, synthetic beside real."""
    made, scanned = (_error(matrices.get(kind, {}), ALL, ALL) for kind in ("synthetic", "real"))
    if made is None or scanned is None:
        return ""
    return (
        f"Trained on all vendors' real scans, the same network misses by {_points(matrices['real'][ALL][ALL])}; on "
        f"their synthetic hearts, by {_points(matrices['synthetic'][ALL][ALL])}."
    )
