import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedcmr.server.federation.validation import Answer, check_reply, drop_duplicates, plausible_norm, update_norm
from fedcmr.shared.privacy import os_generator, private_mean_gradient
from fedcmr.shared.records import OK, encode, pack_reply
from fedcmr.shared.style_statistics import two_step_mean
from tests.wire_request import usual_request

SHAPES = {"bias": (2,), "weight": (3,)}
LIMITS = {"A": 10.0, "B": 10.0}
ARRAYS = {"bias": np.ones(2, np.float32), "weight": np.zeros(3, np.float32)}
REQUEST = usual_request(noise_multiplier=1.5, sample_rate=0.5, max_grad_norm=0.7, local_steps=3, num_views=4)


def content(site="A", code=OK, **records):
    return RecordDict({"reply": ConfigRecord({"site": site, "code": code}), **records})


def test_a_good_reply_gives_its_arrays():
    answer = check_reply(pack_reply("A", OK, ARRAYS, SHAPES), LIMITS, lambda _: SHAPES)
    assert (answer.site, answer.code, answer.dropped) == ("A", OK, None)
    np.testing.assert_array_equal(answer.arrays["bias"], ARRAYS["bias"])


def test_a_refusal_is_not_dropped():
    answer = check_reply(pack_reply("B", "budget-exhausted"), LIMITS, lambda _: SHAPES)
    assert answer == Answer("B", "budget-exhausted")


@pytest.mark.parametrize(
    ("reply", "site", "reason"),
    [
        (RecordDict(), "unknown", "keys"),
        (RecordDict({"reply": ArrayRecord()}), "unknown", "keys"),
        (RecordDict({"reply": ConfigRecord({"site": "A", "code": OK, "num-examples": 40})}), "unknown", "keys"),
        (content(site=["A"]), "unknown", "code"),
        (content(code="everything is fine"), "unknown", "code"),
        (content(code=b"ok"), "unknown", "code"),
        (content(site="Z", arrays=encode(ARRAYS)), "unknown", "site-not-in-study"),
        (content(site="unknown", arrays=encode(ARRAYS)), "unknown", "site-not-in-study"),
        (content(), "A", "keys"),
        (content(arrays=encode(ARRAYS), metrics=MetricRecord({"loss": 0.1})), "A", "keys"),
        (content(code="budget-exhausted", arrays=encode(ARRAYS)), "A", "keys"),
        (content(arrays=MetricRecord({"bias": 0.1})), "A", "names"),
        (content(arrays=MetricRecord({"bias": 0.1, "weight": 0.2})), "A", "dtype"),
        (content(arrays=encode({**ARRAYS, "bias": np.ones(3, np.float32)})), "A", "shape"),
        (content(arrays=encode({**ARRAYS, "bias": np.full(2, np.nan, np.float32)})), "A", "non-finite"),
        (content(arrays=encode({**ARRAYS, "bias": np.full(2, 3e38, np.float32)})), "A", "norm"),
    ],
)
def test_a_bad_reply_is_dropped_with_its_reason(reply, site, reason):
    assert check_reply(reply, LIMITS, lambda _: SHAPES) == Answer(site, dropped=reason)


def test_a_site_that_answers_twice_is_not_believed():
    answers = [Answer("A", OK, ARRAYS), Answer("B", OK, ARRAYS), Answer("A", "budget-exhausted")]
    checked = drop_duplicates(answers)
    assert [answer.dropped for answer in checked] == ["duplicate-site", None, "duplicate-site"]
    assert [answer.code for answer in checked] == ["", OK, ""]


def test_unreadable_replies_are_no_duplicates_of_each_other():
    answers = [Answer(dropped="keys"), Answer(dropped="keys")]
    assert drop_duplicates(answers) == answers


def test_honest_private_updates_are_plausible():
    """With the noise of a strict budget and twice the nominal number of patients, 200 times."""
    rng = np.random.default_rng(0)
    dimension, nominal = 400, 5
    strict = replace(REQUEST, noise_multiplier=20.0)
    limit = plausible_norm(strict, dimension, nominal)
    for _ in range(200):
        gradients = [rng.normal(size=dimension) for _ in range(2 * nominal)]
        update = sum(
            strict.learning_rate
            * private_mean_gradient(
                gradients,
                strict.max_grad_norm,
                strict.noise_multiplier,
                dimension=dimension,
                expected_batch_size=strict.sample_rate * nominal,
                rng=os_generator(),
            )
            for _ in range(strict.local_steps)
        )
        assert update_norm({"a": update.astype(np.float32)}) < limit


def test_honest_private_statistics_are_plausible():
    rng = np.random.default_rng(0)
    request = replace(
        REQUEST, task="statistics", sample_rate=1.0, local_steps=2, max_grad_norm=4.0, noise_multiplier=10.0
    )
    limit = plausible_norm(request, 22, 5)
    for _ in range(200):
        mean, square = two_step_mean(rng.normal(size=(10, 11)) * 3, 4.0, 10.0, 5, os_generator())
        assert update_norm({"mean": mean, "square": square}) < limit


def test_without_privacy_no_norm_is_implausible():
    assert plausible_norm(replace(REQUEST, private=False), 400, 5) == math.inf
