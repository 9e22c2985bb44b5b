"""The example script that trains a small model on text."""

import json
import math
import random
import sys
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.errors import InputError
from evals.subjects.models import load_tokenizer, pick_device
from evals.subjects.texts import read_dataset, read_texts
from examples import train_model
from examples.train_model import Settings

SHIPPED = Path(__file__).parents[2] / "examples" / "books-7m"
CPU = torch.device("cpu")
TINY = Settings(
    layers=2,
    hidden=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    ffn=64,
    vocab=300,
    context=64,
    window=32,
    batch_tokens=512,
    steps=20,
    learning_rate=1e-2,
    warmup=3,
    save_dtype="float32",
)


def sentences(count: int, seed: int) -> str:
    """Paragraphs with the regularity that a tiny model can learn in a few steps."""
    chance = random.Random(seed)
    who = ["the miller", "a quiet neighbour", "my aunt", "our old gardener", "the young clerk"]
    does = ["counts", "paints", "repairs", "forgets", "carries home"]
    what = ["seven lanterns", "the garden gate", "a box of tea", "two copper kettles", "the map"]
    lines = (
        f"Today {chance.choice(who)} {chance.choice(does)} {chance.choice(what)} before supper."
        for _ in range(count)
    )
    return "\n".join(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three books in a folder."""
    path = tmp_path / "texts"
    path.mkdir()
    for seed, name in enumerate(["first.txt", "second.txt", "third.txt"]):
        (path / name).write_text(sentences(60, seed), encoding="utf-8")
    return path


def command(settings: Settings, *rest: object) -> list[str]:
    """The command line for these settings."""
    options = [(train_model._flag(name), value) for name, value in asdict(settings).items()]
    return [str(part) for option in [*options, rest] for part in option]


def error_of(main, arguments: list[str]) -> str:
    """What a user reads when a command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert str(stopped.value).startswith("error: ")
    return str(stopped.value)


# --- training ---


def test_a_trained_model_has_learnt_and_loads_with_the_auto_classes(folder, tmp_path):
    output = tmp_path / "model"
    settings = replace(TINY, save_dtype="bfloat16")
    train_model.main(command(settings, "--text", folder, "--output", output, "--device", "cpu"))

    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert (model.config.num_key_value_heads, model.config.head_dim) == (1, 16)
    assert model.config.vocab_size == len(tokenizer) == TINY.vocab
    ours, shipped = (
        json.loads((path / "tokenizer_config.json").read_text()) for path in (output, SHIPPED)
    )
    assert ours == shipped | {"model_max_length": TINY.context}
    text = "Naïve – 日本 🙂\n  two  spaces"
    assert tokenizer.decode(tokenizer(text).input_ids) == text

    prompt = tokenizer("Today the", return_tensors="pt")
    longer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert longer.shape[1] == prompt.input_ids.shape[1] + 8


def test_the_loss_falls(folder, tmp_path):
    losses = train_model.train(read_texts([folder]), tmp_path / "model", TINY, CPU)

    assert len(losses) == TINY.steps
    assert losses[0] == pytest.approx(math.log(TINY.vocab), abs=0.2)
    assert losses[-1] < losses[0] - 1.5


class Killed(BaseException):
    """Stands for a signal that nothing catches."""


def test_a_run_killed_twice_ends_with_the_weights_of_an_unbroken_run(folder, tmp_path, monkeypatch):
    books, broken = read_texts([folder]), tmp_path / "broken"
    expected = train_model.train(books, tmp_path / "whole", TINY, CPU)
    save, steps = train_model.save_checkpoint, []

    def save_or_die(path, state):
        steps.append(state["step"])
        if steps[-1] in (7, 18) and steps.count(steps[-1]) == 1:
            path.with_suffix(".partial").write_bytes(b"half of a checkpoint")
            raise Killed  # the work since the last checkpoint is lost
        if steps[-1] % 5 == 0:
            save(path, state)

    monkeypatch.setattr(train_model, "save_checkpoint", save_or_die)
    for _ in range(2):
        with pytest.raises(Killed):
            train_model.train(books, broken, TINY, CPU, checkpoint_minutes=0)
    resumed = train_model.train(books, broken, TINY, CPU, checkpoint_minutes=0)

    assert steps == [*range(1, 8), *range(6, 19), *range(16, 21)]
    assert resumed == expected[15:]
    whole, again = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken")
    )
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not (broken / "checkpoint").exists()


