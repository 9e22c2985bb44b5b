"""RotorQuantKVCache: the packed keys and values of one attention layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rotorquant_hf.backend import on_device, uses_triton
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.quant import RotorQuantMSE, RotorQuantProd
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.checks import check_finite, check_vectors
from rotorquant_hf.quant.packed import PackedSpan, Quantizer, encode
from rotorquant_hf.quant.tiles import token_tiles
from rotorquant_hf.store.buffers import TokenBuffers

# Values get other rotations than keys, as in the reference.
_VALUE_SEED_OFFSET = 100


class RotorQuantKVCache:
    """A batched store of quantised keys and values, appended to and never re-quantised.

    The first block appended fixes the channel statistics (equalisation, centring); every token
    is coded once, when it is appended.

    Args:
        d_key: key head dim. d_value: value head dim. 8 to 576 each; they may differ.
        bits: bits per number of keys and values, unless `config` is given.
        seed: seed of the rotations, unless `config` is given.
        device: where the store lies.
        config: all settings; its window settings do not matter here.
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
    ) -> None:
        if config is None:
            config = RotorQuantConfig(key_bits=bits, value_bits=bits, seed=seed)
        self.config = config
        self.d_key, self.d_value = d_key, d_value
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._keys, self._values = TokenBuffers(), TokenBuffers()
        self.key_statistics: ChannelStatistics | None = None
        self.value_statistics: ChannelStatistics | None = None
        _ = self.key_quantizer, self.value_quantizer  # refuse impossible settings now

    # The quantisers are shared by all stores of the same settings: never a store's own copy.
    @property
    def key_quantizer(self) -> Quantizer:
        """What codes the keys."""
        return shared_quantizer("keys", self.config, self.d_key, self.device)

    @property
    def value_quantizer(self) -> Quantizer:
        """What codes the values."""
        return shared_quantizer("values", self.config, self.d_value, self.device)

    def __len__(self) -> int:
        """Tokens stored."""
        return len(self._keys)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Quantise and append tokens.

        Args:
            keys: (batch, heads, tokens, d_key). values: (batch, heads, tokens, d_value).

        Raises:
            TypeError, ValueError: for a wrong dtype or shape, or (on the CPU) NaN or infinite
                entries. The store is then as it was.
        """
        self._check("keys", keys, self.d_key)
        self._check("values", values, self.d_value)
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)} "
                "differ in batch, heads or tokens"
            )
        if keys.shape[2] == 0:
            return
        before, statistics = len(self), (self.key_statistics, self.value_statistics)
        try:
            # Buffers made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._append(keys, values)
        except BaseException:
            self._keys.crop(len(self._keys) - before)
            self._values.crop(len(self._values) - before)
            self.key_statistics, self.value_statistics = statistics
            raise

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self._take_statistics(keys, values)
        if self.runs_on_kernels and keys.dtype != torch.float64:
            self._append_by_kernel(keys, values)
            return
        assert self.key_statistics is not None
        assert self.value_statistics is not None
        batch, heads, tokens, _ = keys.shape
        for tile in token_tiles(tokens, batch * heads * max(self.d_key, self.d_value)):
            u = self.key_statistics.normalize(keys[:, :, tile])
            self._keys.append(encode(self.key_quantizer, u), tokens - tile.start)
            u = self.value_statistics.normalize(values[:, :, tile])
            self._values.append(encode(self.value_quantizer, u), tokens - tile.start)

    def _take_statistics(self, keys: Tensor, values: Tensor) -> None:
        if self.key_statistics is None or self.value_statistics is None:
            config = self.config
            self.key_statistics = ChannelStatistics.of_block(
                keys, config.equalize_keys, config.center_keys, config.rope_layout
            )
            self.value_statistics = ChannelStatistics.of_block(values, config.equalize_values)

    @property
    def runs_on_kernels(self) -> bool:
        """Whether the Triton kernels read and write this store."""
        if not uses_triton(self.device):
            return False
        from rotorquant_hf.kernels.append import supports

        return supports(self.key_quantizer) and supports(self.value_quantizer)

    def _append_by_kernel(self, keys: Tensor, values: Tensor) -> None:
        from rotorquant_hf.kernels.append import AppendPart, append_block

        tokens = keys.shape[2]
        self.reserve(tokens, keys.shape[0], keys.shape[1])
        bounds = on_device([0, tokens, self._keys.end], self.device)
        append_block(
            bounds,
            tokens,
            AppendPart(keys, *self.key_coding()),
            AppendPart(values, *self.value_coding()),
        )
        self.extend(tokens)

    def reserve(self, count: int, batch: int = 0, heads: int = 0) -> None:
        """Make room for `count` more tokens, to be written into the rows and then counted by
        `extend`; afterwards a token has the same row among keys and values. Batch and heads are
        needed as long as there are no rows.
        """
        keys, values = self._keys, self._values
        even = (keys.start, keys.capacity) == (values.start, values.capacity)
        if even and keys.has_room(count) and values.has_room(count):
            return
        grown = []
        for buffers, quantizer in ((keys, self.key_quantizer), (values, self.value_quantizer)):
            like = buffers.tensors or empty_rows(quantizer, batch, heads, self.device)
            grown.append(buffers.grown(like, count))
        keys.adopt(grown[0])  # only now, so that no failure leaves them with different rows
        values.adopt(grown[1])

    def extend(self, count: int) -> None:
        """Count `count` tokens that were written into the rows after the last."""
        self._keys.extend(count)
        self._values.extend(count)

    def rows_in_use(self) -> tuple[int, int]:
        """The first row in `key_rows` and `value_rows` and the one after the last."""
        return self._keys.start, self._keys.end

    def use_rows(self, start: int, end: int) -> None:
        """Go back to rows that were in use before, in the same memory."""
        for buffers in (self._keys, self._values):
            buffers.start, buffers.end = start, end

    def pin(self, pinned: bool) -> None:
        """Keep the rows where they are, whatever is dropped, or no longer."""
        self._keys.pinned = self._values.pinned = pinned

    @property
    def room(self) -> int:
        """Tokens that can be taken without new memory."""
        return self._keys.capacity - self._keys.end

    def key_rows(self) -> dict[str, Tensor]:
        """The keys' whole tensors (batch, heads, capacity, ...), spare rows included."""
        return self._keys.tensors

    def value_rows(self) -> dict[str, Tensor]:
        """The values' whole tensors (batch, heads, capacity, ...), spare rows included."""
        return self._values.tensors

    def key_coding(self) -> tuple[Quantizer, ChannelStatistics, dict[str, Tensor]]:
        """What codes keys: quantiser, statistics, and the tensors that take the rows."""
        assert self.key_statistics is not None
        return self.key_quantizer, self.key_statistics, self._keys.tensors

    def value_coding(self) -> tuple[Quantizer, ChannelStatistics, dict[str, Tensor]]:
        """What codes values; as `key_coding`."""
        assert self.value_statistics is not None
        return self.value_quantizer, self.value_statistics, self._values.tensors

    def _check(self, name: str, x: Tensor, d: int) -> None:
        check_vectors(name, x, d)
        if x.dim() != 4:
            raise ValueError(
                f"{name} have shape {tuple(x.shape)}; pass (batch, heads, tokens, {d})"
            )
        if x.device != self.device:
            raise ValueError(f"{name} are on {x.device}, the store is on {self.device}; move one")
        if self.key_statistics is not None and x.shape[:2] != self.key_statistics.weight.shape[:2]:
            batch, heads = self.key_statistics.weight.shape[:2]
            raise ValueError(
                f"{name} have batch {x.shape[0]} and {x.shape[1]} heads, the store holds batch "
                f"{batch} and {heads} heads; use a new store, or reset this one"
            )
        check_finite(name, x, on_gpu=self.config.check_finite)

    def key_span(self, start: int = 0, end: int | None = None) -> PackedSpan:
        """The packed keys of the tokens [start, end), sharing this store's memory."""
        return self._span(self._keys, self.key_statistics, self.key_quantizer, start, end)

    def value_span(self, start: int = 0, end: int | None = None) -> PackedSpan:
        """The packed values of the tokens [start, end), sharing this store's memory."""
        return self._span(self._values, self.value_statistics, self.value_quantizer, start, end)

    def _span(
        self,
        buffers: TokenBuffers,
        statistics: ChannelStatistics | None,
        quantizer: Quantizer,
        start: int,
        end: int | None,
    ) -> PackedSpan:
        if statistics is None:
            raise ValueError("the store is empty; append keys and values first")
        rows = buffers.rows(start, len(buffers) if end is None else end)
        return PackedSpan(rows, statistics, quantizer)

    def attention_scores(self, queries: Tensor) -> Tensor:
        """Estimated inner products of queries with the stored keys, not divided by sqrt(d).

        Args:
            queries: (batch, query heads, n, d_key); query heads are a multiple of the stored
                heads (grouped-query attention).

        Returns:
            (batch, query heads, n, len(self)) float32.
        """
        check_vectors("queries", queries, self.d_key)
        span = self.key_span()
        batch, heads = span.shape[:2]
        if queries.dim() != 4 or queries.shape[0] != batch or queries.shape[1] % heads:
            raise ValueError(
                f"queries have shape {tuple(queries.shape)}; pass ({batch}, a multiple of {heads}, "
                f"n, {self.d_key})"
            )
        return span.scores(queries)

    def get_keys(self) -> Tensor:
        """The reconstructed keys, (batch, heads, len(self), d_key) float32."""
        return _materialize(self.key_span())

    def get_values(self) -> Tensor:
        """The reconstructed values, (batch, heads, len(self), d_value) float32."""
        return _materialize(self.value_span())

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens; an empty store takes new statistics."""
        self._keys.crop(count)
        self._values.crop(count)
        if not len(self):
            self.reset()

    def drop_front(self, count: int, shrink: bool = True) -> None:
        """Forget the first `count` tokens; the statistics stay, and unless `shrink` the memory."""
        self._keys.drop_front(count, shrink)
        self._values.drop_front(count, shrink)

    def reset(self) -> None:
        """Forget everything, statistics included."""
        self._keys.clear()
        self._values.clear()
        self.key_statistics = self.value_statistics = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every tensor along the batch axis (selection, repetition)."""
        self._keys.map(fn)
        self._values.map(fn)
        if self.key_statistics is not None and self.value_statistics is not None:
            self.key_statistics = self.key_statistics.map(fn)
            self.value_statistics = self.value_statistics.map(fn)

    def state(self) -> dict[str, Tensor]:
        """The live rows and the statistics by name, for saving."""
        if self.key_statistics is None or self.value_statistics is None:
            return {}
        state: dict[str, Tensor] = {}
        for name, buffers, statistics in (
            ("key", self._keys, self.key_statistics),
            ("value", self._values, self.value_statistics),
        ):
            state |= {f"{name}_{k}": v for k, v in buffers.rows(0, len(self)).items()}
            state[f"{name}_weight"] = statistics.weight
            if statistics.mean is not None:
                state[f"{name}_mean"] = statistics.mean
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, into an empty store."""
        self.reset()
        if not state:
            return
        self.key_statistics = self._load_part("key_", self._keys, state)
        self.value_statistics = self._load_part("value_", self._values, state)

    @staticmethod
    def _load_part(
        prefix: str, buffers: TokenBuffers, state: dict[str, Tensor]
    ) -> ChannelStatistics:
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        statistics = ChannelStatistics(part.pop("weight"), part.pop("mean", None))
        if part:
            buffers.append(part)
        return statistics

    def nbytes(self) -> dict[str, int]:
        """Bytes of this store's tensors by part (the shared tables not included)."""
        keys, values = self._keys.nbytes(), self._values.nbytes()
        parts = {f"key_{name}": size for name, size in keys.items() if name != "spare"}
        parts |= {f"value_{name}": size for name, size in values.items() if name != "spare"}
        parts["spare"] = keys["spare"] + values["spare"]
        statistics = [s for s in (self.key_statistics, self.value_statistics) if s is not None]
        parts["statistics"] = sum(s.nbytes for s in statistics)
        return parts


