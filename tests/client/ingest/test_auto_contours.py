"""Contours that a program found: kept where they are plausible and sure, marked, and never truth."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from fedcmr.client.check.folder import check
from fedcmr.client.check.html_report import render_html
from fedcmr.client.cli import main
from fedcmr.client.ingest.auto_contours import (
    IMPLAUSIBLE,
    MIN_DICE,
    NOT_FOUND,
    SURE_DICE,
    TO_CHECK,
    expected_dice,
    find_contours,
)
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.policy import SitePolicy
from fedcmr.client.trainable import trainable
from fedcmr.client.training import load_patients
from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, RV, STRUCTURES, Case, load_cases
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef
from fedcmr.shared.tasks.segmentation.teaching import can_teach, is_segmented
from fedcmr.simulations.hospital import write_hospital
from fedcmr.simulations.scanners.acquisition import SCANNERS

KEY = bytes(32)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    for vendor in SCANNERS:
        write_hospital(folder / vendor, vendor, 1, 9, 8, 77, vendor.lower())
    return folder


@pytest.fixture(scope="module")
def drawn(hospitals, tmp_path_factory) -> list[Case]:
    """With the phantoms' own masks."""
    folder = tmp_path_factory.mktemp("drawn") / "cases"
    prepare(hospitals, folder, "dicom", key=KEY)
    return load_cases(folder)


@pytest.fixture(scope="module")
def site(hospitals, drawn, tmp_path_factory) -> Path:
    """The same scans prepared without masks, by the command line; the drawn ones were read before."""
    folder = tmp_path_factory.mktemp("auto") / "cases"
    for path in hospitals.rglob("masks.nii.gz"):
        path.unlink()
    arguments = [
        "prepare",
        str(hospitals),
        str(folder),
        "--format",
        "dicom",
        "--contours",
        "auto",
        "--num-processes",
        "1",
    ]
    assert main(arguments) == 0
    return folder


def blind(case: Case) -> Case:
    return replace(case, info=replace(case.info, ef=math.nan, contours=""), masks=np.zeros_like(case.masks))


def dice(a, b) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.slow
def test_contours_of_simulated_hearts_are_found_where_they_are(drawn):
    for case in drawn:
        found = find_contours(blind(case))
        assert found.kept, found.code
        assert dice(found.masks == LV, case.masks == LV) > 0.85
        assert dice(found.masks == MYO, case.masks == MYO) > 0.65
        for phase in (ED, ES):
            shown = np.flatnonzero((found.masks[phase] == LV).any(axis=(1, 2)))
            assert (np.diff(shown) == 1).all(), "slices without a gap"
            assert all(ndimage.label(image == LV)[1] <= 1 for image in found.masks[phase]), "one ventricle per slice"


@pytest.mark.slow
def test_a_case_with_automatic_contours_has_no_true_ejection_fraction_and_tests_no_segmenter(site):
    cases = load_cases(site)
    assert [case.info.contours for case in cases] == ["auto"] * 3
    for case in cases:
        assert math.isnan(case.info.ef) and math.isnan(patient_ef(case))
        assert all((case.masks[phase] == label).any() for phase in (ED, ES) for label in STRUCTURES)
        assert not is_segmented(case) and not can_teach(case)
        told = replace(case, info=replace(case.info, ef=0.4))
        assert patient_ef(told) == 0.4, "one that a table knows is true"
        by_hand = replace(case, info=replace(case.info, contours="drawn"))
        assert is_segmented(by_hand) and patient_ef(by_hand) > 0


@pytest.mark.slow
def test_they_train_unless_the_site_s_policy_wants_drawn_ones(site, prior):
    assert trainable(site).num_patients == 3 and len(trainable(site).whole) == 3
    refused = trainable(site, None, "drawn")
    assert (refused.num_patients, refused.left_out) == (0, {"contours-automatic": 3})
    assert len(load_patients(site, prior)) == 3 and load_patients(site, prior, None, "drawn") == []
    with pytest.raises(UserError, match=r"Expected policy\.contours in"):
        SitePolicy(contours="auto")


@pytest.mark.slow
def test_check_shows_them_and_finds_nothing_wrong(site):
    report = check(site)
    assert report.contours == {"drawn": 0, "partial": 0, "auto": 3, "none": 0} and not report.num_unusable
    assert report.uses["EF test"] == 0
    page = render_html(report)
    assert page.count("contours found by a program") == 3 and 'class="lv" d="M' in page


