"""The synthetic data set as it leaves the study: cases, labels, datasheet, checksums, DICOM on request.

The folder appears whole or not at all: everything is written beside it and renamed at the end. `SHA256SUMS` is
checked with `sha256sum --check SHA256SUMS`, and `cases.csv` makes the folder a data set like any other one.
"""

import csv
import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from server.dicom_export import export_case
from server.evaluation.score import score
from shared.case import ED, ES, LV, Case, save_case, write_index
from shared.config import Config
from shared.errors import UserError
from shared.progress import track

DATASHEET_NAME, LABELS_NAME, CHECKSUMS_NAME = "DATASHEET.md", "labels.csv", "SHA256SUMS"
LABEL_COLUMNS = ("pseudonym", "vendor", "ef", "ef_requested", "ef_measured", "lv_ed_ml", "lv_es_ml")
NUM_BOOTSTRAP = 1000


def write_release(
    folder: Path,
    cases: Sequence[Case],
    requested_efs: Sequence[float] | None,
    measured_efs: Sequence[float],
    facts: Mapping[str, Any],
    dicom: bool = False,
) -> None:
    """Write `folder`, replacing an earlier release there.

    Args:
        folder: For example RUN/synthetic.
        cases: Synthetic cases; `info.ef` is the label.
        requested_efs: Shape (len(cases),), what each heart was asked to eject; None: the labels.
        measured_efs: Shape (len(cases),), `server.segmentation.measured_ef` of the pictures, NaN where it found no LV.
        facts: What `datasheet` takes; see `study_facts`.
        dicom: Also write `dicom/`.

    Raises:
        UserError: `folder` holds something that is not a release.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / DATASHEET_NAME).is_file():
        raise UserError(f"{folder} holds other files: give a new or empty folder for the synthetic data set")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for case in track(cases, "writing synthetic cases"):
        save_case(partial, case)
        if dicom:
            export_case(partial / "dicom", case)
    write_index(partial, [case.info for case in cases])
    requested = [case.info.ef for case in cases] if requested_efs is None else requested_efs
    _write_labels(partial / LABELS_NAME, cases, requested, measured_efs)
    text = datasheet(cases, requested, measured_efs, facts)
    (partial / DATASHEET_NAME).write_text(text, encoding="utf-8")
    (partial / CHECKSUMS_NAME).write_text(checksums(partial), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def study_facts(study: str, config: Config, prior_sha256: str, privacy: Mapping[str, Any]) -> dict[str, Any]:
    """What `datasheet` tells of a study, from its settings.

    Args:
        study: Its name.
        config: Its settings.
        prior_sha256: Of the public prior's file.
        privacy: As in report.json.
    """
    return {
        "study": study,
        "privacy": privacy,
        "made_with": {
            "public prior (SHA-256)": prior_sha256,
            "federated rounds": config.federation.num_rounds,
            "calls of the generator per picture": config.synthesis.num_steps,
            "start of the sampler (0 noise, 1 sketch)": config.synthesis.start_t,
            "seed": config.seed,
        },
        "real_data": {
            "phantom": "The sites' scans were themselves simulated: no patient was involved at any point.",
            "acdc": "The sites' scans were real, from the public ACDC data set (Bernard et al. 2018).",
            "prepared": "The sites' scans were real and never left the sites.",
        }[config.hospitals.source],
    }


def cavity_ml(case: Case, phase: int) -> float:
    """LV volume over the slices that are there, in millilitres: area times slice spacing, summed."""
    return float((case.masks[phase] == LV).sum() * np.prod(case.spacing_mm, dtype=np.float64) / 1000)


def checksums(folder: Path) -> str:
    """One `sha256  relative/path` line per file, as `sha256sum` writes and checks them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_NAME)
    lines = (
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}" for path in paths
    )
    return "".join(f"{line}\n" for line in lines)