def shared_quantizer(
    role: str, config: RotorQuantConfig, d: int, device: torch.device
) -> Quantizer:
    """The quantiser of "keys" or "values" for these settings, one per process and device."""
    if role == "keys":
        rule, seed = (config.key_quantizer, config.key_bits, config.key_scale), config.seed
    else:
        rule, seed = ("mse", config.value_bits, config.value_scale), config.seed
        seed += _VALUE_SEED_OFFSET
    qjl = (config.qjl_dim, config.qjl_projection) if rule[0] == "prod" else None
    return _build_quantizer(*rule, qjl, config.rotation, config.rotor_layers, seed, d, device)


@functools.lru_cache(maxsize=64)
def _build_quantizer(
    kind: str,
    bits: int,
    scale: str,
    qjl: tuple[int | None, str] | None,
    rotation: str,
    rotor_layers: int | None,
    seed: int,
    d: int,
    device: torch.device,
) -> Quantizer:
    if qjl is None:
        return RotorQuantMSE(
            d,
            bits,
            seed,
            device=device,
            rotation=rotation,
            rotor_layers=rotor_layers,
            scale=scale,
            scale_dtype=torch.float16,
        )
    return RotorQuantProd(
        d,
        bits,
        qjl[0],
        seed,
        device=device,
        projection=qjl[1],
        rotation=rotation,
        rotor_layers=rotor_layers,
        scale=scale,
        scale_dtype=torch.float16,
    )


def empty_rows(
    quantizer: Quantizer, batch: int, heads: int, device: torch.device
) -> dict[str, Tensor]:
    """Rows of no tokens, (batch, heads, 0, ...), of the shapes and dtypes that `encode` gives."""
    none = torch.empty(0, quantizer.d, device=device)
    return {
        name: rows.new_empty(batch, heads, 0, *rows.shape[1:])
        for name, rows in encode(quantizer, none).items()
    }


def _materialize(span: PackedSpan) -> Tensor:
    out = torch.empty(span.shape, dtype=torch.float32, device=span.rows["scale"].device)
    span.materialize(out)
    return out
