"""Images -> studies: who belongs together when headers are incomplete or contradict each other."""

import filecmp
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from client.deidentify import same_patient
from client.ingest.dicom.header import Header
from client.ingest.patient import sex_code
from client.ingest.reasons import Unusable

StudyKey = tuple[str, str]
"""What the files call the patient and the study."""


@dataclass(frozen=True)
class Grouped:
    """Images by study.

    Attributes:
        studies: Images in the order they came.
        spellings: How the files spell each study's PatientID, where that is not the key's own spelling; else empty.
        conflicting: Patients whose studies do not seem to be of one person.
        refused: Number of studies refused, by reason code.
        left_out: Number of files left out, by reason code.
    """

    studies: dict[StudyKey, list[Header]] = field(repr=False)
    spellings: dict[StudyKey, str] = field(repr=False)
    conflicting: frozenset[str] = field(repr=False)
    refused: Counter[str]
    left_out: Counter[str]


def group_studies(images: Iterable[Header], one_study_one_patient: bool = False) -> Grouped:
    """Images grouped by StudyInstanceUID, each group with its patient.

    A StudyInstanceUID is globally unique (PS3.5, 9), so it decides what belongs together. Images without a PatientID
    are of the patient whom the study's other images name. A study that names no patient is refused: whether two of them
    are one person's cannot be told, and a person who counts as two is protected half as well. Likewise a study that
    names two patients, and one with two different files of one SOPInstanceUID: no image can be told to be the right
    one. Exact copies count once. Numbers that `same_patient` takes for one are one patient, also where name, birth date
    or sex say otherwise; that is noted.

    Args:
        images: Of any studies.
        one_study_one_patient: Take each study without a PatientID for a patient of its own, because somebody knows.
    """
    groups: dict[str, dict[tuple[str, int | None], Header]] = {}
    refused_studies: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    copies = set()
    for image in images:
        study = groups.setdefault(image.StudyInstanceUID, {})
        first = study.setdefault((image.SOPInstanceUID, image.frame), image)
        if first is image or image.path in copies:
            continue
        copies.add(image.path)  # once a file, whatever the number of its frames
        left_out["duplicate"] += 1
        if not _same_bytes(first, image):
            refused_studies[image.StudyInstanceUID] = "conflicting-copies"
    studies: dict[StudyKey, list[Header]] = {}
    spellings: dict[StudyKey, str] = {}
    for study_uid, group in groups.items():
        if study_uid in refused_studies:
            continue
        try:
            spelling = _spelling(group.values())
            if not spelling and not one_study_one_patient:
                raise Unusable("no-patient-id")
        except Unusable as unusable:
            refused_studies[study_uid] = unusable.code
            continue
        patient = same_patient(spelling) or study_uid
        studies[patient, study_uid] = list(group.values())
        spellings[patient, study_uid] = spelling if spelling != patient else ""
    return Grouped(studies, spellings, _conflicting(studies), Counter(refused_studies.values()), left_out)


def _spelling(images: Iterable[Header]) -> str:
    """The only PatientID of a study, the first in order of several spellings; empty where it names none."""
    names = {image.PatientID.strip() for image in images} - {""}
    if len({same_patient(name) for name in names}) > 1:
        raise Unusable("mixed-patients")
    return min(names, default="")


def _conflicting(studies: Mapping[StudyKey, Iterable[Header]]) -> frozenset[str]:
    """Patients of whom two studies give another name, birth date or sex; what a study does not say agrees with all."""
    said: dict[str, tuple[set[str], ...]] = {}
    for (patient, _), images in studies.items():
        known = said.setdefault(patient, (set(), set(), set()))
        for image in images:
            for values, fact in zip(known, (*image.person, sex_code(image.PatientSex)), strict=True):
                values |= {fact} - {""}
    return frozenset(patient for patient, known in said.items() if any(len(values) > 1 for values in known))


def _same_bytes(one: Header, other: Header) -> bool:
    """Whether two files are copies of each other."""
    try:
        return one.path == other.path or filecmp.cmp(one.path, other.path, shallow=False)
    except OSError:
        return False
