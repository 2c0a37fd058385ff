"""What training and prediction share: the schedule, seeds, precision, evaluation, metrics, checkpoints, pictures.

Not run by itself. `evaluate` is the one road from a model to predictions, `score` the one from predictions to figures;
both train.py and predict.py take them.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
from pathlib import Path

import numpy as np
import torch
from sklearn import metrics as sk
from tqdm import tqdm

from dataset import CLASSES, MEAN, STD, eval_transform, make_loader, split_hash
from modules import convnext

FORMAT = 1  # of a checkpoint; raise it when an older one can no longer be read
UNITS = ("slice", "scan", "subject")
THRESHOLD = 0.5  # p_AD from which the prediction is AD


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


def seed_everything(*seeds):
    """Seed Python, NumPy and PyTorch (all devices) from a tuple of whole numbers, such as (seed, epoch)."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
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
def evaluate(model, images, table, *, image_size, mean=MEAN, std=STD, device, amp, batch_size=64, bar=None):
    """Predict every slice: uint8 images (N, H, W) with a table of N rows (an index, or part of it).

    Returns the table with p_AD, the softmax probability of AD in [0, 1], and prediction ("AD" from 0.5, else "NC").
    Raises ValueError if an output is not finite, as happens when fp16 overflows.
    `bar` is the label of a progress bar, or None for no bar.
    """
    model.eval()
    logits = []
    batches = make_loader(images, np.zeros(len(images)), batch_size, pin_memory=device.type == "cuda")
    for x, _ in tqdm(batches, bar, unit=" batches", leave=False, disable=None if bar else True):
        x = eval_transform(x.to(device, non_blocking=True), image_size, mean, std)
        with autocast(device, amp):
            logits.append(model(x.contiguous(memory_format=torch.channels_last)).float())
    p_ad = torch.cat(logits).double().softmax(1)[:, CLASSES.index("AD")].cpu().numpy() if logits else np.zeros(0)
    lost = int(np.isnan(p_ad).sum())
    if lost:
        raise ValueError(f"the model gives no finite output for {lost} of {len(p_ad)} slices in {precision_name(amp)}; "
                         "try --amp off, or a lower --lr if it is being trained")
    return with_predictions(table.assign(p_AD=p_ad))


def with_predictions(table):
    return table.assign(prediction=np.where(table.p_AD >= THRESHOLD, "AD", "NC"))


def aggregate(predictions, unit):
    """Predictions by slice -> by "slice", "scan" or "subject": the mean p_AD over the unit's slices.

    Slices of unknown subject have no row in the table by subject. Adds n_slices; a label is the first slice's.
    """
    if unit == "slice":
        return predictions.assign(n_slices=1)
    columns = {"p_AD": ("p_AD", "mean"), "n_slices": ("p_AD", "size")}
    if unit == "scan":
        columns["subject"] = ("subject", "first")
    if "label" in predictions:
        columns["label"] = ("label", "first")
    return with_predictions(predictions.groupby(unit).agg(**columns).reset_index())


# ---------------------------------------------------------------- from predictions to figures


def score(predictions, resamples=2000, seed=0):
    """Figures of labelled predictions by slice, scan and subject, as a dict that goes into metrics.json.

    Each unit holds n, accuracy, balanced_accuracy, sensitivity, specificity, auroc and ci95 with a pair for each: the
    2.5th and 97.5th percentile of a bootstrap over subjects (Efron & Tibshirani 1993), since slices of one brain are no
    independent samples. Scans of unknown subject are resampled as subjects of their own. A figure that is not defined
    (a class is absent) is None; so is "subject" if no subject is known.
    """
    figures = {}
    for unit in UNITS:
        table = aggregate(predictions, unit)
        group = table.subject if unit == "subject" else table.subject.fillna("scan " + table.scan)
        y, p = (table.label == "AD").to_numpy(), table.p_AD.to_numpy(float)
        if len(table) == 0:
            figures[unit] = None
            continue
        ci95 = bootstrap(y, p, group.astype(str), resamples, seed)
        figures[unit] = {"n": len(table), **point_figures(y, p), "ci95": ci95}
    return figures


def point_figures(y, p):
    """Figures of p_AD `p` (N,) against y (N,), True for AD, at the threshold of 0.5; None where not defined."""
    predicted = p >= THRESHOLD
    figures = {
        "accuracy": sk.accuracy_score(y, predicted),
        "balanced_accuracy": None,
        "sensitivity": sk.recall_score(y, predicted) if y.any() else None,
        "specificity": sk.recall_score(y, predicted, pos_label=False) if not y.all() else None,
        "auroc": None,
    }
    if y.any() and not y.all():
        figures["balanced_accuracy"] = sk.balanced_accuracy_score(y, predicted)
        figures["auroc"] = sk.roc_auc_score(y, p)
    return {name: None if value is None else float(value) for name, value in figures.items()}


