"""What training and prediction share: the schedule, seeds, precision, evaluation, checkpoints, files, pictures.

Not run by itself. `evaluate` is the one road from a model to predictions; metrics.py is the one from there to figures.
"""

import itertools
import json
import math
import os
import platform
import random
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from tqdm import tqdm

import metrics
from dataset import CLASSES, remember, split_hash
from engine import make_engine
from modules import convnext
from slices import MEAN, STD, eval_transform, make_loader

FORMAT = 1  # of a checkpoint; raise it when an older one can no longer be read


# ---------------------------------------------------------------- schedule, seeds, devices


def lr_at(step, *, steps_per_epoch, epochs, warmup_epochs, lr):
    """The learning rate of optimizer step `step` (from 0): linear to `lr` over the warm-up, then cosine to 0.

    The warm-up ends after warmup_epochs * steps_per_epoch steps, the cosine (Loshchilov & Hutter 2017, arXiv
    1608.03983) after epochs * steps_per_epoch. A pure function, so that a resumed run cannot drift.
    """
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return lr * min(1.0, (step + 1) / warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def seed_of(*seeds):
    """One seed (32 bits) out of a tuple of whole numbers, such as (seed, epoch)."""
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


def seed_everything(*seeds):
    """Seed Python, NumPy and PyTorch (all devices) from a tuple of whole numbers, such as (seed, epoch)."""
    seed = seed_of(*seeds)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name="auto"):
    """The device of that name; "auto" is CUDA if it is there, else the CPU. One that is not there is a ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"device {name} cannot be used here ({reason}); choose cpu, cuda, or auto") from None
    return device


def has_native_bf16():
    """Whether this CPU computes in bf16. oneDNN also takes bf16 on an AVX-512 CPU without it, and is slow there."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    return platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()


def pick_amp(mode, device):
    """The dtype to autocast to, or None for float32; "auto": fp16 on CUDA, bf16 on a CPU that has it natively."""
    if mode == "auto":
        mode = "fp16" if device.type == "cuda" else "bf16" if device.type == "cpu" and has_native_bf16() else "off"
    if mode == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a CUDA GPU, this is {device.type}; choose bf16, off or auto")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[mode]


def precision_name(dtype):
    return str(dtype or torch.float32).removeprefix("torch.")


def autocast(device, dtype):
    """A context that casts to `dtype`; for None it does nothing."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


# ---------------------------------------------------------------- from a model to predictions


@torch.inference_mode()
def evaluate(model, images, table, *, rows=None, image_size, mean=MEAN, std=STD, device, amp, batch_size=64, bar=None):
    """Predict every slice of a table of N rows (an index, or part of it), whose pixels are the rows `rows` (N,) of
    uint8 images (M, H, W), or all of these.

    Returns the table with logit, the model's z_AD - z_NC, and p_AD, its softmax probability of AD in [0, 1]. Raises
    ValueError if an output is not finite, as happens when fp16 overflows. `bar` is the label of a progress bar, or
    None for no bar.
    """
    engine, logits = make_engine(model, device, amp), []
    rows = np.arange(len(images)) if rows is None else rows
    batches = make_loader(images, rows, np.zeros(len(rows)), batch_size, device=device)
    for x, _ in tqdm(batches, bar, unit=" batches", leave=False, disable=None if bar else True):
        x = eval_transform(x.to(device, non_blocking=True), image_size, mean, std)
        logits.append(engine(x))
    z = torch.cat(logits).double().cpu().numpy() if logits else np.zeros((0, len(CLASSES)))
    z = z[:, CLASSES.index("AD")] - z[:, CLASSES.index("NC")]
    lost = int((~np.isfinite(z)).sum())
    if lost:
        raise ValueError(f"the model gives no finite output for {lost} of {len(z)} slices in {precision_name(amp)}; "
                         "try --amp off, or a lower --lr if it is being trained")
    return table.assign(logit=z, p_AD=expit(z))


# ---------------------------------------------------------------- files


def write_atomically(path, write):
    """`write(temporary path)`, then move it into place, so that no reader meets half a file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path, table):
    # names of files may hold bytes that are no UTF-8; they are written back as they came
    form = dict(index=False, float_format="%.7g", errors="surrogateescape")
    write_atomically(path, lambda temporary: table.to_csv(temporary, **form))


