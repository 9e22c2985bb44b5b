"""Needle in a haystack: does a model still find a fact that was stored quantised?

A fact ("The secret word of the miller is candle.") is hidden in prose, other facts of the same
form with it. The prose goes through the cache first, so that the fact is quantised before it is
asked for; then comes the question ("The secret word of the miller is"), which neither holds the
answer nor equals the fact, and the model goes on from there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from ..caches.registry import BASELINE, CacheSpec
from ..errors import require
from ..options import option
from ..probes.chunked import feed, read
from ..probes.footprint import quantised_tokens
from ..progress import steps
from ..subjects.models import LoadedModel
from ..subjects.texts import TextOptions, beginning, encode
from .base import Measurement, one_by_one

QUESTION = " The secret word of the {subject} is"

# Words that even a small model has often seen.
SUBJECTS = (
    *("doctor", "soldier", "servant", "brother", "sister", "uncle", "aunt", "cousin", "daughter"),
    *("stranger", "mistress", "poet", "author", "teacher", "queen", "nurse", "student", "artist"),
)
ANSWERS = (
    *("river", "silver", "window", "garden", "winter", "bread", "horse", "letter", "music"),
    *("stone", "water", "table", "summer", "paper", "shadow", "iron", "kitchen", "carriage"),
    *("pocket", "church", "apple", "castle", "flower", "piano", "basket", "forest"),
)


@dataclass(frozen=True)
class NeedleOptions(TextOptions):
    """How `needle` is measured."""

    length: tuple[int, ...] = option((512, 1024), "tokens of prose, facts and question", min=64)
    depth: tuple[float, ...] = option(
        (0.1, 0.3, 0.5, 0.7, 0.9), "place of the fact: 0 first, 1 last", min=0, max=1
    )
    trials: int = option(4, "questions for each length and depth", min=1)
    others: int = option(3, "other facts of the same form in the prose", min=0, max=12)
    chunk: int = option(64, "maximum tokens of a forward pass", min=1)


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        length, depth: its cell.
        context: token ids (1, n) of the prose with its facts.
        span: first and last-but-one token of the fact asked for.
        question: token ids (1, m).
        answer: token ids.
        candidates: first tokens of all possible answers, the right one first.
    """

    length: int
    depth: float
    context: Tensor
    span: tuple[int, int]
    question: Tensor
    answer: list[int]
    candidates: list[int]


class NeedleMeasurement:
    """Retrieval by caches of one model.

    Args:
        loaded: the model.
        options: prose and grid.
        seed: of the facts and their places.

    Raises:
        InputError: for a text that is missing or too short.
    """

    def __init__(self, loaded: LoadedModel, options: NeedleOptions, seed: int = 0) -> None:
        self.loaded, self.options = loaded, options
        self.maker = _Maker(loaded, options, seed)
        self.prompts = [
            self.maker.prompt(length, depth)
            for length in options.length
            for depth in options.depth
            for _ in range(options.trials)
        ]
        self.baseline = self._passes(CacheSpec.of(BASELINE))

    def run(self, spec: CacheSpec) -> dict[str, Any]:
        """The figures of one cache, as plain values."""
        answers = self.baseline if spec.is_baseline else self._passes(spec)
        count = len(answers)
        accuracy = sum(passed for passed, _, _ in answers) / count
        baseline = sum(passed for passed, _, _ in self.baseline) / count
        warnings = []
        if baseline < 0.5:
            warnings.append(
                f"the model itself finds only {baseline:.0%} with the uncompressed cache: this "
                "says little of any other"
            )
        stored = sum(stored for _, _, stored in answers)
        if not spec.is_baseline and stored < count:
            warnings.append(
                f"only {stored} of {count} facts were stored quantised when they were asked for: "
                "use longer texts, or facts less deep"
            )
        return {
            "accuracy": accuracy,
            "baseline_accuracy": baseline,
            "choice_accuracy": sum(chosen for _, chosen, _ in answers) / count,
            "asked": count,
            "quantised": sum(stored for _, _, stored in answers),
            "points": self._grid(answers),
            "warnings": warnings,
        }

    def _passes(self, spec: CacheSpec) -> list[tuple[bool, bool, bool]]:
        """Of every prompt: the answer was written, was the likeliest, was stored quantised."""
        shown = steps(self.prompts, f"{spec.label}: question {{}} of {{}}")
        return [self._ask(prompt, self.loaded.new_cache(spec)) for prompt in shown]

    def _ask(self, prompt: Prompt, cache: Cache) -> tuple[bool, bool, bool]:
        model = self.loaded.model
        feed(model, prompt.context, cache, self.options.chunk)
        first, last = quantised_tokens(cache)
        stored = first <= prompt.span[0] and prompt.span[1] <= last
        logits = read(model, prompt.question, cache)[-1]
        scores = logits[prompt.candidates]
        chosen = len(prompt.candidates) > 1 and bool((scores[0] > scores[1:]).all())
        written: list[int] = []
        while len(written) < len(prompt.answer):
            written.append(int(logits.argmax()))
            if written[-1] != prompt.answer[len(written) - 1]:
                return False, chosen, stored
            if len(written) < len(prompt.answer):
                logits = read(model, prompt.question.new_tensor([written[-1:]]), cache)[-1]
        return True, chosen, stored

    def _grid(self, answers: Sequence[tuple[bool, bool, bool]]) -> list[dict[str, Any]]:
        cells: dict[tuple[int, float], list[tuple[bool, bool, bool]]] = {}
        for prompt, answer in zip(self.prompts, answers, strict=True):
            cells.setdefault((prompt.length, prompt.depth), []).append(answer)
        return [
            {
                "length": length,
                "depth": depth,
                "asked": len(cell),
                "passed": sum(passed for passed, _, _ in cell),
                "chosen": sum(chosen for _, chosen, _ in cell),
                "quantised": all(stored for _, _, stored in cell),
            }
            for (length, depth), cell in cells.items()
        ]


