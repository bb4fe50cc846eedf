"""Canaries in every corner of a scan appear in no byte that `prepare` and `check` write, print or log."""

import base64
import csv
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from fedcmr.client.cli import main
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.whois import PSEUDONYM
from fedcmr.shared.case import load_cases
from fedcmr.shared.file_names import PRIVATE_NAME
from fedcmr.simulations.benchmarks.ingest_damage import damage
from tests.client.ingest.dicom_files import (
    COLUMN_AXIS,
    NORMAL,
    PIXEL_MM,
    ROW_AXIS,
    SLICE_MM,
    beating_heart,
    write_enhanced,
    write_study,
)

CANARIES = ("CANARY", "canary", "19770707", "770707", "1.2.77707", "Zoë".encode().decode("latin-1"), "カナリア")
NAME, DATE, UID_ROOT = "CANARY^Zoë", "19770707", "1.2.77707"
WORDS = {
    "SpecificCharacterSet": "ISO_IR 192",
    "PatientName": NAME,
    "PatientBirthDate": DATE,
    "PatientBirthTime": "070707",
    "StudyDate": DATE,
    "SeriesDate": DATE,
    "AcquisitionDate": DATE,
    "ContentDate": DATE,
    "AcquisitionDateTime": f"{DATE}121212",
    "InstanceCreationDate": DATE,
    "InstitutionName": "CANARY hospital",
    "InstitutionAddress": "CANARY street 7",
    "StationName": "CANARY1",
    "ReferringPhysicianName": "CANARY^Doctor",
    "OperatorsName": "CANARY^Operator",
    "AccessionNumber": "CANARY2",
    "StudyID": "CANARY3",
    "StudyDescription": "CANARY study",
    "SeriesDescription": "CANARY sax",
    "ProtocolName": "CANARY",
    "SequenceName": "*CANARY",
    "PatientComments": "CANARY text",
    "ImageComments": "CANARY image",
    "PatientAge": "077Y",
    "OtherPatientIDs": "CANARY-other",
    "IssuerOfPatientID": "CANARY issuer",
    "EthnicGroup": "CANARY",
    "Occupation": "CANARY",
    "DeviceSerialNumber": "CANARY",
    "RequestedProcedureDescription": "CANARY",
    "ManufacturerModelName": "CANARY",
    "FrameOfReferenceUID": f"{UID_ROOT}.7",
    "PerformedProcedureStepDescription": "CANARY",
    "SoftwareVersions": "CANARY",
    "ReceiveCoilName": "CANARY",
    "AdditionalPatientHistory": "CANARY",
    "DataSetTrailingPadding": b"CANARY..",
}
"""Elements that scanners fill in; of none of them are words kept."""


def plant(path: Path) -> None:
    """Canaries where no keyword reaches: preamble, private blocks, odd representations, overlays, nested items."""
    dataset = dcmread(path)
    private = dataset.private_block(0x0019, "CANARY CREATOR", create=True)
    private.add_new(0x01, "LO", "CANARY private")
    private.add_new(0x02, "UN", b"CANARY unknown ")
    private.add_new(0x03, "OB", b"CANARY bytes")
    dataset.add_new(0x60000022, "LO", "CANARY overlay")
    dataset.add_new(0x60000010, "US", 8)
    dataset.add_new(0x60003000, "OW", b"CANARY.." * 4)
    dataset.add_new(0x00209158, "LT", "CANARY frame comments")
    item = Dataset()
    item.PatientID, item.CodeMeaning = "CANARY nested", "CANARY"
    dataset.OtherPatientIDsSequence = [item]
    dataset.preamble = b"CANARY preamble".ljust(128, b"!")
    dataset.save_as(path, enforce_file_format=True)
    path.write_bytes(path.read_bytes() + b"\0")


