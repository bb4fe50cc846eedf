"""Randomness for privacy: noise and the sampling of patients, from the operating system's cryptographic generator.

Whoever can predict the noise subtracts it. NumPy's generators are made for simulations: from some of a stream the rest
may be computed, and Philox has a key of 128 bits. Every number here comes from the operating system's own generator
(getrandom; on Linux ChaCha20 with a key of 256 bits that is renewed), so that no seed and no state lie in the process,
and a forked process never repeats what its parent drew.

Covered: predicting the noise from other noise, from settings, seeds, the time or the process's memory before the draw.
Not covered: an operating system or a machine that cannot be trusted, and the arithmetic of floating-point numbers. A
normal value is drawn on a grid of 2^64 quantiles and added in float64, and which sums can occur at all may tell
something of what it was added to (Mironov 2012, https://doi.org/10.1145/2382196.2382264); no discrete mechanism is
used.
"""

import math
import secrets

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

FloatArray = NDArray[np.float64]

CHUNK = 2**16
"""Values drawn at once: half a megabyte."""


class OsGenerator:
    """The two methods of `numpy.random.Generator` that the mechanisms need.

    Guarantees:
        All values are independent of each other, of every other generator and of every seed, as far as the operating
        system's generator is a good one. `normal` is the normal distribution by inversion of its quantiles, its tails
        included down to 2^-65, which is 9.1 standard deviations.
    """

    def random(self, size: int) -> FloatArray:
        """Uniform in [0, 1), multiples of 2^-53; shape (size,)."""
        return (_words(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, loc: float, scale: float, size: int | tuple[int, ...]) -> FloatArray:
        """Normal with mean `loc` and standard deviation `scale`; shape `size`."""
        shape = (size,) if isinstance(size, int) else size
        values = np.empty(math.prod(shape))
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            words = _words(len(part))
            # One bit for the side and 63 for how far out: a uniform in (0, 1) alone has no far right tail.
            part[:] = ndtri(((words >> np.uint64(1)) + 0.5) * 2.0**-64)
            part[(words & np.uint64(1)) == 1] *= -1
        return loc + scale * values.reshape(shape)


def _words(number: int) -> NDArray[np.uint64]:
    """So many times 64 bits from the operating system."""
    return np.frombuffer(secrets.token_bytes(8 * number), np.uint64)
