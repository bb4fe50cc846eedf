"""The generator's benchmark: its figures on images whose answer is known."""

import json
from dataclasses import replace

import pytest
import torch

from fedcmr.server.generation.synthesis import synthesize
from fedcmr.server.settings import SynthesisConfig
from fedcmr.shared.style import STYLE_NAMES
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter
from fedcmr.shared.views import slice_pairs
from fedcmr.simulations.benchmarks import generator
from fedcmr.simulations.benchmarks.generator import (
    Measured,
    knee,
    main,
    measure,
    measured_styles,
    on_rendered_hearts,
    prior_alone,
    style_slopes,
)

SEED = 3
CONFIG = SynthesisConfig(num_cases=4, num_slices=2, num_steps=2, t_start=0.5)


def row(num_steps: int, mae: float, style_error: float) -> Measured:
    return Measured(0.5, num_steps, 0.9, None, mae, 0, style_error)


def test_the_knee_is_where_all_figures_stay_near_the_reference():
    reference = row(32, 3.0, 0.5)
    curve = [row(1, 9.0, 0.51), row(2, 3.1, 0.6), row(4, 3.2, 0.51), row(8, 2.9, 0.505)]
    assert knee(curve, reference) == 4
    assert knee([*curve, row(16, 5.0, 0.5)], reference) is None
    assert knee([row(1, 3.0, 0.5), *curve[1:]], reference) == 4  # a lucky low one with worse ones above it is no knee
    assert knee([*curve[:2], replace(curve[2], distance=0.03), replace(curve[3], distance=0.02)], reference) == 8


@pytest.mark.slow
def test_the_distance_to_itself_is_nothing_and_to_other_noise_is_not(prior):
    segmenter = load_segmenter()
    first, images = measure(prior, prior_alone(prior), segmenter, CONFIG, SEED, None)
    assert first.distance is None and images.shape == (8, 2, 64, 64)
    assert measure(prior, prior_alone(prior), segmenter, CONFIG, SEED, images)[0].distance == 0
    other = measure(prior, prior_alone(prior), segmenter, replace(CONFIG, num_steps=5), SEED, images)[0].distance
    assert other is not None and other > 1e-3


def test_style_vectors_are_those_of_the_patient_whole_stack(prior):
    made = synthesize(prior, prior_alone(prior), CONFIG, ["public"], SEED)
    images, masks = slice_pairs(made.cases[1])
    styles = measured_styles(prior, made.cases)
    assert styles.shape == (4, len(STYLE_NAMES))
    lv_mean = images[masks == 3].mean()
    expected = (lv_mean - prior.style_mean[0]) / prior.style_std[0]
    torch.testing.assert_close(styles[1, 0], expected, atol=1e-4, rtol=1e-4)


def test_a_generator_that_does_what_is_requested_has_slope_one(prior, monkeypatch):
    """The slope compares the same heart under both styles: a model that gives the cavity the LV's entry moves 1 : 1."""

    def faithful(condition, sampler, rng, guide):
        level = (condition.style[:, 0] * prior.style_std[0] + prior.style_mean[0])[:, None, None, None]
        return torch.where(condition.masks == 3, level, torch.zeros(())).expand_as(guide).clone()

    monkeypatch.setattr(prior.generator, "sample", faithful)
    monkeypatch.setattr(
        "fedcmr.server.generation.synthesis.match_intensities", lambda images, masks, raw_style, pixel_mm: images
    )  # would be faithful in its place
    slopes = style_slopes(prior, prior_alone(prior), CONFIG, SEED)
    assert slopes["lv_mean"] == pytest.approx(1, abs=0.02)
    assert slopes["background_mean"] == pytest.approx(0, abs=1e-6)
    assert set(slopes) == set(STYLE_NAMES)


def test_the_segmenter_has_an_error_of_its_own_on_rendered_hearts():
    measured = on_rendered_hearts(load_segmenter(), replace(CONFIG, num_cases=20, num_slices=6), SEED)
    assert measured.r > 0.95 and measured.mae_points < 7 and measured.not_found == 0 and measured.style_error is None


@pytest.mark.slow
def test_the_command_writes_figures_and_plot(tiny_prior, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generator, "REFERENCE_STEPS", 3)
    paths = {"--json": tmp_path / "g.json", "--plot": tmp_path / "g.png"}
    arguments = ["--prior", str(tiny_prior), "--t-start", "0,0.5", "--steps", "2,1", "--num-cases", "2"]
    monkeypatch.setattr("sys.argv", ["generator", *arguments, *(str(x) for pair in paths.items() for x in pair)])
    assert main() == 0
    figures = json.loads(paths["--json"].read_text())
    assert [(r["t_start"], r["num_steps"]) for r in figures["rows"][2:]] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (0.5, 1),
        (0.5, 2),
        (0.5, 3),
    ]
    assert paths["--plot"].read_bytes().startswith(b"\x89PNG") and "t_start 0.5" in capsys.readouterr().out


def test_what_is_out_of_range_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generator", "--t-start", "0,1.5"])
    assert main() == 2
    assert "synthesis.t_start" in capsys.readouterr().err
