"""The perplexity per token of a causal language model on held-out text.

Run from the root of the repository::

    python -m examples.perplexity my-model --text path/to/books-heldout

Every book gives the same number of evenly spaced windows; a window is one forward pass in float32
and predicts all of its tokens but the first.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from examples.text_data import (
    Book,
    InputError,
    encode,
    load_tokenizer,
    pick_device,
    read_books,
    require,
    windows_at,
)


class Score(NamedTuple):
    """The sum of the negative log-likelihoods in nats, and how many tokens were predicted."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-likelihood of a token."""
        return math.exp(self.nats / self.tokens)


def token_losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of every token but a window's first, in nats.

    ``windows [batch, length]`` gives ``[batch * (length - 1)]``, float32.
    """
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


def score_tokens(model: PreTrainedModel, tokens: np.ndarray, count: int, window: int) -> Score:
    """Scores up to ``count`` evenly spaced windows of ``tokens [n]``; they never overlap."""
    count = min(count, len(tokens) // window)
    starts = np.linspace(0, len(tokens) - window, count).astype(np.int64)
    nats = 0.0
    with torch.inference_mode():
        for row in torch.from_numpy(windows_at(tokens, starts, window)):
            nats += token_losses(model, row[None].to(model.device)).double().sum().item()
    return Score(nats, count * (window - 1))


def score_books(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    books: Sequence[Book],
    count: int = 16,
    window: int = 1024,
) -> Iterator[tuple[str, Score]]:
    """Yields the name and the score of one book after the other."""
    longest = getattr(model.config, "max_position_embeddings", None) or window
    require(count >= 1, f"--windows {count} is out of range: choose 1 or more")
    fits = 2 <= window <= longest
    require(fits, f"--window {window} is out of range: choose from 2 to {longest}")
    for book in books:
        tokens = encode(tokenizer, book.text)
        require(
            len(tokens) >= window,
            f"{book.name} has {len(tokens)} tokens, less than one window: choose a --window below "
            f"{window}, or leave the book out with --exclude",
        )
        yield book.name, score_tokens(model, tokens, count, window)


def load_model(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal language model, ready to be measured."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is no model that loads: {error}") from error
    return model.to(device).eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the model, or its name on the Hub")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="PATH")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="files to leave")
    parser.add_argument("--windows", type=int, default=16, help="windows of a book (default 16)")
    parser.add_argument("--window", type=int, default=1024, help="tokens (default 1024)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator, if any)")
    options = parser.parse_args(arguments)
    try:
        books = read_books(options.text, options.exclude)
        model = load_model(options.model, pick_device(options.device))
        tokenizer = load_tokenizer(options.model)
        print(f"{'book':<50} {'tokens':>8} {'perplexity':>10}")
        scores = []
        for name, score in score_books(model, tokenizer, books, options.windows, options.window):
            print(f"{name:<50} {score.tokens:>8} {score.perplexity:>10.2f}", flush=True)
            scores.append(score)
        overall = Score(*(sum(part) for part in zip(*scores, strict=True)))
        print(f"{'overall':<50} {overall.tokens:>8} {overall.perplexity:>10.2f}")
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
