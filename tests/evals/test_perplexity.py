"""Perplexity and divergence: equal to the model's own where nothing is compressed, and honest."""

from __future__ import annotations

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache

from evals.__main__ import main
from evals.caches.registry import CacheSpec
from evals.errors import InputError
from evals.measurements.comparison import compare, compared
from evals.measurements.intervals import interval
from evals.measurements.memory import MemoryOptions
from evals.measurements.perplexity import PerplexityMeasurement, PerplexityOptions
from evals.measurements.reference import Reference, SinglePass, single_pass
from evals.measurements.registry import MEASUREMENTS
from evals.probes.chunked import feed
from evals.probes.footprint import footprint
from evals.probes.half_size import half_footprint, layer_shapes
from evals.subjects.models import LoadedModel, ModelOptions
from evals.subjects.twins import add_key_bias, offset_keys, scale_key_channels
from rotorquant_hf import RotorQuantCache
from tests.conftest import MODEL, ROOT
from tests.helpers.models import draw_key_biases

TEXT = str(ROOT / "examples" / "sampled" / "clock.txt")
TEXT_FOLDER = str(ROOT / "examples" / "sampled")
SHORT = {"residual_length": 32, "statistics_length": 0, "key_bits": 3, "value_bits": 3}


def against_single_pass(model, ids, make_cache, chunk=25):
    return compare(model, [ids], SinglePass(model, [ids]), make_cache, chunk)


@pytest.mark.parametrize("chunk", [1, 7, 64, 190, 1000])
def test_the_ordinary_cache_gives_the_models_own_perplexity(model, sampled, chunk) -> None:
    ids = sampled[:, :190]
    result = against_single_pass(model, ids, DynamicCache, chunk)
    own = math.exp(float(model(ids, labels=ids).loss.detach()))  # Transformers' own
    assert result.perplexity == pytest.approx(own, abs=1e-4)
    assert result.baseline_perplexity == pytest.approx(own, abs=1e-4)
    assert 0 <= result.kl_mean < 1e-10
    assert result.top1_agreement == 1
    assert result.compressed_share == 0
    assert result.bits_per_number == 32
    assert result.tokens == 189


@pytest.mark.parametrize("options", [{}, {"block_length": 8, "num_sink_tokens": 0}, {"seed": 1}])
@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks_read_what_single_tokens_read(model, sampled, chunk, options) -> None:
    """By construction, but for codes that rounding tips: a pass ends where tokens are quantised."""
    ids = sampled[:, :150]

    def make_cache() -> Cache:
        return RotorQuantCache(**{**SHORT, **options})

    one = against_single_pass(model, ids, make_cache, 1)
    many = against_single_pass(model, ids, make_cache, chunk)
    assert one.compressed_share > 0.25
    assert many.kl_mean == pytest.approx(one.kl_mean, rel=1e-2)
    assert many.kl_p99 == pytest.approx(one.kl_p99, rel=1e-2)
    assert many.perplexity == pytest.approx(one.perplexity, rel=5e-5)
    assert many.compressed_share == pytest.approx(one.compressed_share, rel=1e-9)