@pytest.mark.slow
def test_what_somebody_drew_stays_and_the_rest_is_filled_in(drawn):
    case = drawn[0]
    masks = case.masks.copy()
    cavity = masks == LV
    masks[~cavity] = NOT_DRAWN
    found = find_contours(replace(blind(case), masks=masks))
    assert found.kept and not (found.masks == NOT_DRAWN).any()
    assert ((found.masks == LV) == cavity).all()
    assert dice(found.masks == MYO, case.masks == MYO) > 0.65
    assert dice(found.masks == RV, case.masks == RV) > 0.5


def test_expected_dice_is_that_of_masks_drawn_by_the_probabilities():
    rng = np.random.default_rng(1)
    masks = np.zeros((2, 1, 20, 20), np.uint8)
    for label, rows in ((RV, slice(4, 8)), (MYO, slice(8, 10)), (LV, slice(10, 16))):
        masks[:, :, rows, 4:16] = label
    likely = np.zeros((2, 1, 4, 20, 20), np.float32)
    for label in range(4):
        likely[:, :, label][masks == label] = 0.7
        likely[:, :, label][masks != label] = 0.1
    draws = rng.random((4000, 20, 20))
    cumulated = likely[0, 0].cumsum(axis=0)
    labels = (draws[:, None] > cumulated).sum(axis=1)
    near = ndimage.binary_dilation(masks[0, 0] > 0, iterations=7)
    for label, value in expected_dice(masks, likely).items():
        own = masks[0, 0] == label
        drawn = [dice(own & near, (one == label) & near) for one in labels]
        assert value == pytest.approx(np.mean(drawn), abs=0.01)
    sharp = np.stack([masks == label for label in range(4)], axis=2).astype(np.float32)
    assert expected_dice(masks, sharp) == pytest.approx(dict.fromkeys(STRUCTURES, 1.0))


@pytest.mark.slow
def test_noise_has_no_contours_and_half_a_heart_no_plausible_ones(drawn):
    rng = np.random.default_rng(0)
    case = blind(drawn[0])
    noise = replace(case, frames=rng.random(case.frames.shape, np.float32))
    found = find_contours(noise)
    assert not found.kept and found.masks is noise.masks
    shown = np.flatnonzero((drawn[0].masks[ES] == LV).any(axis=(1, 2)))
    two = slice(int(shown[len(shown) // 2]), int(shown[len(shown) // 2]) + 2)
    short = replace(case, frames=case.frames[:, two], masks=case.masks[:, two])
    assert find_contours(short).code in (IMPLAUSIBLE, NOT_FOUND)
    assert find_contours(replace(case, frames=case.frames[::-1].copy())).code in (IMPLAUSIBLE, NOT_FOUND), "grows"


@pytest.mark.slow
def test_less_sure_means_a_person_looks(drawn):
    assert all(MIN_DICE[label] < SURE_DICE[label] for label in STRUCTURES)
    blurred = [replace(blind(c), frames=ndimage.gaussian_filter(c.frames, (0, 0, 3.0, 3.0))) for c in drawn]
    before, after = ([find_contours(c) for c in cases] for cases in (map(blind, drawn), blurred))
    sureness = [min(found.dice.values(), default=0.0) for found in before]
    assert all(a < b for a, b in zip([min(f.dice.values(), default=0.0) for f in after], sureness, strict=True))
    assert all(found.code for found in after if min(found.dice.values(), default=0.0) < 0.8)
    assert TO_CHECK in {"auto-to-check"}


@pytest.mark.slow
def test_a_folder_of_drawn_contours_is_not_mixed_with_automatic_ones(hospitals, site):
    with pytest.raises(UserError, match="prepared with another contours"):
        prepare(hospitals, site, "dicom")


@pytest.mark.slow
def test_a_file_that_is_no_segmenter_is_refused_before_any_scan_is_read(hospitals, tmp_path, capsys):
    (tmp_path / "weights").write_bytes(b"nothing")
    arguments = ["prepare", str(hospitals), str(tmp_path / "out"), "--format", "dicom", "--contours", "auto"]
    assert main([*arguments, "--segmenter", str(tmp_path / "weights")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out" / "cases.csv").exists()
