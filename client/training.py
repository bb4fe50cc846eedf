"""Local private training: plain PyTorch on one site's patients.

One data-set item is one patient. Slices, phases, augmentations and noise draws are averaged inside the patient,
then clipped once (De et al. 2022, https://arxiv.org/abs/2204.13650, augmentation multiplicity; Dockhorn et al. 2023,
https://arxiv.org/abs/2210.09929, noise multiplicity).
"""

import functools
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcmr.client.trainable import group_of, usable_cases
from fedcmr.shared.case import INDEX_NAME
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.device import autocast, one_core_each
from fedcmr.shared.models.base import Condition, GenerativeModel
from fedcmr.shared.models.prior import Prior, load_prior
from fedcmr.shared.privacy import Mechanism, Rng, os_generator, poisson_sample, private_mean_gradient
from fedcmr.shared.records import SHAPE_MEAN, SHAPE_SQUARE, STATISTICS, STYLE_MEAN, STYLE_SQUARE, Request
from fedcmr.shared.shape import SHAPE_NAMES, case_shape
from fedcmr.shared.style import STYLE_NAMES, style_vector
from fedcmr.shared.style_statistics import two_step_mean
from fedcmr.shared.views import MAX_SHIFT_MM, Grid, augment_in_equal_time, drawn_whole, slice_pairs, with_heart


@dataclass(frozen=True)
class Patient:
    """One patient as the generator sees it: the slices that hold the heart; perhaps none.

    They are drawn whole, unless the generator is told where nobody drew.

    Attributes:
        name: The case's group: a pseudonym. Seeds the patient's views.
        images: Shape (Z, 2, H, W) on the generator's grid, ED and ES, float32 in [-1, 1].
        masks: Shape (Z, 2, H, W), uint8 labels 0..3, and 255 (`NOT_DRAWN`) for a generator that is told.
        styles: Shape (V, K), the standardised style vectors of the patient's scans by vendor, in the order of the
            site's vendors; zeros where the patient has no scan of one, or nobody drew the region.
        vendors: Shape (Z,), int64: which row of `styles` each slice belongs to.
        measured: Shape (V, K), bool: which entries of `styles` are the patient's own; None for all of the vendors that
            the slices are of.
        shapes: Shape (V, `len(SHAPE_NAMES)`), the standardised shape vectors by vendor; NaN where they could not be
            measured. None where nothing could.
    """

    name: str
    images: Tensor
    masks: Tensor
    styles: Tensor
    vendors: Tensor
    measured: Tensor | None = None
    shapes: Tensor | None = None

    def __post_init__(self) -> None:
        # Otherwise slices would be trained in the style of others.
        assert len(self.images) == len(self.masks) == len(self.vendors), "one vendor for each slice"

    @property
    def slice_styles(self) -> Tensor:
        """Shape (Z, K): for each slice the style vector of its vendor."""
        return self.styles[self.vendors]

    @property
    def known(self) -> Tensor:
        """Shape (V,), bool: of which vendors the patient has scans."""
        if self.measured is not None:
            return self.measured.any(dim=1)
        known = torch.zeros(len(self.styles), dtype=torch.bool)
        known[self.vendors] = True
        return known


class Named(Protocol):
    """A patient, whatever else is known: the name seeds the views."""

    @property
    def name(self) -> str:
        """The case's group: a pseudonym."""


AnyPatient = TypeVar("AnyPatient", bound=Named)


@dataclass(frozen=True)
class Learner(Generic[AnyPatient]):
    """A network of which a site trains a part, and how one patient's gradient is found.

    Attributes:
        name: What is trained, with the fingerprint of its public weights; the key of what was measured on this machine.
        network: Left as it was by whoever trains it.
        holding: Within, the part with these names holds these values and is all that gradients flow to.
        gradient: From a patient, the number of views, their seed and the parameters to the gradient of the patient's
            mean loss over the views, flattened, shape (D,). Its time must not depend on the patient.
        nobody: An empty patient.
    """

    name: str
    network: torch.nn.Module
    holding: Callable[[Mapping[str, Tensor]], AbstractContextManager[dict[str, torch.nn.Parameter]]]
    gradient: Callable[[AnyPatient, int, int, Sequence[torch.nn.Parameter]], NDArray[np.float64]]
    nobody: AnyPatient


