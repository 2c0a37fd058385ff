"""Decoded slices, kept once.

Not run by itself. The cache holds two files a set: the uint8 array of all its slices (.npy), memory-mapped, so that a
set larger than memory trains as well, and a .json with the hash and the STATS of each slice. Both are named by the
files that they were made of (path, size, times) and used only if every slice has its hash; else they are made again.
`train.py --no-cache` decodes into memory.
"""

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from adnc.data import pixels as slices
from adnc.cli import fingerprint

FORMAT = 6  # raise it when decoding changes
UNUSED_DAYS = 60


def cache_folder():
    """Where decoded slices and the set of --demo are kept. OSError if the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convnext-ad-nc"
    except RuntimeError as problem:
        raise OSError(f"{problem}; name a folder with XDG_CACHE_HOME") from None


def decode(paths, find_size, root=None, bar="decoding", bits=None):
    """The slices of N files as uint8 (N, H, W), (H, W) being what `find_size()` returns: from the cache of the folder
    `root` where it is right, else decoded and cached; without `root`, or where the cache cannot be written, decoded
    into memory, then with `bits` as in `slices.load_slices`.

    Returns (images, known, errors): known is a table of N rows with slices.STATS, bits, depth and pixel_hash, errors[i]
    is None or the reason why file i cannot be read.
    """
    if root is not None:
        try:
            name = f"slices-{fingerprint(os.path.abspath(root))}-{fingerprint(describe_files(paths, root))}"
            file = cache_folder() / f"{name}.npy"
            return read_cache(file, len(paths)) or write_cache(file, paths, find_size(), bar)
        except OSError as problem:
            print(f"the decoded slices cannot be kept ({problem}); they are decoded into memory", flush=True)
    images, stats, errors = slices.load_slices(paths, find_size(), bar, bits=bits)
    return images, stats.assign(pixel_hash=slices.hash_slices(images)), errors


def describe_files(paths, root):
    """What a cache was made of, as text: a line a file with its path below `root`, its size and its times."""

    def line(path):
        try:
            stat = os.stat(path)
        except OSError:  # decoding it says why
            return f"{os.path.relpath(path, root)!r} is not there"
        # the time of the last change of its status, too: of copies and archives, others may be the same
        return f"{os.path.relpath(path, root)!r} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"

    return "\n".join([f"format {FORMAT}", *map(line, paths)])


def write_cache(file, paths, size, bar):
    """Decode `paths` into a cache file; returns what `decode` does. The files get their names when they are whole, and
    never where a slice could not be read, for that may be fixed without a trace. What is there for other files of the
    same folder is removed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _clean(file.parent)
    draft, draft_json = _make_draft(file), _make_draft(file)
    try:
        images = np.lib.format.open_memmap(draft, "w+", np.uint8, (len(paths), *size))
        if hasattr(os, "posix_fallocate"):  # a map on a full disk does not raise an error, it ends the process
            with open(draft, "rb+") as out:
                os.posix_fallocate(out.fileno(), 0, os.path.getsize(draft))
        _, stats, errors = slices.load_slices(paths, size, bar, images)
        known = stats.assign(pixel_hash=slices.hash_slices(images))
        images.flush()
        text = json.dumps([list(images.shape), known.to_dict("list")])
        draft_json.write_text(json.dumps([fingerprint(text), text]))
        images = np.load(draft, mmap_mode="r")
        if not any(errors):
            for old in file.parent.glob(f"{file.stem.rsplit('-', 1)[0]}-*"):
                if old.suffix != ".tmp":
                    old.unlink(missing_ok=True)  # who has it mapped keeps it
            os.replace(draft, file)
            os.replace(draft_json, file.with_suffix(".json"))
            print(f"the decoded slices are kept in {file}", flush=True)
    finally:
        for left in (draft, draft_json):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
    return images, known, errors


def _clean(folder):
    """Remove what processes that were killed have left, and what no run has read for a long time."""
    now, unused = time.time(), 0
    for left in folder.glob("slices-*"):
        with contextlib.suppress(OSError):  # another process removes it, too
            stat = left.stat()
            if now - stat.st_mtime > 24 * 3600 * (1 if left.suffix == ".tmp" else UNUSED_DAYS):
                left.unlink()
                unused += stat.st_size * (left.suffix != ".tmp")
    if unused:
        print(f"removed from {folder}: {unused / 1e6:,.0f} MB of decoded slices that nobody has read for {UNUSED_DAYS} "
              "days", flush=True)


def _make_draft(file):
    """An empty file beside `file`, for nobody else to read: slices of patients are not for everybody."""
    handle, name = tempfile.mkstemp(prefix=f"{file.stem}-", suffix=".tmp", dir=file.parent)
    os.close(handle)
    return Path(name)


def read_cache(file, n):
    """What `decode` returns, from a cache file of n slices that is whole; else None."""
    try:
        checksum, text = json.loads(file.with_suffix(".json").read_text())
        shape, known = json.loads(text)
        images, known = np.load(file, mmap_mode="r"), pd.DataFrame(known)
        whole = (checksum == fingerprint(text) and images.dtype == np.uint8 and list(images.shape) == shape
                 and len(known) == n and slices.hash_slices(images) == known.pixel_hash.tolist())
        if whole:
            for kept in (file, file.with_suffix(".json")):
                with contextlib.suppress(OSError):  # of another user
                    os.utime(kept)  # for _clean
        return (images, known, [None] * n) if whole else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError):  # not there, cut off, or not a cache
        return None
