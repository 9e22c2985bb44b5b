"""What a cache's logits are compared with: those of the uncompressed cache, or of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..probes.chunked import fill, read

_KEPT_BYTES = 2 << 30  # of the baseline's logits, in the host's memory


class Reference:
    """The logits that a cache's are compared with: those of the uncompressed cache.

    They are computed in the same passes as the cache's own, so that both round alike, and kept
    for the next cache while they fit in `kept_bytes`.

    Args:
        model: in evaluation mode.
        windows: token ids (1, tokens) each.
        make_cache: makes the uncompressed cache.
        kept_bytes: of the host's memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[Tensor],
        make_cache: Callable[[], Cache] | None = None,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        self.model, self.windows = model, windows
        self.make_cache = make_cache or (lambda: DynamicCache(config=model.config))
        self.room = kept_bytes
        self.kept: dict[tuple[int, int, int], Tensor] = {}
        self.at: tuple[int, int] = (-1, 0)  # the window and token that the cache has come to
        self.cache: Cache | None = None

    def logits(self, window: int, start: int, end: int) -> Tensor:
        """Logits (end - start, vocabulary) after the tokens start..end-1 of a window."""
        key, ids = (window, start, end), self.windows[window]
        if key in self.kept:
            return self.kept[key].to(ids.device).float()
        cache = self.cache if self.at == (window, start) else None
        self.at, self.cache = (-1, 0), None  # a pass that fails leaves a cache of unknown content
        if cache is None:
            cache = self.make_cache()
            if start:
                fill(self.model, ids[:, :start], cache)
        found = read(self.model, ids[:, start:end], cache)
        self.at, self.cache = (window, end), cache
        short = found.to(self.model.dtype)  # of 16-bit models half the bytes
        exact = short if torch.equal(short.float(), found) else found
        if exact.nbytes <= self.room:
            self.room -= exact.nbytes
            self.kept[key] = exact.cpu()
        return found

    def forget(self, window: int) -> None:
        """Drop what is kept of a window: no cache will read it again."""
        for key in [key for key in self.kept if key[0] == window]:
            self.room += self.kept.pop(key).nbytes
        if self.at[0] == window:
            self.at, self.cache = (-1, 0), None


class SinglePass:
    """The logits of one pass without a cache: what the uncompressed cache is compared with."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[Tensor]) -> None:
        self.model, self.windows = model, windows
        self.at, self.found = -1, torch.empty(0)

    def logits(self, window: int, start: int, end: int) -> Tensor:
        """As `Reference.logits`."""
        if window != self.at:
            self.at, self.found = window, single_pass(self.model, self.windows[window])
        return self.found[start:end]


@torch.no_grad()
def single_pass(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (tokens, vocabulary), float32, of a text (1, tokens), in one pass without a cache."""
    return model(ids, use_cache=False).logits[0].float()
