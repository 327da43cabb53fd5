"""The baselines of Buffer-and-Reinforce against their formulas, written out densely and slowly."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from buffer_fakes import random_pairs, shared_assets
from casehard.data.batches import EncodedSet
from casehard.defences.antidote import Antidote, AntidoteConfig, input_norms, top
from casehard.defences.buffer_reinforce.security_vector import (
    KeepBenign,
    KeepBenignConfig,
    SecurityVector,
    SecurityVectorConfig,
)
from casehard.defences.safelora import SafeLora, SafeLoraConfig, choose, factor_cosine, project_exact
from casehard.defences.shrink import Shrink, ShrinkConfig
from casehard.defences.updates import Folder, layers
from casehard.errors import ConfigError, DataError, Unsupported
from casehard.model.adapters import add_lora
from casehard.train.fit import fit
from casehard.train.protocol import Setup, Step
from casehard.train.recipe import TrainConfig
from fakes import tiny_llama, tiny_rows, two_adapters, weights

UNSAFE = tiny_rows(10, seed=3)
PROJECTIONS = [f"{block}_proj" for block in ("q", "k", "v", "o", "gate", "up", "down")]
KINDS = ("lora", "full", "two")


def model_of(kind):
    """Return the aligned model before the user's training."""
    if kind == "two":
        return two_adapters(dropout=0.0)
    return add_lora(tiny_llama(), rank=3, alpha=6.0) if kind == "lora" else tiny_llama()


