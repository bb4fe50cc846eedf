"""A prior may learn from public scans beside simulated hearts, whole or drawn in part, and from nobody else's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.client.training import load_patients
from fedcmr.server.generation.pretraining import pretrain
from fedcmr.server.generation.public_hearts import hide_labels, read_scans, simulate_hearts, with_scans
from fedcmr.server.settings import Config, GeneratorConfig, PretrainConfig, load
from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, fingerprint, load_cases, save_case, write_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.base import Condition
from fedcmr.shared.models.flow_matching import FlowMatching
from fedcmr.shared.models.networks.unet import Architecture
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.provenance import public
from fedcmr.shared.style import STYLE_NAMES
from fedcmr.shared.views import NETWORK_GRID
from fedcmr.simulations.run import simulate

SMALL = {"size_px": 32, "pixel_mm": 4.0, "channels": [16, 16]}


def record_as(folder, origin):
    (folder / "prepared.json").write_text(json.dumps({"provenance": origin.as_json()}))


@pytest.fixture
def scans(tmp_path, write_cases):
    write_cases(tmp_path / "scans", "GE", 3, seed=1)
    record_as(tmp_path / "scans", public("Sunnybrook"))
    return tmp_path / "scans"


@pytest.fixture
def drawn_in_part(scans):
    """The same with masks as Sunnybrook's: the cavity in both frames, muscle at end-diastole, nothing else."""
    cases = []
    for case in load_cases(scans):
        masks = np.full_like(case.masks, NOT_DRAWN)
        masks[case.masks == LV] = LV
        masks[ED][case.masks[ED] == MYO] = MYO
        cases.append(replace(case, masks=masks, info=replace(case.info, contours="partial")))
        save_case(scans, cases[-1])
    write_index(scans, [case.info for case in cases])
    return scans


def settings(**generator):
    pretraining = PretrainConfig(num_hearts=8, num_steps=2, batch_size=4)
    return Config(device="cpu", generator=GeneratorConfig(**SMALL, **generator), pretrain=pretraining)


@pytest.mark.slow
def test_scans_take_their_share_and_have_their_own_patient_s_style(scans):
    hearts = simulate_hearts(8, 0)
    both = with_scans(hearts, load_cases(scans), NETWORK_GRID, partly=False)
    assert both.num_scanned == len(both.images) - len(hearts.images) == 9
    assert torch.equal(both.images[: len(hearts.images)], hearts.images)
    own = both.styles[-9:].reshape(3, 3, -1)
    assert (own == own[:, :1]).all() and not torch.equal(own[0], own[1])
    drawn = both.draw(4000, torch.Generator().manual_seed(0), scan_share=0.25)[2]
    is_scan = (drawn[:, None] == both.styles[-9:][None]).all(2).any(1).float().mean()
    assert is_scan == pytest.approx(0.25, abs=0.02)


@pytest.mark.slow
def test_the_card_says_who_was_learnt_from_and_the_prior_knows_them_again(scans, tmp_path):
    pretrain(settings(), tmp_path / "prior.safetensors", None, [scans])
    card = json.loads((tmp_path / "prior.json").read_text())
    assert card["public_scans"] == {"Sunnybrook": 3} and "CC0" in card["terms"][0]
    assert load_prior(tmp_path / "prior.safetensors").has_seen == {fingerprint(case) for case in load_cases(scans)}
    assert load_prior().has_seen == frozenset()


def test_nobody_of_a_study_has_taught_its_prior(scans, tmp_path, write_cases):
    pretrain(settings(), tmp_path / "prior.safetensors", None, [scans])
    write_cases(tmp_path / "data" / "a" / "train", "Siemens", 3, seed=2)
    write_cases(tmp_path / "data" / "a" / "test", "GE", 3, seed=1)  # the very scans
    overrides = ["hospitals.source=prepared", f"data_root={tmp_path / 'data'}", "hospitals.nominal_patients=20"]
    config = load("default", [*overrides, f"prior={tmp_path / 'prior.safetensors'}"])
    with pytest.raises(UserError, match=r"has learnt from 3 patients of .*test.*, who cannot be private or test"):
        simulate(config, tmp_path / "run", "prepare")


def test_private_scans_and_automatic_contours_teach_no_prior(tmp_path, write_cases, scans):
    write_cases(tmp_path / "private", "GE", 2, seed=5)
    with pytest.raises(UserError, match="private is not recorded as a public data set"):
        pretrain(settings(), tmp_path / "prior.safetensors", None, [tmp_path / "private"])
    write_index(scans, [replace(case.info, contours="auto") for case in load_cases(scans)])
    with pytest.raises(UserError, match="no case with contours that people drew"):
        read_scans([scans])


@pytest.mark.slow
def test_whom_the_prior_to_start_from_has_seen_the_next_one_has_seen_too(scans, tmp_path):
    pretrain(settings(), tmp_path / "first.safetensors", None, [scans])
    config = settings()
    config.pretrain.start = str(tmp_path / "first.safetensors")
    pretrain(config, tmp_path / "second.safetensors")
    first, second = (load_prior(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    assert len(first.has_seen) == 3 and second.has_seen == first.has_seen
    card = json.loads((tmp_path / "second.json").read_text())
    assert card["public_scans"] == {"Sunnybrook": 3} and len(card["terms"]) == 1


@pytest.mark.slow
def test_scans_drawn_in_part_teach_a_network_that_is_told(drawn_in_part, tmp_path):
    with pytest.raises(UserError, match=r"set generator\.unknown_labels to true"):
        pretrain(settings(), tmp_path / "blind.safetensors", None, [drawn_in_part])
    pretrain(settings(unknown_labels=True), tmp_path / "told.safetensors", None, [drawn_in_part])
    told = load_prior(tmp_path / "told.safetensors")
    assert told.generator.architecture.unknown_labels
    patients = load_patients(drawn_in_part, told)
    assert all(len(patient.images) == 3 for patient in patients), "they train it at a site, too"
    assert (patients[0].masks == NOT_DRAWN).any()


def test_a_network_that_is_told_tells_unknown_from_background():
    torch.manual_seed(0)
    model = FlowMatching(Architecture((16, 16), norm_num_groups=4, unknown_labels=True)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    masks = torch.zeros(1, 2, 32, 32, dtype=torch.uint8)
    style, x, t = torch.zeros(1, len(STYLE_NAMES)), torch.randn(1, 2, 32, 32), torch.tensor([0.5])
    unknown = masks.clone()
    unknown[..., 8:16, 8:16] = NOT_DRAWN
    with torch.no_grad():
        first, second = (model.velocity(x, t, Condition(part, style)) for part in (masks, unknown))
    assert not torch.allclose(first, second)


@pytest.mark.slow
def test_labels_are_hidden_as_half_labelled_sets_hide_them():
    masks = simulate_hearts(50, 0).masks
    hidden = hide_labels(masks, torch.Generator().manual_seed(0))
    changed = (hidden != masks).flatten(1).any(1)
    assert changed.float().mean() == pytest.approx(0.2, abs=0.06)
    part, whole = hidden[changed], masks[changed]
    assert torch.equal(part == LV, whole == LV), "the cavity is always drawn"
    assert not (part == 1).any() and not (part == 0).any(), "what is no other structure may be any"
    muscle = torch.stack([(part[:, phase] == MYO).flatten(1).any(1) for phase in (ED, ES)])
    assert all(0.2 < share < 0.8 for share in muscle.float().mean(1))
    assert set(part.unique().tolist()) <= {MYO, LV, NOT_DRAWN}