class _Maker:
    """Draws prompts."""

    def __init__(self, loaded: LoadedModel, options: NeedleOptions, seed: int) -> None:
        self.options, self.random = options, random.Random(seed)
        self.tokenizer, self.device = loaded.tokenizer, loaded.device
        self.begin = beginning(self.tokenizer)
        texts = [encode(self.tokenizer, document.text) for document in options.documents()]
        self.texts = [tokens for tokens in texts if len(tokens) >= max(options.length)]
        longest = max(len(tokens) for tokens in texts)
        require(
            bool(self.texts),
            f"the longest text has {longest} tokens, but length is {max(options.length)}: give a "
            "longer text or a smaller length",
        )
        self.answers = self._distinct()
        require(
            len(self.answers) > options.others,
            f"others is {options.others}, but this tokenizer tells only {len(self.answers)} "
            "answers apart by their first token",
        )
        longest = max(options.length)
        require(
            loaded.context is None or longest <= loaded.context,
            f"length is {longest}, but the model takes {loaded.context} tokens",
        )

    def _distinct(self) -> dict[str, list[int]]:
        """Answers of which no two begin with the same token, so that the first one tells."""
        found: dict[int, tuple[str, list[int]]] = {}
        for word in ANSWERS:
            tokens = self._tokens(" " + word)
            found.setdefault(tokens[0], (word, tokens))
        return dict(found.values())

    def prompt(self, length: int, depth: float) -> Prompt:
        """A question whose fact lies at `depth` of `length` tokens."""
        subjects = self.random.sample(SUBJECTS, self.options.others + 1)
        answers = self.random.sample(sorted(self.answers), self.options.others + 1)
        questions = [self._tokens(QUESTION.format(subject=subject)) for subject in subjects]
        end = self._tokens(".")
        facts = [
            question + self.answers[answer] + end
            for question, answer in zip(questions, answers, strict=True)
        ]
        room = length - len(self.begin) - sum(map(len, facts)) - len(questions[0])
        require(room > 0, f"length is {length}, too short for {len(facts)} facts and a question")
        prose = self._prose(room)
        places = [round(depth * room), *(self.random.randint(0, room) for _ in facts[1:])]
        ids, span, before = list(self.begin), (0, 0), 0
        for index in sorted(range(len(facts)), key=lambda i: places[i]):
            ids += prose[before : places[index]].tolist()
            if index == 0:
                span = (len(ids), len(ids) + len(facts[0]))
            ids += facts[index]
            before = places[index]
        ids += prose[before:].tolist()
        right = answers[0]
        others = [tokens[0] for word, tokens in self.answers.items() if word != right]
        return Prompt(
            length,
            depth,
            torch.tensor([ids], device=self.device),
            span,
            torch.tensor([questions[0]], device=self.device),
            self.answers[right],
            [self.answers[right][0], *others],
        )

    def _prose(self, room: int) -> np.ndarray:
        tokens = self.random.choice(self.texts)
        start = self.random.randrange(len(tokens) - room + 1)
        return tokens[start : start + room]

    def _tokens(self, text: str) -> list[int]:
        """Of a text that follows another: some tokenizers set a space before what comes first."""
        before, whole = (encode(self.tokenizer, x).tolist() for x in ("x", "x" + text))
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return encode(self.tokenizer, text).tolist()


NEEDLE = Measurement(
    name="needle",
    text="whether a fact that was stored quantised is still found",
    meaning="Share of the facts hidden in prose that the model still names.",
    options=NeedleOptions,
    prepare=lambda loaded, options, seed: one_by_one(NeedleMeasurement(loaded, options, seed).run),
)
