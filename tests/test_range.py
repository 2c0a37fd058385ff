"""What is out of the training range gets a warning and no verdict, and what is within it neither."""

import numpy as np
import pandas as pd
import pytest
from conftest import train_small
from PIL import Image
from scipy import ndimage
from test_report import Page

import dataset
from adnc.phantom import draw as phantom
import predict
from adnc.data import pixels as slices


@pytest.fixture(scope="module")
def brains(tmp_path_factory):
    """(a run of an epoch on a small phantom, its AD_NC)"""
    root = phantom.draw(tmp_path_factory.mktemp("phantom"), subjects=12, progress=False)
    return train_small(root, tmp_path_factory.mktemp("run") / "run", "--epochs", "1"), root


def with_skull_and_neck(pixels):
    """The head that a brain was stripped of: dark skull, bright scalp, and a neck down to the border."""
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(pixels >= 20, iterations=3))
    distance = ndimage.distance_transform_edt(~brain)
    head = pixels.copy()
    head[(distance > 7) & (distance <= 18)] = 190
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    head[(y > 150) & (np.abs(x - 130) < 40) & (distance > 18)] = 120
    return head


def photograph(pixels):
    noise = ndimage.gaussian_filter(np.random.default_rng(int(pixels.sum())).normal(size=(*pixels.shape, 3)), (9, 9, 0))
    return np.interp(noise, (noise.min(), noise.max()), (0, 255)).astype(np.uint8)


def coloured(pixels):
    return np.stack([pixels, pixels // 2, 255 - pixels], 2)


@pytest.mark.parametrize("change", [
    with_skull_and_neck, photograph, coloured, lambda pixels: 255 - pixels, lambda pixels: pixels * 0,
    lambda pixels: np.kron(pixels, np.ones((3, 3), np.uint8)),
], ids=["head", "photograph", "colour", "inverted", "black", "larger"])  # fmt: skip
def test_an_input_out_of_the_training_range_gets_a_warning_and_no_verdict(brains, tmp_path, capsys, change):
    run, root = brains
    paths = sorted((root / "test" / "AD").iterdir())[:40]
    for path in paths:
        Image.fromarray(change(np.asarray(Image.open(path)))).save(tmp_path / f"{path.stem}.png")
    words = [str(tmp_path), "--checkpoint", str(run / "best_model.pth"), "--out", str(tmp_path / "out")]
    predict.main(predict.parse_args([*words, "--coverage", "0.5"]))
    printed = capsys.readouterr()
    assert "40 of 40 slices are out of the training range" in printed.err
    assert printed.err.count("is out of the training range: ") == 10  # each has its row, ten a line
    assert printed.out.count("no verdict") == 2 and "AD," not in printed.out
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert table.out_of_range.str.contains("in training").all()
    scans = pd.read_csv(tmp_path / "out" / "scans.csv")
    assert (scans.n_out_of_range == 20).all() and (scans.prediction_set == "AD|NC").all()


def test_a_whole_head_gets_no_verdict_in_the_report_of_one_command(brains, adult, tmp_path):
    """An adult head with its skull, predicted with a model that saw the phantom's brains."""
    run, _ = brains
    words = [str(adult[0]), "--checkpoint", str(run / "best_model.pth"), "--out", str(tmp_path / "out")]
    predict.main(predict.parse_args([*words, "--report", str(tmp_path / "head.html")]))
    page = Page(tmp_path / "head.html")
    assert page.verdicts == {"ch2": "no verdict"}
    said = page.words()
    assert "20 of 20 slices are out of the training range" in said and "share of near-black" in said
    assert "1 of 1 volumes cut: sagittal, 20 central slices every 1.2 mm, 256 x 240" in said
    assert len([tag for tag, _ in page.tags if tag == "img"]) >= 20
    scans = pd.read_csv(tmp_path / "out" / "scans.csv")
    assert scans.n_out_of_range.tolist() == [20]


def test_slices_within_the_training_range_get_no_warning(brains, tmp_path, capsys):
    run, root = brains
    words = [str(root / "test"), "--checkpoint", str(run / "best_model.pth"), "--out", str(tmp_path)]
    predict.main(predict.parse_args(words))
    printed = capsys.readouterr()
    assert "range" not in printed.out + printed.err
    assert pd.read_csv(tmp_path / "predictions.csv").out_of_range.isna().all()


def test_real_slices_of_other_subjects_get_no_warning(oasis):
    index = dataset.read_index(oasis)
    _, stats, _ = slices.load_slices(index.path.tolist(), slices.common_size(index.path), bar=None)
    train = (index.split == "train").to_numpy()
    found = slices.out_of_range(stats[~train], slices.stats_range(stats[train]))
    assert found.notna().mean() < 0.005
    assert list(slices.describe_strange(stats.assign(path=index.path))) == []
