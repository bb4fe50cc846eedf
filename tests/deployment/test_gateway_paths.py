"""The gateway's list against the installed flwr, and the settings that it refuses."""

import re
import stat
from pathlib import Path

import flwr
import pytest

from fedcmr.server.deployment.gateway import DELIVERY_PATHS, FLEET_PATHS, KEYLESS_PATHS, write_gateway
from fedcmr.shared.errors import UserError
from tests.deployment.gateway_study import write_certificates

ROOT = Path(__file__).resolve().parents[2]
FLWR = Path(flwr.__file__).parent
CALL = re.compile(r'"(/v1/fleet/[^"]*)"')


@pytest.fixture
def study(tmp_path):
    write_certificates(tmp_path, ["study.test", "localhost", "127.0.0.1"])
    return tmp_path


def test_the_list_is_what_the_installed_flwr_calls():
    """A new version that calls another path must be read before it is let through."""
    called = set(CALL.findall((FLWR / "supernode" / "fleet_http_client.py").read_text()))
    assert called == set(FLEET_PATHS) | set(KEYLESS_PATHS)


def test_a_supernode_reaches_the_superlink_through_that_one_client():
    """No other file of the SuperNode spells a path of the SuperLink, and its calls are those that the list explains."""
    for path in (FLWR / "supernode").rglob("*.py"):
        if path.name != "fleet_http_client.py":
            assert not CALL.search(path.read_text()), path
    connection = (FLWR / "supernode" / "fleet_http_connection.py").read_text()
    methods = set(re.findall(r"client\.([A-Z]\w+)", connection))
    kebab = {re.sub(r"(?<!^)(?=[A-Z])", "-", method).lower() for method in methods}
    assert {f"/v1/fleet/{name}" for name in kebab} == set(FLEET_PATHS) | set(KEYLESS_PATHS)
    assert len(re.findall(r"if self_registered:", connection)) == 2, "what a SuperNode with a key calls has changed"


def test_the_list_is_what_the_delivery_service_offers():
    text = (ROOT / "shared" / "delivery" / "delivery.proto").read_text()
    package, service = (re.search(rf"^{word} ([\w.]+)", text, re.M)[1] for word in ("package", "service"))
    methods = {f"/{package}.{service}/{method}" for method in re.findall(r"^  rpc (\w+)", text, re.M)}
    assert methods | {"/grpc.health.v1.Health/Check"} == set(DELIVERY_PATHS)


def test_each_path_stands_twice_in_the_file(study):
    text = write_gateway(study, ["study.test"]).read_text()
    for path in FLEET_PATHS + DELIVERY_PATHS:
        assert text.count(f'"~^POST {path.replace(".", "[.]")}\\z" 1;') == 1
        assert text.count(f"location = {path} {{") == 1
    assert not any(path in text for path in KEYLESS_PATHS)


def test_its_own_folder_is_closed_to_others(study):
    path = write_gateway(study, ["study.test"])
    assert stat.S_IMODE((path.parent / "tmp").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("addresses", "ports", "part"),
    [
        ([], {}, "at least one"),
        (["study.test; include /etc/passwd"], {}, "address"),
        (["a b"], {}, "address"),
        (["study.test"], {"gateway_port": 0}, "gateway_port"),
        (["study.test"], {"superlink_port": 443}, "different"),
    ],
)
def test_what_cannot_be_is_refused(study, addresses, ports, part):
    with pytest.raises(UserError, match=part):
        write_gateway(study, addresses, **ports)
    assert not (study / "gateway" / "nginx.conf").exists()


def test_a_certificate_without_a_name_is_refused(tmp_path):
    """nginx compares names only: with IP addresses alone no SuperLink would ever be believed."""
    write_certificates(tmp_path, ["127.0.0.1"])
    with pytest.raises(UserError, match=r"server\.crt.*localhost"):
        write_gateway(tmp_path, ["192.0.2.7"])
    (tmp_path / "server.crt").write_text("")
    with pytest.raises(UserError, match="fedcmr-server init"):
        write_gateway(tmp_path, ["192.0.2.7"])
