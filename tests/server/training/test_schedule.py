"""Schedules: against PyTorch's, and at their ends."""

import pytest
import torch

from fedcmr.server.training.schedule import cosine, ema_decay, one_cycle


def test_learning_rate_equals_torch_s_one_cycle():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.3, total_steps=40, pct_start=0.25, cycle_momentum=False
    )
    for step in range(40):
        assert one_cycle(step, 40, 0.3) == pytest.approx(reference.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        if step < 39:
            reference.step()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_learning_rate_is_positive_in_short_trainings(num_steps):
    assert all(0 < one_cycle(step, num_steps, 0.1) <= 0.1 for step in range(num_steps))


def test_the_cosine_warms_up_and_ends_at_zero_with_the_budget():
    assert [cosine(step, 0.0, 1.0, 4) for step in (0, 3, 9)] == [0.25, 1.0, 1.0]
    assert cosine(99, 0.5, 2.0, 4) == pytest.approx(1.0) and cosine(99, 1.0, 2.0, 4) == pytest.approx(0.0)


def test_the_average_forgets_the_first_weights_and_then_keeps_its_pace():
    assert ema_decay(0.99, 0) == 0.1 and ema_decay(0.99, 10) == 11 / 20 and ema_decay(0.99, 10_000) == 0.99
