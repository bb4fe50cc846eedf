"""The generator of the privacy noise: where its bits come from, and what it makes of them."""

import math
import os
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binomtest, kstest, norm

from fedcmr.shared import noise
from fedcmr.shared.noise import CHUNK, OsGenerator
from fedcmr.shared.privacy import os_generator

NUM = 3 * CHUNK + 17
"""More than one draw from the system, and no multiple of it."""


@pytest.fixture(scope="module")
def values():
    return OsGenerator().normal(0.0, 1.0, NUM)


def test_every_bit_comes_from_the_operating_system_and_none_from_a_seed(monkeypatch):
    """Given the system's words, the values are these, computed one by one with Python's own arithmetic."""
    words = [0, 1, 2**64 - 1, 2**63, 2**63 + 1, 12345678901234567890, 2]
    asked = []

    def token_bytes(number):
        asked.append(number)
        return np.array(words, np.uint64).tobytes()

    monkeypatch.setattr(noise.secrets, "token_bytes", token_bytes)
    generator = os_generator()
    drawn = generator.normal(10.0, 2.0, (7,))
    expected = []
    for word in words:
        tail = (word // 2 + 0.5) / 2**64
        below = NormalDist().inv_cdf(tail) if tail < 0.5 else 0.0
        expected.append(10 + 2 * (-below if word % 2 else below))
    assert drawn == pytest.approx(expected, rel=1e-12)
    assert generator.random(7) == pytest.approx([word / 2**64 for word in words], abs=2**-52)
    assert generator.random(7).max() < 1
    assert asked == [56] * 3


def test_no_state_is_kept_that_the_next_value_could_be_computed_from():
    assert not vars(OsGenerator())


def test_values_are_normal(values):
    assert kstest(values, "norm").pvalue > 1e-6
    assert abs(values.mean()) < 6 / math.sqrt(NUM)
    assert values.std() == pytest.approx(1, abs=6 / math.sqrt(2 * NUM))
    assert (values**4).mean() == pytest.approx(3, abs=6 * math.sqrt(96 / NUM))


@pytest.mark.parametrize("bound", [1.0, 2.0, 3.0])
def test_both_tails_are_as_heavy_as_they_should_be(values, bound):
    for tail in (values > bound, values < -bound):
        assert binomtest(int(tail.sum()), NUM, norm.sf(bound)).pvalue > 1e-6


def test_the_far_tails_can_be_reached_on_both_sides(monkeypatch):
    monkeypatch.setattr(noise.secrets, "token_bytes", lambda number: np.array([0, 1], np.uint64).tobytes())
    lowest, highest = OsGenerator().normal(0.0, 1.0, 2)
    assert lowest == pytest.approx(-highest) and 9 < highest < 9.5


def test_values_and_generators_are_independent_of_each_other(values):
    other = OsGenerator().normal(0.0, 1.0, NUM)
    for first, second in ((values, other), (values[:-1], values[1:]), (values[:CHUNK], values[CHUNK : 2 * CHUNK])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(len(first))
    assert len(np.unique(np.concatenate([values, other]))) == 2 * NUM


def test_a_forked_process_draws_other_values_than_its_parent():
    generator = OsGenerator()
    generator.normal(0.0, 1.0, 5)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, generator.normal(0.0, 1.0, 5).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 40))
    os.close(read)
    os.close(write)
    assert not np.isclose(theirs, generator.normal(0.0, 1.0, 5)).any()


def test_uniform_values_are_uniform():
    values = OsGenerator().random(NUM)
    assert values.min() >= 0 and values.max() < 1
    assert kstest(values, "uniform").pvalue > 1e-6


def test_shapes_are_those_asked_for():
    assert OsGenerator().normal(0.0, 1.0, (2, 3)).shape == (2, 3)
    assert OsGenerator().normal(0.0, 1.0, ()).shape == ()
    assert OsGenerator().normal(0.0, 1.0, 0).shape == (0,)
    assert (OsGenerator().normal(5.0, 0.0, 3) == 5).all()