def nudge(model, size=0.05):
    """Stand in for training: move every trained parameter, the same way for the same model."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def tuned(kind, method):
    """Prepare, train, finish; return the model and copies of its linear weights before, after training and at the end.

    Weights are merged ones: W_0 + sum of s B A.
    """
    model = model_of(kind)
    before = merged(model)
    method.prepare(Setup(model, seed=0, max_steps=1))
    nudge(model)
    after = merged(model)
    method.finish(model)
    return model, before, after, merged(model)


def merged(model):
    """Return the effective weight of every projection, by its plain name."""
    out = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in PROJECTIONS:
            continue
        weight = getattr(module, "base_layer", module).weight.detach().clone()
        for key in getattr(module, "lora_A", {}):
            weight += module.scaling[key] * module.lora_B[key].weight.detach() @ module.lora_A[key].weight.detach()
        out[name.removeprefix("base_model.model.")] = weight
    return out


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unaligned")
    tiny_llama(seed=7).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
def test_shrink_keeps_a_share_of_the_update(kind, c):
    model, before, after, end = tuned(kind, Shrink(ShrinkConfig(c=c)))
    for name in before:
        assert torch.allclose(end[name], before[name] + c * (after[name] - before[name]), atol=1e-6), name
    if kind == "full":
        start = weights(tiny_llama())
        norm = model.state_dict()["model.norm.weight"]
        assert torch.equal(norm, start["model.norm.weight"]) == (c == 0.0)


def test_shrink_interpolates_what_is_trained_beside_an_adapter():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"]))
    name, norm = next((n, p) for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n)
    method, before = Shrink(ShrinkConfig(c=0.25)), norm.detach().clone()
    method.prepare(Setup(model, seed=0, max_steps=1))
    assert [key.removeprefix("start.") for key in method.state()] == [name]
    nudge(model)
    after = norm.detach().clone()
    method.finish(model)
    assert torch.allclose(norm, before + 0.25 * (after - before), atol=1e-7)


def naive_projection(kind, v, update):
    """Build C (O, O) and return C D and its cosine with D."""
    if kind == "approximate":
        c = v @ v.T / v.square().sum().sqrt()
    else:
        c = v @ torch.linalg.pinv(v.T @ v, rtol=1e-6, hermitian=True) @ v.T
    moved = c @ update
    return moved, float(nn.functional.cosine_similarity(moved.flatten(), update.flatten(), dim=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        SafeLoraConfig(threshold=2.0),
        SafeLoraConfig(threshold=-2.0),
        SafeLoraConfig(layers=3),
        SafeLoraConfig(layers=2, projection="exact"),
    ],
    ids=["all", "none", "three", "exact"],
)
def test_safelora_projects_the_chosen_layers(kind, config, unaligned):
    method = SafeLora(config, assets=unaligned)
    _, before, after, end = tuned(kind, method)
    base = merged(tiny_llama(seed=7))
    moved, cosines = {}, {}
    for name in method.cosines:
        v = (before[name] - base[name]).double()
        moved[name], cosines[name] = naive_projection(config.projection, v, (after[name] - before[name]).double())
        assert method.cosines[name] == pytest.approx(cosines[name], abs=1e-5), name
    count = {2.0: len(cosines), -2.0: 0}.get(config.threshold, config.layers)
    assert len(method.projected) == count and len(cosines) == (4 if kind == "two" else 14)
    for name in before:
        if name in method.projected:
            assert torch.allclose(end[name].double(), before[name] + moved[name], atol=1e-6), name
        else:
            assert torch.equal(end[name], after[name]), name
    rest = [cosines[name] for name in cosines if name not in method.projected]
    if rest and method.projected:
        assert max(cosines[name] for name in method.projected) <= min(rest) + 1e-6


def test_safelora_threshold_and_ties():
    cosines = {"a": 0.4, "b": 0.1, "c": 0.4, "d": 0.5}
    assert choose(cosines, SafeLoraConfig(threshold=0.4)) == ("b",)
    assert choose(cosines, SafeLoraConfig()) == ("a", "b", "c")
    assert choose(cosines, SafeLoraConfig(layers=2)) == ("b", "a")
    assert choose(cosines, SafeLoraConfig(layers=0)) == ()


def test_the_exact_projector_drops_small_directions_and_full_rank_is_the_identity():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=g)
    full = torch.randn(6, 6, generator=g)
    assert torch.allclose(project_exact(full, x, 1e-6), x, atol=1e-5)
    assert torch.equal(project_exact(torch.zeros(6, 6), x, 1e-6), torch.zeros(6, 4))
    u = torch.linalg.qr(torch.randn(6, 2, generator=g)).Q
    thin = u @ torch.diag(torch.tensor([1.0, 1e-4])) @ torch.randn(2, 5, generator=g)
    assert torch.linalg.matrix_rank(project_exact(thin, torch.eye(6), 1e-2), rtol=1e-3) == 1
    assert torch.allclose(project_exact(thin, x, 1e-5), u @ (u.T @ x), atol=1e-2)


def test_factor_cosine_of_zero_updates():
    b, a = torch.ones(4, 2), torch.ones(2, 3)
    assert factor_cosine(b, torch.zeros(4, 2), a) == 1.0
    assert factor_cosine(torch.zeros(4, 2), b, a) == 0.0
    assert factor_cosine(2 * b, b, a) == pytest.approx(1.0)


def test_safelora_refuses_a_base_that_does_not_fit(tmp_path, unaligned):
    with pytest.raises(DataError, match=r"no \.safetensors"):
        SafeLora(assets=tmp_path)
    (tmp_path / "wide").mkdir()
    tiny_llama(hidden=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(DataError, match="has shape"):
        SafeLora(assets=tmp_path / "wide").prepare(Setup(tiny_llama(), seed=0, max_steps=1))
    with pytest.raises(DataError, match="no tensor"):
        SafeLora(assets=unaligned).prepare(Setup(tiny_llama(layers=3), seed=0, max_steps=1))
    with pytest.raises(DataError, match="before alignment"):
        SafeLora(assets=unaligned).prepare(Setup(tiny_llama(seed=7), seed=0, max_steps=1))
    assert Folder(unaligned).read("model.norm.weight").dtype == torch.float32


def naive_norms(model, rows):
    """Collect every token's inputs row by row, without padding, and return their norms by projection."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(
                module.register_forward_hook(lambda m, x, y, name=name: seen.setdefault(name, []).append(x[0]))
            )
    model.eval()
    with torch.no_grad():
        for row in rows.rows:
            model(input_ids=torch.tensor([row.input_ids]))
    for hook in hooks:
        hook.remove()
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): torch.cat([x[0] for x in parts]).norm(dim=0)
        for name, parts in seen.items()
    }