def test_compressed_share_is_that_of_single_tokens(model, sampled) -> None:
    """Window 10, blocks of 10, no sinks: a token at place p reads 10 * ((p - 10) // 10) packed."""
    result = against_single_pass(
        model,
        sampled[:, :60],
        lambda: RotorQuantCache(
            residual_length=10, statistics_length=0, block_length=10, num_sink_tokens=0
        ),
    )
    packed = sum(10 * max(0, (p - 10) // 10) for p in range(60))
    assert result.compressed_share == pytest.approx(packed / sum(p + 1 for p in range(60)))


def test_the_figures_are_those_of_their_definitions(model, sampled) -> None:
    """Against float64 sums over all logits at once."""
    ids = sampled[:, :200]
    cache, logits = RotorQuantCache(**SHORT), []
    with torch.no_grad():
        for i in range(200):
            logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits[0])
    actual = torch.cat(logits).double().log_softmax(-1)
    expected = single_pass(model, ids).double().log_softmax(-1)
    kl = (expected.exp() * (expected - actual)).sum(-1)
    loss = -actual[:-1].gather(-1, ids[0, 1:, None]).mean()
    result = against_single_pass(model, ids, lambda: RotorQuantCache(**SHORT), 1)
    assert result.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.kl_p99 == pytest.approx(float(np.quantile(kl, 0.99)), rel=1e-5)
    assert result.perplexity == pytest.approx(float(loss.exp()), rel=1e-9)
    agree = (actual.argmax(-1) == expected.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(agree))
    assert result.bits_per_number == cache.memory().bits_per_number


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 50), (7, 50), (33, 70_000), (5, 300_000)])
def test_logits_are_compared_a_few_rows_at_a_time_with_the_same_bits(tokens, vocabulary) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, tokens, vocabulary, generator=generator) * 3
    actual, expected = logits[0], logits[0] + 0.05 * logits[1]
    for following in (tokens, tokens - 1):  # the last token of a text has no successor
        target = torch.randint(0, vocabulary, (following,), generator=generator)
        a, e = (x.double().log_softmax(-1) for x in (actual, expected))
        kl, agree, losses = compared(actual, expected, target)
        assert torch.equal(kl, (e.exp() * (e - a)).sum(-1))
        assert torch.equal(agree, e.argmax(-1) == a.argmax(-1))
        for found, x in zip(losses, (a, e), strict=True):
            assert torch.equal(found, -x[:following].gather(-1, target[:, None])[:, 0])


def test_tokens_that_read_mostly_codes_are_counted_by_themselves(model, sampled) -> None:
    """Window 10, blocks of 10, no sinks: a token at place p reads 10 * ((p - 10) // 10) packed."""
    options = {
        "residual_length": 10,
        "statistics_length": 0,
        "block_length": 10,
        "num_sink_tokens": 0,
    }
    windows = [sampled[:, :90], sampled[:, 100:150], sampled[:, 160:175]]
    reads = [
        [10 * max(0, (p - 10) // 10) / (p + 1) for p in range(ids.shape[1])] for ids in windows
    ]
    kl, losses, shares = [], [], []
    for ids, share in zip(windows, reads, strict=True):
        cache, logits = RotorQuantCache("k2v2", **options), []
        with torch.no_grad():
            for i in range(ids.shape[1]):
                logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits[0])
        a, e = (x.double().log_softmax(-1) for x in (torch.cat(logits), single_pass(model, ids)))
        chosen = torch.tensor(share) >= 0.5
        kl.append((e.exp() * (e - a)).sum(-1)[chosen])
        both = torch.stack([-x[:-1].gather(-1, ids[0, 1:, None])[:, 0] for x in (a, e)])
        losses.append(both[:, chosen[:-1]])
        shares += [x for x in share if x >= 0.5]
    assert [len(x) for x in kl] == [60, 20, 0]  # from token 30 on; the last window has none
    make_cache = partial(RotorQuantCache, "k2v2", **options)
    result = compare(model, windows, SinglePass(model, windows), make_cache, 25)
    found = result.code_readers
    assert found.tokens == 78
    assert found.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.kl_mean > 1.2 * result.kl_mean
    actual, expected = torch.cat(losses, dim=1).mean(1).exp().tolist()
    assert found.perplexity == pytest.approx(actual, rel=1e-5)
    assert found.baseline_perplexity == pytest.approx(expected, rel=1e-5)
    assert found.compressed_share == pytest.approx(np.mean(shares), rel=1e-9)
    assert found.kl_mean_ci95[0] < found.kl_mean < found.kl_mean_ci95[1]
    short = compare(model, windows[2:], SinglePass(model, windows[2:]), make_cache, 25)
    assert short.code_readers is None
    assert short.kl_mean_ci95 is None


def test_kept_logits_are_forgotten_window_by_window(model, sampled) -> None:
    windows = [sampled[:, :60], sampled[:, 60:120]]
    reference = Reference(model, windows)
    room = reference.room
    first = reference.logits(0, 0, 60)
    reference.logits(1, 0, 60)
    assert torch.equal(reference.logits(0, 0, 60), first)
    reference.forget(0)
    assert list(reference.kept) == [(1, 0, 60)]
    assert reference.room == room - first.nbytes
    reference.forget(1)
    assert reference.room == room
    assert reference.cache is None


def test_logits_of_16_bit_models_are_kept_in_16_bits(model, sampled) -> None:
    half = copy.deepcopy(model).bfloat16()
    reference = Reference(half, [sampled[:, :60]])
    found = reference.logits(0, 0, 60)
    (kept,) = reference.kept.values()
    assert kept.dtype == torch.bfloat16
    assert torch.equal(reference.logits(0, 0, 60), found)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("k4v4", {}, 4.25),  # codes, and a 16-bit scale for 64
        ("k3v2", {}, 2.75),
        ("k3v3", {"exact_layers": (0, -1)}, (2 * 16 + 6 * 3.25) / 8),
        ("hqq", {}, 4.5),  # a scale and a zero of 16 bits for 64
        ("quanto", {"nbits": 2}, 2.5),
        ("dynamic", {}, None),
    ],
)
def test_bits_on_long_texts_do_not_depend_on_the_text(model, name, options, bits) -> None:
    """Tables, statistics and spare room do not grow with it; layers in full precision do."""
    spec = CacheSpec.of(name, options)
    shapes = layer_shapes(model, torch.tensor([[1]]))
    make_cache = partial(spec.make, model.config)
    counted = [half_footprint(shapes, make_cache, n, 64, model.device) for n in (300, 700)]
    assert [x.long_bits_per_number for x in counted] == [bits, bits]
    packed = [x.packed_bits_per_number for x in counted]
    if name.startswith("k") and not options:
        assert packed[0] > packed[1] > bits


