"""Decoding image files, the cache of decoded slices, and what slices look like."""

import errno
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_set, write_slice
from PIL import Image

from adnc.data import pixels
from adnc.data.pixels import (
    STATS,
    common_size,
    decode_files,
    decode_with_stats,
    describe_bits,
    describe_outliers,
    hash_pixels,
    hash_slices,
    load_slices,
    mean_slice,
)  # fmt: skip
from adnc.errors import InputError
from dataset import load_set, read_index


def decode(*args):
    return decode_with_stats(*args)[0]


# ---------------------------------------------------------------- files of many kinds

SIZE = (40, 48)
GREY = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
RGB = np.stack([GREY, 255 - GREY, np.roll(GREY, 5, 0)], 2)
ALPHA = np.tile(np.where(np.arange(48) < 24, 255, 0).astype(np.uint8), (40, 1))
L = Image.fromarray(GREY)
LUMA = np.asarray(Image.fromarray(RGB).convert("L"))


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(name, data):
    """A chunk of a PNG file."""
    checksum = zlib.crc32(name + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + name + data + checksum


def png(width, height, bits, kind, rows):
    """A PNG file from its raw rows; kind is 0 for grey, 2 for RGB, 4 for grey and alpha."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, kind, 0, 0, 0])
    chunks = [
        chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b""),
    ]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_16(kind, values):
    """A PNG of 16 bits a channel from (H, W, C): Pillow reads such files and cannot write them."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, kind, rows)


def with_orientation(image, number, form, **options):
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(image, form, exif=exif, **options)


def grey_16(factor, form="PNG"):
    return encoded(Image.fromarray(GREY.astype(np.uint16) * factor), form)


JPEG = encoded(L, "JPEG", quality=95)
ROTATED = with_orientation(L, 6, "JPEG", quality=95)  # upright after a quarter clockwise
WIDE = GREY.astype(np.uint16) * 257
BOMB = png(20_000, 20_000, 1, 0, bytes(2501 * 20_000))  # 50 kB that decode to 400 MB

REFUSED = {  # name: (bytes, what the reason says)
    "truncated.jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated.png": (encoded(L)[:200], "cannot be read as an image"),
    "checksum.png": (encoded(L)[:100] + b"xyz" + encoded(L)[103:], "cannot be read as an image"),
    "empty.jpeg": (b"", "is empty"),
    "text.jpeg": (b"text, not an image", "its 18 bytes are none of JPEG, PNG"),
    "gif.png": (encoded(L, "GIF"), "are none of JPEG, PNG"),
    "animated.png": (encoded(L, save_all=True, append_images=[L.rotate(9)]), "holds 2 pictures"),
    "pages.tif": (encoded(L, "TIFF", save_all=True, append_images=[L]), "holds 2 pictures"),
    "tiny.png": (encoded(L.resize((48, 15))), "is 48 x 15 pixels; expected 16 to 4096 a side"),
    "huge.png": (encoded(L.resize((4097, 16))), "is 4097 x 16 pixels"),
    "bomb.png": (BOMB, "claims too many pixels; expected 16 to 4096 a side"),
    "colour-16.png": (png_16(2, np.dstack([WIDE] * 3)), "colour or transparency in 16 bits"),
    "colour-12.png": (png_16(2, np.dstack([WIDE // 16] * 3)), "colour or transparency in 16 bits"),
    "alpha-12.png": (png_16(4, np.dstack([WIDE // 16, WIDE])), "colour or transparency in 16"),
    "32-bit.tif": (
        encoded(Image.fromarray(GREY.astype(np.int32) * 300), "TIFF"), "expected 16 bits"
    ),
    "negative.tif": (
        encoded(Image.fromarray(GREY.astype(np.int32) - 50), "TIFF"), "holds values from -50 to 205"
    ),
    "float.tif": (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "holds real numbers"),
}  # fmt: skip

CONVERTED = {  # name: (bytes, the pixels that are expected, the largest difference)
    "grey.png": (encoded(L), GREY, 0),
    "grey.bmp": (encoded(L, "BMP"), GREY, 0),
    "grey.tif": (encoded(L, "TIFF"), GREY, 0),
    "grey.webp": (encoded(L, "WEBP", lossless=True), GREY, 2),
    "12-bit.png": (grey_16(16), GREY, 1),
    "12-bit.tif": (grey_16(16, "TIFF"), GREY, 1),
    "16-bit.png": (grey_16(257), GREY, 0),
    "16-bit.tiff": (grey_16(257, "TIFF"), GREY, 0),
    "rgb.png": (encoded(Image.fromarray(RGB)), LUMA, 0),
    "rgba.png": (encoded(Image.fromarray(np.dstack([RGB, ALPHA]))), np.where(ALPHA, LUMA, 0), 0),
    "alpha.png": (
        encoded(Image.merge("LA", [L, Image.fromarray(ALPHA)])), np.where(ALPHA, GREY, 0), 0
    ),
    "palette.png": (encoded(L.convert("P")), GREY, 1),
    "bit.png": (encoded(Image.fromarray(GREY > 99)), np.where(GREY > 99, 255, 0), 0),
    "cmyk.jpeg": (
        encoded(Image.fromarray(np.dstack([GREY] * 3)).convert("CMYK"), "JPEG", quality=100),
        GREY, 40,
    ),
    "rotated.jpeg": (ROTATED, np.rot90(GREY, -1), 40),
    # The orientation of damaged EXIF is unknown; the pixels are not damaged.
    "exif.png": (encoded(L)[:33] + chunk(b"eXIf", b"no EXIF") + encoded(L)[33:], GREY, 0),
}  # fmt: skip


def load_one(path, size=SIZE, bits=None):
    """(pixels, stats, error) of one file."""
    images, stats, errors = load_slices([str(path)], size, progress=None, bits=bits)
    return images[0], stats.iloc[0], errors[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_slice_is_refused_with_the_reason(tmp_path, name):
    data, reason = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    image, stats, error = load_one(tmp_path / name)
    assert reason in error and "\n" not in error
    assert image.max() == 0 and (stats == 0).all()
    with pytest.raises((InputError, OSError, SyntaxError)):  # Pillow: SyntaxError for a bad PNG
        decode(tmp_path / name)


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_other_kinds_of_pixels_are_converted_as_documented(tmp_path, name):
    data, expected, tolerance = CONVERTED[name]
    (tmp_path / name).write_bytes(data)
    image, stats, error = load_one(tmp_path / name, expected.shape)
    assert error is None
    assert np.abs(image.astype(int) - expected).max() <= tolerance
    assert (stats.height, stats.width) == expected.shape
    assert (stats.colour > 30) == (name in ("rgb.png", "rgba.png"))


def test_every_orientation_is_turned_upright_in_every_format(tmp_path):
    for number in range(1, 9):
        files = {
            "a.png": with_orientation(L, number, "PNG"),
            "raw.tif": with_orientation(L, number, "TIFF"),
            "lzw.tif": with_orientation(L, number, "TIFF", compression="tiff_lzw"),
        }
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        expected = decode(tmp_path / "a.png")
        assert expected.shape == (SIZE if number < 5 else SIZE[::-1])
        for name in files:
            np.testing.assert_array_equal(decode(tmp_path / name), expected)
            assert common_size([tmp_path / name]) == expected.shape
    np.testing.assert_array_equal(expected, np.rot90(GREY, 1))  # number 8


def test_something_else_than_a_file_is_refused_and_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {
        "folder.png": "is not a file",
        "pipe.png": "is not a file",
        "link.png": "does not exist",
        "gone.png": "does not exist",
    }
    for name, reason in reasons.items():
        assert load_one(tmp_path / name)[2] == reason


def test_a_file_without_permission_is_refused_with_the_reason():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "1_1.png"
        path.write_bytes(encoded(L))
        path.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            assert "Permission denied" in load_one(path)[2]
        finally:
            os.seteuid(user)


def test_a_readable_file_is_decoded_as_pillow_decodes_it(ad_nc, tmp_path):
    paths = read_index(ad_nc).path.tolist()[:4]
    bad = tmp_path / "x_1.jpeg"
    bad.write_bytes(b"not an image")
    assert common_size([*paths, bad]) == SIZE
    images, stats, errors = load_slices([*paths, str(bad)], SIZE, progress=None)
    assert images.shape == (5, *SIZE) and images.dtype == np.uint8
    for image, path in zip(images, paths):
        np.testing.assert_array_equal(image, np.asarray(Image.open(path)))
    assert errors[:4] == [None, None, None, None] and "cannot be read" in errors[4]
    assert images[4].max() == 0 and len(stats) == 5


def test_a_set_without_a_readable_file_has_no_common_size(tmp_path):
    (tmp_path / "x_1.jpeg").write_bytes(b"not an image")
    with pytest.raises(InputError, match="can be read as an image, such as .*x_1.jpeg: the"):
        common_size([str(tmp_path / "x_1.jpeg")])


def test_an_image_of_another_size_is_scaled_to_cover_and_cropped(tmp_path):
    slope = np.tile(np.arange(100, dtype=np.uint8), (40, 1))
    Image.fromarray(slope).save(tmp_path / "a.png")
    image = decode(tmp_path / "a.png", (40, 60))
    assert image.shape == (40, 60)
    assert image[0, 0] == 20 and image[0, -1] == 79  # the middle 60 of 100 columns


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("form", ["png", "tiff", "webp", "bmp"])
def test_whatever_pillow_refuses_is_refused(tmp_path, form):
    noise, path = np.random.default_rng(0), tmp_path / f"1_70.{form}"
    slope = np.add.outer(np.arange(120), np.arange(100)) + noise.integers(0, 30, (120, 100))
    options = {"compression": "tiff_lzw"} if form == "tiff" else {}
    Image.fromarray(slope.astype(np.uint8)).save(path, **options)
    good = path.read_bytes()
    n_refused = 0
    for i in noise.integers(60, len(good) - 20, 40):
        path.write_bytes(good[:i] + bytes([good[i] ^ 255]) + good[i + 1 :])
        try:
            with Image.open(path) as image:
                image.load()
        except Exception:
            n_refused += 1
            assert "cannot be read" in load_one(path, (120, 100))[2]
    if form == "png":  # which has checksums
        assert n_refused == 40


def mutated(data, generator):
    """Bytes with one to six random changes."""
    data = bytearray(data)
    for _ in range(generator.randint(1, 6)):
        i = generator.randrange(len(data) + 1)
        extra = generator.randbytes(generator.randrange(13))
        kind = generator.choice(["flip", "set", "cut", "insert", "swap"])
        if kind == "flip" and i < len(data):
            data[i] ^= 1 << generator.randrange(8)
        elif kind == "set":
            data[i : i + len(extra)] = extra
        elif kind == "cut":
            del data[i : i + 1 + 7 * len(extra)]
        elif kind == "insert":
            data[i:i] = extra
        elif kind == "swap":
            data[:] = data[i:] + data[:i]
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_whose_white_is_zero_is_never_read_as_its_negative(tmp_path, photometric, kind):
    values = np.zeros((32, 32), kind)
    values[8:24, 8:24] = 200 if kind == np.uint8 else 40000
    path = tmp_path / "a_1.tif"
    Image.fromarray(values).save(path, tiffinfo={pixels.PHOTOMETRIC: photometric})
    if kind == np.uint16 and photometric == 0:
        with pytest.raises(pixels.Unfit, match="in which 0 is white"):
            pixels.read_grey(path)
    else:
        read = np.asarray(pixels.read_grey(path)[0])
        assert read[0, 0] == 0 and read[16, 16] == values[16, 16]


def test_a_tiff_of_signed_bytes_is_not_read_as_unsigned(tmp_path):
    values = np.arange(-64, 64, dtype=np.int8).repeat(8).reshape(32, 32)
    path = tmp_path / "a_1.tif"
    Image.fromarray(values.view(np.uint8)).save(path, tiffinfo={pixels.SAMPLE_FORMAT: 2})
    with pytest.raises(pixels.Unfit, match="a TIFF of signed bytes"):
        pixels.read_grey(path)


def test_mutated_files_are_used_or_refused_with_a_reason(tmp_path, repeats):
    seeds = [data for data, *_ in (*CONVERTED.values(), *REFUSED.values()) if len(data) < 10_000]
    generator = random.Random(0)
    n, n_used = repeats(300, 5000), 0
    for i in range(n):
        path = tmp_path / f"1_1.{generator.choice(['png', 'jpeg'])}"
        path.write_bytes(mutated(seeds[i % len(seeds)], generator))
        image, stats, error = load_one(path)
        pixels.header(path)
        assert image.shape == SIZE and np.isfinite(stats).all()
        if error is None:
            n_used += 1
        else:
            assert 5 < len(error) < 300 and image.max() == 0
    assert 0.05 * n < n_used < 0.95 * n  # the mutations are neither toys nor noise


def inverted(data):
    return encoded(Image.fromarray(255 - np.asarray(Image.open(io.BytesIO(data)))), "JPEG")


def blackened(data):
    return encoded(Image.open(io.BytesIO(data)).point(lambda level: 0), "JPEG")


def cut_with_an_end(data):
    return data[: len(data) // 2] + b"\xff\xd9"


def zeroed_in_the_middle(data):
    return data[: len(data) // 2] + bytes(300) + data[-200:]


@pytest.mark.parametrize("damage", [cut_with_an_end, zeroed_in_the_middle, inverted, blackened])
def test_a_slice_that_looks_unlike_the_others_is_named(tmp_path, damage):
    """A JPEG that is damaged in the middle decodes without an error."""
    paths = [tmp_path / f"{i}_70.jpeg" for i in range(30)]
    for i, path in enumerate(paths):
        write_slice(path, True, i, (256, 240))

    def outliers():
        _, stats, errors = load_slices(paths, (240, 256), progress=None)
        assert not any(errors)
        return list(describe_outliers(stats.assign(path=paths)))

    assert outliers() == []
    paths[13].write_bytes(damage(paths[13].read_bytes()))
    (line,) = outliers()
    assert line.startswith(
        f"SUSPICIOUS: 1 of 30 slices look unlike the others, first {paths[13]}: "
    )
    assert "usual are" in line


# ---------------------------------------------------------------- 16 bits


def write_16_bits(folder, **largest):
    """Files of 16 bits a pixel, a slope from 0 to `largest` in each; returns their paths."""
    paths = []
    for name, most in largest.items():
        slope = np.linspace(0, most, 40 * 48).reshape(SIZE).round().astype(np.uint16)
        Image.fromarray(slope).save(folder / f"{name}_1.png")
        paths.append(str(folder / f"{name}_1.png"))
    return paths


@pytest.mark.parametrize(
    "largest, bits",
    [
        (dict(a=4000, dark=120), 12),
        (dict(a=24_000, dark=900), 15),
        (dict(a=65_535, dark=3000), 16),
        (dict(a=200, dark=0), 8),
        (dict(a=4096, b=4095), 13),
    ],
)
def test_files_of_16_bits_are_read_by_one_rule_for_the_whole_set(tmp_path, largest, bits):
    """A rule for each file would brighten the dark ones."""
    paths = write_16_bits(tmp_path, **largest)
    plain = tmp_path / "plain_1.png"
    Image.fromarray(np.full(SIZE, 77, np.uint8)).save(plain)
    images, stats, errors = load_slices([*paths, str(plain)], SIZE, progress=None)
    assert errors == [None] * 3
    assert stats.bits.tolist() == [bits, bits, 8] and stats.depth[2] == 0
    assert images[2].max() == 77
    expected = [round(most * 255 / (2**bits - 1)) for most in largest.values()]
    assert images[:2].max((1, 2)).tolist() == expected
    if largest["a"] > 1000:
        assert len(np.unique(images[0])) > 120


def test_files_of_16_bits_to_predict_are_read_as_those_of_training(tmp_path):
    paths = write_16_bits(tmp_path, dark=120, full=4095, more=4096)
    images, _, errors = load_slices(paths, SIZE, progress=None, bits=12)
    assert images.max((1, 2)).tolist() == [7, 255, 0]
    assert errors[:2] == [None, None]
    assert "holds values up to 4,096; expected at most 4,095" in errors[2]


def test_the_rule_for_16_bits_is_reported(tmp_path):
    paths = write_16_bits(tmp_path, dark=200)
    _, stats, _ = load_slices(paths, SIZE, progress=None)
    (line,) = describe_bits(stats.assign(path=paths, label="AD"))
    assert line == (
        "1 of 1 slices are 16-bit (AD 1) and are read as 8-bit, by one rule for all: "
        "0 to 255 becomes 0 to 255"
    )
    assert list(describe_bits(stats.assign(path=paths, label=None, depth=0))) == []


def test_one_bright_pixel_that_darkens_a_whole_set_is_named(tmp_path):
    largest = {f"a{i}": 4000 + i for i in range(9)}
    paths = write_16_bits(tmp_path, **largest, hot=40_000)
    _, stats, _ = load_slices(paths, SIZE, progress=None)
    assert len(stats) == 10 and (stats.depth[:9] == 12).all() and stats.depth.iloc[9] == 16
    assert (stats.bits == 16).all()
    table = stats.assign(path=paths, label=None)
    lines = list(describe_bits(table))
    assert len(lines) == 2
    assert lines[1].startswith(
        "SUSPICIOUS: most of them use at most 12 bits, but 1 use 16, which makes the others 16 "
    )
    assert f"darker; first {paths[9]}" in lines[1]
    assert len(list(describe_bits(table[:9]))) == 1


# ---------------------------------------------------------------- hashes and means


def test_equal_pixels_have_equal_hashes_and_slices_of_one_grey_have_none():
    """Empty slices at the ends of a volume are alike without being copies."""
    images = np.zeros((4, 8, 8), np.uint8)
    images[1] += 7
    images[2:, 0, 0] = 1
    hashes = hash_slices(images)
    assert hashes[:2] == ["", ""]
    assert hashes[2] == hashes[3] == hash_pixels(images[2]) and len(hashes[2]) == 12


def test_the_mean_slice_is_that_of_the_given_rows():
    images = np.random.default_rng(0).integers(0, 256, (600, 5, 4), np.uint8)
    expected = images[1::2].astype(float).mean(0)
    np.testing.assert_allclose(mean_slice(images, np.arange(1, 600, 2)), expected, rtol=1e-12)


# ---------------------------------------------------------------- cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A small set and a cache of its own: (root, load).

    load() checks that the slices are right, and returns (number of decoded files, images, errors).
    """
    scans = {"100": ("train", "AD", "a"), "200": ("train", "NC", "b")}
    root = write_set(tmp_path / "set", scans)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    n_decoded = []

    def count_and_load(paths, *args, **options):
        n_decoded.append(len(paths))
        return load_slices(paths, *args, **options)

    monkeypatch.setattr(pixels, "load_slices", count_and_load)

    def load():
        n_decoded.clear()
        paths = sorted(map(str, root.rglob("*.jpeg")))
        images, table, errors = decode_files(paths, lambda: SIZE, root=root, progress=None)
        expected, stats, _ = load_slices(paths, SIZE, None)
        np.testing.assert_array_equal(images, expected)
        assert table.equals(stats.assign(pixel_hash=hash_slices(expected)))
        return sum(n_decoded), images, errors

    return root, load


def cache_files():
    """(npy, json) of the only set in the cache."""
    npy, table = sorted(pixels.cache_folder().iterdir(), key=lambda path: path.suffix == ".json")
    assert (npy.suffix, table.suffix) == (".npy", ".json") and npy.stem == table.stem
    return npy, table


def test_a_set_is_decoded_once_and_then_memory_mapped(cached):
    _, load = cached
    assert load()[0] == 10
    n_decoded, images, errors = load()
    assert n_decoded == 0 and errors == [None] * 10
    assert isinstance(images, np.memmap) and not images.flags.writeable
    mode = pixels.cache_folder().stat().st_mode
    assert oct(mode)[-3:] == "700"  # slices of patients


def test_a_cache_folder_that_was_there_becomes_private(cached):
    pixels.cache_folder().mkdir(parents=True, mode=0o755)
    cached[1]()
    assert oct(pixels.cache_folder().stat().st_mode)[-3:] == "700"


def test_a_cache_holds_for_any_spelling_of_the_paths(cached, monkeypatch):
    root, load = cached
    load()
    monkeypatch.chdir(root.parent)
    paths = sorted(map(str, Path(root.name).rglob("*.jpeg")))
    monkeypatch.setattr(pixels, "load_slices", None)  # nothing is decoded again
    images, _, _ = decode_files(paths, lambda: SIZE, root=root.name, progress=None)
    assert len(images) == 10


def test_what_a_killed_decoding_left_a_day_ago_is_removed(cached):
    _, load = cached
    load()
    npy, _ = cache_files()
    old, new = npy.with_suffix(".1.tmp"), npy.with_suffix(".2.tmp")
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    npy.unlink()
    load()
    assert not old.exists() and new.exists()


def change_content(folder):
    """Another picture under the old time."""
    path = folder / "100_70.jpeg"
    before = path.stat()
    write_slice(path, False, 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange_two(folder):
    """Two files of one size and one time, as archives may give them."""
    one, two = folder / "100_70.jpeg", folder / "100_71.jpeg"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def add(folder):
    write_slice(folder / "100_99.jpeg", True, 5)


def remove(folder):
    (folder / "100_70.jpeg").unlink()


def rename(folder):
    (folder / "100_70.jpeg").rename(folder / "100_99.jpeg")


def touch(folder):
    os.utime(folder / "100_70.jpeg")


@pytest.mark.parametrize("change", [change_content, exchange_two, add, remove, rename, touch])
def test_a_changed_set_is_decoded_again(cached, change):
    root, load = cached
    folder = root / "train" / "AD"
    for name in ("100_70.jpeg", "100_71.jpeg"):
        path = folder / name
        path.write_bytes(path.read_bytes().ljust(9000, b"\0"))
        os.utime(path, ns=(10**18, 10**18))
    load()
    change(folder)
    assert load()[0] == len(list(root.rglob("*.jpeg")))
    assert load()[0] == 0
    cache_files()  # the new pair has replaced the old one


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("content", [b"", b"[1]", b'{"state": 1}', b"no JSON", bytes(99)])
def test_a_damaged_cache_is_rebuilt(cached, number, content):
    _, load = cached
    load()
    cache_files()[number].write_bytes(content)
    assert load()[0] == 10 and load()[0] == 0


def test_slices_and_table_of_two_different_runs_are_not_mixed(cached):
    """As after a kill between the two writes."""
    root, load = cached
    load()
    npy, table = cache_files()
    old_table = table.read_bytes()
    images = np.load(npy)
    np.save(npy, images[::-1])  # another run, of the same shape
    assert table.read_bytes() == old_table
    assert load()[0] == 10


def test_a_set_with_a_file_that_cannot_be_read_is_not_cached(cached, monkeypatch):
    """The file may be repaired without a change of size or time, as by mounting a share again."""
    root, load = cached
    locked = str(root / "train" / "AD" / "100_70.jpeg")
    paths = sorted(map(str, root.rglob("*.jpeg")))

    def refuse(path, *args):
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return decode_with_stats(path, *args)

    decode_with_stats = pixels.decode_with_stats
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "decode_with_stats", refuse)
        _, _, errors = decode_files(paths, lambda: SIZE, root=root, progress=None)
    assert [error for error in errors if error] == ["cannot be read as an image: Permission denied"]
    assert list(pixels.cache_folder().iterdir()) == []
    assert load()[2] == [None] * 10


def test_if_the_cache_cannot_be_written_slices_are_decoded_into_memory(cached, monkeypatch, capsys):
    _, load = cached

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    n_decoded, images, _ = load()
    assert n_decoded == 10 and not isinstance(images, np.memmap)
    assert "No space left on device); slices are decoded into memory" in capsys.readouterr().out
    assert list(pixels.cache_folder().iterdir()) == []


def test_without_a_home_slices_are_decoded_into_memory(cached, monkeypatch, capsys):
    _, load = cached

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pixels.Path, "home", homeless)
    assert not any(load()[2])
    assert "XDG_CACHE_HOME" in capsys.readouterr().out


def test_two_processes_may_write_the_cache_at_once(cached, tmp_path):
    root, load = cached
    script = (
        "import sys; from pathlib import Path; from adnc.data.pixels import decode_files\n"
        "paths = sorted(map(str, Path(sys.argv[1]).rglob('*.jpeg')))\n"
        "images = decode_files(paths, lambda: (40, 48), root=sys.argv[1], progress=None)[0]\n"
        "print(images.shape, int(images.sum()))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(root)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(3)
    ]
    answers = {process.communicate(timeout=120)[0].splitlines()[-1] for process in processes}
    assert len(answers) == 1 and "(10, 40, 48)" in answers.pop()
    cache_files()
    assert load()[0] == 0


def test_training_reads_the_same_slices_from_the_cache_as_from_the_files(ad_nc, tmp_path):
    shutil.copytree(ad_nc.parent, tmp_path / "set")
    root = tmp_path / "set" / "AD_NC"
    first = load_set(root, progress=None)
    from_cache = load_set(root, progress=None)
    from_files = load_set(root, use_cache=False, progress=None)
    assert isinstance(from_cache.images, np.memmap)
    assert not isinstance(from_files.images, np.memmap)
    for other in (from_cache, from_files):
        assert other.index.equals(first.index)
        np.testing.assert_array_equal(other.images, first.images)
    assert set(STATS) < set(first.index.columns)
