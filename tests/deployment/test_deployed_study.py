"""A whole study over Flower's deployment engine, on this machine."""

import json
import re

from client.ledger import Ledger
from server import cli as server_cli
from shared import checkpoint
from tests.deployment.conftest import server


def test_a_study_between_institutions_ends_with_its_report(deployed, capfd):
    run = deployed.folder / "runs" / "default"
    with deployed.joined("a", "b", "c"):
        assert server("run", deployed.folder, "--test", deployed.test, "--set", *deployed.settings) == 0
        shown = capfd.readouterr()
        assert server("status", deployed.folder, "--json") == 0
        facts = json.loads(capfd.readouterr().out)
    assert "round 2 of 2: 3 of 3 sites" in shown.err + (run / "log.txt").read_text()
    report = json.loads((run / "report.json").read_text())
    assert set(report["privacy"]["sites"]) == {"a", "b", "c"}
    assert report["regression"][deployed.test.name]["all"]["n_patients"] == 3
    assert facts["services"] == {"superlink": True, "superexec": True} and facts["healthy"]
    assert facts["sites"] == dict.fromkeys("abc", "online")
    assert facts["run"]["round"] == 2 and facts["run"]["answered"] == ["a", "b", "c"]
    _, metadata = checkpoint.load(run / "generator.safetensors")
    for name, folder in deployed.sites.items():
        assert len(Ledger(folder / "ledger").charges()) == len(metadata["sites"][name]["releases"]) == 2
        assert not list((folder / "flwr").rglob("*.npz")), "no scan is copied into Flower's folder"
    assert server_cli.main(["run", str(deployed.folder)]) == 2, "a finished run is not begun again by accident"
    assert re.search(r"--resume goes on with it", capfd.readouterr().err)