@dataclass(frozen=True)
class LocalSteps:
    """What a gradient step computes, apart from what makes it private (`fedcmr.shared.privacy.Mechanism`).

    Attributes:
        learning_rate: Learning rate of each step.
        num_views: Random views averaged into one patient's gradient.
        seed: Seed of the views, together with the round, the step and the patient.
        server_round: The round.
    """

    learning_rate: float
    num_views: int
    seed: int
    server_round: int

    @classmethod
    def of(cls, request: Request) -> "LocalSteps":
        """As a request demands them."""
        return cls(request.learning_rate, request.num_views, request.seed, request.server_round)


@dataclass(frozen=True)
class Execution:
    """Where and how fast a site works; no number that it releases depends on it, but for rounding on another device.

    Attributes:
        device: Where the generator runs; on a CPU, patients are computed on as many cores as torch has threads.
        max_seconds: For all steps together, from the site's policy: work that takes longer is given up.
    """

    device: torch.device
    max_seconds: float = math.inf


def patient_of(
    name: str,
    images: Tensor,
    masks: Tensor,
    prior: Prior,
    vendors: Tensor | None = None,
    num_vendors: int = 1,
    shapes: Tensor | None = None,
) -> Patient:
    """A patient from whole stacks on the prior's grid, (Z, 2, H, W) each, of which at least one slice shows the heart.

    Args:
        name: As in `Patient`.
        images: The stacks of all of the patient's scans.
        masks: Likewise.
        prior: Says the grid, and standardises the style vectors.
        vendors: As in `Patient`; None where the site has one vendor.
        num_vendors: Number of vendors at the site.
        shapes: As in `Patient`.
    """
    keep = with_heart(masks)
    images, masks = images[keep], masks[keep]
    vendors = torch.zeros(len(images), dtype=torch.int64) if vendors is None else vendors[keep]
    styles = torch.zeros(num_vendors, len(prior.style_mean))
    measured = torch.zeros(styles.shape, dtype=torch.bool)
    for number in vendors.unique().tolist():
        own = vendors == number
        raw = style_vector(images[own], masks[own], prior.grid.pixel_mm)
        styles[number] = prior.standardise(raw)
        measured[number] = raw.isfinite() | drawn_whole(masks[own]).all()  # a region that is not there has no style
    # What is not known must not be rendered as background, but by a generator that is told where nobody drew.
    whole = drawn_whole(masks) | prior.generator.architecture.unknown_labels
    return Patient(name, images[whole], masks[whole], styles, vendors[whole], measured, shapes)


def load_patients(
    folder: Path, prior: Prior, vendors: Sequence[str] | None = None, contours: str = "any"
) -> list[Patient]:
    """A site's usable patients, those that `fedcmr.client.trainable` names; the others are left out.

    Cases of one group are one patient, with the slices of all: who was scanned twice is clipped once.

    Args:
        folder: A folder of prepared cases.
        prior: Says the grid, and standardises the style vectors.
        vendors: Vendors that the site declares, in the order of their style vectors; None for those of the cases.
        contours: `policy.contours` of the site.

    Raises:
        UserError: The folder is no folder of cases, or its index is damaged.
    """
    scans: dict[str, list[tuple[Tensor, Tensor, Tensor, str]]] = {}
    for case in usable_cases(folder, vendors, Counter(), contours):
        pairs = slice_pairs(case, prior.grid)
        scan = (*pairs, case_shape(case, *pairs), case.info.vendor)
        scans.setdefault(group_of(case.info), []).append(scan)
    names = sorted({vendor for parts in scans.values() for *_, vendor in parts}) if vendors is None else list(vendors)
    patients = []
    for name, parts in scans.items():
        images, masks = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        numbers = torch.tensor([names.index(vendor) for own, *_, vendor in parts for _ in own])
        shapes = torch.full((len(names), len(SHAPE_NAMES)), math.nan)
        for number, vendor in enumerate(names):
            if own_shapes := [shape for *_, shape, scanner in parts if scanner == vendor]:
                shapes[number] = torch.stack(own_shapes).nanmean(dim=0)
        patients.append(patient_of(name, images, masks, prior, numbers, len(names), shapes))
    return patients


def cached_prior(path: Path | None) -> Prior:
    """The public prior, read once per process."""
    return _prior_of(path, modified_ns(path))


def cached_patients(
    folder: Path, prior_path: Path | None, vendors: tuple[str, ...] | None = None, contours: str = "any"
) -> list[Patient]:
    """`load_patients`, once per process: a process of the simulation answers round after round."""
    index_ns, prior_ns = modified_ns(folder / INDEX_NAME), modified_ns(prior_path)
    return _patients_of(folder, index_ns, prior_path, prior_ns, vendors, contours)


