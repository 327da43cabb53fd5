"""A model folder from strangers: nothing outside is read, nothing fetched, nothing hangs, every problem has a name."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model_load import edit, words

from casehard.cli import options
from casehard.data.chat import ChatFormat
from casehard.errors import Corrupt, DataError, Unsupported, UserError
from casehard.io.files import read_json
from casehard.model import load as loading
from casehard.model.adapters import add_lora
from casehard.model.digest import READ, folder_digest
from casehard.model.save import save
from casehard.types import Example
from fakes import tiny_llama

IDS = torch.tensor([[5, 6, 3]])
pytestmark = pytest.mark.timeout(30)  # of a pipe nobody writes to, a test would wait for ever


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    tiny_llama().save_pretrained(folder)
    words(pad_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


# -- what config.json asks for --------------------------------------------------------------------------------------

KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_experts_implementation")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "value", ["flash_attention_2", "flex_attention", "paged|eager", "sdpa", "nonsense", 5, {"": "sdpa"}]
)
def test_the_implementation_in_the_file_is_never_used(folder: Path, key: str, value: Any) -> None:
    edit(folder / "config.json", **{key: value})
    if value in ("sdpa", 5, {"": "sdpa"}):
        got = loading.load(folder)
    else:
        with pytest.warns(UserWarning, match=re.escape(f"config.json: {key} {value!r} is not used")):
            got = loading.load(folder)
    assert got.net.config._attn_implementation == "eager"
    assert torch.equal(logits(got.net), logits(tiny_llama().eval()))


def test_nor_that_of_a_part(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = size | {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Gemma3Config(
        text_config=text | ids, vision_config=size | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    asked = json.loads((tmp_path / "config.json").read_text())
    asked["text_config"]["_attn_implementation"] = "flex_attention"
    asked["vision_config"]["_attn_implementation"] = "flash_attention_2"
    (tmp_path / "config.json").write_text(json.dumps(asked))
    got = loading.load(tmp_path).net.config
    assert {c._attn_implementation for c in (got, got.text_config, got.vision_config)} == {"eager"}


KERNEL = "kernels-community/flash-attn2"


@pytest.mark.parametrize(
    "asked",
    [
        *({key: value} for key in KEYS for value in (KERNEL, f"paged|{KERNEL}", {"": KERNEL})),
        {"text_config": {"_attn_implementation": KERNEL}},
        {"layers": [{"experts_implementation": f"{KERNEL}@v1:run"}]},
        {"use_kernels": True},
        {"kernel_config": {"RMSNorm": "somebody/norm:RMSNorm"}},
    ],
    ids=str,
)
def test_kernels_from_the_hub_are_refused(folder: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr(transformers.integrations.hub_kernels, "get_kernel", lambda *a, **k: fetched.append(a))
    edit(folder / "config.json", **asked)
    with pytest.raises(Unsupported, match=r"config.json: .*kernel.* from the Hub"):
        loading.load(folder)
    with pytest.raises(Unsupported, match=r"from the Hub"):
        loading.load_tokenizer(folder)
    assert not fetched


def test_no_architecture_fetches_kernels_by_itself() -> None:
    assert os.environ["USE_HUB_KERNELS"] == "NO"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "not installed.*bitsandbytes"),
        ({"load_in_8bit": True}, "not installed.*bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "not installed.*(optimum|gptqmodel)"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "not installed.*(optimum|gptqmodel)"),
        ({"quant_method": "mxfp4"}, "quantised with 'mxfp4', which cannot be loaded"),
        ({"quant_method": "fp8"}, "quantised with 'fp8'"),
        ({"bits": 4}, "quantised with 'an unnamed method'"),
        ("int4", "quantised with 'int4'"),
    ],
    ids=str,
)
def test_quantised_weights_name_what_they_need(folder: Path, settings: Any, message: str) -> None:
    edit(folder / "config.json", quantization_config=settings)
    with pytest.raises(Unsupported, match=message) as caught:
        loading.load(folder)
    assert "original" in caught.value.hint


@pytest.mark.parametrize(("name", "config"), [("m.gguf", True), ("m.gguf", False), ("pytorch_model.bin", True)])
def test_other_formats_say_what_to_do(folder: Path, name: str, config: bool) -> None:
    (folder / "model.safetensors").rename(folder / name)
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(Unsupported, match=rf"no .safetensors weights; only {name}") as caught:
        loading.load(folder)
    with pytest.raises(Unsupported, match=r"only folders with .safetensors") as alone:
        loading.load(folder / name)
    with pytest.raises(Unsupported, match=r"only folders with .safetensors"):
        options.model_folder(str(folder / name))
    how = folder / name if name.endswith(".gguf") else f"{folder} --allow-pickle"
    for error in (caught, alone):
        assert f"convert it to safetensors: casehard model import {how} --out DIR" in error.value.hint
        assert ("pickled weights can run code" in error.value.hint) is (not name.endswith(".gguf"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformers_weights", "other.safetensors"),
        ("configuration_files", ["config.4.0.0.json"]),
        ("fast_tokenizer_files", ["tokenizer.4.0.0.json"]),
        ("fusion_config", {"norm": True}),
    ],
)
def test_pointers_to_files_that_nobody_checked_are_refused(folder: Path, key: str, value: Any) -> None:
    name = "tokenizer_config.json" if key == "fast_tokenizer_files" else "config.json"
    edit(folder / name, **{key: value})
    with pytest.raises(Unsupported, match=rf"{name}: .*\({key}\)"):
        loading.load(folder)


VALUES: list[tuple[dict[str, Any], type[UserError], str]] = [
    ({"num_hidden_layers": 100_000}, DataError, "num_hidden_layers is 100000, more than 10,000"),
    ({"num_hidden_layers": -1}, DataError, "num_hidden_layers is -1"),
    ({"num_hidden_layers": 0}, DataError, "num_hidden_layers is 0"),
    ({"num_hidden_layers": 1}, Corrupt, "num_hidden_layers is 1, the weights are those of 2 layers"),
    ({"num_hidden_layers": 3}, Corrupt, "num_hidden_layers is 3, the weights are those of 2 layers"),
    ({"num_hidden_layers": "2"}, DataError, "num_hidden_layers"),
    ({"head_dim": 0}, DataError, "head_dim is 0"),
    ({"head_dim": 16}, Corrupt, "mismatched keys in the weights, first model.layers.0.self_attn.k_proj.weight"),
    ({"hidden_size": 64}, Corrupt, "mismatched keys"),
    ({"intermediate_size": 10**9}, Corrupt, "mismatched keys"),
    (
        {"vocab_size": 10**9},
        Corrupt,
        r"first lm_head.weight: \(1000000000, 32\) by config.json, \(64, 32\) in the file",
    ),
    ({"vocab_size": 63}, Corrupt, "2 mismatched keys"),
    ({"num_attention_heads": 3}, DataError, "not a multiple of the number of attention heads"),
    ({"num_labels": 10**8}, DataError, "num_labels is 100000000, more than 100,000"),
    ({"pad_token_id": 10**9}, DataError, "pad_token_id is 1000000000, outside a vocabulary of 64"),
    ({"eos_token_id": 64}, DataError, "eos_token_id is 64, outside"),
    ({"eos_token_id": [2, 99]}, DataError, r"eos_token_id is \[2, 99\], outside"),
    ({"eos_token_id": "2"}, DataError, "eos_token_id"),
    ({"torch_dtype": "nonsense"}, DataError, "torch_dtype is 'nonsense'"),
    ({"dtype": "load"}, DataError, "dtype is 'load'"),
    ({"dtype": "int8"}, DataError, "dtype is 'int8'"),
    ({"dtype": 5}, DataError, "dtype is 5"),
    ({"attention_dropout": 5.0}, DataError, r"attention_dropout is 5.0, not within 0..1"),
    ({"model_type": 5}, Unsupported, "has model type `5` but"),
    ({"model_type": None}, Unsupported, "has model type `None` but"),
    ({"model_type": ["llama"]}, Unsupported, "cannot be loaded as a causal language model"),
    ({"hidden_act": "no-such-thing"}, Unsupported, "cannot be loaded as a causal language model"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, UserError, "config.json|cannot be"),
    ({"rms_norm_eps": float("nan")}, Corrupt, "its output is not finite, though its weights are"),
    ({"text_config": {"hidden_size": 32}}, DataError, "config.json"),
    ({"is_encoder_decoder": True}, Unsupported, "an encoder-decoder model"),
    ({"attention_dropout": None}, Unsupported, "loads, but cannot be run"),
]


@pytest.mark.parametrize(("asked", "kind", "message"), VALUES, ids=str)
def test_values_no_model_has(folder: Path, asked: dict[str, Any], kind: type[UserError], message: str) -> None:
    edit(folder / "config.json", **asked)
    with pytest.raises(kind, match=message):
        loading.load(folder)


def test_what_is_meant_for_one_call_is_not_kept(folder: Path) -> None:
    edit(folder / "config.json", return_dict=False, output_attentions=True, pad_token_id=-1, eos_token_id=[1, 2])
    got = loading.load(folder)
    told = "\n".join(got.notes)
    assert "return_dict False is not used" in told and "output_attentions True is not used" in told
    assert "pad_token_id is -1: there is no such token" in told
    assert got.net.config.return_dict and not got.net.config.output_attentions
    assert torch.equal(logits(got.net), logits(tiny_llama().eval()))
    edit(folder / "generation_config.json", max_new_tokens=4096, suppress_tokens=[63])
    assert loading.load(folder).net.generation_config.max_new_tokens == 4096  # many tokens, none of them by number
    edit(folder / "generation_config.json", eos_token_id=[2, 64])
    with pytest.raises(
        DataError, match=r"generation_config.json: eos_token_id is \[2, 64\], outside a vocabulary of 64"
    ):
        loading.load(folder)


def test_ids_and_a_tokenizer_that_break_when_they_are_used(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=["x"])
    with pytest.raises(DataError, match=r"eos_token_id is \['x'\], not the number of a token"):
        loading.load(folder)
    edit(folder / "generation_config.json", eos_token_id=2)
    before = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(re.sub(r'("w20": )20', r"\g<1>80", before))
    with pytest.raises(DataError, match="ids up to 80, the model only 64 embeddings"):
        loading.load(folder)
    (folder / "tokenizer.json").write_text(before)
    edit(folder / "tokenizer_config.json", model_max_length=[512])
    for look in (loading.load, loading.load_tokenizer):
        with pytest.raises(DataError, match="the tokenizer cannot be loaded or used"):
            look(folder)


def test_json_that_is_no_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(Corrupt, match=r"config.json: holds a list, not an object"):
        loading.load(folder)
    (folder / "config.json").write_text('{"a":' * 40 + "1" + "}" * 40)
    with pytest.raises(DataError, match=r"nested more than 32 levels"):
        loading.load(folder)
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(Corrupt, match=r"not valid JSON"):
        loading.load(folder)


# -- the tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_are_floating_point_numbers(folder: Path, kind: torch.dtype) -> None:
    tensors(folder, lambda held: held.update({"model.norm.weight": held["model.norm.weight"].to(kind)}))
    with pytest.raises(DataError, match=r"1 weights are not plain floating-point numbers, first model.norm.weight"):
        loading.load(folder)


def test_what_the_model_has_no_place_for_is_told(folder: Path) -> None:
    tensors(folder, lambda held: held.update({"model.position_ids": torch.arange(8), "lora.A": torch.zeros(2)}))
    got = loading.load(folder)
    assert got.notes == ("2 tensors of the files have no place in the model, first lora.A",)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_the_prefix_of_a_wrapper_has_a_name(folder: Path, prefix: str) -> None:
    tensors(folder, lambda held: [held.update({prefix + name: held.pop(name)}) for name in list(held)])
    with pytest.raises(Unsupported, match=f"every tensor's name begins with '{prefix}'"):
        loading.load(folder)


def test_two_tables_that_are_said_to_be_one(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    got = loading.load(folder)
    assert "config.json ties input and output embedding (tie_word_embeddings), the files hold two" in got.notes[0]
    got.net.tie_weights()
    assert torch.equal(logits(got.net), logits(tiny_llama().eval()))
    made = save(got.net, got.tokenizer, tmp_path / "out", parent="", method="", provenance={})
    again = loading.load(made.path)
    assert again.notes == () and torch.equal(logits(again.net), logits(got.net))


def header(folder: Path, change: Callable[[dict[str, Any]], Any], *, claim: int | None = None) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    held = json.loads(data[8 : 8 + size])
    change(held)
    text = json.dumps(held).encode()
    file.write_bytes(struct.pack("<Q", len(text) if claim is None else claim) + text + data[8 + size :])


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        (lambda held: held["model.norm.weight"].update(data_offsets=held["lm_head.weight"]["data_offsets"]), None),
        (lambda held: held["model.norm.weight"].update(data_offsets=[0, 1 << 62]), None),
        (lambda held: held["model.norm.weight"].update(shape=[1 << 62]), None),
        (lambda held: held["model.norm.weight"].update(shape=[-32]), None),
        (lambda held: held["model.norm.weight"].update(dtype="X9"), None),
        (lambda held: held["model.norm.weight"].pop("shape"), None),
        (lambda held: None, 1 << 63),
        (lambda held: None, 5),
    ],
    ids=["overlap", "beyond", "huge", "negative", "dtype", "no shape", "claims 2^63", "claims 5"],
)
def test_headers_that_lie(folder: Path, change: Callable[[dict[str, Any]], Any], claim: int | None) -> None:
    header(folder, change, claim=claim)
    with pytest.raises(Corrupt, match=r"damaged weights: model.safetensors"):
        loading.load(folder)


def test_shards_without_their_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(Unsupported, match=r"neither model.safetensors nor model.safetensors.index.json; only model-0"):
        loading.load(folder)
    index = {"weight_map": {"a": "x/../model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Corrupt, match=r"is not the name of a shard"):
        loading.load(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    index = {"weight_map": {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Corrupt, match=r"is in two files, the second is b.safetensors"):
        loading.load(folder)


# -- the files ------------------------------------------------------------------------------------------------------

FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "additional_chat_templates/x.jinja", "vocab.json", "model.safetensors"),
    *("model.safetensors.index.json", "adapter_config.json", "casehard.json", "manifest.json", "notes"),
)


@pytest.mark.parametrize("name", FILES)
def test_no_pipe_is_waited_for_and_no_link_leads_out(folder: Path, name: str) -> None:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    (folder.parent / "secret").write_text("{}")
    os.mkfifo(folder.parent / "pipe")
    for make, message in (
        (lambda: os.mkfifo(file), "not a plain file"),
        (lambda: file.symlink_to(folder.parent / "secret"), "a link out of the folder"),
        (lambda: file.symlink_to("/dev/zero"), "a link out of the folder"),
        (lambda: file.symlink_to(folder.parent / "pipe"), "a link out of the folder"),
        (lambda: file.symlink_to(file.name), "a link that leads nowhere"),
        (lambda: file.symlink_to("absent"), "a link that leads nowhere"),
    ):
        make()
        for look in (loading.load, loading.load_tokenizer):
            with pytest.raises(Corrupt, match=rf"{name}: {message}"):
                look(folder)
        file.unlink()


def test_read_json_reads_plain_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(Corrupt, match=r"not a plain file"):
            read_json(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"symbolic links"):
        read_json(tmp_path / "loop")


def test_a_snapshot_of_the_hub_is_a_tree_of_links(made: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for file in made.iterdir():
        shutil.copy(file, blobs / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    (blobs / "sha-x").write_text("{{ messages }}")
    (snapshot / "additional_chat_templates" / "x.jinja").symlink_to("../../../blobs/sha-x")
    assert loading.load(snapshot).digest == folder_digest(snapshot)
    (blobs / "sha-x").unlink()
    (blobs / "sha-x").symlink_to(made / "config.json")
    with pytest.raises(Corrupt, match=r"x.jinja: a link out of the folder"):
        loading.load(snapshot)


def test_links_within_the_folder_and_other_folders_are_fine(folder: Path) -> None:
    (folder / "chat_template.jinja").rename(folder / "t.jinja")
    (folder / "chat_template.jinja").symlink_to("t.jinja")
    (folder / "original").mkdir()
    (folder / "original" / "weights.bin").write_bytes(b"x")
    assert loading.load(folder).tokenizer.chat_template


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja", "generation_config.json"])
def test_no_file_is_read_whatever_its_size(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(DataError, match=rf"{name}: 1,073,741,824 bytes long; such a file has at most"):
        loading.load(folder)


def test_a_folder_where_a_file_should_be(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    with pytest.raises(Corrupt, match=r"generation_config.json: a folder, not a file"):
        loading.load(folder)


def test_what_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For an administrator everything may be read.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read"):
        loading.load(folder)


def test_all_problems_of_a_look_are_told_at_once(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    os.mkfifo(folder / "chat_template.jinja")
    (folder / "link").symlink_to("/etc")
    with pytest.raises(Corrupt, match=r"2 problems: chat_template.jinja: not a plain file; link: a link out of"):
        loading.load(folder)
    for name in ("chat_template.jinja", "link"):
        (folder / name).unlink()
    edit(folder / "config.json", use_kernels=True, auto_map={"AutoConfig": "x.Y"}, dtype="nonsense")
    with pytest.raises(Unsupported, match=r"3 problems: .*use_kernels.*auto_map.*dtype is 'nonsense'"):
        loading.load(folder)


# -- further weights, and the digest --------------------------------------------------------------------------------


def test_an_adapter_beside_a_model_is_refused(folder: Path) -> None:
    model = add_lora(tiny_llama(), 2, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    model.save_pretrained(folder)
    for look in (loading.load, folder_digest):
        with pytest.raises(Unsupported, match=r"adapter_config.json lies beside a whole model"):
            look(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(Unsupported, match=r"adapter_model.safetensors lies beside a whole model"):
        loading.load(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert loading.load(folder).digest


def test_parts_of_a_distributed_checkpoint_are_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(Unsupported, match=r"a part of a distributed checkpoint"):
        loading.load(folder)


@pytest.mark.parametrize("name", ["additional_chat_templates/x.jinja", "spiece.model", "bpe.codes", "vocab.json"])
def test_the_digest_covers_what_a_tokenizer_reads(folder: Path, name: str) -> None:
    before = folder_digest(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    first = folder_digest(folder)
    (folder / name).write_text("{ }" if name.endswith(".jinja") else '{"a": 1}')
    assert len({before, first, folder_digest(folder)}) == 3


def test_the_digest_knows_every_file_of_every_tokenizer() -> None:
    root = Path(transformers.__file__).parent
    sources = [*root.glob("models/*/tokenization_*.py"), *root.glob("tokenization_*.py")]
    named: set[str] = set()
    for source in sources:
        for table in re.findall(r"VOCAB_FILES_NAMES\b[^=]*= \{(.*?)\}", source.read_text(encoding="utf-8"), re.S):
            named |= set(re.findall(r': *"([^"]+)"', table))
    assert len(named) > 15 and named <= READ, named - READ


# -- what tokenizer.json asks for -----------------------------------------------------------------------------------


def tokenizer_with(folder: Path, **parts: Any) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


def replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


@pytest.mark.parametrize("nested", [False, True])
def test_a_normalizer_that_multiplies_a_text_is_refused_and_not_run(folder: Path, nested: bool) -> None:
    steps: list[Any] = [replace("a", "a" * 1000)] * 6
    inner = {"type": "Sequence", "normalizers": steps}
    tokenizer_with(folder, normalizer={"type": "Sequence", "normalizers": [inner]} if nested else inner)
    for read in (loading.load, loading.load_tokenizer):
        with pytest.raises(DataError, match=r"tokenizer\.json: its normalizer makes one character 1,000,0") as caught:
            read(folder)
        assert len(caught.value.message) < 400


def test_a_normalizer_of_ordinary_replacements_is_run(folder: Path) -> None:
    steps: list[Any] = [replace(" ", "\u2581"), replace("``", '"'), {"type": "Prepend", "prepend": "\u2581"}]
    tokenizer_with(folder, normalizer={"type": "Sequence", "normalizers": steps})
    assert loading.load(folder).tokenizer("a b")["input_ids"]


def test_a_pattern_that_takes_for_ever_is_an_error_of_the_row(folder: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer_with(folder, pre_tokenizer=pattern)
    chat = ChatFormat(loading.load_tokenizer(folder))
    row = Example.pair("a" * 60 + "!", "a b")
    with pytest.raises(
        DataError, match=r"row with prompt 'aaaa.*the tokenizer gives up: Onig: .*retry-limit"
    ) as caught:
        chat.encode(row)
    assert "tokenizer.json" in caught.value.hint
    with pytest.raises(DataError, match="the tokenizer gives up"):
        chat.prompt_ids(row)


def test_a_panic_while_loading_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer_with(folder, pre_tokenizer=pattern)
    monkeypatch.setattr(loading, "TRIED", ["a" * 60 + "!"])
    with pytest.raises(DataError, match=r"the tokenizer cannot be loaded or used .PanicException: Onig"):
        loading.load(folder)
