"""Labels: what masks may hold, masks that cannot be a heart, tables of ejection fractions, two NIfTI layouts."""

import csv
import json
from functools import partial

import nibabel
import numpy as np
import pytest

from fedcmr.client.cli import main
from fedcmr.client.ingest.cine import Cine, Study
from fedcmr.client.ingest.layouts.ef_table import read_ef_table, with_ejection_fractions
from fedcmr.client.ingest.layouts.mnms2 import find_mnms2
from fedcmr.client.ingest.layouts.plain import find_plain, parse_labels
from fedcmr.client.ingest.plausibility import check_masks, myocardium_at_border
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.shared.case import LV, MYO, RV, load_cases, read_index
from fedcmr.shared.errors import UserError

KEY = bytes(range(32))
NUM_PHASES, SPACING_MM = 6, (1.5, 1.5, 9.0)
# Columns to the left and down, rows down and back, slices from apex to base: a usual short axis, in LPS.
AXES = np.array([[0.8, 0.0, 0.6], [0.36, 0.8, -0.48], np.cross([0.8, 0.0, 0.6], [0.36, 0.8, -0.48])])
AFFINE = np.eye(4)
AFFINE[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ AXES.T * SPACING_MM
LABELS = {0: 0, 1: RV, 2: MYO, 3: LV}


def heart(contraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels of one phase, shape (4, 110, 110), apex to base."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:110, :110] - 55.0
    masks = np.zeros((4, 110, 110), np.uint8)
    for z in range(4):
        cavity = (8 + 2 * z) * (1 - contraction)
        masks[z, np.hypot(rows + 12, columns + 14) < 8 + z] = RV
        masks[z, np.hypot(rows, columns) < cavity + 4] = MYO
        masks[z, np.hypot(rows, columns) < cavity] = LV
    return (np.array([20, 180, 60, 200])[masks] + rng.integers(0, 20, masks.shape)).astype(np.int16), masks


def beat(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of all phases, shape (T, 4, 110, 110); the third has the smallest ventricle."""
    phases = [heart(c, seed * 100 + t) for t, c in enumerate((0.0, 0.2, 0.35, 0.3, 0.2, 0.1))]
    return np.stack([image for image, _ in phases]), np.stack([mask for _, mask in phases])


def loop_ef(ed: np.ndarray, es: np.ndarray, lv: int = LV) -> float:
    volumes = [sum(int(label == lv) for label in phase.ravel().tolist()) for phase in (ed, es)]
    return 1 - volumes[1] / volumes[0]


def write_nifti(path, array, affine=AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_csv(path, rows, delimiter=",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def write_plain(root, names, masks=True, suffix=".nii.gz") -> None:
    """4D frames, and masks of the first and the third phase, numbered as the project does."""
    for seed, name in enumerate(names):
        images, labels = beat(seed)
        labels[[1, 3, 4, 5]] = 0
        write_nifti(root / "frames" / f"{name}{suffix}", images.T)
        if masks:
            write_nifti(root / "masks" / f"{name}{suffix}", labels.T)


# tables of ejection fractions


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        ("", "line 3: column ef_percent is empty"),
        ("nan", "line 3: column ef_percent is not a finite number"),
        ("inf", "line 3: column ef_percent is not a finite number"),
        ("55,7", "line 3: column ef_percent has a comma"),
        ("=cmd|'/C calc'!A0", "line 3: column ef_percent begins like a formula"),
        ("@SUM(A1)", "line 3: column ef_percent begins like a formula"),
        ("+61", "line 3: column ef_percent begins like a formula"),
        ("-5", "line 3: column ef_percent is out of range: expected per cent from 2 to 95"),
        ("0.61", "line 3: column ef_percent is out of range"),
        ("171", "line 3: column ef_percent is out of range"),
        ("1_7", "line 3: column ef_percent is not a finite number"),
        ("٥٥", "line 3: column ef_percent is not a finite number"),
        ("fifty", "line 3: column ef_percent is not a finite number"),
    ],
)
def test_a_bad_cell_is_named_by_file_and_line_and_never_quoted(tmp_path, cell, complaint):
    path = tmp_path / "table.csv"
    write_csv(path, [["patient", "ef_percent"], ["CANARY-1", "45"], ["CANARY-2", cell], ["CANARY-3", "50"]])
    with pytest.raises(UserError) as error:
        read_ef_table(path)
    message = str(error.value)
    assert message.startswith(f"{path} {complaint}")
    assert "CANARY" not in message
    assert not cell or cell not in message.removeprefix(str(path))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("patient,ef_percent\nA,50\nB,55\nA,50\n", "line 4: the patient of line 2 again"),
        ("patient,ef_percent\n ,50\n", "line 2: column patient is empty"),
        ("patient,ef_percent\n=A1,50\n", "line 2: column patient begins like a formula"),
        ("patient,ef_percent\nA\n", "line 2: expected 2 or more cells, got 1"),
        ('patient,ef_percent\nA,50\n"B,60\n', "is not a CSV row"),
        ("patient,ef\nA,50\n", "line 1: expected either a column ef_fraction"),
        ("patient,ef_fraction,ef_percent\nA,0.5,50\n", "line 1: expected either a column ef_fraction"),
        ("name,ef_percent\nA,50\n", "line 1: expected a column patient"),
        ("patient,PatientID,ef_percent\nA,A,50\n", "line 1: two columns mean patient"),
        ("patient,ef_percent\n", "has no rows"),
        ("", "has no rows"),
        ("patient,ef_fraction\nA,55\n", "line 2: column ef_fraction is out of range: expected a fraction from 0.02"),
    ],
)
def test_a_bad_table_is_named_by_file_and_line(tmp_path, text, complaint):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"table\.csv") as error:
        read_ef_table(path)
    assert complaint in str(error.value)


def test_a_table_that_cannot_be_read_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_ef_table(tmp_path / "absent.csv")
    (tmp_path / "table.csv").write_bytes(b"patient,ef_percent\nM\xfcller,50\n")
    with pytest.raises(UserError, match="CSV UTF-8") as error:
        read_ef_table(tmp_path / "table.csv")
    assert "ller" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_ef_table(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "patient,ef_percent\n007,55.5\nB,20\n",
        '\ufeffPatientID;notes;EF_fraction\r\n007;=evil;0.555\r\n\r\nB;"a\nb";.2\r\n',
        "notes\tef_percent\tpatient_id\n\t55.5\t 007\nx,y,z,w\t20\tB\n",
    ],
)
def test_a_table_may_have_other_columns_separators_and_line_ends(tmp_path, text):
    (tmp_path / "table.csv").write_bytes(text.encode())
    assert read_ef_table(tmp_path / "table.csv") == pytest.approx({"007": 0.555, "B": 0.2})


@pytest.mark.slow
def test_an_ejection_fraction_of_the_table_enters_cases_without_masks_only(tmp_path):
    write_plain(tmp_path / "scans", ["A", "B", "C"], masks=False)
    labels = beat(0)[1]
    write_nifti(tmp_path / "scans" / "masks" / "A.nii.gz", labels.T)
    rows = [["patient", "ef_percent", "born"], ["A", 20, "CANARY"], ["B", 33, ""], ["Z9", 44, ""]]
    write_csv(tmp_path / "table.csv", rows)
    out = tmp_path / "out"
    call = partial(prepare, tmp_path / "scans", out, "plain", labels=LABELS, ef_table=tmp_path / "table.csv", key=KEY)
    summary = call()
    efs = sorted((info.ef for info in read_index(out)), key=str)
    assert efs == pytest.approx(sorted([0.33, loop_ef(labels[0], labels[2]), np.nan], key=str), abs=1e-5, nan_ok=True)
    others = {"heart-by-motion": 2}  # discs on a plain ground are no heart to a segmenter
    assert summary.warnings == {"no-ejection-fraction": 1, "unused-row": 1, "unknown-vendor": 3, **others}
    assert json.loads((out / "refused.json").read_text())["warnings"] == summary.warnings
    assert b"CANARY" not in b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert call().warnings == summary.warnings, (
        "a restart that makes no case keeps the warnings of those that are there"
    )
    write_csv(tmp_path / "table.csv", [["patient", "ef_percent"], ["B", 34]])
    with pytest.raises(UserError, match="prepared with another ef_table"):
        call()


def test_one_ejection_fraction_is_not_given_to_several_studies():
    cine = Cine(np.zeros((2, 1, 4, 4), np.float32), None, (1, 1, 1), None, "GE", 1.5)
    studies = [Study(patient, study, partial(_same, cine)) for patient, study in (("A", "1"), ("A", "2"), ("B", "3"))]
    efs = [study.read().ef for study in with_ejection_fractions(studies, {"A": 0.5, "B": 0.6})]
    assert efs == pytest.approx([np.nan, np.nan, 0.6], nan_ok=True)


def _same(cine):
    return cine


# plausibility


def make_cine(masks: np.ndarray, spacing_mm=(9.0, 1.5, 1.5)) -> Cine:
    return Cine(masks.astype(np.float32), masks, spacing_mm, None, "GE", 1.5)


def two_phases() -> np.ndarray:
    return np.stack([heart(0.0)[1], heart(0.35)[1]])


def test_a_heart_is_plausible_and_so_is_no_mask():
    check_masks(make_cine(two_phases()))
    check_masks(make_cine(np.where(two_phases() == RV, 0, two_phases())))
    check_masks(make_cine(np.where(two_phases() == LV, LV, 0).astype(np.uint8)))
    for label, phase in ((MYO, 0), (MYO, 1), (RV, 1)):
        masks = two_phases()
        _without(masks, label, phase)
        check_masks(make_cine(masks))
    check_masks(Cine(np.zeros((2, 1, 4, 4), np.float32), None, (1, 1, 1), None, "GE", 1.5))


def _without(masks, label, phase):
    masks[phase][masks[phase] == label] = 0


def _stray(masks):
    masks[0, 0, 0, 0] = masks[0, 0, -1, -1] = RV


def _shift(masks):
    cavity = masks[0] == LV
    masks[0][cavity] = MYO
    masks[0][np.roll(cavity, 18, axis=2)] = LV


def _emptied(masks):
    kept = np.argwhere(masks[1] == LV)[0]
    masks[1][masks[1] == LV] = MYO
    masks[1][tuple(kept)] = LV


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("masks-implausible", lambda m: m.fill(0)),
        ("masks-implausible", lambda m: _without(m, LV, 1)),
        ("masks-implausible", lambda m: m.__setitem__(1, m[0])),
        ("cavity-outside-myocardium", lambda m: m.__setitem__(..., np.array([0, 3, 2, 1])[m])),
        ("cavity-outside-myocardium", lambda m: m.__setitem__(..., np.array([0, 1, 3, 2])[m])),
        ("cavity-outside-myocardium", _shift),
        ("labels-too-wide", _stray),
        ("ef-implausible", _emptied),
    ],
)
def test_masks_that_cannot_be_a_heart_have_a_reason(reason, change):
    masks = two_phases()
    change(masks)
    with pytest.raises(Unusable) as error:
        # The stray labels are 164 mm apart; pixels of 2 mm make that more than any heart.
        check_masks(make_cine(masks, (9.0, 2.0, 2.0)))
    assert error.value.code == reason


def test_the_share_of_the_cavity_that_touches_myocardium_is_that_of_a_loop():
    phase = heart(0.2)[1]
    phase[0, 55:] = np.where(phase[0, 55:] == MYO, 0, phase[0, 55:])  # an open ring
    phase[1, :, 0] = LV  # at the image's border
    edges = touching = 0
    for z, row, column in np.argwhere(phase == LV):
        for i, j in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            label = phase[z, i, j] if 0 <= i < 110 and 0 <= j < 110 else 0
            edges += label != LV
            touching += label == MYO
    assert 0.3 < touching / edges < 0.9
    assert myocardium_at_border(phase) == touching / edges


# the plain layout


def test_plain_cines_become_cases_with_the_ejection_fraction_of_a_plain_loop(tmp_path):
    write_plain(tmp_path / "scans", ["CANARY-a", "b"])
    write_plain(tmp_path / "scans" / "x", ["b"], suffix=".nii")  # a folder that is not of the layout
    rows = [
        ["Name", "patient", "vendor", "field_strength_t", "remark"],
        ["CANARY-a", "one", "GE MEDICAL SYSTEMS", "15000", "CANARY"],
        ["b", "one", "", "", ""],
    ]
    write_csv(tmp_path / "scans" / "cases.csv", rows)
    summary = prepare(tmp_path / "scans", tmp_path / "out", "plain", labels=parse_labels("rv=1,myo=2,lv=3"), key=KEY)
    assert (summary.num_cases, summary.refused, summary.left_out) == (2, {}, {})
    cases = load_cases(tmp_path / "out")
    expected = [loop_ef(*beat(seed)[1][[0, 2]]) for seed in (0, 1)]
    assert sorted(case.info.ef for case in cases) == pytest.approx(sorted(expected), abs=1e-5)
    assert len({case.info.group for case in cases}) == 1, "both are of one patient"
    assert {(case.info.vendor, str(case.info.field_strength_t)) for case in cases} == {
        ("GE", "1.5"),
        ("unknown", "nan"),
    }
    area = (cases[0].masks[0] == LV).sum(axis=(1, 2))
    assert (np.diff(area) < 0).all(), "slices run from base to apex"
    assert b"CANARY" not in b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    details = json.loads((tmp_path / "out" / "details.json").read_text())
    assert [(d["num_phases"], d["ed_phase"], d["es_phase"]) for d in details.values()] == [(NUM_PHASES, 0, 2)] * 2


def test_two_files_of_one_phase_each_give_the_case_that_one_4d_file_gives(tmp_path):
    images, labels = beat()
    labels[[1, 3, 4, 5]] = 0
    for kind, array in (("frames", images), ("masks", labels)):
        write_nifti(tmp_path / "pair" / kind / "A_ED.nii.gz", array[0].T)
        write_nifti(tmp_path / "pair" / kind / "A_es.nii", array[2].T)
        write_nifti(tmp_path / "cine" / kind / "A.nii.gz", array.T)
    for name in ("pair", "cine"):
        prepare(tmp_path / name, tmp_path / "out" / name, "plain", labels=LABELS, key=KEY)
    (pair,), (cine,) = (load_cases(tmp_path / "out" / name) for name in ("pair", "cine"))
    assert str(pair.info) == str(cine.info)
    assert np.array_equal(pair.frames, cine.frames)
    assert np.array_equal(pair.masks, cine.masks)


def test_numbers_of_a_mask_mean_what_the_option_says(tmp_path):
    images, labels = beat()
    numbers = np.array([0, 40, 7, 5], np.uint8)[labels]
    numbers[:, 0][numbers[:, 0] == 7] = 8  # a second number for the wall, say scar
    numbers[0, 0, 0, :3] = 9  # and one for something else
    write_nifti(tmp_path / "frames" / "A.nii.gz", images.T)
    write_nifti(tmp_path / "masks" / "A.nii.gz", numbers.T)
    read = find_plain(tmp_path, parse_labels("lv=5, myo=7, myo=8, rv=40, background=9")).studies[0].read
    assert np.array_equal(read().masks, labels)
    with pytest.raises(Unusable, match="masks-implausible"):
        find_plain(tmp_path, parse_labels("lv=5,myo=7,rv=40")).studies[0].read()
    with pytest.raises(UserError, match="needs --labels"):
        find_plain(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rv=1,myo=2", "is missing"),
        ("lv=3,myo=3", "3 comes twice"),
        ("lv=3,myo=2,liver=4", "got 'liver=4'"),
        ("lv=0,myo=1", "1 to 255"),
        ("lv=-1,myo=1", "1 to 255"),
        ("lv=256,myo=1", "1 to 255"),
        ("", "expected parts"),
        ("lv=x,myo=1", "1 to 255"),
        ("lv 3 myo 2", "expected parts"),
    ],
)
def test_a_label_map_is_checked(text, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_labels(text)


def test_labels_belong_to_the_plain_layout(tmp_path):
    write_csv(tmp_path / "scans" / "dataset_information.csv", [["SUBJECT_CODE", "VENDOR", "FIELD"], ["1", "GE", "1.5"]])
    with pytest.raises(UserError, match="--labels means nothing in the layout"):
        prepare(tmp_path / "scans", tmp_path / "out", "mnms2", labels=LABELS, key=KEY)


def _rewrite(path, affine=AFFINE, change=lambda array: array, code=None):
    nifti = nibabel.Nifti1Image(change(np.asarray(nibabel.load(path).dataobj)), affine)
    if code is not None:
        nifti.set_sform(None, code)
        nifti.set_qform(None, code)
    nibabel.save(nifti, path)


SHIFTED = AFFINE @ np.array([[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ("reason", "damage"),
    [
        ("masks-differ", lambda s: _rewrite(s / "masks" / "A.nii.gz", change=lambda a: a[..., :-1])),
        ("masks-differ", lambda s: _rewrite(s / "masks" / "A.nii.gz", change=lambda a: a.swapaxes(0, 2))),
        ("masks-misaligned", lambda s: _rewrite(s / "masks" / "A.nii.gz", SHIFTED)),
        ("masks-implausible", lambda s: _rewrite(s / "masks" / "A.nii.gz", change=lambda a: a + 1)),
        (
            "cavity-outside-myocardium",
            lambda s: _rewrite(s / "masks" / "A.nii.gz", change=lambda a: np.array([0, 3, 2, 1], np.uint8)[a]),
        ),
        ("no-orientation", lambda s: _rewrite(s / "frames" / "A.nii.gz", code=0)),
        ("not-short-axis", lambda s: _rewrite(s / "frames" / "A.nii.gz", np.diag([1.5, 1.5, 9.0, 1.0]))),
        ("no-phases", lambda s: _rewrite(s / "frames" / "A.nii.gz", change=lambda a: a[..., 0])),
        ("unreadable-nifti", lambda s: (s / "masks" / "A.nii.gz").write_bytes(b"\x1f\x8bnothing")),
        ("unreadable-nifti", lambda s: _rewrite(s / "frames" / "A.nii.gz", change=lambda a: a + 1j)),
        ("missing-file", lambda s: (s / "frames" / "A.nii.gz").rename(s / "frames" / "A_ed.nii.gz")),
        ("same-name", lambda s: (s / "frames" / "A.nii").write_bytes(b"")),
        ("missing-file", lambda s: (s / "masks" / "A.nii.gz").rename(s / "masks" / "A_es.nii.gz")),
        ("not-in-table", lambda s: write_csv(s / "cases.csv", [["name"], ["B"]])),
        ("missing-file", lambda s: write_csv(s / "cases.csv", [["name"], ["A"], ["B"], ["C"]])),
    ],
)
def test_a_damaged_plain_patient_is_counted_and_the_others_go_on(tmp_path, reason, damage):
    write_plain(tmp_path / "scans", ["A", "B"])
    damage(tmp_path / "scans")
    summary = prepare(tmp_path / "scans", tmp_path / "out", "plain", labels=LABELS, key=KEY)
    assert (summary.num_cases, summary.refused) == (2 if "C" in _names(tmp_path) else 1, {reason: 1})


def _names(root) -> str:
    table = root / "scans" / "cases.csv"
    return table.read_text() if table.exists() else ""


@pytest.mark.slow
def test_masks_may_lack_and_an_ejection_fraction_may_stand_in_the_table(tmp_path):
    write_plain(tmp_path / "scans", ["A", "B"], masks=False)
    write_nifti(tmp_path / "scans" / "masks" / "B.nii.gz", np.zeros_like(beat(1)[1]).T)  # nothing drawn yet
    write_nifti(tmp_path / "scans" / "masks" / "Z.nii.gz", beat()[1].T)
    write_csv(tmp_path / "scans" / "cases.csv", [["name", "ef_fraction"], ["A", "0.4"], ["B", ""]], delimiter=";")
    summary = prepare(tmp_path / "scans", tmp_path / "out", "plain", labels=LABELS, key=KEY)
    assert (summary.num_cases, summary.left_out) == (2, {"masks-without-frames": 1})
    cases = load_cases(tmp_path / "out")
    assert sorted(str(case.info.ef) for case in cases) == ["0.4", "nan"]
    assert not any(case.masks.any() for case in cases)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([["name", "ef_fraction"], ["A", "55"]], "cases.csv line 2: column ef_fraction is out of range"),
        ([["name", "ef_fraction"], ["A", "0,5"]], "cases.csv line 2: column ef_fraction has a comma"),
        ([["name", "field_strength_t"], ["A", "3 T"]], "cases.csv line 2: column field_strength_t is not a finite"),
        ([["name", "vendor"], ["A", "=GE"]], "cases.csv line 2: column vendor begins like a formula"),
        ([["name"], ["A"], ["A"]], "cases.csv line 3: column name is named before"),
        ([["name", "vendor"], ["", "GE"]], "cases.csv line 2: column name is empty"),
        ([["vendor"], ["GE"]], "cases.csv line 1: expected a column name"),
        ([["name", "ef_percent", "ef_fraction"], ["A", "5", ""]], "cases.csv line 1: expected either"),
    ],
)
def test_mistakes_in_the_plain_table_are_named_by_line(tmp_path, rows, complaint):
    write_plain(tmp_path, ["A"], masks=False)
    write_csv(tmp_path / "cases.csv", rows)
    with pytest.raises(UserError) as error:
        find_plain(tmp_path)
    assert complaint in str(error.value)


def test_a_plain_folder_without_frames_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"expected NAME\.nii\.gz"):
        find_plain(tmp_path)


# the layout of M&Ms-2


def write_mnms2(root, codes) -> None:
    for seed, code in enumerate(codes):
        for phase, contraction in (("ED", 0.0), ("ES", 0.35)):
            image, labels = heart(contraction, seed)
            folder = root / "dataset" / code
            write_nifti(folder / f"{code}_SA_{phase}.nii.gz", image.T)
            write_nifti(folder / f"{code}_SA_{phase}_gt.nii.gz", np.array([0, 3, 2, 1], np.uint8)[labels].T)
            write_nifti(folder / f"{code}_LA_{phase}.nii.gz", image[:1].T)  # the long axis is not read
            write_nifti(folder / f"{code}_LA_{phase}_gt.nii.gz", labels[:1].T)


def test_mnms2_patients_become_cases_with_vendor_and_field_strength_of_the_table(tmp_path):
    write_mnms2(tmp_path / "scans", ["001", "041", "172", "230", "300"])
    rows = [
        ["SUBJECT_CODE", "DISEASE", "VENDOR", "SCANNER", "FIELD"],
        [1, "NOR", "GE MEDICAL SYSTEMS", "SIGNA", "1.5"],
        [41, "LV", "SIEMENS", "SymphonyTim", "1.5"],
        [172, "HCM", "Philips Medical Systems", "CANARY", "3.0"],
        [1, "NOR", "GE MEDICAL SYSTEMS", "SIGNA", "1.5"],
        [230, "NOR", "SIEMENS", "", "3"],
        [230, "NOR", "SIEMENS", "", "1.5"],
        [299, "TOF", "SIEMENS", "", ""],
        ["", "", "", "", ""],
    ]
    write_csv(tmp_path / "scans" / "dataset_information.csv", rows)
    summary = prepare(tmp_path / "scans", tmp_path / "out", "mnms2", key=KEY)
    assert (summary.num_cases, summary.refused) == (3, {"conflicting-rows": 1, "missing-file": 1})
    cases = load_cases(tmp_path / "out")
    expected = loop_ef(heart(0.0)[1], heart(0.35)[1])
    assert [case.info.ef for case in cases] == pytest.approx([expected] * 3, abs=1e-5)
    found = {(case.info.vendor, case.info.field_strength_t) for case in cases}
    assert found == {("GE", 1.5), ("Siemens", 1.5), ("Philips", 3.0)}
    for case in cases:
        assert case.frames[case.masks == LV].mean() > case.frames[case.masks == RV].mean() > 0.6


def test_mnms2_frames_and_masks_must_fit(tmp_path):
    write_mnms2(tmp_path, ["001", "002"])
    write_csv(
        tmp_path / "dataset_information.csv", [["SUBJECT_CODE", "VENDOR", "FIELD"], [1, "GE", "x"], [2, "GE", ""]]
    )
    (tmp_path / "dataset" / "001" / "001_SA_ES_gt.nii.gz").unlink()
    write_nifti(tmp_path / "dataset" / "002" / "002_SA_ES.nii.gz", np.ones((9, 9, 4), np.int16))
    codes = []
    for study in find_mnms2(tmp_path).studies:
        with pytest.raises(Unusable) as error:
            study.read()
        codes.append(error.value.code)
    assert codes == ["missing-file", "masks-differ"]
    with pytest.raises(UserError, match=r"dataset_information.csv does not exist"):
        find_mnms2(tmp_path / "dataset")


# the command line


@pytest.mark.slow
def test_the_command_takes_a_label_map_and_a_table_and_says_what_to_look_at(tmp_path, capsys):
    write_plain(tmp_path / "scans", ["A"])
    write_plain(tmp_path / "bare", ["CANARY-A", "B"], masks=False)
    write_csv(tmp_path / "efs.csv", [["patient", "ef_percent"], ["CANARY-A", "41"], ["Z", "50"]])
    prepare_plain = ["prepare", "--format", "plain"]
    assert main([*prepare_plain, "--labels", "rv=1,myo=2,lv=3", str(tmp_path / "scans"), str(tmp_path / "one")]) == 0
    assert main([*prepare_plain, str(tmp_path / "scans"), str(tmp_path / "two")]) == 2
    assert "needs --labels" in capsys.readouterr().err
    assert main([*prepare_plain, "--labels", "myo=2", str(tmp_path / "scans"), str(tmp_path / "two")]) == 2
    assert "is missing" in capsys.readouterr().err
    table = ["--ef-table", str(tmp_path / "efs.csv")]
    assert main([*prepare_plain, *table, str(tmp_path / "bare"), str(tmp_path / "three")]) == 0
    printed = capsys.readouterr().out
    assert "2 cases, 2 of them new" in printed
    assert "no-ejection-fraction" in printed
    assert "unused-row" in printed
    assert "CANARY" not in printed
    assert sorted(str(info.ef) for info in read_index(tmp_path / "three")) == ["0.41", "nan"]
    (tmp_path / "efs.csv").write_text("patient,ef_percent\nCANARY-A,=1+1\n")
    assert main([*prepare_plain, *table, str(tmp_path / "bare"), str(tmp_path / "three")]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("line 2: column ef_percent begins like a formula: enter plain text")
    )
