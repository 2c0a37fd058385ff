"""What training and prediction share: the schedule, seeds, precision, signals, evaluation, files, pictures.

Not run by itself. `evaluate` is the one road from a model to predictions; metrics.py is the one from there to figures.
"""

import contextlib
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import textwrap
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from tqdm import tqdm

import metrics
from dataset import CLASSES, printable
from engine import make_engine
from slices import MEAN, STD, eval_transform, make_loader

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


def make_scaler(device, dtype):
    """GradScaler: skips a step whose gradient is not finite. It scales the loss for float16 only; elsewhere by 1 (after
    a skipped step by 1/2, which changes no bit)."""
    if dtype == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def make_deterministic():
    """On CUDA take only kernels that give the same bits again, or fail. To be called before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def precision_name(dtype):
    return str(dtype or torch.float32).removeprefix("torch.")


def autocast(device, dtype):
    """A context that casts to `dtype`; for None it does nothing."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


# ---------------------------------------------------------------- signals


class Stopped(SystemExit):
    """Somebody asked the process to end. `code` is the exit status, 128 + the number of the signal; `told` whether it
    has been said."""

    told = False

    def __str__(self):
        return signal.Signals(self.code - 128).name


class Signals:
    """Turns SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (a warning of SLURM's) into the exception Stopped while the context is
    open. Within `held` it is put off to the end of that block; who sends a second signal ends the process at once.

    A process that is not `alone` stops only at the end of such a block, and if the others do, too: if `asked` has been
    set by `parallel.agree`.
    """

    def __init__(self):
        self.caught, self.asked, self.alone, self.holding, self.before = None, None, True, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", None)):
                if number is not None:
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.alone and not self.holding:
            raise Stopped(128 + number)
        if self.caught is not None:
            raise SystemExit(128 + number)
        self.caught = number

    @contextlib.contextmanager
    def held(self):
        """A block that a signal does not tear apart."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        number = self.caught if self.alone else self.asked
        if number is not None:
            raise Stopped(128 + number)


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
    """`write(temporary path)`, then move it into place, so that no reader meets half a file. OSError if it cannot be;
    what stood there is then untouched."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or after a power cut the new name may stand for an empty file
        os.replace(temporary, path)
    except OSError as problem:
        reason = problem.strerror or problem
        if not path.parent.is_dir():
            reason = f"the folder {path.parent} is gone"
        kept = "; what stood there before is untouched" if path.exists() else ""
        raise OSError(f"{path} cannot be written: {reason}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# What a spreadsheet would take for a formula, and what `disarm` itself put before one.
FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def disarm(cell):
    """A cell of text that a spreadsheet cannot take for a formula: one more ' before what looks like one."""
    return "'" + cell if isinstance(cell, str) and FORMULA.match(cell) else cell


def rearm(cell):
    """What `disarm` was given."""
    return cell[1:] if isinstance(cell, str) and cell[:1] == "'" and FORMULA.match(cell) else cell


def write_csv(path, table):
    """Write a table for people and spreadsheets; `read_csv` is its inverse."""
    text = [name for name in table if table[name].dtype == object or isinstance(table[name].dtype, pd.StringDtype)]
    table = table.assign(**{name: table[name].map(disarm, na_action="ignore") for name in text})
    # names of files may hold bytes that are no UTF-8; they are written back as they came
    form = dict(index=False, float_format="%.7g", errors="surrogateescape")
    write_atomically(path, lambda temporary: table.to_csv(temporary, **form))


def read_csv(path):
    """A table of strings as `write_csv` wrote it; an empty cell is missing, but a scan may be named NA."""
    table = pd.read_csv(path, dtype="string", keep_default_na=False, encoding_errors="surrogateescape")
    return table.mask(table == "").map(rearm, na_action="ignore").astype("string")


def make_log(path):
    """A function that prints a line past the bars and appends it to the file."""

    def log(line):
        line = printable(line)
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


def make_folder(path):
    """The folder `path`, made if it is not there. OSError if it cannot be, or not be written into."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OSError(f"{path} is no folder, or lies in a file; name another") from None
    except OSError as problem:
        raise OSError(f"the folder {path} cannot be made: {problem.strerror}; name another") from None
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OSError(f"the folder {path} cannot be written into; name another")
    return path


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
    text = printable(text).replace("$", r"\$")  # a name is no formula
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
