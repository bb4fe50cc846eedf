"""`fedcmr-audit`: tables, JSON, the run's audit.json, the report's section, and one line for what is wrong."""

import json
import sys
from dataclasses import replace

import pytest

from fedcmr.server.federation.federate import federate
from fedcmr.server.report.audit import audit_tables, read_audit
from fedcmr.shared.case import load_cases, save_case, write_index
from fedcmr.shared.models.prior import load_prior
from fedcmr.simulations.audit import cli, commands
from fedcmr.simulations.grid import make_grid

pytestmark = pytest.mark.slow

SMALL = (
    "federation.num_views=1",
    "federation.num_rounds=2",
    "federation.local_steps=1",
    "federation.adapter=norm_affine",
)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedcmr-audit", *map(str, arguments)])
        code = cli.main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def finished(make_study, tmp_path, write_cases):
    """A study with a generator, held-out patients and synthetic cases."""
    run = make_study(*SMALL)
    with make_grid(run) as grid:
        federate(grid, run, load_prior(run.prior_path()))
    synthetic = []
    for seed, vendor in enumerate(("Siemens", "Philips", "GE")):
        write_cases(run.path / "test" / "hospitals" / vendor, vendor, 3, seed + 50)
        write_cases(tmp_path / "made" / vendor, vendor, 2, seed + 70)
        found = load_cases(tmp_path / "made" / vendor)
        synthetic += [replace(c, info=replace(c.info, pseudonym=f"{vendor}-{c.info.pseudonym}")) for c in found]
    for case in synthetic:
        save_case(run.path / "synthetic", case)
    write_index(run.path / "synthetic", [case.info for case in synthetic])
    return run


def test_a_run_is_audited_and_its_report_has_the_section(finished, command, tmp_path):
    out = tmp_path / "figures.json"
    code, printed, _ = command("canaries", finished.path, "--canaries", 6, "--guesses", 4, "--json", out)
    assert code == 0 and "lower bound" in printed
    figures = json.loads(out.read_text())
    assert [(row["build"], row["control"]) for row in figures] == [("sound", False), ("sound", True)]
    assert figures[0]["num_guesses"] == 4 and figures[0]["num_sites"] == 1
    assert figures[0]["verdict"] == "not refuted"
    assert f"refute a claim below {figures[0]['highest_provable']:.2f} at best" in " ".join(printed.split())
    assert 7.5 < figures[0]["claimed_epsilon"] <= 8 and figures[0]["adapter"] == "norm_affine"
    code, printed, _ = command("membership", finished.path, "--shadows", 2)
    assert code == 0 and "SimA" in printed
    code, printed, _ = command("copies", finished.path, "--cases", 1)
    assert code == 0 and "nearer to training" in printed
    audit = json.loads((finished.path / "audit.json").read_text())
    assert set(audit) == {"canaries", "membership", "copies"} and audit["canaries"] == figures
    assert [row["num_members"] for row in audit["membership"].values()] == [15, 15, 15]
    assert audit["copies"]["num_training"] == 15 and audit["copies"]["vendors"] == ["GE", "Philips", "Siemens"]
    tables = audit_tables(read_audit(finished.path))
    assert len(tables) == 3 and all(len(row) == len(table.headings) for table in tables for row in table.rows)


def test_images_of_patients_are_drawn_only_where_these_are_simulated(finished, command, tmp_path):
    """Nobody said where these scans come from, and unknown counts as real."""
    assert command("copies", finished.path, "--cases", 1)[0] == 0
    assert not list(finished.path.glob("*.png"))
    assert command("copies", finished.path, "--cases", 1, "--pairs", tmp_path / "asked.png")[0] == 0
    assert (tmp_path / "asked.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_run_the_settings_are_the_default_ones(tiny_prior, command, tmp_path):
    out = tmp_path / "c.json"
    code, printed, _ = command(
        "canaries", "--canaries", 8, "--broken", "--repeats", 2, "--prior", tiny_prior, "--json", out, "--set", *SMALL
    )
    told = " ".join(printed.split())
    rows = json.loads(out.read_text())
    assert [row["build"] for row in rows] == [
        "sound",
        "sound",
        "sound",
        "noise_off",
        "clip_off",
        "slices_as_unit",
        "ledger_reset",
    ]
    assert code == 0 and all(row["claimed_epsilon"] > 7.5 and row["num_guesses"] == 8 for row in rows)
    for row in rows[3:]:  # so few canaries cannot refute it, and that is what is said
        assert row["verdict"] == "not refuted"
        assert f"not refuted at {row['claimed_epsilon']:.2f}. What was released refutes claims below" in told
    code, *_ = command(
        "canaries",
        "--canaries",
        8,
        "--broken",
        "--claim",
        1,
        "--repeats",
        2,
        "--prior",
        tiny_prior,
        "--json",
        out,
        "--set",
        *SMALL,
    )
    rows = json.loads(out.read_text())
    assert rows[0]["claimed_epsilon"] > 7.5 and all(row["claimed_epsilon"] <= 1 for row in rows[1:])
    assert all(row["verdict"] == "refuted" for row in rows if row["build"] == "noise_off")


def test_membership_of_a_simulated_study(tiny_prior, command, tmp_path, monkeypatch):
    out = tmp_path / "m.json"
    assert (
        command(
            "membership",
            "--patients",
            2,
            "--shadows",
            2,
            "--prior",
            tiny_prior,
            "--json",
            out,
            "--set",
            *SMALL,
            "hospitals.vendors=[GE]",
        )[0]
        == 0
    )
    assert set(json.loads(out.read_text())) == {"denoising loss", "SimA", "likelihood ratio"}
    monkeypatch.setattr(commands, "OVERFIT_STEPS", 2)
    assert (
        command(
            "membership",
            "--overfitted",
            "--patients",
            2,
            "--prior",
            tiny_prior,
            "--json",
            out,
            "--set",
            "hospitals.vendors=[GE]",
        )[0]
        == 0
    )
    assert [row["num_members"] for row in json.loads(out.read_text()).values()] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["canaries", "--canaries", "1"], "--canaries >= 2"),
        (["canaries", "--canaries", "10", "--guesses", "11"], "--guesses"),
        (["canaries", "--set", "privacy.enabled=false"], "privacy.enabled"),
        (["membership", "--shadows", "1"], "--shadows"),
        (["copies", "nowhere"], "nowhere"),
        (["canaries", "--json", "no/such/folder/x.json"], "--json"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, told, tiny_prior, command):
    if arguments[0] != "copies":
        arguments += ["--prior", str(tiny_prior)] if "--set" not in arguments else []
    code, _, told_on_stderr = command(*arguments)
    assert code == 2 and told in told_on_stderr and told_on_stderr.count("\n") == 1
