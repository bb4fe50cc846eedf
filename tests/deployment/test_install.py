"""The files that run site and coordinator as services, checked by the programs that read such files.

No unit is started and no image is built here: `systemd-analyze` and Compose's own reader say that the files are
understood and how far a unit is closed, hadolint what is unwise in the Dockerfile.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fedcmr.client import cli as client_cli
from fedcmr.client.deployment.install import CONTAINER_ID, UNIT, next_steps, service_files
from fedcmr.client.policy import SiteSettings, write_site
from fedcmr.server import cli as server_cli
from fedcmr.server.deployment import install as server_install
from fedcmr.server.deployment.coordinator import Coordinator
from fedcmr.shared.errors import UserError
from fedcmr.shared.service_files import write_all

BIN = Path(sys.executable).parent
MAX_EXPOSURE = 20
"""Tenths, of 100 for a unit that is closed to nothing; systemd calls up to 20 "OK"."""
PROGRAM = Path("/usr/bin/true")
SITE = SiteSettings(
    "a",
    {"GE": 40},
    40,
    data="/data/cases",
    ledger_replica="/mnt/other/replica.jsonl",
    prior="p.safetensors",
    coordinator="study.test:443",
    authority="ca.crt",
    folder=Path("/srv/fedcmr/site"),
)
COORDINATOR = Coordinator("pilot", ["study.test"], delivery_port=9444, folder=Path("/srv/fedcmr/study"))
RUN = Path("/srv/fedcmr/study/runs/default/synthetic")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def units(folder: Path) -> list[Path]:
    write_all(service_files(SITE, "systemd", "fedcmr", PROGRAM), folder)
    write_all(server_install.service_files(COORDINATOR, "fedcmr", PROGRAM, PROGRAM, RUN), folder)
    return sorted(folder.glob("*.service"))


@pytest.fixture
def seen_folder():
    """A folder that a service would see, which those of tests, under /tmp, are not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.tool("systemd-analyze")
def test_systemd_understands_every_line_of_the_units(tmp_path):
    for unit in units(tmp_path):
        assert run("systemd-analyze", "verify", unit, cwd=tmp_path) == "", unit


@pytest.mark.tool("systemd-analyze")
def test_the_units_are_closed(tmp_path):
    assert len(units(tmp_path)) == 4
    for unit in units(tmp_path):
        run(
            "systemd-analyze",
            "security",
            "--no-pager",
            "--offline=true",
            f"--threshold={MAX_EXPOSURE}",
            unit,
            cwd=tmp_path,
        )


def test_no_unit_has_a_way_to_more(tmp_path):
    needed = {
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "User=fedcmr",
        "UMask=0077",
        "RestrictSUIDSGID=yes",
        "RestrictNamespaces=yes",
        "SystemCallFilter=@system-service",
    }
    for unit in units(tmp_path):
        lines = set(unit.read_text().splitlines())
        assert needed <= lines, needed - lines
        port = "CAP_NET_BIND_SERVICE" if "gateway" in unit.name else ""
        assert {f"CapabilityBoundingSet={port}", f"AmbientCapabilities={port}"} <= lines


def test_a_site_writes_to_its_folder_and_its_replica_alone(tmp_path):
    text = service_files(SITE, "systemd", "fedcmr", PROGRAM)[UNIT]
    assert "\nReadWritePaths=/srv/fedcmr/site /mnt/other\n" in text
    read_only = re.search(r"\nReadOnlyPaths=(.*)\n", text)[1].split()
    assert set(read_only) == {
        "-/srv/fedcmr/site/site.yaml",
        "-/srv/fedcmr/site/node_key",
        "-/srv/fedcmr/site/ca.crt",
        "-/data/cases",
        "-/srv/fedcmr/site/p.safetensors",
    }
    assert "\nUser=fedcmr\n" in text and "\nExecStart=/usr/bin/true join /srv/fedcmr/site\n" in text


def test_the_delivery_listens_where_the_gateway_calls_it():
    text = server_install.service_files(COORDINATOR, "fedcmr", PROGRAM, PROGRAM, RUN)[server_install.DELIVERY]
    assert f"\nExecStart=/usr/bin/true deliver {RUN} --folder /srv/fedcmr/study --port 9444\n" in text
    assert "\nReadWritePaths=/srv/fedcmr/study/logs\n" in text


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path):
    write_all(service_files(SITE, "compose", "fedcmr", PROGRAM), tmp_path)
    assert run(BIN / "hadolint", "Dockerfile", cwd=tmp_path) == ""


