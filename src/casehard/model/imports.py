"""Bring a model into the house: whatever it comes as, an ordinary safetensors folder with a record is made of it.

1. Say what the source is: a folder with safetensors weights in any dtype, a GGUF file, pickled weights (only when
   allowed), or an adapter; local or of the Hub.
2. Read it in float32, under the checks of :mod:`casehard.model.load`, and take its logits on a text.
3. Choose the chat template, store the weights in the dtype asked for.
4. Load what was written, take the logits again: where they differ by more than the dtype allows, nothing is left.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from casehard.data.chat_templates import choose_template
from casehard.errors import ConfigError, DataError, Unsupported, UserError
from casehard.io.files import read_json, scratch
from casehard.io.manifest import MANIFEST, file_digest, verify
from casehard.model.check import check_folder, trusting
from casehard.model.digest import folder_digest, weight_files
from casehard.model.headers import read_headers
from casehard.model.load import DTYPES, load, load_tokenizer
from casehard.model.lora import read_lora
from casehard.model.lora_files import CONFIG, read_marker, refuse_buffer
from casehard.model.pickled import ADAPTER, pickles_of, unpickle
from casehard.model.probe import Agreement, compare, probe, probe_ids
from casehard.model.provenance import KEY, SERVED, read_provenance, served_with, trained_prompts
from casehard.model.save import save
from casehard.model.source import ORIGIN, HubModel, find, origin, read
from casehard.types import Checkpoint

METHOD = "import"
CARD = "README.md"
_STORED = {"F64": 3, "F32": 2, "BF16": 1, "F16": 1}
"""Bits of precision, roughly: mixed folders are stored in what loses nothing."""
_NAMES = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LICENCE = re.compile(r"^licen[sc]e:[ \t]*[\"']?([\w.+-]{1,60})[\"']?[ \t]*$", re.MULTILINE)

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of an import."""

    base: str = ""
    """Model that an adapter is merged into; by default the one that the adapter names."""
    gguf: str = ""
    """Name of the GGUF file in a folder or Hub model that has several."""
    dtype: str = "auto"
    """What the weights are stored in: float32, bfloat16, float16, or auto for what the source has (GGUF: float32)."""
    allow_pickle: bool = False
    """Whether pickled weights are read, tensors only."""
    chat_template: str = ""
    """See :func:`casehard.data.chat_templates.choose_template`."""
    licence: str = ""
    """Wins over what the source says."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further facts for the record: the package a file came in."""


class Imported(NamedTuple):
    """A model that was brought in."""

    checkpoint: Checkpoint
    record: dict[str, Any]
    """What ``casehard.json`` says of it under ``import``."""
    agreement: Agreement


