"""Looking at the data: contact sheets and mean slices of a set."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import dataset
from adnc.scoring import plots
from adnc.data.pixels import mean_slice
from adnc.data.augment import as_trained


def test_a_set_is_drawn_as_contact_sheets_and_mean_slices(ad_nc, tmp_path, pictures, capsys):
    files = {name: tmp_path / f"{name}.png" for name in ("montage", "augmented", "mean")}
    flags = [str(word) for name in files for word in (f"--{name}", files[name])]
    dataset.main(dataset.parse_args([str(ad_nc), *flags]))
    sheets = {name: np.asarray(Image.open(path).convert("L")) for name, path in files.items()}
    assert all(sheet.std() > 10 for sheet in sheets.values())
    said = capsys.readouterr().out
    assert all(f"in {path}" in said for path in files.values())


def test_pictures_that_would_replace_each_other_or_become_slices_are_wrong_usage(tmp_path, capsys):
    (tmp_path / "AD_NC" / "train").mkdir(parents=True)
    one = tmp_path / "a.png"
    for words, said in ((["--montage", one, "--mean", one], "two pictures cannot both be"),
                        (["--mean", tmp_path / "AD_NC" / "train" / "1_1.png"], "is in the set, where it would be")):
        with pytest.raises(SystemExit):
            dataset.parse_args([str(tmp_path / "AD_NC"), *map(str, words)])
        assert said in capsys.readouterr().err


def test_a_contact_sheet_has_subjects_of_both_classes_and_slices_from_end_to_end():
    rows = [(label, f"{label}{k // 20}", k % 20) for label in ("AD", "NC") for k in range(180)]
    index = pd.DataFrame(rows, columns=["label", "group", "slice"]).assign(scan="s", row=range(len(rows)))
    images = np.arange(len(rows), dtype=np.uint16)[:, None, None].repeat(4, 1)
    sheet = plots.montage_rows(index.sample(frac=1, random_state=0).sort_values("label"), images)
    assert [text[:2] for text, _ in sheet] == ["AD"] * 5 + ["NC"] * 5
    assert len({text for text, _ in sheet}) == 10
    for text, slices in sheet:
        own = index[index.group == text.split("\n")[1]]
        shown = slices[:, 0, 0]
        assert len(shown) == 8 and (np.diff(shown.astype(int)) > 0).all()
        assert (shown[0], shown[-1]) == (own.row.min(), own.row.max())


def test_mean_slices_by_number_show_a_window_that_tells_the_classes_apart(tmp_path, pictures):
    pairs = [(label, first + k // 2) for label, first in (("AD", 0), ("NC", 6)) for k in range(20)]
    index = pd.DataFrame(pairs, columns=["label", "slice"]).assign(row=range(40))
    images = (index.slice * 10 + (index.label == "AD")).to_numpy(np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    rows = dataset.means_by_position(dataset.SliceSet(index, images))
    assert [text for text, _ in rows] == ["all slices", "slices 0 to 3", "slices 4 to 7", "slices 8 to 11",
                                          "slices 12 to 15"]  # fmt: skip
    counts = [(means["AD"][1], means["NC"][1]) for _, means in rows]
    assert counts == [(20, 20), (8, 0), (8, 4), (4, 8), (0, 8)]
    assert rows[1][1]["NC"][0] is None and rows[4][1]["AD"][0] is None
    np.testing.assert_allclose([means["AD"][0][0, 0] for _, means in rows[:4]], [46, 16, 56, 86])
    plots.plot_means(tmp_path / "means.png", rows, "a set")
    plots.plot_means(tmp_path / "one.png", dataset.means_by_position(dataset.SliceSet(index[:1], images)), "one slice")
    assert {path.name for path in tmp_path.iterdir()} == {"means.png", "one.png"}


def test_the_mean_slice_is_that_of_the_rows_asked_for():
    images = np.random.default_rng(0).integers(0, 256, (600, 5, 4), np.uint8)
    rows = np.arange(1, 600, 2)
    np.testing.assert_allclose(mean_slice(images, rows), images[1::2].astype(float).mean(0), rtol=1e-12)


def test_augmented_slices_are_those_of_training_and_differ_from_slice_to_slice():
    images = np.zeros((8, 48, 40), np.uint8)
    images[:, 10:20, 5:15] = 200
    drawn = as_trained(images, 32)
    assert drawn.shape == (8, 32, 32) and drawn.dtype == np.uint8
    assert len({each.tobytes() for each in drawn}) == 8 and 150 < drawn.max() <= 200
    np.testing.assert_array_equal(drawn, as_trained(images, 32))
