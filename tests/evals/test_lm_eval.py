"""lm-eval through compressed caches: scores, options, tasks and command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import DynamicCache

from evals.caches.registry import CacheSpec
from evals.errors import InputError, NotAvailableError
from evals.lm_eval.__main__ import main
from evals.lm_eval.model import RotorQuantLM
from evals.lm_eval.tasks import DATA_VARIABLE, TASKS
from evals.measurements.lm_eval import LmEvalOptions, measure
from evals.subjects.models import LoadedModel, ModelOptions
from tests.conftest import MODEL, ROOT

OWN = ["rotorquant_facts", "rotorquant_rhymes", "rotorquant_recall"]
KINDS = ["multiple choice", "rolling", "generate"]
EARLY = {
    "cache": "rotorquant",
    "key_bits": 2,
    "value_bits": 2,
    "residual_length": 16,
    "statistics_length": 0,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory) -> None:
    """No look-up on the Hub, and data sets prepared in a temporary folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prepared = tmp_path_factory.getbasetemp() / "prepared"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", prepared)


@cache
def _manager() -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False)


def _run(lm: HFLM, tasks: list[str] = OWN, limit: int = 2, **options) -> dict:
    found = simple_evaluate(
        lm, tasks=tasks, limit=limit, bootstrap_iters=10, task_manager=_manager(), **options
    )
    return {"results": found["results"], "samples": found["samples"], "config": found["config"]}


def _responses(found: dict, task: str) -> list:
    """What the model answered, document by document: log-likelihoods or texts."""
    return [sample["resps"] for sample in found["samples"][task]]


def _numbers(found: dict, task: str) -> torch.Tensor:
    """The log-likelihoods among `_responses`, in a row."""

    def flat(x) -> list:
        return [y for item in x for y in flat(item)] if isinstance(x, list | tuple) else [x]

    values = [x for x in flat(_responses(found, task)) if not isinstance(x, bool)]
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def lm(model, tokenizer):
    """Makes lm-eval's `rotorquant` of the shipped model; `hf` for the name "hf"."""

    def make(cache: str | CacheSpec = "rotorquant", **options):
        if cache == "hf":
            return HFLM(model, tokenizer=tokenizer, **options)
        return RotorQuantLM(model, tokenizer=tokenizer, cache=cache, **options)

    return make


@pytest.fixture(scope="module")
def stock(model, tokenizer) -> dict:
    """What lm-eval's own `hf` gives, batches of two."""
    return _run(HFLM(model, tokenizer=tokenizer, batch_size=2))


@pytest.fixture(scope="module")
def early(model, tokenizer) -> dict:
    """What a cache of 2 bits and a short window gives, row by row."""
    return _run(RotorQuantLM(model, tokenizer=tokenizer, **EARLY))


@pytest.mark.parametrize("task", OWN, ids=KINDS)
def test_uncompressed_equals_hf_bit_for_bit(lm, stock, task):
    found = _run(lm("dynamic", batch_size=2), [task])
    assert _responses(found, task) == _responses(stock, task)
    assert found["results"][task] == stock["results"][task]


@pytest.mark.parametrize("task", OWN, ids=KINDS)
def test_uncompressed_in_passes_equals_hf(lm, stock, task):
    """Row by row, where `stock` has padded batches."""
    found = _run(lm("dynamic", chunk=16), [task])
    if task == "rotorquant_recall":
        assert _responses(found, task) == _responses(stock, task)
    else:
        torch.testing.assert_close(
            _numbers(found, task), _numbers(stock, task), atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("task", OWN, ids=KINDS)
def test_every_request_reads_the_codes(lm, early, stock, task):
    other = early
    if task == "rotorquant_recall":  # two bits keep these few words
        coarse = {"key_bits": 1, "value_bits": 1, "query_aware": False}
        other = _run(lm(**EARLY | coarse), [task], limit=2)
    assert _responses(other, task) != _responses(stock, task)
    assert early["config"]["cache_compressed_share"][task] > 0.3
    assert early["config"]["cache_warnings"] == []
    if task != "rotorquant_recall":
        exact = _numbers(stock, task)
        change = ((_numbers(early, task) - exact) / exact).abs()
        assert 1e-5 < change.max() < 0.03  # another text would change it by a tenth and more


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunk_is_a_matter_of_speed(lm, early, chunk):
    task = "rotorquant_rhymes"
    found = _numbers(_run(lm(**EARLY, chunk=chunk), [task], limit=1), task)
    # Rounding moves a number over the edge of a code here and there.
    torch.testing.assert_close(found, _numbers(early, task)[:1], atol=0.05, rtol=0)


def test_padding_is_never_read(lm, sampled):
    """Two batches that differ in the padding of a row only: its logits are the same bits."""
    model = lm(**EARLY)
    batch = torch.cat([sampled[:, :150], sampled[:, 150:300]])
    other = batch.clone()
    batch[1, 90:], other[1, 90:] = 0, 1234
    a, b = model._model_call(batch), model._model_call(other)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1, :90], b[1, :90])
    assert not torch.equal(a[1, 90:], b[1, 90:])