def test_the_seed_decides_the_first_weights_and_the_text():
    tokens = torch.arange(5000, dtype=torch.int32).numpy()

    def beginning(seed: int) -> list[torch.Tensor]:
        settings = replace(TINY, seed=seed)
        model = train_model.build_model(settings, load_tokenizer(SHIPPED))
        return [model.lm_head.weight, train_model.batch_of(0, tokens, settings)]

    assert all(map(torch.equal, beginning(1), beginning(1)))
    assert not any(map(torch.equal, beginning(1), beginning(2)))


def test_bfloat16_autocast_trains(folder, tmp_path):
    settings = replace(TINY, precision="bfloat16")
    losses = train_model.train(read_texts([folder]), tmp_path / "model", settings, CPU)

    assert losses[-1] < losses[0] - 1.5


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch) -> Path:
    """The output folder of a run that was killed after its second checkpoint."""
    output, save = tmp_path / "stopped", train_model.save_checkpoint

    def save_then_die(path, state):
        save(path, state)
        if state["step"] == 2:
            raise Killed

    monkeypatch.setattr(train_model, "save_checkpoint", save_then_die)
    with pytest.raises(Killed):
        train_model.train(read_texts([folder]), output, TINY, CPU, checkpoint_minutes=0)
    monkeypatch.setattr(train_model, "save_checkpoint", save)
    return output


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 5e-3}, "--learning-rate 0.01, not 0.005"),
        ({"layers": 3}, "--layers 2, not 3"),
        ({"precision": "bfloat16"}, "--precision float32, not bfloat16"),
        ({"steps": 30}, "--steps 20, not 30"),
    ],
)
def test_resuming_with_other_settings_is_refused(stopped, folder, change, named):
    arguments = command(replace(TINY, **change), "--text", folder, "--output", stopped)
    message = error_of(train_model.main, [*arguments, "--device", "cpu"])

    assert named in message
    assert "remove" in message


def test_resuming_on_another_text_is_refused(stopped, folder):
    arguments = command(TINY, "--text", folder, "--output", stopped, "--exclude", "third.txt")

    assert "--text of token digest" in error_of(train_model.main, [*arguments, "--device", "cpu"])


def test_a_finished_model_is_not_overwritten(folder, tmp_path):
    output, settings = tmp_path / "model", replace(TINY, steps=1)
    train_model.train(read_texts([folder]), output, settings, CPU)
    before = (output / "model.safetensors").read_bytes()

    with pytest.raises(InputError, match="already holds a model"):
        train_model.train(read_texts([folder]), output, replace(settings, seed=1), CPU)
    assert (output / "model.safetensors").read_bytes() == before


def test_a_tokenizer_can_be_reused(folder, tmp_path):
    output = tmp_path / "model"
    arguments = command(replace(TINY, steps=1), "--text", folder, "--output", output)
    train_model.main([*arguments, "--device", "cpu", "--tokenizer", str(SHIPPED)])

    assert load_tokenizer(output).get_vocab() == load_tokenizer(SHIPPED).get_vocab()
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 4096


# --- the recipe ---


def test_the_defaults_are_the_shipped_model():
    ours = train_model.build_model(Settings(), load_tokenizer(SHIPPED))
    shipped = AutoModelForCausalLM.from_pretrained(SHIPPED)
    made_by = {"_name_or_path", "dtype", "transformers_version", "architectures"}

    config, expected = (model.config.to_dict() for model in (ours, shipped))
    assert config.keys() == expected.keys()
    assert {key for key in config if config[key] != expected[key]} <= made_by
    assert ours.num_parameters() == 6_951_168
    assert Settings().steps * Settings().batch_tokens == pytest.approx(24.4e6, rel=1e-3)


def test_the_rate_rises_rests_and_falls():
    rates = [train_model.learning_rate(step, Settings(steps=1000)) for step in range(1000)]

    assert rates[0] == pytest.approx(2e-5)
    assert rates[99:500] == [2e-3] * 401
    assert rates[749] == pytest.approx(2e-3 * (1 + 0.02) / 2)
    assert rates[-1] == pytest.approx(4e-5)
    assert rates[499:] == sorted(rates[499:], reverse=True)


def test_the_last_fifth_has_the_long_windows_and_every_batch_its_own_text():
    tokens = torch.arange(5000, dtype=torch.int32).numpy()
    batches = [train_model.batch_of(step, tokens, TINY) for step in range(TINY.steps)]

    assert [b.shape[1] - 1 for b in batches] == [TINY.window] * 16 + [TINY.context] * 4
    assert all(b.shape[0] * (b.shape[1] - 1) == TINY.batch_tokens for b in batches)
    assert all(bool((b.diff() == 1).all()) for b in batches)
    assert len({tuple(b[:, 0].tolist()) for b in batches}) == TINY.steps
    shortest = torch.arange(TINY.context + 1, dtype=torch.int32).numpy()
    assert train_model.batch_of(TINY.steps - 1, shortest, TINY).max() == TINY.context


