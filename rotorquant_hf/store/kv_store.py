"""RotorQuantKVCache: the packed keys and values of one attention layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from rotorquant_hf.backend import kernels_take, on_device
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.checks import check_finite, check_vectors
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.quantizer import Quantizer
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.tiles import token_tiles
from rotorquant_hf.store.side import PackedSide
from rotorquant_hf.store.statistics import measured_together


class RotorQuantKVCache:
    """A batched store of quantised keys and values, appended to and never re-quantised.

    The first block appended fixes the channel statistics (equalisation, centring); every token
    is coded once, when it is appended.

    Args:
        d_key: key head dim. d_value: value head dim. 8 to 576 each; they may differ.
        bits: bits per element of keys and values, unless `config` is given.
        seed: seed of the rotations, unless `config` is given.
        device: where the store lies.
        config: all settings; its window settings do not matter here.
        rope: how RoPE turns the keys, (1, 1, 1, r) on the device; None if that is not known.

    Attributes:
        keys, values: the two sides.
    """

    def __init__(
        self,
        d_key: int,
        d_value: int,
        bits: int = 3,
        seed: int = 42,
        device: torch.device | str = "cpu",
        *,
        config: RotorQuantConfig | None = None,
        rope: Rope | None = None,
    ) -> None:
        if config is None:
            config = RotorQuantConfig(key_bits=bits, value_bits=bits, seed=seed)
        self.config = config
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.keys = PackedSide(
            config.key_spec,
            d_key,
            device,
            equalize=config.equalize_keys,
            center=config.center_keys,
            rope_layout=config.rope_layout,
            rope=rope,
            widens=config.widens_keys,
        )
        self.values = PackedSide(
            config.value_spec, d_value, device, equalize=config.equalize_values
        )

    def __copy__(self) -> RotorQuantKVCache:
        """One that goes its own way; rows are shared until either appends."""
        fork = object.__new__(type(self))
        sides = {"keys": copy.copy(self.keys), "values": copy.copy(self.values)}
        fork.__dict__.update(self.__dict__, **sides)
        return fork

    @property
    def sides(self) -> tuple[PackedSide, PackedSide]:
        """Keys and values."""
        return self.keys, self.values

    @property
    def d_key(self) -> int:
        """Key head dim."""
        return self.keys.d

    @property
    def d_value(self) -> int:
        """Value head dim."""
        return self.values.d

    @property
    def device(self) -> torch.device:
        """Where the store lies. Whoever moves its tensors by `map` sets this too."""
        return self.keys.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.keys.device = self.values.device = device

    @property
    def rope(self) -> Rope | None:
        """How RoPE turns the keys; None if that is not known."""
        return self.keys.rope

    @rope.setter
    def rope(self, rope: Rope | None) -> None:
        self.keys.rope = rope

    @property
    def key_quantizer(self) -> Quantizer:
        """What codes the keys."""
        return self.keys.quantizer

    @property
    def value_quantizer(self) -> Quantizer:
        """What codes the values."""
        return self.values.quantizer

    def __len__(self) -> int:
        """Tokens stored."""
        return len(self.keys)

    @property
    def has_statistics(self) -> bool:
        """Whether the channel statistics are fixed."""
        return self.keys.statistics is not None

    @property
    def keys_need_wide(self) -> bool:
        """Whether the keys, by their statistics, need 8 bits (`quant.wide`)."""
        return self.keys.statistics is not None and self.keys.statistics.needs_wide

    @property
    def calibrated(self) -> bool:
        """Whether the channel statistics come from elsewhere, and stay in an emptied store."""
        return self.keys.calibrated

    @calibrated.setter
    def calibrated(self, calibrated: bool) -> None:
        self.keys.calibrated = self.values.calibrated = calibrated

    def calibrate(self, keys: ChannelStatistics, values: ChannelStatistics) -> None:
        """Take channel statistics from elsewhere, before the first token."""
        self.keys.statistics, self.values.statistics = keys, values
        self.calibrated = True

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Quantise and append tokens.

        Args:
            keys: (batch, heads, tokens, d_key). values: (batch, heads, tokens, d_value).

        Raises:
            TypeError, ValueError: for a wrong dtype or shape, or (on the CPU) NaN or infinite
                entries. The store is then as it was.
        """
        self._check("keys", keys, self.keys)
        self._check("values", values, self.values)
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)} "
                "differ in batch, heads or tokens"
            )
        self.append_unchecked(keys, values, len(self))

    def append_unchecked(
        self,
        keys: Tensor,
        values: Tensor,
        position: int,
        sample: tuple[Tensor, Tensor] | None = None,
        queries: QueryMoment | None = None,
    ) -> None:
        """`append` for a caller that has made its checks, as a layer has.

        Args:
            keys, values: as in `append`.
            position: where in the text the first of them is.
            sample: keys and values that the channel statistics are taken from, if they are not
                yet, from the same position on; None for those appended.
            queries: of the queries that read the keys, likewise; None if nothing is known of them.

        Raises:
            ValueError: on the CPU, for vectors too large for their scales. The store is then as
                it was.
        """
        if keys.shape[2] == 0:
            return
        before = [(len(side), side.statistics) for side in self.sides]
        try:
            # Buffers made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._take_statistics(position, sample or (keys, values), queries)
                self._append(keys, values, position)
        except BaseException:
            for side, (count, statistics) in zip(self.sides, before, strict=True):
                side.buffers.crop(len(side) - count)
                side.statistics = statistics
            raise

    def _take_statistics(
        self, position: int, sample: tuple[Tensor, Tensor], queries: QueryMoment | None
    ) -> None:
        if self.has_statistics:
            return
        tokens = sample[0].shape[2]
        keys, values = measured_together(*sample)
        positions = range(position, position + tokens)
        self.keys.take_statistics(keys, positions, queries)
        self.values.take_statistics(values)

    def _append(self, keys: Tensor, values: Tensor, position: int) -> None:
        if self.kernels_take(keys.dtype):
            self._append_by_kernel(keys, values, position)
            return
        batch, heads, tokens, _ = keys.shape
        for segment in self.keys.segments(position, tokens):
            k, v, at = keys[:, :, segment], values[:, :, segment], position + segment.start
            for tile in token_tiles(k.shape[2], batch * heads * max(self.d_key, self.d_value)):
                left = tokens - segment.start - tile.start
                self.keys.append(k[:, :, tile], at, left)
                self.values.append(v[:, :, tile], at, left)

    def kernels_take(self, dtype: torch.dtype) -> bool:
        """Whether the Triton kernels read and write this store, for states of a dtype."""
        return kernels_take(self.device, dtype, self.keys.quantizer, self.values.quantizer)

    def _append_by_kernel(self, keys: Tensor, values: Tensor, position: int) -> None:
        from rotorquant_hf.kernels.append import AppendPart, append_segments

        batch, heads, tokens, _ = keys.shape
        self.reserve(tokens, batch, heads)
        end = self.keys.buffers.end
        for parts, feedback in self.keys.feedbacks(position, tokens):
            # Those of all segments come to the device in one copy.
            counts = [part.stop - part.start for part in parts]
            rows = [[x.start, n, end + x.start] for x, n in zip(parts, counts, strict=True)]
            append_segments(
                on_device(rows, self.device),
                max(counts),
                AppendPart(keys, *self.keys.coding(), feedback),
                AppendPart(values, *self.values.coding()),
            )
        self.extend(tokens)

    def reserve(self, count: int, batch: int = 0, heads: int = 0) -> None:
        """Make room for `count` more tokens, to be written into the rows and then counted by
        `extend`; afterwards a token has the same row among keys and values. Batch and heads are
        needed as long as there are no rows.
        """
        keys, values = self.keys.buffers, self.values.buffers
        even = (keys.start, keys.capacity) == (values.start, values.capacity)
        if even and keys.has_room(count) and values.has_room(count):
            return
        grown = [side.grown(count, batch, heads) for side in self.sides]
        keys.adopt(grown[0])  # only now, so that no failure leaves them with different rows
        values.adopt(grown[1])

    def extend(self, count: int) -> None:
        """Count `count` tokens that were written into the rows after the last."""
        for side in self.sides:
            side.buffers.extend(count)

    def rows_in_use(self) -> tuple[int, int]:
        """The first row in use and the one after the last, in the buffers of both sides."""
        return self.keys.buffers.start, self.keys.buffers.end

    def use_rows(self, start: int, end: int) -> None:
        """Go back to rows that were in use before, in the same memory."""
        for side in self.sides:
            side.buffers.start, side.buffers.end = start, end

    def pin(self, pinned: bool) -> None:
        """Keep the rows where they are, even if tokens are dropped; False ends that."""
        for side in self.sides:
            side.buffers.pinned = pinned

    @property
    def room(self) -> int:
        """Tokens that can be taken without new memory."""
        return self.keys.buffers.room

    def _check(self, name: str, x: Tensor, side: PackedSide) -> None:
        check_vectors(name, x, side.d)
        if x.dim() != 4:
            raise ValueError(
                f"{name} have shape {tuple(x.shape)}; pass (batch, heads, tokens, {side.d})"
            )
        if x.device != self.device:
            raise ValueError(f"{name} are on {x.device}, the store is on {self.device}; move one")
        if side.statistics is not None and x.shape[:2] != side.statistics.scale.shape[:2]:
            batch, heads = side.statistics.scale.shape[:2]
            raise ValueError(
                f"{name} have batch {x.shape[0]} and {x.shape[1]} heads, the store holds batch "
                f"{batch} and {heads} heads; use a new store, or reset this one"
            )
        check_finite(name, x, on_gpu=self.config.check_finite)

    def attention_scores(self, queries: Tensor) -> Tensor:
        """Estimated inner products of queries with the stored keys, not divided by sqrt(d).

        Args:
            queries: (batch, query heads, n, d_key); query heads are a multiple of the stored
                heads (grouped-query attention).

        Returns:
            (batch, query heads, n, len(self)) float32.
        """
        check_vectors("queries", queries, self.d_key)
        span = self.keys.span()
        batch, heads = span.shape[:2]
        if queries.dim() != 4 or queries.shape[0] != batch or queries.shape[1] % heads:
            raise ValueError(
                f"queries have shape {tuple(queries.shape)}; pass ({batch}, a multiple of {heads}, "
                f"n, {self.d_key})"
            )
        return span.scores(queries)

    def get_keys(self) -> Tensor:
        """The reconstructed keys, (batch, heads, len(self), d_key) float32."""
        return self.keys.reconstructed()

    def get_values(self) -> Tensor:
        """The reconstructed values, (batch, heads, len(self), d_value) float32."""
        return self.values.reconstructed()

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens; an empty store takes new statistics.

        Raises:
            ValueError: unless the store has so many.
        """
        self._require("crop", count)
        for side in self.sides:
            side.buffers.crop(count)
        if not len(self):
            self.reset()

    def drop_front(self, count: int, shrink: bool = True) -> None:
        """Forget the first `count` tokens; the statistics stay, and unless `shrink` the memory.

        Raises:
            ValueError: unless the store has so many.
        """
        self._require("drop_front", count)
        for side in self.sides:
            side.buffers.drop_front(count, shrink)

    def _require(self, name: str, count: int) -> None:
        if not 0 <= count <= len(self):
            raise ValueError(
                f"{name}({count}): the store holds {len(self)} tokens; pass how many to forget, "
                "none to all of them"
            )

    def reset(self) -> None:
        """Forget everything; statistics too, unless they come from elsewhere."""
        for side in self.sides:
            side.clear()

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every tensor along the batch axis (selection, repetition)."""
        for side in self.sides:
            side.map(fn)

    def state(self) -> dict[str, Tensor]:
        """The rows in use and the statistics by name, for saving."""
        return {
            **{f"key_{name}": tensor for name, tensor in self.keys.state().items()},
            **{f"value_{name}": tensor for name, tensor in self.values.state().items()},
        }

    def load_state(self, state: dict[str, Tensor], wide_keys: bool = False) -> None:
        """The inverse of `state`, into an empty store, of keys that are wide or not."""
        self.reset()
        if not state:
            return
        for prefix, side, wide in (("key_", self.keys, wide_keys), ("value_", self.values, False)):
            side.load_state(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
                wide,
            )

    def nbytes(self) -> dict[str, int]:
        """Bytes of this store's tensors by part (the shared tables not included)."""
        keys, values = self.keys.buffers.nbytes(), self.values.buffers.nbytes()
        parts = {f"key_{name}": size for name, size in keys.items() if name != "spare"}
        parts |= {f"value_{name}": size for name, size in values.items() if name != "spare"}
        parts["spare"] = keys["spare"] + values["spare"]
        statistics = [side.statistics for side in self.sides if side.statistics is not None]
        parts["statistics"] = sum(s.nbytes for s in statistics)
        return parts
