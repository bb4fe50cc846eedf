"""Sex and pathology group: from every layout that gives them, and unknown where anything else stands in their place."""

import csv

import numpy as np
import pytest
from pydicom import dcmread

from fedcmr.client.check.folder import check
from fedcmr.client.check.html_report import facts
from fedcmr.client.check.report import as_json
from fedcmr.client.ingest.layouts.acdc import find_acdc
from fedcmr.client.ingest.patient import agreed_sex, pathology_code, sex_code
from fedcmr.client.ingest.prepare import prepare
from fedcmr.shared.case import read_index
from fedcmr.simulations.hospital import write_hospital
from tests.client.ingest.dicom_files import write_enhanced, write_study
from tests.client.ingest.layouts.test_labels import write_mnms2
from tests.client.ingest.test_prepare import KEY, heart, write_acdc, write_nifti

NAME = "Smith^John"


def known(folder) -> list[tuple[str, str]]:
    """Sex and pathology of a folder's cases, sorted: pseudonyms are in no order."""
    return sorted((info.sex, info.pathology) for info in read_index(folder))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("DCM", "DCM"),
        (" hcm ", "HCM"),
        ("Other", "Other"),
        ("other", "Other"),
        ("RV", "RV"),
        ("", ""),
        (NAME, ""),
        ("SMITH", ""),
        ("DCM 1948", ""),
    ],
)
def test_only_codes_of_the_list_are_kept(text, code):
    assert pathology_code(text) == code


@pytest.mark.parametrize(
    ("texts", "sex"),
    [
        (["F"], "F"),
        (["M ", "m"], "M"),
        (["Female"], "F"),
        (["F", ""], "F"),
        (["F", "M"], ""),
        (["F", "O"], ""),
        (["O"], ""),
        ([], ""),
        (["", " "], ""),
        ([NAME], ""),
    ],
)
def test_a_stack_has_the_one_sex_that_its_images_name(texts, sex):
    assert agreed_sex(texts) == sex
    assert sex_code(texts[0] if texts else "") in ("", "F", "M")


def test_acdc_gives_the_group_of_info_cfg(tmp_path):
    write_acdc(tmp_path / "scans", [1, 2, 3, 4, 5])
    folders = [tmp_path / "scans" / f"patient{number:03d}" for number in range(1, 6)]
    folders[0].joinpath("Info.cfg").write_text("ED: 1\nES: 12\nGroup: HCM\nHeight: 184.0\nNbFrame: 30\n")
    folders[1].joinpath("Info.cfg").write_bytes(b"ED: 1\r\nGroup:  MINF \r\n")
    folders[2].joinpath("Info.cfg").write_text(f"Group: {NAME}\nGroup: DCM\n")
    folders[3].joinpath("Info.cfg").write_bytes(b"Group: DCM\n\xff\xfe")
    prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY, num_processes=1)
    assert [study.read().pathology for study in find_acdc(tmp_path / "scans").studies] == ["HCM", "MINF", "", "", ""]
    assert known(tmp_path / "out") == [("", "")] * 3 + [("", "HCM"), ("", "MINF")]


def test_mnms_gives_sex_and_pathology_where_its_rows_agree(tmp_path):
    images, masks = heart(110)
    rows = [
        ["A1", "GE", 0, 1, "DCM", "F"],
        ["B2", "GE", 0, 1, "LVNC", "M"],
        ["B2", "GE", 0, 1, "HCM", "M"],
        ["C3", "GE", 0, 1, NAME, NAME],
    ]
    for code in ("A1", "B2", "C3"):
        folder = tmp_path / "scans" / code
        folder.mkdir(parents=True)
        write_nifti(folder / f"{code}_sa.nii.gz", images.T.astype(np.int16))
        write_nifti(folder / f"{code}_sa_gt.nii.gz", np.array([0, 3, 2, 1], np.uint8)[masks].T)
    with (tmp_path / "scans" / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["External code", "VendorName", "ED", "ES", "Pathology", "Sex"], *rows])
    assert prepare(tmp_path / "scans", tmp_path / "out", "mnms", key=KEY, num_processes=1).refused == {}
    assert known(tmp_path / "out") == [("", ""), ("F", "DCM"), ("M", "")]


def test_mnms2_gives_the_disease_of_its_table(tmp_path):
    write_mnms2(tmp_path / "scans", ["001", "002", "003"])
    with (tmp_path / "scans" / "dataset_information.csv").open("w", newline="") as file:
        rows = [[1, "FALL", "GE", 3], [2, NAME, "GE", 3], [3, "TRI", "GE", 3], [3, "LV", "GE", 3]]
        csv.writer(file).writerows([["SUBJECT_CODE", "DISEASE", "VENDOR", "FIELD"], *rows])
    assert prepare(tmp_path / "scans", tmp_path / "out", "mnms2", key=KEY, num_processes=1).refused == {}
    assert known(tmp_path / "out") == [("", ""), ("", ""), ("", "FALL")]


@pytest.mark.slow
def test_dicom_gives_the_sex_that_classic_and_enhanced_files_name(tmp_path):
    sexes = ["F", "O", lambda z, t: "FM"[t % 2], lambda z, t: "M" if z else ""]
    for number, sex in enumerate(sexes):
        folder = tmp_path / "scans" / str(number)
        write_study(folder, patient=f"ID-{number}", study=f"1.2.3.{number}", masks=False, PatientSex=sex)
    write_enhanced(tmp_path / "scans" / "e.dcm", PatientID="ID-9", StudyInstanceUID="1.2.3.99", PatientSex="F")
    summary = prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=KEY, num_processes=1)
    assert summary.num_cases == 5
    assert known(tmp_path / "out") == [("", ""), ("", ""), ("F", ""), ("F", ""), ("M", "")]


@pytest.mark.slow
def test_a_simulated_hospital_tells_the_sex_in_its_headers_and_no_pathology(tmp_path):
    write_hospital(tmp_path / "scans", "Philips", 3, num_slices=6, num_phases=8, seed=2, prefix="x")
    prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=KEY, num_processes=1)
    headers = [dcmread(next(study.rglob("*.dcm")), stop_before_pixels=True) for study in (tmp_path / "scans").iterdir()]
    assert {header.PatientSex for header in headers} == {"F", "M"}, "the seed gives both"
    assert known(tmp_path / "out") == sorted((header.PatientSex, "") for header in headers)


def test_check_counts_them(tmp_path):
    write_acdc(tmp_path / "scans", [1, 2, 3])
    for number, group in ((1, "HCM"), (2, "HCM")):
        (tmp_path / "scans" / f"patient{number:03d}" / "Info.cfg").write_text(f"Group: {group}\n")
    prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY, num_processes=1)
    report = check(tmp_path / "out")
    assert as_json(report)["pathologies"] == {"HCM": 2, "unknown": 1}
    assert as_json(report)["sexes"] == {"unknown": 3}
    assert dict(facts(report))["pathology"] == "HCM 2, unknown 1"
    assert dict(facts(report))["sex"] == "unknown 3"
