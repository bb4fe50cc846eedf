import csv
import hashlib
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from fnmatch import fnmatch
from importlib.metadata import version

import numpy as np
import pydicom
import pytest
import yaml

from fedcmr.server.dataset import writer as release
from fedcmr.server.dataset.datasheet import prior_sentence, real_data, study_facts, terms
from fedcmr.server.dataset.making import DRAWN, Making, keep_making, kept_making, making_of
from fedcmr.server.dataset.writer import cavity_ml, write_release
from fedcmr.server.settings import load
from fedcmr.shared.case import LV, MYO, Case, CaseInfo, load_cases
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import DATASHEET_NAME
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.provenance import PRIVATE_REAL, SIMULATED_SCANS, public

PRIVACY = {
    "unit": "one patient at one site",
    "accountant": "prv",
    "delta": 1e-3,
    "epsilon": 7.98,
    "sites": {
        "A": {"epsilon": 7.98, "steps": 11, "refused": 0},
        "B": {"epsilon": None, "steps": 0, "refused": 2},
    },
}
FACTS = {
    "study": "test",
    "privacy": PRIVACY,
    "made_with": {"rounds": 6},
    "real_data": "They were simulated.",
    "prior": "It knew simulated hearts.",
    "prior_styles": [],
    "settings": "seed: 0\n",
    "terms": "Choose a licence.",
}
SEEN = [0.7, 0.72, 0.71]


def synthetic_case(number: int, vendor: str = "GE") -> Case:
    rng = np.random.default_rng(number)
    masks = np.zeros((2, 3, 64, 64), np.uint8)
    masks[:, :, 20:44, 20:44] = MYO
    masks[0, :, 24:40, 24:40] = LV
    masks[1, :, 28:36, 28:36] = LV
    frames = rng.random(masks.shape, dtype=np.float32)
    info = CaseInfo(f"syn-{number:05d}", vendor, float("nan"), ejection_fraction(masks), f"syn-{number:05d}")
    return Case(info, frames, masks, np.array([9.5, 2, 2], np.float32))


@pytest.fixture
def cases() -> list[Case]:
    return [synthetic_case(0, "GE"), synthetic_case(1, "Siemens"), synthetic_case(2, "GE")]


def test_release_reads_back_with_labels_and_checksums(cases, tmp_path):
    folder = tmp_path / "synthetic"
    write_release(folder, cases, [0.7, 0.71, 0.72], [0.68, float("nan"), 0.73], FACTS)
    for written, read in zip(cases, load_cases(folder), strict=True):
        np.testing.assert_array_equal(written.frames, read.frames)
        assert read.info.vendor == written.info.vendor
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["vendor"] for row in rows] == ["GE", "Siemens", "GE"]
    assert [float(row["ef_requested"]) for row in rows] == [0.7, 0.71, 0.72]
    assert [row["ef_measured"] for row in rows] == ["0.68", "", "0.73"]
    assert float(rows[0]["ef"]) == pytest.approx(1 - 8**2 / 16**2)
    assert float(rows[0]["lv_ed_ml"]) == pytest.approx(3 * 16**2 * 9.5 * 4 / 1000, abs=0.005)
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {
        "SHA256SUMS"
    }
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_datasheet_tells_what_was_spent(cases, tmp_path):
    write_release(tmp_path / "s", cases, None, SEEN, FACTS)
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    assert "epsilon = 7.98 at delta = 0.001" in text and "| B | - | 0.001 |" in text
    assert "2 in the style of GE, 1 in the style of Siemens" in text
    assert "3 slices 9.5 mm apart, of 64 x 64 pixels" in text


def test_datasheet_tells_whether_the_images_show_what_was_requested(cases, tmp_path):
    requested, seen = [0.2, 0.5, 0.8], [0.25, 0.45, 0.70]
    write_release(tmp_path / "s", cases, requested, seen, FACTS)
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    assert f"r = {np.corrcoef(requested, seen)[0, 1]:.3f}" in text
    assert f"mean absolute difference {100 * np.mean([0.05, 0.05, 0.10]):.1f} " in text and "in 0 of 3 patients" in text
    write_release(tmp_path / "s", cases, requested, [0.25, float("nan"), float("nan")], FACTS)
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    assert "r = unknown, mean absolute difference 5.0 " in text and "in 2 of 3 patients" in text


def test_datasheet_warns_where_there_was_no_privacy(cases, tmp_path):
    write_release(tmp_path / "s", cases, None, SEEN, {**FACTS, "privacy": {**PRIVACY, "epsilon": None}})
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    assert "trained without differential privacy" in text and "epsilon =" not in text


