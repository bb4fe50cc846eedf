"""What a request is about: the generator's statistics or gradients, or the segmenter's gradients.

A site answers all of them alike (`fedcmr.client.app.respond`). Here stands in what they differ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from fedcmr.client.policy import SiteSettings
from fedcmr.client.rehearsal import invented_patients
from fedcmr.client.segmenter_training import cached_drawn_patients, cached_segmenter, segmenter_learner
from fedcmr.client.training import (
    Execution,
    Learner,
    LocalSteps,
    cached_patients,
    cached_prior,
    generator_learner,
    private_steps,
    private_update,
)
from fedcmr.shared.adapters import Adapter
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.privacy import Mechanism
from fedcmr.shared.records import SEGMENTER, STATISTICS, Request, Shapes, update_shapes

Update = Callable[[bool, Arrays, Mechanism, LocalSteps, Execution, Callable[[], None]], Arrays]
"""The update that answers a request: of invented patients or of the site's own; the trainable part to start from, and
the rest as in `fedcmr.client.training.private_steps`."""


@dataclass(frozen=True)
class Subject:
    """A request's network and patients at this site, read before anything is charged.

    Attributes:
        sha256: Fingerprint of the public weights, which the request must name.
        part: The trainable part.
        shapes: Names and shapes of the update.
        num_patients: Patients that the request could use.
        learner: What takes gradient steps; None where none are asked for.
        update: Computes the answer.
    """

    sha256: str
    part: Mapping[str, nn.Parameter]
    shapes: Shapes
    num_patients: int
    learner: Learner[Any] | None
    update: Update

    @property
    def trainable(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the trainable part, as it comes with the request."""
        return _shapes_of(self.part)


def _shapes_of(part: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in part.items()}


def subject_of(site: SiteSettings, request: Request) -> Subject:
    """What a request is about at this site.

    Raises:
        UserError: The public weights or the site's folder cannot be read.
    """
    return _segmenter(site) if request.task == SEGMENTER else _generator(site, request)


def _generator(site: SiteSettings, request: Request) -> Subject:
    prior = cached_prior(site.prior_path)
    patients = cached_patients(site.data_path, site.prior_path, site.vendor_names, site.policy.contours)
    is_statistics = request.task == STATISTICS
    learner = generator_learner(prior.generator, f"{request.adapter}, prior {prior.sha256}")
    part = prior.generator.trainable(cast(Adapter, request.adapter))

    def update(invented: bool, arrays: Arrays, mechanism: Mechanism, *how: Any) -> Arrays:
        chosen = invented_patients(site, prior.grid) if invented else patients
        numbers = [site.vendors[vendor] for vendor in site.vendor_names]
        return private_update(
            prior, chosen, request.task, arrays, mechanism, numbers, *how, with_shape=request.with_shape
        )

    return Subject(
        sha256=prior.sha256,
        part=part,
        shapes=update_shapes(
            request.task, _shapes_of(part), len(site.vendors), len(prior.style_mean), request.shape_size
        ),
        num_patients=sum(is_statistics or len(patient.images) > 0 for patient in patients),
        learner=None if is_statistics else learner,
        update=update,
    )


def _segmenter(site: SiteSettings) -> Subject:
    segmenter, sha256 = cached_segmenter()
    grid = segmenter.architecture.grid
    patients = cached_drawn_patients(site.data_path, grid, site.vendor_names, site.policy.contours)
    learner = segmenter_learner(segmenter, f"segmenter {sha256}")
    part = segmenter.trainable()

    def update(invented: bool, arrays: Arrays, mechanism: Mechanism, *how: Any) -> Arrays:
        chosen = [learner.nobody] * site.nominal_patients if invented else patients
        return private_steps(learner, chosen, arrays, mechanism, *how)

    return Subject(
        sha256=sha256,
        part=part,
        shapes=_shapes_of(part),
        num_patients=len(patients),
        learner=learner,
        update=update,
    )
