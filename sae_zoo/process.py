"""First set-up of every process of ours, and its memory: the C library is kept from handing large buffers back.

glibc serves every buffer above 32 MB by a fresh mmap and gives it back when freed, so a training step that allocates
its activations anew pays for page faults each time; on a CPU these cost more than the arithmetic. Told not to, it
reuses the pages. No effect outside Linux with glibc.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import warnings

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def prepare_process() -> None:
    """Set up this process, first of all."""
    keep_freed_memory()
    # Lightning's advice and its own use of torch's internals: of no use to somebody who trains an SAE.
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def keep_freed_memory() -> None:
    """Make this process reuse freed memory instead of returning it to the system."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Return to the system what is free now, after work that needed more memory than what follows."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
