"""The audit with canary patients: who took part is guessed from what the site released.

The auditor throws a coin for each canary, a site trains on those that fell in, and the attacker, who sees all that a
curious server sees and knows the canaries, scores every one. `one_run` turns the right guesses into a lower bound on
epsilon.
"""

import functools
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import qr
from scipy.optimize import minimize

from client.training import Patient, patient_gradient, view_seed
from shared.appearance import CODE_NAMES, MAX_CODE
from shared.config import Config, Rung
from shared.networks.generator import Prior
from shared.privacy import clip_to_norm
from shared.progress import track
from shared.records import CODE_MEAN, MOMENTS
from shared.views import IMAGE_SIZE
from simulations.audit.one_run import CONFIDENCE, guess, highest_provable, lower_bound, p_value
from simulations.audit.sites import Build, Round, Run, run_site

Float = NDArray[np.float64]

NUM_SLICES = 24
"""Of a canary, all alike: a build that clips slices instead of patients lets it weigh that many times as much."""
POOL = 5
"""Canaries that are drawn for every one that is used."""
LEAST_NOISE, MIN_GAIN, MAX_SCALE = 1e-3, 0.5, 1e3
"""Limits of what the attack fits, in units of what was planned."""
LEAST_MOMENT_NOISE = 0.6
"""The moments are too few numbers to tell their noise from: both looks together have two thirds of the first one's."""


