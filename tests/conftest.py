"""Shared fixtures: the shipped model, and a genuine one, each loaded once."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Models that are not there are looked for here alone: a hub that does not answer takes a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if not torch.cuda.is_available():  # kernels run in Triton's interpreter; before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.helpers.interpreter import hasten

    hasten()

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from evals.subjects.models import LoadedModel, ModelOptions, load
from examples.fetch_smollm2 import FetchError, fetch

# The tensors here are small: threads would mostly wait for each other, and on a busy machine for
# a core (measured: ten times slower). Processes that tests start are to do the same.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "books-7m"


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    """The shipped model in float32."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped model's tokenizer."""
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="session")
def sampled(tokenizer) -> torch.Tensor:
    """Token ids (1, tokens) of a text that the shipped model wrote."""
    text = (ROOT / "examples" / "sampled" / "clock.txt").read_text(encoding="utf-8")
    return tokenizer(text, return_tensors="pt").input_ids


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, fetched unless it is here already."""
    try:
        return fetch()
    except FetchError as error:
        pytest.fail(f"the tests on a genuine model cannot run: {error}", pytrace=False)


@pytest.fixture(scope="session")
def genuine(smollm2) -> LoadedModel:
    """SmolLM2 in float32, as the harness loads it: that takes ten seconds."""
    return load(ModelOptions(model=str(smollm2), device="cpu", dtype="float32"))
