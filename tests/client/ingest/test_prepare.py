"""The loop, the NIfTI layouts and the normal form, on volumes written here."""

import csv
import json
import stat
from functools import partial
from itertools import islice

import nibabel
import numpy as np
import pytest

from fedcmr.client.check.folder import check
from fedcmr.client.cli import main
from fedcmr.client.deidentify import KEY_NAME, pseudonym, read_key, read_or_make_key
from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.layouts.acdc import read_acdc
from fedcmr.client.ingest.layouts.mnms import read_mnms
from fedcmr.client.ingest.normalise import normalise, orient
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.reasons import REASONS, Unusable
from fedcmr.shared.case import CASE_PIXEL_MM, CASE_SIZE, LV, NOT_DRAWN, RV, load_cases, read_index
from fedcmr.shared.errors import UserError
from tests.client.ingest.test_burned_in import slanted

KEY = bytes(range(32))


def heart(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of ED and ES, shape (2, 4, size, size), base to apex, right ventricle at the upper left."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    row, column = size / 2 + rng.uniform(-4, 4, 2)
    masks = np.zeros((2, 4, size, size), np.uint8)
    for phase, z in np.ndindex(2, 4):
        cavity = (12 - 2 * z) * (1 - 0.3 * phase) + rng.uniform(0, 1)
        masks[phase, z, np.hypot(rows - row + 12, columns - column + 14) < 10 - z] = 1
        masks[phase, z, np.hypot(rows - row, columns - column) < cavity + 4] = 2
        masks[phase, z, np.hypot(rows - row, columns - column) < cavity] = 3
    return np.array([20, 180, 60, 200])[masks] + rng.integers(0, 20, masks.shape), masks


def write_nifti(path, array, spacing=(1.5, 1.5, 10.0)) -> None:
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


def write_acdc(root, numbers, size=110) -> None:
    for number in numbers:
        folder = root / f"patient{number:03d}"
        folder.mkdir(parents=True)
        images, masks = heart(size, number)
        # The larger ventricle comes second: the frames' numbers do not say which is end-diastole.
        for frame, phase in ((1, 1), (12, 0)):
            write_nifti(folder / f"patient{number:03d}_frame{frame:02d}.nii.gz", images[phase].T.astype(np.uint8))
            write_nifti(folder / f"patient{number:03d}_frame{frame:02d}_gt.nii.gz", masks[phase].T)


def loop_ef(masks) -> float:
    volumes = [sum(int(label == 3) for label in phase.ravel().tolist()) for phase in masks]
    return 1 - min(volumes) / max(volumes)


def test_acdc_patients_become_cases_with_the_ejection_fraction_of_a_plain_loop(tmp_path):
    write_acdc(tmp_path / "scans", [1, 2, 3])
    summary = prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY)
    assert (summary.num_cases, summary.num_new, summary.refused) == (3, 3, {})
    cases = {case.info.group: case for case in load_cases(tmp_path / "out")}
    for number in (1, 2, 3):
        info = cases[pseudonym(KEY, f"{number:03d}")].info
        assert info.ef == pytest.approx(loop_ef(heart(110, number)[1]), abs=1e-5)
        assert (info.vendor, np.isnan(info.field_strength_t)) == ("Siemens", True)
    assert check(tmp_path / "out").num_labelled == 3


def test_folds_keep_the_patients_of_the_fixed_split(tmp_path):
    write_acdc(tmp_path / "scans", [1, 2, 6, 7, 13])
    prepare(tmp_path / "scans", tmp_path / "out", "acdc", folds=[1], key=KEY)
    assert {i.group for i in read_index(tmp_path / "out")} == {pseudonym(KEY, "002"), pseudonym(KEY, "007")}


