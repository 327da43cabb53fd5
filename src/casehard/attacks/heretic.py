"""Run heretic for the attack ``external``: write its prompts, answer its questions, save the trial to be measured.

    python -m casehard.attacks.heretic PROGRAM MODEL OUT HARMFUL BENIGN SEED [option of heretic ...]

heretic (https://github.com/p-e-w/heretic, AGPL-3.0) searches for the strength of abliteration, layer by layer, that
leaves fewest refusals at a small divergence from the model. It is a program of its own in an environment of its own:
nothing of it is imported, and what passes between the two is text. Written against version 1.4.0, which asks in
numbered menus where it believes to be in a notebook.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PER_FIVE = 4
"""Of five prompts of a file, so many give the direction; heretic counts refusals on the others."""
DAMAGED = 0.5
"""Above this divergence heretic itself calls a model damaged."""
SAVE = "Save the model to a local folder"
QUESTION = re.compile(rb"(Enter number|Path to the folder:): $")
CHOICE = re.compile(r"^\[(\d+)\] (.*?)\s*$", re.MULTILINE)
TRIAL = re.compile(r"Refusals:\s*(\d+)/\d+, KL divergence:\s*([\d.]+)")


class NotHereticError(Exception):
    """The program asked or did something that this module does not know."""


def prompts_of(path: Path) -> list[str]:
    """Return the different prompts of a JSONL file, one line each, in their order.

    Raises:
        NotHereticError: fewer than five, or rows without a prompt.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not all(isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows):
        raise NotHereticError(f"{path}: rows need a prompt")
    found = list(dict.fromkeys(" ".join(row["prompt"].split()) for row in rows))
    found = [prompt for prompt in found if prompt]
    if len(found) < 5:
        raise NotHereticError(f"{path}: {len(found)} different prompts; at least 5 are needed")
    return found


def write_settings(place: Path, model: str, seed: int, files: dict[str, Path]) -> None:
    """Write heretic's ``config.toml`` and its prompts into the folder in which it runs."""
    lines = [f"model = {_toml(model)}", f"seed = {seed}", 'export_strategy = "merge"']
    for kind, path in files.items():
        prompts = prompts_of(path)
        given = [prompt for at, prompt in enumerate(prompts) if at % 5 < PER_FIVE]
        for name, chosen in ((f"{kind}_prompts", given), (f"{kind}_evaluation_prompts", prompts[PER_FIVE::5])):
            text = place / f"{name}.txt"
            text.write_text("".join(f"{prompt}\n" for prompt in chosen), encoding="utf-8")
            lines += [f"[{name}]", f"dataset = {_toml(str(text))}"]
    (place / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(text: str) -> str:
    """Return a basic string of TOML, which has the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def answer(menu: str, saved: bool) -> str:
    """Return the number that heretic's menu wants.

    Of the trials, the one with fewest refusals among those that heretic does not call damaged; where all are, the
    least damaged. Then the model is saved, and afterwards every menu is left by its last choice.

    Raises:
        NotHereticError: a menu without choices, or one that is not known.
    """
    choices = CHOICE.findall(menu)
    if not choices:
        raise NotHereticError(f"no choices before the question; it said last: {menu[-300:]!r}")
    if saved:
        return choices[-1][0]
    trials = [(number, *map(float, found.groups())) for number, text in choices if (found := TRIAL.search(text))]
    if trials:
        whole = [trial for trial in trials if trial[2] <= DAMAGED]
        best = min(whole, key=lambda t: (t[1], t[2])) if whole else min(trials, key=lambda t: t[2])
        return str(best[0])
    for number, text in choices:
        if text == SAVE:
            return number
    raise NotHereticError(f"an unknown menu: {[text for _, text in choices]}")


def converse(process: subprocess.Popen[bytes], out: str) -> None:
    """Answer until the program ends; what it says goes to stderr, where ``external`` keeps it."""
    assert process.stdin is not None
    saved, said = False, b""
    for part in _parts(process):
        sys.stderr.buffer.write(part)
        sys.stderr.buffer.flush()
        said += part
        asked = QUESTION.search(said)
        if not asked:
            continue
        if asked[1].startswith(b"Path"):
            told, saved = out, True
        else:
            told = answer(said.decode("utf-8", "replace"), saved)
        process.stdin.write(told.encode() + b"\n")
        process.stdin.flush()
        said = b""


def _parts(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield what the program writes, as it comes."""
    assert process.stdout is not None
    while part := os.read(process.stdout.fileno(), 65536):
        yield part


def main(words: list[str]) -> int:
    """Run it in the present folder; return the exit code."""
    if len(words) < 6:
        print(__doc__, file=sys.stderr)
        return 2
    program, model, out, harmful, benign, seed = words[:6]
    env = {"HF_HUB_OFFLINE": "1", **os.environ, "KAGGLE_KERNEL_RUN_TYPE": "numbered menus", "COLUMNS": "200"}
    try:
        write_settings(Path.cwd(), model, int(seed), {"bad": Path(harmful), "good": Path(benign)})
        command, pipe = [program, "--model", model, *words[6:]], subprocess.PIPE
        with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as process:
            try:
                converse(process, out)
            except BaseException:
                process.kill()
                raise
        return process.returncode
    except (NotHereticError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