def test_bits_on_long_texts_are_those_of_the_layers_that_grow() -> None:
    """Sliding layers hold as much after any text."""
    from tests.helpers.models import build

    ids = (torch.arange(3, 163) * 7 % 90 + 3).unsqueeze(0)
    found = {}
    for name in ("gemma3", "mistral"):  # one full layer of three, none of two
        other = build(name)
        cache = RotorQuantCache(
            residual_length=8, statistics_length=0, block_length=4, config=other.config
        )
        feed(other, ids, cache, 64)
        found[name] = footprint(cache, torch.bfloat16).long_bits_per_number
    assert found == {"gemma3": 5, "mistral": 5}  # 4 and a 16-bit scale for 16


@pytest.mark.parametrize("kept_bytes", [0, 3 << 20, 1 << 30])
def test_the_reference_is_the_same_kept_or_made_again(model, sampled, kept_bytes) -> None:
    windows = [sampled[:, :150], sampled[:, 200:330]]
    reference = Reference(model, windows, kept_bytes=kept_bytes)
    for chunk in (40, 64):  # other passes than those kept
        result = compare(model, windows, reference, lambda: RotorQuantCache(**SHORT), chunk)
        single = compare(
            model, windows, SinglePass(model, windows), lambda: RotorQuantCache(**SHORT), chunk
        )
        assert result.kl_mean == pytest.approx(single.kl_mean, rel=1e-3)
        assert result.baseline_perplexity == pytest.approx(single.baseline_perplexity, abs=1e-4)
    kept = sum(logits.nbytes for logits in reference.kept.values())
    assert kept <= kept_bytes
    assert bool(kept) == bool(kept_bytes)


