"""All that is measured on a GPU, in one command: is it right, which tilings, how fast.

    python -m evals.bench.gpu --out DIR
    python -m evals.bench.gpu --out DIR --part attention --minutes 9

Parts, each bounded in time and in processes of its own, so that a fault of one leaves the others:

- check: every kernel against float64 or plain torch, over widths, dtypes, head dims and options;
- tune: tilings of the attention kernel (`evals.bench.attention --tune`);
- attention: `evals.bench.attention`; generate: `evals.bench.generate`.

Kernels are compiled in parallel beforehand, into Triton's cache. A part whose device is lost is
started anew for what it had left. DIR gets a JSON-lines file for each part, one log of all, and
the summary, which is also printed last. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rotorquant_hf import PRESETS, DecodeGraph, RotorQuantCache, RotorQuantConfig, RotorQuantKVCache
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.states import CachedStates, RingStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.backend import backend
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer

from ..environment import Versions, device_of, on_gpu
from ..errors import NotAvailableError
from ..failures import DeviceLost, guarded
from ..tables import markdown
from . import attention as bench_attention
from . import generate as bench_generate
from .attention import WrongResult, require_close
from .common import DEVICE_LOST, exit_with, random_states, read_rows, require_kernels

PARTS = {"check": 0.18, "tune": 0.22, "attention": 0.34, "generate": 0.26}
"""Parts, with their share of the time where all are run."""

_WORKERS = 12
_GRACE = 15  # seconds between the time a part is told to end in and the time it is made to
_RESTARTS = 3

# Checks


@dataclass(frozen=True)
class Case:
    """Something to be checked: `run` returns its error, or raises `WrongResult`."""

    name: str
    run: Callable[[torch.device], float]


@dataclass(frozen=True)
class AttendCase:
    """A decode step (or a pass of more tokens) of one layer, and what attention is asked for.

    Attributes:
        options: of the layer's config.
        d, d_v: head dims; d_v is d unless given. group: query heads per kv head.
        n: new tokens. context: tokens before them.
        dtype: of all tensors.
        mask: "bool", "added" or "". causal, softcap, sinks: of `AttentionOptions`.
        offset: added to four key channels, which are then centred.
    """

    options: dict[str, Any]
    d: int = 128
    d_v: int = 0
    group: int = 4
    n: int = 1
    context: int = 700
    dtype: torch.dtype = torch.bfloat16
    mask: str = ""
    causal: bool = False
    softcap: float | None = None
    sinks: bool = False
    offset: float = 0.0
    heads: int = 2
    batch: int = 2

    def run(self, device: torch.device) -> float:
        """The relative error of the kernels to float64 attention on the dequantised tensors."""
        generator = torch.Generator(device).manual_seed(1)
        layer = RotorQuantLayer(RotorQuantConfig(**self.options))
        with torch.no_grad():
            layer.update(*self.states(self.context, generator))
            keys, values = map(packed, layer.update(*self.states(self.n, generator)))
            return check_attention(keys, values, self._options(generator), self.group, self.n)

    def states(self, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Keys and values with channels and tokens of different size."""
        sizes = (self.batch, self.heads, tokens, max(self.d, self.d_v))
        keys, values = random_states(sizes, torch.float32, generator)
        channels = torch.arange(sizes[3], device=keys.device) % 7 / 3 + 0.5
        keys, values = keys * channels, values * channels.flip(0)
        keys[..., :4] += self.offset
        return keys[..., : self.d].to(self.dtype), values[..., : self.d_v or self.d].to(self.dtype)

    def _options(self, generator: torch.Generator) -> AttentionOptions:
        query_heads, total = self.heads * self.group, self.context + self.n
        scores = (self.batch, 1, self.n, total)
        draw = partial(torch.rand, device=generator.device, generator=generator)
        mask = None
        if self.mask == "bool":
            mask = draw(scores) < 0.7
            mask[0, :, 0] = False  # a query that sees nothing
        elif self.mask == "added":
            mask = (4 * draw(scores) - 2).to(self.dtype)
            mask = mask.masked_fill(draw(scores) < 0.3, float("-inf"))
        sinks = 3 * draw(query_heads) if self.sinks else None
        return AttentionOptions(self.d**-0.5, mask, self.causal, self.softcap, sinks)


def packed(x: Tensor) -> CompressedTensor:
    """What a layer handed out, if anything in it is packed."""
    if not isinstance(x, CompressedTensor):
        raise WrongResult("nothing was packed")
    return x


