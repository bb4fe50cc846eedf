"""Vendors and field strengths as scanners write them."""

import math

import pytest

from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.vendor import agreed_field_strength, agreed_vendor, field_strength, vendor_name
from fedcmr.shared.case import UNKNOWN, VENDORS, read_index
from tests.client.ingest.dicom_files import write_study

SPELLINGS = {
    "Siemens": [
        "SIEMENS",
        "Siemens",
        "Siemens Healthineers",
        "Siemens HealthCare GmbH",
        "SIEMENS MEDICAL SYSTEMS",
        "Siemens Shenzhen Magnetic Resonance Ltd.",
        " siemens ",
    ],
    "Philips": ["Philips", "Philips Medical Systems", "Philips Healthcare", "PHILIPS", "Philips, Nederland"],
    "GE": [
        "GE",
        "GE MEDICAL SYSTEMS",
        "GE Healthcare",
        "General Electric",
        "G.E. Medical Systems",
        "GE-Healthcare",
        "GE_MEDICAL_SYSTEMS",
        "GEMS",
        "GE\u00a0Medical",
    ],
    "Canon": [
        "CANON_MEC",
        "Canon Medical Systems",
        "TOSHIBA_MEC",
        "TOSHIBA",
        "Toshiba Medical Systems",
        "TOSHIBA_MEC_US",
    ],
    "United Imaging": [
        "UIH",
        "UIH_MR",
        "United Imaging Healthcare",
        "UNITED IMAGING",
        "UnitedImaging",
        "Shanghai United Imaging Healthcare",
    ],
    UNKNOWN: [
        "",
        "  ",
        "Gemini",
        "Hitachi Medical Corporation",
        "Hyperfine",
        "Esaote",
        "geographic",
        "\x00",
        "医疗",
        "My Siemens viewer",
        "Philipson",
        "unknown",
    ],
}


@pytest.mark.parametrize(("vendor", "name"), [(vendor, name) for vendor in SPELLINGS for name in SPELLINGS[vendor]])
def test_a_vendor_has_one_name_however_it_is_spelt(vendor, name):
    assert vendor_name(name) == vendor
    assert vendor in (*VENDORS, UNKNOWN)


@pytest.mark.parametrize(
    ("names", "vendor"),
    [
        (["SIEMENS", "Siemens Healthineers", ""], "Siemens"),
        (["SIEMENS", "Philips"], UNKNOWN),
        (["SIEMENS", "Workstation Ltd."], UNKNOWN),
        (["", " "], UNKNOWN),
        ([], UNKNOWN),
    ],
)
def test_images_that_name_several_vendors_have_none(names, vendor):
    assert agreed_vendor(names) == vendor


@pytest.mark.parametrize(
    ("written", "tesla"),
    [
        (1.5, 1.5),
        (3, 3.0),
        (2.8936, 3.0),
        (1.494, 1.5),
        (0.55, 0.55),
        (7, 7.0),
        (15000, 1.5),
        (30000, 3.0),
        (1500, 1.5),
        (3000, None),
        (5000, None),
        (10000, 1.0),
        (2.2, 2.2),
        (0, None),
        (-1.5, None),
        (99, None),
        (0.064, None),
        (math.nan, None),
        (math.inf, None),
        (1e300, None),
    ],
)
def test_field_strength_is_tesla_or_unknown(written, tesla):
    assert field_strength(written) == pytest.approx(math.nan if tesla is None else tesla, nan_ok=True)


def test_a_stack_has_one_field_strength_or_none():
    assert agreed_field_strength([1.5, math.nan, 15000.0]) == 1.5
    assert math.isnan(agreed_field_strength([1.5, 3.0]))
    assert math.isnan(agreed_field_strength([math.nan, 0.0]))


def test_a_study_of_two_vendors_is_a_case_of_none_with_a_warning(tmp_path):
    write_study(tmp_path / "scans", Manufacturer=lambda z, t: ["SIEMENS", "Philips"][t % 2])
    summary = prepare(tmp_path / "scans", tmp_path / "out", "dicom", key=bytes(32), num_processes=1)
    assert (summary.num_cases, summary.warnings) == (1, {"unknown-vendor": 1})
    assert [info.vendor for info in read_index(tmp_path / "out")] == [UNKNOWN]
