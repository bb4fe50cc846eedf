"""Writes the tables of results into README.md and docs/results.md, from the figures in docs/results/*.json.

    .venv/bin/python docs/tables.py

`utility_CONFIG.json` is what `python -m fedcmr.simulations.benchmarks.utility --json` writes: a new measurement
replaces the file as it is. Files that say `copied_by_hand` hold printed figures whose JSON nobody had kept.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGES = (DOCS.parent / "README.md", DOCS / "results.md")
REGION = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

TEST_SETS = {"acdc": "real, ACDC", "hospitals": "simulated"}
MAIN, POOLED, PRIOR = "synthetic_only", "pooled_real", "prior_only"
MODELS = {
    MAIN: "**synthetic hearts only**",
    POOLED: "pooled real scans, no privacy",
    PRIOR: "public prior only, no site",
}
DISTANCES = ("motion_mm", "heart_mm", "ventricle_mm")
SEGMENTED = {"acdc3": "ACDC, Siemens", "siemens-test": "M&Ms, Siemens", "philips-test": "M&Ms, Philips"}
TUNED = {"acdc": "ACDC A and B (20 each)", "vendors": "M&Ms Siemens and Philips (45 each)"}
ONE_VENDOR = {"acdc": ["all"], "hospitals": ["GE", "Philips", "Siemens", "all"]}


def figures(name: str) -> dict[str, Any]:
    """One file of `docs/results/`."""
    return dict(json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8")))


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def score_rows() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Test set, vendor, model and score of every row, by test set, vendor and model."""
    for config in ("acdc", "default"):
        for test_set, of_set in figures(f"utility_{config}")["test_sets"].items():
            for vendor in ONE_VENDOR[test_set]:
                for model, scores in of_set["rows"].items():
                    out = model.removeprefix("without_").partition("-")[2]
                    if vendor in scores and (model in MODELS or out == vendor.lower()):
                        yield test_set, vendor, model, scores[vendor]


def name_of(model: str, vendor: str) -> str:
    """A row's name for a reader."""
    return MODELS.get(model, f"synthetic hearts only, without the {vendor} hospital")


def patients(test_set: str, vendor: str, score: dict[str, Any]) -> str:
    """A row's test patients for a reader."""
    which = "" if test_set == "acdc" else f", {vendor}"
    return f"{TEST_SETS[test_set]}{which} ({score['n_patients']})"


def interval(score: dict[str, Any], name: str, digits: int) -> str:
    """A figure with its 95 % interval."""
    low, high = score["ci95"][name]
    return f"{score[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def spread(score: dict[str, Any]) -> str:
    """Standard deviation of the seeds' mean absolute errors; a dash for one seed."""
    if "sd_of_seeds_points" in score:
        return f"{score['sd_of_seeds_points']:.1f}"
    maes = score["per_seed"]["mae_points"]
    return f"{statistics.stdev(maes):.1f}" if len(maes) > 1 else "-"


def utility() -> str:
    """Every row of the utility benchmark."""
    return markdown(
        ["test patients", "trained on", "r² (95 %)", "MSE", "MAE, EF points (95 %)", "SD", "bias"],
        [
            [
                patients(test_set, vendor, score),
                name_of(model, vendor),
                interval(score, "r2", 2),
                f"{score['mse']:.4f}",
                interval(score, "mae_points", 1),
                spread(score),
                f"{score['bias_points']:.1f}",
            ]
            for test_set, vendor, model, score in score_rows()
        ],
    )


def headline() -> str:
    """The rows that the README shows: over all vendors, and the vendor whose hospital matters most."""
    return markdown(
        ["test patients", "the ResNet50 was trained on", "mean error, EF points (95 %)", "r²"],
        [
            [
                patients(test_set, vendor, score),
                name_of(model, vendor),
                interval(score, "mae_points", 1),
                f"{score['r2']:.2f}",
            ]
            for test_set, vendor, model, score in score_rows()
            if vendor == "all" or (vendor == "GE" and model not in (POOLED, PRIOR))
        ],
    )


def cross_vendor() -> str:
    """Trained on some vendors, tested on each."""
    cells = figures("cross_vendor_default")["mae_points"]
    vendors = ("GE", "Philips", "Siemens")
    heading = ["trained on"]
    for kind in ("synthetic", "real"):
        heading += [f"{kind}: {vendors[0]}", *vendors[1:], "all (95 %)"]
    rows = []
    for name in cells["synthetic"]:
        row = [name]
        for kind in ("synthetic", "real"):
            of_kind = cells[kind][name]
            low, high = of_kind["ci95"]
            row += [
                *(f"{of_kind[vendor]:.1f}" for vendor in vendors),
                f"{of_kind['all']:.1f} ({low:.1f} to {high:.1f})",
            ]
        rows.append(row)
    return markdown(heading, rows)


def stages() -> str:
    """Seconds of the default study's stages."""
    seconds = figures("stages_default")["seconds"]
    return markdown(["stage, default study", "seconds"], [[name, str(value)] for name, value in seconds.items()])


def contours() -> str:
    """What is found without masks, per vendor."""
    rows = []
    for name, row in figures("contours")["rows"].items():
        distance = [row[key] and "{median:.1f} ({p95:.1f}, {max:.1f})".format(**row[key]) for key in DISTANCES]
        codes = dict(row["contours"])
        sure, to_check = codes.pop("kept", 0), codes.pop("auto-to-check", 0)
        shares = [f"{100 * number / row['n_patients']:.0f} %" for number in (sure, to_check, sum(codes.values()))]
        errors = [row[key] for key in ("ef_mae_points", "ef_bias_points", "ef_mae_points_sure")]
        figures_of = ["-" if value is None else f"{value:.1f}" for value in errors]
        rows.append([f"{name} ({row['n_patients']})", *(text or "-" for text in distance), *shares, *figures_of])
    heading = ["patients", "motion, mm: median (95th percentile, max)", "crop, mm", "ventricle, mm"]
    return markdown([*heading, "kept", "to look at", "left out", "EF MAE", "bias", "EF MAE, kept alone"], rows)


