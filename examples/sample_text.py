"""Sample the texts in `examples/sampled/` from the shipped model.

    python -m examples.sample_text

The repository carries no book: the text that its example and its quick measurements read is what
the shipped model itself writes, at temperature 1 with a fixed seed, after sentences of our own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
OPENINGS = {
    "harbour": "The harbour master counted the lamps twice before he believed one was missing.",
    "clock": "Nobody in the village could say who wound the old clock, yet it had never stopped.",
    "letter": "She read the letter once by the window, once by the fire, and then burned it.",
    "road": "We had been told to keep to the left-hand road, and so of course we took the other.",
}


def main(argv: list[str] | None = None) -> None:
    """Write one text per opening."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(HERE / "books-7m"))
    parser.add_argument("--output", type=Path, default=HERE / "sampled")
    parser.add_argument("--tokens", type=int, default=1600, help="tokens per text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    for name, opening in OPENINGS.items():
        inputs = tokenizer(opening, return_tensors="pt")
        ids = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            min_new_tokens=args.tokens,
            max_new_tokens=args.tokens,
        )
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        (args.output / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        print(f"{args.output / name}.txt: {ids.shape[1]} tokens")


if __name__ == "__main__":
    main()
