"""Pictures of scores, of attribution maps, and of the data.

Tables of predictions are those of `metrics.aggregate`. Every picture is drawn on a Figure of its own, without
pyplot, and saved as PNG.
"""

import contextlib
import textwrap

import numpy as np

from adnc import CLASSES
from adnc.errors import printable
from adnc.files import write_atomically
from adnc.scoring import metrics

# The line of each unit: black and white first, so that a print shows what the screen shows.
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
AD_COLOUR, NC_COLOUR = (213, 94, 0), (0, 114, 178)  # vermilion and blue of Okabe & Ito, for the colour-blind
OPAQUE = 0.75  # the strongest colour of an attribution map: the anatomy shines through


@contextlib.contextmanager
def figure(path, title, columns=1, height=3.2, width=4.2, ratios=(1,), grid=True):
    """Rows of axes to draw on, saved to `path` at the end. The title is wrapped to the width of the figure, since
    what it says about leaks must not be cut off."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "axes.grid": grid}):
        drawing = Figure(figsize=(width * columns, height), layout="constrained")
        yield drawing.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios)
        text = plain_text(title)
        lines = textwrap.wrap(text, int(drawing.get_figwidth() * 14))
        drawing.suptitle("\n".join(lines), fontsize=9)
        write_atomically(path, lambda temporary: drawing.savefig(temporary, dpi=150, format="png"))


def plain_text(text):
    """Text that matplotlib does not take for a formula."""
    return printable(text).replace("$", r"\$")


# ---------------------------------------------------------------- scores


def plot_confusion(path, tables, title):
    """Confusion matrices, one a unit, from a dict of labelled tables by unit."""
    from sklearn.metrics import ConfusionMatrixDisplay

    with figure(path, title, len(tables), grid=False) as (row,):
        for axes, (unit, table) in zip(row, tables.items()):
            ConfusionMatrixDisplay.from_predictions(
                table.label.to_numpy(str), table.prediction.to_numpy(str), labels=CLASSES, cmap="Greys",
                colorbar=False, ax=axes,
            )  # fmt: skip
            axes.set_title(f"{unit}s (n = {len(table):,})")


def plot_roc(path, tables, title):
    """ROC curves, one a unit; grey, the 95 % band of the scan-level curve from a bootstrap over groups."""
    from sklearn.metrics import roc_auc_score, roc_curve

    grid = np.linspace(0, 1, 101)
    with figure(path, title, height=4.4) as ((axes,),):
        for unit, table in tables.items():
            y, p = (table.label == "AD").to_numpy(), table.p_AD.to_numpy(float)
            if y.all() or not y.any():  # one class has no curve
                continue
            if unit == "scan":
                low, high = metrics.roc_band(y, p, table.group, grid)
                axes.fill_between(grid, low, high, color="0.87", label="95 % band, scan-level")
            false_positive_rate, sensitivity, _ = roc_curve(y, p)
            label = f"{unit}-level: AUROC {roc_auc_score(y, p):.3f}"
            axes.plot(false_positive_rate, sensitivity, label=label, **LOOK[unit])
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(xlabel="1 - specificity", ylabel="sensitivity (AD)", aspect="equal")
        axes.legend(loc="lower right")


def plot_calibration(path, tables, title):
    """Reliability diagram: the share of AD against the predicted probability in ten bins; below, how many scans (or
    slices) are in each."""
    limits = (-0.03, 1.03)
    with figure(path, title, height=5.4, ratios=(4, 1)) as ((axes,), (below,)):
        for unit, table in tables.items():
            bins = metrics.which_bin(table.p_AD.to_numpy(float))
            points = table.assign(ad=table.label == "AD").groupby(bins).agg(p=("p_AD", "mean"), ad=("ad", "mean"))
            axes.plot(points.p, points.ad, marker="o", markersize=4, label=f"{unit}-level", **LOOK[unit])
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(ylabel="share that is AD", aspect="equal", xlim=limits, ylim=limits)
        axes.legend(loc="upper left")
        unit = "scan" if "scan" in tables else "slice"
        below.hist(tables[unit].p_AD, bins=metrics.BINS, range=(0, 1), color="0.6", edgecolor="white")
        below.set(xlabel="p_AD", ylabel=f"{unit}s", xlim=limits)


def plot_windows(path, predictions, title):
    """Accuracy for each slice window, beside the share of its larger class: what the window alone could say."""
    table, unit = metrics.by_window(predictions)
    x = np.arange(len(table))
    shown = x[:: max(1, len(table) // 12)]
    with figure(path, title, height=3.6, width=6) as ((axes,),):
        axes.bar(x, table.accuracy, color="0.75", label=f"{unit}-level accuracy")
        larger = np.maximum(table.share_AD, 1 - table.share_AD)
        axes.plot(x, larger, linestyle="", marker="_", markersize=14, color="black", label="share of the larger class")
        for i in shown:
            axes.annotate(f"{table.n[i]}", (i, 0.02), ha="center", fontsize=7)
        axes.set_xticks(shown, table["at"][shown])
        name = "slice window (lowest slice number)" if unit == "scan" else "slice number"
        axes.set(xlabel=f"{name}; in the bars, the number of {unit}s", ylabel="accuracy", ylim=(0, 1.03))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def plot_risk(path, tables, title, sets=None):
    """Risk-coverage curves, one a unit: the error rate among the most certain share. `sets`, of `score_sets`, adds a
    point."""
    with figure(path, title, height=3.6, width=5) as ((axes,),):
        for unit, table in tables.items():
            coverage, risk = metrics.risk_coverage(
                table.p_AD.to_numpy(float), table.prediction == table.label, table.threshold.to_numpy(float)
            )
            axes.plot(coverage, risk, label=f"{unit}-level", **LOOK[unit])
        if sets is not None and sets["accuracy_if_certain"] is not None:
            label = f"prediction sets for {sets['coverage']:g}, scan-level"
            axes.plot(1 - sets["uncertain"], 1 - sets["accuracy_if_certain"], "k*", markersize=9, label=label)
        axes.set(
            xlabel="share of units with an answer, the most certain first", ylabel="error rate among them",
            xlim=(0, 1.02), ylim=(-0.01, None),
        )  # fmt: skip
        axes.legend()


# ---------------------------------------------------------------- attribution maps over the slice


def blend(pixels, values, full):
    """Grey pixels (H, W) from 0 to 255 under a map (H, W): uint8 (H, W, 3). The colour of AD where the map is
    positive, of NC where it is negative, the stronger the nearer to `full`; none at 0."""
    share = OPAQUE * np.clip(abs(values) / (full or 1), 0, 1)[..., None]
    colour = np.where(values[..., None] > 0, AD_COLOUR, NC_COLOUR)
    return (pixels[..., None] * (1 - share) + colour * share).round().astype(np.uint8)


def plot_overlay(path, pixels, values, full, mark=""):
    """`blend` as a PNG of the size of the slice, with a word written across its top."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(blend(pixels, values, full))
    if mark:
        ImageDraw.Draw(picture).text((2, 1), mark, fill="white", stroke_width=1, stroke_fill="black")
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))


