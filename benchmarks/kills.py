"""``python -m benchmarks kills train | harvest | pretrain``: kill an entry point with SIGKILL at random moments, start
it again, and compare what it ends with.

The same command is started in the same folder until it ends by itself; then every file of the result is compared with
that of a run that was never killed, and the next round begins in a new folder, until as many processes as asked for
have been killed. Moments are uniform over the whole of a run; one process in ten starts from nothing, imports included,
the others are forked from one that has imported everything. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_WORDS = ["def", "class", "return", "import", "self", "value", "index", "for", "while", "with", "lambda", "yield",
          "raise", "except", "finally", "assert"]
_SMALL_LM = ("+architecture={model_type: gpt2, n_embd: 32, n_inner: 48, n_layer: 2, n_head: 2, resid_pdrop: 0.1, "
             "embd_pdrop: 0.1, attn_pdrop: 0.1}")  # with dropout: the random state has to survive as well
_TOKENS = "data.n_tokens={train: 6000, validation: 2000, test: 2000}"
COMMANDS = {
    "train": ["l0_target=10", _TOKENS, "d_sae=256", "recipe.n_steps=400", "recipe.batch_size=256",
              "evaluation.n_lm_tokens=512", "trainer.progress_bar=false", "trainer.checkpoint_every=20",
              "trainer.validation_every=30", "trainer.log_every_n_steps=3", "sweep=s", "output_dir=out"],
    "harvest": ["layers=[1,3]", "sites=[residual,attention]", _TOKENS, "data.rows_per_shard=500", "progress_bar=false",
                "output_dir=out"],
    "pretrain": ["corpus=text_files", "corpus.paths=../text", "vocab_size=300", "context_size=32", "batch_size=4",
                 "n_steps=200", "checkpoint_every=10", "warmup_steps=5", "precision=32-true", "progress_bar=false",
                 "name=tiny", "output_dir=out", "~architecture", _SMALL_LM],
}
_TIMES = ("seconds", "seconds_training")  # of a record: the only keys that may differ


@dataclass
class Outcome:
    """Attributes: ``kills``, ``ended`` (runs that came to their end after kills), ``differ`` (what differed then),
    ``found`` (how many kills left which state), ``failed`` (output of runs that ended with an error).
    """

    kills: int = 0
    ended: int = 0
    differ: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    found: Counter = field(default_factory=Counter)


def _run_forked(kind: str, folder: Path, kill_after: float | None) -> int:
    """The entry point in a forked process; returns its exit status, -9 if it was killed."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            os.chdir(folder)
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            _in_child(kind)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()  # os._exit would leave no word of it
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return _wait(child, kill_after)


def _in_child(kind: str) -> None:
    import importlib

    from sae_zoo.data import cache_writer

    cache_writer._NOTE_SECONDS, cache_writer._BUFFER_BYTES = 0.0, 1 << 20  # as often in seconds as else in hours
    module = importlib.import_module(f"sae_zoo.{kind}")
    module.shutil = type("Kept", (), {"rmtree": staticmethod(lambda *_, **__: None)})  # checkpoints, to be compared
    sys.argv = [kind, *COMMANDS[kind]]
    module.main()


