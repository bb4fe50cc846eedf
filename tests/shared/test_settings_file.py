"""Settings mean what they show: a value from elsewhere is refused in every file that people write."""

import json
import os
import time

import pytest

from fedcmr.client.policy import SITE_FILE, SiteSettings, load_site, write_site
from fedcmr.server.deployment.coordinator import COORDINATOR_FILE, Coordinator, load_coordinator, write_coordinator
from fedcmr.server.run_folder import load_run, open_run
from fedcmr.server.settings import load
from fedcmr.shared.errors import UserError
from fedcmr.shared.settings_file import MAX_BYTES, read_settings

CANARY = "word-of-the-environment"
INTERPOLATIONS = (
    "${oc.env:FEDCMR_SECRET}",
    "x${oc.env:FEDCMR_SECRET,none}y",
    "${seed}",
    "${oc.decode:'[1,2]'}",
    "${oc.create:{a:1}}",
    "${python:1+1}",
    '"$\\x7boc.env:FEDCMR_SECRET}"',  # the same letters, escaped
)


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("FEDCMR_SECRET", CANARY)


@pytest.mark.parametrize("value", INTERPOLATIONS)
def test_an_interpolation_is_refused_and_brings_nothing_in(tmp_path, value):
    path = tmp_path / "study.yaml"
    path.write_text(f"seed: 3\ndata_root: {value}\n")
    for name, read in {
        str(path): lambda: load(path),
        "data_root": lambda: load("default", [f"data_root={value}"]),
        "prior": lambda: load("default", [f"prior={value}"]),
    }.items():
        with pytest.raises(UserError) as caught:
            read()
        assert name in str(caught.value) and CANARY not in str(caught.value) and "\n" not in str(caught.value)


def test_no_environment_variable_reaches_a_run_folder(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("data_root: ${oc.env:FEDCMR_SECRET}\n")
    with pytest.raises(UserError, match="interpolation"):
        open_run(tmp_path / "run", load(path))
    run = open_run(tmp_path / "run", load("default"))
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("data_root: null", "data_root: ${oc.env:FEDCMR_SECRET}"))
    assert "oc.env" in config.read_text()
    with pytest.raises(UserError, match="interpolation"):
        load_run(run.path)


def test_a_sites_policy_is_not_the_environments(tmp_path):
    path = write_site(tmp_path, SiteSettings("north", {"GE": 40}, 40))
    path.write_text(path.read_text().replace("max_epsilon: 8.0", "max_epsilon: ${oc.env:FEDCMR_EPSILON,800}"))
    with pytest.raises(UserError, match=rf"{SITE_FILE} line \d+: expected a value, got an interpolation"):
        load_site(tmp_path)


def test_a_coordinators_file_is_read_the_same_way(tmp_path):
    write_coordinator(Coordinator("pilot", ["localhost"], folder=tmp_path))
    path = tmp_path / COORDINATOR_FILE
    assert load_coordinator(tmp_path).name == "pilot"
    path.write_text(path.read_text().replace('name: "pilot"', 'name: "${oc.env:FEDCMR_SECRET}"'))
    with pytest.raises(UserError, match="interpolation"):
        load_coordinator(tmp_path)


@pytest.mark.parametrize(
    "added",
    [
        "name: south\n",  # at the top
        "policy:\n  max_epsilon: 1000\n",  # a whole block again
    ],
)
def test_a_key_that_comes_twice_is_refused(tmp_path, added):
    path = write_site(tmp_path, SiteSettings("north", {"GE": 40}, 40))
    path.write_text(path.read_text() + added)
    with pytest.raises(UserError, match="every key once"):
        load_site(tmp_path)


@pytest.mark.parametrize("text", ["policy: {max_epsilon: 8, max_epsilon: 9}\n", "policy: {<<: {max_epsilon: 9}}\n"])
def test_a_key_within_a_block_is_there_once_too(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"expected (every key once|keys, got a merged mapping)"):
        read_settings(tmp_path / "x.yaml")


def bomb() -> str:
    """Nine levels of nine aliases each: four hundred million values in four hundred bytes."""
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        "[" * 30_000,
        "a: " * 2_000 + "1",
        "seed: " + "1" * 5_000,
        "a" * (MAX_BYTES + 1),
        "- a\n",
        "\0",
        "seed: !!python/object:os.x {}",
    ],
    ids=["aliases", "lists", "maps", "digits", "size", "no keys", "zero", "tag"],
)
def test_a_hostile_file_ends_quickly_with_one_line(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        load(path)
    assert time.process_time() - started < 5 and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_that_is_none_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / SITE_FILE)
    with pytest.raises(UserError, match="not a regular file"):
        load_site(tmp_path / SITE_FILE)


def test_a_path_with_a_dollar_alone_stays_a_path():
    assert load("default", ["data_root=/data/$cans"]).data_root == "/data/$cans"
    assert json.dumps(load("default", ["data_root=/a&b*c"]).data_root) == '"/a&b*c"'


def test_a_key_without_its_block_is_answered_with_the_whole_key(tmp_path):
    (tmp_path / SITE_FILE).write_text("name: a\nvendors: {ge: 9}\nnominal_patients: 9\nmax_epsilon: 3\n")
    with pytest.raises(UserError, match=r"no setting is called 'max_epsilon'; did you mean policy\.max_epsilon\?"):
        load_site(tmp_path)
    (tmp_path / COORDINATOR_FILE).write_text("name: study\nsuperlink_prt: 1\n")
    with pytest.raises(UserError, match=r"coordinator\.yaml: .*did you mean superlink_port\?"):
        load_coordinator(tmp_path)


def test_a_sites_vendors_are_known_in_any_case_and_no_key_of_its_file_is_a_setting(tmp_path):
    (tmp_path / SITE_FILE).write_text("name: a\nvendors: {siemens: 9, united imaging: 4}\nnominal_patients: 9\n")
    assert load_site(tmp_path).vendors == {"Siemens": 9, "United Imaging": 4}
    (tmp_path / SITE_FILE).write_text("name: a\nvendors: {GE: 9}\nnominal_patients: 9\nfolder: x\n")
    with pytest.raises(UserError, match="no setting is called 'folder'"):
        load_site(tmp_path)