def check_attention(
    keys: CompressedTensor,
    values: CompressedTensor,
    options: AttentionOptions,
    group: int,
    n: int,
    bound: float | None = None,
    exact: tuple[Tensor, Tensor] | None = None,
) -> float:
    """The relative error of `attend_packed`.

    Args:
        keys, values: of a layer's update.
        options: of the call. group: query heads per kv head. n: query tokens.
        bound: see `require_close`.
        exact: float64 keys and values to compare with, by default the dequantised ones.
    """
    from rotorquant_hf.attention.triton_attention import attend_packed

    generator = torch.Generator(keys.device).manual_seed(2)
    batch, heads, _, d = keys.shape
    size = (batch, heads * group, n, d)
    query = torch.randn(size, device=keys.device, generator=generator).to(keys.dtype)
    if exact is None:
        exact = double(keys), double(values)
    wide = {
        name: value.double()
        for name in ("mask", "sink_logits")
        if (value := getattr(options, name)) is not None and value.is_floating_point()
    }
    reference = dataclasses.replace(options, **wide)
    expected = attention_reference(query.double(), *exact, reference)
    return require_close(attend_packed(query, keys.states, values.states, options), expected, bound)


def double(x: CompressedTensor) -> Tensor:
    """The dequantised tensor, not rounded to its dtype."""
    states = x.states
    return CachedStates(states.sinks.double(), states.packed, states.recent.double()).materialize()


@dataclass(frozen=True)
class AppendCase:
    """The kernel that codes against `encode`: the reconstructions, which few codes may change."""

    options: dict[str, Any]
    d: int = 128
    dtype: torch.dtype = torch.bfloat16

    def run(self, device: torch.device) -> float:
        """The relative difference of what the two ways store."""
        case = AttendCase({}, d=self.d, dtype=self.dtype, offset=3.0)
        generator = torch.Generator(device).manual_seed(3)
        blocks = [case.states(tokens, generator) for tokens in (300, 32, 7)]
        stores = []
        for name in ("triton", "torch"):
            settings = RotorQuantConfig(**self.options)
            store = RotorQuantKVCache(self.d, self.d, device=device, config=settings)
            with backend(name), torch.no_grad():
                for block in blocks:
                    store.append(*block)
            stores.append((store.get_keys(), store.get_values()))
        pairs = zip(*stores, strict=True)
        return max(require_close(ours, theirs.double(), 5e-3) for ours, theirs in pairs)


@dataclass(frozen=True)
class RingCase:
    """Decode steps through ring, push and append kernel against the layer in plain torch."""

    options: dict[str, Any]
    sliding: int = 0
    d: int = 64
    prompt: int = 250
    steps: int = 100
    every: int = 10

    def run(self, device: torch.device) -> float:
        """The largest relative error of attention on the way, to float64 on torch's tensors."""
        case = AttendCase({}, d=self.d, dtype=torch.float32, offset=1.0)
        generator = torch.Generator(device).manual_seed(4)
        settings = RotorQuantConfig(**self.options)
        layers = {name: self._layer(settings) for name in ("triton", "torch")}
        worst = 0.0
        for i in range(self.steps + 1):
            new = case.states(1 if i else self.prompt, generator)
            seen = {}
            for name, layer in layers.items():
                with backend(name), torch.no_grad():
                    seen[name] = layer.update(*new)
            if i and (i % self.every == 0 or i == self.steps):
                with backend("triton"):
                    worst = max(worst, self._compare(seen, layers))
        return worst

    def _layer(self, settings: RotorQuantConfig) -> RotorQuantLayer:
        if self.sliding:
            return RotorQuantSlidingLayer(settings, self.sliding)
        return RotorQuantLayer(settings)

    def _compare(
        self, seen: dict[str, tuple[Tensor, Tensor]], layers: dict[str, RotorQuantLayer]
    ) -> float:
        keys, values = map(packed, seen["triton"])
        if not isinstance(keys.states, RingStates):
            raise WrongResult("the layer did not step through the kernels")
        for ours, theirs in zip(layers["triton"].recent, layers["torch"].recent, strict=True):
            if not torch.equal(ours, theirs):
                raise WrongResult("the exact windows differ")
        keys_of_torch, values_of_torch = map(packed, seen["torch"])
        exact = double(keys_of_torch), double(values_of_torch)
        return check_attention(
            keys, values, AttentionOptions(self.d**-0.5), 4, 1, bound=5e-3, exact=exact
        )