def naive_mask(matrix, norms, share, group):
    scores = matrix.abs() * norms[None, :]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if group == "row":
        for i, row in enumerate(scores):
            mask[i, row.argsort(descending=True)[: round(share * len(row))]] = True
    else:
        mask.view(-1)[scores.flatten().argsort(descending=True)[: round(share * scores.numel())]] = True
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", ["layer", "row"])
@pytest.mark.parametrize("prune", ["update", "weights"])
def test_antidote_removes_the_highest_scores(kind, group, prune):
    share = 0.1
    method = Antidote(AntidoteConfig(mask_ratio=share, prune=prune, group=group, batch_size=3), unsafe=UNSAFE)
    model, before, after, end = tuned(kind, method)
    untouched = model_of(kind)
    nudge(untouched)
    norms = naive_norms(untouched, UNSAFE)
    pruned = [name for name in before if kind != "two" or name.endswith(("q_proj", "v_proj"))]
    removed = 0
    for name in before:
        if name not in pruned:
            assert torch.equal(end[name], after[name])
            continue
        start = before[name] if prune == "update" else torch.zeros_like(before[name])
        matrix = after[name] - start
        mask = naive_mask(matrix, norms[name], share, group)
        assert torch.allclose(end[name], start + matrix.masked_fill(mask, 0.0), atol=1e-6), name
        removed += int(mask.sum())
    assert method.removed == removed > 0
    assert all(not p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_antidote_on_the_factors_stays_an_adapter():
    method = Antidote(AntidoteConfig(mask_ratio=0.2, prune="factors"), unsafe=UNSAFE)
    model, untouched = tuned("lora", method)[0], model_of("lora")
    nudge(untouched)
    norms, was = naive_norms(untouched, UNSAFE), dict(untouched.named_parameters())
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, was[name])
            continue
        matrix = was[name].detach()
        key = name.removeprefix("base_model.model.").removesuffix(".weight")
        mask = naive_mask(matrix, norms[key], 0.2, "layer")
        assert mask.any() and torch.equal(p, matrix.masked_fill(mask, 0.0)), name


def test_input_norms_are_those_of_fp32_without_dropout_after_bf16_training():
    model = add_lora(tiny_llama(), rank=2, alpha=4.0, dropout=0.5)
    seen = []

    class Probe(Antidote):
        def finish(self, model):
            assert model.training
            fast = input_norms(model, [layer.linear for layer in layers(model)], self.unsafe, 4)
            assert model.training
            seen.extend([fast, naive_norms(model, self.unsafe)])

    recipe = TrainConfig(steps=2, batch_size=2, lr=1e-2, precision="bf16")
    fit(model, None, tiny_rows(8), config=recipe, method=Probe(unsafe=UNSAFE), seed=0)
    fast, under_autocast = seen
    again = naive_norms(model, UNSAFE)
    exact = max((fast[layer.linear] - again[layer.name]).abs().max().item() for layer in layers(model))
    rough = max((under_autocast[layer.name] - again[layer.name]).abs().max().item() for layer in layers(model))
    assert exact < 1e-5 < 1e-4 < rough


def test_the_mask_takes_whole_shares_and_never_zeros():
    scores = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    assert top(scores, 0.5).tolist() == [[False, True], [True, False]]
    assert top(scores, 0.5, rows=True).tolist() == [[False, True], [True, False]]
    assert not top(scores, 0.1).any() and top(scores, 1.0).all()
    assert top(torch.tensor([[0.0, 2.0]]), 1.0).tolist() == [[False, True]]


