"""Code and callers that a deployment turns away: tried on the real engine, by whoever sits at the coordinator."""

import json
import shutil
from contextlib import contextmanager

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto
from flwr.proto import control_pb2
from flwr.supercore.fab import Fab

from fedcmr.client.cli import main as client
from fedcmr.client.deployment.clientapp import SITE_VARIABLE
from fedcmr.server.deployment.coordinator import load_coordinator
from fedcmr.server.deployment.services import node_ids
from fedcmr.simulations.flower_engine import ROOT
from tests.deployment.conftest import change_site, children, descendant, free_port, server
from tests.deployment.gateway_study import BIN, process, request, send, wait_for

pytestmark = pytest.mark.engine

PATIENCE_S = 240.0
STEAL = f"""
import os
from pathlib import Path

if "{SITE_VARIABLE}" in os.environ:
    (Path(os.environ["{SITE_VARIABLE}"]) / "stolen").touch()
"""
ASK = """
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    question = Message(RecordDict(), dst_node_id={node}, message_type="train")
    (reply,) = grid.send_and_receive([question], timeout=200)
    partial = Path({answer!r} + ".partial")
    partial.write_text(reply.error.reason if reply.has_error() else str(dict(reply.content)))
    partial.rename({answer!r})
"""
AGENT = (
    STEAL
    + """
import json

from flwr.agentapp import AgentApp

app = AgentApp()


@app.main()
def main(agent, context):
    def call(name, **arguments):
        return json.loads(agent.grid.call({{"name": name, "call_id": name, "arguments": arguments}})["output"])

    if "FEDCMR_SITE" in os.environ:
        call("push_reply_message", payload="done")
    else:
        message = {{"dst_node_id": "{node}", "payload": "x", "reply_to_message_id": None}}
        sent = call("push_messages", messages=[message])["results"][0]["message_id"]
        partial = Path({answer!r} + ".partial")
        partial.write_text(json.dumps(call("pull_messages", message_ids=[sent], timeout=200)))
        partial.rename({answer!r})
"""
)
AGENT_PROJECT = """
[project]
name = "agent"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
agentapp = "rogue.agent:app"
"""


@pytest.fixture(scope="module")
def joined(deployed):
    """Site b, online."""
    assert server("start", deployed.folder) == 0
    with deployed.joined("b") as running:
        yield running["b"]


def node(study, name="b"):
    return node_ids(load_coordinator(study.folder))[name]


def our_app(folder, answer, study):
    """A copy of what Flower packs, with a server that asks site b something and writes the answer down."""
    for package in ("client", "server", "shared", "configs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    (folder / "fedcmr").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "fedcmr/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "server" / "app.py").write_text(ASK.format(node=node(study), answer=str(answer)))
    return folder


def run_app(study, app, answer, prompt=""):
    """Start an app by the Control API, and wait for what its server wrote down."""
    coordinator = load_coordinator(study.folder)
    start = control_pb2.StartRunRequest(fab=fab_to_proto(Fab("", build_fab_from_disk(app), {})), user_prompt=prompt)
    message = request("POST", "/v1/control/start-run", start.SerializeToString())
    status, text = send(coordinator.superlink_port, message, coordinator.ca)
    assert status == 200, text
    log = study.folder / "logs" / "superexec.log"
    wait_for(answer.exists, "answer", log, study.sites["b"] / "join.log", seconds=PATIENCE_S)
    return answer.read_text()


def test_the_approved_code_is_let_in_whatever_the_server_is(deployed, joined, tmp_path):
    """So that the refusals below are for the code, and for nothing else."""
    answer = tmp_path / "answer"
    assert "bad-request" in run_app(deployed, our_app(tmp_path / "app", answer, deployed), answer)


def test_an_altered_bundle_is_refused_before_any_of_its_code_runs(deployed, joined, tmp_path):
    answer, site = tmp_path / "answer", deployed.sites["b"]
    app = our_app(tmp_path / "app", answer, deployed)
    for path in (app / "client" / "app.py", app / "shared" / "records.py"):
        path.write_text(path.read_text() + STEAL)
    before = set((site / "flwr" / "apps").glob("*"))
    assert "code-not-allowed" in run_app(deployed, app, answer)
    assert not (site / "stolen").exists()
    assert set((site / "flwr" / "apps").glob("*")) == before, "no file of it was unpacked"


