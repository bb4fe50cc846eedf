"""The notebook runs from an empty folder to its end, and shows what it shows in the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def outputs(path: Path) -> list[list[tuple[str, ...]]]:
    """Of each code cell, the kinds of its outputs."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return [[(one["output_type"], *one.get("data", {})) for one in cell["outputs"]] for cell in cells]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    place = tmp_path / "empty"
    place.mkdir()
    copy = Path(shutil.copy(NOTEBOOK, tmp_path))
    command = [sys.executable, str(ROOT / "docs" / "run_notebook.py"), str(copy)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert outputs(copy) == outputs(NOTEBOOK), "run docs/run_notebook.py on it again"
    assert [path.name for path in place.iterdir()] == ["study"]


def test_the_notebook_in_the_repository_has_outputs_and_no_path_of_a_machine():
    assert sum(map(bool, outputs(NOTEBOOK))) >= 5
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 400_000 and not re.search(r'[ "\'(]/(work|home|tmp|root|Users|usr|opt)/', text)
