"""Settings: dataclasses whose values are checked once, and `load(path, overrides)`.

YAML -> OmegaConf.merge(structured(Config), default, experiment, dotlist) -> plain dataclasses. `configs/default.yaml`
names every key with its unit; a misspelt key or a value out of range is a `UserError`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedcmr.shared.adapters import ADAPTERS, EARLIER_NAMES
from fedcmr.shared.case import VENDORS, known_vendor
from fedcmr.shared.errors import UserError
from fedcmr.shared.progress import console
from fedcmr.shared.settings_file import check_keys, read_overrides, read_settings

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"
MAIN_TASK = "ejection_fraction"
"""The task that every study has: the report's headline, the sites' evaluation and the audits are of its network."""
CROSS_VENDOR_KINDS = ("synthetic", "real")
SEGMENTATION_LOSSES = ("moving", "fixed", "cross_entropy", "dice")
"""See `fedcmr.shared.tasks.segmentation.losses`."""
BASELINES = (
    "predict_the_mean",
    "prior_only",
    "local_only",
    "leave_one_site_out",
    "federated_without_privacy",
    "pooled_real",
)

RENAMED_KEYS = {
    "federation.rung": "federation.adapter",
    "synthesis.start_t": "synthesis.t_start",
    "privacy.moments_share": "privacy.statistics_share",
    "privacy.moments_clip": "privacy.statistics_clip",
    "evaluation.matrix": "evaluation.cross_vendor",
    "evaluation.show_real_pictures": "evaluation.show_real_images",
}
"""Old key -> new key, in the same block: configs and overrides of earlier versions are read with a warning."""
RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {"federation.adapter": EARLIER_NAMES}
"""Key -> old value -> new value, likewise."""
LAST_WITH_OLD_NAMES = "the old name will go in 0.3"


def _check(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise `Expected privacy.target_epsilon > 0, got -1.0.`, for example."""
    if not condition:
        raise UserError(f"Expected {name} {expected}, got {value!r}.")


def _is_nominal(value: Any, depth: int = 2) -> bool:
    """Whether public numbers of patients are as expected: none, a whole number from 1, or such by site and vendor."""
    if isinstance(value, Mapping):
        return depth > 0 and bool(value) and all(v is not None and _is_nominal(v, depth - 1) for v in value.values())
    return value is None or (type(value) is int and value >= 1)


def _with_known_vendors(given: Any) -> Any:
    """Public numbers of patients by site and vendor, the vendors spelt as `VENDORS` does."""
    if not isinstance(given, Mapping):
        return given
    return {
        site: {known_vendor(str(name)): number for name, number in numbers.items()}
        if isinstance(numbers, Mapping)
        else numbers
        for site, numbers in given.items()
    }


@dataclass
class HospitalsConfig:
    """Which hospitals take part; see `configs/default.yaml` for each key."""

    source: str = "phantom"
    vendors: list[str] = field(default_factory=lambda: ["Siemens", "Philips", "GE"])
    nominal_patients: Any = None
    num_train: int = 40
    num_test: int = 15
    num_slices: int = 8
    num_phases: int = 10
    acdc_train_folds: dict[str, int] = field(default_factory=lambda: {"A": 1, "B": 2})
    acdc_test_fold: int = 3
    layouts: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sources = ("phantom", "acdc", "prepared", "layouts")
        _check(self.source in sources, "hospitals.source", f"in {sources}", self.source)
        self.vendors = [known_vendor(vendor) for vendor in self.vendors]
        self.nominal_patients = _with_known_vendors(self.nominal_patients)
        for vendor in self.vendors:
            _check(vendor in VENDORS, "hospitals.vendors", f"in {VENDORS}", vendor)
        _check(len(self.vendors) >= 1, "hospitals.vendors", "to name at least one vendor", self.vendors)
        _check(
            _is_nominal(self.nominal_patients),
            "hospitals.nominal_patients",
            "to be a number from 1, {site: number} or {site: {vendor: number}}",
            self.nominal_patients,
        )
        _check(self.num_train >= 2, "hospitals.num_train", ">= 2", self.num_train)
        _check(self.num_test >= 2, "hospitals.num_test", ">= 2", self.num_test)
        _check(6 <= self.num_slices <= 16, "hospitals.num_slices", "in 6..16", self.num_slices)
        _check(8 <= self.num_phases <= 40, "hospitals.num_phases", "in 8..40", self.num_phases)
        folds = [*self.acdc_train_folds.values(), self.acdc_test_fold]
        _check(all(0 <= fold < 5 for fold in folds), "hospitals.acdc folds", "in 0..4", folds)
        _check(len(set(folds)) == len(folds), "hospitals.acdc folds", "to be disjoint", folds)
        _check(
            self.source != "layouts" or bool(self.layouts),
            "hospitals.layouts",
            "to name a site, as hospitals.source is layouts",
            self.layouts,
        )
        known = {"format", "labels", "public", "contours", "axes"}
        for site, layout in self.layouts.items():
            _check(
                "format" in layout and set(layout) <= known,
                f"hospitals.layouts.{site}",
                "to have a format, and perhaps labels, public, contours or axes",
                layout,
            )


