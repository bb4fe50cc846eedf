"""What is about patients is its account's alone under any umask; what is released is as readable as the umask says."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict

from fedcmr.client.app import answer
from fedcmr.client.cli import main
from fedcmr.client.policy import SiteSettings, write_site
from fedcmr.server.dataset.writer import write_release
from fedcmr.server.experiments.models import save_predictions
from fedcmr.server.report.build import build_report
from fedcmr.server.run_folder import open_run
from fedcmr.server.settings import load
from fedcmr.shared import checkpoint
from fedcmr.shared.case import save_case, write_index
from fedcmr.shared.permissions import make_private, open_to_others, private_folder
from tests.client.ingest.test_prepare import write_acdc
from tests.conftest import make_case
from tests.server.dataset.test_writer import FACTS, synthetic_case
from tests.server.report.report_study import study


@pytest.fixture(params=[0o022, 0o000, 0o077], ids=lambda umask: f"umask {umask:03o}")
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(root: Path) -> set[tuple[str, int]]:
    """What kinds of modes are there, links apart."""
    paths = [path for path in [root, *root.rglob("*")] if not path.is_symlink()]
    return {("folder" if path.is_dir() else "file", stat.S_IMODE(path.stat().st_mode)) for path in paths}


PRIVATE = {("folder", 0o700), ("file", 0o600)}


def test_a_prepared_folder_is_its_accounts_alone(tmp_path, umask):
    write_acdc(tmp_path / "scans", [1, 2])
    site, train = tmp_path / "new" / "site", tmp_path / "new" / "site" / "train"
    arguments = ["prepare", "--format", "acdc", str(tmp_path / "scans"), str(train), "--num-processes", "1"]
    assert main(arguments) == 0 and main(["check", str(train)]) == 0
    names = {path.name for path in train.iterdir()}
    assert names >= {"cases", "cases.csv", "details.json", "refused.json", "prepared.json", "check.json", "check.html"}
    assert modes(site) == PRIVATE, "and pseudonym.key next to the cases"


def test_an_earlier_versions_file_becomes_private_when_it_is_written_again(tmp_path, umask):
    case = make_case("p", "GE", 1)
    path = save_case(tmp_path / "train", case)
    write_index(tmp_path / "train", [case.info])
    for file in (path, tmp_path / "train" / "cases.csv"):
        file.chmod(0o666)
    save_case(tmp_path / "train", case)
    write_index(tmp_path / "train", [case.info])
    assert modes(tmp_path / "train") == PRIVATE


def test_a_sites_folder_is_its_accounts_alone(tmp_path, umask):
    site = tmp_path / "site"
    write_site(site, SiteSettings("north", {"GE": 40}, 40))
    metadata = Metadata(1, "m", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type="train")
    content = RecordDict({"config": ConfigRecord({"x": 1})})
    answer(Message(content, metadata=metadata), {"site": str(site), "device": "cpu"}, {})
    assert (site / "errors.log").is_file()
    assert modes(site) == PRIVATE


def test_a_run_folders_files_about_patients_are_its_accounts_alone(tmp_path, umask):
    run = open_run(tmp_path / "run", load("default"))
    run.log("a line")
    run.metric({"stage": "x"})
    cases = [make_case("p", "GE", 1)]
    save_predictions(
        run, "synthetic", [("site", cases)], {"site": {"true": [0.5] * len(cases), "predicted": [0.5] * len(cases)}}
    )
    checkpoint.save(run.path / "checkpoints" / "round_0000.safetensors", {"a": np.zeros(1)}, {})
    build_report(*study(), run.path)
    files = {path: stat.S_IMODE(path.stat().st_mode) for path in run.path.rglob("*") if path.is_file()}
    assert {path.name for path in files} >= {
        "report.json",
        "report.html",
        "report.csv",
        "synthetic.json",
        "log.txt",
        "metrics.jsonl",
        "config.yaml",
    }
    files.pop(run.path / ".lock")  # is empty
    assert set(files.values()) == {0o600}
    assert {stat.S_IMODE((run.path / name).stat().st_mode) for name in ("checkpoints", "private/predictions")} == {
        0o700
    }


def test_a_released_set_is_as_readable_as_the_umask_says(tmp_path, umask):
    cases = [synthetic_case(number) for number in range(2)]
    write_release(tmp_path / "synthetic", cases, None, [0.5, 0.5], FACTS, dicom=False)
    wanted = {("folder", 0o777 & ~umask), ("file", 0o666 & ~umask)}
    assert modes(tmp_path / "synthetic") == wanted


def test_a_copy_of_open_cases_is_closed(tmp_path):
    folder = tmp_path / "copy" / "cases"
    folder.mkdir(parents=True)
    (folder / "a.npz").touch()
    for path in (folder.parent, folder, folder / "a.npz"):
        path.chmod(0o755)
    (folder.parent / "link").symlink_to("/etc/passwd")
    before = Path("/etc/passwd").stat().st_mode
    assert len(open_to_others([tmp_path / "copy"])) == 3, "the link itself tells nothing"
    make_private(tmp_path / "copy")
    assert open_to_others([tmp_path / "copy"]) == [] and modes(tmp_path / "copy") == PRIVATE
    assert Path("/etc/passwd").stat().st_mode == before


def test_every_missing_folder_above_is_private_and_one_that_is_there_stays(tmp_path, umask):
    (tmp_path / "there").mkdir(mode=0o755)
    before = (tmp_path / "there").stat().st_mode
    private_folder(tmp_path / "there" / "a" / "b")
    assert (tmp_path / "there").stat().st_mode == before
    assert modes(tmp_path / "there" / "a") == {("folder", 0o700)}
