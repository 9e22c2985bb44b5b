"""The bytes of a cache by part, measured on its tensors, everything included."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotorquant_hf.backend import running
from rotorquant_hf.layers.full import RotorQuantLayer

PART_NAMES = {
    "key_codes": "key codes",
    "key_scale": "key scales",
    "key_signs": "key QJL signs",
    "key_residual_norm": "key residual norms",
    "value_codes": "value codes",
    "value_scale": "value scales",
    "statistics": "channel statistics",
    "sinks": "sinks, full precision",
    "window": "recent, full precision",
    "spare": "spare capacity",
    "tables": "rotations and codebooks",
    "exact_layers": "uncompressed and recurrent",
}
# Every tensor of a store's rows is a part of its own, as its quantiser names it.
_PACKED_PREFIXES = ("key_", "value_")


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache. `print(report)` shows a table.

    Attributes:
        tokens: tokens seen.
        parts: bytes by part. `PART_NAMES` has the names of what this package's quantisers store;
            another quantiser's rows go by their own.
        numbers: key and value elements that the cache stands for (of a sliding window those it
            still holds).
        packed_numbers: those of them that are stored quantised.
        dtype: the model's dtype.
        backends: what codes and attends where compressed layers are; see `backend.running`.
    """

    tokens: int
    parts: dict[str, int]
    numbers: int
    packed_numbers: int
    dtype: torch.dtype
    backends: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """All bytes, spare capacity and tables included."""
        return sum(self.parts.values())

    @property
    def uncompressed_bytes(self) -> int:
        """Bytes of the same elements in the model's dtype."""
        return self.numbers * self.dtype.itemsize

    @property
    def bits_per_number(self) -> float:
        """Total bits over elements."""
        return 8 * self.total_bytes / max(self.numbers, 1)

    @property
    def ratio(self) -> float:
        """How many times smaller than uncompressed, in total."""
        return self.uncompressed_bytes / max(self.total_bytes, 1)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the quantised tokens alone: codes, scales, signs, residual norms."""
        return sum(size for name, size in self.parts.items() if name.startswith(_PACKED_PREFIXES))

    @property
    def packed_ratio(self) -> float:
        """How many times smaller the quantised tokens are: the limit for long contexts."""
        return self.packed_numbers * self.dtype.itemsize / max(self.packed_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values (for JSON)."""
        return {
            "tokens": self.tokens,
            "parts": dict(self.parts),
            "total_bytes": self.total_bytes,
            "uncompressed_bytes": self.uncompressed_bytes,
            "bits_per_number": self.bits_per_number,
            "ratio": self.ratio,
            "packed_ratio": self.packed_ratio,
            "dtype": str(self.dtype).removeprefix("torch."),
            "backends": list(self.backends),
        }

    def __str__(self) -> str:
        total = max(self.total_bytes, 1)
        rows = [(PART_NAMES.get(name, name), size) for name, size in self.parts.items() if size]
        lines = [f"{name:<26}{size:>15,}  {size / total:>6.1%}" for name, size in rows]
        name = str(self.dtype).removeprefix("torch.")
        return "\n".join(
            [
                f"{'cache of ' + format(self.tokens, ',') + ' tokens':<26}{'bytes':>15}",
                *lines,
                f"{'total':<26}{self.total_bytes:>15,}  {self.bits_per_number:.2f} bits per "
                "element",
                f"{'in ' + name:<26}{self.uncompressed_bytes:>15,}  {self._compared()}",
                *(f"computed by {name}" for name in self.backends),
            ]
        )

    def _compared(self) -> str:
        if not self.numbers:
            return "nothing is cached yet"
        packed = (
            f"tokens alone: {self.packed_ratio:.2f}x" if self.packed_numbers else "tokens: none"
        )
        # Of a short text the statistics that are being taken count for more than is saved.
        size = f"{1 / self.ratio:.2f}x larger" if self.ratio < 1 else f"{self.ratio:.2f}x smaller"
        return f"{size} (quantised {packed})"


def measure(layers: Iterable[Any], tokens: int) -> MemoryReport:
    """Measure the layers of a cache: `RotorQuantLayer`s, and any others as uncompressed."""
    parts = dict.fromkeys(PART_NAMES, 0)
    numbers = packed = 0
    dtype = torch.float32
    tables: dict[int, int] = {}
    ropes: set[int] = set()
    devices: dict[torch.device, None] = {}  # in the order of the layers
    for layer in layers:
        if isinstance(layer, RotorQuantLayer):
            for name, size in layer.nbytes().items():
                parts[name] = parts.get(name, 0) + size
            all_numbers, packed_numbers = layer.numbers()
            numbers, packed = numbers + all_numbers, packed + packed_numbers
            if layer.is_initialized:
                dtype = layer.dtype
                devices[layer.device] = None
                if layer.rope is not None and layer.get_seq_length():
                    if id(layer.rope) in ropes:  # counted with another layer
                        parts["statistics"] -= layer.rope.frequencies.nbytes
                    ropes.add(id(layer.rope))
                if len(layer.store):
                    quantizers = [side.quantizer for side in layer.store.sides]
                    # A rotation is one for all bits.
                    tables |= {id(x): x.nbytes for q in quantizers for x in q.buffers()}
        else:
            for tensor in tensors_of(layer).values():
                # A sliding layer of Transformers' keeps a view of all that it was last given.
                parts["exact_layers"] += tensor.untyped_storage().nbytes()
                if tensor.is_floating_point():
                    numbers, dtype = numbers + tensor.numel(), tensor.dtype
    parts["tables"] = sum(tables.values())
    backends = tuple(dict.fromkeys(map(running, devices)))
    return MemoryReport(tokens, parts, numbers, packed, dtype, backends)


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """The tensors among a layer's attributes, also those in dictionaries, by name."""
    found = {}
    for name, value in vars(layer).items():
        entries = value.items() if isinstance(value, dict) else [(None, value)]
        for key, entry in entries:
            if isinstance(entry, Tensor):
                found[name if key is None else f"{name}.{key}"] = entry
    return found