def _run_from_nothing(kind: str, folder: Path, kill_after: float) -> int:
    with open(folder / "output.txt", "a") as output:
        process = subprocess.Popen([sys.executable, "-m", f"sae_zoo.{kind}", *COMMANDS[kind]], stdout=output,
                                   stderr=output, cwd=folder, start_new_session=True,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    return _wait(process.pid, kill_after)


def _wait(process: int, kill_after: float | None) -> int:
    """The exit status of a process, which is killed when it has used ``kill_after`` seconds of processor time.

    Processor time, as how long a run takes depends on what else the machine does; and a little more of another kind, so
    that it is killed while it waits for the disk as well.
    """
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if kill_after is not None and _processor_seconds(process) > kill_after:
            time.sleep(random.uniform(0, 0.1))
            os.killpg(process, signal.SIGKILL)
            kill_after = None
        time.sleep(0.005)


def _processor_seconds(process: int) -> float:
    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def _files(folder: Path) -> dict[str, bytes]:
    """What a run has left, by name: bytes, of records without times, of checkpoints what is to go on with."""
    import torch

    found = {}
    for path in sorted((folder / "out").rglob("*")):
        name = path.relative_to(folder / "out").as_posix()
        if not path.is_file() or path.name.endswith(".lock"):
            continue
        content: object = path.read_bytes()
        if path.name == "record.json":
            content = {key: value for key, value in json.loads(content).items() if key not in _TIMES}
        elif path.suffix == ".ckpt":
            state = torch.load(path, weights_only=True)
            state.pop("loops")  # Lightning's own counters say how often it was started
            content = plain(state)
        found[name] = content
    return found


def plain(value: object) -> object:
    """``value`` with its tensors as bytes, so that == compares them to the bit."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _state(kind: str, folder: Path) -> str:
    """In a few words, what a killed process has left."""
    names = {path.name for path in (folder / "out").rglob("*")} if (folder / "out").exists() else set()
    if kind == "harvest":
        if not any(name.endswith(".partial") for name in names):
            return "only whole caches" if "manifest.json" in names else "nothing"
        return "shards of a part" if any(name.startswith("00000") for name in names) else "rows of a part"
    if names & {"record.json", "pretraining.json"}:
        return "all, with its record"
    steps = [int(name.split(".")[0]) for name in names if name.endswith(".ckpt")]
    if not steps:
        return "no checkpoint"
    return "a checkpoint after the last step" if f"steps={max(steps)}" in " ".join(COMMANDS[kind]) else "a checkpoint"


def _new_folder(kind: str, root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    if kind == "train" and name != "whole":  # its cache is harvested once
        (folder / "out").mkdir()
        shutil.copytree(root / "whole" / "out" / "cache", folder / "out" / "cache")
    return folder


def stress(kind: str, kills: int, root: Path, seed: int = 0, from_nothing: float = 0.1) -> Outcome:
    """Kill ``kind`` (of :data:`COMMANDS`) ``kills`` times, below the empty folder ``root``.

    Args:
        from_nothing: share of the processes that are started by a command line of their own.
    """
    import sae_zoo.harvest  # what is forked has them
    import sae_zoo.pretrain
    import sae_zoo.train  # noqa: F401

    draw, outcome = random.Random(seed), Outcome()
    if kind == "pretrain":
        (root / "text").mkdir()
        for i in range(60):
            words = random.Random(i)
            (root / "text" / f"{i}.txt").write_text(" ".join(words.choice(_WORDS) for _ in range(150)))
    whole = _new_folder(kind, root, "whole")
    status = _run_forked(kind, whole, None)
    assert status == 0, (whole / "output.txt").read_text()
    expected = _files(whole)
    if kind == "train":
        shutil.rmtree(whole / "out" / "runs")
    timed = whole if kind == "train" else _new_folder(kind, root, "timed")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run_forked(kind, timed, None)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    duration = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # without a first run's harvest
    assert _files(timed) == expected, "two runs that were not killed differ"
    n_folders = 0
    while outcome.kills < kills:
        n_folders += 1
        folder = _new_folder(kind, root, str(n_folders))
        while True:
            if draw.random() < from_nothing:
                status = _run_from_nothing(kind, folder, draw.uniform(0, 3 * duration))
            else:
                status = _run_forked(kind, folder, draw.uniform(0, duration) if outcome.kills < kills else None)
            if status != -signal.SIGKILL:
                break
            outcome.kills += 1
            outcome.found[_state(kind, folder)] += 1
        if status:
            outcome.failed.append((folder / "output.txt").read_text()[-2000:])
            continue
        outcome.ended += 1
        found = _files(folder)
        for name in sorted(expected.keys() | found.keys()):
            removed = name.endswith(".ckpt") and name not in found  # by a process that was started from nothing
            if expected.get(name) != found.get(name) and not removed:
                outcome.differ.append(f"{folder.name}: {name}")
        shutil.rmtree(folder)
    return outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("kind", choices=COMMANDS)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints what it found and returns what ``--json`` shows.

    Raises:
        SystemExit: with status 1, if a run failed or ended with other bytes.
    """
    with tempfile.TemporaryDirectory() as root:
        started = time.monotonic()
        outcome = stress(args.kind, args.kills, Path(root), args.seed)
    found = ", ".join(f"{n} {what}" for what, n in outcome.found.most_common())
    print(f"{args.kind}: {outcome.kills} kills in {time.monotonic() - started:.0f} s, which left: {found}")
    print(f"{outcome.ended} runs came to their end, {len(outcome.failed)} failed, {len(outcome.differ)} files differ")
    if outcome.failed or outcome.differ:
        print("\n".join([*outcome.failed, *outcome.differ]))
        raise SystemExit(1)
    return {"kills": outcome.kills, "ended": outcome.ended, "found": outcome.found}
