"""Decoding on a CPU beside llama.cpp and its quantised caches, with the same weights.

    python -m evals.bench.llama_cpp --model MODEL.gguf --context 512 2048 --text FILE

llama.cpp reads a copy of the file with weights in float32, which is what Transformers makes of it.

The first table: a step after a text of random tokens, milliseconds: median, 10th and 90th
percentile, and how many times as fast as with the same engine's uncompressed cache (of float32 in
Transformers, of float16 in llama.cpp, which computes flash attention). All caches of both engines
take their steps in turn.

The second, with --text: how far the next-token distributions are from those with that uncompressed
cache, over windows of a text, read in passes of --chunk tokens. KL divergence in nats, mean over
the tokens; the share of tokens whose likeliest successor is the same; perplexity. Bits are those of
an element of a long text's keys and values: codes and scales.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from rotorquant_hf.passing import cache_argument

from ..caches.registry import BASELINE, CacheSpec
from ..environment import Versions, device_of
from ..measurements.comparison import compared
from ..probes.footprint import footprint
from ..requirements import require_packages
from ..subjects import gguf
from ..subjects.llama_cpp import FORMATS, PACKAGES, UNCOMPRESSED, LlamaCpp, float32_copy
from ..subjects.models import LoadedModel, ModelOptions, load
from ..subjects.texts import TextOptions, cut
from ..tables import markdown
from ..timing import Timing
from .common import exit_with, new_parser


class Reader:
    """A model with a cache, in Transformers.

    Args:
        loaded, spec: the model and the cache.
        tokens: that it will read at most.
        chunk: tokens of a forward pass at most.
        all_logits: whether `feed` returns those of every token.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        spec: CacheSpec,
        tokens: int,
        chunk: int = 512,
        all_logits: bool = False,
    ) -> None:
        self._model, self._chunk, self._all = loaded.model, chunk, all_logits
        self._cache = spec.make(loaded.model.config)
        self._argument = cache_argument(self._model, self._cache)

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Tensor:
        """As `LlamaCpp.feed`."""
        logits, keep = [], 0 if self._all else 1
        for part in torch.tensor(ids).split(self._chunk):
            out = self._model(part[None], **self._argument, logits_to_keep=keep)
            logits.append(out.logits[0])
        return torch.cat(logits if self._all else logits[-1:])

    @property
    def bits(self) -> float:
        """Of an element of keys and values in a long text."""
        found = footprint(self._cache, self._model.dtype)
        return found.long_bits_per_number or found.full_bits


@dataclass(frozen=True)
class Subject:
    """A cache of an engine.

    Attributes:
        engine, cache: their names.
        reader: makes one, given the tokens that it will read, and options.
    """

    engine: str
    cache: str
    reader: Callable[..., Reader | LlamaCpp]


def times(
    subjects: Sequence[Subject], ids: Sequence[int], steps: int, warm_up: int
) -> dict[Subject, Timing]:
    """Seconds of a step after some tokens, of each in turn."""
    readers = {x: x.reader(len(ids) + warm_up + steps) for x in subjects}
    token = {x: int(reader.feed(ids).argmax()) for x, reader in readers.items()}
    seconds: dict[Subject, list[float]] = {x: [] for x in subjects}
    for step in range(warm_up + steps):
        for x, reader in readers.items():
            begin = time.perf_counter()
            token[x] = int(reader.feed([token[x]]).argmax())
            if step >= warm_up:
                seconds[x].append(time.perf_counter() - begin)
    return {x: Timing.of(found) for x, found in seconds.items()}


def time_rows(found: dict[Subject, Timing], context: int) -> Iterator[list[str]]:
    """Rows of the first table; the first of an engine is what its others are compared with."""
    exact: dict[str, float] = {}
    for x, timing in found.items():
        faster = exact.setdefault(x.engine, timing.median) / timing.median
        spread = f"{1e3 * timing.p10:.1f}-{1e3 * timing.p90:.1f}"
        yield [
            str(context), x.engine, x.cache, f"{1e3 * timing.median:.1f}", spread, f"{faster:.2f}x"
        ]  # fmt: skip


