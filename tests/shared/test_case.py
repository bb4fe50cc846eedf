"""The index of a folder of cases: what is written is read back, folders of earlier versions too, damage is one line."""

import math

import pytest

from fedcmr.shared.case import CaseInfo, read_index, write_index
from fedcmr.shared.errors import UserError

KNOWN = CaseInfo("p1", "GE", 1.5, 0.55, "g1", "F", "DCM")
UNKNOWN = CaseInfo("p2", "unknown", math.nan, math.nan, "g2")


def test_sex_and_pathology_are_read_back_and_empty_where_unknown(tmp_path):
    write_index(tmp_path, [KNOWN, UNKNOWN])
    known, unknown = read_index(tmp_path)
    assert known == KNOWN
    assert (unknown.sex, unknown.pathology) == ("", "")
    assert (tmp_path / "cases.csv").read_text().splitlines() == [
        "pseudonym,vendor,field_strength_t,ef,group,sex,pathology,contours",
        "p1,GE,1.5,0.55,g1,F,DCM,",
        "p2,unknown,,,g2,,,",
    ]


def test_a_folder_of_an_earlier_version_has_neither(tmp_path):
    (tmp_path / "cases.csv").write_text("pseudonym,vendor,field_strength_t,ef,group\np1,GE,1.5,0.55,g1\n")
    assert read_index(tmp_path) == [CaseInfo("p1", "GE", 1.5, 0.55, "g1")]


@pytest.mark.parametrize("cells", ["female,DCM", "f,DCM", "F,Smith^John", "F,a code of many letters", "F,D C"])
def test_other_words_in_these_columns_are_one_line_without_the_value(tmp_path, cells):
    header = "pseudonym,vendor,field_strength_t,ef,group,sex,pathology"
    (tmp_path / "cases.csv").write_text(f"{header}\np1,GE,1.5,0.55,g1,F,DCM\np2,GE,1.5,0.55,g2,{cells}\n")
    with pytest.raises(UserError, match=r"line 3 is not a case's row") as error:
        read_index(tmp_path)
    assert not any(cell in str(error.value) for cell in cells.split(",") if len(cell) > 1)


@pytest.mark.parametrize(("sex", "pathology"), [("O", ""), ("female", ""), ("", "x" * 17), ("", "Smith^John")])
def test_a_row_cannot_be_made_with_other_words(sex, pathology):
    with pytest.raises(ValueError, match="Expected") as error:
        CaseInfo("p1", "GE", 1.5, 0.55, "g1", sex, pathology)
    assert "Smith" not in str(error.value)
