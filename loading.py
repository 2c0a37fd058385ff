"""From a folder to a split index and its slices, decoded once and kept in a cache.

Not run by itself. The cache holds one file a set: the uint8 array of all its slices, memory-mapped, so that a set
larger than memory still trains, and behind it a list of the files that it was made of. It is used only while every file
still has its name, size and time, and only if its own checksums are right; else it is made anew. `train.py --no-cache`
decodes into memory.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

import dataset
import slices

DEMO_SUBJECTS = 70
FORMAT = 2  # of a cache file; raise it when decoding changes
MAGIC = b"slices, decoded\n"
BLOCK = 1 << 24  # bytes that one checksum covers

# ---------------------------------------------------------------- where the data are


def cache_folder():
    """Where decoded slices and the set of --demo are kept. OSError if the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convnext-ad-nc"
    except RuntimeError as problem:
        raise OSError(f"{problem}; name a folder with XDG_CACHE_HOME") from None


def find_data(args):
    """The folder AD_NC to train on; for --demo it is drawn into the cache, once."""
    if args.data:
        return args.data
    if args.demo:
        return demo_data()
    if os.path.isdir("AD_NC"):
        return "AD_NC"
    raise ValueError(
        "no data: there is no ./AD_NC here, and neither --data nor --demo was given\n"
        "  python train.py --data AD_NC    trains on that folder: {train,test}/{AD,NC}/<scan>_<slice>.jpeg\n"
        "  python train.py --demo          needs no data: it draws a synthetic set first"
    )


def demo_data():
    """The phantom set of --demo, drawn on the first call. Where its code has changed, another one is drawn."""
    import anatomy
    import phantom

    code = b"".join(Path(module.__file__).read_bytes() for module in (anatomy, phantom))
    version = hashlib.sha256(code).hexdigest()[:8]
    folder = cache_folder() / f"phantom-{DEMO_SUBJECTS}-{version}"
    if not folder.is_dir():
        print(f"drawing a phantom set of {DEMO_SUBJECTS} subjects into {folder}, once", flush=True)
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")  # another run may be drawing the same set
        try:
            phantom.draw(draft, subjects=DEMO_SUBJECTS, seed=0)
        except OSError as problem:
            raise OSError(f"{problem}; name a folder that can be written with XDG_CACHE_HOME") from None
        if folder.is_dir():
            shutil.rmtree(draft)
        else:
            os.replace(draft, folder)
    return folder / "AD_NC"


# ---------------------------------------------------------------- the set, ready to train on


def load_data(args, root, bar="decoding"):
    """Index, decode and split; returns (index, images), the row of images uint8 (N, H, W) being the index's label.

    The index gets the columns pixels, the fingerprint of each slice, and slices.FACTS; in attrs "dropped", the number
    of scans that --drop-test-subjects left out, and "bad", a (path, reason) for each file that --skip-bad left out;
    without that flag such files are a ValueError. Rows of the array that no label names belong to files not used.
    """
    bad = []
    index = dataset.read_index(root, bad)
    root = index.attrs["root"]
    paths, train = index.path.tolist(), index.path[index.split == "train"]
    if train.empty:
        raise ValueError(f"no slice is left in train/; {dataset.describe_bad(bad)}")
    images, known, errors = decode_once(paths, lambda: slices.common_size(train), None if args.no_cache else root, bar)
    index = index.join(known)
    bad += [(paths[row], errors[row]) for row in sorted(errors)]
    if bad and not args.skip_bad:
        raise ValueError(dataset.describe_bad(bad, "mend or remove them, or leave them out with --skip-bad"))
    index = index.drop(index=list(errors))
    if args.folds is not None:  # the official test set takes part in nothing
        index = index[index.split == "train"]
    dropped = None
    if args.drop_test_subjects:
        index, dropped = dataset.drop_test_subjects(index)
    if args.folds is not None:
        index = dataset.fold_index(index, args.fold, args.folds, args.split_by, args.seed)
    index = dataset.split_index(index, args.val_fraction, args.split_by, args.seed)
    index.attrs |= {"root": root, "dropped": dropped, "bad": bad}
    for split in ("train", "val"):
        missing = set(dataset.CLASSES) - set(index.label[index.split == split])
        if missing:
            raise ValueError(f"{root}: no {' or '.join(sorted(missing))} is left for {split}; expected two subjects "
                             f"or more of each class in train/ and a --val-fraction over 0 (it is {args.val_fraction})")
    return index, images


