"""A site's own settings, `site.yaml`: who it is, where its data and ledger are, and what it agrees to.

The server never writes or reads this file. What a request demands beyond the policy is refused with a code.
"""

import functools
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedcmr.shared.case import VENDORS, known_vendor
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.privacy import MAX_DELTA_TIMES_PATIENTS, Mechanism, largest_delta
from fedcmr.shared.progress import console
from fedcmr.shared.settings_file import check_keys, read_settings
from fedcmr.shared.site_facts import check_vendors

SITE_FILE = "site.yaml"
EVALUATIONS = ("private", "table", "off")
"""Forms in which a site answers about its test patients."""
CONTOURS_ALLOWED = ("any", "drawn")
"""Contours of the patients who take part: those that a program found too, or drawn ones alone."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")

TEMPLATE = """\
# This site's own settings. They stay at the site: the server can neither read nor change them.
# Paths are absolute, or start from this file's folder.

name: {name:<27} # as the study lists the site: letters, digits, '_' and '-'
vendors: {vendors:<24} # of the scanners: {known_vendors};
                                  # each with a public round number near the count of patients with its scans
nominal_patients: {nominal_patients:<15} # the same of all patients, one with scans of two vendors once; divides sums
data: {data:<27} # prepared cases, written by 'fedcmr-client prepare'
ledger: {ledger:<25} # what this site has released: keep it as long as the data, and back it up
ledger_replica: {ledger_replica:<17} # file with its second copy, best on another disk; null: next to the ledger
ledger_same_disk: {ledger_same_disk:<15} # true: both copies on one disk; its restored backup forgets what was spent
test: {test:<27} # prepared test patients of the same --key, whom nobody trains on; null: no evaluation here
test_ledger: {test_ledger:<20} # what this site has released about its test patients; second copy as the ledger's
prior: {prior:<26} # the public prior (.safetensors); null: the one that ships with the project
coordinator: {coordinator:<20} # HOST:PORT that 'fedcmr-client join' calls; null: the site takes part in no deployment
authority: {authority:<22} # the coordinator's ca.crt, by which the server is known

policy:                           # a request beyond one of these is refused; docs/privacy.md says how to choose
  max_epsilon: {policy[max_epsilon]:<18} # privacy loss of a patient over the life of the ledger, all runs together
  max_delta: {policy[max_delta]:<20} # at most 0.1 / nominal_patients
  min_noise_multiplier: {policy[min_noise_multiplier]:<9} # noise of a single step, in units of the clip norm
  max_noise_multiplier: {policy[max_noise_multiplier]:<9} # more noise would be work for an answer that says nothing
  min_sample_rate: {policy[min_sample_rate]:<14} # 1: a step takes all patients; less: it may draw some, and costs more
  max_grad_norm: {policy[max_grad_norm]:<16} # largest clip norm
  min_patients: {policy[min_patients]:<17} # with fewer usable patients, for gradients drawn whole, it refuses
  max_rounds: {policy[max_rounds]:<19} # of one run; null: as many as the budget allows
  max_local_steps: {policy[max_local_steps]:<14} # steps of one round
  max_views: {policy[max_views]:<20} # random views of a patient in one step
  max_seconds: {policy[max_seconds]:<18} # work on one request: refused where it would take longer, and stopped there
  allowed_code_sha256: {policy[allowed_code_sha256]:<10} # versions that may answer; []: any, deployed: none
  allow_without_privacy: {policy[allow_without_privacy]:<8} # true: also answer studies without noise
  evaluation: {policy[evaluation]:<19} # of the test patients: "private", sums with noise, charged to test_ledger;
                                  # "table", plain sums of groups of 5 or more, NOT private, without limit; "off"
  contours: {policy[contours]:<21} # "drawn": cases whose contours a program found take no part; "any": they do
