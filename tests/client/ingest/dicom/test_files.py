"""Single files: found in any folder, parsed like pydicom does where they are good, and with a reason where not."""

import errno
import math
import os
import pickle
import socket
import struct
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    SecondaryCaptureImageStorage,
)

from fedcmr.client.ingest.dicom import parser
from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.dicom.parser import parse
from fedcmr.client.ingest.dicom.reader import HEADER_ELEMENTS, find_dicom, read_file
from fedcmr.client.ingest.files import plain_files
from fedcmr.client.ingest.places import Tally
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from tests.client.ingest.dicom_files import image_dataset, write_image, write_study

REAL = Path(__file__).resolve().parents[4].parent / "shared" / "real" / "dicom"
PIXELS = np.zeros((8, 8))
COMPARED = (
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "Manufacturer",
    "MagneticFieldStrength",
    "Rows",
    "Columns",
    "TriggerTime",
    "InstanceNumber",
    "EchoTime",
    "InversionTime",
    "SeriesNumber",
)


def code(path: Path, seconds: float = 20) -> str:
    """Why a file is no image: a child finds it, and is not ended for its time."""
    with Workers(memory_bytes=256 * 2**20, seconds=seconds) as workers:
        (result,) = workers.map(read_file, [path])
    assert isinstance(result, Unusable), "it was read"
    return result.code


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """An element in explicit VR little endian, of whatever length it claims."""
    length = len(value) if length is None else length
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr)
    if vr in parser.LONG_VRS:
        return head + struct.pack("<HI", 0, length) + value
    return head + struct.pack("<H", length) + value


def with_inserted(path: Path, target: Path, raw: bytes) -> Path:
    """A file with bytes put in before its Rows (0028,0010)."""
    whole = path.read_bytes()
    place = whole.index(b"\x28\x00\x10\x00US")
    target.write_bytes(whole[:place] + raw + whole[place:])
    return target


@pytest.fixture
def image(tmp_path) -> Path:
    write_image(tmp_path / "good.dcm", PIXELS)
    return tmp_path / "good.dcm"


def test_plain_files_are_found_in_order_and_nothing_else(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "folder.dcm").mkdir()
    (tmp_path / "__MACOSX" / "b").mkdir(parents=True)
    for name in ("z", "b/1", "b/2", "b/deep/3", "folder.dcm/in", "b/._1", "__MACOSX/b/._1", ".DS_Store", "b/all.ZIP"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(tmp_path / "s"))
        left_out = Tally()
        found = [os.path.relpath(path, tmp_path) for path in plain_files(tmp_path, left_out)]
    assert found == ["z", "b/1", "b/2", "b/deep/3", "folder.dcm/in"]
    assert left_out == {"no-regular-file": 2, "system-file": 3, "archive": 1}
    (tmp_path / "chosen").symlink_to(tmp_path / "b")
    assert len(list(plain_files(tmp_path / "chosen", left_out))) == 3