def write_canaries(folder: Path, number: int, **elements: object) -> Path:
    """A study that says its patient's name wherever it can."""
    own = folder / f"CANARY-{number}^Jane" / DATE
    study = f"{UID_ROOT}.{number}"
    write_study(own, patient=f"CANARY-{number}", study=study, **WORDS | elements)
    for path in sorted(own.glob("*.dcm")):
        plant(path)
        path.rename(path.with_name(f"CANARY_{path.name}"))
    if (own / "masks.nii.gz").exists():
        mark_nifti(own / "masks.nii.gz")
    return own


def mark_nifti(path: Path) -> None:
    """Every text of a NIfTI header, and an extension."""
    image = nibabel.load(path)
    for name, size in (("descrip", 79), ("db_name", 17), ("aux_file", 23), ("intent_name", 15)):
        image.header[name] = f"CANARY {DATE}"[:size].encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"CANARY extension"))
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path)


def run(*arguments: object, folder: Path) -> bytes:
    """A command as a data manager calls it, with every warning on; what it printed."""
    environment = os.environ | {
        "PYTHONWARNINGS": "always",
        "PYTHONDEVMODE": "1",
        "COLUMNS": "200",
        "TMPDIR": str(folder),
    }
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "fedcmr.client.cli", *map(str, arguments)],
        capture_output=True,
        env=environment,
        cwd=root,
        timeout=300,
    )
    assert done.returncode in (0, 2), done.stderr[-2000:]
    assert b"Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def call(capfd, caplog):
    """`call(*arguments)`: a command in this process; what it printed, logged and warned of."""
    caplog.set_level(logging.DEBUG)

    def call(*arguments: object) -> bytes:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(list(map(str, arguments))) in (0, 2)
        texts = [*capfd.readouterr(), caplog.text, *(str(warning.message) for warning in caught)]
        return "\n".join(texts).encode("utf-8", "surrogateescape")

    return call


def assert_silent(printed: bytes, folder: Path) -> None:
    """No canary in what was printed, or in a file, packed or not, or its name, but in the one that names patients."""
    texts = [printed]
    for path in folder.rglob("*"):
        if PRIVATE_NAME in path.relative_to(folder).parts:
            assert not PSEUDONYM.search(path.read_text(encoding="utf-8") if path.is_file() else ""), "links the two"
            continue
        texts.append(str(path.relative_to(folder)).encode())
        if not path.is_file():
            continue
        content = path.read_bytes()
        texts.append(content)
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                texts += [archive.read(name) for name in archive.namelist()]
                texts += [repr(archive.infolist()).encode(), archive.comment]
        texts += [base64.b64decode(part) for part in re.findall(rb"base64,([A-Za-z0-9+/=]+)", content)]
    for canary in CANARIES:
        assert not any(canary.encode() in text for text in texts), canary