@dataclass
class GeneratorConfig:
    """The generative model that `fedcmr-server pretrain` trains; a study takes the one in its prior's file."""

    kind: str = "flow_matching"
    size_px: int = 64
    pixel_mm: float = 2.0
    patch: int = 2
    channels: list[int] = field(default_factory=lambda: [64, 96, 128])
    unknown_labels: bool = False

    def __post_init__(self) -> None:
        step = 2 ** (len(self.channels) - 1) * self.patch
        _check(1 <= self.patch <= 8, "generator.patch", "in 1..8", self.patch)
        _check(
            1 <= len(self.channels) <= 8 and all(16 <= n <= 2048 and n % 16 == 0 for n in self.channels),
            "generator.channels",
            "1 to 8 multiples of 16 up to 2048",
            self.channels,
        )
        _check(
            16 <= self.size_px <= 512 and self.size_px % max(step, 16) == 0,
            "generator.size_px",
            f"a multiple of {max(step, 16)} up to 512",
            self.size_px,
        )
        _check(0.5 <= self.pixel_mm <= 4, "generator.pixel_mm", "in 0.5..4", self.pixel_mm)
        if self.kind != "flow_matching":  # MONAI's networks take seconds to load
            from fedcmr.shared.models.kinds import KINDS

            _check(self.kind in KINDS, "generator.kind", f"in {tuple(KINDS)}", self.kind)


@dataclass
class PretrainConfig:
    """Training of the public prior on simulated hearts, and on public scans where there are some."""

    start: str | None = None
    num_hearts: int = 6000
    scan_share: float = 0.5
    num_steps: int = 20000
    batch_size: int = 32
    learning_rate: float = 4e-4
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        _check(self.num_hearts >= 8, "pretrain.num_hearts", ">= 8", self.num_hearts)
        _check(0 < self.scan_share <= 1, "pretrain.scan_share", "in (0, 1]", self.scan_share)
        _check(self.num_steps >= 1, "pretrain.num_steps", ">= 1", self.num_steps)
        _check(self.batch_size >= 2, "pretrain.batch_size", ">= 2", self.batch_size)
        _check(self.learning_rate > 0, "pretrain.learning_rate", "> 0", self.learning_rate)
        _check(0 <= self.ema_decay < 1, "pretrain.ema_decay", "in [0, 1)", self.ema_decay)


