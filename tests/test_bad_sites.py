"""Bad input at a site: it trains, or it is refused with a reason, and never a silent NaN."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from fedcmr.client.check.folder import check
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ledger import Ledger
from fedcmr.client.trainable import trainable
from fedcmr.client.training import load_patients
from fedcmr.server.federation.federate import federate
from fedcmr.server.federation.vendor_styles import STYLE_STD_RANGE
from fedcmr.server.generation.synthesis import load_shared_generator, synthesize
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import RegressionConfig
from fedcmr.server.study import STAGES, Study, run_stages
from fedcmr.server.tasks.ejection_fraction.calibration import train_calibrated
from fedcmr.shared import checkpoint
from fedcmr.shared.case import ED, ES, LV, MYO, RV, Case, load_cases, read_index, save_case, write_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.style import STYLE_NAMES
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.simulations.grid import make_grid

pytestmark = pytest.mark.slow

OTHERS = ["b", "c"]
SHORT = ("federation.num_rounds=2", "federation.local_steps=1")


def run_federation(run: RunFolder) -> dict[str, np.ndarray]:
    """The published arrays, after all rounds through Flower's apps."""
    with make_grid(run) as grid:
        federate(grid, run, load_prior(run.prior_path()))
    return checkpoint.load(run.path / "generator.safetensors")[0]


def change_cases(folder: Path, change: Callable[[Case], Case]) -> None:
    """Write a folder's cases again, changed."""
    cases = [change(case) for case in load_cases(folder)]
    for case in cases:
        save_case(folder, case)
    write_index(folder, [case.info for case in cases])


def without(*labels: int, phases: tuple[int, ...] = (ED, ES)) -> Callable[[Case], Case]:
    """A case whose masks lack these labels."""

    def change(case: Case) -> Case:
        masks = case.masks.copy()
        for phase in phases:
            masks[phase][np.isin(masks[phase], labels)] = 0
        return replace(case, masks=masks)

    return change


def of_one_ef(case: Case) -> Case:
    return replace(case, info=replace(case.info, ef=0.55))


def flat_phase(case: Case) -> Case:
    """End-systole without any contrast."""
    frames = case.frames.copy()
    frames[ES] = 0.5
    return replace(case, frames=frames)


def spoil(folder: Path, **arrays: np.ndarray) -> str:
    """Replace arrays in the first case's file, as no `Case` would allow; returns the file's name."""
    path = folder / "cases" / f"{read_index(folder)[0].pseudonym}.npz"
    with np.load(path) as file:
        content = dict(file)
    np.savez(path, **content | arrays)
    return path.name


def only_site(run: RunFolder, name: str) -> None:
    """Make the study one of a single site."""
    study = json.loads((run.path / "study.json").read_text())
    (run.path / "study.json").write_text(json.dumps({"sites": {name: study["sites"][name]}}))
    for other in (run.path / "sites").iterdir():
        if other.name != name:
            shutil.rmtree(other)


def refused(run: RunFolder) -> list[dict[str, str]]:
    return [line["refused"] for line in run.metrics()]


def assert_finite(arrays: dict[str, np.ndarray]) -> None:
    assert arrays and all(np.isfinite(array).all() for array in arrays.values())


def test_one_site_of_one_vendor_trains_alone(make_study):
    run = make_study()
    only_site(run, "b")
    arrays = run_federation(run)
    assert_finite(arrays)
    assert {name for name in arrays if name.startswith("code_mean")} == {"code_mean/Philips"}
    assert [line["answered"] for line in run.metrics()] == [["b"]] * 3


@pytest.mark.parametrize("vendor", ["GE", "unknown"])
def test_one_patient_of_a_vendor_that_the_site_does_not_declare_changes_no_answer(make_study, vendor):
    """The site declares Siemens; its other patients train, with that one or without."""
    run = make_study(*SHORT, min_patients=4)
    train = run.path / "sites" / "a" / "train"
    first, *rest = read_index(train)
    write_index(train, [replace(first, vendor=vendor), *rest])
    found = load_patients(train, load_prior(run.prior_path()), ("Siemens",))
    assert [patient.name for patient in found] == [info.group for info in rest]
    assert_finite(run_federation(run))
    assert refused(run) == [{}, {}]


