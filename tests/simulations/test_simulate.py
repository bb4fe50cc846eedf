"""The main job through its command: a small study from simulated scans to the report, interrupted and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedcmr.server.run_folder import load_run
from fedcmr.shared import checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(sys.executable).parent / "fedcmr-simulate"
REAL_ACDC = ROOT.parent / "shared" / "real" / "acdc"
NOMINAL = ("hospitals.nominal_patients=6",)
SMALL = (
    "hospitals.num_train=4",
    "hospitals.num_test=2",
    "federation.num_views=2",
    "synthesis.num_cases=6",
    "synthesis.num_steps=1",
    "regression.num_steps=2",
    "regression.batch_size=4",
    "regression.num_tta=1",
)


def start(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(COMMAND), *map(str, arguments)],
        env=environment,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(*arguments: object, cwd: Path | None = None) -> tuple[int, str, str]:
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_prior) -> Path:
    """A run folder after `--until prepare`; copied by the tests that go on with it."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    code, _, err = run("--config", "smoke", "--out", folder, "--until", "prepare", f"prior={tiny_prior}", *SMALL)
    assert code == 0, err
    return folder


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def test_a_study_survives_an_interruption_and_ends_with_its_report(folder, tiny_prior):
    arguments = ("--config", "smoke", "--out", folder, f"prior={tiny_prior}", *SMALL)
    process = start(*arguments)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints" / "round_0001.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    started_with = checkpoint.load(folder / "checkpoints" / "round_0001.safetensors")[1]["run_id"]

    code, out, err = run(*arguments)
    assert code == 0, err
    assert "report.html" in out + err

    report = json.loads((folder / "report.json").read_text())
    assert set(report["privacy"]["sites"]) == {"1-siemens", "2-philips", "3-ge"}
    _, metadata = checkpoint.load(folder / "generator.safetensors")
    assert metadata["run_id"] == started_with, "the resumed run is the same run: no site is charged twice for a round"
    assert [line["round"] for line in load_run(folder).rounds()] == [1, 2, 3]

    assert report["privacy"]["epsilon"] == pytest.approx(independent_epsilon(metadata, 1e-3), rel=0.01)
    assert report["privacy"]["epsilon"] <= 8
    for site in ("1-siemens", "2-philips", "3-ge"):
        budget = subprocess.run(
            [COMMAND.with_name("fedcmr-client"), "budget", folder / "sites" / site, "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(budget.stdout)["epsilon"] == pytest.approx(report["privacy"]["epsilon"], rel=1e-6)

    scores = report["regression"]["hospitals"]
    assert set(scores) == {"others", "all"}, "two test patients of a vendor are too few for a cell of their own"
    assert scores["all"]["n_patients"] == 6
    assert set(report["baselines"]) == {"predict_the_mean", "prior_only"}
    assert report["synthetic"]["per_vendor"] == {"GE": 2, "Philips": 2, "Siemens": 2}
    card = (folder / "regressor.md").read_text()
    assert "6 patients: 2 GE, 2 Philips, 2 Siemens." in card and "| hospitals | others | 6 |" in card
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    code, _, err = run(*arguments)
    assert code == 0, err
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before, "a finished study is left alone"


def independent_epsilon(metadata: dict, delta: float) -> float:
    """Epsilon of the releases really made, by Google's accountant."""
    dp_accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import PLDAccountant

    worst = 0.0
    for site in metadata["sites"].values():
        accountant = PLDAccountant()
        for entry in site["releases"]:
            release = entry["release"]
            gaussian = dp_accounting.GaussianDpEvent(release["noise_multiplier"])
            event = dp_accounting.PoissonSampledDpEvent(release["sample_rate"], gaussian)
            accountant.compose(event, release["num_steps"])
        worst = max(worst, accountant.get_epsilon(delta))
    return worst


def test_without_privacy_equal_runs_give_equal_weights(folder, tiny_prior, tmp_path):
    """Also the regressor's: everything but the privacy noise follows from the seed."""
    results = []
    for name in ("one", "two"):
        out = tmp_path / name
        code, _, err = run(
            "--config",
            "smoke",
            "--out",
            out,
            f"prior={tiny_prior}",
            *SMALL,
            "privacy.enabled=false",
            "evaluation.baselines=[]",
            "hospitals.source=prepared",
            *NOMINAL,
            f"data_root={as_data_root(folder, tmp_path)}",
            "hospitals.vendors=[Siemens]",
        )
        assert code == 0, err
        results.append([checkpoint.load(out / f"{file}.safetensors")[0] for file in ("generator", "regressor")])
        assert json.loads((out / "report.json").read_text())["privacy"]["epsilon"] is None
    for first, second in zip(*results, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert (value == second[key]).all(), key


def as_data_root(folder: Path, tmp_path: Path) -> Path:
    """The prepared cases as a user's own: SITE/train and SITE/test."""
    root = tmp_path / "data"
    for site in (folder / "sites").iterdir():
        for part, source in (("train", site / "train"), ("test", folder / "test" / "hospitals" / site.name)):
            if not (root / site.name / part).exists():
                shutil.copytree(source, root / site.name / part)
    return root


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config", "nowhere"], "nowhere"),
        (["--config", "smoke", "privacy.target_epsilon=0"], "privacy.target_epsilon"),
        (["--config", "smoke", "privcy.enabled=false"], "privcy"),
        (["--config", "acdc"], "data_root"),
        (["--config", "acdc", "data_root=nowhere"], "nowhere"),
        (["--config", "smoke", "prior=nowhere.safetensors"], "nowhere.safetensors"),
        (["--config", "smoke", "--out", "/proc/run"], "/proc/run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, tmp_path, tiny_prior):
    prior = [] if any("prior=" in argument for argument in arguments) else [f"prior={tiny_prior}"]
    code, out, err = run(*arguments, *prior, cwd=tmp_path)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and named in errors[0]
    assert "Traceback" not in out + err


def test_a_folder_of_another_config_is_left_as_it_is(folder, tiny_prior):
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())
    code, _, err = run("--config", "smoke", "--out", folder, f"prior={tiny_prior}", *SMALL, "seed=1")
    assert code == 2 and "seed: 0" in err and "seed: 1" in err
    assert before == sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["empty", "no_usable_patient"])
def test_a_site_without_a_usable_patient_is_named(kind, folder, tmp_path, tiny_prior):
    root = as_data_root(folder, tmp_path)
    if kind == "empty":
        (root / "2-philips" / "train" / "cases.csv").write_text("pseudonym,vendor,field_strength_t,ef,group\n")
    else:
        for case in (root / "2-philips" / "train" / "cases").iterdir():
            case.write_bytes(b"not a case")
    code, _, err = run(
        "--config",
        "smoke",
        "--out",
        tmp_path / "out",
        f"prior={tiny_prior}",
        *SMALL,
        "hospitals.source=prepared",
        *NOMINAL,
        f"data_root={root}",
        "privacy.enabled=true",
    )
    assert code == 2 and "2-philips" in err, "before any site is asked"
    assert "Traceback" not in err


def test_baselines_that_look_at_the_sites_cases_are_studies_of_their_own(folder, tmp_path, tiny_prior):
    code, _, err = run(
        "--config",
        "smoke",
        "--out",
        tmp_path / "out",
        f"prior={tiny_prior}",
        *SMALL,
        "federation.num_rounds=2",
        "hospitals.source=prepared",
        *NOMINAL,
        f"data_root={as_data_root(folder, tmp_path)}",
        "evaluation.baselines=[federated_without_privacy,local_only]",
    )
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    sites = ("1-siemens", "2-philips", "3-ge")
    assert set(report["baselines"]) == {"federated_without_privacy", *(f"local_only_{site}" for site in sites)}
    nested = tmp_path / "out" / "baselines"
    plain = checkpoint.load(nested / "federated_without_privacy" / "generator.safetensors")[1]
    assert set(plain["sites"]) == set(sites) and plain["private"] is False
    alone = checkpoint.load(nested / "local_only_2-philips" / "generator.safetensors")[1]
    assert set(alone["sites"]) == {"2-philips"} and alone["private"] is True
    assert set(report["privacy"]["sites"]) == set(sites) and report["privacy"]["epsilon"] <= 8


@pytest.mark.real
@pytest.mark.skipif(not REAL_ACDC.is_dir(), reason="the real ACDC scans are not here")
def test_real_hospitals_take_the_same_path(tmp_path, tiny_prior):
    code, _, err = run(
        "--config",
        "acdc",
        "--out",
        tmp_path / "run",
        f"data_root={REAL_ACDC}",
        f"prior={tiny_prior}",
        *SMALL[2:],
        "federation.num_rounds=2",
        "federation.local_steps=1",
        "evaluation.num_bootstrap=200",
    )
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["regression"]["acdc"]["all"]["n_patients"] == 20
    assert set(report["baselines"]) == {"predict_the_mean", "prior_only", "pooled_real"}
    assert set(report["privacy"]["sites"]) == {"A", "B"} and report["privacy"]["epsilon"] <= 8
