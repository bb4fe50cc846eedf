"""State of a federation: how it starts, what a round requests, how replies change it, and what they cost."""

import functools
import json
import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcmr.server.federation.adapters import Plan, choose_adapter, plan_adapter
from fedcmr.server.federation.noise_plan import SegmenterPart
from fedcmr.server.federation.vendor_styles import vendor_shapes, vendor_styles
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import Config, FederationConfig, PrivacyConfig
from fedcmr.shared import checkpoint
from fedcmr.shared.adapters import ADAPTERS, Adapter, present_name
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.privacy import MAX_DELTA_TIMES_PATIENTS, Release, largest_delta
from fedcmr.shared.privacy_filter import PrivacyFilter, filter_of
from fedcmr.shared.provenance import PRIVATE_REAL, Provenance, from_json
from fedcmr.shared.records import GRADIENTS, SEGMENTER, SHAPE_MEAN, STATISTICS, Request
from fedcmr.shared.shape import SHAPE_STD
from fedcmr.shared.site_facts import facts_line, read_facts
from fedcmr.shared.style import MEAN_KEY, STD_KEY
from fedcmr.shared.style_statistics import NUM_STEPS
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter, public_sha256, save_segmenter

STUDY_NAME = "study.json"
FEDERATED_SEGMENTER_NAME = "federated_segmenter.safetensors"
SMALL_DELTA = 1e-5
"""Delta at which the report also gives epsilon, whatever the study's delta: many papers compare at this value."""
ATTENDANCE = ("round", "answered", "refused", "dropped", "silent", "missing")
"""Keys that the published file keeps of every round: who took part is part of the generator's record."""


@dataclass(frozen=True)
class StudySite:
    """A site's public facts, agreed before the study: `sites` in `study.json`.

    Attributes:
        vendors: Vendor -> nominal number of patients with scans of that vendor.
        nominal_patients: Nominal number of distinct patients.
        provenance: Where its scans come from; private where not stated.
    """

    vendors: dict[str, int]
    nominal_patients: int
    provenance: Provenance = PRIVATE_REAL


