import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the tensors of most tests are tiny


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
