"""The delivery's service, for tests of the client that fetches from it."""

from tests.server.delivery.conftest import fetch, finished, free_port, offer, place, sampler, service

__all__ = ["fetch", "finished", "free_port", "offer", "place", "sampler", "service"]