@pytest.mark.parametrize("task", OWN[:2], ids=KINDS[:2])
def test_batches_give_the_scores_of_single_rows(lm, early, task):
    many = _numbers(_run(lm(**EARLY, batch_size=3), [task]), task)
    torch.testing.assert_close(many, _numbers(early, task), atol=0.05, rtol=0)


def test_share_counts_scored_tokens_only(lm):
    """150 tokens, the last of which is scored, behind a window of 16: by hand."""
    model = lm(**EARLY, num_sink_tokens=4, block_length=16, chunk=50)
    ids = torch.arange(150).unsqueeze(0) + 100
    logits = model._model_call(ids)
    assert [(p.start, p.end) for p in model._passes] == [
        *((0, 36), (36, 52), (52, 68), (68, 84), (84, 100), (100, 116), (116, 132), (132, 148)),
        (148, 150),
    ]
    model._select_cont_toks(logits[0], contlen=1, inplen=150)
    assert model._reads.share == pytest.approx(128 / 150)


def test_nothing_compressed_is_said(lm, caplog):
    """Before the requests run, once for each kind of them; the results say it once more."""
    model = lm("haar", residual_length=1500, statistics_length=0)
    warned = []
    call, generate = model._model_call, model._model_generate
    model._model_call = lambda *args, **kwargs: (warned.append(caplog.text), call(*args))[1]
    model._model_generate = lambda *args, **kwargs: (
        warned.append(caplog.text),
        generate(*args, **kwargs),
    )[1]
    found = _run(model, limit=1)
    said = [r.getMessage() for r in caplog.records if r.name == "lm_eval.models.rotorquant"]
    kinds = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    for kind, task, text in zip(kinds, OWN, said, strict=True):
        assert text.startswith(f"these {kind} requests are too short to read anything compressed")
        assert f"(the longest of {task}: " in text
        assert "keeps the first 1536 tokens (num_sink_tokens 4 + residual_length 1500" in text
        assert "num_fewshot, or keep fewer tokens in full precision (such as residual_len" in text
    assert said[0] in warned[0]
    assert all(text in warned[-1] for text in said)
    (a, b, c) = found["config"]["cache_warnings"]
    assert a.startswith("nothing was read compressed: loglikelihood requests (rotorquant_facts)")
    assert "loglikelihood_rolling requests (rotorquant_rhymes)" in b
    assert "generate_until requests (rotorquant_recall)" in c
    assert all("num_fewshot" in x and "residual_length" in x for x in (a, b, c))
    assert found["config"]["cache_compressed_share"] == dict.fromkeys(OWN, 0.0)
    caplog.clear()
    found = _run(lm("dynamic"), OWN[:1], limit=1)
    assert found["config"]["cache_warnings"] == []  # it is not meant to compress
    assert "compressed" not in caplog.text


def test_the_length_that_is_foreseen_is_that_which_is_read(lm, caplog):
    """A request of one token more than the cache keeps in full precision reads codes."""
    from lm_eval.api.instance import Instance

    model = lm(**EARLY, num_sink_tokens=4, block_length=16)
    word = " the"
    assert len(model.tok_encode(word * 40)) == 40
    for tokens in (37, 38):  # 4 + 16 + 16 are kept; the last token of a request is not fed
        caplog.clear()
        request = Instance("loglikelihood", {}, (word * (tokens - 1), word), 0, task_name="t")
        model.loglikelihood([request], disable_tqdm=True)
        assert ("too short" in caplog.text) == (model._reads.packed == 0) == (tokens == 37)
        # A window of 8 instead of 16 leaves 28 in full precision.
        assert ("residual_length=8)" in caplog.text) == (tokens == 37)
    caplog.clear()
    model.loglikelihood([Instance("loglikelihood", {}, (word, word), 0, task_name="t")])
    assert "with num_fewshot." in caplog.text  # sinks and a block alone are longer


