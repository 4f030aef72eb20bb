import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae_zoo.data.array_file import FileActivations

ROWS = torch.randn(103, 6, generator=torch.Generator().manual_seed(0))


def save(file, rows):
    if file.suffix == ".npy":
        np.save(file, rows.numpy())
    elif file.suffix == ".pt":
        torch.save(rows, file)
    else:
        save_file({"acts": rows.contiguous()}, file)
    return str(file)


def all_rows(data):
    return torch.cat([data.rows(split, 0, data.n_rows(split)) for split in ("train", "validation", "test")])


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_reads_every_format(tmp_path, suffix, dtype):
    if suffix == ".npy" and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    rows = ROWS.to(dtype)
    data = FileActivations(save(tmp_path / f"a{suffix}", rows))
    assert (data.d_in, data.n_rows("train"), data.n_rows("validation"), data.n_rows("test")) == (6, 93, 5, 5)
    assert all_rows(data).dtype == torch.float32
    assert torch.equal(all_rows(data), rows.float())
    by_hand = sum(float(value) ** 2 for row in rows[:93].float().tolist() for value in row) / 93
    assert data.mean_squared_norm == pytest.approx(by_hand, rel=1e-12)
    (batch,) = data.batches("train", 93, n_batches=1, seed=0)
    assert batch.dtype == torch.float32
    assert sorted(batch.tolist()) == sorted(rows[:93].float().tolist()) != batch.tolist()


def test_fortran_order_and_named_tensors(tmp_path):
    np.save(tmp_path / "f.npy", np.asfortranarray(ROWS.numpy()))
    assert torch.equal(all_rows(FileActivations(str(tmp_path / "f.npy"))), ROWS)
    save_file({"mlp": ROWS, "attention": ROWS + 1}, tmp_path / "two.safetensors")
    assert torch.equal(all_rows(FileActivations(f"{tmp_path}/two.safetensors::attention")), ROWS + 1)
    with pytest.raises(ValueError, match=r"holds 2 tensors .*choose one by .*two\.safetensors::name"):
        FileActivations(str(tmp_path / "two.safetensors"))
    with pytest.raises(ValueError, match="no tensor 'resid'; it has"):
        FileActivations(f"{tmp_path}/two.safetensors::resid")


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 60), fraction=st.floats(0.02, 0.98))
def test_splits_are_a_partition_in_order(tmp_path_factory, n, fraction):
    rows = torch.arange(n * 2.0).reshape(n, 2)
    path = save(tmp_path_factory.mktemp("x") / "a.npy", rows)
    if not 2 <= round(n * fraction) < n:
        with pytest.raises(ValueError, match="too few rows"):
            FileActivations(path, heldout_fraction=fraction)
        return
    data = FileActivations(path, heldout_fraction=fraction)
    assert torch.equal(all_rows(data), rows)
    assert data.n_rows("validation") + data.n_rows("test") == round(n * fraction)
    assert 0 <= data.n_rows("test") - data.n_rows("validation") <= 1


def test_a_second_file_is_held_out(tmp_path):
    train, held_out = save(tmp_path / "a.npy", ROWS), save(tmp_path / "b.pt", ROWS[:9] + 5)
    data = FileActivations(train, heldout_path=held_out)
    assert torch.equal(data.rows("train", 0, 103), ROWS)
    assert torch.equal(data.rows("validation", 0, 4), ROWS[:4] + 5)
    assert torch.equal(data.rows("test", 0, 5), ROWS[4:9] + 5)
    assert data.mean_squared_norm == pytest.approx(float(ROWS.double().square().sum()) / 103)
    with pytest.raises(ValueError, match=r"rows of 2 numbers, .*a\.npy of 6"):
        FileActivations(train, heldout_path=save(tmp_path / "c.npy", ROWS[:, :2].contiguous()))
    bad = ROWS.clone()
    bad[7, 0] = torch.nan
    with pytest.raises(ValueError, match=r"d\.npy holds NaN or inf .*row 7;"):
        FileActivations(train, heldout_path=save(tmp_path / "d.npy", bad))


def test_data_id_is_of_the_content_and_the_split(tmp_path):
    one, same = save(tmp_path / "a.npy", ROWS), save(tmp_path / "elsewhere.npy", ROWS)
    other = save(tmp_path / "b.npy", ROWS + 1)
    data_id = FileActivations(one).data_id
    assert data_id == FileActivations(same).data_id
    assert len({data_id, FileActivations(other).data_id, FileActivations(one, heldout_fraction=0.2).data_id,
                FileActivations(one, heldout_path=same).data_id}) == 4


@settings(max_examples=20, deadline=None)
@given(batch_size=st.integers(1, 93), seed=st.integers(0, 3), step=st.integers(0, 400))
def test_a_batch_is_a_pure_function_of_the_step(tmp_path_factory, batch_size, seed, step):
    data = FileActivations(save(tmp_path_factory.mktemp("x") / "a.npy", ROWS))
    n_batches = 93 * 3 // batch_size
    step = step % n_batches
    whole = list(data.batches("train", batch_size, n_batches=n_batches, seed=seed))
    rest = list(data.batches("train", batch_size, n_batches=n_batches, seed=seed, start=step))
    assert len(whole) == n_batches and all(map(torch.equal, rest, whole[step:])) and len(rest) == n_batches - step
    first_pass = torch.cat(whole)[:93]
    if len(first_pass) == 93:
        assert sorted(first_pass.tolist()) == sorted(ROWS[:93].tolist())


