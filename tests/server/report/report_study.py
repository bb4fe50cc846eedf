"""An invented study for the tests of the report: three vendors' hospitals, and the same with every section."""

import numpy as np

from fedcmr.server.evaluation.fidelity.anatomy import QUANTITIES
from fedcmr.server.evaluation.fidelity.measure import TOO_FEW
from fedcmr.server.evaluation.score import score
from fedcmr.server.evaluation.tables import paired_table, table
from fedcmr.server.federation.participation import participation
from fedcmr.server.report.build import ReportInputs, SetPredictions
from fedcmr.server.report.contours import OutlinedPatient
from fedcmr.server.report.images import Extreme, Row, SampleSheet
from fedcmr.server.report.overlays import overlay_rows
from fedcmr.server.tasks.ejection_fraction.saliency import Attribution, score_attributions
from fedcmr.server.tasks.segmentation.scores import score_values
from fedcmr.shared.provenance import PRIVATE_REAL, SIMULATED_SCANS, public

VENDORS = ["GE", "Philips", "Siemens"]


def bare_report(simulated: bool) -> dict:
    """A report without figures, for the tests of one section."""
    return {
        "study": "s",
        "simulated": simulated,
        "regression": {},
        "baselines": {},
        "settings": "seed: 0\n",
        "versions": {},
        "privacy": {"unit": "one patient", "accountant": "prv", "delta": 1e-3, "epsilon": 7.9, "sites": {}},
        "synthetic": {"n_cases": 0, "per_vendor": {}, "requested_ef": None, "measured_ef": None, "agreement": None},
        "timing": {"seconds_per_stage": {}, "seconds_per_round": [], "bytes_per_site_and_round": {"up": 1, "down": 1}},
        "provenance": {
            "sites": {},
            "test_sets": {"acdc": public("ACDC").as_json()},
            **participation([], []),
            "styles_of_the_prior": [],
        },
    }


