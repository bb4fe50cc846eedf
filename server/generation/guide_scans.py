"""Public scans as guides: a real scan of somebody who agreed, bent into the heart that was asked for.

A drawn guide knows how a heart lies in its slices and little of how it looks. A scan has trabeculae, papillary muscles,
fat, vessels and the body around them, as they are. Each heart asked for takes one of the public scans that are most
like it; every slice and phase is bent until cavity, muscle and right ventricle lie where they should, and the drawn
labels are bent alike. So the labels are true of the pixels whether or not the borders came to lie exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from fedcmr.server.generation.deformation import MAX_MM, fit
from fedcmr.server.generation.heart_shapes import Distances, Hearts, distances, masks_from, slice_positions
from fedcmr.server.generation.public_hearts import read_scans
from fedcmr.shared.case import ED, ES, INDEX_NAME, LV, MYO, NOT_DRAWN, RV, Case, fingerprint
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.views import Grid, slice_pairs

SCAN_GRID = Grid(128, 1.25)
"""Scans are kept on it: the field of a prepared case."""
BORDER_GRID, FIT_GRID = Grid(64, 2.5), Grid(40, 4.0)
"""Signed distances of the scans are kept on the first and compared on the second, of the same field."""
STRUCTURES = ((LV,), (LV, MYO), (RV,))
"""Whose borders are laid on each other."""
WEIGHTS = (1.0, 1.0, 0.15)
"""How much each counts: a right ventricle bent into a drawn one loses its corners, and no label depends on it."""
NUM_LIKE = 8
"""A heart's guide is drawn from so many scans that are most like it."""
SCALES = (0.2, 0.35, 0.3)
"""Ejection fraction, logarithms of the cavity's area and of the heart's area over it: differences that count alike."""
MAX_MISS = 0.05
"""The others of them are tried where the ejection fraction comes out further off; the nearest one counts."""
CLOSE_EF, NUM_CORRECTIONS, MAX_STEP_MM = 0.015, 2, 4.0
"""The border at ES is moved at most so often, and so far at a time, until the ejection fraction is that close."""
MAX_ZOOM = 1.3
WRONG_LV, WRONG_RV = 2.0, 1.0
"""So many slices further away a slice may lie to have the same ventricles as the one asked for."""


@dataclass(frozen=True)
class GuideScan:
    """A public scan with whole labels, its slices from base to apex.

    Attributes:
        images: Shape (Z, 2, 128, 128), float32 in [-1, 1].
        masks: The same shape, labels 0..3.
        borders_mm: Shape (Z, 2, 3, 64, 64), signed distances to the borders of `STRUCTURES`, negative inside.
        has: Shape (Z, 2, 2), bool: whether a slice and phase shows the left and the right ventricle.
        first: The first slice with a cavity at ED.
        last: The last one.
        centre_mm: Shape (2,), x and y of the cavity at ED.
        rv_angle: Direction from there to the right ventricle, radians.
        heart_mm2: Area within the outer wall at ED, mean of the middle slices.
        likeness: Shape (3,), what hearts are compared by; see `SCALES`.
    """

    images: Tensor
    masks: Tensor
    borders_mm: Tensor
    has: Tensor
    first: int
    last: int
    centre_mm: Tensor
    rv_angle: float
    heart_mm2: float
    likeness: Tensor


@dataclass(frozen=True)
class GuideScans:
    """All scans of some public folders that can guide.

    Attributes:
        scans: At least one.
        sets: Name of each public set -> its number of scans.
        terms: What may be done with what is made from them.
        patients: Fingerprints of the scans' patients, who are neither private nor a test of a study they guide.
    """

    scans: tuple[GuideScan, ...]
    sets: dict[str, int]
    terms: tuple[str, ...]
    patients: frozenset[str]