def datasheet(
    cases: Sequence[Case], requested_efs: Sequence[float], measured_efs: Sequence[float], facts: Mapping[str, Any]
) -> str:
    """The data set's datasheet, after Gebru et al. (2021), https://arxiv.org/abs/1803.09010.

    Args:
        cases: The synthetic cases.
        requested_efs: Shape (len(cases),).
        measured_efs: Shape (len(cases),), found on the pictures; NaN where no LV was found.
        facts: `study` (its name), `privacy` (as in report.json; an epsilon of None means no privacy), `made_with`
            ({name: value}, one line each), `real_data` (one sentence on what the sites' scans were).
    """
    vendors = sorted(Counter(case.info.vendor for case in cases).items())
    styles = ", ".join(f"{count} in the style of {vendor}" for vendor, count in vendors)
    efs = np.array([case.info.ef for case in cases])
    slices = _span({case.frames.shape[1] for case in cases})
    pixels = ", ".join(sorted({f"{case.frames.shape[2]} x {case.frames.shape[3]}" for case in cases}))
    in_plane = ", ".join(sorted({f"{case.spacing_mm[1]:g} x {case.spacing_mm[2]:g}" for case in cases}))
    apart = _span({round(float(case.spacing_mm[0]), 1) for case in cases})
    return f"""# Datasheet: synthetic cardiac MRI of "{facts["study"]}"

No picture in this folder shows a person. Every heart was drawn by a shape model and painted by a generator.

## Composition

- {len(cases)} synthetic patients: {styles}.
- Per patient: end-diastole and end-systole, short axis, {slices} slices {apart} mm apart, of {pixels} pixels of
  {in_plane} mm.
- Masks: 0 background, 1 right ventricle, 2 myocardium, 3 left-ventricular cavity. The picture was painted over them;
  nobody has drawn them afterwards.
- Ejection fraction, from the masks: {efs.min():.2f} to {efs.max():.2f}, mean {efs.mean():.2f}. Spread evenly on
  purpose: low and high values are more frequent than among patients.
{_agreement(requested_efs, measured_efs)}

| file | content |
|---|---|
| `cases/<pseudonym>.npz` | `frames` float32 (2, Z, H, W) in [0, 1]; `masks` uint8 (2, Z, H, W); `spacing_mm` (3,) |
| `cases.csv` | index: pseudonym, vendor, field strength, ejection fraction, group |
| `{LABELS_NAME}` | `ef` of the masks, `ef_requested`, `ef_measured` on the picture; cavity: `lv_ed_ml`, `lv_es_ml` |
| `dicom/` | only on request: MR Image Storage with SyntheticData (0008,001C) = YES |
| `{CHECKSUMS_NAME}` | check with `sha256sum --check {CHECKSUMS_NAME}` |

## How it was made

A parametric heart gives the masks, the masks give the ejection fraction, and a generator paints the picture: trained
beforehand on simulated hearts, then tuned at the sites. {facts["real_data"]}

{chr(10).join(f"- {name}: {value}" for name, value in facts["made_with"].items())}

## Privacy

{_privacy(facts["privacy"])}

## Intended use

Training and testing of methods that measure the left ventricle, teaching, software tests.

## Limits

- Not for diagnosis, and not evidence about patients: prevalences, ages, sexes and diseases are not modelled.
- A vendor's style is what the sites with that vendor's scanners contributed, not the vendor's range of products.
- Two phases of the cycle, short axis only; no flow, no late enhancement, no implants, few artefacts.
- A method that works on these pictures must be tested on real scans before anybody relies on it.
"""


def _agreement(requested_efs: Sequence[float], measured_efs: Sequence[float]) -> str:
    """Whether the pictures show what was asked for, as one item of the datasheet."""
    found = [(asked, seen) for asked, seen in zip(requested_efs, measured_efs, strict=True) if math.isfinite(seen)]
    values = score([asked for asked, _ in found], [seen for _, seen in found], NUM_BOOTSTRAP, seed=0)
    r, mae = (_with_interval(values, name, digits) for name, digits in (("r", 3), ("mae_points", 1)))
    return "\n".join([
        "- Ejection fraction asked for against the one that an independent segmenter measures on the picture:",
        f"  r = {r}, mean absolute difference {mae} EF points.",
        "  The segmenter was trained on simulated hearts and never on a generated picture. It found no left ventricle",
        f"  in {len(measured_efs) - len(found)} of {len(measured_efs)} patients; their `ef_measured` is empty.",
    ])  # fmt: skip


def _with_interval(values: Mapping[str, Any], name: str, digits: int) -> str:
    """A figure with its 95 % interval; "unknown" where it is undefined."""
    if values[name] is None:
        return "unknown"
    limits = values["ci95"][name]
    interval = f" (95 % {limits[0]:.{digits}f} to {limits[1]:.{digits}f})" if limits else ""
    return f"{values[name]:.{digits}f}{interval}"


def _privacy(privacy: Mapping[str, Any]) -> str:
    """What was spent, and what the guarantee covers."""
    if privacy.get("epsilon") is None:
        return (
            "**None.** The generator was trained without differential privacy. Do not give this folder to anybody who\n"
            "may not see the scans it was trained on."
        )
    sites = sorted(privacy["sites"].items())
    spent = [(name, "-" if site["epsilon"] is None else f"{site['epsilon']:.2f}") for name, site in sites]
    return "\n".join([
        "The sites' updates were differentially private. The guarantee covers whatever is made from the generator,",
        f"this folder included: at most **epsilon = {privacy['epsilon']:.2f} at delta = {privacy['delta']:g}**.",
        "",
        f"- Unit: {privacy['unit']}. A patient scanned at two sites spends both sites' epsilons, added up.",
        f"- Accountant: {privacy['accountant']}.",
        "- Not covered: the choice of settings by somebody who saw the scans.",
        "",
        "| site | epsilon | delta |",
        "|---|---|---|",
        *(f"| {name} | {epsilon} | {privacy['delta']:g} |" for name, epsilon in spent),
    ])  # fmt: skip


def _span(values: Collection[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _write_labels(
    path: Path, cases: Sequence[Case], requested_efs: Sequence[float], measured_efs: Sequence[float]
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(LABEL_COLUMNS)
        for case, requested, measured in zip(cases, requested_efs, measured_efs, strict=True):
            volumes = (f"{cavity_ml(case, phase):.2f}" for phase in (ED, ES))
            efs = ("" if math.isnan(value) else f"{value:.6g}" for value in (case.info.ef, requested, measured))
            writer.writerow([case.info.pseudonym, case.info.vendor, *efs, *volumes])
