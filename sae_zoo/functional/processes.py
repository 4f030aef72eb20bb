"""Values that the processes of distributed training have to agree on, beside the gradients that are averaged over them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_processes(values: Tensor) -> Tensor:
    """``values`` added up over all processes, in place; as they are where there is only one. No gradient."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each of the scalars ``values``, replaced by its mean over all processes, with the gradient of this process's own.

    The gradient of a function of means is then that of the global batch when it has been averaged over the processes,
    also where the function is not linear.
    """
    if not torch.distributed.is_initialized():
        return values
    mean = torch.stack([value.detach().double() for value in values.values()])
    mean = sum_over_processes(mean) / torch.distributed.get_world_size()
    return {name: value + (mean[i].to(value.dtype) - value.detach()) for i, (name, value) in enumerate(values.items())}
