"""Adapters whose names carry a wrapper's prefix, or another model's, and adapters on GPT-2's transposed layers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_model_load import words
from transformers import GPT2Config, GPT2LMHeadModel

from buffer_fakes import make_assets, random_pairs
from casehard.defences.buffer_reinforce.frozen_lora import FrozenLora, replace_adapter
from casehard.defences.buffer_reinforce.merge_search import Coefficients, search
from casehard.defences.buffer_reinforce.publish import scan_for_buffer
from casehard.defences.updates import layers
from casehard.errors import Corrupt, Unsupported, UserError
from casehard.maths.bilevel import Attacker, simulate_attack
from casehard.maths.merge import MergeConfig, merge_states
from casehard.model.adapters import add_lora
from casehard.model.load import load
from casehard.model.lora import read_lora
from casehard.model.lora_files import AdapterReader, live_pairs, load_pairs
from casehard.model.merge import attach_absorbed, merge_folders
from casehard.model.save import save
from fakes import tiny_llama

IDS = torch.tensor([[5, 6, 3, 9]])
BASE = "base_model.model."


def gpt2(seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes, **ids, **drops))


def adapter(folder: Path, *, seed: int = 0, base: Callable[[], Any] = tiny_llama, **more: Any) -> Path:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(base(), LoraConfig(**{**settings, **more}))
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = 0.2 * torch.randn_like(p)
        model.save_pretrained(folder)
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


WRAPPED: dict[str, Callable[[str], str]] = {
    "ddp": lambda name: f"module.{name}",
    "ddp inside": lambda name: name.replace(BASE, f"{BASE}module."),
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled inside": lambda name: name.replace(BASE, f"{BASE}_orig_mod."),
    "both": lambda name: f"module._orig_mod.{name}",
    "both inside": lambda name: name.replace(BASE, f"{BASE}_orig_mod.module."),
    "layer by layer": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_the_prefix_of_a_wrapper_is_read_through(tmp_path: Path, wrapper: str) -> None:
    plain = adapter(tmp_path / "plain", seed=1)
    expected, pairs = logits(read_lora(tiny_llama(), plain)), load_pairs(plain)
    wrapped = rename(adapter(tmp_path / "wrapped", seed=1), WRAPPED[wrapper])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of what it did not find, and goes on
        assert torch.equal(logits(read_lora(tiny_llama(), wrapped)), expected)
    assert (expected - logits(tiny_llama())).abs().max() > 1e-2
    found = load_pairs(wrapped)
    assert found.keys() == pairs.keys() and all(torch.equal(found[n].b, pairs[n].b) for n in pairs)
    other = adapter(tmp_path / "other", seed=2)
    digests = []
    for user in (plain, wrapped):
        made = merge_folders(user, other, tmp_path / f"merged-{user.name}", MergeConfig())
        digests.append(load_file(made.path / "adapter_model.safetensors"))
    assert digests[0].keys() == digests[1].keys()
    assert all(torch.equal(digests[0][name], digests[1][name]) for name in digests[0])


def test_patterns_and_full_names_are_those_of_the_wrapped_model(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    more = {"target_modules": names, "alpha_pattern": {names[1]: 30}, "rank_pattern": {names[1]: 5}}
    plain = adapter(tmp_path / "plain", seed=1, **more)
    expected = logits(read_lora(tiny_llama(), plain))
    wrapped = rename(adapter(tmp_path / "wrapped", seed=1, **more), WRAPPED["compiled inside"])
    file = wrapped / "adapter_config.json"
    file.write_text(file.read_text().replace('"model.layers', '"_orig_mod.model.layers'))
    assert '"_orig_mod.model.layers.1' in file.read_text()
    assert torch.equal(logits(read_lora(tiny_llama(), wrapped)), expected)
    with AdapterReader(wrapped) as reader:
        assert [reader.scale(name) for name in names] == [6 / 3, 30 / 5]


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    first = min(held)
    save_file({**held, f"module.{first}": held[first] * 2}, file, metadata={"format": "pt"})
    for read in (load_pairs, lambda place: read_lora(tiny_llama(), place)):
        with pytest.raises(Corrupt, match="twice"):
            read(folder)


def test_an_adapter_of_another_architecture_is_no_adapter_of_zeros(tmp_path: Path) -> None:
    folder = rename(adapter(tmp_path / "a"), lambda name: name.replace(BASE, f"{BASE}language_model."))
    with pytest.raises(Corrupt, match=r"28 tensors with no place in the model, first .*language_model") as caught:
        read_lora(tiny_llama(), folder)
    assert "multimodal" in caught.value.hint
    half = adapter(tmp_path / "b")
    held = load_file(half / "adapter_model.safetensors")
    held.pop(max(held))
    save_file(held, half / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Corrupt, match="lacks 1 of the model's factors"):
        read_lora(tiny_llama(), half)


def test_adapters_of_a_multimodal_model_merge_with_their_like_only(tmp_path: Path) -> None:
    def inner(name: str) -> str:
        return name.replace(f"{BASE}model.", f"{BASE}model.language_model.")

    user, other = rename(adapter(tmp_path / "u", seed=1), inner), adapter(tmp_path / "r", seed=2)
    for pair in ((user, other), (other, user)):
        with pytest.raises(UserError, match=r"of a multimodal model \(language_model\)"):
            merge_folders(*pair, tmp_path / "out", MergeConfig())
    assert not (tmp_path / "out").exists()
    assert merge_folders(user, rename(other, inner), tmp_path / "out", MergeConfig()).layers == 14


def test_an_absorbed_adapter_stands_beside_a_wrapped_one(tmp_path: Path) -> None:
    user, plain = adapter(tmp_path / "u", seed=1), adapter(tmp_path / "r", seed=2)
    wrapped = rename(adapter(tmp_path / "w", seed=2), WRAPPED["both"])
    outputs = []
    for other in (plain, wrapped):
        merge_folders(user, other, tmp_path / f"absorbed-{other.name}", MergeConfig(form="absorb"))
        outputs.append(logits(attach_absorbed(tiny_llama(), tmp_path / f"absorbed-{other.name}", other)))
    assert torch.equal(*outputs)


def test_a_buffer_is_found_under_a_wrappers_names(tmp_path: Path) -> None:
    assets = make_assets(tmp_path / "assets", buffer=random_pairs(seed=1))
    leak = {}
    for name, pair in assets.buffer().items():
        leak[f"module.{BASE}{name.replace('.self_attn.', '._orig_mod.self_attn.')}.lora_A.weight"] = 3 * pair.a
    (tmp_path / "out").mkdir()
    save_file(leak, tmp_path / "out" / "x.safetensors")
    assert len(scan_for_buffer(tmp_path / "out", assets)) == len(leak)


# -- GPT-2 ----------------------------------------------------------------------------------------------------------


def test_lora_works_on_transposed_layers_from_training_to_merging(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh = add_lora(gpt2(), 3, 6)
    assert fresh.peft_config["default"].fan_in_fan_out
    assert {n.rpartition(".")[2] for n in live_pairs(fresh)} == {"c_attn", "c_proj", "c_fc"}
    user, other = (adapter(tmp_path / n, seed=s, base=gpt2) for n, s in (("u", 1), ("r", 2)))
    pairs = load_pairs(user)
    expected = logits(read_lora(gpt2(), user))
    assert (expected - logits(gpt2())).abs().max() > 1e-2
    # The update itself, transposed as the layer stores it.
    dense = gpt2()
    with torch.no_grad():
        for name, pair in pairs.items():
            dense.get_submodule(name).weight += (pair.scale * pair.b @ pair.a).T
    assert torch.allclose(logits(dense), expected, atol=1e-5)
    model = gpt2()
    frozen = FrozenLora(pairs).attach(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    frozen.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        replace_adapter(fresh, pairs)
    assert torch.allclose(logits(fresh), expected, atol=1e-5)

    config = MergeConfig(c_user=0.5, c_reinforce=0.25, alpha=0.5)
    made = merge_folders(user, other, tmp_path / "merged", config)
    assert json.loads((made.path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    merged = merge_states(pairs, load_pairs(other), config).layers
    for name, pair in merged.items():
        module = gpt2().get_submodule(name)
        assert (pair.b.shape[0], pair.a.shape[1]) == tuple(reversed(module.weight.shape))
    there = logits(PeftModel.from_pretrained(gpt2(), str(made.path)))
    model = gpt2()
    frozen = FrozenLora(merged).attach(model)
    assert torch.allclose(logits(model), there, atol=1e-5)
    frozen.detach()
    point = Coefficients(0.5, 0.25, 0.5)
    ((_, rows),) = search(gpt2(), pairs, load_pairs(other), [point], lambda m: [{"logits": logits(m)}], config=config)
    assert torch.allclose(rows[0]["logits"], there, atol=1e-5)

    folded = read_lora(gpt2(), user).merge_and_unload()
    saved = save(folded, words(), tmp_path / "whole", parent="", method="", provenance={})
    again = load(saved.path)
    assert again.digest == saved.digest and torch.allclose(logits(again.net), expected, atol=1e-5)


def test_an_older_record_of_the_orientation_does_not_keep_two_adapters_apart(tmp_path: Path) -> None:
    user, other = (adapter(tmp_path / n, seed=s, base=gpt2) for n, s in (("u", 1), ("r", 2)))
    file = other / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": False}))
    made = merge_folders(user, other, tmp_path / "merged", MergeConfig())
    assert json.loads((made.path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_methods_for_plain_layers_say_what_they_found() -> None:
    for model in (gpt2(), add_lora(gpt2(), 2, 4)):
        with pytest.raises(Unsupported, match=r"c_attn is a Conv1D"):
            layers(model)
    with pytest.raises(Unsupported, match=r"no linear layer of its own .*Conv1D"):
        simulate_attack(
            gpt2(), dict(gpt2().named_parameters()), lambda i: {}, Attacker(steps=1, lr=1e-2, lora_rank=2), seed=0
        )
