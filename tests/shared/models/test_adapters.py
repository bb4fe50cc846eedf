"""The adapters: which parameters one trains, and that a prior knows nothing of it."""

import pytest
import torch

from fedcmr.shared.adapters import ADAPTERS
from fedcmr.shared.models.base import Condition
from fedcmr.shared.models.flow_matching import FlowMatching
from fedcmr.shared.models.networks.low_rank import RANK, LowRankLinear
from fedcmr.shared.models.networks.unet import Architecture
from fedcmr.shared.models.prior import load_prior, save_prior

CONDITION = Condition(torch.ones(1, 2, 64, 64, dtype=torch.uint8), torch.ones(1, 11))


@torch.no_grad()
def out(generator):
    return generator.velocity(torch.zeros(1, 2, 64, 64), torch.tensor([0.5]), CONDITION)


def test_a_low_rank_update_is_that_of_the_product(prior):
    """Against the layer whose weight is W + B A."""
    layer = LowRankLinear(11, 7, seed=1)
    layer.low_rank().data.normal_()
    plain = torch.nn.Linear(11, 7)
    plain.load_state_dict({"weight": layer.weight + layer.lora_b @ layer.lora_a, "bias": layer.bias})
    x = torch.randn(5, 11)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.linalg.matrix_rank(layer.lora_b @ layer.lora_a) == RANK


def test_every_site_and_the_server_draw_the_same_fixed_factor():
    torch.manual_seed(1)
    first = FlowMatching(Architecture(channels=(16, 16), norm_num_groups=4))
    torch.manual_seed(2)
    second = FlowMatching(Architecture(channels=(16, 16), norm_num_groups=4))
    factors = [{n: b for n, b in g.named_buffers() if n.endswith("lora_a")} for g in (first, second)]
    assert len(factors[0]) == 2
    for name, value in factors[0].items():
        assert torch.equal(value, factors[1][name])
    # A torch that draws otherwise may not take part: its B would belong to another A.
    assert float(factors[0]["unet.class_embedding.0.lora_a"][0, 0]) == pytest.approx(-1.8399378)


def test_an_adapter_is_sorted_small_and_begins_where_the_prior_is(prior, tiny_prior):
    untouched = out(prior.generator)
    sizes = {}
    assert list(prior.generator.adapters()) == list(ADAPTERS)
    for adapter, part in prior.generator.adapters().items():
        assert list(part) == sorted(part)
        sizes[adapter] = sum(parameter.numel() for parameter in part.values())
    assert sizes["statistics"] == sizes["norm_affine"]
    assert sizes["lora"] == 2 * 4 * 16 * RANK
    assert torch.equal(out(prior.generator), untouched), "B is zero before it is trained"


@pytest.mark.parametrize("adapter", ["norm_affine", "lora"])
def test_values_are_held_and_given_back_also_after_an_error(prior, adapter):
    generator = prior.generator
    part = generator.trainable(adapter)
    before, flags = out(generator), [parameter.requires_grad for parameter in generator.parameters()]
    values = {name: torch.full_like(parameter, 0.3).detach() for name, parameter in part.items()}
    with pytest.raises(RuntimeError, match="inside"), generator.holding(values) as held:
        assert all(torch.equal(held[name], values[name]) for name in values)
        assert {name for name, p in generator.unet.named_parameters() if p.requires_grad} == set(part)
        assert not torch.equal(out(generator), before)
        raise RuntimeError("inside")
    assert torch.equal(out(generator), before)
    assert [parameter.requires_grad for parameter in generator.parameters()] == flags


def test_values_of_no_adapter_are_refused(prior):
    part = {name: value.detach() for name, value in prior.generator.trainable("lora").items()}
    first = next(iter(part))
    for wrong in ({}, {first: part[first]}, part | {first: part[first][:-1]}):
        with pytest.raises(ValueError, match="an adapter"), prior.generator.holding(wrong):
            pass


def test_a_priors_file_holds_no_low_rank_part(prior, tmp_path):
    before = out(prior.generator)
    for parameter in prior.generator.trainable("lora").values():
        parameter.data.fill_(1.0)
    assert not torch.equal(out(prior.generator), before)
    save_prior(
        tmp_path / "p.safetensors", prior.generator, prior.style_mean, prior.style_std, prior.style_correlation, {}
    )
    torch.testing.assert_close(out(load_prior(tmp_path / "p.safetensors").generator), before)


def test_only_where_a_gradient_is_taken_the_first_trained_norm_leaves_channels_last(prior):
    def calls():
        """Of every norm as it is called: whether it is trained, and whether its input is channels_last."""
        seen = []

        def record(norm, inputs):
            seen.append((norm.weight.requires_grad, inputs[0].is_contiguous(memory_format=torch.channels_last)))

        norms = [module for module in prior.generator.modules() if isinstance(module, torch.nn.GroupNorm)]
        hooks = [norm.register_forward_pre_hook(record) for norm in norms]
        prior.generator.velocity(torch.zeros(1, 2, 64, 64), torch.zeros(1), CONDITION)
        for hook in hooks:
            hook.remove()
        return seen

    with torch.no_grad():
        sampling = calls()
    training = calls()
    first = next(number for number, (trained, _) in enumerate(sampling) if trained)
    assert (sampling[first], training[first]) == ((True, True), (True, False))
    assert sampling[:first] + sampling[first + 1 :] == training[:first] + training[first + 1 :]
