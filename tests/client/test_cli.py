"""The command line: what it prints, its exit codes, and one clear line for what a person can put right."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedcmr.client.cli import main
from fedcmr.client.code_hash import sha256_of
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import SitePolicy, load_site
from fedcmr.shared.case import CaseInfo, read_index, write_index
from fedcmr.shared.privacy import Release, epsilon


@pytest.fixture
def scans(tmp_path):
    """Two patients in ACDC's layout."""
    rows, columns = np.mgrid[:80, :80]
    for number in (1, 2):
        folder = tmp_path / "scans" / f"patient{number:03d}"
        folder.mkdir(parents=True)
        for frame, radius in ((1, 12), (9, 8 + number)):
            mask = np.zeros((3, 80, 80), np.uint8)
            mask[:, np.hypot(rows - 40, columns - 40) < radius + 5] = 2
            mask[:, np.hypot(rows - 40, columns - 40) < radius] = 3
            for suffix, array in (("", mask * 60), ("_gt", mask)):
                image = nibabel.Nifti1Image(array.T, np.diag([1.5, 1.5, 10, 1]))
                nibabel.save(image, folder / f"patient{number:03d}_frame{frame:02d}{suffix}.nii.gz")
    return tmp_path / "scans"


def test_prepare_then_check_says_what_is_there(scans, tmp_path, capsys):
    (scans / "patient003").mkdir()
    assert main(["prepare", "--format", "acdc", str(scans), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2 cases, 2 of them new" in printed
    assert "missing-file" in printed
    assert "patient003" not in printed
    assert main(["check", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Siemens 2" in printed
    assert "10.0 mm" in printed
    efs = sorted(info.ef for info in read_index(tmp_path / "out"))
    assert f"{efs[0]:.1%} to {efs[1]:.1%}" in printed


def test_prepare_uses_a_given_key(scans, tmp_path):
    key = tmp_path / "site.key"
    key.write_text("ab" * 32)
    for name in ("one", "two"):
        assert main(["prepare", "--format", "acdc", "--key", str(key), str(scans), str(tmp_path / name / "out")]) == 0
        assert not (tmp_path / name / "pseudonym.key").exists()
    one, two = ([info.pseudonym for info in read_index(tmp_path / name / "out")] for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prepare", "--format", "acdc", "absent", "out"], "is not a folder"),
        (["prepare", "--format", "acdc", "--key", "absent", ".", "out"], "key file"),
        (["check", "absent"], "absent is no folder"),
        (["budget", "absent"], "fedcmr-client init"),
        (["init", "site", "--name", "../x", "--vendor", "GE", "--nominal-patients", "9"], "name"),
        (
            ["init", "site", "--name", "x", "--vendor", "GE", "--nominal-patients", "9", "--max-epsilon", "-1"],
            "epsilon",
        ),
    ],
)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prepare"],
        ["prepare", "--format", "png", "a", "b"],
        ["init", "s", "--name", "x", "--vendor", "Nikon"],
        ["prepare", "--format", "acdc", "a", "b", "--num-processes", "0"],
    ],
)
def test_a_misspelt_command_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda out, info: (out / "cases" / f"{info.pseudonym}.npz").unlink(), "is missing"),
        (lambda out, info: (out / "cases" / f"{info.pseudonym}.npz").write_bytes(b"no"), "not a readable case"),
        (lambda out, info: write_index(out, []), "holds no case"),
        (lambda out, info: write_index(out, [info, info]), "twice"),
        (lambda out, info: write_index(out, [CaseInfo(info.pseudonym, "Siemens", 1.5, 0.9, "g")]), "ejection fraction"),
        (lambda out, info: write_index(out, [CaseInfo(info.pseudonym, "Nikon", 1.5, info.ef, "g")]), "vendor"),
    ],
)
def test_check_refuses_a_folder_that_training_could_not_use(scans, tmp_path, capsys, damage, expected):
    out = tmp_path / "out"
    main(["prepare", "--format", "acdc", str(scans), str(out)])
    damage(out, read_index(out)[0])
    capsys.readouterr()
    assert main(["check", str(out)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_init_writes_settings_that_load_and_never_replaces_others(tmp_path, capsys):
    arguments = ["init", str(tmp_path / "a"), "--name", "north", "--vendor", "Philips", "--nominal-patients"]
    assert main([*arguments, "40", "--max-epsilon", "3", "--max-delta", "0.002"]) == 0
    settings = load_site(tmp_path / "a")
    assert (settings.name, settings.vendors, settings.nominal_patients) == ("north", {"Philips": 40}, 40)
    assert (settings.policy.max_epsilon, settings.policy.max_delta) == (3, 0.002)
    assert main([*arguments, "50"]) == 2
    assert load_site(tmp_path / "a") == settings


@pytest.mark.parametrize(("nominal", "delta"), [("20", 1e-3), ("100", 1e-3), ("130", 7e-4), ("4000", 2e-5)])
def test_init_takes_a_delta_that_fits_the_sites_size(tmp_path, nominal, delta):
    arguments = ["init", str(tmp_path), "--name", "north", "--vendor", "GE", "--nominal-patients", nominal]
    assert main(arguments) == 0
    assert load_site(tmp_path).policy.max_delta == delta


def test_budget_is_what_the_accountant_says_about_the_ledger(tmp_path, capsys):
    main(["init", str(tmp_path), "--name", "north", "--vendor", "GE", "--nominal-patients", "40"])
    release = Release(noise_multiplier=2.0, sample_rate=1.0, num_steps=3)
    Ledger(tmp_path / "ledger").reserve("run", 1, release, delta=1e-3, cap=8.0)
    capsys.readouterr()
    assert main(["budget", str(tmp_path), "--json"]) == 0
    budget = json.loads(capsys.readouterr().out)
    assert budget["epsilon"] == pytest.approx(epsilon([release], 1e-3)[0])
    assert budget["epsilon_left"] == pytest.approx(8.0 - budget["epsilon"])
    assert (budget["site"], budget["num_releases"], budget["num_steps"]) == ("north", 1, 3)
    assert main(["budget", str(tmp_path)]) == 0
    assert f"{budget['epsilon']:.3f}" in capsys.readouterr().out


def test_budget_has_the_history_of_every_charge(tmp_path, capsys):
    """Charged at whatever delta, shown at the site's own."""
    main(["init", str(tmp_path), "--name", "north", "--vendor", "GE", "--nominal-patients", "40"])
    releases = [Release(3.0, 1.0, 2), Release(2.0, 1.0, 3)]
    ledger = Ledger(tmp_path / "ledger", policy={"max_epsilon": 8.0, "max_delta": 1e-3})
    ledger.reserve("ab12", 1, releases[0], 1e-6, 100, "statistics")
    ledger.commit("ab12", 1, b"update")
    ledger.reserve("ab12", 2, releases[1], 1e-3, 100, "gradients")
    capsys.readouterr()
    assert main(["budget", str(tmp_path), "--json"]) == 0
    budget = json.loads(capsys.readouterr().out)
    assert [(h["run_id"], h["round"], h["task"], h["num_steps"], h["committed"]) for h in budget["history"]] == [
        ("ab12", 1, "statistics", 2, True),
        ("ab12", 2, "gradients", 3, False),
    ]
    after = [charge["epsilon_after"] for charge in budget["history"]]
    assert after == pytest.approx([epsilon(releases[:1], 1e-3)[0], epsilon(releases, 1e-3)[0]])
    assert after[-1] == budget["epsilon"]
    assert [change["kind"] for change in budget["changes"]] == ["open"]
    assert main(["budget", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "ab12" in printed and f"{after[0]:.3f}" in printed and budget["history"][0]["time"][:10] in printed
    assert "open: max_epsilon 8, max_delta 0.001" in printed


def test_budget_repairs_a_lost_ledger_from_its_second_copy(tmp_path, capsys):
    main(["init", str(tmp_path), "--name", "north", "--vendor", "GE", "--nominal-patients", "40"])
    Ledger(tmp_path / "ledger").reserve("run", 1, Release(2.0, 1.0, 3), delta=1e-3, cap=8.0)
    (tmp_path / "ledger" / "ledger.jsonl").unlink()
    assert main(["budget", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--repair" in error and error.count("\n") == 1
    assert main(["budget", str(tmp_path), "--repair", "--json"]) == 0
    budget = json.loads(capsys.readouterr().out)
    assert budget["num_steps"] == 3
    assert [change["kind"] for change in budget["changes"]] == ["open", "repair"]


def test_code_prints_what_a_policy_can_list(tmp_path, capsys):
    assert main(["code"]) == 0
    printed = capsys.readouterr().out.strip()
    root = Path(__file__).resolve().parents[2]
    for name in ("client", "shared"):
        shutil.copytree(root / name, tmp_path / "bundle" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bundle" / "fedcmr").mkdir()
    shutil.copy(root / "fedcmr" / "__init__.py", tmp_path / "bundle" / "fedcmr")
    assert sha256_of(tmp_path / "bundle") == printed, "the same source elsewhere is the same code"
    SitePolicy(allowed_code_sha256=[printed])
    path = tmp_path / "bundle" / "shared" / "privacy.py"
    noisy = "noise_multiplier * max_grad_norm"
    assert noisy in path.read_text()
    path.write_text(path.read_text().replace(noisy, "0 * max_grad_norm"))
    assert sha256_of(tmp_path / "bundle") != printed


def test_an_edited_ledger_shows_no_budget(tmp_path, capsys):
    main(["init", str(tmp_path), "--name", "north", "--vendor", "GE", "--nominal-patients", "40"])
    Ledger(tmp_path / "ledger").reserve("run", 1, Release(2.0, 1.0, 3), delta=1e-3, cap=8.0)
    path = tmp_path / "ledger" / "ledger.jsonl"
    path.write_text(path.read_text().replace("2.0", "9.0"))
    assert main(["budget", str(tmp_path)]) == 2
    assert "ledger" in capsys.readouterr().err