def security_run(model, method=None, *, out=None, steps=4, on_step=None):
    """Tune an adapter for a few steps; return its factors."""
    recipe = TrainConfig(steps=steps, batch_size=2, lr=1e-2, precision="fp32", save_every=1 if out else 0)
    fit(model, None, tiny_rows(8), config=recipe, method=method, seed=0, out=out, on_step=on_step)
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("c", [1.0, 0.5])
def test_a_security_vector_is_tuning_on_the_merged_buffer_and_then_the_base_as_it_was(c):
    jailbroken = tiny_llama()
    for name, (a, b, scale) in random_pairs(seed=1).items():
        jailbroken.get_submodule(name).weight.data += scale * b @ a
    want = security_run(add_lora(jailbroken, rank=2, alpha=4.0))
    model = add_lora(tiny_llama(), rank=2, alpha=4.0)
    got = security_run(model, SecurityVector(SecurityVectorConfig(c=c), assets=shared_assets().path))
    plain = security_run(add_lora(tiny_llama(), rank=2, alpha=4.0))
    share = {name: c if "lora_B" in name else 1.0 for name in got}
    assert all(torch.allclose(got[name], share[name] * want[name], atol=2e-5) for name in got)
    assert max((want[name] - plain[name]).abs().max() for name in want) > 1e-3  # the buffer made a difference
    base = {name: p for name, p in model.get_base_model().state_dict().items() if "lora_" not in name}
    before = tiny_llama().state_dict()
    assert all(torch.equal(p, before[name.replace(".base_layer", "")]) for name, p in base.items())


