"""A linear layer with a low-rank update of which one factor is public and fixed.

Hu et al. (2021), https://arxiv.org/abs/2106.09685, update a weight W by B A; Sun et al. (2024),
https://arxiv.org/abs/2403.12313, freeze A: half the numbers to clip, to noise and to send, and the mean of the sites' B
is the mean of their updates, which the mean of products would not be.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = 4
SCALE = 4.0
"""Scale of A. It sets how far a step of B moves the layer: at 4 a patient's gradient is about as long as that of the
affine parameters and the same learning rate suits both, measured on simulated hospitals and public development
patients."""


class LowRankLinear(nn.Linear):
    """`(W + B A) x + b`, with A (RANK, in) drawn from a constant seed and B (out, RANK) zero until it is trained.

    B is there from the first call of `low_rank()` on, so that a prior and its training know nothing of it.
    """

    lora_a: Tensor
    lora_b: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, seed: int):
        super().__init__(in_features, out_features)
        projection = torch.randn(RANK, in_features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("lora_a", projection * SCALE / in_features**0.5, persistent=False)
        self.register_parameter("lora_b", None)

    def low_rank(self) -> nn.Parameter:
        """B, shape (out, RANK)."""
        if self.lora_b is None:
            self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, RANK), requires_grad=False)
        return self.lora_b

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, in) -> (N, out)."""
        out = super().forward(x)
        # Next to W, not added to it: in bf16 the sum would swallow a small update.
        return out if self.lora_b is None else out + F.linear(F.linear(x, self.lora_a), self.lora_b)
