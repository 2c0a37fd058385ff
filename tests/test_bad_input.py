"""Files that people copied by hand: each is used as documented, or refused with a reason, and nothing else happens."""

import io
import os
import re
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import command
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SMALL, train_steps, write_set, write_slice
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adnc.scoring import assess
import dataset
from adnc import files
import predict
from adnc.data import pixels as slices
import train
from adnc import cli as utils

GREY = np.random.default_rng(0).integers(0, 256, (40, 48), dtype=np.uint8)


def encoded(image, form="PNG", **how):
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def rotated():
    """A JPEG that says: turn me a quarter clockwise to see me upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(GREY), "JPEG", quality=95, exif=exif)


def chunk(name, data):
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def png(width, height, bits, colour, rows):
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def png_16(colour, values):
    """16 bits a channel, which Pillow reads and does not write: grey and alpha (`colour` 4) or RGB (2), (H, W, C)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values.astype(np.uint16))
    return png(values.shape[1], values.shape[0], 16, colour, rows)


def bomb():
    """A PNG of 20,000 x 20,000 pixels in 50 kB; decoded it would be 400 MB."""
    return png(20_000, 20_000, 1, 0, bytes(2501 * 20_000))


L = Image.fromarray(GREY)
JPEG = encoded(L, "JPEG", quality=95)
ALPHA = np.tile(np.where(np.arange(48) < 24, 255, 0).astype(np.uint8), (40, 1))
REFUSED = {  # name: (bytes, what the reason says)
    "truncated.jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "empty.jpeg": (b"", "its 0 bytes are neither JPEG, PNG, BMP, DIB, TIFF nor WEBP"),
    "text.jpeg": (b"no image, but a text", "are neither JPEG, PNG"),
    "picture.png": (encoded(L, "GIF"), "are neither JPEG, PNG"),
    "animated.png": (encoded(L, save_all=True, append_images=[Image.fromarray(255 - GREY)]), "holds 2 pictures"),
    "1x1.png": (encoded(Image.new("L", (1, 1))), "is 1 x 1 pixels; expected 16 to 4096 a side"),
    "bomb.png": (bomb(), "claims far too many pixels; expected 16 to 4096 a side"),
    "12bit-colour.png": (png_16(2, np.dstack([GREY.astype(int) * 16] * 3)), "16 bits a colour and uses 12"),
    "12bit-alpha.png": (png_16(4, np.dstack([GREY.astype(int) * 16, ALPHA.astype(int) * 257])), "save it in grey"),
    "32bit.tif": (encoded(Image.fromarray(GREY.astype(np.int32) * 300), "TIFF"), "holds values from"),
    "signed.tif": (encoded(Image.fromarray(GREY.astype(np.int32) - 50), "TIFF"), "from -50 to 205; expected 16 bits"),
    "real.tif": (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "holds real numbers"),
    "pages.tif": (encoded(L, "TIFF", save_all=True, append_images=[L]), "holds 2 pictures"),
    "cut.png": (encoded(L)[:200], "cannot be read as an image"),
}
RGB = np.stack([GREY, 255 - GREY, np.roll(GREY, 5, 0)], 2)
LUMA = np.asarray(Image.fromarray(RGB).convert("L"))
CONVERTED = {  # name: (bytes, the pixels that are expected, largest difference)
    "grey.png": (encoded(L), GREY, 0),
    "12bit.png": (encoded(Image.fromarray(GREY.astype(np.uint16) * 16)), GREY, 1),
    "12bit.tif": (encoded(Image.fromarray(GREY.astype(np.uint16) * 16), "TIFF"), GREY, 1),
    "16bit.png": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY, 0),
    "16bit.tiff": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), GREY, 0),
    "16bit-colour.png": (png_16(2, np.dstack([GREY.astype(int) * 257] * 3)), GREY, 0),
    "grey.bmp": (encoded(L, "BMP"), GREY, 0),
    "grey.webp": (encoded(L, "WEBP", lossless=True), GREY, 2),
    "rgb.png": (encoded(Image.fromarray(RGB)), LUMA, 0),
    "rgba.png": (encoded(Image.fromarray(np.dstack([RGB, ALPHA]))), np.where(ALPHA, LUMA, 0), 0),
    "grey-alpha.png": (encoded(Image.merge("LA", [L, Image.fromarray(ALPHA)])), np.where(ALPHA, GREY, 0), 0),
    "palette.png": (encoded(L.convert("P")), GREY, 1),
    "bit.png": (encoded(Image.fromarray(GREY > 99)), np.where(GREY > 99, 255, 0), 0),
    "cmyk.jpeg": (encoded(Image.fromarray(np.dstack([GREY] * 3)).convert("CMYK"), "JPEG", quality=100), GREY, 40),
    "exif.jpeg": (rotated(), np.rot90(GREY, -1), 40),
}


