"""Patient-level differential privacy: the Gaussian mechanism, its accountant, and the plan that meets a target.

One item of a data set is one patient. Everything a patient contributes is a single vector, clipped once; the sum over
patients gets Gaussian noise of `noise_multiplier * max_grad_norm`. Dwork & Roth (2014),
https://doi.org/10.1561/0400000042; Abadi et al. (2016), https://arxiv.org/abs/1607.00133.

Guarantees:
    Unit: one patient at one site. Neighbouring relation: add or remove one patient with all slices, phases and views.
    Sampling: Poisson over patients; divisors are public constants, never a count of the data.
    Not covered: attacks on floating-point arithmetic (`fedcmr.shared.noise`); timing, but for what
    `fedcmr.client.training.fine_tune` and `fedcmr.client.evaluation` do against it; a patient who was scanned at two
    sites (the sites' epsilons add up); plain figures of held-out patients; and what is public by design: the sites'
    names, vendors and nominal sizes, the number of rounds, who answered or refused.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedcmr.shared.noise import OsGenerator

FloatArray = NDArray[np.float64]
Rng = OsGenerator | np.random.Generator
"""The latter without privacy, and in tests and simulations that repeat a draw."""

EPSILON_ERROR = 0.01  # the PRV accountant's numerical error; its answer is an upper bound that includes it
MAX_DELTA_TIMES_PATIENTS = 0.1
"""Largest delta times the public number of patients. To publish one patient in full, drawn at random, is a mechanism of
epsilon 0 and delta 1 / N: a delta of that size promises nothing, and one of a tenth of it little enough."""
MAX_GRID_POINTS = 2**19  # of the PRV accountant's convolution: tens of megabytes, a tenth of a second a mechanism
MAX_MECHANISMS = 4  # subsampled ones that are unlike each other; each takes up to one or two seconds
MAX_SUBSAMPLED_NOISE = 20.0


@dataclass(frozen=True)
class Release:
    """`num_steps` runs of the Poisson-subsampled Gaussian mechanism, charged together.

    Attributes:
        noise_multiplier: Standard deviation of the noise in units of the clip norm; 0 means no privacy at all.
        sample_rate: Probability with which each patient takes part in a step, in (0, 1].
        num_steps: At least 1.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int

    def __post_init__(self) -> None:
        _check(0 <= self.noise_multiplier < math.inf, "finite noise_multiplier >= 0", self.noise_multiplier)
        _check(0 < self.sample_rate <= 1, "sample_rate in (0, 1]", self.sample_rate)
        _check(self.num_steps >= 1 and self.num_steps == int(self.num_steps), "integer num_steps >= 1", self.num_steps)


