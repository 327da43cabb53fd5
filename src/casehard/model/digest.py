"""The content digest of a model folder: what decides its behaviour, not how it is stored.

It covers all that a loader reads: the tensors (name, dtype, shape, bytes; not how they are sharded), the model and
generation config, every file a tokenizer of transformers may be made of, and the chat templates. A folder from which
transformers would take further weights has no digest. It leaves out the manifest, provenance, readme files, and the
keys that only record where and with which library version a file was written.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from casehard.config import digest
from casehard.errors import Corrupt, Unsupported
from casehard.io.files import read_json

_JSON = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "adapter_config.json",
)
_BYTES = (
    *("chat_template.jinja", "tokenizer.model", "merges.txt", "vocab.txt"),  # what follows came later: order counts
    *("bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json", "normalizer.json"),
    *("prophetnet.tokenizer", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "spiece.model"),
    *("spm.model", "spm_char.model", "target.spm", "target_vocab.json", "tekken.json", "tiktoken.model"),
    *("vocab-src.json", "vocab-tgt.json", "word_pronunciation.json", "word_shape.json"),
)
READ = frozenset((*_JSON, *_BYTES))
"""Files beside the weights that transformers reads from a model folder: all of them are in the digest."""
TEMPLATES = "additional_chat_templates"
_VOLATILE = {
    "transformers_version",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "is_local",
    "local_files_only",
}
_MAX_HEADER = 100_000_000  # the limit of the safetensors format itself
_BLOCK = 1 << 22
_LORA = (".json", ".safetensors", ".bin")
_DISTRIBUTED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")  # as transformers names them


class _Slice(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files a loader reads: the single file, else the shards of the index; maybe none.

    Raises:
        Unsupported: a model and further weights that transformers would read with it, or in its place.
        Corrupt: the index names a file that is missing or outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    beside = sorted(p.name for p in folder.glob("adapter_*") if p.suffix in _LORA)
    if beside and (single.exists() or index.exists()):
        raise Unsupported(
            f"{folder}: {beside[0]} lies beside a whole model, and transformers would add that adapter to its weights",
            hint="move the adapter_* files out: they are merged in already, or merge them and save the result",
        )
    if shards := sorted(p.name for p in folder.iterdir() if _DISTRIBUTED.match(p.name)):
        raise Unsupported(
            f"{folder}: {shards[0]} is a part of a distributed checkpoint, which would be read in place of the model",
            hint="consolidate it with save_pretrained(), or move these files out",
        )
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise Corrupt(f"{index}: no weight_map")
    files = sorted(set(names.values()))
    for name in files:
        if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise Corrupt(f"{index}: {name!r} is not the name of a shard in this folder")
        if not (folder / name).is_file():
            raise Corrupt(f"{folder}: the shard {name} is missing", hint="fetch the checkpoint again")
    return [folder / name for name in files]


def _slices(file: Path) -> dict[str, _Slice]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise Corrupt(f"{file}: not a safetensors file, or cut short")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            out = {
                name: _Slice(file, e["dtype"], tuple(e["shape"]), *(8 + length + at for at in e["data_offsets"]))
                for name, e in header.items()
            }
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise Corrupt(f"{file}: damaged safetensors header") from None
    for name, part in out.items():
        if not 8 + length <= part.begin <= part.end <= size:
            raise Corrupt(f"{file}: the tensor {name} lies outside the file; it was cut short")
    return out


def _weights(folder: Path, sha: Any) -> None:
    tensors: dict[str, _Slice] = {}
    for file in weight_files(folder):
        for name, part in _slices(file).items():
            if name in tensors:
                raise Corrupt(f"{folder}: the tensor {name} is in both {tensors[name].file.name} and {file.name}")
            tensors[name] = part
    if not tensors:
        raise Unsupported(f"{folder}: no .safetensors weights to digest")
    for name in sorted(tensors):
        part = tensors[name]
        sha.update(json.dumps([name, part.dtype, part.shape]).encode() + b"\n")
        with part.file.open("rb") as stream:
            stream.seek(part.begin)
            left = part.end - part.begin
            while left:
                block = stream.read(min(_BLOCK, left))
                if not block:
                    raise Corrupt(f"{part.file}: ends within the tensor {name}")
                sha.update(block)
                left -= len(block)


def folder_digest(path: str | Path) -> str:
    """Return the SHA-256 (hex) of what determines a checkpoint's behaviour.

    Raises:
        Unsupported: no safetensors weights, or a model with an adapter beside it.
        Corrupt: a damaged or incomplete file.
    """
    folder = Path(path)
    sha = hashlib.sha256(b"casehard folder digest 1\n")
    _weights(folder, sha)
    for name in _JSON:
        if (folder / name).is_file():
            value = read_json(folder / name)
            if isinstance(value, dict):
                value = {key: item for key, item in value.items() if key not in _VOLATILE}
            sha.update(f"{name}\n{json.dumps(value, sort_keys=True)}\n".encode())
    templates = sorted(f"{TEMPLATES}/{p.name}" for p in (folder / TEMPLATES).glob("*.jinja"))
    for name in (*_BYTES, *templates):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            sha.update(f"{name} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def weights_digest(net: Any) -> str:
    """Return SHA-256 (hex) of a module's tensors as they are in memory: names, dtypes, shapes, bytes.

    A model's own digest is of where it came from, and says nothing of what a caller did to its weights since.
    """
    from casehard.model.lora_files import tensor_digest

    return digest({name: tensor_digest(tensor) for name, tensor in net.state_dict().items()})


def tokenizer_digests(tokenizer: Any) -> tuple[str, str]:
    """Return SHA-256 (hex) of a fast tokenizer's rules, without its padding state, and of its chat template."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("padding", "truncation"):
        rules.pop(key, None)
    text = json.dumps(rules, sort_keys=True)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), hashlib.sha256(template.encode()).hexdigest()
