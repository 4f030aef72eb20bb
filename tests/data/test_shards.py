"""A shard's rows on their way from a file to where they belong."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_zoo.data import shards
from sae_zoo.data.shards import LocalFile, inverse, stored_tensors

N, D_IN = 70_001, 64  # enough bytes for two threads; an odd number of rows


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """``rows``, and the tensor of a file that holds them."""
    path = tmp_path_factory.mktemp("shards") / "shard.safetensors"
    rows = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(0))
    save_file({"activations": rows}, path)
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    return rows, stored_tensors(LocalFile(path), header)["activations"]


def test_a_large_shard_comes_in_the_order_asked_for(stored):
    rows, tensor = stored
    assert rows.nbytes > shards._SHARED_BYTES
    order = np.random.default_rng(0).permutation(N)
    out = torch.empty_like(rows)
    tensor.read_permuted(out, order)
    assert torch.equal(out, rows[torch.from_numpy(order)])


def test_a_part_goes_to_its_places_and_nowhere_else(stored):
    rows, tensor = stored
    place = inverse(np.random.default_rng(1).permutation(2 * N))[:N]  # every other place, about
    out = torch.full((2 * N, D_IN), torch.nan)
    tensor.read_to(out, place)
    assert torch.equal(out[torch.from_numpy(place)], rows)
    assert int(out.isnan().all(1).sum()) == N


@pytest.mark.parametrize("lost", [1, N // 2 * D_IN * 4 + 1])  # of the second half alone, and of both
def test_a_file_that_ends_early_is_said_whichever_thread_finds_it(stored, tmp_path, lost):
    rows, tensor = stored
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tensor.file.path.read_bytes()[:-lost])
    with pytest.raises(ValueError, match=r"cut\.safetensors ends too early"):
        tensor._replace(file=LocalFile(cut)).read_to(torch.empty_like(rows), np.arange(N))
