"""Which part of a cache has what, and a run from machines that share no disk."""

import re
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from sae_zoo import evaluate, train
from sae_zoo import harvest as harvest_entry_point
from sae_zoo.config import compose_config
from sae_zoo.data.cache import make_cache_id
from sae_zoo.data.cache_parts import open_cache_or_parts
from sae_zoo.data.corpus import dealt_to, split_of
from sae_zoo.data.harvesting import identity_of
from sae_zoo.records import read_record
from sae_zoo.running.settings import CacheSettings, config_hash
from tests.data.parts.spec import HELD_OUT, SPEC


def documents_of(cache, split, tokenizer):
    """Texts that the token table of a split is made of."""
    documents, current = [], []
    for token in cache.tokens(split)[:, 1:].flatten().tolist():  # without BOS
        if token in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            documents.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    assert not current  # the last one ends, too
    return [text for text in documents if text]


def test_every_train_document_is_in_one_part_and_held_out_ones_are_in_all(make, corpus, whole, folder):
    parts = open_cache_or_parts(folder).parts
    tokenizer = make.lm.tokenizer
    texts = [Counter(documents_of(part, "train", tokenizer)) for part in parts]
    assert sum(texts, Counter()) == Counter(documents_of(whole, "train", tokenizer))
    assert sum(texts, Counter()) == Counter(document.text for document in corpus.documents("train"))
    assert all(texts)
    for number, part in enumerate(parts):
        assert part.manifest["identity"] == {**whole.manifest["identity"], "part": [number, 3]}
        for split in HELD_OUT:
            assert torch.equal(part.tokens(split), whole.tokens(split))
            assert torch.equal(part.rows(split, 0, part.n_rows(split)), whole.rows(split, 0, whole.n_rows(split)))


def test_documents_are_dealt_evenly_and_whatever_their_split():
    names = [f"folder/{i}.py" for i in range(20_000)]
    counts = Counter((split_of(name), dealt_to(name, 8)) for name in names)
    for split, share in {"train": 0.9, "validation": 0.05, "test": 0.05}.items():
        expected = share * len(names) / 8
        for number in range(8):
            assert abs(counts[split, number] - expected) < 5 * expected**0.5


def test_a_part_has_its_share_of_the_tokens_rounded_up(make, tmp_path):
    n_tokens = {**SPEC["n_tokens"], "train": 401}
    assert make(tmp_path, part=[1, 4], n_tokens=n_tokens).n_rows("train") == 101
    assert make(tmp_path, part=[0, 1], n_tokens=n_tokens).n_rows("train") == 401


def test_caches_keep_their_names_and_runs_their_hashes(make):
    """The name is that of a cache of format 2 which knows of no parts."""
    old = {"lm": "8922a27e6609dfda56a69b55fe47aaec682c76f7a5f40d512c49868a973b8c8b",
           "corpus": "e8d1f8f5a3625168909b1931e0f576b9c1d3207394a215c5b52798e950e95dd8"}
    config = compose_config("train", ["data.n_tokens={train: 800000, validation: 60000, test: 100000}",
                                   "data.dtype=float32", "data.rows_per_shard=65536", "data.seed=0",
                                   "lm.context_size=256"])
    hook = replace(make.hook, layer=3, module="model.layers.3")
    lm = replace(make.lm, fingerprint=old["lm"])
    names = [make_cache_id(lm="builtin", hook="residual.3", identity=identity_of(lm, hook, old["corpus"], spec))
             for spec in (CacheSettings.of(config).spec, replace(CacheSettings.of(config).spec, part=[0, 2]))]
    assert names[0] == "builtin-residual.3-a968a9a11d17d699" != names[1]

    assert config["data"].pop("part", 0) is None
    without = config_hash(config)
    for part, same in ((None, True), ([0, 2], False)):
        assert (config_hash({**config, "data": {**config["data"], "part": part}}) == without) is same


@pytest.mark.parametrize("part, message", [
    ("5", "data.part is 5; it must be a list of a whole number or null"),
    ("[0,x]", r"data.part is \[0, 'x'\]; it must be a list of a whole number or null"),
    ("[1]", r"data.part is \[1\]; it must be \[number, of\], with a number from 0 to of - 1"),
    ("[0,1,2]", r"data.part is \[0, 1, 2\]; it must be \[number, of\]"),
    ("[2,2]", r"data.part is \[2, 2\]; it must be \[number, of\]"),
    ("[-1,2]", r"data.part is \[-1, 2\]; it must be \[number, of\]"),
    ("[0,0]", r"data.part is \[0, 0\]; it must be \[number, of\]"),
    ("[0,2] online", r"data.part is \[0, 2\], but data is online, which stores no training rows; choose"),
])
def test_a_bad_part_gets_one_line(part, message):
    part, *online = part.split()
    config = compose_config("harvest", [*(f"data={name}" for name in online), f"data.part={part}"])
    with pytest.raises(ValueError, match=message) as error:
        CacheSettings.of(config)
    assert "\n" not in str(error.value)


def test_a_bad_part_ends_the_command(enter, tmp_path):
    status, _, err = enter(harvest_entry_point, f"output_dir={tmp_path}", "data.part=[2,2]")
    *_, last = err.splitlines()
    assert status == 2 and last.startswith("sae_zoo.harvest: error: data.part is [2, 2]; it must be"), err
    assert not list(tmp_path.glob("cache/*"))


SMALL = ["data.n_tokens={train: 4000, validation: 1000, test: 1000}", "data.rows_per_shard=1024"]
RUN = ["d_sae=128", "recipe.n_steps=40", "recipe.batch_size=256", "evaluation.n_lm_tokens=256", "sae=topk",
       "l0_target=10", "trainer.progress_bar=false", *SMALL]


def test_a_run_trains_from_a_folder_of_parts(enter, tmp_path):
    machines = [tmp_path / f"machine{number}" for number in range(2)]
    for number, machine in enumerate(machines):
        status, _, err = enter(harvest_entry_point, f"output_dir={machine}", f"data.part=[{number},2]",
                               "progress_bar=false", *SMALL)
        assert status == 0, err
        shutil.copytree(machine / "cache", tmp_path / "parts", dirs_exist_ok=True)
    where = [f"output_dir={tmp_path / 'out'}", f"data.remote.path={tmp_path / 'parts'}"]
    status, _, err = enter(train, *where, *RUN)
    assert status == 0, err
    (run_dir,) = (file.parent for file in (tmp_path / "out" / "runs").rglob("record.json"))
    record = read_record(run_dir)
    assert record["status"] == "finished" and 0 < record["fvu"] < 1 and record["delta_lm_loss"] > 0
    assert record["cache_id"] == record["data_id"] == open_cache_or_parts(tmp_path / "parts").cache_id
    assert not (tmp_path / "out" / "cache").exists()  # nothing was harvested, nothing copied
    status, out, err = enter(evaluate, f"run='{run_dir}'", "progress_bar=false", "n_lm_tokens=256")
    assert status == 0 and f"{record['fvu']:.4g}" in out + err, err

    (path, _) = sorted((tmp_path / "parts").glob("*/manifest.json"))
    shutil.rmtree(path.parent)
    status, _, err = enter(train, "sweep=bad", *where, *RUN)
    *_, last = err.splitlines()
    assert status == 2 and re.search(r"sae_zoo.train: error: .* lacks part [01] of 2", last), err