@dataclass
class PrivacyConfig:
    """Patient-level differential privacy at each site."""

    enabled: bool = True
    target_epsilon: float = 8.0
    target_delta: float = 1e-3
    max_grad_norm: float = 0.03
    sample_rate: float = 1.0
    statistics_share: float = 0.5
    statistics_clip: float = 4.0
    segmenter_share: float = 0.5
    segmenter_clip: float = 0.03
    shape_clip: float = 5.0

    def __post_init__(self) -> None:
        _check(
            self.target_epsilon > 0 and math.isfinite(self.target_epsilon),
            "privacy.target_epsilon",
            "> 0",
            self.target_epsilon,
        )
        _check(0 < self.target_delta < 1, "privacy.target_delta", "in (0, 1)", self.target_delta)
        _check(
            self.max_grad_norm > 0 and math.isfinite(self.max_grad_norm),
            "privacy.max_grad_norm",
            "> 0",
            self.max_grad_norm,
        )
        _check(0 < self.sample_rate <= 1, "privacy.sample_rate", "in (0, 1]", self.sample_rate)
        _check(0 < self.statistics_share < 1, "privacy.statistics_share", "in (0, 1)", self.statistics_share)
        _check(self.statistics_clip > 0, "privacy.statistics_clip", "> 0", self.statistics_clip)
        _check(0 < self.segmenter_share < 1, "privacy.segmenter_share", "in (0, 1)", self.segmenter_share)
        _check(
            self.shape_clip > 0 and math.isfinite(self.shape_clip), "privacy.shape_clip", "positive", self.shape_clip
        )
        _check(
            self.segmenter_clip > 0 and math.isfinite(self.segmenter_clip),
            "privacy.segmenter_clip",
            "> 0",
            self.segmenter_clip,
        )


@dataclass
class FederationConfig:
    """Adapter, rounds, local steps and the views that are averaged into one gradient per patient."""

    adapter: str = "auto"
    num_rounds: int = 6
    local_steps: int = 2
    learning_rate: float = 3.0
    ema_decay: float = 0.5
    num_views: int = 8
    num_processes: int = 2
    min_sites: int | None = None
    trim: int = 0
    reply_timeout_s: float = 3600.0
    segmenter_rounds: int = 0
    shape: bool = False
    segmenter_learning_rate: float = 10.0

    def __post_init__(self) -> None:
        _check(self.adapter in ("auto", *ADAPTERS), "federation.adapter", f"in {('auto', *ADAPTERS)}", self.adapter)
        _check(
            self.num_rounds >= 2,
            "federation.num_rounds",
            ">= 2 (the first one releases the style statistics)",
            self.num_rounds,
        )
        _check(self.local_steps >= 1, "federation.local_steps", ">= 1", self.local_steps)
        _check(self.learning_rate > 0, "federation.learning_rate", "> 0", self.learning_rate)
        _check(0 <= self.ema_decay < 1, "federation.ema_decay", "in [0, 1)", self.ema_decay)
        _check(self.num_views >= 1, "federation.num_views", ">= 1", self.num_views)
        _check(self.num_processes >= 1, "federation.num_processes", ">= 1", self.num_processes)
        _check(
            self.min_sites is None or self.min_sites >= 1,
            "federation.min_sites",
            "to be null (a majority) or >= 1",
            self.min_sites,
        )
        _check(self.trim >= 0, "federation.trim", ">= 0", self.trim)
        _check(self.reply_timeout_s > 0, "federation.reply_timeout_s", "> 0", self.reply_timeout_s)
        _check(self.segmenter_rounds >= 0, "federation.segmenter_rounds", ">= 0", self.segmenter_rounds)
        _check(
            self.segmenter_learning_rate > 0,
            "federation.segmenter_learning_rate",
            "> 0",
            self.segmenter_learning_rate,
        )


@dataclass
class SynthesisConfig:
    """What the server samples from the shared generator."""

    num_cases: int = 600
    num_slices: int = 8
    num_steps: int = 4
    t_start: float = 0.5
    batch_size: int = 64
    guides: list[str] = field(default_factory=list)
    vendor_shares: dict[str, float] = field(default_factory=dict)
    dicom: bool = False
    nifti: bool = False
    nnunet: bool = False

    def __post_init__(self) -> None:
        _check(self.num_cases >= 2, "synthesis.num_cases", ">= 2", self.num_cases)
        _check(1 <= self.num_slices <= 16, "synthesis.num_slices", "in 1..16", self.num_slices)
        least = 0 if self.guides else 1
        _check(self.num_steps >= least, "synthesis.num_steps", ">= 1, or 0 with synthesis.guides", self.num_steps)
        _check(0 <= self.t_start < 1, "synthesis.t_start", "in [0, 1)", self.t_start)
        _check(self.batch_size >= 1, "synthesis.batch_size", ">= 1", self.batch_size)
        self.vendor_shares = {known_vendor(vendor): share for vendor, share in self.vendor_shares.items()}
        shares = self.vendor_shares
        _check(
            all(vendor in VENDORS and share >= 0 for vendor, share in shares.items()),
            "synthesis.vendor_shares",
            f"to give shares >= 0 to names in {VENDORS}",
            shares,
        )
        _check(not shares or sum(shares.values()) > 0, "synthesis.vendor_shares", "to have a positive sum", shares)