def test_every_orientation_of_a_tiff_is_that_of_the_same_png(tmp_path):
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        for name, flags in (("raw.tif", {}), ("lzw.tif", dict(compression="tiff_lzw")), ("same.png", {})):
            L.save(tmp_path / name, exif=exif, **flags)
        expected = slices.decode(tmp_path / "same.png")
        for name in ("raw.tif", "lzw.tif"):
            pixels = slices.decode(tmp_path / name)
            np.testing.assert_array_equal(pixels, expected)
            assert slices.header(tmp_path / name) == pixels.shape


def png_with(name, data):
    """A PNG with one more chunk, behind its header."""
    return encoded(L)[:33] + chunk(name, data) + encoded(L)[33:]


# An orientation, and a resolution whose value lies beyond the file.
EXIF = (b"MM\0*\0\0\0\x08\0\x02" + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
        + struct.pack(">HHII", 0x011A, 5, 1, 0xFFFFFF00) + bytes(4))
LONG = zlib.compress(bytes(80 * 2**20))
DAMAGED = {
    "rational.jpeg": encoded(L, "JPEG", quality=95, exif=b"Exif\0\0" + EXIF), "rational.png": png_with(b"eXIf", EXIF),
    "exif.png": png_with(b"eXIf", b"no EXIF"), "offset.png": png_with(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "long.png": png_with(b"zTXt", b"k\0\0" + LONG), "unicode.png": png_with(b"iTXt", b"k\0\1\0\0\0" + LONG),
    "plain.png": png_with(b"tEXt", b"k\0" + b"x" * 2**21), "profile.png": png_with(b"iCCP", b"k\0\0" + LONG),
    "unknown.png": png_with(b"zTXt", b"k\0\7x"), "gamma.png": png_with(b"gAMA", b""),
    "size.png": png_with(b"pHYs", b"x"), "mpf.jpeg": JPEG[:2] + b"\xff\xe2\0\x0aMPF\0MM\0*" + JPEG[2:],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_in_metadata_is_no_reason_against_good_pixels(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name])
    expected = np.rot90(GREY, -1) if "rational" in name else GREY  # its orientation can be read
    pixels, error, _ = use(tmp_path / name, expected.shape)
    assert error is None and np.abs(pixels.astype(int) - expected).max() <= (40 if "jpeg" in name else 0)
    with slices.quiet_pillow():
        assert slices.header(tmp_path / name) == expected.shape


def use(path, size):
    images, stats, (error,) = slices.load_slices([str(path)], size, bar=None)
    return images[0], error, stats.iloc[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_slice_is_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).write_bytes(REFUSED[name][0])
    pixels, error, _ = use(tmp_path / name, (40, 48))
    assert REFUSED[name][1] in error and pixels.max() == 0 and "\n" not in error
    with pytest.raises((ValueError, OSError)):
        slices.decode(tmp_path / name, bits=12)


@pytest.mark.parametrize("name", CONVERTED)
def test_other_kinds_of_pixels_are_converted_as_documented(tmp_path, name):
    data, expected, most = CONVERTED[name]
    (tmp_path / name).write_bytes(data)
    pixels, error, stats = use(tmp_path / name, expected.shape)
    assert error is None and np.abs(pixels.astype(int) - expected).max() <= most
    assert (stats.height, stats.width) == expected.shape and (stats.colour > 30) == (name in ("rgb.png", "rgba.png"))


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("folder.png", "is not a regular file"), ("pipe.png", "is not a regular file"),
                         ("link.png", "No such file"), ("gone.png", "No such file")):
        assert reason in use(tmp_path / name, (40, 48))[1] and slices.header(tmp_path / name) is None


def test_a_file_that_must_not_be_read_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "1_1.png"
        path.write_bytes(encoded(L))
        path.chmod(0)
        os.seteuid(65534 if os.getuid() == 0 else os.getuid())  # root may read everything
        try:
            assert "Permission denied" in use(path, (40, 48))[1]
        finally:
            os.seteuid(os.getuid())


