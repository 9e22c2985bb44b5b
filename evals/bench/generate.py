"""Whole-model decoding with each cache: milliseconds a token, tokens per second, memory.

    python -m evals.bench.generate --out generate.jsonl
    python -m evals.bench.generate --largest-batch 32768

The model has the shape of Llama-3.1-8B (or what the options say) and random weights. Each cache is
filled with random keys and values, layer by layer, in place of a prompt (`evals speed` reads a real
one); then every step feeds the model one token per row. A step is timed on the host, up to the
device's last result, as a loop that looks at each token would see it: with the time of launching
the model's kernels, except where a step is a CUDA graph ("graph", `rotorquant_hf.DecodeGraph`).

Where all caches of a configuration fit into memory together, they take their steps in turn; else
one comes after the other, the baseline first and again last. `--largest-batch` looks for the
largest batch that a cache lets fit, and decodes with it.

Memory, in GB (1e9 bytes): "cache" is all that is allocated for the cache after its first steps;
"peak" adds the weights and what a step takes besides. On a CPU only the bytes of the cache's
tensors are given.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, PreTrainedModel

from rotorquant_hf import PRESETS, DecodeGraph
from rotorquant_hf.attention.tensor import show_queries

from ..caches.registry import BASELINE, CacheSpec
from ..environment import Versions, device_of, on_gpu
from ..errors import NotAvailableError
from ..failures import DeviceLost, free_memory, guarded, recover
from ..measurements.memory import decode
from ..probes.footprint import footprint
from ..sweep.rows import JSONLines
from ..tables import markdown
from ..timing import MIN_SAMPLES, Timing, timed
from .common import (
    DEVICE_LOST,
    add_run_options,
    chunks,
    exit_with,
    new_parser,
    open_log,
    random_states,
    require_kernels,
)

QUANTIZED = {"quanto": 4, "hqq": 4, "fp8": None}
"""Backends of Transformers' QuantizedCache, with their bits where they can be chosen."""

_GRAPH_WARM_UP = 6  # steps until a DecodeGraph has captured and replayed
_TOGETHER = 0.6  # of the free memory, that caches may take together
_TRIES = 8


@dataclass(frozen=True)
class GenerationShape:
    """One configuration: `batch` rows of `context` tokens each."""

    batch: int
    context: int


