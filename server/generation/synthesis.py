"""Synthetic patients: heart shapes over the whole range of ejection fractions, rendered by the shared generator."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedcmr.server.generation.guide_scans import GuideScans, bend, read_guides
from fedcmr.server.generation.heart_shapes import Hearts, distances, masks_from, slice_positions
from fedcmr.server.generation.intensity_matching import match_dark_shares, match_intensities, match_noise
from fedcmr.server.generation.population import draw_dark_shares, draw_population
from fedcmr.server.generation.rendering import render
from fedcmr.server.settings import SynthesisConfig
from fedcmr.shared import checkpoint
from fedcmr.shared.case import Case, CaseInfo
from fedcmr.shared.device import autocast, pick_device
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.base import Condition, GenerativeModel, Sampler
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.progress import track_parts
from fedcmr.shared.records import SHAPE_MEAN
from fedcmr.shared.shape import SHAPE_STD, ShapeDistribution
from fedcmr.shared.style import MEAN_KEY, STD_KEY, StyleDistribution, style_vectors
from fedcmr.shared.views import Grid

EF_RANGE = (0.08, 0.80)
"""Ejection fractions requested are spread evenly over this, for every vendor."""
_HEARTS_PER_CHUNK = 32


@dataclass(frozen=True)
class SharedGenerator:
    """What a federation adds to the public prior.

    Attributes:
        trainable: The fine-tuned parameters by name.
        styles: Vendor -> its distribution of style vectors.
        shapes: Vendor -> its population of hearts; empty where no site released its shapes.
    """

    trainable: Mapping[str, Tensor]
    styles: Mapping[str, StyleDistribution]
    shapes: Mapping[str, ShapeDistribution] = field(default_factory=dict)


@dataclass(frozen=True)
class SyntheticSet:
    """Synthetic cases and what was requested.

    Attributes:
        cases: Frames and masks on the generator's grid; `info.ef` is measured on the masks.
        requested_efs: Shape (len(cases),).
        styles: Shape (len(cases), K), the standardised style vectors requested.
    """

    cases: list[Case]
    requested_efs: list[float]
    styles: Tensor


def load_shared_generator(path: Path, prior: Prior) -> SharedGenerator:
    """Read `generator.safetensors`.

    Raises:
        UserError: It cannot be read or belongs to another prior.
    """
    arrays, metadata = checkpoint.load(path)
    if metadata.get("prior_sha256") != prior.sha256:
        raise UserError(f"{path} was trained on another prior: give that one as 'prior'")
    names = ("trainable", MEAN_KEY, STD_KEY, SHAPE_MEAN, SHAPE_STD)
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = torch.from_numpy(array)
    styles = {
        vendor: StyleDistribution(mean, groups[STD_KEY][vendor], prior.style_correlation)
        for vendor, mean in groups[MEAN_KEY].items()
    }
    shapes = {vendor: ShapeDistribution(mean, groups[SHAPE_STD][vendor]) for vendor, mean in groups[SHAPE_MEAN].items()}
    return SharedGenerator(groups["trainable"], styles, shapes)


def synthesize(
    prior: Prior,
    shared: SharedGenerator | None,
    config: SynthesisConfig,
    vendors: Sequence[str],
    seed: int,
    device_name: str = "auto",
    description: str = "generating hearts",
) -> SyntheticSet:
    """Sample labelled cases, the same hearts for the same seed whatever the generator.

    Args:
        prior: The public prior; left as it was.
        shared: What the federation added; None samples the public prior only, with its own wide range of styles.
        config: How many cases, slices and steps, and the vendors' shares.
        vendors: The study's vendors, in equal shares where `config.vendor_shares` is empty.
        seed: Seed of shapes, style vectors and noise.
        device_name: See `fedcmr.shared.device`.
        description: Text next to the progress bar.

    Raises:
        UserError: A vendor is requested that the study has not learnt.
    """
    names = vendor_names(config, vendors)
    unknown = sorted(set(names) - set(shared.styles)) if shared else []
    if unknown:
        raise UserError(
            f"synthesis.vendor_shares asks for {unknown[0]}, which the study has not learnt: "
            f"expected some of {sorted(shared.styles if shared else ())}"
        )
    rng = torch.Generator().manual_seed(seed)
    requested = _spread_efs(names, rng)
    return _make(prior, shared, config, names, requested, seed, rng, device_name, description)


def synthesize_requested(
    prior: Prior,
    shared: SharedGenerator | None,
    config: SynthesisConfig,
    names: Sequence[str],
    requested_efs: Sequence[float],
    seed: int,
    device_name: str = "auto",
) -> list[Case]:
    """Sample one case per vendor and ejection fraction requested, without a progress bar.

    Args:
        prior: The public prior; left as it was.
        shared: What the federation added; None samples the public prior only, see `synthesize`.
        config: Slices and steps.
        names: Shape (N,), vendors that the study has learnt; any text for the public prior only.
        requested_efs: Shape (N,), in `EF_RANGE`; the masks' own, `info.ef`, differ a little by their pixels.
        seed: Seed of shapes, style vectors and noise. A case depends on all of (names, requested_efs, seed).
        device_name: See `fedcmr.shared.device`.
    """
    rng = torch.Generator().manual_seed(seed)
    return _make(prior, shared, config, names, torch.tensor(requested_efs), seed, rng, device_name, None).cases


def _make(
    prior: Prior,
    shared: SharedGenerator | None,
    config: SynthesisConfig,
    names: Sequence[str],
    requested: Tensor,
    seed: int,
    rng: torch.Generator,
    device_name: str,
    description: str | None,
) -> SyntheticSet:
    """A case for each name and ejection fraction; None as `description` shows no progress."""
    device = pick_device(device_name)
    # All at once: the bisection of the contractions is many small steps, whatever the number of hearts.
    populations = shared.shapes if shared else {}
    hearts = draw_population(populations, names, config.num_slices, requested, rng, description is not None)
    guides = read_guides(config.guides)
    # A scan has trabeculae of its own.
    dark = None if guides else draw_dark_shares(populations, names, requested, rng)
    wanted = _draw_styles(shared, names, seed)
    cases: list[Case] = []
    styles: list[Tensor] = []
    generator = prior.generator.to(device)
    with ExitStack() as stack:
        if shared:
            try:
                stack.enter_context(generator.holding(shared.trainable))
            except ValueError:
                raise UserError(
                    "generator.safetensors does not fit the prior's trainable part: run the federation again"
                ) from None
        for part in track_parts(len(names), _HEARTS_PER_CHUNK, description):
            start = part.start
            own_styles = None if wanted is None else wanted[part]
            guide, condition, groups = _guides(prior, hearts[part], requested[part], own_styles, config, guides, rng)
            images = _generate(generator, guide, condition, config, rng, device)
            masks, raw, pixel_mm = condition.masks, prior.raw(condition.style), prior.grid.pixel_mm
            if dark is not None:
                images = match_dark_shares(images, masks, dark[part], rng, pixel_mm)
            images = match_noise(match_intensities(images, masks, raw, pixel_mm), masks, raw, rng, pixel_mm)
            styles.append(condition.style)
            cases += [
                _case(
                    f"syn-{start + i:05d}",
                    names[start + i],
                    images[i],
                    masks[i],
                    hearts[start + i : start + i + 1],
                    prior.grid,
                    groups[i] if groups else None,
                )
                for i in range(part.stop - start)
            ]
    return SyntheticSet(cases, requested.tolist(), torch.cat(styles))


def vendor_names(config: SynthesisConfig, vendors: Sequence[str]) -> list[str]:
    """The vendor of each case, interleaved, in the shares requested (largest remainder)."""
    shares = {name: share for name, share in config.vendor_shares.items() if share > 0}
    shares = shares or dict.fromkeys(sorted(set(vendors)), 1.0)
    total = sum(shares.values())
    exact = {name: config.num_cases * share / total for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: config.num_cases - sum(counts.values())]:
        counts[name] += 1
    places = [((k + 0.5) / counts[name], name) for name in counts for k in range(counts[name])]
    return [name for _, name in sorted(places)]


def _spread_efs(names: Sequence[str], rng: torch.Generator) -> Tensor:
    """Evenly spread ejection fractions for every vendor, in random order; shape (len(names),)."""
    low, high = EF_RANGE
    efs = torch.zeros(len(names))
    for vendor in sorted(set(names)):
        index = torch.tensor([i for i, name in enumerate(names) if name == vendor])
        even = low + (high - low) * (torch.arange(len(index)) + 0.5) / len(index)
        efs[index] = even[torch.randperm(len(index), generator=rng)]
    return efs


def _draw_styles(shared: SharedGenerator | None, names: Sequence[str], seed: int) -> Tensor | None:
    """A style vector from each case's vendor, shape (N, K); None for the public prior only: each guide has its own.

    Random numbers of their own: the hearts stay the same whether there are styles to draw or not.
    """
    if shared is None:
        return None
    rng = torch.Generator().manual_seed(seed + 1)
    return torch.stack([shared.styles[name].sample(1, rng)[0] for name in names])


def _guides(
    prior: Prior,
    hearts: Hearts,
    efs: Tensor,
    styles: Tensor | None,
    config: SynthesisConfig,
    guides: GuideScans | None,
    rng: torch.Generator,
) -> tuple[Tensor, Condition, list[str] | None]:
    """Images (N, S, 2, H, W) of the hearts in the intensities of their styles: public scans, or rough drawings.

    With them the condition of the hearts: masks (N, S, 2, H, W), and one style vector for all slices, (N, K); and of
    scans the name of each heart's one, None of drawings.
    """
    groups = None
    if guides:
        bent = bend(guides, hearts, efs, config.num_slices, prior.grid, rng)
        guide, masks = bent.images, bent.masks
        groups = [f"scan-{number:04d}" for number in bent.numbers]
    else:
        d = distances(hearts, slice_positions(hearts, config.num_slices), prior.grid)
        masks, guide = masks_from(d), render(hearts, d, rng)
    pixel_mm = prior.grid.pixel_mm
    if styles is None:
        return guide, Condition(masks, prior.standardise(style_vectors(guide, masks, pixel_mm))), groups
    return match_intensities(guide, masks, prior.raw(styles), pixel_mm), Condition(masks, styles), groups


def _generate(
    generator: GenerativeModel,
    guide: Tensor,
    condition: Condition,
    config: SynthesisConfig,
    rng: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Images (N, S, 2, H, W) in [-1, 1], each heart in its own style; the guides themselves where there is no step."""
    if config.num_steps == 0:
        return guide
    sampler = Sampler(config.num_steps, config.t_start)
    flat = Condition(condition.masks.flatten(0, 1), condition.style.repeat_interleave(config.num_slices, dim=0))
    images = []
    for part in torch.arange(len(flat)).split(config.batch_size):
        with autocast(device):
            rough = guide.flatten(0, 1)[part].to(device)
            images.append(generator.sample(flat[part].to(device), sampler, rng, rough).cpu())
    return torch.cat(images).reshape(guide.shape)


def _case(
    pseudonym: str, vendor: str, images: Tensor, masks: Tensor, heart: Hearts, grid: Grid, group: str | None
) -> Case:
    """One heart's (S, 2, H, W) images as a case; the heart is its own group where none is given."""
    num_slices = images.shape[0]
    frames = ((images + 1) / 2).clamp(0, 1).transpose(0, 1).numpy().astype(np.float32)
    labels = masks.transpose(0, 1).numpy()
    spacing_z = float(heart.stack_end - heart.stack_start) / num_slices
    info = CaseInfo(pseudonym, vendor, float("nan"), ejection_fraction(labels), group or pseudonym, contours="drawn")
    spacing_mm = np.array([spacing_z, grid.pixel_mm, grid.pixel_mm], np.float32)
    return Case(info, np.ascontiguousarray(frames), np.ascontiguousarray(labels), spacing_mm)
