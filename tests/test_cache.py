"""Slices are decoded once, and a cache that is not right is never believed."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, write_slice

from adnc.data import cache
import dataset
import train
from dataset import read_index


@pytest.fixture
def ours(ad_nc, tmp_path, monkeypatch):
    """A copy of the set, and a cache of its own. Returns (root, load); load() tells what it decoded."""
    shutil.copytree(ad_nc.parent, tmp_path / "set")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, decoded, genuine = tmp_path / "set" / "AD_NC", [], cache.slices.load_slices

    def counting(paths, *args, **more):
        decoded.append(len(paths))
        return genuine(paths, *args, **more)

    monkeypatch.setattr(cache.slices, "load_slices", counting)

    def load():
        decoded.clear()
        paths = read_index(root).path.tolist()
        images, known, errors = cache.decode(paths, lambda: (40, 48), root, bar=None)
        expected, stats, _ = genuine(paths, (40, 48), None)
        assert np.array_equal(images, expected) and known.pixel_hash.nunique() == len(paths)
        assert known[list(stats)].equals(stats)
        return sum(decoded), images, errors

    return root, load


def cache_file(kind="npy"):
    (file,) = cache.cache_folder().glob(f"slices-*.{kind}")
    return file


def test_a_set_is_decoded_once(ours):
    root, load = ours
    assert load()[0] == 90
    count, images, errors = load()
    assert count == 0 and not any(errors) and isinstance(images, np.memmap) and not images.flags.writeable
    for kind in ("npy", "json"):  # slices of patients are not for everybody
        assert oct(cache_file(kind).stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("change", ["changed", "exchanged", "added", "removed", "renamed", "touched"])
def test_a_changed_set_is_decoded_again(ours, change):
    root, load = ours
    load()
    folder = root / "train" / "AD"
    first = folder / "100_70.jpeg"
    if change == "changed":  # to another picture, with the old time
        before = first.stat()
        write_slice(first, False, 1)
        os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert first.stat().st_size != before.st_size
    elif change == "exchanged":  # two of one size and one time, as archives and copies give them
        other = first.with_name("101_70.jpeg")
        for path in (first, other):
            path.write_bytes(path.read_bytes().ljust(9000, b"\0"))
            os.utime(path, ns=(10**18, 10**18))
        load()
        first.rename(folder / "x")
        other.rename(first)
        (folder / "x").rename(other)
    elif change == "added":
        write_slice(folder / "100_99.jpeg", True, 5)
    elif change == "removed":
        first.unlink()
    elif change == "renamed":
        first.rename(folder / "100_99.jpeg")
    else:
        os.utime(first)
    assert load()[0] == len(read_index(root)) and load()[0] == 0
    assert cache_file().stem == cache_file("json").stem  # the old ones are gone


DAMAGE = {
    "cut": lambda data: data[:-100], "emptied": lambda data: b"", "another file": lambda data: os.urandom(5000),
    "a pixel": lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
    "swapped slices": lambda data: data[:-3840] + data[-1920:] + data[-3840:-1920],
    "another shape": lambda data: data.replace(b"(90, 40, 48)", b"(90, 48, 40)"),
}
DAMAGE_TO_JSON = {
    "cut": DAMAGE["cut"], "emptied": DAMAGE["emptied"], "not JSON": lambda data: b"no",
    "other JSON": lambda data: b"[1]",
    "a number": lambda data: data.replace(b"48.0", b"49.0", 1), "a hash": lambda data: data[:-20] + b"0" + data[-19:],
}  # fmt: skip


EVERY = [("npy", name) for name in DAMAGE] + [("json", name) for name in DAMAGE_TO_JSON]


@pytest.mark.parametrize("kind, damage", EVERY)
def test_a_damaged_cache_is_rebuilt_and_never_believed(ours, kind, damage):
    root, load = ours
    load()
    file = cache_file(kind)
    before = file.read_bytes()
    file.write_bytes((DAMAGE if kind == "npy" else DAMAGE_TO_JSON)[damage](before))
    assert file.read_bytes() != before
    assert load()[0] == 90 and load()[0] == 0


def test_what_a_killed_process_left_in_the_cache_is_removed_after_a_day(ours):
    root, load = ours
    load()
    file = cache_file()
    old, new = (file.with_name(f"{file.stem}-{name}.tmp") for name in ("old", "new"))
    for draft in (old, new):
        draft.write_bytes(b"x")
    os.utime(old, (0, 0))
    file.unlink()
    assert load()[0] == 90 and not old.exists() and new.exists()


def test_decoded_slices_that_nobody_reads_are_removed_and_those_in_use_stay(ours, capsys):
    root, load = ours
    load()
    used, unused = cache_file(), cache_file().with_name("slices-0-1.npy")
    demo = used.with_name("phantom-80")
    for path in (unused, unused.with_suffix(".json"), demo):
        path.write_bytes(b"x")
    for path in used.parent.iterdir():
        os.utime(path, (0, 0))
    assert load()[0] == 0  # which marks them as read
    capsys.readouterr()
    cache.decode(read_index(root).path.tolist()[:5], lambda: (40, 48), root.parent)  # another set
    assert used.exists() and used.with_suffix(".json").exists() and demo.exists()
    assert not unused.exists() and not unused.with_suffix(".json").exists()
    assert f"of decoded slices that nobody has read for {cache.UNUSED_DAYS} days" in capsys.readouterr().out


def test_a_set_with_files_that_cannot_be_read_is_not_kept_for_they_may_be_fixed(ours, monkeypatch):
    root, load = ours
    first, genuine = str(root / "train" / "AD" / "100_70.jpeg"), cache.slices._decode

    def locked(path, *how):
        if path == first:
            raise PermissionError(13, "Permission denied")
        return genuine(path, *how)

    args = train.parse_args(["--data", str(root), *SMALL])
    with monkeypatch.context() as patch:
        patch.setattr(cache.slices, "_decode", locked)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"(?s)1 file cannot be used.*100_70\.jpeg .*Permission denied"):
                dataset.load_set(args, root, bar=None)
    assert not list(cache.cache_folder().iterdir())
    assert not any(load()[2])  # fixed, though neither size nor time have changed


def test_a_dangling_link_is_named(ours):
    root, _ = ours
    (root / "train" / "AD" / "100_99.jpeg").symlink_to("nowhere.jpeg")
    with pytest.raises(ValueError, match=r"(?s)1 file cannot be used.*100_99\.jpeg"):
        dataset.load_set(train.parse_args(["--data", str(root), *SMALL]), root, bar=None)


def test_without_a_home_the_slices_are_decoded_into_memory(ad_nc, monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.Path, "home", homeless)
    images, _, errors = cache.decode(read_index(ad_nc).path.tolist(), lambda: (40, 48), ad_nc, None)
    assert images.shape == (90, 40, 48) and not any(errors) and "XDG_CACHE_HOME" in capsys.readouterr().out


def test_two_processes_may_build_the_cache_at_once(ad_nc, tmp_path):
    script = ("import sys, cache; from dataset import read_index; paths = read_index(sys.argv[1]).path.tolist();"
              "images = cache.decode(paths, lambda: (40, 48), sys.argv[1], None)[0];"
              "print(images.shape, int(images.sum()))")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(cache.__file__).parent)}
    run = dict(stdout=subprocess.PIPE, text=True, env=environment)
    processes = [subprocess.Popen([sys.executable, "-c", script, str(ad_nc)], **run) for _ in range(4)]
    answers = {process.communicate(timeout=120)[0].splitlines()[-1] for process in processes}
    assert len(answers) == 1 and "(90, 40, 48)" in answers.pop()
    left = sorted(path.suffix for path in (tmp_path / "convnext-ad-nc").iterdir())
    assert left == [".json", ".npy"]  # no draft


def test_where_the_cache_cannot_be_written_the_slices_are_decoded_into_memory(ours, monkeypatch, capsys):
    root, load = ours

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert load()[0] == 90
    assert "No space left on device); they are decoded into memory" in capsys.readouterr().out
    assert not list(cache.cache_folder().iterdir())
    args = train.parse_args(["--data", str(root), "--no-cache", *SMALL])
    assert not isinstance(dataset.load_set(args, root, bar=None).images, np.memmap)


def test_what_a_run_reads_out_of_the_cache_is_what_it_decodes(ours):
    root, _ = ours
    flags = ["--data", str(root), *SMALL]
    one, two, three = (dataset.load_set(train.parse_args(flags + more), root, bar=None)
                       for more in ([], [], ["--no-cache"]))
    for other in (two, three):
        assert other.index.equals(one.index) and np.array_equal(other.images, one.images)


def test_folds_use_only_rows_of_train(ours):
    root, _ = ours
    args = train.parse_args(["--data", str(root), "--fold", "1", "--folds", "3", *SMALL])
    fold = dataset.load_set(args, root, bar=None)
    assert len(fold.images) == 90 and len(fold) == 60 and fold.index.path.str.contains("/train/").all()
    for row, path in zip(fold.rows, fold.index.path):
        assert np.array_equal(fold.images[row], cache.slices.decode(path))