def build_model(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """A model of the given shape with random weights, made on the device."""
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.intermediate,
        vocab_size=args.vocab,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def fill(
    cache: Cache, model: PreTrainedModel, shape: GenerationShape, generator: torch.Generator
) -> None:
    """Put `context` random tokens into every layer, read by random queries.

    Raises:
        RuntimeError: if a layer then says that it has more or fewer.
    """
    config = model.config
    size = shape.batch * config.num_key_value_heads * config.head_dim
    with torch.no_grad():
        for layer in range(config.num_hidden_layers):
            for count in chunks(shape.context, size):
                states = (shape.batch, config.num_key_value_heads, count, config.head_dim)
                seen, _ = cache.update(*random_states(states, model.dtype, generator), layer)
                asking = (shape.batch, config.num_attention_heads, min(count, 64), config.head_dim)
                show_queries(seen, random_states(asking, model.dtype, generator)[0])
    lengths = {int(cache.get_seq_length(layer)) for layer in range(config.num_hidden_layers)}
    if lengths != {shape.context}:
        raise RuntimeError(f"layers of {sorted(lengths)} tokens, filled with {shape.context}")


def estimated_bytes(name: str, model: PreTrainedModel, shape: GenerationShape) -> int:
    """About what a cache will take, for deciding what fits."""
    config, width = model.config, model.dtype.itemsize
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    elements *= shape.batch * shape.context
    if name == BASELINE:
        return elements * width
    if name in QUANTIZED:
        return elements * (QUANTIZED[name] or 8) // 8 * 9 // 8
    settings = PRESETS[name]
    window = min(shape.context, settings.residual_length + 2 * settings.block_length)
    window_bytes = elements // shape.context * window * width
    return (
        int(elements * (settings.key_spec.bits + settings.value_spec.bits + 0.5) / 16)
        + window_bytes
    )


class Decoder:
    """Decodes with one cache, filled when this is made, step by step.

    Args:
        name: the cache, see `caches/registry.py`. mode: "eager" or "graph".
        model, shape: what decodes, and how much of it.
        steps: how many steps there will be, warming up included.
        seed: of the tokens in the cache.

    Raises:
        NotAvailableError: if this cache or mode cannot be run here.
    """

    def __init__(
        self,
        name: str,
        mode: str,
        model: PreTrainedModel,
        shape: GenerationShape,
        steps: int,
        seed: int = 0,
    ) -> None:
        self.name, self.mode, self.model = name, mode, model
        self.cuda = on_gpu(model.device)
        generator = torch.Generator(model.device).manual_seed(seed)
        size = (shape.batch, 1)
        self.ids = torch.randint(
            0, model.config.vocab_size, size, device=model.device, generator=generator
        )
        self._base = self._allocated()
        self.cache = CacheSpec.of(name).make(model.config)
        fill(self.cache, model, shape, generator)
        self._graph = self._captured(self.cache, steps) if mode == "graph" else None
        self.scratch = self.graph_bytes = 0
        self.seconds: list[float] = []

    @torch.no_grad()
    def _next(self) -> Tensor:
        """The likeliest token of every row after `ids`, (batch, 1)."""
        if self._graph is not None:
            return self._graph(self.ids)[:, -1:].argmax(-1)
        return decode(self.model, self.ids, self.cache, 1)

    def _captured(self, cache: Any, steps: int) -> Callable[[Tensor], Tensor]:
        try:
            return DecodeGraph(self.model, cache, steps)
        except ValueError as error:
            raise NotAvailableError(str(error)) from None

    def warm_up(self, steps: int) -> None:
        """Steps that do not count; then takes stock of the memory."""
        reserved = self._reserved()
        allocated = self._allocated()
        for _ in range(max(steps, _GRAPH_WARM_UP) if self.mode == "graph" else steps):
            self.step()
        self.seconds.clear()
        # What a graph's pool holds beyond the tensors in it.
        grown = self._reserved() - reserved - (self._allocated() - allocated)
        self.graph_bytes = max(0, grown) if self.mode == "graph" else 0
        self.cache_bytes = footprint(self.cache, self.model.dtype).total_bytes
        if self.cuda:
            self.cache_bytes = self._allocated() - self._base

    def step(self) -> None:
        """Decode one token per row and note the seconds it took."""
        before = self._allocated()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        seconds, self.ids = timed(self._next, self.model.device)
        self.seconds.append(seconds)
        if self.cuda:
            peak = torch.cuda.max_memory_allocated(self.model.device)
            self.scratch = max(self.scratch, peak - before)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.model.device) if self.cuda else 0

    def _reserved(self) -> int:
        if not self.cuda:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.model.device)

    def row(self, weights: int) -> dict[str, Any]:
        """What was measured."""
        timing = Timing.of(self.seconds)
        row = {"status": "ok", **timing.row("ms"), "tokens_s": len(self.ids) / timing.median}
        row["cache_bytes"] = self.cache_bytes
        if self.cuda:
            extra = self.scratch + self.graph_bytes
            row |= {"graph_bytes": self.graph_bytes, "scratch_bytes": self.scratch}
            row["peak_bytes"] = weights + self.cache_bytes + extra
        return row


