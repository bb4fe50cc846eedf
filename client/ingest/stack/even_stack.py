"""Slices at even distances among positions along one line."""

from collections.abc import Sequence

import numpy as np

MIN_SPACING_MM, MAX_SPACING_MM = 2.0, 25.0
"""From a 3D cine to 20 mm slices with a gap."""
MAX_DEVIATION = 0.1
"""Distance of a slice from its place in an even stack, in spacings."""
MAX_POSITIONS = 100
"""No stack through a heart has as many."""
MAX_EXTRA_SHARE = 0.25
"""As a share of all positions: so many slices next to an even run, or more, are not extra ones."""


def even_run(depths: Sequence[float]) -> list[int]:
    """Indices of the longest run of positions at one spacing without a hole; of equally long ones the most even.

    Args:
        depths: Millimetres, ascending.

    Returns:
        Empty for too many positions.
    """
    if len(depths) > MAX_POSITIONS:
        return []
    best: tuple[int, float, list[int]] = (min(1, len(depths)), 0.0, list(range(min(1, len(depths)))))
    positions = np.asarray(depths)
    for start in range(len(depths)):
        for second in range(start + 1, len(depths)):
            spacing = depths[second] - depths[start]
            if not MIN_SPACING_MM <= spacing <= MAX_SPACING_MM or len(depths) - start < best[0]:
                continue
            run, misfit = [start, second], 0.0
            while True:
                # The spacing so far, not the first one: a small error of it would add up.
                spacing = (depths[run[-1]] - depths[start]) / (len(run) - 1)
                expected = depths[run[-1]] + spacing
                index = int(np.abs(positions - expected).argmin())
                if index <= run[-1] or abs(depths[index] - expected) > MAX_DEVIATION * spacing:
                    break
                misfit = max(misfit, abs(depths[index] - expected) / spacing)
                run.append(index)
            if (len(run), -misfit) > (best[0], -best[1]):
                best = (len(run), misfit, run)
    return best[2]


def is_complete(depths: Sequence[float], kept: Sequence[int]) -> bool:
    """Whether a run holds the whole stack, and what else there is are extra slices.

    A slice that was planned again lies between two others, or overlaps the first or last. One farther off shows
    that a slice between is missing: half a ventricle is no case.

    Args:
        depths: Millimetres, ascending.
        kept: Indices of the run, at least two.
    """
    run = np.asarray(depths)[list(kept)]
    spacing = (run[-1] - run[0]) / (len(run) - 1)
    extra = [depth for index, depth in enumerate(depths) if index not in set(kept)]
    near = all(np.abs(run - depth).min() < (1 - MAX_DEVIATION) * spacing for depth in extra)
    return near and len(extra) < MAX_EXTRA_SHARE * len(depths)
