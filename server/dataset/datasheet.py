"""`DATASHEET.md` of a synthetic data set: the questions of Gebru et al. (2021), answered.

https://arxiv.org/abs/1803.09010; "Collection" and "Preprocessing" are one here, "How it was made".
"""

import hashlib
import json
import math
import platform
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from fedcmr.server.dataset.making import from_guides, making_of
from fedcmr.server.dataset.nifti import LABELS
from fedcmr.server.dataset.nnunet import DATASET_NAME
from fedcmr.server.evaluation.score import score
from fedcmr.server.front_matter import front_matter
from fedcmr.server.generation.guide_scans import read_guides
from fedcmr.server.settings import Config
from fedcmr.shared.case import Case
from fedcmr.shared.file_names import DATASHEET_NAME
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.provenance import Provenance

NUM_BOOTSTRAP = 1000
LIBRARIES = ("fedcmr", "torch", "monai", "opacus", "numpy")
SETTINGS = ("seed", "privacy", "federation", "synthesis")
"""Settings that determine the images. The others concern the study's hospitals and tests, and contain paths."""
FILES = {
    "cases/<pseudonym>.npz": "`frames` float32 (2, Z, H, W) in [0, 1]; `masks` uint8 (2, Z, H, W); `spacing_mm` (3,): "
    "z, y, x. Slices from base to apex, seen from the apex. The masks are whole: no pixel is unknown (255)",
    "cases.csv": "index, a row per patient: pseudonym, vendor (the style), field_strength_t (empty: none), ef, group, "
    "contours (`drawn`: the masks are whole)",
    "labels.csv": "`ef` of the masks, `ef_requested`, `ef_measured` on the image; cavity: `lv_ed_ml`, `lv_es_ml`",
    "DATASHEET.md": "this file",
    "croissant.json": "the same in short for programs: Croissant 1.0 of MLCommons, and its RAI vocabulary",
    "SHA256SUMS": "check with `sha256sum --check SHA256SUMS`",
}
DICOM_FILES = {
    "dicom/<pseudonym>/<phase>_<slice>.dcm": "MR Image Storage, `ed_00` to `es_NN`, a series per phase, SyntheticData "
    "(0008,001C) = YES",
    "dicom/<pseudonym>/masks/<phase>.dcm": "the masks, Segmentation Storage with SNOMED CT codes; "
    "`prepare --format dicom dicom` reads both (from 3 slices on)",
}
NIFTI_FILES = {
    "nifti/frames/<pseudonym>.nii.gz": "float32 in [0, 1], axes (x, y, z, phase), RAS+ millimetres",
    "nifti/masks/<pseudonym>.nii.gz": "uint8, the same axes",
    "nifti/cases.csv": f"name, vendor, ef_fraction; `prepare --format plain --labels {LABELS} nifti` reads the folder",
}
NNUNET_FILES = {
    f"nnunet/{DATASET_NAME}/imagesTr/<pseudonym>_<phase>_0000.nii.gz": "nnU-Net v2, one image per phase, `ed` and "
    "`es`: float32 in [0, 1], axes (x, y, z)",
    f"nnunet/{DATASET_NAME}/labelsTr/<pseudonym>_<phase>.nii.gz": "their labels, uint8",
    f"nnunet/{DATASET_NAME}/dataset.json": "channel and labels, for nnU-Net",
    f"nnunet/{DATASET_NAME}/splits_final.json": "five folds by patient: copy it to nnU-Net's folder of preprocessed "
    "data, otherwise a patient's phases are split over training and validation",
    f"nnunet/{DATASET_NAME}/cases.csv": "name, patient, phase, vendor, ef_fraction; `prepare --format nnunet nnunet` "
    "reads the folder",
    "datalist.json": "MONAI: image, label, ef and fold of each phase; paths from this folder",
}
SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (math.inf, "100K<n<1M"))
"""Hugging Face's names for the number of patients."""


@dataclass(frozen=True)
class Content:
    """Content of a release.

    Attributes:
        cases: The synthetic cases.
        requested_efs: Shape (len(cases),), as fractions.
        measured_efs: Shape (len(cases),), measured on the images; NaN where no LV was found.
        dicom: Whether there is `dicom/`; likewise `nifti` and `nnunet`.
    """

    cases: Sequence[Case]
    requested_efs: Sequence[float]
    measured_efs: Sequence[float]
    dicom: bool = False
    nifti: bool = False
    nnunet: bool = False


