"""Distances between two groups of patients in a space of features, with every patient counting alike.

A group is an array (P, S, D): patients, slices of each, features.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 3
"""Of precision and recall; 3 as in the paper."""

Float = NDArray[np.float64]
Index = NDArray[np.int64]


def frechet_distance(a: Float, b: Float) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Heusel et al. (2017), https://arxiv.org/abs/1706.08500. There are fewer slices than features, so that covariances
    are `shrunk_covariance`.

    Args:
        a: Shape (P, S, D).
        b: Shape (Q, S, D).
    """
    first, second = (values.reshape(-1, values.shape[-1]) for values in (a, b))
    shift = first.mean(axis=0) - second.mean(axis=0)
    cov_a, cov_b = shrunk_covariance(first), shrunk_covariance(second)
    # The eigenvalues of C_a C_b are those of the symmetric root C_b root.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    between = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(max(0.0, shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * between))


def shrunk_covariance(values: Float) -> Float:
    """The sample covariance drawn towards a multiple of the identity, by as much as its own noise asks for.

    Ledoit & Wolf (2004), https://doi.org/10.1016/S0047-259X(03)00096-4.

    Args:
        values: Shape (N, D).
    """
    num, dim = values.shape
    centred = values - values.mean(axis=0)
    sample = centred.T @ centred / num
    target = np.trace(sample) / dim
    distance = ((sample - target * np.eye(dim)) ** 2).sum()
    noise = (((centred**2).sum(axis=1) ** 2).sum() / num - (sample**2).sum()) / num
    weight = 0.0 if distance <= 0 else float(np.clip(noise / distance, 0, 1))
    return (1 - weight) * sample + weight * target * np.eye(dim)


@dataclass(frozen=True)
class Kernel:
    """The polynomial kernel of the kernel inception distance between patients: the mean over pairs of their slices.

    Binkowski et al. (2018), https://arxiv.org/abs/1801.01401, k(x, y) = (x y / D + 1)^3.

    Attributes:
        values: Shape (N, N), of all patients that are to be compared.
    """

    values: Float

    @staticmethod
    def of(features: Float) -> "Kernel":
        """The kernel of (N, S, D)."""
        num, slices, dim = features.shape
        flat = features.reshape(-1, dim)
        pairs = (flat @ flat.T / dim + 1) ** 3
        return Kernel(pairs.reshape(num, slices, num, slices).mean(axis=(1, 3)))

    def distance(self, a: Index, b: Index) -> float:
        """The unbiased squared maximum mean discrepancy of two groups of at least two patients; may be below 0.

        Unbiased with patients as the units: two slices of one patient are no two draws, and no such pair counts.

        Args:
            a: Shape (P,), indices of patients.
            b: Shape (Q,).
        """
        return float(self._within(a) + self._within(b) - 2 * self.values[np.ix_(a, b)].mean())

    def _within(self, group: Index) -> float:
        own, num = self.values[np.ix_(group, group)], len(group)
        return (own.sum() - np.trace(own)) / (num * (num - 1))


@dataclass(frozen=True)
class Manifolds:
    """Precision and recall of Kynkäänniemi et al. (2019), https://arxiv.org/abs/1904.06991, for patients.

    A ball around every slice reaches to the `NEIGHBOURS`-th nearest *other patient* of its group, at that patient's
    nearest slice: the neighbouring slices of one stack would make a ball of their own.

    Attributes:
        distances: Shape (N, S, N, S), between the slices of all patients that are to be compared.
    """

    distances: Float

    @staticmethod
    def of(features: Float) -> "Manifolds":
        """The distances in (N, S, D)."""
        num, slices, dim = features.shape
        flat = features.reshape(-1, dim)
        squares = (flat**2).sum(axis=1)
        squared = squares[:, None] + squares - 2 * flat @ flat.T
        np.fill_diagonal(squared, 0)
        return Manifolds(np.sqrt(squared.clip(0)).reshape(num, slices, num, slices))

    def covered(self, group: Index, by: Index) -> float:
        """The share of a group's slices within a ball of another group, mean over patients.

        Precision is the share of the synthetic ones by the real ones, recall that of the real ones by the synthetic.

        Args:
            group: Shape (P,), indices of patients.
            by: Shape (Q,), more than `NEIGHBOURS` patients.
        """
        if len(by) <= NEIGHBOURS:
            raise ValueError(f"Expected more than {NEIGHBOURS} patients, got {len(by)}.")
        to_patients = self.distances[by][:, :, by].min(axis=3)  # (Q, S, Q)
        to_patients[np.arange(len(by)), :, np.arange(len(by))] = np.inf
        radii = np.sort(to_patients, axis=2)[:, :, NEIGHBOURS - 1]
        between = self.distances[group][:, :, by]
        return float((between <= radii).any(axis=(2, 3)).mean())