@dataclass(frozen=True)
class _Source:
    """A source, read."""

    kind: str
    net: nn.Module
    tokenizer: Any
    stored: str
    """dtype that loses nothing."""
    converted: str
    parent: str = ""
    """Content digest, where the source is a model folder."""
    logits: torch.Tensor | None = None
    """Taken before anything was merged."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    carried: Mapping[str, Any] = field(default_factory=dict)
    """What is known of its training."""


def import_model(
    given: str | Path, out: str | Path, wanted: Wanted | None = None, *, tell: Tell | None = None
) -> Imported:
    """Make an ordinary model folder of a model in another form, and show that it computes the same.

    Args:
        given: Hub id, model folder, GGUF file, or adapter folder.
        out: the folder to make; whole or absent.
        wanted: what is asked for.
        tell: called with a line before the Hub is asked.

    Raises:
        ConfigError: no such source, file or chat template.
        Unsupported: pickled weights that were not allowed, quantised weights, an architecture that is not read.
        MissingExtra: a GGUF file without the package that reads it.
        Corrupt: a damaged file.
        Refused: what was written computes something else; nothing is left.
        StorageError: the disk refused the write; nothing is left.
    """
    wanted, out = wanted or Wanted(), Path(out)
    if wanted.dtype not in ("auto", *DTYPES):
        raise ConfigError(f"unknown dtype {wanted.dtype!r}", hint=f"one of auto, {', '.join(DTYPES)}")
    place, hub = _place(given, wanted, tell)
    source = _read(place, out, wanted, tell)
    template = choose_template(source.tokenizer, wanted.chat_template)
    if template.note:
        warnings.warn(template.note, stacklevel=2)
    config: Any = source.net.config
    ids = probe_ids(source.tokenizer, context=getattr(config, "max_position_embeddings", None))
    if not ids or max(ids) >= int(config.get_text_config().vocab_size):
        raise DataError(f"{given}: the tokenizer does not belong to the model", hint="its tokens have no embedding")
    before = probe(source.net, ids) if source.logits is None else source.logits
    name = source.stored if wanted.dtype == "auto" else wanted.dtype
    record = _record(place, hub, source, wanted, name) | {"chat_template": template.name}
    agreed: list[Agreement] = []

    def check(folder: Path) -> Mapping[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told when the source was read
            made = load(folder)
        if probe_ids(made.tokenizer, context=len(ids)) != ids:
            raise DataError(f"{given}: the tokenizer reads a text otherwise once it is saved", hint="nothing is left")
        agreed.append(compare(before, probe(made.net, ids), DTYPES[name]))
        record["verified"] = agreed[0]._asdict()
        (folder / CARD).write_text(_card(record), encoding="utf-8")
        return {METHOD: record}

    carried = {**source.carried, **({ORIGIN: str(hub)} if hub else {})}
    net = source.net.to(DTYPES[name])
    done = save(net, source.tokenizer, out, parent=source.parent, method=METHOD, provenance=carried, check=check)
    return Imported(done, record, agreed[0])


# -- what the source is -----------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    path: Path
    """A GGUF file, or a folder."""
    pickled: bool = False


def _place(given: str | Path, wanted: Wanted, tell: Tell | None) -> tuple[_Place, HubModel | None]:
    """Return where the source lies, fetched from the Hub where it is not local, and the Hub model with its commit."""
    if Path(given).suffix == ".gguf" and Path(given).is_file():
        return _Place(Path(given)), None
    found = read(given)
    also = (CARD, *([wanted.gguf] if wanted.gguf else []))
    folder = found if isinstance(found, Path) else find(given, tell=tell, also=also)
    hub = None if isinstance(found, Path) else _commit(folder)
    if wanted.gguf:
        return _Place(_inside(folder, wanted.gguf)), hub
    weights = weight_files(folder)
    if hub and not weights and wanted.allow_pickle:
        folder = find(given, tell=tell, also=(*also, "pytorch_model*.bin", ADAPTER))
    if weights:
        return _Place(folder), hub
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) == 1:
        return _Place(packed[0]), hub
    if packed:
        names = ", ".join(path.name for path in packed[:6])
        raise ConfigError(f"{given}: {len(packed)} GGUF files: {names}", hint="name one of them with --gguf FILE")
    if pickles_of(folder):
        if not wanted.allow_pickle:
            text = f"{given}: no .safetensors weights; only {pickles_of(folder)[0].name}"
            raise Unsupported(text, hint=trusting(folder))
        return _Place(folder, pickled=True), hub
    if hub:
        raise Unsupported(
            f"{given} has no .safetensors weights on the Hub",
            hint="where it has GGUF files, name one with --gguf FILE; for pytorch_model.bin, --allow-pickle",
        )
    check_folder(folder)  # says what is missing
    raise DataError(f"{folder}: not a model folder")


def _commit(folder: Path) -> HubModel:
    name, _, revision = origin(folder).partition("@")
    return HubModel(name, revision)


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
        there = ", ".join(p.name for p in sorted(folder.glob("*.gguf"))[:6]) or "none"
        raise ConfigError(f"{folder}: no GGUF file {name!r}", hint=f"GGUF files there: {there}")
    return path


# -- reading it -------------------------------------------------------------------------------------------------------


def _read(place: _Place, out: Path, wanted: Wanted, tell: Tell | None) -> _Source:
    if place.path.suffix == ".gguf" and place.path.is_file():
        return _gguf(place.path)
    if not place.pickled:
        return _folder(place.path, wanted, tell)
    files = pickles_of(place.path)
    with scratch(out, needs=sum(path.stat().st_size for path in files)) as plain:
        unpickle(place.path, plain)
        with _called(plain, place.path):
            found = _folder(plain, wanted, tell)
    digests = {path.name: file_digest(path) for path in files}
    converted = f"pickled {found.converted}"
    return replace(found, kind=f"pickled {found.kind}", facts={**found.facts, "sha256": digests}, converted=converted)


@contextmanager
def _called(copy: Path, folder: Path) -> Iterator[None]:
    """Let errors about a copy name the folder it was made of."""
    try:
        yield
    except UserError as error:
        error.message, error.hint = (text.replace(str(copy), str(folder)) for text in (error.message, error.hint))
        raise


def _gguf(file: Path) -> _Source:
    from casehard.model.gguf_file import read_gguf

    net, tokenizer, facts = read_gguf(file)
    said = {"sha256": file_digest(file), "named": _plain(facts.name), "licence": facts.licence or _licence(file.parent)}
    return _Source("GGUF", net, tokenizer, "float32", f"{', '.join(facts.kinds)} dequantised", facts=said)


def _folder(folder: Path, wanted: Wanted, tell: Tell | None) -> _Source:
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        return _adapter(folder, wanted, tell)
    if wanted.base:
        raise ConfigError(f"{folder}: a whole model, and --base {wanted.base}", hint="--base is for adapters")
    stored = _stored(folder)
    model = load(folder)
    known = read_provenance(folder).get("provenance", {})
    return _Source(
        "folder",
        model.net,
        model.tokenizer,
        stored.dtype,
        stored.told,
        parent=model.digest,
        facts={"sha256": model.digest, "licence": _licence(folder), "before": _before(known)},
        carried={key: known[key] for key in (KEY, SERVED, ORIGIN) if known.get(key)},
    )


def _before(known: Mapping[str, Any]) -> dict[str, str]:
    """Return where a folder that was imported once already came from."""
    earlier = known.get(METHOD)
    told = ("source", "revision", "file", "sha256", "package", "original", "converted")
    return {key: _plain(earlier[key]) for key in told if earlier.get(key)} if isinstance(earlier, dict) else {}


class _Stored(NamedTuple):
    dtype: str
    told: str


def _stored(folder: Path) -> _Stored:
    """Return what the weights of a folder are stored in.

    Raises:
        Unsupported: packed in a quantised form.
    """
    settings = check_folder(folder).config.get("quantization_config")
    if settings:
        kind = settings.get("quant_method", "an unnamed method") if isinstance(settings, dict) else str(settings)
        hint = "take the original, unquantised weights: an attack or a defence trains plain numbers"
        raise Unsupported(f"{folder}: quantised with {kind}", hint=hint)
    kinds = Counter(tensor.dtype for tensor in read_headers(folder).values() if tensor.dtype in _STORED)
    # Halves of two kinds have no common half.
    widest = max(kinds, key=lambda kind: (_STORED[kind], kinds[kind])) if kinds else "F32"
    dtype = "float32" if {"BF16", "F16"} <= set(kinds) else _NAMES[widest]
    return _Stored(dtype, ", ".join(sorted(kinds)) or "no floating-point numbers")


def _adapter(folder: Path, wanted: Wanted, tell: Tell | None) -> _Source:
    refuse_buffer(folder)
    if (folder / MANIFEST).is_file():
        verify(folder)
    settings = read_json(folder / CONFIG)
    named = wanted.base or (settings.get("base_model_name_or_path") if isinstance(settings, dict) else "")
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{folder}: an adapter that names no base model", hint="give it with --base MODEL")
    try:
        base = find(named, tell=tell)
    except ConfigError as error:
        hint = error.hint if wanted.base else "give the base where it is now, with --base MODEL"
        raise ConfigError(f"{folder}: its base {named!r}: {error.message}", hint=hint) from None
    stored = _stored(base)
    model = load(base)
    bound = (read_marker(folder) or {}).get("base_digest")
    if bound and bound != model.digest:
        hint = "give the base that it was made for, with --base MODEL"
        raise UserError(f"{folder} was made for the base {bound[:12]}, {named} is {model.digest[:12]}", hint=hint)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else model.tokenizer
    wrapped: Any = read_lora(model.net, folder).eval()
    context = getattr(wrapped.config, "max_position_embeddings", None)
    before = probe(wrapped, probe_ids(tokenizer, context=context))
    marks = sorted(trained_prompts(folder, base))
    carried = {KEY: marks, SERVED: served_with(folder) or served_with(base), ORIGIN: model.origin}
    facts = {
        "sha256": folder_digest(folder),
        "base": {"named": _plain(Path(named).name if Path(named).is_dir() else named), "sha256": model.digest},
        "licence": _licence(folder) or _licence(base),
    }
    return _Source(
        "adapter",
        wrapped.merge_and_unload(safe_merge=True),
        tokenizer,
        stored.dtype,
        f"merged into its base ({stored.told})",
        parent=model.digest,
        logits=before,
        facts=facts,
        carried={key: value for key, value in carried.items() if value},
    )


def _licence(folder: Path) -> str:
    """Return the licence that the head of a model's readme names; empty where there is none."""
    file = folder / CARD
    if not file.is_file() or file.stat().st_size > 1 << 20:
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")
    head = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = _LICENCE.search(head)
    return found[1] if found else ""