@dataclass(frozen=True)
class ModelCase:
    """A small model's steps: as a CUDA graph, or eager, against eager steps of another backend."""

    preset: str
    graph: bool
    prompt: int = 250
    steps: int = 80

    def run(self, device: torch.device) -> float:
        """The largest relative error of a step's logits."""
        if self.graph and not on_gpu(device):
            raise NotAvailableError("CUDA graphs need a CUDA device")
        model = _small_model(device)
        generator = torch.Generator(device).manual_seed(5)
        ids = torch.randint(
            0, model.config.vocab_size, (2, self.steps), device=device, generator=generator
        )
        with backend("triton"):
            fast = self._logits(model, ids, self.graph)
        with backend("triton" if self.graph else "torch"):
            expected = self._logits(model, ids, False)
        bound = 1e-4 if self.graph else 1e-2  # the two backends may code a number differently
        pairs = zip(fast, expected, strict=True)
        return max(require_close(ours, theirs.double(), bound) for ours, theirs in pairs)

    def _logits(self, model: PreTrainedModel, ids: Tensor, graph: bool) -> list[Tensor]:
        generator = torch.Generator(ids.device).manual_seed(6)
        cache = RotorQuantCache(PRESETS[self.preset], config=model.config)
        shape = bench_generate.Shape(len(ids), self.prompt)
        bench_generate.fill(cache, model, shape, generator)

        def eager(new: Tensor) -> Tensor:
            return model(input_ids=new, past_key_values=cache, use_cache=True).logits

        step: Callable[[Tensor], Tensor] = eager
        if graph:
            step = DecodeGraph(model, cache, self.steps)
        with torch.no_grad():
            return [step(ids[:, i : i + 1]).clone() for i in range(self.steps)]