def test_a_second_release_replaces_the_first_whole(cases, tmp_path):
    write_release(tmp_path / "s", cases, None, SEEN, FACTS)
    write_release(tmp_path / "s", cases[:1], None, SEEN[:1], FACTS)
    assert len(list((tmp_path / "s" / "cases").iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_of_something_else_is_left_alone(cases, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        write_release(tmp_path, cases, None, SEEN, FACTS)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_cavity_volume_counts_voxels():
    case = synthetic_case(0)
    assert cavity_ml(case, 1) == pytest.approx((case.masks[1] == LV).sum() * 9.5 * 2 * 2 / 1000)


@pytest.mark.parametrize("exports", [(), (True,), (False, True), (False, False, True), (True, True, True)])
def test_datasheet_names_every_file_and_no_other(cases, tmp_path, exports):
    write_release(tmp_path / "s", cases, None, SEEN, FACTS, *exports)
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    patterns = [re.sub("<[a-z]+>", "*", name) for name in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)]
    files = [path.relative_to(tmp_path / "s").as_posix() for path in (tmp_path / "s").rglob("*") if path.is_file()]
    for file in files:
        assert sum(fnmatch(file, pattern) for pattern in patterns) == 1, file
    for pattern in patterns:
        assert any(fnmatch(file, pattern) for file in files), pattern


def test_datasheet_answers_each_group_of_questions_and_tells_how_it_was_made(cases, tmp_path, prior):
    config = load("acdc", ["data_root=/secret/scans", "synthesis.num_steps=7", "seed=31"])
    (tmp_path / "generator").write_bytes(b"weights")
    facts = study_facts("study", config, prior, tmp_path / "generator", PRIVACY, [public("ACDC")] * 2, ["GE"])
    write_release(tmp_path / "s", cases, [0.7] * 3, [0.68, float("nan"), 0.73], facts)
    text = (tmp_path / "s" / DATASHEET_NAME).read_text()
    for heading in (
        "Motivation",
        "Composition",
        "How it was made",
        "Privacy",
        "Uses",
        "Distribution",
        "Maintenance",
        "Limits",
    ):
        assert f"\n## {heading}\n" in text
    assert f"fedcmr {version('fedcmr')}" in text and f"torch {version('torch')}" in text and prior.sha256 in text
    assert f"generator (SHA-256): {hashlib.sha256(b'weights').hexdigest()}" in text
    settings = yaml.safe_load(re.search("```yaml\n(.+?)```", text, re.DOTALL)[1])
    assert settings["seed"] == 31 and settings["synthesis"]["num_steps"] == 7
    assert settings["privacy"]["target_epsilon"] == config.privacy.target_epsilon
    assert "secret" not in text and "CC BY-NC-SA" in text and "Bernard et al. (2018)" in text
    assert "The scans of all 2 sites were those of real patients, from the public data set ACDC." in text
    assert "No site gave the style of GE: these images have the public prior's own." in text
    assert "on what its file does not say" in text, "this prior's file names no hearts"
    assert "| GE | 2 | 0.75 (0.75 to 0.75) | 2, 2.5 |" in text
    assert "| Siemens | 1 | 0.75 (0.75 to 0.75) | 0, unknown |" in text


FREE = "whoever made it may choose its licence"
NOBODY = "no patient was involved"


def test_only_sites_that_are_all_simulated_involve_no_patient():
    assert NOBODY in real_data([SIMULATED_SCANS] * 3) and FREE in terms([SIMULATED_SCANS] * 3, {})
    for others in ([], [PRIVATE_REAL], [public("ACDC")]):
        sites = [SIMULATED_SCANS] * 2 + others if others else []
        assert NOBODY not in real_data(sites) and FREE not in terms(sites, {})
    assert "Nobody has recorded" in real_data([]) and "ask its coordinator" in terms([], {})


def test_a_mixed_study_tells_each_kind_of_site_and_the_terms_of_its_public_data():
    sites = [PRIVATE_REAL, public("ACDC"), PRIVATE_REAL]
    assert real_data(sites).splitlines() == [
        "The scans of 2 of the 3 sites were those of real patients, and private.",
        "The scans of 1 of the 3 sites were those of real patients, from the public data set ACDC.",
    ]
    assert "CC BY-NC-SA 4.0" in terms(sites, {}) and "the sites'\nagreement" in terms(sites, {})
    assert "agreement" not in terms([public("ACDC")], {})


def test_the_priors_own_file_says_what_it_learnt():
    assert "simulated hearts alone" in prior_sentence(load_prior(None).made_by)
    assert "does not say" in prior_sentence({}) and "simulated" not in prior_sentence({})


def test_a_prior_that_has_seen_patients_says_so_and_passes_their_terms_on():
    seen = {"num_hearts": "6000", "public_scans": '{"ACDC": 79}', "terms": '["ACDC: CC BY-NC-SA 4.0"]'}
    assert "simulated hearts and public scans of patients (ACDC: 79)" in prior_sentence(seen)
    assert FREE not in terms([SIMULATED_SCANS], seen) and "ACDC: CC BY-NC-SA 4.0. Keep" in terms(
        [SIMULATED_SCANS], seen
    )
    assert FREE in terms([SIMULATED_SCANS], {"num_hearts": "6000", "public_scans": "{}", "terms": "[]"})


def test_where_the_shapes_come_from_is_told(cases, tmp_path):
    write_release(tmp_path / "plain", cases, [0.7] * 3, SEEN, FACTS)
    assert "a public model and cost no privacy" in (tmp_path / "plain" / DATASHEET_NAME).read_text()
    write_release(tmp_path / "own", cases, [0.7] * 3, SEEN, {**FACTS, "populations": ["GE", "Siemens"]})
    text = (tmp_path / "own" / DATASHEET_NAME).read_text()
    assert "cost no privacy" not in text and "GE, Siemens released, within the privacy stated here" in text


def test_without_privacy_the_datasheet_does_not_say_that_no_image_shows_a_person(cases, tmp_path):
    for epsilon, promised in ((7.98, True), (None, False)):
        write_release(tmp_path / "s", cases, None, SEEN, {**FACTS, "privacy": {**PRIVACY, "epsilon": epsilon}})
        assert ("No image in this folder shows a person" in (tmp_path / "s" / DATASHEET_NAME).read_text()) == promised


def test_a_set_bent_from_public_scans_says_whom_it_shows_and_splits_by_scan(cases, tmp_path):
    making = Making("ACDC: 79", 75, is_refined=False)
    grouped = [replace(case, info=replace(case.info, group=f"scan-{n // 2}")) for n, case in enumerate(cases)]
    facts = {**FACTS, "making": making.facts()}
    write_release(tmp_path / "s", grouped, None, SEEN, facts, dicom=True, nnunet=True)
    text = " ".join((tmp_path / "s" / DATASHEET_NAME).read_text().split())
    assert "shows a person, if out of shape" in text and "No image in this folder shows a person" not in text
    assert "75 scans are behind the patients" in text and "no network went over it" in text
    assert "was rendered" not in text and "independent of each other" not in text
    entries = json.loads((tmp_path / "s" / "datalist.json").read_text())["training"]
    fold_of = {entry["patient"]: entry["fold"] for entry in entries}
    assert [fold_of[case.info.pseudonym] for case in cases] == [0, 0, 1]
    image = pydicom.dcmread(next((tmp_path / "s" / "dicom").rglob("ed_00.dcm")))
    assert "public data set (ACDC: 79)" in image.DerivationDescription and "person" not in image.PatientComments
    croissant = json.loads((tmp_path / "s" / "croissant.json").read_text())
    assert "makers of the public sets" in croissant["rai:dataAnnotationProtocol"]


def test_guides_are_named_by_their_sets_and_their_terms_bind(tmp_path, prior, write_cases):
    write_cases(tmp_path / "secret", "GE", 2, seed=3)
    (tmp_path / "secret" / "prepared.json").write_text(json.dumps({"provenance": public("ACDC").as_json()}))
    guided = [f"synthesis.guides=[{tmp_path / 'secret'}]", "synthesis.num_steps=0"]
    config = load("default", [*guided, "federation.adapter=statistics"])
    (tmp_path / "generator").write_bytes(b"weights")
    facts = study_facts("study", config, prior, tmp_path / "generator", PRIVACY, [SIMULATED_SCANS], [])
    assert yaml.safe_load(facts["settings"])["synthesis"]["guides"] == ["ACDC"]
    assert "CC BY-NC-SA" in facts["terms"] and FREE not in facts["terms"]
    assert facts["making"].items() >= {"scans": "ACDC: 2", "num_scans": 2, "is_refined": False}.items()
    keep_making(facts, tmp_path)
    assert kept_making(tmp_path) == making_of(facts) and kept_making(tmp_path / "secret") == DRAWN


def test_a_broken_release_leaves_the_earlier_one(cases, tmp_path, monkeypatch):
    write_release(tmp_path / "s", cases, None, SEEN, FACTS)
    before = (tmp_path / "s" / "SHA256SUMS").read_text()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(release, "export_nifti", fail)
    with pytest.raises(OSError):
        write_release(tmp_path / "s", cases[:1], None, SEEN[:1], FACTS, nifti=True)
    assert (tmp_path / "s" / "SHA256SUMS").read_text() == before
    monkeypatch.undo()
    write_release(tmp_path / "s", cases[:1], None, SEEN[:1], FACTS, nifti=True)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_equal_cases_make_equal_files(cases, tmp_path):
    for name in ("a", "b"):
        write_release(tmp_path / name, cases, None, SEEN, FACTS, dicom=True, nifti=True, nnunet=True)
        time.sleep(1.1)  # a file that holds its time differs
    assert (tmp_path / "a" / "SHA256SUMS").read_text() == (tmp_path / "b" / "SHA256SUMS").read_text()
