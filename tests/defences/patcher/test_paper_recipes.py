"""The recipes and the plan of the published runs say what the paper's tables say."""

from __future__ import annotations

from pathlib import Path

import pytest

from casehard.benchmark.plan import load_plan
from casehard.config import build, read_yaml
from casehard.data.chat import ChatFormat
from casehard.steps import Finetune
from casehard.types import Example
from chat_fakes import byte_level, wrap

ROOT = Path(__file__).resolve().parents[3]
MODELS = ("qwen2.5_1.5b", "qwen3_4b", "llama3_8b")
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# After the template of Qwen3, cut down to what a chat without tools and earlier thoughts takes.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
OFF = "{%- set enable_thinking = false %}"


def loaded(name):
    """Return the step of a recipe and the method's settings."""
    path = ROOT / "recipes" / f"{name}.yaml"
    given = {"method": "patcher", "model": "m", "rows": {"data": ["d.jsonl"], "unsafe": ["u.jsonl"]}}
    step = build(Finetune, {**given, **read_yaml(path)}, where=name)
    return step, step.spec.configure(step.method, step.preset, step.settings)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("kind", "k1"), [("patcher_", 300), ("patcher_parallel_", 500)])
def test_a_recipe_has_the_published_numbers(model, kind, k1):
    step, config = loaded(kind + model)
    train, (attacker,) = step.train, config.attackers
    assert (train.steps, train.batch_size, train.accumulation, train.lr) == (15000, 4, 1, 1e-5)
    assert (train.schedule, train.warmup, train.weight_decay, train.clip) == ("constant", 0, 0.01, 1.0)
    assert (config.alpha, config.round_steps, config.delta_dtype, config.reference) == (0.5, 1000, "float32", "current")
    assert (attacker.steps, attacker.lr, attacker.batch_size) == (k1, 1e-5, 4)
    assert (attacker.optimizer, attacker.weight_decay, attacker.clip, attacker.lora_rank) == ("adamw", 0.01, 1.0, 0)
    sequential = kind == "patcher_"
    assert config.schedule == ("sequential" if sequential else "reference_parallel")
    assert config.reset_optimizer is sequential, "separate processes for each phase forget their moments"
    assert (config.retain, config.c) == ("none", 1.0)
    assert step.system == ALPACA


def test_the_published_test_attack_is_a_plan():
    plan = load_plan(ROOT / "plans" / "patcher_paper.yaml")
    assert plan.system == ALPACA and plan.max_length == 4096
    assert len(plan.attacks) == 3
    for attack in plan.attacks:
        settings = attack.settings
        assert (attack.attack, attack.mode, attack.share, attack.steps, attack.lr) == (
            "finetune",
            "full",
            0.2,
            2000,
            1e-5,
        )
        assert (settings["rows"], settings["batch_size"], settings["schedule"]) == (1000, 4, "constant")
        assert attack.rows["benign"] == ("../data/paper/gsm8k.jsonl",)
    by_name = {row.name: row for row in plan.defences}
    assert set(by_name) == {"sft", "same-passes", "patcher", "patcher-parallel", "vaccine", "booster", "tar"}
    for name in ("sft", "patcher", "patcher-parallel", "vaccine", "booster"):
        train = by_name[name].train
        assert (train["steps"], train["batch_size"], train["lr"], train["schedule"]) == (15000, 4, 1e-5, "constant"), (
            name
        )
    # 15 rounds of 1000 steps of which 14 take two passes, and 14 attacks of 300.
    assert by_name["same-passes"].train["steps"] == 15000 + 14000 + 14 * 300
    assert (by_name["patcher"].preset, by_name["patcher-parallel"].preset) == ("paper_sequential", "reference_parallel")


def test_the_recipe_of_qwen3_says_how_thinking_is_switched_off_and_it_is():
    for kind in ("patcher_", "patcher_parallel_"):
        assert OFF in (ROOT / "recipes" / f"{kind}qwen3_4b.yaml").read_text(encoding="utf-8")
    row = Example.pair("how are you", "I am well")
    for template, thinks in ((THINKING, True), (OFF + THINKING, False)):
        tokenizer = wrap(byte_level(), template, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>")
        chat = ChatFormat(tokenizer, system=ALPACA)
        encoded = chat.encode(row)
        asked = chat.prompt_ids(row)
        answer = tokenizer.decode([t for t in encoded.labels if t >= 0])
        assert tokenizer.decode(asked).endswith("</think>\n\n") is not thinks
        assert ("<think>" in answer) is thinks, "an empty thought is no part of the answer"
        assert encoded.input_ids[: len(asked)] == asked, "what is trained is what is asked"
        assert ALPACA in tokenizer.decode(asked)
