"""What `import fedcmr` offers to a script or a notebook besides `load_cases`: a whole study and new synthetic cases."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedcmr.server.generation.synthesis import EF_RANGE, SharedGenerator, synthesize_requested
from fedcmr.server.run_folder import load_run
from fedcmr.server.settings import Config, load
from fedcmr.server.study import Study as RunOfStudy
from fedcmr.shared.case import UNKNOWN, Case, known_vendor, load_cases
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import Prior, load_prior
from fedcmr.simulations import run as study
from fedcmr.simulations.config import default_folder, load_study
from fedcmr.simulations.summary import print_summary


@dataclass(frozen=True)
class Study:
    """A finished study; everything is read from its folder when it is first used.

    Attributes:
        path: The run folder. `docs/commands.md` names the files in it.
    """

    path: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        """The figures of `report.json`: `regression`, `baselines`, `privacy`, `synthetic` and the rest."""
        return dict(json.loads((self.path / "report.json").read_text(encoding="utf-8")))

    @cached_property
    def cases(self) -> list[Case]:
        """The synthetic data set, in the order of its `cases.csv`."""
        return load_cases(self.path / "synthetic")

    @property
    def generator(self) -> SharedGenerator:
        """What the sites added to the public prior: tensors by name, and each vendor's style statistics."""
        return self._run.shared

    @property
    def prior(self) -> Prior:
        """The public prior that the study began with."""
        return self._run.prior

    @property
    def config(self) -> Config:
        """The study's settings."""
        return self._run.config

    @cached_property
    def _run(self) -> RunOfStudy:
        """The study as the server knows it."""
        return RunOfStudy(load_run(self.path))


def simulate(config: str | Path = "smoke", out: str | Path | None = None, **overrides: Any) -> Study:
    """Run a whole study on this machine, or resume it: hospitals, private training, synthetic data set, report.

    The same as the command `fedcmr-simulate`, progress and summary included. It needs no `if __name__ == "__main__"`.

    Args:
        config: A name under `configs/` ("smoke", two minutes; "default", twenty minutes; "acdc") or a YAML file's path.
        out: The run folder; `runs/CONFIG` where None. A finished study of the same settings is only read.
        overrides: Keys of `configs/default.yaml`, a section as a dictionary: `seed=1`,
            `privacy={"target_epsilon": 3.0}`.

    Returns:
        The finished study.

    Raises:
        UserError: A setting is unknown or out of range, the folder belongs to other settings or cannot be written, or
            too few sites could take part. The message is one line with the remedy.
    """
    settings = load_study(config, [f"{key}={_as_yaml(key, value)}" for key, value in overrides.items()])
    run = study.simulate(settings, Path(out) if out is not None else default_folder(config))
    print_summary(run)
    return Study(run.path)


def synthesize(
    study: Study | str | Path | None = None,
    *,
    number: int = 10,
    vendor: str | None = None,
    ef: tuple[float, float] = EF_RANGE,
    seed: int = 0,
    device: str = "auto",
) -> list[Case]:
    """Sample new labelled cases. This costs no privacy: what is made from a private generator is covered by its claim.

    Args:
        study: A finished study or the path of its run folder; None samples the public prior only, no site's scanner.
        number: How many cases.
        vendor: One of the study's vendors; None takes all of them in turn. The public prior knows no vendor.
        ef: Lowest and highest ejection fraction that is requested, in [0.08, 0.80]; the cases spread evenly over it in
            random order. `info.ef` is measured on the masks and differs a little.
        seed: Seed of shapes, styles and noise: equal arguments give equal cases.
        device: "auto", "cpu" or "cuda".

    Returns:
        The cases: frames and masks (2, Z, 64, 64) on the generator's grid, see `fedcmr.shared.case.Case`.

    Raises:
        UserError: The study is not finished, or it has not learnt the vendor.
        ValueError: The number, the range or the device is none.
    """
    low, high = ef
    if number < 1 or not EF_RANGE[0] <= low <= high <= EF_RANGE[1]:
        raise ValueError(f"Expected number >= 1 and an ef within {EF_RANGE}, the lower first, got {number=} {ef=}.")
    if study is None:
        if vendor is not None:
            raise UserError(f"the public prior knows no vendor, got {vendor!r}: give a study, or vendor=None")
        prior, generator, config, vendors = load_prior(None), None, load("default"), [UNKNOWN]
    else:
        study = study if isinstance(study, Study) else Study(Path(study))
        config, prior, generator = study.config, study.prior, study.generator
        vendors = sorted(generator.styles) if vendor is None else [known_vendor(vendor)]
        if not set(vendors) <= set(generator.styles):
            raise UserError(f"{study.path} has not learnt {vendor!r}: expected one of {sorted(generator.styles)}")
    names = [vendors[index % len(vendors)] for index in range(number)]
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    efs = low + (high - low) * (order + 0.5) / number
    return synthesize_requested(prior, generator, config.synthesis, names, efs.tolist(), seed, device)


def _as_yaml(key: str, value: Any) -> str:
    """A value as an override on the command line has it; JSON is YAML."""
    try:
        return json.dumps(os.fspath(value) if isinstance(value, os.PathLike) else value)
    except (TypeError, ValueError):
        raise UserError(f"{key}: expected a number, text, list or dictionary, got {type(value).__name__}") from None