@dataclass(frozen=True)
class FederationState:
    """All that must survive a restart; a round makes a new one (`fedcmr.server.federation.round`).

    Attributes:
        run_id: Together with the round it is the key in every site's ledger; the same after a restart.
        prior_sha256: SHA-256 of the public prior that the trainable part belongs to.
        adapter: Chosen once.
        choice: The adapter and why it was chosen, in one line.
        plan: The noise of the whole run, planned once; None without privacy.
        order: Order of the Renyi filter with which the plan and the sites account for subsampled steps; None where
            every step uses all patients (`fedcmr.shared.privacy_filter`).
        segmenter: The segmenter's trainable part after the last aggregation; empty where the study has no such rounds.
        segmenter_ema: Its average, which is published.
        segmenter_sha256: The public segmenter that this part belongs to; "" without such rounds.
        server_round: Number of finished rounds.
        arrays: The trainable part after the last aggregation.
        ema: Exponential moving average of the trainable part over rounds; this is published.
        style_mean: Vendor -> shape (K,), mean of the standardised style vectors; zeros until a site has replied.
        style_std: Vendor -> shape (K,), their standard deviation; ones until a site has replied.
        shape_mean: Vendor -> mean of the standardised shape vectors; a vendor is there once a site has released them.
        shape_std: Vendor -> their standard deviation.
        releases: Site -> one entry per request: its round, task, release, the site's code and whether it was charged.
        rounds: One entry per round, as in `metrics.jsonl`.
    """

    run_id: str
    prior_sha256: str
    adapter: Adapter
    choice: str
    plan: Plan | None
    server_round: int
    arrays: Arrays
    ema: Arrays
    style_mean: Arrays
    style_std: Arrays
    releases: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    order: int | None = None
    segmenter: Arrays = field(default_factory=dict)
    segmenter_ema: Arrays = field(default_factory=dict)
    segmenter_sha256: str = ""
    shape_mean: Arrays = field(default_factory=dict)
    shape_std: Arrays = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the checkpoint of the last finished round."""
        groups = {"arrays": self.arrays, "ema": self.ema, MEAN_KEY: self.style_mean, STD_KEY: self.style_std}
        groups |= {"segmenter": self.segmenter, "segmenter_ema": self.segmenter_ema}
        groups |= {SHAPE_MEAN: self.shape_mean, SHAPE_STD: self.shape_std}
        metadata = {
            "run_id": self.run_id,
            "prior_sha256": self.prior_sha256,
            "adapter": self.adapter,
            "choice": self.choice,
            "plan": {task: asdict(part) for task, part in self.plan.items()} if self.plan else None,
            "server_round": self.server_round,
            "releases": self.releases,
            "rounds": self.rounds,
            "order": self.order,
            "segmenter_sha256": self.segmenter_sha256,
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
        names = ("arrays", "ema", MEAN_KEY, STD_KEY, "segmenter", "segmenter_ema", SHAPE_MEAN, SHAPE_STD)
        groups: dict[str, Arrays] = {name: {} for name in names}
        for name, array in arrays.items():
            group, _, rest = name.partition("/")
            groups[group][rest] = array
        values = _with_present_names(metadata)
        if values["plan"]:
            values["plan"] = {task: Release(**release) for task, release in values["plan"].items()}
        return cls(
            arrays=groups["arrays"],
            ema=groups["ema"],
            style_mean=groups[MEAN_KEY],
            style_std=groups[STD_KEY],
            segmenter=groups["segmenter"],
            segmenter_ema=groups["segmenter_ema"],
            shape_mean=groups[SHAPE_MEAN],
            shape_std=groups[SHAPE_STD],
            **values,
        )

    def generator_rounds(self, config: Config) -> int:
        """Number of rounds for the generator, the first ones; with the "statistics" adapter it is 1."""
        return 1 if self.adapter == "statistics" else config.federation.num_rounds

    def num_rounds(self, config: Config) -> int:
        """Number of rounds of the whole run: the generator's, then the segmenter's."""
        return self.generator_rounds(config) + config.federation.segmenter_rounds

    def task_of(self, server_round: int, config: Config) -> str:
        """What a round, counted from 1, asks for."""
        if server_round == 1:
            return STATISTICS
        return GRADIENTS if server_round <= self.generator_rounds(config) else SEGMENTER

    def arrays_of(self, task: str) -> Arrays:
        """The trainable part that a round of a task sends."""
        return self.segmenter if task == SEGMENTER else self.arrays

    def described(self, config: Config) -> str:
        """The adapter and why it was chosen, and why there are fewer rounds than the settings say, where there are."""
        planned, num_rounds = config.federation.num_rounds, self.generator_rounds(config)
        if num_rounds == planned:
            return self.choice
        return (
            f"{self.choice}. Style statistics are released once, so the {planned} rounds of federation.num_rounds "
            f"become {num_rounds}"
        )

    def after_statistics(
        self, updates: Mapping[str, Arrays], sites: Mapping[str, StudySite], request: Request
    ) -> "FederationState":
        """This state with each vendor's distribution of styles, and of shapes where these were asked for.

        A vendor whose sites have not replied keeps the prior's styles and the usual hearts.
        """
        vendors = {site: facts.vendors for site, facts in sites.items()}
        found = vendor_styles(updates, vendors, request)
        shapes = vendor_shapes(updates, vendors, request) if request.with_shape else {}
        return replace(
            self,
            style_mean=self.style_mean | {vendor: mean for vendor, (mean, _) in found.items()},
            style_std=self.style_std | {vendor: std for vendor, (_, std) in found.items()},
            shape_mean=self.shape_mean | {vendor: mean for vendor, (mean, _) in shapes.items()},
            shape_std=self.shape_std | {vendor: std for vendor, (_, std) in shapes.items()},
        )

    def after_gradients(
        self, updates: Mapping[str, Arrays], ema_decay: float, trim: int = 0, task: str = GRADIENTS
    ) -> "FederationState":
        """This state with the equally weighted mean of the sites' updates added; the average moves towards the result.

        Args:
            updates: Site -> its update; more than `2 * trim` sites.
            ema_decay: Decay of the moving average, in [0, 1).
            trim: This many of the smallest and of the largest values of every entry are left out of its mean: the
                coordinate-wise trimmed mean of Yin et al. (2018), https://arxiv.org/abs/1803.01498, definition 2.
            task: `GRADIENTS` or `SEGMENTER`: what the updates are of.
        """
        if task == SEGMENTER:
            arrays, averages = _aggregated(self.segmenter, self.segmenter_ema, updates, ema_decay, trim)
            return replace(self, segmenter=arrays, segmenter_ema=averages)
        arrays, averages = _aggregated(self.arrays, self.ema, updates, ema_decay, trim)
        return replace(self, arrays=arrays, ema=averages)

    def max_epsilon(self, delta: float) -> float | None:
        """The largest epsilon of any site in this run so far; None without privacy."""
        if self.plan is None:
            return None
        return max((value for value, _ in self.epsilons(delta).values()), default=0.0)

    def epsilons(self, delta: float) -> dict[str, tuple[float, str]]:
        """Site -> (epsilon of all requests that it did not refuse, accountant), for this run alone.

        Computed with the filter of a site whose cap is the study's target. A site's own ledger also counts its earlier
        runs.
        """
        return {site: _epsilon(charged_releases(entries), delta, self.order) for site, entries in self.releases.items()}

    def publish_segmenter(self, path: Path, config: Config) -> None:
        """Write the public segmenter with the average of its trainable part; a file of `save_segmenter`."""
        segmenter = load_segmenter()
        facts = {
            "run_id": self.run_id,
            "public_sha256": self.segmenter_sha256,
            "num_rounds": config.federation.segmenter_rounds,
            "private": self.plan is not None,
            "epsilon_of_the_whole_run": self.max_epsilon(config.privacy.target_delta),
            "delta": config.privacy.target_delta if self.plan is not None else None,
        }
        with segmenter.holding({name: torch.from_numpy(array) for name, array in self.segmenter_ema.items()}):
            save_segmenter(path, segmenter, facts)

    def publish(self, path: Path, vendors: Mapping[str, Collection[str]], delta: float) -> Arrays:
        """Write the shared generator: `trainable/<name>`, and each vendor's styles and released shapes.

        The styles' means and standard deviations are under `MEAN_KEY` and `STD_KEY`, those of the shapes under
        `SHAPE_MEAN` and `SHAPE_STD`.

        Returns:
            The arrays in the file.
        """
        private = self.plan is not None
        epsilons = self.epsilons(delta) if private else {}
        smaller = self.epsilons(SMALL_DELTA) if private else {}
        sites = {
            site: {
                "vendors": sorted(vendors[site]),
                "epsilon": epsilons[site][0] if private else None,
                "epsilon_at_1e-5": smaller[site][0] if private else None,
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
            "adapter": self.adapter,
            "private": private,
            "delta": delta if private else None,
            "num_rounds": self.server_round,
            "rounds": [{key: line[key] for key in ATTENDANCE} for line in self.rounds],
            "vendors": sorted({vendor for names in vendors.values() for vendor in names}),
            "sites": sites,
        }
        groups = {"trainable": self.ema, MEAN_KEY: self.style_mean, STD_KEY: self.style_std}
        groups |= {SHAPE_MEAN: self.shape_mean, SHAPE_STD: self.shape_std}
        arrays = _flat(groups)
        checkpoint.save(path, arrays, metadata)
        return arrays


def _aggregated(
    arrays: Arrays, ema: Arrays, updates: Mapping[str, Arrays], ema_decay: float, trim: int
) -> tuple[Arrays, Arrays]:
    """A trainable part and its average after a round, as `FederationState.after_gradients` says."""
    after: Arrays = {}
    averages: Arrays = {}
    for name, array in arrays.items():
        values = np.stack([updates[site][name] for site in sorted(updates)]).astype(np.float64)
        if trim > 0:
            values = np.sort(values, axis=0)[trim:-trim]
        after[name] = np.asarray(array + values.mean(axis=0), np.float32)
        average = ema_decay * ema[name].astype(np.float64) + (1 - ema_decay) * after[name]
        averages[name] = np.asarray(average, np.float32)
    return after, averages


def initial_state(config: Config, prior: Prior, sites: Mapping[str, StudySite]) -> FederationState:
    """The state before round 1: the adapter, its trainable part, the prior's styles, and the noise of the whole run."""
    privacy, federation = config.privacy, config.federation
    segmenter_rounds = federation.segmenter_rounds
    segmenter_part, segmenter_arrays = None, {}
    if segmenter_rounds:
        steps = segmenter_rounds * federation.local_steps
        segmenter_part = SegmenterPart(privacy.segmenter_share, segmenter_rounds, steps)
        segmenter_arrays = _copied(load_segmenter().trainable())
    num_rounds = federation.num_rounds - 1  # rounds of gradients
    num_steps = num_rounds * federation.local_steps
    parts = {adapter: prior.generator.trainable(adapter) for adapter in ADAPTERS}
    sizes = {adapter: sum(parameter.numel() for parameter in parts[adapter].values()) for adapter in ADAPTERS[1:]}
    plan = plan_adapter("norm_affine", privacy, num_steps, num_rounds, segmenter_part) if privacy.enabled else None
    nominal_patients = [facts.nominal_patients for facts in sites.values()]
    adapter, choice = choose_adapter(federation.adapter, plan[GRADIENTS] if plan else None, nominal_patients, sizes)
    if plan and adapter == "statistics":
        plan = plan_adapter(adapter, privacy, num_steps, num_rounds, segmenter_part)
    arrays = _copied(parts[adapter])
    vendors = sorted({vendor for facts in sites.values() for vendor in facts.vendors})
    style_size = len(prior.style_mean)
    return FederationState(
        run_id=secrets.token_hex(8),
        prior_sha256=prior.sha256,
        adapter=adapter,
        choice=choice,
        plan=plan,
        order=filter_of(privacy.sample_rate, privacy.target_epsilon, privacy.target_delta).order if plan else None,
        server_round=0,
        arrays=arrays,
        ema=dict(arrays),
        style_mean={vendor: np.zeros(style_size, np.float32) for vendor in vendors},
        style_std={vendor: np.ones(style_size, np.float32) for vendor in vendors},
        segmenter=segmenter_arrays,
        segmenter_ema=dict(segmenter_arrays),
        segmenter_sha256=public_sha256() if segmenter_rounds else "",
    )


