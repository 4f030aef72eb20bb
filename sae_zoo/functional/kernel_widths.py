"""Standard deviation of each kernel at bandwidth 1: kernels are compared at matched variance, not at equal width."""

from __future__ import annotations

KERNEL_STD = {"rectangle": 12**-0.5, "triangle": 6**-0.5, "epanechnikov": 5**-0.5, "gaussian": 1.0}