def _small_model(device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=256,
        vocab_size=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def cases() -> list[Case]:
    """Everything that is checked; the kernels that the benchmarks use come first."""
    attend: dict[str, AttendCase] = {}
    for bits in (3, 4, 2, 1, 5, 6, 7, 8):
        attend[f"k{bits}v{bits}"] = AttendCase(_bits(bits))
    for bits, d in ((3, 128), (2, 64), (4, 128), (5, 64)):
        attend[f"k{bits}v{bits} prod d {d}"] = AttendCase(_bits(bits, "prod"), d)
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        attend[f"k3v3 {name}"] = AttendCase(_bits(3), dtype=dtype)
        attend[f"k4v4 {name}"] = AttendCase(_bits(4), d=64, dtype=dtype)
        attend[f"k3v3 prod {name}"] = AttendCase(_bits(3, "prod"), d=64, dtype=dtype)
    for d in (64, 80, 96, 256):
        attend[f"k3v3 d {d}"] = AttendCase(_bits(3), d)
        attend[f"k4v4 d {d}"] = AttendCase(_bits(4), d)
    three = partial(AttendCase, _bits(3), 64)
    attend |= {
        "k4v3": AttendCase({"key_bits": 4, "value_bits": 3}),
        "k8v2": AttendCase({"key_bits": 8, "value_bits": 2}, 64),
        "d 192 and 128": AttendCase(_bits(4), 192, 128),
        "values equalised": AttendCase(_bits(3) | {"equalize_values": 0.5}, 64),
        "keys centred": three(offset=30.0),
        "boolean mask": three(mask="bool"),
        "added mask": three(mask="added"),
        "softcap": three(softcap=5.0),
        "learned sinks": three(sinks=True),
        "softcap, sinks, added mask": three(softcap=5.0, sinks=True, mask="added"),
        "4 causal tokens": three(n=4, causal=True),
        "32 causal tokens, mask": three(n=32, causal=True, mask="bool"),
        "40 causal tokens, not a step": three(n=40, causal=True),
        "one query head": three(group=1),
        "group of 16": three(group=16),
        "20,000 tokens, batch 1": AttendCase(_bits(3), context=20000, batch=1, heads=8),
        "20,000 tokens, 16 rows": AttendCase(_bits(4), context=20000, batch=16, heads=1),
    }
    found = [Case(f"attend: {name}", case.run) for name, case in attend.items()]
    append = {f"{bits} bits": AppendCase(_bits(bits)) for bits in range(1, 9)}
    append |= {f"3 bits d {d}": AppendCase(_bits(3), d) for d in (64, 80, 256)}
    for scale in ("norm", "least_squares", "unbiased"):
        options = _bits(3) | {"key_scale": scale, "value_scale": "matched"}
        append[f"scale {scale}"] = AppendCase(options, 64)
    append["prod"] = AppendCase(_bits(3, "prod"))
    append["prod float16"] = AppendCase(_bits(4, "prod"), 64, torch.float16)
    append["3 bits float32"] = AppendCase(_bits(3), 64, torch.float32)
    found += [Case(f"append: {name}", case.run) for name, case in append.items()]
    ring = {
        "k4v4": RingCase(_bits(4)),
        "k3v3 prod": RingCase(_bits(3, "prod")),
        "blocks of 1": RingCase(_bits(4) | {"block_length": 1, "residual_length": 16}),
        "no sinks": RingCase(_bits(4) | {"num_sink_tokens": 0}),
        "sliding window": RingCase(_bits(4), sliding=230),
    }
    found += [Case(f"ring: {name}", case.run) for name, case in ring.items()]
    for preset in ("k4v4", "k3v3"):
        found.append(Case(f"model: {preset} against torch", ModelCase(preset, False).run))
        found.append(Case(f"graph: {preset} against eager", ModelCase(preset, True).run))
    return found


def _bits(bits: int, quantizer: str = "mse") -> dict[str, Any]:
    return {"key_bits": bits, "value_bits": bits, "key_quantizer": quantizer}


def check_share(args: argparse.Namespace, device: torch.device) -> int:
    """Run share i of n of the checks; each prints a row of JSON."""
    index, count = args.share
    chosen = [case for case in cases() if fnmatch.fnmatch(case.name, args.only)]
    until = time.monotonic() + 60 * args.minutes
    kernels: AbstractContextManager[None] = nullcontext()
    if not on_gpu(device):
        kernels = backend("triton")
    with kernels:
        for case in chosen[index::count]:
            begin = time.monotonic()
            row: dict[str, Any] = {"kind": "check", "case": case.name}
            if begin > until:
                _print_row(row | {"status": "skipped", "reason": "out of time"})
                continue
            try:
                with guarded(device, partial(_print_failure, row)) as faults:
                    error = case.run(device)
                if not faults:
                    took = round(time.monotonic() - begin, 1)
                    _print_row(row | {"status": "ok", "error": error, "seconds": took})
            except DeviceLost as error:
                print(f"The device is lost {error}", flush=True)
                return DEVICE_LOST
    return 0


def _print_failure(row: dict[str, Any], reason: str) -> None:
    status = bench_generate.status_of(reason)
    if reason.startswith(WrongResult.__name__):
        status = "wrong"
    _print_row(row | {"status": status, "reason": reason})


def _print_row(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


# Running the parts


class Runner:
    """Runs commands, prints what they print, and keeps it in one log.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self._lock = threading.Lock()
        self._log = (out / "log.txt").open("a", encoding="utf-8")

    def say(self, line: str) -> None:
        """Print a line, and write it into the log."""
        with self._lock:
            print(line, flush=True)
            self._log.write(line + "\n")
            self._log.flush()

    def run(
        self,
        commands: Sequence[Sequence[str]],
        seconds: float,
        take: Callable[[str], bool] | None = None,
    ) -> list[int]:
        """Run commands of this project side by side, for at most so long.

        Args:
            commands: arguments of Python.
            seconds: after which they are ended.
            take: is shown every line; True keeps it out of the log.

        Returns:
            Their exit statuses, negative for those that were ended.
        """
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        root = Path(__file__).parents[2]
        begin = time.monotonic()
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=root,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for command in commands
        ]
        readers = [threading.Thread(target=self._read, args=(p, take)) for p in processes]
        for reader in readers:
            reader.start()
        for process, command in zip(processes, commands, strict=True):
            try:
                process.wait(max(0.0, begin + seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.say(f"ended after {seconds:.0f} s: {' '.join(command)}")
                process.kill()
                process.wait()
        for reader in readers:
            reader.join(5)
        return [process.returncode for process in processes]

    def _read(self, process: subprocess.Popen[str], take: Callable[[str], bool] | None) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if take is None or not take(line.rstrip("\n")):
                self.say(line.rstrip("\n"))

    def close(self) -> None:
        """Close the log."""
        self._log.close()


class Session:
    """The parts, over one folder.

    Args:
        args: the command's. runner: runs the processes.
    """

    def __init__(self, args: argparse.Namespace, runner: Runner) -> None:
        self.args, self.runner = args, runner
        self.workers = min(args.workers, max(1, os.cpu_count() or 1))

    def path(self, part: str) -> Path:
        """The rows of a part."""
        return self.args.out / f"{part}.jsonl"

    def check(self, seconds: float) -> None:
        """All checks, divided among processes; what a process that died had left, one by one."""
        until = time.monotonic() + seconds
        path, lock = self.path("check"), threading.Lock()
        path.unlink(missing_ok=True)

        def write(row: dict[str, Any]) -> None:
            with lock, path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if row["status"] != "ok":
                self.runner.say(f"{row['case']}: {row['status']}: {row['reason']}")

        def take(line: str) -> bool:
            if not line.startswith('{"kind": "check"'):
                return False
            write(json.loads(line))
            return True

        def left() -> list[str]:
            done = {row["case"] for row in read_rows(path)}
            names = [case.name for case in cases() if fnmatch.fnmatch(case.name, self.args.only)]
            return [name for name in names if name not in done]

        def run(shares: list[list[str]]) -> set[int]:
            time_left = until - time.monotonic()
            limit = ["--minutes", f"{(time_left - _GRACE) / 60:.2f}", *self._device()]
            module = ["-m", "evals.bench.gpu", "--out", str(self.args.out), *limit]
            return set(self.runner.run([[*module, *share] for share in shares], time_left, take))

        only = ["--only", self.args.only]
        statuses = run([["--share", f"{i}/{self.workers}", *only] for i in range(self.workers)])
        if left() and until - time.monotonic() > 2 * _GRACE:
            statuses |= run([["--share", "0/1", "--only", x] for x in left()[: self.workers]])
        for name in left():
            reason = f"not run, or its process ended: {sorted(statuses - {0})}"
            write({"kind": "check", "case": name, "status": "failed", "reason": reason})
        self.runner.say(check_summary(read_rows(path)))

    def tune(self, seconds: float) -> None:
        """Tilings, on some configurations."""
        begin = time.monotonic()
        command = ["-m", "evals.bench.attention", "--tune", *self._device(), *self.args.tune]
        self._compile(command, 0.45 * seconds)
        left = seconds - (time.monotonic() - begin)
        self._resumed("tune", command, left)

    def attention(self, seconds: float) -> None:
        """Attention alone."""
        begin = time.monotonic()
        command = ["-m", "evals.bench.attention", "--check", "--prod", *self._device()]
        command += self.args.attention
        self._compile(command, 0.3 * seconds)
        left = seconds - (time.monotonic() - begin)
        self._resumed("attention", command, left)

    def generate(self, seconds: float) -> None:
        """Whole models."""
        begin = time.monotonic()
        if len(self.args.part) == 1:  # else the kernels are there
            kernels = ["-m", "evals.bench.attention", "--head-dim", "128", *self._device()]
            self._compile(kernels, 0.15 * seconds)
        command = ["-m", "evals.bench.generate", *self._device(), *self.args.generate]
        self._resumed("generate", command, seconds - (time.monotonic() - begin))

    def _compile(self, command: list[str], seconds: float) -> None:
        """Compile a benchmark's kernels, divided among processes."""
        if self.workers > 1:
            self.runner.say(f"compiling in {self.workers} processes")
            limit = ["--seconds", f"{seconds - _GRACE:.0f}"]
            shares = [["--share", f"{i}/{self.workers}"] for i in range(self.workers)]
            self.runner.run([[*command, *limit, *share] for share in shares], seconds)

    def _resumed(self, part: str, command: list[str], seconds: float) -> None:
        """Run a benchmark, anew where its device is lost."""
        until = time.monotonic() + seconds
        out = ["--out", str(self.path(part)), "--resume"]
        for _ in range(1 + _RESTARTS):
            left = until - time.monotonic()
            if left < 2 * _GRACE:
                self.runner.say(f"{part}: out of time")
                return
            limit = ["--seconds", f"{left - 2 * _GRACE:.0f}"]
            status = self.runner.run([[*command, *out, *limit]], left)[0]
            if status != DEVICE_LOST:
                if status:
                    self.runner.say(f"{part}: exit status {status}")
                return

    def _device(self) -> list[str]:
        return ["--device", self.args.device]

    def summary(self) -> str:
        """The results of all parts that there are."""
        rows = {part: read_rows(self.path(part)) for part in PARTS}
        texts = {
            "check": check_summary(rows["check"]),
            "tune": tune_summary(rows["tune"]),
            "attention": bench_attention.summary(rows["attention"]),
            "generate": bench_generate.summary(rows["generate"]),
        }
        return "\n\n".join(f"## {part}\n\n{text}" for part, text in texts.items() if text)


def check_summary(rows: list[dict[str, Any]]) -> str:
    """How many checks passed, and all that did not."""
    if not rows:
        return ""
    ok = [row for row in rows if row["status"] == "ok"]
    lines = [f"{len(ok)} of {len(rows)} checks passed."]
    for group in dict.fromkeys(row["case"].split(":")[0] for row in ok):
        worst = max((x for x in ok if x["case"].startswith(f"{group}:")), key=lambda x: x["error"])
        name = worst["case"].split(": ", 1)[1]
        lines.append(f"{group}: largest relative error {worst['error']:.1e} ({name})")
    lines += [f"{x['case']}: {x['status']}: {x['reason']}" for x in rows if x["status"] != "ok"]
    return "\n".join(f"- {line}" if i else f"{line}\n" for i, line in enumerate(lines))


def tune_summary(rows: list[dict[str, Any]]) -> str:
    """The best tilings of each configuration, and the default."""
    final = [row for row in rows if row.get("final")]
    head = markdown(bench_attention.TUNE_HEADER, [], left=5)
    return "\n".join([head, *map(bench_attention.tune_row, final)]) if final else ""


def main(argv: list[str] | None = None) -> int:
    """Run the parts, print the summary, and return the exit status."""
    args = _arguments(argv)
    device = device_of(args.device)
    if args.share:
        return check_share(args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    runner = Runner(args.out)
    session = Session(args, runner)
    versions = Versions.of(device, "evals.bench.gpu", argv)
    runner.say(f"{versions}\n")
    chosen = [part for part in PARTS if part in args.part]
    for i, part in enumerate(chosen):
        left = begin + 60 * args.minutes - time.monotonic() - _GRACE
        seconds = left * PARTS[part] / sum(PARTS[name] for name in chosen[i:])
        runner.say(f"# {part}, at most {seconds:.0f} s, {time.monotonic() - begin:.0f} s gone\n")
        getattr(session, part)(seconds)
    text = f"{session.summary()}\n\n{versions}\n"
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    runner.say(f"\n{text}\n{time.monotonic() - begin:.0f} s in all")
    runner.close()
    rows = [row for part in ("check", "attention") for row in read_rows(session.path(part))]
    bad = {"check": {"wrong", "failed"}, "attention": {"wrong"}}
    if any(row.get("status") in bad.get(row["kind"], ()) for row in rows):
        return 1
    right = any(row["kind"] == "check" and row["status"] == "ok" for row in rows)
    return int("check" in chosen and not right)  # nothing checked is nothing shown


# What is measured where all parts have to fit into one call, and where a part has one of its own.
_TUNE = "--batch 1 8 --context 32768 --head-dim 128 --bits 3 4 --config-seconds 12"
_ATTENTION = "--batch 1 8 32 --context 1024 8192 32768 131072 --config-seconds 3"
_GENERATE = "--batch 1 8 --context 32768 131072 --caches dynamic quanto hqq fp8 k4v4 k3v3"
_TUNE_ALONE = "--batch 1 8 --context 4096 32768 --head-dim 128 64 --config-seconds 20 --prod"
_ATTENTION_ALONE = "--config-seconds 4"
_GENERATE_ALONE = "--largest-batch 32768"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--only", default="*", help="pattern of the names of checks")
    parser.add_argument("--workers", type=int, default=_WORKERS, help="processes that compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--share", type=bench_attention.share, help="I/N: only that of the checks")
    for part in ("tune", "attention", "generate"):
        parser.add_argument(f"--{part}", help=f"arguments for {part}, in one string")
    args = parser.parse_args(argv)
    require_kernels(parser, args.device)
    if args.minutes <= 0 and not args.share:
        parser.error(f"--minutes is {args.minutes}; choose more than 0")
    if not any(fnmatch.fnmatch(case.name, args.only) for case in cases()):
        parser.error(f"--only is {args.only!r}, which matches no check")
    alone = len(args.part) == 1
    for name, all_parts, one_part in (
        ("tune", _TUNE, _TUNE_ALONE),
        ("attention", _ATTENTION, _ATTENTION_ALONE),
        ("generate", _GENERATE, _GENERATE_ALONE),
    ):
        given = getattr(args, name)
        setattr(args, name, (given or (one_part if alone else all_parts)).split())
    return args


if __name__ == "__main__":
    exit_with(main)
