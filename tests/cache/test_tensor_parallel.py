"""Tensor parallelism: two processes, each with half the heads, as one with all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from rotorquant_hf import RotorQuantCache, calibrate
from tests.conftest import ROOT
from tests.helpers import divided
from tests.helpers.models import feed

RANKS = (0, 1)
BY_HEAD = ("codes", "scale", "sinks", "window", "spare")
"""What the names of parts of a cache end in that has a share for each head."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("divided")
    model = divided.load()
    calibrate(model, divided.words(3, 100)).save(folder / "calibration")
    for name, config in (("whole", model.config), ("unknown", None)):
        cache = RotorQuantCache("k4v4", config=config, **divided.SETTINGS)
        feed(model, cache, divided.words(2, divided.PROMPT), (divided.PROMPT - 10,))
        cache.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Any]:
    """What one process finds."""
    return divided.found_in(divided.load(), folder, "part")


@pytest.fixture(scope="module")
def found(folder, alone) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    launch = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    done = subprocess.run(
        [sys.executable, "-m", *launch, "tests.helpers.divided", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"found-{rank}", weights_only=False) for rank in RANKS]


@pytest.mark.parametrize("attention", divided.ATTENTION)
def test_two_processes_write_what_one_does(alone, found, attention) -> None:
    one, (first, second) = alone[attention], (x[attention] for x in found)
    assert torch.equal(first["text"], one["text"])
    assert torch.equal(second["text"], one["text"])
    torch.testing.assert_close(first["logits"], one["logits"], atol=1e-4, rtol=1e-4)
    # The same to the last bit, so that no process ever chooses another token.
    assert torch.equal(first["logits"], second["logits"])


@pytest.mark.parametrize("attention", divided.ATTENTION)
def test_each_holds_half_the_heads(alone, found, attention) -> None:
    one = alone[attention]
    assert one["packed"] > 0
    for rank in RANKS:
        part = found[rank][attention]
        assert 2 * part["packed"] == one["packed"]
        assert part["bytes"].keys() == one["bytes"].keys()
        counted = [name for name in one["bytes"] if name.endswith(BY_HEAD)]
        assert len(counted) == 7
        for name in counted:
            assert 2 * part["bytes"][name] == one["bytes"][name], name
            assert part["bytes"][name] > 0 or name == "spare"
        keys = one["keys"][:, rank : rank + 1]
        torch.testing.assert_close(part["keys"], keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", divided.ATTENTION)
def test_each_takes_the_statistics_of_its_heads(alone, found, attention) -> None:
    for rank in RANKS:
        parts, whole = (x[attention]["statistics"] for x in (found[rank], alone))
        assert ["hessian" in side for side in whole] == [True, False]
        compare(parts, whole, rank, 1e-3)


def compare(parts: list, whole: list, rank: int, tolerance: float) -> None:
    """Statistics of keys and values with those of the same heads of the whole."""
    for part, one in zip(parts, whole, strict=True):
        assert part.keys() == one.keys()
        for name, x in one.items():
            own = x if name == "frequencies" else x[:, rank : rank + 1]
            torch.testing.assert_close(part[name], own, atol=tolerance, rtol=tolerance)


def test_each_saves_and_loads_its_part(alone, found) -> None:
    assert torch.equal(alone["resumed"], alone["sdpa"]["text"])
    for rank in RANKS:
        assert torch.equal(found[rank]["resumed"], alone["resumed"])


def test_a_calibration_of_the_whole_is_divided(alone, found) -> None:
    for rank in RANKS:
        parts, whole = (x["statistics of the calibration"] for x in (found[rank], alone))
        compare(parts, whole, rank, 0.0)
        assert not torch.equal(whole[0]["weight"], alone["sdpa"]["statistics"][0]["weight"])
        assert torch.equal(found[rank]["calibrated"], alone["calibrated"])


def test_bits_are_allocated_as_in_one_process(alone, found) -> None:
    assert len({*alone["allocated"].key_bits, *alone["allocated"].value_bits}) > 1
    for rank in RANKS:
        assert found[rank]["allocated"] == alone["allocated"]


def test_no_process_takes_other_heads_for_its_own(folder, found) -> None:
    for rank in RANKS:
        said = found[rank]
        own, other = (f"part {i + 1} of 2 of the kv heads" for i in (rank, 1 - rank))
        assert (
            f"part-{1 - rank} has {other}, and this process holds {own}; "
            in (said["another's part"])
        )
        assert f"whole has all kv heads, and this process holds {own}; " in said["the whole"]
        assert "to a path of its own" in said["the whole"]
        assert f"has {own}; pass config=model.config" in said["without config"]
        assert (
            "keys have number of heads 1, but this cache holds keys of number of heads 2"
            in (said["the whole, unknown"])
        )
        assert said["tokens of the whole"] == divided.PROMPT - 10
    with pytest.raises(ValueError, match=r"part-1 has part 2 of 2 .* this process holds all kv"):
        RotorQuantCache.load(folder / "part-1", config=divided.load().config)


def test_no_process_calibrates_half_the_heads(found) -> None:
    for rank in RANKS:
        assert "divided among 2 processes (tp_plan)" in found[rank]["calibrating"]
        assert "calibrate it in one process" in found[rank]["calibrating"]
