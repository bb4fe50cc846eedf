"""A generator's grid is that of its file: what it is trained on, told, and makes is on it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedcmr.client.training import Execution, LocalSteps, fine_tune, load_patients
from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.pretraining import _first_model, pretrain
from fedcmr.server.generation.rendering import render
from fedcmr.server.generation.synthesis import synthesize
from fedcmr.server.settings import Config, GeneratorConfig, PretrainConfig, SynthesisConfig, load
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.networks.unet import Architecture
from fedcmr.shared.models.prior import Prior, load_prior
from fedcmr.shared.privacy import Mechanism
from fedcmr.shared.style import STYLE_NAMES, regions, style_vectors
from fedcmr.shared.views import NETWORK_GRID, Grid, slice_pairs

FINE = Grid(96, 1.5)


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Prior:
    path = tmp_path_factory.mktemp("fine") / "prior.safetensors"
    generator = GeneratorConfig(size_px=96, pixel_mm=1.5, patch=4, channels=[16, 16, 16])
    pretrain(Config(device="cpu", generator=generator, pretrain=PretrainConfig(None, 8, 1, 2)), path)
    return load_prior(path)


def hearts(grid: Grid, seed: int = 3):
    rng = torch.Generator().manual_seed(seed)
    drawn = draw_hearts(4, rng, 6)
    d = distances(drawn, slice_positions(drawn, 6), grid)
    return render(drawn, d, rng), masks_from(d)


@pytest.mark.slow
def test_its_file_says_it_and_a_file_of_an_earlier_version_has_the_first_one(fine, tiny_prior):
    assert fine.grid == FINE and fine.generator.architecture.patch == 4
    assert load_prior(tiny_prior).grid == load_prior().grid == NETWORK_GRID
    assert load_prior().generator.architecture == Architecture()


@pytest.mark.slow
def test_synthetic_cases_are_on_it(fine):
    config = SynthesisConfig(num_cases=2, num_slices=4, num_steps=2)
    case = synthesize(fine, None, config, ["GE"], seed=0, device_name="cpu").cases[0]
    assert case.frames.shape == (2, 4, 96, 96) and tuple(case.spacing_mm[1:]) == (1.5, 1.5)
    assert slice_pairs(case)[0].shape == (4, 2, 64, 64), "readers bring it to theirs"
    assert (case.masks == 3).any()


@pytest.mark.slow
def test_sites_train_on_it(fine, tmp_path, write_cases):
    write_cases(tmp_path / "site", "GE", 2, seed=1)
    patients = load_patients(tmp_path / "site", fine)
    assert all(patient.images.shape[2:] == (96, 96) for patient in patients)
    arrays = {name: p.detach().numpy().copy() for name, p in fine.generator.trainable("lora").items()}
    mechanism = Mechanism(1.0, 1.0, 1, 0.03, 1e-3, nominal_patients=4)  # two of the four gradients are of nobody
    steps = LocalSteps(learning_rate=0.1, num_views=2, seed=0, server_round=2)
    update = fine_tune(fine.generator, patients, arrays, mechanism, steps, Execution(torch.device("cpu")))
    assert {name: value.shape for name, value in update.items()} == {n: a.shape for n, a in arrays.items()}
    assert all(np.isfinite(value).all() and value.any() for value in update.values())


def test_a_heart_lies_where_it_lies_on_any_grid():
    (_, coarse), (_, fine) = hearts(Grid(64, 2.0)), hearts(Grid(128, 1.0))
    for label in (1, 2, 3):
        share = F.avg_pool2d((fine == label).flatten(0, 1).float(), 2)
        assert ((share > 0.5) != (coarse == label).flatten(0, 1)).float().mean() < 0.01


def test_surroundings_are_as_coarse_in_millimetres_on_any_grid():
    """Distance over which neighbouring pixels are alike, by the correlation of images shifted by 8 mm."""
    alike = []
    for grid in (Grid(64, 2.0), Grid(128, 1.25), Grid(128, 1.0)):
        images = hearts(grid)[0].flatten(0, 2)
        step = round(8 / grid.pixel_mm)
        pairs = torch.stack([images[..., step:].flatten(), images[..., :-step].flatten()])
        alike.append(float(torch.corrcoef(pairs)[0, 1]))
    assert max(alike) - min(alike) < 0.1, alike


def test_a_style_is_that_of_regions_in_millimetres():
    images, masks = hearts(Grid(64, 2.0))
    large = [F.interpolate(x.flatten(0, 1).float(), scale_factor=2).unflatten(0, x.shape[:2]) for x in (images, masks)]
    fine_images, fine_masks = large[0], large[1].to(torch.uint8)
    band, fine_band = (
        float(regions(m.flatten(0, 1), mm)[3].float().mean()) for m, mm in ((masks, 2.0), (fine_masks, 1.0))
    )
    assert fine_band == pytest.approx(band, rel=0.01)
    coarse, fine = style_vectors(images, masks), style_vectors(fine_images, fine_masks, 1.0)
    names = [i for i, name in enumerate(STYLE_NAMES) if name not in ("edge_sharpness", "noise_level")]
    torch.testing.assert_close(fine[:, names], coarse[:, names], atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("size_px=100", r"generator\.size_px a multiple of 16 up to 512, got 100"),
        ("patch=0", r"generator\.patch in 1\.\.8"),
        ("pixel_mm=0", r"generator\.pixel_mm in 0\.5\.\.4"),
        ("channels=[10]", r"generator\.channels 1 to 8 multiples of 16"),
    ],
)
def test_sizes_that_no_network_has_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        load("default", [f"generator.{setting}"])


def test_a_prior_of_other_sizes_is_no_start(tmp_path, tiny_prior):
    settings = PretrainConfig(num_hearts=8, num_steps=1, batch_size=2, start=str(tiny_prior))
    with pytest.raises(UserError, match="other sizes than the settings"):
        pretrain(Config(device="cpu", pretrain=settings), tmp_path / "prior.safetensors")


@pytest.mark.slow
def test_a_prior_of_another_grid_is_a_start_but_for_the_layers_that_read_and_write_pixels(tmp_path):
    training, sizes, path = PretrainConfig(None, 8, 1, 2), {"channels": [16, 16, 16]}, tmp_path / "first.safetensors"
    pretrain(Config(device="cpu", generator=GeneratorConfig(**sizes), pretrain=training), path)
    first = load_prior(path)
    generator = GeneratorConfig(size_px=96, pixel_mm=1.5, patch=4, unknown_labels=True, **sizes)
    again = replace(training, start=str(path))
    model, sha256 = _first_model(Config(device="cpu", generator=generator, pretrain=again))
    assert sha256 == first.sha256 and model.architecture.grid == FINE
    learnt, weights = first.generator.state_dict(), model.state_dict()
    differ = {name for name in weights if learnt[name].shape != weights[name].shape}
    assert differ == {"unet.conv_in.conv.weight", "unet.out.2.conv.weight", "unet.out.2.conv.bias"}
    assert all(torch.equal(learnt[name], weights[name]) for name in weights if name not in differ)