def study(simulated: bool = True) -> tuple[dict, ReportInputs]:
    """A report with its default baselines, and its images."""
    rng = np.random.default_rng(0)
    vendors = [vendor for vendor in VENDORS for _ in range(15)]
    true = rng.uniform(0.12, 0.75, 45)
    requested = rng.uniform(0.08, 0.8, 200)
    measured = requested + rng.normal(0, 0.03, 200)
    predictions = {
        "synthetic_only": 0.06 + 0.9 * true + rng.normal(0, 0.06, 45),
        "prior_only": 0.2 + 0.6 * true + rng.normal(0, 0.09, 45),
        "predict_the_mean": np.full(45, 0.44),
    }
    scores = {model: {"hospitals": table(true, predicted, vendors, 300, 0)} for model, predicted in predictions.items()}
    report = {
        "study": "runs/default <1>",
        "simulated": simulated,
        "provenance": {
            "sites": {f"{v.lower()}-site": (SIMULATED_SCANS if simulated else PRIVATE_REAL).as_json() for v in VENDORS},
            "test_sets": {"hospitals": (SIMULATED_SCANS if simulated else PRIVATE_REAL).as_json()},
            **participation(
                [{"answered": [f"{v.lower()}-site" for v in VENDORS], "refused": {}, "dropped": {}}] * 6,
                [f"{v.lower()}-site" for v in VENDORS],
            ),
            "styles_of_the_prior": [],
        },
        "privacy": {
            "unit": "one patient at one site, added or removed",
            "accountant": "prv",
            "delta": 0.001,
            "epsilon": 7.964,
            "sites": {
                f"{v.lower()}-site": {"epsilon": 7.9 + i / 50, "steps": 11, "refused": i} for i, v in enumerate(VENDORS)
            },
        },
        "regression": scores.pop("synthetic_only"),
        "baselines": scores,
        "synthetic": {
            "n_cases": 201,
            "per_vendor": dict.fromkeys(VENDORS, 67),
            "requested_ef": [*requested.tolist(), 0.5],
            "mask_ef": [*requested.tolist(), 0.5],
            "measured_ef": [*measured.tolist(), None],
            "agreement": score(requested, measured, 300, 0),
        },
        "timing": {
            "seconds_per_stage": {
                "hospitals": 61.2,
                "prepare": 20.0,
                "federation": 130.5,
                "synthesis": 95.0,
                "regressor": 171.0,
                "prior_only": 266.0,
            },
            "seconds_per_round": [20.0, 22.5],
            "bytes_per_site_and_round": {"up": 3412, "down": 4410},
        },
        "settings": "seed: 0\nprivacy:\n  target_epsilon: 8.0\n",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    grid = np.hypot(*np.mgrid[-32:32, -32:32])

    def images(shade: float) -> np.ndarray:
        discs = [[np.where(grid < radius, 0.9, shade) for radius in (14 + i, 9 + i)] for i in range(5)]
        return np.array(discs) + rng.normal(0, 0.05, (5, 2, 64, 64))

    def mapped(pair: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return pair, np.exp(-((grid / 9) ** 2)), (np.stack([grid, grid + 3]) < 20).astype(np.uint8)

    steps = list(range(20, 901, 20))
    efs = [0.2, 0.3, 0.4, 0.5, 0.6]
    attributions = {
        kind: [
            Attribution(vendor, ef, 0.7 + ef / 10, 0.33, *mapped(images(0.3)[0])) for vendor in VENDORS for ef in efs
        ]
        for kind in ("synthetic", "hospitals")
    }
    report["saliency"] = score_attributions(attributions, 300, 0)
    inputs = ReportInputs(
        predictions={
            model: {"hospitals": SetPredictions(vendors, true, predicted)} for model, predicted in predictions.items()
        },
        samples={vendor: SampleSheet(Row(images(0.3), efs), Row(images(0.35), efs)) for vendor in VENDORS},
        best=[Extreme(vendor, 0.52, 0.53, images(0.3)[:3]) for vendor in VENDORS],
        worst=[Extreme(vendor, 0.61, 0.33, images(0.3)[:3]) for vendor in VENDORS],
        curves={
            model: (steps, [0.1 * np.exp(-step / tau) + 0.004 for step in steps])
            for model, tau in (("synthetic_only", 200), ("prior_only", 260))
        },
        shown=["hospitals"],
        saliency=overlay_rows(attributions, ["hospitals"]),
    )
    return report, inputs


def fidelity_block() -> dict:
    """What `fedcmr.server.experiments.fidelity` publishes of two vendors, with a third that has too few patients."""
    distances = {"frd": 31.4, "kid": -0.02, "precision": 0.81, "recall": 0.6}
    hearts = {f"wasserstein_{key}": 4.5 for key in QUANTITIES}
    row = {"n_patients": 15, **distances, **hearts, "auc_heart": 0.84, "auc_image": 0.9}
    bounds = {name: [value - 0.1, value + 0.1] for name, value in row.items() if name != "n_patients"}
    without = {key: value for key, value in row.items() if not key.startswith("auc")}
    fewer = {key: value for key, value in bounds.items() if key in without}
    comparisons = {
        "own": {**row, "ci95": bounds},
        "others": {**without, "ci95": fewer},
        "halves": {**without, "wasserstein_mass_g": None, "ci95": fewer | {"wasserstein_mass_g": None}},
        "prior_only": {**row, "ci95": bounds},
    }
    means = {f"{key}_{kind}": value for key in QUANTITIES for kind, value in (("mean", 130.25), ("sd", 41.0))}
    described = {"n_patients": 15, **means, "ci95": {f"{key}_mean": [110.0, 150.0] for key in QUANTITIES}}
    unknown = described | {"mass_g_mean": None, "mass_g_sd": None}
    group = {
        "n_patients": 15,
        "n_synthetic": 100,
        "n_prior_only": 40,
        "n_others": 24,
        "n_half": 7,
        "comparisons": comparisons,
        "anatomy": {"real": unknown, "synthetic": described, "prior_only": described},
    }
    return {
        "test_sets": ["hospitals"],
        "simulated": False,
        "grid": {"size_px": 64, "pixel_mm": 2.0},
        "structures": ["left ventricle at ED"],
        "n_radiomics": 48,
        "n_draws": 100,
        "num_steps": 400,
        "groups": {"Philips": group, "Siemens": group},
        "not_measured": {"GE": TOO_FEW},
    }


def full_study() -> tuple[dict, ReportInputs]:
    """`study` with what is not in every run: two cross-vendor evaluations, subgroups, uncertainty, EF classes."""
    report, inputs = study()
    rng = np.random.default_rng(1)
    predictions = inputs.predictions["synthetic_only"]["hospitals"]
    true, vendors = np.asarray(predictions.true), predictions.vendors
    noise = rng.normal(0, 0.05, 45)
    kinds: dict[str, dict] = {}
    differences: dict[str, dict] = {}
    for kind, scale in (("synthetic", 1.0), ("real", 0.8)):
        guesses = {"all": true + scale * noise}
        for k, vendor in enumerate(VENDORS):
            away = np.array([name != vendor for name in vendors])
            guesses[vendor] = true + scale * (noise + away * (0.02 + 0.02 * k))
            guesses[f"without {vendor}"] = true + scale * (noise + ~away * 0.015 * k)
        kinds[kind] = {key: table(true, guess, vendors, 300, 0) for key, guess in guesses.items()}
        differences[kind] = {
            key: paired_table(true, guess, guesses["all"], vendors, 300, 0)
            for key, guess in guesses.items()
            if key.startswith("without")
        }
    del kinds["real"]["GE"]  # nobody trained on it
    kinds["real"]["without GE"]["GE"] = score([0.5], [np.nan], 300, 0)
    strengths = np.array([1.5, 3.0])[np.arange(45) % 2]
    sexes = np.array(["F", "M", "unknown"])[np.arange(45) % 3]
    pathologies = np.array(["DCM", "HCM", "MINF", "NOR", "RV"])[np.arange(45) % 5]

    def by(labels: np.ndarray) -> dict[str, dict]:
        guess = np.asarray(predictions.predicted)
        return {str(name): score(true[labels == name], guess[labels == name], 300, 0) for name in np.unique(labels)}

    facts = {
        "field strength": {f"{name} T": values for name, values in by(strengths).items()},
        "pathology": by(pathologies),
        "sex": by(sexes),
    }
    coverage = [
        {"nominal": nominal, "observed": observed, "ci95": ci95}
        for nominal, observed, ci95 in (
            (0.5, 0.42, [0.28, 0.56]),
            (0.8, 0.69, [0.55, 0.82]),
            (0.9, 0.76, [0.62, 0.87]),
            (0.95, 0.93, [0.84, 1.0]),
        )
    ]
    few = {"true": [0.33, 0.55, 0.58], "predicted": [0.29, 0.44, 0.56]}
    report["provenance"]["test_sets"]["mnms"] = public("M&Ms").as_json()
    report["regression"]["mnms"] = table(few["true"], few["predicted"], VENDORS, 300, 0)
    for tables in report["regression"].values():
        for values in tables.values():
            values |= {"category_agreement": 0.84, "category_kappa": 0.79, "n_undefined": 0}
            values["ci95"] |= {"category_agreement": [0.73, 0.93], "category_kappa": [0.61, 0.9]}
    report["baselines"]["predict_the_mean"]["hospitals"]["all"] |= {"category_agreement": 0.4, "category_kappa": None}
    report |= {
        "matrix": kinds,
        "matrix_differences": differences,
        "fidelity": fidelity_block(),
        "subgroups": {"hospitals": facts, "mnms": {}},
        "uncertainty": {
            "hospitals": {"n_patients": 45, "mean_sd_points": 3.1, "coverage": coverage, "rank_correlation": 0.31},
            "mnms": {
                "n_patients": 3,
                "mean_sd_points": 4.2,
                "rank_correlation": None,
                "coverage": [{"nominal": 0.9, "observed": None, "ci95": None}],
            },
        },
    }
    groups = ["GE"] * 9 + ["Philips"] * 7 + ["Siemens"] * 8
    drawn = {f"num_phases/{name}": np.full(24, 2.0) for name in ("lv", "myo", "rv", "mean", "ef")}
    for name in ("rv", "mean"):
        drawn[f"num_phases/{name}"][9:16] = 0
    dice = {f"dice/{name}": rng.uniform(0.7, 0.9, 24) for name in ("lv", "myo", "rv", "mean")}
    distance = {f"hd95_mm/{name}": rng.uniform(3, 12, 24) for name in ("lv", "myo", "rv")}
    error = rng.normal(-12, 6, 24)
    values = {**dice, **distance, "ef_mae_points": np.abs(error), "ef_bias_points": error, **drawn}
    report["segmentation"] = {"hospitals": score_values(values, groups, 300, 0)}
    labels = np.zeros((3, 2, 64, 64), np.uint8)
    labels[:, :, 14:50, 20:56], labels[:, :, 20:44, 26:50], labels[:, :, 20:44, 8:20] = 2, 3, 1
    words = "Dice: LV 0.91, muscle 0.80, RV 0.85, mean 0.85; EF \u22122.1 points"
    outlined = [
        OutlinedPatient(kind, vendor, inputs.best[0].images, labels, np.roll(labels, 2, 3), (2.0, 2.0), words)
        for vendor in VENDORS
        for kind in ("Best", "Worst")
    ]
    large = {
        vendor: SampleSheet(Row(sheet.synthetic.images[:2], [0.2, 0.3])) for vendor, sheet in inputs.samples.items()
    }
    sd = [None if i == 7 else float(value) for i, value in enumerate(rng.uniform(0.02, 0.06, 45))]
    predictions = {
        "hospitals": SetPredictions(vendors, predictions.true, predictions.predicted, sd),
        "mnms": SetPredictions(VENDORS, few["true"], few["predicted"]),
    }
    return report, ReportInputs(
        **{**vars(inputs), "predictions": {"synthetic_only": predictions}, "outlined": outlined, "large": large}
    )
