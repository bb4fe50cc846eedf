"""State of a federation: how it starts, what a round asks, how answers change it, and what they cost."""

import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared import checkpoint
from shared.checkpoint import Arrays
from shared.config import Config
from shared.errors import UserError
from shared.networks.generator import Prior
from shared.privacy import NoisePlan, Release, epsilon, plan_noise
from shared.records import CODE_MEAN, CODE_SQUARE, GRADIENTS, MOMENTS, Request
from shared.run_folder import RunFolder

CODE_STD_RANGE = (0.5, 1.5)
"""In the prior's own spread. Clipping and noise make a vendor's spread too small or too large; one that vanishes would
paint the same picture over and over. The public development patients of one vendor spread by 0.4 to 0.95."""


@dataclass(frozen=True)
class StudySite:
    """A site's public facts, agreed before the study: `sites` in `study.json`."""

    vendor: str
    nominal_patients: int


@dataclass
class FederationState:
    """All that must survive a restart.

    Attributes:
        run_id: With the round, the key in every site's ledger: the same after a restart.
        prior_sha256: Of the public prior that the trainable part belongs to.
        plan: The noise of the whole run, planned once; None without privacy.
        server_round: Rounds finished.
        arrays: The trainable part after the last aggregation.
        ema: Its exponential moving average over rounds: what is published.
        code_mean: Vendor -> shape (K,), mean of the standardised appearance code; zeros until a site has answered.
        code_std: Vendor -> shape (K,), its standard deviation; ones until a site has answered.
        releases: Site -> one entry per request: its round, task, release, the site's code and whether it was charged.
        rounds: One entry per round, as in `metrics.jsonl`.
    """

    run_id: str
    prior_sha256: str
    plan: NoisePlan | None
    server_round: int
    arrays: Arrays
    ema: Arrays
    code_mean: Arrays
    code_std: Arrays
    releases: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the checkpoint of the last finished round."""
        groups = {"arrays": self.arrays, "ema": self.ema, "code_mean": self.code_mean, "code_std": self.code_std}
        metadata = {
            "run_id": self.run_id,
            "prior_sha256": self.prior_sha256,
            "plan": asdict(self.plan) if self.plan else None,
            "server_round": self.server_round,
            "releases": self.releases,
            "rounds": self.rounds,
        }
        checkpoint.save(checkpoint.round_path(folder, self.server_round), _flat(groups), metadata)

    @classmethod
    def load_newest(cls, folder: Path) -> "FederationState | None":
        """The state after the newest round whose checkpoint can be read; None where none was saved.

        Raises:
            UserError: There are checkpoints and none can be read.
        """
        newest = checkpoint.load_newest(folder)
        if newest is None:
            return None
        arrays, metadata = newest
        values: dict[str, Any] = {"arrays": {}, "ema": {}, "code_mean": {}, "code_std": {}, **metadata}
        for name, array in arrays.items():
            group, _, rest = name.partition("/")
            values[group][rest] = array
        if values["plan"]:
            values["plan"] = NoisePlan(**{key: Release(**release) for key, release in values["plan"].items()})
        return cls(**values)

    def apply_moments(self, updates: Mapping[str, Arrays], vendors: Mapping[str, str]) -> None:
        """Per vendor: mean and standard deviation of the code from its sites' private moments, equally weighted.

        A vendor whose sites have not answered keeps the prior's.
        """
        for vendor in sorted({vendors[site] for site in updates}):
            of_vendor = [updates[site] for site in sorted(updates) if vendors[site] == vendor]
            mean = np.mean([update[CODE_MEAN] for update in of_vendor], axis=0, dtype=np.float64)
            square = np.mean([update[CODE_SQUARE] for update in of_vendor], axis=0, dtype=np.float64)
            low, high = CODE_STD_RANGE
            std = np.sqrt(np.clip(square - mean**2, low**2, high**2))
            self.code_mean[vendor], self.code_std[vendor] = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def apply_gradients(self, updates: Mapping[str, Arrays], ema_decay: float) -> None:
        """Add the mean of the sites' updates, equally weighted, and move the average towards the result."""
        for name, array in self.arrays.items():
            mean = np.mean([updates[site][name] for site in sorted(updates)], axis=0, dtype=np.float64)
            self.arrays[name] = np.asarray(array + mean, np.float32)
            ema = ema_decay * self.ema[name].astype(np.float64) + (1 - ema_decay) * self.arrays[name]
            self.ema[name] = np.asarray(ema, np.float32)

    def epsilons(self, delta: float) -> dict[str, tuple[float, str]]:
        """Site -> (epsilon of all that it was asked for and did not refuse, accountant), this run alone.

        The site's own ledger also counts its earlier runs.
        """
        return {site: _epsilon(charged_releases(entries), delta) for site, entries in self.releases.items()}

    def publish(self, path: Path, vendors: Mapping[str, str], delta: float) -> None:
        """Write the shared generator: `trainable/<name>`, `code_mean/<vendor>` and `code_std/<vendor>`."""
        private = self.plan is not None
        epsilons = self.epsilons(delta) if private else {}
        sites = {
            site: {
                "vendor": vendors[site],
                "epsilon": epsilons[site][0] if private else None,
                "accountant": epsilons[site][1] if private else None,
                "steps": sum(release.num_steps for release in charged_releases(entries)),
                "refused": [entry["code"] for entry in entries if not entry["charged"]],
                "releases": entries,
            }
            for site, entries in self.releases.items()
        }
        metadata = {
            "run_id": self.run_id,
            "prior_sha256": self.prior_sha256,
            "private": private,
            "delta": delta if private else None,
            "num_rounds": self.server_round,
            "vendors": sorted(set(vendors.values())),
            "sites": sites,
        }
        groups = {"trainable": self.ema, "code_mean": self.code_mean, "code_std": self.code_std}
        checkpoint.save(path, _flat(groups), metadata)


