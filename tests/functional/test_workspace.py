import torch

from sae_zoo.functional import workspace

SHAPE = (512, 1024)  # 2 MB
LIKE = torch.empty(0)


def take(fill):
    return workspace.empty(*SHAPE, like=LIKE).fill_(fill)


def test_memory_is_used_again_only_when_no_tensor_is_on_it():
    first = take(1)
    address = first.data_ptr()
    view = first.T[3:5]
    del first
    other = take(2)
    assert other.data_ptr() != address and (view == 1).all(), "a view of it was still alive"
    del view
    assert take(3).data_ptr() == address
    assert (other == 2).all()


def test_a_gradient_that_is_kept_is_not_overwritten():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return workspace.empty(*grad.shape, like=grad).copy_(2 * grad)

    x = torch.ones(SHAPE, requires_grad=True)
    Double.apply(x).sum().backward()
    kept = x.grad
    Double.apply(x).sum().backward()  # adds to it
    x.grad = None
    Double.apply(x).sum().backward()
    assert (kept == 4).all() and (x.grad == 2).all()


def test_shape_alignment_and_small_or_other_types():
    x = workspace.empty(3, 1 << 20, like=LIKE, dtype=torch.float64)
    assert x.shape == (3, 1 << 20) and x.dtype is torch.float64 and x.is_contiguous() and x.data_ptr() % 64 == 0
    n = len(workspace._buffers)
    assert workspace.empty(3, like=LIKE).shape == (3,) and workspace.empty(0, 5, like=LIKE).numel() == 0
    assert workspace.empty(*SHAPE, like=torch.empty(0, device="meta")).is_meta
    assert len(workspace._buffers) == n, "nothing of this needs a buffer"


def test_what_lies_free_for_long_is_given_back():
    workspace.empty(7, 1 << 20, like=LIKE)
    size = 7 * 4 << 20
    assert any(b.memory.nbytes > size for b in workspace._buffers)
    for _ in range(workspace._PATIENCE + 1):
        take(0)
    assert not any(b.memory.nbytes > size for b in workspace._buffers)
