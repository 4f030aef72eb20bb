"""Adam (Kingma and Ba 2015, arXiv 1412.6980) that knows about decoder rows.

What torch's lacks: it keeps no first moment where beta1 is 0; it can keep one second moment for the whole row of a
latent, the mean of the squares (a row is a direction, and its gradient's direction then is the step's); and in the one
pass over a parameter it also removes from the gradient the component along each unit row, and scales the rows back to
norm 1 after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

SECOND_MOMENTS = ("element", "row")


def adam_reference_(weight: Tensor, grad: Tensor, first: Tensor | None, second: Tensor, numbers: Tensor, *,
                    unit_rows: bool) -> None:
    """One step in plain tensor operations, in place: what a CUDA device compiles, and what tests compare with.

    Args:
        weight, grad: [rows, d]; ``first`` too, or None where beta1 is 0.
        second: [rows, d], or [rows, 1] for one of each row.
        numbers: [5]: learning rate / (1 - beta1^t), beta1, beta2, 1 / sqrt(1 - beta2^t), eps. A tensor, so that a new
            value does not mean a new compilation.
        unit_rows: see :class:`Adam`.
    """
    step_size, beta1, beta2, scale, eps = numbers.unbind()
    if unit_rows:
        grad = grad - torch.linalg.vecdot(grad, weight).unsqueeze(1) * weight
    square = grad.square() if second.shape == grad.shape else grad.square().mean(1, keepdim=True)
    second.copy_(beta2 * second + (1 - beta2) * square)
    if first is not None:
        grad = first.copy_(beta1 * first + (1 - beta1) * grad)
    new = weight - step_size * grad / (second.sqrt() * scale + eps)
    if unit_rows:
        new = new / torch.linalg.vector_norm(new, dim=1, keepdim=True).clamp_min(torch.finfo(new.dtype).tiny)
    weight.copy_(new)


@cache
def _compiled() -> Any:
    return torch.compile(adam_reference_)


def _step_on(device_type: str) -> Callable[..., None]:
    """The step of one tensor as it is taken there; numbers by their names."""
    if device_type == "cpu":
        from sae_zoo.functional.cpu_kernels import adam_  # numba, which a CUDA machine never needs

        return adam_
    step: Any = _compiled() if device_type == "cuda" else adam_reference_

    def with_numbers_in_a_tensor(weight: Tensor, *others: Tensor | None, unit_rows: bool, **numbers: float) -> None:
        step(weight, *others, torch.tensor(list(numbers.values()), device=weight.device), unit_rows=unit_rows)

    return with_numbers_in_a_tensor


def _rows(tensor: Tensor, *, like: Tensor) -> Tensor:
    """``tensor`` as a matrix, seen so that the rows of ``like``, seen so, are contiguous."""
    if like.ndim == 2:
        return tensor if like.is_contiguous() else tensor.T
    return tensor.view(1, -1)


class Adam(torch.optim.Optimizer):
    """Adam; state ``exp_avg_sq``, and ``exp_avg`` only where beta1 is not 0.

    Args:
        params: parameters or groups of them. A group with ``unit_rows=True`` holds matrices whose rows have norm 1: the
            gradient's component along a row is removed before the moments see it, and rows have norm 1 after the step
            (Gated SAEs and Gemma Scope, PAPER.md section 2).
        lr, beta1, beta2, eps: Adam's.
        second_moment: of matrices: of each ``element``, or one for each ``row`` (of contiguous memory). Vectors have
            one for each element.
    """

    def __init__(self, params: Iterable, *, lr: float, beta1: float, beta2: float, eps: float,
                 second_moment: str = "element"):
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "unit_rows": False,
                                  "second_moment": second_moment})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, beta1, beta2 = self.state[parameter], group["beta1"], group["beta2"]
        if not state:
            state["step"] = 0
            by_row = group["second_moment"] == "row" and parameter.ndim == 2
            state["exp_avg_sq"] = (torch.zeros_like(_rows(parameter, like=parameter)[:, :1]) if by_row
                                   else torch.zeros_like(parameter))
            if beta1:
                state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        numbers = {"step_size": group["lr"] / (1 - beta1 ** state["step"]), "beta1": beta1, "beta2": beta2,
                   "scale": (1 - beta2 ** state["step"]) ** -0.5, "eps": group["eps"]}
        second = state["exp_avg_sq"]
        tensors = [None if t is None else _rows(t, like=parameter)
                   for t in (parameter, parameter.grad, state.get("exp_avg"))]
        tensors.append(second if second.shape != parameter.shape else _rows(second, like=parameter))
        _step_on(parameter.device.type)(*tensors, **numbers, unit_rows=group["unit_rows"])
