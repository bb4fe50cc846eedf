"""Sentences about whose scans are behind a report."""

from fedcmr.server.report.provenance import shapes_of_hearts
from tests.server.report.report_study import bare_report


def report_of(populations: list[str], epsilon: float | None = 7.9) -> dict:
    report = bare_report(simulated=True)
    report["provenance"]["populations"] = populations
    report["synthetic"]["per_vendor"] = {"GE": 5, "Siemens": 5}
    report["privacy"]["epsilon"] = epsilon
    return report


def test_a_study_that_released_no_shape_says_so():
    sentence = shapes_of_hearts(report_of([]))
    assert sentence == shapes_of_hearts(bare_report(simulated=True))
    assert "public model" in sentence and "no site has released any" in sentence


def test_the_vendors_whose_population_the_hearts_are_drawn_from_are_named():
    assert "hearts of GE and Siemens are drawn" in shapes_of_hearts(report_of(["GE", "Siemens"]))
    some = shapes_of_hearts(report_of(["GE"]))
    assert "hearts of GE are drawn" in some and "Those of Siemens come from the public model alone." in some
    assert "privacy that is stated above" in some and "without privacy" in shapes_of_hearts(report_of(["GE"], None))