def test_too_few_patients_are_named_and_cost_nothing(make_study):
    run = make_study(*SHORT)
    train = run.path / "sites" / "a" / "train"
    write_index(train, read_index(train)[:4])
    arrays = run_federation(run)
    assert refused(run) == [{"a": "too-few-patients"}] * 2
    assert "a refused: too-few-patients" in (run.path / "log.txt").read_text()
    assert Ledger(run.path / "sites" / "a" / "ledger").releases() == []
    _, metadata = checkpoint.load(run.path / "generator.safetensors")
    assert metadata["sites"]["a"]["epsilon"] == 0 and metadata["sites"]["b"]["epsilon"] > 0
    assert not arrays["code_mean/Siemens"].any(), "a vendor whose site refused keeps the prior's style"


@pytest.mark.parametrize(("label", "lost"), [(RV, {"rv_mean"}), (MYO, {"myo_mean", "myo_std", "edge_sharpness"})])
def test_a_region_that_no_patient_has_gets_the_public_mean_and_the_least_spread(make_study, label, lost):
    """Without noise, so that the released figures are exact."""
    run = make_study(
        *SHORT, "privacy.enabled=false", "synthesis.num_cases=3", "synthesis.num_steps=1", allow_without_privacy=True
    )
    change_cases(run.path / "sites" / "a" / "train", without(label))
    arrays = run_federation(run)
    assert_finite(arrays)
    assert refused(run) == [{}, {}]
    missing = np.array([name in lost for name in STYLE_NAMES])
    mean, std = arrays["code_mean/Siemens"], arrays["code_std/Siemens"]
    assert not mean[missing].any() and (std[missing] == STYLE_STD_RANGE[0]).all()
    assert np.abs(mean[~missing]).min() > 0, "what the patients do have is released"

    prior = load_prior(run.prior_path())
    shared = load_shared_generator(run.path / "generator.safetensors", prior)
    rendered = synthesize(prior, shared, run.config.synthesis, ["Siemens"], 0, "cpu").cases
    assert all(np.isfinite(case.frames).all() and np.ptp(case.frames) > 0 for case in rendered)


@pytest.mark.parametrize("labels", [(RV,), (MYO,), (RV, MYO)])
def test_the_private_update_is_finite_whatever_region_is_missing(make_study, labels):
    run = make_study(*SHORT)
    for site in ("a", *OTHERS):
        change_cases(run.path / "sites" / site / "train", without(*labels))
    assert_finite(run_federation(run))
    assert [line["answered"] for line in run.metrics()] == [["a", "b", "c"]] * 2


def test_a_site_without_any_left_ventricle_is_refused(make_study):
    run = make_study(*SHORT)
    train = run.path / "sites" / "a" / "train"
    change_cases(train, without(LV))
    assert load_patients(train, load_prior(run.prior_path())) == []
    assert_finite(run_federation(run))
    assert refused(run) == [{"a": "too-few-patients"}] * 2
    assert Ledger(run.path / "sites" / "a" / "ledger").releases() == []


def test_patients_without_a_left_ventricle_are_left_out_and_the_rest_trains(make_study):
    run = make_study(*SHORT, min_patients=3)
    train = run.path / "sites" / "a" / "train"
    lost = {info.pseudonym for info in read_index(train)[:2]}
    change_cases(train, lambda case: without(LV)(case) if case.info.pseudonym in lost else case)
    names = [patient.name for patient in load_patients(train, load_prior(run.prior_path()))]
    assert len(names) == 3 and not lost & set(names)
    assert_finite(run_federation(run))
    assert refused(run) == [{}, {}]


def test_an_empty_cavity_at_end_systole_trains(make_study):
    """Its ejection fraction is one; the image's region is missing in one phase only."""
    run = make_study(*SHORT)
    change_cases(run.path / "sites" / "a" / "train", without(LV, phases=(ES,)))
    assert_finite(run_federation(run))
    assert refused(run) == [{}, {}]


