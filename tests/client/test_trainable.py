"""What can be trained on: `prepare`, `check`, `check SITE` and training give one answer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedcmr.client.check.folder import check
from fedcmr.client.cli import main
from fedcmr.client.deployment.connection import examine
from fedcmr.client.policy import SitePolicy, SiteSettings, load_site, write_site
from fedcmr.client.trainable import LEFT_OUT, checked, trainable
from fedcmr.client.training import load_patients
from fedcmr.shared.case import ED, LV, MYO, load_cases, read_index, save_case, write_index
from fedcmr.shared.errors import UserError
from tests.client.ingest.dicom_files import write_study


def change(folder: Path, index: int, **values) -> None:
    """Replace values in one row of the index."""
    infos = read_index(folder)
    infos[index] = replace(infos[index], **values)
    write_index(folder, infos)


def new_masks(folder: Path, index: int, make) -> None:
    case = load_cases(folder)[index]
    save_case(folder, replace(case, masks=make(case.masks.copy())))


def no_ventricle(masks):
    masks[ED][masks[ED] == LV] = MYO
    return masks


def speck(masks):
    """One pixel of ventricle, which the coarser grid of the networks does not see."""
    masks[masks == LV] = MYO
    masks[:, 0, 40, 41] = LV
    return masks


DAMAGES = {
    "no-masks": lambda folder: new_masks(folder, 0, np.zeros_like),
    "no-heart": lambda folder: new_masks(folder, 0, no_ventricle),
    "vendor-unknown": lambda folder: change(folder, 0, vendor="unknown"),
    "case-missing": lambda folder: (folder / "cases" / "p00.npz").unlink(),
    "case-unreadable": lambda folder: (folder / "cases" / "p00.npz").write_bytes(b"PK\3\4 cut"),
    "named-twice": lambda folder: (folder / "cases.csv").open("a").write("p00,Siemens,1.5,0.5,p00,,\n"),
}


@pytest.fixture
def cases(tmp_path, write_cases) -> Path:
    """Six patients of a Siemens scanner, as `prepare` leaves them."""
    folder = tmp_path / "train"
    write_cases(folder, "Siemens", 6, seed=1)
    areas = [(case.masks == LV).sum(axis=(1, 2, 3)) for case in load_cases(folder)]
    write_index(folder, [replace(i, ef=1 - a[1] / a[0]) for i, a in zip(read_index(folder), areas, strict=True)])
    return folder


def site_of(cases: Path, vendors=None, **policy) -> Path:
    vendors = vendors or {"Siemens": 6}
    folder = cases.parent
    write_site(folder, SiteSettings("a", vendors, sum(vendors.values()), policy=SitePolicy(**policy)))
    return folder


def finding(site: Path):
    (found,) = [found for found in examine(load_site(site)) if found.name == "cases"]
    return found


@pytest.mark.parametrize("code", DAMAGES)
def test_one_case_that_cannot_be_used_is_counted_everywhere_and_the_rest_trains(cases, prior, code):
    DAMAGES[code](cases)
    found = trainable(cases, ("Siemens",))
    assert set(found.left_out) == {code} and found.num_patients == 5
    names = [patient.name for patient in load_patients(cases, prior, ("Siemens",))]
    assert names == list(found.patients) and "p00" not in names
    report = check(cases)
    assert [case.left_out for case in report.cases if case.left_out] == [code] * found.left_out[code]
    looked_at = finding(site_of(cases))
    assert looked_at.ok and f"{code} {found.left_out[code]}: {LEFT_OUT[code]}" in looked_at.text
    assert "p00" not in looked_at.text


@pytest.mark.parametrize("code", ["no-masks", "no-heart", "vendor-unknown"])
def test_a_folder_that_training_would_refuse_is_never_called_one_that_can_be_trained_on(cases, prior, code, capsys):
    """The kind of `check` that said so of scans without a contour."""
    for index in range(6):
        if code == "vendor-unknown":
            change(cases, index, vendor="unknown")
        else:
            new_masks(cases, index, np.zeros_like if code == "no-masks" else no_ventricle)
    assert load_patients(cases, prior, ("Siemens",)) == []
    assert main(["check", str(cases)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("without a left ventricle" if code == "no-heart" else LEFT_OUT[code]) in error
    assert "can be trained on." not in (cases / "check.html").read_text().replace("None of the 6 cases here can be", "")
    looked_at = finding(site_of(cases))
    assert not looked_at.ok and "fewer patients" in looked_at.text and f"{code} 6" in looked_at.text


def test_a_ventricle_that_the_networks_do_not_see_is_none(cases, prior):
    new_masks(cases, 0, speck)
    found = trainable(cases)
    assert (len(load_patients(cases, prior)), found.num_patients, found.left_out) == (5, 5, {"no-heart": 1})


def test_a_declared_vendor_that_the_cases_contradict_is_refused_and_training_leaves_them_out(cases, prior, capsys):
    change(cases, 0, vendor="GE")
    site = site_of(cases)
    looked_at = finding(site)
    assert not looked_at.ok and "contradicts the vendors of site.yaml, Siemens" in looked_at.text
    assert "vendor-not-declared 1" in looked_at.text and "add it to 'vendors'" in looked_at.text
    assert main(["check", str(site), "--json"]) == 2
    assert "cases" in capsys.readouterr().err
    assert len(load_patients(cases, prior, load_site(site).vendor_names)) == 5


def test_a_vendor_that_is_declared_and_has_no_case_is_refused(cases):
    looked_at = finding(site_of(cases, {"Siemens": 6, "GE": 3}))
    assert not looked_at.ok and "declares GE" in looked_at.text


def test_a_folder_of_another_vendor_alone_is_refused(cases):
    looked_at = finding(site_of(cases, {"Philips": 6}))
    assert not looked_at.ok and "vendor-not-declared 6" in looked_at.text


def test_check_counts_patients_by_vendor_as_training_does(cases, prior, capsys):
    change(cases, 0, vendor="GE")
    change(cases, 1, vendor="GE", group="p02")
    assert main(["check", str(cases), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = trainable(cases)
    assert found.vendors == {"GE": 2, "Siemens": 4} and found.num_patients == 5
    assert len(load_patients(cases, prior)) == 5
    assert (report["num_trainable_patients"], report["trainable_vendors"]) == (5, {"Siemens": 4, "GE": 2})


def test_a_missing_folder_is_an_error_and_not_a_count(tmp_path):
    with pytest.raises(UserError, match="fedcmr-client prepare"):
        trainable(tmp_path / "absent")


def test_a_file_is_a_case_or_a_count_whatever_byte_of_it_is_damaged(cases):
    """Among the damages are headers that numpy's parser stumbles over, and flags that zipfile does not know."""
    path = cases / "cases" / "p00.npz"
    content, rng = path.read_bytes(), np.random.default_rng(0)
    starts = [content.find(b"PK\3\4"), content.rfind(b"PK\3\4"), content.find(b"PK\1\2"), len(content) - 120]
    codes = set()
    for _ in range(150):
        damaged = bytearray(content)
        damaged[min(int(rng.choice(starts)) + int(rng.integers(120)), len(content) - 1)] = int(rng.integers(256))
        path.write_bytes(damaged)
        found = checked(cases, read_index(cases)[0], named_twice=False, vendors=None)
        codes.add(found if isinstance(found, str) else "a case")
    assert codes == {"a case", "case-unreadable"}