def save_checkpoint(path, **content):
    """Save plain Python values and tensors, so that they load with weights_only=True."""
    write_atomically(path, lambda temporary: torch.save({"format": FORMAT, **content}, temporary))


def load_tensors(path):
    """What torch.save wrote, on the CPU, as data and never as code. ValueError if it is not there or something else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; expected one that torch.save or train.py wrote") from None
    except Exception as problem:  # torch.load raises nearly anything on a foreign file
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))  # torch colours its advice
        reason = re.split(r"[.:]\s|\n", text)[0] or type(problem).__name__
        raise ValueError(f"{path} cannot be read as tensors ({reason}); expected a file of torch.save") from None


def load_checkpoint(path):
    """Load a checkpoint of `save_checkpoint`. A file of another kind is a ValueError."""
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of this project; expected best_model.pth of a run")
    if checkpoint["format"] != FORMAT:
        raise ValueError(f"{path} has format {checkpoint['format']}, this version reads {FORMAT}; train it anew")
    if tuple(checkpoint["classes"]) != CLASSES:
        raise ValueError(f"{path} knows the classes {checkpoint['classes']}; expected {list(CLASSES)}")
    return checkpoint


def build_model(checkpoint):
    """The model that a checkpoint describes, with its weights."""
    arguments = dict(checkpoint["model"])
    model = convnext(arguments.pop("variant"), **arguments)
    model.load_state_dict(checkpoint["weights"])
    return model


def describe_model(args, index, images, precision, init=None):
    """What a checkpoint says of its model beside the weights: all that predict.py needs. `init` tells of the weights of
    --init: {"file", "seen"}, the latter None where the file does not say. Whom they have seen, this model has seen."""
    seen = remember(index[index.split != "test"])  # trained and chosen on
    if init and init["seen"]:
        theirs = init["seen"]
        seen = {name: value or theirs[name] if name == "unknown" else sorted({*value, *theirs.get(name, [])})
                for name, value in seen.items()}
    return {
        "model": {"variant": args.model, "in_chans": 1, "num_classes": 2, "drop_path_rate": args.drop_path},
        "classes": list(CLASSES), "image_size": args.image_size, "slice_size": list(images.shape[1:]),
        "mean": MEAN, "std": STD, "split_by": args.split_by, "split_hash": split_hash(index),
        "seen": seen, "init": init, "flags": vars(args), "precision": precision,
    }


def save_state(state, path, **content):
    """Save all that a run needs to go on: `state` is (model, ema or None, optimizer, scaler)."""
    model, ema, optimizer, scaler = state
    save_checkpoint(
        path, weights=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
        ema=ema.state_dict() if ema is not None else None, **content,
    )


def restore_state(state, last):
    """Put a checkpoint of `save_state` back into `state`."""
    model, ema, optimizer, scaler = state
    model.load_state_dict(last["weights"])
    optimizer.load_state_dict(last["optimizer"])
    if last["scaler"]:  # empty where the run had no scaler, on a CPU
        scaler.load_state_dict(last["scaler"])
    if ema is not None:
        ema.load_state_dict(last["ema"])


def make_log(path):
    """A function that prints a line past the bars and appends it to the file."""

    def log(line):
        tqdm.write(line)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log


def open_tensorboard(out):
    """A function that writes a row of the history as TensorBoard events into the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out)

    def write_events(row):
        for name, value in row.items():
            if name != "epoch" and value is not None:
                writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    return write_events


