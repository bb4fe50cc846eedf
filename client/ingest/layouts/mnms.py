"""The layout of M&Ms: one CSV, and `CODE/CODE_sa.nii.gz` with `CODE_sa_gt.nii.gz`, 4D, labelled at two phases.

Campello et al., IEEE TMI 2021, https://doi.org/10.1109/TMI.2021.3090082. Its masks count from the left ventricle: 1 LV,
2 myocardium, 3 RV. The field strength is not given; the CSV's columns `Pathology` and `Sex` may be missing.
"""

import math
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from fedcmr.client.ingest.cine import Cine, Findings, Study
from fedcmr.client.ingest.files import NIFTI_SUFFIXES, find_named, is_system, lookup, nifti_files, nifti_stem
from fedcmr.client.ingest.layouts.layout import Layout
from fedcmr.client.ingest.layouts.nifti import on_grid, patient_axes, read_nifti, relabel, spacing_of
from fedcmr.client.ingest.layouts.tables import read_rows, whole_number
from fedcmr.client.ingest.patient import agreed, pathology_code, sex_code
from fedcmr.client.ingest.places import Place, Tally
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.vendor import says_vendor, vendor_name
from fedcmr.shared.case import BACKGROUND, LV, MYO, RV
from fedcmr.shared.errors import UserError

LABELS = {0: BACKGROUND, 1: LV, 2: MYO, 3: RV}
COLUMNS = ("External code", "VendorName", "ED", "ES")
ALIASES = {name: (name.lower(),) for name in (*COLUMNS, "Sex", "Pathology")}
IMAGE, MASK = "_sa", "_sa_gt"


def find_mnms(source: Path) -> Findings:
    """Patients that the CSV lists.

    Raises:
        UserError: There is no such CSV, or more than one.
    """
    left_out, refused = Tally(), Tally()
    images = nifti_files(source, _code, left_out, refused, known=(".csv",))
    described: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in _read_table(source):
        if row["External code"]:
            described[row["External code"]].append(row)
    studies, named = [], set()
    for code, rows in described.items():
        row = rows[0]
        phases = whole_number(row["ED"]), whole_number(row["ES"])
        image = lookup(code, images)
        named.add(image)
        place = Place(str(images[image]) if image else "", code)
        if len({tuple(one[column] for column in COLUMNS) for one in rows}) > 1:
            refused.add("conflicting-rows", place)
        elif phases[0] is None or phases[1] is None:
            refused.add("no-phases-in-table", place)
        elif image is None:
            refused.add("missing-file", place)
        else:
            sex = agreed(sex_code(one.get("Sex", "")) for one in rows)
            pathology = agreed(pathology_code(one.get("Pathology", "")) for one in rows)
            read = partial(read_mnms, images[image], row["VendorName"], (phases[0], phases[1]), sex, pathology)
            studies.append(Study(code, code, read, place=place))
    for image in sorted(set(images) - named):
        left_out.add("not-in-table", images[image])
    return Findings(studies, refused, left_out)


def read_mnms(path: Path, vendor: str, phases: tuple[int, int], sex: str = "", pathology: str = "") -> Cine:
    """The two labelled phases of one patient.

    Args:
        path: The `CODE_sa.nii.gz`.
        vendor: As the CSV names it.
        phases: Indices of the labelled phases, from 0.
        sex: As in `Cine`.
        pathology: As in `Cine`.

    Raises:
        Unusable: The stack or its mask is missing or damaged, or they do not fit.
    """
    image = read_nifti(path)
    masks = read_nifti(sibling(path, "_gt"), labels=True)
    masks = on_grid(masks, image) or masks
    if image.array.shape != masks.array.shape or image.array.ndim != 4 or max(phases) >= image.array.shape[3]:
        raise Unusable("masks-differ")
    x_mm, y_mm, z_mm = spacing_of(image.affine)
    return Cine(
        images=image.array[..., list(phases)].T.astype(np.float32),
        masks=relabel(masks.array[..., list(phases)].T, LABELS),
        spacing_mm=(z_mm, y_mm, x_mm),
        axes=patient_axes(image),
        vendor=vendor_name(vendor),
        says_vendor=says_vendor([vendor]),
        field_strength_t=math.nan,
        sex=sex,
        pathology=pathology,
    )


def sibling(path: Path, ending: str) -> Path:
    """The file beside an image that has its name and an ending, compressed or not; where none is, the likeliest."""
    stem = nifti_stem(path.name)
    assert stem is not None
    names = [f"{stem}{ending}{path.name[len(stem) :]}", *(f"{stem}{ending}{suffix}" for suffix in NIFTI_SUFFIXES)]
    paths = [find_named(path.parent, name) for name in names]
    return next((one for one in paths if one.exists()), paths[0])


def _code(stem: str) -> str | None:
    """The patient of a file with a whole cine; empty for its mask."""
    if stem.lower().endswith(MASK):
        return ""
    return stem[: -len(IMAGE)] if stem.lower().endswith(IMAGE) else None


def _read_table(source: Path) -> list[dict[str, str]]:
    """The rows of the data set's CSV, the one of the folder's tables that has its columns."""
    paths = [path for path in sorted(source.iterdir()) if path.suffix.lower() == ".csv" and not is_system(path.name)]
    tables, trouble = [], ""
    for path in paths:
        try:
            tables.append([row for _, row in read_rows(path, ALIASES, COLUMNS)])
        except UserError as error:
            trouble = f"; {error}"
    if len(tables) != 1:
        told = trouble if len(paths) == 1 else ""
        raise UserError(f"{source}: expected one CSV with the columns {', '.join(COLUMNS)}, got {len(tables)}{told}")
    return tables[0]


MNMS = Layout(
    lambda source, options, workers: find_mnms(source),
    expects="CODE/CODE_sa.nii.gz and CODE_sa_gt.nii.gz, and the data set's CSV",
    public_set="M&Ms",
)