@dataclass(frozen=True)
class CanaryAudit:
    """The outcome of an audit.

    Attributes:
        build: Which site was audited.
        claimed_epsilon: What the site's ledger would show, at `delta`.
        delta: Of claim and bound.
        lower_bound: No smaller epsilon is compatible with the right guesses, with `confidence`.
        confidence: Of the bound.
        highest_provable: The bound had all guesses been right.
        num_canaries: Patients with a coin.
        num_guesses: How many were guessed; chosen before the coins were thrown.
        num_correct: How many of these were right.
        p_value: Of the claim: the probability, at most, of so many right guesses if it holds.
        num_runs: Times that the site ran.
        rung: Of the study: which part of the generator it trains.
        num_steps: Gradient steps of a run.
    """

    build: Build
    claimed_epsilon: float
    delta: float
    lower_bound: float
    confidence: float
    highest_provable: float
    num_canaries: int
    num_guesses: int
    num_correct: int
    p_value: float
    num_runs: int
    rung: str
    num_steps: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the verdict."""
        return {**asdict(self), "claim_holds": self.lower_bound <= self.claimed_epsilon}


def audit(
    prior: Prior,
    canaries: Sequence[Patient],
    config: Config,
    build: Build,
    num_guesses: int,
    num_repeats: int = 1,
    rng: np.random.Generator | None = None,
) -> CanaryAudit:
    """Throw the coins, run the site, attack what it released.

    Args:
        prior: The public prior.
        canaries: At least 2.
        config: Of the study, with privacy on.
        build: What to break.
        num_guesses: r, at most as many as canaries; half are guessed in, half out.
        num_repeats: Runs where the ledger forgets.
        rng: Of the coins; from the operating system by default.
    """
    rng = np.random.default_rng(secrets.randbits(256)) if rng is None else rng
    included = rng.random(len(canaries)) < 0.5
    inside = [canary for canary, coin in zip(canaries, included, strict=True) if coin]
    runs = run_site(prior, inside, max(1, len(canaries) // 2), config, build, num_repeats)
    scores = attack(prior, canaries, runs, max(1, len(canaries) // 2))
    guesses = guess(scores, num_guesses - num_guesses // 2, num_guesses // 2)
    delta, correct = config.privacy.target_delta, guesses.correct(included)
    claim, counts = runs[0].claimed_epsilon, (len(canaries), guesses.num)
    return CanaryAudit(
        build=build,
        claimed_epsilon=claim,
        delta=delta,
        lower_bound=lower_bound(*counts, correct, delta),
        confidence=CONFIDENCE,
        highest_provable=highest_provable(*counts, delta),
        num_canaries=len(canaries),
        num_guesses=guesses.num,
        num_correct=correct,
        p_value=p_value(*counts, correct, claim, delta),
        num_runs=len(runs),
        rung=runs[0].rounds[0].request.rung,
        num_steps=sum(r.request.local_steps for r in runs[0].rounds if r.request.task != MOMENTS),
    )


def make_canaries(num: int, prior: Prior, rung: Rung, seed: int, num_views: int = 2) -> list[Patient]:
    """Patients whose gradients are long and unlike each other: blocks of black and white under random labels.

    Of `POOL` times as many candidates those are kept that a QR decomposition with pivots of their gradients at the
    prior finds the least alike (Businger and Golub 1965, https://doi.org/10.1007/BF01436084). All is public.
    """
    rng = np.random.default_rng(seed)
    pool = [_candidate(f"canary{index:05d}", rng) for index in range(POOL * num)]
    if rung == "moments":  # no gradient is taken
        return pool[:num]
    start = {name: parameter.detach().clone() for name, parameter in prior.generator.trainable(rung).items()}
    with prior.generator.holding(start) as part:
        parameters = list(part.values())
        gradients = [
            patient_gradient(prior.generator, canary, num_views, seed, parameters)
            for canary in track(pool, "drawing canaries")
        ]
    directions = [gradient / max(float(np.linalg.norm(gradient)), 1e-12) for gradient in gradients]
    _, _, order = qr(np.stack(directions).T, mode="economic", pivoting=True)
    return [pool[index] for index in sorted(order[:num])]


def attack(prior: Prior, canaries: Sequence[Patient], runs: Sequence[Run], nominal_patients: int) -> Float:
    """Every canary's score, shape (m,): how much likelier it took part, from the releases alone.

    Each release is a sum of what the canaries in it contribute, plus noise. What each would contribute is known: its
    clipped gradient on the round's own views at the arrays that the server sent. With the releases y, a row of V per
    canary, coins b of variance 1/4 and noise of variance 1, the best linear estimate is
    E[b] = 1/2 + V (V^T V + 4)^-1 (y - V^T 1/2). Before that, `_fit` finds how loud canaries and noise really are, so
    that an absent clip or an absent noise is noticed.
    """
    gradients: list[tuple[Float, Float]] = []
    codes: list[tuple[Float, Float]] = []
    known: dict[bytes, Float] = {}
    for entry in track([entry for run in runs for entry in run.rounds], "attacking rounds"):
        if entry.request.task == MOMENTS:
            codes.append(_moment_equations(canaries, entry, nominal_patients))
        else:
            gradients.append(_gradient_equations(prior, canaries, entry, nominal_patients, known))
    parts = []
    for equations, least in ((gradients, LEAST_NOISE), (codes, LEAST_MOMENT_NOISE)):
        if equations:
            vectors, released = _side_by_side(equations)
            gain, noise = _fit(vectors, released, least)
            parts.append((vectors * gain / noise, (released - gain * vectors.sum(axis=0) / 2) / noise))
    vectors, rest = (np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
    gram = vectors @ vectors.T
    return np.linalg.solve(gram + 4 * np.eye(len(gram)), vectors @ rest)


def _candidate(name: str, rng: np.random.Generator) -> Patient:
    """One block size for the picture and one for the labels, both drawn; a code at the corners of what is allowed."""
    picture = _blocks(rng.choice([-1.0, 1.0], (2, IMAGE_SIZE, IMAGE_SIZE)), int(rng.integers(2, 17)))
    picture *= rng.uniform(0.1, 1.0)
    labels = _blocks(rng.integers(0, 4, (2, IMAGE_SIZE, IMAGE_SIZE)), int(rng.integers(3, 20)))
    code = MAX_CODE * rng.choice([-1.0, 1.0], len(CODE_NAMES))
    images = torch.from_numpy(picture.astype(np.float32)).expand(NUM_SLICES, -1, -1, -1)
    masks = torch.from_numpy(labels.astype(np.uint8)).expand(NUM_SLICES, -1, -1, -1)
    vendors = torch.zeros(len(images), dtype=torch.int64)
    return Patient(name, images, masks, torch.from_numpy(code.astype(np.float32))[None], vendors)


def _blocks(values: NDArray[Any], side: int) -> NDArray[Any]:
    """Squares of `side` pixels, one value each; shape (2, H, W)."""
    coarse = values[:, : -(-IMAGE_SIZE // side), : -(-IMAGE_SIZE // side)]
    return coarse.repeat(side, axis=1).repeat(side, axis=2)[:, :IMAGE_SIZE, :IMAGE_SIZE]


def _gradient_equations(
    prior: Prior, canaries: Sequence[Patient], entry: Round, nominal_patients: int, known: dict[bytes, Float]
) -> tuple[Float, Float]:
    """What each canary adds to a round's update, (m, D), and the update, (D,), in units of the planned noise.

    The steps after a round's first start where the server has not looked; its own start stands for theirs.
    """
    request = entry.request
    key = b"".join([request.server_round.to_bytes(4, "big"), *(array.tobytes() for array in entry.start.values())])
    if key not in known:
        with prior.generator.holding({n: torch.from_numpy(a) for n, a in entry.start.items()}) as parameters:
            contribution = functools.partial(_clipped_gradients, prior, request, list(parameters.values()))
            known[key] = np.stack([contribution(canary) for canary in canaries])
    noise = request.noise_multiplier * request.max_grad_norm * math.sqrt(request.local_steps)
    update = np.concatenate([array.ravel() for array in entry.reply.values()]).astype(np.float64)
    divisor = request.sample_rate * nominal_patients
    return request.sample_rate * known[key] / noise, -update * divisor / (request.learning_rate * noise)


def _clipped_gradients(prior: Prior, request: Any, parameters: Any, canary: Patient) -> Float:
    """Sum of a canary's clipped gradients over a round's steps; shape (D,)."""
    seeds = [view_seed(request.seed, request.server_round, step, canary.name) for step in range(request.local_steps)]
    gradients = [patient_gradient(prior.generator, canary, request.num_views, seed, parameters) for seed in seeds]
    return np.sum([clip_to_norm(gradient, request.max_grad_norm) for gradient in gradients], axis=0)


def _moment_equations(canaries: Sequence[Patient], entry: Round, nominal_patients: int) -> tuple[Float, Float]:
    """What each canary adds to the mean code, (m, K), and the mean, (K,), in units of the first look's planned noise.

    Only the first look's part is known: the second clips around a centre that is published with its own noise alone
    mixed in. It adds to the same directions, which the fitted gain takes up. The mean square is left alone, for the
    canaries' codes are all of one length and leave little in it.
    """
    clip, noise_multiplier = entry.request.max_grad_norm, entry.request.noise_multiplier
    codes = np.stack([clip_to_norm(canary.codes[0].double().numpy(), clip) for canary in canaries])
    mean = entry.reply[CODE_MEAN][0].astype(np.float64)
    return codes / (clip * noise_multiplier), mean * nominal_patients / (clip * noise_multiplier)


def _side_by_side(equations: Sequence[tuple[Float, Float]]) -> tuple[Float, Float]:
    """The equations of all rounds as one system: (m, D) and (D,)."""
    return np.concatenate([part for part, _ in equations], axis=1), np.concatenate([part for _, part in equations])


def _fit(vectors: Float, released: Float, least_noise: float) -> tuple[float, float]:
    """How loud the canaries are and how loud the noise, both in units of the plan: what explains the releases best.

    With gain g and noise s they are N(g V^T 1/2, g^2 V^T V / 4 + s^2), whose likelihood is a sum over the singular
    directions of V.

    Args:
        vectors: V, shape (m, D).
        released: Shape (D,).
        least_noise: Below this s is not looked for.
    """
    values, left = np.linalg.eigh(vectors @ vectors.T)
    keep = values > 1e-9 * values.max(initial=1e-300)
    values, left = values[keep], left[:, keep]
    along = left.T @ (vectors @ released) / np.sqrt(values)
    middle = left.T @ (vectors @ vectors.sum(axis=0) / 2) / np.sqrt(values)
    beyond, num_beyond = max(float(released @ released - along @ along), 0.0), len(released) - len(values)

    def cost(logs: Float) -> float:
        gain, noise = np.exp(np.clip(logs, (math.log(MIN_GAIN), math.log(least_noise)), math.log(MAX_SCALE)))
        variance = gain**2 * values / 4 + noise**2
        misfit = ((along - gain * middle) ** 2 / variance + np.log(variance)).sum()
        return float(misfit + beyond / noise**2 + num_beyond * 2 * math.log(noise))

    starts = [(g, s) for g in (0.0, math.log(8.0)) for s in (math.log(max(0.03, least_noise)), 0.0)]
    best = min((minimize(cost, start, method="Nelder-Mead") for start in starts), key=lambda found: found.fun).x
    gain, noise = np.exp(np.clip(best, (math.log(MIN_GAIN), math.log(least_noise)), math.log(MAX_SCALE)))
    return float(gain), float(noise)
