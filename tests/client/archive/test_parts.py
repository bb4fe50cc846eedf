"""What an import is made of, without an archive: queries, lists, bodies, state, patience."""

import datetime
import fcntl
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pydicom
import pytest

from fedcmr.client.archive.archive import Answered, Broken, NotFetched, NotReached
from fedcmr.client.archive.credentials import Certificates
from fedcmr.client.archive.dimse import NOT_EXPECTED, OUT_OF_RESOURCES, SUCCESS, DimseArchive
from fedcmr.client.archive.fetching import fetch_study
from fedcmr.client.archive.finding import Found, FoundStudy, find_studies
from fedcmr.client.archive.importing import import_studies
from fedcmr.client.archive.multipart import boundary_of, save_parts
from fedcmr.client.archive.noted import Named, Noted, Seal
from fedcmr.client.archive.patience import MAX_ANSWERS, Patience
from fedcmr.client.archive.query import parse_query
from fedcmr.client.archive.state import ImportState, Record
from fedcmr.client.deidentify import pseudonym
from fedcmr.client.ingest.identity import Identity
from fedcmr.client.ingest.places import Place, Tally
from fedcmr.client.ingest.prepare import Choices, prepare
from fedcmr.client.ingest.refused_list import LIST_NAME, Row
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.shared.errors import UserError
from tests.client.archive.conftest import KEY
from tests.client.archive.studies import LOCALISER, MARK, accession, leaks, same_cases, study_uid, write_study
from tests.client.ingest.dicom.test_segmentation import ED, ES, NUM_PHASES, NUM_SLICES
from tests.client.ingest.dicom_files import compress
from tests.client.ingest.test_refused_list import rows_of


def test_a_query_is_asked_month_by_month_and_leaves_no_day_out():
    query = parse_query(["date=2019-02..2020-02-29"])
    days = []
    for match in query.matches():
        first, last = (datetime.datetime.strptime(day, "%Y%m%d").date() for day in match["StudyDate"].split("-"))
        assert (last - first).days < 31
        days += [first + datetime.timedelta(days=n) for n in range((last - first).days + 1)]
    assert days == [datetime.date(2019, 2, 1) + datetime.timedelta(days=n) for n in range(len(days))]
    assert days[-1] == datetime.date(2020, 2, 29)


def test_what_the_archive_did_not_look_at_is_looked_at_here():
    query = parse_query(["date=2020-05-04", "description=Herz,CMR"])
    assert query.takes({"StudyDate": "20200504", "StudyDescription": "MR HERZ"})
    assert not query.takes({"StudyDate": "20200505", "StudyDescription": "MR Herz"})
    assert not query.takes({"StudyDate": "20200504", "StudyDescription": "Knee"})
    assert not query.takes({"StudyDate": "20200504"})


@pytest.mark.parametrize(
    "parts",
    [
        ["vendor=GE"],
        ["date=2020", "date=2021"],
        ["date=20"],
        ["date=2020-13"],
        ["date=2021..2020"],
        ["date=2020", "vendor=Acme"],
        ["words=x"],
        ["date="],
        ["list=/no/such/file"],
    ],
)
def test_a_query_that_means_nothing_is_one_line(parts):
    with pytest.raises(UserError, match="expected"):
        parse_query(parts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A1\n\n# comment\nA1\n1.2.840.1.9\n", [("AccessionNumber", "A1"), ("StudyInstanceUID", "1.2.840.1.9")]),
        ("20200101\n", [("AccessionNumber", "20200101")]),
        ('\ufeffAccession Number,x\n"A,1",3\n', [("AccessionNumber", "A,1")]),
        ("accession_number;StudyInstanceUID\nA1;1.2.3.4\n", [("StudyInstanceUID", "1.2.3.4")]),
    ],
)
def test_a_list_is_read_in_the_forms_that_tables_take(tmp_path, text, found):
    path = tmp_path / "list"
    path.write_text(text)
    assert parse_query([f"list={path}"]).listed == tuple(found)


@pytest.mark.parametrize("text", ["", "A*\n", "StudyInstanceUID,x\nJane,1\n", "name,number\nJane,1\n", "A" * 65])
def test_a_list_that_cannot_be_meant_is_refused_without_its_values(tmp_path, text):
    path = tmp_path / "list"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)) as error:
        parse_query([f"list={path}"])
    assert "Jane" not in str(error.value) and "A*" not in str(error.value)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_body_is_cut_into_the_same_parts_wherever_its_chunks_end(tmp_path, size):
    parts = [b"\r\n--bound\r\n\r\n--bo", b"", b"x" * 5000, b"--b--\r\n"]
    body = b"preamble" + b"".join(b"\r\n--b\r\nContent-Type: application/dicom\r\n\r\n" + part for part in parts[1:])
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    with pytest.raises(Broken, match="in the middle"):
        save_parts(chunks, b"b", tmp_path)
    assert boundary_of('multipart/related; type="application/dicom"; boundary="b c"') == b"b c"
    assert boundary_of("text/html") is None
    body = body.replace(b"--b--\r\n", b"z") + b"\r\n--b--\r\nrest"
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    assert save_parts(chunks, b"b", tmp_path) == 3
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [b"", b"x" * 5000, b"z"]


