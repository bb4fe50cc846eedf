"""`report.csv`, a tidy CSV: every figure of the report's tables in a row of its own, for spreadsheets and programs.

The values are those of `report.json`, digit for digit; an empty cell is null there: undefined, or without an interval.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fedcmr.server.evaluation.export import figures_of
from fedcmr.server.experiments.names import FEDERATED_SEGMENTER, MAIN_MODEL

Number = int | float | None


class TidyRow(NamedTuple):
    """A figure.

    Attributes:
        section: Part of the report.
        model: Which model, or what it was trained on; for an audit, the build or the attack.
        test_set: Name of the test set.
        group: Vendor or "all"; site, stage or round where the figure is of one.
        metric: Name of the figure, as in `report.json`.
        value: The figure.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    section: str
    model: str
    test_set: str
    group: str
    metric: str
    value: Number
    low: Number = None
    high: Number = None


def as_csv(report: Mapping[str, Any]) -> str:
    """The table with a line of headings, RFC 4180."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(TidyRow._fields)
    writer.writerows(tidy_rows(report))
    return buffer.getvalue()


def tidy_rows(report: Mapping[str, Any]) -> Iterator[TidyRow]:
    """Every figure of `report.json` that the HTML report has in a table, in its order."""
    for model, test_sets in {MAIN_MODEL: report["regression"], **report["baselines"]}.items():
        for test_set, tables in test_sets.items():
            for group, score in tables.items():
                yield from _figures(("results", model, test_set, group), score)
    for test_set, tables in (report.get("prior_differences") or {}).items():
        for group, score in tables.items():
            yield from _difference(("results minus public prior only", MAIN_MODEL, test_set, group), score)
    for group, score in ((report.get("federated_evaluation") or {}).get("vendors") or {}).items():
        yield from _figures(("results at the sites", MAIN_MODEL, "", group), score)
    combined = report.get("combined_ef") or {}
    for test_set, ways in (combined.get("test_sets") or {}).items():
        for way, tables in ways.items():
            for group, score in tables.items():
                yield from _figures(("ejection fraction by stack", way, test_set, group), score)
        for way, tables in combined["differences"][test_set].items():
            for group, score in tables.items():
                yield from _difference(("ejection fraction by stack minus resnet50", way, test_set, group), score)
    for test_set, tables in (report.get("segmentation") or {}).items():
        for group, score in tables.items():
            yield from _figures(("segmentation", MAIN_MODEL, test_set, group), score)
    for task, parts in (report.get("tasks") or {}).items():
        for model, test_sets in parts["baselines"].items():
            for test_set, tables in test_sets.items():
                for group, score in tables.items():
                    yield from _figures((task, model, test_set, group), score)
        for test_set, tables in (parts.get("differences") or {}).items():
            for group, score in tables.items():
                yield from _difference((f"{task} minus public segmenter", FEDERATED_SEGMENTER, test_set, group), score)
        yield from _cross_vendor(parts, f"{task} ")
    yield from _cross_vendor(report)
    for test_set, facts in (report.get("subgroups") or {}).items():
        for fact, groups in facts.items():
            for group, score in groups.items():
                yield from _figures((f"by {fact}", MAIN_MODEL, test_set, group), score)
    for test_set, figures in (report.get("uncertainty") or {}).items():
        place = ("uncertainty", MAIN_MODEL, test_set, "all")
        yield from _figures(place, figures)
        for row in figures["coverage"]:
            yield TidyRow(*place, f"coverage_{row['nominal']:g}", row["observed"], *(row.get("ci95") or (None, None)))
    for name, groups in (report.get("saliency") or {}).items():
        for group, score in groups.items():
            values = {**score, "ci95": {"share_in_heart": score["ci95"]}}
            yield from _figures(("saliency", MAIN_MODEL, name, group), values)
    yield from _figures(("privacy", "", "", "all"), report["privacy"])
    for site, figures in report["privacy"]["sites"].items():
        yield from _figures(("privacy", "", "", site), figures)
    yield from _participation(report["provenance"])
    yield from _audit(report.get("audit") or {})
    yield from _synthetic(report["synthetic"])
    yield from _fidelity(report.get("fidelity") or {"groups": {}})
    yield from _timing(report["timing"])


def _figures(place: tuple[str, str, str, str], values: Mapping[str, Any]) -> Iterator[TidyRow]:
    """The figures of a mapping, with their intervals."""
    for figure in figures_of(values):
        yield TidyRow(*place, *figure)


def _difference(place: tuple[str, str, str, str], score: Mapping[str, Any]) -> Iterator[TidyRow]:
    """The figures of a paired difference, whose interval is that of the difference."""
    return _figures(place, {**score, "ci95": {"difference_points": score["ci95"]}})


def _cross_vendor(report: Mapping[str, Any], prefix: str = "") -> Iterator[TidyRow]:
    for kind, table in (report.get("matrix") or {}).items():
        for trained_on, groups in (table or {}).items():
            for group, score in groups.items():
                yield from _figures((f"{prefix}matrix {kind}", trained_on, "", group), score or {})
    for kind, table in (report.get("matrix_differences") or {}).items():
        for trained_on, groups in (table or {}).items():
            for group, score in groups.items():
                if score:
                    yield from _difference((f"{prefix}matrix {kind} minus all", trained_on, "", group), score)


def _participation(part: Mapping[str, Any]) -> Iterator[TidyRow]:
    yield TidyRow("participation", "", "", "all", "num_rounds", part["num_rounds"])
    for site, facts in part["attendance"].items():
        place = ("participation", "", "", site)
        yield from _figures(place, facts)
        for kind in ("refused", "dropped"):
            yield from _figures(place, {f"{kind} {code}": num for code, num in facts[kind].items()})


def _audit(audit: Mapping[str, Any]) -> Iterator[TidyRow]:
    for row in audit.get("canaries", ()):
        build = "control" if row.get("control") else row["build"]
        yield from _figures(("audit canaries", build, "", ""), row)
    for name, row in audit.get("membership", {}).items():
        yield from _figures(("audit membership", name, "", ""), row)
    yield from _figures(("audit copies", "", "", ""), audit.get("copies", {}))


def _synthetic(synthetic: Mapping[str, Any]) -> Iterator[TidyRow]:
    yield TidyRow("synthetic", "", "", "all", "n_cases", synthetic["n_cases"])
    for vendor, num in synthetic["per_vendor"].items():
        yield TidyRow("synthetic", "", "", vendor, "n_cases", num)
    yield from _figures(("measured against requested", "", "", "all"), synthetic.get("agreement") or {})


def _fidelity(block: Mapping[str, Any]) -> Iterator[TidyRow]:
    yield from _figures(("fidelity", "", "", "all"), block)
    for vendor, group in block["groups"].items():
        yield from _figures(("fidelity", "", "", vendor), group)
        for name, row in group["comparisons"].items():
            yield from _figures(("fidelity", name, "", vendor), row)
        for role, row in group["anatomy"].items():
            yield from _figures(("anatomy", role, "", vendor), row)


def _timing(timing: Mapping[str, Any]) -> Iterator[TidyRow]:
    for stage, elapsed_s in timing["seconds_per_stage"].items():
        yield TidyRow("time", "", "", stage, "seconds", elapsed_s)
    for number, elapsed_s in enumerate(timing["seconds_per_round"], start=1):
        yield TidyRow("time", "", "", f"round {number}", "seconds", elapsed_s)
    for direction, num_bytes in timing["bytes_per_site_and_round"].items():
        yield TidyRow("traffic", "", "", direction, "bytes_per_site_and_round", num_bytes)
