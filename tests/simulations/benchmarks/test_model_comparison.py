"""Kinds of generators beside each other: the maths where the answer is known, and the command on few pictures."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from fedcmr.server.generation import pretraining
from fedcmr.shared.diffusion import integrate, interpolate
from fedcmr.shared.networks.generator import Generator
from fedcmr.simulations.benchmarks import generative_models as painters
from fedcmr.simulations.benchmarks import model_comparison as kinds
from fedcmr.simulations.benchmarks.generative_models import KINDS, Blocks, Latent, Painter, Small
from fedcmr.simulations.benchmarks.model_comparison import frechet_distance, main


def pictures(num: int = 6) -> torch.Tensor:
    return torch.rand((num, 2, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("side", [1, 2, 4])
def test_blocks_lose_nothing(side):
    space = Blocks(side)
    points = space.encode(pictures())
    assert points.shape == (6, space.channels, 64 // side, 64 // side)
    assert torch.equal(space.decode(points), pictures())


def test_small_pictures_keep_what_is_coarse():
    coarse = torch.linspace(-1, 1, 64)[None, None, None].expand(1, 2, 64, 64)
    space = Small()
    assert space.encode(coarse).shape == (1, 2, 32, 32)
    torch.testing.assert_close(space.decode(space.encode(coarse)), coarse, atol=0.02, rtol=0)


def test_latents_are_standardised_and_take_the_shape_of_pictures_again():
    space = Latent().requires_grad_(False)
    space.standardise(pictures())
    latents = space.encode(pictures())
    assert latents.shape == (6, 8, 16, 16)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-2, rtol=0)
    assert space.decode(latents).shape == (6, 2, 64, 64)


class KnowsTheNoise(Painter):
    """Predicts the noise that was added, whatever it is shown."""

    def __init__(self, noise: torch.Tensor):
        super().__init__(Blocks(1), "noise")
        self.noise, self.seen = noise, []

    def _predict(self, x_t, t, masks, code):
        self.seen.append(t)
        return self.noise


def test_known_noise_leads_to_the_picture_by_any_number_of_steps():
    image, noise = pictures(3), torch.randn((3, 2, 64, 64), generator=torch.Generator().manual_seed(1))
    painter, masks, code = KnowsTheNoise(noise), torch.zeros((3, 2, 64, 64), dtype=torch.uint8), torch.zeros((3, 11))
    t = torch.tensor([0.02, 0.5, 0.9])
    torch.testing.assert_close(painter(interpolate(noise, image, t), t, masks, code), image - noise, atol=1e-3, rtol=0)
    for num_steps in (1, 4):
        painted = integrate(painter, masks, code, image, noise, 0.3, num_steps)
        torch.testing.assert_close(painted, image, atol=1e-4, rtol=0)


def test_noise_is_learnt_on_the_cosine_schedule():
    noise = torch.randn((3, 2, 64, 64), generator=torch.Generator().manual_seed(1))
    painter, masks, code = KnowsTheNoise(noise), torch.zeros((3, 2, 64, 64), dtype=torch.uint8), torch.zeros((3, 11))
    draw = torch.tensor([0.0, 0.25, 0.9])
    assert painter.loss(pictures(3), masks, code, draw, noise) == 0
    t = painter.seen[0].double()
    ratio = torch.tan((1 - draw.double()) * math.pi / 2)  # noise to picture, Nichol and Dhariwal's sin to cos
    torch.testing.assert_close((1 - t[1:]) / t[1:], ratio[1:], atol=0, rtol=1e-5)
    assert abs(t[0]) < 1e-6


def test_the_first_kind_is_the_project_s():
    def shapes(unet):
        return {name: p.shape for name, p in unet.named_parameters() if "class_embedding" not in name}

    assert shapes(KINDS["flow, blocks of 2"]().unet) == shapes(Generator().unet)


def test_frechet_distance_where_it_is_known():
    x = np.random.default_rng(0).normal(size=(400, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 3) == pytest.approx(5 * 9)
    centred = x - x.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(np.trace(np.cov(x, rowvar=False)))
    y = np.random.default_rng(2).normal(size=(300, 5))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(expected)


def test_the_command_trains_paints_and_goes_on(tmp_path, monkeypatch, capsys):
    out, figures = tmp_path / "kinds", tmp_path / "kinds.json"
    arguments = [
        "kinds",
        "--minutes",
        "0.02",
        "--num-hearts",
        "8",
        "--num-cases",
        "4",
        "--out",
        str(out),
        "--kinds",
        "diffusion, blocks of 2;flow, latent space",
        "--json",
        str(figures),
    ]
    monkeypatch.setattr("sys.argv", [*arguments, "--plot", str(tmp_path / "kinds.png")])
    assert main() == 0
    first = json.loads(figures.read_text())
    rows = first["rows"]
    assert [row["kind"] for row in rows[::2]] == ["rendered hearts", "diffusion, blocks of 2", "flow, latent space"]
    assert rows[0]["code_error"] == 0 and rows[0]["r"] > 0.9
    assert all(row["train_steps"] >= 1 and row["ms_per_pair"] > 0 for row in rows[2:])
    assert all(row["distance"] > rows[0]["distance"] for row in rows[2:])  # a second of training paints noise
    assert (tmp_path / "kinds.png").stat().st_size > 1000

    monkeypatch.setattr(kinds, "train", None)  # the networks are there
    assert main() == 0
    again = json.loads(figures.read_text())["rows"]
    assert [row["distance"] for row in again] == [row["distance"] for row in rows]

    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [*arguments, "--seed", "1"])
    assert main() == 2 and "remove it or give another --out" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "--kinds", "gan"])
    assert main() == 2 and "--kinds names 'gan'" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "--plot", str(tmp_path / "nowhere" / "kinds.png")])
    assert main() == 2 and "for --plot in a folder that is there" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "--num-cases", "0"])
    assert main() == 2 and "--num-cases 0" in capsys.readouterr().err


def test_training_lowers_the_loss(monkeypatch):
    hearts = kinds.simulate_hearts(8, 0)
    monkeypatch.setattr(pretraining, "WARM_UP_STEPS", 2)
    draws = [torch.rand(32), torch.randn(32, 8, 32, 32)]

    def loss(painter: Painter) -> float:
        points = painter.space.encode(hearts.images[:32].float() / 127.5 - 1)
        with torch.no_grad():
            return float(painter.loss(points, hearts.masks[:32], hearts.codes[:32], *draws))

    torch.manual_seed(0)
    fresh = loss(KINDS["flow, blocks of 2"]().eval())
    assert (
        loss(painters.train("flow, blocks of 2", hearts, 8, 0)[0]) < 0.99 * fresh
    )  # few steps fit into eight seconds of a busy machine
