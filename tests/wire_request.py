"""A request as the server sends it in a round of gradients, to be changed by each test where it matters."""

from typing import Any

from fedcmr.shared.records import Request

USUAL: dict[str, Any] = {
    "task": "gradients",
    "run_id": "0123456789abcdef",
    "server_round": 2,
    "prior_sha256": "ab" * 32,
    "adapter": "norm_affine",
    "private": True,
    "noise_multiplier": 4.0,
    "sample_rate": 1.0,
    "max_grad_norm": 1.0,
    "target_delta": 1e-3,
    "local_steps": 1,
    "learning_rate": 0.1,
    "num_views": 2,
    "seed": 0,
}


def usual_request(**changes: Any) -> Request:
    """The usual request with these fields in place of its own."""
    return Request(**{**USUAL, **changes})
