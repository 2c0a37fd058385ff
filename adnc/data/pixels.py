"""From a file to pixels, and what a slice looks like.

Not run by itself. Slices are uint8 arrays (N, H, W) until a batch is made; dataset.py knows whose they are.

What a file may be: a JPEG, PNG, BMP, TIFF or WebP of one picture, from 16 to 4,096 pixels a side. It is turned as its
EXIF says; no other metadata are read, and damage in them is no reason against good pixels. Colour (RGB, palette, CMYK)
becomes grey by ITU-R 601-2 (0.299 R + 0.587 G + 0.114 B), what is transparent becomes black. Files of 16 bits become 8
by the bits that all such files of a set use together (12 of them: 0 to 4,095 -> 0 to 255), or those in training did.
Anything else is refused, and nothing is guessed.
"""

import contextlib
import hashlib
import io
import itertools
import os
import re
import stat
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from adnc.cli import InputError, Threads, printable

SMALLEST, LARGEST = 16, 4096  # pixels a side: less shows nothing, more is a photograph or an attack on the memory
NEAR_BLACK = 16  # grey levels below are background
FORMATS = {"JPEG": (".jpeg", ".jpg", ".jpe", ".jfif"), "PNG": (".png",), "BMP": (".bmp",), "DIB": (".dib",),
           "TIFF": (".tif", ".tiff"), "WEBP": (".webp",)}  # fmt: skip
EXTENSIONS = sum(FORMATS.values(), ())
FEWEST_ALIKE = 20  # slices, of which one can say what is usual
MOST_PLACES, MOST_COUNTED = 20, 100_000  # of what is passed over: what one reads, and what one waits for
STATS = ("height", "width", "colour", "near_black", "median", "bright", "brightest", "border")

# ---------------------------------------------------------------- files


def is_junk(name):
    """Leftovers of archives and tools: .DS_Store, ._x.jpeg, .ipynb_checkpoints, __MACOSX."""
    return name.startswith((".", "__MACOSX"))


def parse_name(path):
    """`<scan>_<slice>.jpeg` -> (scan, slice), the scan being all before the last underscore; None for another form."""
    match = re.fullmatch(r"(.+)_(\d{1,9})", Path(path).stem, re.DOTALL)  # more digits are an id, not a slice number
    return (match[1], int(match[2])) if match else None


def list_folder(folder):
    """What is right in `folder`, by name: (paths of image files, of folders, of other files, junk of any kind too)."""
    images, folders, others = [], [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        kind = images if entry.name.lower().endswith(EXTENSIONS) else others
        kind = folders if os.path.isdir(entry.path) else kind  # a link to itself is no folder
        (others if is_junk(entry.name) else kind).append(entry.path)
    return images, folders, others


def passed_over(root, used):
    """Lines on what is under `root` and not among the paths `used`, by folder, and by kind in folders that hold
    some of them, so that files seen are files used, refused or listed here."""
    lines, counts, used = [], Counter(), {os.path.abspath(path) for path in used}
    ours, met = {os.path.abspath(root), *map(os.path.dirname, used)}, set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=lambda problem: lines.append(
            f"passed over: {printable(problem.filename)}, which cannot be listed ({problem.strerror})")):
        if os.path.realpath(folder) in met:  # a link that leads back
            folders.clear()
            continue
        met.add(os.path.realpath(folder))
        place, folders[:] = os.path.abspath(folder), sorted(folders)
        for name in names:
            kind = os.path.splitext(name)[1].lower() or "extensionless"
            if os.path.join(place, name) in used:
                continue
            if is_junk(name) or any(map(is_junk, Path(os.path.relpath(folder, root)).parts)):
                counts["", "left by archives and tools, such as .DS_Store"] += 1
            else:
                counts[f"{kind} " * (place in ours), f"in {printable(folder)}"] += 1
        if counts.total() > MOST_COUNTED:  # as behind a link to /
            lines.append(f"passed over: more than {MOST_COUNTED:,} files; the others are not counted")
            break
    found = counts.most_common(MOST_PLACES)
    more = counts.total() - sum(n for _, n in found)
    if more:
        found.append((("", "in other places"), more))
    return lines + [f"passed over: {n:,} {kind}file{'s' * (n > 1)} {where}" for (kind, where), n in found]