def test_interval_is_students(model) -> None:
    differences = [0.01, 0.03, -0.005, 0.02]
    low, high = interval([(100, d) for d in differences], 50.0)
    mean, deviation = np.mean(differences), np.std(differences, ddof=1)
    half = student.ppf(0.975, 3) * deviation / 2
    assert low == pytest.approx(50 * math.expm1(mean - half))
    assert high == pytest.approx(50 * math.expm1(mean + half))
    assert interval([(100, 0.01)], 50.0) is None
    # A window counts by its tokens: one of almost none hardly matters.
    lone = interval([(10_000, 0.01), (10_000, 0.01), (1, 5.0)], 50.0)
    assert lone[0] < 50 * math.expm1(0.01) < lone[1]
    assert lone[1] - lone[0] < 0.5


def test_documents_not_windows_are_the_sample(model, sampled) -> None:
    windows = [sampled[:, i * 120 : (i + 1) * 120] for i in range(4)]
    reference = Reference(model, windows)

    def result(documents):
        make_cache = lambda: RotorQuantCache(**SHORT)  # noqa: E731
        return compare(model, windows, reference, make_cache, 64, documents)

    alone = [
        compare(model, [ids], Reference(model, [ids]), lambda: RotorQuantCache(**SHORT), 64)
        for ids in windows
    ]
    means = [math.log(r.perplexity / r.baseline_perplexity) for r in alone]
    two = [(238, (means[0] + means[1]) / 2), (238, (means[2] + means[3]) / 2)]
    by_document = result(["a", "a", "b", "b"])
    expected = interval(two, by_document.baseline_perplexity)
    assert by_document.delta_ci95 == pytest.approx(expected, rel=1e-2)
    of_one = result(["a"] * 4).delta_ci95
    assert of_one == result(None).delta_ci95
    assert of_one != by_document.delta_ci95


def test_bits_in_16_bits_are_those_of_a_16_bit_model(model, sampled) -> None:
    """Counted beside a float32 model as on the model in bfloat16 itself."""
    half = copy.deepcopy(model).bfloat16()
    ids = sampled[:, :300]
    shapes = layer_shapes(model, ids[:, :1])
    assert len(shapes) == 8
    for name in ("dynamic", "k3v3", "k4v4", "haar", "quanto", "hqq"):
        spec = CacheSpec.of(name)
        make_cache = partial(spec.make, model.config)
        counted = half_footprint(shapes, make_cache, 300, 64, model.device)
        own = compare(half, [ids], SinglePass(half, [ids]), make_cache, 64)
        assert counted.bits_per_number == own.bits_per_number
        assert counted.packed_bits_per_number == own.packed_bits_per_number
    assert counted.packed_bits_per_number == 4.5  # hqq: a scale and a zero of 16 bits for 64


@pytest.mark.parametrize("measure", ["perplexity", "memory"])
def test_wide_keys_count_in_16_bits_too(tokenizer, measure) -> None:
    """There other states are counted, which would not have widened the keys."""
    config = AutoConfig.from_pretrained(MODEL, attention_bias=True)
    biased = AutoModelForCausalLM.from_pretrained(MODEL, config=config, dtype=torch.float32)
    draw_key_biases(biased, layer=1)
    chosen = {
        "perplexity": PerplexityOptions(text=(TEXT,), max_tokens=600, window=300),
        "memory": MemoryOptions(context=(300,), new_tokens=4),
    }[measure]
    measured = MEASUREMENTS[measure].prepare(
        LoadedModel(biased, tokenizer, ModelOptions()), chosen, 0
    )
    options = {"residual_length": 32, "statistics_length": 0}
    wide, narrow = (
        (result if measure == "perplexity" else result["points"][0])
        for result in measured(
            [CacheSpec.of("k4v4", options | {"key_bits": bits}) for bits in (4, (4,) * 8)]
        )
    )
    for name in ("long_bits_per_number", "long_bits_per_number_16bit"):
        assert wide[name] == narrow[name] + 4 / 16, name  # of 16 sides one has 4 bits more
    for name in ("bits_per_number", "bits_per_number_16bit"):
        assert narrow[name] + 0.2 < wide[name] < narrow[name] + 0.3, name  # spare room included


