"""Folders of NIfTI files as people have them: links, twins, capitals, unpacked files; and headers that say half."""

import csv
import gzip
import struct
import unicodedata
from collections import Counter

import nibabel
import numpy as np
import pytest

from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.layouts.acdc import find_acdc, read_acdc
from fedcmr.client.ingest.layouts.ef_table import read_ef_table, with_ejection_fractions
from fedcmr.client.ingest.layouts.layout import SHORT_AXIS
from fedcmr.client.ingest.layouts.mnms import find_mnms, read_mnms
from fedcmr.client.ingest.layouts.mnms2 import find_mnms2
from fedcmr.client.ingest.layouts.nifti import read_nifti
from fedcmr.client.ingest.layouts.plain import find_plain
from fedcmr.client.ingest.layouts.tables import whole_number
from fedcmr.client.ingest.normalise import orient
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.shared.errors import UserError
from tests.client.ingest.layouts.test_labels import (
    AFFINE,
    KEY,
    LABELS,
    beat,
    heart,
    write_csv,
    write_mnms2,
    write_nifti,
    write_plain,
)
from tests.client.ingest.test_prepare import write_acdc

MAC_TWIN = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(82)
THEIRS = np.array([0, 3, 2, 1], np.uint8)
"""Labels of M&Ms, which count from the left ventricle."""


def write_mnms(root, codes, suffix=".nii.gz", affine=AFFINE) -> None:
    for seed, code in enumerate(codes):
        images, labels = beat(seed)
        labels[[1, 3, 4, 5]] = 0
        write_nifti(root / code / f"{code}_sa{suffix}", images.T, affine)
        write_nifti(root / code / f"{code}_sa_gt{suffix}", THEIRS[labels].T, affine)


def write_table(root, rows, delimiter=",", name="information.csv") -> None:
    write_csv(root / name, [["External code", "VendorName", "ED", "ES"], *rows], delimiter)


def stored(path) -> np.ndarray:
    """A file's array, which stays what it was when the file is written again."""
    return np.asarray(nibabel.load(path, mmap=False).dataobj)


def only(found) -> Cine:
    (study,) = found.studies
    return study.read()


def equal(one: Cine, other: Cine) -> bool:
    return np.array_equal(orient(one).images, orient(other).images) and np.array_equal(
        orient(one).masks, orient(other).masks
    )


# files


def test_linked_files_are_read_in_every_layout(tmp_path):
    write_plain(tmp_path / "store", ["A", "B"])
    write_acdc(tmp_path / "store", [1])
    write_mnms(tmp_path / "store", ["C1"])
    write_mnms2(tmp_path / "store", ["001"])
    for name in ("plain/frames", "plain/masks", "acdc/patient001", "mnms/C1", "mnms2/001"):
        (tmp_path / name).mkdir(parents=True)
    for kind in ("frames", "masks"):
        for name in ("A", "B"):
            (tmp_path / "plain" / kind / f"{name}.nii.gz").symlink_to(tmp_path / "store" / kind / f"{name}.nii.gz")
    for name, source in (("acdc", "patient001"), ("mnms", "C1"), ("mnms2", "dataset/001")):
        for file in (tmp_path / "store" / source).iterdir():
            (tmp_path / name / source.split("/")[-1] / file.name).symlink_to(file)
    write_table(tmp_path / "mnms", [["C1", "GE", 0, 2]])
    write_csv(tmp_path / "mnms2" / "dataset_information.csv", [["SUBJECT_CODE", "VENDOR", "FIELD"], [1, "GE", "1,5"]])
    assert len(find_plain(tmp_path / "plain", LABELS).studies) == 2
    for study in (
        *find_plain(tmp_path / "plain", LABELS).studies,
        *find_acdc(tmp_path / "acdc").studies,
        *find_mnms(tmp_path / "mnms").studies,
    ):
        assert study.read().masks.any()
    assert only(find_mnms2(tmp_path / "mnms2")).field_strength_t == 1.5


