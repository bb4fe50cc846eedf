"""The layout of nnU-Net v2's raw data sets: one image per phase, their labels, and `dataset.json`.

    imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz     likewise imagesTs and labelsTs; labels may be missing
    dataset.json                                        what the numbers of the labels mean
    cases.csv                                           optional; columns name, phase (ed or es), patient, vendor,
                                                        field_strength_t

https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md. The format knows no patients and no
phases: where there is no table, NAME is PATIENT_ed or PATIENT_es. Labels that `dataset.json` does not name as a
ventricle, its wall, or nnU-Net's "ignore", are named on the command line, `--labels rv=1,myo=2,lv=3`.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fedcmr.client.deidentify import same_patient
from fedcmr.client.ingest.cine import Findings, Study
from fedcmr.client.ingest.dicom.segment_names import structure_named
from fedcmr.client.ingest.files import find_named, lookup, nifti_stem, plain_files
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.plain import Described, read_plain
from fedcmr.client.ingest.layouts.tables import plain_number, read_rows
from fedcmr.client.ingest.places import Place, Tally, common_folder
from fedcmr.shared.case import BACKGROUND, LV, NOT_DRAWN, PHASE_NAMES
from fedcmr.shared.errors import UserError
from fedcmr.shared.plain_files import read_plain as read_bytes

TABLE_NAME, DESCRIPTION_NAME = "cases.csv", "dataset.json"
COLUMNS = {
    "name": ("name",),
    "phase": ("phase",),
    "patient": ("patient", "patientid", "patient_id"),
    "vendor": ("vendor", "manufacturer"),
    "field_strength_t": ("field_strength_t",),
}
CHANNEL = "_0000"
"""How the name of an image's first channel ends; further ones have other numbers."""
IMAGES, LABELS = ("imagestr", "imagests"), ("labelstr", "labelsts")
MAX_DESCRIPTION_BYTES = 2**20

Found = dict[str, list[Path]]


def find_nnunet(source: Path, labels: Mapping[int, int] | None = None, axes: str | None = None) -> Findings:
    """Patients of a raw data set.

    Args:
        source: The folder of `dataset.json`, or the one above it.
        labels: From `plain.parse_labels`; needed where there are labels that `dataset.json` does not explain.
        axes: As in `find_plain`.

    Raises:
        UserError: There are no images or several channels, labels that nobody explains, names that tell no phase and no
            table, or the table has a mistake.
    """
    root = _root(source)
    refused, left_out = Tally(), Tally()
    images, drawn = _files(root, left_out)
    if not images:
        raise UserError(f"{root} holds no imagesTr/NAME{CHANNEL}.nii.gz, nor such files in imagesTs")
    if drawn and labels is None:
        labels = _labels(root)
    table_path = find_named(root, TABLE_NAME)
    described = _read_table(table_path) if table_path.exists() else _by_name(root, images)
    patients: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    unused, undrawn = set(described), set(drawn)
    for name in sorted(images):
        row, label = lookup(name, described), lookup(name, drawn)
        undrawn.discard(label or "")
        if row is None:
            refused.add("not-in-table", Place(common_folder(images[name]), name))
            continue
        unused.discard(row)
        phase, one = described[row]
        patients[one.patient][phase].append(name)
    studies = []
    for patient, phases in sorted(patients.items()):
        names = [name for own in phases.values() for name in own]
        _, one = described[lookup(names[0], described) or ""]
        labelled = {name: label for name in names if (label := lookup(name, drawn)) is not None}
        paths = [path for name in names for path in images[name]]
        place = Place(common_folder(paths) if len(phases) == 1 else str(paths[0]), one.spelling or patient)
        twice = any(len(files) > 1 for files in (*(images[n] for n in names), *(drawn[n] for n in labelled.values())))
        if twice or any(len(own) > 1 for own in phases.values()):
            refused.add("same-name", place)
        elif set(phases) != set(PHASE_NAMES):
            refused.add("missing-file", place)
        else:
            frames = {phase: images[own[0]][0] for phase, own in phases.items()}
            masks = {phase: drawn[labelled[own[0]]][0] for phase, own in phases.items() if own[0] in labelled}
            read = partial(read_plain, frames, masks or None, dict(labels or {}), one, axes)
            studies.append(Study(patient, patient, read, one.spelling, place=place))
    for name in sorted(unused):
        refused.add("missing-file", Place(patient=name))
    for name in sorted(undrawn):
        for path in drawn[name]:
            left_out.add("masks-without-frames", Place(str(path), name))
    return Findings(studies, refused, left_out)