def test_a_security_vector_resumes_with_the_buffer_in_place(tmp_path):
    def run(out=None, die_at=None):
        def stop(model, step):
            if step == die_at:
                raise InterruptedError

        method = SecurityVector(SecurityVectorConfig(c=0.5), assets=shared_assets().path)
        model = add_lora(tiny_llama(), rank=2, alpha=4.0)
        try:
            return security_run(model, method, out=out, steps=5, on_step=stop)
        except InterruptedError:
            method.release()
            assert not any(module._forward_hooks for module in model.modules())
            return {}

    whole = run()
    assert run(tmp_path, die_at=3) == {}
    resumed = run(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("micros", [1, 2])
def test_keeping_benign_answers_adds_the_kl_to_the_base(micros):
    model, benign = add_lora(tiny_llama(), rank=2, alpha=4.0), tiny_rows(6, seed=5)
    method = KeepBenign(KeepBenignConfig(kl=0.3, batch_size=3), benign=benign)
    method.prepare(Setup(model, seed=0, max_steps=4, micros=micros))
    nudge(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    log: dict[str, float] = {}
    total, want = 0.0, 0.0
    drawn = [benign.batch_at(3, seed=0, step=2 * micros + micro, purpose="keep-benign") for micro in range(micros)]
    tokens = sum((rows["labels"][:, 1:] != -100).sum() for rows in drawn)
    for micro, rows in enumerate(drawn):
        batch = UNSAFE.batch_at(4, seed=0, step=micro, purpose="x")
        step = Step(2, micro, micros, lambda m, b: m(**b).loss / micros, lambda loss: loss.backward(), log.update)
        total = total + method.loss(model, batch, step)
        inputs = {key: value for key, value in rows.items() if key != "labels"}
        with model.disable_adapter(), torch.no_grad():
            base = model(**inputs).logits[:, :-1].log_softmax(-1)
        now = model(**inputs).logits[:, :-1].log_softmax(-1)
        keep = rows["labels"][:, 1:] != -100
        kl = (base.exp() * (base - now)).sum(-1)[keep].mean()
        want = want + model(**batch).loss / micros + 0.3 * kl * keep.sum() / tokens
        assert log["benign_kl"] == pytest.approx(kl.item(), rel=1e-4) and kl.item() > 1e-4
    pairs = zip(torch.autograd.grad(total, trained), torch.autograd.grad(want, trained), strict=True)
    assert all(torch.allclose(g, h, atol=1e-6) for g, h in pairs)


def test_keeping_benign_answers_keeps_them():
    drift = []
    for kl in (0.0, 100.0):
        model, benign = add_lora(tiny_llama(), rank=2, alpha=4.0), tiny_rows(6, seed=5)
        method = KeepBenign(KeepBenignConfig(kl=kl, batch_size=6), benign=benign)
        security_run(model, method, steps=12)
        batch = benign.batch_at(6, seed=0, step=0, purpose="x")
        with torch.no_grad(), model.disable_adapter():
            base = model(**batch).logits.softmax(-1)
        with torch.no_grad():
            drift.append((model(**batch).logits.softmax(-1) - base).abs().mean().item())
    assert drift[1] < 0.7 * drift[0]


@pytest.mark.parametrize("make", [lambda p: Shrink(), lambda p: SafeLora(assets=p)])
def test_a_resumed_method_measures_from_where_training_started(make, unaligned):
    first, again = make(unaligned), make(unaligned)
    model = tiny_llama()
    first.prepare(Setup(model, seed=0, max_steps=1))
    nudge(model)
    again.prepare(Setup(model, seed=0, max_steps=1))  # the checkpoint's weights are already in the model
    again.restore(first.state())
    twin = tiny_llama()
    twin.load_state_dict(model.state_dict())
    first.finish(model)
    again.finish(twin)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_cannot_be_mended_is_refused(unaligned):
    def ready(method, model):
        return method.prepare(Setup(model, seed=0, max_steps=1))

    dora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(Unsupported, match="magnitude"):
        ready(Shrink(), dora)
    embedding = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(Unsupported, match="lora_embedding"):
        ready(Shrink(), embedding)
    norms = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"])
    with pytest.raises(Unsupported, match="norm"):
        ready(SafeLora(assets=unaligned), get_peft_model(tiny_llama(), norms))
    with pytest.raises(Unsupported, match="beside A and B"):
        ready(
            Antidote(unsafe=UNSAFE), get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], lora_bias=True))
        )
    with pytest.raises(Unsupported, match="without adapters"):
        ready(Antidote(AntidoteConfig(prune="factors"), unsafe=UNSAFE), tiny_llama())
    with pytest.raises(Unsupported, match="bfloat16"):
        ready(Antidote(unsafe=UNSAFE), tiny_llama().bfloat16())
    frozen = tiny_llama().requires_grad_(False)
    with pytest.raises(Unsupported, match="no linear layer"):
        ready(SafeLora(assets=unaligned), frozen)
    used = model_of("lora")
    nudge(used)
    with pytest.warns(UserWarning, match="not fresh"):
        ready(Shrink(), used)


def test_bad_settings_are_refused():
    with pytest.raises(DataError, match="no benign rows"):
        KeepBenign(benign=EncodedSet((), 0))
    with pytest.raises(Unsupported, match="has none"):
        KeepBenign(benign=UNSAFE).prepare(Setup(tiny_llama(), seed=0, max_steps=1))
    with pytest.raises(DataError, match="no unsafe rows"):
        Antidote(unsafe=EncodedSet((), 0))
    cases = (
        (ShrinkConfig, {"c": -0.1}),
        (ShrinkConfig, {"c": float("nan")}),
        (SecurityVectorConfig, {"c": 2.0}),
        (KeepBenignConfig, {"kl": -1.0}),
        (KeepBenignConfig, {"batch_size": 0}),
        (SafeLoraConfig, {"layers": -1}),
        (SafeLoraConfig, {"rank_tolerance": 1.0}),
        (AntidoteConfig, {"mask_ratio": 1.5}),
        (AntidoteConfig, {"batch_size": 0}),
        (AntidoteConfig, {"prune": "factors", "group": "row"}),
    )
    for kind, bad in cases:
        with pytest.raises(ConfigError):
            kind(**bad)
