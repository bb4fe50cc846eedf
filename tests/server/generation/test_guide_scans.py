"""Public scans as guides: bent into the hearts asked for, with labels that stay true of the pixels."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcmr.server.generation.guide_scans import bend, read_guides
from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.synthesis import SharedGenerator, synthesize, synthesize_requested
from fedcmr.server.settings import SynthesisConfig, load
from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, RV, load_cases, save_case, write_index
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.provenance import public
from fedcmr.shared.style import STYLE_NAMES, StyleDistribution, style_vectors
from fedcmr.shared.views import NETWORK_GRID, slice_pairs
from fedcmr.simulations.run import simulate

LEVELS = {LV: 0.9, MYO: 0.3, RV: 0.8, 0: 0.2}
"""Grey values in [0, 1] of the scans' structures, before a factor of each scan."""

EFS = torch.tensor([0.1, 0.35, 0.5, 0.6])


def record_as(folder: Path, origin) -> None:
    (folder / "prepared.json").write_text(json.dumps({"provenance": origin.as_json()}))


@pytest.fixture(scope="module")
def scans(tmp_path_factory, write_cases) -> Path:
    folder = tmp_path_factory.mktemp("guides") / "scans"
    write_cases(folder, "GE", 4, seed=1)
    record_as(folder, public("Sunnybrook"))
    return folder


def settings(folder: Path, **changes) -> SynthesisConfig:
    return SynthesisConfig(num_cases=6, num_slices=4, num_steps=0, guides=[str(folder)], **changes)


def hearts(efs: Sequence[float], seed: int = 3):
    return draw_hearts(len(efs), torch.Generator().manual_seed(seed), 6, torch.tensor(efs))


def test_the_borders_come_near_those_asked_for(scans):
    asked = hearts(EFS.tolist())
    guides = read_guides([scans])
    bent = bend(guides, asked, EFS, 6, NETWORK_GRID, torch.Generator().manual_seed(0))
    posed = replace(
        asked,
        centre=torch.stack([guides.scans[number].centre_mm for number in bent.numbers]),
        rv_angle=torch.tensor([guides.scans[number].rv_angle for number in bent.numbers]),
    )
    wanted = masks_from(distances(posed, slice_positions(asked, 6), NETWORK_GRID))
    middle = slice(2, 4)
    for labels in ((LV,), (LV, MYO)):
        found, true = (torch.isin(masks[:, middle], torch.tensor(labels)) for masks in (bent.masks, wanted))
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.9
    efs = [ejection_fraction(masks.transpose(0, 1).numpy()) for masks in bent.masks]
    np.testing.assert_allclose(efs, EFS, atol=0.03)


def test_labels_are_true_of_the_pixels_they_were_bent_with(scans):
    bent = bend(
        read_guides([scans]),
        hearts([0.25, 0.55]),
        torch.tensor([0.25, 0.55]),
        6,
        NETWORK_GRID,
        torch.Generator().manual_seed(0),
    )
    for images, masks in zip(bent.images, bent.masks, strict=True):
        means = {label: float(images[masks == label].mean()) for label in (LV, MYO, RV, 0)}
        assert means[LV] > means[RV] > means[MYO] > means[0]
        inner = (masks == MYO) & (images > (means[LV] + means[MYO]) / 2)
        assert inner.sum() < 0.1 * (masks == MYO).sum(), "but for partial volume no muscle is as bright as blood"


def test_a_heart_takes_one_of_the_scans_that_are_like_it(scans, monkeypatch):
    guides = read_guides([scans])
    monkeypatch.setattr("fedcmr.server.generation.guide_scans.NUM_LIKE", 1)
    own = [masks_of(case) for case in load_cases(scans)]
    efs = [ejection_fraction(masks) for masks in own]
    asked = torch.tensor([0.2] * 8 + [0.75] * 8)
    wide = draw_hearts(16, torch.Generator().manual_seed(1), 4, asked)
    numbers = bend(guides, wide, asked, 4, NETWORK_GRID, torch.Generator().manual_seed(0)).numbers
    low, high = (np.mean([efs[number] for number in part]) for part in (numbers[:8], numbers[8:]))
    assert low < high


def masks_of(case) -> np.ndarray:
    return slice_pairs(case)[1].transpose(0, 1).numpy()


