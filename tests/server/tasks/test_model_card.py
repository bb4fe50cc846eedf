"""The ResNet50's card states its training and its tests, and nothing of a patient."""

import hashlib
import json
import math
from dataclasses import replace

import pytest

from fedcmr.server.evaluation.coverage import coverage
from fedcmr.server.evaluation.tables import table
from fedcmr.server.settings import AugmentationConfig, RegressionConfig
from fedcmr.server.tasks.ejection_fraction.model_card import training_facts, write_model_card
from fedcmr.server.tasks.facts import of_folders
from fedcmr.shared.case import Case, CaseInfo
from fedcmr.shared.provenance import SIMULATED_SCANS, public
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, save_regressor
from tests.server.disc_case import disc_case

CONFIG = RegressionConfig(num_steps=7, augmentation=AugmentationConfig(blur_px=0.0))
EFS = (0.2, 0.40, 0.45, 0.50, 0.7)


@pytest.fixture
def cases() -> list[Case]:
    cases = [disc_case(f"hidden-{i}", ef, seed=i) for i, ef in enumerate(EFS)]
    return [replace(case, info=replace(case.info, vendor="GE" if i else "Philips")) for i, case in enumerate(cases)]


@pytest.fixture
def weights(cases, tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    model = Regressor(0.45)
    model.sd_floor.fill_(0.031)
    model.sd_gain.fill_(1.0)
    save_regressor(path, model, training_facts(cases, CONFIG, 3, "Cases of a test."))
    return path


def test_facts_count_patients_by_vendor_and_class(cases):
    blank = Case(CaseInfo("x", "GE", 3.0, math.nan, "x"), cases[0].frames, 0 * cases[0].masks, cases[0].spacing_mm)
    facts = training_facts([*cases, blank], CONFIG, 3, "Cases of a test.")
    assert facts["trained_on"] == 5 and facts["vendors"] == {"GE": 4, "Philips": 1}
    assert facts["classes"] == {"reduced": 2, "mildly reduced": 1, "preserved": 2}
    assert facts["settings"]["augmentation"]["blur_px"] == 0


def test_an_untested_network_says_so(weights):
    text = write_model_card(weights).read_text()
    assert "Not tested yet: `fedcmr-server evaluate --model model.safetensors" in text
    assert "5 patients: 4 GE, 1 Philips." in text and "num_steps: 7" in text and "seed 3" in text
    assert "2 reduced, 1 mildly reduced, 2 preserved" in text and "mean 0.45" in text and "3.1 points" in text
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in text
    assert "hidden" not in text


def test_figures_are_those_of_the_scores(weights):
    true, predicted, vendors = [0.3, 0.5, 0.6, 0.4], [0.35, 0.5, 0.5, 0.42], ["GE", "GE", "GE", "Philips"]
    scores = {"ward": table(true, predicted, vendors, 200, 0)}
    text = write_model_card(weights, scores, {"ward": coverage(true, predicted, [0.04] * 4)}).read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ward |")]
    by_vendor = {row[1].strip(): [cell.strip() for cell in row[2:]] for row in rows}
    assert set(by_vendor) == {"all", "GE", "Philips"}
    figures = scores["ward"]["all"]
    assert by_vendor["all"][0] == "4" and by_vendor["all"][1].startswith(f"{figures['mae_points']:.1f} (")
    assert by_vendor["all"][2].startswith(f"{figures['r2']:.2f} (")
    assert by_vendor["Philips"][2] == "undefined", "one patient has no r2"
    assert "Observed coverage on ward, 4 patients: 50% (nominal 50%)" in text


def test_weights_without_facts_get_no_card(tiny, tmp_path):
    save_regressor(tmp_path / "old.safetensors", Regressor(0.5), {"seed": 0})
    assert write_model_card(tmp_path / "old.safetensors") is None
    assert not (tmp_path / "old.md").exists()


def test_a_synthetic_folder_is_known_by_its_datasheet(tmp_path):
    for name in ("made", "ward"):
        (tmp_path / name).mkdir()
    (tmp_path / "made" / "DATASHEET.md").touch()
    text = of_folders([tmp_path / "made", tmp_path / "ward"])
    assert "datasheets: made." in text and "ward: real scans that are private" in text
    assert "may disclose the real patients" in text
    (tmp_path / "ward" / "prepared.json").write_text(json.dumps({"provenance": public("ACDC").as_json()}))
    assert "Bernard et al. (2018)" in of_folders([tmp_path / "ward"])
    (tmp_path / "ward" / "prepared.json").write_text(json.dumps({"provenance": SIMULATED_SCANS.as_json()}))
    text = of_folders([tmp_path / "ward"])
    assert "simulated scans, of no patient" in text and "disclose" not in text
    assert "scans" not in of_folders([tmp_path / "made"])
