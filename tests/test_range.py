"""The range check: slices out of the training range get a warning and their scans no verdict."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

import predict
from adnc.data.pixels import (
    COLUMNS,
    SLACK,
    STATS,
    common_size,
    describe_outliers,
    load_slices,
    out_of_range,
    stats_range,
)
from dataset import decode_set
from utils import load_checkpoint, save_checkpoint

# ---------------------------------------------------------------- the texts


def table_of(**columns):
    """A table of two slices, 100 in each column if nothing else is given."""
    return pd.DataFrame({name: columns.get(name, [100.0, 100.0]) for name in COLUMNS})


def test_the_range_is_the_smallest_and_the_largest_value_of_training():
    training = stats_range(table_of(median=[20.0, 60.0]))
    assert training["median"] == [20, 60] and training["height"] == [100, 100]
    assert list(training) == list(STATS)


@pytest.mark.parametrize("name", SLACK)
def test_values_are_accepted_up_to_a_quarter_of_the_range_and_the_slack(name):
    training = stats_range(table_of(**{name: [20.0, 60.0]}))
    reach = 0.25 * 40 + SLACK[name]
    inside = table_of(**{name: [20 - reach, 60 + reach]})
    assert out_of_range(inside, training).isna().all()
    outside = table_of(**{name: [20 - reach - 0.01, 60 + reach + 0.01]})
    assert out_of_range(outside, training).str.endswith(", in training 20 to 60").all()


def test_height_and_width_are_accepted_up_to_a_factor():
    training = stats_range(table_of())
    assert out_of_range(table_of(height=[67.0, 150.0]), training).isna().all()
    assert out_of_range(table_of(width=[66.0, 151.0]), training).tolist() == [
        "width 66, in training 100 to 100",
        "width 151, in training 100 to 100",
    ]


def test_a_text_lists_everything_that_is_out_of_range():
    stats = table_of(median=[200.0, 100.0], border=[180.0, 100.0])
    texts = out_of_range(stats, stats_range(table_of()))
    assert texts[0] == (
        "median grey 200, in training 100 to 100; "
        "mean grey of the border 180, in training 100 to 100"
    )
    assert pd.isna(texts[1])


def test_real_slices_of_other_subjects_are_in_range(oasis):
    index = decode_set(oasis, progress=None).index
    train = index.split == "train"
    texts = out_of_range(index[~train], stats_range(index[train]))
    assert texts.notna().mean() < 0.005
    assert list(describe_outliers(index)) == []


# ---------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def brains(run_folder, phantom, tmp_path_factory):
    """(checkpoint whose training range is that of a small phantom, AD_NC of the phantom)

    The check reads the range that a checkpoint records, so the phantom need not be trained on.
    """
    root = phantom / "AD_NC"
    paths = sorted(map(str, (root / "train").rglob("*.jpeg")))
    images, stats, _ = load_slices(paths, common_size(paths), progress=None)
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    del checkpoint["format"], checkpoint["baselines"]  # fitted to slices of another size
    checkpoint["slice_size"] = list(images.shape[1:])
    checkpoint["slice_stats"] = stats_range(stats)
    file = tmp_path_factory.mktemp("run") / "best_model.pth"
    save_checkpoint(file, **checkpoint)
    return file, root


def run_predict(checkpoint, inputs, out, *flags):
    predict.main([str(inputs), "--checkpoint", str(checkpoint), "--out", str(out), *flags])


def with_skull_and_neck(pixels):
    """The head of a stripped brain: dark skull, bright scalp, and a neck down to the border."""
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(pixels >= 20, iterations=3))
    distance = ndimage.distance_transform_edt(~brain)
    head = pixels.copy()
    head[(distance > 7) & (distance <= 18)] = 190
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    head[(y > 150) & (np.abs(x - 130) < 40) & (distance > 18)] = 120
    return head


def photograph(pixels):
    noise = np.random.default_rng(int(pixels.sum())).normal(size=(*pixels.shape, 3))
    noise = ndimage.gaussian_filter(noise, (9, 9, 0))
    return np.interp(noise, (noise.min(), noise.max()), (0, 255)).astype(np.uint8)


def coloured(pixels):
    return np.stack([pixels, pixels // 2, 255 - pixels], 2)


def inverted(pixels):
    return 255 - pixels


def black(pixels):
    return pixels * 0


def enlarged(pixels):
    return np.kron(pixels, np.ones((3, 3), np.uint8))


@pytest.mark.parametrize(
    "change", [with_skull_and_neck, photograph, coloured, inverted, black, enlarged]
)
def test_slices_out_of_range_get_a_warning_and_their_scans_no_verdict(
    brains, tmp_path, capsys, change
):
    checkpoint, root = brains
    for path in sorted((root / "test" / "AD").iterdir())[:40]:
        changed = change(np.asarray(Image.open(path)))
        Image.fromarray(changed).save(tmp_path / f"{path.stem}.png")
    run_predict(checkpoint, tmp_path, tmp_path / "out", "--coverage", "0.5")

    printed = capsys.readouterr()
    assert "40 of 40 slices are out of the training range" in printed.err
    assert printed.err.count("is out of the training range: ") == 2  # one for each scan
    assert printed.out.count("no verdict") == 2 and "AD," not in printed.out
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert table.out_of_range.str.contains("in training").all()
    scans = pd.read_csv(tmp_path / "out" / "scans.csv")
    assert (scans.n_out_of_range == 20).all()
    assert (scans.prediction_set == "AD|NC").all()


def test_slices_in_range_get_no_warning(brains, tmp_path, capsys):
    checkpoint, root = brains
    run_predict(checkpoint, root / "test", tmp_path / "out")
    printed = capsys.readouterr()
    assert "training range" not in printed.out + printed.err
    assert pd.read_csv(tmp_path / "out" / "predictions.csv").out_of_range.isna().all()


def test_a_head_with_its_skull_gets_no_verdict(brains, adult, tmp_path, capsys):
    """An adult head, predicted with the range of stripped brains."""
    checkpoint, _ = brains
    run_predict(checkpoint, adult[0], tmp_path / "out")
    printed = capsys.readouterr()
    assert "scan ch2: no verdict: 20 slices, 20 out of the training range" in printed.out
    assert "share of near-black" in printed.err