# ---------------------------------------------------------------- training


def spoiled(tmp_path):
    """A set with one of everything. Returns (AD_NC, names of the files that cannot be used)."""
    root = write_set(tmp_path)
    bad = set()
    for number, (name, (data, _)) in enumerate(REFUSED.items()):
        path = root / "train" / "AD" / f"100_{200 + number}{Path(name).suffix}"
        path.write_bytes(data)
        bad.add(path.name)
    (root / "test" / "NC" / "400_99.jpeg").symlink_to("nowhere")
    (root / "test" / "NC" / "400_98.jpeg").symlink_to("400_98.jpeg")
    (root / "test" / "NC" / "4 00.jpeg").mkdir()
    write_slice(root / "train" / "AD" / "a holiday\n.jpeg", True, 1)
    write_slice(root / "train" / "NC" / "101_70.png", False, 1)  # scan 101 is AD
    write_slice(root / "train" / "NC" / "200_70.png", False, 1)  # there as 200_70.jpeg
    write_slice(root / "test" / "NC" / "205_99.jpeg", False, 1)  # scan 205 is in train
    bad |= {"400_98.jpeg", "400_99.jpeg", "4 00.jpeg", "a holiday\n.jpeg"}
    bad |= {"101_70.png", "200_70.png", "205_99.jpeg", "200_70.jpeg"}
    bad |= {f"{scan}_{number}.jpeg" for scan in (101, 205) for number in range(70, 75)}
    return root, bad


def test_training_lists_all_offenders_before_the_first_step(tmp_path):
    root, bad = spoiled(tmp_path)
    words = ["--data", root, "--out", tmp_path / "run", *SMALL, "--epochs", "1"]
    done = command.run(ROOT / "train.py", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"error: {len(bad)} files cannot be used; fix or remove them, or leave them out")
    assert len(lines) == 12 and lines[-1] == f"  ... and {len(bad) - 10} more"
    audit = command.run(ROOT / "dataset.py", root)
    assert audit.returncode == 1 and "slices per scan" in audit.stdout and "files cannot be used" in audit.stderr


def test_skip_bad_continues_without_them_and_records_them(tmp_path):
    root, bad = spoiled(tmp_path)
    run = train_steps(root, tmp_path / "run", "--epochs", "1", "--skip-bad")
    skipped = pd.read_csv(run / "skipped.csv")
    assert {os.path.basename(path) for path in skipped.path} == bad and skipped.reason.notna().all()
    assert f"skipped.csv: {len(bad)} files that cannot be used" in (run / "training_log.txt").read_text()
    used = pd.read_csv(run / "split.csv").path.map(os.path.basename)
    assert not bad & set(used) and len(used) == 90 - 11
    (root / "train" / "AD" / "102_70.jpeg").write_bytes(b"")  # another one, later
    with pytest.raises(ValueError, match="these slices are not those"):
        train.main(train.parse_args(["--out", str(run), "--resume"]))


# ---------------------------------------------------------------- prediction


def run_predict(run_folder, out, *inputs):
    words = [*map(str, inputs), "--checkpoint", str(run_folder / "best_model.pth"), "--out", str(out)]
    return command.run(ROOT / "predict.py", *words)


def predict_here(run_folder, out, *inputs):
    """Predict in this process."""
    words = [*map(str, inputs), "--checkpoint", str(run_folder / "best_model.pth"), "--out", str(out)]
    predict.main(predict.parse_args(words))


NAMES = ["with space_1.png", "new\nline_2.png", "ümläut-腦_3.png", "=1+1_4.png", "@x_5.png", "-x_6.png",
         "\x1b[31m_7.png", "a,b\"c'_8.png"]  # fmt: skip