def private_update(
    prior: Prior,
    patients: list[Patient],
    task: str,
    arrays: Mapping[str, NDArray[np.float32]],
    mechanism: Mechanism,
    nominal_patients: Sequence[int],
    steps: LocalSteps,
    execution: Execution,
    tell_failure: Callable[[], None] | None = None,
    *,
    with_shape: bool = False,
) -> Arrays:
    """The update that answers a request: the statistics, or the gradient steps' change of the trainable part.

    Args:
        prior: Whose generator is trained; left as it was.
        patients: All of the site's usable patients.
        task: Task of the request.
        arrays: The trainable part to start from.
        mechanism: What makes the release private.
        nominal_patients: The site's public constant for each of its vendors, in the order of their names.
        steps: What a gradient step does.
        execution: Where and how fast.
        tell_failure: As in `fine_tune`.
        with_shape: As in `statistics`.
    """
    if task == STATISTICS:
        return statistics(patients, mechanism, nominal_patients, with_shape)
    return fine_tune(prior.generator, patients, arrays, mechanism, steps, execution, tell_failure)


def statistics(
    patients: list[Patient], mechanism: Mechanism, nominal_patients: Sequence[int], with_shape: bool = False
) -> Arrays:
    """Mean and mean square by vendor of the patients' style vectors, and of their shape vectors, each of shape (V, K).

    Guarantees: those of `fedcmr.shared.style_statistics.two_step_mean`, once for all vendors, style and shape together;
        without privacy none.

    Args:
        patients: All of the site's usable patients.
        mechanism: What makes the release private; its nominal number of patients is not used.
        nominal_patients: The site's public constant for each of its V vendors.
        with_shape: Whether a patient's row has the shape vector behind the style vector, under one clip.
    """
    num_vendors, style_size = len(nominal_patients), len(STYLE_NAMES)
    size = style_size + (len(SHAPE_NAMES) if with_shape else 0)
    # Where nobody is left, noise alone is released.
    rows = np.array([_complete(patient, with_shape).numpy() for patient in patients]).reshape(-1, num_vendors * size)
    known = np.array([patient.known.numpy() for patient in patients], bool).reshape(-1, num_vendors)
    known = known.repeat(size, axis=1)
    if mechanism.private:
        divisors = np.array(nominal_patients).repeat(size)
        mean, square = two_step_mean(
            rows, mechanism.max_grad_norm, mechanism.noise_multiplier, divisors, os_generator(), known
        )
    else:
        number = known.sum(axis=0).clip(1)
        mean, square = rows.sum(axis=0) / number, (rows**2).sum(axis=0) / number
    means, squares = (values.astype(np.float32).reshape(num_vendors, size) for values in (mean, square))
    found = {STYLE_MEAN: means[:, :style_size], STYLE_SQUARE: squares[:, :style_size]}
    return found | ({SHAPE_MEAN: means[:, style_size:], SHAPE_SQUARE: squares[:, style_size:]} if with_shape else {})


def _complete(patient: Patient, with_shape: bool) -> Tensor:
    """The patient's vectors, with 1 or -1 by chance in entries that could not be measured; shape (V, K), float64.

    Their mean and spread are those of the public hearts: a region that nobody at a site draws is released as the public
    knows it, and not as one in which all patients are alike. The chance follows from the patient's name.
    """
    values = patient.styles.double()
    measured = torch.ones(values.shape, dtype=torch.bool) if patient.measured is None else patient.measured
    if with_shape:
        unknown = torch.full((len(values), len(SHAPE_NAMES)), math.nan)
        shapes = unknown if patient.shapes is None else patient.shapes
        values = torch.cat([values, shapes.double().nan_to_num()], dim=1)
        measured = torch.cat([measured, shapes.isfinite()], dim=1)
    missing = patient.known[:, None] & ~measured
    if not missing.any():
        return values
    rng = torch.Generator().manual_seed(view_seed(0, 0, 0, patient.name))
    signs = torch.randint(2, values.shape, generator=rng).double() * 2 - 1
    return torch.where(missing, signs, values)


