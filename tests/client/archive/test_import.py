"""A real archive, both protocols: the cases are those of the files, whatever is killed on the way."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedcmr.client.archive.state import STATE_NAME
from fedcmr.client.check.folder import check, write_report
from fedcmr.client.cli import main
from fedcmr.client.deidentify import pseudonym
from fedcmr.client.ingest.refused_list import LIST_NAME
from fedcmr.client.whois import trace
from fedcmr.shared.case import read_index
from fedcmr.simulations.benchmarks.orthanc import CLIENT_AET
from tests.client.archive.conftest import KEY
from tests.client.archive.studies import LOCALISER, MARK, accession, leaks, same_cases, study_uid
from tests.client.ingest.test_refused_list import rows_of

pytestmark = [pytest.mark.engine, pytest.mark.tool("Orthanc"), pytest.mark.tool("libOrthancDicomWeb.so")]
ALL = ("--query", "date=2020..2021")
PROTOCOLS = ("dicomweb", "get", "move")


def address(archive, protocol) -> list[str]:
    """How the command line names the archive."""
    if protocol == "dicomweb":
        return ["--dicomweb", archive.url]
    own = CLIENT_AET if protocol == "get" else f"{CLIENT_AET}:{archive.receiving_port}"
    return ["--dimse", archive.dimse, "--own-aet", own]


def told(row: dict[str, str]) -> tuple[str, ...]:
    """A line of the list, but for where it is."""
    return tuple(value for name, value in row.items() if name != "path")


def lines(folder: Path) -> list[dict]:
    path = folder / STATE_NAME
    content = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_import_gives_the_cases_of_the_files_and_names_nobody(
    archive, from_files, key_file, tmp_path, capfd, protocol
):
    command = ["import", str(tmp_path / "train"), *address(archive, protocol), *ALL, "--key", str(key_file)]
    assert main(command) == 0
    printed = capfd.readouterr()
    assert "studies fetched: 4," in printed.out and "no-short-axis-cine" in printed.out
    assert same_cases(tmp_path / "train", from_files)
    refused = [json.loads((folder / "refused.json").read_text()) for folder in (tmp_path / "train", from_files)]
    assert refused[0] == refused[1]
    assert leaks(tmp_path, printed.out, printed.err) == []
    for name in (STATE_NAME, LIST_NAME):
        assert stat.S_IMODE((tmp_path / "train" / name).stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "train" / name).parent.stat().st_mode) == 0o700
    assert not (tmp_path / "train.fetching").exists()
    assert main(command) == 0
    assert "studies fetched: 0," in capfd.readouterr().out, "nothing is fetched twice"
    assert same_cases(tmp_path / "train", from_files)


def test_what_was_refused_is_listed_as_by_prepare_by_where_the_archive_has_it(
    archive, from_files, key_file, tmp_path, capfd
):
    folder, listed = tmp_path / "train", tmp_path / "list.txt"
    listed.write_text("\n".join([*map(study_uid, range(4)), accession(77)]))
    for protocol, start in (("dicomweb", f"{archive.url}/studies/"), ("get", f"{archive.dimse} study ")):
        command = ["import", str(folder), *address(archive, protocol), "--key", str(key_file), "--retry-refused"]
        assert main([*command, "--query", f"list={listed}"]) == 0
        printed = capfd.readouterr()
        assert f"which ones: {folder / LIST_NAME}, which names patients" in printed.out
        assert leaks(tmp_path / "train", printed.out, printed.err) == []
        rows = rows_of(folder)
        missing = [row for row in rows if row["reason"] == "not-in-archive"]
        assert [(row["what"], row["accession"], row["path"]) for row in missing] == [("not fetched", accession(77), "")]
        others = [row for row in rows if row not in missing]
        assert sorted(map(told, others)) == sorted(map(told, rows_of(from_files)))
        (refused,) = [row for row in others if row["what"] == "study refused"]
        assert (refused["patient"], refused["accession"]) == (f"{MARK}-{LOCALISER}", accession(LOCALISER))
        assert refused["path"] == start + study_uid(LOCALISER)
        assert all(row["path"].startswith(start + row["study"]) for row in others if row["study"] == refused["study"])
    write_report(folder, check(folder))
    page = (folder / "check.html").read_text()
    assert f'<a href="{LIST_NAME}">' in page and MARK not in page


def test_a_case_is_traced_to_the_archive_with_the_key_alone(archive, key_file, tmp_path, capfd):
    folder, listed = tmp_path / "train", tmp_path / "list.txt"
    listed.write_text(accession(0))
    command = ["import", str(folder), *address(archive, "dicomweb"), "--key", str(key_file)]
    assert main([*command, "--query", f"list={listed}"]) == 0
    (info,) = read_index(folder)
    assert info.pseudonym == pseudonym(KEY, f"{MARK}-0", study_uid(0)), "as by prepare"
    capfd.readouterr()
    assert main(["whois", str(folder), info.pseudonym, info.group, "--key", str(key_file)]) == 0
    printed = "".join(capfd.readouterr().out.split())
    assert printed.count(f"{MARK}-0") == 2 and accession(0) in printed
    for found in trace(folder, [info.pseudonym, info.group], KEY):
        place = found.place
        assert (place.patient, place.accession, place.study) == (f"{MARK}-0", accession(0), study_uid(0))
        assert place.path == f"{archive.url}/studies/{study_uid(0)}"
    other = tmp_path / "other.key"
    other.write_text("ab" * 32)
    assert main(["whois", str(folder), info.pseudonym, "--key", str(other)]) == 2
    told = capfd.readouterr()
    assert told.out == "" and "another key" in told.err and MARK not in told.err
    assert main(["whois", str(folder), "p" + "0" * 16, "--key", str(key_file)]) == 2
    assert "none that was imported" in capfd.readouterr().err


@pytest.mark.parametrize("protocol", PROTOCOLS[:2])
def test_a_dry_run_counts_by_vendor_and_year_and_fetches_nothing(archive, tmp_path, capfd, protocol):
    assert main(["import", str(tmp_path / "train"), *address(archive, protocol), *ALL, "--dry-run"]) == 0
    printed = capfd.readouterr()
    rows = [line.split("│")[1:-1] for line in printed.out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["GE", "2021", "1", "24"],
        ["Philips", "2021", "1", "24"],
        ["Siemens", "2020", "2", "28"],
        ["all", "", "4", "76"],
    ]
    assert list(tmp_path.iterdir()) == []
    assert leaks(tmp_path, printed.out, printed.err) == []


def test_a_list_of_accession_numbers_and_a_vendor_choose(archive, from_files, key_file, tmp_path, capfd):
    listed = tmp_path / "list.csv"
    listed.write_text(f"name;Accession Number\nx;{accession(1)}\ny;{accession(0)}\nz;{accession(77)}\n")
    command = ["import", str(tmp_path / "train"), *address(archive, "get"), "--key", str(key_file), "--query"]
    assert main([*command, f"list={listed}", "vendor=Philips", "description=heart,cardiac"]) == 0
    printed = capfd.readouterr()
    assert "studies fetched: 1," in printed.out and "not-in-archive" in printed.out
    (info,) = read_index(tmp_path / "train")
    assert info.vendor == "Philips" and info.pseudonym in {one.pseudonym for one in read_index(from_files)}
    listed.write_text(f"# uids\n{study_uid(0)}\n{study_uid(1)}\n")
    kept = tmp_path / "kept"
    assert main([*command, f"list={listed}", "--keep", str(kept)]) == 0
    assert "studies fetched: 1," in capfd.readouterr().out, "the other one is there"
    assert {info.vendor for info in read_index(tmp_path / "train")} == {"Siemens", "Philips"}
    (folder,) = kept.iterdir()
    assert len(list(folder.rglob("*.dcm"))) == 26
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.rglob("*")} == {0o600, 0o700}
    assert not leaks(tmp_path / "train")


def test_a_killed_import_resumes_and_fetches_no_study_twice(archive, from_files, key_file, tmp_path, capfd):
    folder = tmp_path / "train"
    command = ["import", str(folder), *address(archive, "dicomweb"), *ALL, "--key", str(key_file)]
    process = subprocess.Popen([sys.executable, "-m", "fedcmr.client.cli", *command], stdout=subprocess.DEVNULL)
    while not lines(folder) and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = lines(folder)
    assert 1 <= len(before) < 4, "it was killed in the middle"
    assert main(command) == 0
    assert f"studies fetched: {4 - len(before)}," in capfd.readouterr().out
    after = lines(folder)
    assert after[: len(before)] == before
    assert len({line["study"] for line in after}) == len(after) == 4
    assert same_cases(folder, from_files)
    assert sorted(map(told, rows_of(folder))) == sorted(map(told, rows_of(from_files))), "none is lost, none doubled"
    assert not (tmp_path / "train.fetching").exists()


@pytest.mark.parametrize("protocol", PROTOCOLS[:2])
def test_an_archive_that_is_killed_and_comes_back_costs_no_study(
    archive, from_files, key_file, tmp_path, capfd, protocol
):
    folder = tmp_path / "train"

    def interrupt() -> None:
        while not lines(folder):
            time.sleep(0.005)
        archive.kill()
        time.sleep(1.0)
        archive.start()

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = main(["import", str(folder), *address(archive, protocol), *ALL, "--key", str(key_file)])
    thread.join()
    assert code == 0
    assert "studies fetched: 4, not fetched: 0" in capfd.readouterr().out
    assert same_cases(folder, from_files)


def test_a_study_without_a_cine_is_fetched_again_only_when_asked(archive, key_file, tmp_path, capfd):
    listed = tmp_path / "list.txt"
    listed.write_text(study_uid(LOCALISER))
    command = ["import", str(tmp_path / "train"), *address(archive, "get"), "--key", str(key_file)]
    command += ["--query", f"list={listed}"]
    for more, num_lines in (((), 1), ((), 1), (("--retry-refused",), 2)):
        assert main([*command, *more]) == 2
        printed = capfd.readouterr()
        assert "no-short-axis-cine 1" in printed.err
        assert leaks(tmp_path / "train", printed.out, printed.err) == []
        assert len(lines(tmp_path / "train")) == num_lines
