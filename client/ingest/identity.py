"""Whose a study is, compared with others: one number of two people, two numbers of one person, two issuers."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from fedcmr.client.deidentify import pseudonym, same_patient
from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.patient import sex_code
from fedcmr.client.ingest.placeholders import is_placeholder

MAX_NUMBERS = 3
"""Most patient numbers of one person. A name and birth date that more of them share are what an anonymiser wrote for
everybody."""
IDENTITY_WARNINGS = ("conflicting-patient-id", "several-issuers", "issuers-apart", "two-numbers-one-person")
"""Codes that depend on the other studies of a folder, in the order in which a case notes them."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Identity:
    """What a study says about its patient. Texts are only compared with those of other studies.

    Attributes:
        patient: What the study's case is grouped by.
        number: The patient's number, as `same_patient` spells it; empty for a placeholder.
        names: Digests of the names that the files give; likewise `birth_dates`.
        sexes: "F" or "M", as the files say.
        persons: Pairs of name and birth date, where an image gives both.
        issuers: Digests of who issued the number.
    """

    patient: str = field(repr=False)
    number: str = field(repr=False)
    names: frozenset[str] = field(repr=False)
    birth_dates: frozenset[str] = field(repr=False)
    sexes: frozenset[str]
    persons: frozenset[tuple[str, str]] = field(repr=False)
    issuers: frozenset[str] = field(repr=False)

    def keyed(self, key: bytes) -> "Identity":
        """The same with a keyed hash for every text, which says nothing without the site's key and compares alike."""

        def hidden(kind: str, texts: Iterable[str]) -> frozenset[str]:
            return frozenset(pseudonym(key, kind, text) for text in texts)

        return Identity(
            pseudonym(key, "patient", self.patient),
            pseudonym(key, "number", self.number) if self.number else "",
            hidden("name", self.names),
            hidden("birth date", self.birth_dates),
            self.sexes,
            frozenset((pseudonym(key, "name", n), pseudonym(key, "birth date", b)) for n, b in self.persons),
            hidden("issuer", self.issuers),
        )


def identity_of(images: Iterable[Header], patient: str, spelling: str) -> Identity:
    """What the images of one study say.

    Args:
        images: Their headers.
        patient: What the study's case is grouped by.
        spelling: The PatientID as the files spell it, where that is not `patient` itself; else empty.
    """
    images = list(images)
    number = same_patient(spelling or patient)
    return Identity(
        patient,
        "" if is_placeholder(number) else number,
        frozenset(image.person[0] for image in images) - {""},
        frozenset(image.person[1] for image in images) - {""},
        frozenset(sex_code(image.PatientSex) for image in images) - {""},
        frozenset(image.person for image in images if all(image.person)),
        frozenset(image.issuer for image in images) - {""},
    )


def of_one_person(identities: Mapping[Key, Identity]) -> set[Key]:
    """Studies whose number, name and birth date are also those of another issuer's patient."""
    found: dict[tuple[str, tuple[str, str]], set[Key]] = defaultdict(set)
    for key, identity in identities.items():
        for person in identity.persons if identity.number else ():
            found[identity.number, person].add(key)
    several = (keys for keys in found.values() if len({identities[key].patient for key in keys}) > 1)
    return {key for keys in several for key in keys}


def identity_warnings(identities: Mapping[Key, Identity], issuers_differ: bool) -> dict[Key, tuple[str, ...]]:
    """What is uncertain about each study's patient, as codes of `IDENTITY_WARNINGS`."""
    conflicting = _conflicting(identities.values())
    issuers: dict[str, set[str]] = defaultdict(set)
    patients: dict[tuple[str, str], set[str]] = defaultdict(set)
    for identity in identities.values():
        issuers[identity.number] |= identity.issuers
        for person in identity.persons:
            patients[person].add(identity.patient)
    doubled = {person for person, found in patients.items() if 1 < len(found) <= MAX_NUMBERS}
    by_issuer = "issuers-apart" if issuers_differ else "several-issuers"
    warnings = {}
    for key, identity in identities.items():
        findings = {
            "conflicting-patient-id": identity.patient in conflicting,
            by_issuer: bool(identity.number) and len(issuers[identity.number]) > 1,
            "two-numbers-one-person": not doubled.isdisjoint(identity.persons),
        }
        warnings[key] = tuple(code for code, applies in findings.items() if applies)
    return warnings


def _conflicting(identities: Iterable[Identity]) -> frozenset[str]:
    """Patients of whom two studies give another name, birth date or sex; what a study does not say agrees with all."""
    said: dict[str, tuple[set[str], set[str], set[str]]] = {}
    for one in identities:
        known = said.setdefault(one.patient, (set(), set(), set()))
        for values, more in zip(known, (one.names, one.birth_dates, one.sexes), strict=True):
            values |= more
    return frozenset(patient for patient, known in said.items() if any(len(values) > 1 for values in known))
