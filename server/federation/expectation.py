"""What a study can expect, before its first round: from the sites' public numbers and the budget, without a patient.

What the sites' rounds can teach is bounded by how well a few patients under noise tell a vendor's mean; whether it will
show is bounded by the number of test patients. Both are known before anybody is charged.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from fedcmr.server.federation.state import FederationState, StudySite, make_request
from fedcmr.server.settings import Config
from fedcmr.shared.style_statistics import noise_std

SPREAD = 0.7
"""Standard deviation of one vendor's patients in an entry of the style or shape vector, in units of the public hearts'
own spread: 0.5 to 0.8 in the released statistics of two vendors' real scans, Siemens and Philips."""
DISTANCE = 0.7
"""Root mean square, over the entries, of a vendor's distance from the public mean: 0.5 to 0.8 in them."""
PAIRED_SD_POINTS = 2.9
"""Standard deviation over patients of the difference of two networks' absolute errors, one trained with and one without
the hospitals' rounds, in points of ejection fraction: of 30 real test patients of two vendors, two seeds."""
POWER, SIGNIFICANCE = 0.8, 0.05


@dataclass(frozen=True)
class Expectation:
    """How well the first round will tell one vendor's mean style and shape; all in units of the public hearts' spread.

    Attributes:
        num_patients: The sites' nominal patients of this vendor.
        by_chance: Standard error that so few patients have, without any privacy.
        by_noise: That of the noise alone.
    """

    num_patients: int
    by_chance: float
    by_noise: float

    @property
    def error(self) -> float:
        """Standard error of each entry of the vendor's mean."""
        return math.hypot(self.by_chance, self.by_noise)

    @property
    def learnt(self) -> float:
        """Share of a typical distance between vendor and public hearts that the released mean explains, in [0, 1)."""
        return DISTANCE**2 / (DISTANCE**2 + self.error**2)


def expectations(state: FederationState, config: Config, sites: Mapping[str, StudySite]) -> dict[str, Expectation]:
    """Vendor -> what the statistics of round 1 will be worth, every site having the same weight."""
    request = make_request(config, state, 1)
    found = {}
    for vendor in sorted({name for site in sites.values() for name in site.vendors}):
        numbers = [site.vendors[vendor] for site in sites.values() if vendor in site.vendors]
        noises = [noise_std(request.max_grad_norm, request.noise_multiplier, number)[0] for number in numbers]
        by_chance = SPREAD * math.sqrt(sum(1 / number for number in numbers)) / len(numbers)
        found[vendor] = Expectation(sum(numbers), by_chance, math.hypot(*noises) / len(numbers))
    return found


def num_test_patients(difference_points: float) -> int:
    """Test patients with which a true paired difference is found with probability `POWER` (two-sided z test).

    Args:
        difference_points: The difference of the mean absolute errors, in points of ejection fraction.
    """
    quantiles = NormalDist().inv_cdf(1 - SIGNIFICANCE / 2) + NormalDist().inv_cdf(POWER)
    return math.ceil((quantiles * PAIRED_SD_POINTS / difference_points) ** 2)


def expected(state: FederationState, config: Config, sites: Mapping[str, StudySite]) -> list[str]:
    """What to expect, in words; see `expectations`."""
    found = expectations(state, config, sites)
    what = "style and shape" if config.federation.shape else "style"
    lines = [
        f"{vendor}, {one.num_patients} patients: round 1 tells its mean {what} to within {one.error:.2f} of the public "
        f"hearts' spread, {one.by_chance:.2f} by the number of patients alone and {one.by_noise:.2f} by the noise: "
        f"{one.learnt:.0%} of what typically sets a vendor apart"
        for vendor, one in found.items()
    ]
    one_point, half = num_test_patients(1.0), num_test_patients(0.5)
    lines.append(
        f"whether that shows: a gain of 1 point of ejection fraction takes {one_point} test patients to be seen, "
        f"half a point {half} ({POWER:.0%} power)"
    )
    return lines
