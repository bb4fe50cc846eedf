import json

import pytest

from fedcmr.client import cli as client_cli
from fedcmr.server import cli as server_cli
from fedcmr.shared.errors import UserError
from fedcmr.shared.site_facts import check_vendors, facts_line, parse_vendors, read_facts


def test_one_vendor_alone_has_the_sites_own_number():
    assert parse_vendors(["GE"], 40) == parse_vendors(["GE=40"], 40) == {"GE": 40}


def test_several_vendors_have_numbers_of_their_own():
    assert parse_vendors(["Siemens=40", "United Imaging=20"], 50) == {"Siemens": 40, "United Imaging": 20}


@pytest.mark.parametrize(
    ("words", "nominal", "named"),
    [
        (["Nikon"], 40, "expected one of .* got 'Nikon'"),
        (["GE", "Siemens"], 40, "VENDOR=NUMBER"),
        (["GE=", "Siemens=4"], 40, "VENDOR=NUMBER"),
        (["GE=-4"], 40, "VENDOR=NUMBER"),
        (["GE=20", "GE=20"], 40, "at most once"),
        (["GE=30"], 40, "30, the number of its vendor"),
        (["GE=0", "Siemens=4"], 4, ">= 1"),
        (["Siemens=40", "GE=20"], 39, "from 40"),
        (["Siemens=40", "GE=20"], 61, "to 60"),
    ],
)
def test_numbers_that_cannot_be_one_sites_are_refused_by_name(words, nominal, named):
    with pytest.raises(UserError, match=named) as error:
        parse_vendors(words, nominal)
    assert "--vendor" in str(error.value)


@pytest.mark.parametrize("nominal", [40, 50, 60])
def test_distinct_patients_lie_between_the_largest_number_and_the_sum(nominal):
    check_vendors({"Siemens": 40, "GE": 20}, nominal)


def test_a_file_of_a_version_with_one_vendor_a_site_is_read_as_such():
    assert read_facts({"vendor": "GE", "nominal_patients": 40}) == ({"GE": 40}, 40)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"vendor": "GE"}',
        '{"vendors": 3, "nominal_patients": 3}',
        "[]",
        '"GE"',
        '{"vendors": {"GE": "x"}, "nominal_patients": 3}',
    ],
)
def test_what_is_no_facts_is_told_apart_from_facts_that_are_wrong(text):
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        read_facts(json.loads(text))


def test_the_line_does_not_depend_on_the_order_and_every_fact_changes_it():
    line = facts_line("a", {"Siemens": 40, "GE": 20}, 50)
    assert line == facts_line("a", {"GE": 20, "Siemens": 40}, 50)
    others = [
        facts_line("b", {"Siemens": 40, "GE": 20}, 50),
        facts_line("a", {"Siemens": 40}, 50),
        facts_line("a", {"Siemens": 40, "GE": 21}, 50),
        facts_line("a", {"Siemens": 40, "GE": 20}, 51),
    ]
    assert len({line, *others}) == 5 and "\n" not in line


def test_vendors_of_a_command_line_are_known_in_any_case():
    assert parse_vendors(["siemens=40", "United_IMAGING=20"], 50) == {"Siemens": 40, "United Imaging": 20}
    assert parse_vendors(["ge"], 9) == {"GE": 9}
    with pytest.raises(UserError, match="at most once"):
        parse_vendors(["GE=4", "ge=4"], 8)


@pytest.mark.parametrize(
    ("parser", "words"),
    [
        (server_cli._parser, ["synthesize", "run", "--out", "x"]),
        (client_cli._parser, ["prepare", "--format", "dicom", "a", "b"]),
        (client_cli._parser, ["fetch", "x", "--from", "y:1"]),
    ],
    ids=["synthesize", "prepare", "fetch"],
)
def test_every_command_with_a_vendor_knows_it_in_any_case(parser, words, capsys):
    for text, vendor in (("siemens", "Siemens"), ("GE", "GE"), ("united-imaging", "United Imaging")):
        assert parser().parse_args([*words, "--vendor", text]).vendor in (vendor, [vendor])
    with pytest.raises(SystemExit):
        parser().parse_args([*words, "--vendor", "acme"])
    assert "expected one of Siemens, Philips" in capsys.readouterr().err
