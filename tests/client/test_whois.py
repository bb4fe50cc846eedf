"""Who is behind a pseudonym: told to whoever holds the key and the scans, and to nobody else."""

import json
import shutil
from pathlib import Path

import pytest

from fedcmr.client.cli import main
from fedcmr.client.deidentify import KEY_NAME, pseudonym
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.refused_list import SOURCES_NAME
from fedcmr.client.whois import trace
from fedcmr.shared.case import read_index
from fedcmr.shared.errors import UserError
from tests.client.ingest.dicom_files import write_study
from tests.client.ingest.test_prepare import write_acdc

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Cases of two patients, one with two studies, with the key next to them and the scans beside."""
    root = tmp_path_factory.mktemp("whois")
    for name, patient, study in (("a", "0012", "1.2.1"), ("b", "0012", "1.2.2"), ("c", "77", "1.2.3")):
        write_study(root / "scans" / name, patient=patient, study=study, masks=False, AccessionNumber=f"ACC-{name}")
    prepare(root / "scans", root / "cases", "dicom")
    return root


def test_a_case_and_a_patient_are_traced_to_number_accession_and_folder(folder, capsys):
    infos = read_index(folder / "cases")
    key = bytes.fromhex((folder / KEY_NAME).read_text())
    one = pseudonym(key, "77", "1.2.3")
    assert one in {info.pseudonym for info in infos}
    (found,) = trace(folder / "cases", [one], key)
    place = found.place
    assert (found.pseudonym, place.patient, place.accession, place.study) == (one, "77", "ACC-c", "1.2.3")
    assert Path(place.path) == (folder / "scans" / "c").resolve()
    group = pseudonym(key, "12")
    assert {Path(found.place.path).name for found in trace(folder / "cases", [group], key)} == {"a", "b"}
    assert main(["whois", str(folder / "cases"), one, group, "--num-processes", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("0012") == 2 and "ACC-c" in printed
    assert f"  path      {place.path}\n" in printed, "a path on one line, whole, however narrow the screen"


def test_without_the_right_key_nothing_is_told(folder, tmp_path, capsys):
    (tmp_path / "other.key").write_text("ab" * 32)
    name = read_index(folder / "cases")[0].pseudonym
    assert main(["whois", str(folder / "cases"), name, "--key", str(tmp_path / "other.key")]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and "another key" in told.err
    assert "scans" not in told.err.replace(str(folder), "")
    assert main(["whois", str(folder / "cases"), name, "--key", str(tmp_path / "none.key")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "told"), [("p" + "0" * 16, "1 of the pseudonyms is of no study"), ("77", "p and 16")])
def test_what_stands_for_no_study_is_an_error_of_one_line(folder, capsys, name, told):
    assert main(["whois", str(folder / "cases"), name, "--num-processes", "1"]) == 2
    assert told in capsys.readouterr().err


def test_scans_that_moved_are_given_anew(tmp_path):
    write_acdc(tmp_path / "scans", [1])
    prepare(tmp_path / "scans", tmp_path / "cases", "acdc", key=KEY)
    name = read_index(tmp_path / "cases")[0].pseudonym
    moved = shutil.move(tmp_path / "scans", tmp_path / "archive")
    with pytest.raises(UserError, match="is not there: mount it, or give it with --source"):
        trace(tmp_path / "cases", [name], KEY)
    (found,) = trace(tmp_path / "cases", [name], KEY, [Path(moved)])
    assert found.place.patient == "001" and Path(found.place.path) == tmp_path / "archive" / "patient001"
    (tmp_path / "cases" / SOURCES_NAME).unlink()
    with pytest.raises(UserError, match="give them with --source"):
        trace(tmp_path / "cases", [name], KEY)
    settings = json.loads((tmp_path / "cases" / "prepared.json").read_text())
    (tmp_path / "cases" / "prepared.json").write_text(json.dumps(settings | {"format": "other"}))
    with pytest.raises(UserError, match="damaged or of another version"):
        trace(tmp_path / "cases", [name], KEY)