def test_no_secret_can_enter_the_image(tmp_path):
    files = service_files(SITE, "compose", "fedcmr", PROGRAM)
    (copied,) = re.findall(r"^COPY (?!--from)(\S+)", files["Dockerfile"], re.M)
    assert files[".dockerignore"].split() == ["*", f"!{copied}"] and copied.endswith("-py3-none-any.whl")
    assert not re.search(r"^(ADD|ARG)\b|key|token", files["Dockerfile"].replace("no key", ""), re.M)
    assert f"\nUSER {CONTAINER_ID}:{CONTAINER_ID}\n" in files["Dockerfile"]


def test_compose_reads_a_container_without_privileges(tmp_path):
    write_all(service_files(SITE, "compose", "fedcmr", PROGRAM), tmp_path)
    read = yaml.safe_load(run(BIN / "docker-compose", "-f", "compose.yaml", "config", cwd=tmp_path))
    (service,) = read["services"].values()
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in service and "privileged" not in service and "environment" not in service
    writable = {mount["target"] for mount in service["volumes"] if not mount.get("read_only")}
    assert writable == {"/srv/fedcmr/site", "/mnt/other"}
    assert all(mount["source"] == mount["target"] for mount in service["volumes"])
    assert service["command"] == ["join", "/srv/fedcmr/site"]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"coordinator": None}, "coordinator"),
        ({"folder": Path("/srv/a b")}, "letters, digits"),
        ({"folder": Path("/srv/a%n")}, "letters, digits"),
        ({"folder": Path("/home/anna/site")}, "does not see"),
        ({"data": "/tmp/cases"}, "does not see"),
    ],
)
def test_a_site_that_cannot_be_a_service_is_told_why(changes, part):
    with pytest.raises(UserError, match=part):
        service_files(replace(SITE, **changes), "systemd", "fedcmr", PROGRAM)


@pytest.mark.parametrize("user", ["root", "a b", "x; rm"])
def test_a_service_has_an_account_of_its_own(user):
    with pytest.raises(UserError, match="--user"):
        service_files(SITE, "systemd", user, PROGRAM)
    with pytest.raises(UserError, match="--user"):
        server_install.service_files(COORDINATOR, user, PROGRAM, PROGRAM)


def test_what_is_left_to_do_names_what_lies_outside_the_folder(tmp_path):
    shown = next_steps(SITE, "systemd", "fedcmr", tmp_path)
    assert "write to /mnt/other" in shown and "read /data/cases" in shown
    assert "chown -R fedcmr:fedcmr /srv/fedcmr/site\n" in shown, "only the site's own folder changes its owner"


def test_the_commands_write_the_files(seen_folder, tmp_path, capsys):
    site, study = seen_folder / "site", seen_folder / "study"
    write_site(site, replace(SITE, folder=Path()))
    for kind, count in (("systemd", 1), ("compose", 3)):
        out = tmp_path / kind
        arguments = ["service", str(site), "--kind", kind, "--out", str(out), "--program", str(PROGRAM)]
        assert client_cli.main(arguments) == 0
        assert len(list(out.iterdir())) == count
    assert server_cli.main(["init", str(study), "--name", "pilot", "--address", "study.test"]) == 0
    arguments = ["service", str(study), "--out", str(tmp_path / "server"), "--program", str(PROGRAM)]
    assert server_cli.main(arguments) == 0
    assert {path.name for path in (tmp_path / "server").iterdir()} == set(server_install.FILES)
    assert "systemctl enable --now fedcmr-coordinator fedcmr-gateway" in capsys.readouterr().out


def test_a_new_folder_has_a_gateway_that_follows_its_settings(seen_folder, capsys):
    study = seen_folder / "study"
    arguments = ["init", str(study), "--name", "pilot", "--address", "study.test", "--gateway-port", "8443"]
    assert server_cli.main(arguments) == 2 and "to differ" in capsys.readouterr().err
    arguments[-1] = "4443"
    assert server_cli.main(arguments) == 0
    config = study / "gateway" / "nginx.conf"
    assert ":4443 ssl" in config.read_text() and "server_name study.test;" in config.read_text()
    settings = (study / "coordinator.yaml").read_text()
    (study / "coordinator.yaml").write_text(settings.replace("4443", "4444"))
    assert server_cli.main(["gateway", str(study)]) == 0
    assert ":4444 ssl" in config.read_text()


