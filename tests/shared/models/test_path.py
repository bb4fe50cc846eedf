"""The linear path and flow matching against closed forms."""

import pytest
import torch

from fedcmr.shared.models.flow_matching import flow_matching_loss
from fedcmr.shared.models.path import integrate, interpolate


def test_the_path_runs_from_noise_to_image():
    noise, image = torch.randn(3, 2, 8, 8), torch.rand(3, 2, 8, 8)
    assert torch.equal(interpolate(noise, image, torch.zeros(3)), noise)
    assert torch.equal(interpolate(noise, image, torch.ones(3)), image)


def test_the_loss_is_zero_for_the_true_velocity_and_one_value_per_image():
    noise, image, t = torch.randn(3, 2, 8, 8), torch.rand(3, 2, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    exact = flow_matching_loss(lambda x, t: image - noise, noise, image, t)
    assert exact.shape == (3,) and exact.abs().max() < 1e-10
    off = flow_matching_loss(lambda x, t: image - noise + 2, noise, image, t)
    assert off.tolist() == pytest.approx([4.0] * 3, rel=1e-5)


def test_one_step_reaches_the_image_of_a_straight_flow():
    image, noise = torch.rand(3, 2, 8, 8) * 2 - 1, torch.randn(3, 2, 8, 8)
    reached = integrate(lambda x, t: (image - x) / (1 - t).clamp(min=1e-6)[:, None, None, None], noise, 0.0, 1)
    assert (reached - image).abs().max() < 1e-5


def test_the_integration_is_of_second_order():
    """On dx/dt = x from t = 0 the error falls about fourfold when the steps are doubled; Euler's would halve."""
    start = torch.full((3, 2, 8, 8), 0.2)

    def error(num_steps):
        return abs(float(integrate(lambda x, t: x, start, 0.0, num_steps)[0, 0, 0, 0]) - 0.2 * torch.e)

    assert error(16) / error(32) == pytest.approx(4, rel=0.25)
