"""What `tests/cache/test_tensor_parallel.py` has done, by one process or by one of two.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.helpers.divided FOLDER

FOLDER has a `calibration`, and caches of the `whole` model. Every process writes what it found into
a file of the folder, named by its rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from rotorquant_hf import RotorQuantCache, allocate_bits, calibrate
from tests.conftest import MODEL, ROOT
from tests.helpers.models import feed

ATTENTION = ("sdpa", "rotorquant")
PROMPT, NEW = 60, 16
SETTINGS = {"residual_length": 8, "block_length": 4, "num_sink_tokens": 2, "statistics_length": 16}


def load(**options: Any) -> Any:
    """The shipped model: of random weights it is chance what layers decide by their heads."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, **options).eval()


def words(rows: int, tokens: int) -> torch.Tensor:
    """Token ids (rows, tokens) of a text that the shipped model wrote."""
    text = (ROOT / "examples" / "sampled" / "clock.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt").input_ids
    return ids[0, : rows * tokens].view(rows, tokens)


def refused(work: Callable[[], Any]) -> str:
    """What the ValueError says that this raises."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return "not refused"


def generated(model: Any, ids: torch.Tensor, cache: RotorQuantCache, new: int = NEW) -> Any:
    """The text so far and the new tokens, greedy."""
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False}
    return model.generate(ids, past_key_values=cache, **options)


def statistics(cache: RotorQuantCache) -> list[dict[str, torch.Tensor]]:
    """Of the keys and the values of the first layer."""
    return [side.statistics.tensors() for side in cache.layers[0].store.sides]


def found_in(model: Any, folder: Path, name: str) -> dict[str, Any]:
    """What there is to compare of one process's model; it saves under `name`."""
    ids, found = words(2, PROMPT), {}
    for attention in ATTENTION:
        model.set_attn_implementation(attention)
        cache = RotorQuantCache("k4v4", config=model.config, **SETTINGS)
        text = generated(model, ids, cache)
        found[attention] = {
            "text": text,
            "logits": feed(model, cache, text[:, -1:], (1,)),
            "bytes": cache.memory().parts,
            "packed": cache.memory().packed_numbers,
            "keys": cache.layers[0].keys[...],
            "statistics": statistics(cache),
        }
    cache = RotorQuantCache("k4v4", config=model.config, **SETTINGS)
    text = generated(model, ids, cache, NEW // 2)
    cache.save(folder / name)
    cache = RotorQuantCache.load(folder / name, config=model.config)
    found["resumed"] = generated(model, text, cache, NEW - NEW // 2)
    calibration = folder / "calibration"
    cache = RotorQuantCache("k4v4", config=model.config, calibration=calibration, **SETTINGS)
    found["calibrated"] = generated(model, ids, cache)
    found["statistics of the calibration"] = statistics(cache)
    found["allocated"] = allocate_bits(model, words(1, 100), cache.settings)
    return found


def main(folder: Path) -> None:
    """Of one of two processes."""
    torch.set_num_threads(1)
    model = load(distributed_config=DistributedConfig(tp_plan="auto"))
    rank = torch.distributed.get_rank()
    found = found_in(model, folder, f"part-{rank}")
    config, ids = model.config, words(2, PROMPT)
    torch.distributed.barrier()
    found |= {
        "another's part": refused(
            lambda: RotorQuantCache.load(folder / f"part-{1 - rank}", config)
        ),
        "without config": refused(lambda: RotorQuantCache.load(folder / f"part-{rank}")),
        "the whole": refused(lambda: RotorQuantCache.load(folder / "whole", config)),
        "calibrating": refused(lambda: calibrate(model, words(1, 300))),
    }
    whole = RotorQuantCache.load(folder / "unknown")
    found["the whole, unknown"] = refused(lambda: generated(model, ids, whole, 1))
    found["tokens of the whole"] = whole.get_seq_length()
    torch.save(found, folder / f"found-{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
