"""The Triton kernels, without a GPU: the `check_*` functions below compare them with dense oracles in Triton's
interpreter, and `compiling_*` puts each through the compiler. Both run in processes of their own, because Triton looks
at its environment when it is imported.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_apart(functions, **environment):
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider",
               "-o", f"python_functions={functions}_"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@needs_triton
def test_in_the_interpreter():
    run_apart("check", TRITON_INTERPRET="1")


@needs_triton
def test_compiler_takes_the_kernels(tmp_path):
    run_apart("compiling", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_nothing_imports_the_kernels_before_it_needs_them():
    for path in ROOT.glob("sae_zoo/**/*.py"):
        for node in ast.parse(path.read_text()).body:  # imports inside functions are further down
            if isinstance(node, ast.Import | ast.ImportFrom) and path.stem != "cuda_kernels":
                names = ast.unparse(node).replace(".", " ").split()
                assert not {"triton_kernels", "cuda_kernels"} & set(names), path


# In the interpreter.


@pytest.fixture
def kernels():
    from sae_zoo.functional import triton_kernels

    return triton_kernels


def entries(lengths, n, generator):
    """Random row numbers and weights of bags of these lengths."""
    total = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    return torch.randint(n, (total,), generator=generator), offsets, torch.randn(total, generator=generator)


def bag_matrix(ids, offsets, weights, n):
    """[n_bags, n] float64: the matrix S of which a bag sum is the product with another."""
    dense = [[0.0] * n for _ in offsets[1:]]
    for bag, row in enumerate(dense):
        for e in range(offsets[bag], offsets[bag + 1]):
            row[int(ids[e])] += float(weights[e])
    return torch.tensor(dense, dtype=torch.float64).view(-1, n)


BAGS = {
    "no bags": [],
    "all empty": [0, 0, 0],
    "some empty": [0, 3, 0, 9, 1, 0],
    "one giant": [300],
    "as long as pieces": [0, 128, 2, 129, 0, 256, 257],
    "nine pieces of one among short ones": [2] * 3 + [1100] + [1] * 3,
}


@pytest.mark.parametrize("lengths", BAGS.values(), ids=BAGS)
def check_bag_sum(kernels, generator, lengths):
    ids, offsets, weights = entries(lengths, 50, generator)
    matrix = torch.randn(50, 100, generator=generator)
    out = kernels.bag_sum(ids, offsets, weights, matrix)
    expected = bag_matrix(ids, offsets, weights, 50) @ matrix.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("d", [1, 384, 640, 2304, 3584])
def check_bag_sum_of_any_width(kernels, generator, d):
    ids, offsets, weights = entries([3, 0, 130], 7, generator)
    matrix = torch.randn(7, d, generator=generator)
    out = kernels.bag_sum(ids.int(), offsets, weights, matrix)
    expected = bag_matrix(ids, offsets, weights, 7) @ matrix.double()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def check_bag_sum_adds_bfloat16_in_float32(kernels, generator):
    ids, offsets, weights = entries([0, 150, 5], 20, generator)
    matrix = torch.randn(20, 100, generator=generator).bfloat16()
    expected = bag_matrix(ids, offsets, weights, 20) @ matrix.double()
    wide = kernels.bag_sum(ids, offsets, weights, matrix, out_dtype=torch.float32)
    torch.testing.assert_close(wide.double(), expected, rtol=1e-5, atol=1e-4)
    narrow = kernels.bag_sum(ids, offsets, weights, matrix)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, rtol=2**-7, atol=1e-4)  # the interpreter cuts, not rounds


def check_bag_sum_ignores_rows_of_no_bag(kernels):
    matrix = torch.tensor([[1.0, 2], [float("nan"), float("inf")]])
    out = kernels.bag_sum(torch.tensor([0]), torch.tensor([0, 1, 1]), torch.tensor([3.0]), matrix)
    assert out.tolist() == [[3, 6], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 100, 384, 2304])
@pytest.mark.parametrize("n_active", [0, 37])
def check_sampled_dot(kernels, generator, dtype, d, n_active):
    dense, weight = (torch.randn(rows, d, generator=generator).to(dtype) for rows in (9, 30))
    rows = torch.randint(9, (n_active,), generator=generator).sort().values
    ids = torch.randint(30, (n_active,), generator=generator)
    expected = (dense.double() @ weight.double().T)[rows, ids]
    out = kernels.sampled_dot(rows, ids.int(), dense, weight)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def largest(pre_acts, k):
    """By sorting a list: the k largest, of equal ones the lower columns, in ascending order."""
    return [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]) for row in pre_acts.double().tolist()]


INF = float("inf")
ROWS = {
    "negative": lambda g: -torch.rand(1, 70, generator=g),
    "ties, two rows": lambda g: torch.randint(-2, 3, (2, 70), generator=g).float(),
    "all equal": lambda g: torch.full((1, 70), -0.5),
    "infinities": lambda g: torch.tensor([[-INF, 1, INF, -INF, INF, 0, -INF]]),
    "signed zeros": lambda g: torch.tensor([[-0.0, 0.0, -0.0, -1, 0.0, -0.0, 1e-45, -1e-45]]),
    "one column": lambda g: torch.randn(1, 1, generator=g),
}


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
def check_topk_at_its_corners(kernels, generator, make):
    pre_acts = make(generator)
    n = pre_acts.shape[1]
    for k in sorted({1, min(4, n), n}):
        indices = kernels.topk_indices(pre_acts, k)
        assert indices.dtype == torch.int64 and indices.tolist() == largest(pre_acts, k)


LONG_ROWS = {
    "normal": lambda g: torch.randn(1, 5000, generator=g),
    "bfloat16": lambda g: torch.randn(1, 5000, generator=g).bfloat16(),
    "ties": lambda g: torch.randint(-3, 4, (1, 5000), generator=g).float(),
    "all equal": lambda g: torch.full((1, 5000), -INF),
    "ascending": lambda g: torch.arange(5000.0).view(1, -1),
    # The largest are in few of the groups (columns 2,048 apart) that the search starts from: most candidates.
    "in few groups": lambda g: torch.randn(1, 9 * 2048, generator=g) + 10 * (torch.arange(9 * 2048) % 2048 < 32),
}


@pytest.mark.parametrize("make", LONG_ROWS.values(), ids=LONG_ROWS)
def check_topk_of_several_blocks(kernels, generator, make):
    pre_acts = make(generator)
    assert kernels.topk_indices(pre_acts, 33).tolist() == largest(pre_acts, 33)


@pytest.mark.parametrize("k", [2048, 2049])
def check_topk_of_more_than_there_are_groups(kernels, generator, k):
    pre_acts = torch.randint(-500, 500, (1, 2100), generator=generator).float()
    assert kernels.topk_indices(pre_acts, k).tolist() == largest(pre_acts, k)


def check_topk_is_exactly_k_whatever_the_values(kernels):
    pre_acts = torch.tensor([[float("nan"), 1, -1, -float("nan"), INF, 0]])
    for k in (1, 5):
        (indices,) = kernels.topk_indices(pre_acts, k).tolist()
        assert len(set(indices)) == k and set(indices) <= set(range(6))


def check_selection_of_no_rows(kernels):
    assert kernels.topk_indices(torch.zeros(0, 5), 2).shape == (0, 2)
    counts, latent_ids, values = kernels.select_above(torch.zeros(0, 5), 0.0)
    assert (len(counts), len(latent_ids), len(values)) == (0, 0, 0)


@pytest.mark.parametrize("n, dtype", [(1, torch.float32), (100, torch.bfloat16), (5000, torch.float32)])
@pytest.mark.parametrize("bound", ["none above", "all above", "number", "number on a value", "per latent"])
def check_select_above(kernels, generator, n, dtype, bound):
    pre_acts = torch.randn(3, n, generator=generator).to(dtype)
    pre_acts[1, 0] = -INF
    bound = {
        "none above": 1e9,
        "all above": torch.where(pre_acts.min(0).values.isinf(), -INF, -1e9).float(),
        "number": 0.5,
        "number on a value": float(pre_acts[0, 0]),
        "per latent": torch.randn(n, generator=generator),
    }[bound]
    counts, latent_ids, values = kernels.select_above(pre_acts, bound)
    above = pre_acts.float() > bound
    assert counts.dtype == latent_ids.dtype == torch.int64 and values.dtype == torch.float32
    assert counts.tolist() == above.sum(1).tolist()
    assert latent_ids.tolist() == above.nonzero()[:, 1].tolist()
    assert values.tolist() == pre_acts.float()[above].tolist()


def check_bounds_are_compared_in_float32(kernels):
    """1 + 2^-12 is 1 in bfloat16."""
    pre_acts = torch.tensor([[1.0, 1.0]]).bfloat16()
    _, latent_ids, _ = kernels.select_above(pre_acts, torch.tensor([1 + 2**-12, 1 - 2**-12]))
    assert latent_ids.tolist() == [1]


def check_nan_exceeds_nothing(kernels):
    counts, _, _ = kernels.select_above(torch.full((2, 3), float("nan")), -INF)
    assert counts.tolist() == [0, 0]


def check_errors_say_what_to_do(kernels):
    ids, offsets = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2])
    weights, matrix = torch.ones(2), torch.ones(3, 4)
    for call, message in {
        lambda: kernels.bag_sum(ids.float(), offsets, weights, matrix): "ids is torch.float32.*int64 or int32",
        lambda: kernels.bag_sum(ids, offsets.int(), weights, matrix): "offsets is torch.int32",
        lambda: kernels.bag_sum(ids, offsets, weights.double(), matrix): "weights is torch.float64",
        lambda: kernels.bag_sum(ids, offsets, weights[:1], matrix): "len.ids. is 2 and len.weights. is 1",
        lambda: kernels.bag_sum(ids, offsets, weights, matrix.T): "matrix.*strides.*contiguous",
        lambda: kernels.bag_sum(ids, offsets, weights, matrix, out_dtype=torch.float16): "out_dtype is torch.float16",
        lambda: kernels.sampled_dot(ids, ids[:1], matrix, matrix): "len.rows. is 2 and len.ids. is 1",
        lambda: kernels.sampled_dot(ids, ids, matrix, matrix[:, :2].contiguous()): "they must be equal",
        lambda: kernels.topk_indices(matrix, 0): "k is 0; it must be from 1 to n = 4",
        lambda: kernels.topk_indices(matrix, 5): "k is 5; it must be from 1 to n = 4",
        lambda: kernels.topk_indices(matrix.double(), 1): "pre_acts is torch.float64",
        lambda: kernels.select_above(matrix, torch.ones(3)): "len.bound. is 3",
        lambda: kernels.select_above(matrix, torch.ones(4).double()): "bound is torch.float64",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# Through the compiler, for an H100 or H200. It takes less than the interpreter does.


def compile_for_hopper(kernel, num_warps=4, **arguments):
    """``arguments``, in the kernel's order: types of those passed at run time, values of those it is compiled for."""
    import triton
    from triton.backends.compiler import GPUTarget

    assert list(arguments) == kernel.arg_names
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else kind for name, kind in arguments.items()}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def compiling_every_kernel(kernels):
    kind = "*bf16"  # float32 takes the same way without the conversions
    bag = {"ids": "*i64", "offsets": "*i64", "weights": "*fp32", "matrix": kind}
    width = {"d": "i32", "BLOCK_D": 128}
    piece = {"owner": "*i64", "first_piece": "*i64"}
    row = {"n": "i32", "k": "i32", "capacity": "i32"}
    found = {"pre_acts": kind, "candidates": "*i32", "n_candidates": "*i32"}
    compiled = [
        compile_for_hopper(kernels._sum_short_bags, **bag, out=kind, **width),
        compile_for_hopper(kernels._sum_pieces, **bag, **piece, partial="*fp32", n_bags="i32", **width),
        compile_for_hopper(kernels._sum_long_bags, **piece, pieces="*i64", partial="*fp32", out=kind, n_bags="i32",
                           **width),
        compile_for_hopper(kernels._dot_entries, rows="*i64", ids="*i64", dense=kind, weight=kind, out="*fp32",
                           n_entries="i32", **width),
        compile_for_hopper(kernels._find_candidates, num_warps=8, **found, **row),
        compile_for_hopper(kernels._keep_largest, **found, indices="*i64", **row),
        # Triton compiles for the value of an argument that is 1.
        compile_for_hopper(kernels._keep_largest, **found, indices="*i64", **row | {"k": 1, "capacity": 1}),
    ]
    for per_latent, bound in ((True, "*fp32"), (False, "fp32")):
        above, rest = {"pre_acts": kind, "bound": bound}, {"n": "i32", "PER_LATENT": per_latent}
        compiled += [
            compile_for_hopper(kernels._count_above, num_warps=8, **above, counts="*i32", **rest),
            compile_for_hopper(kernels._write_above, num_warps=8, **above, offsets="*i64", latent_ids="*i64",
                               out="*fp32", **rest),
        ]
    assert all(kernel.asm["cubin"] and "atom" not in kernel.asm["ptx"] for kernel in compiled)


# The whole step on the interface that the CPU's kernels have too.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["jumprelu", "topk", "topk sae.recall=0.5", "gated", "relu"])
def check_training_step_equals_the_cpus(name, dtype, monkeypatch):
    from sae_zoo.config import compose_config
    from sae_zoo.functional import cpu_kernels, cuda_kernels, selection, sparse_code
    from sae_zoo.running.settings import TrainSettings

    x = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
    settings = TrainSettings.of(compose_config("train", [*f"sae={name}".split(), "d_sae=40", "l0_target=4"]))
    sae = settings.sae(d_in=12, input_scale=3.0)
    sae.initialise(x)
    gradients = {}
    for kernels in (cpu_kernels, cuda_kernels):
        for module in (selection, sparse_code):
            monkeypatch.setattr(module, "kernels_for", lambda tensor, kernels=kernels: kernels)
        sae.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = sae.loss(x, sparse=True)
        loss.total.backward()
        gradients[kernels] = [p.grad for p in sae.parameters()]
        assert all(g.dtype is torch.float32 for g in gradients[kernels])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
