"""The check's HTML report: one file for the site's own eyes, without network or script."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedcmr.client.check.flags import MAX_EF, MIN_EF
from fedcmr.client.check.report import CheckedCase, CheckReport, meaning
from fedcmr.shared.case import UNKNOWN
from fedcmr.shared.resources import resource

TEMPLATE = "client/check/html_report.html"
SHEET_SIZE = 60
"""Cases that are unfolded at a time: two screens of a desk, ten of a phone."""
MAX_IMAGES = 1000
"""Images in the report, about 6 kB each; further cases are listed without one, unflagged cases first."""
CONTOURS_OF = {"drawn": "drawn", "partial": "drawn in part", "auto": "found by a program", "none": "none"}
"""A patient's contours, in words."""
SEXES = {"F": "female", "M": "male", "O": "other"}
"""The codes of DICOM's PatientSex (0010,0040)."""
CONTOURS = {
    "lv": "left cavity",
    "myo": "myocardium, outer border",
    "rv": "right ventricle",
    "undrawn": "not drawn: unknown",
}


def render_html(report: CheckReport, refused_list: str | None = None) -> str:
    """The report as HTML.

    Args:
        report: What it shows.
        refused_list: The path within the folder of the list of what was refused; None where there is none.
    """
    environment = Environment(
        loader=FileSystemLoader(resource(TEMPLATE).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent}
    flagged = [case for case in report.cases if case.flags or case.trouble]
    flagged.sort(key=lambda case: (case.trouble is None, -len(case.flags), case.pseudonym))
    others = [case for case in report.cases if not (case.flags or case.trouble)]
    shown = {id(case) for case in [*flagged, *others][:MAX_IMAGES]}
    return environment.get_template(TEMPLATE.rpartition("/")[2]).render(
        report=report,
        refused_list=refused_list,
        headline=headline(report),
        key_figures=_key_figures(report),
        facts=facts(report),
        bars=_bars(report.ef_histogram),
        ef_bounds=(MIN_EF, MAX_EF),
        marks=[
            (code, number, meaning(code))
            for code, number in {**report.troubles, **report.not_trained, **report.flags}.items()
        ],
        reasons=[
            (title, [(code, number, meaning(code)) for code, number in counts.items()])
            for title, counts in (
                ("studies refused", report.refused),
                ("files and series left out", report.left_out),
                ("used all the same", report.other_warnings),
            )
            if counts
        ],
        flagged=flagged,
        sheets=[others[start : start + SHEET_SIZE] for start in range(0, len(others), SHEET_SIZE)],
        sheet_size=SHEET_SIZE,
        shown=shown,
        case_id=id,
        contours={name: text for name, text in CONTOURS.items() if name != "undrawn" or report.contours["partial"]},
        line=case_line,
    )


def headline(report: CheckReport) -> str:
    """What the data manager needs to know, in one sentence."""
    refused = sum(report.refused.values())
    if not report.cases:
        return f"There is no case here: {_number(refused, 'study', 'studies')} refused, the reasons are below."
    usable = report.trainable
    if not usable:
        return f"None of the {_number(report.num_cases, 'case', 'cases')} here can be trained on."
    sentence = f"{_number(len(usable), 'case', 'cases')} of {_number(report.num_patients, 'patient', 'patients')}"
    if len(usable) < report.num_cases:
        sentence = f"{len(usable)} of {_number(report.num_cases, 'case', 'cases')}"
    sentence += " can be trained on"
    flagged = sum(bool(case.flags) for case in usable)
    if not flagged:
        return f"{sentence}."
    return f"{sentence}; look at {'it' if len(usable) == 1 else f'{flagged} of them'} first."


def facts(report: CheckReport) -> list[tuple[str, str]]:
    """Names and values of the summary, for the report and the terminal alike."""
    strengths = {UNKNOWN if t is None else f"{t:g} T:": number for t, number in report.field_strengths_t.items()}
    return [
        ("patients", str(report.num_patients)),
        ("cases", f"{report.num_cases}, {report.num_labelled} with masks"),
        ("contours", _patients({CONTOURS_OF[name]: number for name, number in report.contours.items()})),
        ("vendor", _counts(report.vendors)),
        ("can be trained on", _trained(report)),
        ("can be used for", _uses(report.uses)),
        ("field strength", _counts(strengths)),
        ("sex", _counts({SEXES.get(name, name): number for name, number in report.sexes.items()})),
        ("pathology", _counts(report.pathologies)),
        ("phases of the scan", _range(report.num_phases, "d")),
        ("slices", _range(report.num_slices, "d")),
        ("slice spacing", _range(report.slice_spacing_mm, ".1f", " mm")),
        ("ejection fraction", _range(report.ef, ".1%") + _of_how_many(len(report.efs), report.num_cases)),
    ]


def case_line(case: CheckedCase) -> str:
    """What is known of a case, in one line; what is not is left out."""
    parts = [case.vendor if case.vendor != UNKNOWN else "vendor unknown"]
    if case.field_strength_t is not None:
        parts[0] += f" {case.field_strength_t:g} T"
    if case.num_slices is not None and case.slice_spacing_mm is not None:
        parts.append(f"{_number(case.num_slices, 'slice', 'slices')}, {case.slice_spacing_mm:.1f} mm apart")
    if case.num_phases is not None:
        phases = _number(case.num_phases, "phase", "phases")
        if case.ed_phase is not None and case.es_phase is not None:
            phases = f"ED {case.ed_phase + 1}, ES {case.es_phase + 1} of {phases}"
        parts.append(phases)
    return "; ".join(parts)


def _trained(report: CheckReport) -> str:
    """For example "3 patients (GE 1, Siemens 2)"."""
    patients = _number(report.num_trainable_patients, "patient", "patients")
    return f"{patients} ({_counts(report.trainable_vendors)})" if report.trainable else "nothing"


def _key_figures(report: CheckReport) -> list[tuple[str, str, str]]:
    """The figures at the top: value, unit, explanation."""
    low, high = report.ef or (None, None)
    numbers = Counter(case.contours for case in report.cases)
    kinds = [f"{numbers[name]} {CONTOURS_OF[name]}" for name in ("partial", "auto") if numbers[name]]
    return [
        (
            str(report.num_cases),
            "case" if report.num_cases == 1 else "cases",
            f"of {_number(report.num_patients, 'patient', 'patients')}",
        ),
        (str(report.num_labelled), "", "with masks" + (f": {', '.join(kinds)}" if kinds else "")),
        (str(report.num_flagged), "", "to look at before they are used"),
        (str(sum(report.refused.values())), "", "studies refused; reasons and numbers are below"),
        (
            "unknown" if low is None else f"{100 * low:.0f} to {100 * (high or 0):.0f}",
            "" if low is None else "%",
            "ejection fraction, smallest and largest",
        ),
    ]


def _bars(histogram: Sequence[int]) -> list[dict[str, Any]]:
    """The histogram's bars in a drawing 100 wide and 40 high: place, height, and how many cases they stand for."""
    width, most = 100 / len(histogram), max(histogram) or 1
    return [
        {
            "x": round(i * width + 0.4, 2),
            "width": round(width - 0.8, 2),
            "height": round(40 * number / most, 2),
            "number": number,
            "low": round(i * width),
            "high": round((i + 1) * width),
        }
        for i, number in enumerate(histogram)
    ]


def _number(number: int, one: str, several: str) -> str:
    """For example "1 case", "2 cases"."""
    return f"{number} {one if number == 1 else several}"


def _counts(numbers: dict[str, int]) -> str:
    """For example "Siemens 20, GE 3"."""
    return ", ".join(f"{name} {number}" for name, number in sorted(numbers.items())) or UNKNOWN


def _patients(numbers: dict[str, int]) -> str:
    """For example "drawn 3 patients, partial 1, none 0", in the order given."""
    (name, number), *others = numbers.items()
    first = f"{name} {_number(number, 'patient', 'patients')}"
    return ", ".join([first, *(f"{name} {number}" for name, number in others)])


def _uses(numbers: dict[str, int]) -> str:
    """For example "statistics of style and shape: 5 patients; EF test: 2"."""
    (name, number), *others = numbers.items()
    first = f"{name}: {_number(number, 'patient', 'patients')}"
    return "; ".join([first, *(f"{name}: {number}" for name, number in others)])


def _range(values: tuple[float, float] | None, form: str, unit: str = "") -> str:
    """For example "8.0 to 10.0 mm"."""
    if values is None:
        return UNKNOWN
    low, high = (format(value, form) for value in values)
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _of_how_many(known: int, all_cases: int) -> str:
    """Nothing where all are known or none is."""
    return f", known in {known} cases" if 0 < known < all_cases else ""


def _percent(fraction: float) -> str:
    """Whole per cent; the space does not break."""
    return f"{100 * fraction:.0f}\u00a0%"