def test_mnms_counts_labels_from_the_left_ventricle_and_takes_the_vendor_of_its_csv(tmp_path):
    images, masks = heart(110)
    cine = np.stack([images[0], images[0], images[1]])
    labels = np.stack([masks[0], masks[0] * 0, masks[1]])
    folder = tmp_path / "scans" / "training" / "A1"
    folder.mkdir(parents=True)
    write_nifti(folder / "A1_sa.nii.gz", cine.T.astype(np.int16))
    write_nifti(folder / "A1_sa_gt.nii.gz", np.array([0, 3, 2, 1], np.uint8)[labels].T)
    with (tmp_path / "scans" / "table.csv").open("w", newline="") as file:
        rows = [
            ["", "External code", "VendorName", "ED", "ES"],
            [0, "A1", "GE", 0, 2],
            [1, "B2", "Philips", 0, 1],
            [2, "A1", "GE", 0, 2],
            [3, "C3", "GE", 0, 2],
            [4, "C3", "GE", 0, 1],
        ]
        csv.writer(file).writerows(rows)
    summary = prepare(tmp_path / "scans", tmp_path / "out", "mnms", key=KEY)
    (case,) = load_cases(tmp_path / "out")
    assert case.info.vendor == "GE"
    assert case.info.ef == pytest.approx(loop_ef(masks), abs=1e-5)
    assert case.frames[case.masks == LV].mean() > case.frames[case.masks == RV].mean() > 0.7
    assert summary.refused == {"missing-file": 1, "conflicting-rows": 1}
    with pytest.raises(Unusable, match="masks-differ"):
        read_mnms(folder / "A1_sa.nii.gz", "GE", (0, 3))


def test_mnms_without_its_csv_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="expected one CSV"):
        write_acdc(tmp_path / "scans", [1])
        prepare(tmp_path / "scans", tmp_path / "out", "mnms", key=KEY)


@pytest.mark.parametrize(
    ("reason", "damage"),
    [
        ("missing-file", lambda f: (f / "patient002_frame01_gt.nii.gz").unlink()),
        ("missing-file", lambda f: (f / "patient002_frame01.nii.gz").unlink()),
        ("unreadable-nifti", lambda f: (f / "patient002_frame01.nii.gz").write_bytes(b"\x1f\x8bnothing")),
        (
            "unreadable-nifti",
            lambda f: (f / "patient002_frame01.nii.gz").write_bytes(
                (f / "patient002_frame01.nii.gz").read_bytes()[:2000]
            ),
        ),
        ("masks-differ", lambda f: write_nifti(f / "patient002_frame01_gt.nii.gz", np.ones((5, 5, 5), np.uint8))),
        ("masks-implausible", lambda f: write_nifti(f / "patient002_frame01_gt.nii.gz", np.full((110, 110, 4), 7.5))),
        (
            "masks-implausible",
            lambda f: [
                write_nifti(f / f"patient002_frame{n}_gt.nii.gz", np.zeros((110, 110, 4), np.uint8))
                for n in ("01", "12")
            ],
        ),
    ],
)
def test_a_damaged_patient_is_counted_and_the_others_go_on(tmp_path, reason, damage):
    write_acdc(tmp_path / "scans", [1, 2])
    damage(tmp_path / "scans" / "patient002")
    summary = prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY)
    assert (summary.num_cases, summary.refused) == (1, {reason: 1})
    assert json.loads((tmp_path / "out" / "refused.json").read_text()) == {
        "studies": {reason: 1},
        "left_out": {},
        "warnings": {},
    }


def test_no_usable_patient_is_one_line_with_counts_and_no_names(tmp_path):
    write_acdc(tmp_path / "scans", [2])
    (tmp_path / "scans" / "patient002" / "patient002_frame01_gt.nii.gz").unlink()
    with pytest.raises(
        UserError, match=r"no usable acdc patient \(missing-file 1: a frame, a mask .* copy it again\)"
    ) as error:
        prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY)
    assert "patient002" not in str(error.value)


