"""The ledger's benchmark goes through what a site goes through."""

import pytest

from fedcmr.client.ledger import Ledger
from fedcmr.shared.privacy import epsilon
from fedcmr.simulations.benchmarks.ledger import PARTS, answer_round, round_ms, study_releases


def test_the_timed_rounds_are_those_of_the_default_study():
    releases = study_releases(8.0)
    assert len(releases) == 6
    assert epsilon(releases, 1e-3)[0] == pytest.approx(8, rel=0.01)


def test_a_timed_round_is_charged_and_committed_and_its_parts_add_up(tmp_path):
    figures = round_ms(tmp_path, num_studies=1, num_repeats=1)
    assert set(figures) == set(PARTS) and all(value > 0 for value in figures.values())
    charges = Ledger(tmp_path / "ledger").charges()
    assert len(charges) == 3 * 6 and all(charge["reply"] for charge in charges)
    spent = answer_round(tmp_path, "ab" * 4, 1, study_releases(8.0)[0])
    assert sum(spent[part] for part in PARTS[:3]) == pytest.approx(spent["whole round"], rel=0.2)
