"""The saliency benchmark: occlusion finds the place that matters, and agreement is that of the ranks."""

import json

import pytest
import torch
from torch import Tensor, nn

from fedcmr.shared.tasks.ejection_fraction.network import Regressor, save_regressor
from fedcmr.simulations.benchmarks import saliency
from fedcmr.simulations.benchmarks.saliency import SQUARE_PX, STEP_PX, _print, compare, covering, main, untrained

pytestmark = pytest.mark.slow


class Corner(nn.Module):
    """Predicts the mean of the upper left 20 x 20 pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images[..., :20, :20].mean(dim=(1, 2, 3))[:, None]


def test_covering_moves_the_answer_where_it_comes_from_and_nowhere_else():
    model = Regressor()
    model.network = Corner()
    images = torch.zeros(2, 2, 64, 64)
    images[..., :20, :20] = 1.0
    moved = covering(model, images)
    grey = images.mean()
    assert moved[0, 0, 0].item() == pytest.approx((1 - grey.item()) * SQUARE_PX**2 / 400, rel=1e-5)
    assert (moved[:, 20 // STEP_PX + 1 :] == 0).all() and (moved[:, :, 20 // STEP_PX + 1 :] == 0).all()


def test_agreement_is_one_for_maps_of_the_same_order():
    moved = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0))
    maps = torch.zeros(3, 64, 64)
    for i in range(10):
        for j in range(10):  # the middle of a square that no other square holds
            maps[:, i * STEP_PX + 4, j * STEP_PX + 4] = moved[:, i, j] ** 3
    assert saliency._agreement(maps, moved) == pytest.approx(1)
    assert saliency._agreement(maps, 1 - moved) == pytest.approx(-1)


def test_untrained_networks_differ_and_answer():
    images = torch.rand(4, 2, 64, 64) * 2 - 1
    first, second = (untrained(images, seed)(images).ef for seed in (0, 1))
    assert first.isfinite().all() and not torch.equal(first, second)


def test_the_command_prints_and_writes_every_map(tmp_path, write_cases, monkeypatch, capsys):
    write_cases(tmp_path / "cases", "GE", 3, 0)
    torch.manual_seed(0)
    save_regressor(tmp_path / "model.safetensors", Regressor())
    arguments = ["--model", "model.safetensors", "--cases", "cases", "--num", "2", "--json", "figures.json"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["saliency", *arguments])
    assert main() == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 1 + 4 * 3 + 3
    assert -1 <= figures["layer1, HiResCAM, both signs"]["rank_correlation"] <= 1
    assert "2 patients" in capsys.readouterr().out


def test_a_network_without_a_map_is_told_apart_from_one_that_looks_elsewhere(capsys):
    """One that predicts the same whatever it sees has gradients of zero everywhere."""
    deaf = Regressor()
    torch.nn.init.zeros_(deaf.network.fc.weight)
    images, masks = torch.rand(2, 2, 64, 64) * 2 - 1, torch.full((2, 2, 64, 64), 3, dtype=torch.uint8)
    figures = compare(deaf.eval(), images, masks)
    assert figures["layer1, HiResCAM, both signs"] == {
        "share_in_heart": None,
        "area_share": None,
        "rank_correlation": None,
    }
    _print(figures, 2)
    assert "no map" in capsys.readouterr().out