def bootstrap(y, p, group, resamples=2000, seed=0):
    """95 % intervals of `point_figures` when whole groups (subjects) are drawn with replacement.

    Every figure is a ratio of sums over groups, so a resample is a vector of counts by group and all of them are a few
    matrix products; for the AUROC the sum goes over pairs of groups (Mann-Whitney).
    """
    groups, group = np.unique(group, return_inverse=True)
    n = len(groups)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(float)  # (B, G)
    hit = (p >= THRESHOLD) == y

    def total(values):  # of a boolean (N,) in each resample, (B,)
        return weights @ np.bincount(group, values, n)

    wins = np.zeros((n, n))  # [i, j]: pairs of an AD of group i above an NC of group j, ties count half
    for i in np.unique(group[y]):
        above = p[y & (group == i)][:, None] - p[~y]
        wins[i] = np.bincount(group[~y], (np.sign(above) / 2 + 0.5).sum(0), n)
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, specificity = total(hit & y) / total(y), total(hit & ~y) / total(~y)
        drawn = {
            "accuracy": total(hit) / total(np.ones(len(y))),
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "auroc": ((weights @ wins) * weights).sum(1) / (total(y) * total(~y)),
        }
    intervals = {}
    for name, values in drawn.items():
        values = values[np.isfinite(values)]  # a resample without one of the classes says nothing of that class
        intervals[name] = [float(q) for q in np.quantile(values, [0.025, 0.975])] if len(values) else None
    return intervals


def format_score(figures, title):
    """`score`'s dict as lines of a table for people."""
    names = dict(accuracy="accuracy", balanced_accuracy="balanced acc.", sensitivity="sensitivity",
                 specificity="specificity", auroc="AUROC")
    lines = [title, f"{'':<9}{'n':>6}  " + "".join(f"{name:<22}" for name in names.values())]
    for unit in UNITS:
        if figures[unit] is None:
            lines.append(f"{unit:<9}{0:>6}  subjects unknown")
            continue
        cells = []
        for name in names:
            value, interval = figures[unit][name], figures[unit]["ci95"][name]
            cells.append("undefined" if value is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]")
        lines.append(f"{unit:<9}{figures[unit]['n']:>6}  " + "".join(f"{cell:<22}" for cell in cells).rstrip())
    return "\n".join(lines)


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


def fingerprint(name):
    """A scan or subject id as a checkpoint keeps it (SHA-256, 12 hex digits): spares the reader the names, but does not
    hide them from somebody who tries all ids."""
    return hashlib.sha256(str(name).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def describe_model(args, index, images, precision):
    """What a checkpoint says of its model beside the weights: all that predict.py needs."""
    known = index[index.split != "test"]
    return {
        "model": {"variant": args.model, "in_chans": 1, "num_classes": 2, "drop_path_rate": args.drop_path},
        "classes": list(CLASSES), "image_size": args.image_size, "slice_size": list(images.shape[1:]),
        "mean": MEAN, "std": STD, "split_by": args.split_by, "split_hash": split_hash(index),
        # who was trained and chosen on, so that predict.py can tell a test from a memory; fingerprints, no names
        "seen": {"subjects": sorted(map(fingerprint, known.subject.dropna().unique())),
                 "scans": sorted(map(fingerprint, known.scan.unique())), "unknown": bool(known.subject.isna().any())},
        "flags": vars(args), "precision": precision,
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


def _figure(columns=1, height=3.2):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(4.2 * columns, height), layout="constrained", squeeze=False)


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
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_history(path, history, best_epoch, title):
    """Loss and slice accuracy of training and validation over the epochs; dotted, the epoch that was kept."""
    figure, ((loss, accuracy),) = _figure(2)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        axes.plot(history.epoch, history[f"train_{name}"], label="training (with smoothed labels)")
        axes.plot(history.epoch, history[f"val_{name}"], label="validation")
        axes.axvline(best_epoch, color="grey", linestyle=":", label=f"kept: epoch {best_epoch}")
        axes.set(xlabel="epoch", ylabel=f"{name} (by slice)")
        axes.grid(alpha=0.3)
    loss.axhline(math.log(2), color="grey", linewidth=0.8)
    loss.annotate("ln 2: knows nothing", (history.epoch.iloc[0], math.log(2)), fontsize=7, va="bottom")
    accuracy.legend(fontsize=8)
    figure.suptitle(title, fontsize=9, wrap=True)
    _save(figure, path)


def plot_confusion(path, tables, title):
    """Confusion matrices, one a unit, from a dict of labelled tables by unit."""
    figure, (row,) = _figure(len(tables))
    for axes, (unit, table) in zip(row, tables.items()):
        sk.ConfusionMatrixDisplay.from_predictions(
            table.label, table.prediction, labels=CLASSES, cmap="Blues", colorbar=False, ax=axes
        )
        axes.set_title(f"by {unit} (n = {len(table):,})", fontsize=10)
    figure.suptitle(title, fontsize=9, wrap=True)
    _save(figure, path)


def plot_roc(path, tables, title):
    """ROC curves, one a unit."""
    figure, ((axes,),) = _figure(height=4.2)
    for unit, table in tables.items():
        y = table.label == "AD"
        if y.all() or not y.any():  # one class has no curve
            continue
        false_positive, sensitivity, _ = sk.roc_curve(y, table.p_AD)
        axes.plot(false_positive, sensitivity, label=f"{unit}: AUROC {sk.roc_auc_score(y, table.p_AD):.3f}")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity (AD)", aspect="equal")
    axes.set_title(title, fontsize=9, wrap=True)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_calibration(path, tables, title):
    """Reliability diagram: the share of AD against the predicted probability, in ten bins of equal width."""
    figure, ((axes,),) = _figure(height=4.2)
    for unit, table in tables.items():
        bins = np.minimum((table.p_AD * 10).astype(int), 9)
        points = table.assign(ad=table.label == "AD").groupby(bins).agg(p=("p_AD", "mean"), ad=("ad", "mean"))
        axes.plot(points.p, points.ad, marker="o", markersize=4, label=unit)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.set(xlabel="predicted probability of AD", ylabel="share that is AD", aspect="equal")
    axes.set_title(title, fontsize=9, wrap=True)
    axes.legend(fontsize=8)
    _save(figure, path)
