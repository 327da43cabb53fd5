"""Model folders as nobody would write them: each loads and computes finite numbers, or has an error of casehard.

Seconds by default, always the same examples; CASEHARD_FUZZ_EXAMPLES=20000 looks at that many new ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from casehard.errors import UserError
from casehard.model.load import load
from fakes import tiny_llama

EXAMPLES = int(os.environ.get("CASEHARD_FUZZ_EXAMPLES", "0"))
SECONDS = 20  # an example takes a twentieth of one

JSON = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
FILES = (*JSON, "model.safetensors", "chat_template.jinja")
NAMES = (
    *FILES,
    *("adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json", "casehard.json", "x.gguf"),
    *("manifest.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("additional_chat_templates/x.jinja", "pytorch_model.bin", "README.md", "processor_config.json", "params.json"),
)
KEYS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings", "model_type", "architectures", "dtype", "torch_dtype"),
    *("rope_parameters", "rope_scaling", "rms_norm_eps", "hidden_act", "attention_dropout", "attention_bias"),
    *("tie_word_embeddings", "return_dict", "output_attentions", "num_labels", "id2label", "layer_types", "use_cache"),
    *("pad_token_id", "eos_token_id", "bos_token_id", "attn_implementation", "_attn_implementation", "text_config"),
    *("quantization_config", "per_layer_config", "is_encoder_decoder", "sliding_window", "pretraining_tp", "to_dict"),
    *(
        "n_layer",
        "n_head",
        "n_embd",
        "n_inner",
        "n_positions",
        "scale_attn_weights",
        "attn_pdrop",
        "activation_function",
    ),
    *("do_sample", "temperature", "num_beams", "max_new_tokens", "cache_implementation", "suppress_tokens"),
    *("tokenizer_class", "pad_token", "eos_token", "extra_special_tokens", "init_inputs", "added_tokens_decoder"),
    *("model_max_length", "chat_template", "transformers_version", "name_or_path", "auto_map", "use_kernels"),
)
TYPES = ("llama", "gpt2", "mistral", "qwen2", "gemma3", "mamba", "bert", "t5", "nothing", "gemma3_text", "mixtral")

odd = st.one_of(
    st.sampled_from([None, True, False, 0, 1, 2, -1, 3, 63, 64, 65, 10**5, 10**9, 2**63, -(10**9), 0.0, 1e-5, 1e308]),
    st.sampled_from([float("nan"), float("inf"), "", "x", "2", "eager", "a/b", "\ud800", "\0", "../x", "float16"]),
    st.sampled_from(TYPES),
    st.sampled_from(
        [[], {}, [None], [[]], {"": None}, {"a": {"b": [1]}}, [1, "x"], {"0": "x"}, ["full_attention"] * 2]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 70), max_size=4),
)
Change = Callable[[Path], None]


def _replace(value: Any, picks: list[int], new: Any) -> Any:
    """Put a value at a place inside a JSON value that the picks lead to."""
    if not picks or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[picks[0] % len(keys)]
    value[key] = _replace(value[key], picks[1:], new)
    return value


def plain(file: Path) -> Path:
    """Return a file that may be changed: what a link leads to is not the example's, and a pipe would be waited for."""
    if file.is_symlink() or not file.is_file():
        raise OSError(f"{file} is not there any more")
    return file


def set_key(name: str, key: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        held = json.loads(plain(folder / name).read_text())
        (folder / name).write_text(json.dumps(held | {key: value}))

    return change


def set_deep(name: str, picks: list[int], value: Any) -> Change:
    def change(folder: Path) -> None:
        held = json.loads(plain(folder / name).read_text())
        (folder / name).write_text(json.dumps(_replace(held, picks, value)))

    return change


def edit_bytes(name: str, at: int, new: bytes, cut: int) -> Change:
    def change(folder: Path) -> None:
        data = plain(folder / name).read_bytes()
        at_ = at % (len(data) + 1)
        (folder / name).write_bytes(data[:at_] + new + data[at_ + cut :])

    return change


def put(name: str, how: str) -> Change:
    def change(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if file.is_file() or file.is_symlink():
            file.unlink()
        elif file.exists():
            return
        if how == "pipe":
            os.mkfifo(file)
        elif how == "folder":
            file.mkdir()
        elif how.startswith("->"):
            file.symlink_to(how[2:])
        elif how != "gone":
            file.write_text(how)

    return change


def edit_header(picks: list[int], value: Any, length: int | None) -> Change:
    def change(folder: Path) -> None:
        file = plain(folder / "model.safetensors")
        data = file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        text = json.dumps(_replace(json.loads(data[8 : 8 + size]), picks, value)).encode()
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :])

    return change


