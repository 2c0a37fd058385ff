"""Pictures of scores, of attribution maps, and of the data.

Tables of predictions are those of `metrics.aggregate`. Every picture is drawn on its own Figure,
without pyplot, and saved as PNG.
"""

import contextlib
import textwrap

import numpy as np
import pandas as pd
from matplotlib import rc_context, rcParamsDefault
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from adnc import CLASSES
from adnc.errors import printable
from adnc.files import write_atomically
from adnc.scoring import metrics

# The line of each unit: told apart in black and white too, so that a print shows what the screen
# shows.
LOOK = {
    "slice": dict(color="#999999", linestyle="--"),
    "scan": dict(color="#000000", linestyle="-"),
    "subject": dict(color="#0072b2", linestyle="-."),
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

# Vermilion and blue of Okabe & Ito, which colour-blind readers can tell apart.
AD_COLOUR = (213, 94, 0)
NC_COLOUR = (0, 114, 178)
OPAQUE = 0.75  # the strongest colour of an attribution map: the anatomy shines through


@contextlib.contextmanager
def figure(path, title, columns=1, height=3.2, width=4.2, ratios=(1,), grid=True):
    """Rows of axes to draw on, saved to `path` at the end.

    `width` is that of a column, in inches; `ratios` are the relative heights of the rows. The title
    is wrapped to the width of the figure, since the leaks it names must not be cut off.
    """
    # Matplotlib's own defaults, not those of a matplotlibrc; and no backend, which a notebook may
    # have named in MPLBACKEND and not installed.
    defaults = {name: rcParamsDefault[name] for name in rcParamsDefault if name != "backend"}
    with rc_context({**defaults, **STYLE, "axes.grid": grid}):
        drawing = Figure(figsize=(width * columns, height), layout="constrained")
        drawing.get_layout_engine().set(w_pad=0.1)  # inches; text does not touch the edge
        yield drawing.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios)
        lines = textwrap.wrap(plain_text(title), int(drawing.get_figwidth() * 14))
        drawing.suptitle("\n".join(lines), fontsize=9)
        write_atomically(path, lambda temporary: drawing.savefig(temporary, dpi=150, format="png"))


