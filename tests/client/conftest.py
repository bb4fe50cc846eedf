"""Ledgers that several tests begin with."""

from pathlib import Path

import pytest

from fedcmr.client.ledger import Ledger
from fedcmr.shared.privacy import Release


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "site" / "ledger"


@pytest.fixture
def used(folder) -> Path:
    """The folder of a ledger with two rounds charged, the first of them committed."""
    ledger = Ledger(folder)
    ledger.reserve("run", 1, Release(2.0, 1.0, 2), 1e-3, 100)
    ledger.commit("run", 1, b"update")
    ledger.reserve("run", 2, Release(2.0, 1.0, 2), 1e-3, 100)
    return folder