def fine_tune(
    generator: GenerativeModel,
    patients: list[Patient],
    arrays: Mapping[str, NDArray[np.float32]],
    mechanism: Mechanism,
    steps: LocalSteps,
    execution: Execution,
    tell_failure: Callable[[], None] | None = None,
) -> Arrays:
    """`private_steps` on the generator: patients without a slice that is drawn whole are never sampled.

    Args:
        generator: Left as it was.
        patients: All of the site's usable patients.
        arrays: The trainable part to start from; its names say which adapter's it is.
        mechanism: As in `private_steps`, like the others.
        steps: What a step does.
        execution: Where and how fast.
        tell_failure: For a patient's failure.
    """
    whole = [patient for patient in patients if len(patient.images)]
    learner = generator_learner(generator)
    return private_steps(learner, whole, arrays, mechanism, steps, execution, tell_failure, len(patients))


def generator_learner(generator: GenerativeModel, name: str = "generator") -> Learner[Patient]:
    """The generator, of which the adapter is trained."""

    def gradient(
        patient: Patient, num_views: int, seed: int, parameters: Sequence[torch.nn.Parameter]
    ) -> NDArray[np.float64]:
        return patient_gradient(generator, patient, num_views, seed, parameters)

    return Learner(name, generator, generator.holding, gradient, dummy_patient(generator.architecture.grid))


def private_steps(
    learner: Learner[AnyPatient],
    patients: Sequence[AnyPatient],
    arrays: Mapping[str, NDArray[np.float32]],
    mechanism: Mechanism,
    steps: LocalSteps,
    execution: Execution,
    tell_failure: Callable[[], None] | None = None,
    num_patients: int | None = None,
) -> Arrays:
    """Patient-level DP-SGD (Abadi et al. 2016, https://arxiv.org/abs/1607.00133, Algorithm 1) on a trainable part.

    Guarantees: per step one Poisson-subsampled Gaussian mechanism; neighbours differ by one patient of this site. Who
    is sampled and the noise come from the operating system, never from the seed; the step divides by the expected
    batch, a public constant, and an empty batch takes its noise step. Without privacy no guarantee: no noise, and
    everything follows from the seed; the clip stays, because the learning rate is made for clipped gradients.

    With privacy nothing but the sum depends on who is there. A patient whose gradient fails or is not finite counts as
    the zero vector. A step computes `num_gradients` of them, of a dummy patient where a patient was not sampled or does
    not exist, so that neither its time nor its memory shows how many there were: a patient's slices are drawn into a
    fixed number of views. What the time still shows is whether the site has more patients than its public number.

    Args:
        learner: What is trained; left as it was.
        patients: Who may be sampled.
        arrays: The trainable part to start from.
        mechanism: What makes a step private.
        steps: What a step does.
        execution: Where and how fast.
        tell_failure: Called within the `except` of a patient's failure, so that the site's own people learn of it.
        num_patients: All of the site's usable patients; None where these are all.

    Returns:
        What to add to each of `arrays`.

    Raises:
        TimeoutError: The steps took longer than `max_seconds`.
    """
    learner.network.to(execution.device)
    size = num_gradients(len(patients) if num_patients is None else num_patients, mechanism)
    deadline = time.monotonic() + execution.max_seconds
    rng: Rng = os_generator() if mechanism.private else np.random.default_rng([steps.seed, steps.server_round])
    with learner.holding({name: torch.from_numpy(array) for name, array in arrays.items()}) as parameters:
        for step in range(mechanism.num_steps):
            sampled = [patients[index] for index in poisson_sample(len(patients), mechanism.sample_rate, rng)]
            mean = _mean_gradient(
                learner, sampled, size, parameters, mechanism, steps, step, rng, deadline, tell_failure
            )
            _descend(parameters, steps.learning_rate * mean)
        return {name: parameter.detach().cpu().numpy() - arrays[name] for name, parameter in parameters.items()}


def num_gradients(num_patients: int, mechanism: Mechanism) -> int:
    """Gradients in one private step: the site's public number of patients, or its patients where they are more."""
    return max(mechanism.divisor, num_patients) if mechanism.private else 0


def dummy_patient(grid: Grid) -> Patient:
    """Nobody: one empty slice on the generator's grid, whose gradient takes as long as anybody's."""
    images = torch.zeros(1, 2, grid.size_px, grid.size_px)
    no_vendor = torch.zeros(1, dtype=torch.int64)
    return Patient("", images, images.to(torch.uint8), torch.zeros(1, len(STYLE_NAMES)), no_vendor)


