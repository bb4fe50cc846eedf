"""Saliency of the ResNet50: maps of what its ejection fraction rests on, and the share of them inside the heart.

Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) weighs a layer's channels with the mean of their
gradients over the image and keeps what speaks for a class. Neither step is fit for this network:

- The mean is right where nothing but pooling follows, and there the map has 2 x 2 places. At a finer layer gradients
  differ from place to place: HiResCAM (Draelos & Carin 2020, https://arxiv.org/abs/2011.08891) multiplies gradient and
  activation where they are.
- An ejection fraction has no class: what lowers it matters as much as what raises it. So both signs count.

Which map is right can be measured without a gradient, by occlusion: cover one place of the image after the other and
watch the prediction (`python -m fedcmr.simulations.benchmarks.saliency`). Rank correlation of the maps with the
effect of occlusion, a ResNet50 of the default study on 20 development patients:

    layer, its grid    Grad-CAM    HiResCAM, positive    HiResCAM, both signs
    layer1, 16 x 16        0.18                  0.66                    0.78
    layer2, 8 x 8          0.35                  0.54                    0.70
    layer3, 4 x 4          0.22                  0.32                    0.48
    layer4, 2 x 2          0.05                  0.05                    0.07

0.86 of the map that is used lies in the heart, 0.89 of the effect of occlusion, and 0.36 of the image. Three untrained
networks have 0.45 to 0.46 there, because hearts are brighter than their surroundings. This value, rather than the area,
is the reference of a network without any preference.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.visualize import GradCAM
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from fedcmr.server.evaluation.disclosure import joined
from fedcmr.server.evaluation.score import mean_interval
from fedcmr.server.evaluation.tables import vendor_groups
from fedcmr.server.run_folder import REGRESSOR_NAME, RunFolder
from fedcmr.shared.case import NOT_DRAWN, Case
from fedcmr.shared.device import autocast, pick_device
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.ejection_fraction.centring import centred_with_masks
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, load_regressor
from fedcmr.shared.tasks.ejection_fraction.stack import middle_slices
from fedcmr.shared.tasks.ejection_fraction.sums import MIN_GROUP
from fedcmr.shared.views import slice_pairs

TARGET_LAYER = "layer1"
EF_COLUMN = 0
"""The column of the network's outputs that is the logit of the ejection fraction."""
MAX_CASES = 20
"""Cases per vendor of the synthetic set and of each test set: enough for an interval, few enough for a report."""
SMOOTHING_PX = 4.0
"""Standard deviation of the blur over a map. Shortcuts of stride 2 read every other position only, so a map is a
lattice of dots; but a feature stands for a patch of the image, at most 35 px wide at this layer."""
BATCH = 64
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Attribution:
    """What a network's prediction for one patient rests on.

    Attributes:
        vendor: Manufacturer of the scanner, or of the style.
        ef: The patient's ejection fraction; NaN where unknown.
        share_in_heart: Share of the maps inside the heart (both ventricles and the muscle, at ED or ES), over all
            slices that the network sees; NaN where there is no mask.
        area_share: Share of the images that this heart covers: what a map without preference would have.
        image: Shape (2, H, W) in [0, 1], the middle one of these slices, as the network sees it.
        saliency: Shape (H, W), its map, non-negative.
        masks: Shape (2, H, W), its labels.
    """

    vendor: str
    ef: float
    share_in_heart: float
    area_share: float
    image: NDArray[np.float32]
    saliency: NDArray[np.float32]
    masks: NDArray[np.uint8]


class HiResCAM(GradCAM):
    """MONAI's Grad-CAM without the mean over the gradients, and with both signs."""

    def compute_map(
        self, x: Tensor, class_idx: int | None = None, retain_graph: bool = False, layer_idx: int = -1, **kwargs: Any
    ) -> Tensor:
        """Sum over channels of gradient times activation, place by place; shape (N, 1, h, w)."""
        _, activations, gradients = self.nn_module(x, class_idx=class_idx, retain_graph=retain_graph, **kwargs)
        product = gradients[layer_idx].float() * activations[layer_idx].float()
        return self.rectify(product.sum(1, keepdim=True))

    def rectify(self, maps: Tensor) -> Tensor:
        """Which of a map's signs count, as values that are not negative."""
        return maps.abs()


def saliency_maps(
    model: Regressor,
    images: Tensor,
    device: str | torch.device = "cpu",
    layer: str = TARGET_LAYER,
    method: type[GradCAM] = HiResCAM,
) -> Tensor:
    """Where the logit of each pair's ejection fraction comes from.

    Args:
        model: Left as it is, without hooks or gradients.
        images: Shape (N, 2, H, W) in [-1, 1], centred.
        device: Where to compute.
        layer: Layer whose activations are mapped.
        method: MONAI's or the one above.

    Returns:
        Shape (N, H, W), non-negative; of no unit but alike for all pairs.
    """
    network = copy.deepcopy(model.network).requires_grad_(False).to(device)
    cam = method(network, layer, postprocessing=_smooth)
    maps = []
    with torch.enable_grad(), autocast(torch.device(device)):
        for batch in images.split(BATCH):
            # Gradients of the images, not of the weights: that is faster, and MONAI's hooks need one below the layer.
            pairs = batch.to(device).contiguous(memory_format=torch.channels_last).requires_grad_(True)
            maps.append(cam(pairs, class_idx=EF_COLUMN)[:, 0])
    return torch.cat(maps)