def test_links_lead_to_files_and_folders_once_and_never_in_circles(tmp_path):
    for name in ("scans/a", "store/folder/1", "store/2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "store" / "pipe")
    targets = {
        "b": "store/2",
        "folder": "store/folder",
        "folder again": "store/folder",
        "loop": "scans",
        "nowhere": "store/gone",
        "pipe": "store/pipe",
    }
    for name, target in targets.items():
        (tmp_path / "scans" / name).symlink_to(tmp_path / target)
    left_out = Tally()
    found = [os.path.relpath(path, tmp_path / "scans") for path in plain_files(tmp_path / "scans", left_out)]
    assert found == ["a", "b", "folder/1"]
    assert left_out == {"no-regular-file": 4}


def test_folders_and_files_that_may_not_be_read_are_counted(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a").touch()
    (tmp_path / "b").touch()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    left_out = Tally()
    assert list(plain_files(tmp_path, left_out)) == [str(tmp_path / "b")]
    assert left_out == {"unreadable": 1}

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(parser.os, "open", refuse)
    with pytest.raises(Unusable, match="unreadable"):
        read_file(tmp_path / "b")


def test_a_file_that_becomes_something_else_meanwhile_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").mkdir()
    assert code(tmp_path / "pipe") == "no-regular-file"
    assert code(tmp_path / "link") == "not-dicom"
    assert code(tmp_path / "folder") in ("no-regular-file", "unreadable")
    assert code(tmp_path / "gone") == "unreadable"


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", bytes(10_000), np.random.default_rng(0).bytes(10_000), b"DICM" * 30],
    ids=["empty", "text", "zeros", "random", "almost"],
)
def test_other_files_are_not_dicom(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert code(tmp_path / "a") == "not-dicom"


def test_every_cut_of_a_header_is_a_reason(image):
    whole = image.read_bytes()
    end = len(whole) - PIXELS.size * 2
    codes = set()
    for length in range(end):
        image.write_bytes(whole[:length])
        with pytest.raises(Unusable) as error:
            read_file(image)
        codes.add(error.value.code)
    assert codes <= {"not-dicom", "damaged-header", "not-mr-image", "no-uid", "no-geometry", "unreadable-pixels"}
    image.write_bytes(whole)
    assert len(read_file(image)) == 1


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.4.95"])
def test_deflated_files_are_refused_unopened(tmp_path, syntax):
    dataset = image_dataset(PIXELS, transfer_syntax=DeflatedExplicitVRLittleEndian)
    dataset.add_new(0x00091001, "OB", bytes(20_000_000))
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    assert (tmp_path / "a").stat().st_size < 100_000
    raw = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(raw.replace(b"1.2.840.10008.1.2.1.99", str(syntax).ljust(22, "\0").encode()))
    assert code(tmp_path / "a") == "deflated"


@pytest.mark.parametrize("defined", [True, False])
def test_deep_nesting_is_refused(image, tmp_path, defined):
    raw = b""
    for _ in range(300):
        if defined:
            raw = element(0x00091010, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(raw)) + raw)
        else:
            item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + raw + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
            raw = element(0x00091010, b"SQ", item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0), 0xFFFFFFFF)
    path = with_inserted(image, tmp_path / "deep", raw)
    if defined:  # passed over unseen
        assert len(read_file(path)) == 1
    else:
        assert code(path) == "too-large"
    groups = element(0x52009230, b"SQ", b"".join([struct.pack("<HHI", 0xFFFE, 0xE000, len(raw)), raw]))
    whole = image.read_bytes()
    place = whole.index(b"\xe0\x7f\x10\x00OW")
    (tmp_path / "wanted").write_bytes(whole[:place] + groups + whole[place:])
    if not defined:
        assert code(tmp_path / "wanted") == "too-large"


def test_a_hundred_thousand_elements_are_refused(image, tmp_path):
    many = b"".join(element(0x00091000 + i % 200, b"LO", b"x ") for i in range(100_000))
    assert code(with_inserted(image, tmp_path / "many", many)) == "too-large"
    items = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 1_200_000 + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    endless = element(0x00091010, b"SQ", items, 0xFFFFFFFF)
    assert code(with_inserted(image, tmp_path / "items", endless)) == "too-large"


@pytest.mark.parametrize("tag", [0x00091010, 0x00200032, 0x00280002])
@pytest.mark.parametrize("vr", [b"OB", b"UN", b"SQ", b"UT"])
def test_a_length_of_two_gigabytes_is_not_believed(image, tmp_path, tag, vr):
    path = with_inserted(image, tmp_path / "long", element(tag, vr, b"abcd", 2**31 - 2))
    assert code(path) in ("damaged-header", "too-large")


def test_a_value_that_is_far_too_long_is_refused(image, tmp_path):
    path = with_inserted(image, tmp_path / "long", element(0x00280004, b"UT", b"MONOCHROME2 " * 1000))
    assert code(path) == "too-large"