LIMITS = {"MemoryMax", "MemoryHigh", "TasksMax", "LimitCORE", "InaccessiblePaths"}


def test_every_unit_has_limits_and_secrets_that_it_does_not_see(tmp_path):
    """What runs in a site's unit was sent by somebody else, and what runs behind the gateway is asked by anybody."""
    for unit in units(tmp_path):
        values = dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.M))
        assert values.keys() >= LIMITS and values["LimitCORE"] == "0", unit.name
        assert ("CPUWeight" in values) == (unit.name in (UNIT, server_install.DELIVERY))
        hidden = values["InaccessiblePaths"].split()
        if unit.name == UNIT:
            assert hidden == ["-/srv/fedcmr/site/pseudonym.key", "-/data/pseudonym.key"]
            assert values["LimitFSIZE"] == "8G"
        else:
            assert "-/srv/fedcmr/study/ca.key" in hidden, "it signs for the whole study, and only 'init' needs it"
        denied = {UNIT: "link-local multicast", "fedcmr-gateway.service": None}.get(unit.name, "any")
        assert values.get("IPAddressDeny") == denied, "the gateway is what everybody may call"


@pytest.mark.tool("systemd-analyze")
@pytest.mark.parametrize(
    ("coordinator", "allow", "expected"),
    [
        ("192.0.2.7:443", (), "localhost 192.0.2.7"),
        ("[2001:db8::1]:443", (), "localhost 2001:db8::1"),
        ("study.test:443", ("192.0.2.0/24", "2001:db8::1"), "localhost 192.0.2.0/24 2001:db8::1/128"),
    ],
)
def test_a_site_calls_its_coordinator_alone_where_its_address_is_known(tmp_path, coordinator, allow, expected):
    site = replace(SITE, coordinator=coordinator)
    files = service_files(site, "systemd", "fedcmr", PROGRAM, allow)
    assert f"\nIPAddressDeny=any\nIPAddressAllow={expected}\n" in files[UNIT]
    (unit,) = write_all(files, tmp_path)
    assert run("systemd-analyze", "verify", unit, cwd=tmp_path) == ""


def test_an_address_that_is_none_is_refused():
    with pytest.raises(UserError, match="--allow"):
        service_files(SITE, "systemd", "fedcmr", PROGRAM, ["study.test"])


def test_the_container_has_limits_and_does_not_see_the_pseudonyms_key(seen_folder, tmp_path):
    site = replace(SITE, folder=seen_folder / "site", data="train")
    site.folder.mkdir()
    (site.folder / "pseudonym.key").touch()
    write_all(service_files(site, "compose", "fedcmr", PROGRAM), tmp_path)
    read = yaml.safe_load(run(BIN / "docker-compose", "-f", "compose.yaml", "config", cwd=tmp_path))
    (service,) = read["services"].values()
    assert 2**28 < int(service["mem_limit"]) == int(service["memswap_limit"]) and service["cpu_shares"] == 512
    assert service["pids_limit"] == 512 and service["ulimits"]["core"] == {"soft": 0, "hard": 0}
    hidden = [mount for mount in service["volumes"] if mount["source"] == "/dev/null"]
    assert [(mount["target"], mount["read_only"]) for mount in hidden] == [(f"{site.folder}/pseudonym.key", True)]


def test_test_patients_are_read_only_and_their_ledger_is_written():
    site = replace(SITE, test="/data/tests/cases", test_ledger="/data/test_ledger")
    text = service_files(site, "systemd", "fedcmr", PROGRAM)[UNIT]
    assert "\nReadWritePaths=/srv/fedcmr/site /data/test_ledger /mnt/other\n" in text
    assert "-/data/tests/cases" in re.search(r"\nReadOnlyPaths=(.*)\n", text)[1].split()
    assert "-/data/tests/pseudonym.key" in re.search(r"\nInaccessiblePaths=(.*)\n", text)[1].split()