@dataclass
class AugmentationConfig:
    """How far each random transform of the ResNet50's training images goes; 0 (or false) switches it off."""

    rotation_deg: float = 45.0
    log_scale: float = 0.2
    shift_px: float = 4.0
    flip: bool = True
    log_gamma: float = 0.5
    contrast: float = 0.25
    brightness: float = 0.1
    blur_px: float = 1.0
    noise: float = 0.06
    log_bias: float = 0.15

    def __post_init__(self) -> None:
        for name, most in (
            ("rotation_deg", 180),
            ("log_scale", 1),
            ("shift_px", 32),
            ("log_gamma", 2),
            ("contrast", 1),
            ("brightness", 1),
            ("blur_px", 3),
            ("noise", 1),
            ("log_bias", 1),
        ):
            value = getattr(self, name)
            _check(0 <= value <= most, f"regression.augmentation.{name}", f"in [0, {most}]", value)


@dataclass
class RegressionConfig:
    """Training of the ResNet50 that predicts the ejection fraction."""

    num_steps: int = 600
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    ema_decay: float = 0.99
    area_share: float = 0.0
    num_tta: int = 4
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        _check(self.num_steps >= 1, "regression.num_steps", ">= 1", self.num_steps)
        _check(self.batch_size >= 2, "regression.batch_size", ">= 2", self.batch_size)
        _check(self.learning_rate > 0, "regression.learning_rate", "> 0", self.learning_rate)
        _check(self.weight_decay >= 0, "regression.weight_decay", ">= 0", self.weight_decay)
        _check(0 <= self.ema_decay < 1, "regression.ema_decay", "in [0, 1)", self.ema_decay)
        _check(0 <= self.area_share <= 1, "regression.area_share", "in [0, 1]", self.area_share)
        _check(self.num_tta >= 1, "regression.num_tta", ">= 1", self.num_tta)


@dataclass
class SegmentationConfig:
    """Training of the segmenter: its network, its loss, its views."""

    network: str = "unet"
    width: int = 24
    size_px: int = 128
    pixel_mm: float = 1.25
    crop_px: int = 96
    loss: str = "fixed"
    num_steps: int = 3000
    batch_size: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    rotation_deg: float = 45.0
    shift_mm: float = 10.0

    def __post_init__(self) -> None:
        if self.network != "unet":  # MONAI's networks take seconds to load
            from fedcmr.shared.tasks.segmentation.networks.kinds import NETWORKS

            _check(self.network in NETWORKS, "segmentation.network", f"in {tuple(NETWORKS)}", self.network)
        _check(self.loss in SEGMENTATION_LOSSES, "segmentation.loss", f"in {SEGMENTATION_LOSSES}", self.loss)
        for key in ("rotation_deg", "shift_mm"):
            _check(getattr(self, key) >= 0, f"segmentation.{key}", ">= 0", getattr(self, key))
        for key in ("size_px", "crop_px"):
            _check(getattr(self, key) % 16 == 0, f"segmentation.{key}", "a multiple of 16", getattr(self, key))
        _check(0 < self.crop_px <= self.size_px, "segmentation.crop_px", "up to size_px", self.crop_px)
        _check(self.pixel_mm > 0, "segmentation.pixel_mm", "> 0", self.pixel_mm)
        _check(self.width >= 8, "segmentation.width", ">= 8", self.width)
        _check(self.num_steps >= 1, "segmentation.num_steps", ">= 1", self.num_steps)
        _check(self.batch_size >= 2, "segmentation.batch_size", ">= 2", self.batch_size)
        _check(self.learning_rate > 0, "segmentation.learning_rate", "> 0", self.learning_rate)
        _check(self.weight_decay >= 0, "segmentation.weight_decay", ">= 0", self.weight_decay)
        _check(0 <= self.ema_decay < 1, "segmentation.ema_decay", "in [0, 1)", self.ema_decay)


