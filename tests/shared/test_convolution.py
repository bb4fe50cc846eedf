"""im2col (GEMM) convolutions compute what PyTorch's own convolutions do."""

import pytest
import torch
from torch import nn

from fedcmr.shared.tasks.ejection_fraction.convolution import Im2colConv2d, use_im2col
from fedcmr.shared.tasks.ejection_fraction.network import Regressor


@pytest.mark.parametrize("side", [1, 2, 5, 8])
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (2, 1, 1), (5, 3, 2)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_product_equals_the_convolution_and_its_gradients(side, size, stride, padding, bias):
    torch.manual_seed(side)
    layer = nn.Conv2d(3, 4, size, stride, padding, bias=bias).double()
    im2col = Im2colConv2d(3, 4, size, stride, padding, bias=bias).double()
    im2col.load_state_dict(layer.state_dict())
    images = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    expected = layer(images)
    weights = torch.randn_like(expected)
    results = [
        (conv(images), torch.autograd.grad((conv(images) * weights).sum(), [images, *conv.parameters()]))
        for conv in (layer, im2col)
    ]
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])


def test_only_what_a_product_computes_is_replaced():
    kept = [
        nn.Conv2d(4, 4, 5),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, (1, 3)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 1, padding=1),
    ]
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(*kept))
    before = network.state_dict()
    use_im2col(network, 3)
    assert type(network[0]) is Im2colConv2d
    assert list(network[1]) == kept
    torch.testing.assert_close(network.state_dict(), before)


def test_resnet_of_products_is_the_resnet(monkeypatch):
    """In every layer but the stem; the results of both agree."""
    torch.manual_seed(0)
    fast = Regressor().eval()
    assert sum(isinstance(module, Im2colConv2d) for module in fast.modules()) == 45
    monkeypatch.setattr(Regressor, "arrange", staticmethod(lambda network: network))
    plain = Regressor().eval()
    plain.load_state_dict(fast.state_dict())
    images = torch.rand(2, 2, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-5)