def test_prediction_continues_and_writes_a_row_with_the_reason(run_folder, ad_nc, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, (name, (data, _)) in enumerate(REFUSED.items()):
        (folder / f"9_{number}{Path(name).suffix}").write_bytes(data)
    for name in NAMES:
        shutil.copy(ad_nc / "test" / "AD" / "300_70.jpeg", folder / name)
    raw = os.fsencode(folder) + b"/\xff\xfe_9.png"  # bytes that are no UTF-8
    shutil.copy(ad_nc / "test" / "AD" / "300_70.jpeg", raw)
    (folder / "9_90.jpeg").symlink_to("nowhere")
    (folder / "9_91.jpeg").mkdir()
    done = run_predict(run_folder, tmp_path / "out", folder, tmp_path / "nowhere.png", folder / "9_90.jpeg")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"{len(REFUSED) + 2} of {len(REFUSED) + 2 + len(NAMES) + 1} files could not be read" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    table = files.read_csv(tmp_path / "out" / "predictions.csv")
    assert table.error.notna().sum() == len(REFUSED) + 2 and (table.error.isna() == table.p_AD.notna()).all()
    good = table[table.error.isna()]
    assert {os.fsencode(os.path.basename(path)) for path in good.path} == {
        *map(os.fsencode, NAMES), b"\xff\xfe_9.png"}  # fmt: skip
    assert good.p_AD.nunique() == 1
    cells = pd.read_csv(tmp_path / "out" / "predictions.csv", dtype=str, encoding_errors="replace").stack()
    assert not cells.str.match(r"[=+\-@\t\r]").any() and "'=1+1" in set(cells)


def test_an_input_that_is_not_there_costs_the_others_no_scores(run_folder, ad_nc, tmp_path, capsys):
    predict_here(run_folder, tmp_path, ad_nc / "test", tmp_path / "gone.png")
    warnings = capsys.readouterr().err
    assert "have no label" not in warnings and "1 of 31 files could not" in warnings
    assert (tmp_path / "metrics.json").exists()


def test_prediction_of_nothing_exits_with_2(run_folder, tmp_path):
    (tmp_path / "9_1.jpeg").write_bytes(b"")
    done = run_predict(run_folder, tmp_path / "out", tmp_path / "9_1.jpeg", tmp_path / "gone")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv").error.dropna()) == 2
    done = run_predict(run_folder, tmp_path / "more", tmp_path / "gone")
    assert done.returncode == 2 and re.fullmatch(r"error: .*gone does not exist; expected .*\n", done.stderr)
    assert not (tmp_path / "more").exists()


def test_broken_metadata_cost_a_prediction_its_subjects_only(run_folder, ad_nc, tmp_path, capsys):
    shutil.copytree(ad_nc / "test", tmp_path / "AD_NC" / "test")
    words = ["--checkpoint", str(run_folder / "best_model.pth")]
    for content, sentence in (('{"300": ', "subjects are not known: .* cannot be read as a JSON object of scans"),
                              ('{"300": {"label": 0}}', "1 scans are in a folder of another class than the meta")):
        (tmp_path / "meta_data_with_label.json").write_text(content)
        out = tmp_path / f"out {len(content)}"
        predict.main(predict.parse_args([str(tmp_path / "AD_NC" / "test"), *words, "--out", str(out)]))
        assert re.search(sentence, capsys.readouterr().err)
        assert len(pd.read_csv(out / "scans.csv")) == 6


def test_a_name_is_neither_a_formula_of_a_spreadsheet_nor_of_a_picture(run_folder, ad_nc, tmp_path, pictures):
    run = shutil.copytree(run_folder, tmp_path / "$\\frac{$")
    (tmp_path / "in").mkdir()
    for label in ("AD", "NC"):
        (tmp_path / "in" / label).mkdir()
        for path in (ad_nc / "test" / label).iterdir():
            shutil.copy(path, tmp_path / "in" / label / f"={path.name}")
    predict_here(run, tmp_path / "out", tmp_path / "in")
    assert (tmp_path / "out" / "roc_curve.png").exists()
    table, _ = assess.read_run(tmp_path / "out")  # what is read back is what was there
    assert set(table.scan) == {"=300", "=301", "=302", "=400", "=401", "=402"}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\r\x00", exclude_categories=["Cs"])), min_size=1))
def test_a_table_is_read_back_as_it_was_and_holds_no_formula(cells):
    cells = ["'=2", *cells]
    with tempfile.TemporaryDirectory() as folder:
        files.write_csv(Path(folder) / "a.csv", pd.DataFrame({"cell": cells, "n": range(len(cells))}))
        again = files.read_csv(Path(folder) / "a.csv")
        raw = pd.read_csv(Path(folder) / "a.csv", dtype=str, keep_default_na=False)
    assert again.cell.fillna("").tolist() == cells
    assert not raw.cell.str.match(r"[=+\-@\t\n]").any()
