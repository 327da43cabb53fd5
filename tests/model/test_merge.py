"""Adapter folders: what may be read, what is made of two of them, and that plain PEFT computes the same with it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from buffer_fakes import off_the_user
from casehard.errors import Corrupt, DataError, Unsupported, UserError
from casehard.io.manifest import verify
from casehard.maths.merge import BASES, LoraPair, merge_states
from casehard.model.lora_files import (
    AdapterReader,
    load_pairs,
    read_marker,
    refuse_buffer,
    tensor_digests,
    write_marker,
)
from casehard.model.merge import attach_absorbed, merge_folders

_spec = importlib.util.spec_from_file_location("casehard_test_fakes", Path(__file__).resolve().parents[1] / "fakes.py")
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)

ATTENTION = ["q_proj", "v_proj"]
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def adapter(folder, *, seed=0, r=3, alpha=6, targets=ATTENTION, **more):
    """Save a random adapter of the tiny Llama with PEFT, as a user's trainer does."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **more)
        model = get_peft_model(fakes.tiny_llama(), config)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = 0.2 * torch.randn_like(p)
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path):
    return adapter(tmp_path / "user", seed=1), adapter(tmp_path / "reinforce", seed=2, r=5, alpha=5)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def shifted(deltas):
    """Logits of the base with dense updates added to its weights."""
    model = fakes.tiny_llama()
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        weight.data = (weight.data.double() + delta).float()
    return logits(model)


def loaded(folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(fakes.tiny_llama(), folder)


def dense(user, reinforce, config):
    """Equation 5 with basis output, layer by layer, from the folders."""
    out = {}
    us, rs = load_pairs(user), load_pairs(reinforce)
    for name in {*us, *rs}:
        u = us[name].delta() if name in us else torch.zeros(1, dtype=torch.float64)
        r = rs[name].delta() if name in rs else torch.zeros(1, dtype=torch.float64)
        if name in us and name in rs:
            q = torch.linalg.svd(u, full_matrices=False)[0][:, : us[name].rank]
            r = r - config.alpha * q @ q.T @ r
        out[name] = config.c_user * u + config.c_reinforce * r
    return out


def test_the_reader_computes_what_peft_computes(tmp_path):
    folder = adapter(
        tmp_path / "a", r=4, alpha=6, targets=["q_proj", "o_proj"], use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "o_proj": 3}, alpha_pattern={"^.*o_proj": 1, "layers.0.*": 9},
    )  # fmt: skip
    pairs = load_pairs(folder)
    assert {p.rank for p in pairs.values()} == {2, 3, 4} and len({p.scale for p in pairs.values()}) >= 3
    want = logits(loaded(folder))
    assert torch.allclose(shifted({n: p.delta() for n, p in pairs.items()}), want, atol=1e-5)


def test_alpha_zero_equals_pefts_own_cat(pair, tmp_path):
    user, reinforce = pair
    merge_folders(user, reinforce, tmp_path / "out", off_the_user(alpha=0.0, c_user=0.7, c_reinforce=1.3))
    oracle = loaded(user)
    oracle.load_adapter(reinforce, adapter_name="reinforce")
    oracle.add_weighted_adapter(["default", "reinforce"], [0.7, 1.3], "cat", combination_type="cat")
    oracle.set_adapter("cat")
    assert torch.allclose(logits(loaded(tmp_path / "out")), logits(oracle), atol=1e-6)