def test_a_set_bent_from_scans_is_in_the_vendors_grey_values_and_names_the_scan(prior, scans):
    mean = torch.zeros(len(STYLE_NAMES))
    mean[STYLE_NAMES.index("lv_mean")], mean[STYLE_NAMES.index("myo_mean")] = 1.0, -0.5
    style = StyleDistribution(mean, torch.full_like(mean, 1e-3), torch.eye(len(mean)))
    shared = SharedGenerator({n: v.detach().clone() for n, v in prior.generator.trainable().items()}, {"GE": style})
    made = synthesize(prior, shared, settings(scans), ["GE"], seed=1, device_name="cpu")
    again = synthesize(prior, shared, settings(scans), ["GE"], seed=1, device_name="cpu")
    raw = prior.raw(mean[None])[0]
    for case, other in zip(made.cases, again.cases, strict=True):
        np.testing.assert_array_equal(case.frames, other.frames)
        images, masks = slice_pairs(case, prior.grid)
        found = style_vectors(images[None], masks[None], prior.grid.pixel_mm)[0]
        for name in ("lv_mean", "myo_mean"):
            index = STYLE_NAMES.index(name)
            assert float(found[index]) == pytest.approx(float(raw[index]), abs=0.15)
        assert case.info.ef == ejection_fraction(case.masks) and case.info.group.startswith("scan-")
    assert len({case.info.group for case in made.cases}) < len(made.cases), "six patients of four scans"


def test_without_a_step_no_network_takes_part_and_with_steps_it_does(prior, scans):
    no_step, steps = settings(scans), replace(settings(scans), num_steps=2, t_start=0.8)
    plain = synthesize_requested(prior, None, no_step, ["GE"], [0.4], 0, "cpu")[0]
    with torch.no_grad():
        for parameter in prior.generator.parameters():
            parameter.add_(0.1)
    same = synthesize_requested(prior, None, no_step, ["GE"], [0.4], 0, "cpu")[0]
    refined = synthesize_requested(prior, None, steps, ["GE"], [0.4], 0, "cpu")[0]
    np.testing.assert_array_equal(plain.frames, same.frames)
    np.testing.assert_array_equal(plain.masks, refined.masks)
    assert not np.array_equal(plain.frames, refined.frames)


def test_no_step_needs_guides_and_trains_no_adapter_in_vain():
    with pytest.raises(UserError, match=r"synthesis\.num_steps"):
        load("default", ["synthesis.num_steps=0"])
    guided = ["synthesis.num_steps=0", "synthesis.guides=[somewhere]"]
    with pytest.raises(UserError, match=r"federation\.adapter to be statistics"):
        load("default", guided)
    assert load("default", [*guided, "federation.adapter=statistics"]).synthesis.guides == ["somewhere"]


def test_only_public_scans_that_are_drawn_whole_are_guides(tmp_path, scans, write_cases):
    assert read_guides([]) is None
    write_cases(tmp_path / "private", "GE", 2, seed=5)
    with pytest.raises(UserError, match="private is not recorded as a public data set"):
        read_guides([tmp_path / "private"])
    write_cases(tmp_path / "part", "GE", 3, seed=6)
    record_as(tmp_path / "part", public("Sunnybrook"))
    cases = load_cases(tmp_path / "part")
    cases[0].masks[ES][cases[0].masks[ES] == MYO] = NOT_DRAWN
    cases[1].masks[cases[1].masks == RV] = 0
    for case in cases:
        save_case(tmp_path / "part", case)
    write_index(tmp_path / "part", [case.info for case in cases])
    assert len(read_guides([tmp_path / "part"]).scans) == 1
    cases[2].masks[ED] = NOT_DRAWN
    save_case(tmp_path / "part", cases[2])
    write_index(tmp_path / "part", [replace(case.info, sex="F") for case in cases])  # another time of writing
    with pytest.raises(UserError, match=r"synthesis\.guides: none of the 3 scans"):
        read_guides([tmp_path / "part"])


def test_nobody_of_a_study_guides_it(tmp_path, write_cases, scans, tiny_prior):
    write_cases(tmp_path / "data" / "a" / "train", "Siemens", 3, seed=2)
    write_cases(tmp_path / "data" / "a" / "test", "GE", 3, seed=1)  # three of the guides
    overrides = ["hospitals.source=prepared", f"data_root={tmp_path / 'data'}", "hospitals.nominal_patients=20"]
    config = load("default", [*overrides, f"prior={tiny_prior}", f"synthesis.guides=[{scans}]"])
    with pytest.raises(UserError, match=r"synthesis\.guides holds 3 patients of .*test.*take other guides"):
        simulate(config, tmp_path / "run", "prepare")
