"""Who is one patient: a number in several spellings is one, no number is nobody's, one number of many is told."""

import json
from collections import Counter

import pytest

from fedcmr.client.deidentify import pseudonym, same_patient
from fedcmr.client.ingest.placeholders import is_placeholder
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.reasons import REASONS
from fedcmr.shared.case import read_index, write_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PREPARED_NAME
from tests.client.ingest.dicom_files import write_study

KEY = bytes(range(32))


def export(folder, *studies):
    """Studies of these (PatientID, further elements)."""
    for number, (patient, elements) in enumerate(studies):
        write_study(folder / f"s{number}", patient=patient, study=f"1.2.{number + 3}", **elements)
    return folder


def of(issuer, **elements):
    return {"IssuerOfPatientID": issuer, **elements}


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
    assert json.loads((tmp_path / "apart" / PREPARED_NAME).read_text())["one_study_one_patient"] is True


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
    source = export(tmp_path / "scans", *[("4711", person) for person in persons], ("ID-1", {}))
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY)
    assert summary.warnings == {"conflicting-patient-id": 3}
    assert groups(tmp_path / "out") == [1, 3]
    assert "one patient" in REASONS["conflicting-patient-id"]
    written = b"".join(path.read_bytes() for path in tmp_path.glob("out/*.*")) + "".join(capfd.readouterr()).encode()
    assert not any(word in written for word in (b"Roe", b"Poe", b"19600101", b"4711"))


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
    settings = json.loads((out / PREPARED_NAME).read_text())
    for key in ("vendors_given", "one_study_one_patient"):
        del settings[key]
    (out / PREPARED_NAME).write_text(json.dumps(settings))
    assert prepare(source, out, "dicom", key=KEY).num_new == 0
    assert {info.pseudonym for info in read_index(out)} == names and groups(out) == [2]


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0000", "00-00", "-", "?", "...", "XXX", "xxxxxx", "UNKNOWN", "N/A", "n.a.", "Anonymous", "none"],
)
def test_a_text_that_says_nothing_is_a_placeholder(text):
    assert is_placeholder(text)


@pytest.mark.parametrize("text", ["7", "00100", "X", "X1", "ANON-12", "UNKNOWN7", "ID", "0x0", "Nancy", "カナリア"])
def test_whatever_may_be_somebodys_is_none(text):
    assert not is_placeholder(text)


@pytest.mark.parametrize("number", ["0000", "-", "UNKNOWN", "N/A", "XXX", "ANONYMOUS^^^HOSP"])
def test_a_placeholder_is_no_patients_number(tmp_path, number):
    """`0000` was one patient, however many persons it stood for."""
    source = export(tmp_path / "scans", (number, {}), (number, {}), ("ID-1", {}))
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY)
    assert (summary.refused, groups(tmp_path / "out")) == ({"no-patient-id": 2}, [1])
    prepare(source, tmp_path / "apart", "dicom", key=KEY, one_study_one_patient=True)
    assert groups(tmp_path / "apart") == [1, 1, 1]
    # Named as an earlier version named them, which took the placeholder for a number.
    names = {info.pseudonym for info in read_index(tmp_path / "apart")}
    assert {pseudonym(KEY, number, "1.2.3"), pseudonym(KEY, number, "1.2.4")} <= names


def test_images_with_a_placeholder_are_of_the_patient_whom_the_others_name(tmp_path):
    write_study(tmp_path / "scans" / "a", study="1.2.3", PatientID=lambda z, t: "UNKNOWN" if z == 2 else "ID-1")
    write_study(tmp_path / "scans" / "b", study="1.2.4", patient="ID-1")
    assert prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=KEY).refused == {}
    assert groups(tmp_path / "out") == [2]


def test_a_number_is_one_patient_whoever_issued_it_and_two_issuers_are_noted(tmp_path, capfd):
    source = export(
        tmp_path / "scans",
        ("12345", of("CANARY-A")),
        ("0012345", of("CANARY-B")),
        ("12345", {}),
        ("777", of("CANARY-A")),
        ("777", of("canary a")),
        ("777", of("N/A")),
    )
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY)
    assert groups(tmp_path / "out") == [3, 3]
    assert summary.warnings == {"several-issuers": 3}
    assert "--issuers-differ" in REASONS["several-issuers"]
    written = b"".join(path.read_bytes() for path in tmp_path.glob("out/*.*")) + "".join(capfd.readouterr()).encode()
    assert b"canary" not in written.lower()