class Unfit(InputError):
    """A file that is not taken for a slice, whatever it is; the text continues a sentence that begins with its name."""


@contextlib.contextmanager
def quiet_pillow():
    """Pillow without its warnings of damaged metadata, in files that can be read. Around whole pools, not in their
    threads: filters of warnings are those of the process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


PNG = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"acTL", b"fcTL", b"fdAT"}


def _without_texts(path):
    """What to open of an image file: of a PNG the chunks that pixels, frames and orientation are in, for Pillow refuses
    the whole picture for a text that is damaged or long; of a TIFF its bytes, for Pillow maps the file into memory with
    the wrong row length if it is to be turned by 90 degrees; of any other file its path."""
    with open(path, "rb") as file:
        kept = [file.read(len(PNG))]
        if kept[0][:2] in (b"II", b"MM"):
            return io.BytesIO(kept[0] + file.read())
        if kept != [PNG]:
            return path
        while len(head := file.read(8)) == 8:
            if head[4:] in PNG_CHUNKS:
                kept += [head, file.read(int.from_bytes(head[:4], "big") + 4)]
            else:
                file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return io.BytesIO(b"".join(kept))


def _open(path):
    """An image file, its pixels not yet read. OSError or Unfit if it is not one that is read here."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
        raise Unfit("is not a regular file")
    if os.path.getsize(path) > LARGEST**2 * 16:
        raise Unfit(f"has {os.path.getsize(path):,} bytes, more than {LARGEST} x {LARGEST} pixels can need")
    try:
        image = Image.open(_without_texts(path), formats=tuple(FORMATS))
    except UnidentifiedImageError:
        size, kinds = os.path.getsize(path), " nor ".join((", ".join(list(FORMATS)[:-1]), list(FORMATS)[-1]))
        raise Unfit(f"cannot be read as an image: its {size:,} bytes are neither {kinds}") from None
    except Image.DecompressionBombError:
        raise Unfit(f"claims far too many pixels; expected {SMALLEST} to {LARGEST} a side") from None
    if not SMALLEST <= min(image.size) <= max(image.size) <= LARGEST:
        image.close()
        raise Unfit(f"is {image.width} x {image.height} pixels; expected {SMALLEST} to {LARGEST} a side")
    if getattr(image, "n_frames", 1) > 1:
        image.close()
        raise Unfit(f"holds {image.n_frames} pictures; expected one")
    return image


# How to turn an image upright, by the orientation in its EXIF.
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}


