"""The mixin over TRL's SFTTrainer: same bits as the bare SFTTrainer, every seam, and an exact resume."""

from __future__ import annotations

import pytest
import torch

from fakes import Averaging, TwoPasses, largest_difference, tiny_llama, weights

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from casehard.io.manifest import verify  # noqa: E402
from casehard.train.trainer import HardeningMixin  # noqa: E402


class HardenedSFT(HardeningMixin, trl.SFTTrainer):
    """What the documentation tells users of TRL to write."""


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def _train(cls, out, *, steps=4, resume=None, **more):
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{int(i)}" for i in torch.randint(0, 61, (8,), generator=generator)) for _ in range(16)]
    arguments = trl.SFTConfig(
        output_dir=str(out),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=3,
    )
    model = tiny_llama(dropout=0.2)
    made = cls(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=_tokenizer(),
        **more,
    )
    made.train(resume_from_checkpoint=resume)
    return weights(model), made


def test_plain_is_the_bare_sft_trainer(tmp_path):
    bare, _ = _train(trl.SFTTrainer, tmp_path / "bare")
    ours, made = _train(HardenedSFT, tmp_path / "ours")
    assert largest_difference(bare, ours) == 0
    assert made.cost_tracker.budget(4).passes == 8


@pytest.mark.parametrize("method", [Averaging, TwoPasses])
def test_seams_and_resume(tmp_path, method):
    whole, made = _train(HardenedSFT, tmp_path, method=method())
    for name in ("checkpoint-2", "checkpoint-4"):
        verify(tmp_path / name)
    assert not list(tmp_path.rglob("*.bin"))
    assert made.cost_tracker.passes == (8 if method is Averaging else 16)
    resumed, _ = _train(HardenedSFT, tmp_path, method=method(), resume=str(tmp_path / "checkpoint-2"))
    assert largest_difference(whole, resumed) == 0
