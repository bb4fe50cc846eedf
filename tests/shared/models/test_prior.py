"""A prior's file: what older ones say is understood, and what no prior would ask for is refused before it is built."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedcmr.shared.errors import UserError
from fedcmr.shared.models.kinds import kind_of
from fedcmr.shared.models.prior import SHIPPED_PRIOR, load_prior

SHIPPED_SHA256 = "69a39dfc3acceb3d0e4df846a8c8235613593d68aa3afb2e4d64aa054a9af9f0"  # pragma: allowlist secret


def header_of(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_the_shipped_prior_is_a_flow_of_these_very_weights():
    prior = load_prior()
    assert prior.sha256 == SHIPPED_SHA256 and kind_of(prior.generator) == "flow_matching"
    assert "kind" not in header_of(SHIPPED_PRIOR), "files of earlier versions name no kind"
    weights = load_file(SHIPPED_PRIOR)
    for name, value in prior.generator.state_dict().items():
        assert torch.equal(value, weights[f"generator.{name}"].float()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gan"}, "another kind than flow_matching, diffusion, latent_flow"),
        ({"kind": "latent_flow"}, "not a prior of this version"),  # the weights are not of this kind
        ({"channels": [4096]}, "not a prior of this version"),
        ({"channels": [16] * 9}, "not a prior of this version"),
        ({"num_res_blocks": 1000}, "not a prior of this version"),
        ({"num_res_blocks": [1, 1, 1000]}, "not a prior of this version"),
        ({"tiles": 1}, "not a prior of this version"),
        ({"patch": 64}, "not a prior of this version"),
        ({"size_px": 4096}, "not a prior of this version"),
        ({"pixel_mm": 0}, "not a prior of this version"),
    ],
)
def test_what_is_no_prior_is_refused_before_it_is_built(tiny_prior, tmp_path, monkeypatch, change, message):
    header = header_of(tiny_prior)
    architecture = json.loads(header["architecture"])
    header |= {name: value for name, value in change.items() if name == "kind"}
    architecture |= {name: value for name, value in change.items() if name != "kind"}
    path = tmp_path / "p.safetensors"
    save_file(load_file(tiny_prior), path, metadata={**header, "architecture": json.dumps(architecture)})
    if change.keys() != {"kind"}:
        monkeypatch.setattr("fedcmr.shared.models.prior.make", lambda *_: pytest.fail("it was built"))
    with pytest.raises(UserError, match=message):
        load_prior(path)
