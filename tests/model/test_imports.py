"""Whatever a model comes as, an ordinary folder is made of it that computes the same; or nothing is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from casehard.data.chat_templates import SHIPPED, choose_template
from casehard.data.template import ChatTemplate
from casehard.errors import ConfigError, Corrupt, MissingExtra, Refused, Unsupported, UserError
from casehard.io.manifest import file_digest, verify
from casehard.model import imports
from casehard.model.gguf_header import read_header
from casehard.model.headers import read_headers
from casehard.model.imports import Wanted, import_model
from casehard.model.load import load, load_tokenizer
from casehard.model.lora_files import write_marker
from casehard.types import Message
from fake_hub import FakeHub, commit, serving, use
from fakes import tiny_llama
from gguf_fakes import TEMPLATE, VOCABULARY, write_folder, write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:padding with")
IDS = torch.arange(3, 40).unsqueeze(0)


def model(**how: Any) -> Any:
    return tiny_llama(vocab=len(VOCABULARY), **how).eval()


@torch.no_grad()
def logits(net: Any) -> torch.Tensor:
    return net(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("imports") / "plain", model())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    served = FakeHub()
    with serving(served) as url:
        use(monkeypatch, tmp_path / "cache", url)
        yield served


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "casehard.json").read_text())["provenance"]["import"]


def nothing_but(place: Path, *names: str) -> bool:
    return {path.name for path in place.iterdir()} == set(names)


# -- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_keeps_its_dtype_and_its_logits(tmp_path: Path, dtype: str) -> None:
    net = model().to(getattr(torch, dtype))
    write_folder(tmp_path / "in", net)
    made = import_model(tmp_path / "in", tmp_path / "out", Wanted(licence="mit"))
    verify(tmp_path / "out")
    assert made.agreement.largest == 0.0 and made.agreement.tokens > 50
    found = load(tmp_path / "out")
    assert torch.equal(logits(found.net), logits(load(tmp_path / "in").net))
    assert read_headers(tmp_path / "out") == read_headers(tmp_path / "in")
    said = record(tmp_path / "out")
    assert (said["kind"], said["source"], said["dtype"], said["licence"]) == ("folder", "in", dtype, "mit")
    assert said["sha256"] == found.parent and said["verified"]["largest"] == 0.0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and said["sha256"] in card and str(tmp_path) not in card


def test_a_dtype_that_rounds_is_allowed_what_it_rounds(folder: Path, tmp_path: Path) -> None:
    made = import_model(folder, tmp_path / "out", Wanted(dtype="bfloat16"))
    assert 0 < made.agreement.relative < 0.02 < made.agreement.allowed
    assert {t.dtype for t in read_headers(tmp_path / "out").values()} == {"BF16"}
    assert record(tmp_path / "out")["converted"] == "F32 to bfloat16"
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        import_model(folder, tmp_path / "no", Wanted(dtype="int8"))


def test_what_computes_something_else_is_refused_and_nothing_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    write = PreTrainedModel.save_pretrained

    def wrong(self: Any, *arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            self.model.layers[0].mlp.down_proj.weight += 0.05
        return write(self, *arguments, **named)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", wrong)
    with pytest.raises(Refused, match=r"computes something else than its source: logits differ by .* allows 0.0001"):
        import_model(folder, tmp_path / "deep" / "out")
    assert nothing_but(tmp_path / "deep")


def test_what_was_known_of_a_checkpoint_stays_known(folder: Path, tmp_path: Path) -> None:
    from casehard.model.save import save

    one = load(folder)
    known = {"trained_prompts": ["2:ab"], "origin": "org/name@abc", "serving_system": "Be kind."}
    save(one.net, one.tokenizer, tmp_path / "in", parent="", method="plain", provenance=known)
    import_model(tmp_path / "in", tmp_path / "out")
    made = load(tmp_path / "out")
    assert (made.trained_prompts, made.origin, made.served_with) == ({"2:ab"}, "org/name@abc", "Be kind.")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", model())
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(Unsupported, match="quantised with bitsandbytes"):
        import_model(tmp_path / "in", tmp_path / "out")
    assert nothing_but(tmp_path, "in")


def test_a_hub_model_says_its_commit_and_licence(hub: FakeHub, tmp_path: Path) -> None:
    served = write_folder(tmp_path / "served", model())
    (served / "README.md").write_text("---\nlanguage: en\nlicense: cc-by-4.0\n---\n# Model\n")
    hub.add("org/small", served)
    import_model("org/small", tmp_path / "out")
    said = record(tmp_path / "out")
    assert (said["source"], said["revision"], said["licence"]) == ("org/small", commit(1), "cc-by-4.0")
    assert load(tmp_path / "out").origin == f"org/small@{commit(1)}"


def test_pickles_of_the_hub_are_fetched_only_when_allowed(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/old", pickled(tmp_path / "served", model()))
    with pytest.raises(Unsupported, match=r"org/old has no \.safetensors weights on the Hub") as caught:
        import_model("org/old", tmp_path / "out")
    assert "--allow-pickle" in caught.value.hint and not any("pytorch_model" in asked for asked in hub.asked)
    made = import_model("org/old", tmp_path / "out", Wanted(allow_pickle=True))
    assert made.record["revision"] == commit(1) and list(made.record["sha256"]) == ["pytorch_model.bin"]
    assert torch.equal(logits(load(tmp_path / "out").net), logits(model()))


def test_one_gguf_file_of_a_hub_model_is_fetched(hub: FakeHub, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    for name in ("a-Q4.gguf", "a-F32.gguf"):
        (tmp_path / "served" / name).write_bytes(packed.read_bytes())
    (tmp_path / "served" / "README.md").write_text("# a")
    hub.add("org/packed", tmp_path / "served")
    with pytest.raises(Unsupported, match="org/packed has no") as caught:
        import_model("org/packed", tmp_path / "out")
    assert "--gguf FILE" in caught.value.hint
    made = import_model("org/packed", tmp_path / "out", Wanted(gguf="a-F32.gguf"))
    assert (made.record["source"], made.record["file"]) == ("org/packed", "a-F32.gguf")
    assert not any("a-Q4.gguf" in asked for asked in hub.asked)
    assert load(tmp_path / "out").origin == f"org/packed@{commit(1)}"


# -- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model(), license="apache-2.0")


def test_a_gguf_file_becomes_the_model_it_was_made_of(packed: Path, tmp_path: Path) -> None:
    made = import_model(packed, tmp_path / "out")
    found = load(tmp_path / "out")
    assert torch.equal(logits(found.net), logits(model()))
    assert found.tokenizer.chat_template == TEMPLATE
    assert found.tokenizer.convert_tokens_to_ids(["<|im_end|>", "the"]) == [2, VOCABULARY.index("the")]
    said = record(tmp_path / "out")
    assert (said["kind"], said["sha256"], said["licence"]) == ("GGUF", file_digest(packed), "apache-2.0")
    assert said["converted"] == "F32 dequantised to float32" and made.agreement.largest == 0.0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = import_model(tmp_path / "out", tmp_path / "half", Wanted(dtype="float16"))
    assert again.record["before"]["sha256"] == file_digest(packed) and again.record["licence"] == "apache-2.0"


def test_a_folder_with_one_gguf_file_is_that_file_and_of_several_one_is_named(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    net = model(hidden=64)
    one = write_gguf(tmp_path / "in" / "one.gguf", net, quantised=True)
    made = import_model(tmp_path / "in", tmp_path / "out")
    assert made.record["converted"] == "F32, Q8_0 dequantised to float32"
    assert 0 < (logits(load(tmp_path / "out").net) - logits(net)).abs().max() < 0.02
    (tmp_path / "in" / "two.gguf").write_bytes(packed.read_bytes())
    with pytest.raises(ConfigError, match=r"2 GGUF files: one.gguf, two.gguf") as caught:
        import_model(tmp_path / "in", tmp_path / "again")
    assert "--gguf FILE" in caught.value.hint
    assert import_model(tmp_path / "in", tmp_path / "again", Wanted(gguf="one.gguf")).record["sha256"] == file_digest(
        one
    )
    with pytest.raises(ConfigError, match=r"no GGUF file '../x.gguf'"):
        import_model(tmp_path / "in", tmp_path / "no", Wanted(gguf="../x.gguf"))


def test_a_damaged_gguf_file_is_called_one(packed: Path, tmp_path: Path) -> None:
    data, bad = packed.read_bytes(), tmp_path / "bad.gguf"
    one_layer_less = data.replace(b"blk.1.", b"blk.7.")
    lacking = data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    tokens = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    assert data[tokens : tokens + 8] == len(VOCABULARY).to_bytes(8, "little")
    many = [data[:at] + (1 << 40).to_bytes(8, "little") + data[at + 8 :] for at in (8, 16, tokens, tokens + 8)]
    cases = [(b"", "not a GGUF"), (b"PK" + data[2:], "not a GGUF"), (data[:3000], "damaged or cut short")]
    cases += [(content, "promises more than the file holds") for content in many]
    cases += [(data[:-64], "ends beyond the file"), (one_layer_less, "holds tensors of 2"), (lacking, "1 missing keys")]
    for content, said in cases:
        bad.write_bytes(content)
        with pytest.raises(Corrupt, match=said):
            import_model(bad, tmp_path / "out")
    for content, said in (
        (data[:4] + b"\1\0\0\0" + data[8:], "version 1"),
        (data[:4] + data[7:3:-1], "version 50331648"),
    ):
        bad.write_bytes(content)
        with pytest.raises(Unsupported, match=said):
            import_model(bad, tmp_path / "out")
    assert nothing_but(tmp_path, "bad.gguf")


def test_no_flipped_byte_of_a_gguf_header_hangs_or_escapes(packed: Path, tmp_path: Path) -> None:
    data, bad, told = packed.read_bytes(), tmp_path / "bad.gguf", 0
    end = data.index(b"output_norm.weight")
    for at in range(4, end, 61):
        bad.write_bytes(data[:at] + bytes([data[at] ^ 0x84]) + data[at + 1 :])
        try:
            read_header(bad)
        except UserError as error:
            assert bad.name in error.message
            told += 1
    assert told, "some of them cannot be read as a header"


def test_a_gguf_file_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "odd.gguf", model(), architecture="zork")
    with pytest.raises(Unsupported, match="cannot be read as a causal language model"):
        import_model(file, tmp_path / "out")


def test_without_its_reader_a_gguf_file_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingExtra, match="'gguf' is not installed") as caught:
        import_model(tmp_path / "x.gguf", tmp_path / "out")
    assert caught.value.hint == "pip install 'casehard[gguf]'"


# -- pickles --------------------------------------------------------------------------------------------------------


def pickled(folder: Path, net: Any, parts: int = 1) -> Path:
    """Write a folder whose weights are pickles."""
    write_folder(folder, net)
    (folder / "model.safetensors").unlink()
    state = list(net.state_dict().items())
    if parts == 1:
        torch.save(dict(state), folder / "pytorch_model.bin")
        return folder
    places = {}
    for part in range(parts):
        name = f"pytorch_model-{part + 1:05}-of-{parts:05}.bin"
        torch.save(dict(state[part::parts]), folder / name)
        places |= {key: name for key, _ in state[part::parts]}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(("parts", "tied"), [(1, True), (3, False), (3, True)])
def test_pickled_weights_are_converted_when_allowed(tmp_path: Path, parts: int, tied: bool) -> None:
    net = model()
    if tied:
        net.config.tie_word_embeddings = True
        net.tie_weights()
    place = pickled(tmp_path / "in", net, parts)
    with pytest.raises(Unsupported, match=r"no .safetensors weights; only pytorch_model") as caught:
        import_model(place, tmp_path / "out")
    assert "can run code" in caught.value.hint and f"model import {place} --allow-pickle" in caught.value.hint
    made = import_model(place, tmp_path / "out", Wanted(allow_pickle=True))
    assert torch.equal(logits(load(tmp_path / "out").net), logits(net))
    assert ("lm_head.weight" in read_headers(tmp_path / "out")) is not tied
    assert len(made.record["sha256"]) == parts and made.record["kind"] == "pickled folder"
    assert nothing_but(tmp_path, "in", "out") and not list((tmp_path / "out").glob("*.bin"))


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("content", ["code", "nested", "cut", "empty", "foreign"])
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path: Path, content: str) -> None:
    place = pickled(tmp_path / "in", model())
    file = place / "pytorch_model.bin"
    if content == "code":
        torch.save({"a": _Evil()}, file)
    elif content == "nested":
        torch.save({"model": torch.load(file, weights_only=True)}, file)
    elif content == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif content == "foreign":
        torch.save({"other.weight": torch.zeros(3, 3)}, file)
    else:
        torch.save({}, file)
    with pytest.raises((Unsupported, Corrupt)) as caught:
        import_model(place, tmp_path / "out", Wanted(allow_pickle=True))
    assert str(place) in caught.value.message and ".staging" not in caught.value.message
    assert nothing_but(tmp_path, "in")


# -- adapters -------------------------------------------------------------------------------------------------------


def adapter(place: Path, base: str) -> Path:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        wrapped = get_peft_model(model(), config)
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.data = 0.3 * torch.randn_like(weight)
        wrapped.peft_config["default"].base_model_name_or_path = base
        wrapped.save_pretrained(place)
    return place


def test_an_adapter_is_merged_into_its_base(folder: Path, tmp_path: Path) -> None:
    place = adapter(tmp_path / "adapter", str(folder))
    made = import_model(place, tmp_path / "out")
    assert made.agreement.relative < 1e-5
    found = load(tmp_path / "out")
    assert (logits(found.net) - logits(model())).abs().max() > 0.1
    said = record(tmp_path / "out")
    assert said["kind"] == "adapter" and said["base"]["sha256"] == found.parent == load(folder).digest
    with pytest.raises(Unsupported, match="a PEFT adapter without its base") as caught:
        load(place)
    assert f"casehard model import {place} --base MODEL" in caught.value.hint


def test_an_adapter_whose_base_is_elsewhere_asks_for_it(folder: Path, tmp_path: Path) -> None:
    place = adapter(tmp_path / "adapter", "./their/base")
    with pytest.raises(ConfigError, match=r"its base '\./their/base'") as caught:
        import_model(place, tmp_path / "out")
    assert "--base MODEL" in caught.value.hint
    assert import_model(place, tmp_path / "out", Wanted(base=str(folder))).agreement.relative < 1e-5
    with pytest.raises(ConfigError, match="a whole model, and --base"):
        import_model(folder, tmp_path / "no", Wanted(base=str(folder)))


def test_adapters_that_must_not_be_merged_are_refused(folder: Path, tmp_path: Path) -> None:
    place = adapter(tmp_path / "adapter", str(folder))
    write_marker(place, "user", base_digest="0" * 64)
    with pytest.raises(UserError, match="was made for the base 000000000000"):
        import_model(place, tmp_path / "out")
    write_marker(place, "buffer")
    with pytest.raises(UserError, match="marked as a buffer"):
        import_model(place, tmp_path / "out")
    assert nothing_but(tmp_path, "adapter")


def test_a_pickled_adapter_needs_the_flag_too(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from casehard.model.lora_files import AdapterReader

    place = adapter(tmp_path / "adapter", str(folder))
    import_model(place, tmp_path / "first")
    torch.save(load_file(place / "adapter_model.safetensors"), place / "adapter_model.bin")
    (place / "adapter_model.safetensors").unlink()
    for read in (lambda: import_model(place, tmp_path / "out"), lambda: AdapterReader(place)):
        with pytest.raises(Unsupported) as caught:
            read()
        assert f"casehard model import {place} --allow-pickle" in caught.value.hint
    import_model(place, tmp_path / "out", Wanted(allow_pickle=True))
    assert load(tmp_path / "out").digest == load(tmp_path / "first").digest


# -- chat templates -------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_of_several_templates_one_is_chosen_by_name(tmp_path: Path) -> None:
    named = {"formal": "F{{ messages[0]['content'] }}", "short": "S{{ messages[0]['content'] }}"}
    place = write_folder(tmp_path / "in", model(), template=named)
    with pytest.raises(Unsupported, match="2 chat templates and no default: formal, short"):
        import_model(place, tmp_path / "out")
    with pytest.raises(ConfigError, match="no chat template is called 'shrot'") as caught:
        import_model(place, tmp_path / "out", Wanted(chat_template="shrot"))
    assert caught.value.hint == "shipped: chatml, llama-2, llama-3, plain; of the model: formal, short"
    assert nothing_but(tmp_path, "in")
    made = import_model(place, tmp_path / "out", Wanted(chat_template="short"))
    assert load(tmp_path / "out").tokenizer.chat_template == named["short"]
    assert made.record["chat_template"] == "its own, short"
    kept = write_folder(tmp_path / "both", model(), template=named | {"default": TEMPLATE})
    import_model(kept, tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").chat_template == named | {"default": TEMPLATE}


def test_a_missing_template_is_chosen_with_a_warning(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "in", model(), template=None)
    with pytest.warns(UserWarning, match="no chat template: 'chatml' is chosen, as the model has its tokens"):
        import_model(place, tmp_path / "out")
    assert load(tmp_path / "out").tokenizer.chat_template == SHIPPED["chatml"]
    with pytest.warns(UserWarning, match="'llama-3' is given to a model that has none, whose vocabulary lacks"):
        import_model(place, tmp_path / "other", Wanted(chat_template="llama-3"))
    tokenizer = load_tokenizer(place)
    tokenizer.get_vocab = lambda: {"a": 0}  # type: ignore[method-assign]
    assert choose_template(tokenizer).name == "plain"


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_render_here_as_in_transformers(folder: Path, name: str, ends: bool) -> None:
    tokenizer = load_tokenizer(folder)
    if not ends:
        tokenizer.bos_token = tokenizer.eos_token = None
    choose_template(tokenizer, name)
    talk = [*CHAT, {"role": "assistant", "content": "Hello."}]
    chat = ChatTemplate(tokenizer)
    for turns, prompt in ((CHAT, True), (talk, False)):
        there = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        assert chat.render([Message(t["role"], t["content"]) for t in turns], prompt=prompt).text == there
        assert "Be brief." in there and "None" not in there


def test_the_record_names_no_path_and_obeys_nobody(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "a[b](c).gguf", model(), license="<b>x</b>\n# injected")
    made = import_model(file, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<b>" not in card and "\n# injected" not in card and "](" not in card
    assert json.loads((tmp_path / "out" / "casehard.json").read_text())["method"] == imports.METHOD
    assert str(tmp_path) not in json.dumps(made.record)