"""


REMEDY = "Correct that line; 'fedcmr-client init' into another folder shows every key."


def _check(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise `Expected policy.max_epsilon > 0, got -1.0.`, for example."""
    if not condition:
        raise UserError(f"Expected {name} {expected}, got {value!r}.")


@dataclass(frozen=True)
class SitePolicy:
    """What a site agrees to; `TEMPLATE` explains each key."""

    max_epsilon: float = 8.0
    max_delta: float = 1e-3
    min_noise_multiplier: float = 0.3
    max_noise_multiplier: float = 100.0
    min_sample_rate: float = 1.0
    max_grad_norm: float = 10.0
    min_patients: int = 5
    max_rounds: int | None = None
    max_local_steps: int = 100
    max_views: int = 64
    max_seconds: float = 7200.0
    allowed_code_sha256: list[str] = field(default_factory=list)
    allow_without_privacy: bool = False
    evaluation: str = "private"
    contours: str = "any"

    def __post_init__(self) -> None:
        _check(0 < self.max_epsilon < math.inf, "policy.max_epsilon", "> 0 and finite", self.max_epsilon)
        _check(0 < self.max_delta < 1, "policy.max_delta", "in (0, 1)", self.max_delta)
        _check(
            0 < self.min_noise_multiplier < math.inf,
            "policy.min_noise_multiplier",
            "> 0 and finite",
            self.min_noise_multiplier,
        )
        _check(
            self.min_noise_multiplier <= self.max_noise_multiplier < math.inf,
            "policy.max_noise_multiplier",
            ">= policy.min_noise_multiplier and finite",
            self.max_noise_multiplier,
        )
        _check(0 < self.min_sample_rate <= 1, "policy.min_sample_rate", "in (0, 1]", self.min_sample_rate)
        _check(0 < self.max_grad_norm < math.inf, "policy.max_grad_norm", "> 0 and finite", self.max_grad_norm)
        _check(self.min_patients >= 1, "policy.min_patients", ">= 1", self.min_patients)
        _check(self.max_rounds is None or self.max_rounds >= 1, "policy.max_rounds", ">= 1 or null", self.max_rounds)
        _check(self.max_local_steps >= 1, "policy.max_local_steps", ">= 1", self.max_local_steps)
        _check(self.max_views >= 1, "policy.max_views", ">= 1", self.max_views)
        _check(0 < self.max_seconds < math.inf, "policy.max_seconds", "> 0 and finite", self.max_seconds)
        _check(self.evaluation in EVALUATIONS, "policy.evaluation", f"in {EVALUATIONS}", self.evaluation)
        _check(self.contours in CONTOURS_ALLOWED, "policy.contours", f"in {CONTOURS_ALLOWED}", self.contours)
        for sha256 in self.allowed_code_sha256:
            _check(
                SHA256.fullmatch(sha256) is not None,
                "policy.allowed_code_sha256",
                "to hold what 'fedcmr-client code' prints, 64 hexadecimal digits",
                sha256,
            )


