"""The segmenter: it measures hearts it was not trained on, from pixels alone, and its training can be resumed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.server.cli import main
from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.public_hearts import simulate_hearts
from fedcmr.server.generation.rendering import render
from fedcmr.server.tasks.segmentation import training as segmentation
from fedcmr.server.tasks.segmentation.examples import Examples, random_views
from fedcmr.server.tasks.segmentation.training import dice, measured_ef, train_segmenter
from fedcmr.shared.case import LV, Case, CaseInfo
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.segmentation.segmenter import (
    SHIPPED_SEGMENTER,
    Segmenter,
    load_segmenter,
    save_segmenter,
    segment,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shipped() -> Segmenter:
    return load_segmenter()


@pytest.fixture(scope="module")
def rendered() -> list[Case]:
    """Hearts of known ejection fraction, rendered, that no training met."""
    rng = torch.Generator().manual_seed(4242)
    hearts = draw_hearts(24, rng, 6, torch.linspace(0.1, 0.75, 24))
    d = distances(hearts, slice_positions(hearts, 6))
    frames = ((render(hearts, d, rng) + 1) / 2).transpose(1, 2).numpy()
    masks = masks_from(d).transpose(1, 2).numpy()
    info = CaseInfo("p", "unknown", float("nan"), float("nan"), "p")
    return [Case(info, f, m, np.array([9, 2, 2], np.float32)) for f, m in zip(frames, masks, strict=True)]


def test_the_shipped_segmenter_finds_hearts_it_has_not_seen(shipped):
    hearts = simulate_hearts(12, seed=99)
    found = segment(shipped, hearts.images.float() / 127.5 - 1)
    assert found.shape == hearts.masks.shape and found.dtype == torch.uint8
    overlap = dice(found, hearts.masks)
    assert overlap["lv"] > 0.92 and overlap["myo"] > 0.82 and overlap["rv"] > 0.88


def test_it_measures_the_ejection_fraction(shipped, rendered):
    true = [ejection_fraction(case.masks) for case in rendered]
    assert np.corrcoef(true, measured_ef(shipped, rendered))[0, 1] > 0.97


def test_it_looks_at_pixels_only(shipped, rendered):
    blind = [Case(case.info, case.frames, np.zeros_like(case.masks), case.spacing_mm) for case in rendered[:3]]
    assert measured_ef(shipped, blind) == measured_ef(shipped, rendered[:3])


@pytest.mark.slow
def test_it_takes_no_contraction_for_granted(shipped, rendered):
    """The same image as ED and as ES ejects little, wide or contracted; the phase alone would suggest 0.44.

    Not nothing: the border that readers draw lies elsewhere at ES.
    """
    for phase in (0, 1):
        still = [Case(case.info, case.frames[[phase, phase]], case.masks, case.spacing_mm) for case in rendered]
        assert np.median(np.abs(measured_ef(shipped, still))) < 0.2


def test_the_sum_over_a_stack_is_the_mean_over_slices_weighted_by_ed_area(shipped, rendered):
    case = rendered[12]
    alone = [Case(case.info, case.frames[:, z : z + 1], case.masks[:, z : z + 1], case.spacing_mm) for z in range(6)]
    whole, parts = measured_ef(shipped, [case])[0], measured_ef(shipped, alone)
    ed = [int((segment(shipped, torch.from_numpy(c.frames).transpose(0, 1) * 2 - 1)[:, 0] == LV).sum()) for c in alone]
    parts = np.nan_to_num(
        parts, nan=1.0
    )  # a slice without a cavity at ES is undefined alone, and ejects all of its own
    assert whole == pytest.approx(np.average(parts, weights=ed), abs=0.01)  # bf16 rounds by batch size


def test_without_a_ventricle_there_is_no_ejection_fraction(rendered):
    blind = Segmenter().eval()
    blind.network.final_conv.bias.data.copy_(torch.tensor([9.0, 0, 0, 0] * 2))  # background everywhere
    assert np.isnan(measured_ef(blind, rendered[:2])).all()
    assert measured_ef(blind, []) == []


def test_what_ships_is_small_and_says_what_made_it():
    assert SHIPPED_SEGMENTER.stat().st_size < 2e6
    card = json.loads(SHIPPED_SEGMENTER.with_suffix(".json").read_text())
    assert "no patient" in card["trained_on"] and card["num_steps"] > 1000


def test_dice_of_known_squares():
    masks, labels = torch.zeros(1, 2, 8, 8, dtype=torch.uint8), torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    masks[..., :4, :4] = LV
    labels[..., 2:6, :4] = LV
    overlap = dice(labels, masks)
    assert overlap["lv"] == pytest.approx(2 * 8 / (16 + 16)) and np.isnan(overlap["rv"])


def test_masks_move_with_their_images():
    """Images whose only bright part is the cavity: after the augmentation the mask still lies on it."""
    masks = simulate_hearts(16, seed=5).masks
    images, moved = random_views(
        Examples((masks == LV).to(torch.uint8) * 200, masks), segmentation.PUBLIC, seed=0, step=1
    )
    cavity = moved == LV
    for image, inside in zip(images, cavity, strict=True):
        if inside.sum() > 50:
            assert image[inside].mean() > image[~inside].mean() + 0.3


@pytest.fixture
def short(monkeypatch):
    """A training of few hearts and small batches."""
    monkeypatch.setattr(segmentation, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(segmentation, "PUBLIC", replace(segmentation.PUBLIC, batch_size=4))
    monkeypatch.setattr(segmentation, "NUM_HELD_OUT", 2)


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, short, monkeypatch):
    train_segmenter(tmp_path / "whole.safetensors", 1, CPU, num_steps=4, num_hearts=4)

    def stop_at_three(examples, config, seed, step):
        if step == 3:
            raise KeyboardInterrupt
        return random_views(examples, config, seed, step)

    monkeypatch.setattr(segmentation, "random_views", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(tmp_path / "parts.safetensors", 1, CPU, num_steps=4, num_hearts=4)
    monkeypatch.setattr(segmentation, "random_views", random_views)
    train_segmenter(tmp_path / "parts.safetensors", 1, CPU, num_steps=4, num_hearts=4)
    whole, parts = (load_segmenter(tmp_path / f"{name}.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    card = json.loads((tmp_path / "parts.json").read_text())
    assert (card["num_steps"], card["seed"]) == (4, 1) and card["elapsed_minutes"] >= 0


def test_the_time_budget_ends_the_training(tmp_path, short):
    train_segmenter(tmp_path / "s.safetensors", 1, CPU, minutes=1e-6, num_steps=1000, num_hearts=4)
    assert json.loads((tmp_path / "s.json").read_text())["num_steps"] == 1


def test_a_saved_segmenter_reads_back(tmp_path):
    torch.manual_seed(0)
    segmenter = Segmenter().eval()
    save_segmenter(tmp_path / "s.safetensors", segmenter, {})
    images = torch.rand(2, 2, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            load_segmenter(tmp_path / "s.safetensors")(images), segmenter(images), atol=5e-3, rtol=5e-3
        )


def test_another_file_is_refused(tmp_path, tiny_prior):
    with pytest.raises(UserError, match=r"nothing\.safetensors is missing"):
        load_segmenter(tmp_path / "nothing.safetensors")
    from fedcmr.shared import checkpoint

    checkpoint.save(tmp_path / "other.safetensors", {"a": np.zeros(2, np.float32)}, {"format": "another"})
    with pytest.raises(UserError, match="fedcmr-server train --task segmentation"):
        load_segmenter(tmp_path / "other.safetensors")


def test_the_command_hands_its_settings_over(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(segmentation, "train_segmenter", lambda *arguments: calls.append(arguments))
    out = tmp_path / "s.safetensors"
    assert main(["segmenter", "--out", str(out), "--minutes", "1.5", "--set", "seed=3", "device=cpu"]) == 0
    assert calls == [(out, 3, CPU, 1.5)]
    assert main(["segmenter", "--out", str(tmp_path / "s.pt")]) == 2