def study_facts(
    study: str,
    config: Config,
    prior: Prior,
    generator: Path,
    privacy: Mapping[str, Any],
    sites: Sequence[Provenance],
    prior_styles: Sequence[str],
    populations: Sequence[str] = (),
) -> dict[str, Any]:
    """A study's facts for `datasheet`.

    Args:
        study: Name of the study.
        config: Its settings.
        prior: The public prior.
        generator: File of the shared generator, which the federation added to the prior.
        privacy: As in report.json.
        sites: Provenance of the scans of each site that took part.
        prior_styles: The vendors whose style comes from no site.
        populations: The vendors whose sites released the shapes of their hearts.
    """
    settings, guides = asdict(config), read_guides(config.synthesis.guides)
    settings["synthesis"]["guides"] = sorted(guides.sets) if guides else []  # paths are this machine's
    return {
        "study": study,
        "privacy": privacy,
        "made_with": {
            "versions": ", ".join([f"python {platform.python_version()}", *(f"{n} {version(n)}" for n in LIBRARIES)]),
            "public prior (SHA-256)": prior.sha256,
            "generator (SHA-256)": hashlib.sha256(generator.read_bytes()).hexdigest(),
            "seed": config.seed,
        },
        "settings": OmegaConf.to_yaml(OmegaConf.create({name: settings[name] for name in SETTINGS})),
        "making": from_guides(guides, config.synthesis.num_steps).facts(),
        "prior": prior_sentence(prior.made_by),
        "real_data": real_data(sites),
        "terms": terms(sites, prior.made_by, guides.terms if guides else ()),
        "prior_styles": prior_styles,
        "populations": list(populations),
    }


def prior_sentence(made_by: Mapping[str, str]) -> str:
    """What the generator was trained on before the sites adapted it, as far as the prior's file states it."""
    if made_by.get("num_hearts", "").isdecimal():  # written by `fedcmr-server pretrain`
        scans = public_scans(made_by)
        of_whom = (
            f"on simulated hearts and public scans of patients ({scans})" if scans else "on simulated hearts alone"
        )
        return f"The generator was trained beforehand {of_whom}, then tuned at the sites."
    return "The generator was trained beforehand, on what its file does not say, then tuned at the sites."


def public_scans(made_by: Mapping[str, str]) -> str:
    """The public scans that a prior has seen, "ACDC: 79"; empty where it has seen none."""
    return ", ".join(f"{name}: {number}" for name, number in json.loads(made_by.get("public_scans", "{}")).items())


def real_data(sites: Sequence[Provenance]) -> str:
    """The provenance of the sites' scans, one sentence for each kind; no site is named.

    It states that no patient was involved only where every site's scans are recorded as simulated.
    """
    if sites and all(site.is_simulated for site in sites):
        return "The sites' scans were themselves simulated: no patient was involved at any site."
    sentences = []
    for kind, num in sorted(Counter((site.kind, site.source) for site in sites).items()):
        who = _of_sites(num, len(sites))
        match kind:
            case ("simulated", _):
                sentences.append(f"The scans of {who} were simulated.")
            case ("public", source):
                sentences.append(f"The scans of {who} were those of real patients, from the public data set {source}.")
            case _:
                sentences.append(f"The scans of {who} were those of real patients, and private.")
    return "\n".join(sentences) or "Nobody has recorded whose scans the sites had: take them for real patients'."


def terms(sites: Sequence[Provenance], made_by: Mapping[str, str], of_guides: Sequence[str] = ()) -> str:
    """Terms of use for everything that was made from the sites' scans, those that the prior has seen and the guides."""
    if sites and all(site.is_simulated for site in sites) and not public_scans(made_by) and not of_guides:
        return "No third party's scan is behind this folder: whoever made it may choose its licence."
    of_prior = json.loads(made_by.get("terms", "[]"))
    sentences = [
        f"{text}. Keep to these terms here too."
        for text in dict.fromkeys([*(site.terms for site in sites), *of_prior, *of_guides])
        if text
    ]
    if not sites or any(site.kind == "private" for site in sites):
        sentences.append(
            "Private scans of real patients are among those that the generator was tuned on: the sites'\n"
            "agreement on the study decides who may have this folder; ask its coordinator."
        )
    return "\n".join(sentences)


def _of_sites(num: int, of: int) -> str:
    """A number of sites, as words for a sentence."""
    if num == of:
        return "the one site" if of == 1 else f"all {of} sites"
    return f"{num} of the {of} sites"