def plot_legend(path, title):
    """What the colours of an overlay mean."""
    bar = np.linspace(-1, 1, 256)[None].repeat(24, 0)
    with figure(path, title, height=2.1, width=6, grid=False) as ((axes,),):
        axes.imshow(blend(np.full(bar.shape, 120), bar, 1), aspect="auto", extent=(-1, 1, 0, 1))
        axes.set(
            yticks=[], xticks=[-1, 0, 1], xticklabels=["towards NC", "0: grey", "towards AD"],
            xlabel="full colour: the 99.5 % quantile of the scan's maps (full_colour in explanations.csv)",
        )  # fmt: skip


def plot_scan_map(path, pixels, mean, slices, title):
    """A scan's mean map over its mean slice, and the sums of positive and negative values by slice. `slices` is the
    part of `attribution.Explained.table` of the scan."""
    full = float(abs(mean).max())
    numbered = slices.slice.notna().all()
    at = np.arange(len(slices))
    with figure(path, title, 2, height=3.4, width=3.6) as ((left, right),):
        left.imshow(blend(pixels, mean, full))
        left.set(title=f"mean over the slices (full colour: {full:.2g})", xticks=[], yticks=[])
        left.grid(False)
        for name, colour, label in (("for_AD", AD_COLOUR, "towards AD"), ("for_NC", NC_COLOUR, "towards NC")):
            right.barh(at, slices[name], color=np.array(colour) / 255, label=label)
        step = max(1, len(slices) // 20)
        ticks = slices.slice.astype(str)[::step] if numbered else at[::step] + 1
        right.set_yticks(at[::step], ticks)
        right.axvline(0, color="black", linewidth=0.8)
        right.set(xlabel="sum of the map", ylabel="slice number" if numbered else "slice")
        right.invert_yaxis()
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2)  # beside the bars


