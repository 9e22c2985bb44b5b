"""The tensor that attention receives: the shape of all cached keys (or values), packed inside.

`Cache.update` must return tensors. Returning dequantised ones would put the whole history in
memory at every step of every layer's attention, whatever kernel follows. So it returns a
`CompressedTensor`: any attention function can use it, since an operation on it first materialises
it; and one that knows it can read the packed codes through `CompressedTensor.states`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from rotorquant_hf.packed import PackedSpan


@dataclass(frozen=True)
class CachedStates:
    """All keys (or values) that one attention call may read, oldest token first.

    Attributes:
        sinks: (batch, heads, n, d), the first tokens, exact; n may be 0.
        packed: the quantised tokens that follow.
        tail: (batch, heads, m, d), the recent window and the new tokens, exact.
    """

    sinks: Tensor
    packed: PackedSpan
    tail: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, d)."""
        batch, heads, m, d = self.tail.shape
        return batch, heads, self.sinks.shape[2] + self.packed.shape[2] + m, d

    def materialize(self) -> Tensor:
        """The dequantised tensor, in the dtype of the tail."""
        out = self.tail.new_empty(self.shape)
        first, last = self.sinks.shape[2], self.shape[2] - self.tail.shape[2]
        out[:, :, :first] = self.sinks
        self.packed.materialize(out[:, :, first:last])
        out[:, :, last:] = self.tail
        return out


class CompressedTensor(Tensor):
    """A read-only tensor (batch, heads, tokens, d) over `CachedStates`.

    Asking for its shape, dtype or device reads nothing. Any other operation materialises it
    and goes on with the dequantised tensor; nothing keeps that one when the operation is done.
    """

    states: CachedStates

    @staticmethod
    def __new__(cls, states: CachedStates) -> CompressedTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls, states.shape, dtype=states.tail.dtype, device=states.tail.device
        )
        tensor.states = states
        return tensor

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return (
            f"CompressedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"packed={self.states.packed.shape[2]})"
        )

    def materialize(self) -> Tensor:
        """The dequantised tensor."""
        return self.states.materialize()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        _refuse_writing(func, args, kwargs or {})
        # Here rather than in __torch_dispatch__, so that a function made of several operators,
        # such as scaled_dot_product_attention, materialises once.
        args, kwargs = tree_map_only(cls, cls.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What reaches an operator without passing `__torch_function__` (calls from C++)."""
        _refuse_writing(func, args, kwargs or {})
        args, kwargs = tree_map_only(cls, cls.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = getattr(func, "__name__", "").partition(".")[0]  # overloads are named add_.Tensor
    in_place = (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True
    written = list(args[:1]) if in_place or name in ("__setitem__", "__set__") else []
    written.append(kwargs.get("out"))
    if any(isinstance(x, CompressedTensor) for x in tree_leaves(written)):
        raise RuntimeError(
            f"{name} would write into cached keys or values that are stored quantised; "
            "write into a copy (tensor.clone())"
        )


_GETTERS = (
    "shape dtype device ndim layout itemsize requires_grad grad_fn is_leaf is_cpu is_cuda is_mps "
    "is_xpu is_meta is_nested is_sparse is_quantized"
)
_METHODS = (
    "size dim ndimension numel nelement __len__ is_floating_point is_complex get_device "
    "element_size"
)
_METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _GETTERS.split()]
    + [getattr(Tensor, name) for name in _METHODS.split()]
)
"""What is answered from the wrapper, without reading anything."""