def test_passes_and_seeds_differ_and_ranks_share(tmp_path):
    data = FileActivations(save(tmp_path / "a.npy", ROWS))
    first, second = data.batches("train", 93, n_batches=2, seed=0)
    (other,) = data.batches("train", 93, n_batches=1, seed=1)
    assert not torch.equal(first, second) and not torch.equal(first, other)
    ranks = [data.batches("train", 40, n_batches=7, seed=0, rank=rank, world_size=2) for rank in range(2)]
    for parts, whole in zip(zip(*ranks, strict=True), data.batches("train", 40, n_batches=7, seed=0), strict=True):
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("row", [0, 50, 93, 102])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_first_row_that_is_not_finite_is_named(tmp_path, monkeypatch, row, bad):
    monkeypatch.setattr("sae_zoo.data.array_file._CHUNK_BYTES", 6 * 4 * 7)  # seven rows at a time
    rows = ROWS.double()
    rows[row, 3] = rows[102, 0] = bad
    with pytest.raises(ValueError, match=rf"a.npy holds NaN or inf \(as float32\), first in row {row};"):
        FileActivations(save(tmp_path / "a.npy", rows))


def write(content):
    return lambda file: file.write_bytes(content)


@pytest.mark.parametrize("name, make, message", [
    ("a.npy", lambda f: save(f, ROWS.int()), "holds int32 of shape"),
    ("a.npy", lambda f: save(f, ROWS[0]), r"float32 of shape \(6,\); a two-dimensional float array"),
    ("a.npy", lambda f: save(f, ROWS[None]), r"of shape \(1, 103, 6\)"),
    ("a.npy", lambda f: save(f, ROWS[:0]), r"of shape \(0, 6\); it is empty"),
    ("a.npy", lambda f: save(f, ROWS[:3]), "too few rows: train|too few rows: validation"),
    ("a.npy", lambda f: np.save(f, np.array([{}, {}])), "cannot be read as .npy"),
    ("a.npy", lambda f: np.save(f, ROWS.numpy().astype(">f4")), "cannot be read as .npy"),
    ("a.npy", lambda f: np.save(f, ROWS.numpy().astype(complex)), "holds complex"),
    ("a.npy", write(b"\x93NUMPY garbage"), "cannot be read as .npy"),
    ("a.safetensors", write(b"garbage garbage garbage"), "cannot be read as .safetensors"),
    ("a.safetensors", lambda f: save_file({}, f), "holds 0 tensors"),
    ("a.pt", write(b"garbage garbage garbage"), "cannot be read as .pt"),
    ("a.pt", lambda f: torch.save({"acts": ROWS}, f), "holds a dict; save the tensor alone"),
    ("a.pt", lambda f: torch.save(torch.nn.Linear(2, 2), f), "cannot be read as .pt"),
    ("a.npz", write(b""), "ends in '.npz'; activation files end in .npy, .safetensors, .pt"),
    ("a.npy", lambda f: None, "does not exist"),
    ("a.npy", lambda f: f.mkdir(), "does not exist"),
])
def test_bad_files_get_one_clear_line(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        FileActivations(str(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_truncated_files(tmp_path):
    for suffix in (".npy", ".safetensors", ".pt"):
        file = tmp_path / f"a{suffix}"
        save(file, ROWS)
        file.write_bytes(file.read_bytes()[:-300])
        with pytest.raises(ValueError, match=f"cannot be read as {suffix}"):
            FileActivations(str(file))


def test_bad_requests(tmp_path):
    path = save(tmp_path / "a.npy", ROWS)
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"heldout_fraction is {fraction}; it must be between 0 and 1"):
            FileActivations(path, heldout_fraction=fraction)
    with pytest.raises(ValueError, match=r"only a \.safetensors file has named tensors; leave ::x out"):
        FileActivations(path + "::x")
    data = FileActivations(path)
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        data.rows("dev", 0, 1)
    with pytest.raises(ValueError, match="rows 90 to 94 of train were asked for; it has 93"):
        data.rows("train", 90, 94)
    with pytest.raises(ValueError, match="batch_size is 94"):
        data.batches("train", 94, n_batches=1, seed=0)


MEASURE = """
import sys, torch
from sae_zoo.data import array_file

def anonymous_megabytes():
    return int([line for line in open("/proc/self/status") if line.startswith("RssAnon")][0].split()[1]) / 1024

torch.set_num_threads(1)
array_file._CHUNK_BYTES = 1 << 20
before = anonymous_megabytes()
kept = []
for path in sys.argv[1:]:
    data = array_file.FileActivations(path)
    kept += [data, *data.batches("train", 64, n_batches=3, seed=0)]
    print(anonymous_megabytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_files_are_mapped_not_loaded(tmp_path):
    paths = [save(tmp_path / f"a{suffix}", torch.ones(16_384, 1024)) for suffix in (".npy", ".safetensors", ".pt")]
    ran = subprocess.run([sys.executable, "-c", MEASURE, *paths], check=True, capture_output=True, text=True)
    assert max(map(float, ran.stdout.split())) < 40  # each file has 64, what is at work on it up to 20