def test_an_agent_is_refused_before_any_of_its_code_runs(deployed, joined, tmp_path):
    """Flower has other kinds of apps, which a SuperNode starts at the server's word by commands of other names."""
    answer, site = tmp_path / "answer", deployed.sites["b"]
    package = tmp_path / "app" / "rogue"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "agent.py").write_text(AGENT.format(node=node(deployed), answer=str(answer)))
    (tmp_path / "app" / "pyproject.toml").write_text(AGENT_PROJECT)
    shown = json.loads(run_app(deployed, tmp_path / "app", answer, prompt="hello"))
    assert not (site / "stolen").exists()
    assert [reply["error"] is not None for reply in shown["messages"]] == [True], "and the SuperNode is free again"


@pytest.mark.parametrize("flags", [(), ("--superexec-auth-secret-file", "guessed")], ids=["none", "guessed"])
def test_an_executor_without_the_sites_secret_gets_no_work(joined, tmp_path, flags):
    """Any program of the site's machine reaches the SuperNode's own port, and could answer in the site's name."""
    (tmp_path / "guessed").write_text("0" * 64)
    words = children(joined.pid)[descendant(joined.pid, "flower-supernode")]
    address = f"127.0.0.1:{words[words.index('--port') + 1]}"
    known = ("--superexec-auth-secret-file", words[words.index("--superexec-auth-secret-file") + 1])
    command = (BIN / "flower-superexec", "--insecure", "--runtime-api-address", address)
    logs = tmp_path / "honest.log", tmp_path / "rogue.log"
    with (
        process(logs[0], *command, *known, home=tmp_path / "flwr") as honest,
        process(logs[1], *command, *flags, home=tmp_path / "flwr") as rogue,
    ):
        wait_for(lambda: rogue.poll() is not None, "refusal", *logs, seconds=PATIENCE_S)  # Flower turns it away
        assert honest.poll() is None, "one with the secret stays and waits for work"
    assert joined.poll() is None


@contextmanager
def supernode(site, *flags):
    """Flower's own SuperNode with the site's key: `fedcmr-client join` would refuse before it starts one."""
    command = ("--auth-supernode-private-key", site / "node_key", "--host", "127.0.0.1", "--port", free_port())
    log = site / "supernode.log"
    with process(log, BIN / "flower-supernode", *command, *flags, home=site / "flwr") as running:
        yield running, log


def copy_of(study, name, folder):
    shutil.copytree(study.sites[name], folder, ignore=shutil.ignore_patterns("flwr", "*.log"))
    return folder


def test_a_key_in_use_is_refused_and_its_owner_stays(deployed, joined, tmp_path):
    coordinator = load_coordinator(deployed.folder)
    thief = copy_of(deployed, "b", tmp_path / "thief")
    with supernode(thief, "--superlink", coordinator.superlink, "--root-certificates", coordinator.ca) as (
        running,
        log,
    ):
        wait_for(lambda: running.poll() is not None, "refusal", log, seconds=PATIENCE_S)
        assert running.returncode != 0, log.read_text()
    assert deployed.status()["sites"]["b"] == "online" and joined.poll() is None


def test_a_server_of_another_authority_is_not_called(deployed, tmp_path, capfd):
    """`join` says so in a line; Flower's own SuperNode gets no further than the handshake."""
    assert server("init", tmp_path / "other", "--name", "loopback", "--address", "127.0.0.1") == 0
    site = copy_of(deployed, "c", tmp_path / "site")
    other = tmp_path / "other" / "ca.crt"
    change_site(site, authority=str(other))
    capfd.readouterr()
    assert client(["join", str(site)]) == 2
    error = capfd.readouterr().err
    assert "is not the study's server" in error and error.rstrip().endswith("they are listed above")
    address = load_coordinator(deployed.folder).superlink
    with supernode(site, "--superlink", address, "--root-certificates", other) as (_, log):
        wait_for(lambda: "CERTIFICATE_VERIFY_FAILED" in log.read_text(), "refusal", log, seconds=PATIENCE_S)
    assert deployed.status()["sites"]["c"] != "online"


def test_plain_http_is_refused(deployed, tmp_path):
    coordinator = load_coordinator(deployed.folder)
    for path in ("/v1/fleet/activate-node", "/v1/control/list-runs"):
        status, _ = send(coordinator.superlink_port, request("POST", path), None)
        assert status == 0, "the connection is closed without an answer"
        assert send(coordinator.superlink_port, request("POST", path), coordinator.ca)[0] > 0, "as over TLS it is not"
    site = copy_of(deployed, "c", tmp_path / "site")
    with supernode(site, "--superlink", coordinator.superlink, "--insecure") as (running, log):
        wait_for(lambda: "rror" in log.read_text() or running.poll() is not None, "refusal", log, seconds=PATIENCE_S)
    assert deployed.status()["sites"]["c"] != "online"