class GenerationBench:
    """Runs the rows of all configurations.

    Args:
        model: what decodes.
        args: the command's.
        log: takes the rows.
        until: `time.monotonic` after which nothing new is started.
    """

    def __init__(
        self, model: PreTrainedModel, args: argparse.Namespace, log: JSONLines, until: float
    ) -> None:
        self.model, self.args, self.log, self.until = model, args, log, until
        self.device = model.device
        self.weights = sum(x.nbytes for x in itertools.chain(model.parameters(), model.buffers()))
        names = ("layers", "hidden", "heads", "kv_heads", "head_dim", "dtype")
        self.key = {name: getattr(args, name) for name in names}
        # What libraries take with their first call is nobody's cache.
        Decoder(BASELINE, "eager", model, GenerationShape(1, 16), 2).warm_up(2)

    def free(self) -> int:
        """Bytes that may be taken."""
        if not on_gpu(self.device):
            return self.args.memory
        return min(free_memory(self.device), self.args.memory)

    def run(self, shape: GenerationShape) -> None:
        """All caches and modes on one configuration."""
        wanted = [(name, mode, 1) for name in self.args.caches for mode in self._modes(name)]
        sizes = [estimated_bytes(name, self.model, shape) for name, _, _ in wanted]
        together = sum(sizes) < _TOGETHER * self.free()
        groups = [wanted] if together else [[entry] for entry in wanted]
        if not together and BASELINE in self.args.caches and len(wanted) > 1:
            groups.append([(BASELINE, "eager", 2)])
        for group in groups:
            self._run_group(shape, group, together)

    def _modes(self, name: str) -> tuple[str, ...]:
        return ("eager", "graph") if name in PRESETS and self.args.graph else ("eager",)

    def _run_group(
        self, shape: GenerationShape, group: list[tuple[str, str, int]], together: bool
    ) -> None:
        """Fill all caches of the group, then step them in turn."""
        keys: dict[tuple[str, str], dict[str, Any]] = {}
        decoders: dict[tuple[str, str], Decoder] = {}
        for name, mode, turn in group:
            key = {"kind": "generate", **self.key, **asdict(shape)}
            key |= {"cache": name, "mode": mode, "pass": turn}
            if any(done.items() >= key.items() for done in self.log.entries):
                continue
            keys[name, mode] = key
            with guarded(self.device, partial(self.report, key)):
                decoders[name, mode] = self._decoder(name, mode, shape)
        until = time.monotonic() + self.args.config_seconds
        for i in range(self.args.steps):
            if i >= MIN_SAMPLES and time.monotonic() > until:
                break
            for entry in list(decoders):
                with guarded(self.device, partial(self.report, keys[entry])) as faults:
                    decoders[entry].step()
                if faults:
                    del decoders[entry]
        for entry in list(decoders):
            row = decoders.pop(entry).row(self.weights)
            self.write(keys[entry] | row | {"interleaved": together})
        recover(self.device, "a configuration")

    def _decoder(self, name: str, mode: str, shape: GenerationShape) -> Decoder:
        if time.monotonic() > self.until:
            raise TimeoutError(f"out of time (--seconds {self.args.seconds:g})")
        size, free = estimated_bytes(name, self.model, shape), self.free()
        if size > free:
            raise MemoryError(f"the cache takes about {size:,} bytes, {free:,} are free")
        steps = self.args.steps + self.args.warm_up + _GRAPH_WARM_UP
        decoder = Decoder(name, mode, self.model, shape, steps)
        decoder.warm_up(self.args.warm_up)
        return decoder

    def report(self, key: dict[str, Any], reason: str) -> None:
        """Write the row of what failed."""
        status = status_of(reason)
        reason = reason.removeprefix(f"{NotAvailableError.__name__}: ")
        self.write(key | {"status": status, "reason": reason})

    def write(self, row: dict[str, Any]) -> None:
        """Write and print a row, compared with the baseline if there is one."""
        base = baseline_of(row, self.log.entries)
        if row["status"] == "ok" and base is not None:
            row["speedup"] = base["ms"] / row["ms"]
        self.log.write(row)
        print(table_row(row), flush=True)

    def largest_batch(self, name: str, context: int) -> None:
        """Look for the largest batch of `context` tokens a row that a cache lets fit."""
        key = {"kind": "largest_batch", **self.key, "context": context, "cache": name}
        key |= {"mode": "eager", "pass": 1}
        if any(done.items() >= key.items() for done in self.log.entries):
            return
        report = partial(self.report, key | {"batch": 0})
        with guarded(self.device, report):
            batch, row = self._largest(name, context)
            self.write(key | {"batch": batch} | row)

    def _largest(self, name: str, context: int) -> tuple[int, dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}

        def fits(batch: int) -> bool:
            if first + (batch - 1) * each > free or time.monotonic() > self.until:
                return False
            with guarded(self.device, lambda reason: None) as faults:
                rows[batch] = self._try(name, GenerationShape(batch, context))
            return not faults

        first, second = (
            self._try(name, GenerationShape(n, context))["cache_bytes"] for n in (1, 2)
        )
        each, free = max(1, second - first), self.free()
        start = int(0.95 * (free - first + each) / each)
        batch = search(fits, max(1, start), _TRIES)
        if not batch:
            raise MemoryError(f"not one row of {first:,} bytes into the {free:,} that are free")
        return batch, rows[batch]

    def _try(self, name: str, shape: GenerationShape) -> dict[str, Any]:
        """Decode a few steps."""
        decoder = Decoder(name, "eager", self.model, shape, self.args.warm_up + MIN_SAMPLES)
        decoder.warm_up(self.args.warm_up)
        for _ in range(MIN_SAMPLES):
            decoder.step()
        return decoder.row(self.weights)


