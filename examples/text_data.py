"""Text for training: tokenizers made here, books as one stream of tokens, windows of it."""

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from evals.errors import require
from evals.subjects.texts import Document, encode

END = "<|endoftext|>"
SMALLEST_VOCAB = 257  # the 256 bytes and END


def train_tokenizer(texts: Iterable[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab`` tokens; ``END`` is token 0."""
    require(
        vocab >= SMALLEST_VOCAB,
        f"--vocab {vocab} is too small: a byte-level tokenizer needs {SMALLEST_VOCAB} or more",
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
    )


def join(tokenizer: PreTrainedTokenizerBase, books: Iterable[Document]) -> np.ndarray:
    """All books as one stream, each followed by the end-of-text token: ``[tokens]``, int32."""
    marked = tokenizer.eos_token_id is not None
    require(
        marked, f"{tokenizer.name_or_path} has no end-of-text token: choose another --tokenizer"
    )
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    parts: list[np.ndarray] = []
    for book in tqdm(books, desc="tokens of the text", unit="book"):
        parts += encode(tokenizer, book.text), end
    return np.concatenate(parts)


def windows_at(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The windows ``tokens[s : s + length]`` of all ``starts``: ``[starts, length]``, int64."""
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)
