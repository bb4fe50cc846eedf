"""The check's page: whole, for itself, without names, readable in a browser of any width."""

import json
import re
import shutil

import numpy as np
import pydicom
import pytest

from fedcmr.client.check.contact_sheet import CaseImage
from fedcmr.client.check.folder import check
from fedcmr.client.check.html_report import SHEET_SIZE, headline, render_html
from fedcmr.client.check.report import CheckedCase, CheckReport
from fedcmr.client.cli import main
from fedcmr.client.ingest.reasons import REASONS
from fedcmr.simulations.hospital import write_hospital
from tests.browser import chromium

CANARY = "ZZCANARY"


def image(seed: int = 0) -> CaseImage:
    """A real JPEG of noise, the worst that compression can meet."""
    from fedcmr.client.check.contact_sheet import _jpeg

    sheet = np.random.default_rng(seed).integers(0, 255, (96, 194), dtype=np.uint8)
    return CaseImage(_jpeg(sheet), {"lv": "M20 20l10 0 0 10-10 0Z", "rv": "M60 60l10 0 0 10Z"}, 4, 194, 96)


def report_of(num_cases: int, num_flagged: int = 2, one_image: bool = True) -> CheckReport:
    shown, vendors = image(), ("GE", "Siemens", "unknown")
    cases = [
        CheckedCase(
            f"p{i:04d}",
            f"g{i:04d}",
            vendors[i % 3],
            1.5,
            (i % 97) / 97,
            8,
            10.0,
            25,
            0,
            9,
            "drawn",
            ("few-slices", "burned-in-suspected") if i < num_flagged else (),
            None,
            shown if one_image else image(i),
        )
        for i in range(num_cases)
    ]
    cases.append(CheckedCase("bad", "bad", "GE", None, None, trouble="case-unreadable"))
    refused = {code: i + 1 for i, code in enumerate(REASONS)}
    return CheckReport(tuple(cases), refused, {"not-dicom": 3}, {"unused-row": 2})


def test_the_report_holds_every_case_and_every_reason_with_its_number_and_meaning():
    report = report_of(150)
    page = render_html(report)
    assert re.findall(r"<h3>(\w+)<", page) == ["bad", *(f"p{i:04d}" for i in range(150))], "the odd ones first"
    text = page.replace("&#39;", "'")
    for code, number in report.refused.items():
        assert f'<th scope="row">{code}</th><td class="number">{number}</td><td>{REASONS[code]}</td>' in text
    assert page.count("<img ") == 150 and page.count(">no image<") == 1
    assert page.count("<details") == 3 and page.count("<details open") == 1
    assert f"Cases {SHEET_SIZE + 1} to {2 * SHEET_SIZE}" in page and "Cases 121 to 148" in page
    assert "This report stays at the site" in page


def test_the_report_is_one_file_without_network_or_script():
    page = render_html(report_of(3))
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<script" not in page and "@import" not in page and not re.search(r"url\(|\son\w+=", page)
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in re.findall(r"<img [^>]*>", page))


def test_a_report_of_five_hundred_noisy_cases_can_still_be_mailed_around_the_hospital():
    assert len(render_html(report_of(500, one_image=False))) < 10e6


def test_beyond_a_limit_the_flagged_cases_keep_their_images(monkeypatch):
    monkeypatch.setattr("fedcmr.client.check.html_report.MAX_IMAGES", 5)
    page = render_html(report_of(20, num_flagged=3))
    assert page.count("<img ") == 4 and page.count("image left out") == 16
    for name in ("p0000", "p0001", "p0002"):
        assert f'alt="Case {name}:' in page


def test_codes_from_a_foreign_file_are_escaped():
    page = render_html(CheckReport((), {"<img src=x>": 1}, {}, {}))
    assert "<img" not in page and "&lt;img src=x&gt;" in page


def test_headline_counts_what_can_be_used():
    report = report_of(9)
    assert headline(report) == "9 of 10 cases can be trained on; look at 2 of them first."
    assert headline(CheckReport(report.cases[3:4], {}, {}, {})) == "1 case of 1 patient can be trained on."
    assert "2 studies refused" in headline(CheckReport((), {"uneven-phases": 2}, {}, {}))


@pytest.mark.slow
def test_what_the_scans_call_the_patient_is_in_neither_page_nor_json(tmp_path, capsys):
    """Names planted in folders, files and headers, of a study that becomes a case and of one that is refused."""
    write_hospital(tmp_path / "plain", "GE", 2, 6, 12, 0, "x")
    source = tmp_path / f"{CANARY}-export"
    for number, study in enumerate(sorted((tmp_path / "plain").iterdir())):
        folder = source / f"{CANARY} {study.name}"
        folder.mkdir(parents=True)
        shutil.copy(study / "masks.nii.gz", folder)
        for index, path in enumerate(sorted(study.rglob("*.dcm"))):
            image = pydicom.dcmread(path)
            image.BurnedInAnnotation = "YES" if number == 1 else "NO"  # the second study is refused for it
            image.PatientName = image.StudyDescription = image.InstitutionName = image.SeriesDescription = CANARY
            image.PatientID = f"{CANARY}{number}"
            image.add_new((0x0009, 0x0010), "LO", CANARY)
            image.save_as(folder / f"{CANARY}{index:04d}.dcm")
    out = tmp_path / "out"
    assert main(["prepare", "--format", "dicom", str(source), str(out), "--num-processes", "1"]) == 0
    capsys.readouterr()
    assert main(["check", str(out)]) == 0
    printed = capsys.readouterr()
    page = (out / "check.html").read_text()
    assert page.count('class="case"') == 1 and "studies refused" in page
    for text in (page, (out / "check.json").read_text(), printed.out, printed.err):
        assert CANARY.lower() not in text.lower()
    report = check(out)
    assert (report.num_phases, report.num_slices) == ((12, 12), (6, 6))
    assert report.refused == {"burned-in-annotation": 1}


@pytest.mark.engine
@pytest.mark.tool("chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_chromium_shows_every_image_and_nothing_overflows(tmp_path, width):
    """The page stays as it is, in a frame of that width; the page around the frame asks the questions."""
    page = json.dumps(render_html(report_of(70))).replace("</", "<\\/")
    (tmp_path / "probe.html").write_text(f"""<iframe style="border:0;width:{width}px;height:900px"></iframe><script>
        const frame = document.querySelector("iframe");
        frame.srcdoc = {page};
        frame.onload = async () => {{
            const shown = frame.contentDocument, page = shown.documentElement, images = [...shown.images];
            for (const part of shown.querySelectorAll("details")) part.open = true;
            for (const image of images) image.loading = "eager";
            await Promise.all(images.map(image => image.decode()));
            document.body.dataset.decoded = images.filter(p => p.complete && p.naturalWidth).length;
            document.body.dataset.overflow = page.scrollWidth - page.clientWidth;
            document.body.dataset.width = page.clientWidth;
            const box = shown.querySelector("#contours"), lines = shown.querySelector(".contours");
            document.body.dataset.before = frame.contentWindow.getComputedStyle(lines).display;
            box.click();
            document.body.dataset.after = frame.contentWindow.getComputedStyle(lines).display;
        }};</script>""")
    shown = chromium(
        tmp_path / "profile", "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "probe.html").as_uri()
    )
    body = re.search(r"<body[^>]*>", shown.stdout)[0]
    assert 'data-decoded="70"' in body and 'data-overflow="0"' in body and f'data-width="{width}"' in body, body
    assert 'data-before="block"' in body and 'data-after="none"' in body, body
    assert "CONSOLE" not in shown.stderr