def orientation(image):
    """A key of TURNS, or 1 for an image that is upright or whose metadata cannot be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises nearly anything on damaged metadata
        return 1
    if image.format == "TIFF" and found in TURNS:  # Pillow turns it itself, once it is loaded
        image.load()
        return 1
    return found if found in TURNS else 1


def header(path):
    """(height, width) of an image file, or None if it is not one. Reads only the header."""
    try:
        with _open(path) as image:
            return image.size if orientation(image) >= 5 else image.size[::-1]
    except Exception:  # Pillow raises nearly anything on a damaged file; decoding it says what
        return None


def common_size(paths):
    """The most frequent size (H, W) among the image files; InputError if none of them can be read."""
    from tqdm import tqdm

    with quiet_pillow(), Threads() as pool:
        work = tqdm(pool.map(header, paths), "sizes", len(paths), unit=" slices", disable=None, leave=False)
        sizes = pd.Series([size for size in work if size])
    if sizes.empty:
        raise InputError(f"none of the {len(paths)} files can be read as an image: {', '.join(list(paths)[:2])}")
    return sizes.mode()[0]


def hash_pixels(pixels):
    """SHA-256 (12 hex digits) of a slice uint8 (H, W); "" for a single grey, which belongs to nobody."""
    if pixels.size == 0 or (pixels == pixels.flat[0]).all():
        return ""
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:12]


def hash_slices(images):
    """`hash_pixels` of each of uint8 (N, H, W), in parallel."""
    from tqdm import tqdm

    with Threads() as pool:  # hashing lets go of the interpreter's lock
        work = pool.map(hash_pixels, images)
        return list(tqdm(work, "checksums", len(images), unit=" slices", disable=None, leave=False))


# ---------------------------------------------------------------- decoding


def decode(path, size=None, bits=16):
    """One slice as uint8 (H, W). With `size` = (H, W), an image of another size is scaled to cover it and cropped
    about its centre; in a file of 16 bits, `bits` are used. Raises OSError or ValueError if the file is not an image as
    the docstring of this file says."""
    with quiet_pillow():
        return _decode(path, size, bits)[0]


class _Deep(Exception):
    """A file of 16 bits a pixel; `largest` is its largest value."""

    def __init__(self, largest):
        self.largest = largest


def _decode(path, size, bits):
    """(pixels of `decode`, their STATS, the bits a pixel that they were read from, and the bits that the largest value
    of a file of 16 takes, else 0). Where `bits` is None, a file of 16 raises _Deep."""
    with _open(path) as image:
        deep = any(";16" in str(tile[3]) for tile in image.tile)  # of colours, Pillow keeps the upper 8
        image.load()  # before the metadata: PNG's are read by way of the pixels, and an error there is no error
        turn = TURNS.get(orientation(image))
        image = image.transpose(Image.Transpose[turn]) if turn else image
        colour, depth = 0.0, 0
        if image.mode == "F":
            raise Unfit("holds real numbers without a known range; expected 8 or 16 bits a pixel")
        grey = image.mode[0] == "I"
        if deep := deep or grey:
            values = np.asarray(image).astype(np.int64) if grey else np.asarray(image.convert("RGB")) * np.int64(257)
            if not 0 <= values.min() <= values.max() <= 65535:
                raise Unfit(f"holds values from {values.min()} to {values.max()}; expected 16 bits: 0 to 65,535")
            if bits is None:
                raise _Deep(int(values.max()))
            white, depth = 2**bits - 1, max(8, int(values.max()).bit_length())
            if values.max() > white:
                raise Unfit(f"holds values up to {values.max():,}; expected {white:,} at most, as the 16-bit slices "
                            "in training have: rescale it as they were")
            if bits < 16 and not grey:
                raise Unfit(f"has 16 bits a colour and uses {bits}, of which few can be read here; save it in grey")
        if image.mode[0] == "I":  # convert("L") would clip at 255
            image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
        elif image.mode != "L":
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            image = image.convert("RGB")
            colour = float(np.ptp(np.asarray(image), axis=2).mean())
            image = image.convert("L")
        original = image.height, image.width
        if size is not None and original != tuple(size):
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels, (*original, colour, *_describe(pixels, image.histogram()), bits if deep else 8, depth)


# ---------------------------------------------------------------- what a slice looks like


def _describe(pixels, histogram):
    """The STATS of pixels uint8 (H, W) beside size and colour: the share of near-black pixels, the quantiles 0.5, 0.9
    and 0.99 of the grey levels, and the mean grey level of the outermost tenth of rows and columns."""
    share = np.cumsum(histogram) / pixels.size
    height, width = (max(1, side // 10) for side in pixels.shape)
    inside = pixels[height:-height, width:-width]
    frame = (float(pixels.sum()) - float(inside.sum())) / (pixels.size - inside.size)
    return share[NEAR_BLACK - 1], *np.searchsorted(share, (0.5, 0.9, 0.99)), frame


def mean_slice(images, rows):
    """The mean of rows of uint8 (N, H, W), float64 (H, W)."""
    total = np.zeros(images.shape[1:], np.int64)
    for at in range(0, len(rows), 256):  # in parts, since the set may be larger than memory
        total += images[rows[at : at + 256]].sum(0, dtype=np.int64)
    return total / len(rows)


def stats_range(stats):
    """The smallest and largest of each of STATS over the slices of a table, as a checkpoint keeps them."""
    return {name: [float(stats[name].min()), float(stats[name].max())] for name in STATS}


# How far beyond the range of training a slice is still taken for one of its kind: a share of that range, plus so much.
SHARE, SLACK = 0.25, {"colour": 5, "near_black": 0.02, "median": 5, "bright": 10, "brightest": 16, "border": 5}
SCALE = 1.5  # the same for height and width, as a factor
WORDS = {"colour": "colour (mean difference of channels)", "near_black": "share of near-black", "median": "median grey",
         "bright": "90 % quantile of grey", "brightest": "99 % quantile of grey", "border": "mean grey of the border"}


def out_of_range(stats, training):
    """In what slices are out of the training range: a text for each row of a table with STATS, <NA> where it is within.
    `training` is the `stats_range` of the training slices."""
    found = pd.Series("", index=stats.index, dtype="string")
    for name in STATS:
        low, high = training[name]
        least, most = low / SCALE, high * SCALE
        if name in SLACK:
            slack = SHARE * (high - low) + SLACK[name]
            least, most = low - slack, high + slack
        texts = stats[name].map(f"; {WORDS.get(name, name)} {{:.3g}}, in training {low:.3g} to {high:.3g}".format)
        found += texts.where((stats[name] < least) | (stats[name] > most), "")
    return found.mask(found == "").str.removeprefix("; ")


def describe_bits(table):
    """Lines on the files of 16 bits a pixel in a table with path, bits, depth and perhaps label, if there are any."""
    deep = table[table.depth > 0]
    if len(deep):
        bits, labels = int(deep.bits.max()), deep.label.dropna().value_counts()
        where = f" ({', '.join(f'{label} {n:,}' for label, n in labels.items())})" * bool(len(labels))
        yield (f"{len(deep):,} of {len(table):,} slices have 16 bits a pixel{where} and are read as of {bits}, all by "
               f"one rule: 0 to {2**bits - 1:,} becomes 0 to 255")
        usual, most = int(deep.depth.median()), int(deep.depth.max())
        if most >= usual + 2:
            few = deep[deep.depth == most]
            yield (f"SUSPICIOUS: most of them use {usual} bits or fewer, and become {2 ** (bits - usual)} times as "
                   f"dark as they could be, for the sake of {len(few):,} that use {most}, first {few.path.iloc[0]}: is "
                   "that a slice like the others?")


LIKENESS = ("height", "width", "colour", "near_black", "median", "border")  # of STATS; contrast differs between scans


def describe_strange(table):
    """A line on slices of a set, a table with path and STATS, that look unlike the others: beyond the fences of Tukey
    (1977), one and a half interquartile ranges outside the quartiles, and the slack of `out_of_range`."""
    if len(table) < FEWEST_ALIKE:
        return
    low, high = (table[list(LIKENESS)].quantile(q) for q in (0.25, 0.75))
    fences = dict.fromkeys(STATS, (-np.inf, np.inf)) | {
        name: (low[name] - 1.5 * (high - low)[name], high[name] + 1.5 * (high - low)[name]) for name in LIKENESS}
    strange = out_of_range(table, fences).dropna()
    if len(strange):
        yield (f"SUSPICIOUS: {len(strange):,} of {len(table):,} slices look unlike the others, first "
               f"{table.path[strange.index[0]]}: {strange.iloc[0].replace('in training', 'usual are')}; are they "
               "damaged, or of another kind?")


def load_slices(paths, size, bar="decoding", images=None, bits=None):
    """Decode files in parallel into uint8 (N, H, W) with size = (H, W), a new array or the `images` given. In files of
    16 bits a pixel `bits` are used, or else as many as the largest value in all of them takes, at least 8.

    Returns (images, stats, errors): stats is a DataFrame of N rows with STATS, bits and depth (see `_decode`);
    errors[i] is None, or the reason why file i could not be read and images[i] is black.
    """
    from tqdm import tqdm

    if images is None:
        images = np.zeros((len(paths), *size), np.uint8)
    stats = np.zeros((len(paths), len(STATS) + 2))

    def load(i, bits):
        try:
            images[i], stats[i] = _decode(paths[i], size, bits)
        except _Deep as problem:
            return problem
        except Unfit as problem:
            return str(problem)
        except Exception as problem:  # Pillow raises nearly anything on a damaged file
            reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
            return f"cannot be read as an image: {reason}"

    # Pillow decodes outside the interpreter's lock; more threads than cores only fight for it
    with quiet_pillow(), Threads((os.cpu_count() or 1) + 1) as pool:
        work = pool.map(load, range(len(paths)), itertools.repeat(bits))
        errors = list(tqdm(work, bar, len(paths), unit=" slices", disable=None if bar else True, leave=False))
        deep = [i for i, error in enumerate(errors) if isinstance(error, _Deep)]
        bits = max([8, *(errors[i].largest.bit_length() for i in deep)])
        for i, error in zip(deep, pool.map(load, deep, itertools.repeat(bits))):
            errors[i] = error
    return images, pd.DataFrame(stats.round(4), columns=[*STATS, "bits", "depth"]), errors
