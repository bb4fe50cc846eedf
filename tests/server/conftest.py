import pytest

from tests.tiny_regressor import make_tiny


@pytest.fixture
def tiny(monkeypatch):
    """The same training with a network small enough for a test."""
    make_tiny(monkeypatch)
