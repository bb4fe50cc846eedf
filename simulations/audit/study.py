"""Simulated patients for the membership audit, and the generators that are attacked.

Patients come from the simulated hospitals' own scanners and through the client's own normalisation. Only the detour
over DICOM files is left out: it takes most of the time and changes nothing but the rounding of positions.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.normalise import normalise
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.training import Patient, patient_of
from fedcmr.server.training.loop import Budget, Recipe, train
from fedcmr.server.training.state import TrainingState
from fedcmr.shared.case import Case, CaseInfo
from fedcmr.shared.models.base import Condition, GenerativeModel
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.progress import track
from fedcmr.shared.views import augment, slice_pairs
from fedcmr.simulations.hospital import POPULATIONS
from fedcmr.simulations.patients.population import draw_patient
from fedcmr.simulations.scanners.acquisition import SCANNERS, acquire

NUM_SLICES, NUM_PHASES = 6, 3
"""Slices and phases of a stack. Three phases hold end-diastole and, to within a twentieth of the cycle, end-systole."""


@dataclass(frozen=True)
class Pool:
    """Patients of several sites, some of whom trained.

    Attributes:
        patients: P of them.
        member: Shape (P,): who trained.
        site: Shape (P,), the number of the site at which each was scanned.
        vendors: Vendor of each site.
    """

    patients: list[Patient]
    member: NDArray[np.bool_]
    site: NDArray[np.int64]
    vendors: list[str]

    def at(self, site: int, chosen: NDArray[np.bool_]) -> list[Patient]:
        """The chosen patients of a site."""
        return [self.patients[index] for index in np.flatnonzero((self.site == site) & chosen)]


def draw_pool(vendors: Sequence[str], num_each: int, prior: Prior, seed: int) -> Pool:
    """At every vendor's hospital `num_each` patients who will train and as many who will not."""
    patients, site = [], []
    jobs = [(number, vendor, index) for number, vendor in enumerate(vendors) for index in range(2 * num_each)]
    for number, vendor, index in track(jobs, "scanning patients"):
        patients.append(draw(vendor, prior, np.random.default_rng([seed, number, index]), f"{number}-{index:04d}"))
        site.append(number)
    member = np.array([index < num_each for _, _, index in jobs])
    return Pool(patients, member, np.array(site), list(vendors))


def draw(vendor: str, prior: Prior, rng: np.random.Generator, name: str) -> Patient:
    """One patient of a vendor's hospital, drawn again where the scan is unusable, as at `fedcmr-client prepare`."""
    while True:
        scan = acquire(draw_patient(rng, POPULATIONS[vendor]), SCANNERS[vendor], NUM_SLICES, NUM_PHASES, rng)
        stack = scan.stack
        along = stack.first_pixel_mm[-1] - stack.first_pixel_mm[0]
        axes = np.stack([along / np.linalg.norm(along), stack.column_direction, stack.row_direction])
        spacing = (stack.spacing_mm, stack.pixel_mm, stack.pixel_mm)
        cine = Cine(scan.frames.astype(np.float32), scan.masks, spacing, axes, vendor, 1.5)
        try:
            found = normalise(cine)
        except Unusable:
            continue
        info = CaseInfo(name, vendor, 1.5, found.ef, name)
        images, masks = slice_pairs(Case(info, found.frames, found.masks, found.spacing_mm), prior.grid)
        return patient_of(name, images, masks, prior)


def middle(patient: Patient, num_slices: int) -> Patient:
    """A patient with nothing but slices from the middle of its stack, and the style vector of the whole one."""
    start = max(0, (len(patient.images) - num_slices) // 2)
    chosen = slice(start, start + num_slices)
    return replace(patient, images=patient.images[chosen], masks=patient.masks[chosen], vendors=patient.vendors[chosen])


def overfitted(
    prior: Prior, patients: Sequence[Patient], num_steps: int, batch_size: int, learning_rate: float, seed: int = 0
) -> GenerativeModel:
    """A generator without privacy, all weights trained on a few patients for long: what the attacks must catch."""
    generator = deepcopy(prior.generator).requires_grad_(True)
    images, masks = (torch.cat([getattr(patient, key) for patient in patients]) for key in ("images", "masks"))
    styles = torch.cat([patient.slice_styles for patient in patients])
    # Plain AdamW: what the attacks found of these networks was measured with it.
    optimizer = torch.optim.AdamW(generator.parameters(), weight_decay=0.0)
    rng = torch.Generator().manual_seed(seed)

    def loss_of_step(_: int) -> torch.Tensor:
        index = torch.randint(len(images), (batch_size,), generator=rng)
        views, labels = augment(images[index], masks[index], rng, 5.0, 0.02, 1.0)
        return generator.loss(views, Condition(labels, styles[index]), rng).mean()

    state = TrainingState(generator, optimizer=optimizer)
    train(state, loss_of_step, Recipe(lambda *_: learning_rate, lambda *_: 0.0), Budget(num_steps), "overfitting")
    return generator.eval().requires_grad_(False)