# -- the record -------------------------------------------------------------------------------------------------------


def _plain(text: object) -> str:
    """Return what a stranger's file says as text that Markdown takes literally."""
    return re.sub(r"[^\w .,:;@/+()=%-]", "?", str(text))[:200]


def _record(place: _Place, hub: HubModel | None, source: _Source, wanted: Wanted, dtype: str) -> dict[str, Any]:
    facts = {key: value for key, value in source.facts.items() if value and key != "licence"}
    return {
        "kind": source.kind,
        "source": hub.name if hub else _plain(place.path.resolve().name),
        **({"revision": hub.revision} if hub else {}),
        **({"file": _plain(place.path.name)} if hub and place.path.is_file() else {}),
        **facts,
        **wanted.facts,
        "licence": _plain(wanted.licence or source.facts.get("licence") or "unknown"),
        "converted": f"{source.converted} to {dtype}",
        "dtype": dtype,
    }


def _card(record: Mapping[str, Any]) -> str:
    """Return the model card of an import."""
    licence = str(record["licence"])
    head = ["---", f"license: {licence}", "---", ""] if re.fullmatch(r"[a-z0-9.+-]+", licence) else []
    seen = record["verified"]
    lines = []
    for key, value in record.items():
        if isinstance(value, Mapping) and key != "verified":
            lines += [f"- {key}, {_plain(name)}: `{_plain(item)}`" for name, item in value.items()]
        elif key != "verified":
            lines.append(f"- {key}: {_plain(value)}")
    return "\n".join(
        [
            *head,
            f"# {record['source']}, imported",
            "",
            "This folder was made by casehard from a model in another form. Nothing was trained.",
            "",
            *lines,
            f"- checked on a text of {seen['tokens']} tokens: logits differ from the source's by at most "
            f"{seen['largest']:.3g} ({seen['relative']:.2g} of their spread; {seen['allowed']:.2g} is allowed)",
            "",
            "The terms of the source hold for it. It was not hardened and not measured here.",
            "",
        ]
    )
