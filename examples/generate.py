"""Generate text with a compressed cache, then show where its bytes are and what was saved.

    python -m examples.generate
    python -m examples.generate --model Qwen/Qwen2.5-0.5B-Instruct --preset k3v3

It needs torch, transformers and rotorquant_hf alone: copy it, and change what you like (the
default model and prompt are those of the repository; give --model and --prompt).
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from rotorquant_hf import PRESETS, RotorQuantCache
from rotorquant_hf.passing import cache_argument

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Generate text with a compressed cache.")
    # The default model and text are those of the repository: elsewhere name --model and --prompt.
    parser.add_argument("--model", default=str(HERE / "books-7m"), help="folder or Hub name")
    parser.add_argument("--preset", default="k4v4", choices=list(PRESETS))
    parser.add_argument("--prompt", help="the prompt itself, instead of --prompt-file")
    parser.add_argument("--prompt-file", type=Path, default=HERE / "sampled" / "harbour.txt")
    parser.add_argument("--prompt-tokens", type=int, default=1200, help="tokens of it to read")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    args = parser.parse_args(argv)
    if min(args.prompt_tokens, args.max_new_tokens) < 1 or args.prompt == "":
        parser.error("give a prompt, and at least 1 for --prompt-tokens and --max-new-tokens")
    if not args.prompt and not args.prompt_file.is_file():
        parser.error(f"--prompt-file {args.prompt_file}: no such file")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model {args.model}: {str(error).splitlines()[0]}")

    text = args.prompt or args.prompt_file.read_text(encoding="utf-8").strip()
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.prompt_tokens)
    inputs = inputs.to(device)
    print(f"[...] {tokenizer.decode(inputs.input_ids[0, -40:])}", end="", flush=True)

    torch.manual_seed(0)
    cache = RotorQuantCache(args.preset, config=model.config)  # the one line that matters
    model.generate(
        **inputs,
        **cache_argument(model, cache),  # past_key_values=cache before Transformers 5.24
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        temperature=0.8,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )

    memory = cache.memory()
    print(f"\n{memory}\n")
    saved = memory.uncompressed_bytes - memory.total_bytes
    if not memory.packed_numbers:
        print("Nothing was quantised: all tokens are recent ones. Give a longer prompt.")
        return
    print(
        f"{args.preset} saved {saved:,} of {memory.uncompressed_bytes:,} bytes, at "
        f"{memory.tokens:,} tokens. The full-precision sinks and recent window do not grow: "
        f"long texts come near {memory.packed_ratio:.1f}x."
    )


if __name__ == "__main__":
    main()