def test_a_readers_own_exception_becomes_a_code(tmp_path, monkeypatch):
    broken = Study("1", "1", partial(int, "patient Jane Doe"))
    with pytest.raises(ValueError, match="Jane"):
        broken.read()
    monkeypatch.setattr("fedcmr.client.ingest.layouts.acdc.find_acdc", lambda source, folds: Findings([broken]))
    (tmp_path / "scans").mkdir()
    with pytest.raises(UserError, match="unexpected-error 1") as error:
        prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY)
    assert "Jane" not in str(error.value)
    assert error.value.__cause__ is None


def test_an_interrupted_call_goes_on_and_does_no_work_twice(tmp_path, monkeypatch):
    write_acdc(tmp_path / "scans", [1, 2, 3])

    def until_third(results, description, total):
        yield from islice(results, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr("fedcmr.client.ingest.prepare.track", until_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "scans", tmp_path / "out", "acdc")
    monkeypatch.undo()
    names = [info.pseudonym for info in read_index(tmp_path / "out")]
    written = [(tmp_path / "out" / "cases" / f"{name}.npz").stat().st_mtime_ns for name in names]
    assert len(names) == 2
    summary = prepare(tmp_path / "scans", tmp_path / "out", "acdc")
    assert (summary.num_cases, summary.num_new) == (3, 1)
    assert written == [(tmp_path / "out" / "cases" / f"{name}.npz").stat().st_mtime_ns for name in names]
    details = json.loads((tmp_path / "out" / "details.json").read_text())
    assert sorted(details) == [info.pseudonym for info in read_index(tmp_path / "out")]


def test_worker_processes_give_the_same_cases(tmp_path):
    write_acdc(tmp_path / "scans", [1, 2, 3], size=64)
    for count in (1, 2):
        prepare(tmp_path / "scans", tmp_path / f"out{count}", "acdc", key=KEY, num_processes=count)
    one, two = (load_cases(tmp_path / f"out{count}") for count in (1, 2))
    assert [case.info.pseudonym for case in one] == [case.info.pseudonym for case in two]
    assert all(np.array_equal(a.frames, b.frames) and np.array_equal(a.masks, b.masks) for a, b in zip(one, two))  # noqa: B905


def test_nothing_is_overwritten(tmp_path):
    write_acdc(tmp_path / "scans", [1])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not made by 'prepare'"):
        prepare(tmp_path / "scans", other, "acdc", key=KEY)
    with pytest.raises(UserError, match="not made by 'prepare'"):
        prepare(tmp_path / "scans", other / "thesis.txt", "acdc", key=KEY)
    with pytest.raises(UserError, match="lies inside"):
        prepare(tmp_path / "scans", tmp_path / "scans" / "out", "acdc", key=KEY)
    with pytest.raises(UserError, match="is not a folder"):
        prepare(tmp_path / "absent", tmp_path / "out", "acdc", key=KEY)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "out").exists()


def test_a_destination_keeps_to_one_key_so_that_no_patient_enters_twice(tmp_path):
    write_acdc(tmp_path / "scans", [1])
    prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY)
    with pytest.raises(UserError, match="another key_check"):
        prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=KEY[::-1])


def test_the_key_is_made_once_next_to_the_destination_and_only_its_owner_reads_it(tmp_path):
    key = read_or_make_key(tmp_path)
    assert read_or_make_key(tmp_path) == key == read_key(tmp_path / KEY_NAME)
    assert stat.S_IMODE((tmp_path / KEY_NAME).stat().st_mode) == 0o600
    (tmp_path / KEY_NAME).write_text("abcd")
    with pytest.raises(UserError, match="expected at least 32"):
        read_key(tmp_path / KEY_NAME)
    with pytest.raises(UserError, match="does not exist"):
        read_key(tmp_path / "absent")