def test_a_phase_without_contrast_trains(make_study):
    run = make_study(*SHORT)
    change_cases(run.path / "sites" / "a" / "train", flat_phase)
    assert_finite(run_federation(run))
    assert refused(run) == [{}, {}]


@pytest.mark.parametrize(
    "bad",
    [
        {"frames": np.full((2, 3, 96, 96), np.nan, np.float32)},
        {"frames": np.full((2, 3, 96, 96), 7.0, np.float32)},
        {"frames": np.zeros((2, 0, 96, 96), np.float32), "masks": np.zeros((2, 0, 96, 96), np.uint8)},
        {"masks": np.full((2, 3, 96, 96), 9, np.uint8)},
        {"spacing_mm": np.array([10, np.nan, 1.5], np.float32)},
        {"spacing_mm": np.array([10, np.inf, 1.5], np.float32)},
    ],
    ids=["nan", "above-one", "no-slice", "unknown-label", "nan-spacing", "endless-spacing"],
)
def test_a_case_that_is_not_one_is_left_out_and_changes_no_answer(make_study, bad):
    """Else one patient's file would turn "ok" into a refusal, uncharged and as often as the server likes to ask."""
    run = make_study(*SHORT, min_patients=4)
    train = run.path / "sites" / "a" / "train"
    name = spoil(train, **bad)
    found = trainable(train, ("Siemens",))
    assert (found.num_patients, found.left_out) == (4, {"case-unreadable": 1})
    assert Path(name).stem not in found.patients
    assert_finite(run_federation(run))
    assert refused(run) == [{}, {}]


@pytest.mark.parametrize("damage", ["no-index", "no-folder", "no-table"])
def test_a_damaged_index_or_a_missing_folder_is_refused(make_study, damage):
    run = make_study(*SHORT)
    site = run.path / "sites" / "a"
    if damage == "no-folder":
        shutil.rmtree(site / "train")
    elif damage == "no-index":
        (site / "train" / "cases.csv").unlink()
    else:
        (site / "train" / "cases.csv").write_bytes(b"pseudonym,vendor\xff\n\0\n")
    assert_finite(run_federation(run))
    assert refused(run) == [{"a": "data-unreadable"}] * 2
    assert Ledger(site / "ledger").releases() == []


