"""Scores by field strength, pathology and sex, in the report and as a tidy CSV."""

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fedcmr.server.evaluation.export import COLUMNS, as_csv
from fedcmr.server.evaluation.score import METRICS, score
from fedcmr.server.evaluation.subgroups import subgroup_tables
from fedcmr.server.evaluation.tables import as_text_table, table
from fedcmr.shared.case import Case, CaseInfo

FACTS = [  # field strength, pathology, sex
    (3.0, "DCM", "F"),
    (1.5, "NOR", "M"),
    (3.0, "DCM", "F"),
    (math.nan, "", "M"),
    (1.5, "xHCM", ""),
    (0.55, "DCM", "M"),
] * 5
TRUE = [0.2, 0.6, 0.3, 0.45, 0.7, 0.35] * 5
PREDICTED = [0.25, 0.55, 0.45, 0.5, 0.6, 0.3] * 5


def cases_of(facts) -> list[Case]:
    """Patients of whom nothing but the row matters."""
    frames = np.zeros((2, 1, 4, 4), np.float32)
    rows = [
        CaseInfo(f"p{i}", "GE", tesla, TRUE[i], f"p{i}", sex, pathology)
        for i, (tesla, pathology, sex) in enumerate(facts)
    ]
    return [Case(row, frames, frames.astype(np.uint8), np.ones(3, np.float32)) for row in rows]


def test_groups_have_the_score_of_their_own_patients_and_read_in_order():
    tables = subgroup_tables(cases_of(FACTS), TRUE, PREDICTED, 100, seed=0)
    assert {fact: list(groups) for fact, groups in tables.items()} == {
        "field strength": ["0.55 T", "1.5 T", "3 T", "unknown"],
        "pathology": ["DCM", "NOR", "xHCM", "unknown"],
        "sex": ["F", "M", "unknown"],
    }
    assert tables["pathology"]["DCM"] == score([0.2, 0.3, 0.35] * 5, [0.25, 0.45, 0.3] * 5, 100, seed=0)
    assert tables["field strength"]["3 T"] == score([0.2, 0.3] * 5, [0.25, 0.45] * 5, 100, seed=0)
    for groups in tables.values():
        assert sum(values["n_patients"] for values in groups.values()) == len(TRUE)
    json.dumps(tables, allow_nan=False)


def test_a_group_of_fewer_than_five_is_joined_with_others():
    facts = [(1.5, "DCM", "F")] * 8 + [(3.0, "HCM", "M")] * 6 + [(3.0, "NOR", "M")] * 4
    values = [0.02 * i for i in range(18)]
    tables = subgroup_tables(cases_of(facts[:18]), values, values, 100, seed=0)
    assert {group: score["n_patients"] for group, score in tables["pathology"].items()} == {"DCM": 8, "others": 10}
    assert list(tables["sex"]) == ["F", "M"]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ([(math.nan, "", "")] * 6, []),
        ([(math.nan, "", "")] * 5 + [(math.nan, "", "F")] * 5, ["sex"]),
        ([(math.nan, "", "")] * 5 + [(math.nan, "", "F")], []),
        ([(1.5, "", "")] * 6, ["field strength"]),
        ([], []),
    ],
)
def test_what_is_known_of_nobody_is_left_out(facts, expected):
    tables = subgroup_tables(cases_of(facts), TRUE[: len(facts)], PREDICTED[: len(facts)], 100, seed=0)
    assert list(tables) == expected


def test_other_lengths_are_an_error():
    with pytest.raises(ValueError, match="got 30 cases, 30 and 5"):
        subgroup_tables(cases_of(FACTS), TRUE, PREDICTED[:5], 100, seed=0)


def test_predictions_of_several_seeds_are_shared_out_alike():
    stacked = np.array([PREDICTED, TRUE])
    tables = subgroup_tables(cases_of(FACTS), TRUE, stacked, 100, seed=0)
    assert tables["sex"]["F"] == score(
        [0.2, 0.3] * 5, stacked[:, 0::2][:, [i for i in range(15) if i % 3 < 2]], 100, seed=0
    )


def test_an_answer_that_is_no_number_marks_its_groups_alone():
    predicted = [math.nan, *PREDICTED[1:]]
    tables = subgroup_tables(cases_of(FACTS), TRUE, predicted, 100, seed=0)
    for fact, group in (("sex", "F"), ("pathology", "DCM"), ("field strength", "3 T")):
        gap = tables[fact][group]
        assert gap["n_undefined"] == 1 and gap["n_patients"] >= 2
        assert {gap[name] for name in METRICS} == {None}
    assert tables["sex"]["M"]["n_undefined"] == 0 and tables["sex"]["M"]["mae_points"] is not None
    printed = as_text_table("", {"sex": tables["sex"]}, "group")
    assert list(printed.columns[2].cells) == ["10, 1 undefined", "15", "5", ""]


def test_the_terminals_table_reads_reports_that_are_older_than_the_classes():
    scores = table(TRUE, PREDICTED, ["GE"] * 30, 100, seed=0)
    for values in scores.values():
        del values["n_undefined"], values["category_agreement"], values["category_kappa"]
    cells = [next(iter(column.cells)) for column in as_text_table("", {"model": scores}).columns]
    assert cells[2] == "30" and cells[-2:] == ["-", "-"]


def test_the_flat_table_holds_every_figure_of_the_report():
    cases, vendors = cases_of(FACTS), ["GE", "GE", "Siemens", "GE", "Siemens", "Canon"] * 5
    report = {
        "regression": {"a": table(TRUE, PREDICTED, vendors, 100, seed=0)},
        "baselines": {"predict_the_mean": {"a": table(TRUE, [0.4] * 30, vendors, 100, seed=0)}},
        "subgroups": {"a": subgroup_tables(cases, TRUE, PREDICTED, 100, seed=0)},
    }
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert tuple(rows[0]) == COLUMNS
    groups = 2 * 4 + 4 + 4 + 3
    assert len(rows) == groups * (2 + len(METRICS))
    keyed = {tuple(row[name] for name in COLUMNS[:5]): row for row in rows}
    assert len(keyed) == len(rows)

    def assert_row(key, value, interval):
        row = keyed[key]
        assert row["value"] == ("" if value is None else repr(value))
        assert [row["low"], row["high"]] == (["", ""] if interval is None else list(map(repr, interval)))

    models = {"model": report["regression"], **report["baselines"]}
    for model, scores in ((model, sets["a"]) for model, sets in models.items()):
        for group, values in scores.items():
            kind = "all" if group == "all" else "vendor"
            for name in METRICS:
                assert_row((model, "a", kind, group, name), values[name], values["ci95"][name])
    for fact, of_fact in report["subgroups"]["a"].items():
        for group, values in of_fact.items():
            assert_row(("model", "a", fact, group, "n_patients"), values["n_patients"], None)
            assert_row(("model", "a", fact, group, "r2"), values["r2"], values["ci95"]["r2"])


def test_rows_of_another_vendor_or_sex_do_not_change_a_groups_score():
    cases = cases_of(FACTS)
    other = [replace(case, info=replace(case.info, vendor="Canon")) for case in cases]
    first, second = (subgroup_tables(each, TRUE, PREDICTED, 100, seed=0) for each in (cases, other))
    assert first == second
