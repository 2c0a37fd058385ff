"""The dark share of the head, a baseline of one number."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import dataset
from adnc.scoring import baselines
from adnc.scoring.baselines import dark_shares


def head(fluid, grey=120, side=64):
    """A round head on black, of one grey, with a hole of fluid of that radius in its middle."""
    y, x = np.mgrid[:side, :side] - side / 2
    radius = np.hypot(y, x)
    return np.where(radius > 28, 0, np.where(radius < fluid, 30, grey)).astype(np.uint8)


@pytest.mark.parametrize("grey", [60, 120, 240])
def test_it_is_the_share_of_fluid_whatever_the_brightness(grey):
    pixels = head(10)
    pixels = (pixels.astype(int) * grey // 120).astype(np.uint8)
    assert dark_shares(pixels) == pytest.approx([10**2 / 28**2] * 3, rel=0.05)
    assert dark_shares(head(0)) == pytest.approx([0, 0, 0])


def test_black_fluid_is_inside_the_head_and_an_empty_slice_has_none():
    pixels = head(10)
    pixels[pixels == 30] = 0
    assert dark_shares(pixels) == pytest.approx([10**2 / 28**2] * 3, rel=0.05)
    assert dark_shares(np.zeros((32, 32), np.uint8)).tolist() == [0, 0, 0]


def test_it_ranks_real_subjects_without_a_fit(oasis):
    """An AUROC of 0.721 on 136 subjects, as published in docs/scores.md."""
    slices = dataset.decode_set(oasis, progress=None)
    shares = baselines.all_dark_shares(slices.images, slices.rows)[:, 1]
    subjects = slices.index.assign(share=shares).groupby("subject")
    subjects = subjects.agg(share=("share", "mean"), label=("label", "first"))
    assert len(subjects) == 136
    assert roc_auc_score(subjects.label == "AD", subjects.share) == pytest.approx(0.721, abs=0.001)


def test_slices_without_a_black_background_are_named(ad_nc):
    index = dataset.decode_set(ad_nc, progress=None).index
    assert list(baselines.describe_background(index)) == []
    (line,) = baselines.describe_background(index.assign(near_black=0.01))
    assert "only 1% of a slice is near-black" in line
