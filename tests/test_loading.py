"""Slices are decoded once, and a cache that is not right is never believed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, write_slice

import loading
import train
from dataset import read_index


@pytest.fixture
def ours(ad_nc, tmp_path, monkeypatch):
    """A copy of the set, and a cache of its own. Returns (root, load); load() tells what it decoded."""
    shutil.copytree(ad_nc.parent, tmp_path / "set")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, decoded, genuine = tmp_path / "set" / "AD_NC", [], loading.slices.load_slices

    def counting(paths, *args):
        decoded.append(len(paths))
        return genuine(paths, *args)

    monkeypatch.setattr(loading.slices, "load_slices", counting)

    def load():
        decoded.clear()
        paths = read_index(root).path.tolist()
        images, known, errors = loading.decode_once(paths, lambda: (40, 48), root, bar=None)
        expected, _, facts = genuine(paths, (40, 48), None)
        assert np.array_equal(images, expected) and known.pixels.nunique() == len(paths)
        assert known[list(facts)].equals(facts)
        return sum(decoded), images, errors

    return root, load


def cache_file():
    (file,) = loading.cache_folder().glob("slices-*")
    return file


def test_a_set_is_decoded_once(ours):
    root, load = ours
    assert load()[0] == 90
    count, images, errors = load()
    assert count == 0 and errors == {} and isinstance(images, np.memmap) and not images.flags.writeable
    assert oct(cache_file().stat().st_mode)[-3:] == "600"  # slices of patients are not for everybody


@pytest.mark.parametrize("change", ["changed", "added", "removed", "renamed", "touched"])
def test_a_changed_set_is_decoded_anew(ours, change):
    root, load = ours
    load()
    folder = root / "train" / "AD"
    first = folder / "100_70.jpeg"
    if change == "changed":  # to another picture, with the old time
        before = first.stat()
        write_slice(first, False, 1)
        os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert first.stat().st_size != before.st_size
    elif change == "added":
        write_slice(folder / "100_99.jpeg", True, 5)
    elif change == "removed":
        first.unlink()
    elif change == "renamed":
        first.rename(folder / "100_99.jpeg")
    else:
        os.utime(first)
    assert load()[0] == len(read_index(root)) and load()[0] == 0
    cache_file()  # the old one is gone


@pytest.mark.parametrize("damage", ["cut", "emptied", "pixel", "trailer", "another file", "swapped blocks"])
def test_a_damaged_cache_is_rebuilt_and_never_believed(ours, damage, monkeypatch):
    root, load = ours
    monkeypatch.setattr(loading, "BLOCK", 4000)
    load()
    file = cache_file()
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[:-100]
    elif damage == "emptied":
        content = b""
    elif damage == "pixel":
        content[1000] ^= 1
    elif damage == "trailer":
        content[-50] ^= 1
    elif damage == "swapped blocks":
        start = len(loading.MAGIC)
        content[start : start + 8000] = content[start + 4000 : start + 8000] + content[start : start + 4000]
    else:
        content = os.urandom(5000)
    file.write_bytes(content)
    assert load()[0] == 90 and load()[0] == 0


def test_what_a_killed_process_left_in_the_cache_is_removed_after_a_day(ours):
    root, load = ours
    load()
    file = cache_file()
    old, new = (file.with_name(f"{file.name}-{name}.tmp") for name in ("old", "new"))
    for draft in (old, new):
        draft.write_bytes(b"x")
    os.utime(old, (0, 0))
    file.unlink()
    assert load()[0] == 90 and not old.exists() and new.exists()


def test_a_set_with_files_that_cannot_be_read_is_not_kept_for_they_may_be_mended(ours, monkeypatch):
    root, load = ours
    first, genuine = str(root / "train" / "AD" / "100_70.jpeg"), loading.slices._decode

    def locked(path, size):
        if path == first:
            raise PermissionError(13, "Permission denied")
        return genuine(path, size)

    args = train.parse_args(["--data", str(root), *SMALL])
    with monkeypatch.context() as patch:
        patch.setattr(loading.slices, "_decode", locked)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"(?s)1 file cannot be used.*100_70\.jpeg .*Permission denied"):
                loading.load_data(args, root, bar=None)
    assert not list(loading.cache_folder().iterdir())
    assert load()[2] == {}  # mended, though neither size nor time have changed


def test_a_dangling_link_is_named(ours):
    root, _ = ours
    (root / "train" / "AD" / "100_99.jpeg").symlink_to("nowhere.jpeg")
    with pytest.raises(ValueError, match=r"(?s)1 file cannot be used.*100_99\.jpeg"):
        loading.load_data(train.parse_args(["--data", str(root), *SMALL]), root, bar=None)


def test_without_a_home_the_slices_are_decoded_into_memory(ad_nc, monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(loading.Path, "home", homeless)
    images, _, errors = loading.decode_once(read_index(ad_nc).path.tolist(), lambda: (40, 48), ad_nc, None)
    assert images.shape == (90, 40, 48) and errors == {} and "XDG_CACHE_HOME" in capsys.readouterr().out


def test_two_processes_may_build_the_cache_at_once(ad_nc, tmp_path):
    script = ("import sys, loading; from dataset import read_index; paths = read_index(sys.argv[1]).path.tolist();"
              "images = loading.decode_once(paths, lambda: (40, 48), sys.argv[1], None)[0];"
              "print(images.shape, int(images.sum()))")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(loading.__file__).parent)}
    run = dict(stdout=subprocess.PIPE, text=True, env=environment)
    processes = [subprocess.Popen([sys.executable, "-c", script, str(ad_nc)], **run) for _ in range(4)]
    answers = {process.communicate(timeout=120)[0].splitlines()[-1] for process in processes}
    assert len(answers) == 1 and "(90, 40, 48)" in answers.pop()
    assert len(list((tmp_path / "convnext-ad-nc").iterdir())) == 1  # no draft is left


def test_where_the_cache_cannot_be_written_the_slices_are_decoded_into_memory(ours, monkeypatch, capsys):
    root, load = ours
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert load()[0] == 90
    assert "decoded into memory" in capsys.readouterr().out
    monkeypatch.undo()
    args = train.parse_args(["--data", str(root), "--no-cache", *SMALL])
    assert not isinstance(loading.load_data(args, root, bar=None)[1], np.memmap)


def test_what_a_run_reads_out_of_the_cache_is_what_it_decodes(ours):
    root, _ = ours
    flags = ["--data", str(root), *SMALL]
    one, two, three = (loading.load_data(train.parse_args(flags + more), root, bar=None)
                       for more in ([], [], ["--no-cache"]))
    for index, images in (two, three):
        assert index.equals(one[0]) and np.array_equal(images, one[1])


def test_folds_use_only_rows_of_train(ours):
    root, _ = ours
    args = train.parse_args(["--data", str(root), "--fold", "1", "--folds", "3", *SMALL])
    index, images = loading.load_data(args, root, bar=None)
    assert len(images) == 90 and len(index) == 60 and index.path.str.contains("/train/").all()
    for row, path in index.path.items():
        assert np.array_equal(images[row], loading.slices.decode(path))
