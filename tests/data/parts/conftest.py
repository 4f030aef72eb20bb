"""One cache harvested whole, and the same in three parts."""

import shutil
from functools import partial

import fsspec
import pytest

from sae_zoo.data.cache_parts import open_cache_or_parts
from sae_zoo.data.copies import Copies
from sae_zoo.data.corpus import TextFilesCorpus
from sae_zoo.data.existing import open_finished
from sae_zoo.data.harvesting import HarvestSpec, harvest
from sae_zoo.data.remote import RemoteFolder
from sae_zoo.lm.hooks import resolve_hook
from tests.data.parts.spec import SPEC


@pytest.fixture(scope="package")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"{i}: " + " ".join(f"word{(i * j) % 17} is {j}" for j in range(12)))
    return TextFilesCorpus(paths=str(folder))


@pytest.fixture(scope="package")
def make(corpus, tiny_gemma2, tmp_path_factory):
    """Harvests residual.1 of a tiny Gemma 2 into a folder; what is asked for overrides ``SPEC``."""
    lm = tiny_gemma2(corpus.root, tmp_path_factory.mktemp("lm"))
    hook = resolve_hook(lm.model, "auto", 1, "residual")

    def make(root, lm_name="tiny", text=corpus, **values):
        return harvest(lm, lm_name, [hook], text, HarvestSpec(**SPEC | values), root=root, batch_size=4,
                       progress_bar=False)[hook.name]

    make.lm, make.hook, make.finished = lm, hook, partial(open_finished, lm=lm, hook=hook, corpus=corpus)
    return make


@pytest.fixture(scope="package")
def whole(make, tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="package")
def folder(make, tmp_path_factory):
    """Of all three parts."""
    root = tmp_path_factory.mktemp("parts")
    for number in (2, 0, 1):
        make(root, part=[number, 3])
    return root


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the three parts that a test may change."""
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.fixture(params=["local", "memory"])
def merged(request, folder, tmp_path):
    if request.param == "local":
        yield open_cache_or_parts(folder)
        return
    memory = fsspec.filesystem("memory")
    for file in folder.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"memory://bucket/parts/{file.relative_to(folder).as_posix()}", file.read_bytes())
    yield open_cache_or_parts(RemoteFolder("memory://bucket/parts", Copies(tmp_path / "copies", 10**7)))
    memory.store.clear()
