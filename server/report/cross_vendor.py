"""The cross-vendor evaluation: what a network that trained on one vendor, on all, or on all but one makes of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedcmr.server.experiments.names import ALL, WITHOUT
from fedcmr.server.formatting import figure, interval, listed, signed
from fedcmr.server.report.heat_map import colour_range, heat_map

KINDS = {"synthetic": "synthetic hearts", "real": "real scans"}
"""What the networks of an evaluation were trained on."""

Cells = Mapping[str, Mapping[str, Any]]
"""{test vendor or "all": score}."""


@dataclass(frozen=True)
class CrossVendorRow:
    """A row of the table below a heat map.

    Attributes:
        trained_on: The training set's name for the reader.
        tested_on: The vendor, or all of them.
        score: Its figures.
        difference: Difference of the error, patient by patient, to that of the network trained on all vendors; None
            where unknown.
    """

    trained_on: str
    tested_on: str
    score: Mapping[str, Any]
    difference: Mapping[str, Any] | None


@dataclass(frozen=True)
class CrossVendorPart:
    """One kind of training data in the report.

    Attributes:
        title: Title of the part.
        image: The heat map.
        rows: Rows of the table.
    """

    title: str
    image: str
    rows: list[CrossVendorRow]


def cross_vendor_parts(report: Mapping[str, Any]) -> list[CrossVendorPart]:
    """The evaluations of `report.json` as heat maps, on one colour scale, and tables; none where none was run."""
    evaluations = _evaluations(report)
    differences = report.get("matrix_differences") or {}
    errors = [
        score["mae_points"]
        for table in evaluations.values()
        for cells in table.values()
        for score in cells.values()
        if score and score["mae_points"] is not None
    ]
    limits = colour_range(errors)
    return [
        CrossVendorPart(
            f"Trained on {KINDS[kind]}", _image(table, limits), list(_rows(table, differences.get(kind) or {}))
        )
        for kind, table in evaluations.items()
    ]


def cross_vendor_sentences(report: Mapping[str, Any]) -> list[str]:
    """The main findings of the evaluations, a sentence each."""
    evaluations, differences = _evaluations(report), report.get("matrix_differences") or {}
    sentences = []
    for kind, table in evaluations.items():
        sentences.append(_farthest(kind, table))
        sentences.append(_left_out(kind, table, differences.get(kind) or {}, named=len(evaluations) > 1))
    sentences.append(_against_real(evaluations))
    return [sentence for sentence in sentences if sentence]


def trained_on(key: str) -> str:
    """A training set's name for the reader."""
    if key == ALL:
        return "all vendors"
    return f"all but {key.removeprefix(WITHOUT)}" if key.startswith(WITHOUT) else f"{key} alone"


def _evaluations(report: Mapping[str, Any]) -> dict[str, Mapping[str, Cells]]:
    """Those that were run, in a fixed order."""
    evaluations = report.get("matrix") or {}
    return {kind: evaluations[kind] for kind in KINDS if evaluations.get(kind)}


def _order(key: str) -> tuple[int, str]:
    """Single vendors, then all but one, then all."""
    return (2 if key == ALL else 1 if key.startswith(WITHOUT) else 0), key


def _tested_on(key: str) -> str:
    return "all vendors" if key == ALL else key


def _test_groups(table: Mapping[str, Cells]) -> list[str]:
    return sorted({group for cells in table.values() for group in cells}, key=_order)


def _image(table: Mapping[str, Cells], limits: tuple[float, float]) -> str:
    groups = _test_groups(table)
    names = {group: f"{group}\nn = {_num_patients(table, group)}" for group in groups}
    rows = {
        trained_on(key): {names[group]: table[key].get(group) for group in groups} for key in sorted(table, key=_order)
    }
    return heat_map(rows, {trained_on(group): names[group] for group in groups if group != ALL}, limits)


def _num_patients(table: Mapping[str, Cells], group: str) -> int:
    return max((cells[group]["n_patients"] for cells in table.values() if cells.get(group)), default=0)


def _rows(table: Mapping[str, Cells], differences: Mapping[str, Cells]) -> Iterator[CrossVendorRow]:
    for key in sorted(table, key=_order):
        for group in sorted(table[key], key=_order):
            if score := table[key][group]:
                yield CrossVendorRow(trained_on(key), _tested_on(group), score, (differences.get(key) or {}).get(group))


def _error(table: Mapping[str, Cells], key: str, group: str) -> float | None:
    score = table.get(key, {}).get(group)
    return score["mae_points"] if score else None


def _points(score: Mapping[str, Any]) -> str:
    """An error with its interval."""
    bounds = interval(score["ci95"]["mae_points"], 1)
    return f"{figure(score['mae_points'], 1)} points" + (f" ({bounds})" if bounds else "")


def _farthest(kind: str, table: Mapping[str, Cells]) -> str:
    """The vendor on which a network trained on another does worst."""
    vendors = [key for key in table if _order(key)[0] == 0]
    pairs = {
        (key, group): error
        for key in vendors
        for group in table[key]
        if group not in (ALL, key) and (error := _error(table, key, group)) is not None
    }
    if not pairs:
        return ""
    key, group = max(pairs, key=lambda pair: pairs[pair])
    own = ""
    if _error(table, group, group) is not None:
        own = f"; trained on those of {group}, by {_points(table[group][group])}"
    return (
        f"Trained on {KINDS[kind]} of {key} alone, the network misses {group} patients by "
        f"{_points(table[key][group])}, the widest of all pairs{own}."
    )


def _left_out(kind: str, table: Mapping[str, Cells], differences: Mapping[str, Cells], named: bool) -> str:
    """What it costs each vendor's patients that their vendor stays away."""
    costs = []
    for key in sorted(table):
        vendor = key.removeprefix(WITHOUT)
        if not key.startswith(WITHOUT):
            continue
        paired = (differences.get(key) or {}).get(vendor)
        without, whole = _error(table, key, vendor), _error(table, ALL, vendor)
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


def _against_real(evaluations: Mapping[str, Mapping[str, Cells]]) -> str:
    """All vendors together, synthetic compared with real."""
    made, scanned = (_error(evaluations.get(kind, {}), ALL, ALL) for kind in ("synthetic", "real"))
    if made is None or scanned is None:
        return ""
    return (
        f"Trained on all vendors' real scans, the same network misses by {_points(evaluations['real'][ALL][ALL])}; on "
        f"their synthetic hearts, by {_points(evaluations['synthetic'][ALL][ALL])}."
    )
