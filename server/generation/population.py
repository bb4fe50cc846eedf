"""Hearts of a vendor's own population: simulated hearts weighted until their shapes are those that its sites released.

A pool of hearts is drawn widely. Among all weights with which the pool has the released means and spreads, and evenly
spread ejection fractions, the most even ones are taken: those of maximum entropy (Jaynes 1957,
https://doi.org/10.1103/PhysRev.106.620). They are exponential in the moments, and their parameters minimise a convex
function. It costs no privacy: nothing but what was released is used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from fedcmr.server.generation.heart_shapes import (
    Hearts,
    distances,
    draw_hearts,
    masks_from,
    slice_positions,
    solve_contraction,
)
from fedcmr.shared.case import LV
from fedcmr.shared.progress import track_parts
from fedcmr.shared.shape import (
    GEOMETRY_NAMES,
    SPREAD,
    ShapeDistribution,
    expected_shapes,
    geometry_vectors,
    standardise_shapes,
)
from fedcmr.shared.views import NETWORK_GRID

POOL_SIZE = 1000
POOL_SEED = 20
CHUNK = 50
NUM_EF_BINS = 8
TOLERANCE = 0.02
"""How far the weighted moments may miss the released ones, per unit of the exponent: exact moments that a pool hardly
reaches would rest on a handful of its hearts."""
REFINED_SIZE, NUM_REFINEMENTS = 400, 2
NEAR_EF = 0.04
"""A heart is taken for an ejection fraction about this far from its own, and then contracts to it exactly."""
SPREADING = 0.4
"""How far a new heart moves from the one that it comes from, in units of the population's spread. It also moves towards
the mean, so that the spread stays as it was (West 1993, https://doi.org/10.1111/j.2517-6161.1993.tb01911.x)."""
DARK_RANGE = (0.05, 0.85)
"""A cavity has some trabeculae, and some blood."""
RANGES = {
    "wall": (3.0, 25.0),
    "wall_taper": (-0.8, 0.9),
    "taper": (0.8, 4.5),
    "rv_reach": (0.15, 1.5),
    "rv_shrink": (0.3, 1.0),
    "rv_end": (0.4, 1.05),
    "scar_width": (0.3, 1.6),
    "scar_severity": (0.0, 1.0),
    "descent": (0.0, 40.0),
    "thickening": (-0.6, 2.0),
}
"""Hearts outside are none."""


@dataclass(frozen=True)
class Pool:
    """Simulated hearts with their shapes.

    Attributes:
        hearts: N hearts.
        shapes: Shape (N, 13), standardised geometry, float64.
        efs: Shape (N,).
    """

    hearts: Hearts
    shapes: Tensor
    efs: Tensor


_pools: dict[int, Pool] = {}
"""Slices of a stack -> the pool: a process that makes one set after another draws it once."""
_populations: dict[tuple[int, bytes, bytes], tuple[Pool, Tensor]] = {}
"""Slices, mean and spread -> what `population_of` found."""


def pool_of(num_slices: int, description: str | None = None) -> Pool:
    """Widely drawn hearts, the same for everybody.

    Args:
        num_slices: Slices of the stack in which shapes and ejection fractions are measured.
        description: Text next to the progress bar; None shows none.
    """
    if num_slices not in _pools:
        rng = torch.Generator().manual_seed(POOL_SEED)
        hearts = joined([draw_hearts(CHUNK, rng, num_slices, wide=True) for _ in range(POOL_SIZE // CHUNK)])
        _pools[num_slices] = _measured_pool(hearts, num_slices, description)
    return _pools[num_slices]


def _measured_pool(hearts: Hearts, num_slices: int, description: str | None) -> Pool:
    """Hearts with what is measured on them; those in which something cannot be measured are left out."""
    kept, shapes, efs = [], [], []
    for part in track_parts(len(hearts), CHUNK, description):
        own = hearts[part]
        own_shapes, own_efs = measured(own, num_slices)
        whole = own_shapes.isfinite().all(dim=1) & own_efs.isfinite()
        kept.append(own[whole])
        shapes.append(own_shapes[whole])
        efs.append(own_efs[whole])
    return Pool(joined(kept), torch.cat(shapes), torch.cat(efs))


def measured(hearts: Hearts, num_slices: int) -> tuple[Tensor, Tensor]:
    """Standardised geometry (N, 13) and ejection fractions (N,) of simulated hearts, from their masks."""
    grid = NETWORK_GRID
    masks = masks_from(distances(hearts, slice_positions(hearts, num_slices), grid)).transpose(1, 2)
    slice_mm = (hearts.stack_end - hearts.stack_start) / num_slices
    pixel_mm = torch.full_like(slice_mm, grid.pixel_mm)
    raw = geometry_vectors(masks, torch.stack([slice_mm, pixel_mm, pixel_mm], dim=1))
    volumes = (masks == LV).sum(dim=(2, 3, 4)).double()
    efs = 1 - volumes[:, 1] / volumes[:, 0]
    return standardise_shapes(raw, efs), efs


def weights_for(pool: Pool, wanted: ShapeDistribution) -> Tensor:
    """The most even weights with which the pool is a population; shape (N,), they add up to one.

    Args:
        pool: Hearts.
        wanted: The population's means and spreads.
    """
    size = len(GEOMETRY_NAMES)
    mean, std = wanted.mean[:size].double().numpy(), wanted.std[:size].double().numpy()
    shapes = pool.shapes.numpy()
    efs = pool.efs.numpy()
    bins = ((efs - efs.min()) / (np.ptp(efs) + 1e-9) * NUM_EF_BINS).astype(int)
    present = np.unique(bins)
    in_bin = (bins[:, None] == present).astype(np.float64)
    # Around the wanted mean, in units of the wanted spread: first and second moments are then of one size.
    away = (shapes - mean) / std
    # What was released does not depend on the ejection fraction, and no more shall the shapes.
    slope = away * ((efs - efs.mean()) / efs.std())[:, None]
    features = np.concatenate([away, (away**2 - 1) / 2, slope, in_bin - 1 / len(present)], axis=1)

    def dual(exponents: np.ndarray) -> tuple[float, np.ndarray]:
        """The function to minimise, and its gradient: the weighted moments, which are to be zero."""
        scores = features @ exponents
        total = logsumexp(scores)
        weights = np.exp(scores - total)
        value = total + 0.5 * TOLERANCE * exponents @ exponents
        return float(value), weights @ features + TOLERANCE * exponents

    found = minimize(dual, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    scores = features @ found.x
    return torch.from_numpy(np.exp(scores - logsumexp(scores)))


def population_of(wanted: ShapeDistribution, num_slices: int, description: str | None = None) -> tuple[Pool, Tensor]:
    """A pool of hearts about those that weigh most among the widely drawn, and their weights, shape (N,).

    Many hearts instead of a handful: these are moved a little, measured and weighted anew. Drawn once in a process.

    Args:
        wanted: The population.
        num_slices: As for `pool_of`.
        description: Likewise.
    """
    key = (num_slices, wanted.mean.numpy().tobytes(), wanted.std.numpy().tobytes())
    if key not in _populations:
        pool, rng = pool_of(num_slices, description and "widely drawn hearts"), torch.Generator().manual_seed(POOL_SEED)
        weights = weights_for(pool, wanted)
        for _ in range(NUM_REFINEMENTS):
            low, high = float(pool.efs.min()), float(pool.efs.max())
            efs = low + (high - low) * torch.rand(REFINED_SIZE, generator=rng)
            pool = _measured_pool(
                solve_contraction(_moved(pool, weights, efs, rng), efs, num_slices), num_slices, description
            )
            weights = weights_for(pool, wanted)
        _populations[key] = pool, weights
    return _populations[key]


def draw_population(
    populations: Mapping[str, ShapeDistribution],
    names: Sequence[str],
    num_slices: int,
    efs: Tensor,
    generator: torch.Generator,
    show_progress: bool = False,
) -> Hearts:
    """Hearts of the ejection fractions requested, each of its vendor's population; else as hearts usually are.

    Args:
        populations: Vendor -> what its sites released; perhaps not of all vendors.
        names: Shape (N,), the vendor of each heart.
        num_slices: Slices of their stacks.
        efs: Shape (N,), as for `draw_hearts`.
        generator: Source of the draws.
        show_progress: Whether the drawing of pools, seconds a vendor, is shown.
    """
    usual = draw_hearts(len(names), generator, num_slices, efs)
    released = sorted(set(names) & set(populations))
    if not released:
        return usual
    others = torch.tensor([index for index, name in enumerate(names) if name not in populations], dtype=torch.int64)
    parts, order = [usual[others]], [others]
    for name in released:
        own = torch.tensor([index for index, other in enumerate(names) if other == name])
        description = f"hearts of the population of {name}" if show_progress else None
        pool, weights = population_of(populations[name], num_slices, description)
        parts.append(_moved(pool, weights, efs[own], generator))
        order.append(own)
    hearts = joined(parts)[torch.cat(order).argsort()]
    # Where a heart lies is no part of its shape.
    return solve_contraction(replace(hearts, centre=usual.centre), efs, num_slices)


def draw_dark_shares(
    populations: Mapping[str, ShapeDistribution], names: Sequence[str], efs: Tensor, generator: torch.Generator
) -> Tensor | None:
    """For each heart how much of its cavity is dark at ED and ES, as its vendor's sites released it; shape (N, 2).

    Args:
        populations: As for `draw_population`.
        names: Likewise.
        efs: Likewise.
        generator: Source of the draws.

    Returns:
        NaN for vendors without a population; None where none has one, and nothing is drawn.
    """
    if not set(names) & set(populations):
        return None
    size = len(GEOMETRY_NAMES)
    unknown = torch.full((2,), math.nan)
    mean, std = (
        torch.stack([getattr(populations[name], kind)[size:] if name in populations else unknown for name in names])
        for kind in ("mean", "std")
    )
    away = mean + std * torch.randn(len(names), 2, generator=generator)
    shares = expected_shapes(efs)[:, size:] + torch.tensor(SPREAD, dtype=torch.float64)[size:] * away
    return shares.float().clamp(*DARK_RANGE)


def _moved(pool: Pool, weights: Tensor, efs: Tensor, rng: torch.Generator) -> Hearts:
    """For each ejection fraction a heart of about that, by weight, that is then moved a little; not contracted yet."""
    near = torch.exp(-0.5 * ((pool.efs[None] - efs[:, None].double()) / NEAR_EF) ** 2)
    chosen = torch.multinomial(near * weights + 1e-9 * near + 1e-30, 1, generator=rng).squeeze(1)
    values = _flat(pool.hearts).double()
    mean = weights @ values
    away = values - mean
    covariance = (away * weights[:, None]).T @ away
    spread = covariance.diagonal().sqrt()
    covariance = 0.5 * covariance + 0.5 * torch.diag(spread**2) + 1e-9 * torch.eye(len(spread))
    noise = torch.randn(len(efs), len(spread), generator=rng, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    moved = mean + (1 - SPREADING**2) ** 0.5 * away[chosen] + SPREADING * noise
    hearts = _unflat(moved.to(efs.dtype), pool.hearts)
    return replace(hearts, **{name: getattr(hearts, name).clamp(low, high) for name, (low, high) in RANGES.items()})


def _flat(hearts: Hearts) -> Tensor:
    """All parameters, shape (N, P)."""
    return torch.cat([getattr(hearts, field.name).reshape(len(hearts), -1) for field in fields(Hearts)], dim=1)


def _unflat(values: Tensor, like: Hearts) -> Hearts:
    """The inverse of `_flat`."""
    shapes = {field.name: getattr(like, field.name).shape[1:] for field in fields(Hearts)}
    parts = values.split([shape.numel() for shape in shapes.values()], dim=1)
    return Hearts(
        **{name: part.reshape(len(values), *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    )


def joined(parts: Sequence[Hearts]) -> Hearts:
    """Several sets of hearts as one."""
    return Hearts(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Hearts)})
