"""The choice of adapter: which one the sites' numbers of patients can pay for, and how much noise it takes.

Every adapter begins with the private statistics of the sites' style vectors, 22 numbers in one round (52 with those of
the shape vectors). "statistics" ends there and spends the whole budget on them. "norm_affine" continues with private
gradient steps on some hundred affine parameters of the generator's normalisation layers. "lora" (LoRA) does so on some
thousand parameters of low-rank updates of the layers that take the style vector.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from fedcmr.server.federation.noise_plan import SegmenterPart, plan_noise
from fedcmr.server.settings import PrivacyConfig
from fedcmr.shared.adapters import ADAPTERS, Adapter
from fedcmr.shared.privacy import Release
from fedcmr.shared.records import GRADIENTS, SEGMENTER, STATISTICS
from fedcmr.shared.style_statistics import NUM_STEPS

LEAST_SIGNAL: Mapping[Adapter, float] = {"norm_affine": 1.2, "lora": 0.3}
"""The least `signal_to_noise` at which "auto" chooses an adapter that trains by gradients.

Set by `simulations.benchmarks.adapters` on simulated hospitals. The norm-affine adapter lowered the held-out loss from
1.2 on and raised it at 0.95 and below. LoRA lowered it by the full amount from 0.4 on and by half of it at 0.2: noise
in its parameters changes the images little, and the signal in them is strong. So with today's numbers of parameters
"auto" never stops at the norm-affine adapter."""

IN_WORDS: Mapping[Adapter, str] = {
    "statistics": "the sites release the style statistics of their scans, and no gradients",
    "norm_affine": "gradients train the scales and shifts of the generator's normalisation",
    "lora": "gradients train low-rank updates of the generator's layers (LoRA)",
}

Plan = dict[str, Release]
"""Task -> what one site will release for it over the whole run."""


def plan_adapter(
    adapter: Adapter,
    privacy: PrivacyConfig,
    num_gradient_steps: int,
    num_rounds: int = 1,
    segmenter: SegmenterPart | None = None,
) -> Plan:
    """The least noise with which a whole run with this adapter stays within the target.

    The two steps of the private mean, with noise s each, cost as much as one with s / sqrt(2). With "statistics" they
    spend the whole budget, with any other adapter `statistics_share` of it. The gradient steps are divided evenly among
    `num_rounds` rounds. Steps on the segmenter come first: the budget of all else is what their share leaves.
    """
    target, delta = privacy.target_epsilon, privacy.target_delta
    if adapter == "statistics" and segmenter is not None:
        rate, steps, rounds = privacy.sample_rate, segmenter.num_steps, segmenter.num_rounds
        parts = plan_noise(target, delta, rate, steps, 1 - segmenter.share, rounds)
        plan = {STATISTICS: _two_steps(parts.statistics), SEGMENTER: parts.gradients}
    elif adapter == "statistics":
        statistics = plan_noise(target, delta, 1.0, 1, 1 / NUM_STEPS).gradients
        plan = {STATISTICS: replace(statistics, num_steps=NUM_STEPS)}
    else:
        share = privacy.statistics_share
        parts = plan_noise(target, delta, privacy.sample_rate, num_gradient_steps, share, num_rounds, segmenter)
        plan = {STATISTICS: _two_steps(parts.statistics), GRADIENTS: parts.gradients}
        plan |= {SEGMENTER: parts.segmenter} if parts.segmenter else {}
    return plan


def _two_steps(statistics: Release) -> Release:
    """The two steps of the private mean, in the place of one release that costs as much."""
    return Release(statistics.noise_multiplier * math.sqrt(NUM_STEPS), 1.0, NUM_STEPS)


def signal_to_noise(gradients: Release, nominal_patients: Iterable[int], num_parameters: int) -> float:
    """Length of the whole run's update over that of its noise, if every patient's clipped gradient were the same.

    The mean over S sites of T steps, each the clip C long, adds up to T C. Site i's noise has the standard deviation
    s C / (q N_i) in each of D coordinates of a step. Over T steps and the mean of S sites its length is
    s C sqrt(T D sum_i N_i^-2) / (q S). The ratio depends neither on the clip nor on the learning rate, and at a given
    epsilon it hardly depends on T, because more steps need more noise. All its inputs are public.
    """
    sizes = list(nominal_patients)
    if gradients.noise_multiplier == 0:
        return math.inf
    spread = math.sqrt(sum(size**-2 for size in sizes)) / len(sizes)
    steps = math.sqrt(gradients.num_steps / num_parameters)
    return gradients.sample_rate * steps / (gradients.noise_multiplier * spread)


def choose_adapter(
    setting: str, gradients: Release | None, nominal_patients: Iterable[int], num_parameters: Mapping[Adapter, int]
) -> tuple[Adapter, str]:
    """The adapter of a study, and one line that says why.

    "auto" takes the last adapter in `ADAPTERS` whose signal-to-noise ratio is at least its `LEAST_SIGNAL`. If there is
    none, it takes the style statistics alone, which then have the whole budget.

    Args:
        setting: `federation.adapter`.
        gradients: What the gradient steps would release; None without privacy.
        nominal_patients: Nominal number of patients of each site in the study.
        num_parameters: Number of trainable parameters of each adapter that trains by gradients.
    """
    for adapter in ADAPTERS:
        if adapter == setting:
            return adapter, f"adapter {adapter}: {IN_WORDS[adapter]}; as federation.adapter says"
    if gradients is None:
        last = ADAPTERS[-1]
        return last, f"adapter {last}: {IN_WORDS[last]}; the largest, as there is no noise without privacy"
    sizes = list(nominal_patients)
    signals = {adapter: signal_to_noise(gradients, sizes, num) for adapter, num in num_parameters.items()}
    paid = [adapter for adapter, signal in signals.items() if signal >= LEAST_SIGNAL[adapter]]
    chosen = max(paid, key=ADAPTERS.index, default=ADAPTERS[0])
    measured = ", ".join(
        f"{signal:.2f} with {adapter}, which needs {LEAST_SIGNAL[adapter]:g}" for adapter, signal in signals.items()
    )
    why = "so that gradients are worth their noise" if paid else "so that gradients would be little but noise"
    return chosen, (
        f"adapter {chosen}: {IN_WORDS[chosen]}. By the sites' public numbers of patients the signal to noise of a "
        f"whole run of gradients is {measured}: {why}"
    )
