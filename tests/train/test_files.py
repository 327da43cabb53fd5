"""Folders are complete or absent; every change to a finished one is told; paths stay inside (R2, R4, R5, R16)."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casehard.errors import Corrupt, StorageError, UserError
from casehard.io import manifest
from casehard.io.files import CRASH_EXIT, inside, is_full, staged, storage_errors, sweep, write_text_atomic
from casehard.io.manifest import MANIFEST, read_manifest, verify, write_manifest


@pytest.fixture
def folder(tmp_path):
    with staged(tmp_path / "made") as made:
        (made / "a.txt").write_text("alpha" * 50)
        (made / "deep").mkdir()
        (made / "deep/b.bin").write_bytes(bytes(range(256)))
    return tmp_path / "made"


def test_a_staged_folder_appears_whole(folder):
    verify(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["made"]
    assert (folder / "deep/b.bin").read_bytes() == bytes(range(256))


def test_a_failed_block_leaves_the_old_folder_and_nothing_else(folder):
    with pytest.raises(ZeroDivisionError), staged(folder) as again:
        (again / "a.txt").write_text("new")
        raise ZeroDivisionError
    verify(folder)
    assert (folder / "a.txt").read_text() == "alpha" * 50
    assert sorted(p.name for p in folder.parent.iterdir()) == ["made"]


def test_replacing_a_folder(folder):
    with staged(folder) as again:
        (again / "c.txt").write_text("new")
    verify(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["c.txt", MANIFEST]
    assert [p.name for p in folder.parent.iterdir()] == ["made"]


def test_every_flipped_bit_is_found(folder):
    """R4: 50 random bits of any file, the manifest included."""
    rng = random.Random(0)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for _ in range(50):
        path = rng.choice(files)
        data = bytearray(path.read_bytes())
        good = bytes(data)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(Corrupt) as caught:
            verify(folder)
        assert path.relative_to(folder).as_posix() in str(caught.value)
        if path.name != MANIFEST:
            assert "expected sha256" in str(caught.value) and "actual" in str(caught.value)
        path.write_bytes(good)
    verify(folder)


def _append(folder):
    (folder / "a.txt").write_text("alpha" * 51)


def _cut(folder):
    os.truncate(folder / "a.txt", 3)


def _remove(folder):
    (folder / "deep/b.bin").unlink()


def _extra(folder):
    (folder / "deep/c.bin").write_text("")


def _link(folder):
    target = folder.parent / "elsewhere"
    shutil.move(folder / "a.txt", target)
    (folder / "a.txt").symlink_to(target)


def _no_manifest(folder):
    (folder / MANIFEST).unlink()


def _odd_manifest(folder):
    (folder / MANIFEST).write_text('{"files": [1]}')


@pytest.mark.parametrize("harm", [_append, _cut, _remove, _extra, _link, _no_manifest, _odd_manifest])
def test_every_harm_is_found(folder, harm):
    harm(folder)
    with pytest.raises(Corrupt):
        verify(folder)


def test_large_files_are_hashed_side_by_side_with_the_same_result(folder, monkeypatch):
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    plain = read_manifest(folder)
    monkeypatch.setattr(manifest, "_LARGE", 0)  # every file is large
    assert len(plain) > 1
    write_manifest(folder)
    assert read_manifest(folder) == plain
    verify(folder)
    harmed = folder / max(plain)
    harmed.write_bytes(harmed.read_bytes() + b"!")
    with pytest.raises(Corrupt, match=f"{max(plain)} differs from the manifest"):
        verify(folder)


def test_a_link_to_a_good_folder_is_refused(folder):
    link = folder.with_name("link")
    link.symlink_to(folder)
    with pytest.raises(Corrupt, match="link"):
        verify(link)
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to("deep/b.bin")
    with pytest.raises(Corrupt, match="plain file"):
        write_manifest(folder)


@pytest.mark.parametrize("limit", [0, 100, 3000])
def test_a_full_disk_leaves_nothing(folder, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(StorageError) as caught, staged(folder, needs=5000) as again:
            (again / "big").write_bytes(b"x" * 5000)
        with pytest.raises(StorageError):
            write_text_atomic(folder.parent / "text", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "needed 5,000 bytes" in str(caught.value) and "free" in str(caught.value)
    assert caught.value.exit_code == 5
    verify(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["made"]


def test_too_little_space_is_told_before_writing(tmp_path):
    with pytest.raises(StorageError, match="free"), staged(tmp_path / "x", needs=10**18):
        raise AssertionError("never entered")


def test_what_counts_as_full():
    assert is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_full(wrapped)
    assert not is_full(OSError(errno.EACCES, "denied"))
    with pytest.raises(PermissionError), storage_errors(__import__("pathlib").Path(".")):
        raise PermissionError


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "x/y.json"
    write_text_atomic(path, "one")
    write_text_atomic(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["y.json"]


@pytest.mark.parametrize(
    ("point", "complete"),
    [("save:before_manifest", False), ("save:after_manifest", False), ("save:after_rename", True)],
)
def test_a_crash_at_any_point_leaves_complete_or_nothing(tmp_path, point, complete):
    code = (
        "import sys, pathlib; from casehard.io.files import staged\n"
        "with staged(pathlib.Path(sys.argv[1])) as f: (f / 'a').write_text('a')"
    )
    final = tmp_path / "made"
    done = subprocess.run([sys.executable, "-c", code, str(final)], env={**os.environ, "CASEHARD_CRASH_AT": point})
    assert done.returncode == CRASH_EXIT
    assert final.exists() == complete
    if complete:
        verify(final)
    sweep(tmp_path)
    assert list(tmp_path.glob(".*")) == []


BAD = ["", "../x", "/etc/passwd", "a/../../x", "a\0b", "x" * 300, "a/" * 600 + "b", "..", "C:\\x", "a\\b", "link/x"]


@pytest.mark.parametrize("path", BAD)
def test_paths_that_lead_out_are_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(UserError) as caught:
        inside(root, path)
    assert len(str(caught.value)) < 400
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab./\\\0~- \xe9"), max_size=20))
def test_an_accepted_path_is_inside(tmp_path_factory, text):
    root = tmp_path_factory.getbasetemp()
    try:
        path = inside(root, text)
    except UserError:
        return
    assert path.resolve().is_relative_to(root.resolve())


@pytest.fixture
def moments(monkeypatch):
    """What is flushed and renamed, in order: ("flush", name) and ("rename", name)."""
    seen = []

    def watched(original):
        def move(self, to):
            seen.append(("rename", Path(to).name))
            return original(self, to)

        return move

    def fsync(handle):
        seen.append(("flush", Path(f"/proc/self/fd/{handle}").readlink().name))

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_all_of_a_folder_is_on_the_disk_before_it_is_visible_and_then_its_name_is(tmp_path, moments):
    with staged(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "a.txt").write_text("a")
        (folder / "deep" / "b.txt").write_text("b")
    at = moments.index(("rename", "out"))
    before = [name for what, name in moments[:at] if what == "flush"]
    assert {"a.txt", "b.txt", "manifest.json", "deep"} <= set(before)
    assert before.index("manifest.json") > max(before.index("a.txt"), before.index("b.txt"))
    assert ("flush", tmp_path.name) in moments[at:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_all_of_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, moments):
    write_text_atomic(tmp_path / "a.json", "{}")
    at = moments.index(("rename", "a.json"))
    assert [what for what, _ in moments[:at]] == ["flush"]
    assert moments[at + 1 :] == [("flush", tmp_path.name)]
