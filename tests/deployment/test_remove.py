"""A site whose key is taken away is refused, and may come back with another."""

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedcmr.client.deployment.node_key import make_node_key
from fedcmr.server.deployment.coordinator import load_coordinator
from tests.deployment.conftest import free_port, server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "coordinator"
    ports = [free_port() for _ in range(2)]
    assert (
        server(
            "init",
            folder,
            "--name",
            "loopback",
            "--address",
            "127.0.0.1",
            "--port",
            ports[0],
            "--health-port",
            ports[1],
        )
        == 0
    )
    try:
        assert server("start", folder) == 0
        yield folder
    finally:
        server("stop", folder)


def register(study, site) -> int:
    site.mkdir(exist_ok=True)
    return server("register", study, make_node_key(site), "--name", "a", "--vendor", "GE", "--nominal-patients", 5)


def activate(study, site) -> int:
    """The SuperLink's answer to a SuperNode with the site's key."""
    key = load_ssh_private_key((site / "node_key").read_bytes(), None)
    coordinator = load_coordinator(study)
    signed = NodeAuthHttpInterceptor(key, key.public_key())
    request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30)
    with FleetHttpClient.from_server_address(coordinator.superlink, False, str(coordinator.ca), [signed]) as client:
        try:
            client.ActivateNode(request)
        except httpx.HTTPStatusError as error:
            return error.response.status_code
    return 200


def test_a_removed_site_is_refused_and_may_come_back_with_another_key(study, tmp_path, capsys):
    lost, new = tmp_path / "lost", tmp_path / "new"
    assert register(study, lost) == 0 and activate(study, lost) == 200
    new.mkdir()
    assert register(study, new) == 2 and "remove it first" in capsys.readouterr().err
    assert server("remove", study, "--name", "a") == 0
    assert activate(study, lost) in range(400, 500)
    assert load_coordinator(study).sites() == {}
    assert register(study, new) == 0 and activate(study, new) == 200
    assert activate(study, lost) in range(400, 500)


def test_a_site_that_is_not_there_cannot_be_removed(study, capsys):
    assert server("remove", study, "--name", "b") == 2
    assert "no site 'b'" in capsys.readouterr().err
