"""Small studies of several patients, with segmentations, as an archive holds them; all that names one is marked."""

from pathlib import Path

from fedcmr.client.ingest.refused_list import LIST_NAME
from fedcmr.shared.case import Case, load_cases
from tests.client.ingest.dicom.test_segmentation import ED, ES, IMAGES, NUM_PHASES, NUM_SLICES, make_image, make_seg
from tests.client.ingest.dicom_files import compress

MARK = "CANARY"
ROOT = "1.2.826.0.1.99999"
"""Root of all UIDs of studies."""
PATIENTS = (("SIEMENS", "20200310"), ("Philips Medical Systems", "20210511"), ("GE MEDICAL SYSTEMS", "20210907"))
LOCALISER = len(PATIENTS)
"""Number of a study that holds nothing but a localiser."""


def study_uid(number: int) -> str:
    return f"{ROOT}.{number}"


def accession(number: int) -> str:
    return f"{MARK}ACC{number}"


def write_study(folder: Path, number: int, syntax: str | None = None, phases: int = NUM_PHASES) -> Path:
    """One patient's study; `syntax` is GDCM's name of one to compress its images by."""
    folder.mkdir(parents=True)
    manufacturer, date = PATIENTS[number % len(PATIENTS)]
    stack = []
    for t in range(phases):
        stack.append([make_image(z, t, IMAGES[t, z] + number, f"{study_uid(number)}.1") for z in range(NUM_SLICES)])
        for image in stack[t]:
            image.PatientID, image.PatientName = f"{MARK}-{number}", f"{MARK}^Jane{number}"
            image.PatientBirthDate, image.StudyInstanceUID = f"1950010{number + 1}", study_uid(number)
            image.AccessionNumber, image.StudyDate = accession(number), date
            image.Manufacturer = manufacturer
            image.StudyDescription = f"Cardiac MR {MARK}"
            path = folder / f"{image.InstanceNumber:03d}.dcm"
            image.save_as(path, enforce_file_format=True)
            if syntax is not None:
                compress(path, path, syntax)
    if phases == NUM_PHASES:
        for t in (ED, ES):
            make_seg(t, images=stack[t], number=number).save_as(folder / f"seg{t}.dcm")
    return folder


def write_studies(folder: Path) -> Path:
    """The study of every patient, one of them compressed, and a localiser."""
    write_study(folder / "0", 0)
    write_study(folder / "1", 1, "JPEG2000Lossless")
    write_study(folder / "2", 2, "JPEGLSLossless")
    write_study(folder / "3", LOCALISER, phases=1)
    return folder


def same_cases(one: Path, other: Path) -> bool:
    """Whether two folders hold the same cases, to the bit, and the same notes on them."""

    def content(case: Case) -> tuple[object, ...]:
        return repr(case.info), case.frames.tobytes(), case.masks.tobytes(), tuple(case.spacing_mm)

    cases = [[content(case) for case in load_cases(folder)] for folder in (one, other)]
    details = [(folder / "details.json").read_text() for folder in (one, other)]
    return len(cases[0]) > 0 and cases[0] == cases[1] and details[0] == details[1]


def leaks(folder: Path, *texts: str) -> list[str]:
    """Files below a folder whose name or content names a patient or a study, and texts that do.

    The list of what was refused is there to name them.
    """
    marks = (MARK, ROOT, "Jane", "1950010")
    files = [path for path in folder.rglob("*") if any(mark in str(path.relative_to(folder)) for mark in marks)]
    files += [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.match(LIST_NAME) and any(mark.encode() in path.read_bytes() for mark in marks)
    ]
    return [str(path) for path in files] + [text for text in texts if any(mark in text for mark in marks)]
