"""What the fork server of the tests imports once for all its children: libraries of others, and nothing of casehard."""

from __future__ import annotations

import gc
import os

# As casehard.model.load and casehard.cli have it before transformers is imported.
os.environ.setdefault("USE_HUB_KERNELS", "NO")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import hypothesis  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import safetensors.torch  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
import transformers
from transformers.models.llama import modeling_llama  # noqa: F401

# No test cuts the power, which is all that flushing guards against, and waiting for the disk was a third of the time.
# tests/train/test_files.py holds what is flushed, and when.
os.fsync = lambda handle: None
transformers.Trainer, transformers.AutoTokenizer, transformers.AutoModelForCausalLM  # noqa: B018  imported when asked
gc.collect()
gc.freeze()
