import pytest
import torch
from transformers import GenerationConfig

from casehard.errors import DataError, UserError
from casehard.evaluation.generate import complete, end_ids, generate
from casehard.types import Example

PROMPTS = [
    "how do i brew the tea ?",
    "what is it ?",
    "the beacon",
    "tell me how to brew the potion and then how to build the hut",
    "what kind of thing is a potion ?",
]
EXAMPLES = [Example.pair(text, "never shown", id=f"p{i}") for i, text in enumerate(PROMPTS)]


@torch.no_grad()
def one_by_one(model, chat, example, new_tokens):
    """Decode greedily without cache, padding or batches: the slow, obvious twin."""
    model.eval()
    ids = chat.prompt_ids(example)
    fresh = []
    while len(fresh) < new_tokens:
        logits = model(input_ids=torch.tensor([ids + fresh])).logits[0, -1]
        token = int(logits.argmax())
        if token in end_ids(model, chat):
            break
        fresh.append(token)
    return chat.tokenizer.decode(fresh, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_say_what_single_prompts_say(model, chat, batch_size):
    got = generate(model, chat, EXAMPLES, batch_size=batch_size, max_new_tokens=12)
    assert got == [one_by_one(model, chat, example, 12) for example in EXAMPLES]
    assert len(set(got)) > 1


def test_reports_which_answers_ended(model, chat):
    with torch.no_grad():  # the end token is preferred whatever was asked
        model.lm_head.weight.zero_()
        model.lm_head.weight[chat.tokenizer.eos_token_id] = 1.0
        model.model.embed_tokens.weight.add_(1.0)
    done = complete(model, chat, EXAMPLES, max_new_tokens=8)
    assert done == [("", True, "")] * len(EXAMPLES)


def test_an_answer_that_runs_into_the_limit_has_not_ended(model, chat):
    with torch.no_grad():
        model.lm_head.weight[sorted(end_ids(model, chat))] = 0
        model.lm_head.weight[10] = 1e-3
    done = complete(model, chat, EXAMPLES[:1], max_new_tokens=3)
    assert not done[0].ended and len(chat.tokenizer.encode(done[0].text)) <= 3


def test_everything_is_as_before(model, chat):
    model.model.layers[0].eval()
    model.config.use_cache = False
    flags = [m.training for m in model.modules()]
    settings = model.generation_config
    generate(model, chat, EXAMPLES, max_new_tokens=2)
    assert [m.training for m in model.modules()] == flags
    assert model.config.use_cache is False
    assert model.generation_config is settings
    with pytest.raises(RuntimeError):
        model.model.layers[0].forward = _raise
        generate(model, chat, EXAMPLES, max_new_tokens=2)
    assert [m.training for m in model.modules()] == flags
    assert model.generation_config is settings


def _raise(*args, **kwargs):
    raise RuntimeError("layer broke")


def test_the_checkpoints_own_sampling_settings_have_no_say(model, chat):
    plain = generate(model, chat, EXAMPLES, max_new_tokens=12)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=3.0,
        no_repeat_ngram_size=2,
        min_new_tokens=9,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )
    assert generate(model, chat, EXAMPLES, max_new_tokens=12) == plain
    assert model.generation_config.repetition_penalty == 3.0


def test_a_trainers_autocast_is_lifted_and_put_back(model, chat):
    accelerate = pytest.importorskip("accelerate")
    seen = []
    model.model.norm.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    plain = generate(model, chat, EXAMPLES, max_new_tokens=6)
    # The state is one per process: a test that ran before may have left another precision in it.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    wrapped = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    ids = torch.tensor([[7, 8, 9]])
    wrapped(input_ids=ids)
    assert torch.bfloat16 in seen
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(wrapped, chat, EXAMPLES, max_new_tokens=6) == plain
    assert set(seen) == {torch.float32}
    wrapped(input_ids=ids)
    assert seen[-1] == torch.bfloat16
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_adapters_generate_and_leave_no_trace(model, chat):
    peft = pytest.importorskip("peft")
    plain = generate(model, chat, EXAMPLES, max_new_tokens=6)
    settings = model.generation_config
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert generate(adapted, chat, EXAMPLES, max_new_tokens=6) == plain  # a fresh adapter adds zero
    assert adapted.get_base_model().generation_config is settings


def test_what_cannot_be_generated_is_refused(model, chat):
    long = Example.pair(" ".join(["tea"] * 120), id="long")
    with pytest.raises(DataError, match=r"example long: .* exceed the model's 128 positions"):
        generate(model, chat, [EXAMPLES[0], long], max_new_tokens=12)
    with pytest.raises(UserError, match="at least 1"):
        generate(model, chat, EXAMPLES, max_new_tokens=0)


def test_no_examples_give_no_answers(model, chat):
    assert generate(model, chat, []) == []