def legend_above(axes, columns=2, **options):
    """A legend that covers no curve."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, **options)


def plain_text(text):
    """Text that matplotlib does not read as a formula."""
    return printable(text).replace("$", r"\$")


# ---------------------------------------------------------------- scores


def plot_confusion(path, tables, title):
    """Confusion matrices, one per unit, from a dict of labelled tables by unit."""
    with figure(path, title, len(tables), grid=False) as (row,):
        for axes, (unit, table) in zip(row, tables.items()):
            counts = confusion_matrix(
                table.label.to_numpy(str), table.prediction.to_numpy(str), labels=CLASSES
            )
            axes.imshow(counts, cmap="Greys", vmin=0)
            for (i, k), n in np.ndenumerate(counts):
                colour = "white" if n > counts.max() / 2 else "black"
                axes.text(k, i, f"{n:,}", ha="center", va="center", color=colour)
            ticks = range(len(CLASSES))
            axes.set(xticks=ticks, xticklabels=CLASSES, yticks=ticks, yticklabels=CLASSES)
            axes.set(xlabel="prediction", ylabel="label", title=f"{unit}s (n = {len(table):,})")


def plot_roc(path, tables, title):
    """ROC curves, one per unit, and in grey the 95 % bootstrap band of the scan-level curve."""
    grid = np.linspace(0, 1, 101)
    with figure(path, title, height=4.4) as ((axes,),):
        for unit, table in tables.items():
            y, p = (table.label == "AD").to_numpy(bool), table.p_AD.to_numpy(float)
            if y.all() or not y.any():  # a single class has no curve
                continue
            if unit == "scan":
                low, high = metrics.roc_band(y, p, table.group, grid)
                axes.fill_between(grid, low, high, color="0.87", label="95 % band, scan-level")
            false_positive_rate, sensitivity, _ = roc_curve(y, p)
            label = f"{unit}-level (n = {len(y):,}): {roc_auc_score(y, p):.3f}"
            axes.plot(false_positive_rate, sensitivity, label=label, **LOOK[unit])
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(xlabel="1 - specificity", ylabel="sensitivity (AD)", aspect="equal")
        legend_above(axes, title="AUROC")


def plot_calibration(path, tables, title):
    """Reliability diagram: the share of AD against the mean p_AD in ten bins of equal width; below,
    the number of scans (or slices) in each bin."""
    limits = (-0.03, 1.03)
    with figure(path, title, height=6, ratios=(4, 1)) as ((axes,), (below,)):
        for unit, table in tables.items():
            bins = metrics.which_bin(table.p_AD.to_numpy(float))
            bins = table.assign(ad=table.label == "AD").groupby(bins)
            points = bins.agg(p=("p_AD", "mean"), ad=("ad", "mean"))
            label = f"{unit}-level (n = {len(table):,})"
            axes.plot(points.p, points.ad, marker="o", markersize=4, label=label, **LOOK[unit])
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(ylabel="share that is AD", xlim=limits, ylim=limits)
        legend_above(axes)

        unit = "scan" if "scan" in tables else "slice"
        p = tables[unit].p_AD
        below.hist(p, bins=metrics.BINS, range=(0, 1), color="0.6", edgecolor="white")
        below.set(xlabel="p_AD", ylabel=f"{unit}s", xlim=limits)
        axes.set_box_aspect(1)  # panels of the same width, with the same p_AD above each other
        below.set_box_aspect(0.25)


def plot_windows(path, predictions, title):
    """Accuracy for each slice window, beside the share of its larger class, which is the accuracy
    that the window alone allows."""
    table, unit = metrics.by_window(predictions)
    larger = np.maximum(table.share_AD, 1 - table.share_AD)
    x = np.arange(len(table))
    ticks = x[:: max(1, len(table) // 12)]
    marks = dict(linestyle="", marker="_", markersize=14, color="black")
    with figure(path, title, height=3.6, width=6) as ((axes,),):
        axes.bar(x, table.accuracy, color="0.75", label=f"{unit}-level accuracy")
        axes.plot(x, larger, label="share of the larger class", **marks)
        for i in ticks:
            axes.annotate(f"{table.n[i]}", (i, 0.02), ha="center", fontsize=7)
        axes.set_xticks(ticks, table["at"][ticks])
        name = "slice window (lowest slice number)" if unit == "scan" else "slice number"
        axes.set_xlabel(f"{name}; in the bars, the number of {unit}s")
        axes.set(ylabel="accuracy", ylim=(0, 1.03))
        legend_above(axes)


def plot_risk(path, tables, title, sets=None):
    """Risk-coverage curves, one per unit: the error rate among the most certain share of units.

    `sets`, the result of `calibration.score_sets`, adds a point.
    """
    with figure(path, title, height=4, width=5) as ((axes,),):
        for unit, table in tables.items():
            p, threshold = table.p_AD.to_numpy(float), table.threshold.to_numpy(float)
            correct = table.prediction == table.label
            coverage, risk = metrics.risk_coverage(p, correct, threshold)
            axes.plot(coverage, risk, label=f"{unit}-level (n = {len(p):,})", **LOOK[unit])
        if sets is not None and sets["accuracy_if_certain"] is not None:
            # Scans out of range have the set AD|NC, and are not among the n.
            coverage = sets["n_certain"] / (sets["n"] + sets["n_out_of_range"])
            risk = 1 - sets["accuracy_if_certain"]
            label = f"prediction sets for {sets['coverage']:g}, scan-level"
            axes.plot(coverage, risk, "k*", markersize=9, label=label)
        axes.set(xlabel="share of units with an answer, the most certain first", xlim=(0, 1.02))
        axes.set(ylabel="error rate among them", ylim=(-0.01, None))
        legend_above(axes)


# ---------------------------------------------------------------- attribution maps over the slice


def blend(pixels, values, full):
    """Lay a map (H, W) over grey pixels (H, W) from 0 to 255: uint8 (H, W, 3).

    Positive values get the colour of AD, negative values that of NC, 0 none. The colour is
    strongest at `full`.
    """
    strength = abs(values) / (full or 1)
    share = OPAQUE * np.clip(strength, 0, 1)[..., None]
    colour = np.where(values[..., None] > 0, AD_COLOUR, NC_COLOUR)
    rest = 1 - share
    return (pixels[..., None] * rest + colour * share).round().astype(np.uint8)


def plot_overlay(path, pixels, values, full, mark=""):
    """`blend` as a PNG of the size of the slice, with the text `mark` across its top."""
    picture = Image.fromarray(blend(pixels, values, full))
    if mark:
        draw = ImageDraw.Draw(picture)
        draw.text((2, 1), mark, fill="white", stroke_width=1, stroke_fill="black")
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))


def plot_legend(path, title, full, label):
    """The legend of all overlays: the meaning of the colours, the strongest of which is `full`."""
    bar = np.linspace(-1, 1, 256)[None].repeat(24, 0)
    with figure(path, title, height=3, width=7, grid=False) as ((axes,),):
        axes.imshow(blend(np.full(bar.shape, 120), bar, 1), aspect="auto", extent=(-1, 1, 0, 1))
        names = [f"{-full:.2g}\ntowards NC", "0\nno colour", f"{full:.2g}\ntowards AD"]
        axes.set(yticks=[], xticks=[-1, 0, 1], xticklabels=names)
        axes.set_xlabel(textwrap.fill(label, 90))


def plot_scan_map(path, pixels, mean, full, slices, title):
    """The mean map of a scan over its mean slice, and the positive and negative sums of the map of
    each slice.

    `slices` holds the rows of the scan in the table of attribution.Explained.
    """
    numbered = slices.slice.notna().all()
    at = np.arange(len(slices))
    step = max(1, len(slices) // 20)
    numbers = slices.slice.astype(str)[::step] if numbered else at[::step] + 1
    sides = (("for_AD", AD_COLOUR, "towards AD"), ("for_NC", NC_COLOUR, "towards NC"))
    with figure(path, title, 2, height=3.4, width=3.6) as ((left, right),):
        left.imshow(blend(pixels, mean, full))
        left.set(title=f"mean over the slices (full colour: {full:.2g})", xticks=[], yticks=[])
        left.grid(False)
        for name, colour, label in sides:
            right.barh(at, slices[name], color=np.array(colour) / 255, label=label)
        right.set_yticks(at[::step], numbers)
        right.axvline(0, color="black", linewidth=0.8)
        right.set(xlabel="sum of the map", ylabel="slice number" if numbered else "slice")
        right.invert_yaxis()
        legend_above(right)


# ---------------------------------------------------------------- the data


def evenly(values, most):
    """At most `most` of the values, evenly spread."""
    return values[np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]


def montage_rows(index, images, change=None, n_groups=5, n_slices=8):
    """Rows of a contact sheet, (text, slices uint8 (n, H, W), their numbers): some groups of each
    class, and some slices of each group.

    A group is a subject, or a scan of an unknown subject. The function `change` is applied to the
    slices of each row.
    """
    rows = []
    for label in reversed(CLASSES):
        part = index[index.label == label]
        for group in evenly(part.group.unique(), n_groups):
            own = part[part.group == group].sort_values(["slice", "scan"])
            own = own.iloc[evenly(np.arange(len(own)), n_slices)]
            slices = images[own.row.to_numpy(int)]
            if change is not None:
                slices = change(slices)
            rows.append((f"{label}\n{group}", slices, own.slice.tolist()))
    return rows


def plot_montage(path, rows, title):
    """A contact sheet of the rows of `montage_rows`."""
    most = max(len(slices) for _, slices, _ in rows)
    size = dict(height=0.4 + 1.1 * len(rows), width=1.6 + 1.1 * most, ratios=[1 for _ in rows])
    with figure(path, title, **size, grid=False) as panels:
        for axes, (text, slices, numbers) in zip(panels[:, 0], rows):
            height, width = slices.shape[1:]
            sheet = np.zeros((height, most * width), slices.dtype)
            sheet[:, : len(slices) * width] = np.concatenate(slices, 1)
            axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.set_ylabel(plain_text(text), rotation=0, ha="right", va="center")
            for k, number in enumerate(numbers):
                if not pd.isna(number):
                    at = ((k + 0.03) * width, 0.03 * height)
                    axes.annotate(f"{number}", at, color="0.8", fontsize=7, va="top")


def plot_means(path, rows, title):
    """The mean slice of each class and their difference, all differences on one scale.

    `rows` are (text, {class: (mean slice (H, W) in grey levels or None, number of slices)}).
    """
    differences = []
    for _, means in rows:
        (ad, n_ad), (nc, n_nc) = means["AD"], means["NC"]
        differences.append(ad - nc if n_ad and n_nc else None)
    largest = [float(abs(each).max()) for each in differences if each is not None]
    full = max(largest, default=0) or 1

    size = dict(height=2.6 * len(rows), width=3.0, ratios=[1 for _ in rows])
    with figure(path, title, 3, **size, grid=False) as panels:
        for axes, (text, means), difference in zip(panels, rows, differences):
            axes[0].set_ylabel(text)
            for place, label in zip(axes, ("AD", "NC")):
                mean, n_slices = means[label]
                place.set_title(f"{label}, {n_slices:,} slices")
                if mean is not None:
                    place.imshow(mean, cmap="gray", vmin=0, vmax=255)
            if difference is None:
                axes[2].set_title("only one class")
            else:
                drawn = axes[2].imshow(difference, cmap="PuOr_r", vmin=-full, vmax=full)
                axes[2].set_title(f"AD minus NC, at most {abs(difference).max():.1f} grey levels")
                axes[2].figure.colorbar(drawn, ax=axes[2], shrink=0.8)
            for place in axes:
                place.set(xticks=[], yticks=[])
                place.spines[:].set_visible(False)
