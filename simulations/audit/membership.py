"""Membership inference on a generator: did this patient train it?

Three attacks, each relative to the public prior, which every attacker has: what all of a patient's images have in
common with those of others then cancels. The attacker holds the patient's images, masks and style vectors.

- denoising loss: the training loss on fixed views (the threshold attack of Yeom et al. 2018,
  https://arxiv.org/abs/1709.01604, as Matsumoto et al. 2023, https://arxiv.org/abs/2302.03262, apply it to diffusion);
- SimA (Rao, Qu and Moyer 2025, https://arxiv.org/abs/2509.25003): one query with the clean image, the norm of the
  predicted noise;
- likelihood ratio: the same loss against that of shadow generators which the patient did not train (LiRA, Carlini et
  al. 2022, https://arxiv.org/abs/2112.03570, the offline form with one variance for all).
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcmr.client.training import Patient, patient_gradient, view_seed
from fedcmr.server.federation.round import Replies
from fedcmr.server.federation.state import StudySite, initial_state
from fedcmr.server.settings import Config
from fedcmr.shared.adapters import Adapter
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.device import autocast, one_core_each
from fedcmr.shared.models.base import Condition, GenerativeModel
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.privacy import clip_to_norm
from fedcmr.shared.progress import console, track
from fedcmr.shared.records import GRADIENTS, Request
from fedcmr.simulations.audit.roc import Membership, membership
from fedcmr.simulations.audit.study import Pool
from fedcmr.simulations.benchmarks.adapters import HELD_OUT_VIEWS, Site, fixed_views
from fedcmr.simulations.benchmarks.adapters import federate as federate_sites
from fedcmr.simulations.in_process import gradient_rounds, reply_with

Float = NDArray[np.float64]

LOSS, SIMA, RATIO = "denoising loss", "SimA", "likelihood ratio"
SIMA_T = 0.7
"""Time of SimA's query: where the noise of the path is 0.3 and the image 0.7 strong."""
NUM_DRAWS = 2
"""Gradients per patient that the shadows train with, again and again."""
BATCH = 64


def attack_arrays(prior: Prior, arrays: Arrays, pool: Pool, config: Config, num_shadows: int) -> dict[str, Membership]:
    """All attacks on a generator that differs from the prior by a trainable part."""
    views, clean = fixed_views(pool.patients), clean_images(pool.patients)
    before = _both(prior.generator, views, clean)
    with prior.generator.holding({name: torch.from_numpy(array) for name, array in arrays.items()}):
        after = _both(prior.generator, views, clean)
    gains = {LOSS: before[0] - after[0], SIMA: before[1] - after[1]}
    if num_shadows:
        gains[RATIO] = likelihood_ratio(prior, pool, config, gains[LOSS], before[0], views, num_shadows)
    return _told_apart(gains, pool)


def attack_generator(prior: Prior, generator: GenerativeModel, pool: Pool) -> dict[str, Membership]:
    """The attacks without shadows on a generator of any weights."""
    views, clean = fixed_views(pool.patients), clean_images(pool.patients)
    before, after = (_both(network, views, clean) for network in (prior.generator, generator))
    return _told_apart({LOSS: before[0] - after[0], SIMA: before[1] - after[1]}, pool)


def federate(prior: Prior, pool: Pool, config: Config) -> Arrays:
    """What a study of the pool's members would publish: the rounds of gradients, client code, real noise."""
    console.print(f"training the study: {len(pool.vendors)} sites, {int(pool.member.sum())} patients")
    sites = [Site(vendor, pool.at(number, pool.member)) for number, vendor in enumerate(pool.vendors)]
    return federate_sites(prior, sites, config, torch.device("cpu")).ema