@pytest.fixture
def out(tmp_path) -> Path:
    """Where everything is written, the temporary files of the commands included."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_the_canaries_are_where_they_would_be_found(tmp_path):
    """The search finds a canary in each of the places that it looks at, and the study is a usable one."""
    write_canaries(tmp_path / "scans", 1)
    raw = b"".join(path.read_bytes() for path in (tmp_path / "scans").rglob("*.dcm"))
    assert all(
        canary.encode() in raw for canary in ("CANARY private", "CANARY overlay", "CANARY nested", DATE, UID_ROOT)
    )
    prepare(tmp_path / "scans", tmp_path / "cases", "dicom", key=bytes(32))
    assert len(load_cases(tmp_path / "cases")) == 1
    packed = tmp_path / "found" / "x.npz"
    packed.parent.mkdir()
    np.savez_compressed(packed, name=np.array(["x" * 40, "CANARY"]).astype("S40"))
    with pytest.raises(AssertionError):
        assert_silent(b"", packed.parent)
    packed.unlink()
    (packed.parent / "page.html").write_bytes(b"base64," + base64.b64encode(b".. CANARY"))
    with pytest.raises(AssertionError):
        assert_silent(b"", packed.parent)


@pytest.mark.slow
def test_good_odd_and_damaged_dicom_says_no_name(tmp_path, out):
    scans = tmp_path / "scans"
    write_canaries(scans, 1)
    odd = write_canaries(scans, 2, masks=False, Manufacturer="CANARY Inc.", ImageType=["CANARY"], PatientSex="CANARY")
    for path in odd.glob("*.dcm"):
        path.write_bytes(path.read_bytes().replace(b"ISO_IR 192", b"CANARY 192"))
    write_canaries(scans, 3, skip=[(2, 3)])
    write_canaries(scans, 4, BurnedInAnnotation="YES")
    write_canaries(scans, 5, masks=False, PatientID="")
    write_canaries(scans, 6, masks=False, PatientID=lambda z, t: f"CANARY-{z}")
    write_canaries(scans, 7, masks=False, PatientID="カナリア", PatientName="カナリア")
    write_enhanced(scans / "CANARY-8" / "CANARY.dcm", StudyInstanceUID=f"{UID_ROOT}.8", PatientID="CANARY-8", **WORDS)
    # Numbers that are none: libraries like to quote them.
    own = write_canaries(scans, 9, masks=False, InstanceNumber="88888888")
    for path in own.glob("*.dcm"):
        path.write_bytes(path.read_bytes().replace(b"88888888", b"CANARY99"))
    rng = random.Random(5)
    originals = [path.read_bytes() for path in sorted((scans / "CANARY-1^Jane").rglob("*.dcm"))[:12]]
    for number in range(150):
        (scans / f"CANARY-{number}.dcm").write_bytes(damage(rng.choice(originals), originals, rng))
    shutil.copytree(own, scans / "CANARY-copy")
    (scans / "CANARY.txt").write_text("CANARY")
    (scans / "CANARY-link").symlink_to(scans / "CANARY.txt")
    os.mkfifo(scans / "CANARY-fifo")
    printed = run("prepare", "--format", "dicom", scans, out / "cases", "--num-processes", 2, folder=out)
    assert b"mixed-patients" in printed and b"burned-in-annotation" in printed and b"duplicate" in printed
    assert len(load_cases(out / "cases")) >= 4
    printed += run("check", out / "cases", folder=out)
    printed += run("check", "--json", out / "cases", folder=out)
    assert (out / "cases" / "check.html").exists()
    assert_silent(printed, out)


def test_nothing_usable_is_an_error_without_names(tmp_path, out, call):
    write_canaries(tmp_path / "scans", 1, skip=[(1, 1)])
    printed = call("prepare", "--format", "dicom", tmp_path / "scans", out / "cases")
    assert b"uneven-phases" in printed
    assert_silent(printed, out)


def write_phases(folder: Path, names: dict[str, tuple[int, bool]], relabel=(0, 1, 2, 3)) -> None:
    """Marked NIfTI files of the beating heart: by name the phase, and whether it is the mask."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = beating_heart()
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ np.column_stack(
        [COLUMN_AXIS * PIXEL_MM, ROW_AXIS * PIXEL_MM, NORMAL * SLICE_MM]
    )
    for name, (phase, is_mask) in names.items():
        array = np.array(relabel, np.uint8)[labels[phase]] if is_mask else images[phase]
        nibabel.save(nibabel.Nifti1Image(array.T.copy(), affine), folder / name)
        mark_nifti(folder / name)