def read_guides(folders: Sequence[str | Path]) -> GuideScans | None:
    """The guides of prepared folders, read once per process; None where there is no folder.

    Raises:
        UserError: A folder is none of cases or not recorded as a public set's, or none of its scans is drawn whole.
    """
    if not folders:
        return None
    indices = [Path(folder) / INDEX_NAME for folder in folders]
    return _guides_of(tuple((str(path.parent), _modified_ns(path)) for path in indices))


@dataclass(frozen=True)
class BentScans:
    """Hearts that were made from scans.

    Attributes:
        images: Shape (N, S, 2, H, W), float32 in [-1, 1].
        masks: The same shape, labels 0..3.
        numbers: Shape (N,), the scan of each.
    """

    images: Tensor
    masks: Tensor
    numbers: list[int]


def bend(
    guides: GuideScans, hearts: Hearts, efs: Tensor, num_slices: int, grid: Grid, rng: torch.Generator
) -> BentScans:
    """The hearts, each made from one scan.

    A heart takes over the scan's place and orientation in the image, so that the body around it stays upright.

    Args:
        guides: The scans.
        hearts: N hearts.
        efs: Shape (N,), their ejection fractions.
        num_slices: S, evenly spaced from base to apex.
        grid: Of the images.
        rng: Chooses among the scans that are most like a heart.
    """
    positions = slice_positions(hearts, num_slices)
    sizes = [_measure(labels, FIT_GRID.pixel_mm) for labels in masks_from(distances(hearts, positions, FIT_GRID))]
    likeness = torch.stack([scan.likeness for scan in guides.scans])
    like = torch.cdist(torch.stack([size.likeness for size in sizes]), likeness).argsort(dim=1)[:, :NUM_LIKE]
    order = torch.rand(like.shape, generator=rng).argsort(dim=1)
    made, numbers = [], []
    for row, (size, tried) in enumerate(zip(sizes, like.gather(1, order).tolist(), strict=True)):
        best: tuple[float, int, Tensor, Tensor] | None = None
        for number in tried:
            heart = slice(row, row + 1)
            bent = _bend_one(guides.scans[number], hearts[heart], positions[heart], size, float(efs[row]), grid)
            if best is None or bent[0] < best[0]:
                best = (bent[0], number, *bent[1:])
            if bent[0] <= MAX_MISS:
                break
        assert best is not None, "at least one was tried"
        made.append(best[2:])
        numbers.append(best[1])
    images, masks = (torch.stack(parts) for parts in zip(*made, strict=True))
    return BentScans(images, masks, numbers)


@dataclass(frozen=True)
class _Size:
    """What `_measure` found: slices with a cavity at ED, and two fields of `GuideScan`."""

    first: int
    last: int
    heart_mm2: float
    likeness: Tensor


@lru_cache(maxsize=1)
def _guides_of(folders: tuple[tuple[str, int], ...]) -> GuideScans:
    public = read_scans([Path(folder) for folder, _ in folders])
    used = [(case, scan) for case in public.cases if (scan := _guide_of(case)) is not None]
    if not used:
        raise UserError(
            f"synthesis.guides: none of the {len(public.cases)} scans has both ventricles and the muscle drawn in both "
            "phases, and only such a scan can be a guide: name folders of other public scans"
        )
    return GuideScans(
        tuple(scan for _, scan in used), public.sets, public.terms, frozenset(fingerprint(case) for case, _ in used)
    )