def test_twins_of_models_that_have_none_are_refused(model) -> None:
    from tests.helpers.models import build

    for name, change in (
        ("qwen3", lambda m: scale_key_channels(m, 10.0)),  # keys are normalised
        ("gpt2", lambda m: scale_key_channels(m, 10.0)),
        ("gpt2", lambda m: add_key_bias(m, 100.0, 3)),
        ("qwen2", lambda m: add_key_bias(m, 100.0, 3)),  # has biases
        ("llama", lambda m: add_key_bias(m, 100.0, 8)),  # has 8 pairs
    ):
        with pytest.raises(InputError):
            change(copy.deepcopy(build(name)))


def test_outlier_twin_is_the_same_function(model, sampled) -> None:
    twin = copy.deepcopy(model)
    scale_key_channels(twin, 10.0)
    weights = [m.model.layers[0].self_attn.k_proj.weight for m in (twin, model)]
    assert not torch.equal(*weights)
    ids = sampled[:, :100]
    torch.testing.assert_close(
        single_pass(twin, ids), single_pass(model, ids), rtol=1e-3, atol=1e-3
    )


def test_key_offset_is_the_same_function_and_centred_by_default(model, sampled) -> None:
    ids = sampled[:, :300]

    def kl(offset: float, make_cache) -> float:
        return against_single_pass(model, ids, lambda: offset_keys(make_cache(), offset)).kl_mean

    assert kl(50.0, DynamicCache) < 1e-5
    default = kl(100.0, lambda: RotorQuantCache(**SHORT))
    uncentred = kl(100.0, lambda: RotorQuantCache(center_keys=False, **SHORT))
    assert default < 0.006
    assert uncentred > 5 * default


@pytest.mark.parametrize("pair", [16, 20, 31])
def test_a_key_bias_is_survived_whether_rope_turns_it_or_not(model, sampled, pair) -> None:
    twin = copy.deepcopy(model)
    add_key_bias(twin, 100.0, pair)
    ids = sampled[:, :500]
    keys = DynamicCache()
    twin(ids[:, :50], past_key_values=keys)
    assert keys.layers[0].keys[..., [pair, pair + 32]].norm(dim=-1).mean() > 50
    default = against_single_pass(twin, ids, lambda: RotorQuantCache(**SHORT))
    uncentred = against_single_pass(twin, ids, lambda: RotorQuantCache(center_keys=False, **SHORT))
    assert default.kl_mean < 1.5 * uncentred.kl_mean < 0.003


def run(capsys, *argv: str) -> dict:
    main(["perplexity", "--model", str(MODEL), "--text", TEXT, "--json", *argv])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_command(capsys) -> None:
    options = ["--chunk", "64", "--max-tokens", "500", "--window", "250"]
    short = ["--residual-length", "32", "--statistics-length", "0"]
    three = run(capsys, "--key-bits", "3", "--value-bits", "3", *short, *options)
    again = run(capsys, "--cache", "k3v3:residual_length=32,statistics_length=0", *options)
    assert again == run(
        capsys, "--cache", "k3v3:residual_length=64,statistics_length=0", *short, *options
    )
    plain = run(capsys, "--cache", "dynamic", *options)
    assert three == again
    assert three["cache"] == "k3v3, statistics 0, window 32"
    assert three["warnings"] == []
    assert (three["chunk"], three["window"], three["windows"]) == (64, 250, 2)
    assert three["tokens"] == plain["tokens"] == 498
    assert three["delta"] == pytest.approx(three["perplexity"] - three["baseline_perplexity"])
    assert three["delta_ci95"][0] < three["delta"] < three["delta_ci95"][1]
    assert three["baseline_perplexity"] == pytest.approx(plain["perplexity"], abs=1e-4)
    assert plain["delta"] == pytest.approx(0, abs=1e-4)
    assert plain["reference"] == "one pass without a cache"
    assert 5e-5 < three["kl_mean"] < three["kl_p99"]
    assert 3 < three["bits_per_number"] < 32 == plain["bits_per_number"]