def initial_state(config: Config, prior: Prior, sites: Mapping[str, StudySite]) -> FederationState:
    """The state before round 1: the prior's trainable part, its code distribution, and the noise of the whole run."""
    arrays = {name: parameter.detach().cpu().numpy().copy() for name, parameter in prior.generator.trainable().items()}
    privacy, federation = config.privacy, config.federation
    plan = None
    if privacy.enabled:
        plan = plan_noise(
            privacy.target_epsilon,
            privacy.target_delta,
            privacy.sample_rate,
            (federation.num_rounds - 1) * federation.local_steps,
            privacy.moments_share,
        )
    vendors = sorted({facts.vendor for facts in sites.values()})
    code_size = len(prior.code_mean)
    return FederationState(
        run_id=secrets.token_hex(8),
        prior_sha256=prior.sha256,
        plan=plan,
        server_round=0,
        arrays=arrays,
        ema=dict(arrays),
        code_mean={vendor: np.zeros(code_size, np.float32) for vendor in vendors},
        code_std={vendor: np.ones(code_size, np.float32) for vendor in vendors},
    )


def make_request(config: Config, state: FederationState, server_round: int) -> Request:
    """What a round asks of every site."""
    privacy, federation, plan = config.privacy, config.federation, state.plan
    is_moments = server_round == 1
    noise = 0.0
    if plan is not None:
        noise = (plan.moments if is_moments else plan.gradients).noise_multiplier
    return Request(
        task=MOMENTS if is_moments else GRADIENTS,
        run_id=state.run_id,
        server_round=server_round,
        prior_sha256=state.prior_sha256,
        private=plan is not None,
        noise_multiplier=float(noise),
        sample_rate=1.0 if is_moments else float(privacy.sample_rate),
        max_grad_norm=float(privacy.moments_clip if is_moments else privacy.max_grad_norm),
        target_delta=float(privacy.target_delta),
        local_steps=1 if is_moments else federation.local_steps,
        learning_rate=float(federation.learning_rate),
        num_views=federation.num_views,
        seed=config.seed,
    )


def read_study(run: RunFolder) -> dict[str, StudySite]:
    """The study's sites and their public facts.

    Raises:
        UserError: `study.json` is missing or is not as expected.
    """
    path = run.path / "study.json"
    try:
        sites = json.loads(path.read_text(encoding="utf-8"))["sites"]
        study = {name: StudySite(str(facts["vendor"]), int(facts["nominal_patients"])) for name, facts in sites.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{path}: expected {{"sites": {{name: {{"vendor", "nominal_patients"}}}}}}') from None
    if not study or any(facts.nominal_patients < 1 for facts in study.values()):
        raise UserError(f"{path}: expected at least one site, each with nominal_patients >= 1")
    return study


def charged_releases(entries: Sequence[Mapping[str, Any]]) -> tuple[Release, ...]:
    """The releases of a site's entries that were, or may have been, charged."""
    return tuple(Release(**entry["release"]) for entry in entries if entry["charged"])


@functools.lru_cache
def _epsilon(releases: tuple[Release, ...], delta: float) -> tuple[float, str]:
    """Sites that were asked alike share one computation."""
    return epsilon(releases, delta)


def _flat(groups: Mapping[str, Arrays]) -> Arrays:
    """`<group>/<name>` for every array of every group."""
    return {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
