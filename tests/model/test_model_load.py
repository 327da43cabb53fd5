"""Only safetensors are read, nobody's code is run, and what is odd about a folder is told."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from casehard.data.chat import ChatFormat
from casehard.errors import ConfigError, Corrupt, DataError, Unsupported, UserError
from casehard.model import load as loading
from casehard.types import Example
from fakes import tiny_llama

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def words(count: int = 64, **special: str) -> Any:
    names = ["<unk>", "<s>", "</s>", "user", "assistant", "hello", "world"]
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(names)} | {f"w{i}": i for i in range(len(names), count)}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **({"unk_token": "<unk>", "eos_token": "</s>"} | special)
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    tiny_llama().save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_load_gives_the_saved_model(folder: Path) -> None:
    got = loading.load(folder)
    ids = torch.tensor([[5, 6, 3]])
    with torch.no_grad():
        assert torch.equal(got.net(ids).logits, tiny_llama().eval()(ids).logits)
    assert not got.net.training
    assert got.net.config._attn_implementation == "eager"
    assert got.path == folder and len(got.digest) == 64
    assert got.tokenizer.pad_token_id == 0
    assert "padding with '<unk>' (id 0)" in got.notes[0]
    assert got.net.get_input_embeddings().weight.shape[0] == 64
    row = ChatFormat(got.tokenizer).encode(Example.pair("hello", "world"))
    assert row.input_ids == [3, 5, 4, 6, 2] and row.labels == [-100, -100, -100, 6, 2]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("nested", [False, True])
def test_remote_code_is_refused_without_a_question(
    folder: Path, name: str, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(folder / name, **({"text_config": {"auto_map": asked}} if nested else {"auto_map": asked}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    with pytest.raises(Unsupported, match=rf"{name}: asks for code of its own \(auto_map\)"):
        loading.load(folder)
    assert sys.stdin.read() == "y\ny\n"
    with pytest.raises(Unsupported, match="auto_map"):
        loading.load_tokenizer(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickled_weights_are_refused_unopened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(Unsupported, match=rf"no .safetensors weights; only {name}"):
        loading.load(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights at all")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reshape(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=70)


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


def unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", model_type="no-such-thing", architectures=["NoSuchThing"])


def foreign_tokenizer(folder: Path) -> None:
    words(80).save_pretrained(folder)


def traversal(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD: list[tuple[Callable[[Path], None], type[UserError], str]] = [
    (no_config, DataError, "config.json is missing"),
    (adapter, Unsupported, "PEFT adapter without its base"),
    (broken_config, Corrupt, "not valid JSON"),
    (cut, Corrupt, "model.safetensors|damaged weights"),
    (garbage, Corrupt, "model.safetensors|damaged weights"),
    (drop_tensor, Corrupt, "1 missing keys in the weights, first model.norm.weight"),
    (reshape, Corrupt, "2 mismatched keys in the weights, first lm_head.weight"),
    (not_finite, Corrupt, "model.norm.weight holds NaN or Inf"),
    (no_tokenizer, DataError, "tokenizer cannot be loaded"),
    (broken_tokenizer, DataError, "tokenizer cannot be loaded"),
    (unknown_architecture, Unsupported, "cannot be loaded as a causal language model|tokenizer"),
    (foreign_tokenizer, DataError, "ids up to 79, the model only 64 embeddings"),
    (traversal, Corrupt, "is not the name of a shard"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_each_kind_of_damage_has_its_error(
    folder: Path, damage: Callable[[Path], None], kind: type[UserError], message: str
) -> None:
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        loading.load(folder)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/folder", "no such model folder"),
        ("absent", "no such model folder"),
        ("org/name", "neither a folder here nor can it be fetched from the Hub"),
        ("hub:org/name", "neither a folder here nor"),
        ("../..", "not a model folder|config.json is missing"),
        ("a\0b", "NUL"),
        ("x" * 5000, "too long|no such model folder"),
    ],
)
def test_bad_paths(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loading.load(path)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="a file, not a model folder"):
        loading.load(folder / "config.json")


def test_dtypes(folder: Path) -> None:
    assert next(loading.load(folder, dtype="bfloat16").net.parameters()).dtype == torch.bfloat16
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    assert next(loading.load(folder).net.parameters()).dtype == torch.float32
    assert next(loading.load(folder, dtype="auto").net.parameters()).dtype == torch.bfloat16
    with pytest.raises(Unsupported, match="float16 on a CPU"):
        loading.load(folder, dtype="float16")
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        loading.load(folder, dtype="int8")


def test_devices(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown device 'tpu9'"):
        loading.load(folder, device="tpu9")
    if not torch.cuda.is_available():
        assert next(loading.load(folder, device="auto").net.parameters()).device.type == "cpu"
        with pytest.raises(Unsupported, match="no CUDA device"):
            loading.load(folder, device="cuda")


def test_pad_outside_the_embeddings_is_replaced(folder: Path) -> None:
    tokenizer = words()
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match="ids up to 64, the model only 64 embeddings"):
        loading.load(folder)


def test_a_flipped_bit_is_told_when_there_is_a_manifest(folder: Path) -> None:
    from casehard.io.manifest import write_manifest

    write_manifest(folder)
    loading.load(folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(Corrupt, match=r"model\.safetensors"):
        loading.load(folder)


STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k"


@pytest.mark.skipif(not STORIES.is_dir(), reason="real-data fixtures not present")
def test_a_published_checkpoint_loads_and_speaks() -> None:
    got = loading.load(STORIES)
    assert sum(p.numel() for p in got.net.parameters()) == 260_032
    ids = got.tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        out = got.net.generate(**ids, do_sample=False, max_new_tokens=40)
    assert got.tokenizer.decode(out[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily."
    )