@dataclass(frozen=True)
class SiteSettings:
    """A site, as `site.yaml` describes it; `TEMPLATE` explains each key.

    Attributes:
        folder: Where `site.yaml` lies; not a key of the file.
    """

    name: str
    vendors: dict[str, int]
    nominal_patients: int
    data: str = "train"
    ledger: str = "ledger"
    ledger_replica: str | None = None
    ledger_same_disk: bool = False
    test: str | None = None
    test_ledger: str = "test_ledger"
    prior: str | None = None
    coordinator: str | None = None
    authority: str | None = None
    policy: SitePolicy = field(default_factory=SitePolicy)
    folder: Path = Path()

    def __post_init__(self) -> None:
        _check(NAME.fullmatch(self.name) is not None, "name", f"to match {NAME.pattern}", self.name)
        check_vendors(self.vendors, self.nominal_patients)
        _check(
            self.nominal_patients >= self.policy.min_patients,
            "nominal_patients",
            f">= policy.min_patients ({self.policy.min_patients})",
            self.nominal_patients,
        )
        largest = largest_delta(self.nominal_patients)
        _check(
            self.policy.max_delta <= largest,
            "policy.max_delta",
            f"<= {MAX_DELTA_TIMES_PATIENTS:g} / nominal_patients ({largest:.3g})",
            self.policy.max_delta,
        )
        ledger = PurePath(os.path.normpath(self.ledger))
        replica = None if self.ledger_replica is None else PurePath(os.path.normpath(self.ledger_replica))
        _check(
            replica is None or ledger not in (replica, *replica.parents),
            "ledger_replica",
            "outside the ledger's folder, which may be lost as a whole",
            self.ledger_replica,
        )
        test = None if self.test is None else PurePath(os.path.normpath(self.test))
        _check(test != PurePath(os.path.normpath(self.data)), "test", "to be another folder than data", self.test)
        test_ledger = PurePath(os.path.normpath(self.test_ledger))
        _check(test_ledger != ledger, "test_ledger", "to be another folder than ledger", self.test_ledger)

    @property
    def vendor_names(self) -> tuple[str, ...]:
        """The vendors in the order in which the site's statistics are released."""
        return tuple(sorted(self.vendors))

    @property
    def data_path(self) -> Path:
        """The folder of prepared cases."""
        return self.folder / self.data

    @property
    def ledger_path(self) -> Path:
        """The ledger's folder."""
        return self.folder / self.ledger

    @property
    def replica_path(self) -> Path | None:
        """The file with the ledger's replica; None for the place next to the ledger."""
        return None if self.ledger_replica is None else self.folder / self.ledger_replica

    @property
    def test_path(self) -> Path | None:
        """The folder of prepared test patients; None where the site has none."""
        return None if self.test is None else self.folder / self.test

    @property
    def test_ledger_path(self) -> Path:
        """The folder of the ledger of the test patients."""
        return self.folder / self.test_ledger

    @property
    def test_replica_path(self) -> Path | None:
        """The file with that ledger's replica, next to the other replica; None for the place next to the ledger."""
        path = self.replica_path
        return None if path is None else path.with_name(path.name + ".test")

    @property
    def authority_path(self) -> Path | None:
        """The file of the study's certificate authority; None without a deployment."""
        return None if self.authority is None else self.folder / self.authority

    @property
    def prior_path(self) -> Path | None:
        """The public prior; None for the one that ships with the project."""
        return None if self.prior is None else self.folder / self.prior


def round_down(value: float) -> float:
    """To one significant digit, never up: 0.1 / 130 patients -> 7e-4."""
    exponent = math.floor(math.log10(value))
    return float(f"{math.floor(round(value / 10.0**exponent, 9))}e{exponent}")


def load_site(path: Path) -> SiteSettings:
    """Read a site's settings from its `site.yaml`, or from the folder that holds it.

    Raises:
        UserError: The file is missing, is no YAML, has an unknown or missing key, or a value that cannot be.
    """
    path = Path(path)
    if path.is_dir():
        path = path / SITE_FILE
    if not path.exists():
        raise UserError(f"{path}: expected a site's settings there, got no file; write it with 'fedcmr-client init'")
    try:
        node = read_settings(path, SiteSettings)
    except UserError as error:
        raise UserError(f"{error}. {REMEDY}") from None
    try:
        if "vendor" in node and "vendors" not in node and "nominal_patients" in node:
            # A file of a version that knew one vendor a site.
            node["vendors"] = {node.pop("vendor"): node["nominal_patients"]}
        if (
            OmegaConf.select(node, "policy.evaluation") is False
        ):  # what YAML reads where the quotes of "off" are missing
            node["policy"]["evaluation"] = "off"
        if "ledger_witness" in node:
            if "ledger_replica" in node:
                raise UserError("Expected ledger_replica once, got it as ledger_witness too.")
            node["ledger_replica"] = node.pop("ledger_witness")
            _warn_renamed(path)
        check_keys(node, SiteSettings, no_keys=("folder",))
        if isinstance(node.get("vendors"), DictConfig):
            node["vendors"] = {known_vendor(str(name)): number for name, number in node["vendors"].items()}
        merged = OmegaConf.merge(OmegaConf.structured(SiteSettings), node)
        settings = cast(SiteSettings, OmegaConf.to_object(merged))
    except UserError as error:
        raise UserError(f"{path}: {error} {REMEDY}") from None
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]} {REMEDY}") from None
    return replace(settings, folder=path.resolve().parent)


