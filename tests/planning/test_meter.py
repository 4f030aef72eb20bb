import pytest
import torch
from torch import nn

from sae_zoo.planning.meter import Cost, Meter


def test_a_chain_whose_costs_are_known():
    a = torch.empty(1000, 500, device="meta")  # 2 MB, there before
    with Meter() as meter:
        b = a + 1  # 2 MB
        b = b * 2  # 4 MB while both are there
        seen = meter.so_far()
        c = a @ b.T  # 4 MB more than b
        del b
        torch.relu_(c.view(-1)[:10])  # a view, in place
        d = c.T.contiguous()  # 4 MB more than c
        assert d.shape == c.shape
        total = meter.so_far()
    assert seen == Cost(0, 4_000_000)
    assert total == Cost(2 * 1000 * 1000 * 500, 8_000_000)


def test_the_gradients_of_a_linear_layer():
    layer = nn.Linear(300, 200, bias=False, device="meta")
    x = torch.empty(50, 300, device="meta")
    with Meter() as meter:
        layer(x).sum().backward()
    assert meter.so_far().flops == 2 * 2 * 50 * 300 * 200  # the product, and its gradient of the weight; none of x
    # The output and the gradient of the weight; the gradient of a sum is one number, seen as many.
    assert meter.so_far().peak_bytes == pytest.approx(4 * (300 * 200 + 50 * 200), rel=0.01)


def test_no_memory_is_taken():
    with Meter() as meter:
        x = torch.empty(1 << 40)  # 4 TiB
        assert (x + x).shape == x.shape
    assert meter.so_far().peak_bytes == 2 * 4 << 40
