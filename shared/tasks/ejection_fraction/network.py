"""ResNet50 that predicts the patient's ejection fraction from an ED/ES pair of short-axis slices.

It sees one slice at a time, the ventricle in the middle, and no mask: a test scan needs nothing but its pixels. The LV
areas of both phases are learnt with the ejection fraction, because they say where the cavity is;
`fedcmr.shared.tasks.ejection_fraction.inference` combines the predictions of the slices into a patient's.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import resnet50
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from numpy.typing import NDArray
from torch import Tensor, nn

from fedcmr.shared import checkpoint as checkpoints
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.ejection_fraction.convolution import use_im2col

MAX_IM2COL_KERNELS = {"layer1": 1, "layer2": 1, "layer3": 3, "layer4": 3}
"""For each layer of the ResNet50, up to which size of kernel an im2col (GEMM) convolution is used: images of
64 x 64 have 16, 8, 4 and 2 pixels a side there, and with few pixels it is faster."""
FORMAT = "fedcmr-regressor-2"
NOT_SENT = ("mean_ef", "sd_floor", "sd_gain", "num_batches_tracked")
"""Last parts of the names of what inference at a site does not need: baseline, calibration, a counter of training."""


class Prediction(NamedTuple):
    """What the network predicts for each pair: shapes (N,), EF in [0, 1], areas as fractions of the image."""

    ef: Tensor
    area_ed: Tensor
    area_es: Tensor


class Regressor(nn.Module):
    """MONAI ResNet50 with three outputs.

    Residual branches start at zero (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1), the outputs at
    the mean: on one batch the loss falls to a tenth in 5 steps, where the plain initialisation first rises.

    Attributes:
        mean_ef: Mean ejection fraction of the patients it was trained on; the predict-the-mean baseline.
        sd_floor: With `sd_gain`, what gives the predicted SD, as found by calibration; NaN until then.
        sd_gain: See there.
        area_share: `regression.area_share` of its training.
    """

    mean_ef: Tensor
    sd_floor: Tensor
    sd_gain: Tensor
    area_share: Tensor

    def __init__(self, mean_ef: float = 0.5, area_share: float = 0.0) -> None:
        super().__init__()
        network = resnet50(spatial_dims=2, n_input_channels=2, num_classes=3, conv1_t_stride=2)
        self.network = self.arrange(network)
        for name, value in (
            ("mean_ef", mean_ef),
            ("sd_floor", math.nan),
            ("sd_gain", math.nan),
            ("area_share", area_share),
        ):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        for module in self.network.modules():
            if isinstance(module, ResNetBottleneck):
                nn.init.zeros_(module.bn3.weight)
        bounded = min(max(mean_ef, 0.05), 0.95)
        typical_area = 0.08  # of the image; softplus^-1(a) = log(exp(a) - 1)
        bias = torch.full((3,), math.log(math.expm1(typical_area)))
        bias[0] = math.log(bounded / (1 - bounded))
        self.network.fc.bias.data.copy_(bias)

    @staticmethod
    def arrange(network: ResNet) -> ResNet:
        """Lay the network out for speed; but for rounding it computes the same."""
        for name, layer in network.named_children():
            use_im2col(layer, MAX_IM2COL_KERNELS.get(name, 0))
        return network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Prediction:
        """Predict from pairs of shape (N, 2, 64, 64) in [-1, 1]."""
        logits = self.network(images.contiguous(memory_format=torch.channels_last)).float()
        ef, area_ed, area_es = logits.unbind(1)
        return Prediction(torch.sigmoid(ef), F.softplus(area_ed), F.softplus(area_es))


def save_regressor(path: Path, model: Regressor, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the weights as safetensors, atomically, with `metadata` readable in the file's header."""
    arrays = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    checkpoints.save(path, arrays, {**(metadata or {}), "format": FORMAT})


def load_regressor(path: Path) -> Regressor:
    """Read a file of `save_regressor`.

    Raises:
        UserError: The file is missing, or is not a regressor of this version.
    """
    arrays, metadata = checkpoints.load(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a regressor: expected format {FORMAT}, made by 'fedcmr-server train'")
    model = Regressor()
    try:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    except RuntimeError:
        raise UserError(f"{path} holds weights of another network: expected the ResNet50 of {FORMAT}") from None
    return model.eval()


def to_arrays(model: Regressor) -> Arrays:
    """What a site needs of a model to predict: named float32 arrays, scalars as arrays of one."""
    return {
        name: np.atleast_1d(value.detach().cpu().numpy().astype(np.float32))
        for name, value in model.state_dict().items()
        if name.rpartition(".")[2] not in NOT_SENT
    }


def array_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `to_arrays`, of which no model of this version has others."""
    return {name: array.shape for name, array in to_arrays(Regressor()).items()}


def from_arrays(arrays: Mapping[str, NDArray[np.float32]]) -> Regressor:
    """The model of `to_arrays`, not calibrated.

    Args:
        arrays: Arrays of exactly the names and shapes of `array_shapes`.
    """
    model = Regressor()
    state = model.state_dict()
    with torch.no_grad():
        for name, array in arrays.items():
            state[name].copy_(torch.from_numpy(np.array(array)).reshape(state[name].shape))
    return model.eval()