def test_only_matrices_decay():
    model = train_model.build_model(TINY, load_tokenizer(SHIPPED))
    decayed, free = train_model.build_optimizer(model, TINY).param_groups

    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert {id(p) for p in free["params"]} == {id(p) for p in norms}
    assert len(decayed["params"]) + len(norms) == len(list(model.parameters()))


# --- text ---


def test_archives_and_exclusions(folder, tmp_path):
    archive = tmp_path / "texts.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(folder, "books")
    (folder / "notes.md").write_text("not a book")

    from_folder, from_archive = (read_texts([p], ["sec*"]) for p in (folder, archive))
    assert [book.name for book in from_folder] == ["first.txt", "third.txt"]
    assert [book.name for book in from_archive] == ["books/first.txt", "books/third.txt"]
    assert [book.text for book in from_folder] == [book.text for book in from_archive]
    assert read_texts([folder / "third.txt"])[0].text == sentences(60, 2)


def test_byte_order_marks_and_windows_line_ends_go(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")

    assert read_texts([tmp_path])[0].text == "one\ntwo"


def test_rows_of_a_data_set_are_documents(monkeypatch):
    class Rows(dict):
        column_names = ("text",)

    calls = []

    def load_dataset(*names, split):
        calls.append((*names, split))
        return Rows(text=["one", " ", "two"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    books = read_dataset("some/name", "raw", "train[:1%]", "text")

    assert [book.text for book in books] == ["one", "two"]
    assert calls == [("some/name", "raw", "train[:1%]")]
    with pytest.raises(InputError, match="'body' is not in some/name"):
        read_dataset("some/name", None, "train", "body")


def test_without_the_datasets_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    arguments = command(TINY, "--dataset", "some/name", "--output", tmp_path / "model")

    assert "pip install datasets" in error_of(train_model.main, arguments)


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"heads": 3, "kv_heads": 2}, "--heads 3 must be a multiple of --kv-heads 2"),
        ({"head_dim": 15}, "--head-dim 15 must be even"),
        ({"window": 128}, "--window 128 must not exceed --context 64"),
        ({"batch_tokens": 500}, "--batch-tokens 500 must be a multiple of 32"),
        ({"layers": 0}, "--layers 0 is out of range"),
        ({"learning_rate": math.nan}, "--learning-rate nan is out of range"),
        ({"precision": "float8"}, "--precision float8: choose from auto, float32, bfloat16"),
    ],
)
def test_impossible_settings_are_refused(change, named):
    with pytest.raises(InputError, match=named):
        replace(TINY, **change)


def test_bad_input_is_refused_with_the_remedy(folder, tmp_path):
    empty, output = tmp_path / "empty", tmp_path / "model"
    empty.mkdir()
    (tmp_path / "short.txt").write_text("Not much to read.")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "damaged.tar.xz").write_bytes(archive_of(folder, tmp_path)[:-200])

    def refusal(text: Path, *rest: str, settings: Settings = TINY) -> str:
        arguments = command(settings, "--text", text, "--output", output)
        return error_of(train_model.main, [*arguments, "--device", "cpu", *rest])

    assert "nowhere does not exist: name a folder" in refusal(tmp_path / "nowhere")
    assert "no .txt files in" in refusal(empty)
    assert "outside --exclude *.txt" in refusal(folder, "--exclude", "*.txt")
    assert "--exclude 'fourth*' matches none of 3" in refusal(folder, "--exclude", "fourth*")
    assert "too few for a window of --context 64" in refusal(tmp_path / "short.txt")
    assert "latin.txt is not UTF-8" in refusal(tmp_path / "latin.txt")
    assert "damaged.tar.xz is damaged" in refusal(tmp_path / "damaged.tar.xz")
    assert "--vocab 256 is too small" in refusal(folder, settings=replace(TINY, vocab=256))
    assert f"{empty} has no tokenizer" in refusal(folder, "--tokenizer", str(empty))
    assert "--device gpu cannot be used here: choose" in refusal(folder, "--device", "gpu")
    assert not output.exists()


def archive_of(folder: Path, tmp_path: Path) -> bytes:
    """The bytes of a compressed archive of the folder."""
    with tarfile.open(tmp_path / "whole.tar.xz", "w:xz") as tar:
        tar.add(folder, "books")
    return (tmp_path / "whole.tar.xz").read_bytes()


def test_a_device_is_found():
    assert pick_device("cpu") == CPU
    if not torch.accelerator.is_available():
        assert pick_device(None) == CPU