def _root(source: Path) -> Path:
    """The data set's folder: this one, or the only one below that has a `dataset.json`."""
    if find_named(source, DESCRIPTION_NAME).is_file():
        return source
    below = sorted(path.parent for path in source.glob(f"*/{DESCRIPTION_NAME}"))
    if len(below) != 1:
        raise UserError(f"{source}: expected {DESCRIPTION_NAME} there or in one folder below, got {len(below)}")
    return below[0]


def _files(root: Path, left_out: Tally) -> tuple[Found, Found]:
    """Images and labels by nnU-Net's name for them; one that stands for two files has both.

    Raises:
        UserError: An image has several channels.
    """
    images, drawn = defaultdict(list), defaultdict(list)
    for path in map(Path, plain_files(root, left_out)):
        folder, stem = path.parent.name.lower(), nifti_stem(path.name)
        if stem is None or folder not in (*IMAGES, *LABELS) or path.parent.parent != root:
            if path.suffix.lower() not in (".json", ".csv", ".md", ".txt"):
                left_out.add("other-file", path)
        elif folder in LABELS:
            drawn[stem].append(path)
        elif stem.endswith(CHANNEL):
            images[stem.removesuffix(CHANNEL)].append(path)
        elif stem[-5:-4] == "_" and stem[-4:].isdecimal():
            raise UserError(f"{root / path.parent.name} holds images of several channels: expected {CHANNEL} alone")
        else:
            left_out.add("other-file", path)
    return dict(images), dict(drawn)


def _labels(root: Path) -> dict[int, int]:
    """What the numbers mean, by the names that `dataset.json` gives them.

    Raises:
        UserError: It cannot be read, or names a label that is not known here.
    """
    path = find_named(root, DESCRIPTION_NAME)
    ask = "say what the numbers mean with --labels, for example rv=1,myo=2,lv=3"
    try:
        named = json.loads(read_bytes(path, MAX_DESCRIPTION_BYTES).decode())["labels"]
        numbers = {str(name): int(number) for name, number in named.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{path} holds no labels of the form name: number: {ask}") from None
    known = {0: BACKGROUND}
    for name, number in numbers.items():
        structure = NOT_DRAWN if name.lower() == "ignore" else structure_named(name)
        if number == 0:
            continue
        if structure is None or number in known or not 0 < number <= 255:
            raise UserError(f"{path} names labels that are no ventricle or myocardium, or not one number each: {ask}")
        known[number] = structure
    if LV not in known.values():
        raise UserError(f"{path} names no left ventricle: {ask}")
    return known


def _by_name(root: Path, images: Mapping[str, object]) -> dict[str, tuple[str, Described]]:
    """Phase and patient of names that end in _ed or _es.

    Raises:
        UserError: One does not.
    """
    described = {}
    for name in images:
        patient, _, phase = name.rpartition("_")
        if patient and phase.lower() in PHASE_NAMES:
            described[name] = phase.lower(), Described(patient)
    if len(described) < len(images):
        raise UserError(
            f"{root}: {len(images) - len(described)} of {len(images)} images are not named PATIENT_ed or PATIENT_es: "
            f"add {TABLE_NAME} with the columns name, phase (ed or es) and patient, a row per image"
        )
    return described


def _read_table(path: Path) -> dict[str, tuple[str, Described]]:
    """`cases.csv` by name: phase, and what it says of the patient.

    Raises:
        UserError: A column is missing, a name comes twice, a phase is neither, or a patient has no name.
    """
    table: dict[str, tuple[str, Described]] = {}
    for line, row in read_rows(path, COLUMNS, ["name", "phase", "patient"]):
        name, phase, spelling = row["name"], row["phase"].lower(), row["patient"]
        place = f"{path} line {line}: column"
        if not name or name in table:
            raise UserError(f"{place} name is {'named before' if name else 'empty'}: expected one row per image")
        if phase not in PHASE_NAMES:
            raise UserError(f"{place} phase is neither ed nor es")
        if not spelling:
            raise UserError(f"{place} patient is empty: expected whose image it is, the same for both phases")
        field = row.get("field_strength_t", "")
        tesla = {"field_strength_t": plain_number(field, f"{place} field_strength_t")} if field else {}
        patient = same_patient(spelling)
        spelt = spelling * (spelling != patient)
        table[name] = phase, Described(patient, row.get("vendor", ""), **tesla, spelling=spelt)
    return table


NNUNET = Layout(
    lambda source, options, workers: find_nnunet(source, options.labels, options.axes),
    expects="""\
a raw data set of nnU-Net v2: imagesTr/PATIENT_ed_0000.nii.gz and PATIENT_es_0000.nii.gz, labelsTr/PATIENT_ed.nii.gz
and so on, dataset.json; other names need a table cases.csv with the columns name, phase (ed or es), patient, and
where known vendor and field_strength_t; labels that dataset.json does not explain need --labels""",
    takes=("labels", "axes"),
)
