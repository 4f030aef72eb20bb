import math

import pytest
import torch

from sae_zoo.functional.activations import KERNELS, heaviside, jumprelu, kernel_half_width
from sae_zoo.functional.kernel_widths import KERNEL_STD


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_integrate_to_one_with_the_stated_spread_inside_their_support(kernel):
    function, half_width = KERNELS[kernel]
    u = torch.linspace(-half_width, half_width, 200_001, dtype=torch.float64)
    density = function(u.clone())
    assert torch.trapezoid(density, u) == pytest.approx(1, abs=1e-4)
    assert torch.trapezoid(density * u * u, u) ** 0.5 == pytest.approx(KERNEL_STD[kernel], rel=2e-3)
    assert (function(torch.tensor([-half_width - 1e-6, half_width + 1e-6])) == 0).all()


def test_values():
    z, theta = torch.tensor([-1.0, 0.2, 0.5, 0.51, 3.0]), torch.tensor(0.5)
    assert jumprelu(z, theta, bandwidth=0.1).tolist() == pytest.approx([0, 0, 0, 0.51, 3.0])
    assert heaviside(z, theta, bandwidth=0.1).tolist() == [0, 0, 0, 1, 1]


def test_rectangle_gradients_by_hand():
    # theta = 0.5, eps = 0.2: the window is (0.4, 0.6), its height 1 / 0.2 = 5.
    z = torch.tensor([0.3, 0.45, 0.55, 0.7], requires_grad=True)
    theta = torch.tensor(0.5, requires_grad=True)
    jumprelu(z, theta, bandwidth=0.2).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert z.grad.tolist() == [0, 0, 100, 1000]
    assert theta.grad.item() == pytest.approx(-0.5 * 5 * (10 + 100))

    z.grad = theta.grad = None
    heaviside(z, theta, bandwidth=0.2).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert z.grad is None  # the sparsity term trains theta alone
    assert theta.grad.item() == pytest.approx(-5 * (10 + 100))


def test_triangle_gradient_by_hand():
    z, theta = torch.tensor([0.4, 0.55]), torch.tensor(0.5, requires_grad=True)
    heaviside(z, theta, bandwidth=0.2, kernel="triangle").sum().backward()
    assert theta.grad.item() == pytest.approx(-5 * ((1 - 0.5) + (1 - 0.25)))


def test_ste_into_pre_acts_is_the_derivative_of_a_function_of_the_difference():
    z, theta = torch.tensor([0.45, 0.55], requires_grad=True), torch.full((2,), 0.5, requires_grad=True)
    heaviside(z, theta, bandwidth=0.2, ste_into_pre_acts=True).sum().backward()
    assert torch.equal(z.grad, -theta.grad) and (z.grad > 0).all()
    z.grad = theta.grad = None
    jumprelu(z, theta, bandwidth=0.2, ste_into_pre_acts=True).sum().backward()
    assert z.grad.tolist() == pytest.approx([2.5, 3.5])  # window plus H


def test_gradient_of_a_broadcast_threshold_sums_over_the_batch():
    z = torch.tensor([[0.5, 0.1], [0.52, 0.1]])
    theta = torch.tensor([0.5, 0.5], requires_grad=True)
    heaviside(z, theta, bandwidth=0.2).sum().backward()
    assert theta.grad.tolist() == [-10, 0]


def test_window_is_float32_under_bfloat16():
    # At this magnitude bfloat16 spaces numbers by 2^-8 of 0.5: a window of 0.001 would be empty or everything.
    theta = torch.tensor(0.5009, requires_grad=True)
    heaviside(torch.tensor([0.5], dtype=torch.bfloat16), theta, bandwidth=0.01).sum().backward()
    assert theta.grad.dtype == torch.float32 and theta.grad.item() == pytest.approx(-100)


def test_l0_gradient_estimates_the_expected_loss():
    """One latent on x ~ N(0, 1): E[L] = E[x^2; x < theta] + lambda P(x > theta), so
    dE[L]/dtheta = (theta^2 - lambda) phi(theta).

    Also on f instead of pre-activations, as two public ports do it, where the lower half of the window is lost.
    """
    n, theta_value, coefficient = 4_000_000, 0.8, 0.1
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    phi = math.exp(-theta_value**2 / 2) / math.sqrt(2 * math.pi)
    errors = []
    for bandwidth in (0.4, 0.1, 0.025):
        theta = torch.tensor(theta_value, requires_grad=True)
        f = jumprelu(x, theta, bandwidth=bandwidth)
        ((x - f).square().mean() + coefficient * heaviside(x, theta, bandwidth=bandwidth).mean()).backward()
        errors.append(abs(theta.grad.item() / ((theta_value**2 - coefficient) * phi) - 1))
    assert errors[0] > errors[2] and errors[2] < 0.05

    theta = torch.tensor(theta_value, requires_grad=True)
    heaviside(x, theta, bandwidth=0.1).mean().backward()
    assert theta.grad.item() == pytest.approx(-phi, rel=0.02)
    right, theta.grad = theta.grad.item(), None
    heaviside(jumprelu(x, theta.detach(), bandwidth=0.1), theta, bandwidth=0.1).mean().backward()
    assert theta.grad.item() / right == pytest.approx(0.5, abs=0.03)


def test_bad_windows():
    with pytest.raises(ValueError, match="'box'; choose from epanechnikov"):
        kernel_half_width("box", 0.1)
    with pytest.raises(ValueError, match="bandwidth is 0; it must be positive"):
        kernel_half_width("rectangle", 0)
