"""The audit with canary patients: who took part is guessed from what the sites released.

The auditor throws a coin for each canary, sites train on those that fell in, and the attacker, who sees all that a
curious server sees and knows the canaries, scores every one. `one_run` turns the right guesses into a lower bound on
epsilon.

The canaries lie at many sites of one study, `PER_SITE` at each. No patient is at two sites, so what all sites release
together is as private for each canary as its own site's part, and every coin counts in one test. At one site all
canaries would share its few hundred numbers; so few of them can be distinguished as well as the noise allows. Each site
has the same canaries, under the same names, with coins of their own: the attacker computes what one site's would
contribute, once.
"""

import functools
import itertools
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from fedcmr.client.training import Patient, patient_gradient, view_seed
from fedcmr.server.settings import Config
from fedcmr.shared.adapters import Adapter
from fedcmr.shared.device import one_core_each
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.privacy import clip_to_norm
from fedcmr.shared.progress import track
from fedcmr.shared.records import STATISTICS, STYLE_MEAN, STYLE_SQUARE
from fedcmr.shared.style import MAX_STYLE, STYLE_NAMES
from fedcmr.shared.style_statistics import noise_std, two_step_mean
from fedcmr.simulations.audit.one_run import CONFIDENCE, Family, chance, guess, highest_provable, lower_bound, p_value
from fedcmr.simulations.audit.roc import FALSE_ALARM
from fedcmr.simulations.audit.sites import Build, Round, Run, run_study

Float = NDArray[np.float64]

PER_SITE = 10
"""Canaries of a site: fewer than a style vector has entries, so that each can have an entry to itself."""
NUM_SLICES = 8
"""Slices of a canary, all alike: a build that clips slices instead of patients lets it weigh so many times as much."""
POOL = 5
"""Candidates for every canary."""
LEAST_NOISE = 1e-3
LOUDNESS, NUM_LOUDNESS, NUM_SCATTER = (0.5, 1e3), 200, 40
"""Range and grid of the loudness, and grid of the scatter, that the attack searches, in units of what was planned."""


