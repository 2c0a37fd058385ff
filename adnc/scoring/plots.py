"""Every picture: of a run and of its scores.

Not run by itself. Tables of predictions come in as `metrics.aggregate` makes them; what is computed here is where ink
goes. matplotlib is imported by the first picture.
"""

import contextlib
import math
import textwrap

import numpy as np

from adnc.scoring import metrics
from adnc.files import write_atomically
from adnc.cli import CLASSES, lr_at, printable

# one look: black and white first, so that a print shows what the screen shows
LOOK = {"slice": dict(color="#999999", linestyle="--"), "scan": dict(color="#000000", linestyle="-"),
        "subject": dict(color="#0072b2", linestyle="-.")}
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "axes.grid": True, "grid.alpha": 0.3,
         "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
AD_COLOUR, NC_COLOUR = (213, 94, 0), (0, 114, 178)  # vermilion and blue of Okabe & Ito, told apart by the colour-blind
OPAQUE = 0.75  # of the strongest colour of an attribution map: the anatomy shines through


@contextlib.contextmanager
def _figure(path, title, columns=1, height=3.2, width=4.2, ratios=(1,), grid=True):
    """Rows of axes to draw on; saved to `path` at the end, under a title as wide as the figure, since what it says
    about leaks must not be cut off."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"axes.grid": grid}):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        yield figure.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios)
        text = printable(title).replace("$", r"\$")  # a name is not a formula
        figure.suptitle("\n".join(textwrap.wrap(text, int(figure.get_figwidth() * 14))), fontsize=9)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def plot_lr(path, *, steps_per_epoch, **schedule):
    """The learning rate over the epochs, from `lr_at` itself."""
    total = schedule["epochs"] * steps_per_epoch
    steps = np.unique(np.linspace(0, total - 1, 2000).astype(int))
    with _figure(path, "warm-up, then cosine, by step") as ((axes,),):
        axes.plot(steps / steps_per_epoch, [lr_at(s, steps_per_epoch=steps_per_epoch, **schedule) for s in steps])
        axes.set(xlabel="epoch", ylabel="learning rate")


def plot_history(path, history, best_epoch, title):
    """Loss and slice accuracy of training and validation over the epochs; dotted, the epoch that was kept."""
    with _figure(path, title, 2) as ((loss, accuracy),):
        for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
            axes.plot(history.epoch, history[f"train_{name}"], label="training (with smoothed labels)", **LOOK["slice"])
            axes.plot(history.epoch, history[f"val_{name}"], label="validation", **LOOK["scan"])
            axes.axvline(best_epoch, color="grey", linestyle=":", linewidth=1, label=f"kept: epoch {best_epoch}")
            axes.set(xlabel="epoch", ylabel=f"{name} (slice-level)")
        loss.axhline(math.log(2), color="grey", linewidth=0.8)
        loss.annotate("ln 2: knows nothing", (history.epoch.iloc[0], math.log(2)), fontsize=7, va="bottom")
        accuracy.legend()


def plot_confusion(path, tables, title):
    """Confusion matrices, one a unit, from a dict of labelled tables by unit."""
    from sklearn import metrics as sk

    with _figure(path, title, len(tables), grid=False) as (row,):
        for axes, (unit, table) in zip(row, tables.items()):
            true, predicted = table.label.to_numpy(str), table.prediction.to_numpy(str)
            sk.ConfusionMatrixDisplay.from_predictions(true, predicted, labels=CLASSES, cmap="Greys", colorbar=False,
                                                       ax=axes)  # fmt: skip
            axes.set_title(f"{unit}s (n = {len(table):,})")


def plot_roc(path, tables, title):
    """ROC curves, one a unit; grey, the 95 % band of the scan-level curve from a bootstrap over groups."""
    from sklearn import metrics as sk

    with _figure(path, title, height=4.4) as ((axes,),):
        grid = np.linspace(0, 1, 101)
        for unit, table in tables.items():
            y, p = (table.label == "AD").to_numpy(), table.p_AD.to_numpy(float)
            if y.all() or not y.any():  # one class has no curve
                continue
            if unit == "scan":
                axes.fill_between(grid, *metrics.roc_band(y, p, table.group, grid), color="0.87",
                                  label="95 % band, scan-level")
            false_positive, sensitivity, _ = sk.roc_curve(y, p)
            label = f"{unit}-level: AUROC {sk.roc_auc_score(y, p):.3f}"
            axes.plot(false_positive, sensitivity, label=label, **LOOK[unit])
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(xlabel="1 - specificity", ylabel="sensitivity (AD)", aspect="equal")
        axes.legend(loc="lower right")


def plot_calibration(path, tables, title):
    """Reliability diagram: the share of AD against the predicted probability in ten bins of equal width; below, how
    many scans (else slices) fall into each."""
    with _figure(path, title, height=5.4, ratios=(4, 1)) as ((axes,), (below,)):
        for unit, table in tables.items():
            bins = metrics.which_bin(table.p_AD.to_numpy(float))
            points = table.assign(ad=table.label == "AD").groupby(bins).agg(p=("p_AD", "mean"), ad=("ad", "mean"))
            axes.plot(points.p, points.ad, marker="o", markersize=4, label=f"{unit}-level", **LOOK[unit])
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(ylabel="share that is AD", aspect="equal", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.legend(loc="upper left")
        unit = "scan" if "scan" in tables else "slice"
        below.hist(tables[unit].p_AD, bins=metrics.BINS, range=(0, 1), color="0.6", edgecolor="white")
        below.set(xlabel="p_AD", ylabel=f"{unit}s", xlim=(-0.03, 1.03))


def plot_windows(path, predictions, title):
    """Accuracy for each slice window, beside that of its larger class: what the window alone could say."""
    table, unit = metrics.by_window(predictions)
    with _figure(path, title, height=3.6, width=6) as ((axes,),):
        x = np.arange(len(table))
        axes.bar(x, table.accuracy, color="0.75", label=f"{unit}-level accuracy")
        larger = np.maximum(table.share_AD, 1 - table.share_AD)
        axes.plot(x, larger, linestyle="", marker="_", markersize=14, color="black", label="share of the larger class")
        step = max(1, len(table) // 12)
        for i in x[::step]:
            axes.annotate(f"{table.n[i]}", (i, 0.02), ha="center", fontsize=7)
        axes.set_xticks(x[::step], table["at"][::step])
        name = "slice window (lowest slice number)" if unit == "scan" else "slice number"
        axes.set(xlabel=f"{name}; in the bars, the number of {unit}s", ylabel="accuracy", ylim=(0, 1.03))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def plot_risk(path, tables, title, sets=None):
    """Risk-coverage curves, one a unit: the error rate among the surest share. `sets` of `score_sets` adds a point."""
    with _figure(path, title, height=3.6, width=5) as ((axes,),):
        for unit, table in tables.items():
            coverage, risk = metrics.risk_coverage(table.p_AD.to_numpy(float), table.prediction == table.label,
                                                   table.threshold.to_numpy(float))
            axes.plot(coverage, risk, label=f"{unit}-level", **LOOK[unit])
        if sets is not None and sets["accuracy_if_certain"] is not None:
            axes.plot(1 - sets["uncertain"], 1 - sets["accuracy_if_certain"], "k*", markersize=9,
                      label=f"prediction sets for {sets['coverage']:g}, scan-level")
        axes.set(xlabel="share of units that are answered, the surest first", ylabel="error rate among them",
                 xlim=(0, 1.02), ylim=(-0.01, None))
        axes.legend()


def plot_stress(path, tables, title):
    """For each kind of change the share of scans whose decision changes, by level; a line a run, from a dict of tables
    of `stress.stress`."""
    first = next(iter(tables.values()))
    kinds = [kind for kind in dict.fromkeys(first.change) if kind != "none"]
    height = math.ceil(len(kinds) / 3)
    with _figure(path, title, 3, height=2.2 * height, width=3, ratios=[1] * height) as rows:
        for axes, kind in zip(rows.flat, kinds):
            for name, table in tables.items():
                part = table[table.change == kind]
                levels = part.level.str.split(n=1)  # the number, and what follows it
                axes.plot(levels.str[0], part.changed, marker="o", markersize=3, label=name)
            axes.set(title=" ".join([kind, *levels.iloc[0][1:]]), ylim=(-0.02, 1.02))
        rows.flat[0].legend()
        rows[0][0].set_ylabel("share of scans")


def plot_probe(path, known, title):
    """AUROC of a linear read-out, and spread, by place in the network; a line a run, of {run: stress.probe's dict}."""
    with _figure(path, title, 2) as ((left, right),):
        for name, scores in known.items():
            for axes, values in zip((left, right), zip(*scores.values())):
                axes.plot(list(scores), values, marker="o", markersize=3, label=name)
        left.set(ylabel="AUROC, linear read-out")
        right.set(ylabel="SD over slices / mean", yscale="log")
        for axes in (left, right):
            axes.tick_params(axis="x", rotation=30)
        left.legend()


def plot_curve(path, curves, title):
    """AUROC against the number of training subjects with 95 % intervals, from `evaluate.learning_curve`'s dict."""
    with _figure(path, title, height=3.6, width=5.6) as ((axes,),):
        for k, (model, sizes) in enumerate(curves.items()):
            counts = np.array(list(sizes))
            auroc = np.array([part["auroc"] for part in sizes.values()])
            low, high = np.array([part["ci95"]["auroc"] for part in sizes.values()]).T
            shifted = counts * 1.03 ** (k - len(curves) / 2)  # so that intervals do not cover each other
            axes.errorbar(shifted, auroc, (auroc - low, high - auroc), marker="o", markersize=3, capsize=2, label=model)
        counts = sorted({n for sizes in curves.values() for n in sizes})
        axes.set(xscale="log", xticks=counts, xticklabels=[f"{n:,}" for n in counts], xlabel="training subjects",
                 ylabel="AUROC, subject-level")
        axes.minorticks_off()
        axes.axhline(0.5, color="#999999", linestyle=":")
        axes.legend()


# ---------------------------------------------------------------- attribution maps, over the slice


def blend(pixels, values, full):
    """Grey pixels (H, W) from 0 to 255 under a map (H, W): uint8 (H, W, 3). The colour of AD where it is positive, of
    NC where it is negative, the stronger the nearer to `full`; none at 0."""
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
    with _figure(path, title, height=2.1, width=6, grid=False) as ((axes,),):
        bar = np.linspace(-1, 1, 256)[None].repeat(24, 0)
        axes.imshow(blend(np.full(bar.shape, 120), bar, 1), aspect="auto", extent=(-1, 1, 0, 1))
        axes.set(yticks=[], xticks=[-1, 0, 1], xticklabels=["towards NC", "0: grey", "towards AD"],
                 xlabel="full colour: the 99.5 % quantile of the scan's maps (full_colour in explanations.csv)")


def plot_scan_map(path, pixels, mean, slices, title):
    """A scan's mean map over its mean slice, and what speaks for either class in each slice, by slice number; from the
    rows of a scan of `explain.Explained.table`."""
    with _figure(path, title, 2, height=3.4, width=3.6) as ((left, right),):
        full = float(abs(mean).max())
        left.imshow(blend(pixels, mean, full))
        left.set(title=f"mean over the slices (full colour: {full:.2g})", xticks=[], yticks=[])
        left.grid(False)
        known = slices.slice.notna().all()
        at = np.arange(len(slices))
        for name, colour, label in (("for_AD", AD_COLOUR, "towards AD"), ("for_NC", NC_COLOUR, "towards NC")):
            right.barh(at, slices[name], color=np.array(colour) / 255, label=label)
        step = max(1, len(slices) // 20)
        right.set_yticks(at[::step], slices.slice.astype(str)[::step] if known else at[::step] + 1)
        right.axvline(0, color="black", linewidth=0.8)
        right.set(xlabel="sum of the map", ylabel="slice number" if known else "slice")
        right.invert_yaxis()
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2, frameon=False)  # beside the bars


# ---------------------------------------------------------------- looking at the data


def montage_rows(index, images, change=lambda pixels: pixels, subjects=5, slices=8):
    """Rows of a contact sheet [(text, slices uint8 (n, H, W))]: of each class some subjects, of each some slices,
    evenly spread; `change` is applied to the slices of each."""

    def spread(values, most):
        return values[np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]

    rows = []
    for label in reversed(CLASSES):
        part = index[index.label == label]
        for group in spread(part.group.unique(), subjects):  # a subject, or where it is not known a scan
            own = spread(part[part.group == group].sort_values(["slice", "scan"]).row.to_numpy(int), slices)
            rows.append((f"{label}\n{group}", change(images[own])))
    return rows


def plot_montage(path, rows, title):
    """A contact sheet of `montage_rows`."""
    most = max(len(slices) for _, slices in rows)
    size = dict(height=0.4 + 1.1 * len(rows), width=1.6 + 1.1 * most, ratios=[1] * len(rows))
    with _figure(path, title, **size, grid=False) as axes:
        for axis, (text, slices) in zip(axes[:, 0], rows):
            height, width = slices.shape[1:]
            sheet = np.zeros((height, most * width), slices.dtype)
            sheet[:, : len(slices) * width] = np.concatenate(slices, 1)
            axis.imshow(sheet, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(printable(text).replace("$", r"\$"), rotation=0, ha="right", va="center")


def plot_means(path, rows, title):
    """The mean slice of each class and their difference, pixel by pixel, all differences on one scale. `rows` are
    (text, {class: ((H, W) of grey levels or None where there is no slice, how many)}), from the top."""
    differences = [means["AD"][0] - means["NC"][0] if means["AD"][1] and means["NC"][1] else None for _, means in rows]
    full = max((float(abs(each).max()) for each in differences if each is not None), default=0) or 1
    with _figure(path, title, 3, height=2.6 * len(rows), width=3.0, ratios=[1] * len(rows), grid=False) as panels:
        for axes, (text, means), difference in zip(panels, rows, differences):
            axes[0].set_ylabel(text)
            for place, label in zip(axes, ("AD", "NC")):
                mean, n = means[label]
                place.set_title(f"{label}, {n:,} slices")
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