def test_who_knows_that_issuers_differ_gets_a_patient_of_each(tmp_path):
    source = export(
        tmp_path / "scans",
        ("12345", of("A")),
        ("0012345", of("a ")),
        ("12345", of("B")),
        ("12345^^^B&1.2&ISO", {}),
        ("777", of("A")),
        ("12345", {}),
        ("12345", of("UNKNOWN")),
    )
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY, issuers_differ=True)
    assert groups(tmp_path / "out") == [1, 2, 2]
    # A study that names no issuer could be of either; refused, as one that names no patient.
    assert (summary.refused, summary.warnings) == ({"no-issuer": 2}, {"issuers-apart": 4})
    with pytest.raises(UserError, match="another issuers_differ"):
        prepare(source, tmp_path / "out", "dicom", key=KEY)
    with pytest.raises(UserError, match="--issuers-differ"):
        prepare(source, tmp_path / "plain", "plain", key=KEY, issuers_differ=True)


def test_whose_scans_come_in_two_calls_is_one_patient(tmp_path):
    """Who is a patient depends on a study alone, not on what else lies in the folder that is read."""
    for option in (False, True):
        for number in range(2):
            source = export(tmp_path / f"scans{option}{number}", ("1", of("A")) if option or number else ("1", {}))
            write_study(source / "s0", patient="1", study=f"1.3.{number}", **of("A") if option or number else {})
            prepare(source, tmp_path / f"out{option}", "dicom", key=KEY, issuers_differ=option)
        assert groups(tmp_path / f"out{option}") == [2]


def test_one_person_is_not_split_by_an_issuer_that_is_spelt_in_two_ways(tmp_path):
    ann = {"PatientName": "Roe^Ann", "PatientBirthDate": "19600101"}
    source = export(tmp_path / "scans", ("1", of("HOSP", **ann)), ("1", of("Hospital", **ann)), ("2", of("HOSP")))
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY, issuers_differ=True)
    assert (summary.refused, groups(tmp_path / "out")) == ({"issuers-of-one-person": 2}, [1])


def test_a_study_of_two_issuers_is_nobodys_where_issuers_differ(tmp_path):
    source = export(tmp_path / "scans", ("1", {"IssuerOfPatientID": lambda z, t: "AB"[z % 2]}), ("2", of("A")))
    assert prepare(source, tmp_path / "out", "dicom", key=KEY).warnings == {"several-issuers": 1}
    summary = prepare(source, tmp_path / "apart", "dicom", key=KEY, issuers_differ=True)
    assert summary.refused == {"mixed-patients": 1}


def test_one_person_under_two_numbers_is_told(tmp_path):
    ann = {"PatientName": "Roe^Ann", "PatientBirthDate": "19600101"}
    source = export(tmp_path / "scans", ("1", ann), ("2", ann), ("3", {**ann, "PatientBirthDate": "19600102"}))
    assert prepare(source, tmp_path / "out", "dicom", key=KEY).warnings == {"two-numbers-one-person": 2}
    assert groups(tmp_path / "out") == [1, 1, 1]


@pytest.mark.parametrize("filling", [("ANONYMOUS", "19600101"), ("Doe^Jane", ""), ("Doe^Jane", "19000101")])
def test_what_an_anonymiser_writes_for_everybody_is_no_person(tmp_path, filling):
    same = dict(zip(("PatientName", "PatientBirthDate"), filling, strict=True))
    source = export(tmp_path / "scans", *((str(number), same) for number in range(1, 5)))
    assert prepare(source, tmp_path / "out", "dicom", key=KEY).warnings == {}


@pytest.mark.slow
def test_a_table_gives_no_ejection_fraction_to_a_number_of_two_issuers(tmp_path):
    source = tmp_path / "scans"
    for index, (number, issuer) in enumerate([("1", "A"), ("01", "B"), ("2", "A")]):
        write_study(source / str(index), patient=number, study=f"1.2.{index}", masks=False, **of(issuer))
    (tmp_path / "efs.csv").write_text("patient,ef_percent\n1,40\n2,60\n")
    summary = prepare(source, tmp_path / "out", "dicom", key=KEY, ef_table=tmp_path / "efs.csv", issuers_differ=True)
    assert sorted(str(info.ef) for info in read_index(tmp_path / "out")) == ["0.6", "nan", "nan"]
    assert summary.warnings == {"issuers-apart": 2, "no-ejection-fraction": 2}


def test_a_placeholder_in_a_table_of_patients_is_named_by_line(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "a.nii.gz").touch()
    (tmp_path / "cases.csv").write_text("name,patient\nb,0\na,N/A\n")
    with pytest.raises(UserError, match=r"cases.csv line 3: column patient .* enter one for each person"):
        prepare(tmp_path, tmp_path.with_name("out"), "plain", key=KEY)
