"""Rounds that the tests of the ledger charge."""

from pathlib import Path

from fedcmr.client.ledger import Ledger
from fedcmr.shared.privacy import Release

DELTA = 1e-3
RELEASE = Release(2.0, 1.0, 2)


def charge(folder: Path, server_round: int, release: Release = RELEASE, cap: float = 100) -> None:
    """One whole round, as a client goes through it."""
    ledger = Ledger(folder)
    ledger.reserve("run", server_round, release, DELTA, cap)
    ledger.commit("run", server_round, b"update of round %d" % server_round)
