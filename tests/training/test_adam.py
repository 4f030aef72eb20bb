import pytest
import torch

from sae_zoo.functional.decoder import normalise_rows_
from sae_zoo.training import adam
from sae_zoo.training.adam import Adam, adam_reference_


def train(make_optimizer, parameters, steps=12):
    generator = torch.Generator().manual_seed(5)
    optimizer = make_optimizer(parameters)
    for step in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if step % 2 and p.ndim == 2:
                p.grad = p.grad.T.contiguous().T
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + step)
        optimizer.step()
    return optimizer


def matrices(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 5), (5, 7), (9,)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[1] = made[1].T.contiguous().T  # column after column, as W_enc
    return [torch.nn.Parameter(t) for t in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_equals_torchs(beta1, dtype):
    ours, theirs = matrices(dtype), matrices(dtype)
    optimizer = train(lambda p: Adam(p, lr=0.01, beta1=beta1, beta2=0.99, eps=1e-6), ours)
    train(lambda p: torch.optim.Adam(p, lr=0.01, betas=(beta1, 0.99), eps=1e-6), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert ("exp_avg" in optimizer.state[a]) == (beta1 != 0)
    assert ours[1].T.is_contiguous()


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_unit_rows_by_hand(beta1):
    """Project, step, renormalise: three passes in plain operations."""
    (ours, *_), (theirs, *_) = matrices(), matrices()
    for p in (ours, theirs):
        normalise_rows_(p.data)
    train(lambda p: Adam([{"params": p, "unit_rows": True}], lr=0.01, beta1=beta1, beta2=0.99, eps=1e-6), [ours])
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(beta1, 0.99), eps=1e-6)

    class Constrained:
        param_groups = reference.param_groups

        def step(self):
            theirs.grad -= (theirs.grad * theirs.data).sum(1, keepdim=True) * theirs.data
            reference.step()
            theirs.data /= theirs.data.norm(dim=1, keepdim=True)

    train(lambda p: Constrained(), [theirs])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(7))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_one_second_moment_a_row(beta1):
    """Torch's Adam, where every gradient of a row has the same size: the two rules agree."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = ([torch.nn.Parameter(torch.ones(6, 4)), torch.nn.Parameter(torch.ones(6, 4).T)] for _ in range(2))
    optimizers = (Adam(ours, lr=0.01, beta1=beta1, beta2=0.99, eps=1e-6, second_moment="row"),
                  torch.optim.Adam(theirs, lr=0.01, betas=(beta1, 0.99), eps=1e-6))
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            signs = torch.randint(2, (6, 4), generator=generator) * 2.0 - 1
            grad = signs * torch.rand(6, 1, generator=generator)
            a.grad = grad if a.shape == (6, 4) else grad.T
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert optimizers[0].state[a]["exp_avg_sq"].shape == (6, 1)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_form_for_cuda_is_the_same(beta1, unit_rows, by_row):
    generator = torch.Generator().manual_seed(2)
    weight, grad, first, second = (torch.randn(6, 4, generator=generator) for _ in range(4))
    normalise_rows_(weight)
    ours = torch.nn.Parameter(weight.clone())
    ours.grad = grad.clone()
    if by_row:
        second = second[:, :1].clone()
    optimizer = Adam([{"params": [ours], "unit_rows": unit_rows}], lr=0.02, beta1=beta1, beta2=0.9, eps=1e-4,
                     second_moment="row" if by_row else "element")
    optimizer.state[ours] = {"step": 3, "exp_avg_sq": second.square(), **({"exp_avg": first.clone()} if beta1 else {})}
    optimizer.step()
    numbers = torch.tensor([0.02 / (1 - beta1**4), beta1, 0.9, (1 - 0.9**4) ** -0.5, 1e-4])
    adam_reference_(weight, grad, first if beta1 else None, second.square_(), numbers, unit_rows=unit_rows)
    torch.testing.assert_close(ours.data, weight)
    torch.testing.assert_close(optimizer.state[ours]["exp_avg_sq"], second)


@pytest.mark.parametrize("device_type", ["xpu", "cuda"])
def test_what_is_handed_to_the_form_of_other_devices(device_type, monkeypatch):
    """On the CPU's tensors: the same as the CPU's own step."""
    monkeypatch.setattr(adam, "_compiled", lambda: adam_reference_)
    tensors, numbers = [], {"step_size": 0.03, "beta1": 0.9, "beta2": 0.99, "scale": 1.5, "eps": 1e-4}
    for name in ("cpu", device_type):
        generator = torch.Generator().manual_seed(2)
        weight, grad, first, second = (torch.randn(6, 4, generator=generator) for _ in range(4))
        normalise_rows_(weight)
        tensors.append((weight, grad, first, second.square_()))
        adam._step_on(name)(*tensors[-1], **numbers, unit_rows=True)
    for a, b in zip(*tensors, strict=True):
        torch.testing.assert_close(a, b)


def test_cuda_alone_compiles(monkeypatch):
    monkeypatch.setattr(adam, "_compiled", lambda: pytest.fail("compiled"))
    adam._step_on("xpu")
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        adam._step_on("cuda")


def test_each_element_has_its_own_second_moment_unless_asked():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Adam([parameter], lr=0.01, beta1=0.0, beta2=0.9, eps=1e-8)
    assert optimizer.param_groups[0]["second_moment"] == "element"
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg_sq"].shape == (3, 2)


def test_state_survives_saving(tmp_path):
    whole, halves = matrices(), matrices()
    make = lambda p: Adam(p, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-6)  # noqa: E731
    train(make, whole, steps=4)
    optimizer = train(make, halves, steps=4)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    again = make(halves)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for p in halves:
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(again.state[p][key]), torch.as_tensor(value))
    assert again.state[halves[1]]["exp_avg"].T.is_contiguous()