def segmentation() -> str:
    """Segmenters by what they were trained on, against real patients."""
    heading = ["test patients", "trained on", "Dice LV", "myocardium", "RV", "mean (95 %)", "LV at ED", "EF MAE"]
    return markdown(heading, sorted(segmentation_rows("segmentation_sources"), key=lambda row: row[0]))


def segmentation_then_real() -> str:
    """Small segmenters of the same number of real steps, with and without synthetic hearts before them."""
    rows = []
    for row in figures("segmentation_then_real")["rows"]:
        for test_set, scores in row["test"].items():
            low, high = (100 * bound for bound in scores["difference_ci95"])
            is_first = row["name"] == "real pooled"
            change = "-" if is_first else f"{100 * scores['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
            patients = f"{SEGMENTED[test_set]} ({scores['n_patients']})"
            rows.append(
                [patients, row["name"], f"{scores['dice']['mean']:.3f}", change, f"{scores['ef_mae_points']:.1f}"]
            )
    heading = ["test patients", "trained on", "mean Dice", "points over real pooled (95 %)", "EF MAE"]
    return markdown(heading, sorted(rows, key=lambda row: row[0]))


def segmentation_losses() -> str:
    """Small segmenters by their loss, each patient tested by one that has not seen it."""
    rows = []
    for row in figures("segmentation_losses")["rows"]:
        scores = row["test"]["held out"]
        dice, (low, high) = scores["dice"], (100 * bound for bound in scores["difference_ci95"])
        change = f"{100 * scores['difference']:+.1f} ({low:+.1f} to {high:+.1f})" if rows else "-"
        values = [f"{dice[name]:.3f}" for name in ("lv", "myo", "rv", "mean")]
        distance = scores["hd95_mm"]["lv"]
        rows.append([row["name"], *values, change, "-" if distance is None else f"{distance:.1f}"])
    heading = ["loss", "Dice LV", "myocardium", "RV", "mean", "points over the first (95 %)", "HD95 LV, mm"]
    return markdown(heading, rows)


def segmentation_networks() -> str:
    """Segmenters by their network, trained on the same real patients."""
    facts = {
        row["name"]: [f"{row['parameters']:,}", "-" if row["minutes"] is None else f"{row['minutes']:.0f}"]
        for row in figures("segmentation_networks")["rows"]
    }
    rows = [[*row[:2], *facts[row[1]], *row[2:]] for row in segmentation_rows("segmentation_networks")]
    heading = ["test patients", "network", "parameters", "minutes", "Dice LV", "myocardium", "RV", "mean (95 %)"]
    return markdown([*heading, "LV at ED", "EF MAE"], sorted(rows, key=lambda row: row[0]))


def segmentation_rows(name: str) -> list[list[str]]:
    """Test patients, row and scores of every row of a comparison of segmenters."""
    rows = []
    for row in figures(name)["rows"]:
        for test_set, scores in row["test"].items():
            dice, (low, high) = scores["dice"], scores["ci95"]["dice"]["mean"]
            rows.append(
                [
                    f"{SEGMENTED[test_set]} ({scores['n_patients']})",
                    row["name"],
                    *(f"{dice[name]:.3f}" for name in ("lv", "myo", "rv")),
                    f"{dice['mean']:.3f} ({low:.3f} to {high:.3f})",
                    f"{scores['lv_dice_at_ed']:.3f}",
                    "-" if scores["ef_mae_points"] is None else f"{scores['ef_mae_points']:.1f}",
                ]
            )
    return rows


def federated_segmenter() -> str:
    """What the sites' rounds bring to the public segmenter, by hospitals and test patients."""
    rows = []
    for name, hospitals in TUNED.items():
        facts = figures(f"federated_segmenter_{name}")
        for test_set, label in SEGMENTED.items():
            for row in facts["rows"]:
                scores = row["test"][test_set]
                dice, difference = scores["dice"], scores["difference"]
                low, high = difference["ci95"]
                is_public = "epsilon" not in row
                change = f"{difference['difference_points']:+.1f} ({low:+.1f} to {high:+.1f})"
                values = [f"{dice[part]:.3f}" for part in ("lv", "myo", "rv", "mean")]
                patients = f"{label} ({scores['n_patients']})"
                rows.append([hospitals, patients, row["name"], *values, "-" if is_public else change])
    heading = ["hospitals", "test patients", "segmenter", "Dice LV", "myocardium", "RV", "mean", "points (95 %)"]
    return markdown(heading, rows)


def shapes() -> str:
    """How far drawn hearts are from held-out patients, with and without the released shapes."""
    rows = figures("shapes")["rows"]
    names = list(next(iter(rows.values())))
    cells = [[vendor, *(f"{of_vendor[name]['mean']:.2f}" for name in names)] for vendor, of_vendor in rows.items()]
    return markdown(["vendor", *names], cells)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "utility": utility,
    "cross_vendor": cross_vendor,
    "stages": stages,
    "contours": contours,
    "segmentation": segmentation,
    "segmentation_then_real": segmentation_then_real,
    "segmentation_losses": segmentation_losses,
    "segmentation_networks": segmentation_networks,
    "federated_segmenter": federated_segmenter,
    "shapes": shapes,
}


def with_tables(page: str) -> str:
    """A page with its tables made anew."""
    return REGION.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
