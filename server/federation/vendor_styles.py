"""From the sites' private statistics to each vendor's distribution of style vectors, and of shape vectors.

A mean and a standard deviation per component are all that a hospital can pay for; their correlation is the public
prior's. Measured in units of the prior's spread at epsilon 8 (delta 0.001, half of it for the statistics), the
noise in each of a site's 11 means is 0.12 with 20 patients, 0.06 with 40 and 0.006 with 400, in each of its 11
variances 0.20, 0.10 and 0.010, against variances of 0.02 to 0.4 among simulated and of 0.1 to 0.9 among real patients
of one vendor. A third private step for the 55 covariances would raise all this noise by a fifth and add noise of 0.24,
0.12 and 0.012 to each, against covariances of 0.05 (simulated) to 0.16 (real; root mean square): with 20 or 40 patients
the result would be noise, with 400 it would be affordable. So the covariance is not requested.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.records import SHAPE_MEAN, SHAPE_SQUARE, STYLE_MEAN, STYLE_SQUARE, Request
from fedcmr.shared.style_statistics import noise_std

STYLE_STD_RANGE = (0.15, 1.5)
"""Range of a vendor's standard deviations, in units of the prior's. Within one vendor the style vectors of simulated
patients have standard deviations of 0.1 to 0.7, those of the public development patients of 0.4 to 0.95. A standard
deviation of zero would give every image the same style."""
SHAPE_STD_RANGE = (0.3, 1.5)
"""Likewise of the shapes, in units of the widely drawn hearts: 0.3 to 1.7 among the public development patients."""


Distributions = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Vendor -> mean and standard deviation of each entry, shape (K,) each."""


def vendor_styles(
    updates: Mapping[str, Arrays], sites: Mapping[str, Mapping[str, int]], request: Request
) -> Distributions:
    """`vendor_distributions` of the style vectors."""
    return vendor_distributions(updates, sites, request, (STYLE_MEAN, STYLE_SQUARE), STYLE_STD_RANGE)


def vendor_shapes(
    updates: Mapping[str, Arrays], sites: Mapping[str, Mapping[str, int]], request: Request
) -> Distributions:
    """`vendor_distributions` of the shape vectors."""
    return vendor_distributions(updates, sites, request, (SHAPE_MEAN, SHAPE_SQUARE), SHAPE_STD_RANGE)


def vendor_distributions(
    updates: Mapping[str, Arrays],
    sites: Mapping[str, Mapping[str, int]],
    request: Request,
    keys: tuple[str, str],
    std_range: tuple[float, float],
) -> Distributions:
    """Vendor -> mean and standard deviation of its vectors, for every vendor with a reply; equal weight per site.

    The known noise gives the share of the estimates' scatter that is noise, and shrinkage removes this share (James &
    Stein 1961; Efron & Morris 1973, https://doi.org/10.1080/01621459.1973.10481350, positive part). Means shrink to the
    public mean, 0. Variances shrink to their own mean over vendors and components, whose noise is smaller by the square
    root of their number. With little noise each stays nearly as it was. It costs no privacy.

    Args:
        updates: Site -> its private statistics, a row for each of its vendors in the order of their names.
        sites: Site -> vendor -> nominal number of patients, which divided its sums.
        request: The request that the updates reply to.
        keys: Names of the mean and of the mean square in an update.
        std_range: The standard deviations are limited to it.
    """
    mean_key, square_key = keys
    names = sorted({vendor for site in updates for vendor in sites[site]})
    means, variances, mean_noises, variance_noises = [], [], [], []
    for vendor in names:
        rows = [(site, sorted(sites[site]).index(vendor)) for site in sorted(updates) if vendor in sites[site]]
        site_means = np.array([updates[site][mean_key][row] for site, row in rows], np.float64)
        squares = np.array([updates[site][square_key][row] for site, row in rows], np.float64)
        noise = [noise_std(request.max_grad_norm, request.noise_multiplier, sites[site][vendor]) for site, _ in rows]
        mean_noise, variance_noise = np.square(noise).mean(axis=0)
        mean = site_means.mean(axis=0)
        # The scatter of the sites' means is part of a vendor's spread, the noise in that scatter is not.
        variances.append(squares.mean(axis=0) - mean**2 - mean_noise * (1 - 1 / len(rows)))
        means.append(mean)
        mean_noises.append(mean_noise / len(rows))
        variance_noises.append(variance_noise / len(rows))
    low, high = std_range
    centres = _shrink(np.array(means), 0.0, mean_noises).astype(np.float32)
    pooled = float(np.mean(variances))
    stds = np.sqrt(np.clip(_shrink(np.array(variances), pooled, variance_noises), low**2, high**2)).astype(np.float32)
    return {vendor: (centres[index], stds[index]) for index, vendor in enumerate(names)}


def _shrink(values: NDArray[np.float64], target: float, noise_variances: list[float]) -> NDArray[np.float64]:
    """All values, moved towards the target by the share of their scatter around it that the noise explains."""
    scatter = np.square(values - target).mean()
    share = min(1.0, float(np.mean(noise_variances)) / scatter) if scatter > 0 else 0.0
    return values + share * (target - values)