def test_a_state_that_was_cut_by_a_crash_loses_one_line_at_most(tmp_path):
    identity = Identity("p", "n", frozenset("a"), frozenset("b"), frozenset("F"), frozenset({("a", "b")}), frozenset())
    records = [Record(f"s{n}", ("c",), {"r": 1}, {"l": n}, {"c": identity}) for n in range(3)]
    state = ImportState(tmp_path)
    for record in records:
        state.add(record)
    assert list(ImportState(tmp_path).records.values()) == records
    content = state.path.read_bytes()
    state.path.write_bytes(content[:-30])
    cut = ImportState(tmp_path)
    assert list(cut.records.values()) == records[:2]
    cut.add(records[2])
    assert list(ImportState(tmp_path).records.values()) == records


def test_patience_ends_and_a_connection_that_never_was_has_none():
    waits: list[float] = []
    patience = Patience("PACS", 60.0, waits.append)

    def broken() -> None:
        raise Broken("refused")

    with pytest.raises(NotReached, match="PACS is not reached"):
        patience.ask(broken)
    assert waits == []
    patience.ask(lambda: None)
    with pytest.raises(NotReached):
        patience.ask(broken)
    assert 60 <= sum(waits) <= 100 and waits == sorted(waits[:-1]) + waits[-1:]

    calls = []

    def answered() -> None:
        calls.append(1)
        raise Answered("archive-error", "500", passing=len(calls) < 10)

    with pytest.raises(NotFetched):
        patience.ask(answered)
    assert len(calls) == MAX_ANSWERS


SEG_SERIES = "1.2.5"