def _copied(part: Mapping[str, torch.nn.Parameter]) -> Arrays:
    """The values of a trainable part."""
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in part.items()}


def make_request(
    config: Config, state: FederationState, server_round: int, sites: Mapping[str, StudySite] | None = None
) -> Request:
    """A round's request to every site.

    Args:
        config: Settings of the study.
        state: State after the round before.
        server_round: The round, from 1.
        sites: Sites of the study, so that a site which accounts with other facts refuses; None skips this check.
    """
    privacy, federation = config.privacy, config.federation
    task = state.task_of(server_round, config)
    is_statistics, is_segmenter = task == STATISTICS, task == SEGMENTER
    with_shape = is_statistics and federation.shape
    clips = {
        STATISTICS: math.hypot(privacy.statistics_clip, privacy.shape_clip) if with_shape else privacy.statistics_clip,
        GRADIENTS: privacy.max_grad_norm,
        SEGMENTER: privacy.segmenter_clip,
    }
    return Request(
        task=task,
        run_id=state.run_id,
        server_round=server_round,
        prior_sha256=state.segmenter_sha256 if is_segmenter else state.prior_sha256,
        adapter=state.adapter,
        private=state.plan is not None,
        noise_multiplier=float(state.plan[task].noise_multiplier) if state.plan else 0.0,
        sample_rate=1.0 if is_statistics else float(privacy.sample_rate),
        max_grad_norm=float(clips[task]),
        target_delta=float(privacy.target_delta),
        local_steps=NUM_STEPS if is_statistics else federation.local_steps,
        learning_rate=float(federation.segmenter_learning_rate if is_segmenter else federation.learning_rate),
        num_views=federation.num_views,
        seed=config.seed,
        sites="\n".join(facts_line(name, s.vendors, s.nominal_patients) for name, s in sorted((sites or {}).items())),
        with_shape=with_shape,
    )


