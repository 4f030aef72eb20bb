import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kills
from sae_zoo.config import compose_config


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")
def test_one_kill():
    """Many more, and of the other entry points, by hand: python -m benchmarks kills."""
    done = subprocess.run([sys.executable, "-m", "benchmarks", "kills", "train", "--kills", "1"], text=True,
                          capture_output=True, cwd=Path(__file__).parents[2],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: 1 kills in" in done.stdout and " 0 failed, 0 files differ" in done.stdout


@pytest.mark.parametrize("kind", kills.COMMANDS)
def test_the_commands_compose(kind):
    assert compose_config(kind, kills.COMMANDS[kind])["output_dir"] == "out"
