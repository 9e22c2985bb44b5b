"""The native library: coding, and attention over packed codes, in C, for CPUs.

`pip install` compiles it where it finds a compiler. Nothing needs it: without it, plain torch
computes (`quant/mse.py`, `attention/torch_attention.py`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch

MAX_TERMS = 4
MAX_SIZE = 4096
"""Terms of packed vectors, and codes of one, that the library takes."""

LEVELS = ("avx512", "avx2", "portable")
"""What it is compiled for, the fastest first; each needs the instructions of those after it."""

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""Dtypes of queries, keys and values that it reads."""

_TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.bool: 3,
    torch.uint8: 3,
}
"""Of elements, as attend.h numbers them."""


class TensorArgument(ctypes.Structure):
    """`Tensor` of attend.h."""

    _fields_ = [
        ("data", c_void_p),
        ("type", c_int64),
        ("strides", c_int64 * 3),
    ]

    def point(self, x: torch.Tensor) -> None:
        """Let it be a tensor of three axes or more, the last of neighbours."""
        self.data, self.type = x.data_ptr(), _TYPES[x.dtype]
        self.strides[:] = x.stride()[:3]

    def point_channels(self, scale: torch.Tensor) -> None:
        """Let it be scales of channels, (batch, heads, 1, d) or (batch, heads, 1, 1): one for all.

        Its third stride is that of the channels.
        """
        self.point(scale)
        self.strides[2] = int(scale.shape[3] > 1)


class RopeArgument(ctypes.Structure):
    """`Rope` of attend.h."""

    _fields_ = [
        ("pairs", c_int64),
        ("interleaved", c_int64),
        ("frequencies", TensorArgument),
    ]

    def point(self, frequencies: torch.Tensor, layout: str, batch: int) -> None:
        """Let it turn by frequencies (batch or 1, 1, 1, r), of a layout of `quant/rope.py`."""
        self.pairs, self.interleaved = frequencies.shape[3], layout == "interleaved"
        self.frequencies.point(frequencies.expand(batch, -1, -1, -1))


class TermArgument(ctypes.Structure):
    """`Term` of attend.h."""

    _fields_ = [
        ("codes", TensorArgument),
        ("scale", TensorArgument),
        ("bits", c_int64),
        ("size", c_int64),
        ("table", c_void_p),
        ("basis", c_void_p),
    ]


class SideArgument(ctypes.Structure):
    """`Side` of attend.h."""

    _fields_ = [
        ("d", c_int64),
        ("sinks", TensorArgument),
        ("recent", TensorArgument),
        ("terms", c_int64),
        ("term", TermArgument * MAX_TERMS),
        ("scale", TensorArgument),
        ("mean", TensorArgument),
    ]


class Arguments(ctypes.Structure):
    """`Arguments` of attend.h."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "group", "n")),
        *((name, c_int64) for name in ("sinks", "packed", "recent")),
        ("factor", c_double),
        ("softcap", c_double),
        ("causal", c_int64),
        ("query", TensorArgument),
        ("out", c_void_p),
        ("sink_logits", c_void_p),
        ("mask", TensorArgument),
        ("mask_stride_k", c_int64),
        ("keys", SideArgument),
        ("values", SideArgument),
    ]


class AppendArguments(ctypes.Structure):
    """`Coding` of append.h."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "tokens", "d", "bits", "rule")),
        *((name, TensorArgument) for name in ("x", "channels", "mean")),
        *((name, c_void_p) for name in ("rotation", "boundaries", "centroids")),
        ("factor", TensorArgument),
        ("ridge", c_double),
        ("rope", RopeArgument),
        ("position", c_int64),
        ("projections", c_int64),
        ("projection", c_void_p),
        *((name, TensorArgument) for name in ("codes", "scale", "signs", "residual_norm")),
    ]


class TurnedArgument(ctypes.Structure):
    """`Turned` of statistics.h."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "tokens", "d")),
        ("x", TensorArgument),
        ("places", c_void_p),
        ("rope", RopeArgument),
        ("cos", TensorArgument),
        ("sin", TensorArgument),
    ]


class MomentArguments(ctypes.Structure):
    """`Moment` of statistics.h."""

    _fields_ = [
        ("x", TurnedArgument),
        ("group", c_int64),
        *((name, c_void_p) for name in ("mean", "before")),
    ]


class BlockArguments(ctypes.Structure):
    """`Block` of statistics.h."""

    _fields_ = [
        ("x", TurnedArgument),
        ("power", c_double),
        *((name, c_int64) for name in ("center", "layout")),
        ("spread", TensorArgument),
        *((name, c_double) for name in ("turns", "min_rms", "offset_energy", "offset_share")),
        *((name, c_void_p) for name in ("scale", "mean", "turning")),
    ]


class HessianArguments(ctypes.Structure):
    """`Hessian` of statistics.h."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "d")),
        *((name, c_void_p) for name in ("moment", "before")),
        ("rope", RopeArgument),
        *((name, TensorArgument) for name in ("by_cos", "by_sin", "by_turn")),
        ("level", c_double),
        ("scale", TensorArgument),
        ("start", c_void_p),
        ("ridge", c_double),
        ("iterations", c_int64),
        ("factor", c_void_p),
    ]