# prepare


def export(folder: Path, **manufacturers: str) -> Path:
    for number, (name, manufacturer) in enumerate(manufacturers.items()):
        write_study(folder / name, patient=f"ID-{name}", study=f"1.2.{number + 3}", Manufacturer=manufacturer)
    return folder


def run_prepare(source: Path, out: Path, *options: str) -> int:
    return main(["prepare", "--format", "dicom", str(source), str(out), "--num-processes", "1", *options])


def test_prepare_says_how_many_can_be_trained_on_and_how_to_mend_the_rest(tmp_path, capsys):
    source, out = export(tmp_path / "scans", a="SIEMENS", b=""), tmp_path / "out"
    assert run_prepare(source, out) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 patient can be trained on (Siemens 1); left out: vendor-unknown 1:" in printed and "--vendor" in printed
    assert main(["check", str(out)]) == 0
    assert "1 patient (Siemens 1)" in " ".join(capsys.readouterr().out.split())
    before = {info.pseudonym: info.vendor for info in read_index(out)}
    assert run_prepare(source, out, "--vendor", "Siemens") == 0
    assert "2 patients can be trained on (Siemens 2)" in " ".join(capsys.readouterr().out.split())
    after = {info.pseudonym: info.vendor for info in read_index(out)}
    assert set(before.values()) == {"Siemens", "unknown"} and after == dict.fromkeys(before, "Siemens")
    assert json.loads((out / "prepared.json").read_text())["vendors_given"] == ["Siemens"]


def test_a_given_vendor_overrides_nothing_that_the_scans_say(tmp_path, capsys):
    source = export(tmp_path / "scans", a="GE MEDICAL SYSTEMS", b="Hitachi", c="removed", d="SIEMENS")
    assert run_prepare(source, tmp_path / "out", "--vendor", "Siemens") == 0
    assert sorted(info.vendor for info in read_index(tmp_path / "out")) == ["GE", "Siemens", "Siemens", "unknown"]
    warnings = json.loads((tmp_path / "out" / "refused.json").read_text())["warnings"]
    assert warnings == {"vendor-contradicted": 1, "unknown-vendor": 1, "vendor-given": 1}


@pytest.mark.slow
def test_scans_without_contours_are_prepared_and_not_said_to_train(tmp_path, capsys):
    write_study(tmp_path / "scans" / "a", masks=False)
    assert run_prepare(tmp_path / "scans", tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "nothing here can be trained on yet; left out: no-masks 1: cases without contours" in printed
    assert main(["check", str(tmp_path / "out")]) == 2
    assert "no-masks 1" in capsys.readouterr().err


def test_where_nothing_is_usable_the_one_line_tells_what_the_codes_mean(tmp_path, capsys):
    write_study(tmp_path / "scans" / "a", skip=[(None, t) for t in range(1, 99)])
    shutil.copy(__file__, tmp_path / "scans" / "notes.txt")
    assert run_prepare(tmp_path / "scans", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no-short-axis-cine 1: no stack of parallel short-axis slices" in error