def new_folder(path):
    """Make `path`, or path-2, path-3, ... where it is taken; returns what was made."""
    for number in itertools.count(1):
        folder = Path(path if number == 1 else f"{path}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def near(path):
    """The path as a person would type it here: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative


# ---------------------------------------------------------------- pictures


# one look: black and white first, so that a print shows what the screen shows
LOOK = {"slice": dict(color="#999999", linestyle="--"), "scan": dict(color="#000000", linestyle="-"),
        "subject": dict(color="#0072b2", linestyle="-.")}
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "axes.grid": True, "grid.alpha": 0.3,
         "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def _figure(columns=1, height=3.2, width=4.2, ratios=(1,)):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    size = width * columns, height
    return plt.subplots(len(ratios), columns, figsize=size, layout="constrained", squeeze=False, height_ratios=ratios)


def _title(figure, text):
    """A title as wide as the figure; what it says of leaks must not be cut off."""
    width = int(figure.get_figwidth() * 14)
    figure.suptitle("\n".join(textwrap.wrap(text, width)), fontsize=9)


def _save(figure, path):
    import matplotlib.pyplot as plt

    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)


def plot_lr(path, *, steps_per_epoch, **schedule):
    """The learning rate over the epochs, from `lr_at` itself."""
    total = schedule["epochs"] * steps_per_epoch
    steps = np.unique(np.linspace(0, total - 1, 2000).astype(int))
    figure, ((axes,),) = _figure()
    axes.plot(steps / steps_per_epoch, [lr_at(s, steps_per_epoch=steps_per_epoch, **schedule) for s in steps])
    axes.set(xlabel="epoch", ylabel="learning rate", title="warm-up, then cosine, by step")
    _save(figure, path)


def plot_history(path, history, best_epoch, title):
    """Loss and slice accuracy of training and validation over the epochs; dotted, the epoch that was kept."""
    figure, ((loss, accuracy),) = _figure(2)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        axes.plot(history.epoch, history[f"train_{name}"], label="training (with smoothed labels)", **LOOK["slice"])
        axes.plot(history.epoch, history[f"val_{name}"], label="validation", **LOOK["scan"])
        axes.axvline(best_epoch, color="grey", linestyle=":", linewidth=1, label=f"kept: epoch {best_epoch}")
        axes.set(xlabel="epoch", ylabel=f"{name} (by slice)")
    loss.axhline(math.log(2), color="grey", linewidth=0.8)
    loss.annotate("ln 2: knows nothing", (history.epoch.iloc[0], math.log(2)), fontsize=7, va="bottom")
    accuracy.legend()
    _title(figure, title)
    _save(figure, path)


def plot_confusion(path, tables, title):
    """Confusion matrices, one a unit, from a dict of labelled tables by unit."""
    from sklearn import metrics as sk

    figure, (row,) = _figure(len(tables))
    for axes, (unit, table) in zip(row, tables.items()):
        sk.ConfusionMatrixDisplay.from_predictions(
            table.label, table.prediction, labels=CLASSES, cmap="Greys", colorbar=False, ax=axes
        )
        axes.grid(False)
        axes.set_title(f"by {unit} (n = {len(table):,})")
    _title(figure, title)
    _save(figure, path)


def plot_roc(path, tables, title):
    """ROC curves, one a unit; grey, the 95 % band of the curve by scan from a bootstrap over subjects."""
    from sklearn import metrics as sk

    figure, ((axes,),) = _figure(height=4.4)
    grid = np.linspace(0, 1, 101)
    for unit, table in tables.items():
        y, p = (table.label == "AD").to_numpy(), table.p_AD.to_numpy(float)
        if y.all() or not y.any():  # one class has no curve
            continue
        if unit == "scan":
            axes.fill_between(grid, *metrics.roc_band(y, p, metrics.groups(table), grid), color="0.87",
                              label="95 % band, by scan")
        false_positive, sensitivity, _ = sk.roc_curve(y, p)
        axes.plot(false_positive, sensitivity, label=f"by {unit}: AUROC {sk.roc_auc_score(y, p):.3f}", **LOOK[unit])
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity (AD)", aspect="equal")
    axes.legend(loc="lower right")
    _title(figure, title)
    _save(figure, path)


def plot_calibration(path, tables, title):
    """Reliability diagram: the share of AD against the predicted probability in ten bins of equal width; below, how
    many scans (else slices) fall into each."""
    figure, ((axes,), (below,)) = _figure(height=5.4, ratios=(4, 1))
    for unit, table in tables.items():
        bins = metrics.which_bin(table.p_AD.to_numpy(float))
        points = table.assign(ad=table.label == "AD").groupby(bins).agg(p=("p_AD", "mean"), ad=("ad", "mean"))
        axes.plot(points.p, points.ad, marker="o", markersize=4, label=f"by {unit}", **LOOK[unit])
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.set(ylabel="share that is AD", aspect="equal", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.legend(loc="upper left")
    unit = "scan" if "scan" in tables else "slice"
    below.hist(tables[unit].p_AD, bins=metrics.BINS, range=(0, 1), color="0.6", edgecolor="white")
    below.set(xlabel="predicted probability of AD", ylabel=f"{unit}s", xlim=(-0.03, 1.03))
    _title(figure, title)
    _save(figure, path)


def plot_windows(path, predictions, title):
    """Accuracy for each slice window, beside that of its larger class: what the window alone could say."""
    table, unit = metrics.by_window(predictions)
    figure, ((axes,),) = _figure(height=3.6, width=6)
    x = np.arange(len(table))
    axes.bar(x, table.accuracy, color="0.75", label=f"accuracy by {unit}")
    larger = np.maximum(table.share_AD, 1 - table.share_AD)
    axes.plot(x, larger, linestyle="", marker="_", markersize=14, color="black", label="share of the larger class")
    step = max(1, len(table) // 12)
    for i in x[::step]:
        axes.annotate(f"{table.n[i]}", (i, 0.02), ha="center", fontsize=7)
    axes.set_xticks(x[::step], table["at"][::step])
    name = "slice window (lowest slice number)" if unit == "scan" else "slice number"
    axes.set(xlabel=f"{name}; in the bars, the number of {unit}s", ylabel="accuracy", ylim=(0, 1.03))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    _title(figure, title)
    _save(figure, path)


def plot_risk(path, tables, title, sets=None):
    """Risk-coverage curves, one a unit: the error rate among the surest share. `sets` of `score_sets` adds a point."""
    figure, ((axes,),) = _figure(height=3.6, width=5)
    for unit, table in tables.items():
        threshold = table.threshold.to_numpy() if "threshold" in table else metrics.THRESHOLD
        coverage, risk = metrics.risk_coverage(table.p_AD.to_numpy(float), table.prediction == table.label, threshold)
        axes.plot(coverage, risk, label=f"by {unit}", **LOOK[unit])
    if sets is not None and sets["accuracy_if_certain"] is not None:
        axes.plot(1 - sets["uncertain"], 1 - sets["accuracy_if_certain"], "k*", markersize=9,
                  label=f"prediction sets for {sets['coverage']:g}, by scan")
    axes.set(xlabel="share of units that are answered, the surest first", ylabel="error rate among them",
             xlim=(0, 1.02), ylim=(-0.01, None))
    axes.legend()
    _title(figure, title)
    _save(figure, path)


def plot_speed(path, ratios, title):
    """Bars of speeds as multiples of torchvision's, a dict by name; ours are dark."""
    figure, ((axes,),) = _figure(height=0.3 * len(ratios) + 1.2, width=6)
    bars = axes.barh(list(ratios), list(ratios.values()), color=["0.4" if "ours" in name else "0.8" for name in ratios])
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios.values()], padding=2)
    axes.invert_yaxis()
    axes.set(xlabel="speed, times torchvision's (the first bar of each group)", xlim=(0, 1.1 * max(ratios.values())))
    _title(figure, title)
    _save(figure, path)