def test_pseudonyms_depend_on_the_key_and_keep_parts_apart():
    assert pseudonym(KEY, "a", "bc") != pseudonym(KEY, "ab", "c")
    assert pseudonym(KEY, "a") != pseudonym(KEY[::-1], "a")
    assert pseudonym(KEY, "a") == pseudonym(KEY, "a")


def cine(images, masks=None, spacing=(10.0, CASE_PIXEL_MM, CASE_PIXEL_MM)) -> Cine:
    return Cine(images.astype(np.float32), masks, spacing, None, "GE", 1.5)


def test_resampling_keeps_millimetres_and_follows_linear_interpolation():
    rows, columns = np.mgrid[:120, :90]
    images = np.stack([rows + 2.0 * columns] * 2)[:, None]
    masks = np.zeros((2, 1, 120, 90), np.uint8)
    masks[0, :, 40:81, 35:56] = 3
    masks[1, :, 59:62, 44:47] = 3
    result = normalise(cine(images, masks, (8.0, 1.0, 2.0)))
    # Centroid (60, 45); a row is 1 mm, a column 2 mm, a case's pixel 1.25 mm.
    steps = (np.arange(CASE_SIZE) - (CASE_SIZE - 1) / 2) * CASE_PIXEL_MM
    expected = (60 + steps)[:, None] + 2.0 * (45 + steps / 2)[None]
    inside = np.ix_(abs(steps) < 55, abs(steps) < 85)
    low, high = (result.frames[0, 0][47, 47], result.frames[0, 0][47, 60])
    scale = (high - low) / (expected[47, 60] - expected[47, 47])
    unclipped = (result.frames[0, 0] > 0) & (result.frames[0, 0] < 1)
    error = np.abs(result.frames[0, 0] - (low + (expected - expected[47, 47]) * scale))
    assert error[inside][unclipped[inside]].max() < 2e-3
    assert result.spacing_mm.tolist() == [8.0, CASE_PIXEL_MM, CASE_PIXEL_MM]


def test_pixels_that_already_fit_are_not_blurred():
    images = np.random.default_rng(0).uniform(0, 1, (2, 1, 160, 160))
    masks = np.zeros((2, 1, 160, 160), np.uint8)
    masks[:, :, 70:78, 70:78] = 3  # centroid (73.5, 73.5): the case's pixels fall on the image's
    masks[1, :, 70, 70], masks[1, :, 77, 77] = 2, 2
    result = normalise(cine(images, masks))
    crop = images[:, :, 10:138, 10:138]
    low, high = np.percentile(crop, (1, 99))
    assert np.abs(result.frames - ((crop - low) / (high - low)).clip(0, 1)).max() < 1e-5
    drawn = np.where(masks == 0, NOT_DRAWN, masks)  # nobody drew a right ventricle
    assert np.array_equal(result.masks, drawn[:, :, 10:138, 10:138])


@pytest.mark.parametrize("pixel_mm", [0.7, 1.1, 1.5, 2.0])
def test_resampled_masks_keep_the_ejection_fraction(pixel_mm):
    size = int(130 / pixel_mm)
    rows, columns = np.mgrid[:size, :size] * pixel_mm
    masks = np.zeros((2, 6, size, size), np.uint8)
    for phase, z in np.ndindex(2, 6):
        cavity = (22 - 2 * z) * (1 - 0.45 * phase)
        masks[phase, z, np.hypot(rows - 63.3, columns - 66.1) < cavity + 9] = 2
        masks[phase, z, np.hypot(rows - 63.3, columns - 66.1) < cavity] = 3
    result = normalise(cine(masks * 10.0, masks, (9.0, pixel_mm, pixel_mm)))
    volumes = (result.masks == LV).sum(axis=(1, 2, 3))
    assert result.ef == pytest.approx(loop_ef(masks), abs=1e-9)
    assert 1 - volumes[1] / volumes[0] == pytest.approx(result.ef, abs=0.003)


