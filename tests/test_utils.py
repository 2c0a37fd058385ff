import numpy as np
import pytest

import utils

RECIPE = dict(steps_per_epoch=10, epochs=5, warmup_epochs=1, lr=1e-3)


# ---------------------------------------------------------------- schedule


def test_learning_rate_rises_to_its_peak_over_the_first_epoch_and_falls_to_zero():
    lrs = [utils.lr_at(step, **RECIPE) for step in range(51)]
    assert lrs[0] == pytest.approx(1e-4)  # a tenth of the way up, not a wasted step at zero
    assert lrs[9] == pytest.approx(1e-3) == lrs[10] == max(lrs)
    assert np.all(np.diff(lrs[:10]) > 0) and np.all(np.diff(lrs[10:]) < 0)
    assert lrs[30] == pytest.approx(0.5e-3)  # halfway through the cosine
    assert lrs[50] == pytest.approx(0, abs=1e-12)


def test_learning_rate_without_warm_up_or_with_nothing_but_warm_up():
    assert utils.lr_at(0, **RECIPE | dict(warmup_epochs=0)) == 1e-3
    assert utils.lr_at(9, **RECIPE | dict(epochs=1)) == pytest.approx(1e-3)
    assert utils.lr_at(4, **RECIPE | dict(warmup_epochs=0.5)) == pytest.approx(1e-3)


# ---------------------------------------------------------------- files


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    file = tmp_path / "x.json"
    utils.write_json(file, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.write_atomically(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == ["x.json"]
