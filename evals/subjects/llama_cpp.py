"""A model of a GGUF file as llama.cpp runs it, with its own cache, in formats of a few bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import NotAvailableError
from . import gguf

PACKAGES = ("gguf", "llama-cpp-python")
"""What this needs; the second is compiled when it is installed."""

UNCOMPRESSED = "f16"
"""The format of its cache in which nothing is lost. (One in float32 it casts to float16 in every
step, before it computes attention: slower, and the same logits.)"""

FORMATS = {UNCOMPRESSED: 16.0, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5}
"""Formats of its cache, with the bits of an element: a code, and of 32 elements a scale."""


def float32_copy(name: str, folder: Path) -> Path:
    """Write a GGUF file's model with weights in float32, as Transformers reads them.

    So that both decode with the same weights, and as many bytes of them.

    Args:
        name: of the file.
        folder: that takes the copy.

    Raises:
        InputError: if there is no such file.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    gguf.check(name)
    read = GGUFReader(name)
    path = folder / Path(name).name
    writer = GGUFWriter(path, read.fields["general.architecture"].contents())
    for field in read.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue  # of the file itself, or written already
        kind, value = field.types[0], field.contents()
        parts = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(
            field.name, 0 if field.name == "general.file_type" else value, kind, parts
        )
    for tensor in read.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaCpp:
    """A context of llama.cpp: a model, and what it has read.

    Args:
        path: of the GGUF file.
        format_: of keys and values, of `FORMATS`; attention is its flash attention, which alone
            reads values of a few bits.
        tokens: that it will read at most.
        threads: that it may take.
        chunk: tokens of a forward pass at most.
        all_logits: whether `feed` returns those of every token.

    Raises:
        NotAvailableError: if it makes no such context.
    """

    def __init__(
        self,
        path: Path,
        format_: str,
        tokens: int,
        threads: int,
        chunk: int = 512,
        all_logits: bool = False,
    ) -> None:
        import llama_cpp

        type_ = getattr(llama_cpp, f"GGML_TYPE_{format_.upper()}")
        self.bits = FORMATS[format_]
        self._logits_of, self._all = llama_cpp.llama_get_logits_ith, all_logits
        try:
            self._llama = llama_cpp.Llama(
                str(path),
                n_ctx=tokens,
                n_batch=chunk,
                n_ubatch=chunk,
                n_threads=threads,
                n_threads_batch=threads,
                type_k=type_,
                type_v=type_,
                flash_attn=True,
                logits_all=all_logits,
                verbose=False,
            )
        except ValueError as error:
            raise NotAvailableError(f"llama.cpp, cache in {format_}: {error}") from error

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Read tokens.

        Returns:
            Logits, float32: (tokens, vocabulary), or (1, vocabulary), of the last.
        """
        before = self._llama.n_tokens
        self._llama.eval(ids)
        if self._all:
            return torch.from_numpy(self._llama.scores[before : self._llama.n_tokens])
        last = self._logits_of(self._llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(last, (1, self._llama.n_vocab())))
