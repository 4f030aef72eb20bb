import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")
@pytest.mark.parametrize("kind", ["train", "harvest", "pretrain"])
def test_one_kill(kind):
    """Many more by hand: python -m benchmarks kills."""
    done = subprocess.run([sys.executable, "-m", "benchmarks", "kills", kind, "--kills", "1"], text=True, capture_output=True,
                          cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kind}: 1 kills in" in done.stdout and " 0 failed, 0 files differ" in done.stdout
