"""Decode image files to grey slices, cache them, and describe what they look like.

Slices are uint8 arrays (N, H, W) until a batch is made. A file is a JPEG, PNG, BMP, TIFF or WebP of
one picture, with sides of 16 to 4,096 pixels. It is turned as its EXIF says. Colour (RGB, palette,
CMYK) becomes grey by ITU-R 601-2 (0.299 R + 0.587 G + 0.114 B), and what is transparent becomes
black. Grey files of 16 bits become 8 bits by one rule for the whole set: with b the number of bits
of the largest value in the set, the range 0 to 2^b - 1 is scaled to 0 to 255. Anything else is
refused.
"""

import hashlib
import io
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from tqdm import tqdm

from adnc.errors import InputError, is_system_limit
from adnc.files import fingerprint, same_name, write_text

SMALLEST, LARGEST = 16, 4096  # pixels: a smaller side shows nothing, a larger one is a photograph
NEAR_BLACK = 16  # grey levels below are background
FORMATS = {
    "JPEG": (".jpeg", ".jpg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
SAMPLE_FORMAT, SIGNED = 339, 2  # the tag of a TIFF for the type of its numbers
PHOTOMETRIC = 262  # the tag of a TIFF that says whether 0 is white (0) or black (1)
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

# What describes a slice: its size in the file, the mean difference of its channels, the share of
# near-black pixels, the quantiles 0.5, 0.9 and 0.99 of its grey levels, and the mean grey of its
# border.
STATS = ("height", "width", "colour", "near_black", "median", "bright", "brightest", "border")
COLUMNS = (*STATS, "bits", "depth")


class Unfit(InputError):
    """A file that cannot be a slice. The text follows the name of the file in a sentence."""


# ---------------------------------------------------------------- names of files


def is_junk(name):
    """Leftovers of archives and tools: .DS_Store, ._x.jpeg, .ipynb_checkpoints, __MACOSX,
    @eaDir."""
    return name.startswith((".", "__MACOSX", "@eaDir"))


def parse_name(path):
    """(scan, slice) of a name `<scan>_<slice>.jpeg`, or None for a name of another form.

    The scan is everything before the last underscore, in the spelling of `same_name`.
    """
    name = same_name(Path(path).stem)
    match = re.fullmatch(r"(.+)_(\d{1,9})", name, re.DOTALL)  # more digits are an id
    if not match:
        return None
    return match[1].strip(), int(match[2])


# ---------------------------------------------------------------- one file


def open_image(path):
    """An image file whose pixels are not yet decoded. Raises Unfit or OSError if it is no slice."""
    if not os.path.isfile(path):  # reading from a pipe would wait forever
        raise Unfit("is not a file" if os.path.exists(path) else "does not exist")
    size = os.path.getsize(path)
    if size == 0:
        raise Unfit("is empty")
    if size > LARGEST**2 * 16:
        raise Unfit(f"has {size:,} bytes, more than {LARGEST} x {LARGEST} pixels can need")

    # From memory: Pillow maps a TIFF that is to be turned by 90 degrees with the wrong row length.
    data = io.BytesIO(Path(path).read_bytes())
    try:
        image = Image.open(data, formats=(*FORMATS, "DIB"))
    except UnidentifiedImageError:
        raise Unfit(
            f"cannot be read as an image: its {size:,} bytes are none of {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError:
        raise Unfit(f"claims too many pixels; expected {SMALLEST} to {LARGEST} a side") from None

    if not SMALLEST <= min(image.size) <= max(image.size) <= LARGEST:
        raise Unfit(
            f"is {image.width} x {image.height} pixels; expected {SMALLEST} to {LARGEST} a side"
        )
    if getattr(image, "n_frames", 1) > 1:
        raise Unfit(f"holds {image.n_frames} pictures; expected one")
    # Pillow keeps the upper 8 of these 16 bits, which are black if the file uses fewer.
    if image.mode[0] != "I" and any(re.search(";16[BLN]", str(tile)) for tile in image.tile):
        raise Unfit("has colour or transparency in 16 bits; save it in grey, or in 8 bits")
    return image


def upright(image):
    """The image, turned as its EXIF says; as it is if the EXIF cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises nearly anything on damaged metadata
        return image


def read_grey(path):
    """(grey, colour): a file as an image of mode "L", or "I" if it has more than 8 bits; and the
    mean difference of its channels, 0 for a grey image."""
    image = opened = open_image(path)
    image.load()  # outside `upright`, which would hide that the pixels are damaged
    image = upright(image)
    if image.mode == "L":
        # Pillow reads signed bytes as unsigned: what is below 0 would become bright.
        if opened.format == "TIFF" and SIGNED in opened.tag_v2.get(SAMPLE_FORMAT, ()):
            raise Unfit("is a TIFF of signed bytes; save it with unsigned ones")
        return image, 0.0
    if opened.format == "TIFF" and image.mode[0] == "I" and opened.tag_v2.get(PHOTOMETRIC) == 0:
        raise Unfit(
            "is a TIFF of 16 bits in which 0 is white, and would be read as its negative; save it "
            "with 0 for black"
        )
    if image.mode == "F":
        raise Unfit("holds real numbers without a known range; expected 8 or 16 bits per pixel")
    if image.mode.startswith("I"):
        return image.convert("I"), 0.0

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("RGB")
    colour = float(np.ptp(np.asarray(image), axis=2).mean())
    return image.convert("L"), colour


def from_16_bits(values, bits):
    """int (H, W) of a 16-bit file -> uint8: 0 to 2^bits - 1 becomes 0 to 255, rounded.

    Raises Unfit for values out of that range.
    """
    white = 2**bits - 1
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise Unfit(f"holds values from {low} to {high}; expected 16 bits: 0 to 65,535")
    if high > white:
        raise Unfit(
            f"holds values up to {high:,}; expected at most {white:,}, as the 16-bit slices in "
            "training have: rescale it as they were"
        )
    return ((values * 255 + white // 2) // white).astype(np.uint8)


def decode_with_stats(path, size=None, bits=16):
    """One slice as (uint8 (H, W), dict of COLUMNS).

    With size = (H, W), an image of another size is scaled to cover it and cropped about its centre.
    In a 16-bit file, 2^bits - 1 becomes white. Of the COLUMNS, `bits` is that number (8 for other
    files), and `depth` the number of bits of the largest value in the file (0 for other files).
    Raises Unfit, or what Pillow raises for a damaged file.
    """
    grey, colour = read_grey(path)
    used, depth = 8, 0
    if grey.mode == "I":
        values = np.asarray(grey).astype(np.int64)
        grey = Image.fromarray(from_16_bits(values, bits))
        used, depth = bits, max(8, int(values.max()).bit_length())

    stats = {"height": grey.height, "width": grey.width, "colour": colour}
    if size is not None and (grey.height, grey.width) != tuple(size):
        grey = ImageOps.fit(grey, (size[1], size[0]), Image.Resampling.BILINEAR)
    stats |= describe_levels(grey)
    return np.asarray(grey), stats | {"bits": used, "depth": depth}


def describe_levels(grey):
    """The STATS of an image of mode "L" from near_black on."""
    pixels = np.asarray(grey)
    share = np.cumsum(grey.histogram()) / pixels.size  # of pixels up to each grey level
    median, bright, brightest = np.searchsorted(share, (0.5, 0.9, 0.99))
    height, width = (max(1, side // 10) for side in pixels.shape)  # the border is a tenth wide
    inside = pixels[height:-height, width:-width]
    border = (float(pixels.sum()) - float(inside.sum())) / (pixels.size - inside.size)
    return {
        "near_black": share[NEAR_BLACK - 1], "median": median, "bright": bright,
        "brightest": brightest, "border": border,
    }  # fmt: skip


def header(path):
    """(height, width) of an upright image file, or None if it cannot be read."""
    try:
        return upright(open_image(path)).size[::-1]
    except Exception as problem:
        if is_system_limit(problem):
            raise
        return None  # decoding the file will say what is wrong with it


def hash_pixels(pixels):
    """SHA-256 (12 hex digits) of a slice uint8 (H, W); "" for a slice of one grey level.

    An empty slice looks like any other, so it does not identify a scan.
    """
    if (pixels == pixels.flat[0]).all():
        return ""
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:12]


# ---------------------------------------------------------------- many files


def progress_bar(work, label, total):
    """A bar on a terminal, elsewhere a line; nothing if the label is None."""
    hidden = None if label else True
    if label and not sys.stderr.isatty():
        print(f"{label} {total:,} slices", flush=True)
    return tqdm(work, label, total, unit=" slices", disable=hidden, leave=False)


def threads():
    # Pillow and hashlib release the interpreter's lock; more threads than cores only fight for it.
    return ThreadPoolExecutor((os.cpu_count() or 1) + 1)


def common_size(paths):
    """The most frequent size (H, W) of the image files; InputError if none of them can be read."""
    with threads() as pool:
        sizes = pd.Series([size for size in pool.map(header, paths) if size])
    if sizes.empty:
        examples = ", ".join(list(paths)[:2])
        _, _, (reason,) = load_slices(list(paths)[:1], (SMALLEST, SMALLEST), None)
        raise InputError(
            f"none of the {len(paths)} files can be read as an image, such as {examples}: the "
            f"first {reason}"
        )
    return sizes.mode()[0]


def hash_slices(images):
    """`hash_pixels` of each of uint8 (N, H, W), in parallel."""
    with threads() as pool:
        return list(pool.map(hash_pixels, images))


def load_slices(paths, size, progress="decoding", images=None, bits=None):
    """Decode files in parallel into uint8 (N, H, W) with size = (H, W), or into `images`.

    In 16-bit files 2^bits - 1 becomes white; if `bits` is None, it is the number of bits of the
    largest value in all of them.

    Returns (images, stats, errors): a DataFrame of N rows with STATS, bits and depth; and for each
    file None, or the reason why it cannot be read, in which case images[i] is black.
    """
    if images is None:
        images = np.zeros((len(paths), *size), np.uint8)
    rows = [dict.fromkeys(COLUMNS, 0) for _ in paths]

    def load(i, white_bits):
        try:
            images[i], rows[i] = decode_with_stats(paths[i], size, white_bits)
        except Unfit as problem:
            return str(problem)
        except Exception as problem:  # Pillow raises nearly anything on a damaged file
            if is_system_limit(problem):
                raise
            reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
            return f"cannot be read as an image: {reason}"
        return None

    assumed = 16 if bits is None else bits
    with threads() as pool:
        work = pool.map(lambda i: load(i, assumed), range(len(paths)))
        errors = list(progress_bar(work, progress, len(paths)))
        # Only now is the largest value of the 16-bit files known; decode them again if it is lower.
        deep = [i for i, row in enumerate(rows) if row["depth"] > 0]
        needed = max((rows[i]["depth"] for i in deep), default=16)
        if bits is None and needed < 16:
            for i, error in zip(deep, pool.map(lambda i: load(i, needed), deep)):
                errors[i] = error
    return images, pd.DataFrame(rows, columns=list(COLUMNS), dtype=float).round(4), errors


# ---------------------------------------------------------------- what a slice shows


def find_head(pixels):
    """The head in a slice uint8 (H, W), as a mask bool (H, W): everything that is not near-black,
    with its holes, such as ventricles, filled.

    scipy's binary_fill_holes gives the same, and takes four times as long.
    """
    black = np.pad(pixels < NEAR_BLACK, 1, constant_values=True)
    regions, _ = ndimage.label(black)
    return (regions != regions[0, 0])[1:-1, 1:-1]  # all but the black that touches the border


# ---------------------------------------------------------------- cache


def cache_folder():
    """Where decoded slices and the set of --demo are kept: in XDG_CACHE_HOME, or ~/.cache."""
    try:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as problem:  # the user has no home folder
        raise OSError(f"{problem}; name a folder with XDG_CACHE_HOME") from None
    return parent / "convnext-ad-nc"


def make_cache_folder():
    """Make the cache folder, which no other user may read: it holds slices of patients."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


FORMAT = 8  # of the cache; raise it when decoding changes


def decode_files(paths, find_size, *, root=None, progress="decoding", bits=None):
    """The slices of N files as uint8 (N, H, W), where (H, W) is what `find_size()` returns.

    With the folder `root` they are cached: one .npy file per folder, memory-mapped, so that a set
    larger than memory trains as well; and a .json with their table. The cache is used as long as
    path, size and times of change of each file stay the same. If it cannot be written, a line says
    so and the slices are decoded into memory.

    Returns (images, table, errors): a DataFrame of N rows with STATS, bits, depth and pixel_hash;
    and for each file None, or the reason why it cannot be read.
    """
    assert root is None or bits is None, "a cache has the bits of its own files"
    if root is not None:
        try:
            file = cache_folder() / f"slices-{fingerprint(os.path.abspath(root))}.npy"
            state = fingerprint(describe_files(paths), 32)
            cached = read_cache(file, state)
            if cached is None:
                return write_cache(file, state, paths, find_size(), progress)
            images, table = cached
            return images, table, [None for _ in paths]  # a set with errors is never cached
        except OSError as problem:
            print(
                f"the cache cannot be written ({problem}); slices are decoded into memory",
                flush=True,
            )
    images, stats, errors = load_slices(paths, find_size(), progress, bits=bits)
    return images, stats.assign(pixel_hash=hash_slices(images)), errors


def describe_files(paths):
    """The files that a cache is made of, as text: a line each with path, size and times."""
    lines = [f"format {FORMAT}"]
    for path in map(os.path.abspath, paths):
        try:
            stat = os.stat(path)
        except OSError:  # decoding will say why
            lines.append(f"{path!r} is not there")
        else:  # copies and archives may keep the time of the content, but not ctime
            lines.append(f"{path!r} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}")
    return "\n".join(lines)


def stamp(file):
    """Size and time of change of a .npy file, by which its .json knows that the two are a pair."""
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


def read_cache(file, state):
    """(images, table) of a cache that was made from files in that state, or None."""
    try:
        kept = json.loads(file.with_suffix(".json").read_text())
        if kept["state"] != state or kept["stamp"] != stamp(file):
            return None
        return np.load(file, mmap_mode="r"), pd.DataFrame(kept["table"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, damaged, or of another version
        return None


DAY = 24 * 60 * 60  # seconds


def write_cache(file, state, paths, size, progress):
    """Decode into a cache; returns what `decode_files` does.

    The cache is not kept if a file cannot be read: that may be repaired without a change of size
    or time, as with permissions.
    """
    make_cache_folder()
    for path in file.parent.glob(f"{file.stem}.*.tmp"):  # what a process left that was killed
        if path.stat().st_mtime < time.time() - DAY:
            path.unlink(missing_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        images = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(paths), *size))
        if hasattr(os, "posix_fallocate"):  # writing to a map on a full disk would end the process
            with open(temporary, "rb+") as out:
                os.posix_fallocate(out.fileno(), 0, os.path.getsize(temporary))
        _, stats, errors = load_slices(paths, size, progress, images)
        table = stats.assign(pixel_hash=hash_slices(images))
        images.flush()
        images = np.load(temporary, mmap_mode="r")
        if not any(errors):
            kept = {"state": state, "stamp": stamp(temporary), "table": table.to_dict("list")}
            os.replace(temporary, file)
            write_text(file.with_suffix(".json"), json.dumps(kept))
            print(f"the decoded slices are cached in {file}", flush=True)
    finally:
        temporary.unlink(missing_ok=True)
    return images, table, errors


# ---------------------------------------------------------------- what slices look like


def mean_slice(images, rows):
    """The mean of rows of uint8 (N, H, W), float64 (H, W)."""
    total = np.zeros(images.shape[1:], np.int64)
    for start in range(0, len(rows), 256):  # in parts, since the set may be larger than memory
        total += images[rows[start : start + 256]].sum(0, dtype=np.int64)
    return total / len(rows)


def stats_range(stats):
    """The smallest and the largest value of each of STATS in a table: {name: [low, high]}."""
    return {name: [float(stats[name].min()), float(stats[name].max())] for name in STATS}


# How far out of the training range a slice is still accepted: by a share of the range plus a slack,
# or for height and width by a factor.
SHARE = 0.25
SLACK = {"colour": 5, "near_black": 0.02, "median": 5, "bright": 10, "brightest": 16, "border": 5}
SCALE = 1.5
WORDS = {
    "height": "height",
    "width": "width",
    "colour": "colour (mean difference of channels)",
    "near_black": "share of near-black",
    "median": "median grey",
    "bright": "90 % quantile of grey",
    "brightest": "99 % quantile of grey",
    "border": "mean grey of the border",
}


def out_of_range(stats, training, reference="in training"):
    """What is out of the training range: a text for each row of a table with STATS, or <NA>.

    `training` is the `stats_range` of the training slices; the texts call it `reference`.
    """
    texts = pd.Series("", index=stats.index, dtype="string")
    for name in STATS:
        low, high = training[name]
        if name in SLACK:
            slack = SHARE * (high - low) + SLACK[name]
            least, most = low - slack, high + slack
        else:
            least, most = low / SCALE, high * SCALE
        outside = (stats[name] < least) | (stats[name] > most)
        for i in stats.index[outside]:
            value = stats.at[i, name]
            texts[i] += f"; {WORDS[name]} {value:.3g}, {reference} {low:.3g} to {high:.3g}"
    return texts.mask(texts == "").str.removeprefix("; ")


def by_label(table):
    """` (AD 12, NC 30)`: the labels in a table, or an empty text if none is known."""
    counts = table.label.dropna().value_counts()
    if counts.empty:
        return ""
    return f" ({', '.join(f'{label} {n:,}' for label, n in counts.items())})"


def describe_converted(table, size):
    """Lines on the slices of a table with label and STATS that were not of the common size (H, W),
    and on those in colour."""
    height, width = size
    resized = table[(table.height != height) | (table.width != width)]
    if len(resized):
        yield (
            f"{len(resized):,} of {len(table):,} slices{by_label(resized)} are not {width} wide x "
            f"{height} high, and were scaled and cropped to that"
        )
    coloured = table[table.colour > 0]
    if len(coloured):
        yield (
            f"{len(coloured):,} of {len(table):,} slices{by_label(coloured)} are in colour, and "
            "were turned to grey"
        )


def describe_bits(table):
    """Lines on the 16-bit files in a table with path, label, bits and depth."""
    deep = table[table.depth > 0]
    if deep.empty:
        return
    bits = int(deep.bits.max())
    yield (
        f"{len(deep):,} of {len(table):,} slices are 16-bit{by_label(deep)} and are read as "
        f"{bits}-bit, by one rule for all: 0 to {2**bits - 1:,} becomes 0 to 255"
    )
    usual, most = int(deep.depth.median()), int(deep.depth.max())
    if most >= usual + 2:
        few = deep[deep.depth == most]
        yield (
            f"SUSPICIOUS: most of them use at most {usual} bits, but {len(few):,} use {most}, "
            f"which makes the others {2 ** (bits - usual)} times darker; first "
            f"{few.path.iloc[0]}: is that a slice like the others?"
        )


MIN_ALIKE = 20  # slices needed to tell what is usual
# The STATS that are alike in a set; contrast is not: it differs between scans.
LIKENESS = ("height", "width", "colour", "near_black", "median", "border")


def describe_outliers(table):
    """A line on the slices of a table with path and STATS that look unlike the others.

    They are outside Tukey's fences (1977), 1.5 interquartile ranges beyond the quartiles, and
    outside the slack of `out_of_range` beyond these.
    """
    if len(table) < MIN_ALIKE:
        return
    fences = dict.fromkeys(STATS, (-np.inf, np.inf))
    for name in LIKENESS:
        low, high = table[name].quantile(0.25), table[name].quantile(0.75)
        fences[name] = (low - 1.5 * (high - low), high + 1.5 * (high - low))
    outliers = out_of_range(table, fences, reference="usual are").dropna()
    if len(outliers):
        yield (
            f"SUSPICIOUS: {len(outliers):,} of {len(table):,} slices look unlike the others, first "
            f"{table.path[outliers.index[0]]}: {outliers.iloc[0]}; are they damaged, or of another "
            "kind?"
        )
