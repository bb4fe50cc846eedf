"""What a site can train on, decided in one place: `prepare`, `check`, `join` and training all ask here."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcmr.shared.case import INDEX_NAME, VENDORS, Case, CaseInfo, load_case, read_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.views import drawn_whole, slice_pairs, with_heart

STYLE, GRADIENT, EF_TEST = "statistics of style and shape", "generator gradients", "EF test"
"""What a site's patients can be used for. The statistics need the left ventricle's cavity at either phase, and take
what is drawn; shape is among them where a study sets `federation.shape`. Gradients need slices in which nothing is left
to draw, because the generator is told what the masks say. A test of the ejection fraction needs that alone: from the
cavity at both phases, or from a table."""

LEFT_OUT = {
    "no-masks": "cases without contours: draw left ventricle, myocardium and right ventricle at end-diastole and "
    "end-systole, or have them found by 'prepare --contours auto', and prepare into a new folder; until then they can "
    "test a model if their EF is known",
    "contours-automatic": "cases whose contours a program found, which policy.contours: drawn of site.yaml does not "
    "allow: draw them, and prepare into a new folder",
    "no-heart": "cases whose masks show no left ventricle in any slice: draw it, prepare anew",
    "vendor-unknown": "cases whose scans name no known vendor, or several: repeat 'prepare' with --vendor V if the "
    "scans that name none are all of one vendor",
    "vendor-not-declared": "cases of a vendor that site.yaml does not declare: add it to 'vendors', there and at the "
    "coordinator, or prepare these scans elsewhere",
    "case-missing": f"cases that {INDEX_NAME} names and whose file is missing: prepare the folder again",
    "case-unreadable": "cases whose file is damaged: remove it and prepare the folder again",
    "named-twice": f"cases that {INDEX_NAME} names twice: remove their rows and files and prepare the folder again",
}
"""Why a case is not trained on, by code, each with its remedy."""


@dataclass(frozen=True)
class Trainable:
    """What of a folder of cases can be trained on; counts and pseudonyms, no images.

    Attributes:
        patients: Group -> its usable cases. A patient with several scans is one patient.
        left_out: Number of cases that are not used, by code of `LEFT_OUT`.
        whole: The groups with a slice that is drawn whole: those that train the generator. The others take part in the
            statistics alone.
    """

    patients: Mapping[str, tuple[CaseInfo, ...]]
    left_out: Mapping[str, int]
    whole: frozenset[str]

    @property
    def num_patients(self) -> int:
        """Patients with at least one usable case."""
        return len(self.patients)

    @property
    def vendors(self) -> dict[str, int]:
        """Number of patients with usable scans of each vendor; one with scans of two counts for both."""
        seen = Counter(vendor for cases in self.patients.values() for vendor in {info.vendor for info in cases})
        return dict(sorted(seen.items()))


def trainable(folder: Path, vendors: Collection[str] | None = None, contours: str = "any") -> Trainable:
    """Which patients of a folder can be trained on, and why the other cases cannot.

    Args:
        folder: A folder of prepared cases.
        vendors: Vendors that the site declares; None takes every known vendor.
        contours: `policy.contours` of the site: "drawn" leaves out cases with automatic contours.

    Raises:
        UserError: The folder is no folder of cases, or its index is damaged.
    """
    left_out: Counter[str] = Counter()
    patients: dict[str, list[CaseInfo]] = defaultdict(list)
    whole = set()
    for case in usable_cases(folder, vendors, left_out, contours):
        patients[group_of(case.info)].append(case.info)
        if trains_the_generator(case):
            whole.add(group_of(case.info))
    by_group = {group: tuple(infos) for group, infos in patients.items()}
    return Trainable(by_group, dict(sorted(left_out.items())), frozenset(whole))


def described(found: Trainable) -> str:
    """In a sentence who can be trained on, and why others cannot: "4 patients can be trained on (Siemens 4); ..."."""
    by_vendor = ", ".join(f"{vendor} {number}" for vendor, number in found.vendors.items())
    patients = f"{found.num_patients} {'patient' if found.num_patients == 1 else 'patients'}"
    sentence = f"{patients} can be trained on ({by_vendor})" if found.patients else "nothing here can be trained on yet"
    if num_in_part := found.num_patients - len(found.whole):
        sentence += f", {num_in_part} of them drawn in part: for {STYLE} only, not for {GRADIENT}"
    reasons = "; ".join(f"{code} {number}: {LEFT_OUT[code]}" for code, number in found.left_out.items())
    sentence += f"; left out: {reasons}" if reasons else ""
    if len(found.vendors) > 1:
        sentence += "; site.yaml must declare all of these vendors"
    return sentence


def usable_cases(
    folder: Path, vendors: Collection[str] | None, left_out: Counter[str], contours: str = "any"
) -> Iterator[Case]:
    """The cases of a folder that can be trained on, in the order of its index, one in memory at a time.

    A case that cannot be used is left out, whatever is wrong with it: an answer that one patient's file could turn into
    a refusal would tell of that patient for nothing.

    Args:
        folder: As in `trainable`.
        vendors: As in `trainable`.
        left_out: Is increased by the codes of the others.
        contours: As in `trainable`.
    """
    infos = read_index(folder)
    repeated = repeated_names(infos)
    for info in infos:
        case = checked(folder, info, info.pseudonym in repeated, vendors, contours)
        if isinstance(case, Case):
            yield case
        else:
            left_out[case] += 1


def checked(
    folder: Path, info: CaseInfo, named_twice: bool, vendors: Collection[str] | None, contours: str = "any"
) -> Case | str:
    """One case if it can be trained on, otherwise a code of `LEFT_OUT`."""
    if not (folder / "cases" / f"{info.pseudonym}.npz").is_file():
        return "case-missing"
    try:
        case = load_case(folder, info)
    except UserError:
        return "case-unreadable"
    if named_twice:  # which of the rows is right is unknown
        return "named-twice"
    return reason_of(case, vendors, contours) or case


def reason_of(case: Case, vendors: Collection[str] | None, contours: str = "any") -> str | None:
    """Why a whole case cannot be trained on; None where it can."""
    if not case.masks.any():
        return "no-masks"
    if contours == "drawn" and case.info.contours == "auto":
        return "contours-automatic"
    if not with_heart(slice_pairs(case)[1]).any():  # on the networks' grid, as training sees it
        return "no-heart"
    if case.info.vendor not in VENDORS:
        return "vendor-unknown"
    if vendors is not None and case.info.vendor not in vendors:
        return "vendor-not-declared"
    return None


def trains_the_generator(case: Case) -> bool:
    """Whether a usable case has a slice with the heart that is drawn whole at both phases, as training sees it."""
    masks = slice_pairs(case)[1]
    return bool((with_heart(masks) & drawn_whole(masks)).any())


def repeated_names(infos: Collection[CaseInfo]) -> set[str]:
    """Pseudonyms that an index names more than once."""
    return {name for name, count in Counter(info.pseudonym for info in infos).items() if count > 1}


def group_of(info: CaseInfo) -> str:
    """The patient whom a case belongs to."""
    return info.group or info.pseudonym
