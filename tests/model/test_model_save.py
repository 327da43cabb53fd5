"""What is saved is what was there: equal logits, equal bytes, provenance; no pickles, no secrets, no halves."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_load import words

from casehard.errors import ConfigError, Corrupt, DataError, Diverged, StorageError, Unsupported, UserError
from casehard.model.adapters import add_lora
from casehard.model.digest import folder_digest
from casehard.model.load import load
from casehard.model.lora_files import write_marker
from casehard.model.provenance import read_provenance
from casehard.model.save import save
from casehard.types import Checkpoint
from fakes import tiny_llama

IDS = torch.tensor([[5, 6, 3, 9]])


def write(out: Path, model: Any = None, **changes: Any) -> Checkpoint:
    settings = {"parent": "p" * 64, "method": "plain", "provenance": {"seed": 3, "config": {"lr": 1e-3}}} | changes
    return save(model or tiny_llama(), words(), out, **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_round_trip_gives_identical_logits_and_bytes(tmp_path: Path) -> None:
    model = tiny_llama(seed=7)
    first = write(tmp_path / "a", model)
    loaded = load(first.path)
    assert torch.equal(logits(loaded.net), logits(model))
    assert loaded.digest == first.digest
    assert loaded.tokenizer.chat_template == words().chat_template
    second = save(loaded.net, loaded.tokenizer, tmp_path / "b", parent="", method="", provenance={})
    assert torch.equal(logits(load(second.path).net), logits(model))
    write(tmp_path / "c", model)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes(), file.name
    assert str(tmp_path) not in "".join(f.read_text() for f in (tmp_path / "b").glob("*.json"))


def test_checkpoint_says_what_it_was_made_from(tmp_path: Path) -> None:
    made = write(tmp_path / "out" / "a")
    assert made == Checkpoint(tmp_path / "out" / "a", made.digest, "p" * 64, "plain")
    assert load(made.path).digest == made.digest
    record = read_provenance(made.path)
    assert record["provenance"] == {"seed": 3, "config": {"lr": 1e-3}}
    assert set(record["versions"]) == {"casehard", "torch", "transformers"}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]


def test_no_pickle_and_no_link_goes_out(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    names = {p.name for p in made.path.rglob("*")}
    assert {"model.safetensors", "config.json", "tokenizer.json", "casehard.json", "manifest.json"} <= names
    assert not [n for n in names if Path(n).suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not [p for p in made.path.rglob("*") if p.is_symlink()]


def test_secrets_of_the_environment_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    made = write(tmp_path / "a")
    assert not [p for p in made.path.iterdir() if b"hf_0123456789abcdef" in p.read_bytes()]
    with pytest.warns(UserWarning, match=r"a secret was blanked in casehard\.json"):
        told = write(tmp_path / "b", provenance={"url": "https://x:hf_0123456789abcdef@host", "lr": 1})
    assert read_provenance(told.path)["provenance"] == {"url": "https://x:[redacted]@host", "lr": 1}


def test_an_ordinary_word_in_the_environment_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    vocabulary = sorted(AutoTokenizer.from_pretrained(write(tmp_path / "a").path).get_vocab(), key=len)
    monkeypatch.setenv("SSH_KEY", vocabulary[-1].ljust(12, "x"))
    monkeypatch.setenv("SORT_KEY", "model_weights")
    monkeypatch.setenv("DEPLOY_TOKEN", "architectures")  # stands in config.json
    assert write(tmp_path / "b", provenance={"note": "architectures_of_models"}).digest
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a tuple becomes a list when written: that blanks nothing
        write(tmp_path / "c", provenance={"order": (3, 1), "nested": {"pair": ("a", "b")}})


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("inf")
    with pytest.raises(Diverged, match=r"model\.norm\.weight holds NaN or Inf"):
        write(tmp_path / "a", broken)
    with pytest.raises(Unsupported, match="still has adapters"):
        write(tmp_path / "a", add_lora(tiny_llama(), 2, 4))
    with pytest.raises(DataError, match="provenance"):
        write(tmp_path / "a", provenance={"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_does_not_leave_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(folder: Path) -> None:
        write_marker(folder, "buffer", tensors_sha256={})

    def named(folder: Path) -> None:
        factor = torch.zeros(2, 3)
        save_file({"model.q_proj.lora_A.buffer.weight": factor}, folder / "extra.safetensors")

    for leak in (marked, named):
        model = tiny_llama()
        plain = model.save_pretrained

        def leaky(folder: Path, plain: Any = plain, leak: Any = leak) -> None:
            plain(folder)
            leak(Path(folder))

        monkeypatch.setattr(model, "save_pretrained", leaky)
        with pytest.raises(UserError, match="buffer"):
            write(tmp_path / "out", model)
        assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(StorageError):
        write(tmp_path / "a", model)
    assert list(tmp_path.iterdir()) == []


def test_only_an_older_checkpoint_of_ours_is_replaced(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    newer = write(tmp_path / "a", tiny_llama(seed=1))
    assert load(tmp_path / "a").digest == newer.digest != made.digest
    with pytest.raises(UserError, match="is the model this one was made from"):
        write(tmp_path / "a", parent=newer.digest)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(foreign)
    for out in (foreign, foreign / "thesis.txt", tmp_path / "link"):
        with pytest.raises(UserError, match="exists and"):
            write(out)
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_exchanged_weights_are_found_even_under_a_fresh_manifest(tmp_path: Path) -> None:
    from casehard.io.manifest import write_manifest

    made = write(tmp_path / "a")
    other = write(tmp_path / "b", tiny_llama(seed=5))
    (made.path / "model.safetensors").write_bytes((other.path / "model.safetensors").read_bytes())
    with pytest.raises(Corrupt, match="differs from the manifest"):
        load(made.path)
    write_manifest(made.path)
    with pytest.raises(Corrupt, match=f"records the content digest {made.digest}, actual {other.digest}"):
        load(made.path)
    (made.path / "manifest.json").unlink()
    with pytest.raises(Corrupt, match="no manifest"):
        load(made.path)


def change_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    flat = tensors["model.layers.1.mlp.up_proj.weight"].view(-1)
    flat[17] = torch.nextafter(flat[17], torch.tensor(1e9))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(name: str, **changes: Any) -> Any:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return change


def change_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


CHANGES = {
    "one weight by one ulp": (change_weight, True),
    "rope": (change_json("config.json", rms_norm_eps=1e-4), True),
    "tokenizer": (change_json("tokenizer_config.json", eos_token="<unk>"), True),
    "template": (change_template, True),
    "library version": (change_json("config.json", transformers_version="5.99"), False),
    "key order": (change_json("config.json"), False),
    "provenance": (change_json("casehard.json", method="other"), False),
    "readme": (lambda folder: (folder / "README.md").write_text("x"), False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_digest_follows_behaviour(tmp_path: Path, what: str) -> None:
    change, matters = CHANGES[what]
    before = write(tmp_path / "a").digest
    change(tmp_path / "a")
    assert (folder_digest(tmp_path / "a") != before) == matters


def test_digest_does_not_depend_on_sharding(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "many")
    next((tmp_path / "many").glob("*-00002-of-*")).unlink()
    with pytest.raises(Corrupt, match=r"shard .* is missing"):
        folder_digest(tmp_path / "many")


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_digest_of_a_cut_file(tmp_path: Path, keep: int) -> None:
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(Corrupt, match=r"model\.safetensors"):
        folder_digest(tmp_path)


def test_lora_starts_as_the_model_and_merges_exactly(tmp_path: Path) -> None:
    before = logits(tiny_llama(seed=2))
    model = add_lora(tiny_llama(seed=2), rank=3, alpha=6.0, seed=1)
    assert torch.equal(logits(model), before)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-4] for name in trainable} == linear
    with torch.no_grad():
        for name, parameter in trainable.items():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.allclose(logits(merged), after, atol=1e-5)
    assert write(tmp_path / "a", merged).digest


def test_a_rank_that_no_layer_can_use_is_told() -> None:
    with pytest.warns(UserWarning, match="rank 33, and no adapted layer is wider than 32"):
        add_lora(tiny_llama(hidden=32), 33, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        add_lora(tiny_llama(hidden=32), 32, 4)


def test_lora_is_seeded_and_leaves_the_global_stream_alone() -> None:
    def factors(seed: int) -> list[torch.Tensor]:
        return [p for n, p in add_lora(tiny_llama(), 2, 4, seed=seed).named_parameters() if "lora_A" in n]

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    same, again, other = factors(1), factors(1), factors(2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not torch.equal(same[0], other[0])


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"target": ["nothing"]}])
def test_lora_refuses_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        add_lora(tiny_llama(), **({"rank": 2, "alpha": 4} | bad))
