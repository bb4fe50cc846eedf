"""ResNet50 that reads an ED/ES pair of short-axis slices and tells the patient's ejection fraction.

It sees one slice at a time, the ventricle in the middle, and no mask: a test scan needs nothing but its pixels. The LV
areas of both phases are learnt beside the ejection fraction, because they say where to look; `server.reading` makes a
patient's answer of what it says of the slices.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import resnet50
from monai.networks.nets.resnet import ResNetBottleneck
from torch import Tensor, nn

from server.augmentation import Augmentation, augment_pairs
from server.localisation import centred
from server.training_state import TrainingState, one_cycle
from shared import checkpoint as checkpoints
from shared.anatomy import ejection_fraction
from shared.case import LV, Case
from shared.config import RegressionConfig
from shared.device import autocast
from shared.errors import UserError
from shared.progress import track
from shared.views import slice_pairs

MIDDLE_SHARE = 0.6
EF_BETA = 0.1
"""Where the smooth L1 loss turns from square to linear: 10 EF points, between readers' and gross errors."""
AREA_WEIGHT, AREA_SCALE = 0.5, 5.0
"""Weight of the area terms, and what brings areas (a dilated cavity fills 0.2 of the picture) to the range of EF."""
MAX_GRAD_NORM = 5.0
CHECKPOINT_EVERY = 200
LOG_EVERY = 20
FORMAT = "fedcmr-regressor-2"


class Prediction(NamedTuple):
    """What the network says of each pair: shapes (N,), EF in [0, 1], areas as fractions of the picture."""

    ef: Tensor
    area_ed: Tensor
    area_es: Tensor


class Regressor(nn.Module):
    """MONAI ResNet50 with three outputs.

    Residual branches start at zero (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1), the outputs at
    the mean: on one batch the loss falls to a tenth in 5 steps, where the plain initialisation first rises.

    Attributes:
        mean_ef: Mean ejection fraction of the patients it was trained on; the predict-the-mean baseline.
        sd_floor: With `sd_gain`, how wrong answers are; see `server.reading.calibrate`. NaN until then.
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
        self.network = network.to(memory_format=torch.channels_last)
        for name, value in (("mean_ef", mean_ef), ("sd_floor", math.nan), ("sd_gain", math.nan),
                            ("area_share", area_share)):  # fmt: skip
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        for module in self.network.modules():
            if isinstance(module, ResNetBottleneck):
                nn.init.zeros_(module.bn3.weight)
        bounded = min(max(mean_ef, 0.05), 0.95)
        typical_area = 0.08  # of the picture; softplus^-1(a) = log(exp(a) - 1)
        bias = torch.full((3,), math.log(math.expm1(typical_area)))
        bias[0] = math.log(bounded / (1 - bounded))
        self.network.fc.bias.data.copy_(bias)

    def forward(self, images: Tensor) -> Prediction:
        """Predict from pairs of shape (N, 2, 64, 64) in [-1, 1]."""
        logits = self.network(images.contiguous(memory_format=torch.channels_last)).float()
        ef, area_ed, area_es = logits.unbind(1)
        return Prediction(torch.sigmoid(ef), F.softplus(area_ed), F.softplus(area_es))


@dataclass(frozen=True)
class Examples:
    """Slice pairs of many patients with their targets, as tensors.

    Attributes:
        images: Shape (M, 2, H, W), float32 in [-1, 1].
        ef: Shape (M,), the patient's ejection fraction; NaN in slices that shall not tell it, outside the middle.
        areas: Shape (M, 2), LV area at ED and ES as a fraction of the picture; NaN where the patient has no mask.
        mean_ef: Mean over patients, not over slices.
    """

    images: Tensor
    ef: Tensor
    areas: Tensor
    mean_ef: float


def middle_slices(num_slices: int) -> slice:
    """The middle of a stack by index, in training and testing alike: the central 60 %.

    Basal slices open into the atrium and apical ones blur; which these are must not be read from a mask.
    """
    kept = max(1, round(MIDDLE_SHARE * num_slices))
    first = (num_slices - kept) // 2
    return slice(first, first + kept)


def patient_ef(case: Case) -> float:
    """The ejection fraction in the case's row, else of its masks; NaN where neither is known."""
    return case.info.ef if math.isfinite(case.info.ef) else ejection_fraction(case.masks)


def prepare_examples(cases: Sequence[Case], whole_stacks: bool = False) -> Examples:
    """The middle slices of every patient whose ejection fraction is known, or all of them for their areas.

    Raises:
        UserError: There is no such patient.
    """
    known = [(case, patient_ef(case)) for case in cases]
    known = [(case, ef) for case, ef in known if math.isfinite(ef)]
    if not known:
        raise UserError(f"none of the {len(cases)} training cases has an ejection fraction: give labels or masks")
    stacks, efs, areas = [], [], []
    for case, ef in known:
        pictures, masks = slice_pairs(case)
        middle = middle_slices(len(pictures))
        lv = (masks == LV).float().mean(dim=(2, 3))
        lv = lv if lv.any() else torch.full_like(lv, math.nan)
        told = torch.full((len(pictures),), math.nan)
        told[middle] = ef
        taken = slice(None) if whole_stacks else middle
        stacks.append(pictures[taken])
        areas.append(lv[taken])
        efs.append(told[taken])
    mean_ef = float(np.mean([ef for _, ef in known]))
    return Examples(torch.cat(centred(stacks)), torch.cat(efs), torch.cat(areas), mean_ef)


