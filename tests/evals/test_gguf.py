"""Models in GGUF files: what the folder with the same weights gives, and what cannot be read."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models

from evals.__main__ import main
from evals.errors import InputError
from evals.lm_eval.model import RotorQuantLM
from evals.requirements import packages_of
from evals.subjects import gguf
from evals.subjects.models import LoadedModel, ModelOptions, load, load_tokenizer
from evals.sweep.plan import plan_of
from tests.conftest import MODEL, ROOT
from tests.helpers.gguf_file import write

TEXT = str(ROOT / "examples" / "sampled" / "clock.txt")


@pytest.fixture(scope="module")
def path(model, tokenizer, tmp_path_factory) -> Path:
    """The shipped model as a GGUF file."""
    return write(tmp_path_factory.mktemp("gguf") / "books-7m.gguf", model, tokenizer)


@pytest.fixture(scope="module")
def read(path) -> LoadedModel:
    """That file, as the harness loads it."""
    return load(ModelOptions(model=str(path), device="cpu"))


def is_plain(model) -> bool:
    """Whether no trace of a quantiser is left on a model."""
    return (
        getattr(model, "hf_quantizer", None) is None
        and not getattr(model, "is_quantized", False)
        and getattr(model.config, "quantization_config", None) is None
    )


def test_the_file_gives_the_logits_and_the_tokens_of_the_folder(
    read, model, tokenizer, sampled
) -> None:
    text = Path(TEXT).read_text(encoding="utf-8")
    assert read.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert read.tokenizer.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        found, expected = (x(sampled[:, :200]).logits for x in (read.model, model))
    assert torch.equal(found, expected)
    assert read.context == model.config.max_position_embeddings
    assert read.to_dict()["label"] == "books-7m"
    assert read.dtype == torch.float32


@pytest.mark.parametrize("older", [False, True], ids=["dequantised", "an older Transformers"])
def test_the_model_is_a_plain_one_in_the_dtype_asked_for(path, monkeypatch, older) -> None:
    if older:  # no GgufConfig, and a quantiser that stays on the model
        monkeypatch.setattr(gguf, "dequantised", dict)
    options = ModelOptions(model=str(path), dtype="bfloat16", device="cpu", attention="eager")
    model = load(options).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert is_plain(model)
    assert model.config._attn_implementation == "eager"
    assert {x.dtype for x in copy.deepcopy(model).half().parameters()} == {torch.float16}


def test_a_version_without_the_option_is_asked_for_nothing(monkeypatch) -> None:
    assert gguf.dequantised()["quantization_config"].dequantize
    monkeypatch.setattr(gguf, "transformers", SimpleNamespace())
    assert gguf.dequantised() == {}


def test_the_model_can_be_spread_and_be_a_twin(path, read, sampled) -> None:
    spread = load(ModelOptions(model=str(path), device="auto", dtype="float32", outliers=10))
    with torch.no_grad():
        found, expected = (x.model(sampled[:, :50].to(x.device)).logits for x in (spread, read))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_what_lies_beside_the_file_is_not_read(path, tokenizer, tmp_path) -> None:
    beside = tmp_path / path.name
    beside.symlink_to(path)
    other = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    other.save(str(tmp_path / "tokenizer.json"))
    assert gguf.read_tokenizer(str(beside)).get_vocab() == tokenizer.get_vocab()


def test_the_tokenizer_can_be_another(path, tokenizer) -> None:
    """Of a folder for the file, and of the file for a folder."""
    for model, name in ((path, MODEL), (MODEL, path)):
        options = ModelOptions(model=str(model), tokenizer=str(name))
        assert set(gguf.PACKAGES) <= set(packages_of(options))
        assert load_tokenizer(str(name), options).get_vocab() == tokenizer.get_vocab()
    assert packages_of(ModelOptions()) == []


def test_a_folder_may_have_such_a_name(tmp_path) -> None:
    (tmp_path / "books.gguf").symlink_to(MODEL)
    options = ModelOptions(model=str(tmp_path / "books.gguf"), revision="main")
    assert packages_of(options) == []
    assert options.label == "books.gguf"


COMMANDS = {
    "perplexity": ["--text", TEXT, "--max-tokens", "200", "--window", "200", "--json"],
    "agreement": [
        *("--text", TEXT, "--max-tokens", "128", "--window", "128", "--new-tokens", "4", "--json"),
    ],
    "memory": ["--context", "200", "--new-tokens", "2", "--json"],
    "needle": ["--text", TEXT, "--length", "256", "--depth", "0.3", "--trials", "2", "--json"],
    "verify": ["--text", TEXT, "--max-tokens", "512", "--window", "256", "--presets", "k8v8"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_give_what_they_give_for_the_folder(path, capsys, command) -> None:
    found = []
    for model in (str(path), str(MODEL)):
        with suppress(SystemExit):  # verify's verdict on so little text
            main([command, "--model", model, *COMMANDS[command]])
        found.append(capsys.readouterr().out.replace(model, "MODEL"))
    assert found[0] == found[1]
    assert "k8v8" in found[0] if command == "verify" else json.loads(found[0])["model"] == "MODEL"


SWEEP = {"models": ["books-7m.gguf"], "caches": ["dynamic", "k3v3"]}
MEMORY = {"measure": "memory", "context": [200], "new_tokens": 2}


def test_a_sweep_resumes_until_the_file_changes(path, tmp_path, monkeypatch, capsys) -> None:
    """The file is named by a relative path, as a folder may be."""
    monkeypatch.chdir(tmp_path)
    content = bytearray(path.read_bytes())
    Path("books-7m.gguf").write_bytes(content)
    Path("small.yaml").write_text(yaml.safe_dump(SWEEP | {"measurements": [MEMORY]}))
    command = ["sweep", "small.yaml", "--out", "out"]
    main(command)
    rows = Path("out", "rows.jsonl").read_text()
    entries = [json.loads(line) for line in rows.splitlines()]
    assert "gguf" in entries[0]["versions"]["packages"]
    assert [row["status"] for row in entries[1:]] == ["ok", "ok"]
    assert {row["model"]["label"] for row in entries[1:]} == {"books-7m"}
    main(command)
    assert Path("out", "rows.jsonl").read_text() == rows
    assert capsys.readouterr().out.count("2 ok of 2 rows") == 2
    content[len(content) // 3] ^= 1
    Path("books-7m.gguf").write_bytes(content)
    with pytest.raises(SystemExit):
        main(command)
    assert "with other settings, text or model" in capsys.readouterr().err


def test_a_plan_needs_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^no file books-7m\.gguf: name a GGUF file"):
        plan_of(SWEEP | {"measurements": [MEMORY]}, "sweep.yaml", "sweep", {})


@pytest.fixture(scope="module")
def bad(path, model, tokenizer, tmp_path_factory) -> Path:
    """A folder of files that cannot be read."""
    folder = tmp_path_factory.mktemp("bad")
    whole = path.read_bytes()
    (folder / "text.gguf").write_text("a text")
    (folder / "empty.gguf").write_bytes(b"")
    (folder / "head.gguf").write_bytes(whole[:50_000])
    (folder / "half.gguf").write_bytes(whole[: len(whole) // 2])
    write(folder / "mystery.gguf", model, tokenizer, architecture="mystery")
    write(folder / "part.gguf", model, tokenizer, without="blk.3.attn_k.weight")
    return folder


BAD = {
    "absent": r"no file .*absent\.gguf: name a GGUF file, a folder",
    "text": r"text\.gguf is not a GGUF file: it does not begin",
    "empty": r"empty\.gguf is not a GGUF file",
    "head": r"could not read .*head\.gguf: name a whole GGUF file",
    "half": r"could not read .*half\.gguf: name a whole GGUF file",
    "mystery": r"could not read .*mystery\.gguf: .*architecture mystery is not supported",
    "part": r"part\.gguf lacks 1 of the model's weights, such as .*layers\.3\.self_attn\.k_proj",
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_read_are_named(bad, name) -> None:
    with pytest.raises(InputError, match=BAD[name]):
        load(ModelOptions(model=str(bad / f"{name}.gguf"), device="cpu"))


def test_a_file_has_no_revision(path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["memory", "--model", str(path), "--revision", "main"])
    assert stopped.value.code == 2
    says = f"error: revision is 'main', but {path} is a file: leave the revision out\n"
    assert capsys.readouterr().err == says
    with pytest.raises(InputError, match="leave the revision out"):
        RotorQuantLM(str(path), revision="main", device="cpu")


@pytest.mark.parametrize("older", [False, True], ids=["dequantised", "an older Transformers"])
def test_lm_eval_scores_the_file_as_the_folder(
    path, model, tokenizer, bad, monkeypatch, older
) -> None:
    """Loaded by lm-eval itself, from what `--model_args` says."""
    asked, options = [], {} if older else gguf.dequantised()
    monkeypatch.setattr(gguf, "dequantised", lambda: asked.append(options) or options)
    arguments = f"pretrained={path},cache=k2v2,residual_length=16,statistics_length=0,dtype=float32"
    lm = RotorQuantLM.create_from_arg_string(arguments, {"device": "cpu"})
    assert asked == [options]
    assert is_plain(lm.model)
    own = RotorQuantLM(
        model, tokenizer=tokenizer, cache="k2v2", residual_length=16, statistics_length=0
    )
    ids = torch.tensor([own.tok_encode(Path(TEXT).read_text(encoding="utf-8"))[:200]])
    assert lm.tok_encode(lm.tok_decode(ids[0])) == ids[0].tolist()
    assert torch.equal(lm._model_call(ids), own._model_call(ids))
    with pytest.raises(InputError, match=BAD["mystery"]):
        RotorQuantLM(str(bad / "mystery.gguf"), device="cpu")