@pytest.mark.parametrize("ef", ["55", "-0.1", "inf"])
def test_an_ejection_fraction_that_is_no_fraction_is_refused(make_study, ef):
    train = make_study().path / "sites" / "a" / "train"
    lines = (train / "cases.csv").read_text().splitlines()
    values = lines[1].split(",")
    lines[1] = ",".join([*values[:3], ef, values[4]])
    (train / "cases.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"cases\.csv line 2"):
        read_index(train)


def test_a_study_in_which_all_patients_eject_the_same_ends_with_a_report(make_study):
    run = make_study(
        *SHORT,
        "synthesis.num_cases=3",
        "synthesis.num_steps=1",
        "regression.num_steps=2",
        "regression.batch_size=4",
        "regression.num_tta=1",
        "evaluation.num_bootstrap=100",
        "evaluation.baselines=[predict_the_mean]",
    )
    for site in ("a", *OTHERS):
        change_cases(run.path / "sites" / site / "train", of_one_ef)
    shutil.copytree(run.path / "sites" / "a" / "train", run.path / "test" / "hospitals" / "a")
    run_federation(run)
    with make_grid(run) as grid:
        run_stages(Study(run, grid), STAGES)
    report = json.loads((run.path / "report.json").read_text())  # strict JSON: NaN would not have been written
    for scores in (report["regression"], report["baselines"]["predict_the_mean"]):
        everybody = scores["hospitals"]["all"]
        assert everybody["n_patients"] == 5 and everybody["mae_points"] >= 0
        assert everybody["r2"] is everybody["r"] is everybody["ci95"]["r2"] is None
    page = re.sub(r'src="[^"]*"', "", (run.path / "report.html").read_text())
    assert "undefined" in page and not re.search(r"\bnan\b", page, re.IGNORECASE)


def test_a_regressor_of_cases_that_all_eject_the_same_is_finite(make_study):
    train = make_study().path / "sites" / "a" / "train"
    change_cases(train, of_one_ef)
    cases = load_cases(train)
    settings = RegressionConfig(
        num_steps=3, batch_size=4, learning_rate=1e-3, weight_decay=0.05, ema_decay=0.9, num_tta=1
    )
    model = train_calibrated(cases, settings, 0)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert model.mean_ef.item() == pytest.approx(0.55)
    answers = predict(model, cases, 1).ef
    assert np.isfinite(answers).all() and (answers >= 0).all() and (answers <= 1).all()


def write_acdc(folder: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    """Two patients in ACDC's layout, the second one changed; images and masks are (2, Z, H, W)."""
    rows, columns = np.mgrid[:100, :100] - 50
    masks = np.zeros((2, 4, 100, 100), np.uint8)
    for phase, cavity in enumerate((15, 10)):
        masks[phase][:, np.hypot(rows + 12, columns + 18) < 10] = RV
        masks[phase][:, np.hypot(rows, columns) < cavity + 6] = MYO
        masks[phase][:, np.hypot(rows, columns) < cavity] = LV
    images = np.array([20, 160, 60, 200], np.float32)[masks] + np.random.default_rng(0).normal(0, 5, masks.shape)
    for number in (1, 2):
        name = f"patient{number:03d}"
        (folder / name).mkdir(parents=True)
        frames, labels = (images, masks) if number == 1 else change(images.copy(), masks.copy())
        for frame, phase in ((1, ED), (9, ES)):
            for suffix, array in (("", frames.astype(np.float32)), ("_gt", labels)):
                volume = nibabel.Nifti1Image(array[phase].T, np.diag([1.5, 1.5, 10, 1]))
                nibabel.save(volume, folder / name / f"{name}_frame{frame:02d}{suffix}.nii.gz")


def lacking(*labels: int, phases: tuple[int, ...] = (ED, ES)):
    def change(images, masks):
        for phase in phases:
            masks[phase][np.isin(masks[phase], labels)] = 0
        return images, masks

    return change


def pixel(value: float, phase: int, everywhere: bool = False):
    def change(images, masks):
        images[(phase, ...) if everywhere else (phase, 0, 40, 40)] = value
        return images, masks

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lacking(RV), None),
        (lacking(MYO), None),
        (lacking(RV, MYO), None),
        (lacking(LV), "masks-implausible"),
        (lacking(LV, phases=(ES,)), "masks-implausible"),
        (lacking(RV, MYO, LV), "masks-implausible"),
        (pixel(np.nan, ED), None),  # as resampling leaves it outside the field of view
        (pixel(np.inf, ES), None),
        (pixel(50.0, ED, everywhere=True), "constant-image"),
        (pixel(50.0, ES, everywhere=True), "constant-image"),
    ],
    ids=["no-rv", "no-myo", "lv-only", "no-lv", "no-lv-at-es", "empty", "nan", "inf", "flat-ed", "flat-es"],
)
def test_prepare_takes_a_scan_that_can_be_used_and_counts_the_others(tmp_path, change, reason):
    """A scan needs its left ventricle in both phases: the ejection fraction is its cavity's."""
    write_acdc(tmp_path / "scans", change)
    summary = prepare(tmp_path / "scans", tmp_path / "out", "acdc", key=bytes(32))
    assert summary.refused == ({} if reason is None else {reason: 1})
    assert summary.num_cases == check(tmp_path / "out").num_cases == (2 if reason is None else 1)
    whole = max(load_cases(tmp_path / "out"), key=lambda case: len(np.unique(case.masks)))
    for case in load_cases(tmp_path / "out"):
        assert np.isfinite(case.frames).all()
        assert case.info.ef == pytest.approx(whole.info.ef), "the missing class is not what the volume is made of"