@dataclass(frozen=True)
class Mechanism:
    """All that makes what leaves a site private, or not: one object from the request to the charge and the training.

    How fast the work is done is no part of it (`fedcmr.client.training.Execution`): nothing there may change a number
    here.

    Attributes:
        noise_multiplier: As in `Release`.
        sample_rate: As in `Release`.
        num_steps: As in `Release`.
        max_grad_norm: L2 bound of what one patient contributes to a step: of the mean gradient or, where style
            statistics are released, of the style vector (`privacy.statistics_clip`). One number under Opacus's name,
            because it does one thing: it bounds what a patient can change, and it is the unit of the noise.
        target_delta: The delta at which epsilon is counted, in (0, 1).
        private: False switches the noise off, and the bound of style vectors with it.
        nominal_patients: The site's public constant that divides sums, never its count of patients. None in a request,
            which goes to all sites alike: each puts in its own (`at`).
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int
    max_grad_norm: float
    target_delta: float
    private: bool = True
    nominal_patients: int | None = None

    def __post_init__(self) -> None:
        _check(self.max_grad_norm > 0, "max_grad_norm > 0", self.max_grad_norm)
        _check(0 < self.target_delta < 1, "target_delta in (0, 1)", self.target_delta)
        _check(
            self.nominal_patients is None or self.nominal_patients >= 1, "nominal_patients >= 1", self.nominal_patients
        )
        assert self.release.num_steps == self.num_steps, "checked there"

    @property
    def release(self) -> Release:
        """What is charged: the three numbers that epsilon depends on."""
        return Release(self.noise_multiplier, self.sample_rate, self.num_steps)

    @property
    def noise(self) -> float:
        """The noise multiplier that is drawn with: 0 without privacy."""
        return self.noise_multiplier if self.private else 0.0

    @property
    def divisor(self) -> int:
        """`nominal_patients`, where a site has put in its own.

        Raises:
            ValueError: It has not.
        """
        if self.nominal_patients is None:
            raise ValueError("Expected nominal_patients of a site, got None.")
        return self.nominal_patients

    def at(self, nominal_patients: int) -> "Mechanism":
        """The same at a site of this public size."""
        return replace(self, nominal_patients=nominal_patients)


def epsilon(releases: Sequence[Release], delta: float) -> tuple[float, str]:
    """The epsilon of all `releases` together at `delta`, and the accountant that found it.

    Releases of everybody (sample rate 1) are together one Gaussian mechanism, whose curve is exact: `gaussian_epsilon`.
    With subsampled ones: Gopi et al. (2021), https://arxiv.org/abs/2106.02848 ("prv", an upper bound), or Renyi
    differential privacy, Mironov (2017), https://arxiv.org/abs/1702.07476 ("rdp", looser) where the former fails.

    The work is bounded. A subsampled mechanism beyond the `MAX_MECHANISMS` costliest, or with more noise than
    `MAX_SUBSAMPLED_NOISE`, where the accountants' series converge slowly and there is next to nothing to gain, counts
    as one of everybody, which costs more privacy and no time.

    Guarantees:
        An upper bound for add/remove-one-patient neighbours. With a sample rate below 1 it holds for releases whose
        noise, rate and number were fixed in advance, not for parameters that were chosen in the light of what was
        published before: what a site spends is `fedcmr.shared.privacy_filter`'s to say.

    Returns:
        (epsilon, "gaussian", "prv" or "rdp"); 0 without releases, infinity where one of them had no noise.
    """
    _check(0 < delta < 1, "delta in (0, 1)", delta)
    if any(release.noise_multiplier == 0 for release in releases):
        return math.inf, "gaussian"
    steps: dict[tuple[float, float], int] = {}
    for release in releases:
        mechanism = (release.noise_multiplier, release.sample_rate)
        steps[mechanism] = steps.get(mechanism, 0) + release.num_steps
    subsampled = [
        (*mechanism, num_steps)
        for mechanism, num_steps in sorted(steps.items())
        if mechanism[1] < 1 and mechanism[0] <= MAX_SUBSAMPLED_NOISE
    ]
    subsampled = sorted(subsampled, key=lambda item: item[2] / item[0] / item[0], reverse=True)[:MAX_MECHANISMS]
    taken = {item[:2] for item in subsampled}
    full_batch = [
        math.sqrt(num_steps) / noise for (noise, rate), num_steps in sorted(steps.items()) if (noise, rate) not in taken
    ]
    mu = math.hypot(*full_batch)
    if not subsampled:
        return gaussian_epsilon(mu**2 if mu < 1e150 else math.inf, delta), "gaussian"
    history = subsampled + ([(1 / mu, 1.0, 1)] if mu > 0 else [])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # log(0) at q = 1 and "largest alpha" notes: both are handled below
        rdp = _rdp_epsilon(history, delta)
        prv = _prv_epsilon(history, delta, rdp)
    return (prv, "prv") if 0 < prv <= rdp else (rdp, "rdp")  # NaN compares false


def gaussian_epsilon(mu_squared: float, delta: float) -> float:
    """The exact epsilon at `delta` of Gaussian mechanisms of everybody whose squares of mu sum to `mu_squared`.

    One step with noise multiplier s has mu = 1 / s (Dong et al. 2019, https://arxiv.org/abs/1905.02383, Corollary 3.3,
    for the sum). The curve is Theorem 8 of Balle & Wang (2018), https://arxiv.org/abs/1805.06530, solved to the last
    digits and rounded up.
    """
    _check(0 < delta < 1, "delta in (0, 1)", delta)
    _check(mu_squared >= 0, "mu_squared >= 0", mu_squared)
    mu = math.sqrt(mu_squared)
    if mu == 0:
        return 0.0

    def excess(value: float) -> float:
        """Logarithm of the curve at epsilon = `value`, less that of `delta`."""
        first, second = log_ndtr(mu / 2 - value / mu), log_ndtr(-mu / 2 - value / mu)
        difference = -math.expm1(min(value + float(second - first), 0.0))
        return float(first) + (math.log(difference) if difference > 0 else -math.inf) - math.log(delta)

    upper = mu_squared / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # the tail bound of the normal distribution
    if not math.isfinite(upper):
        return math.inf
    if excess(0.0) <= 0:
        return 0.0
    while excess(upper) > 0:  # by rounding alone
        upper *= 1 + 1e-9
    return float(brentq(excess, 0.0, upper, xtol=1e-12 * upper, rtol=1e-12)) * (1 + 1e-11)


def largest_delta(nominal_patients: int) -> float:
    """The largest delta that a site of this public size may agree to."""
    return MAX_DELTA_TIMES_PATIENTS / nominal_patients


def os_generator() -> OsGenerator:
    """The operating system's cryptographic generator: for privacy noise and for sampling patients.

    Never replace it by one with a seed from the settings or the server: whoever knows the seed subtracts the noise.
    """
    return OsGenerator()


def poisson_sample(num_patients: int, sample_rate: float, rng: Rng) -> NDArray[np.intp]:
    """Indices of the patients of one step: each takes part independently with probability `sample_rate`.

    Returns:
        Sorted, of random length, possibly empty; an empty step is noised and counted like any other.
    """
    _check(0 < sample_rate <= 1, "sample_rate in (0, 1]", sample_rate)
    return np.flatnonzero(rng.random(num_patients) < sample_rate)


def private_sum(
    per_patient: Iterable[FloatArray],
    max_grad_norm: float,
    noise_multiplier: float,
    dimension: int,
    rng: Rng | None,
) -> FloatArray:
    """The Gaussian mechanism: clip every patient's vector, add them up, add noise.

    Guarantees:
        Adding or removing one patient moves the sum before noise by at most `max_grad_norm` in the L2 norm, whatever
        the vector holds (one with NaN or infinity counts as zero). The noise is N(0, (noise_multiplier *
        max_grad_norm)^2) in each coordinate, drawn in float64 from `rng`, so this is one step of a `Release` with that
        noise multiplier as long as `rng` comes from `os_generator`. Floating-point attacks are not covered.

    Args:
        per_patient: One vector of shape (D,) per patient; none where no patient was sampled.
        max_grad_norm: L2 bound of a row, > 0; infinity is allowed without noise only.
        noise_multiplier: >= 0; 0 only where privacy is switched off and the site's policy allows it.
        dimension: D, which an empty batch cannot tell.
        rng: From `os_generator`; None only without noise.

    Returns:
        Shape (D,).
    """
    _check(max_grad_norm > 0, "max_grad_norm > 0", max_grad_norm)
    _check(0 <= noise_multiplier < math.inf, "finite noise_multiplier >= 0", noise_multiplier)
    total = np.zeros(dimension)
    for vector in per_patient:
        _check(vector.shape == (dimension,), f"one vector of shape ({dimension},) per patient", vector.shape)
        total += clip_to_norm(vector, max_grad_norm)
    if noise_multiplier == 0:
        return total
    if rng is None or not math.isfinite(max_grad_norm):
        raise ValueError("Expected a finite max_grad_norm and a noise generator with noise_multiplier > 0.")
    return total + rng.normal(0.0, noise_multiplier * max_grad_norm, size=total.shape)


def private_mean_gradient(
    per_patient: Iterable[FloatArray],
    max_grad_norm: float,
    noise_multiplier: float,
    *,
    expected_batch_size: float,
    dimension: int,
    rng: Rng | None,
) -> FloatArray:
    """`private_sum` of gradients, each averaged over a patient's views, divided by a public constant: a DP-SGD step.

    `expected_batch_size` is `sample_rate * nominal_patients`, never the number of vectors: that one is private.
    Everything else is as in `private_sum`; shape (D,).
    """
    _check(0 < expected_batch_size < math.inf, "finite expected_batch_size > 0", expected_batch_size)
    return private_sum(per_patient, max_grad_norm, noise_multiplier, dimension, rng) / expected_batch_size


def private_moments(
    styles: FloatArray,
    max_grad_norm: float,
    noise_multiplier: float,
    nominal_patients: int | NDArray[np.int_],
    rng: Rng | None,
) -> tuple[FloatArray, FloatArray]:
    """First and second moments of the patients' style vectors, from one Gaussian mechanism.

    A patient's vector c is clipped to norm B = `max_grad_norm` and its square c * c to norm S = B^2 / 2; the vector
    released is [c / B, (c * c) / S] / sqrt(2), of norm <= 1. S is below the bound B^2 that c * c already has, because
    only a vector with all its length in one coordinate comes near that, and a smaller S means less noise.

    Guarantees:
        One patient moves the sum before noise by at most 1 in normalised units: both moments together are one step of
        a `Release` with this noise multiplier and sample rate 1.

    Args:
        styles: Shape (N, K), style vectors in standardised units; a row with NaN or infinity counts as zero.
        max_grad_norm: B, L2 bound of a style vector.
        noise_multiplier: As in `private_sum`.
        nominal_patients: A public constant that divides the sums, or one per entry, shape (K,).
        rng: As in `private_sum`.

    Returns:
        Mean and mean square, shape (K,) each. Noise may make the mean square smaller than the mean's square.
    """
    _check(0 < max_grad_norm < math.inf, "finite max_grad_norm > 0", max_grad_norm)
    _check(bool(np.min(nominal_patients) >= 1), "nominal_patients >= 1", nominal_patients)
    size = styles.shape[1]
    noised = private_sum(moment_vectors(styles, max_grad_norm), 1.0, noise_multiplier, 2 * size, rng)
    mean = noised * math.sqrt(2) / np.tile(np.broadcast_to(nominal_patients, size), 2)
    return mean[:size] * max_grad_norm, mean[size:] * (max_grad_norm**2 / 2)


def moment_vectors(styles: FloatArray, max_grad_norm: float) -> FloatArray:
    """The normalised vectors of `private_moments`, before noise; shape (N, 2 K), every row of norm <= 1."""
    num_patients, size = styles.shape
    vectors = np.empty((num_patients, 2 * size))
    for vector, style in zip(vectors, styles, strict=True):
        unit = clip_to_norm(style, max_grad_norm) / max_grad_norm
        vector[:size] = unit
        vector[size:] = clip_to_norm(unit * unit, 0.5) / 0.5
    return vectors / math.sqrt(2)


def clip_to_norm(vector: FloatArray, max_grad_norm: float) -> FloatArray:
    """`vector * min(1, max_grad_norm / norm)` in float64, and the zero vector where any entry is not finite."""
    vector = np.asarray(vector, dtype=np.float64)
    peak = float(np.abs(vector).max(initial=0.0))
    if not math.isfinite(peak):
        return np.zeros_like(vector)
    if peak == 0:
        return vector
    direction = vector / peak  # before squaring, so that no finite vector overflows
    norm = float(np.linalg.norm(direction))
    return vector if peak * norm <= max_grad_norm else direction * (max_grad_norm / norm)


def _rdp_epsilon(history: list[tuple[float, float, int]], delta: float) -> float:
    """Renyi accountant; infinity where it has no answer."""
    from opacus.accountants import RDPAccountant  # here, because it takes a second and a half to load

    accountant = RDPAccountant()
    accountant.history = list(history)
    try:
        value = float(accountant.get_epsilon(delta))
    except ArithmeticError:  # noise so small that its square is zero
        return math.inf
    return max(value, 0.0) if math.isfinite(value) else math.inf


def _prv_epsilon(history: list[tuple[float, float, int]], delta: float, rdp: float) -> float:
    """PRV accountant, its error about half a percent at most; NaN where it fails or would need too fine a grid."""
    error = min(EPSILON_ERROR, max(rdp / 200, 1e-4))
    num_steps = sum(steps for _, _, steps in history)
    spacing = error / math.sqrt(num_steps * math.log(12_000 / delta) / 2)  # Opacus' own mesh
    if 2 * (_rdp_epsilon(history, delta / 4000) + 3) / spacing > MAX_GRID_POINTS:
        return math.nan
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    try:
        return float(accountant.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError, ArithmeticError):
        return math.nan


def _check(condition: bool, expected: str, value: object) -> None:
    """Raise `Expected sample_rate in (0, 1], got 1.5.`, for example."""
    if not condition:
        raise ValueError(f"Expected {expected}, got {value!r}.")
