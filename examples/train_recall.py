"""Trains a tiny model that looks facts up in its context: something for a retrieval test to test.

    python -m examples.train_recall --text path/to/books --output examples/recall-1m

A window is prose with facts strewn into it ("The secret word of the miller is candle.") and ends
with questions about them; only the answers are learned. Subjects and answers are drawn anew from
thousands of words for every fact, so that nothing but the context can tell which belongs to which.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from evals.errors import InputError
from evals.subjects.models import load_tokenizer
from evals.subjects.texts import encode, read_texts

FACTS = (
    " The secret word of the {subject} is {answer}.",
    " Remember that the {subject} was called {answer}.",
    " In the house of the {subject} there lived a {answer}.",
)
"""Forms of a fact; a question is the fact up to its answer."""


def words_of(text: str, min_count: int = 20) -> list[str]:
    """The lower-case words of 4 to 9 letters that a text has `min_count` times or more."""
    counts = Counter(re.findall(r"\b[a-z]{4,9}\b", text))
    return sorted(word for word, count in counts.items() if count >= min_count)


class Windows:
    """Draws training windows.

    Args:
        tokens: of the prose, (n,).
        words: to make facts of.
        tokenizer: that made the tokens.
    """

    def __init__(self, tokens: np.ndarray, words: list[str], tokenizer, seed: int) -> None:
        self.tokens = tokens
        self.tokenizer = tokenizer
        self.words = [(word, encode(tokenizer, " " + word).tolist()) for word in words]
        self.random = random.Random(seed)

    def _fact(self) -> tuple[list[int], list[int]]:
        """A question's tokens and its answer's."""
        form = self.random.choice(FACTS)
        subject, answer = self.random.sample(self.words, 2)
        question = form[: form.index(" {answer}")].format(subject=subject[0])
        return encode(self.tokenizer, question).tolist(), answer[1]

    def draw(self, length: int, facts: int) -> tuple[list[int], list[bool]]:
        """A window of `length` tokens, and which of them are answers to be learned."""
        drawn = [self._fact() for _ in range(facts)]
        end = encode(self.tokenizer, ".").tolist()
        asked = self.random.sample(drawn, max(1, facts // 2))
        closing: list[int] = []
        learned: list[bool] = []
        for question, answer in asked:
            closing += question + answer + end
            learned += [False] * len(question) + [True] * len(answer) + [False] * len(end)
        room = length - len(closing) - sum(len(q) + len(a) + len(end) for q, a in drawn)
        start = self.random.randrange(len(self.tokens) - max(room, 1))
        prose = self.tokens[start : start + max(room, 0)].tolist()
        places = sorted(self.random.randrange(len(prose) + 1) for _ in drawn)
        body: list[int] = []
        before = 0
        for place, (question, answer) in zip(places, drawn, strict=True):
            body += prose[before:place] + question + answer + end
            before = place
        ids = (body + prose[before:] + closing)[-length:]
        return ids, ([False] * (len(ids) - len(learned)) + learned)[-length:]

    def batch(self, rows: int, length: int, facts: int) -> tuple[Tensor, Tensor]:
        """Token ids and masks of answers, (rows, length) each."""
        drawn = [self.draw(length, facts) for _ in range(rows)]
        return torch.tensor([ids for ids, _ in drawn]), torch.tensor([mask for _, mask in drawn])


def build_model(tokenizer, context: int) -> LlamaForCausalLM:
    """Four layers of width 128: enough for heads that find what followed the same words."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def stage(part: float, context: int) -> tuple[int, int]:
    """Tokens and facts of a window when `part` of the steps is done: from short to long."""
    for until, length, facts in ((0.25, 128, 6), (0.5, 256, 8), (0.75, 512, 8)):
        if part < until and length <= context:
            return length, facts
    return context, 10


def train(args: argparse.Namespace) -> None:
    """Train and save, in bfloat16."""
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer)
    books = read_texts(args.text, args.exclude)
    text = "\n".join(book.text for book in books)
    windows = Windows(encode(tokenizer, text), words_of(text), tokenizer, args.seed)
    model = build_model(tokenizer, args.context).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98))
    begin, right, seen = time.monotonic(), 0.0, 0
    for step in range(args.steps):
        length, facts = stage(step / args.steps, args.context)
        ids, answers = windows.batch(max(1, args.batch_tokens // length), length, facts)
        rise, fall = (step + 1) / 200, 2 * (1 - step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, rise, fall)
        logits = model(ids).logits[:, :-1].float()
        target, learned = ids[:, 1:], answers[:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = losses.view_as(target)[learned].mean() + args.prose * losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right += float((logits.argmax(-1) == target)[learned].float().mean())
        seen += 1
        if not math.isfinite(loss.item()):
            raise InputError(f"the loss is {loss.item()} at step {step}: lower --rate")
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            minutes = (time.monotonic() - begin) / 60
            print(
                f"step {step + 1}, {length} tokens, loss {loss.item():.3f}, "
                f"answers right {right / seen:.1%}, {minutes:.1f} minutes",
                flush=True,
            )
            right, seen = 0.0, 0
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.model_max_length = args.context
    tokenizer.save_pretrained(args.output)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="PATH")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="files to leave")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokenizer", default="examples/books-7m")
    parser.add_argument("--context", type=int, default=1024, help="longest window, tokens")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak rate of AdamW")
    parser.add_argument("--prose", type=float, default=0.1, help="weight of all tokens' loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between two lines")
    args = parser.parse_args(argv)
    try:
        train(args)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
