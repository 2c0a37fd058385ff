"""Pictures: scores, attribution maps over slices, contact sheets and mean slices of a set."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from fake_predictions import complete, random_predictions
from PIL import Image

import dataset
from adnc.data.augment import as_trained
from adnc.scoring import metrics, plots


def grey_levels(path):
    return np.asarray(Image.open(path).convert("L"))


# ---------------------------------------------------------------- scores


def test_the_title_is_wrapped_and_a_dollar_or_an_escape_is_text(tmp_path):
    title = "LEAKY: " + "a long reason, " * 20 + "$x_1$ \x1b[1m"
    with plots.figure(tmp_path / "a.png", title) as ((axes,),):
        axes.plot([0, 1])
        drawing = axes.figure
    text = drawing.get_suptitle()
    assert text.replace("\n", " ").endswith(r"reason, \$x_1\$ \x1b[1m")
    assert max(map(len, text.split("\n"))) <= drawing.get_figwidth() * 14
    assert grey_levels(tmp_path / "a.png").std() > 5


@pytest.mark.parametrize("labels", [["AD", "NC"], ["AD"]])
def test_pictures_of_scores_are_drawn_with_two_classes_and_with_one(labels, tmp_path, pictures):
    table = complete(random_predictions(10))
    table = table[table.label.isin(labels)]
    tables = {unit: metrics.aggregate(table, unit) for unit in metrics.UNITS}
    sets = {"coverage": 0.9, "n": 10, "n_certain": 8, "n_out_of_range": 2}
    sets["accuracy_if_certain"] = 0.9
    plots.plot_confusion(tmp_path / "confusion.png", tables, "a title")
    plots.plot_calibration(tmp_path / "calibration.png", tables, "a title")
    plots.plot_risk(tmp_path / "risk.png", tables, "a title", sets)
    plots.plot_windows(tmp_path / "windows.png", tables["slice"], "a title")
    if len(labels) == 2:
        plots.plot_roc(tmp_path / "roc.png", tables, "a title")
    for path in tmp_path.iterdir():
        assert grey_levels(path).std() > 5


# ---------------------------------------------------------------- attribution maps


def test_an_overlay_has_the_colour_of_ad_above_zero_of_nc_below_and_none_at_zero():
    pixels = np.full((1, 4), 100)
    colours = plots.blend(pixels, np.array([[-2.0, -1.0, 0.0, 1.0]]), full=1)
    share = plots.OPAQUE
    for column, colour in ((0, plots.NC_COLOUR), (1, plots.NC_COLOUR), (3, plots.AD_COLOUR)):
        expected = (100 * (1 - share) + np.array(colour) * share).round()
        assert colours[0, column].tolist() == expected.tolist()
    assert colours[0, 2].tolist() == [100, 100, 100]
    assert plots.blend(pixels, np.zeros((1, 4)), full=0).tolist() == [[[100] * 3] * 4]


def test_an_overlay_is_a_picture_of_the_size_of_the_slice_with_its_mark(tmp_path, pictures):
    pixels = np.full((60, 80), 100, np.uint8)
    for name, mark in (("plain", ""), ("marked", "UNUSABLE")):
        plots.plot_overlay(tmp_path / f"{name}.png", pixels, np.zeros((60, 80)), 1, mark)
    plain, marked = (grey_levels(tmp_path / f"{name}.png") for name in ("plain", "marked"))
    assert plain.shape == marked.shape == (60, 80)
    assert (plain == 100).all() and (marked[:15] != 100).any() and (marked[20:] == 100).all()


# ---------------------------------------------------------------- the data


def test_a_contact_sheet_shows_subjects_of_both_classes_and_slices_from_end_to_end():
    rows = [(label, f"{label}{k // 20}", k % 20) for label in ("AD", "NC") for k in range(180)]
    index = pd.DataFrame(rows, columns=["label", "group", "slice"])
    index = index.assign(scan="s", row=range(len(rows)))
    images = np.arange(len(rows), dtype=np.uint16)[:, None, None].repeat(4, 1)
    shuffled = index.sample(frac=1, random_state=0).sort_values("label")
    sheet = plots.montage_rows(shuffled, images)

    begins = [text[:2] for text, _, _ in sheet]
    assert len(sheet) == 10 and set(begins[:5]) == {"AD"} and set(begins[5:]) == {"NC"}
    assert len({text for text, _, _ in sheet}) == 10
    for text, slices, numbers in sheet:
        own = index[index.group == text.split("\n")[1]]
        shown = slices[:, 0, 0].astype(int)
        assert len(shown) == 8 and (np.diff(shown) > 0).all()
        assert numbers == index.slice[shown].tolist()
        assert (shown[0], shown[-1]) == (own.row.min(), own.row.max())


def test_contact_sheets_of_a_set_are_drawn_plain_and_augmented(ad_nc, tmp_path, pictures):
    slices = dataset.decode_set(ad_nc, use_cache=False, progress=None)
    for name, change in (("plain", None), ("augmented", as_trained)):
        rows = plots.montage_rows(slices.index, slices.images, change)
        plots.plot_montage(tmp_path / f"{name}.png", rows, "a set")
    plain, augmented = (grey_levels(tmp_path / f"{name}.png") for name in ("plain", "augmented"))
    assert plain.std() > 10 and augmented.std() > 10
    assert plain.shape != augmented.shape or (plain != augmented).any()


def test_mean_slices_by_number_show_a_window_that_tells_the_classes_apart(tmp_path, pictures):
    numbers = [*range(10), *range(6, 16)]  # of AD, of NC; each number twice
    index = pd.DataFrame({"label": ["AD"] * 20 + ["NC"] * 20, "slice": np.repeat(numbers, 2)})
    index["row"] = range(40)
    grey = (index.slice * 10 + (index.label == "AD")).to_numpy(np.uint8)
    images = np.broadcast_to(grey[:, None, None], (40, 8, 8)).copy()

    rows = dataset.means_by_position(dataset.SliceSet(index, images))
    texts, means = zip(*rows)
    ranges = ["slices 0 to 3", "slices 4 to 7", "slices 8 to 11", "slices 12 to 15"]
    assert list(texts) == ["all slices", *ranges]
    counts = [(each["AD"][1], each["NC"][1]) for each in means]
    assert counts == [(20, 20), (8, 0), (8, 4), (4, 8), (0, 8)]
    assert means[1]["NC"][0] is None and means[4]["AD"][0] is None
    np.testing.assert_allclose([each["AD"][0][0, 0] for each in means[:4]], [46, 16, 56, 86])

    plots.plot_means(tmp_path / "means.png", rows, "a set")
    one_slice = dataset.means_by_position(dataset.SliceSet(index[:1], images))
    plots.plot_means(tmp_path / "one.png", one_slice, "one slice")
    assert all(grey_levels(tmp_path / f"{name}.png").std() > 5 for name in ("means", "one"))


# ---------------------------------------------------------------- the user's matplotlib

SCRIPT = """
import sys
import adnc
import matplotlib
before = matplotlib.rcParams.copy()
from adnc.scoring import plots
import pandas as pd
table = pd.DataFrame({"label": ["AD", "NC"], "prediction": ["AD", "AD"]})
plots.plot_confusion(sys.argv[1], {"scan": table}, "a title")
plots.plot_legend(sys.argv[2], "a title", 0.1, "a label")
assert "matplotlib.pyplot" not in sys.modules
names = set(before) - {"backend"}  # to read it would import a backend
assert all(matplotlib.rcParams[name] == before[name] for name in names)
"""


IMPORTED = """
import os, sys
import adnc
import matplotlib
assert os.environ["MPLBACKEND"] == sys.argv[1]
if sys.argv[1] == "pdf":  # one that is there remains the user's
    assert matplotlib.rcParams["backend"] == "pdf"
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "foo", "pdf"])
def test_matplotlib_is_imported_whatever_backend_is_named(backend):
    """A newer matplotlib refuses to be imported if MPLBACKEND names a backend that is missing."""
    words = [sys.executable, "-c", IMPORTED, backend]
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


def test_pictures_are_the_same_whatever_backend_and_settings_the_user_has(tmp_path, pictures):
    """A notebook's backend that is not installed here, and a matplotlibrc."""
    (tmp_path / "matplotlibrc").write_text(
        "figure.dpi: 30\nsavefig.facecolor: red\ntext.usetex: True\naxes.facecolor: black\n"
    )
    theirs = [tmp_path / "confusion.png", tmp_path / "legend.png"]
    changes = {
        "MPLBACKEND": "module://a_package.that_is_not_here",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
    }
    words = [sys.executable, "-c", SCRIPT, *map(str, theirs)]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **changes}
    )
    assert done.returncode == 0, done.stderr
    ours = [tmp_path / "ours-1.png", tmp_path / "ours-2.png"]
    table = pd.DataFrame({"label": ["AD", "NC"], "prediction": ["AD", "AD"]})
    plots.plot_confusion(ours[0], {"scan": table}, "a title")
    plots.plot_legend(ours[1], "a title", 0.1, "a label")
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