@functools.cache
def _warn_renamed(path: Path) -> None:
    """Warn once per process and file, which every request reads again."""
    text = f"{path}: ledger_witness is now ledger_replica; the old name will go in 0.3"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def write_site(folder: Path, settings: SiteSettings) -> Path:
    """Write a commented `site.yaml` into `folder`; one that is there already stays as it is.

    Returns:
        The file's path.

    Raises:
        UserError: The folder has a `site.yaml` with other settings.
    """
    path = Path(folder) / SITE_FILE
    if path.exists():
        if load_site(path) != replace(settings, folder=path.resolve().parent):
            raise UserError(f"{path}: expected no file or the same settings, got others; edit it or remove it")
        return path
    values = asdict(settings)
    policy = {key: json.dumps(value) for key, value in values.pop("policy").items()}
    keys = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items() if key != "folder"}
    private_folder(path.parent)
    write_atomically(path, TEMPLATE.format(**keys, policy=policy, known_vendors=", ".join(VENDORS)).encode())
    return path


def refusal(
    policy: SitePolicy,
    mechanism: Mechanism,
    *,
    num_patients: int,
    server_round: int = 1,
    num_views: int = 1,
) -> str | None:
    """The code with which a site refuses a request; None where its policy allows it.

    Less noise or a larger clip than the site allows is refused, never replaced by the site's own value: the server has
    planned the study's noise and rounds for what it requested, and would take the answer for something that it is not.
    A delta above the cap is refused too, before anything is spent: a study planned for it would run out of this site's
    budget half-way. Where the request is the stricter one, it is what counts: the budget is computed at its delta.

    What the budget has left is the ledger's to say ("budget-exhausted"), how long the work takes
    `fedcmr.client.request_time.estimated_seconds`' and `fedcmr.client.evaluation.expected_seconds`' ("time-above-cap").

    Args:
        policy: The site's own.
        mechanism: What the request would charge, and how.
        num_patients: Patients that the request could use; for gradients, who is drawn whole in a slice. This code is
            the one thing that depends on the patients and is not covered by the guarantee: it says which side of
            `min_patients` they are on, before the study starts.
        server_round: Round of the run, from 1. A server can give a run a new name, so what binds in the end is the cap
            on epsilon.
        num_views: Views of a patient in one step.
    """
    if num_patients < policy.min_patients:
        return "too-few-patients"
    if mechanism.num_steps > policy.max_local_steps:
        return "steps-above-cap"
    if num_views > policy.max_views:
        return "views-above-cap"
    if not mechanism.private:
        return None if policy.allow_without_privacy else "privacy-off-not-allowed"
    if not mechanism.noise_multiplier >= policy.min_noise_multiplier:
        return "noise-below-minimum"
    if mechanism.noise_multiplier > policy.max_noise_multiplier:
        return "noise-above-cap"
    if mechanism.sample_rate < policy.min_sample_rate:
        return "sample-rate-below-minimum"
    if not mechanism.target_delta <= policy.max_delta:
        return "delta-above-cap"
    if not mechanism.max_grad_norm <= policy.max_grad_norm:
        return "clip-above-cap"
    if policy.max_rounds is not None and server_round > policy.max_rounds:
        return "rounds-exhausted"
    return None
