"""Who is one patient: a number in several spellings is one, no number is nobody's, one number of many is told."""

import json
from collections import Counter

import pytest

from client.deidentify import pseudonym, same_patient
from client.ingest.prepare import SETTINGS_NAME, prepare
from client.ingest.reasons import REASONS
from shared.case import read_index, write_index
from shared.errors import UserError
from tests.client.dicom_files import write_study

KEY = bytes(range(32))


def export(folder, *studies):
    """Studies of these (PatientID, further elements)."""
    for number, (patient, elements) in enumerate(studies):
        write_study(folder / f"s{number}", patient=patient, study=f"1.2.{number + 3}", **elements)
    return folder


def groups(folder):
    return sorted(Counter(info.group for info in read_index(folder)).values())


@pytest.mark.parametrize("spelling", ["12345", "0012345", " 12345 ", "12345^MRN", "012345^^^HOSP&1.2.3&ISO", "^12345"])
def test_spellings_of_one_number_are_one_patient(spelling):
    assert same_patient(spelling) == "12345"


@pytest.mark.parametrize("other", ["12346", "123450", "A12345", "12345A", "1 2345"])
def test_other_numbers_stay_apart(other):
    assert same_patient(other) != "12345"


@pytest.mark.parametrize("number", ["ID-1", "pat0012", "p1f00", "7"])
def test_a_well_formed_number_is_its_own_spelling(number):
    assert same_patient(number) == number


@pytest.mark.parametrize("empty", ["", "  ", "^", " ^ ^"])
def test_no_number_is_nobodys(empty):
    assert same_patient(empty) == ""
    assert same_patient("000") == "0"


def test_a_person_spelt_in_three_ways_is_clipped_as_one(tmp_path):
    person = {"PatientName": "Roe^Ann", "PatientBirthDate": "19600101"}
    source = export(tmp_path / "scans", ("0012345", person), ("12345", person), ("12345^MRN", person), ("777", {}))
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY)
    assert groups(tmp_path / "out") == [1, 3]
    assert summary.warnings == {} and summary.refused == {}


def test_a_person_without_a_number_is_refused_until_somebody_knows_better(tmp_path):
    """Three studies of one person without a number made three patients of her."""
    source = export(tmp_path / "scans", ("", {}), ("", {}), ("  ", {}), ("ID-1", {}))
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY)
    assert (summary.refused, groups(tmp_path / "out")) == ({"no-patient-id": 3}, [1])
    with pytest.raises(UserError, match="another one_study_one_patient"):
        prepare(source, tmp_path / "out", "dicom", key=KEY, one_study_one_patient=True)
    prepare(source, tmp_path / "apart", "dicom", key=KEY, one_study_one_patient=True)
    assert groups(tmp_path / "apart") == [1, 1, 1, 1]
    assert json.loads((tmp_path / "apart" / SETTINGS_NAME).read_text())["one_study_one_patient"] is True


def test_where_nobody_has_a_number_the_one_line_names_the_remedy(tmp_path):
    source = export(tmp_path / "scans", ("", {}))
    with pytest.raises(UserError, match=r"no-patient-id 1: .*--one-study-one-patient"):
        prepare(source, tmp_path / "out", "dicom", key=KEY)


@pytest.mark.parametrize(
    "persons",
    [
        [{"PatientSex": "F"}, {"PatientSex": "F"}, {"PatientSex": "M"}],
        [{"PatientBirthDate": "19600101"}, {"PatientBirthDate": ""}, {"PatientBirthDate": "19700101"}],
        [{"PatientName": "Roe^Ann"}, {"PatientName": "Roe^Ann"}, {"PatientName": "Poe^Eve"}],
    ],
    ids=["sex", "birth-date", "name"],
)
def test_one_number_of_several_persons_is_told_and_counts_as_one_patient(tmp_path, capfd, persons):
    source = export(tmp_path / "scans", *[("ANONYMOUS", person) for person in persons], ("ID-1", {}))
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY)
    assert summary.warnings == {"conflicting-patient-id": 3}
    assert groups(tmp_path / "out") == [1, 3]
    assert "one patient" in REASONS["conflicting-patient-id"]
    written = b"".join(path.read_bytes() for path in tmp_path.glob("out/*.*")) + "".join(capfd.readouterr()).encode()
    assert not any(word in written for word in (b"Roe", b"Poe", b"19600101", b"ANONYMOUS"))


def test_names_that_differ_in_nothing_but_their_signs_agree(tmp_path):
    persons = [{"PatientName": name} for name in ("ROE^ANN", "Roe^Ann^^", "Roe Ann")]
    source = export(tmp_path / "scans", *[("12345", person) for person in persons])
    assert prepare(source, tmp_path / "out", "dicom", key=KEY).warnings == {}


def test_a_folder_of_an_earlier_version_keeps_its_cases_and_gets_the_common_patient(tmp_path):
    """It took each spelling for a patient; the same scans again make no second case of any."""
    source, out = export(tmp_path / "scans", ("0012345", {}), ("12345", {})), tmp_path / "out"
    prepare(source, out, "dicom", key=KEY)
    infos = read_index(out)
    names = {info.pseudonym for info in infos}
    assert names == {pseudonym(KEY, "0012345", "1.2.3"), pseudonym(KEY, "12345", "1.2.4")}
    old = {pseudonym(KEY, "0012345", "1.2.3"): pseudonym(KEY, "0012345")}
    write_index(out, [type(info)(**{**vars(info), "group": old.get(info.pseudonym, info.group)}) for info in infos])
    assert groups(out) == [1, 1]
    settings = json.loads((out / SETTINGS_NAME).read_text())
    for key in ("vendors_given", "one_study_one_patient"):
        del settings[key]
    (out / SETTINGS_NAME).write_text(json.dumps(settings))
    assert prepare(source, out, "dicom", key=KEY).num_new == 0
    assert {info.pseudonym for info in read_index(out)} == names and groups(out) == [2]
