"""The tensor that attention receives: the shape of all cached keys (or values), packed inside.

`Cache.update` must return tensors. Returning dequantised ones would put the whole history in
memory at every step, in every layer. So it returns a
`CompressedTensor`: `scaled_dot_product_attention` on it reads the packed codes, and so can any
attention function that knows it; for all others it is a tensor, since any other operation on it
first materialises it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only

from rotorquant_hf.attention.dispatch import compute, needs_gradient, why_unsupported
from rotorquant_hf.attention.head_view import AS_STORED, VIEWS, HeadView
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.states import KVStates, PlainStates

OnQuery = Callable[[Tensor, Tensor | None, float | None], None]


class CompressedTensor(Tensor):
    """A read-only tensor (batch, heads, tokens, d) over `KVStates`, or a head view of it.

    If it has `on_query`, attention calls that with the queries (batch, query heads, n, d) that have
    read it, their mask or None, and the factor of the inner products or None for d^-1/2. For the
    sake of them even tokens of which none is packed come as one (`PlainStates`).

    Asking for its shape, dtype or device reads nothing, `scaled_dot_product_attention` reads the
    packed codes, and repeating the heads, as for grouped queries, gives another of its kind. Any
    other operation materialises it and goes on with the dequantised tensor; nothing keeps that
    one when the operation is done.
    """

    states: KVStates | PlainStates
    view_of_heads: HeadView
    on_query: OnQuery | None
    _size: torch.Size

    @staticmethod
    def __new__(
        cls,
        states: KVStates | PlainStates,
        view: HeadView = AS_STORED,
        on_query: OnQuery | None = None,
    ) -> CompressedTensor:
        sinks, size = states.sinks, torch.Size(view.shape(states.shape))
        tensor = Tensor._make_wrapper_subclass(cls, size, dtype=sinks.dtype, device=sinks.device)
        tensor._size = size
        tensor.states, tensor.view_of_heads, tensor.on_query = states, view, on_query
        return tensor

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        packed = 0 if self.packed_states is None else self.packed_states.packed.shape[2]
        return f"CompressedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, packed={packed})"

    # Attention asks for these some times a step; through `__torch_function__` each takes longer
    # than copying a token.

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As of any tensor."""
        return self._size

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """As of any tensor."""
        return self.states.sinks.dtype

    @property
    def packed_states(self) -> KVStates | None:
        """The states, None if none of their tokens is packed."""
        return None if isinstance(self.states, PlainStates) else self.states

    def materialize(self) -> Tensor:
        """The dequantised tensor."""
        return self.view_of_heads.of(self.states.materialize())

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return _scaled_dot_product_attention(*args, **kwargs)
        _refuse_writing(func, args, kwargs)
        result = None
        if args and type(args[0]) is cls:
            result = _as_view(func, *args, **kwargs)
        if result is not None:
            return result
        # Here rather than in __torch_dispatch__, so that a function made of several operators,
        # such as scaled_dot_product_attention, materialises once.
        args, kwargs = tree_map_only(cls, cls.materialize, (args, kwargs))
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


def _scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Attention, by the packed codes where possible; `key` then sees the queries."""
    # Only where a compiler might look in: the wrapper takes longer than all that `_attend` does.
    attend = _attend_uncompiled if torch.compiler.is_dynamo_compiling() else _attend
    result = attend(query, key, value, *args, **kwargs)
    if result is None:
        plain, args, kwargs = tree_map_only(
            CompressedTensor, CompressedTensor.materialize, ((query, key, value), args, kwargs)
        )
        result = functional.scaled_dot_product_attention(*plain, *args, **kwargs)
    mask = kwargs.get("attn_mask", args[0] if args else None)
    show_queries(key, query, mask, kwargs.get("scale"))  # which torch takes by name alone
    return result


def show_queries(
    key: Tensor, query: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> None:
    """Tell the keys of what attention has read which queries (batch, heads, n, d) read them.

    Args:
        key, query: as attention got them.
        mask: broadcastable to (batch, heads, n, tokens), or None.
        scale: factor of the inner products; None for d^-1/2.
    """
    if isinstance(key, CompressedTensor) and key.on_query is not None:
        batch, heads, _, d = key.states.shape
        fits = query.dim() == 4 and (query.shape[0], query.shape[3]) == (batch, d)
        if fits and query.shape[1] % heads == 0 and not isinstance(query, CompressedTensor):
            key.on_query(query, mask, scale)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`scaled_dot_product_attention` over packed codes; None where torch has to compute it."""
    if not (isinstance(key, CompressedTensor) and isinstance(value, CompressedTensor)):
        return None
    if key.view_of_heads != value.view_of_heads or key.view_of_heads.split:
        return None
    keys, values = key.packed_states, value.packed_states
    if keys is None or values is None:
        return None
    if dropout_p or is_causal or isinstance(query, CompressedTensor):  # causal from the first key
        return None
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        query = query.to(torch.get_autocast_dtype(query.device.type))
    elif query.dtype != key.dtype or (
        attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype)
    ):
        return None
    options = AttentionOptions(query.shape[-1] ** -0.5 if scale is None else scale, attn_mask)
    if why_unsupported(query, keys, values, options) is not None:
        return None
    # A single head is broadcast even without enable_gqa.
    if not (enable_gqa or key.shape[1] in (1, query.shape[1])) or query.shape[1] % key.shape[1]:
        return None
    if needs_gradient(query, keys, values, options):
        return None
    return compute(query, keys, values, options)


_attend_uncompiled = torch.compiler.disable(_attend)


def _as_view(
    func: Callable[..., Any], x: CompressedTensor, *args: Any, **kwargs: Any
) -> CompressedTensor | None:
    """Handle no-op conversions and views that repeat heads without dequantising.

    None for every other operation.
    """
    if func in VIEWS:
        view = x.view_of_heads.after(func, x.states, args, kwargs)
        return None if view is None else CompressedTensor(x.states, view, x.on_query)
    if func in _CONVERSIONS:
        probe = torch.empty((0,) * x.dim(), dtype=x.dtype, device=x.device)
        return x if func(probe, *args, **kwargs) is probe else None
    if func is Tensor.detach:
        recorded = x.states.sinks.requires_grad or x.states.recent.requires_grad
        return None if recorded else CompressedTensor(x.states, x.view_of_heads, x.on_query)
    return None


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

_CONVERSIONS = frozenset(
    [Tensor.to, Tensor.contiguous, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.cpu]
)
"""Return the tensor itself if dtype and device are right already."""
