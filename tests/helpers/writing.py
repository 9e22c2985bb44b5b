"""Ways in which a model writes a text through a cache: the same text, whatever the cache is.

`WAYS` has them by name. Each takes a model and an empty cache.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from rotorquant_hf import RotorQuantCache
from tests.helpers.models import feed, prompt

PROMPT, NEW = 30, 10  # tokens


class Written(NamedTuple):
    """What a way has written.

    Attributes:
        tokens: (rows, tokens).
        logits: by which they were chosen, (rows, new tokens, vocabulary), a row for every beam.
        cache: what has read them.
    """

    tokens: Tensor
    logits: Tensor
    cache: Any


Way = Callable[[Any, Cache], Written]


def _generate(model: Any, cache: Cache, ids: Tensor, **options: Any) -> Written:
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    out = model.generate(
        ids, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
    )
    return Written(out.sequences, torch.stack(out.logits, dim=1), cache)


def greedy(model: Any, cache: Cache) -> Written:
    """Two rows, token by token."""
    return _generate(model, cache, prompt(2, PROMPT))


def beams(model: Any, cache: Cache) -> Written:
    """Beam search of two rows, whose beams change places."""
    return _generate(model, cache, prompt(2, PROMPT), num_beams=3)


def assisted(model: Any, cache: Cache) -> Written:
    """A likeness of the model proposes tokens; those that are rejected are cropped."""
    return _generate(model, cache, prompt(1, PROMPT), assistant_model=likeness(model))


def lookup(model: Any, cache: Cache) -> Written:
    """The prompt proposes tokens; it repeats, so that there is something to look up."""
    ids = prompt(1, PROMPT // 5).repeat(1, 5)
    return _generate(model, cache, ids, prompt_lookup_num_tokens=3)


def crop(model: Any, cache: Cache) -> Written:
    """A text is read, its end forgotten, and another end read instead."""
    ids, other = prompt(2, PROMPT), prompt(2, 2 * NEW, seed=1)
    feed(model, cache, ids, (PROMPT - NEW,))
    cache.activate_past_recording()
    feed(model, cache, ids[:, PROMPT - NEW :], (NEW - 2, 1, 1))
    cache.crop(-NEW)
    logits = feed(model, cache, other, (NEW,) + (1,) * NEW)
    return Written(logits.argmax(-1), logits, cache)


def padding(model: Any, cache: Cache) -> Written:
    """Three rows, two with padding on the left."""
    ids = prompt(3, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[2, :3] = 0
    ids[mask == 0] = 0
    return _generate(model, cache, ids, attention_mask=mask)


def chunks(model: Any, cache: Cache) -> Written:
    """The prompt is read in parts."""
    return _generate(model, cache, prompt(2, PROMPT), prefill_chunk_size=7)


def saved(model: Any, cache: Any) -> Written:
    """The cache is saved and loaded in the middle of the text."""
    ids = greedy(model, cache).tokens
    if isinstance(cache, RotorQuantCache):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "cache.safetensors"
            cache.save(file)
            cache = RotorQuantCache.load(file, config=model.config)
    return _generate(model, cache, ids)


WAYS: dict[str, Way] = {
    way.__name__: way for way in (greedy, beams, assisted, lookup, crop, padding, chunks, saved)
}

TAKES_BACK = ("assisted", "lookup", "crop")
"""Those that undo tokens, which a recurrent state does not allow."""


@functools.lru_cache(maxsize=2)
def likeness(model: Any) -> Any:
    """A copy of a model with other weights by a fifth, which proposes some of its tokens."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.is_floating_point() and weight.numel() > 1:
                noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
                weight.add_(noise * weight.std() / 5)
    # Four tokens every time, however unsure it is of them: a random model always is.
    other.generation_config.num_assistant_tokens = 4
    other.generation_config.num_assistant_tokens_schedule = "constant"
    other.generation_config.assistant_confidence_threshold = 0.0
    return other
