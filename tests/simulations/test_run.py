"""What a simulated study takes from its settings, and what it never takes from its cases."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedcmr.server.settings import load
from fedcmr.shared.case import LV, load_cases
from fedcmr.shared.errors import UserError
from fedcmr.shared.provenance import SIMULATED_SCANS
from fedcmr.simulations import run as run_module
from fedcmr.simulations.run import nominal_patients, simulate

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "real"


def settings(*overrides: str):
    return load("default", ["hospitals.source=prepared", "data_root=scans", *overrides]).hospitals


@pytest.fixture
def root(tmp_path, write_cases):
    for name, vendor in (("a", "GE"), ("b", "Philips")):
        write_cases(tmp_path / "root" / name / "train", vendor, 3, seed=1)
    record = json.dumps({"provenance": SIMULATED_SCANS.as_json()})
    (tmp_path / "root" / "b" / "train" / "prepared.json").write_text(record)
    return tmp_path / "root"


def test_the_public_number_of_patients_is_the_settings_and_not_the_count_of_cases(root, tmp_path, tiny_prior):
    config = load(
        "default",
        [
            "hospitals.source=prepared",
            f"data_root={root}",
            "hospitals.nominal_patients={a: 12, b: 7}",
            f"prior={tiny_prior}",
        ],
    )
    run = simulate(config, tmp_path / "run", until="prepare")
    sites = json.loads((run.path / "study.json").read_text())["sites"]
    assert [sites[name]["nominal_patients"] for name in "ab"] == [12, 7]
    assert sites["a"]["vendors"] == {"GE": 12}
    assert [sites[name]["provenance"]["kind"] for name in "ab"] == ["private", "simulated"]
    for name, number in (("a", 12), ("b", 7)):
        assert f"nominal_patients: {number}" in (run.path / "sites" / name / "site.yaml").read_text()


@pytest.mark.parametrize("kind", ["typo", "no acdc", "no sites", "delta", "site without a number", "empty site"])
def test_a_mistake_leaves_no_run_folder_in_the_way_of_the_corrected_command(
    kind, root, tmp_path, tiny_prior, write_cases
):
    (tmp_path / "other").mkdir()
    source, place, more = {
        "typo": ("prepared", tmp_path / "rot", ()),
        "no acdc": ("acdc", tmp_path / "other", ()),
        "no sites": ("prepared", tmp_path / "other", ()),
        "delta": ("prepared", root, ("privacy.target_delta=0.5",)),
        "site without a number": ("prepared", root, ("hospitals.nominal_patients={a: 12}",)),
        "empty site": ("prepared", root, ()),
    }[kind]
    write_cases(root / "a" / "test", "GE", 2, seed=5)
    if kind == "empty site":
        (root / "c" / "train").mkdir(parents=True)
        (root / "c" / "train" / "cases.csv").write_text("pseudonym,vendor,field_strength_t,ef,group\n")
    common = [f"prior={tiny_prior}", "device=cpu", "hospitals.nominal_patients=12"]
    wrong = load("default", [f"hospitals.source={source}", f"data_root={place}", *common, *more])
    with pytest.raises(UserError):
        simulate(wrong, tmp_path / "run", until="prepare")
    assert not (tmp_path / "run").exists()
    if kind == "empty site":
        shutil.rmtree(root / "c")
    right = load("default", ["hospitals.source=prepared", f"data_root={root}", *common])
    assert simulate(right, tmp_path / "run", until="prepare").is_done("prepare")


def test_a_folder_that_was_there_stays_and_so_does_what_took_time(root, tmp_path, tiny_prior, monkeypatch):
    config = load(
        "default",
        ["hospitals.source=prepared", f"data_root={root}", f"prior={tiny_prior}", "hospitals.nominal_patients=12"],
    )

    def fail_after_a_case(study):
        (study.run.path / "sites").mkdir()
        (study.run.path / "sites" / "p.npz").touch()
        raise UserError("the disk is full")

    stages = tuple(replace(stage, do=fail_after_a_case) for stage in run_module.SITE_STAGES if stage.name == "prepare")
    monkeypatch.setattr(run_module, "SITE_STAGES", tuple(replace(stage, needs=()) for stage in stages))
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="disk"):
        simulate(config, tmp_path / "run")
    assert (tmp_path / "run" / "sites" / "p.npz").exists() and (tmp_path / "run" / "config.yaml").exists()


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path, monkeypatch, tiny_prior):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda"):
        simulate(load("smoke", ["device=cuda", f"prior={tiny_prior}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_acdc_takes_the_published_splits_size():
    assert load("acdc", ["data_root=scans"]).hospitals.nominal_patients == 20


def test_a_site_of_several_vendors_needs_a_number_for_each():
    two = settings("hospitals.nominal_patients={a: {GE: 30, Siemens: 12}}")
    assert nominal_patients(two, "a", ["GE", "Siemens"]) == {"GE": 30, "Siemens": 12}
    with pytest.raises(UserError, match="expected a number for each of GE, got GE, Siemens"):
        nominal_patients(two, "a", ["GE"])
    with pytest.raises(UserError, match="names no number for site b"):
        nominal_patients(two, "b", ["GE"])
    with pytest.raises(UserError, match="several vendors"):
        nominal_patients(settings("hospitals.nominal_patients=9"), "a", ["GE", "Siemens"])


@pytest.fixture
def exports(tmp_path, write_cases):
    """Scans of two sites as NIfTI: one drawn whole, the other's masks have other numbers and hold the cavity alone."""
    directions = np.array([[0.0, 0.8, 0.6], [0.6, 0.64, -0.48], [-0.8, 0.48, -0.36]]).T  # slices across an oblique axis
    for site, part, seed in (("a", "train", 1), ("a", "test", 2), ("b", "train", 3), ("b", "test", 4)):
        folder = tmp_path / "scans" / site / part
        write_cases(tmp_path / "made" / site / part, "GE" if site == "a" else "Philips", 3, seed=seed)
        for name in ("frames", "masks"):
            (folder / name).mkdir(parents=True)
        rows = ["name,vendor"]
        for case in load_cases(tmp_path / "made" / site / part):
            affine = np.diag([*case.spacing_mm[::-1], 1.0])
            affine[:3, :3] = directions * case.spacing_mm[::-1]
            masks = case.masks if site == "a" else (case.masks == LV) * 7
            for name, values in (("frames", 1000 * case.frames), ("masks", masks.astype(np.uint8))):
                image = nibabel.Nifti1Image(values.transpose(3, 2, 1, 0).astype(np.float32), affine)
                nibabel.save(image, folder / name / f"{case.info.pseudonym}.nii.gz")
            rows.append(f"{case.info.pseudonym},{case.info.vendor}")
        (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "scans"


def of_layouts(exports, tiny_prior, layouts: str):
    overrides = [f"data_root={exports}", f"prior={tiny_prior}", f"hospitals.layouts={layouts}"]
    return load("default", ["hospitals.source=layouts", "hospitals.nominal_patients=20", *overrides])


def test_each_site_s_scans_have_a_layout_of_their_own(exports, tmp_path, tiny_prior):
    config = of_layouts(
        exports, tiny_prior, "{a: {format: plain, labels: 'rv=1,myo=2,lv=3'}, b: {format: plain, labels: lv=7}}"
    )
    run = simulate(config, tmp_path / "run", until="prepare")
    sites = {name: load_cases(run.path / "sites" / name / "train") for name in "ab"}
    assert [{case.info.contours for case in sites[name]} for name in "ab"] == [{"drawn"}, {"partial"}]
    assert len(load_cases(run.path / "test" / "hospitals" / "b")) == 3
    assert json.loads((run.path / "study.json").read_text())["sites"]["b"]["vendors"] == {"Philips": 20}


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ("{a: {format: nrrd}}", r"hospitals\.layouts\.a\.format is nrrd: expected one of"),
        ("{c: {format: plain}}", r"c/train is not a folder: hospitals\.layouts names a site c"),
        ("{a: {labels: lv=1}}", r"hospitals\.layouts\.a to have a format"),
        ("{}", r"hospitals\.layouts to name a site"),
    ],
)
def test_a_layout_that_says_too_little_is_one_line(layouts, message, exports, tmp_path, tiny_prior):
    with pytest.raises(UserError, match=message):
        simulate(of_layouts(exports, tiny_prior, layouts), tmp_path / "run", until="prepare")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans in {REAL}")
def test_the_study_of_three_real_vendors_is_prepared_from_their_own_layouts(tmp_path):
    config = load("three_vendors", [f"data_root={REAL / 'three_vendors'}", "tasks=[ejection_fraction]"])
    run = simulate(config, tmp_path / "run", until="prepare")
    for name, num_train, num_test, contours in (
        ("siemens", 45, 15, {"drawn"}),
        ("philips", 45, 15, {"drawn"}),
        ("ge", 27, 9, {"partial"}),
    ):
        train, test = (run.path / "sites" / name / "train", run.path / "test" / "hospitals" / name)
        assert (len(load_cases(train)), len(load_cases(test))) == (num_train, num_test)
        assert {case.info.contours for case in load_cases(train)} == contours
        assert all(np.isfinite(case.info.ef) for case in load_cases(test))
