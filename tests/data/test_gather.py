import pytest
import torch

from sae_zoo.data.gather import Gather


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, d, m", [(1, 1, 1), (7, 3, 20), (100, 33, 64), (5, 4, 0)])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_gather_is_indexing(dtype, n, d, m, n_threads, generator, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    rows = torch.randn(n, d, generator=generator).to(dtype)
    order = torch.randint(n, (m,), generator=generator)
    out = torch.full((m + 1, d), 9.0)
    Gather()(rows, order, out[:m])
    assert torch.equal(out[:m], torch.stack([rows[i].float() for i in order]) if m else out[:0])
    assert (out[m:] == 9).all()


def test_every_bfloat16_is_widened_to_the_bit():
    rows = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
    order, out = torch.arange(256).flip(0), torch.empty(256, 256)
    Gather()(rows, order, out)
    finite = ~rows.flip(0).isnan()
    assert torch.equal(out[finite], rows.flip(0).float()[finite]) and torch.equal(out.isnan(), ~finite)
    assert torch.equal(out.bfloat16()[finite].view(torch.int16), rows.flip(0)[finite].view(torch.int16))  # -0
