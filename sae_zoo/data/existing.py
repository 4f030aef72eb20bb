"""Open an existing cache (or all of its parts) at a given path instead of harvesting one."""

from __future__ import annotations

import json

from sae_zoo.data.cache import StoredActivations
from sae_zoo.data.cache_parts import open_cache_or_parts
from sae_zoo.data.corpus import Corpus
from sae_zoo.data.folders import Folder, LocalFolder
from sae_zoo.data.harvesting import HASHED_UP_TO_BYTES, HarvestSpec, identity_of
from sae_zoo.lm.hooks import HookPoint, hook_width
from sae_zoo.lm.load import LoadedLM


def open_finished(folder: Folder, lm: LoadedLM, hook: HookPoint, corpus: Corpus, spec: HarvestSpec
                  ) -> StoredActivations:
    """The cache in ``folder``, which must be the very one that a harvest of these would make, or all parts of it.

    Raises:
        ValueError: in one line, if it is another one, of another width than the hook point, damaged, or out of reach.
    """
    cache = open_cache_or_parts(folder)
    found = cache.manifest["identity"]
    wanted = json.loads(json.dumps(identity_of(lm, hook, corpus.fingerprint(), spec)))
    differing = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(f"cache {folder} is not what this config would harvest: its {key} is {found.get(key)}, the "
                         f"config's {wanted.get(key)}; change the config, or data.remote.path")
    if (width := hook_width(lm.model, hook)) != cache.d_in:
        raise ValueError(f"cache {folder} has rows of {cache.d_in} numbers, but the hook point gives {width}; it "
                         "belongs to another language model: change data.remote.path")
    if isinstance(folder, LocalFolder) and cache.n_bytes <= HASHED_UP_TO_BYTES:  # what is fetched is hashed then
        cache.verify_hashes()
    return cache
