"""Images -> studies: who belongs together when headers are incomplete or contradict each other."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from fedcmr.client.deidentify import same_patient
from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.identity import Identity, identity_of, identity_warnings, of_one_person
from fedcmr.client.ingest.placeholders import is_placeholder
from fedcmr.client.ingest.places import Place, Tally, common_folder
from fedcmr.client.ingest.reasons import Unusable

StudyKey = tuple[str, str]
"""What the files call the patient and the study."""


@dataclass(frozen=True)
class Grouped:
    """Images by study.

    Attributes:
        studies: Images in the order they came.
        spellings: How the files spell each study's PatientID, where that is not the key's own spelling; else empty.
        warnings: What is uncertain about each study's patient, as reason codes.
        identities: What each study says about its patient.
        refused: Studies refused, by reason code.
    """

    studies: dict[StudyKey, list[Header]] = field(repr=False)
    spellings: dict[StudyKey, str] = field(repr=False)
    warnings: dict[StudyKey, tuple[str, ...]] = field(repr=False)
    identities: dict[StudyKey, Identity] = field(repr=False)
    refused: Tally


def group_studies(
    images: Iterable[Header],
    one_study_one_patient: bool = False,
    issuers_differ: bool = False,
    conflicting: Collection[str] = (),
) -> Grouped:
    """Images grouped by StudyInstanceUID, each group with its patient.

    A StudyInstanceUID is globally unique (PS3.5, 9), so it decides what belongs together. Images without a PatientID,
    or with a placeholder such as `0000` or `UNKNOWN`, are of the patient whom the study's other images name. A study
    that names no patient is refused: whether two of them are one person's is unknown, and a person who counts as
    two is protected half as well. Likewise a study that names two patients, and one with two different images of one
    SOPInstanceUID at one place and time: it is unknown which is the right one. Numbers that `same_patient`
    takes for one are one patient, also where name, birth date or sex say otherwise; that is noted.

    A PatientID is unique within its issuer only (PS3.3 C.7.1.1), but one hospital's scanners may name the issuer, spell
    it otherwise or leave it out. So a number is one patient whoever issued it, which is noted where issuers differ. A
    patient depends on nothing but the study itself: scans that come later cannot make two of one.

    Args:
        images: Headers of images, from any studies.
        one_study_one_patient: Take each study without a PatientID for a patient of its own, because somebody knows.
        issuers_differ: Take a number of another issuer for another patient, because somebody knows. A study that names
            no issuer is refused, and so are studies whose number, name and birth date agree under two issuers: they
            are one person's, and the issuer is spelt in two ways.
        conflicting: Studies with such images, as `copies.without_copies` finds them.
    """
    groups: dict[str, list[Header]] = defaultdict(list)
    refused_studies = dict.fromkeys(conflicting, "conflicting-copies")
    for image in images:
        groups[image.StudyInstanceUID].append(image)
    studies: dict[StudyKey, list[Header]] = {}
    spellings: dict[StudyKey, str] = {}
    for study_uid, group in groups.items():
        if study_uid in refused_studies:
            continue
        try:
            spelling = _spelling(group)
            number = same_patient(spelling)
            if not is_placeholder(number):
                patient = f"{number}^^^{_issuer(group)}" if issuers_differ else number
            elif one_study_one_patient:
                patient = study_uid
            else:
                raise Unusable("no-patient-id")
        except Unusable as unusable:
            refused_studies[study_uid] = unusable.code
            continue
        studies[patient, study_uid] = group
        spellings[patient, study_uid] = spelling if spelling != patient else ""
    identities = {key: identity_of(group, key[0], spellings[key]) for key, group in studies.items()}
    if issuers_differ:
        for key in of_one_person(identities):
            refused_studies[key[1]] = "issuers-of-one-person"
            del studies[key], spellings[key], identities[key]
    warnings = identity_warnings(identities, issuers_differ)
    refused = Tally()
    for study_uid, code in refused_studies.items():
        refused.add(code, place_of(groups[study_uid]))
    return Grouped(studies, spellings, warnings, identities, refused)


def place_of(images: Sequence[Header]) -> Place:
    """Where a study lies, and what its files call it; of several numbers all."""
    patients, accessions, studies = (
        ", ".join(sorted({getattr(image, keyword).strip() for image in images} - {""}))
        for keyword in ("PatientID", "AccessionNumber", "StudyInstanceUID")
    )
    return Place(common_folder(image.path for image in images), patients, accessions, studies)


def _spelling(images: Iterable[Header]) -> str:
    """The only PatientID of a study, the first in order of several spellings; a placeholder or empty without one."""
    names = {image.PatientID.strip() for image in images} - {""}
    numbers = {name for name in names if not is_placeholder(same_patient(name))}
    if len({same_patient(name) for name in numbers}) > 1:
        raise Unusable("mixed-patients")
    return min(numbers or names, default="")


def _issuer(images: Iterable[Header]) -> str:
    """The only issuer that a study names."""
    issuers = {image.issuer for image in images} - {""}
    if len(issuers) != 1:
        raise Unusable("mixed-patients" if issuers else "no-issuer")
    return issuers.pop()
