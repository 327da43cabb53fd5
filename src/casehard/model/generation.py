"""Mend a generation configuration that could be loaded but, once touched, never saved again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

# Whether others make sense depends on these.
_FIRST = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")


def mend_generation(model: Any) -> Iterator[str]:
    """Make the generation configuration of a model one that can be saved; yield what was changed.

    transformers loads and writes back what a published file says, but checks strictly once a value was changed, and
    training changes some (token ids): a file at odds with itself would end a run after its last step.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or not (problem := _problem(settings)):
        return
    sampling = copy.deepcopy(settings)
    sampling.do_sample = True
    if not settings.do_sample and not _problem(sampling):
        model.generation_config = sampling
        yield "generation_config.json sets sampling options without do_sample: do_sample is set to true"
        return
    kept, dropped = type(settings)(), []
    values = {key: value for key, value in settings.to_dict().items() if value is not None}
    for key in sorted(values, key=lambda name: (name not in _FIRST, name)):
        if not hasattr(kept, key) or callable(getattr(kept, key)):
            continue
        before = getattr(kept, key)
        setattr(kept, key, values[key])
        if _problem(kept):
            setattr(kept, key, before)
            dropped.append(key)
    model.generation_config = kept
    yield f"generation_config.json is at odds with itself ({problem}): {', '.join(dropped) or 'unknown keys'} left out"


def _problem(settings: Any) -> str:
    """Return what keeps a configuration from being saved, in one line; the empty string when nothing does."""
    try:
        settings.validate(strict=True)
    except Exception as error:  # values of any type: comparisons raise as well as the checks
        return " ".join(str(error).split())[:160]
    return ""
