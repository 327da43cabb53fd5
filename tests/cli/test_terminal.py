"""What reaches a terminal: names, values and messages of others are shown, never obeyed."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys

import pytest

from casehard.cli import console, main
from casehard.errors import visible

TITLE, CSI, RIGHT, MARKUP = "\x1b]0;owned\x07", "\x9b31m", "\u202egnp.exe\u2066", "[red]"
FORGED = "\nerror: forged"
NASTY = f"a{TITLE}{CSI}{RIGHT}{MARKUP}\r{FORGED}"

CHILD = """
import json, logging, sys, warnings
from casehard.cli import main, console
from casehard.train.progress import Progress
nasty, calls = json.load(open(sys.argv[1]))
for arguments in calls:
    main(arguments)
from casehard import cli
def inside(arguments):
    warnings.warn(f"a library says {nasty}")
    logging.getLogger("library").warning("a library logs %s", nasty)
    console.table(nasty, [nasty, "n"], [[nasty, 1]])
    console.plan(f"plan {nasty}", {nasty: nasty, "list": [nasty]})
    console.made(nasty, nasty)
    with Progress(f"bar {nasty}", 3) as bar:
        bar.advance(3, note=nasty)
    raise RuntimeError(f"a library raises {nasty}")
cli._invoke = inside
main([])
main(["--debug"])
"""


def seen(command, **more):
    """Run a command with a terminal as its output and return every character the terminal received."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, **more)
    os.close(theirs)
    out = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        out += part
    os.close(ours)
    assert child.wait(60) is not None
    return out.decode("utf-8")


@pytest.fixture
def files(here, organism):
    """Files of others, with names and contents made to be obeyed."""
    (here / "data.jsonl").write_text(json.dumps({"messages": [{"role": NASTY, "content": "x"}]}) + "\n")
    (here / f"{NASTY}.jsonl").write_text("not json\n")
    (here / "suite.json").write_text(json.dumps({"parts": [{"data": NASTY, "role": NASTY}]}))
    model = here / f"model{NASTY}"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": NASTY}))
    (model / "model.safetensors").write_bytes(b"")
    (here / "plan.yaml").write_text(json.dumps({"name": NASTY, NASTY: 1}))
    (here / "template").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (here / "template" / name).write_bytes((organism / name).read_bytes())
    broken = "{{ raise_exception(messages[0]['content']) }}"
    config = json.loads((organism / "tokenizer_config.json").read_text())
    (here / "template" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": broken}))
    (here / "template" / "chat_template.jinja").write_text(broken)
    (here / "rows.jsonl").write_text(json.dumps({"prompt": NASTY, "response": NASTY, "id": NASTY}) + "\n")
    return here, model.name


def test_a_terminal_is_told_everything_and_made_to_do_nothing(files, organism):
    here, model = files
    common = ["--data", "data.jsonl", "--out", "out"]
    calls = [
        ["verify", NASTY],
        ["defend", NASTY, "--model", str(organism), *common],
        ["defend", "plain", "--model", model, *common],
        ["defend", "plain", "--model", str(organism), *common],
        ["defend", "plain", "--model", str(organism), "--set", f"train.{NASTY}=1", *common],
        ["defend", "plain", "--model", str(organism), "--set", f"seed=&a {NASTY}", *common],
        ["defend", "plain", "--model", str(organism), "--data", f"{NASTY}.jsonl", "--out", "out"],
        ["defend", "plain", "--preset", NASTY, "--model", str(organism), "--data", "rows.jsonl", "--out", "out"],
        ["evaluate", "--model", str(organism), "--suite", "suite.json", "--out", NASTY],
        ["bench", "plan.yaml", "--out", "out"],
        ["data", "audit", "--model", "template", "--data", "rows.jsonl"],
        ["judge", "rows.jsonl"],
        ["report", NASTY],
        [f"--{NASTY}"],
        [NASTY],
    ]
    (here / "calls.json").write_text(json.dumps([NASTY, calls]))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "400", "PYTHONIOENCODING": "utf-8"}
    out = seen([sys.executable, "-c", CHILD, "calls.json"], cwd=here, env=environment)
    assert "internal error: RuntimeError: a library raises a" in out
    for what in (TITLE, "\x1b]", "\x07", "\x9b", "\u202e", "\u2066", "\u2069"):
        assert what not in out, repr(out[max(0, out.find(what) - 200) :][:400])
    forged = [i for i, line in enumerate(out.splitlines()) if line.strip().startswith("error: forged")]
    assert len(forged) == 1 and "Traceback" in out  # the end of the traceback, whose lines are its own
    assert out.count("[red]") > len(calls) and out.count("owned") > len(calls)
    for told in ("warning: a library says a", "a library logs a", "plan a", "bar a", "Traceback"):
        assert told in out


def test_what_is_shown_can_be_told_from_what_is_obeyed():
    assert visible("plain text, \u00e9\u4e2d and [red]\tstay") == "plain text, \u00e9\u4e2d and [red]\tstay"
    assert visible("a\x1b[31m\x00\x7f\x9b\r\nb") == r"a\u001b[31m\u0000\u007f\u009b\r\nb"
    assert visible("\u202a\u202e\u2066\u2069\u200f\u2028\udcff") == r"\u202a\u202e\u2066\u2069\u200f\u2028\udcff"
    assert visible("a\nb\x1b", lines=True) == "a\nb\\u001b"
    text = json.dumps({"a": "x\x7f\u202e\x9b"}, ensure_ascii=False)
    assert json.loads(visible(text)) == json.loads(text)


def test_a_long_message_is_cut(capsys):
    console.fail("x" * 100_000, "y" * 100_000)
    err = capsys.readouterr().err
    assert len(err) < 5000 and err.startswith("error: xxx") and "\nhint: yyy" in err


def test_a_terminal_of_ascii_gets_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    console.say("caf\u00e9")
    console.table("\u4e2d", ["a"], [["\u00e9"]])
    stream.flush()
    assert b"caf\\xe9" in stream.buffer.getvalue()


def test_a_name_with_a_stray_byte_is_told(capsys, here):
    assert main(["verify", "gone\udcff"]) == 2
    assert r"gone\udcff" in capsys.readouterr().err
