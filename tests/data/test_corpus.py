import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_zoo.data.corpus import (
    SPLITS,
    Document,
    HFDatasetCorpus,
    PackedTokens,
    StdlibCorpus,
    TextFilesCorpus,
    deal,
    pack,
    special_token_ids,
    split_of,
)
from sae_zoo.lm.rows import data_points

# One token for every lower-case letter, at 10 to 35.
LETTERS = {chr(ord("a") + i): 10 + i for i in range(26)}


def letters_tokenizer(**special):
    vocabulary = {**LETTERS, "[UNK]": 9, "<0>": 0, "<1>": 1, "<2>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


ALL = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>"}


def text(tokens):
    letters = {i: letter for letter, i in LETTERS.items()} | {0: "_", 1: "^", 2: "$"}
    return ["".join(letters[i] for i in row) for row in tokens.tolist()]


def documents(*texts):
    return [Document(str(i), t) for i, t in enumerate(texts)]


# ---------------------------------------------------------------------------------------------------------------- split


def test_split_is_fixed_for_ever_and_has_the_stated_shares():
    # The built-in language model was trained on these: a change would move its training text into held-out data.
    held_out = {f"{i}.py": split_of(f"{i}.py") for i in range(40) if split_of(f"{i}.py") != "train"}
    assert held_out == {"6.py": "validation", "24.py": "test", "30.py": "test", "32.py": "test", "33.py": "validation",
                        "36.py": "validation"}
    counts = {split: sum(split_of(f"lib/{i}.py") == split for i in range(20_000)) for split in SPLITS}
    assert abs(counts["train"] - 18_000) < 4 * (20_000 * 0.9 * 0.1) ** 0.5
    assert abs(counts["validation"] - 1_000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5
    assert sum(counts.values()) == 20_000


@pytest.mark.parametrize("kind", ["stdlib", "text_files"])
def test_splits_are_a_partition_of_the_documents(kind, tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    corpus = StdlibCorpus() if kind == "stdlib" else TextFilesCorpus(paths=str(tmp_path))
    names = {split: [document.name for document in corpus.documents(split)] for split in SPLITS}
    everything = [name for split in SPLITS for name in names[split]]
    assert all(names.values()) and len(everything) == len(set(everything)) == len(corpus.files) - len(corpus.skipped)
    assert all(split_of(name) == split for split in SPLITS for name in names[split])
    assert all(names[split] == [d.name for d in corpus.documents(split)] for split in SPLITS)


def test_stdlib_leaves_out_tests_and_packages():
    names = [file.as_posix() for file in StdlibCorpus().files]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any(part in name for name in names for part in ("/test/", "/tests/", "-packages/"))


# ----------------------------------------------------------------------------------------------------------- text files


def write_tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


def every_document(corpus):
    return {document.name: document.text for split in SPLITS for document in corpus.documents(split)}


def test_files_folders_and_globs(tmp_path):
    write_tree(tmp_path, {"a.md": "one", "b/c.md": "two", "b/d.txt": "three", "b/e/f.md": "föur", "[x]/g.md": "five"})
    assert every_document(TextFilesCorpus(paths=str(tmp_path))) == {
        "a.md": "one", "b/c.md": "two", "b/d.txt": "three", "b/e/f.md": "föur", "[x]/g.md": "five"}
    assert every_document(TextFilesCorpus(paths=[f"{tmp_path}/**/*.md"])).keys() == {
        "a.md", "b/c.md", "b/e/f.md", "[x]/g.md"}
    overlapping = TextFilesCorpus(paths=[f"{tmp_path}/b/*", f"{tmp_path}/b/c.md", f"{tmp_path}/a.md"])
    assert every_document(overlapping).keys() == {"a.md", "b/c.md", "b/d.txt"}
    assert every_document(TextFilesCorpus(paths=f"{tmp_path}/[x]")) == {"g.md": "five"}
    assert every_document(TextFilesCorpus(paths=f"{tmp_path}/[x]/g.md")) == {"g.md": "five"}
    with pytest.raises(ValueError, match=r"no/such\.txt' matches no file"):
        TextFilesCorpus(paths=[f"{tmp_path}/a.md", "no/such.txt"])


def test_files_that_are_not_text_are_listed_once(tmp_path):
    write_tree(tmp_path, {"a.md": "one", "b.bin": b"\xff\xfe\x00", "c.md": ""})
    corpus = TextFilesCorpus(paths=str(tmp_path))
    for _ in range(2):
        assert every_document(corpus) == {"a.md": "one"}
    assert sorted(file.name for file in corpus.skipped) == ["b.bin", "c.md"]


def test_fingerprint_follows_content_not_place(tmp_path):
    files = {"x/a.md": "one", "x/b.md": "two"}
    write_tree(tmp_path / "here", files)
    write_tree(tmp_path / "there", files)
    here, there = (TextFilesCorpus(paths=str(tmp_path / place)) for place in ("here", "there"))
    original = here.fingerprint()
    assert original == there.fingerprint()
    write_tree(tmp_path / "there", {"x/b.md": "two!"})
    assert original != there.fingerprint()
    (tmp_path / "here/x/b.md").rename(tmp_path / "here/x/c.md")
    assert original != TextFilesCorpus(paths=str(tmp_path / "here")).fingerprint()


# ---------------------------------------------------------------------------------------------------------- hf datasets


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": "json", "data_files": str(file)}


def test_hf_dataset_streams_a_local_file(tmp_path):
    texts = [f"document {i}" for i in range(50)]
    rows = [{"text": t, "n": i} for i, t in enumerate(texts)] + [{"text": None, "n": 0}, {"text": "", "n": 0}]
    corpus = HFDatasetCorpus(**write_jsonl(tmp_path / "a.jsonl", rows))
    found = {split: [document.text for document in corpus.documents(split)] for split in SPLITS}
    assert sorted(text for texts_of in found.values() for text in texts_of) == sorted(texts)
    shuffled = HFDatasetCorpus(**write_jsonl(tmp_path / "b.jsonl", rows[::-1]))
    assert {split: sorted(found[split]) for split in SPLITS} == {
        split: sorted(document.text for document in shuffled.documents(split)) for split in SPLITS}


def test_hf_dataset_arguments(tmp_path):
    arguments = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "n": 1}])
    with pytest.raises(ValueError, match="'text' is not a column of json; its columns are body, n"):
        list(HFDatasetCorpus(**arguments).documents("train"))
    one = HFDatasetCorpus(path="p", subset="en", split="train", revision="1", text_field="body")
    same = HFDatasetCorpus(path="p", subset="en", split="train", revision="1", text_field="body")
    assert one.fingerprint() == same.fingerprint()
    for change in ({"path": "q"}, {"subset": "de"}, {"split": "test"}, {"revision": "2"}, {"text_field": "text"}):
        changed = {"path": "p", "subset": "en", "split": "train", "revision": "1", "text_field": "body", **change}
        assert HFDatasetCorpus(**changed).fingerprint() != one.fingerprint()


