"""Trains a small Llama language model on plain text, on a CPU or a GPU.

Run from the root of the repository::

    python -m examples.train_model --text path/to/books --output my-model
    python -m evals perplexity --model my-model --cache dynamic --text path/to/books-heldout

The defaults are the size and the recipe of ``examples/books-7m``. A run that was stopped goes on
from its last checkpoint when the same command is given again; with float32 on a CPU it ends with
the weights that an unbroken run gives, bit for bit.
"""

import argparse
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from evals.errors import InputError, require
from evals.subjects.models import load_tokenizer, pick_device
from evals.subjects.texts import Document, read_dataset, read_texts
from examples.text_data import join, train_tokenizer, windows_at

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """All that decides the weights, besides the text; every field is a command-line option."""

    layers: Annotated[int, "decoder layers"] = 8
    hidden: Annotated[int, "width of the residual stream"] = 256
    heads: Annotated[int, "query heads, a multiple of --kv-heads"] = 4
    kv_heads: Annotated[int, "key-value heads"] = 2
    head_dim: Annotated[int, "numbers in a head, even for RoPE"] = 64
    ffn: Annotated[int, "width of the feed-forward layers"] = 704
    vocab: Annotated[int, "tokens in the tokenizer; --tokenizer brings its own number"] = 4096
    context: Annotated[int, "longest context in tokens, the window of the last fifth"] = 2048
    window: Annotated[int, "tokens in a window of the first four fifths"] = 512
    batch_tokens: Annotated[int, "tokens in a batch, a multiple of both windows"] = 4096
    steps: Annotated[int, "batches to train on"] = 5957
    learning_rate: Annotated[float, "peak rate of AdamW, held until half of the steps"] = 2e-3
    warmup: Annotated[int, "steps from rate zero to the peak"] = 100
    final_rate: Annotated[float, "rate of the last step, as a part of the peak"] = 0.02
    weight_decay: Annotated[float, "weight decay of the matrices; vectors have none"] = 0.1
    clip: Annotated[float, "largest norm of the gradient"] = 1.0
    precision: Annotated[str, "of the arithmetic: float32, bfloat16 (autocast) or auto"] = "auto"
    save_dtype: Annotated[str, "of the saved weights: float32 or bfloat16"] = "bfloat16"
    seed: Annotated[int, "of the first weights and of the order of the text"] = 0

    def __post_init__(self) -> None:
        """Refuses what no model or batch can have."""
        for name, value in asdict(self).items():
            lowest = 0 if name in ("seed", "warmup", "final_rate", "weight_decay") else 1e-12
            inside = isinstance(value, str) or lowest <= value < math.inf
            require(inside, f"{_flag(name)} {value} is out of range: choose a positive number")
        whole = self.heads % self.kv_heads == 0
        require(whole, f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}")
        even = self.head_dim % 2 == 0
        require(even, f"--head-dim {self.head_dim} must be even: RoPE turns pairs")
        fits = self.window <= self.context
        require(fits, f"--window {self.window} must not exceed --context {self.context}")
        for length in (self.window, self.context):
            whole = self.batch_tokens % length == 0
            require(whole, f"--batch-tokens {self.batch_tokens} must be a multiple of {length}")
        for name, choices in (("precision", ("auto", *DTYPES)), ("save_dtype", tuple(DTYPES))):
            known = (value := getattr(self, name)) in choices
            require(known, f"{_flag(name)} {value}: choose from {', '.join(choices)}")

    def on(self, device: torch.device) -> "Settings":
        """These settings with the automatic precision decided: bfloat16 where CUDA has it."""
        if self.precision != "auto":
            return self
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return replace(self, precision="bfloat16" if fast else "float32")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- the model and one step ---


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama with fresh float32 weights, on the CPU so that no device changes them."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.ffn,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            head_dim=settings.head_dim,
            max_position_embeddings=settings.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms' vectors alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))


def learning_rate(step: int, settings: Settings) -> float:
    """The rate of a step: a linear rise, the peak until half of the steps, a linear fall."""
    rise = (step + 1) / max(settings.warmup, 1)
    fallen = max(0.0, 2 * (step + 1) / settings.steps - 1)
    return settings.learning_rate * min(1.0, rise, 1 - (1 - settings.final_rate) * fallen)


