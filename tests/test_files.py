import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from sae_zoo.files import locked, replacing, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path, error):
    file = tmp_path / "new" / "a.txt"
    write_text(file, "old é")

    def fails():
        with replacing(file) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        fails()
    assert names(file.parent) == ["a.txt"] and file.read_text(encoding="utf-8") == "old é"
    write_text(file, "new")
    assert names(file.parent) == ["a.txt"] and file.read_text() == "new"


def test_until_the_block_ends_the_old_file_is_there(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with replacing(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old" and temporary.parent == tmp_path
    assert file.read_text() == "new"


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b"0123" * 100_000),
                                   lambda path: save_file({"a": torch.zeros(100_000)}, path)],
                         ids=["bytes", "tensors"])
def test_a_full_disk_is_one_line_and_costs_nothing(small_disk, write):
    disk = small_disk(200_000)
    write_text(disk / "a", "old")
    with pytest.raises(OSError, match=r"a cannot be written: .*[Nn]o space left on device") as error, \
            replacing(disk / "a") as temporary:
        write(temporary)
    assert "\n" not in str(error.value)
    assert names(disk) == ["a"] and (disk / "a").read_text() == "old"


HOLD = """
import sys
from pathlib import Path
from sae_zoo.files import locked
with locked(Path(sys.argv[1]), "at it"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_dies_with_its_holder(tmp_path, caplog):
    lock = tmp_path / "new" / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    started = time.monotonic()
    with caplog.at_level("INFO"), locked(lock, "training"):
        assert time.monotonic() - started < 5
    assert "waiting" not in caplog.text