def search(fits: Callable[[int], bool], start: int, tries: int) -> int:
    """The largest n that fits, to 5%: up or down from `start` by factors of 2, then by halves."""
    low, high, n = 0, 0, start
    for _ in range(tries):
        if fits(n):
            low = n
        else:
            high = n
        if not high:
            n = 2 * low
        elif high - low <= max(1, low // 20):
            break
        else:
            n = (low + high) // 2
    return low


def baseline_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the ordinary cache in the same configuration."""
    names = ("kind", "layers", "hidden", "heads", "kv_heads", "head_dim", "dtype", "context")
    key = {name: row[name] for name in names} | {"cache": BASELINE, "status": "ok", "pass": 1}
    if row["kind"] != "generate":
        return None  # the batches differ
    key["batch"] = row["batch"]
    return next((x for x in [*rows, row] if x.items() >= key.items()), None)


def status_of(reason: str) -> str:
    """What kind of failure a reason tells of."""
    if reason.startswith(NotAvailableError.__name__):
        return "not available"
    if reason.startswith("TimeoutError"):
        return "skipped"
    return "out of memory" if "MemoryError" in reason else "failed"


HEADER = (
    "batch", "context", "cache", "mode", "ms a step", "p10-p90", "tokens/s", "of baseline",
    "cache, GB", "peak, GB", "",
)  # fmt: skip


def table_row(row: dict[str, Any]) -> str:
    """A row as a line of a Markdown table under `HEADER`."""
    again = " (again)" if row["pass"] == 2 else ""
    cells = [str(row["batch"]), str(row["context"]), row["cache"] + again, row["mode"]]
    if row["status"] != "ok":
        cells += [f"{row['status']}: {row['reason']}".replace("|", "/"), *[""] * 6]
    else:
        note = "largest batch" if row["kind"] == "largest_batch" else ""
        if not row.get("interleaved", True):
            note = "one after the other"
        cells += [
            f"{row['ms']:.2f}",
            f"{row['ms_p10']:.2f}-{row['ms_p90']:.2f}",
            f"{row['tokens_s']:.1f}",
            f"{row['speedup']:.2f}x" if "speedup" in row else "",
            f"{row['cache_bytes'] / 1e9:.3f}",
            f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "",
            note,
        ]
    return f"| {' | '.join(cells)} |"


def summary(rows: list[dict[str, Any]]) -> str:
    """All rows as a Markdown table."""
    rows = [row for row in rows if row.get("kind") in ("generate", "largest_batch")]
    head = markdown(HEADER, [], left=4)
    return "\n".join([head, *map(table_row, rows)]) if rows else ""


def main(argv: list[str] | None = None) -> int:
    """Run, print tables, and return the exit status."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    versions = Versions.of(device_of(args.device), f"{__package__}.generate", argv)
    log = open_log(args.out, args.resume)
    try:
        log.write(versions.row())
        _run(args, log)
    except DeviceLost as error:
        print(f"The device is lost {error}; start anew with --resume", flush=True)
        return DEVICE_LOST
    finally:
        log.close()
    print(f"\n{summary(log.entries)}\n\n{versions}", flush=True)
    return 0


def _run(args: argparse.Namespace, log: JSONLines) -> None:
    until = time.monotonic() + args.seconds
    bench = GenerationBench(build_model(args, device_of(args.device)), args, log, until)
    print(f"weights: {bench.weights / 1e9:.2f} GB\n")
    print(markdown(HEADER, [], left=4), flush=True)
    work: list[tuple[str, Callable[[], None]]] = [
        (f"batch {batch}, context {context}", partial(bench.run, GenerationShape(batch, context)))
        for context, batch in itertools.product(args.context, args.batch)
    ]
    work += [
        (f"the largest batch of {name} at {context}", partial(bench.largest_batch, name, context))
        for context, name in itertools.product(args.largest_batch, args.caches)
    ]
    for name, run in work:
        if time.monotonic() < until:
            run()
        else:
            print(f"not measured, out of time (--seconds {args.seconds:g}): {name}")
            log.write({"kind": "skipped", "what": name, "reason": "out of time"})


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    caches = [BASELINE, *QUANTIZED, *PRESETS]
    default = [BASELINE, *QUANTIZED, "k4v4", "k3v3", "k2v2"]
    contexts = [4096, 32768, 131072]
    add("--batch", type=int, nargs="*", default=[1, 8, 32], help="rows of the batch")
    add("--context", type=int, nargs="*", default=contexts, help="tokens in the cache")
    add("--caches", nargs="+", default=default, choices=caches, help="caches to decode with")
    add("--no-graph", dest="graph", action="store_false", help="no CUDA graphs")
    add("--largest-batch", type=int, nargs="*", default=[], help="contexts, tokens")
    add("--steps", type=int, default=20, help="tokens to decode")
    add("--warm-up", type=int, default=3, help="steps that do not count")
    add("--layers", type=int, default=32, help="of the model")
    add("--hidden", type=int, default=4096, help="elements of a hidden state")
    add("--heads", type=int, default=32, help="query heads")
    add("--kv-heads", type=int, default=8, help="key and value heads")
    add("--head-dim", type=int, default=128, help="elements of a head")
    add("--intermediate", type=int, default=14336, help="elements inside an MLP")
    add("--vocab", type=int, default=128256, help="tokens of the vocabulary")
    add("--memory", type=int, default=1 << 62, help="bytes that caches may take")
    add("--config-seconds", type=float, default=20.0, help="of the steps of a configuration")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add_run_options(parser)
    args = parser.parse_args(argv)
    if args.device.startswith("cuda"):
        require_kernels(parser, args.device)
    if args.device == "cpu" and args.largest_batch and args.memory == 1 << 62:
        parser.error("--largest-batch on a CPU needs --memory")
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}; choose one from 1")
    return args


if __name__ == "__main__":
    exit_with(main)
