"""The command `calibrate`, and caches with what it has written."""

import json

import pytest

from evals.__main__ import main
from evals.caches.registry import CacheSpec
from evals.errors import InputError
from rotorquant_hf import Calibration
from tests.conftest import MODEL as FOLDER

MODEL = str(FOLDER)
SAMPLES = "examples/sampled"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "books.safetensors"
    options = ["--window", "256", "--max-tokens", "512", "--out", str(path)]
    main(["calibrate", "--model", MODEL, "--text", SAMPLES, *options])
    return path


def test_it_writes_a_calibration(file):
    made = Calibration.load(file)
    assert made.tokens == 512
    assert sorted(made.layers) == list(range(8))


def test_a_cache_quantises_with_it_from_the_start(file, capsys):
    options = ["--text", SAMPLES, "--window", "128", "--max-tokens", "256", "--json"]
    shares = {}
    for cache in (f"calibrated:preset=k3v3,residual_length=32,file={file}", "k3v3"):
        main(["perplexity", "--model", MODEL, "--cache", cache, *options])
        shares[cache[:4]] = json.loads(capsys.readouterr().out)["compressed_share"]
    assert shares["cali"] > 0.1
    assert shares["k3v3"] == 0


def test_the_cache_is_named_and_written_as_code(file):
    spec = CacheSpec.of("calibrated", {"preset": "k3v3", "file": str(file)})
    assert spec.label.startswith("calibrated k3v3")
    line, call = spec.code
    assert line == "from rotorquant_hf import RotorQuantCache"
    assert call == f'RotorQuantCache("k3v3", config=model.config, calibration="{file}")'


@pytest.mark.parametrize("options", [{}, {"file": 3}, {"file": ""}])
def test_a_file_must_be_named(options):
    with pytest.raises(InputError, match="name a file that calibrate has written"):
        CacheSpec.of("calibrated", options)


def test_bad_input_is_refused(file, tmp_path, capsys):
    for arguments, says in (
        (
            ["--cache", f"calibrated:file={tmp_path / 'none'}"],
            f"error: no calibration {tmp_path / 'none'}: make it with python -m evals calibrate "
            f"--model MODEL --text FILE --out {tmp_path / 'none'}\n",
        ),
        (["--cache", f"calibrated:file={file},equalize_keys=0.0"], "equalize_keys is 0.0, but"),
        (["--model", "examples/recall-1m", "--cache", f"calibrated:file={file}"], "another model"),
    ):
        options = ["--text", SAMPLES, "--max-tokens", "200", "--window", "100"]
        with pytest.raises(SystemExit) as stopped:
            main(["perplexity", "--model", MODEL, *options, *arguments])
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evals.__main__.load", lambda options: pytest.fail("loaded"))
    for out, says in (
        (tmp_path / "absent" / "x", f"there is no folder {tmp_path / 'absent'}; make it"),
        (tmp_path, "is a folder: name a file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["calibrate", "--model", MODEL, "--text", SAMPLES, "--out", str(out)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --out {out}")
        assert says in error
        assert error.count("\n") == 1


def test_attention_that_hides_its_queries_is_refused(tmp_path, capsys):
    options = ["--attention", "eager", "--out", str(tmp_path / "file")]
    with pytest.raises(SystemExit):
        main(["calibrate", "--model", MODEL, "--text", SAMPLES, *options])
    assert "does not show its queries" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