def token_losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of every token but a window's first, in nats.

    ``windows [batch, length]`` gives ``[batch * (length - 1)]``, float32.
    """
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


def batch_of(step: int, tokens: np.ndarray, settings: Settings) -> torch.Tensor:
    """The windows of a step, each with the token that follows it: ``[batch, length + 1]``.

    They depend on the seed and the step alone, which makes the step all there is to remember of
    the position in the text.
    """
    late = step >= settings.steps - settings.steps // 5
    length = settings.context if late else settings.window
    random = np.random.default_rng((settings.seed, step))
    starts = random.integers(0, len(tokens) - length, size=settings.batch_tokens // length)
    return torch.from_numpy(windows_at(tokens, starts, length + 1))


def steps_from(
    first: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokens: np.ndarray,
    settings: Settings,
) -> Iterator[tuple[int, float]]:
    """Trains from step ``first`` on; yields the steps done and the mean loss in nats a token."""
    device, mixed = model.device, settings.precision == "bfloat16"
    model.train()
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = token_losses(model, batch_of(step, tokens, settings).to(device)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        require(math.isfinite(value), f"the loss is {value} at step {step}: lower --learning-rate")
        yield step + 1, value


# --- checkpoints and the whole run ---


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes beside ``path`` and renames, so that a kill leaves the old checkpoint or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of a stopped run; one of other settings or another text is refused."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in identity.items():
        before = state["identity"].get(name)
        require(
            before == value,
            f"{path} was made with {_flag(name)} {before}, not {value}: give the same to resume, "
            f"or remove {path.parent} to start again",
        )
    return state


def prepare_text(
    books: list[Document], settings: Settings, tokenizer_from: str | Path | None
) -> tuple[PreTrainedTokenizerBase, np.ndarray]:
    """The tokenizer, trained here unless it comes from a folder, and the text as its tokens."""
    if tokenizer_from is None:
        texts = (book.text for book in books)
        tokenizer = train_tokenizer(texts, settings.vocab, settings.context)
    else:
        tokenizer = load_tokenizer(tokenizer_from)
        tokenizer.model_max_length = settings.context
    tokens = join(tokenizer, books)
    require(
        len(tokens) > settings.context,
        f"the text has {len(tokens)} tokens, too few for a window of --context {settings.context}: "
        "give more text or a smaller --context",
    )
    return tokenizer, tokens


def train(
    books: list[Document],
    output: Path,
    settings: Settings,
    device: torch.device,
    tokenizer_from: str | Path | None = None,
    checkpoint_minutes: float = 2.0,
) -> list[float]:
    """Trains a model into ``output``; returns this run's losses in nats a token, one a step."""
    settings, path, first = settings.on(device), output / "checkpoint" / "state.pt", 0
    if path.exists():
        tokenizer_from = tokenizer_from or output
    else:
        unused = not (output / "config.json").exists()
        require(unused, f"{output} already holds a model: choose another --output or remove it")
    tokenizer, tokens = prepare_text(books, settings, tokenizer_from)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
    identity = asdict(settings) | {"text": f"of token digest {digest}"}
    model = build_model(settings, tokenizer).to(device)
    optimizer = build_optimizer(model, settings)
    if path.exists():
        state = load_checkpoint(path, identity)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    tokenizer.save_pretrained(output)

    history: list[float] = []
    saved_at = time.monotonic()
    with tqdm(total=settings.steps, initial=first, unit="step") as bar:
        for step, loss in steps_from(first, model, optimizer, tokens, settings):
            history.append(loss)
            bar.set_postfix(loss=f"{np.mean(history[-50:]):.3f}", refresh=False)
            bar.update()
            if time.monotonic() - saved_at >= 60 * checkpoint_minutes:
                weights, moments = model.state_dict(), optimizer.state_dict()
                state = {"identity": identity, "step": step, "model": weights, "optimizer": moments}
                save_checkpoint(path, state)
                saved_at = time.monotonic()
    model.to(DTYPES[settings.save_dtype]).save_pretrained(output)
    shutil.rmtree(path.parent, ignore_errors=True)
    return history


# --- the command line ---


def build_parser() -> argparse.ArgumentParser:
    """The options; one for every field of ``Settings``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", nargs="+", type=Path, metavar="PATH", help="folder or tar archive of .txt files"
    )
    source.add_argument("--dataset", metavar="NAME", help="data set of the datasets package")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="held-out files")
    parser.add_argument("--dataset-config", metavar="NAME")
    parser.add_argument("--split", default="train", help="of --dataset, such as train[:10%%]")
    parser.add_argument("--column", default="text", help="of --dataset (default text)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the model")
    parser.add_argument("--tokenizer", metavar="DIR", help="reuse this one (default: train one)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator, if any)")
    parser.add_argument("--checkpoint-minutes", type=float, default=2.0, help="(default 2)")
    parser.add_argument("--tokens", type=int, help="tokens to train on, instead of --steps")
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        default = getattr(Settings, name)
        kind, (text,) = hint.__origin__, hint.__metadata__
        text += f" (default {default})"
        parser.add_argument(_flag(name), type=kind, default=default, help=text)
    return parser


def read_text(options: argparse.Namespace) -> list[Document]:
    """The text that the options name."""
    if options.dataset is None:
        return read_texts(options.text, options.exclude)
    require(not options.exclude, f"--exclude {options.exclude} is for --text: choose a --split")
    return read_dataset(options.dataset, options.dataset_config, options.split, options.column)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = build_parser().parse_args(arguments)
    try:
        settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
        if options.tokens is not None:
            settings = replace(settings, steps=math.ceil(options.tokens / settings.batch_tokens))
        train(
            read_text(options),
            options.output,
            settings,
            pick_device(options.device),
            options.tokenizer,
            options.checkpoint_minutes,
        )
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"the model is in {options.output}")


if __name__ == "__main__":
    main()