def write_table(path: Path, *rows: list[object]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def pair(name: str, ed: str, es: str, gt: str = "_gt") -> dict[str, tuple[int, bool]]:
    return {
        f"{name}{phase}{mask}.nii.gz": (number, bool(mask)) for phase, number in ((ed, 0), (es, 4)) for mask in ("", gt)
    }


def write_layout(layout: str, scans: Path) -> list[str]:
    """Two patients, the second of them damaged; returns further options."""
    if layout == "acdc":
        for name in ("patient770", "patient707"):
            write_phases(scans / name, pair(name, "_frame01", "_frame05"))
            (scans / name / "Info.cfg").write_text("Group: CANARY\nName: CANARY\n")
        broken = scans / "patient707" / "patient707_frame01.nii.gz"
    elif layout == "mnms2":
        for name in ("770", "707"):
            write_phases(scans / name, pair(f"{name}_SA", "_ED", "_ES"), relabel=(0, 3, 2, 1))
        header = ["SUBJECT_CODE", "DISEASE", "VENDOR", "SCANNER", "FIELD", "CANARY"]
        rows = ([code, "CANARY", "CANARY Siemens", "CANARY", "1.5", NAME] for code in ("770", "707"))
        write_table(scans / "dataset_information.csv", header, *rows)
        broken = scans / "707" / "707_SA_ED.nii.gz"
    else:
        names = ("CANARY-a", "CANARY-b")
        for name in names:
            write_phases(scans / "frames", {f"{name}_ed.nii.gz": (0, False), f"{name}_es.nii.gz": (4, False)})
            write_phases(scans / "masks", {f"{name}_ed.nii.gz": (0, True), f"{name}_es.nii.gz": (4, True)})
        write_table(
            scans / "cases.csv",
            ["name", "patient", "vendor", "CANARY"],
            *([name, f"{name}-id", "GE", NAME] for name in names),
        )
        broken = scans / "frames" / "CANARY-b_ed.nii.gz"
    broken.write_bytes(broken.read_bytes()[:900])
    return ["--labels", "rv=1,myo=2,lv=3"] if layout == "plain" else []


@pytest.mark.parametrize("layout", ["acdc", "mnms2", "plain"])
def test_nifti_layouts_say_no_name(tmp_path, out, call, layout):
    scans = tmp_path / "scans"
    options = write_layout(layout, scans)
    printed = call("prepare", "--format", layout, *options, scans, out / "cases", "--num-processes", 1)
    assert b"unreadable-nifti" in printed
    assert len(load_cases(out / "cases")) == 1
    printed += call("check", out / "cases")
    assert_silent(printed, out)
    assert not any(number in printed for number in (b"770", b"707"))


@pytest.mark.slow
def test_names_that_are_no_text_are_patients_like_others(tmp_path, out, call):
    names = [os.fsdecode(name) for name in (b"CANARY-\xff", b"CANARY-\xfe")]
    for name in names:
        write_phases(tmp_path / "scans" / "frames", {f"{name}_ed.nii.gz": (0, False), f"{name}_es.nii.gz": (4, False)})
    printed = call("prepare", "--format", "plain", tmp_path / "scans", out / "cases", "--num-processes", 1)
    assert len({case.info.group for case in load_cases(out / "cases")}) == 2
    assert_silent(printed, out)


@pytest.mark.parametrize(
    "rows",
    [
        [["patient", "ef_percent"], ["CANARY-1", "CANARY"]],
        [["patient", "ef_percent"], ["CANARY-1", "=CANARY()"]],
        [["patient", "ef_percent"], ["CANARY-1", "55"], ["CANARY-1", "56"]],
        [["patient", "ef_percent", "CANARY"], ["CANARY-1", "770707"]],
        [["patient", "CANARY"], ["CANARY-1", "55"]],
    ],
    ids=["text", "formula", "twice", "out of range", "no column"],
)
def test_a_faulty_table_is_named_by_line_and_never_by_value(tmp_path, out, call, rows):
    write_study(tmp_path / "scans", patient="CANARY-1", study=UID_ROOT, masks=False)
    write_table(tmp_path / "table.csv", *rows)
    arguments = [
        "prepare",
        "--format",
        "dicom",
        "--ef-table",
        tmp_path / "table.csv",
        tmp_path / "scans",
        out / "cases",
    ]
    printed = call(*arguments)
    assert re.search(rb"table\.csv\s+line", printed)
    assert_silent(printed, out)
