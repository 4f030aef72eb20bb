"""The benchmarks of speed, on shapes so small that only their bookkeeping is tested, never a time."""

import argparse
import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.step import Trainee, add_arguments, least_bytes, peak_bytes, synthetic
from sae_zoo.saes import variants

SHAPE = "16,64,128,6"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_step(capsys, tmp_path):
    main(["step", "--shape", SHAPE, "--variants", "jumprelu,matryoshka", "--rounds", "3", "--threads", "1",
          "--peers-dir", str(tmp_path), "--json"])
    result = last_line(capsys)
    assert result["shape"] == [16, 64, 128, 6] and result["encoder_gemm_ms"] > 0
    assert set(result["variants"]) == {"jumprelu", "matryoshka"}
    for r in result["variants"].values():
        assert r["ms"] > 0 and r["ratio"] > 0 and r["dense_ms"] > 0 and r["l0"] == pytest.approx(6, rel=0.35)
        assert set(r["phases_ms"]) == {"forward", "backward", "optimiser", "counters"}
    assert result["peers"].keys() == {"sae-lens", "dictionary-learning", "eai-sparsify"}
    assert all("not installed" in peer["absent"] for peer in result["peers"].values())


def test_scaling_and_whole_runs(capsys):
    main(["scaling", "--d-in", "16", "--batch", "64", "--d-sae", "64,128", "--l0", "4,8", "--rounds", "1", "--variants",
          "topk", "--json"])
    result = last_line(capsys)
    assert len(result["rows"]) == 4 and set(result["exponents"]) == {"topk"}
    main(["whole", "--shape", SHAPE, "--variants", "gated,topk", "--steps", "30", "--json"])
    result = last_line(capsys)
    assert set(result["variants"]) == {"gated", "topk"}
    assert all(r["seconds"] > 0 and r["ratio"] > 0 for r in result["variants"].values())


def test_memory_is_that_of_the_step():
    """Of weights and gradients, and of a batch only its share: nothing of batch x d_sae is kept."""
    wide, long = (peak_bytes("topk", shape, beta1=0.0) for shape in ((32, 65536, 1024, 4), (32, 65536, 2048, 4)))
    if wide is None:
        pytest.skip("this system does not tell the memory of a process")
    assert wide > 2 * 4 * 2 * 32 * 65536
    assert long - wide < 0.25 * 4 * 1024 * 65536


def test_all_variants_are_compared_unless_some_are_named(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args([]).variants == variants() and parser.parse_args(["--variants=topk"]).variants == ["topk"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--variants=topk,banana"])
    assert "'banana' is no variant; choose from batchtopk, " in capsys.readouterr().err


def test_least_bytes_by_hand():
    for beta1, moments in ((0.0, 0), (0.9, 2 * 4 * 8 + 8 + 4)):
        trainee = Trainee("topk", 8, 2, synthetic(16, 4), beta1=beta1)
        trainee.step()
        # Parameters and gradients, one second moment for each row of the matrices and each bias, the batch.
        assert least_bytes(trainee) == 4 * (2 * (2 * 4 * 8 + 8 + 4) + (8 + 8 + 8 + 4) + moments + 16 * 4)


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "0,1,1,1", "4,8,2,9"])
def test_bad_shapes(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["step", "--shape", text])
    assert stopped.value.code == 2
    assert "give four whole numbers" in (error := capsys.readouterr().err) or "at most D_SAE = 8" in error