@pytest.mark.parametrize(
    ("reason", "sop_class"),
    [
        ("not-mr-image", CTImageStorage),
        ("not-mr-image", BasicTextSRStorage),
        ("not-mr-image", EncapsulatedPDFStorage),
        ("not-mr-image", SecondaryCaptureImageStorage),
        ("not-mr-image", "1.2.840.10008.5.1.4.1.1.4.2"),
        ("not-grayscale", "1.2.840.10008.5.1.4.1.1.4.3"),
        ("dicomdir", MediaStorageDirectoryStorage),
    ],
)
def test_other_objects_are_counted_by_kind(tmp_path, reason, sop_class):
    write_image(tmp_path / "a", PIXELS, SOPClassUID=sop_class)
    assert code(tmp_path / "a") == reason


def test_a_directory_of_files_has_its_class_in_the_meta_information_only(tmp_path):
    dataset = image_dataset(PIXELS, SOPClassUID=MediaStorageDirectoryStorage)
    del dataset.SOPClassUID
    dataset.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    assert code(tmp_path / "DICOMDIR") == "dicomdir"


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("no-uid", {"StudyInstanceUID": None}),
        ("no-uid", {"SeriesInstanceUID": ""}),
        ("no-geometry", {"ImagePositionPatient": None}),
        ("no-geometry", {"ImageOrientationPatient": None}),
        ("no-geometry", {"ImagePositionPatient": [1, 2]}),
        ("no-geometry", {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}),
        ("no-geometry", {"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]}),
        ("no-geometry", {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}),
        ("no-geometry", {"ImagePositionPatient": ["1e300", 0, 0]}),
        ("no-geometry", {"PixelSpacing": None}),
        ("no-geometry", {"PixelSpacing": [0, 1]}),
        ("no-geometry", {"PixelSpacing": [-1, 1]}),
        ("no-geometry", {"PixelSpacing": [1]}),
        ("no-geometry", {"Rows": None}),
        ("no-geometry", {"Rows": 0}),
        ("too-large", {"Columns": 65535}),
    ],
    ids=str,
)
def test_headers_that_say_too_little_are_refused(tmp_path, reason, changes):
    write_image(tmp_path / "a", PIXELS, **changes)
    assert code(tmp_path / "a") == reason


@pytest.mark.parametrize("bad", [b"nan", b"inf", b"1e400", b"abc", b"1_0", b"--1", b"1,5", b"0x1F", b"\xff\xfe"])
def test_numbers_that_are_none_count_as_missing(tmp_path, bad):
    write_image(tmp_path / "a", PIXELS, TriggerTime="77777777", InstanceNumber="66666666", SeriesNumber=5)
    raw = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(raw.replace(b"77777777", bad.ljust(8)).replace(b"66666666", bad.ljust(8)))
    (header,) = read_file(tmp_path / "a")
    assert math.isnan(header.TriggerTime)
    assert math.isnan(header.InstanceNumber)
    assert header.SeriesNumber == 5


def test_uids_of_any_length_and_kind_are_only_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_study(tmp_path / "in", study="../../../etc/" + "9" * 70, masks=False)
    found = find_dicom(tmp_path / "in")
    assert len(found.studies) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.filterwarnings("ignore:.*(encod|escape).*")
@pytest.mark.parametrize(
    ("character_set", "raw"),
    [
        ("ISO_IR 100", "Müller".encode("latin-1")),
        ("ISO_IR 192", "Müller".encode()),
        ("\\ISO 2022 IR 100", "Müller".encode("latin-1")),
        ("ISO_IR 999", "Müller".encode("latin-1")),
    ],
    ids=["Latin-1", "UTF-8", "code extension", "unknown"],
)
def test_a_patient_is_the_same_in_every_character_set(tmp_path, character_set, raw):
    write_image(tmp_path / "a", PIXELS, SpecificCharacterSet="ISO_IR 6", PatientID="x" * (len(raw) + len(raw) % 2))
    whole = (tmp_path / "a").read_bytes()
    old = element(0x00080005, b"CS", b"ISO_IR 6")
    value = character_set.encode() + b" " * (len(character_set) % 2)
    assert whole.count(old) == 1
    whole = whole.replace(old, element(0x00080005, b"CS", value))
    (tmp_path / "a").write_bytes(whole.replace(b"x" * (len(raw) + len(raw) % 2), raw + b" " * (len(raw) % 2)))
    (header,) = read_file(tmp_path / "a")
    assert header.PatientID == "Müller"


