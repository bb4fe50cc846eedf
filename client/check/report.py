"""What the check of a folder of cases has found, and the same as JSON."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedcmr.client.check.contact_sheet import CaseImage
from fedcmr.client.check.flags import FLAGS
from fedcmr.client.ingest.reasons import REASONS
from fedcmr.client.trainable import EF_TEST, GRADIENT, LEFT_OUT, STYLE
from fedcmr.shared.case import CONTOURS, INDEX_NAME, UNKNOWN, VENDORS

MIN_FIELD_MM = 120.0
"""A dilated heart with its right ventricle just fits into this; earlier versions prepared 144 mm."""

TROUBLES = {
    "named-twice": f"{INDEX_NAME} names it twice",
    "case-missing": "its file is missing",
    "case-unreadable": "its file is not a readable case",
    "other-vendor": f"its vendor is none of {', '.join(VENDORS)} or {UNKNOWN}",
    "wrong-size": f"its frames show less than {MIN_FIELD_MM:.0f} mm",
    "no-contrast": "a frame without contrast",
    "no-left-ventricle": "masks without a left ventricle",
    "ef-differs": f"the ejection fraction of {INDEX_NAME} is not that of the masks",
}
"""What is wrong with a case that `prepare` did not leave so, by code."""
EF_BINS = 20
"""Bins of the EF histogram: one per five points."""
OTHER_VERSION = "written by another version of fedcmr: prepare the folder again to learn what it means"


@dataclass(frozen=True)
class CheckedCase:
    """One case: a row of the index, what its file holds, and what was found.

    What cannot be read is None.

    Attributes:
        pseudonym: As in the index.
        group: As in the index: the patient.
        vendor: As in the index.
        field_strength_t: Tesla.
        ef: Ejection fraction in [0, 1].
        num_slices: Slices of the stack.
        slice_spacing_mm: Distance between slices.
        num_phases: Phases of the scan.
        ed_phase: Which of them became end-diastole, from 0.
        es_phase: Likewise for end-systole.
        contours: Where its masks come from, as `fedcmr.shared.case.CaseInfo`; empty where it has none.
        flags: Codes of `FLAGS`, then what `prepare` noted, codes of `REASONS`.
        trouble: A code of `TROUBLES`, or None for a case whose file is as it should be.
        image: Image of its middle slice.
        sex: As in the index.
        pathology: As in the index.
        left_out: Why training leaves the case out, a code of `fedcmr.client.trainable.LEFT_OUT`; None where it does
            not.
        trains_the_generator: Whether a slice is drawn whole, in a case that training does not leave out.
    """

    pseudonym: str
    group: str
    vendor: str
    field_strength_t: float | None
    ef: float | None
    num_slices: int | None = None
    slice_spacing_mm: float | None = None
    num_phases: int | None = None
    ed_phase: int | None = None
    es_phase: int | None = None
    contours: str = ""
    flags: tuple[str, ...] = ()
    trouble: str | None = None
    image: CaseImage | None = field(default=None, repr=False)
    sex: str | None = None
    pathology: str | None = None
    left_out: str | None = None
    trains_the_generator: bool = False

    @property
    def labelled(self) -> bool:
        """Whether it has masks."""
        return bool(self.contours)


@dataclass(frozen=True)
class CheckReport:
    """What a folder of cases holds.

    Ranges are the smallest and the largest of what is known, or None.

    Attributes:
        cases: In the order of the index.
        refused: Studies that became no case, by reason code.
        left_out: Files and series that belong to no short-axis cine, by reason code.
        warnings: What `prepare` noted about cases and scans that it used all the same, by reason code.
    """

    cases: tuple[CheckedCase, ...]
    refused: dict[str, int]
    left_out: dict[str, int]
    warnings: dict[str, int]

    @property
    def num_cases(self) -> int:
        """Rows of the index."""
        return len(self.cases)

    @property
    def num_patients(self) -> int:
        """Distinct groups."""
        return len({case.group for case in self.cases})

    @property
    def num_labelled(self) -> int:
        """Cases with masks."""
        return sum(case.labelled for case in self.cases)

    @property
    def contours(self) -> dict[str, int]:
        """Number of patients by the best that any of their cases has: "drawn", "partial", "auto" if any, and "none"."""
        ranks = {name: rank for rank, name in enumerate((*CONTOURS, ""))}
        best: dict[str, str] = {}
        for case in self.cases:
            best[case.group] = min(best.get(case.group, ""), case.contours, key=ranks.__getitem__)
        counts = Counter(best.values())
        found = {name: counts[name] for name in CONTOURS if counts[name] or name != "auto"}
        return {**found, "none": counts[""]}

    @property
    def uses(self) -> dict[str, int]:
        """Number of patients that can be used, by use; see `fedcmr.client.trainable`."""
        whole = [case for case in self.cases if case.trouble is None]
        return {
            STYLE: self.num_trainable_patients,
            GRADIENT: len({case.group for case in self.trainable if case.trains_the_generator}),
            EF_TEST: len({case.group for case in whole if case.ef is not None}),
        }

    @property
    def trainable(self) -> list[CheckedCase]:
        """The cases that can be trained on."""
        return [case for case in self.cases if case.trouble is None and case.left_out is None]

    @property
    def num_trainable_patients(self) -> int:
        """Distinct groups that can be trained on."""
        return len({case.group for case in self.trainable})

    @property
    def trainable_vendors(self) -> dict[str, int]:
        """Number of patients that can be trained on by vendor; one with scans of two counts for both."""
        return _counts(vendor for vendor, _ in {(case.vendor, case.group) for case in self.trainable})

    @property
    def not_trained(self) -> dict[str, int]:
        """Number of cases that are not damaged and that training leaves out all the same, by code."""
        return _counts(case.left_out for case in self.cases if case.left_out is not None and case.trouble is None)

    @property
    def num_unusable(self) -> int:
        """Cases that are damaged."""
        return sum(case.trouble is not None for case in self.cases)

    @property
    def num_flagged(self) -> int:
        """Usable cases that a person should check."""
        return sum(bool(case.flags) and case.trouble is None for case in self.cases)

    @property
    def vendors(self) -> dict[str, int]:
        """Number of cases by vendor."""
        return _counts(case.vendor for case in self.cases)

    @property
    def field_strengths_t(self) -> dict[float | None, int]:
        """Number of cases by field strength in tesla; None for unknown."""
        return dict(Counter(case.field_strength_t for case in self.cases))

    @property
    def sexes(self) -> dict[str, int]:
        """Number of cases by sex."""
        return _counts(case.sex or UNKNOWN for case in self.cases)

    @property
    def pathologies(self) -> dict[str, int]:
        """Number of cases by pathology group."""
        return _counts(case.pathology or UNKNOWN for case in self.cases)

    @property
    def num_slices(self) -> tuple[int, int] | None:
        """Smallest and largest number of slices of a stack; None where unknown."""
        return _range(case.num_slices for case in self.cases)

    @property
    def slice_spacing_mm(self) -> tuple[float, float] | None:
        """Smallest and largest distance between slices; None where unknown."""
        return _range(case.slice_spacing_mm for case in self.cases)

    @property
    def num_phases(self) -> tuple[int, int] | None:
        """Smallest and largest number of phases of a scan; None where unknown."""
        return _range(case.num_phases for case in self.cases)

    @property
    def efs(self) -> list[float]:
        """The known ejection fractions."""
        return [case.ef for case in self.cases if case.ef is not None]

    @property
    def ef(self) -> tuple[float, float] | None:
        """Ejection fraction."""
        return _range(self.efs)

    @property
    def ef_histogram(self) -> list[int]:
        """Known ejection fractions in bins of five points from 0 to 100 %."""
        return [int(count) for count in np.histogram(self.efs, EF_BINS, (0.0, 1.0))[0]]

    @property
    def flags(self) -> dict[str, int]:
        """Number of cases by flag."""
        return _counts(code for case in self.cases for code in case.flags)

    @property
    def other_warnings(self) -> dict[str, int]:
        """The warnings that no case carries as its flag: they concern the scans as a whole."""
        return {code: number for code, number in self.warnings.items() if code not in self.flags}

    @property
    def troubles(self) -> dict[str, int]:
        """Number of cases by trouble."""
        return _counts(case.trouble for case in self.cases if case.trouble is not None)


def as_json(report: CheckReport) -> dict[str, Any]:
    """The report as plain values; fractions and millimetres, unknown values null, codes with what they mean."""
    return {
        "num_cases": report.num_cases,
        "num_patients": report.num_patients,
        "num_labelled": report.num_labelled,
        "contours": report.contours,
        "uses": report.uses,
        "num_trainable_patients": report.num_trainable_patients,
        "trainable_vendors": report.trainable_vendors,
        "num_unusable": report.num_unusable,
        "num_flagged": report.num_flagged,
        "vendors": report.vendors,
        "field_strengths_t": {"unknown" if t is None else f"{t:g}": n for t, n in report.field_strengths_t.items()},
        "sexes": report.sexes,
        "pathologies": report.pathologies,
        "num_phases": report.num_phases,
        "num_slices": report.num_slices,
        "slice_spacing_mm": report.slice_spacing_mm,
        "ef": report.ef,
        "ef_histogram": report.ef_histogram,
        "not_trained": _explained(report.not_trained),
        "troubles": _explained(report.troubles),
        "flags": _explained(report.flags),
        "studies_refused": _explained(report.refused),
        "left_out": _explained(report.left_out),
        "warnings": _explained(report.warnings),
        "cases": [_case_as_json(case) for case in report.cases],
    }


def _case_as_json(case: CheckedCase) -> dict[str, Any]:
    """A case without its image."""
    return {**{name: value for name, value in vars(case).items() if name != "image"}, "labelled": case.labelled}


def meaning(code: str) -> str:
    """What a trouble, a reason not to train, a flag or a reason of `prepare` means."""
    return TROUBLES.get(code) or LEFT_OUT.get(code) or FLAGS.get(code) or REASONS.get(code, OTHER_VERSION)


def _explained(counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    return {code: {"number": number, "meaning": meaning(code)} for code, number in counts.items()}


def _counts(codes: Iterable[str]) -> dict[str, int]:
    """How often each occurs, the most frequent first."""
    return dict(sorted(Counter(codes).items(), key=lambda item: (-item[1], item[0])))


def _range(values: Iterable[Any]) -> tuple[Any, Any] | None:
    """Smallest and largest of the known ones."""
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None