def test_the_remedy_for_short_requests_is_one(lm, caplog):
    """Statistics keep 4 + 256 tokens; with the settings that are named, the request reads codes."""
    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood", {}, (" the" * 100, " the"), 0, task_name="t")
    lm("k3v3", residual_length=16).loglikelihood([request], disable_tqdm=True)
    assert "260 tokens (num_sink_tokens 4 + statistics_length 256) in full" in caplog.text
    assert "(such as residual_length=16,statistics_length=48)" in caplog.text
    caplog.clear()
    model = lm("k3v3", residual_length=16, statistics_length=48)
    model.loglikelihood([request], disable_tqdm=True)
    assert "too short" not in caplog.text
    caplog.clear()
    lm("k3v3").loglikelihood([request], disable_tqdm=True)
    assert "(such as residual_length=32,statistics_length=64)" in caplog.text


def test_results_say_which_cache(lm):
    config = _run(lm("k3v2", residual_length=32, statistics_length=0), OWN[2:], limit=1)["config"]
    assert config["cache"]["kind"] == "rotorquant"
    assert config["cache"]["options"]["value_bits"] == 2
    assert config["cache"]["options"]["residual_length"] == 32
    assert config["cache"]["options"]["num_sink_tokens"] == 4  # the defaults too
    assert config["cache_chunk"] == 64
    assert 0 < config["cache_compressed_share"]["rotorquant_recall"] < 1
    json.dumps({name: x for name, x in config.items() if name.startswith("cache")})


def test_batch_size_auto(lm, stock):
    model = lm("dynamic", batch_size="auto", max_batch_size=2)
    found = _run(model, OWN[:1])
    torch.testing.assert_close(
        _numbers(found, OWN[0]), _numbers(stock, OWN[0]), atol=1e-4, rtol=1e-5
    )
    assert list(model.batch_sizes.values()) == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_bit": 3}, "'key_bit'; did you mean key_bits"),
        ({"bits": 3}, "key_bits"),
        ({"nonsense": 3}, "'nonsense'"),
        ({"key_bits": 99}, "key_bits is 99"),
        ({"chunk": 0}, "chunk is 0"),
        ({"cache": "k9v9"}, "k9v9: unknown cache"),
        ({"cache": "quanto", "key_bits": 3}, "'key_bits'"),
        ({"preset": "k9v9"}, "preset is 'k9v9'"),
        ({"backend": "seq2seq"}, "--model hf"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "by name"])
def test_bad_arguments_are_named(model, tokenizer, options, message, loaded):
    own = {"tokenizer": tokenizer} if loaded else {"device": "cpu"}
    with pytest.raises(InputError, match=message):
        RotorQuantLM(model if loaded else str(MODEL), **own, **options)


def test_arguments_of_the_command_line():
    text = f"pretrained={MODEL},key_bits=3,value_bits=2,residual_length=32,statistics_length=0"
    text += ",equalize_keys=0.25"
    model = RotorQuantLM.create_from_arg_string(
        f"{text},chunk=8,dtype=float32,attn_implementation=eager", {"device": "cpu"}
    )
    assert model.spec == CacheSpec.of(
        "rotorquant",
        {
            "key_bits": 3,
            "value_bits": 2,
            "residual_length": 32,
            "statistics_length": 0,
            "equalize_keys": 0.25,
        },
    )
    assert model.chunk == 8
    assert model.model.config._attn_implementation == "eager"


def test_measure(model, tokenizer, monkeypatch):
    loaded = LoadedModel(model, tokenizer, ModelOptions(model=str(MODEL)))
    options = LmEvalOptions(tasks=("rotorquant_facts", "rotorquant_rhymes"), limit=2)
    found = measure(
        loaded, CacheSpec.of("k2v2", {"residual_length": 16, "statistics_length": 0}), options, 1
    )
    assert json.loads(json.dumps(found)) == found
    facts = found["scores"]["rotorquant_facts"]
    assert set(facts) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert found["scores"]["rotorquant_rhymes"]["bits_per_byte"] > 0
    assert found["tasks_versions"] == {"rotorquant_facts": 1.0, "rotorquant_rhymes": 1.0}
    assert 0.5 < found["compressed_share"] < 1
    assert found["compressed_shares"]["rotorquant_facts"] > 0.8
    assert found["warnings"] == []
    monkeypatch.setattr(
        "evals.measurements.lm_eval._manager", lambda *args: _manager()
    )  # in a moment
    with pytest.raises(InputError, match="unknown task 'rotorquant_fact'"):
        measure(loaded, CacheSpec.of("k2v2"), LmEvalOptions(tasks=("rotorquant_fact",)), 1)