def clean_images(patients: Sequence[Patient]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per patient the images, masks and style vectors of all slices."""
    return [(p.images, p.masks, p.slice_styles) for p in patients]


@torch.no_grad()
def view_losses(generator: GenerativeModel, views: Sequence[Tensor]) -> Float:
    """Mean loss of every patient over its fixed views, shape (P,)."""
    device = next(generator.parameters()).device
    losses = []
    for part in torch.arange(len(views[0])).split(BATCH):
        with autocast(device):
            images, masks, styles, t, noise = (tensor[part].to(device) for tensor in views)
            losses.append(generator.loss_at(images, Condition(masks, styles), t, noise).cpu())
    return torch.cat(losses).reshape(-1, HELD_OUT_VIEWS).mean(1).double().numpy()


@torch.no_grad()
def predicted_noise(generator: GenerativeModel, clean: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Float:
    """SimA's statistic, shape (P,): norm of the noise found in a clean image, mean over a patient's slices.

    On the linear path x_t = (1 - t) x_0 + t x_1 the noise is x_0 = x_t - t v; the query is x_t = t x_1.
    """
    device = next(generator.parameters()).device
    images, masks, styles = (torch.cat([part[k] for part in clean]) for k in range(3))
    norms = []
    for part in torch.arange(len(images)).split(BATCH):
        t = torch.full((len(part),), SIMA_T, device=device)
        with autocast(device):
            x_t = SIMA_T * generator.encode(images[part].to(device))
            velocity = generator.velocity(x_t, t, Condition(masks[part], styles[part]).to(device))
        norms.append((x_t - SIMA_T * velocity).flatten(1).norm(dim=1).cpu())
    sizes = [len(part[0]) for part in clean]
    return np.array([float(part.mean()) for part in torch.cat(norms).split(sizes)])


def likelihood_ratio(
    prior: Prior, pool: Pool, config: Config, gain: Float, before: Float, views: Sequence[Tensor], num_shadows: int
) -> Float:
    """Each patient's gain in loss above that in shadows which it did not train, in standard deviations; shape (P,).

    Every shadow is trained on a random half of all patients at each site with noise of its own. It takes the gradients
    at the prior, because the trained part moves too little for them to change much: it costs no more than its losses.
    """
    if config.federation.adapter == "statistics":
        return gain  # nothing was trained
    gradients = _gradients(prior, pool.patients, config)
    rng = np.random.default_rng(config.seed)
    gains, inside = [], []
    for _ in track(range(num_shadows), "attacking shadows"):
        chosen = _random_half(pool.site, rng)
        arrays = _shadow(prior, gradients, chosen, pool.site, config, rng)
        with prior.generator.holding({name: torch.from_numpy(array) for name, array in arrays.items()}):
            gains.append(before - view_losses(prior.generator, views))
        inside.append(chosen)
    out = ~np.stack(inside)
    values, counts = np.stack(gains), out.sum(axis=0)
    mean = np.where(counts > 0, (values * out).sum(axis=0) / np.maximum(counts, 1), values.mean(axis=0))
    squares = (((values - mean) ** 2) * out).sum() / max(int(np.maximum(counts - 1, 0).sum()), 1)
    return (gain - mean) / max(float(np.sqrt(squares)), 1e-12)


def _told_apart(scores: Mapping[str, Float], pool: Pool) -> dict[str, Membership]:
    """How well each attack's scores, shape (P,), tell members from others."""
    halves = _first_halves(pool.site[pool.member])
    return {name: membership(values[pool.member], values[~pool.member], halves) for name, values in scores.items()}


def _first_halves(site: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The first half of every site's patients: members came before others too, and order alone must tell nothing."""
    first = np.zeros(len(site), bool)
    for number in np.unique(site):
        there = np.flatnonzero(site == number)
        first[there[: len(there) // 2]] = True
    return first if first.any() else np.arange(len(site)) < len(site) // 2  # one patient a site


def _both(
    generator: GenerativeModel, views: Sequence[Tensor], clean: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Float, Float]:
    return view_losses(generator, views), predicted_noise(generator, clean)


def _gradients(prior: Prior, patients: Sequence[Patient], config: Config) -> Float:
    """Clipped gradients at the prior, shape (`NUM_DRAWS`, P, D)."""
    part = prior.generator.trainable(cast(Adapter, config.federation.adapter))
    with prior.generator.holding({name: value.detach().clone() for name, value in part.items()}) as parameters:
        chosen = list(parameters.values())

        def clipped(job: tuple[int, Patient]) -> Float:
            draw, patient = job
            seed = view_seed(config.seed, 0, draw, patient.name)
            gradient = patient_gradient(prior.generator, patient, config.federation.num_views, seed, chosen)
            return clip_to_norm(gradient, config.privacy.max_grad_norm)

        jobs = [(draw, patient) for draw in range(NUM_DRAWS) for patient in patients]
        rows = list(one_core_each(clipped, track(jobs, "gradients for the shadows")))
    return np.stack(rows).reshape(NUM_DRAWS, len(patients), -1)


def _random_half(site: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Half of the patients of every site."""
    chosen = np.zeros(len(site), bool)
    for number in np.unique(site):
        there = np.flatnonzero(site == number)
        chosen[rng.permutation(there)[: len(there) // 2]] = True
    return chosen


def _shadow(
    prior: Prior,
    gradients: Float,
    chosen: NDArray[np.bool_],
    site: NDArray[np.int64],
    config: Config,
    rng: np.random.Generator,
) -> Arrays:
    """The part that the server would publish had the chosen patients trained; same steps, noise and average."""
    numbers = np.unique(site)
    sizes = {f"{number}": int((chosen & (site == number)).sum()) for number in numbers}
    sites = {name: StudySite({"Siemens": max(size, 1)}, max(size, 1)) for name, size in sizes.items()}
    state = initial_state(config, prior, sites)
    noise = state.plan[GRADIENTS].noise_multiplier * config.privacy.max_grad_norm if state.plan else 0.0

    def train(request: Request, start: Arrays) -> Replies:
        updates = {}
        for number in numbers:
            there, name = chosen & (site == number), f"{number}"
            update = np.zeros(gradients.shape[-1])
            for step in range(request.local_steps):
                draw = (request.server_round * request.local_steps + step) % NUM_DRAWS
                total = gradients[draw, there].sum(axis=0) + rng.normal(0, noise, update.shape)
                update -= request.learning_rate * total / max(sizes[name], 1)
            updates[name] = _shaped(update, start)
        return reply_with(updates)

    return gradient_rounds(state, sites, config, train).ema


def _shaped(flat: Float, like: Mapping[str, NDArray[np.float32]]) -> Arrays:
    """A flat vector as arrays of these names and shapes."""
    cuts = np.cumsum([array.size for array in like.values()])[:-1]
    pieces = np.split(flat, cuts)
    return {
        name: piece.reshape(array.shape).astype(np.float32)
        for (name, array), piece in zip(like.items(), pieces, strict=True)
    }
