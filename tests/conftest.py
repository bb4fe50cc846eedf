"""Invented data for the tests: a small random prior, and the folders of a small study."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcmr.client.policy import SitePolicy, SiteSettings, write_site
from fedcmr.server.run_folder import RunFolder, load_run
from fedcmr.server.settings import dump, load
from fedcmr.shared.case import Case, CaseInfo, save_case, write_index
from fedcmr.shared.models.flow_matching import FlowMatching
from fedcmr.shared.models.networks.unet import Architecture
from fedcmr.shared.models.prior import Prior, load_prior, save_prior
from fedcmr.shared.style import STYLE_NAMES
from tests import tools

NOMINAL_PATIENTS = 5
VENDORS = {"a": "Siemens", "b": "Philips", "c": "GE"}
LONGEST = (
    "test_survives",
    "test_simulate",
    "test_deployed_study",
    "test_full_disks",
    "test_membership",
    "test_kill",
    "test_flower_engine",
    "test_scale",
    "test_canaries",
    "test_grid",
    "test_utility",
)
"""Files of tests that take minutes."""

for guessed in ("COLUMNS", "LINES"):  # which readline leaves to the processes that share the files out
    os.environ.pop(guessed, None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose programs are missing; fail it where they are required."""
    missing = tools.packages(tuple(program for mark in item.iter_markers("tool") for program in mark.args))
    if missing:
        told = f"missing Debian package: {', '.join(missing)}"
        if os.environ.get(tools.REQUIRED):
            pytest.fail(f"{told} ({tools.REQUIRED} is set)", pytrace=False)
        pytest.skip(told)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that processes that share the files out among them end at about the same time."""
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny_prior(tmp_path_factory) -> Path:
    """The file of a random generator small enough for one CPU thread."""
    path = tmp_path_factory.mktemp("prior") / "tiny.safetensors"
    torch.manual_seed(0)
    generator = FlowMatching(Architecture(channels=(16, 16, 16), norm_num_groups=4))
    for parameter in generator.parameters():
        if parameter.dim() > 1 and not parameter.any():  # layers that MONAI starts at zero pass no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    num = len(STYLE_NAMES)
    save_prior(path, generator, torch.zeros(num), torch.full((num,), 0.5), torch.eye(num), {"made_by": "a test"})
    return path


@pytest.fixture
def prior(tiny_prior) -> Prior:
    """The tiny prior, read afresh."""
    return load_prior(tiny_prior)


def make_case(pseudonym: str, vendor: str, seed: int, num_slices: int = 3) -> Case:
    """A disc in a ring next to another, contracting, on noise; its ejection fraction is no more than a number."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96] - 48.0
    radius = np.hypot(y, x)
    masks = np.zeros((2, num_slices, 96, 96), np.uint8)
    for phase, cavity in enumerate((14 + rng.uniform(-2, 2), 9 + rng.uniform(-2, 2))):
        masks[phase][:, np.hypot(y, x + 22) < 12] = 1
        masks[phase][:, radius < cavity + 6] = 2
        masks[phase][:, radius < cavity] = 3
    frames = np.array([0.2, 0.8, 0.3, 0.9])[masks] * rng.uniform(0.7, 1.0) + rng.normal(0, 0.05, masks.shape)
    info = CaseInfo(pseudonym, vendor, 1.5, float(rng.uniform(0.2, 0.7)), pseudonym)
    return Case(info, frames.clip(0, 1).astype(np.float32), masks, np.array([10, 1.5, 1.5], np.float32))


@pytest.fixture(name="write_cases", scope="session")
def write_cases_fixture():
    """`write_cases(folder, vendor, count, seed, prefix)`: a folder of cases as `fedcmr-client prepare` leaves it."""
    return write_cases


def write_cases(folder: Path, vendor: str, count: int, seed: int, prefix: str = "p") -> None:
    cases = [make_case(f"{prefix}{index:02d}", vendor, seed * 100 + index) for index in range(count)]
    for case in cases:
        save_case(folder, case)
    write_index(folder, [case.info for case in cases])


@pytest.fixture
def make_study(tmp_path, tiny_prior):
    """Builds a run folder with three sites: `make_study(*overrides, num_patients=..., **policy)`."""

    def make(*overrides: str, num_patients: int = NOMINAL_PATIENTS, **policy: object) -> RunFolder:
        run_path = tmp_path / "run"
        run_path.mkdir()
        federation = ["federation.num_rounds=3", "federation.num_views=2", "federation.num_processes=1"]
        config = load("default", [f"prior={tiny_prior}", "device=cpu", *federation, *overrides])
        (run_path / "config.yaml").write_text(dump(config))
        study = {
            "sites": {
                name: {"vendors": {v: NOMINAL_PATIENTS}, "nominal_patients": NOMINAL_PATIENTS}
                for name, v in VENDORS.items()
            }
        }
        (run_path / "study.json").write_text(json.dumps(study))
        for seed, (name, vendor) in enumerate(VENDORS.items()):
            folder = run_path / "sites" / name
            write_cases(folder / "train", vendor, num_patients, seed)
            settings = SiteSettings(
                name, {vendor: NOMINAL_PATIENTS}, NOMINAL_PATIENTS, prior=str(tiny_prior), policy=SitePolicy(**policy)
            )
            write_site(folder, settings)
        return load_run(run_path)

    return make


@pytest.fixture
def tiny_evaluations(monkeypatch):
    """Evaluations at the sites with a network small enough for a test, and without their waits."""
    from tests.tiny_regressor import make_evaluations_quick, make_tiny  # here: MONAI takes seconds to load

    make_tiny(monkeypatch)
    make_evaluations_quick(monkeypatch)


def give_test_patients(run: RunFolder, policies: dict[str, str]) -> None:
    """Twelve test patients to each site, of other names than its training patients', and its policy."""
    for seed, (name, policy) in enumerate(policies.items(), start=70):
        folder = run.path / "sites" / name
        write_cases(folder / "test", VENDORS[name], 12, seed, prefix="t")
        text = (folder / "site.yaml").read_text().replace("test: null", 'test: "test"')
        (folder / "site.yaml").write_text(text.replace('evaluation: "private"', f'evaluation: "{policy}"'))


PAGE = 4096
"""A small file takes one on tmpfs."""


@pytest.fixture
def small_disk():
    """`small_disk(folder, num_pages)` makes a disk there; skips where none can be mounted."""
    mounted = []

    def make(folder: Path, num_pages: int = 64) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_pages * PAGE}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root and the right to mount (CAP_SYS_ADMIN)")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def fill():
    """`fill(disk, num_pages)` leaves so many pages free on a small disk; None frees what it had taken."""

    def leave(disk: Path, num_pages: int | None) -> None:
        filler = disk / "filler"
        filler.unlink(missing_ok=True)
        if num_pages is not None:
            filler.write_bytes(bytes(PAGE * (shutil.disk_usage(disk).free // PAGE - num_pages)))
            assert shutil.disk_usage(disk).free == num_pages * PAGE

    return leave
