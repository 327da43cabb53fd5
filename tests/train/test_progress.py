"""How far a task is, on a terminal of any width and in lines elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pytest

from casehard.train import progress
from casehard.train.progress import Progress, announce


class Terminal(io.StringIO):
    """Text that counts as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [80, 100])
def test_counts_and_times_are_never_cut(monkeypatch, width):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "quiet", False)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    with Progress("a-plan-with-quite-a-long-name-of-its-own", 124) as bar:
        bar.advance(12)
        bar.busy(2)
        bar.advance(1, note="world-0/patcher-with-settings/s0/full-parameter-p10 ok")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", screen.getvalue())]
    last = [line for line in lines if "/124" in line][-1]
    assert len(last) <= width
    # Done, a note cut to what is left, time taken, time to come.
    assert re.search(r" 13/124 2 running, w.* 0:00:0\d \S:\S\S:\S\S *$", last)


def test_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(progress, "quiet", False)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress("train", 4) as bar:
        bar.advance(1, loss=0.5)
    with Progress("runs", 4) as bar:
        bar.busy(2)
        bar.advance(1, note="a ok")
    announce("what comes next ...")
    lines = [line.partition(" [")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "train: 1/4 loss 0.5",
        "runs: 0 done, 2 running of 4",
        "runs: 1 done, 2 running of 4, a ok",
        "what comes next ...",
    ]
    progress.set_quiet(True)
    announce("nothing")
    assert capsys.readouterr().err == ""