@pytest.mark.filterwarnings("ignore:.*(encod|escape).*")
@pytest.mark.parametrize("character_set", ["ISO 2022 IR 87", "GB18030", "ISO_IR 144", "\\\\\\", "\0\0"])
def test_odd_character_sets_and_bytes_do_no_harm(tmp_path, character_set):
    write_image(tmp_path / "a", PIXELS, SpecificCharacterSet="ISO_IR 6", PatientID="x" * 20)
    whole = (tmp_path / "a").read_bytes()
    value = character_set.encode() + b" " * (len(character_set) % 2)
    whole = whole.replace(element(0x00080005, b"CS", b"ISO_IR 6"), element(0x00080005, b"CS", value))
    raws = [b"\x1b$B\xff\xfe\x1b(B" + b"\x80" * 11, bytes(range(200, 220)), bytes(range(201, 221)), b"\x1b" * 20]
    names = set()
    for raw in raws:
        (tmp_path / "a").write_bytes(whole.replace(b"x" * 20, raw.ljust(20)))
        (header,) = read_file(tmp_path / "a")
        names.add(header.PatientID)
    assert len(names) == len(raws), "two patients never become one"


def expected_header(path: Path) -> dict[str, object]:
    """What pydicom, an independent parser, reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        values = {}
        for keyword in COMPARED:
            value = dataset.get(keyword)
            is_text = keyword.endswith("UID") or keyword in ("PatientID", "Manufacturer")
            values[keyword] = str(value or "").strip() if is_text else math.nan if value is None else float(value)
        if "ImagePositionPatient" in dataset:
            for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
                values[keyword] = tuple(float(x) for x in dataset[keyword].value)
        return values


def assert_equal_headers(header: Header, expected: dict[str, object]) -> None:
    for keyword, value in expected.items():
        found = getattr(header, keyword)
        if keyword in ("TriggerTime", "InstanceNumber", "EchoTime", "InversionTime") and header.frame is not None:
            continue  # of the frame, not of the file
        assert found == value or (math.isnan(found) and math.isnan(value)), keyword


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("undefined", [False, True])
def test_a_header_full_of_other_things_is_read_like_pydicom_does(tmp_path, syntax, undefined):
    dataset = image_dataset(
        PIXELS,
        transfer_syntax=syntax,
        TriggerTime="12.5",
        InstanceNumber=7,
        EchoTime="1.25",
        PatientName="Doe^Jane",
        SeriesNumber=9,
    )
    inner, innermost = Dataset(), Dataset()
    for one in (inner, innermost):
        one.StudyInstanceUID, one.TriggerTime, one.PatientID = "9.9.9", "99", "not this one"
    inner.ReferencedImageSequence = Sequence([Dataset(), innermost])
    dataset.ReferencedStudySequence = Sequence([inner, inner])
    dataset.ReferencedPerformedProcedureStepSequence = Sequence([])
    for one in (dataset, inner):
        for name in ("ReferencedStudySequence", "ReferencedImageSequence", "ReferencedPerformedProcedureStepSequence"):
            if name in one:
                one[name].is_undefined_length = undefined
                for item in one[name].value:
                    item.is_undefined_length_sequence_item = undefined
    block = dataset.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    block.add_new(0x10, "OB", bytes(range(256)) * 400)
    block.add_new(0x11, "UN", b"\xfe\xff\x00\xe0" * 10)
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    (header,) = read_file(tmp_path / "a")
    assert_equal_headers(header, expected_header(tmp_path / "a"))
    assert header.TriggerTime == 12.5


def test_sequences_of_unknown_vr_hold_implicit_elements(image, tmp_path):
    inner = struct.pack("<HHI", 0x0020, 0x0032, 6) + b"1\\2\\3 "
    # A length that looks like a VR where one is expected.
    inner += struct.pack("<HHI", 0x0029, 0x1010, 0x4142) + bytes(0x4142)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + inner + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    raw = element(0x00091010, b"UN", item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0), 0xFFFFFFFF)
    path = with_inserted(image, tmp_path / "un", raw)
    (header,) = read_file(path)
    assert_equal_headers(header, expected_header(path))


def test_a_transfer_syntax_that_is_wrong_about_the_vr_does_not_matter(image, tmp_path):
    raw = image.read_bytes()
    explicit, implicit = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"
    image.write_bytes(raw.replace(explicit, implicit))
    (header,) = read_file(image)
    assert header.StudyInstanceUID == "1.2.3"
    write_image(tmp_path / "implicit", PIXELS, transfer_syntax=ImplicitVRLittleEndian)
    raw = (tmp_path / "implicit").read_bytes()
    meta = element(0x00020010, b"UI", b"1.2.840.10008.1.2\0")
    assert raw.count(meta) == 1
    (tmp_path / "implicit").write_bytes(raw.replace(meta, element(0x00020010, b"UI", b"1.2.840.10008.1.2.1\0")))
    (header,) = read_file(tmp_path / "implicit")
    assert header.StudyInstanceUID == "1.2.3"


def test_only_allowed_elements_are_kept(tmp_path):
    write_image(
        tmp_path / "a",
        PIXELS,
        PatientName="Doe^Jane",
        PatientBirthDate="19770707",
        StudyDate="20200101",
        InstitutionName="General",
        AccessionNumber="A1",
        SeriesDescription="cine",
    )
    kept = parse(tmp_path / "a", HEADER_ELEMENTS).elements.values
    assert set(kept) <= set(HEADER_ELEMENTS)
    names = {pydicom.datadict.keyword_for_tag(tag) for tag in HEADER_ELEMENTS}
    assert not any(
        word in name for name in names for word in ("Name", "Date", "Description", "Institution", "Accession")
    )
    assert not any(tag >> 16 & 1 for tag in HEADER_ELEMENTS), "no private element"
    assert b"Doe" not in pickle.dumps(read_file(tmp_path / "a"))
    assert "ID-1" not in repr(read_file(tmp_path / "a"))


def test_headers_survive_the_way_from_a_child_and_share_what_is_equal(tmp_path):
    write_study(tmp_path, masks=False)
    files = sorted(map(str, tmp_path.iterdir()))
    with Workers() as workers:
        headers = [header for (header,) in workers.map(read_file, files, batch_size=16)]
    assert headers == [read_file(path)[0] for path in files] or any(math.isnan(h.EchoTime) for h in headers)
    assert [str(header.path) for header in headers] == files
    assert len({id(header.StudyInstanceUID) for header in headers}) == 1
    assert len({id(header.ImageOrientationPatient) for header in headers}) == 1
    assert len({id(header.pixel_format) for header in headers}) == 1


def test_the_rest_goes_on(tmp_path):
    write_study(tmp_path / "study", masks=False)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty").touch()
    os.mkfifo(bad / "pipe")
    write_image(bad / "ct", PIXELS, SOPClassUID=CTImageStorage)
    write_image(bad / "rgb", PIXELS, PhotometricInterpretation="RGB", SamplesPerPixel=3)
    write_image(bad / "big", PIXELS, Rows=65535, Columns=65535)
    (bad / "cut").write_bytes((bad / "ct").read_bytes()[:300])
    found = find_dicom(tmp_path)
    assert len(found.studies) == 1
    assert found.left_out == {
        "not-dicom": 1,
        "no-regular-file": 1,
        "not-mr-image": 1,
        "not-grayscale": 1,
        "too-large": 1,
        "damaged-header": 1,
    }


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans in {REAL}")
def test_real_headers_are_read_like_pydicom_does():
    num_files = 0
    for path in sorted(path for path in REAL.rglob("*.*") if path.is_file() and path.parent != REAL):
        try:
            headers = read_file(path)
        except Unusable as unusable:
            assert unusable.code == "not-dicom"
            continue
        num_files += 1
        assert_equal_headers(headers[0], expected_header(path))
    assert num_files > 250
