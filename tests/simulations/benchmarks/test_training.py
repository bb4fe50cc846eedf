"""The training benchmark compares two ways of computing the same thing."""

import pytest
import torch

from fedcmr.server.settings import load
from fedcmr.shared.case import save_case, write_index
from fedcmr.shared.tasks.ejection_fraction.network import Regressor
from fedcmr.simulations.benchmarks.training import WAYS, PlainRegressor, accuracy, step_seconds
from tests.server.disc_case import disc_case

SMALL = ["regression.num_steps=2", "regression.batch_size=4", "regression.num_tta=1", "evaluation.num_bootstrap=100"]


def test_both_ways_are_one_network():
    torch.manual_seed(0)
    ours, plain = Regressor(0.4).eval(), PlainRegressor(0.4).eval()
    plain.load_state_dict(ours.state_dict())
    assert ours.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.network.conv1.weight.is_contiguous()
    images = torch.rand(3, 2, 64, 64) * 2 - 1
    for one, other in zip(ours(images), plain(images), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_plain_way_computes_in_float32_where_the_other_may_not():
    images = torch.rand(2, 2, 64, 64) * 2 - 1
    seen = {}
    for name, way in WAYS.items():
        model = way().eval()
        model.network.conv1.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.dtype}))
        with torch.autocast("cpu", torch.bfloat16):
            model(images)
    assert list(seen.values()) == [torch.bfloat16, torch.float32]


@pytest.mark.slow
def test_times_have_a_ratio():
    seconds = step_seconds(load("default", SMALL).regression, num_repeats=1)
    ours, plain, ratio = seconds.values()
    assert ratio == plain / ours > 0


@pytest.mark.slow
def test_both_networks_answer_the_same_patients(tmp_path):
    cases = [disc_case(f"p{i}", ef, seed=i) for i, ef in enumerate((0.2, 0.4, 0.6))]
    for case in cases:
        save_case(tmp_path / "dev", case)
    write_index(tmp_path / "dev", [case.info for case in cases])
    figures = accuracy(tmp_path / "dev", [tmp_path / "dev"], load("default", SMALL))["dev"]
    assert set(figures) == {*WAYS, "difference"}
    ours, plain = (figures[name]["mae_points"] for name in WAYS)
    assert figures["difference"]["difference_points"] == pytest.approx(ours - plain)