def _mean_gradient(
    learner: Learner[AnyPatient],
    sampled: list[AnyPatient],
    size: int,
    parameters: Mapping[str, torch.nn.Parameter],
    mechanism: Mechanism,
    steps: LocalSteps,
    step: int,
    rng: Rng,
    deadline: float,
    tell_failure: Callable[[], None] | None,
) -> NDArray[np.float64]:
    """One step's mean over the sampled patients, clipped and noised where that is requested; shape (D,)."""
    dimension = sum(parameter.numel() for parameter in parameters.values())
    chosen = list(parameters.values())
    nobody = learner.nobody

    def gradient(patient: AnyPatient) -> NDArray[np.float64]:
        seed = view_seed(steps.seed, steps.server_round, step, patient.name)
        try:
            return learner.gradient(patient, steps.num_views, seed, chosen)
        except Exception:
            if not mechanism.private:
                raise
            if tell_failure is not None:
                tell_failure()
            return np.zeros(dimension)

    def gradients() -> Iterator[NDArray[np.float64]]:
        patients = sampled + [nobody] * (size - len(sampled))
        results = one_core_each(gradient, patients) if chosen[0].device.type == "cpu" else map(gradient, patients)
        for patient, result in zip(patients, results, strict=True):
            if time.monotonic() > deadline:
                raise TimeoutError("Expected the work to take at most policy.max_seconds.")
            if patient is not nobody:
                yield result

    expected_batch_size = mechanism.sample_rate * mechanism.divisor if mechanism.private else max(len(sampled), 1)
    return private_mean_gradient(
        gradients(),
        mechanism.max_grad_norm,
        mechanism.noise,
        dimension=dimension,
        expected_batch_size=expected_batch_size,
        rng=rng,
    )


def patient_gradient(
    generator: GenerativeModel,
    patient: Patient,
    num_views: int,
    seed: int,
    parameters: Sequence[torch.nn.Parameter] | None = None,
) -> NDArray[np.float64]:
    """Gradient of one patient's mean loss over random (slice, augmentation, t, noise) views, flattened.

    Args:
        generator: Where the parameters belong.
        patient: Its slices are drawn with replacement.
        num_views: How many views.
        seed: Seed of the views.
        parameters: Parameters to differentiate, gradients on; None for the affine part.

    Returns:
        Shape (D,), in the order of the parameters. Not clipped.
    """
    parameters = list(generator.trainable().values()) if parameters is None else parameters
    device = parameters[0].device
    rng = torch.Generator().manual_seed(seed)
    index = torch.randint(len(patient.images), (num_views,), generator=rng)
    shift_px = MAX_SHIFT_MM / generator.architecture.grid.pixel_mm
    images, masks = augment_in_equal_time(patient.images[index], patient.masks[index], rng, max_shift_px=shift_px)
    condition = Condition(masks, patient.slice_styles[index]).to(device)
    with autocast(device):
        loss = generator.loss(images.to(device), condition, rng).mean()
    return flat_gradient(loss, parameters)


def flat_gradient(loss: Tensor, parameters: Sequence[torch.nn.Parameter]) -> NDArray[np.float64]:
    """The gradient of a loss, shape (D,), in the order of the parameters."""
    gradients = torch.autograd.grad(loss, parameters)
    return np.concatenate([gradient.cpu().double().numpy().ravel() for gradient in gradients])


def view_seed(seed: int, server_round: int, step: int, patient: str) -> int:
    """A patient's views depend on the patient alone, never on who else is sampled."""
    digest = hashlib.sha256(f"{seed}/{server_round}/{step}/{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _descend(parameters: Mapping[str, torch.nn.Parameter], update: NDArray[np.float64]) -> None:
    """Subtract a flat update from the parameters."""
    offset = 0
    with torch.no_grad():
        for parameter in parameters.values():
            piece = torch.from_numpy(update[offset : offset + parameter.numel()]).reshape(parameter.shape)
            parameter.sub_(piece.to(parameter))
            offset += parameter.numel()


def modified_ns(path: Path | None) -> int:
    """Part of a cache's key: a file that was written again is read again."""
    return path.stat().st_mtime_ns if path and path.exists() else 0


@functools.lru_cache(maxsize=2)
def _prior_of(path: Path | None, file_ns: int) -> Prior:
    return load_prior(path)


@functools.lru_cache(maxsize=8)
def _patients_of(
    folder: Path,
    index_ns: int,
    prior_path: Path | None,
    prior_ns: int,
    vendors: tuple[str, ...] | None,
    contours: str,
) -> list[Patient]:
    return load_patients(folder, _prior_of(prior_path, prior_ns), vendors, contours)