def _with_present_names(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's metadata, whichever version wrote it, in today's words: a resumed run continues in these."""
    values = dict(metadata)
    values["adapter"] = present_name(values.pop("rung", None) or values["adapter"])
    values["plan"] = values["plan"] and {present_name(task): release for task, release in values["plan"].items()}
    values["releases"] = {
        site: [{**entry, "task": present_name(entry["task"])} for entry in entries]
        for site, entries in values["releases"].items()
    }
    for line in values["rounds"]:
        if "rung" in line:
            line["adapter"] = present_name(line.pop("rung"))
    return values


def quorum(settings: FederationConfig, num_sites: int, task: str = GRADIENTS) -> int:
    """Number of usable replies that a round needs: by default a majority of the registered sites.

    `trim` does not apply to style statistics, which each vendor has of its own.
    """
    least = num_sites // 2 + 1 if settings.min_sites is None else settings.min_sites
    return max(least, 2 * (0 if task == STATISTICS else settings.trim) + 1)


def write_study(run: RunFolder, sites: Mapping[str, StudySite]) -> None:
    """Write `study.json`, the study's sites and their public facts; see `read_study`."""
    facts = {name: asdict(site) for name, site in sites.items()}
    (run.path / STUDY_NAME).write_text(json.dumps({"sites": facts}, indent=2) + "\n", encoding="utf-8")


def read_study(run: RunFolder) -> dict[str, StudySite]:
    """The study's sites and their public facts.

    Raises:
        UserError: `study.json` is missing or is not as expected.
    """
    path = run.path / STUDY_NAME
    try:
        sites = json.loads(path.read_text(encoding="utf-8"))["sites"]
        study = {name: study_site(facts) for name, facts in sites.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{path}: expected {{"sites": {{NAME: {{"vendors": {{VENDOR: NUMBER}}, "nominal_patients": N}}}}}}'
        ) from None
    if not study:
        raise UserError(f"{path}: expected at least one site")
    return study


def study_site(facts: Mapping[str, Any]) -> StudySite:
    """A site's public facts as a JSON file holds them."""
    return StudySite(*read_facts(facts), from_json(facts.get("provenance")))


def charged_releases(entries: Sequence[Mapping[str, Any]]) -> tuple[Release, ...]:
    """The releases of a site's entries that were, or may have been, charged."""
    return tuple(Release(**entry["release"]) for entry in entries if entry["charged"])


def check_delta(privacy: PrivacyConfig, nominal_patients: Mapping[str, int]) -> None:
    """Refuse a study whose delta is too large for the patients of a site, before any request is sent.

    Args:
        privacy: Settings of the study.
        nominal_patients: Site -> its public number of patients.

    Raises:
        UserError: The target is above what a site of that size may agree to.
    """
    name, size = max(nominal_patients.items(), key=lambda item: item[1])
    if privacy.enabled and privacy.target_delta > largest_delta(size):
        raise UserError(
            f"privacy.target_delta: expected at most {MAX_DELTA_TIMES_PATIENTS:g} / nominal patients, for site {name} "
            f"with {size} of them {largest_delta(size):.3g}, got {privacy.target_delta:g}"
        )


@functools.lru_cache
def _epsilon(releases: tuple[Release, ...], delta: float, order: int | None) -> tuple[float, str]:
    """Epsilon and accountant of releases; sites with the same releases share one computation."""
    return PrivacyFilter(order).of(releases, delta)


def _flat(groups: Mapping[str, Arrays]) -> Arrays:
    """`<group>/<name>` for every array of every group."""
    return {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
