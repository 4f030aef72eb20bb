"""Parts that are missing, double, damaged or foreign."""

import json
import shutil
from dataclasses import replace

import pytest

from sae_zoo.data.cache import manifest_digest, open_cache
from sae_zoo.data.cache_parts import open_cache_or_parts
from sae_zoo.data.copies import Copies
from sae_zoo.data.folders import LocalFolder
from sae_zoo.data.harvesting import HarvestSpec
from sae_zoo.data.remote import RemoteFolder
from tests.data.parts.spec import SPEC


def edited(path, **changes):
    """Change the manifest of a cache, so that only who compares it with something else can see it."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))


def names_of(folder):
    """The names of the parts, by number."""
    caches = [open_cache(path.parent) for path in folder.glob("*/manifest.json")]
    return {cache.manifest["identity"]["part"][0]: cache.cache_id for cache in caches}


def put(folder, cache):
    shutil.copytree(cache.path, folder / cache.cache_id)


def _without(folder, make, **_):
    for number in (0, 2):
        shutil.rmtree(folder / names_of(folder)[number])


def _unfinished(folder, make, **_):
    (folder / names_of(folder)[1] / "manifest.json").unlink()


WRONG = {
    "missing": (_without, r"lacks part 0, 2 of 3 \(the first is 0\); copy what is missing there"),
    "manifest not there yet": (_unfinished, "lacks part 1 of 3"),
    "hidden": (lambda folder, **_: (folder / names_of(folder)[1]).rename(folder / ".gone"), "lacks part 1 of 3"),
    "twice": (lambda folder, make, aside: put(folder, make(aside, lm_name="again", part=[1, 3])),
              "holds part 1 of 3 twice, as .*again-residual.1.*; take one out"),
    "whole": (lambda folder, make, aside: put(folder, make(aside)), "in it is no part of a cache but a whole one"),
    "of another number": (lambda folder, make, aside: put(folder, make(aside, part=[1, 2])),
                          "holds parts of more than one cache: parts is .* of .*, .* of .*; keep the parts of each"),
    "another seed": (lambda folder, make, aside: put(folder, make(aside, part=[1, 3], seed=5)),
                     "holds parts of more than one cache: seed is"),
    "another width": (lambda folder, **_: edited(folder / names_of(folder)[2], d_in=23),
                      "is damaged: .* does not hold"),
    "other special tokens": (lambda folder, **_: edited(folder / names_of(folder)[2], special_ids=[]),
                             "holds parts of more than one cache: special_ids is"),
    "a truncated file": (lambda folder, **_: (folder / names_of(folder)[2] / "train/00001.safetensors").write_bytes(
                         b"x"), "is damaged: train/00001.safetensors has 1 bytes"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("place", ["local", "url"])
def test_what_is_not_right_gets_one_line(make, copied, tmp_path, what, place):
    do, message = WRONG[what]
    do(copied, make=make, aside=tmp_path / "aside")
    where = copied if place == "local" else RemoteFolder(copied.as_uri(), Copies(tmp_path / "copies", 10**7))
    with pytest.raises(ValueError, match=message) as error:
        open_cache_or_parts(where)
    assert "\n" not in str(error.value) and str(copied) in str(error.value)


@pytest.mark.parametrize("place", ["local", "url"])
def test_an_empty_folder_and_none_at_all_get_one_line(tmp_path, place):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for folder in (tmp_path / "empty", tmp_path / "none"):
        where = folder if place == "local" else RemoteFolder(folder.as_uri(), Copies(tmp_path / "copies", 10**7))
        with pytest.raises(ValueError, match=r"is not a cache: it has no manifest\.json; harvest it first"):
            open_cache_or_parts(where)


def test_a_folder_of_a_cache_is_that_cache(whole):
    cache = open_cache_or_parts(whole.path)
    assert type(cache) is type(whole) and cache.manifest == whole.manifest


def test_it_must_be_what_the_config_would_harvest(make, folder, whole, copied):
    spec = HarvestSpec(**SPEC)
    assert make.finished(LocalFolder(folder), spec=spec).parts
    assert make.finished(LocalFolder(whole.path), spec=spec).cache_id == whole.cache_id
    part = folder / names_of(folder)[1]
    assert make.finished(LocalFolder(part), spec=replace(spec, part=[1, 3])).cache_id == part.name
    for place, asked, message in (
        (folder, replace(spec, seed=1), "its seed is 0, the config's 1; change the config, or data.remote.path"),
        (folder, replace(spec, part=[0, 3]), r"its part is None, the config's \[0, 3\]"),
        (part, spec, r"its part is \[1, 3\], the config's None"),
        (part, replace(spec, part=[0, 3]), r"its part is \[1, 3\], the config's \[0, 3\]"),
    ):
        with pytest.raises(ValueError, match=f"is not what this config would harvest: {message}"):
            make.finished(LocalFolder(place), spec=asked)
    file = copied / names_of(copied)[2] / "train/00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{names_of(copied)[2]} is damaged: the SHA-256 of train/00001.safetensors"):
        make.finished(LocalFolder(copied), spec=spec)