def saliency_share(maps: Tensor, masks: Tensor) -> tuple[float, float]:
    """The share of one patient's maps that lies inside the heart, and the share of the images that the heart covers.

    Args:
        maps: Shape (Z, H, W), non-negative.
        masks: Shape (Z, 2, H, W), uint8 labels 0..3 and 255 (`NOT_DRAWN`).

    Returns:
        Both in [0, 1]; NaN where no slice has a mask, or the heart is not drawn whole, the former also where the maps
        are zero.
    """
    heart = (masks > 0).any(dim=1)
    if not heart.any() or (masks == NOT_DRAWN).any():
        return float("nan"), float("nan")
    return float((maps * heart).sum().double() / maps.sum().double()), float(heart.double().mean())


def centred_slices(cases: Sequence[Case]) -> tuple[list[Tensor], list[Tensor]]:
    """The images that `predict` sees, (Z, 2, H, W) in [-1, 1] for each case, and the masks that belong to them."""
    stacks, masks = [], []
    for case in cases:
        images, labels = slice_pairs(case)
        middle = middle_slices(len(images))
        stacks.append(images[middle])
        masks.append(labels[middle])
    return centred_with_masks(stacks, masks)


def attribute(model: Regressor, cases: Sequence[Case], device: str | torch.device = "cpu") -> list[Attribution]:
    """One `Attribution` per case, on the slices and the images that `predict` sees."""
    if not cases:
        return []
    stacks, masks = centred_slices(cases)
    maps = saliency_maps(model, torch.cat(stacks), device).split([len(stack) for stack in stacks])
    attributions = []
    for case, images, heat, heart in zip(cases, stacks, maps, masks, strict=True):
        shown = len(images) // 2
        attributions.append(
            Attribution(
                case.info.vendor,
                case.info.ef,
                *saliency_share(heat, heart),
                ((images[shown] + 1) / 2).numpy(),
                heat[shown].numpy(),
                heart[shown].numpy(),
            )
        )
    return attributions


def study_attributions(
    run: RunFolder, synthetic: Sequence[Case], test_sets: Sequence[tuple[str, Sequence[Case]]]
) -> dict[str, list[Attribution]]:
    """What the predictions of a run's main model rest on.

    Returns:
        {"synthetic" or test set: at most `MAX_CASES` cases of each vendor}. Empty where the run's regressor is
        missing or of another version; sets without any mask are left out.
    """
    try:
        model = load_regressor(run.path / REGRESSOR_NAME)
    except UserError:
        return {}
    device = pick_device(run.config.device)
    sets = {name: _some_of_each_vendor(cases) for name, cases in ((SYNTHETIC, synthetic), *test_sets)}
    return {name: attribute(model, cases, device) for name, cases in sets.items() if cases}


def score_attributions(
    attributions: Mapping[str, Sequence[Attribution]], num_bootstrap: int, seed: int
) -> dict[str, dict[str, Any]]:
    """The report's `saliency`: means over the patients of each vendor, then of "all".

    Returns:
        {set: {vendor or "all": n_patients, share_in_heart, area_share, and ci95 of share_in_heart}}; None where
        there is no such figure. Intervals are over resampled patients.
    """
    scores: dict[str, dict[str, Any]] = {}
    for name, patients in attributions.items():
        shares = np.array([(patient.share_in_heart, patient.area_share) for patient in patients])
        known = np.isfinite(shares).all(axis=1)
        vendors = np.array([patient.vendor for patient in patients], dtype=object)
        if name != SYNTHETIC:  # small groups of test patients are joined, and too few are none
            known &= known.sum() >= MIN_GROUP
            vendors[known] = joined(vendors[known].tolist())
        groups = vendor_groups(vendors.tolist())
        scores[name] = {
            vendor: _mean_shares(shares[chosen & known], num_bootstrap, seed) for vendor, chosen in groups.items()
        }
    return scores


def _smooth(maps: Tensor) -> Tensor:
    """Maps (N, 1, H, W) without their lattice; mirrored at the border, so that nothing is lost there."""
    sigma = (0, 0, SMOOTHING_PX, SMOOTHING_PX)
    return torch.from_numpy(gaussian_filter(maps.detach().float().cpu().numpy(), sigma, mode="reflect"))


def _mean_shares(shares: NDArray[np.float64], num_bootstrap: int, seed: int) -> dict[str, Any]:
    """One vendor's figures from the shares of its patients, shape (N, 2)."""
    if not len(shares):
        return {"n_patients": 0, "share_in_heart": None, "area_share": None, "ci95": None}
    in_heart, area = (float(value) for value in shares.mean(axis=0))
    interval = mean_interval(shares[:, 0], num_bootstrap, seed)
    return {"n_patients": len(shares), "share_in_heart": in_heart, "area_share": area, "ci95": interval}


def _some_of_each_vendor(cases: Iterable[Case]) -> list[Case]:
    """The first `MAX_CASES` of each vendor whose masks are whole; pseudonyms, and so the order, are random."""
    chosen: dict[str, list[Case]] = {}
    for case in cases:
        same = chosen.setdefault(case.info.vendor, [])
        if len(same) < MAX_CASES and case.masks.any() and not (case.masks == NOT_DRAWN).any():
            same.append(case)
    return [case for vendor in sorted(chosen) for case in chosen[vendor]]
