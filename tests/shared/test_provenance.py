"""Where scans come from is recorded, and what is not recorded counts as real and private."""

import json

import pytest

from fedcmr.client.cli import main
from fedcmr.server.deployment.coordinator import Coordinator, register_site
from fedcmr.server.federation.state import StudySite, read_study
from fedcmr.shared.errors import UserError
from fedcmr.shared.provenance import (
    PRIVATE_REAL,
    SIMULATED_SCANS,
    from_json,
    of_folder,
    parse,
    public,
    together,
)
from fedcmr.simulations.hospital import write_hospital


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        "simulated",
        [],
        {},
        {"kind": "SIMULATED"},
        {"kind": ["simulated"]},
        {"kind": "public"},
        {"kind": "public", "source": "ours"},
        {"kind": "private", "terms": "anything goes"},
    ],
)
def test_what_is_not_exactly_a_provenance_counts_as_private(value):
    assert from_json(value) == PRIVATE_REAL


@pytest.mark.parametrize("provenance", [PRIVATE_REAL, SIMULATED_SCANS, public("ACDC"), public("M&Ms-2")])
def test_a_provenance_is_read_back_as_it_was_written(provenance):
    assert from_json(json.loads(json.dumps(provenance.as_json()))) == provenance


def test_terms_come_from_the_table_and_not_from_a_file():
    assert from_json({"kind": "public", "source": "ACDC", "terms": "do what you like"}).terms == public("ACDC").terms


def test_public_sets_are_known_in_any_spelling_and_name_citation_and_terms():
    assert public("mnms") == public("M&Ms") == parse("public:m&ms")
    assert "Bernard et al. (2018)" in public("acdc").terms and "CC BY-NC-SA 4.0" in public("acdc").terms
    with pytest.raises(UserError, match="Expected a public data set of ACDC"):
        public("our own")


@pytest.mark.parametrize("text", ["", "public", "public:", "real", "simulated:ACDC"])
def test_a_misspelt_provenance_is_refused(text):
    with pytest.raises(UserError, match="private, simulated or public:NAME"):
        parse(text)


def test_parts_together_are_simulated_only_if_all_are():
    acdc, mnms = public("ACDC"), public("M&Ms")
    assert together([SIMULATED_SCANS, SIMULATED_SCANS]) == SIMULATED_SCANS
    assert together([]) == PRIVATE_REAL
    assert together([acdc, PRIVATE_REAL]).kind == "private" and together([acdc, PRIVATE_REAL]).source == "ACDC"
    assert together([acdc, mnms]).kind == "public" and together([acdc, mnms]).source == "ACDC, M&Ms"
    mixed = together([SIMULATED_SCANS, acdc])
    assert mixed.kind == "mixed" and not mixed.is_simulated and mixed.terms == acdc.terms


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], PRIVATE_REAL),
        (["--simulated"], SIMULATED_SCANS),
        (["--public", "sunnybrook"], public("Sunnybrook")),
    ],
)
def test_prepare_records_where_the_scans_come_from(tmp_path, options, expected, capsys):
    write_hospital(tmp_path / "scans", "GE", 2, 6, 8, seed=1, prefix="ge")
    arguments = ["prepare", str(tmp_path / "scans"), str(tmp_path / "out"), "--format", "dicom", "--num-processes", "1"]
    assert main([*arguments, *options]) == 0
    assert of_folder(tmp_path / "out") == expected and "recorded as" in capsys.readouterr().out
    other = ["--simulated"] if expected != SIMULATED_SCANS else ["--private"]
    assert main([*arguments, *other]) == 2
    assert "another provenance" in capsys.readouterr().err


def test_a_folder_without_a_readable_record_is_private(tmp_path):
    assert of_folder(tmp_path) == PRIVATE_REAL
    for content in ("{", "[]", "{}", '{"provenance": "simulated"}'):
        (tmp_path / "prepared.json").write_text(content)
        assert of_folder(tmp_path) == PRIVATE_REAL


def test_a_coordinator_keeps_each_sites_provenance_and_takes_the_unknown_for_private(tmp_path):
    coordinator = Coordinator("pilot", folder=tmp_path)
    register_site(coordinator, "a", "ecdsa-sha2-nistp384 AAAA", StudySite({"GE": 5}, 5, public("ACDC")))
    register_site(coordinator, "b", "ecdsa-sha2-nistp384 BBBB", StudySite({"GE": 5}, 5))
    assert {name: site.provenance for name, site in coordinator.sites().items()} == {
        "a": public("ACDC"),
        "b": PRIVATE_REAL,
    }
    facts = json.loads((tmp_path / "sites" / "a.json").read_text())
    del facts["provenance"]
    (tmp_path / "sites" / "a.json").write_text(json.dumps(facts))
    assert coordinator.sites()["a"].provenance == PRIVATE_REAL


def test_a_study_whose_facts_name_no_provenance_counts_as_private(make_study):
    run = make_study("hospitals.source=phantom")
    assert all(site.provenance == PRIVATE_REAL for site in read_study(run).values())
