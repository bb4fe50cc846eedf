"""One hospital of three sends what no honest one would, over the real engine: the round continues with the others."""

import sys

import numpy as np
import pytest

from fedcmr.client.ledger import Ledger
from fedcmr.server.deployment.coordinator import load_coordinator
from fedcmr.server.federation.state import FederationState
from fedcmr.server.run_folder import load_run
from fedcmr.shared.checkpoint import from_bytes, load, round_path
from tests.deployment.conftest import free_port, server, wait_online
from tests.deployment.gateway_study import BIN, process

pytestmark = pytest.mark.engine

REASONS = ("keys", "non-finite", "non-finite", "shape", "names", "payload", "norm", "payload", "names-another-site")
"""Why its answer is dropped, round by round, in the order of `HOSTILE`."""
HOSTILE = f"""#!{sys.executable}
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supernode.cli import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

app = ClientApp()


@app.train()
def train(message, context):
    server_round = message.content["config"]["server-round"]
    reply = RecordDict({{"reply": ConfigRecord({{"site": "b" if server_round == 9 else "c", "code": "ok"}})}})
    if server_round > 1:  # in the first, the record is missing
        filled = {{2: np.nan, 3: np.inf, 7: 1e6}}.get(server_round, 0.0)
        shapes = {{name: array.shape for name, array in message.content["arrays"].items()}}
        arrays = {{name: Array(np.full(shape, filled, np.float32)) for name, shape in shapes.items()}}
        last, shape = sorted(shapes.items())[-1]
        if server_round == 4:
            arrays[last] = Array(np.zeros((*shape, 2), np.float32))
        if server_round == 5:
            del arrays[last]
        if server_round in (6, 8):  # one number, or ten times as many, said to be as many as were asked for
            payload = Array(np.zeros(1 if server_round == 6 else 10 * int(np.prod(shape)), np.float32))
            arrays[last] = Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=payload.data)
        reply["arrays"] = ArrayRecord(arrays)
    return Message(reply, reply_to=message)


run_clientapp.get_load_client_app_fn = lambda *_, **__: lambda *_: app
flwr_clientapp()
"""


def test_a_hostile_site_changes_nothing_but_the_log(deployed, tmp_path):
    deployed.renew()
    run, command = tmp_path / "run", tmp_path / "bin" / "flwr-clientapp"
    command.parent.mkdir()
    command.write_text(HOSTILE)
    command.chmod(0o700)
    coordinator = load_coordinator(deployed.folder)
    supernode = (
        BIN / "flower-supernode",
        "--superlink",
        coordinator.superlink,
        "--root-certificates",
        coordinator.ca,
        "--auth-supernode-private-key",
        deployed.sites["c"] / "node_key",
        "--host",
        "127.0.0.1",
        "--port",
        free_port(),
    )
    settings = (*deployed.settings, f"federation.num_rounds={len(REASONS)}")
    with (
        deployed.joined("a", "b"),
        process(tmp_path / "node.log", *supernode, home=tmp_path / "flwr", commands=command.parent),
    ):
        wait_online(tmp_path / "node.log", told="SuperNode ID")
        done = server("run", deployed.folder, "--out", run, "--test", deployed.test, "--set", *settings)
        assert done == 0, (tmp_path / "node.log").read_text()[-3000:]

    lines = load_run(run).rounds()
    assert [line["dropped"] for line in lines] == [{"c": reason} for reason in REASONS]
    assert all(line["answered"] == ["a", "b"] for line in lines)
    assert "c dropped: norm" in (run / "log.txt").read_text()

    run_id = FederationState.load_newest(run / "checkpoints").run_id
    ledgers = [Ledger(deployed.sites[name] / "ledger") for name in ("a", "b")]
    models = {number: load(round_path(run / "checkpoints", number))[0] for number in range(1, len(REASONS) + 1)}
    for server_round in range(2, len(REASONS) + 1):
        sent = [from_bytes(ledger.cached_reply(run_id, server_round)) for ledger in ledgers]
        before, after = models[server_round - 1], models[server_round]
        for name, update in sent[0].items():
            expected = before[f"arrays/{name}"] + (update.astype(np.float64) + sent[1][name]) / 2
            np.testing.assert_allclose(after[f"arrays/{name}"], expected, rtol=1e-6, atol=1e-7)