def decode_once(paths, find_size, root=None, bar="decoding"):
    """The slices of files as uint8 (N, H, W), (H, W) being what `find_size()` says: out of the cache for the folder
    `root` where it is right, else decoded and cached; without `root`, or where the cache cannot be written, decoded
    into memory.

    Returns (images, a table with the columns pixels, the fingerprints of the slices, and slices.FACTS,
    {row: reason} for the files that cannot be read).
    """
    if root is not None:
        try:
            where = os.fsencode(os.path.abspath(root))
            file, key = cache_folder() / f"slices-{hashlib.sha256(where).hexdigest()[:16]}", describe_files(paths, root)
            return read_cache(file, key) or write_cache(file, key, paths, find_size(), bar)
        except OSError as problem:
            print(f"the decoded slices cannot be kept ({problem}); they are decoded into memory", flush=True)
    images, errors, facts = slices.load_slices(paths, find_size(), bar)
    return images, with_pixels(facts, images), {row: error for row, error in enumerate(errors) if error}


def with_pixels(facts, images):
    return facts.assign(pixels=slices.fingerprint_slices(images))


def describe_files(paths, root):
    """What a cache was made of, as text: a line a file with its path below `root`, its size and its time."""

    def line(path):
        try:
            stat = os.stat(path)
        except OSError:  # decoding it says why
            return f"{os.path.relpath(path, root)!r} is not there"
        return f"{os.path.relpath(path, root)!r} {stat.st_size} {stat.st_mtime_ns}"

    return "\n".join([f"format {FORMAT}", *map(line, paths)])


# ---------------------------------------------------------------- the cache file: MAGIC, slices, trailer, its length


def write_cache(file, key, paths, size, bar):
    """Decode `paths` into a cache file; returns what `decode_once` does. Until it is whole it has another name; where a
    file could not be read it never is, for that may be mended without a trace."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f"{file.name}-*.tmp"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 24 * 3600:
            left.unlink(missing_ok=True)
    shape = (len(paths), *size)
    needed = int(np.prod(shape, dtype=np.int64))
    free = shutil.disk_usage(file.parent).free
    if free < 1.05 * needed:  # a map on a full disk does not raise an error, it ends the process
        raise OSError(f"{file.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")
    handle, draft = tempfile.mkstemp(prefix=f"{file.name}-", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "w+b") as out:
            out.write(MAGIC)
            out.truncate(len(MAGIC) + needed)
            out.flush()
            images = np.memmap(draft, np.uint8, "r+", len(MAGIC), shape)
            _, errors, facts = slices.load_slices(paths, size, bar, images)
            errors = {row: error for row, error in enumerate(errors) if error}
            known = with_pixels(facts, images)
            trailer = {"key": key, "size": size, "known": known.to_dict("list")}
            images.flush()
            trailer["checksums"] = checksums(draft, needed)
            text = json.dumps(trailer).encode()
            out.seek(len(MAGIC) + needed)
            out.write(text + zlib.crc32(text).to_bytes(8, "little") + len(text).to_bytes(8, "little"))
            out.flush()
            os.fsync(out.fileno())
        images = np.memmap(draft, np.uint8, "r", len(MAGIC), shape)
        if not errors:
            os.replace(draft, file)  # who has the old one mapped keeps it
            print(f"the decoded slices are kept in {file}", flush=True)
    finally:
        Path(draft).unlink(missing_ok=True)
    return images, known, errors


def read_cache(file, key):
    """(images, table, no errors) of a cache file that was made of `key` and is whole, else None."""
    try:
        with open(file, "rb") as cache:
            magic = cache.read(len(MAGIC))
            size = cache.seek(-16, os.SEEK_END)
            end = cache.read()
            length = int.from_bytes(end[8:], "little")
            cache.seek(size - length)
            text = cache.read(length)
        if zlib.crc32(text) != int.from_bytes(end[:8], "little"):
            return None
        trailer = json.loads(text)
        if trailer["key"] != key or magic != MAGIC:
            return None
        known = pd.DataFrame(trailer["known"])
        shape = len(known), *trailer["size"]
        needed = int(np.prod(shape, dtype=np.int64))
        if len(MAGIC) + needed != size - length or checksums(file, needed) != trailer["checksums"]:
            return None
        return np.memmap(file, np.uint8, "r", len(MAGIC), shape), known, {}
    except (OSError, ValueError, KeyError, TypeError):  # not there, cut off, or no cache at all
        return None


def checksums(file, length):
    """CRC-32 of each block of the slices. Read, not mapped, so that memory does not fill with them."""

    def one(start):
        with open(file, "rb") as cache:
            cache.seek(len(MAGIC) + start)
            return zlib.crc32(cache.read(min(BLOCK, length - start)))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, range(0, length, BLOCK)))