@pytest.mark.parametrize("form", ["concat", "absorb"])
def test_the_made_folder_gives_the_logits_of_the_dense_formula_in_plain_peft(pair, tmp_path, form):
    user, reinforce = pair
    config = off_the_user(alpha=0.6, c_user=0.8, form=form, tau=0.0)
    made = merge_folders(user, reinforce, out := tmp_path / "out", config)
    want = shifted(dense(user, reinforce, config))
    before = {p.name: p.read_bytes() for p in reinforce.iterdir() if p.is_file()}
    if form == "concat":
        model = loaded(out)
        assert made.rank == 8 and made.reinforce_weight is None
    else:
        model = attach_absorbed(fakes.tiny_llama(), out, reinforce)
        assert made.rank == 3 and made.reinforce_weight == 0.5
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.allclose(logits(model), want, atol=1e-5)
    assert (logits(model) - logits(fakes.tiny_llama())).abs().max() > 0.05
    assert before == {p.name: p.read_bytes() for p in reinforce.iterdir() if p.is_file()}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == made.rank and not config["use_rslora"]
    assert not config.get("rank_pattern") and not config.get("alpha_pattern") and config["bias"] == "none"
    assert sorted(config["target_modules"]) == ATTENTION
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "casehard_adapter.json", "manifest.json", "merge.json",
    }  # fmt: skip
    verify(out)
    assert read_marker(out)["role"] == "merged" and read_marker(out)["tensors_sha256"] == tensor_digests(out)


def test_folders_and_states_agree_for_every_basis(pair, tmp_path):
    user, reinforce = pair
    for basis in BASES:
        config = off_the_user(alpha=1.0, basis=basis)
        merge_folders(user, reinforce, tmp_path / basis, config)
        result = merge_states(load_pairs(user), load_pairs(reinforce), config)
        there = load_pairs(tmp_path / basis)
        assert there.keys() == result.layers.keys()
        for name, p in there.items():
            assert p.scale == 1.0
            assert torch.equal(p.a, result.layers[name].a) and torch.equal(p.b, result.layers[name].b)


def test_union_of_layers_of_different_ranks_and_targets(tmp_path):
    user = adapter(tmp_path / "u", seed=1, r=2, targets=["q_proj", "up_proj"])
    reinforce = adapter(tmp_path / "r", seed=2, r=4, targets=["q_proj", "down_proj"], rank_pattern={"down_proj": 6})
    config = off_the_user(alpha=1.0, tau=0.0)
    made = merge_folders(user, reinforce, tmp_path / "out", config)
    assert (made.rank, made.layers, len(made.reports), len(made.notes)) == (6, 6, 2, 2)
    assert torch.allclose(logits(loaded(tmp_path / "out")), shifted(dense(user, reinforce, config)), atol=1e-5)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert all(n.endswith("up_proj") for n in record["user_only"]) and len(record["reinforce_only"]) == 2
    made = merge_folders(user, reinforce, tmp_path / "absorbed", off_the_user(form="absorb", alpha=1.0, tau=0.0))
    assert (made.rank, made.layers) == (2, 4)
    model = attach_absorbed(fakes.tiny_llama(), tmp_path / "absorbed", reinforce)
    assert torch.allclose(logits(model), shifted(dense(user, reinforce, config)), atol=1e-5)


def test_layers_chosen_by_number_are_named_in_full(tmp_path):
    user = adapter(tmp_path / "u", seed=1, layers_to_transform=[1])
    reinforce = adapter(tmp_path / "r", seed=2, layers_to_transform=[1])
    merge_folders(user, reinforce, tmp_path / "out", off_the_user())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.1.self_attn.{t}" for t in ATTENTION]
    assert torch.allclose(logits(loaded(tmp_path / "out")), shifted(dense(user, reinforce, off_the_user())), atol=1e-5)


def test_equal_inputs_give_equal_bytes_wherever_they_lie(pair, tmp_path):
    import shutil

    user, reinforce = pair
    merge_folders(user, reinforce, tmp_path / "one", off_the_user())
    for name, folder in (("u2", user), ("r2", reinforce)):
        shutil.copytree(folder, tmp_path / "elsewhere" / name)
    merge_folders(tmp_path / "elsewhere" / "u2", tmp_path / "elsewhere" / "r2", tmp_path / "two", off_the_user())
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


def test_a_cut_rank_is_written_and_its_error_told(pair, tmp_path):
    made = merge_folders(*pair, tmp_path / "out", off_the_user(rank=3))
    assert made.rank == 3 and all(0 < r.error < 1 for r in made.reports.values())
    assert loaded(tmp_path / "out").peft_config["default"].r == 3


def mark(folder, role, **digests):
    write_marker(folder, role, **digests)
    return folder


