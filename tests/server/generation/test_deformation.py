"""Borders are laid on those that are wanted, smoothly, and nothing moves where there is nothing to lay."""

import numpy as np
import torch

from fedcmr.server.generation.deformation import Deformation, fit
from fedcmr.shared.views import Grid

GRID = Grid(64, 2.0)
WEIGHTS = torch.ones(1)
HERE = torch.zeros(1, 2)


def disc(radius_mm: float, x_mm: float = 0.0, y_mm: float = 0.0) -> torch.Tensor:
    """Signed distance to a circle, shape (1, 1, 64, 64)."""
    axis = (torch.arange(64) - 31.5) * 2.0
    return ((axis[None] - x_mm) ** 2 + (axis[:, None] - y_mm) ** 2).sqrt()[None, None] - radius_mm


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    inside, wanted = one < 0, other < 0
    return float(2 * (inside & wanted).sum() / (inside.sum() + wanted.sum()))


def test_a_circle_comes_to_lie_on_an_ellipse_elsewhere():
    axis = (torch.arange(64) - 31.5) * 2.0
    ellipse = (((axis[None] - 4) / 26) ** 2 + ((axis[:, None] + 3) / 18) ** 2).sqrt()[None, None] * 21 - 21
    found = fit(disc(20), GRID, ellipse, GRID, HERE, HERE, torch.ones(1), WEIGHTS)
    assert overlap(disc(20), ellipse) < 0.9
    assert overlap(found.bent(disc(20), GRID, GRID, "bilinear", "border"), ellipse) > 0.97


def test_a_cavity_that_closes_to_half_is_not_folded():
    found = fit(disc(24), GRID, disc(12), GRID, HERE, HERE, torch.ones(1), WEIGHTS)
    assert overlap(found.bent(disc(24), GRID, GRID, "bilinear", "border"), disc(12)) > 0.93
    x, y = found.points_mm(GRID)[0].unbind(-1)
    (x_by_y, x_by_x), (y_by_y, y_by_x) = (np.gradient(values.numpy(), GRID.pixel_mm) for values in (x, y))
    assert (x_by_x * y_by_y - x_by_y * y_by_x).min() > 0, "every point of the source stays on its side of the others"


def test_where_a_structure_is_in_one_of_both_only_nothing_moves():
    nothing = torch.full((1, 1, 64, 64), 12.0)
    for source, wanted in ((disc(20), nothing), (nothing, disc(20))):
        found = fit(source, GRID, wanted, GRID, HERE, HERE, torch.ones(1), WEIGHTS)
        assert not found.knots_mm.any()


def test_a_zoom_about_a_point_keeps_the_point_and_the_grids_may_differ():
    centre, source_centre = torch.tensor([[10.0, -6.0]]), torch.tensor([[-4.0, 8.0]])
    still = Deformation(centre, source_centre, torch.tensor([1.5]), torch.zeros(1, 2, 16, 16))
    fine = Grid(128, 1.25)
    bent = still.bent(disc(10, -4, 8), GRID, fine, "bilinear", "border")
    axis = (torch.arange(128) - 63.5) * 1.25
    wanted = ((axis[None] - 10) ** 2 + (axis[:, None] + 6) ** 2).sqrt()[None, None] - 15
    assert overlap(bent, wanted) > 0.98
