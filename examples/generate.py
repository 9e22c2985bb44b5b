"""Generate with the compressed cache, then show what it saved and what it changed.

    python -m examples.generate

Streams text from the shipped model (or `--model`), whose cache is compressed, and prints a table:
the bytes of the cache at the end against the ordinary cache, and how far the model that reads
it agrees with the model that does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, TextStreamer

from evals.errors import InputError
from evals.measurements.agreement import agreement_length, continuation
from evals.measurements.perplexity import SinglePass, compare
from evals.subjects.models import load_model, load_tokenizer, pick_device
from rotorquant_hf import PRESETS, RotorQuantCache
from rotorquant_hf.memory import measure

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    """Stream a text, print the table."""
    args = _arguments(argv)
    torch.manual_seed(0)
    try:
        model = load_model(args.model, pick_device(args.device), getattr(torch, args.dtype))
        tokenizer = load_tokenizer(args.model)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    text = args.prompt or args.prompt_file.read_text(encoding="utf-8").strip()
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    prompt = ids[:, : args.prompt_tokens]

    cache = RotorQuantCache(args.presets[0], config=model.config)
    print(f"[...] {tokenizer.decode(prompt[0, -40:])}", end="", flush=True)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        temperature=0.8,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    print(f"\n{cache.memory()}\n")

    print(_table(model, prompt, ids[:, : args.length], args.presets, args.max_new_tokens))


def _table(
    model: PreTrainedModel, prompt: Tensor, text: Tensor, presets: list[str], new_tokens: int
) -> str:
    """One row per cache: generation from `prompt`, divergence along `text`.

    The divergence of the ordinary cache is the rounding noise of the model's dtype.
    """
    caches: dict[str, Callable[[], Cache]] = {
        "ordinary (DynamicCache)": lambda: DynamicCache(config=model.config)
    } | {name: partial(RotorQuantCache, name, config=model.config) for name in presets}
    expected: list[int] | None = None
    lines = [
        "| cache | bytes | smaller | bits/number | same sampled text | top-1 | KL (nats) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, make_cache in caches.items():
        cache = make_cache()
        actual = continuation(model, prompt, cache, new_tokens, sample=True)
        expected = expected or actual
        same = agreement_length(actual, expected)
        memory = measure(cache.layers, cache.get_seq_length())
        result = compare(model, [text], SinglePass(model, [text]), make_cache, chunk=16)
        lines.append(
            f"| {name} | {memory.total_bytes:,} | {memory.ratio:.2f}x | "
            f"{memory.bits_per_number:.2f} | {same} of {len(expected)} tokens | "
            f"{result.top1_agreement:.2%} | {result.kl_mean:.5f} |"
        )
    heading = f"{memory.tokens} tokens in {model.dtype}, agreement over {text.shape[1]} tokens:"
    return "\n".join([heading, "", *lines])


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(HERE / "books-7m"))
    parser.add_argument("--prompt", help="the prompt itself, instead of --prompt-file")
    parser.add_argument("--prompt-file", type=Path, default=HERE / "sampled" / "harbour.txt")
    parser.add_argument(
        "--prompt-tokens", type=int, default=1200, help="tokens of it to prompt with"
    )
    parser.add_argument("--length", type=int, default=1600, help="tokens to measure agreement on")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator, if any)")
    parser.add_argument(
        "--presets",
        nargs="+",
        default=["k4v4", "k4v3", "k3v3", "k2v2", "k8v8"],
        choices=list(PRESETS),
        help="settings to compare; the text is streamed with the first",
    )
    args = parser.parse_args(argv)
    if not args.prompt and not args.prompt_file.is_file():
        parser.error(f"there is no file {args.prompt_file} (--prompt-file)")
    return args


if __name__ == "__main__":
    main()