def test_an_interval_without_an_end_is_null_in_json(capsys) -> None:
    """Of 100 tokens none tells what the 99th percentile may be; JSON has no infinity."""
    short = ["--max-tokens", "150", "--window", "50", "--chunk", "16"]
    cache = "k2v2:residual_length=16,block_length=8,statistics_length=0"
    found = run(capsys, "--cache", cache, *short)
    low, high = found["kl_p99_ci95"]
    assert low > 0
    assert high is None
    assert found["code_readers"]["kl_p99_ci95"][1] is None


def test_command_without_json_prints_names_and_values(capsys) -> None:
    main(["perplexity", "--model", str(MODEL), "--text", TEXT, "--max-tokens", "300"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"perplexity", "delta", "kl_mean", "bits_per_number", "warnings"} <= set(names)
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert shown["delta_ci95"] == "- (one window)"
    assert "None" not in " ".join(lines)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--text", "absent.txt"], "absent.txt does not exist"),
        (
            ["--text", TEXT, "--model", "no/such-model"],
            "no folder or file no/such-model, and no such model in the Hub's cache (HF_HUB_OFFLINE",
        ),
        (["--text", TEXT, "--model", "/no/such"], "no folder or file /no/such: name a folder"),
        (["--text", TEXT, "--model", TEXT_FOLDER], f"{TEXT_FOLDER} has no config.json: name a"),
        (["--text", TEXT, "--tokenizer", TEXT_FOLDER], f"{TEXT_FOLDER} has no tokenizer: put its"),
        (["--text", TEXT, "--attention", "none"], "attention 'none' cannot be used here: choose"),
        (
            ["--text", TEXT, "--cache", "dynamics"],
            "dynamics: unknown cache; choose",
        ),
        (["--text", TEXT, "--key-bits", "9"], "key_bits is 9; choose"),
        (["--text", TEXT, "--cache", "fp8", "--key-bits", "3"], "unknown key 'key_bits'"),
        (["--text", TEXT, "--chunk", "0"], "error: --chunk is 0; choose 1 or more"),
        (["--text", TEXT, "--max-tokens", "-5"], "error: --max-tokens is -5; choose 2 or more"),
        (
            ["--text", TEXT, "--max-tokens", "10"],
            "error: --max-tokens is 10; set it to at least 65",
        ),
        (
            ["--text", TEXT, "--place", "end"],
            "error: --place is 'end'; choose one of start, spread",
        ),
        (["--text", TEXT, "--device", "gpu"], "--device gpu cannot be used here"),
        ([], "no text to measure on"),
    ],
)
def test_wrong_arguments_are_named(capsys, argv, says) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["perplexity", "--model", str(MODEL), *argv])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_sliding_window_model_is_measured(sampled) -> None:
    """Two sorts of layers, which quantise at different tokens."""
    from tests.helpers.models import build

    sliding = copy.deepcopy(build("gemma3"))
    loaded = LoadedModel(sliding, None, ModelOptions())
    ids = torch.arange(3, 203).unsqueeze(0) % sliding.config.vocab_size
    spec = CacheSpec.of("k4v4", {"residual_length": 8, "statistics_length": 0, "block_length": 4})
    one, many = (
        compare(sliding, [ids], SinglePass(sliding, [ids]), lambda: loaded.new_cache(spec), chunk)
        for chunk in (1, 50)
    )
    assert one.compressed_share > 0.1
    assert many.kl_mean == pytest.approx(one.kl_mean, rel=2e-2)


def test_the_baseline_row_states_the_rounding_noise(model, tokenizer) -> None:
    options = PerplexityOptions(text=(TEXT,), max_tokens=300, window=150)
    half = copy.deepcopy(model).bfloat16()
    loaded = LoadedModel(half, tokenizer, ModelOptions(model=str(MODEL)))
    measurement = PerplexityMeasurement(loaded, options)
    noise = measurement.run(CacheSpec.of("dynamic"))
    assert 0 <= noise["kl_mean"] < 1e-3
    assert noise["bits_per_number"] == 16
