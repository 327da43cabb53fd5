"""``casehard model``: what the user reads, and that every other command names it where it would help."""

from __future__ import annotations

import json

import pytest
from helpers import tree

from casehard.cli import main
from fakes import tiny_llama
from gguf_fakes import VOCABULARY, write_folder


@pytest.fixture
def plain(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "plain", tiny_llama(vocab=len(VOCABULARY)))


def test_import_says_what_it_made(plain, here, capsys):
    assert main(["model", "import", str(plain), "--out", "out", "--licence", "mit", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr()
    assert "F32 to bfloat16" in said.out and "model folder: out" in said.out and "largest difference" in said.out
    assert main(["verify", "out"]) == 0
    assert json.loads((here / "out" / "casehard.json").read_text())["provenance"]["import"]["licence"] == "mit"
    assert main(["model", "import", str(plain), "--out", "out"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert "out.staging" not in " ".join(tree(here))


def test_fetch_without_a_name_lists_what_is_known(here, capsys):
    assert main(["model", "fetch"]) == 0
    said = capsys.readouterr().out
    assert "smollm2" in said and "HuggingFaceTB/SmolLM2-135M-Instruct" in said and "apache-2.0" in said
    assert main(["model", "fetch", "smol"]) == 2 and "known: smollm2" in capsys.readouterr().err
    assert main(["model", "fetch", "--out", "x"]) == 2 and not tree(here)


@pytest.mark.parametrize("form", ["file.gguf", "folder", "pytorch_model.bin"])
def test_every_command_that_meets_another_form_names_the_import(here, capsys, form):
    (here / "in").mkdir()
    (here / "in" / "config.json").write_text("{}")
    name = "pytorch_model.bin" if form.endswith("bin") else "file.gguf"
    (here / "in" / name).write_bytes(b"not opened")
    (here / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "role": "utility"}\n')
    given = "in" if form == "folder" else f"in/{form}"
    wanted = "model import in --allow-pickle" if form.endswith("bin") else "model import in/file.gguf"
    for command in (
        "defend plain --data rows.jsonl --out out",
        "evaluate --suite rows.jsonl --out out",
        "attack finetune --harmful rows.jsonl --suite rows.jsonl --share 1 --out out",
        "scan model --suite rows.jsonl --out out",
        "data audit --data rows.jsonl",
        "doctor",
    ):
        line = [*command.split(), "--model", given]
        code = main(line)
        said = capsys.readouterr()
        text = said.err + said.out
        if line[0] == "data" and form == "folder":  # reads the tokenizer alone
            continue
        assert code and f"casehard {wanted}" in " ".join(text.split()), (line, text)
