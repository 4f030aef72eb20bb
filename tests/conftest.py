import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

torch.set_num_threads(1)  # the tensors of most tests are tiny
if "PYTEST_XDIST_WORKER" in os.environ:  # such a worker ignores Ctrl-C, and tests look at what it does
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take longest, the longest first: begun last, one of them would keep a single worker busy while the others
# wait.
_SLOW_FILES = ("running/test_devices.py", "test_train.py", "test_plan.py", "planning/test_sae.py",
               "benchmarks/test_step.py", "running/test_turns.py", "faults/test_train_faults.py",
               "functional/test_triton_kernels.py", "analysis/test_notebook.py", "benchmarks/test_kills.py",
               "analysis/test_paper.py", "test_experiments.py")


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(_SLOW_FILES)}
    here = Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(here).as_posix(), len(order)))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def enter(monkeypatch, capfd):
    """Runs an entry point's ``main`` in this process as a command line would; returns (exit status, stdout, stderr)."""

    def call(module, *arguments):
        from sae_zoo import train

        GlobalHydra.instance().clear()
        train._swept.clear()
        logging.getLogger().handlers.clear()
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        status = 0
        try:
            module.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many bytes and returns its folder; skips where mounting is not allowed."""
    mounted = []

    def mount(n_bytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system of a given size needs mount, and the right to use it")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
