"""A run folder: stages are done once, other settings and other processes are kept out, nothing is overwritten."""

import multiprocessing
from pathlib import Path

import pytest

from fedcmr.server.run_folder import copy_cases, load_run, open_run
from fedcmr.server.settings import load
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import open_to_others


@pytest.fixture
def config():
    return load("smoke")


def test_a_finished_stage_is_not_done_again(tmp_path, config):
    run = open_run(tmp_path / "run", config)
    with run.stage("hearts") as to_do:
        assert to_do
    with run.stage("hearts") as to_do:
        assert not to_do
    assert load_run(run.path).is_done("hearts")


def test_a_stage_that_failed_or_was_interrupted_is_done_again(tmp_path, config):
    run = open_run(tmp_path / "run", config)
    with pytest.raises(KeyboardInterrupt), run.stage("hearts"):
        raise KeyboardInterrupt
    assert not run.is_done("hearts")


def test_a_line_cut_off_by_a_crash_is_skipped(tmp_path, config):
    run = open_run(tmp_path / "run", config)
    run.mark_done("one", 1.0)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tw')
    assert list(run.stage_seconds()) == ["one"]


def test_other_settings_are_refused_by_name_and_nothing_is_changed(tmp_path, config):
    open_run(tmp_path / "run", config)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"num_train: 6.*num_train: 7"):
        open_run(tmp_path / "run", load("smoke", ["hospitals.num_train=7"]))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path, config):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        open_run(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="not a run folder"):
        open_run(tmp_path / "thesis.txt", config)
    with pytest.raises(UserError, match="not a run folder"):
        load_run(tmp_path)


def test_a_place_that_cannot_be_written_is_one_clear_error(config):
    with pytest.raises(UserError, match="cannot be written"):
        open_run(Path("/proc/fedcmr-run"), config)


def _try_open(path, answers):
    try:
        open_run(path, load("smoke"))
        answers.put("opened")
    except UserError as error:
        answers.put(str(error))


def test_a_second_process_is_kept_out(tmp_path, config):
    run = open_run(tmp_path / "run", config)
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=_try_open, args=(run.path, answers))
    process.start()
    assert "in use by another process" in answers.get(timeout=60)
    process.join()


def test_a_copy_of_prepared_cases_is_private_and_without_the_sites_own_list(tmp_path):
    for name in ("cases.csv", "cases/p.npz", "private/refused.csv"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).touch(mode=0o644)
    copy_cases(tmp_path / "from", tmp_path / "to")
    assert {path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*")} == {
        "cases.csv",
        "cases",
        "cases/p.npz",
    }
    assert open_to_others([tmp_path / "to"]) == []
