"""Kernels of the sparse step: numba on a CPU, Triton on a CUDA device, by the device of the tensors alone."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def has_kernels(device_type: str) -> bool:
    """Whether the sparse step can run there."""
    return device_type in ("cpu", "cuda")


def kernels_for(tensor: Tensor) -> ModuleType:
    """The module of kernels for the device of ``tensor``; both have the same functions.

    Raises:
        ValueError: if the device has none.
    """
    match tensor.device.type:
        case "cpu":
            from sae_zoo.functional import cpu_kernels

            return cpu_kernels
        case "cuda":
            from sae_zoo.functional import cuda_kernels

            return cuda_kernels
        case other:
            raise ValueError(f"device {other} has no sparse kernels; use cpu or cuda (trainer.accelerator=cpu)")