# -------------------------------------------------------------------------------------------------------------- packing


def test_packing_by_hand():
    packed = pack(documents("abc", "defgh", "i"), letters_tokenizer(**ALL), 5)
    assert text(packed.tokens) == ["^abc$", "^defg", "^h$i$"]
    assert packed.tokens.dtype == torch.int32
    assert (packed.n_documents, packed.n_bytes, packed.n_tokens, packed.special_ids) == (3, 9, 9, (0, 1, 2))
    assert text(pack(documents("abcd"), letters_tokenizer(**ALL), 4).tokens) == ["^abc", "^d$_"]
    assert text(pack(documents("abc", "de"), letters_tokenizer(eos_token="<2>"), 4).tokens) == ["abc$", "de$$"]
    assert text(pack(documents("abc", "de"), letters_tokenizer(), 2).tokens) == ["ab", "cd"]  # no token to pad with


@pytest.mark.parametrize("special", [ALL, {"eos_token": "<2>"}, {}])
def test_the_first_column_is_never_data(special):
    """Without BOS it holds an ordinary token, and the model's attention sinks to it."""
    packed = pack(documents("abc", "defgh", "ijkl"), letters_tokenizer(**special), 4)
    assert not packed.keep[:, 0].any()
    special_here = torch.isin(packed.tokens, torch.tensor(packed.special_ids, dtype=torch.int32))
    assert torch.equal(packed.keep[:, 1:], ~special_here[:, 1:])
    assert torch.equal(packed.keep, data_points(packed.tokens.long(), packed.special_ids))
    assert packed.n_tokens == int(packed.keep.sum())


def test_max_tokens_cuts_the_last_document():
    packed = pack(iter(documents("abc", "defgh", "i")), letters_tokenizer(**ALL), 5, max_tokens=5)
    assert text(packed.tokens) == ["^abc$", "^de$_"]
    assert packed.n_documents == 2 and packed.n_tokens == 5


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text("abcxyz", max_size=9), min_size=1, max_size=8), context_size=st.integers(2, 9),
       max_tokens=st.none() | st.integers(1, 30))
def test_packing_keeps_every_token_in_order(texts, context_size, max_tokens):
    everything = "".join(texts)[:max_tokens]
    tokenizer = letters_tokenizer(**ALL)
    if not everything:
        with pytest.raises(ValueError, match="corpus gave no tokens"):
            pack(documents(*texts), tokenizer, context_size, max_tokens)
        return
    packed = pack(documents(*texts), tokenizer, context_size, max_tokens)
    assert packed.tokens.shape[1] == context_size and (packed.tokens[:, 0] == 1).all()
    assert "".join(text(packed.tokens[packed.keep][None])) == everything
    assert packed.n_tokens == len(everything)
    assert not torch.isin(packed.tokens[packed.keep], torch.tensor(special_token_ids(tokenizer))).any()


def test_bad_packing():
    with pytest.raises(ValueError, match="context_size is 1; it must be at least 2"):
        pack(documents("abc"), letters_tokenizer(**ALL), 1)
    with pytest.raises(ValueError, match="3 tokens do not fill one row of 4"):
        pack(documents("abc"), letters_tokenizer(), 4)


@pytest.mark.parametrize("first, second", [(1, 1), (3, 5), (6, 10), (1, 9)])
def test_dealt_rows_are_a_partition_in_proportion(first, second):
    rows = PackedTokens(torch.arange(400, dtype=torch.int32).view(100, 4), (0,), n_documents=3, n_bytes=9)
    a, b = deal(rows, first, second)
    assert sorted(torch.cat([a.tokens, b.tokens]).flatten().tolist()) == list(range(400))
    assert len(a.tokens) == pytest.approx(100 * first / (first + second), abs=1)
    for half in (a.tokens[:, 0] < 200, a.tokens[:, 0] >= 200):  # evenly along the order
        assert half.sum() == pytest.approx(len(a.tokens) / 2, abs=1)