class Shelf:
    """An archive of files in folders, one a study, with ways to fail."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.lost, self.can_decode, self.fetched = folders, 0, True, Counter[str]()
        self.manufacturer = ""

    def find(self, level, match):
        if level == "STUDY":
            yield from ({"StudyInstanceUID": uid, "AccessionNumber": f"A{uid}"} for uid in self.folders)
        elif match["StudyInstanceUID"] in self.folders and level == "SERIES":
            yield {"SeriesInstanceUID": "1.2.3", "Modality": "MR", "NumberOfSeriesRelatedInstances": "24"}
            yield {"SeriesInstanceUID": "1.2.4", "Modality": "SR"}
            yield {"SeriesInstanceUID": SEG_SERIES, "Modality": "SEG"}
        elif level == "IMAGE" and match["SeriesInstanceUID"] == SEG_SERIES:
            number = match["StudyInstanceUID"].rpartition(".")[2]
            yield from ({"SOPInstanceUID": f"1.2.3.5{number}.{t + 1}"} for t in (ED, ES))
        elif level == "IMAGE":
            uid = match["StudyInstanceUID"]
            for number in range(1, NUM_PHASES * NUM_SLICES + 1):
                yield {"SOPInstanceUID": f"{uid}.1.{number}", "Manufacturer": self.manufacturer}
            yield {"SOPInstanceUID": f"{uid}.1.99", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}

    def fetch(self, study_uid, series_uid, wanted, folder, uncompressed=False):
        self.fetched[study_uid] += 1
        if uncompressed and not self.can_decode:
            raise Answered("archive-error", "406")
        pattern = "seg*.dcm" if series_uid == SEG_SERIES else "[0-9]*.dcm"
        for path in sorted(self.folders[study_uid].glob(pattern))[self.lost :]:
            target = folder / path.name
            if uncompressed:
                compress(path, target, "ExplicitVRLittleEndian")
            else:
                shutil.copyfile(path, target)
                content = target.read_bytes()
                # A syntax that nobody here reads: JPEG XL lossless in the place of JPEG 2000.
                target.write_bytes(content.replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.11"))

    def where(self, study_uid, series_uid=""):
        return f"PACS {study_uid} {series_uid}".strip()

    def close(self) -> None:
        pass


def quick(seconds: float = 60.0) -> Patience:
    return Patience("PACS", seconds, lambda wait: None)


def found(*numbers: int) -> Found:
    return Found([FoundStudy(study_uid(n), "2020", "Siemens", 24, accession(n)) for n in numbers], Tally())


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_here_is_decoded_by_the_archive(tmp_path):
    shelf = Shelf({study_uid(0): write_study(tmp_path / "scans", 0, "JPEG2000Lossless")})
    with Workers() as workers:
        left_out = fetch_study(shelf, study_uid(0), tmp_path / "decoded", workers, quick()).left_out
        shelf.can_decode = False
        fetch_study(shelf, study_uid(0), tmp_path / "as-it-is", workers, quick())
    assert left_out == {"not-mr-image": 1}
    files = {name: sorted((tmp_path / name).rglob("*.dcm")) for name in ("decoded", "as-it-is")}
    assert [len(paths) for paths in files.values()] == [26, 26]
    assert b"1.2.840.10008.1.2.1" in files["decoded"][0].read_bytes()
    assert b"1.2.840.10008.1.2.4.11" in files["as-it-is"][0].read_bytes()


@pytest.mark.slow
def test_what_the_archive_does_not_hand_over_is_counted_and_asked_for_again(tmp_path):
    folders = {study_uid(n): write_study(tmp_path / "scans" / str(n), n) for n in (0, 1)}
    shelf = Shelf(dict(folders))
    del shelf.folders[study_uid(1)]  # it vanished after it was found
    arguments = (tmp_path / "site" / "train", Choices("dicom"))
    shelf.lost = 1
    with pytest.raises(UserError, match="incomplete-fetch 1: ") as error:
        import_studies(shelf, found(0, 1), quick(), *arguments, key=KEY)
    assert "study-vanished 1: " in str(error.value)
    assert leaks(tmp_path / "site", str(error.value)) == []
    assert shelf.fetched[study_uid(0)] == 2 * MAX_ANSWERS, "as it is, and decoded"
    site = tmp_path / "site" / "train"
    assert f"which ones: {site / LIST_NAME}" in str(error.value)
    assert [(row["what"], row["reason"], row["patient"], row["accession"], row["path"]) for row in rows_of(site)] == [
        ("not fetched", code, "", accession(n), f"PACS {study_uid(n)}")
        for n, code in ((0, "incomplete-fetch"), (1, "study-vanished"))
    ]
    shelf.lost, shelf.folders = 0, folders
    imported = import_studies(shelf, found(0, 1), quick(), *arguments, key=KEY)
    assert (imported.num_fetched, imported.not_fetched, imported.summary.num_cases) == (2, {}, 2)
    assert [(row["what"], row["reason"], row["patient"], row["path"], row["files"]) for row in rows_of(site)] == [
        ("left out", "not-mr-image", f"{MARK}-{n}", f"PACS {study_uid(n)} 1.2.3", "1") for n in (0, 1)
    ], "what came is off the list, and what the archive has besides is on it"
    prepare(tmp_path / "scans", tmp_path / "files", "dicom", key=KEY)
    assert same_cases(tmp_path / "site" / "train", tmp_path / "files")


@pytest.mark.slow
def test_two_patients_who_may_be_one_are_noted_as_by_prepare_though_they_come_one_by_one(tmp_path):
    folders = {study_uid(n): write_study(tmp_path / "scans" / str(n), n) for n in (0, 1)}
    for path in (tmp_path / "scans").rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.PatientName, dataset.PatientBirthDate = "CANARY^One", "19500101"
        dataset.save_as(path)
    import_studies(Shelf(folders), found(0, 1), quick(), tmp_path / "site" / "train", Choices("dicom"), key=KEY)
    prepare(tmp_path / "scans", tmp_path / "files", "dicom", key=KEY)
    assert "two-numbers-one-person" in (tmp_path / "files" / "details.json").read_text()
    assert same_cases(tmp_path / "site" / "train", tmp_path / "files")
    assert leaks(tmp_path / "site") == []


@pytest.mark.slow
def test_an_archive_that_is_gone_leaves_a_list_of_what_was_done_before(tmp_path):
    folder = tmp_path / "site" / "train"
    localiser = write_study(tmp_path / "scans", LOCALISER, phases=1)
    names = {str(pydicom.dcmread(path).SOPInstanceUID) for path in localiser.glob("*.dcm")}
    shelf = Shelf({study_uid(n): localiser for n in (LOCALISER, 7)})
    find = shelf.find

    def find_until_it_is_gone(level, match):
        if match.get("StudyInstanceUID") == study_uid(7):
            raise Broken("refused")
        yield from (row for row in find(level, match) if level != "IMAGE" or row["SOPInstanceUID"] in names)

    shelf.find = find_until_it_is_gone
    with pytest.raises(NotReached):
        import_studies(shelf, found(LOCALISER, 7), quick(), folder, Choices("dicom"), key=KEY)
    rows = rows_of(folder)
    assert ("study refused", "no-short-axis-cine", f"{MARK}-{LOCALISER}") in {
        (row["what"], row["reason"], row["patient"]) for row in rows
    }
    assert json.loads((folder / "refused.json").read_text())["studies"] == {"no-short-axis-cine": 1}
    state = ImportState(folder)
    (record,) = state.records.values()
    state.add(replace(record, sealed=record.sealed[:-2]))
    with pytest.raises(NotReached):
        import_studies(shelf, found(LOCALISER, 7), quick(), folder, Choices("dicom"), key=KEY)
    assert sum(int(row["files"]) for row in rows_of(folder)) == sum(int(row["files"]) for row in rows)
    assert {row["patient"] for row in rows_of(folder)} == {""}, "what a damaged note told is gone, its counts are not"


def test_notes_of_patients_are_opened_by_their_own_key_alone():
    place = Place("https://pacs/studies/1.2", "MRN-\udcff", "A1", "1.2")
    noted = Noted((Named("MRN-\udcff", "MRN", "1.2", place),), (Row("left out", "not-cine", place, 3),))
    seal = Seal(KEY)
    assert seal.open(seal.close(noted)) == noted and "MRN" not in repr(noted)
    assert "MRN" not in seal.close(noted) and seal.close(noted) != seal.close(noted)
    assert Seal(bytes(32)).open(seal.close(noted)) is None
    assert seal.open("") is seal.open("ü") is seal.open(seal.close(noted)[:-4]) is None


def test_a_vendor_that_the_archive_does_not_say_is_not_guessed(tmp_path):
    shelf = Shelf({study_uid(0): tmp_path})
    query = parse_query(["date=2020-01", "vendor=GE"])
    skipped = find_studies(shelf, query, quick()).skipped
    assert skipped == {"vendor-not-said": 1}
    assert skipped.places == [("vendor-not-said", Place(f"PACS {study_uid(0)}", "", f"A{study_uid(0)}", study_uid(0)))]
    shelf.manufacturer = "GE MEDICAL SYSTEMS"
    assert [study.vendor for study in find_studies(shelf, query, quick()).studies] == ["GE"]
    shelf.manufacturer = "Philips"
    assert find_studies(shelf, query, quick()) == Found([], Tally())


def test_the_originals_are_not_kept_among_the_cases(tmp_path):
    for keep in (tmp_path / "train" / "originals", tmp_path):
        with pytest.raises(UserError, match="--keep"):
            import_studies(Shelf({}), found(), quick(), tmp_path / "train", Choices("dicom"), key=KEY, keep=keep)


def test_two_imports_into_one_folder_do_not_meet_and_what_a_killed_one_left_goes(tmp_path):
    arguments = (Shelf({}), found(), quick(), tmp_path / "site" / "train", Choices("dicom"))
    left = tmp_path / "site" / "train.fetching" / "p1" / "000000.dcm"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"CANARY")
    descriptor = os.open(left.parents[1], os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another import"):
        import_studies(*arguments, key=KEY)
    assert left.exists()
    os.close(descriptor)
    with pytest.raises(UserError, match="no usable patient"):
        import_studies(*arguments, key=KEY)
    assert not left.parents[1].exists()


def test_the_open_port_takes_what_was_asked_for_once_and_nothing_else(tmp_path):
    inbox = DimseArchive("PACS", "127.0.0.1", 104, "FEDCMR", 11112, Certificates()).inbox

    def send(uid: str) -> int:
        request = SimpleNamespace(AffectedSOPInstanceUID=uid)
        return inbox.receive(SimpleNamespace(request=request, encoded_dataset=lambda: b"image"))

    assert send("1.2") != SUCCESS, "nothing is being fetched"
    inbox.open(tmp_path, {"1.2", "1.3"})
    assert [send("9.9"), send("1.2"), send("1.2")] == [NOT_EXPECTED, SUCCESS, NOT_EXPECTED]
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == b"image" and path.stat().st_mode & 0o077 == 0
    inbox.folder = tmp_path / "gone"
    assert send("1.3") == OUT_OF_RESOURCES and isinstance(inbox.error, OSError)


def test_the_state_and_the_digests_of_names_mean_nothing_without_the_key():
    plain = Identity("p", "n", frozenset("a"), frozenset("b"), frozenset("F"), frozenset({("a", "b")}), frozenset("i"))
    one, other = plain.keyed(KEY), plain.keyed(bytes(32))
    assert one == plain.keyed(KEY)
    assert not one.names & (other.names | plain.names) and one.number == pseudonym(KEY, "number", "n")
