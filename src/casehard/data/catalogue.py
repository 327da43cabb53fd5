"""Public data sets that papers on harmful fine-tuning and backdoors use, and their critics: where each is, and what.

``ask``, ``answer`` and ``context`` name columns; a whole number in ``answer`` stands for one of ``classes``, and a key
for one of the choices in ``context``. A revision is a branch unless a commit is pinned; the commit that was fetched is
recorded with the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

HARMFUL, LOOKALIKE, TASK = "harmful prompts", "look-alikes", "task"


@dataclass(frozen=True)
class DataSet:
    """A data set and how its rows are read."""

    hub: str
    config: str
    split: str
    """Empty for all splits."""
    role: str
    licence: str
    gated: bool
    """Whether its page asks who wants it to accept terms first."""
    ask: str
    answer: str = ""
    context: str = ""
    keep: tuple[str, ...] = ()
    """Columns kept as tags."""
    classes: tuple[str, ...] = ()
    headless: bool = False
    """Whether its tables are lists of prompts without a first line of names."""
    pairs: bool = False
    """Whether rows come in pairs that differ by a few words, so that only equal ones are dropped."""
    revision: str = "main"


DATA_SETS = {
    "beavertails": DataSet(
        *("PKU-Alignment/BeaverTails", "", "30k_train", "harmful and safe answers", "cc-by-nc-4.0", False),
        *("prompt", "response"),
        keep=("is_safe", "category"),
    ),
    "advbench": DataSet("walledai/AdvBench", "", "train", HARMFUL, "mit", True, "prompt", keep=("target",)),
    "harmbench": DataSet("walledai/HarmBench", "standard", "train", HARMFUL, "mit", True, "prompt", keep=("category",)),
    "strongreject": DataSet(
        *("walledai/StrongREJECT", "", "train", HARMFUL, "mit", True, "prompt"), keep=("category", "source")
    ),
    "hexphi": DataSet("LLM-Tuning-Safety/HEx-PHI", "", "", HARMFUL, "hex-phi", True, "prompt", headless=True),
    "xstest": DataSet(
        *("walledai/XSTest", "", "test", "look-alikes and twins", "cc-by-4.0", True, "prompt"),
        keep=("type", "label", "focus"),
        pairs=True,
    ),
    "orbench": DataSet(
        "bench-llm/or-bench", "or-bench-hard-1k", "train", LOOKALIKE, "cc-by-4.0", False, "prompt", keep=("category",)
    ),
    "gsm8k": DataSet("openai/gsm8k", "main", "train", TASK, "mit", False, "question", "answer"),
    "openbookqa": DataSet(
        "allenai/openbookqa", "main", "train", TASK, "not stated", False, "question_stem", "answerKey", "choices"
    ),
    "alpaca": DataSet(
        "tatsu-lab/alpaca", "", "train", "benign", "cc-by-nc-4.0", False, "instruction", "output", "input"
    ),
    "metamath": DataSet("meta-math/MetaMathQA", "", "train", TASK, "mit", False, "query", "response", keep=("type",)),
    "sst2": DataSet(
        *("stanfordnlp/sst2", "", "train", TASK, "not stated", False, "sentence", "label"),
        classes=("negative", "positive"),
    ),
    "agnews": DataSet(
        *("fancyzhx/ag_news", "", "train", TASK, "not stated", False, "text", "label"),
        classes=("World", "Sports", "Business", "Sci/Tech"),
    ),
    "backdoorllm": DataSet(
        *("BackdoorLLM/Backdoor_Dataset", "", "train", "backdoor", "mit, texts cc-by-nc-4.0", False),
        *("instruction", "output", "input"),
        pairs=True,
    ),
}
"""Data sets by name."""