def datasheet(content: Content, facts: Mapping[str, Any]) -> str:
    """The data set's datasheet.

    Args:
        content: The release.
        facts: `study` (its name), `privacy` (as in report.json; an epsilon of None means no privacy), `made_with`
            ({name: value}, one line each), `settings` (YAML), `prior` (what the prior was trained on), `real_data`
            (provenance of the sites' scans), `terms` (terms of use), `prior_styles` (vendors whose style comes from no
            site).
    """
    cases, making = content.cases, making_of(facts)
    slices = _span({case.frames.shape[1] for case in cases})
    pixels = ", ".join(sorted({f"{case.frames.shape[2]} x {case.frames.shape[3]}" for case in cases}))
    in_plane = ", ".join(sorted({f"{case.spacing_mm[1]:g} x {case.spacing_mm[2]:g}" for case in cases}))
    apart = _span({round(float(case.spacing_mm[0]), 1) for case in cases})
    return f"""{front_matter(_card(content, facts))}
# Datasheet: synthetic cardiac MRI of "{facts["study"]}"

{making.opening(facts["privacy"].get("epsilon") is not None)}

## Motivation

Scans of patients cannot be given away. This set was made so that methods that measure the left ventricle can be
trained and tested on images in the style of several vendors' scanners, with the labels that belong to them.

## Composition

- {len(cases)} synthetic patients: {_styles(cases)}.
- Per patient: end-diastole and end-systole, short axis, {slices} slices {apart} mm apart, of {pixels} pixels of
  {in_plane} mm.
- Masks: 0 background, 1 right ventricle, 2 myocardium, 3 left-ventricular cavity. {making.masks()}
- Ejection fraction, from the masks, spread evenly on purpose: low and high values are more frequent than among
  patients.
- {making.independence()}
- No identity, age, sex or date: there is none.

{_by_vendor(content)}

{_agreement(content)}

{_files(content)}

## How it was made

{making.sentence()}
{facts["prior"]}
{facts["real_data"]}
Nothing was sorted out afterwards: every heart that was drawn is in the folder.

{chr(10).join(f"- {name}: {value}" for name, value in facts["made_with"].items())}
- settings, as `configs/default.yaml` explains them:

```yaml
{facts["settings"].strip()}
```

## Privacy

{_privacy(facts["privacy"])}

{_shapes(facts.get("populations", ()), facts["privacy"])} No image's file names a person, site or scanner.

## Uses

- Intended: training and testing of methods that measure the left ventricle, teaching, software tests.
- Not intended: diagnosis; evidence about patients, vendors or diseases; a replacement for a test on real scans; mixing
  into a clinical archive. Do not take away the marks that say that the images are synthetic.

## Distribution

{facts["terms"]}
The licence of the software that made it (Apache-2.0) does not extend to it. Pass it on whole, with this file.

## Maintenance

A folder is not changed once it is written: a new release replaces it whole, and `SHA256SUMS` tells releases apart. The
same versions, settings and generator make the same hearts again. Mistakes and questions: to whoever gave it to you.

## Limits

- Prevalences, ages and sexes are not modelled; of diseases, size, wall thickness, weak and partly scarred walls.
{_style(facts["prior_styles"])}
- Two phases of the cycle, short axis only; no flow, no late enhancement, no implants, few artefacts.
- The exports' position in the body is nominal, the same for all; `SliceThickness` is the distance of slices.
- A method that works on these images must be tested on real scans before anybody relies on it.
"""