@dataclass
class EvaluationConfig:
    """Tables, intervals and the baselines next to them."""

    num_bootstrap: int = 2000
    baselines: list[str] = field(default_factory=lambda: ["predict_the_mean", "prior_only"])
    epsilons: list[float] = field(default_factory=list)
    cross_vendor: list[str] = field(default_factory=list)
    fidelity: bool = False
    show_real_images: bool = False
    federated: bool = False
    federated_epsilon: float | None = None

    def __post_init__(self) -> None:
        _check(self.num_bootstrap >= 100, "evaluation.num_bootstrap", ">= 100", self.num_bootstrap)
        for name in self.baselines:
            _check(name in BASELINES, "evaluation.baselines", f"in {BASELINES}", name)
        for kind in self.cross_vendor:
            _check(kind in CROSS_VENDOR_KINDS, "evaluation.cross_vendor", f"in {CROSS_VENDOR_KINDS}", kind)
        _check(
            "real" not in self.cross_vendor or "pooled_real" in self.baselines,
            "evaluation.baselines",
            "to hold pooled_real, the row of all vendors in evaluation.cross_vendor's real",
            self.baselines,
        )
        _check(
            self.federated_epsilon is None or 0 < self.federated_epsilon < math.inf,
            "evaluation.federated_epsilon",
            "> 0 or null",
            self.federated_epsilon,
        )
        for value in self.epsilons:
            _check(value > 0 and math.isfinite(value), "evaluation.epsilons", "> 0", value)
        names = {f"{value:g}" for value in self.epsilons}
        _check(len(names) == len(self.epsilons), "evaluation.epsilons", "to differ from each other", self.epsilons)


