"""Images -> studies: who belongs together when headers are incomplete or contradict each other."""

import filecmp
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from client.ingest.dicom.header import Header
from client.ingest.reasons import Unusable

StudyKey = tuple[str, str]
"""What the files call the patient and the study."""


@dataclass(frozen=True)
class Grouped:
    """Images by study.

    Attributes:
        studies: Images in the order they came.
        refused: Number of studies refused, by reason code.
        left_out: Number of files left out, by reason code.
    """

    studies: dict[StudyKey, list[Header]] = field(repr=False)
    refused: Counter[str]
    left_out: Counter[str]


def group_studies(images: Iterable[Header]) -> Grouped:
    """Images grouped by StudyInstanceUID, each group with its patient.

    A StudyInstanceUID is globally unique (PS3.5, 9), so it decides what belongs together. Images without a PatientID
    are of the patient whom the study's other images name; where none does, the study is a patient of its own: nothing
    is merged on a guess, and no study falls apart. A study that names two patients is refused whole, and so is one with
    two different files of one SOPInstanceUID: no image can be told to be the right one. Exact copies count once.
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
    for study_uid, group in groups.items():
        try:
            patient = _patient(group.values())
        except Unusable as unusable:
            refused_studies[study_uid] = unusable.code
        if study_uid not in refused_studies:
            studies[patient or study_uid, study_uid] = list(group.values())
    return Grouped(studies, Counter(refused_studies.values()), left_out)


def _patient(images: Iterable[Header]) -> str:
    """The only PatientID of a study, empty where it names none."""
    names = {image.PatientID.strip() for image in images} - {""}
    if len(names) > 1:
        raise Unusable("mixed-patients")
    return names.pop() if names else ""


def _same_bytes(one: Header, other: Header) -> bool:
    """Whether two files are copies of each other."""
    try:
        return one.path == other.path or filecmp.cmp(one.path, other.path, shallow=False)
    except OSError:
        return False