def test_buffers_are_refused_by_marker_name_and_content(pair, tmp_path):
    user, reinforce = pair
    mark(reinforce, "reinforce")
    buffer = mark(adapter(tmp_path / "b", seed=3), "buffer")
    for args in ((buffer, reinforce), (user, buffer)):
        with pytest.raises(UserError, match="marked as a buffer"):
            merge_folders(*args, tmp_path / "out", off_the_user())
    known = set(read_marker(buffer)["tensors_sha256"].values())
    (buffer / "casehard_adapter.json").unlink()
    refuse_buffer(buffer)
    with pytest.raises(UserError, match="one of the buffer's"):
        merge_folders(buffer, reinforce, tmp_path / "out", off_the_user(), buffer_digests=known)
    refuse_buffer(user, known=known)

    tensors = load_file(user / "adapter_model.safetensors")
    renamed = {n.replace("lora_A.weight", "lora_A.buffer.weight"): t for n, t in tensors.items()}
    (tmp_path / "dump").mkdir()
    save_file(renamed, tmp_path / "dump" / "state.safetensors")
    with pytest.raises(UserError, match="name of a buffer"):
        refuse_buffer(tmp_path)
    assert not (tmp_path / "out").exists()
    both = fakes.two_adapters()
    both.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="name of a buffer"):
        refuse_buffer(tmp_path / "checkpoint")


def test_what_is_bound_to_another_base_or_swapped_or_merged_is_refused(pair, tmp_path):
    user, reinforce = pair
    mark(reinforce, "reinforce", base_digest="a" * 64, template_digest="t" * 64)
    mark(user, "user", base_digest="b" * 64)
    with pytest.raises(UserError, match=r"another base model.*bbb.*aaa"):
        merge_folders(user, reinforce, tmp_path / "out", off_the_user())
    mark(user, "user", base_digest="a" * 64, template_digest="s" * 64)
    with pytest.raises(UserError, match="another chat template"):
        merge_folders(user, reinforce, tmp_path / "out", off_the_user())
    mark(user, "user", base_digest="a" * 64, tokenizer_digest="k" * 64)
    with pytest.raises(UserError, match="swapped"):
        merge_folders(reinforce, user, tmp_path / "out", off_the_user())
    with pytest.raises(UserError, match="the same folder"):
        merge_folders(user, user, tmp_path / "out", off_the_user())
    assert not (tmp_path / "out").exists()
    merge_folders(user, reinforce, tmp_path / "out", off_the_user())
    marker = read_marker(tmp_path / "out")
    assert [marker[k][0] for k in ("base_digest", "tokenizer_digest", "template_digest")] == ["a", "k", "t"]
    with pytest.raises(UserError, match="merged already"):
        merge_folders(tmp_path / "out", reinforce, tmp_path / "again", off_the_user())


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_not_plain_lora_is_refused_by_name(pair, tmp_path):
    user, reinforce = pair
    out = tmp_path / "out"
    cases = [
        (adapter(tmp_path / "dora", use_dora=True), "use_dora"),
        (adapter(tmp_path / "bias", bias="lora_only"), "bias = 'lora_only'"),
        (adapter(tmp_path / "lb", lora_bias=True), "lora_bias"),
        (adapter(tmp_path / "saved", modules_to_save=["lm_head"]), "modules_to_save"),
        (adapter(tmp_path / "emb", targets=["embed_tokens"]), "no LoRA factor"),
    ]
    for folder, text in cases:
        with pytest.raises(Unsupported, match=text):
            merge_folders(folder, reinforce, out, off_the_user())
    for changes, text in (
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "LORA", "layer_replication": [[0, 1]]}, "layer_replication"),
    ):
        folder = adapter(tmp_path / text.replace(" ", "_"))
        edit(folder, **changes)
        with pytest.raises(Unsupported, match=text):
            merge_folders(folder, reinforce, out, off_the_user())
    # A DoRA magnitude without its flag in the configuration is found in the file.
    edit(cases[0][0], use_dora=False)
    with pytest.raises(Unsupported, match="magnitude"):
        merge_folders(cases[0][0], reinforce, out, off_the_user())
    with pytest.raises(UserError, match="no adapter_config"):
        merge_folders(tmp_path, reinforce, out, off_the_user())
    (user / "adapter_model.safetensors").rename(user / "adapter_model.bin")
    with pytest.raises(Unsupported, match="pickle"):
        merge_folders(user, reinforce, out, off_the_user())
    assert not out.exists()