DTYPES = (torch.int64, torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64, torch.complex64)


def edit_tensor(which: int, how: int | str) -> Change:
    def change(folder: Path) -> None:
        file = plain(folder / "model.safetensors")
        held = load_file(file)
        name = sorted(held)[which % len(held)]
        tensor = held.pop(name)
        if isinstance(how, int):
            held[name] = tensor.to(DTYPES[how % len(DTYPES)])
        elif how == "nan":
            held[name] = torch.full_like(tensor, float("nan"))
        elif how == "huge":
            held[name] = torch.full_like(tensor, 3e38)
        elif how == "flat":
            held[name] = tensor.reshape(-1)
        elif how == "long":
            held[name] = torch.cat([tensor, tensor])
        elif how != "gone":
            held[how + name] = tensor
        save_file(held, file, metadata={"format": "pt"})

    return change


def every_name(prefix: str) -> Change:
    def change(folder: Path) -> None:
        file = plain(folder / "model.safetensors")
        save_file({prefix + name: t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})

    return change


picks = st.lists(st.integers(0, 200), max_size=5)
targets = st.sampled_from(["->/dev/zero", "->/", "->config.json", "->x", "->../outside", "->."])
contents = st.sampled_from(["", "{}", "[]", "null", "{", '{"a": 1}', '{"auto_map": {}}', '{"weight_map": {}}'])
changes = st.one_of(
    st.builds(set_key, st.sampled_from(JSON[:3]), st.sampled_from(KEYS), odd),
    st.builds(set_key, st.just("config.json"), st.sampled_from(KEYS), odd),
    st.builds(set_key, st.just("config.json"), st.just("model_type"), st.sampled_from(TYPES)),
    st.builds(set_deep, st.sampled_from(JSON), picks, odd),
    st.builds(edit_bytes, st.sampled_from(FILES), st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 40)),
    st.builds(put, st.sampled_from(NAMES), st.one_of(st.sampled_from(["pipe", "folder", "gone"]), targets, contents)),
    st.builds(edit_header, picks, odd, st.none() | st.integers(0, 2**64 - 1)),
    st.builds(edit_tensor, st.integers(0, 99), st.integers(0, 9) | st.sampled_from(["nan", "huge", "flat", "long"])),
    st.builds(edit_tensor, st.integers(0, 99), st.sampled_from(["gone", "_orig_mod.", "module.", "x."])),
    st.builds(every_name, st.sampled_from(["_orig_mod.", "module.", "language_model.", "model."])),
)


class Hung(BaseException):
    """An example took too long; no handler for errors may catch it."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hung

    before, left = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)  # the test's own limit
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))])}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    other = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, **ids))
    for name, model in (("llama", tiny_llama(hidden=16)), ("gpt2", other)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.sampled_from(["llama", "gpt2"]), st.lists(changes, min_size=1, max_size=3))
def test_a_folder_loads_or_has_an_error(made: Path, base: str, several: list[Change]) -> None:
    with tempfile.TemporaryDirectory(prefix="casehard-fuzz-") as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(shutil.copytree(made / base, Path(place) / "model"))
        (Path(place) / "outside").write_text("{}")
        for change in several:
            with suppress(OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError):
                change(folder)  # one may take away what the next would change
        with limit(SECONDS):
            try:
                got = load(folder)
            except UserError as error:
                assert error.message and "\n" not in error.message
                return
            with torch.no_grad():
                assert bool(got.net(torch.tensor([[5, 6, 3]])).logits.isfinite().all())
            assert len(got.digest) == 64