def test_a_link_that_leads_nowhere_is_counted(tmp_path):
    write_plain(tmp_path, ["A"])
    (tmp_path / "frames" / "B.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    found = find_plain(tmp_path, LABELS)
    assert (len(found.studies), found.left_out) == (1, {"no-regular-file": 1})


def test_twins_of_a_mac_are_no_scans(tmp_path):
    write_plain(tmp_path / "plain", ["A"])
    write_acdc(tmp_path / "acdc", [1])
    write_mnms(tmp_path / "mnms", ["C1"])
    write_table(tmp_path / "mnms", [["C1", "GE", 0, 2]])
    (tmp_path / "mnms" / "._information.csv").write_bytes(MAC_TWIN)
    for path in list(tmp_path.rglob("*.nii.gz")):
        path.with_name(f"._{path.name}").write_bytes(MAC_TWIN)
    extra = tmp_path / "acdc" / "__MACOSX" / "patient001"
    extra.mkdir(parents=True)
    (extra / "._patient001_frame01.nii.gz").write_bytes(MAC_TWIN)
    for found, count in (
        (find_plain(tmp_path / "plain", LABELS), 2),
        (find_acdc(tmp_path / "acdc"), 5),
        (find_mnms(tmp_path / "mnms"), 3),
    ):
        assert (len(found.studies), found.refused, found.left_out) == (1, {}, {"system-file": count})
        assert found.studies[0].read().masks.any()


def test_unpacked_files_and_suffixes_in_capitals_are_read_in_every_layout(tmp_path):
    write_plain(tmp_path / "plain", ["A"], suffix=".nii")
    write_acdc(tmp_path / "acdc", [1])
    write_mnms(tmp_path / "mnms", ["C1"], suffix=".nii")
    write_mnms2(tmp_path / "mnms2", ["001"])
    write_table(tmp_path / "mnms", [["c1", "GE", 0, 2]], name="Information.CSV")
    write_csv(tmp_path / "mnms2" / "dataset_information.csv", [["SUBJECT_CODE", "VENDOR", "FIELD"], ["1.0", "GE", 3]])
    expected = only(find_acdc(tmp_path / "acdc"))
    for path in [*(tmp_path / "acdc").rglob("*.gz"), *(tmp_path / "mnms2").rglob("*.gz")]:
        path.with_name(path.name.removesuffix(".nii.gz") + ".NII").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    (tmp_path / "acdc" / "patient001").rename(tmp_path / "acdc" / "Patient001")
    for path in list((tmp_path / "plain").rglob("*.nii")):
        path.rename(path.with_suffix(".NII"))
    assert equal(only(find_acdc(tmp_path / "acdc")), expected)
    assert only(find_plain(tmp_path / "plain", LABELS)).masks.any()
    assert only(find_mnms(tmp_path / "mnms")).masks.any()
    assert only(find_mnms2(tmp_path / "mnms2")).field_strength_t == 3.0


def test_a_name_that_does_not_say_whether_its_content_is_packed_is_read_by_content(tmp_path):
    images = beat()[0]
    write_nifti(tmp_path / "a.nii.gz", images.T)
    (tmp_path / "unpacked.nii.gz").write_bytes(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    (tmp_path / "packed.nii").write_bytes((tmp_path / "a.nii.gz").read_bytes())
    nibabel.save(nibabel.Nifti2Image(images.T, AFFINE), tmp_path / "second.nii")
    for name in ("unpacked.nii.gz", "packed.nii", "second.nii"):
        assert np.array_equal(read_nifti(tmp_path / name).array, images.T)


def test_files_in_folders_below_are_found_and_other_files_counted(tmp_path):
    write_plain(tmp_path / "flat", ["A"])
    for number, place in enumerate(("one", "two")):
        images, labels = beat(number)
        write_nifti(tmp_path / "deep" / "Frames" / place / "cine.nii.gz", images.T)
        write_nifti(tmp_path / "deep" / "Masks" / place / "cine.nii.gz", labels.T)
    for kind in ("frames", "masks"):
        (tmp_path / "flat" / kind / "siemens").mkdir()
        (tmp_path / "flat" / kind / "A.nii.gz").rename(tmp_path / "flat" / kind / "siemens" / "A.nii.gz")
    (tmp_path / "flat" / "frames" / "A.json").write_text("{}")
    (tmp_path / "flat" / "frames" / "B.nii.gz.zip").touch()
    found = find_plain(tmp_path / "flat", LABELS)
    assert (len(found.studies), found.left_out) == (1, {"other-file": 1, "archive": 1})
    assert found.studies[0].study == "A"
    deep = find_plain(tmp_path / "deep", LABELS)
    assert [study.study for study in deep.studies] == ["one/cine", "two/cine"]
    assert all(study.read().masks.any() for study in deep.studies)


def test_two_folders_of_one_patient_are_one_if_equal_and_refused_if_not(tmp_path):
    write_mnms(tmp_path, ["C1"])
    write_table(tmp_path, [["C1", "GE", 0, 2]])
    copy = tmp_path / "copy" / "C1_sa.nii.gz"
    copy.parent.mkdir()
    copy.write_bytes((tmp_path / "C1" / "C1_sa.nii.gz").read_bytes())
    found = find_mnms(tmp_path)
    assert (len(found.studies), found.left_out) == (1, {"duplicate": 1})
    write_nifti(copy, beat(7)[0].T)
    found = find_mnms(tmp_path)
    assert (found.studies, found.refused) == ([], {"same-name": 1, "missing-file": 1})
    write_acdc(tmp_path / "a", [1])
    write_acdc(tmp_path / "a" / "again", [1])
    assert find_acdc(tmp_path / "a").refused == {"same-name": 1}


def test_letters_written_apart_are_the_same_name(tmp_path):
    apart, together = (unicodedata.normalize(form, "P-Müller-01") for form in ("NFD", "NFC"))
    write_plain(tmp_path, [apart], masks=False)
    labels = beat()[1]
    write_nifti(tmp_path / "masks" / f"{together}.nii.gz", labels.T)
    write_csv(tmp_path / "cases.csv", [["name", "vendor"], [together, "Siemens"]])
    found = find_plain(tmp_path, LABELS)
    assert (len(found.studies), found.refused, found.left_out) == (1, {}, {})
    assert found.studies[0].read().masks.any()
    (tmp_path / "cases.csv").unlink()
    write_csv(tmp_path / "efs.csv", [["patient", "ef_percent"], [together, 41]])
    (study,) = with_ejection_fractions(find_plain(tmp_path, LABELS).studies, read_ef_table(tmp_path / "efs.csv"))
    assert study.read().ef == 0.41


def test_a_folder_without_frames_says_what_lies_there(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "1234567_20209_2_0.zip").touch()
    with pytest.raises(UserError, match=r"archive 1: archives .*unpack"):
        prepare(tmp_path / "scans", tmp_path / "out", "plain", labels=LABELS, key=KEY)
    with pytest.raises(UserError, match=r"archive 1: archives .*unpack"):
        prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=KEY)


# tables


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5", 5),
        ("5.0", 5),
        ("0.00", 0),
        (" 7,0 ", 7),
        ("5.", 5),
        ("5.5", None),
        ("", None),
        ("-1", None),
        ("1e3", None),
    ],
)
def test_a_whole_number_may_be_written_with_a_fraction_of_zero(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("marked", [False, True])
def test_the_mnms_table_may_come_from_any_program(tmp_path, delimiter, marked):
    write_mnms(tmp_path, ["C1", "C2"])
    write_table(tmp_path, [["C1", "GE", "0.0", "2.0"], ["C2", "Philips", 0, 2], ["C3", "GE", "", ""]], delimiter)
    if marked:
        path = tmp_path / "information.csv"
        path.write_text(f"sep={delimiter}\r\n{path.read_text()}", encoding="utf-8-sig")
    found = find_mnms(tmp_path)
    assert (len(found.studies), found.refused) == (2, {"no-phases-in-table": 1})
    assert {study.read().vendor for study in found.studies} == {"GE", "Philips"}


def test_a_table_without_a_column_is_told_by_its_name(tmp_path):
    write_mnms(tmp_path, ["C1"])
    with (tmp_path / "information.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["External code", "VendorName", "ED"], ["C1", "GE", 0]])
    with pytest.raises(UserError, match=r"information.csv line 1: expected a column ES"):
        find_mnms(tmp_path)


# headers


def _turned(array):
    """The same volume with its slices first, as tools write it that bring a file close to RAS+."""
    return nibabel.Nifti1Image(array, AFFINE).as_reoriented(np.array([[1, 1], [2, -1], [0, -1]]))


def test_axes_in_any_order_give_the_same_case_in_every_layout_whose_header_knows_them(tmp_path):
    images, labels = beat()
    labels[[1, 3, 4, 5]] = 0
    for name, turned in (("as scanned", False), ("turned", True)):
        for kind, array in (("frames", images), ("masks", labels)):
            path = tmp_path / name / kind / "A.nii.gz"
            write_nifti(path, array.T)
            if turned:
                nibabel.save(_turned(array.T), path)
        for code, array in (("C1_sa", images), ("C1_sa_gt", THEIRS[labels])):
            path = tmp_path / name / "C1" / f"{code}.nii.gz"
            write_nifti(path, array.T)
            if turned:
                nibabel.save(_turned(array.T), path)
    assert nibabel.load(tmp_path / "turned" / "C1" / "C1_sa.nii.gz").shape != images.T.shape
    one, other = (only(find_plain(tmp_path / name, LABELS)) for name in ("as scanned", "turned"))
    assert equal(one, other)
    one, other = (read_mnms(tmp_path / name / "C1" / "C1_sa.nii.gz", "GE", (0, 2)) for name in ("as scanned", "turned"))
    assert equal(one, other)


def test_a_mask_that_was_turned_since_is_laid_on_its_image_by_its_header(tmp_path):
    write_plain(tmp_path, ["A"])
    expected = only(find_plain(tmp_path, LABELS))
    write_mnms(tmp_path / "mnms", ["C1"])
    path = tmp_path / "mnms" / "C1" / "C1_sa.nii.gz"
    known = read_mnms(path, "GE", (0, 2))
    for mask in (tmp_path / "masks" / "A.nii.gz", path.with_name("C1_sa_gt.nii.gz")):
        nibabel.save(_turned(stored(mask)), mask)
    assert np.array_equal(only(find_plain(tmp_path, LABELS)).masks, expected.masks)
    assert np.array_equal(read_mnms(path, "GE", (0, 2)).masks, known.masks)


def test_slices_along_the_first_axis_of_a_header_without_orientation_are_found_by_their_distance(tmp_path):
    image, _ = heart(0.0)
    write_nifti(tmp_path / "a.nii", np.moveaxis(image.T, 2, 0), np.diag([9.0, 1.5, 1.5, 1.0]))
    assert np.array_equal(read_nifti(tmp_path / "a.nii").array, image.T)


def test_axes_of_one_are_dropped(tmp_path):
    images, labels = beat()
    labels[[1, 3, 4, 5]] = 0
    for kind, array in (("frames", images), ("masks", labels)):
        write_nifti(tmp_path / kind / "A.nii.gz", array.T[..., None])
        write_nifti(tmp_path / kind / "B.nii.gz", array.T[:, :, :, None, :])
        for phase, t in (("ed", 0), ("es", 2)):
            write_nifti(tmp_path / kind / f"C_{phase}.nii.gz", array[t].T[..., None])
    cines = [study.read() for study in find_plain(tmp_path, LABELS).studies]
    assert [cine.images.shape for cine in cines] == [images.shape, images.shape, images[:2].shape]
    assert equal(cines[0], cines[1])
    write_acdc(tmp_path, [1])
    for path in (tmp_path / "patient001").iterdir():
        nibabel.save(nibabel.Nifti1Image(stored(path)[..., None], nibabel.load(path).affine), path)
    assert read_acdc(tmp_path / "patient001").masks.any()


@pytest.mark.parametrize("shape", [(20, 20), (20, 20, 4, 6, 3), (0, 20, 4)])
def test_what_is_neither_stack_nor_cine_says_so(tmp_path, shape):
    write_nifti(tmp_path / "a.nii", np.zeros(shape, np.int16))
    with pytest.raises(Unusable, match=r"not-a-stack|unreadable-nifti"):
        read_nifti(tmp_path / "a.nii")


def test_labels_with_a_slope_are_whole_numbers_and_others_are_none(tmp_path):
    write_plain(tmp_path, ["A"])
    expected = only(find_plain(tmp_path, LABELS)).masks
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    path = tmp_path / "masks" / "A.nii.gz"
    whole = stored(path)
    nibabel.save(nibabel.Nifti1Image(whole.astype(float), AFFINE, header), path)
    assert set(np.unique(nibabel.load(path).get_fdata())) != {0.0, 1.0, 2.0, 3.0}
    assert np.array_equal(only(find_plain(tmp_path, LABELS)).masks, expected)
    write_nifti(path, whole + np.float32(0.2))
    with pytest.raises(Unusable, match="masks-implausible"):
        only(find_plain(tmp_path, LABELS))


def test_nan_outside_the_field_of_view_is_dark_and_not_labelled(tmp_path):
    write_plain(tmp_path, ["A"])
    expected = only(find_plain(tmp_path, LABELS))
    for kind in ("frames", "masks"):
        path = tmp_path / kind / "A.nii.gz"
        array = stored(path).astype(np.float32)
        array[:4] = np.nan
        array[4, :2] = np.inf
        write_nifti(path, array)
    found = only(find_plain(tmp_path, LABELS))
    assert np.array_equal(found.images[..., 5:], expected.images[..., 5:])
    assert (found.images[..., :4] == found.images.min()).all()
    assert np.array_equal(found.masks, expected.masks)
    write_nifti(tmp_path / "frames" / "A.nii.gz", np.full(array.shape, np.nan, np.float32))
    with pytest.raises(Unusable, match="not-finite"):
        only(find_plain(tmp_path, LABELS))


def _with_header(path, change) -> None:
    """Change the 348 bytes of a NIfTI-1 header that is stored little endian and unpacked."""
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


def _no_slice_step(raw: bytearray) -> None:
    for row in range(3):  # the third column of srow_x, srow_y and srow_z (bytes 280 to 327)
        raw[280 + 16 * row + 8 : 280 + 16 * row + 12] = bytes(4)


def _nan_quaternion(raw: bytearray) -> None:
    raw[256:260] = struct.pack("<f", 1.5)  # quatern_b: with it no rotation


def _plain_sform(raw: bytearray) -> None:
    raw[280:328] = struct.pack("<12f", 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)


@pytest.mark.parametrize("damage", [_no_slice_step, _nan_quaternion, _plain_sform])
def test_of_sform_and_qform_the_one_that_can_be_is_taken(tmp_path, damage):
    write_plain(tmp_path, ["A"], suffix=".nii")
    expected = only(find_plain(tmp_path, LABELS))
    for kind in ("frames", "masks"):
        path = tmp_path / kind / "A.nii"
        image = nibabel.load(path, mmap=False)
        image.set_qform(AFFINE, 1)
        nibabel.save(image, path)
        _with_header(path, damage)
    found = only(find_plain(tmp_path, LABELS))
    assert found.spacing_mm == pytest.approx(expected.spacing_mm)
    assert found.axes == pytest.approx(expected.axes, abs=1e-5)
    assert equal(found, expected)


def test_a_header_that_knows_no_axes_is_told_and_may_be_helped(tmp_path):
    write_plain(tmp_path, ["A", "B"], suffix=".nii")
    affine = np.diag([1.5, 1.5, 9.0, 1.0])
    for kind in ("frames", "masks"):
        write_nifti(tmp_path / kind / "A.nii", stored(tmp_path / kind / "A.nii"), affine)
        path = tmp_path / kind / "B.nii"
        _with_header(path, lambda raw: raw.__setitem__(slice(252, 256), bytes(4)))  # qform_code, sform_code
    codes = []
    for study in find_plain(tmp_path, LABELS).studies:
        with pytest.raises(Unusable) as error:
            study.read()
        codes.append(error.value.code)
    assert codes == ["not-short-axis", "no-orientation"]
    for study in find_plain(tmp_path, LABELS, SHORT_AXIS).studies:
        cine = study.read()
        assert cine.axes is None and cine.spacing_mm == pytest.approx((9.0, 1.5, 1.5))
        assert cine.masks.any()


def test_masks_that_lost_their_orientation_are_taken_as_they_lie_only_where_somebody_knows(tmp_path):
    write_plain(tmp_path, ["A"])
    expected = only(find_plain(tmp_path, LABELS)).masks
    path = tmp_path / "masks" / "A.nii.gz"
    write_nifti(path, stored(path), np.eye(4))
    with pytest.raises(Unusable, match="masks-misaligned"):
        only(find_plain(tmp_path, LABELS))
    assert np.array_equal(only(find_plain(tmp_path, LABELS, SHORT_AXIS)).masks, expected)


def test_a_header_without_voxel_sizes_says_so(tmp_path):
    write_nifti(tmp_path / "a.nii", beat()[0].T)

    def forget(raw: bytearray) -> None:
        raw[252:256] = bytes(4)
        raw[80:92] = struct.pack("<3f", np.nan, 1.5, 9.0)

    _with_header(tmp_path / "a.nii", forget)
    with pytest.raises(Unusable, match="no-voxel-size"):
        read_nifti(tmp_path / "a.nii")


def test_counts_of_what_is_passed_over_reach_the_summary(tmp_path):
    write_plain(tmp_path / "scans", ["A"])
    (tmp_path / "scans" / "frames" / "._A.nii.gz").write_bytes(MAC_TWIN)
    summary = prepare(tmp_path / "scans", tmp_path / "out", "plain", labels=LABELS, key=KEY)
    assert Counter(summary.left_out) == {"system-file": 1}


def test_a_header_with_a_negative_number_of_axes_is_no_stack(tmp_path):
    """Found by the fuzzer."""
    content = bytearray(nibabel.Nifti2Image(beat()[0].T, AFFINE).to_bytes())
    content[16:24] = (-1).to_bytes(8, "little", signed=True)
    (tmp_path / "one.nii").write_bytes(content)
    with pytest.raises(Unusable, match="not-a-stack"):
        read_nifti(tmp_path / "one.nii")
