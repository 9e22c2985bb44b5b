"""The measurements measure: nothing compressed shows nothing, the twins keep the function."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import DynamicCache

from evals import bench_cpu, cache_size, divergence
from evals.outlier_twin import KeyOffsetCache, add_key_bias, scale_key_channels
from rotorquant_hf import RotorQuantCache
from tests.conftest import MODEL, ROOT


def compare(model, ids, make_cache, chunk=25):
    reference = [divergence.reference_logits(model, ids)]
    return divergence.compare(model, [ids], reference, make_cache, chunk)


def test_ordinary_cache_diverges_by_nothing(model, sampled) -> None:
    ids = sampled[:, :190]
    result = compare(model, ids, DynamicCache)
    assert result.kl_mean < 1e-7
    assert result.top1_agreement == 1
    assert result.compressed_share == 0
    assert result.bits_per_number == 32
    loss = model(ids, labels=ids).loss  # Transformers' own
    assert result.perplexity == pytest.approx(float(loss.detach().exp()), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(result.perplexity, rel=1e-6)


def test_a_cache_that_compresses_nothing_shows_so(model, sampled) -> None:
    result = compare(model, sampled[:, :190], lambda: RotorQuantCache(residual_length=500))
    assert result.compressed_share == 0
    assert result.kl_mean < 1e-7


def test_compressed_share_counts_what_was_read(model, sampled) -> None:
    """Window 10, blocks of 10, no sinks, chunks of 10: before chunk i, 10 (i - 1) are packed."""
    result = compare(
        model,
        sampled[:, :60],
        lambda: RotorQuantCache(residual_length=10, block_length=10, num_sink_tokens=0),
        chunk=10,
    )
    packed, read = sum(10 * max(0, i - 1) for i in range(6)), sum(10 * (i + 1) for i in range(6))
    assert result.compressed_share == pytest.approx(packed / read)


def test_outlier_twin_is_the_same_function(model, sampled) -> None:
    twin = copy.deepcopy(model)
    scale_key_channels(twin, 10.0)
    assert not torch.equal(
        twin.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.k_proj.weight
    )
    ids = sampled[:, :100]
    torch.testing.assert_close(
        divergence.reference_logits(twin, ids),
        divergence.reference_logits(model, ids),
        rtol=1e-3,
        atol=1e-3,
    )


def test_key_offset_is_the_same_function_and_centred_by_default(model, sampled) -> None:
    ids = sampled[:, :300]
    exact = compare(model, ids, lambda: KeyOffsetCache(50.0, residual_length=500))
    assert exact.kl_mean < 1e-5
    options = {"residual_length": 32, "key_bits": 3, "value_bits": 3}
    default = compare(model, ids, lambda: KeyOffsetCache(100.0, **options))
    uncentred = compare(model, ids, lambda: KeyOffsetCache(100.0, center_keys=False, **options))
    assert default.kl_mean < 0.006
    assert uncentred.kl_mean > 10 * default.kl_mean


@pytest.mark.parametrize("pair", [16, 20, 31])
def test_a_key_bias_is_survived_whether_rope_turns_it_or_not(model, sampled, pair) -> None:
    twin = copy.deepcopy(model)
    add_key_bias(twin, 100.0, pair)
    ids = sampled[:, :500]
    keys = DynamicCache()
    twin(ids[:, :50], past_key_values=keys)
    assert keys.layers[0].keys[..., [pair, pair + 32]].norm(dim=-1).mean() > 50
    options = {"residual_length": 32, "key_bits": 3, "value_bits": 3}
    default = compare(twin, ids, lambda: RotorQuantCache(**options))
    uncentred = compare(twin, ids, lambda: RotorQuantCache(center_keys=False, **options))
    assert default.kl_mean < 1.5 * uncentred.kl_mean < 0.003


def test_wrong_arguments_are_named(capsys, tmp_path) -> None:
    config, text = ROOT / "configs" / "bits.yaml", ROOT / "examples" / "sampled" / "road.txt"
    for argv, says in (
        ([str(config), "--text", "absent.txt"], "there is no file absent.txt"),
        (["absent.yaml", "--text", str(text)], "there is no file absent.yaml"),
        ([str(config), "--text", str(text), "--windows", "0"], "--windows is 0"),
    ):
        with pytest.raises(SystemExit):
            divergence.main(argv)
        assert says in capsys.readouterr().err


def test_command_prints_a_row_per_setting(tmp_path, capsys) -> None:
    config = tmp_path / "grid.yaml"
    config.write_text(
        "base: {residual_length: 32}\nrows:\n  two: {key_bits: 2}\n  eight: {key_bits: 8}\n"
    )
    text = ROOT / "examples" / "sampled" / "road.txt"
    divergence.main(
        [str(config), "--model", str(MODEL), "--text", str(text), "--windows", "1",
         "--length", "200", "--json"]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["name"] for row in rows] == ["two", "eight"]
    assert rows[0]["kl_mean"] > rows[1]["kl_mean"] > 0
    assert rows[0]["key_bits"] == 2
    assert "uncompressed" in lines[-1]


def test_committed_config_is_valid() -> None:
    rows = divergence._rows(ROOT / "configs" / "quantizers.yaml")
    assert len(rows) > 10
    default = rows["the same, 4 sinks"]
    assert default.to_dict() | {"key_bits": 4, "value_bits": 4, "residual_length": 128} == (
        RotorQuantCache().settings.to_dict()
    )


def test_bad_input_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="the text has 5 tokens; it needs at least 10"):
        divergence.windows(torch.arange(5), 1, 10)
    config = tmp_path / "bad.yaml"
    config.write_text("rows: {a: {bits: 3}}")
    with pytest.raises(ValueError, match="unknown option bits"):
        divergence._rows(config)
    config.write_text("settings: {}")
    with pytest.raises(ValueError, match="settings"):
        divergence._rows(config)
    config.write_text("")
    with pytest.raises(ValueError, match=r"bad\.yaml has the keys None"):
        divergence._rows(config)


def test_cache_sizes(capsys) -> None:
    cache_size.main(
        ["--tokens", "1000", "--heads", "2", "--head-dim", "64", "--presets", "k4v4", "k3v3"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| k4v4 ") for line in lines)
    ratios = [float(line.split("|")[3].strip().rstrip("x")) for line in lines if "| k" in line]
    assert 1.5 < ratios[0] < ratios[1] < 5


def test_bench_cpu(capsys) -> None:
    """A row per width, whose ratio is that of its medians."""
    options = ["--context", "400", "--dtype", "float32", "--threads", "1", "--repeats", "3"]
    bench_cpu.main([*options, "--bits", "3", "4"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in lines if "| float32" in line]
    assert [row[1] for row in rows] == ["3", "4"]
    for row in rows:
        packed, dequantised = (float(row[i].split()[0]) for i in (3, 4))
        assert float(row[5].rstrip("x")) == pytest.approx(dequantised / packed, rel=0.5)


def test_bench_cpu_reads_what_was_compressed() -> None:
    keys, values, plain_keys, _ = bench_cpu.cached(400, 2, 64, 3, torch.float32)
    assert keys.states.packed.shape == (1, 2, 256, 64)
    assert keys.shape == values.shape == plain_keys.shape
    assert 0 < (keys.materialize() - plain_keys).norm() < 0.2 * plain_keys.norm()
