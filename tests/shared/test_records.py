import io
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedcmr.shared.privacy import Release
from fedcmr.shared.records import (
    CODES,
    INTERNAL_ERROR,
    OK,
    Request,
    decode,
    encode,
    pack_reply,
    pack_request,
    update_shapes,
)
from tests.wire_request import usual_request

SHAPES = {"bias": (2,), "norm.weight": (3, 4)}
REQUEST = usual_request(noise_multiplier=1.5, sample_rate=0.5, local_steps=2, num_views=4)


def arrays_of(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_arrays_survive_the_wire():
    arrays = arrays_of(SHAPES)
    decoded = decode(encode(arrays), SHAPES)
    assert set(decoded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(decoded[name], array)


def test_a_request_survives_the_wire():
    for request in (REQUEST, replace(REQUEST, adapter="lora"), replace(REQUEST, task="statistics", sample_rate=1.0)):
        content = pack_request(arrays_of(SHAPES), request)
        assert Request.from_config(content["config"]) == request
    assert REQUEST.mechanism.release == Release(1.5, 0.5, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"task": "evaluate"},
        {"run_id": "../../etc"},
        {"server_round": 0},
        {"server_round": True},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": 1},
        {"private": 0},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"max_grad_norm": float("inf")},
        {"target_delta": 1.0},
        {"local_steps": 0},
        {"local_steps": 10**9},
        {"num_views": 10**9},
        {"learning_rate": 0.0},
        {"seed": -1},
        {"task": "statistics"},
        {"task": "statistics", "sample_rate": 1.0, "local_steps": 1},
        {"adapter": "all"},
        {"adapter": ""},
    ],
)
def test_a_request_out_of_range_is_refused(change):
    with pytest.raises(ValueError):
        replace(REQUEST, **change)


@pytest.mark.parametrize("key", ["extra", "seed"])
def test_a_request_has_exactly_its_keys(key):
    config = REQUEST.to_config()
    if key in config:
        del config[key]
    else:
        config[key] = 1
    with pytest.raises(ValueError):
        Request.from_config(config)


def test_a_reply_holds_exactly_what_the_allow_list_names():
    reply = pack_reply("A", OK, arrays_of(SHAPES), SHAPES)
    assert set(reply) == {"reply", "arrays"}
    assert dict(reply["reply"]) == {"site": "A", "code": OK}
    assert set(reply["arrays"]) == set(SHAPES)
    refused = pack_reply("A", "budget-exhausted")
    assert set(refused) == {"reply"}
    assert dict(refused["reply"]) == {"site": "A", "code": "budget-exhausted"}


@pytest.mark.parametrize(
    ("site", "code", "arrays"),
    [
        ("A", OK, None),
        ("A", OK, {**arrays_of(SHAPES), "num_patients": np.ones(1, np.float32)}),
        ("A", OK, {"bias": np.zeros(2, np.float32)}),
        ("A", OK, {**arrays_of(SHAPES), "bias": np.zeros(2)}),
        ("A", OK, {**arrays_of(SHAPES), "bias": np.zeros(3, np.float32)}),
        ("A", OK, {**arrays_of(SHAPES), "bias": np.full(2, np.nan, np.float32)}),
        ("A", INTERNAL_ERROR, arrays_of(SHAPES)),
        ("A", "Traceback: patient 17", None),
        ("patient 17", INTERNAL_ERROR, None),
    ],
)
def test_what_is_not_on_the_allow_list_cannot_be_packed(site, code, arrays):
    with pytest.raises(ValueError) as error:
        pack_reply(site, code, arrays, SHAPES)
    assert "17" not in str(error.value)


def lying(**changes):
    """An encoded record whose "bias" lies in the given way."""
    record = encode(arrays_of(SHAPES))
    bias = record["bias"]
    facts = {"dtype": bias.dtype, "shape": bias.shape, "stype": bias.stype, "data": bias.data} | changes
    record["bias"] = Array(**facts)
    return record


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (ArrayRecord(), "names"),
        (encode(arrays_of({**SHAPES, "extra": (1,)})), "names"),
        (lying(dtype="float64"), "dtype"),
        (lying(stype="pickle"), "dtype"),
        (ConfigRecord({"bias": "text", "norm.weight": "text"}), "dtype"),
        (lying(shape=(3,)), "shape"),
        (lying(shape=(2, 1)), "shape"),
        (lying(data=b""), "payload"),
        (lying(data=npy(np.zeros(2, np.float32))[:-1]), "payload"),
        (lying(data=npy(np.zeros(2, np.float32)) + b"0"), "payload"),
        (lying(data=npy(np.zeros(2, np.float64))), "payload"),
        (lying(data=npy(np.zeros((2, 1), np.float32))), "payload"),
        (lying(data=npy(np.zeros(1_000_000, np.float32))), "payload"),
        (lying(data=npy(np.zeros(2, np.float32)).replace(b"(2,)", b"(9,)")), "payload"),
        (lying(data=b"\x93NUMPY\x02\x00" + b"\xff" * 130), "payload"),
        (lying(data=npy(np.array([1, np.inf], np.float32))), "non-finite"),
    ],
)
def test_a_lying_array_is_dropped_with_its_reason(record, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        decode(record, SHAPES)


def test_updates_are_statistics_in_round_one_and_deltas_after():
    assert update_shapes("statistics", SHAPES, 2, 11) == {"style_mean": (2, 11), "style_square": (2, 11)}
    assert update_shapes("gradients", SHAPES, 2, 11) == SHAPES


def test_codes_are_short_words():
    assert all(code.replace("-", "").isalpha() and len(code) < 30 for code in CODES)
