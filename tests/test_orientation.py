"""Slices that are turned or mirrored are noticed, and upright ones never taken for such."""

from dataclasses import replace

import numpy as np
import pytest

import dataset
from adnc.data.orientation import VIEWS, describe_turned, find_view
from adnc.data.pixels import mean_slice


def parts(root):
    """(mean training slice, SliceSet of test) of a set."""
    slices = dataset.decode_set(root, progress=None)
    return mean_slice(slices.images, slices.part("train").rows), slices.part("test")


@pytest.fixture(scope="module")
def drawn(phantom):
    return parts(phantom / "AD_NC")


@pytest.fixture(scope="module")
def real(oasis):
    return parts(oasis)


def turned(test, view):
    """The mean slice of each scan of `test`, seen as a view of VIEWS."""
    for _, part in test.index.groupby("scan"):
        yield VIEWS[view](mean_slice(test.images, part.row.to_numpy(np.int64)))


@pytest.mark.parametrize("view", list(VIEWS)[1:])
def test_every_turn_of_a_sagittal_head_is_noticed(drawn, view):
    training, test = drawn
    assert {find_view(pixels, training) for pixels in turned(test, view)} == {view}


@pytest.mark.parametrize("view", list(VIEWS)[1:])
def test_turns_of_real_axial_heads_are_noticed_but_not_their_mirror_image(real, view):
    training, test = real
    views = [find_view(pixels, training) for pixels in turned(test, view)]
    if view == "mirrored left to right":
        assert set(views) == {None}
    else:
        assert None not in views


def test_no_upright_slice_raises_an_alarm(drawn, real):
    for training, test in (drawn, real):
        for row in test.rows[::5]:
            assert find_view(test.images[row], training) is None
        assert list(describe_turned(replace(test), training)) == []


def test_the_warning_names_the_turn_and_a_scan(drawn):
    training, test = drawn
    images = np.rot90(test.images, 2, (1, 2))
    (line,) = describe_turned(replace(test, images=images), training)
    n = test.index.scan.nunique()
    assert line.startswith(f"{n} of {n} scans, first {test.index.scan.iloc[0]}, look turned by 180")


def test_what_shows_no_head_is_not_called_turned(drawn):
    training, test = drawn
    noise = np.random.default_rng(0).uniform(0, 255, (3, *training.shape))
    assert [find_view(pixels, training) for pixels in noise] == [None] * 3
    assert find_view(np.zeros(training.shape), training) is None
