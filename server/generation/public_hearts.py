"""The public prior's training set: simulated hearts, and scans that anybody may ask for. Costs no privacy."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.rendering import render
from fedcmr.shared.case import MYO, NOT_DRAWN, RV, Case, load_cases
from fedcmr.shared.errors import UserError
from fedcmr.shared.progress import track_parts
from fedcmr.shared.provenance import PUBLIC, of_folder
from fedcmr.shared.style import MAX_STYLE, style_moments, style_vector, style_vectors
from fedcmr.shared.views import MAX_SHIFT_MM, NETWORK_GRID, Grid, augment, drawn_whole, slice_pairs, with_heart

STACK_SLICES = 8
SLICES_PER_HEART = 4
"""Slices kept of each simulated heart; they share one style vector, as a patient's do."""
HIDDEN_SHARE = 0.2
"""Share of pairs in which a network that knows unknown labels is told but a part of them."""


@dataclass(frozen=True)
class PublicHearts:
    """M slice pairs: those of simulated hearts, then those of scans.

    Attributes:
        images: Shape (M, 2, H, W), uint8, 0..255 for -1..1.
        masks: Shape (M, 2, H, W), uint8 labels 0..3, and 255 where nobody drew.
        styles: Shape (M, K), standardised.
        style_mean: Shape (K,), of the simulated hearts, whose range is wider than any scanner's.
        style_std: Shape (K,), likewise.
        style_correlation: Shape (K, K), likewise.
        pixel_mm: In-plane pixel.
        num_scanned: How many of the pairs, the last ones, are of scans.
    """

    images: Tensor
    masks: Tensor
    styles: Tensor
    style_mean: Tensor
    style_std: Tensor
    style_correlation: Tensor
    pixel_mm: float
    num_scanned: int = 0

    def chosen(self, index: Tensor | slice) -> Tensor:
        """Chosen images, shape (N, 2, H, W), float32 in [-1, 1]."""
        return self.images[index].float() / 127.5 - 1

    def draw(self, num: int, rng: torch.Generator, scan_share: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Random views of `num` random pairs: images, masks, style vectors.

        Args:
            num: How many.
            rng: Source of the draws.
            scan_share: Chance of a pair to be of a scan; without scans, and without simulated hearts, it plays no part.
        """
        num_simulated = len(self.images) - self.num_scanned
        index = torch.randint(num_simulated or self.num_scanned, (num,), generator=rng)
        if num_simulated and self.num_scanned:
            scanned = torch.rand(num, generator=rng) < scan_share
            of_scan = num_simulated + torch.randint(self.num_scanned, (num,), generator=rng)
            index = torch.where(scanned, of_scan, index)
        shift_px = MAX_SHIFT_MM / self.pixel_mm
        images, masks = augment(self.chosen(index), self.masks[index], rng, max_rotation_deg=60, max_shift_px=shift_px)
        return images, masks, self.styles[index]


def simulate_hearts(num_hearts: int, seed: int, grid: Grid = NETWORK_GRID) -> PublicHearts:
    """Draw, slice and render hearts over the whole range of ejection fractions."""
    images, masks, styles = [], [], []
    chunk = 50
    for part in track_parts(num_hearts, chunk, "simulating hearts"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + part.start)
        hearts = draw_hearts(part.stop - part.start, generator, STACK_SLICES)
        chosen = torch.rand(len(hearts), STACK_SLICES, generator=generator).argsort(1)[:, :SLICES_PER_HEART]
        d = distances(hearts, slice_positions(hearts, STACK_SLICES).gather(1, chosen.sort(1).values), grid)
        labels, rendered = masks_from(d), render(hearts, d, generator)
        styles.append(style_vectors(rendered, labels, grid.pixel_mm).repeat_interleave(SLICES_PER_HEART, dim=0))
        images.append(_as_bytes(rendered).flatten(0, 1))
        masks.append(labels.flatten(0, 1))
    raw = torch.cat(styles)
    mean, std, correlation = style_moments(raw)
    standardised = torch.nan_to_num((raw - mean) / std, nan=0.0)
    return PublicHearts(torch.cat(images), torch.cat(masks), standardised, mean, std, correlation, grid.pixel_mm)


@dataclass(frozen=True)
class PublicScans:
    """What public folders hold.

    Attributes:
        cases: Their cases with the heart in some slice.
        sets: Name of each public set -> its number of cases.
        terms: What may be done with what is made from them.
    """

    cases: Sequence[Case]
    sets: dict[str, int]
    terms: tuple[str, ...]


def read_scans(folders: Sequence[Path]) -> PublicScans:
    """The cases of prepared folders that are recorded as a public set's.

    Raises:
        UserError: A folder is none of cases, or its scans are not recorded as public: then they may be of patients
            whom nobody asked.
    """
    cases: list[Case] = []
    sets: Counter[str] = Counter()
    terms: dict[str, None] = {}
    for folder in folders:
        origin = of_folder(folder)
        if origin.kind != PUBLIC:
            raise UserError(
                f"{folder} is not recorded as a public data set, and a public prior may learn from nothing else: "
                "prepare it with the set's own --format, or with --public NAME"
            )
        of_set = [case for case in load_cases(folder) if case.info.contours != "auto" and case.masks.any()]
        if not of_set:
            raise UserError(f"{folder} holds no case with contours that people drew: nothing can be learnt there")
        cases += of_set
        sets[origin.source] += len(of_set)
        terms[origin.terms] = None
    return PublicScans(cases, dict(sets), tuple(terms))


def with_scans(hearts: PublicHearts, scans: Sequence[Case], grid: Grid, partly: bool) -> PublicHearts:
    """Simulated hearts with the slices of public scans that hold the heart behind them.

    Args:
        hearts: Simulated hearts, on whose scale the scans' styles are brought.
        scans: Cases.
        grid: The grid of the hearts.
        partly: Whether slices take part in which something was not drawn.

    Raises:
        UserError: No slice can be used.
    """
    images, masks, styles = [], [], []
    for case in scans:
        pairs, labels = slice_pairs(case, grid)
        keep = with_heart(labels)
        used = keep if partly else keep & drawn_whole(labels)
        if not used.any():
            continue
        raw = style_vector(pairs[keep], labels[keep], grid.pixel_mm)
        style = torch.nan_to_num((raw - hearts.style_mean) / hearts.style_std, nan=0.0).clamp(-MAX_STYLE, MAX_STYLE)
        images.append(_as_bytes(pairs[used]))
        masks.append(labels[used])
        styles.append(style.expand(int(used.sum()), -1))
    if not images:
        raise UserError(
            "none of the public scans has a slice that is drawn whole: set generator.unknown_labels to true"
        )
    num_scanned = sum(map(len, images))
    return replace(
        hearts,
        images=torch.cat([hearts.images, *images]),
        masks=torch.cat([hearts.masks, *masks]),
        styles=torch.cat([hearts.styles, *styles]),
        num_scanned=num_scanned,
    )


def hide_labels(masks: Tensor, rng: torch.Generator) -> Tensor:
    """Masks as half-labelled sets have them: in some pairs the right ventricle, or the muscle too, was not drawn.

    Where a structure is not drawn, what is not one of the others may be it: background becomes `NOT_DRAWN` as well.

    Args:
        masks: Shape (N, 2, H, W), uint8; left as it is.
        rng: Source of the draws.
    """
    draw = torch.rand(len(masks), 2, 1, 1, generator=rng)  # each frame on its own: sets draw muscle at ED alone
    pair = torch.rand(len(masks), 1, 1, 1, generator=rng) < HIDDEN_SHARE
    rest, muscle = (masks == RV) | (masks == 0), masks == MYO
    hidden = torch.where(pair & rest, NOT_DRAWN, masks.int())
    return torch.where(pair & (draw < 0.5) & muscle, NOT_DRAWN, hidden).to(torch.uint8)


def _as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8: a quarter of the memory."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
