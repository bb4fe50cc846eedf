"""The page with every section, opened in a real browser: nothing is fetched, nothing fails, nothing sticks out."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedcmr.server.report.build import build_report
from tests.browser import chromium
from tests.server.report.report_study import full_study

ROOT = Path(__file__).resolve().parents[3]
DARK = "--blink-settings=preferredColorScheme=0"
PAPER = {"light": "rgb(250, 249, 246)", "dark": "rgb(18, 20, 22)"}
NUM_IMAGES = 1 + 2 + 2 * 4 + 6 + 1 + 6 + 6 + 6 + 3 + 1 + 1
"""Errors, heat maps, two plots of three vendors and a small test set, cases, calibration, contours, samples, maps,
large ones, requests, curves."""

pytestmark = [pytest.mark.engine, pytest.mark.tool("chromium")]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    build_report(*full_study(), folder)
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_every_image_and_nothing_overflows(page, tmp_path, width, scheme):
    """The page stays as it is, in a frame of that width; the page around the frame takes the measurements.

    Every fold is opened. A plot may stick out of no card, and a table only where it can be scrolled.
    """
    text = json.dumps(page.read_text()).replace("</", "<\\/")
    (tmp_path / "probe.html").write_text(f"""<iframe style="border:0;width:{width}px;height:900px"></iframe><script>
        const frame = document.querySelector("iframe");
        frame.srcdoc = {text};
        frame.onload = () => {{
            const shown = frame.contentDocument, page = shown.documentElement, images = [...shown.images];
            shown.querySelectorAll("details").forEach(fold => fold.open = true);
            const right = element => element.getBoundingClientRect().right;
            const facts = document.body.dataset;
            facts.images = images.length;
            facts.decoded = images.filter(p => p.complete && p.naturalWidth).length;
            facts.tiny = images.filter(p => p.clientWidth < 90).length;
            facts.outside = images.filter(p => right(p) > right(p.parentElement) + 1).length;
            facts.overflow = page.scrollWidth - page.clientWidth;
            facts.width = page.clientWidth;
            facts.paper = frame.contentWindow.getComputedStyle(shown.body).backgroundColor;
        }};</script>""")
    shown = chromium(
        tmp_path / "profile", "--dump-dom", *([DARK] if scheme == "dark" else []), (tmp_path / "probe.html").as_uri()
    )
    facts = dict(re.findall(r'data-(\w+)="([^"]*)"', shown.stdout.split("<iframe")[0]))
    assert facts == {
        "images": str(NUM_IMAGES),
        "decoded": str(NUM_IMAGES),
        "tiny": "0",
        "outside": "0",
        "overflow": "0",
        "width": str(width),
        "paper": PAPER[scheme],
    }
    assert "CONSOLE" not in shown.stderr


@pytest.mark.tool("pdftotext")
def test_it_prints(page, tmp_path):
    """What is folded away on the screen is printed, and no column of the widest table is cut off."""
    printed = tmp_path / "report.pdf"
    chromium(tmp_path / "profile", "--no-pdf-header-footer", f"--print-to-pdf={printed}", page.as_uri())
    assert printed.read_bytes().startswith(b"%PDF")
    text = subprocess.run(["pdftotext", "-layout", printed, "-"], capture_output=True, text=True, check=True).stdout
    assert "target_epsilon: 8.0" in text and "all but Philips" in text
    report = json.loads((page.parent / "report.json").read_text())
    assert f"{report['regression']['hospitals']['GE']['mse']:.4f}" in text


def test_a_bundle_of_code_alone_finds_the_templates_in_the_installed_package(tmp_path):
    """Flower's bundle holds the .py files only and comes first on the path; the templates lie behind it."""
    bundle = tmp_path / "bundle"
    sources = [path for package in ("server", "shared") for path in (ROOT / package).rglob("*.py")]
    for source in (ROOT / "fedcmr" / "__init__.py", *sources):
        target = bundle / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    program = (
        f"import sys; sys.path[:0] = [{str(bundle)!r}, {str(ROOT)!r}]\n"
        "from pathlib import Path\n"
        "import fedcmr.server.report.build as build\n"
        "from tests.server.report.report_study import full_study\n"
        f"build.build_report(*full_study(), Path({str(tmp_path / 'run')!r}))\n"
        "print(build.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == str(bundle / "server" / "report" / "build.py")
    assert "Patient by patient" in (tmp_path / "run" / "report.html").read_text()
