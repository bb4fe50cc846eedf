import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from server.evaluation import score, table
from server.report.build import Answers, ReportInputs, as_json, build_report, groups_of, headline
from server.report.models import model_name, model_rank
from server.report.overlays import overlay_rows
from server.report.pictures import Extreme, Row, SampleSheet
from server.saliency import Look, score_looks

VENDORS = ["GE", "Philips", "Siemens"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def study(simulated: bool = True) -> tuple[dict, ReportInputs]:
    rng = np.random.default_rng(0)
    vendors = [vendor for vendor in VENDORS for _ in range(15)]
    true = rng.uniform(0.12, 0.75, 45)
    requested = rng.uniform(0.08, 0.8, 200)
    measured = requested + rng.normal(0, 0.03, 200)
    answers = {
        "synthetic_only": 0.06 + 0.9 * true + rng.normal(0, 0.06, 45),
        "prior_only": 0.2 + 0.6 * true + rng.normal(0, 0.09, 45),
        "predict_the_mean": np.full(45, 0.44),
    }
    scores = {model: {"hospitals": table(true, predicted, vendors, 300, 0)} for model, predicted in answers.items()}
    report = {
        "study": "runs/default <1>",
        "simulated": simulated,
        "privacy": {
            "unit": "one patient at one site, added or removed",
            "accountant": "prv",
            "delta": 0.001,
            "epsilon": 7.964,
            "sites": {f"{v.lower()}-site": {"epsilon": 7.9 + i / 50, "steps": 11, "refused": i}
                      for i, v in enumerate(VENDORS)},
        },
        "regression": scores.pop("synthetic_only"),
        "baselines": scores,
        "synthetic": {"n_cases": 201, "per_vendor": dict.fromkeys(VENDORS, 67),
                      "requested_ef": [*requested.tolist(), 0.5], "mask_ef": [*requested.tolist(), 0.5],
                      "measured_ef": [*measured.tolist(), None], "agreement": score(requested, measured, 300, 0)},
        "timing": {
            "seconds_per_stage": {"hospitals": 61.2, "prepare": 20.0, "federation": 130.5, "synthesis": 95.0,
                                  "regressor": 171.0, "prior_only": 266.0},
            "seconds_per_round": [20.0, 22.5],
            "bytes_per_site_and_round": {"up": 3412, "down": 4410},
        },
        "settings": "seed: 0\nprivacy:\n  target_epsilon: 8.0\n",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }  # fmt: skip
    grid = np.hypot(*np.mgrid[-32:32, -32:32])

    def pictures(shade: float) -> np.ndarray:
        discs = [[np.where(grid < radius, 0.9, shade) for radius in (14 + i, 9 + i)] for i in range(5)]
        return np.array(discs) + rng.normal(0, 0.05, (5, 2, 64, 64))

    def mapped(pair: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return pair, np.exp(-((grid / 9) ** 2)), (np.stack([grid, grid + 3]) < 20).astype(np.uint8)

    steps = list(range(20, 901, 20))
    efs = [0.2, 0.3, 0.4, 0.5, 0.6]
    looks = {
        kind: [Look(vendor, ef, 0.7 + ef / 10, 0.33, *mapped(pictures(0.3)[0])) for vendor in VENDORS for ef in efs]
        for kind in ("synthetic", "hospitals")
    }
    report["saliency"] = score_looks(looks, 300, 0)
    inputs = ReportInputs(
        predictions={model: {"hospitals": Answers(vendors, true, predicted)} for model, predicted in answers.items()},
        samples={vendor: SampleSheet(Row(pictures(0.3), efs), Row(pictures(0.35), efs)) for vendor in VENDORS},
        best=[Extreme(vendor, 0.52, 0.53, pictures(0.3)[:3]) for vendor in VENDORS],
        worst=[Extreme(vendor, 0.61, 0.33, pictures(0.3)[:3]) for vendor in VENDORS],
        curves={model: (steps, [0.1 * np.exp(-step / tau) + 0.004 for step in steps])
                for model, tau in (("synthetic_only", 200), ("prior_only", 260))},
        show_real=True,
        saliency=overlay_rows(looks, show_real=True),
    )  # fmt: skip
    return report, inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    build_report(*study(), folder)
    return folder


def test_json_reads_back_and_holds_no_nan(folder):
    report, _ = study()
    assert json.loads((folder / "report.json").read_text()) == report
    odd = {"a": float("nan"), "b": [np.float32(0.5), float("inf")], "c": np.arange(2), "d": (1, None, "x")}
    assert as_json(odd) == {"a": None, "b": [0.5, None], "c": [0, 1], "d": [1, None, "x"]}
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]


def test_page_is_one_file_without_network_or_script(folder):
    page = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<script" not in page and "@import" not in page and not re.search(r"url\(", page)


def test_every_picture_has_a_text_in_its_place(folder):
    images = re.findall(r"<img [^>]*>", (folder / "report.html").read_text())
    assert len(images) == 1 + 3 + 6 + 6 + 6 + 1 + 1
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)


def test_names_from_outside_are_escaped(folder):
    page = (folder / "report.html").read_text()
    assert "runs/default &lt;1&gt;" in page and "<1>" not in page


def test_page_tells_figures_of_the_json(folder):
    report, _ = study()
    page = (folder / "report.html").read_text()
    overall = report["regression"]["hospitals"]["all"]
    assert f"by {overall['mae_points']:.1f} points on average" in page
    for vendor in VENDORS:
        assert f"{report['regression']['hospitals'][vendor]['mae_points']:.1f}" in page
    assert "7.94" in page and "undefined" in page


def test_real_pictures_appear_only_when_they_may(tmp_path):
    report, inputs = study(simulated=False)
    build_report(report, ReportInputs(**{**inputs.__dict__, "show_real": False}), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall("data:image/png", page)) == 3 + 3
    assert "Real pictures are left out" in page and "best and worst cases are left out" in page
    assert "45 real patients" in page


def test_best_and_worst_cases_stand_with_both_ejection_fractions(folder):
    page = (folder / "report.html").read_text()
    captions = re.findall(r"<figcaption>(\w+)<br>true (\d+)\u00a0%, predicted (\d+)\u00a0%", page)
    assert captions == [(v, "52", "53") for v in VENDORS] + [(v, "61", "33") for v in VENDORS]


def test_page_tells_how_far_the_pictures_are_from_what_was_asked_for(folder):
    report, _ = study()
    agreement = report["synthetic"]["agreement"]
    page = (folder / "report.html").read_text()
    assert f"by {agreement['mae_points']:.1f} points" in page
    assert re.search(rf"r\s+is {agreement['r']:.3f}", page)
    assert "In 1 of 201 cases it found no left ventricle" in page


@pytest.mark.parametrize(
    ("measured", "words"),
    [(None, "Nobody has measured"), ([None] * 201, "In none of the synthetic pictures")],
    ids=["older-run", "nothing-found"],
)
def test_where_no_ef_was_measured_the_page_says_so(tmp_path, measured, words):
    report, inputs = study()
    agreement = score([], [], 300, 0) if measured else None
    synthetic = {**report["synthetic"], "measured_ef": measured, "agreement": agreement}
    build_report({**report, "synthetic": synthetic}, inputs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert words in page and "measured against the requested" not in page


def test_models_have_plain_names_and_a_readers_order():
    keys = ["without_1-ge", "predict_the_mean", "epsilon_10", "epsilon_3", "local_only_2-philips", "prior_only",
            "federated_without_privacy", "pooled_real", "synthetic_only", "epsilon_0.5", "something_new"]  # fmt: skip
    assert [model_name(key) for key in sorted(keys, key=model_rank)] == [
        "synthetic hearts only", "real scans, pooled", "sites, without privacy", "prior alone, no site",
        "sites, epsilon 0.5", "sites, epsilon 3", "sites, epsilon 10", "site 2-philips alone", "without site 1-ge",
        "something new", "guess the mean",
    ]  # fmt: skip


def test_models_that_a_study_has_several_of_are_in_the_table_and_not_in_the_figure(tmp_path):
    report, inputs = study()
    several = {f"{family}{name}": report["baselines"]["prior_only"]
               for family in ("without_", "local_only_", "epsilon_") for name in ("1", "2", "3")}  # fmt: skip
    build_report({**report, "baselines": report["baselines"] | several}, inputs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    figure = base64.b64decode(re.search(r'svg\+xml;base64,([^"]+)', page)[1]).decode()
    for name in ("without site 2", "site 3 alone", "sites, epsilon 1"):
        assert f'<th scope="row">{name}</th>' in page and name not in figure
    assert "prior alone, no site" in figure and "Only in the table: sites, epsilon 1," in page


def test_headline_says_so_when_there_is_no_result():
    report, _ = study()
    assert "45 simulated patients" in headline(report)
    assert "has no result" in headline({**report, "regression": {}})
    one = {"acdc": table([0.5], [0.6], ["Siemens"], 100, 0)}
    assert "1 simulated patient by 10.0 points" in headline({**report, "regression": one})


def test_groups_put_the_main_model_first_and_do_not_repeat_a_single_vendor():
    report, _ = study()
    groups = groups_of(report)
    assert list(groups) == [*VENDORS, "all vendors"]
    assert list(groups["GE"]) == ["synthetic hearts only", "prior alone, no site", "guess the mean"]
    single = {"acdc": table([0.5, 0.3], [0.6, 0.4], ["Siemens"] * 2, 100, 0)}
    assert list(groups_of({**report, "regression": single, "baselines": {}})) == ["Siemens"]


def test_page_of_a_run_without_results_or_privacy(tmp_path):
    report, _ = study()
    synthetic = {"n_cases": 0, "per_vendor": {}, "requested_ef": None, "mask_ef": None, "measured_ef": None,
                 "agreement": None}  # fmt: skip
    empty = {**report, "regression": {}, "baselines": {}, "synthetic": synthetic,
             "privacy": {"unit": "one patient", "accountant": None, "delta": 0.001, "epsilon": None,
                         "sites": {"A": {"epsilon": None, "steps": 3, "refused": 0}}}}  # fmt: skip
    build_report(empty, ReportInputs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "has no result" in page and "None was guaranteed" in page


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_every_picture_and_nothing_overflows(folder, tmp_path, width):
    """The page stays as it is, in a frame of that width; the page around the frame asks the questions."""
    page = json.dumps((folder / "report.html").read_text()).replace("</", "<\\/")
    (tmp_path / "probe.html").write_text(f"""<iframe style="border:0;width:{width}px;height:900px"></iframe><script>
        const frame = document.querySelector("iframe");
        frame.srcdoc = {page};
        frame.onload = () => {{
            const shown = frame.contentDocument, page = shown.documentElement, pictures = [...shown.images];
            document.body.dataset.decoded = pictures.filter(p => p.complete && p.naturalWidth).length;
            document.body.dataset.overflow = page.scrollWidth - page.clientWidth;
            document.body.dataset.width = page.clientWidth;
        }};</script>""")
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--hide-scrollbars", "--dump-dom",
         (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert 'data-decoded="24"' in shown.stdout
    assert 'data-overflow="0"' in shown.stdout and f'data-width="{width}"' in shown.stdout
    assert "CONSOLE" not in shown.stderr