def test_measure_uses_the_caches_of_the_subject(model, tokenizer, caplog):
    """Twins wrap their caches; one that compresses nothing is found out."""

    class Uncompressed(LoadedModel):
        def new_cache(self, spec):
            return DynamicCache(config=self.model.config)

    loaded = Uncompressed(model, tokenizer, ModelOptions())
    options = LmEvalOptions(tasks=("rotorquant_facts",), limit=1)
    found = measure(
        loaded, CacheSpec.of("k2v2", {"residual_length": 16, "statistics_length": 0}), options, 1
    )
    assert found["compressed_share"] == 0
    assert "nothing was read compressed" in found["warnings"][0]
    assert found["warnings"][0] in caplog.text  # what was not foreseen is said when it is seen


def test_measure_without_lm_eval(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    loaded = LoadedModel(model, tokenizer, ModelOptions())
    with pytest.raises(NotAvailableError, match="pip install"):
        measure(loaded, CacheSpec.of("k2v2"), LmEvalOptions(), 1)


_CHOICES = [
    {"question": f"What follows {a}?", "choices": [b, "a horse", "the sea", "no"], "label": 0}
    for a, b in (("one", "two"), ("two", "three"), ("three", "four"))
]
_GAPS = [
    {"question": "The cup fell on the stone and the _ broke.", "choices": ["cup", "stone"]},
    {"question": "Ann gave Jane a book, and _ read it.", "choices": ["Ann", "Jane"]},
    {"question": "He liked the soup, not the meat: the _ was good.", "choices": ["meat", "soup"]},
]
LOCAL = {
    "arc_easy_local": ("ARC-Easy_test.jsonl", _CHOICES),
    "arc_challenge_local": ("ARC-Challenge_test.jsonl", _CHOICES),
    "piqa_local": ("piqa_test.jsonl", [x | {"choices": x["choices"][:2]} for x in _CHOICES]),
    "winogrande_local": (
        "winogrande_test.jsonl",
        [x | {"label": i % 2} for i, x in enumerate(_GAPS)],
    ),
    "openbookqa_local": ("openbookqa_test.jsonl", _CHOICES),
    "lambada_local": ("lambada_test.jsonl", [{"text": f"He came {x} and home"} for x in range(3)]),
    "gsm8k_local": (
        "gsm8k_test.jsonl",
        [{"question": f"1 + {x}?", "answer": f"It is {x + 1}.\n#### {x + 1}"} for x in range(3)],
    ),
}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder with a few documents of every local task."""
    for file, documents in LOCAL.values():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (tmp_path / file).write_text(lines, encoding="utf-8")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("data")
def test_local_tasks_run(lm):
    model = lm(**EARLY)
    found = _run(model, list(LOCAL), num_fewshot=1, gen_kwargs={"max_gen_toks": 4})
    assert set(found["results"]) == set(LOCAL)
    prompt = {task: found["samples"][task][1]["arguments"][0][0] for task in LOCAL}
    text = "Question: What follows one?\nAnswer: two\n\nQuestion: What follows two?\nAnswer:"
    assert prompt["arc_easy_local"] == prompt["piqa_local"] == text
    assert prompt["arc_challenge_local"] == text
    assert prompt["openbookqa_local"] == "What follows one? two\n\nWhat follows two?"
    assert prompt["lambada_local"] == "He came 0 and home\n\nHe came 1 and"
    assert prompt["gsm8k_local"] == (
        "Question: 1 + 0?\nAnswer: It is 1.\n#### 1\n\nQuestion: 1 + 1?\nAnswer:"
    )
    shot = "The cup fell on the stone and the cup broke.\n\n"
    gap = found["samples"]["winogrande_local"][1]
    assert [arguments[0] for arguments in gap["arguments"]] == [
        shot + "Ann gave Jane a book, and Ann",
        shot + "Ann gave Jane a book, and Jane",
    ]
    assert {arguments[1] for arguments in gap["arguments"]} == {" read it."}
    first = found["samples"]["arc_easy_local"][0]["arguments"][0][0]
    assert "What follows one?\nAnswer: two" not in first  # never its own example


def test_missing_local_files_are_named(data, monkeypatch):
    """By an error of the file's own: lm-eval loads it outside the package."""

    def refused(task: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as raised:
            _manager().load([task])
        assert type(raised.value).__name__ == "DataError"

    (data / "piqa_test.jsonl").unlink()
    refused("piqa_local", r"piqa_test\.jsonl, which is not in")
    (data / "piqa_test.jsonl").write_text('{"goal": "x"}\n')
    refused("piqa_local", "missing 'question'")
    monkeypatch.delenv(DATA_VARIABLE)
    refused("gsm8k_local", "--data")


def test_missing_folder_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--model", "rotorquant", "--tasks", "piqa_local", "--data", "nowhere"])
    assert "--data nowhere is not a folder" in capsys.readouterr().err


def _texts(responses):
    """As lm-eval writes them: every value as its text."""
    return [_texts(x) for x in responses] if isinstance(responses, list | tuple) else str(responses)


def _saved(folder: Path) -> tuple[dict, dict[str, list]]:
    """What a run wrote: its results, and the responses of every task in the documents' order."""
    (results,) = folder.glob("**/results_*.json")
    responses = {}
    for task in OWN:
        (path,) = folder.glob(f"**/samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        responses[task] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return json.loads(results.read_text(encoding="utf-8")), responses


def test_command_line_in_two_processes(early, tmp_path):
    """`accelerate launch` over two processes gives what one process gives."""
    include = tmp_path / "more"
    shutil.copytree(TASKS / "own", include)
    # accelerate's --cpu starts one process, whatever --num_processes says (it needs mpirun).
    launch = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    settings = "dtype=float32,key_bits=2,value_bits=2,residual_length=16,statistics_length=0"
    done = subprocess.run(
        [
            *(sys.executable, "-m", *launch, "-m", "evals.lm_eval", "run", "--tasks", *OWN),
            *("--model", "rotorquant", "--model_args", f"pretrained={MODEL},{settings}"),
            *("--include_path", include, "--limit", "2", "--log_samples"),
            *("--output_path", tmp_path),
        ],
        cwd=ROOT,
        env=os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"{task} on rank {rank}" in done.stderr for task in OWN for rank in (0, 1))
    assert f"Including path: {include}" in done.stderr
    results, responses = _saved(tmp_path)
    config = results["config"]
    assert config["cache"]["options"] == early["config"]["cache"]["options"]
    assert config["cache_compressed_share"] == early["config"]["cache_compressed_share"]
    for task in OWN:
        assert responses[task] == _texts(_responses(early, task))
        for name, value in results["results"][task].items():
            if isinstance(value, float):
                assert value == pytest.approx(early["results"][task][name], rel=1e-12)


@pytest.mark.parametrize("arguments", [["run", "--help"], ["ls", "tasks", "-h"]], ids=" ".join)
def test_help_says_both(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["lm_eval"])
    with pytest.raises(SystemExit):
        main(arguments)
    shown = capsys.readouterr().out
    assert "--data" in shown
    assert "usage: lm-eval" in shown
    assert "--include_path" in shown


def test_a_file_of_answers_is_one_cache_s(lm, tmp_path):
    """lm-eval knows requests by their text: another cache would be given this one's scores."""
    file = str(tmp_path / "answers")
    first = _run(lm(**EARLY), [OWN[0]], use_cache=file)
    again = _run(lm(**EARLY), [OWN[0]], use_cache=file)
    assert _responses(again, OWN[0]) == _responses(first, OWN[0])
    for other in ({"key_bits": 3}, {"chunk": 32}, {"cache": "dynamic"}):
        options = other if "cache" in other else EARLY | other
        with pytest.raises(InputError, match=r"--use_cache: .* another model or cache .*key_bits"):
            _run(lm(**options), [OWN[0]], use_cache=file)


def test_answers_of_another_model_type_are_not_taken(lm, tmp_path):
    file = str(tmp_path / "answers")
    _run(lm("hf"), [OWN[0]], use_cache=file)
    with pytest.raises(InputError, match=r"none of rotorquant"):
        _run(lm(**EARLY), [OWN[0]], use_cache=file)


def test_batches_found_by_trying_are_tried_once(lm, early, monkeypatch):
    """In all tasks together, and of fewer requests than trials are asked for."""
    tried = []
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda self, *args: tried.append(args) or 2)
    for size in ("auto", "auto:9"):
        tried.clear()
        found = _run(lm(**EARLY, batch_size=size), OWN[:1], limit=1)
        assert _numbers(found, OWN[0]).shape == _numbers(early, OWN[0])[:4].shape
        assert len(tried) <= 4
    tried.clear()
    requests = [
        Instance("loglikelihood", {}, ("A clock", " struck"), 0, metadata=(task, 0, 1))
        for task in ("first", "second", "third")
    ]
    assert len(lm(**EARLY, batch_size="auto").loglikelihood(requests)) == 3
    assert len(tried) == 1
