"""Divergence of a model that reads a compressed cache from the same model without one.

    python -m evals.divergence configs/quantizers.yaml --text BOOK.txt ...

The text is teacher-forced *through* the cache in chunks, so that every token older than the exact
window is read compressed. (One forward pass shows nothing: a prompt's own attention is exact.)
The reference is one forward pass without a cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel

from evals.outlier_twin import KeyOffsetCache, add_key_bias, scale_key_channels
from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.memory import measure


@dataclass(frozen=True)
class Divergence:
    """What reading the compressed cache changed.

    Attributes:
        kl_mean: mean KL divergence of the next-token distributions to the reference, nats.
        kl_p99: its 99th percentile over the tokens.
        top1_agreement: share of tokens whose most likely successor is the reference's.
        perplexity: of the text, read through the cache.
        reference_perplexity: of the text, without a cache.
        tokens: predicted tokens.
        compressed_share: share of the keys and values read by the chunks that were read quantised.
        bits_per_number: of the cache when the last token is in.
    """

    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int
    compressed_share: float
    bits_per_number: float


@torch.no_grad()
def reference_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) of one text (1, tokens), in one pass without a cache."""
    return model(ids, use_cache=False).logits[0].float()


@torch.no_grad()
def read_chunk(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits (n, vocabulary) of the next tokens (1, n) of a text, fed through `cache`."""
    return model(ids, past_key_values=cache, use_cache=True).logits[0].float()


def compare(
    model: PreTrainedModel,
    texts: list[Tensor],
    references: list[Tensor],
    make_cache: Callable[[], Cache],
    chunk: int,
) -> Divergence:
    """Feed texts through new caches and compare with the references.

    Args:
        model: in evaluation mode.
        texts: token ids (1, tokens) each.
        references: `reference_logits` of each.
        make_cache: makes an empty cache, of any kind; called once per text.
        chunk: tokens per forward pass; 1 is true decoding.
    """
    kl, agree, loss, reference_loss, packed, read = [], [], [], [], 0, 0
    for ids, reference in zip(texts, references, strict=True):
        cache, packed_before = make_cache(), 0
        for start in range(0, ids.shape[1], chunk):
            logits = read_chunk(model, ids[:, start : start + chunk], cache)
            end = start + len(logits)
            after = measure(cache.layers, end)
            # The chunk read what was packed before it; the rest, and itself, exactly.
            packed, read = packed + packed_before, read + after.numbers
            packed_before = after.packed_numbers
            expected = reference[start:end].log_softmax(-1)
            actual = logits.log_softmax(-1)
            kl.append((expected.exp() * (expected - actual)).sum(-1))
            agree.append(expected.argmax(-1) == actual.argmax(-1))
            target = ids[0, start + 1 : end + 1].unsqueeze(-1)
            loss.append(-actual[: len(target)].gather(-1, target))
            reference_loss.append(-expected[: len(target)].gather(-1, target))
    divergences = torch.cat(kl)
    return Divergence(
        kl_mean=float(divergences.mean()),
        kl_p99=float(divergences.quantile(0.99)),
        top1_agreement=float(torch.cat(agree).float().mean()),
        perplexity=float(torch.cat(loss).mean().exp()),
        reference_perplexity=float(torch.cat(reference_loss).mean().exp()),
        tokens=len(divergences),
        compressed_share=packed / read,
        bits_per_number=after.bits_per_number,
    )


def windows(ids: Tensor, count: int, length: int) -> list[Tensor]:
    """`count` evenly spaced windows (1, length) of the token ids (tokens,) of a text."""
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens; it needs at least {length} (--length)")
    starts = torch.linspace(0, len(ids) - length, count).long()
    return [ids[start : start + length].unsqueeze(0) for start in starts]


def _rows(path: Path) -> dict[str, RotorQuantConfig]:
    """Named settings: `rows` of a YAML file, each over its `base`."""
    spec: Any = yaml.safe_load(path.read_text())
    if not isinstance(spec, dict) or not {"rows"} <= set(spec) <= {"base", "rows"}:
        keys = sorted(spec) if isinstance(spec, dict) else repr(spec)
        raise ValueError(f"{path} has the keys {keys}; it takes 'rows' and, if wanted, 'base'")
    base = spec.get("base", {})
    return {
        name: RotorQuantConfig.from_options(**{**base, **(options or {})})
        for name, options in spec["rows"].items()
    }


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table, a row per setting."""
    args = _arguments(argv)
    rows = _rows(args.config)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    if args.outliers:
        scale_key_channels(model, args.outliers)
    if args.key_bias:
        add_key_bias(model, args.key_bias, args.bias_pair)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = []
    for path in args.text:
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        texts += windows(torch.tensor(ids, device=args.device), args.windows, args.length)
    references = [reference_logits(model, ids) for ids in texts]
    print(_HEADER)
    for name, settings in tqdm(rows.items(), disable=not sys.stderr.isatty(), leave=False):
        make_cache = partial(KeyOffsetCache, args.offset, settings, config=model.config)
        result = compare(model, texts, references, make_cache, args.chunk)
        tqdm.write(
            f"| {name} | {result.kl_mean:.2e} | {result.kl_p99:.2e} | {result.top1_agreement:.2%} "
            f"| {result.perplexity:.3f} | {result.compressed_share:.0%} |"
        )
        if args.json:
            tqdm.write(json.dumps({"name": name, **asdict(result), **settings.to_dict()}))
    print(f"| uncompressed | 0 | 0 | 100% | {result.reference_perplexity:.3f} | 0% |")


_HEADER = """\
| settings | KL mean (nats) | KL p99 | top-1 | perplexity | read packed |
| --- | ---: | ---: | ---: | ---: | ---: |"""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="YAML with the settings to compare")
    parser.add_argument("--model", default="examples/books-7m")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files")
    parser.add_argument("--windows", type=int, default=3, help="windows per text")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    parser.add_argument("--chunk", type=int, default=32, help="tokens per forward pass")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--outliers", type=float, help="factor on two key channel pairs per head")
    parser.add_argument("--offset", type=float, default=0.0, help="constant on four key channels")
    parser.add_argument("--key-bias", type=float, help="bias on one key channel per head")
    parser.add_argument("--bias-pair", type=int, default=0, help="RoPE pair of the bias")
    parser.add_argument("--json", action="store_true", help="add a JSON line per row")
    args = parser.parse_args(argv)
    for path in (args.config, *args.text):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    for name in ("windows", "length", "chunk"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; choose at least 1")
    return args


if __name__ == "__main__":
    main()
