"""The documents against the code: links lead somewhere, tables are those of the figures, examples run as they stand."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.prepare import prepare
from fedcmr.server.cli import main
from fedcmr.server.dataset.writer import cavity_ml
from fedcmr.server.tasks.registry import TASKS
from fedcmr.shared.case import ED, load_cases
from fedcmr.shared.models.base import Condition, Sampler
from fedcmr.shared.models.kinds import KINDS, make
from fedcmr.shared.models.networks.unet import Architecture
from fedcmr.shared.style import STYLE_NAMES
from tests.conftest import make_case

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def load(path: Path) -> ModuleType:
    """A Python file that is no part of the package."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"
    named = re.findall(r"`((?:\.\./|docs/)?[\w/-]+\.md)`", text)
    if page.name == "CHANGELOG.md":
        return  # it names what there was
    for name in set(named) - {"regressor.md", "model.md"}:  # these are written by commands
        assert (page.parent / name).is_file(), f"{page.name} names {name}"


def test_the_tables_are_those_of_the_figures():
    tables = load(ROOT / "docs" / "tables.py")
    shown = [name for page in tables.PAGES for name in re.findall(r"<!-- table (\w+) -->", page.read_text())]
    assert sorted(shown) == sorted(tables.TABLES)
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.with_tables(text) == text, "run: .venv/bin/python docs/tables.py"
    assert tables.headline().count("\n") <= 2 + 8, "the README shows eight rows at most"


def test_the_figure_is_small():
    path = ROOT / "docs" / "hearts.png"
    assert path.stat().st_size < 150_000
    with Image.open(path) as image:
        assert image.width >= 600 and not image.text, "no metadata"


def test_the_readme_is_short():
    text = re.sub(
        r"```.*?```|^\|.*?$", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    assert len(text.split()) <= 800


def write_nifti(path: Path, stack: np.ndarray) -> None:
    """A stack (Z, H, W) with 10 mm between slices, axial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(stack.T, np.diag([-1.5, -1.5, 10.0, 1.0])), path)


def test_the_example_of_a_layout_reads_scans(tmp_path, monkeypatch):
    (source,) = [code for code in examples(ROOT / "docs" / "extending.md") if "Layout(" in code]
    (tmp_path / "export_layout.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))  # children of `prepare` import it by its name
    module = importlib.import_module("export_layout")
    monkeypatch.setitem(LAYOUTS, "export", module.EXPORT)
    for number in range(2):
        case = make_case(f"p{number}", "Philips", number, num_slices=6)
        swapped = np.array([0, 3, 2, 1], np.uint8)[case.masks]  # the export counts from the left ventricle
        for phase, name in enumerate(("ed", "es")):
            write_nifti(tmp_path / "scans" / f"patient{number}" / f"{name}.nii.gz", 1000 * case.frames[phase])
            write_nifti(tmp_path / "scans" / f"patient{number}" / f"{name}_mask.nii.gz", swapped[phase])
    summary = prepare(tmp_path / "scans", tmp_path / "cases", "export")
    assert (summary.num_cases, summary.refused, summary.provenance.kind) == (2, {}, "private")
    for case in load_cases(tmp_path / "cases"):
        assert case.info.vendor == "Philips" and 0 < case.info.ef < 1
        assert set(np.unique(case.masks)) == {0, 1, 2, 3}
    sys.modules.pop("export_layout")


def test_the_example_of_a_model_trains_and_samples(monkeypatch):
    (source,) = [code for code in examples(ROOT / "docs" / "extending.md") if "(GenerativeModel)" in code]
    names: dict[str, Any] = {}
    exec(source, names)  # noqa: S102 - the lines of our own document
    monkeypatch.setitem(KINDS, "image_prediction", names["ImagePrediction"])
    model = make("image_prediction", Architecture(channels=(16, 16, 16), norm_num_groups=4))
    rng = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 4, (3, 2, 32, 32), dtype=torch.uint8, generator=rng)
    condition = Condition(masks, torch.randn(3, len(STYLE_NAMES), generator=rng))
    images = torch.full((3, 2, 32, 32), 0.5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = model.loss(images, condition, rng)
        assert loss.shape == (3,), "privacy clips per patient"
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(float(loss.detach().mean()))
    assert losses[-1] < losses[0] / 3
    sampled = model.sample(condition, Sampler(num_steps=4), rng)
    assert sampled.shape == images.shape and float((sampled - images).abs().mean()) < 0.3


def test_the_example_of_a_task_is_trained_and_evaluated_by_the_commands(tmp_path, monkeypatch, write_cases, capsys):
    (source,) = [code for code in examples(ROOT / "docs" / "extending.md") if "(Task[" in code]
    names: dict[str, Any] = {}
    exec(source, names)  # noqa: S102 - the lines of our own document
    monkeypatch.setitem(TASKS, "volume", names["Volume"]())
    write_cases(tmp_path / "train", "GE", 12, seed=1)
    write_cases(tmp_path / "test", "GE", 6, seed=2)
    model = tmp_path / "volume.safetensors"

    def server(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fedcmr-server", *map(str, arguments)])
        assert main() == 0
        return capsys.readouterr().out

    server("train", "--task", "volume", "--data", tmp_path / "train", "--out", model)
    assert "MAE, ml" in server("evaluate", "--model", model, "--test", tmp_path / "test")
    figures = json.loads(server("evaluate", "--model", model, "--test", tmp_path / "test", "--json"))
    found = figures["volume"][str(tmp_path / "test")]["all"]
    volumes = [cavity_ml(case, ED) for case in load_cases(tmp_path / "test")]
    guess = np.abs(np.array(volumes) - np.mean(volumes)).mean()
    assert found["n_patients"] == 6 and found["mae_ml"] < guess / 2, "it has learnt more than the mean"
