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


def turned(test, view):
    """The mean slice of each scan of `test`, seen as a view of VIEWS."""
    for _, part in test.index.groupby("scan"):
        yield VIEWS[view](mean_slice(test.images, part.row.to_numpy(np.int64)))


def assert_upright(training, test):
    """No slice and no scan raises an alarm."""
    for row in test.rows[::5]:
        assert find_view(test.images[row], training) is None
    assert list(describe_turned(test, training)) == []


def test_turns_of_real_axial_heads_are_noticed_but_not_their_mirror_image(oasis):
    training, test = parts(oasis)
    assert_upright(training, test)
    for view in VIEWS:
        views = [find_view(pixels, training) for pixels in turned(test, view)]
        if view in ("upright", "mirrored left to right"):
            assert set(views) == {None}
        else:
            assert None not in views


def test_every_turn_of_a_sagittal_head_is_noticed(drawn):
    training, test = drawn
    assert_upright(training, test)
    for view in list(VIEWS)[1:]:
        assert {find_view(pixels, training) for pixels in turned(test, view)} == {view}

    images = np.rot90(test.images, 2, (1, 2))
    (line,) = describe_turned(replace(test, images=images), training)
    n = test.index.scan.nunique()
    assert line.startswith(f"{n} of {n} scans, first {test.index.scan.iloc[0]}, look turned by 180")

    # What shows no head is not called turned.
    noise = np.random.default_rng(0).uniform(0, 255, (3, *training.shape))
    assert {find_view(pixels, training) for pixels in noise} == {None}
    assert find_view(np.zeros(training.shape), training) is None
