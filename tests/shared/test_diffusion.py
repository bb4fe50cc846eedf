"""Flow matching against closed forms."""

import pytest
import torch

from fedcmr.shared.diffusion import flow_matching_loss, interpolate, sample

MASKS = torch.zeros(3, 2, 8, 8, dtype=torch.uint8)
CODE = torch.zeros(3, 11)


def test_the_path_runs_from_noise_to_picture():
    noise, picture = torch.randn(3, 2, 8, 8), torch.rand(3, 2, 8, 8)
    assert torch.equal(interpolate(noise, picture, torch.zeros(3)), noise)
    assert torch.equal(interpolate(noise, picture, torch.ones(3)), picture)


def test_the_loss_is_zero_for_the_true_velocity_and_one_value_per_picture():
    noise, picture, t = torch.randn(3, 2, 8, 8), torch.rand(3, 2, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    exact = flow_matching_loss(lambda x, t, m, c: picture - noise, picture, MASKS, CODE, t, noise)
    assert exact.shape == (3,) and exact.abs().max() < 1e-10
    off = flow_matching_loss(lambda x, t, m, c: picture - noise + 2, picture, MASKS, CODE, t, noise)
    assert off.tolist() == pytest.approx([4.0] * 3, rel=1e-5)


def test_the_sampler_reaches_the_picture_of_a_straight_flow():
    picture, noise = torch.rand(3, 2, 8, 8) * 2 - 1, torch.randn(3, 2, 8, 8)

    def velocity(x, t, masks, code):
        return (picture - x) / (1 - t).clamp(min=1e-6)[:, None, None, None]

    reached = sample(velocity, MASKS, CODE, torch.zeros_like(picture), noise, 0.0, 1)
    assert (reached - picture).abs().max() < 1e-5


def test_the_sampler_is_of_second_order():
    """On dx/dt = x from t = 0 the error falls about fourfold when the steps are doubled; Euler's would halve."""
    start = torch.full((3, 2, 8, 8), 0.2)

    def error(num_steps):
        reached = sample(lambda x, t, m, c: x, MASKS, CODE, start, start, 0.0, num_steps)
        return abs(float(reached[0, 0, 0, 0]) - 0.2 * torch.e)

    assert error(16) / error(32) == pytest.approx(4, rel=0.25)


def test_the_sketch_counts_only_from_a_later_start():
    noise = torch.randn(3, 2, 8, 8) * 0.1

    def still(shade, start_t):
        sketch = torch.full_like(noise, shade)
        return sample(lambda x, t, m, c: torch.zeros_like(x), MASKS, CODE, sketch, noise, start_t, 2)

    assert torch.equal(still(-0.5, 0.0), still(0.5, 0.0))
    assert (still(0.5, 0.6) - still(-0.5, 0.6)).mean() == pytest.approx(0.6, abs=0.05)