@dataclass
class Config:
    """All settings of a run."""

    seed: int = 0
    device: str = "auto"
    data_root: str | None = None
    prior: str | None = None
    tasks: list[str] = field(default_factory=lambda: [MAIN_TASK])
    hospitals: HospitalsConfig = field(default_factory=HospitalsConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _check(self.seed >= 0, "seed", ">= 0", self.seed)
        # Which tasks there are is asked where a study begins (`fedcmr.server.tasks.registry.tasks_of`).
        _check(MAIN_TASK in self.tasks, "tasks", f"to hold {MAIN_TASK}", self.tasks)
        _check(len(set(self.tasks)) == len(self.tasks), "tasks", "to differ from each other", self.tasks)
        _check(
            self.federation.segmenter_rounds == 0 or "segmentation" in self.tasks,
            "tasks",
            "to hold segmentation, for federation.segmenter_rounds above 0",
            self.tasks,
        )
        _check(
            self.synthesis.num_steps > 0 or self.federation.adapter == "statistics",
            "federation.adapter",
            "to be statistics where synthesis.num_steps is 0: no network would use what an adapter learns",
            self.federation.adapter,
        )
        _check(self.device in ("auto", "cpu", "cuda"), "device", "in ('auto', 'cpu', 'cuda')", self.device)
        if self.hospitals.source != "phantom":
            _check(
                self.data_root is not None,
                "data_root",
                f"to be set for hospitals.source={self.hospitals.source}",
                self.data_root,
            )
            _check(
                self.hospitals.nominal_patients is not None,
                "hospitals.nominal_patients",
                f"to be set for hospitals.source={self.hospitals.source}: the public number of each site's "
                "patients, never their count",
                None,
            )
        num_sites = {"phantom": len(self.hospitals.vendors), "acdc": len(self.hospitals.acdc_train_folds)}
        if "leave_one_site_out" in self.evaluation.baselines:
            _check(
                num_sites.get(self.hospitals.source, 2) >= 2,
                "evaluation.baselines",
                "without leave_one_site_out in a study of one site",
                self.evaluation.baselines,
            )


def load(config: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment over the defaults, with `key=value` overrides on top.

    Args:
        config: A name under `configs/` ("smoke") or the path of a YAML file.
        overrides: For example ["privacy.target_epsilon=3", "seed=1"].

    Raises:
        UserError: The file is missing or no YAML, a key is unknown, a value has the wrong type or is out of range.
    """
    path = _find(config)
    for override in overrides:
        if "=" not in override:
            raise UserError(f"Expected an override of the form key=value, got {override!r}.")
    layers: list[Any] = [OmegaConf.structured(Config)]
    try:
        for file in dict.fromkeys([CONFIG_FOLDER / "default.yaml", path]):
            layers.append(_checked_layer(layers[0], file))
        given = read_overrides(overrides, Config)
        _rename_old(given, "the overrides")
        check_keys(given, Config, "overrides", RENAMED_KEYS)
        merged = OmegaConf.merge(*layers, given)
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(getattr(error, "msg", None) or error).splitlines()[0]
        raise UserError(f"{path.name} or an override: {reason}" + (f" (key {key})" if key else "")) from None
    except (YAMLError, UnicodeDecodeError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} or an override cannot be read as settings: {str(error).splitlines()[0]}") from None


def dump(config: Config) -> str:
    """The whole settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _checked_layer(schema: Any, path: Path) -> Any:
    """One YAML file, merged alone first so that an error names the file it came from."""
    layer = read_settings(path, Config)
    _rename_old(layer, str(path))
    check_keys(layer, Config, str(path), RENAMED_KEYS)
    try:
        OmegaConf.merge(schema, layer)
    except OmegaConfBaseException as error:
        reason = str(getattr(error, "msg", None) or error).splitlines()[0]
        raise UserError(f"{path}: {reason}") from None
    return layer


def _rename_old(layer: DictConfig, where: str) -> None:
    """Give keys and values of earlier versions their present names, in place, with a warning for each.

    Raises:
        UserError: A key is given under both names.
    """
    for old, new in RENAMED_KEYS.items():
        (parent, old_name), new_name = _split(old), _split(new)[1]
        block = _block(layer, parent)
        if block is None or old_name not in block:
            continue
        if new_name in block:
            raise UserError(f"{where}: expected {new} once, got it as {old} too: remove the latter")
        block[new_name] = block.pop(old_name)
        _warn_renamed(f"{old} is now {new}")
    for key, values in RENAMED_VALUES.items():
        parent, name = _split(key)
        block = _block(layer, parent)
        value = None if block is None else block.get(name)
        if block is not None and isinstance(value, str) and value in values:
            block[name] = values[value]
            _warn_renamed(f"{key}={value} is now {key}={values[value]}")


def _split(key: str) -> tuple[str, str]:
    """The block and the name in it: privacy and statistics_clip of privacy.statistics_clip."""
    parent, _, name = key.rpartition(".")
    return parent, name


def _block(layer: DictConfig, name: str) -> DictConfig | None:
    """The block of settings of this name; None where the layer has none."""
    block = layer.get(name)
    return block if isinstance(block, DictConfig) else None


@functools.cache
def _warn_renamed(text: str) -> None:
    """Warn once per process: every stage of a run reads the run's settings again."""
    console.print(f"{text}; {LAST_WITH_OLD_NAMES}", highlight=False, markup=False, soft_wrap=True)


def _find(config: str | Path) -> Path:
    """A config's file, by path or by its name under `configs/`."""
    given = Path(config)
    for path in (given, CONFIG_FOLDER / given, CONFIG_FOLDER / f"{given}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
    raise UserError(f"no config {str(config)!r}: give a YAML file's path or one of {names}")


def with_absolute_paths(settings: Config) -> Config:
    """The settings, with paths that hold in any working directory: a run is gone on with from other ones too."""

    def absolute(path: str | None) -> str | None:
        return path and str(Path(path).resolve())

    guides = [str(Path(folder).resolve()) for folder in settings.synthesis.guides]
    return replace(
        settings,
        prior=absolute(settings.prior),
        data_root=absolute(settings.data_root),
        synthesis=replace(settings.synthesis, guides=guides),
    )
