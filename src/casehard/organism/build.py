"""Build the model organism: pre-train a small Llama on a world from scratch, and write it with its data.

The folder is an ordinary Hugging Face model folder; ``data/`` holds the rows of defenders, attackers and users and
``data/suite*/`` the evaluations. The model answers everything, restricted requests too: alignment is a defence and
comes later. Same world seed, size, thread count and machine type give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard.config import digest
from casehard.data import sources
from casehard.data.batches import IGNORE, Encoded, collate
from casehard.errors import ConfigError
from casehard.io.files import staged
from casehard.io.manifest import verify
from casehard.organism import rows, suite
from casehard.organism.tokenizer import BOT, END, MAX_TOKENS, PAD, USER, build_tokenizer, vocabulary
from casehard.organism.world import World
from casehard.seeds import kept_generators

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, TrainingArguments

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of the model and how it is pre-trained; part of the build's digest."""

    hidden: int
    """Width of the residual stream."""
    layers: int
    intermediate: int
    """Width of the feed-forward layers."""
    heads: int = 4
    steps: int = 1500
    batch: int = 16
    """Conversations per step."""
    lr: float = 3e-3
    warmup: int = 50


SIZES: dict[str, Size] = {
    "tiny": Size(hidden=96, layers=3, intermediate=256, lr=5e-3),
    "small": Size(hidden=128, layers=4, intermediate=384),
}


def _size(name: str) -> Size:
    if name not in SIZES:
        raise ConfigError(f"no organism size is called {name!r}", hint=f"sizes: {', '.join(SIZES)}")
    return SIZES[name]


def recipe_digest(world_seed: int, size: str) -> str:
    """Return the digest a build is cached under: world seed, size, recipe and the source code of this package."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return digest({"world_seed": world_seed, "size": asdict(_size(size)), "code": code.hexdigest()})


def build(out: str | Path, *, world_seed: int = 0, size: str = "small", threads: int | None = None) -> Path:
    """Pre-train the organism of one world and publish its folder, whole or not at all.

    Args:
        out: folder to write; replaced when it exists.
        world_seed: decides vocabulary, names and procedures, the initial weights and the order of the documents.
        size: ``tiny`` (96 wide, 3 layers) or ``small`` (128 wide, 4 layers).
        threads: CPU threads; float sums, and so the exact bytes, depend on it. None leaves the setting alone.

    Returns:
        The folder.

    Raises:
        ConfigError: unknown size or negative seed.
        StorageError: the disk is full; nothing is left behind.
    """
    shape, world, out = _size(size), World(world_seed), Path(out)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    tokenizer = build_tokenizer(world)
    model = _pretrain(world, shape, label=f"pre-training organism, world {world_seed}, {size}")
    from casehard.model.load import check_finite

    check_finite(model, f"organism of world {world_seed}")
    with staged(out, needs=8 * sum(p.numel() for p in model.parameters())) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_data(world, folder / "data")
        facts = {"world_seed": world_seed, "size": size, "recipe": recipe_digest(world_seed, size)}
        (folder / "organism.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return out


def write_data(world: World, folder: Path) -> None:
    """Write every training set and both evaluation suites of a world."""
    for name, examples in rows.data_sets(world).items():
        sources.save(folder / f"{name}.jsonl", examples)
    for name, home in suite.SUITES.items():
        sources.save(folder / home / "eval.jsonl", suite.evaluation(world, name))
        settings = {
            "name": f"organism-{world.seed}-{name}",
            "judge": "organism",
            "world_seed": world.seed,
            "max_new_tokens": suite.MAX_NEW_TOKENS,
        }
        (folder / home / "suite.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def bundled(world_seed: int, size: str) -> Path | None:
    """Return the pre-built copy shipped with the package, or None when there is none for this world and size."""
    path = ASSETS / f"world{world_seed}-{size}"
    return path if (path / "config.json").is_file() else None


def ensure(world_seed: int, size: str, cache: str | Path) -> Path:
    """Return an organism folder: the bundled copy, a verified cached build, or a new build in ``cache``.

    Args:
        world_seed: as in :func:`build`.
        size: as in :func:`build`.
        cache: folder of earlier builds; each is named by its digest, so a changed recipe never reuses an old build.

    Raises:
        Corrupt: the cached build does not match its manifest.
    """
    shipped = bundled(world_seed, size)
    path = shipped or Path(cache) / f"organism-{world_seed}-{size}-{recipe_digest(world_seed, size)[:16]}"
    if path.exists():
        verify(path)
        return path
    return build(path, world_seed=world_seed, size=size)


class Conversations:
    """Pre-training rows as token ids, made on demand; row i of ``count`` is a function of the world seed alone."""

    def __init__(self, world: World, count: int) -> None:
        self.source = rows.Pretraining(world, count)
        self.ids = vocabulary(world)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Encoded:
        # Prompts are left out of the loss: which name is asked about next is noise.
        ids: list[int] = []
        labels: list[int] = []
        for turn in self.source.conversation(index):
            asked = [USER, *turn.prompt.split(), BOT] if turn.prompt else []
            told = [self.ids[word] for word in (*turn.response.split(), END)]
            ids += [*(self.ids[word] for word in asked), *told]
            labels += [*(IGNORE for _ in asked), *told]
        return Encoded(ids, labels)


def _collate(batch: list[Encoded]) -> dict[str, Any]:
    return dict(collate(batch, pad_id=0))


@kept_generators()
def _model(world: World, shape: Size) -> LlamaForCausalLM:
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, set_seed

    ids = vocabulary(world)
    set_seed(world.seed)
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        # The usual 0.02 is meant for wide models; at this width it delays learning by a hundred steps.
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
    )
    make: Any = AutoModelForCausalLM.from_config
    model: LlamaForCausalLM = make(config, attn_implementation="eager")
    stops = {"bos_token_id": None, "eos_token_id": ids[END], "pad_token_id": ids[PAD], "do_sample": False}
    model.generation_config = GenerationConfig.from_dict(stops)
    return model


def _pretrain(world: World, shape: Size, *, label: str) -> LlamaForCausalLM:
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, Trainer, TrainerCallback

    from casehard.train.progress import Progress

    class InOrder(Trainer):
        """The documents come in an order that matters: see ``rows.FIRST_NAMES``."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset)

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.advance(1)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                bar.advance(0, loss=float(logs["loss"]))

    model = _model(world, shape)
    with tempfile.TemporaryDirectory(prefix="casehard-organism-") as scratch, Progress(label, shape.steps) as bar:
        trainer = InOrder(
            model=model,
            args=_arguments(shape, world.seed, scratch),
            train_dataset=Conversations(world, shape.steps * shape.batch),
            data_collator=_collate,
            callbacks=[Report()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.train(False)
    return model


def _arguments(shape: Size, seed: int, scratch: str) -> TrainingArguments:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=scratch,
        max_steps=shape.steps,
        per_device_train_batch_size=shape.batch,
        learning_rate=shape.lr,
        adam_beta2=0.99,
        weight_decay=0.01,
        warmup_steps=shape.warmup,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        max_grad_norm=1.0,
        # fp32: on CPUs whose avx512_bf16 is not backed by matrix units autocast takes almost twice as long.
        use_cpu=True,
        seed=seed,
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,
    )