class PushedArgument(ctypes.Structure):
    """`Pushed` of push.h."""

    _fields_ = [("d", c_int64), ("from_", TensorArgument), ("to", TensorArgument)]


class PushArguments(ctypes.Structure):
    """`Push` of push.h."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "tokens")),
        ("keys", PushedArgument),
        ("values", PushedArgument),
    ]


ARGUMENTS: dict[str, type[ctypes.Structure]] = {
    "attend": Arguments,
    "append": AppendArguments,
    "moment": MomentArguments,
    "block": BlockArguments,
    "hessian": HessianArguments,
}
"""Of the functions that are compiled for every level."""


class Library:
    """The loaded library.

    Attributes:
        level: of `LEVELS`, the best that this processor has.
    """

    def __init__(self, path: str) -> None:
        loaded = ctypes.CDLL(path)
        loaded.rotorquant_level.restype = c_char_p
        self._name: bytes = loaded.rotorquant_level()
        self.level = self._name.decode()
        self._team = _team_of_torch()
        self._functions = {name: getattr(loaded, f"rotorquant_{name}") for name in ARGUMENTS}
        for name, arguments in ARGUMENTS.items():
            self._functions[name].argtypes = [POINTER(arguments), c_char_p, c_void_p, c_int]
        self._push = loaded.rotorquant_push
        self._push.argtypes = [POINTER(PushArguments)]

    def attend(self, arguments: Arguments, level: str | None = None) -> None:
        """Compute what the arguments say, with as many threads as torch has.

        Raises:
            MemoryError: if there is none for the sums.
        """
        self._run("attend", arguments, level, "attention over packed codes")

    def append(self, arguments: AppendArguments, level: str | None = None) -> bool:
        """Code what the arguments say, with as many threads as torch has.

        Returns:
            Whether the rows are right: not if a vector is too large for its scale.

        Raises:
            MemoryError: if there is none to work in.
        """
        return self._run("append", arguments, level, "coding keys and values") == 0

    def moment(self, arguments: MomentArguments, level: str | None = None) -> None:
        """Take second moments, with as many threads as torch has.

        Raises:
            MemoryError: if there is none for the sums.
        """
        self._run("moment", arguments, level, "the second moments of queries")

    def block(self, arguments: BlockArguments, level: str | None = None) -> None:
        """Take scales and means of channels, with as many threads as torch has.

        Raises:
            MemoryError: if there is none to work in.
        """
        self._run("block", arguments, level, "the statistics of keys and values")

    def hessian(self, arguments: HessianArguments, level: str | None = None) -> bool:
        """Make Hessians of second moments, with as many threads as torch has.

        Returns:
            Whether they are right: not of a moment that is none.

        Raises:
            MemoryError: if there is none to work in.
        """
        return self._run("hessian", arguments, level, "the Hessian of keys") == 0

    def _run(self, name: str, arguments: ctypes.Structure, level: str | None, what: str) -> int:
        """What a function returns, 0 or more."""
        at = self._name if level is None else level.encode()
        done: int = self._functions[name](arguments, at, self._team, torch.get_num_threads())
        if done < 0:
            raise MemoryError(f"no memory for {what}")
        return done

    def push(self, arguments: PushArguments) -> bool:
        """Copy new tokens to their places; whether all their elements are finite."""
        return self._push(arguments) == 0


@functools.cache
def library() -> Library | None:
    """The library, or None where it was not compiled.

    In the environment, ROTORQUANT_NATIVE=0 leaves it out, and a path there names another one.
    """
    asked = os.environ.get("ROTORQUANT_NATIVE", "")
    if asked == "0":
        return None
    if asked:
        return Library(asked)
    found = importlib.util.find_spec("rotorquant_hf.native._library")
    return None if found is None or found.origin is None else Library(found.origin)


def _team_of_torch() -> int | None:
    """The address of the function that runs work on the threads that torch has already.

    Threads of our own would compete with these, which wait for work in a loop for a while. None if
    torch has no GNU OpenMP; then one thread works.
    """
    for path in Path(torch.__file__).parent.glob("lib/libgomp*"):
        loaded = ctypes.CDLL(str(path))
        if hasattr(loaded, "GOMP_parallel"):
            return ctypes.cast(loaded.GOMP_parallel, c_void_p).value
    return None
