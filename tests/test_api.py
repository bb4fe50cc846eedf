"""`import fedcmr` as a user's script has it: nothing is guarded, and no folder but the user's own is there."""

import io
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.cli.build import build_fab_from_disk

import fedcmr
from fedcmr.client.code_hash import IMPORT_NAME
from fedcmr.shared.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import fedcmr

print("the script begins")
study = fedcmr.simulate(
    out="run",
    prior={prior!r},
    hospitals={{"vendors": ["Siemens", "GE"], "num_train": 4, "num_test": 2}},
    federation={{"num_rounds": 2, "num_views": 2, "num_processes": 2}},
    synthesis={{"num_cases": 6, "num_steps": 1, "vendor_shares": {{"Siemens": 2, "GE": 1}}}},
    regression={{"num_steps": 2, "batch_size": 4, "num_tta": 1}},
    evaluation={{"baselines": [], "num_bootstrap": 100}},
)
assert study.report["privacy"]["epsilon"] <= 8 and len(study.cases) == 6
print("the script ends")
"""


def run(code: str, folder: Path, *, as_script: bool = False) -> "subprocess.CompletedProcess[str]":
    """A program in a folder, as a file there or as `python -c`, with two processors as far as it can tell."""
    (folder / "script.py").write_text(code)
    command = [sys.executable, *(["script.py"] if as_script else ["-c", code])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_prior):
    """The study of an unguarded script."""
    folder = tmp_path_factory.mktemp("script")
    done = run(SCRIPT.format(prior=str(tiny_prior)), folder, as_script=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert (done.stdout.count("the script begins"), done.stdout.count("the script ends")) == (1, 1), "it ran once"
    assert "Traceback" not in done.stderr and "report.html" in done.stdout
    from fedcmr.simulations.api import Study  # here: other tests look at what an import loads

    return Study(folder / "run")


def test_an_unguarded_script_runs_a_study_once(study):
    assert study.report["synthetic"]["per_vendor"] == {"GE": 2, "Siemens": 4}
    assert [case.info.vendor for case in study.cases].count("Siemens") == 4
    assert set(study.generator.styles) == {"Siemens", "GE"}
    assert study.report == json.loads((study.path / "report.json").read_text())


def test_a_finished_study_is_only_read(study, tiny_prior, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in study.path.rglob("*") if path.name != ".lock"}
    done = run(SCRIPT.format(prior=str(tiny_prior)), study.path.parent)  # and as `python -c`
    assert done.returncode == 0, done.stderr[-5000:]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_cases_are_read_from_a_path_or_its_text(study):
    for folder in (study.path / "synthetic", str(study.path / "synthetic")):
        cases = fedcmr.load_cases(folder)
        assert [case.info.pseudonym for case in cases] == [case.info.pseudonym for case in study.cases]
    with pytest.raises(UserError, match=r"cases\.csv"):
        fedcmr.load_cases(study.path)


def test_new_cases_have_the_vendor_and_the_ejection_fractions_that_were_requested(study):
    cases = fedcmr.synthesize(study, number=3, vendor="GE", ef=(0.2, 0.3), seed=5, device="cpu")
    assert [case.info.vendor for case in cases] == ["GE"] * 3
    assert all(0.15 < case.info.ef < 0.35 for case in cases)
    again = fedcmr.synthesize(str(study.path), number=3, vendor="GE", ef=(0.2, 0.3), seed=5, device="cpu")
    for first, second in zip(cases, again, strict=True):
        np.testing.assert_array_equal(first.frames, second.frames)
        assert first.frames.shape == (2, 6, 64, 64)
    assert {case.info.vendor for case in fedcmr.synthesize(study, number=2, device="cpu")} == {"GE", "Siemens"}


def test_the_readme_opens_the_data_as_it_says(study, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "default").symlink_to(study.path)
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(lines, names)  # noqa: S102 - the lines of our own README
    assert "(2, 6, 64, 64)" in capsys.readouterr().out
    assert isinstance(names["more"], list) and len(names["more"]) == 20


def test_the_public_prior_is_of_no_vendor():
    (case,) = fedcmr.synthesize(number=1, ef=(0.6, 0.6), device="cpu")
    assert case.info.vendor == "unknown" and case.info.ef == pytest.approx(0.6, abs=0.05)
    with pytest.raises(UserError, match="no vendor"):
        fedcmr.synthesize(number=1, vendor="GE")


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"vendor": "Canon"}, UserError, "Canon"),
        ({"number": 0}, ValueError, "number=0"),
        ({"ef": (0.5, 0.4)}, ValueError, "0.5, 0.4"),
        ({"ef": (0.0, 0.4)}, ValueError, "0.08"),
    ],
)
def test_what_cannot_be_made_is_said(study, arguments, error, named):
    with pytest.raises(error, match=named):
        fedcmr.synthesize(study, **arguments)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"config": "nowhere"}, "nowhere"),
        ({"privcy": {"enabled": False}}, "privcy"),
        ({"privacy": {"target_epsilon": 0}}, "privacy.target_epsilon"),
        ({"data_root": torch.zeros(1)}, "data_root"),
    ],
)
def test_a_wrong_setting_is_an_exception_of_one_line(overrides, named, tmp_path):
    with pytest.raises(UserError, match=named) as error:
        fedcmr.simulate(out=tmp_path / "run", **overrides)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_import_loads_no_library_and_names_what_there_is(tmp_path):
    code = (
        "import sys, fedcmr\n"
        "assert not {'torch', 'numpy', 'flwr', 'fedcmr.shared'} & set(sys.modules)\n"
        "assert {'load_cases', 'simulate', 'synthesize'} <= set(dir(fedcmr))\n"
        "fedcmr.load_cases\n"
        "assert 'torch' not in sys.modules, 'who only reads cases does not wait for it'\n"
        "from fedcmr import *\n"
        "assert not hasattr(fedcmr, 'rehearse') and simulate is fedcmr.simulate"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_bundle_at_a_site_has_no_study_and_its_packages_are_found(tmp_path):
    """Flower's bundle holds `fedcmr/__init__.py` with `client`, `server` and `shared` next to it."""
    (tmp_path / "fedcmr").mkdir()
    (tmp_path / IMPORT_NAME).write_bytes((ROOT / IMPORT_NAME).read_bytes())
    for name in ("client", "server", "shared"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("HERE = True")
    code = (
        "import fedcmr\nfrom fedcmr import client, server, shared\n"
        "assert client.HERE and server.HERE and shared.HERE\n"
        "try:\n    fedcmr.simulate\nexcept ImportError:\n    print('none')"
    )
    done = run(code, tmp_path)
    assert done.stdout == "none\n", done.stderr


def test_flower_finds_one_app_while_it_still_imports_the_other(tmp_path):
    """Its simulation does both at once, in two threads; the package's first import is held here for a second."""
    components = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    bundle = str(tmp_path / "bundle")
    zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))).extractall(bundle)
    code = f"""
import threading, time
from importlib.machinery import SourceFileLoader
from flwr.supercore.object_ref import load_app, validate

get_code, begun = SourceFileLoader.get_code, threading.Event()

def get_code_late(self, name):
    if name == "fedcmr":
        begun.set()
        time.sleep(1)
    return get_code(self, name)

SourceFileLoader.get_code = get_code_late
found = {{}}
def load(part, reference):
    found[part] = type(load_app(reference, ValueError, {bundle!r})).__name__
other = threading.Thread(target=load, args=("server", {components["serverapp"]!r}))
other.start()
begun.wait()
print(validate({components["clientapp"]!r}, project_dir={bundle!r}))
other.join()
load("client", {components["clientapp"]!r})
print(found)
"""
    done = run(code, tmp_path)
    expected = "(True, None)\n{'server': 'ServerApp', 'client': 'ClientApp'}\n"
    assert done.stdout == expected, done.stdout + done.stderr