# ---------------------------------------------------------------- the data


def evenly(values, most):
    """At most `most` of the values, evenly spread."""
    return values[np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]


def montage_rows(index, images, change=None, n_groups=5, n_slices=8):
    """Rows of a contact sheet, (text, slices uint8 (n, H, W)): of each class some groups (subjects, or scans of
    unknown subjects), of each some slices. `change` is applied to the slices of each."""
    rows = []
    for label in reversed(CLASSES):
        part = index[index.label == label]
        for group in evenly(part.group.unique(), n_groups):
            own = part[part.group == group].sort_values(["slice", "scan"])
            slices = images[evenly(own.row.to_numpy(int), n_slices)]
            if change is not None:
                slices = change(slices)
            rows.append((f"{label}\n{group}", slices))
    return rows


def plot_montage(path, rows, title):
    """A contact sheet of `montage_rows`."""
    most = max(len(slices) for _, slices in rows)
    size = dict(height=0.4 + 1.1 * len(rows), width=1.6 + 1.1 * most, ratios=[1] * len(rows))
    with figure(path, title, **size, grid=False) as axes:
        for axis, (text, slices) in zip(axes[:, 0], rows):
            height, width = slices.shape[1:]
            sheet = np.zeros((height, most * width), slices.dtype)
            sheet[:, : len(slices) * width] = np.concatenate(slices, 1)
            axis.imshow(sheet, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(plain_text(text), rotation=0, ha="right", va="center")


def plot_means(path, rows, title):
    """The mean slice of each class and their difference, all differences on one scale. `rows` are (text, {class:
    ((H, W) of grey levels, or None without slices, the number of slices)})."""
    differences = []
    for _, means in rows:
        (ad, n_ad), (nc, n_nc) = means["AD"], means["NC"]
        differences.append(ad - nc if n_ad and n_nc else None)
    full = max((float(abs(each).max()) for each in differences if each is not None), default=0) or 1

    size = dict(height=2.6 * len(rows), width=3.0, ratios=[1] * len(rows))
    with figure(path, title, 3, **size, grid=False) as panels:
        for axes, (text, means), difference in zip(panels, rows, differences):
            axes[0].set_ylabel(text)
            for place, label in zip(axes, ("AD", "NC")):
                mean, n_slices = means[label]
                place.set_title(f"{label}, {n_slices:,} slices")
                if mean is not None:
                    place.imshow(mean, cmap="gray", vmin=0, vmax=255)
            if difference is None:
                axes[2].set_title("only one class is here")
            else:
                drawn = axes[2].imshow(difference, cmap="PuOr_r", vmin=-full, vmax=full)
                axes[2].set_title(f"AD minus NC, at most {abs(difference).max():.1f} grey levels")
                axes[2].figure.colorbar(drawn, ax=axes[2], shrink=0.8)
            for place in axes:
                place.set(xticks=[], yticks=[])
                place.spines[:].set_visible(False)