def _modified_ns(path: Path) -> int:
    """When a file was written; 0 where there is none, which its reader then tells."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def _guide_of(case: Case) -> GuideScan | None:
    """A case as a guide, with its base first; None where it is not drawn whole."""
    images, masks = slice_pairs(case, SCAN_GRID)
    shown = [[bool((masks[:, phase] == label).any()) for label in (LV, MYO, RV)] for phase in (ED, ES)]
    if bool((masks == NOT_DRAWN).any()) or not all(map(all, shown)):
        return None
    size = _measure(masks, SCAN_GRID.pixel_mm)
    axis = (torch.arange(SCAN_GRID.size_px) - (SCAN_GRID.size_px - 1) / 2) * SCAN_GRID.pixel_mm

    def centre(label: int) -> Tensor:
        inside = (masks[:, ED] == label).double()
        return torch.stack([(inside.sum((0, 1)) * axis).sum(), (inside.sum((0, 2)) * axis).sum()]).div(inside.sum())

    middle = centre(LV)
    x, y = (centre(RV) - middle).tolist()
    has = torch.stack([(masks == label).flatten(2).any(2) for label in (LV, RV)], dim=-1)
    return GuideScan(
        images=images,
        masks=masks,
        borders_mm=_borders_of_masks(masks),
        has=has,
        first=size.first,
        last=size.last,
        centre_mm=middle.float(),
        rv_angle=math.atan2(y, x),
        heart_mm2=size.heart_mm2,
        likeness=size.likeness,
    )


def _measure(masks: Tensor, pixel_mm: float) -> _Size:
    """Size and ejection fraction of one stack of masks (Z, 2, H, W)."""
    cavity = (masks[:, ED] == LV).sum(dim=(1, 2)).double() * pixel_mm**2
    heart = cavity + (masks[:, ED] == MYO).sum(dim=(1, 2)) * pixel_mm**2
    rows = torch.nonzero(cavity).squeeze(1)
    first, last = int(rows[0]), int(rows[-1])
    quarter = (last - first) // 4
    middle = slice(first + quarter, last - quarter + 1)
    of_cavity, of_heart = float(cavity[middle].mean()), float(heart[middle].mean())
    values = (ejection_fraction(masks.transpose(0, 1).numpy()), math.log(of_cavity), math.log(of_heart / of_cavity))
    return _Size(first, last, of_heart, torch.tensor(values) / torch.tensor(SCALES))


def _borders_of_masks(masks: Tensor) -> Tensor:
    """Signed distances in mm of (Z, 2, H, W) masks on `SCAN_GRID`, shape (Z, 2, 3, 64, 64)."""
    found = torch.stack([torch.isin(masks, torch.tensor(labels)) for labels in STRUCTURES], dim=2)
    far = np.full(found.shape[3:], MAX_MM)

    def signed(inside: np.ndarray) -> np.ndarray:
        return distance_transform_edt(~inside) - distance_transform_edt(inside) if inside.any() else far

    flat = [np.clip(signed(part) * SCAN_GRID.pixel_mm, -MAX_MM, MAX_MM) for part in found.flatten(0, 2).numpy()]
    whole = torch.from_numpy(np.stack(flat)).float().reshape(found.shape)
    return F.avg_pool2d(whole.flatten(0, 2)[:, None], 2).reshape(*found.shape[:3], *(BORDER_GRID.size_px,) * 2)


def _borders_of(d: Distances) -> Tensor:
    """Signed distances of hearts as the masks have them, shape (N, S, 2, 3, H, W)."""
    borders = torch.stack([d.endo, d.epi, torch.maximum(d.rv, -d.epi)], dim=3)
    above = (d.atrium < 1e3).any(dim=(-1, -2))  # there is no ventricle above the mitral plane
    return torch.where(above[:, :, :, None, None, None], MAX_MM, borders)


def _posed(heart: Hearts, scan: GuideScan) -> Hearts:
    """One heart where the scan's heart lies, turned as that is."""
    return replace(
        heart,
        rv_angle=torch.tensor([scan.rv_angle]),
        scar_angle=heart.scar_angle + scan.rv_angle - heart.rv_angle,
        centre=scan.centre_mm[None],
    )