def divergence_rows(
    subjects: Sequence[Subject], windows: Sequence[list[int]], chunk: int
) -> Iterator[list[str]]:
    """Rows of the second table; the first of an engine is what its others are compared with."""
    bits: dict[Subject, float] = {}
    parts: dict[Subject, list[tuple[Tensor, Tensor, Tensor]]] = {x: [] for x in subjects}
    for ids in windows:
        exact: dict[str, Tensor] = {}
        for x in subjects:
            reader = x.reader(len(ids), chunk=chunk, all_logits=True)
            logits = reader.feed(ids).clone()
            bits[x] = reader.bits
            expected = exact.setdefault(x.engine, logits)
            parts[x].append(compared(logits, expected, torch.tensor(ids[1:])))
    for x, found in parts.items():
        kl, agree, losses = (torch.cat(part, dim=-1).double() for part in zip(*found, strict=True))
        perplexity = math.exp(float(losses[0].mean()))
        figures = f"{bits[x]:.2f}", f"{kl.mean():.2e}", f"{agree.mean():.2%}", f"{perplexity:.3f}"
        yield [x.engine, x.cache, *figures]


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    args = _arguments(argv)
    require_packages("this", PACKAGES)
    gguf.check(args.model)
    specs = [CacheSpec.named(name, "--caches") for name in (BASELINE, *args.caches)]
    torch.set_num_threads(args.threads)
    loaded = load(ModelOptions(model=args.model, dtype="float32", device="cpu"))
    windows = _windows(loaded, args) if args.text else []
    print(f"{Versions.of(device_of('cpu'), 'evals.bench.llama_cpp', argv)}\n")
    print(f"llama-cpp-python {version('llama-cpp-python')}\n")
    with TemporaryDirectory() as folder:
        copy = float32_copy(args.model, Path(folder))
        subjects = [
            Subject("Transformers", spec.label, partial(Reader, loaded, spec)) for spec in specs
        ]
        subjects += [
            Subject("llama.cpp", name, partial(LlamaCpp, copy, name, threads=args.threads))
            for name in (UNCOMPRESSED, *args.formats)
        ]
        if args.context:
            header = ("tokens", "engine", "cache", "ms", "p10-p90", "beside uncompressed")
            print(markdown(header, [], left=3))
        for context in args.context:
            generator = random.Random(0)
            ids = [generator.randrange(loaded.model.config.vocab_size) for _ in range(context)]
            found = times(subjects, ids, args.steps, args.warm_up)
            for row in time_rows(found, context):
                print(f"| {' | '.join(row)} |", flush=True)
        if windows:
            print()
            columns = ("engine", "cache", "bits", "KL", "same likeliest", "perplexity")
            print(markdown(columns, [], left=2))
            for row in divergence_rows(subjects, windows, args.chunk):
                print(f"| {' | '.join(row)} |", flush=True)
    return 0


def _windows(loaded: LoadedModel, args: argparse.Namespace) -> list[list[int]]:
    options = TextOptions(
        text=tuple(args.text), window=args.window, max_tokens=args.max_tokens, place="spread"
    )
    windows, _ = cut(loaded.tokenizer, options.documents(), options, loaded.context, args.chunk)
    return [window.ids[0].tolist() for window in windows]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="GGUF file")
    add("--context", type=int, nargs="*", default=[512, 2048], help="tokens before the steps")
    add("--caches", nargs="+", default=["k4v4", "k3v3"], help="names, with settings as in verify")
    formats = [name for name in FORMATS if name != UNCOMPRESSED]
    add("--formats", nargs="*", default=formats, choices=formats, help="of llama.cpp's cache")
    add("--threads", type=int, default=1, help="of either engine")
    add("--steps", type=int, default=40, help="that are timed")
    add("--warm-up", type=int, default=4, help="steps that do not count")
    add("--text", nargs="+", help="files, folders or archives of text")
    add("--window", type=int, default=2048, help="tokens of a text that are read with a new cache")
    add("--max-tokens", type=int, default=8192, help="of the texts, in all")
    add("--chunk", type=int, default=64, help="tokens of a pass over a text")
    args = parser.parse_args(argv)
    if min([args.threads, args.warm_up, args.chunk, *args.context]) < 1 or args.steps < 2:
        parser.error("choose --threads, --warm-up, --chunk, --context from 1, --steps from 2")
    return args


if __name__ == "__main__":
    exit_with(main)
