"""A model argument means one thing everywhere; whatever the Hub does, the user reads what happened and what to do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casehard.data.hub import rows as hub_rows
from casehard.errors import ConfigError, DataError, StorageError, Unsupported, UserError
from casehard.io import hub as hub_questions
from casehard.model import load as loading
from casehard.model import source
from casehard.model.source import HubModel, find, is_snapshot, origin, pin, read
from fake_hub import FakeHub, closed_port, commit, serving, use


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with the names of a model and next to nothing in it."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 40)
    (folder / "README.md").write_text("not wanted")
    for name in ("pytorch_model.bin", "modeling_evil.py", "training_args.pt"):
        (folder / name).write_bytes(b"not wanted")
    (folder / "consolidated.safetensors").write_bytes(b"not wanted")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    with serving(hub) as url:
        use(monkeypatch, tmp_path / "cache", url)
        yield hub


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("org/name", HubModel("org/name")),
        ("org/name@main", HubModel("org/name", "main")),
        ("hub:org/name", HubModel("org/name")),
        ("hub:org/name@refs/pr/1", HubModel("org/name", "refs/pr/1")),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", HubModel("HuggingFaceTB/SmolLM2-135M-Instruct")),
        ("hub:runs/name", HubModel("runs/name")),
        ("runs/a", Path("runs/a")),
        ("runs/tuned", Path("runs/tuned/checkpoint")),
        ("both/here", Path("both/here")),
        ("hub:both/here", HubModel("both/here")),
    ],
)
def test_what_a_model_argument_means(here: Path, text: str, meant: Path | HubModel) -> None:
    for folder in ("runs/a", "runs/tuned/checkpoint", "both/here"):
        (here / folder).mkdir(parents=True)
    (here / "runs" / "tuned" / "checkpoint" / "config.json").write_text("{}")
    assert read(text) == meant


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        # The first part is a folder here: plainly a path, and the Hub is not asked.
        ("runs/pacther", "did you mean runs/patcher?; a model of the Hub: hub:runs/pacther"),
        ("./org/name", "org/name[@revision]"),
        ("../org/name", "org/name[@revision]"),
        ("/org/name", "config.json"),
        ("~/name", "config.json"),
        ("org/name/", "org/name[@revision]"),
        ("org/name/more", "org/name[@revision]"),
        ("gpt2", "org/name[@revision]"),
        ("run", "did you mean runs?"),
        ("org/name@", "org/name[@revision]"),
        ("org/..name", "config.json"),
    ],
)
def test_a_path_to_nothing_is_no_network_attempt(here: Path, hub: FakeHub, text: str, hint: str) -> None:
    (here / "runs" / "patcher").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        find(text)
    assert caught.value.message == f"no such model folder: {text}"
    assert hint in caught.value.hint
    assert hub.asked == []


@pytest.mark.parametrize("text", ["hub:", "hub:name", "hub:a/b/c", "hub:../../etc", "hub:org/name@", "hub:org/na me"])
def test_a_malformed_id_is_told_its_form(hub: FakeHub, text: str) -> None:
    with pytest.raises(ConfigError, match="names no model of the Hub") as caught:
        find(text)
    assert "hub:org/name@revision" in caught.value.hint and hub.asked == []


@pytest.mark.parametrize("text", ["org/model", "org/model@main", "hub:org/model", f"org/model@{commit(1)}"])
def test_a_model_is_fetched_and_pinned(here: Path, hub: FakeHub, small: Path, text: str) -> None:
    hub.add("org/model", small)
    said: list[str] = []
    folder = find(text, tell=said.append)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()
    assert is_snapshot(folder) and origin(folder) == f"org/model@{commit(1)}"
    assert said == [f"looking for {text.removeprefix('hub:')} at {hub.url} ..."]
    asked = len(hub.asked)
    assert pin(text) == f"org/model@{commit(1)}"
    # The commit is known now: nobody is asked for it a second time.
    asked = len(hub.asked)
    assert find(pin(f"org/model@{commit(1)}")) == folder and len(hub.asked) == asked


def test_revisions_are_told_apart(here: Path, hub: FakeHub, small: Path) -> None:
    hub.add("org/model", small, commits={"main": commit(1), "v2": commit(2)})
    assert pin("org/model") == f"org/model@{commit(1)}" and pin("org/model@v2") == f"org/model@{commit(2)}"
    with pytest.raises(ConfigError, match="it has no revision 'v3'"):
        find("org/model@v3")


SAYS = [
    ({"info": (401, "GatedRepo")}, "it is gated, .* .HTTP 401", "ask for access at {url}/org/model, then log in"),
    # The usual case: anybody may read about it, and who was not let in gets no file.
    ({"files": (403, "GatedRepo")}, "it is gated, .* .HTTP 403", "hf auth login"),
    ({"files": (401, "GatedRepo")}, "it is gated, .* .HTTP 401", "HF_TOKEN"),
    ({"info": (401, "RepoNotFound")}, "there is no such model, or it is private", "the spelling at {url}/org/model"),
    ({"info": (404, "RepoNotFound")}, "there is no such model, or it is private", "for a private model log in"),
    ({"info": (404, "RevisionNotFound")}, "it has no revision 'main'", "{url}/org/model/tree/main"),
    ({"info": (403, "")}, "access was refused .HTTP 403", "a token may have expired"),
    ({"info": (500, "")}, "answered with HTTP 500", "try again later"),
    ({"files": (503, "")}, "answered with HTTP 503", "try again later"),
    ({"info": (429, "")}, "HTTP 429", "wait some minutes"),
    ({"cut": True}, "the transfer from .* broke off", "goes on where it stopped"),
    ({"hang": True}, "does not answer", "check the network and HF_ENDPOINT"),
    # The client sets no limit of time for this question, and asks it six times.
    ({"no_list": True}, "does not answer", "check the network and HF_ENDPOINT"),
]


@pytest.mark.filterwarnings(
    "ignore:HTTP Error", "ignore:Retrying in", "ignore:Error while downloading", "ignore:.*timed out"
)
@pytest.mark.parametrize(("how", "why", "hint"), SAYS, ids=[str(how) for how, _, _ in SAYS])
def test_each_no_of_the_hub_has_its_words(
    here: Path, hub: FakeHub, small: Path, how: dict, why: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_questions, "PATIENCE", 0.3)
    hub.add("org/model", small, **how)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"'org/model' is neither a folder here nor .* the Hub: .*{why}") as caught:
        find("org/model")
    assert hint.format(url=hub.url) in caught.value.hint
    assert "\n" not in caught.value.message and len(caught.value.message) < 300
    assert time.monotonic() - began < 10


@pytest.mark.filterwarnings("ignore:.*timed out", "ignore:Retrying in")
def test_a_listing_that_does_not_come_leaves_what_the_cache_has(
    here: Path, hub: FakeHub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_questions, "PATIENCE", 0.3)
    repo = hub.add("org/model", small)
    folder = find("org/model")
    source._fetched.clear()
    repo.commits["main"] = commit(2)
    repo.no_list = True
    with pytest.warns(UserWarning, match="taken from the cache, commit 000000000000: .* does not answer"):
        assert find("org/model") == folder


@pytest.mark.filterwarnings("ignore:.*timed out", "ignore:Retrying in")
def test_rows_of_a_hub_that_never_answers(here: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_questions, "PATIENCE", 0.3)
    hub.silent = True
    began = time.monotonic()
    with pytest.raises(DataError, match="hub:org/name:train: the Hub does not answer") as caught:
        next(iter(hub_rows("hub:org/name:train")))
    assert "check the name and the network" in caught.value.hint
    assert time.monotonic() - began < 10


def test_a_hub_that_is_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = closed_port()
    use(monkeypatch, here / "cache", url)
    with pytest.raises(UserError, match=rf"{url} cannot be reached") as caught:
        find("org/model")
    assert "check the network" in caught.value.hint and "a local folder" in caught.value.hint


def test_what_the_cache_has_needs_no_hub(
    here: Path, hub: FakeHub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", small)
    folder = find("org/model")
    source._fetched.clear()
    hub.add("org/model", small, info=(500, ""))
    with pytest.warns(
        UserWarning,
        match=rf"org/model is taken from the cache, commit {commit(1)[:12]}: the Hub answered with HTTP 500",
    ):
        assert find("org/model") == folder
    use(monkeypatch, here / "cache", closed_port())
    with pytest.warns(UserWarning, match="cannot be reached"):
        assert find("org/model") == folder
    use(monkeypatch, here / "cache", closed_port(), offline=True)
    assert find("org/model") == find(f"org/model@{commit(1)}") == folder
    for text in ("org/other", "org/model@v2"):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and the cache does not have it") as caught:
            find(text)
        assert "unset HF_HUB_OFFLINE" in caught.value.hint


@pytest.mark.filterwarnings("ignore:Error while downloading")
def test_a_transfer_cut_short_goes_on(here: Path, hub: FakeHub, small: Path) -> None:
    repo = hub.add("org/model", small, cut=True)
    with pytest.raises(UserError):
        find("org/model")
    repo.cut = False
    assert (find("org/model") / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_a_cache_that_cannot_be_written(here: Path, hub: FakeHub, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", small)
    (here / "file").write_text("")
    use(monkeypatch, here / "file" / "cache", hub.url)
    with pytest.raises(UserError) as caught:
        find("org/model")
    assert isinstance(caught.value, StorageError) and "HF_HOME" in caught.value.hint


def test_what_is_fetched_goes_through_the_same_checks(here: Path, hub: FakeHub, small: Path) -> None:
    (small / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config"}}))
    hub.add("org/evil", small)
    with pytest.raises(Unsupported, match="auto_map"):
        loading.load("org/evil")
    (small / "config.json").write_text("{}")
    for name in ("model.safetensors", "consolidated.safetensors"):
        (small / name).unlink()
    hub.add("org/pickled", small)
    with pytest.raises(Unsupported, match=r"no \.safetensors weights"):
        loading.load("hub:org/pickled@main")