def _card(content: Content, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the head of the datasheet tells the Hub; the licence is the section "Distribution"."""
    num_cases = len(content.cases)
    private = [] if facts["privacy"].get("epsilon") is None else ["differential-privacy"]
    return {
        "license": "other",
        "license_name": "see-distribution",
        "license_link": DATASHEET_NAME,
        "pretty_name": f"Synthetic cardiac MRI of {facts['study']}",
        "task_categories": ["image-segmentation"],
        "size_categories": [next(name for limit, name in SIZES if num_cases < limit)],
        "annotations_creators": ["machine-generated"],
        "tags": ["medical", "cardiac-mri", "synthetic", "ejection-fraction", *private],
        "configs": [{"config_name": "labels", "data_files": "labels.csv"}],
    }


def _shapes(populations: Sequence[str], privacy: Mapping[str, Any]) -> str:
    """Where the shapes of the hearts come from, and whether that has cost privacy."""
    if not populations:
        return "Shapes and labels are drawn from a public model and cost no privacy."
    cost = "without privacy" if privacy.get("epsilon") is None else "within the privacy stated here"
    return (
        "Hearts are drawn from a public model, so that their shapes have the mean and the spread that the sites of\n"
        f"{', '.join(populations)} released, {cost}. Their ejection fractions are spread evenly and say nothing about\n"
        "anybody."
    )


def _style(prior_styles: Sequence[str]) -> str:
    """Lines of the limitations: where a vendor's style comes from."""
    line = (
        "- A vendor's style is what the sites with that vendor's scanners contributed, not the vendor's range of "
        "products."
    )
    if not prior_styles:
        return line
    return f"{line}\n- No site gave the style of {', '.join(prior_styles)}: these images have the public prior's own."


def _styles(cases: Sequence[Case]) -> str:
    vendors = [case.info.vendor for case in cases]
    return ", ".join(f"{vendors.count(vendor)} in the style of {vendor}" for vendor in sorted(set(vendors)))


def _by_vendor(content: Content) -> str:
    """A table of the labels, and of the measurements on the images, by style."""
    rows = [
        "| style | patients | ejection fraction, mean (range) | image measured in, mean difference in points |",
        "|---|---|---|---|",
    ]
    vendors = np.array([case.info.vendor for case in content.cases])
    efs = np.array([case.info.ef for case in content.cases])
    differences = 100 * np.abs(np.array(content.requested_efs) - np.array(content.measured_efs))
    for vendor in sorted(set(vendors.tolist())):
        own, seen = efs[vendors == vendor], differences[vendors == vendor]
        seen = seen[np.isfinite(seen)]
        mean = f"{seen.mean():.1f}" if seen.size else "unknown"
        label = f"{own.mean():.2f} ({own.min():.2f} to {own.max():.2f})"
        rows.append(f"| {vendor} | {len(own)} | {label} | {seen.size}, {mean} |")
    return "\n".join(rows)


def _agreement(content: Content) -> str:
    """Conditioning fidelity: whether the images show the requested ejection fraction."""
    pairs = zip(content.requested_efs, content.measured_efs, strict=True)
    found = [(requested, seen) for requested, seen in pairs if math.isfinite(seen)]
    values = score([requested for requested, _ in found], [seen for _, seen in found], NUM_BOOTSTRAP, seed=0)
    r, mae = (_with_interval(values, name, digits) for name, digits in (("r", 3), ("mae_points", 1)))
    num_cases = len(content.cases)
    return "\n".join(
        [
            "Requested ejection fraction against the one that an independent segmenter measures on the image:",
            f"r = {r}, mean absolute difference {mae} EF points.",
            "The segmenter was trained on simulated hearts and never on a generated image. It found no left ventricle",
            f"in {num_cases - len(found)} of {num_cases} patients; their `ef_measured` is empty.",
        ]
    )


def _with_interval(values: Mapping[str, Any], name: str, digits: int) -> str:
    """A figure with its 95 % interval; "unknown" where it is undefined."""
    if values[name] is None:
        return "unknown"
    limits = values["ci95"][name]
    interval = f" (95 % {limits[0]:.{digits}f} to {limits[1]:.{digits}f})" if limits else ""
    return f"{values[name]:.{digits}f}{interval}"


def _files(content: Content) -> str:
    """A table of every kind of file in the folder."""
    exports = ((content.dicom, DICOM_FILES), (content.nifti, NIFTI_FILES), (content.nnunet, NNUNET_FILES))
    files = FILES | {name: text for there, own in exports if there for name, text in own.items()}
    return "\n".join(["| file | content |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in files.items())])


def _privacy(privacy: Mapping[str, Any]) -> str:
    """Epsilon spent, and what the guarantee covers."""
    if privacy.get("epsilon") is None:
        return (
            "**None.** The generator was trained without differential privacy. Do not give this folder to anybody who\n"
            "may not see the scans it was trained on."
        )
    sites, smaller = sorted(privacy["sites"].items()), privacy.get("epsilon_at_1e-5")
    spent = [(name, "-" if site["epsilon"] is None else f"{site['epsilon']:.2f}") for name, site in sites]
    return "\n".join(
        [
            "The sites' updates were differentially private. The guarantee covers whatever is made from the generator,",
            f"this folder included: at most **epsilon = {privacy['epsilon']:.2f} at delta = {privacy['delta']:g}**.",
            "",
            f"- Unit: {privacy['unit']}. A patient scanned at two sites spends both sites' epsilons, added up.",
            f"- Accountant: {privacy['accountant']}.",
            *([f"- At delta = 1e-5, which many papers compare at: epsilon = {smaller:.2f}."] if smaller else []),
            *_segmenter_rounds(privacy),
            "- Not covered: the choice of settings by somebody who saw the scans.",
            "",
            "| site | epsilon | delta |",
            "|---|---|---|",
            *(f"| {name} | {epsilon} | {privacy['delta']:g} |" for name, epsilon in spent),
        ]
    )


def _segmenter_rounds(privacy: Mapping[str, Any]) -> list[str]:
    """What of the epsilon is not this folder's."""
    rounds = privacy.get("segmenter_rounds")
    what = "one round" if rounds == 1 else f"{rounds} rounds"
    return [f"- The same epsilon covers {what} in which the sites tuned the public segmenter."] if rounds else []


def _span(values: Collection[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
