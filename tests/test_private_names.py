"""Versions are known whatever the installation forgot to record."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from casehard.benchmark import store
from casehard.compat import require_supported, requirements_of, version_of
from casehard.errors import Unsupported


def test_an_installed_package_says_its_version() -> None:
    assert version_of("pytest") == pytest.__version__
    assert version_of("certainly-not-there") == ""
    assert requirements_of("certainly-not-there") is None


def test_a_package_of_a_source_tree_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "from_source", SimpleNamespace(__version__="3.1"))
    assert version_of("from_source") == "3.1"


def test_an_installation_cut_short_is_asked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cut_short-0.dist-info").mkdir()
    (tmp_path / "cut_short-0.dist-info" / "METADATA").write_text("Name: cut_short\n")
    assert version_of("cut_short") == ""
    monkeypatch.setitem(sys.modules, "cut_short", SimpleNamespace(__version__="3.2"))
    assert version_of("cut_short") == "3.2"


def test_what_is_recorded_of_a_run_needs_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import transformers

    def none(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", none)
    found = store._versions.__wrapped__()
    assert (found["torch"], found["transformers"]) == (str(torch.__version__), transformers.__version__)
    require_supported.__wrapped__()
    monkeypatch.setattr(transformers, "__version__", "4.9.0")
    with pytest.raises(Unsupported, match=r"transformers 4.9.0 is older than 5.17"):
        require_supported.__wrapped__()