def regression_loss(prediction: Prediction, ef: Tensor, areas: Tensor) -> Tensor:
    """Smooth L1 on the ejection fraction and on both areas, where they are known, averaged over the batch."""
    predicted = AREA_SCALE * torch.stack([prediction.area_ed, prediction.area_es], 1)
    return _known_l1(prediction.ef, ef) + AREA_WEIGHT * _known_l1(predicted, AREA_SCALE * areas)


def _known_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1, averaged over all elements; unknown ones (NaN) count as met."""
    return F.smooth_l1_loss(predicted, torch.where(target.isfinite(), target, predicted.detach()), beta=EF_BETA)


def train_regressor(
    cases: Sequence[Case],
    config: RegressionConfig,
    seed: int,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    description: str = "training the ResNet50",
    augmentation: Augmentation | None = None,
    log: Callable[[int, float], None] | None = None,
) -> Regressor:
    """Train on slices of every patient and return the averaged (EMA) network, not calibrated yet.

    Everything random follows from (seed, step), so a run resumed from its checkpoint equals an uninterrupted one, and
    on a CPU with the same number of threads equal seeds give equal weights.

    Args:
        cases: Patients of any number of slices; those without an ejection fraction are left out.
        config: Steps, batch size, learning rate, weight decay, decay of the average; above an `area_share` of 0 whole
            stacks are learnt, else the middle slices.
        seed: Of weights, order and augmentation.
        device: Where to train.
        checkpoint: A safetensors file written every `CHECKPOINT_EVERY` steps and removed at the end. One that belongs
            to other data, settings or seed is not used.
        description: Words beside the progress bar.
        augmentation: None for the defaults.
        log: Called with (step, mean loss since the last call) every `LOG_EVERY` steps.

    Raises:
        UserError: No patient has an ejection fraction, or the loss is no longer finite.
    """
    augmentation = augmentation or Augmentation()
    examples = prepare_examples(cases, config.area_share > 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Regressor(examples.mean_ef, config.area_share)
    model.to(device)
    state = TrainingState(model.train(), config.weight_decay)
    identity = _identity(examples, config, augmentation, seed)
    first = state.restore(checkpoint, identity) if checkpoint else 0

    losses: list[float] = []
    for step in track(range(first, config.num_steps), description):
        generator = torch.Generator().manual_seed(_step_seed(seed, step))
        index = batch_indices(len(examples.images), config.batch_size, seed, step)
        images, growth = augment_pairs(examples.images[index].to(device), augmentation, generator)
        areas = examples.areas[index].to(device) * growth[:, None]
        with autocast(torch.device(device)):
            prediction = model(images)
        loss = regression_loss(prediction, examples.ef[index].to(device), areas)
        rate = one_cycle(step, config.num_steps, config.learning_rate)
        state.step(loss, rate, MAX_GRAD_NORM, min(config.ema_decay, (1 + step) / (10 + step)))

        losses.append(loss.item())
        if (step + 1) % LOG_EVERY == 0 or step + 1 == config.num_steps:
            if not math.isfinite(sum(losses)):
                raise UserError(
                    f"the regressor's loss is not finite at step {step + 1}: lower regression.learning_rate"
                )
            if log is not None:
                log(step + 1, sum(losses) / len(losses))
            losses = []
        if checkpoint and (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < config.num_steps:
            state.save(checkpoint, identity, step + 1)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return state.ema.eval()


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


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of one step's batch: epoch after epoch in a new order, so every example is seen equally often."""
    first, last = step * batch_size, (step + 1) * batch_size
    order = [
        torch.randperm(num_examples, generator=torch.Generator().manual_seed(_step_seed(seed, -1 - epoch)))
        for epoch in range(first // num_examples, (last - 1) // num_examples + 1)
    ]
    start = first % num_examples
    return torch.cat(order)[start : start + batch_size]


def _step_seed(seed: int, step: int) -> int:
    """A seed of its own for every (seed, step)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:7], "big")


def _identity(examples: Examples, config: RegressionConfig, augmentation: Augmentation, seed: int) -> str:
    """What a checkpoint must agree on to be continued: data, settings and seed."""
    digest = hashlib.sha256(repr((sorted(asdict(config).items()), asdict(augmentation), seed)).encode())
    for tensor in (examples.ef, examples.areas, examples.images.double().sum(dim=(1, 2, 3))):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
