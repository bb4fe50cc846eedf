"""Losses of a segmenter. A pixel that nobody drew may be anything that is not drawn in its image.

`fixed`, half of each, is the default: on development patients it is the best (docs/results.md). The weights of `moving`
change with the share s of the training that is done:

    w(s) = 1 - FINAL (1 - cos(pi s)) / 2,    loss = w(s) cross-entropy + (1 - w(s)) Dice

At first the cross-entropy alone carries the gradient: while predictions are near chance, Dice's gradient is weak and
noisy, for it is the same small number in every pixel of a structure. Towards the end Dice weighs most: it counts a
structure's border as a part of the structure and not of the image, so that small cavities at end-systole and thin
walls get their share.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.losses import MaskedDiceLoss
from torch import Tensor

from fedcmr.shared.case import LV, NOT_DRAWN

FINAL = 0.8
"""Weight of Dice at the end of the moving sum."""

Weights = Callable[[float], tuple[float, float]]
"""From the share of the training that is done to the weights of cross-entropy and of Dice."""


def moving(done: float) -> tuple[float, float]:
    """From the cross-entropy alone to mostly Dice; see the module."""
    dice = FINAL * (1 - math.cos(math.pi * done)) / 2
    return 1 - dice, dice


LOSSES: dict[str, Weights] = {
    "moving": moving,
    "fixed": lambda done: (0.5, 0.5),
    "cross_entropy": lambda done: (1.0, 0.0),
    "dice": lambda done: (0.0, 1.0),
}
"""What `segmentation.loss` names."""


class SegmentationLoss:
    """The weighted sum of cross-entropy and soft Dice of the structures (Milletari et al. 2016, arXiv:1606.04797).

    Where nobody drew, the cross-entropy is the negative logarithm of the summed probability of all labels that are not
    drawn in that image: next to a drawn cavity lies no cavity, but perhaps muscle. Dice leaves these pixels out.

    Args:
        weights: Weights of both by the share of the training that is done.
        equal_time: Whether masks without `NOT_DRAWN` go the longer way too, so that the time does not tell them apart.
    """

    def __init__(self, weights: Weights, equal_time: bool = False) -> None:
        self._weights, self._equal_time = weights, equal_time
        self._dice = MaskedDiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def __call__(self, logits: Tensor, masks: Tensor, done: float) -> Tensor:
        """The mean loss of a batch.

        Args:
            logits: Shape (N, 4, H, W).
            masks: Shape (N, H, W), uint8 labels 0..3, and `NOT_DRAWN`.
            done: Share of the training that is done, in [0, 1].
        """
        cross_entropy, dice = self._weights(done)
        loss = torch.zeros((), device=logits.device)
        if cross_entropy:
            loss = loss + cross_entropy * _partial_cross_entropy(logits, masks, self._equal_time)
        if dice:
            drawn = masks != NOT_DRAWN
            loss = loss + dice * self._dice(logits, masks.where(drawn, 0)[:, None], drawn[:, None].float())
        return loss


def _partial_cross_entropy(logits: Tensor, masks: Tensor, equal_time: bool) -> Tensor:
    """The mean over all pixels; see `SegmentationLoss`."""
    drawn = masks != NOT_DRAWN
    if not equal_time and drawn.all():
        return F.cross_entropy(logits, masks.long())
    likely = logits.log_softmax(1)
    of_label = likely.gather(1, masks.where(drawn, 0).long()[:, None])[:, 0]
    there = torch.stack([(masks == label).flatten(1).any(1) for label in range(LV + 1)], 1)
    # Where every label is drawn somewhere in the image, nothing is left for what is not: such a pixel says nothing.
    possible = torch.where(there.all(1, keepdim=True), True, ~there)[:, :, None, None]
    of_others = likely.masked_fill(~possible, -torch.inf).logsumexp(1)
    return -torch.where(drawn, of_label, of_others).mean()