def test_damaged_adapters_are_found_and_leave_nothing(pair, tmp_path):
    user, reinforce = pair
    out, weights = tmp_path / "out", user / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in sorted(tensors) if "layers.1" in n and "lora_A" in n)
    write_marker(user, "user")

    def attempt(error, text, changed):
        save_file(changed, weights)
        with pytest.raises(error, match=text):
            merge_folders(user, reinforce, out, off_the_user())
        assert {p.name for p in tmp_path.iterdir()} == {"user", "reinforce"}

    attempt(Corrupt, "differs from casehard_adapter.json", tensors | {name: tensors[name] + 1e-3})
    (user / "casehard_adapter.json").unlink()
    attempt(Corrupt, "NaN or Inf", tensors | {name: tensors[name] * torch.nan})
    attempt(Corrupt, "only factor B", {n: t for n, t in tensors.items() if n != name})
    attempt(Corrupt, "do not fit rank 3", tensors | {name: torch.zeros(4, 32)})
    attempt(DataError, r"32 x 30.*32 x 32", tensors | {name: torch.zeros(3, 30)})
    weights.write_bytes(weights.read_bytes()[:300])
    with pytest.raises(Corrupt, match="cannot be read"):
        merge_folders(user, reinforce, out, off_the_user())
    edit(user, r=99)
    save_file(tensors, weights)
    with pytest.raises(Corrupt, match="rank 99"):
        merge_folders(user, reinforce, out, off_the_user())
    (user / "casehard_adapter.json").write_text('{"role": "king"}')
    with pytest.raises(Corrupt, match="no role"):
        read_marker(user)


def test_a_folder_absorbed_for_another_adapter_is_refused(pair, tmp_path):
    user, reinforce = pair
    merge_folders(user, reinforce, tmp_path / "out", off_the_user(form="absorb"))
    other = adapter(tmp_path / "other", seed=9, r=5, alpha=5)
    with pytest.raises(UserError, match="was made for the reinforcing adapter"):
        attach_absorbed(fakes.tiny_llama(), tmp_path / "out", other)
    merge_folders(user, reinforce, tmp_path / "whole", off_the_user())
    with pytest.raises(UserError, match="not made with form absorb"):
        attach_absorbed(fakes.tiny_llama(), tmp_path / "whole", reinforce)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "merge.json"])
def test_a_changed_absorbed_folder_is_refused(pair, tmp_path, file):
    user, reinforce = pair
    merge_folders(user, reinforce, tmp_path / "out", off_the_user(form="absorb"))
    target = tmp_path / "out" / file
    if file == "merge.json":
        target.write_text(json.dumps(json.loads(target.read_text()) | {"reinforce_weight": -3.0}))
    else:
        content = bytearray(target.read_bytes())
        content[-2] ^= 1
        target.write_bytes(content)
    with pytest.raises(Corrupt, match=f"{file} differs from the manifest"):
        attach_absorbed(fakes.tiny_llama(), tmp_path / "out", reinforce)


def test_half_precision_adapters_are_merged_in_full_precision(pair, tmp_path):
    user, reinforce = pair
    weights = user / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(weights).items()}, weights)
    config = off_the_user(alpha=1.0, tau=0.0)
    merge_folders(user, reinforce, tmp_path / "out", config)
    with AdapterReader(tmp_path / "out") as reader:
        name, first = next(iter((n, reader.pair(n)) for n in reader.shapes))
    assert isinstance(first, LoraPair) and first.a.dtype == torch.float32
    want = dense(user, reinforce, config)[name]
    assert float((first.delta() - want).norm() / want.norm()) < 1e-6
