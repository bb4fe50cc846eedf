"""The site's own list of what `prepare` refused or passed over: complete, private, harmless."""

import csv
import json
import shutil
import stat
from collections import Counter
from pathlib import Path

import pytest

from fedcmr.client.check.folder import check, write_report
from fedcmr.client.ingest.places import Place, Tally
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.reasons import REASONS
from fedcmr.client.ingest.refused_list import COLUMNS, LIST_NAME, SOURCES_NAME, plain_text, write_list
from fedcmr.shared.errors import UserError
from tests.client.ingest.dicom_files import write_study
from tests.client.ingest.test_prepare import write_acdc

KEY = bytes(range(32))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / LIST_NAME).open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A folder of DICOM with two good studies and one of several kinds that are none."""
    root = tmp_path_factory.mktemp("export") / "scans"
    for number in (1, 2):
        write_study(root / f"good {number}", patient=f"MRN-{number}", study=f"1.2.{number}", masks=False)
    still = {"TriggerTime": "777", "SeriesInstanceUID": "1.2.1.77", "SOPInstanceUID": lambda z, t: f"1.2.1.78.{z}"}
    later = [(None, t) for t in range(1, 8)]
    write_study(root / "good 1" / "late", patient="MRN-1", study="1.2.1", masks=False, skip=later, **still)
    refused = {
        "uneven": {"skip": [(2, 3), (2, 4), (2, 5)]},
        "burned": {"BurnedInAnnotation": "YES"},
        "blank": {"patient": ""},
        "mixed": {"PatientID": lambda z, t: f"MRN-{z}"},
        "mask": {},
    }
    for number, (name, options) in enumerate(refused.items()):
        elements = {"patient": f"MRN-9{number}", "AccessionNumber": f"ACC-{name}", **options}
        write_study(root / name / "=HYPERLINK(1)", study=f"1.3.{number}", masks=False, **elements)
    (root / "mask" / "=HYPERLINK(1)" / "masks.nii.gz").write_bytes(b"nothing")
    (root / "notes.txt").write_text("no scan")
    (root / "good 2" / "._twin").write_text("")
    (root / "all.zip").write_text("")
    return root


@pytest.fixture(scope="module")
def prepared(export) -> Path:
    folder = export.with_name("out")
    prepare(export, folder, "dicom", key=KEY)
    return folder


def test_everything_that_is_counted_is_listed_with_its_reason_and_its_place(export, prepared):
    rows, counts = rows_of(prepared), json.loads((prepared / "refused.json").read_text())
    assert tuple(rows[0]) == COLUMNS
    for what, kind in (("study refused", "studies"), ("left out", "left_out")):
        listed = Counter()
        for row in rows:
            listed[row["reason"]] += int(row["files"]) * (row["what"] == what)
        assert +listed == counts[kind] != {}
    assert all(row["what it means, and what to do"] == REASONS[row["reason"]] for row in rows)
    refused = {row["reason"]: row for row in rows if row["what"] == "study refused"}
    assert len(refused) == 5 and len(counts["left_out"]) >= 4
    uneven = refused["uneven-spacing"]
    assert (uneven["patient"], uneven["accession"], uneven["study"]) == ("MRN-90", "ACC-uneven", "1.3.0")
    assert export / uneven["path"] == export / "uneven" / "=HYPERLINK(1)"
    assert refused["mixed-patients"]["patient"] == "MRN-0, MRN-1, MRN-2, MRN-3, MRN-4"
    (passed,) = [row for row in rows if row["reason"] == "not-cine"]
    assert (passed["patient"], passed["path"]) == ("MRN-1", "good 1/late"), "a part of a study that became a case"


def test_it_is_the_accounts_alone_and_no_pseudonym_stands_in_it(prepared):
    for name in (LIST_NAME, SOURCES_NAME):
        assert stat.S_IMODE((prepared / name).stat().st_mode) == 0o600
        for case in (prepared / "cases").glob("*.npz"):
            assert case.stem not in (prepared / name).read_text(encoding="utf-8-sig")
    assert stat.S_IMODE((prepared / LIST_NAME).parent.stat().st_mode) == 0o700


def test_a_repeat_takes_out_what_was_mended_and_doubles_nothing(tmp_path):
    write_acdc(tmp_path / "scans", [1, 2, 3])
    frame = tmp_path / "scans" / "patient002" / "patient002_frame01.nii.gz"
    frame.rename(tmp_path / "frame")
    (tmp_path / "scans" / "patient003" / "patient003_frame01.nii.gz").write_bytes(b"nothing")
    for _ in range(2):
        prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY)
        assert [(row["reason"], row["patient"], row["path"]) for row in rows_of(tmp_path / "out")] == [
            ("missing-file", "002", "patient002"),
            ("unreadable-nifti", "003", "patient003"),
        ]
    (tmp_path / "frame").rename(frame)
    prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY)
    assert [row["patient"] for row in rows_of(tmp_path / "out")] == ["003"]
    assert json.loads((tmp_path / "out" / SOURCES_NAME).read_text()) == [str((tmp_path / "scans").resolve())]


def test_where_nothing_was_usable_the_list_says_why(tmp_path):
    write_acdc(tmp_path / "scans", [2])
    (tmp_path / "scans" / "patient002" / "patient002_frame01.nii.gz").unlink()
    with pytest.raises(UserError, match=rf"which ones: .*{LIST_NAME}") as error:
        prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY)
    assert "patient002" not in str(error.value) and [row["path"] for row in rows_of(tmp_path / "out")] == ["patient002"]


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=cmd|'/c calc'!A1", "'=cmd|''/c calc'!A1".replace("''", "'")),
        ("@SUM(1)", "'@SUM(1)"),
        ("-1", "'-1"),
        ("+49", "'+49"),
        ("  =1", "'  =1"),
        ("\t=1", "' =1"),
        ("a;=1", "a;'=1"),
        ("\uff1d1", "'\uff1d1"),
        ("a\r\n=1", "a  =1"),
        ("b\u202etxt.exe", "b txt.exe"),
        ("\udcff", " "),
        ("MRN-0012/ü 5", "MRN-0012/ü 5"),
    ],
)
def test_no_cell_is_a_formula(tmp_path, text, cell):
    assert plain_text(text) == cell
    refused = Tally()
    refused.add("uneven-phases", Place(str(tmp_path / "scans" / "f"), text, text, text))
    write_list(tmp_path, tmp_path / "scans", refused, Tally(), Tally())
    (row,) = rows_of(tmp_path)
    assert (row["patient"], row["path"]) == (cell, "f")


def test_many_files_of_one_kind_in_one_folder_are_one_line(tmp_path):
    left_out = Tally()
    for folder in "ab":
        for number in range(500):
            left_out.add("not-mr-image", tmp_path / "scans" / folder / f"{number}.dcm")
    left_out.add("archive", tmp_path / "scans" / "all.zip")
    write_list(tmp_path, tmp_path / "scans", Tally(), left_out, Tally())
    told = {(row["reason"], row["path"], row["files"]) for row in rows_of(tmp_path)}
    assert told == {("not-mr-image", "a", "500"), ("not-mr-image", "b", "500"), ("archive", "all.zip", "1")}


def test_the_check_links_to_the_list_beside_it_and_says_that_it_names_patients(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "moved")
    write_report(folder, check(folder))
    page = (folder / "check.html").read_text()
    assert f'<a href="{LIST_NAME}">' in page and "<strong>names patients</strong>" in page
    assert "fedcmr-client whois DST PSEUDONYM" in page and "MRN" not in page and "MRN" not in (
        folder / "check.json"
    ).read_text()  # fmt: skip
    shutil.rmtree((folder / LIST_NAME).parent)
    write_report(folder, check(folder))
    assert LIST_NAME not in (folder / "check.html").read_text()
