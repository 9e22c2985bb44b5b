"""The command `allocate`, and what it prints."""

import json
import shlex

import pytest

from evals.__main__ import main
from evals.caches.registry import CacheSpec
from tests.conftest import MODEL as FOLDER

MODEL = str(FOLDER)
TEXT = ["--text", "examples/sampled", "--window", "200", "--max-tokens", "400"]
CACHE = "k3v3:residual_length=32,statistics_length=48"


def test_it_prints_the_cache_twice(capsys):
    main(["allocate", "--model", MODEL, *TEXT, "--cache", CACHE])
    _, code, option = capsys.readouterr().out.splitlines()
    flag, text = shlex.split(option)
    assert flag == "--cache"
    spec = CacheSpec.named(text)
    assert sum(spec.options.key_bits + spec.options.value_bits) == 6 * 8
    assert len(set(spec.options.key_bits + spec.options.value_bits)) > 1
    assert spec.options.of_layer(0).residual_length == 32
    assert code == spec.code[1]
    main(["allocate", "--model", MODEL, *TEXT, "--cache", CACHE, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["dtype"], found["cache"]) == (MODEL, "float32", text)
    assert tuple(found["key_bits"]) == spec.options.key_bits
    assert found["code"][1] == code
    main(
        [
            "allocate",
            "--model",
            MODEL,
            *TEXT,
            "--cache",
            "k3v3",
            "--window",
            "600",
            "--max-tokens",
            "600",
        ]
    )
    option = capsys.readouterr().out.splitlines()[2]
    assert CacheSpec.named(shlex.split(option)[1]).options.residual_length == 128


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cache", "hqq"], "--cache hqq: name a preset of rotorquant, with its settings"),
        (["--cache", "k3v3"], "windows have 200 tokens; with these settings pass windows of 520"),
        (["--cache", "k3v3:key_bits=[3,3]"], "layer by layer"),
        (["--cache", "k9v9"], "unknown cache"),
    ],
)
def test_bad_input_is_refused(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["allocate", "--model", MODEL, *TEXT, *arguments])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
