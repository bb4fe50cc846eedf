"""Statistics of shape: asked for in round 1, charged with those of style, kept, published and used."""

import math

import numpy as np
import pytest

from fedcmr.server.federation.federate import federate
from fedcmr.server.federation.state import initial_state, make_request, read_study
from fedcmr.server.generation.synthesis import load_shared_generator
from fedcmr.shared.records import OK, Request, pack_reply
from fedcmr.shared.shape import SHAPE_NAMES
from tests.server.federation.test_strategy import ScriptedGrid, agree, newest, update_of

ON = ("federation.shape=true", "federation.adapter=norm_affine")


def test_only_the_statistics_are_asked_for_shapes_and_under_one_clip(make_study, prior):
    study = make_study(*ON, num_patients=0)
    state = initial_state(study.config, prior, read_study(study))
    first, second = (make_request(study.config, state, number) for number in (1, 2))
    privacy = study.config.privacy
    assert first.with_shape and first.shape_size == len(SHAPE_NAMES)
    assert first.max_grad_norm == pytest.approx(math.hypot(privacy.statistics_clip, privacy.shape_clip))
    assert not second.with_shape and second.max_grad_norm == privacy.max_grad_norm
    assert Request.from_config(first.to_config()) == first
    with pytest.raises(ValueError, match="within its ranges"):
        Request.from_config({**second.to_config(), "with-shape": True})


def test_asking_for_shapes_costs_no_more(make_study, prior):
    """One clip and one noise for both: the plan of the whole run is the same."""
    study = make_study(*ON, num_patients=0)
    plan = initial_state(study.config, prior, read_study(study)).plan
    study.config.federation.shape = False
    assert initial_state(study.config, prior, read_study(study)).plan == plan is not None


def test_each_vendors_shapes_are_kept_published_and_read_again(make_study, prior):
    study = make_study("federation.shape=true", "privacy.enabled=false", num_patients=0)

    def script(site, request, arrays):
        if request.task != "statistics":
            return agree()(site, request, arrays)
        update, shapes = update_of(request, arrays, 0)
        update["style_square"][:] = 1.0
        update["shape_mean"][:], update["shape_square"][:] = {"a": (0.5, 1.25), "b": (-1, 1.49), "c": (0, 0)}[site]
        return pack_reply(site, OK, update, shapes)

    federate(ScriptedGrid(script), study, prior)
    shared = load_shared_generator(study.path / "generator.safetensors", prior)
    for vendor, mean, std in (("Siemens", 0.5, 1.0), ("Philips", -1.0, 0.7), ("GE", 0.0, 0.3)):
        np.testing.assert_allclose(newest(study).shape_mean[vendor], mean, atol=1e-6)
        np.testing.assert_allclose(shared.shapes[vendor].mean, mean, atol=1e-6)
        np.testing.assert_allclose(shared.shapes[vendor].std, std, atol=1e-5)


def test_a_study_without_shapes_has_none(make_study, prior):
    study = make_study(ON[1], num_patients=0)
    federate(ScriptedGrid(agree()), study, prior)
    assert newest(study).shape_mean == {}
    assert load_shared_generator(study.path / "generator.safetensors", prior).shapes == {}
