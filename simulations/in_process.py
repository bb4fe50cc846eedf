"""Sites of patients in this process: a round's request answered by the client's own code, without Flower.

The audits and benchmarks run `fedcmr.server.federation.round.run_round` with it, as a study does with messages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from fedcmr.client.segmenter_training import DrawnPatient, segmenter_learner
from fedcmr.client.training import Execution, LocalSteps, Patient, private_steps, private_update
from fedcmr.server.federation.round import Ask, Replies, run_round
from fedcmr.server.federation.senders import Reply
from fedcmr.server.federation.state import FederationState, StudySite
from fedcmr.server.settings import Config
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.privacy import Mechanism
from fedcmr.shared.records import OK, SEGMENTER, Request, pack_reply
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter

MechanismOf = Callable[[Request, int], Mechanism]
"""From a request and a site's public number of patients."""


class SitesInProcess:
    """What a site would send for each request; no policy is checked and no ledger charged.

    Args:
        prior: The public prior.
        patients: Site -> its patients.
        sites: Site -> its public facts.
        device: Where the generator runs.
        mechanism_of: What makes a release private, by default the request's own; an audit breaks it on purpose.
        drawn: Site -> those who teach the segmenter, for its rounds; without them it is asked of nobody.
    """

    def __init__(
        self,
        prior: Prior,
        patients: Mapping[str, Sequence[Patient]],
        sites: Mapping[str, StudySite],
        device: torch.device,
        mechanism_of: MechanismOf | None = None,
        drawn: Mapping[str, Sequence[DrawnPatient]] | None = None,
    ):
        self.prior, self.patients, self.sites = prior, patients, sites
        self.execution = Execution(device)
        self.mechanism_of = mechanism_of or (lambda request, nominal_patients: request.mechanism.at(nominal_patients))
        self.drawn, self.learner = dict(drawn or {}), segmenter_learner(load_segmenter()) if drawn else None
        self.updates: dict[str, Arrays] = {}
        """Site -> what it sent for the last request."""

    def train(self, request: Request, arrays: Arrays) -> Replies:
        """Every site's update, in the records in which it would travel."""
        if request.task == SEGMENTER:
            self.updates = self._of_segmenter(request, arrays)
            return reply_with(self.updates)
        self.updates = {
            name: private_update(
                self.prior,
                list(there),
                request.task,
                arrays,
                self.mechanism_of(request, self.sites[name].nominal_patients),
                [self.sites[name].vendors[vendor] for vendor in sorted(self.sites[name].vendors)],
                LocalSteps.of(request),
                self.execution,
                with_shape=request.with_shape,
            )
            for name, there in self.patients.items()
        }
        return reply_with(self.updates)

    def _of_segmenter(self, request: Request, arrays: Arrays) -> dict[str, Arrays]:
        assert self.learner is not None, "rounds for the segmenter need drawn patients"
        steps = LocalSteps.of(request)
        return {
            name: private_steps(
                self.learner,
                there,
                arrays,
                self.mechanism_of(request, self.sites[name].nominal_patients),
                steps,
                self.execution,
            )
            for name, there in self.drawn.items()
        }


def reply_with(updates: Mapping[str, Arrays]) -> Replies:
    """Replies that bring these updates, one of each site."""
    return Replies(
        len(updates),
        [
            Reply(name, pack_reply(name, OK, update, {key: array.shape for key, array in update.items()}))
            for name, update in updates.items()
        ],
    )


def gradient_rounds(
    state: FederationState, sites: Mapping[str, StudySite], config: Config, ask: Ask
) -> FederationState:
    """A study's rounds of gradients alone; the share of the budget for style statistics stays set aside."""
    state = replace(state, server_round=1)
    while state.server_round < state.generator_rounds(config):
        state, _ = run_round(state, sites, config, ask)
    return state