@dataclass(frozen=True)
class CanaryAudit:
    """The outcome of an audit.

    Attributes:
        build: Which sites were audited.
        control: Every canary took part, whatever its coin: there is nothing to find.
        claimed_epsilon: What each site's ledger would show, at `delta`.
        delta: Delta of claim and bound.
        family: Family of trade-off functions that the claim is taken from, see `one_run`.
        lower_bound: No smaller epsilon is compatible with the right guesses, with `confidence`.
        confidence: Confidence of the bound, in (0, 1).
        highest_provable: The bound had all guesses been right.
        num_canaries: Patients with a coin.
        num_guesses: How many were guessed; chosen before the coins were thrown.
        num_correct: How many of these were right.
        p_value: p-value of the claim: the probability, at most, of so many right guesses if it holds.
        p_chance: The probability of so many right guesses about coins that mean nothing.
        num_sites: Sites of the study.
        num_runs: Times that the study ran.
        adapter: The study's adapter: which part of the generator it trains.
        num_steps: Gradient steps of a run.
    """

    build: Build
    control: bool
    claimed_epsilon: float
    delta: float
    family: Family
    lower_bound: float
    confidence: float
    highest_provable: float
    num_canaries: int
    num_guesses: int
    num_correct: int
    p_value: float
    p_chance: float
    num_sites: int
    num_runs: int
    adapter: str
    num_steps: int

    @property
    def verdict(self) -> str:
        """`refuted`, `not refuted`, or of the control `finds nothing` or `finds what is not there`."""
        if self.control:
            return "finds nothing" if self.p_chance >= FALSE_ALARM else "finds what is not there"
        return "not refuted" if self.lower_bound <= self.claimed_epsilon else "refuted"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the verdict."""
        return {**asdict(self), "verdict": self.verdict}


def audit(
    prior: Prior,
    canaries: Sequence[Patient],
    num_canaries: int,
    config: Config,
    build: Build,
    num_guesses: int,
    num_repeats: int = 1,
    control: bool = False,
    rng: np.random.Generator | None = None,
) -> CanaryAudit:
    """Throw the coins, run the sites, attack what they released.

    Args:
        prior: The public prior.
        canaries: Canaries of one site.
        num_canaries: m, at least 2; the sites are as many as hold so many.
        config: Settings of the study, with privacy on.
        build: What to break.
        num_guesses: c, at most m.
        num_repeats: Runs where the ledger forgets.
        control: Let every canary take part, whatever its coin.
        rng: Source of the coins; the operating system by default.
    """
    rng = np.random.default_rng(secrets.randbits(256)) if rng is None else rng
    coins = rng.random(num_canaries) < 0.5
    present = np.ones(num_canaries, bool) if control else coins
    sites: dict[str, list[Patient]] = {f"site{n:04d}": [] for n in range(math.ceil(num_canaries / len(canaries)))}
    for inside, (name, canary) in zip(present, itertools.product(sites, canaries), strict=False):
        if inside:
            sites[name].append(canary)
    nominal_patients = max(1, len(canaries) // 2)
    runs = run_study(prior, sites, nominal_patients, config, build, num_repeats)
    scores = attack(prior, canaries, runs, nominal_patients).ravel()[:num_canaries]
    guesses = guess(scores, num_guesses)
    delta, correct = config.privacy.target_delta, guesses.correct(coins)
    family: Family = "gaussian" if config.privacy.sample_rate == 1 else "approximate"
    claim, counts = runs[0].claimed_epsilon, (num_canaries, guesses.num)
    return CanaryAudit(
        build=build,
        control=control,
        claimed_epsilon=claim,
        delta=delta,
        family=family,
        lower_bound=lower_bound(*counts, correct, delta, family),
        confidence=CONFIDENCE,
        highest_provable=highest_provable(*counts, delta, family),
        num_canaries=num_canaries,
        num_guesses=guesses.num,
        num_correct=correct,
        p_value=p_value(*counts, correct, claim, delta, family),
        p_chance=chance(guesses.num, correct),
        num_sites=len(sites),
        num_runs=len(runs),
        adapter=runs[0].rounds[0].request.adapter,
        num_steps=sum(r.request.local_steps for r in runs[0].rounds if r.request.task != STATISTICS),
    )


def make_canaries(prior: Prior, adapter: Adapter, seed: int, num_views: int = 1, num: int = PER_SITE) -> list[Patient]:
    """A site's canaries: long gradients, unlike each other, of blocks of black and white under random labels.

    Each has one entry of the style vector to itself, as large as a style vector may have it. Of `POOL` candidates the
    one is taken whose gradient at the prior has the largest part that the canaries before it do not have. All is
    public.

    Args:
        prior: The public prior.
        adapter: The adapter whose gradients are compared.
        seed: Seed of the candidates.
        num_views: Views in a gradient.
        num: Number of canaries, at most as many as a style vector has entries.
    """
    rng = np.random.default_rng(seed)
    if not 1 <= num <= len(STYLE_NAMES):
        raise ValueError(f"Expected num in 1..{len(STYLE_NAMES)}, got {num}.")
    pools = [
        [_candidate(f"canary{axis:02d}", axis, prior.grid.size_px, rng) for _ in range(POOL)] for axis in range(num)
    ]
    if adapter == "statistics":  # no gradient is taken
        return [pool[0] for pool in pools]
    start = {name: parameter.detach().clone() for name, parameter in prior.generator.trainable(adapter).items()}
    with prior.generator.holding(start) as part:
        parameters = list(part.values())
        take = functools.partial(_gradient, prior, parameters, num_views, seed)
        found = list(one_core_each(take, track([c for pool in pools for c in pool], "drawing canaries")))
    basis = np.empty((0, found[0].size))
    chosen = []
    for axis, pool in enumerate(pools):
        directions = [g / max(float(np.linalg.norm(g)), 1e-12) for g in found[axis * POOL : (axis + 1) * POOL]]
        rest = np.stack([direction - basis.T @ (basis @ direction) for direction in directions])
        lengths = np.linalg.norm(rest, axis=1)
        best = int(lengths.argmax())
        chosen.append(pool[best])
        basis = np.concatenate([basis, rest[best : best + 1] / max(float(lengths[best]), 1e-12)])
    return chosen


def attack(prior: Prior, canaries: Sequence[Patient], runs: Sequence[Run], nominal_patients: int) -> Float:
    """Every canary's score, shape (S, k): how much likelier it took part at a site, from the releases alone.

    Each release of a site is a sum of what the canaries there contribute, plus noise. What each would contribute is
    known: its clipped gradient on the round's own views at the arrays that the server sent, its style vector, and that
    vector's square. With a site's releases y, a row of V per canary, coins b of variance 1/4 and noise of variance 1,
    the best linear estimate is E[b] = 1/2 + V (V^T V + 4)^-1 (y - V^T 1/2). Before that, `_fit` finds how loud canaries
    and noise really are, from all sites together, so that an absent clip or an absent noise is noticed.

    Rounds that requested the same thing from the same start, as those of a study that is run again, are one.
    """
    alike: dict[bytes, list[Round]] = {}
    for entry in (entry for run in runs for entry in run.rounds):
        start = entry.start.values() if entry.request.task != STATISTICS else ()
        key = b"".join([entry.request.server_round.to_bytes(4, "big"), *(array.tobytes() for array in start)])
        alike.setdefault(key, []).append(entry)
    systems: list[tuple[Float, Float]] = []
    gradients: list[tuple[Float, Float]] = []
    for entries in track(list(alike.values()), "attacking rounds"):
        if entries[0].request.task == STATISTICS:
            systems += _moment_equations(canaries, entries, nominal_patients)
        else:
            gradients.append(_gradient_equations(prior, canaries, entries, nominal_patients))
    if gradients:
        systems.append(_side_by_side(gradients))
    parts = []
    for planned, released in systems:
        loudness, noise = _fit(planned, released)
        vectors = planned * loudness[:, None] / noise
        parts.append((vectors, released / noise - vectors.sum(axis=0) / 2))
    whole, rest = _side_by_side(parts)
    return np.asarray(np.linalg.solve(whole @ whole.T + 4 * np.eye(len(whole)), whole @ rest.T).T, np.float64)


def _candidate(name: str, axis: int, size_px: int, rng: np.random.Generator) -> Patient:
    """One block size for the image and one for the labels, both drawn; a style vector far out along one of its axes."""
    pattern = _blocks(rng.choice([-1.0, 1.0], (2, size_px, size_px)), int(rng.integers(2, 17)))
    pattern *= rng.uniform(0.1, 1.0)
    labels = _blocks(rng.integers(0, 4, (2, size_px, size_px)), int(rng.integers(3, 20)))
    styles = torch.zeros(1, len(STYLE_NAMES))
    styles[0, axis] = MAX_STYLE
    images = torch.from_numpy(pattern.astype(np.float32)).expand(NUM_SLICES, -1, -1, -1)
    masks = torch.from_numpy(labels.astype(np.uint8)).expand(NUM_SLICES, -1, -1, -1)
    return Patient(name, images, masks, styles, torch.zeros(NUM_SLICES, dtype=torch.int64))


def _blocks(values: NDArray[Any], side: int) -> NDArray[Any]:
    """Squares of `side` pixels, one value each; shape (2, H, W)."""
    size = values.shape[-1]
    coarse = values[:, : -(-size // side), : -(-size // side)]
    return coarse.repeat(side, axis=1).repeat(side, axis=2)[:, :size, :size]


def _gradient(prior: Prior, parameters: Any, num_views: int, seed: int, canary: Patient) -> Float:
    return patient_gradient(prior.generator, canary, num_views, seed, parameters)


def _gradient_equations(
    prior: Prior, canaries: Sequence[Patient], entries: Sequence[Round], nominal_patients: int
) -> tuple[Float, Float]:
    """What each canary adds to a site's update, (k, D), and the sites' updates, (S, D), in units of the planned noise.

    The steps after a round's first start where the server cannot see; the round's start stands for theirs.

    Args:
        prior: The public prior.
        canaries: Canaries of a site.
        entries: One round, or the same one of several runs: their sum in units of its noise, from which nothing that
            bears on the coins is lost.
        nominal_patients: A site's public number of patients.
    """
    request, start = entries[0].request, entries[0].start
    with prior.generator.holding({name: torch.from_numpy(array) for name, array in start.items()}) as parameters:
        contribution = functools.partial(_clipped_gradients, prior, request, list(parameters.values()))
        known = np.stack(list(one_core_each(contribution, canaries)))
    noise = request.noise_multiplier * request.max_grad_norm * math.sqrt(request.local_steps)
    updates = np.array(
        [
            [
                np.concatenate([array.ravel() for array in reply.values()]).astype(np.float64)
                for reply in e.replies.values()
            ]
            for e in entries
        ]
    )
    divisor = request.sample_rate * nominal_patients
    return _pooled(request.sample_rate * known / noise, -updates * divisor / (request.learning_rate * noise))


def _clipped_gradients(prior: Prior, request: Any, parameters: Any, canary: Patient) -> Float:
    """Sum of a canary's clipped gradients over a round's steps; shape (D,)."""
    seeds = [view_seed(request.seed, request.server_round, step, canary.name) for step in range(request.local_steps)]
    gradients = [patient_gradient(prior.generator, canary, request.num_views, seed, parameters) for seed in seeds]
    return np.sum([clip_to_norm(gradient, request.max_grad_norm) for gradient in gradients], axis=0)


def _moment_equations(
    canaries: Sequence[Patient], entries: Sequence[Round], nominal_patients: int
) -> list[tuple[Float, Float]]:
    """What each canary alone does to a site's mean style, (k, K), and what came, (S, K); the same of its variance.

    In units of the planned noise. That canaries share a clip around a centre which they have moved is left out.
    """
    request = entries[0].request
    clip = request.max_grad_norm
    styles = [canary.styles.double().numpy() for canary in canaries]
    known = np.stack([_mean_and_variance(*two_step_mean(style, clip, 0.0, nominal_patients, None)) for style in styles])
    released = np.array(
        [
            [_mean_and_variance(reply[STYLE_MEAN][0], reply[STYLE_SQUARE][0]) for reply in entry.replies.values()]
            for entry in entries
        ]
    )
    noise = noise_std(clip, request.noise_multiplier, nominal_patients)
    return [_pooled(known[:, n] / noise[n], released[:, :, n] / noise[n]) for n in range(2)]


def _mean_and_variance(mean: NDArray[Any], square: NDArray[Any]) -> Float:
    """Shape (2, K)."""
    wide = mean.astype(np.float64)
    return np.stack([wide, square.astype(np.float64) - wide**2])


def _pooled(vectors: Float, released: Float) -> tuple[Float, Float]:
    """Vectors (k, D) and releases (T, S, D) of noise 1 in each of T runs, as those of one release of noise 1."""
    times = math.sqrt(len(released))
    return vectors * times, released.sum(axis=0) / times


def _side_by_side(parts: Sequence[tuple[Float, Float]]) -> tuple[Float, Float]:
    """Equations of several releases as one system."""
    return np.concatenate([part for part, _ in parts], axis=1), np.concatenate([part for _, part in parts], axis=1)


def _fit(vectors: Float, released: Float) -> tuple[Float, float]:
    """How loud each canary is, shape (k,), and how loud the noise, in units of the plan.

    What no canary can have added is noise. A canary's share in the releases of all sites is a mixture of two normal
    distributions, about 0 where it was not and about its loudness where it was; a priori that is the planned one within
    a factor of e, so that noise alone does not move it. Where shares scatter more than the noise explains, the
    equations do not describe what was done, and count for less.

    Args:
        vectors: V, shape (k, D).
        released: Shape (S, D).
    """
    inverse = np.linalg.pinv(vectors @ vectors.T, rcond=1e-9, hermitian=True)
    shares = released @ vectors.T @ inverse
    num_beyond = vectors.shape[1] - np.linalg.matrix_rank(vectors)
    rest = float(((released - shares @ vectors) ** 2).sum())
    noise = max(math.sqrt(rest / (num_beyond * len(released))), LEAST_NOISE) if num_beyond else LEAST_NOISE
    scatter, loudness = np.geomspace(1, LOUDNESS[1], NUM_SCATTER), np.geomspace(*LOUDNESS, NUM_LOUDNESS)
    deviation = np.outer(scatter, noise * np.sqrt(np.maximum(np.diag(inverse), 1e-12)))
    absent = norm.logpdf(shares[None], 0.0, deviation[:, None])[..., None]
    present = norm.logpdf(shares[None, ..., None], loudness, deviation[:, None, :, None])
    likelihood = np.logaddexp(absent, present).sum(axis=1) - np.log(loudness) ** 2 / 2
    best = int(likelihood.max(axis=2).sum(axis=1).argmax())
    return loudness[likelihood[best].argmax(axis=1)], noise * float(scatter[best])