def test_a_ventricle_larger_than_the_crop_is_refused():
    rows, columns = np.mgrid[:200, :200]
    masks = np.zeros((2, 3, 200, 200), np.uint8)
    for phase, radius in enumerate((84, 60)):
        masks[phase, :, np.hypot(rows - 100, columns - 100) < radius] = 3
    with pytest.raises(Unusable, match="heart-beyond-crop"):
        normalise(cine(masks * 10.0, masks))


def test_an_acdc_field_of_view_that_no_scanner_has_is_scaled_down(tmp_path):
    write_acdc(tmp_path / "a", [1], size=360)
    assert read_acdc(tmp_path / "a" / "patient001").spacing_mm == pytest.approx((10.0, 384 / 360, 384 / 360))
    write_acdc(tmp_path / "b", [1], size=300)
    assert read_acdc(tmp_path / "b" / "patient001").spacing_mm == pytest.approx((10.0, 1.5, 1.5))


def test_frames_are_scaled_between_percentiles_of_both_frames_together():
    images, masks = heart(110)
    result = normalise(cine(images * 7.0 - 300, masks))
    assert np.abs(result.frames - normalise(cine(images, masks)).frames).max() < 1e-5
    assert (result.frames.min(), result.frames.max()) == (0, 1)
    assert 0.005 < (result.frames == 1).mean() < 0.02


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("from_apex", [False, True])
def test_masks_alone_turn_the_image_and_order_the_slices(turns, from_apex):
    images, masks = heart(110)
    turned, labels = (np.rot90(array, turns, axes=(2, 3)) for array in (images, masks))
    if from_apex:
        turned, labels = turned[:, ::-1], labels[:, ::-1]
    assert np.array_equal(orient(cine(turned, labels)).images, images)


def test_acdc_frames_of_different_shape_are_refused(tmp_path):
    write_acdc(tmp_path, [1])
    write_nifti(tmp_path / "patient001" / "patient001_frame01.nii.gz", np.ones((9, 9, 4), np.uint8))
    with pytest.raises(Unusable, match="masks-differ"):
        read_acdc(tmp_path / "patient001")


def test_every_reason_says_what_it_means():
    assert all(len(meaning) > 20 and "\n" not in meaning for meaning in REASONS.values())


def with_letters(root, number):
    """Draw a name into both frames of a patient of the ACDC layout, at a slant."""
    for path in (root / f"patient{number:03d}").glob("*_frame??.nii.gz"):
        image = nibabel.load(path)
        array = np.asanyarray(image.dataobj).copy()
        mark = slanted("DOE JOHN", 45)
        array[10 : 10 + mark.shape[0], 10 : 10 + mark.shape[1]][mark] = array.max()
        nibabel.save(nibabel.Nifti1Image(array, image.affine), path)


def test_scans_that_seem_to_show_a_name_are_left_out_until_somebody_has_looked(tmp_path, capsys):
    write_acdc(tmp_path / "scans", [1, 2])
    with_letters(tmp_path / "scans", 2)
    arguments = ["prepare", "--format", "acdc", str(tmp_path / "scans"), str(tmp_path / "d"), "--num-processes", "1"]
    assert main(arguments) == 0
    assert "--keep-suspected" in " ".join(capsys.readouterr().out.split())
    assert len(load_cases(tmp_path / "d")) == 1
    assert json.loads((tmp_path / "d" / "refused.json").read_text())["studies"] == {"burned-in-suspected": 1}
    assert main([*arguments, "--keep-suspected"]) == 0
    assert len(load_cases(tmp_path / "d")) == 2
    counts = json.loads((tmp_path / "d" / "refused.json").read_text())
    assert counts["studies"] == {} and counts["warnings"] == {"burned-in-suspected": 1}
    assert main(arguments) == 0, "what an earlier call, or an earlier version, kept is taken out again"
    assert len(load_cases(tmp_path / "d")) == len(list((tmp_path / "d" / "cases").iterdir())) == 1