def _bend_one(
    scan: GuideScan, heart: Hearts, positions: Tensor, size: _Size, ef: float, grid: Grid
) -> tuple[float, Tensor, Tensor]:
    """One heart from a scan: how far its ejection fraction is off, images and masks, both of shape (S, 2, H, W).

    Slices differ in what they show, and a deformation is stiff, so the cavity at ES comes out a little too large or too
    small over the stack: its border is moved by what that makes on average, and laid there again.
    """
    d = distances(_posed(heart, scan), positions, FIT_GRID)
    asked, wanted = masks_from(d)[0], _borders_of(d)[0]
    index = torch.tensor(_slices_for(scan, asked))
    zoom = min(max(math.sqrt(size.heart_mm2 / scan.heart_mm2), 1 / MAX_ZOOM), MAX_ZOOM)
    diastole = _bend_phase(scan, index, ED, wanted[:, ED], zoom, grid)
    volume = float((diastole[1] == LV).sum())
    at_systole, best = wanted[:, ES].clone(), None
    for _ in range(NUM_CORRECTIONS + 1):
        systole = _bend_phase(scan, index, ES, at_systole, zoom, grid)
        areas = (systole[1] == LV).flatten(1).sum(1).double()
        missed = float(areas.sum()) - (1 - ef) * volume
        if best is None or abs(missed) < best[0]:
            best = (abs(missed), *systole)
        if abs(missed) <= CLOSE_EF * volume:
            break
        around = max(float((2 * math.pi**0.5 * areas.sqrt()).sum()), 1.0)  # of circles of these areas, in pixels
        step = min(max(missed / around * grid.pixel_mm, -MAX_STEP_MM), MAX_STEP_MM)
        at_systole[:, 0] = torch.where(at_systole[:, 0] < MAX_MM, at_systole[:, 0] + step, MAX_MM)
    assert best is not None, "it was bent at least once"
    images, masks = (torch.stack(pair, dim=1) for pair in zip(diastole, best[1:], strict=True))
    return best[0] / max(volume, 1.0), images, masks


def _bend_phase(
    scan: GuideScan, index: Tensor, phase: int, wanted: Tensor, zoom: float, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Images and masks of one phase, shape (S, H, W).

    Args:
        scan: The scan.
        index: Shape (S,), the scan's slice for each of the heart's.
        phase: ED or ES.
        wanted: The heart's signed distances on `FIT_GRID`, shape (S, 3, h, w).
        zoom: How much larger the heart is.
        grid: Of the images.
    """
    at = scan.centre_mm.expand(len(index), 2)
    zooms = torch.full((len(index),), zoom)
    borders = scan.borders_mm[index, phase]
    deformation = fit(borders, BORDER_GRID, wanted, FIT_GRID, at, at, zooms, torch.tensor(WEIGHTS))
    shares = F.one_hot(scan.masks[index, phase].long(), LV + 1).movedim(-1, 1).float()
    images = deformation.bent(scan.images[index, phase][:, None], SCAN_GRID, grid, "bicubic", "reflection")
    labels = deformation.bent(shares, SCAN_GRID, grid, "bilinear", "border").argmax(dim=1)
    return images[:, 0].clamp(-1, 1), labels.to(torch.uint8)


def _slices_for(scan: GuideScan, asked: Tensor) -> list[int]:
    """For each slice of a heart the scan's slice at the same share of the cavity's length that shows the same.

    Args:
        scan: The scan.
        asked: Masks of the heart, shape (S, 2, h, w).
    """
    has = torch.stack([(asked == label).flatten(2).any(2) for label in (LV, RV)], dim=-1)
    rows = torch.nonzero(has[:, ED, 0]).squeeze(1)
    first, last = int(rows[0]), int(rows[-1])
    share = (torch.arange(len(asked)) - first) / max(last - first, 1)
    place = scan.first + share * (scan.last - scan.first)
    away = (torch.arange(len(scan.images))[None] - place[:, None]).abs()
    wrong = (scan.has[None] != has[:, None]).double().sum(dim=2)  # of the two phases
    cost = away + wrong @ torch.tensor([WRONG_LV, WRONG_RV], dtype=torch.float64)
    return cost.argmin(dim=1).tolist()
