"""Utilities: seeds, device and precision, learning-rate schedule, checkpoints, run log, training
curves, scores of an epoch.

A checkpoint holds plain Python values and tensors, so that it loads with weights_only=True.
best_model.pth is a model with everything that predict.py needs; last.pth is a run with everything
that --resume needs.
"""

import contextlib
import math
import platform
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from tqdm import tqdm

from adnc import CLASSES
from adnc.errors import InputError, printable
from adnc.files import write_atomically
from adnc.pretrained import load_tensors
from adnc.scoring import metrics, plots
from modules import make_model

# ---------------------------------------------------------------- seeds


def seed_of(*numbers):
    """One seed of 32 bits from whole numbers such as (seed, epoch, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*numbers):
    """Seed Python, NumPy and PyTorch on all devices from whole numbers such as (seed, epoch,
    step)."""
    seed = seed_of(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------- device and precision


def pick_device(name="auto"):
    """The device of that name; "auto" is CUDA if there is a GPU, else the CPU. InputError if
    unusable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        # Fails for a device that is not there, or holds no numbers.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise InputError(
            f"device {name} cannot be used here ({reason}); choose cpu or auto"
        ) from None
    return device


def has_native_bf16():
    """Whether this CPU computes in bf16. oneDNN emulates it on an AVX-512 CPU without it,
    slowly."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        if platform.machine().lower() in ("x86_64", "amd64"):
            return torch.cpu._is_avx512_bf16_supported()
    except AttributeError:  # the names are private: another version of PyTorch may lack them
        return False
    return True


def pick_amp(mode, device):
    """The dtype to autocast to, or None for float32. "auto": bf16 on a GPU or CPU that has it (GPUs
    from compute capability 8 on), fp16 on other GPUs."""
    if mode == "auto":
        mode = "off"
        if device.type == "cuda":
            mode = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        elif device.type == "cpu" and has_native_bf16():
            mode = "bf16"
    if mode == "fp16" and device.type != "cuda":
        raise InputError(
            f"--amp fp16 needs a CUDA GPU, this is {device.type}; choose bf16, off or auto"
        )
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[mode]


def precision_name(amp):
    return str(amp or torch.float32).removeprefix("torch.")


def autocast(device, amp):
    return torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None)


def device_name(device):
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # of Linux
    name = platform.machine()
    if info.exists():
        match = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        name = match[1] if match else name
    return f"cpu ({name})"


@contextlib.contextmanager
def explain_out_of_memory(advice):
    """Turn an out-of-memory error, on GPU or CPU, into one sentence with advice."""
    try:
        yield
    except MemoryError:
        raise OSError(f"out of memory; {advice}") from None
    except RuntimeError as problem:
        out_of_memory = isinstance(problem, torch.cuda.OutOfMemoryError)
        if not (out_of_memory or "can't allocate memory" in str(problem)):
            raise
        first = str(problem).splitlines()[0][:200]
        raise OSError(f"out of memory ({first}); {advice}") from None


# ---------------------------------------------------------------- learning rate


def lr_at(step, *, steps_per_epoch, epochs, warmup_epochs, lr):
    """The learning rate of optimizer step `step` (from 0): linear warm-up to `lr`, then cosine to
    0.

    The warm-up ends after warmup_epochs * steps_per_epoch steps, the cosine (Loshchilov & Hutter
    2017, arXiv 1608.03983) after epochs * steps_per_epoch. A pure function, so a resumed run cannot
    drift.
    """
    warmup = warmup_epochs * steps_per_epoch
    total = epochs * steps_per_epoch
    if step < warmup:
        return lr * min(1.0, (step + 1) / warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))


# ---------------------------------------------------------------- checkpoints

FORMAT = 5  # raise it when an older checkpoint can no longer be read


def save_checkpoint(path, **content):
    """Save plain Python values and tensors, atomically. OSError if the file cannot be written."""

    def write(temporary):
        temporary.touch()  # where this is not permitted, the error says so
        try:
            torch.save({**content, "format": FORMAT}, temporary)
        except RuntimeError as problem:  # of PyTorch's writer; its text speaks of positions
            reason = str(problem).splitlines()[0]
            raise OSError(
                f"the disk may be full, or a limit on the size of files reached ({reason})"
            ) from None

    write_atomically(path, write)


def load_checkpoint(path):
    """A checkpoint of `save_checkpoint`. InputError for a file that is damaged, or of another kind
    or version."""
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise InputError(
            f"{path} is not a checkpoint of this project; expected best_model.pth of a run"
        )
    if checkpoint["format"] != FORMAT:
        raise InputError(
            f"{path} has format {checkpoint['format']}, this version reads {FORMAT}; "
            "train it again, or use the version that wrote it"
        )
    if checkpoint["classes"] != list(CLASSES):
        raise InputError(
            f"{path} has the classes {checkpoint['classes']}; expected {list(CLASSES)}"
        )
    return checkpoint


def build_model(checkpoint):
    """The model that a checkpoint describes, with its weights."""
    model = make_model(**checkpoint["model"])
    model.load_state_dict(checkpoint["weights"])
    return model


# ---------------------------------------------------------------- run log and pictures


def make_log(path):
    """A function that prints a line past the progress bars and appends it to the file `path`."""

    def log(line=""):
        line = printable(line)
        tqdm.write(line)
        sys.stdout.flush()  # else a file that standard output goes to is pages behind
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log


def plot_lr_schedule(path, *, steps_per_epoch, epochs, **schedule):
    """The learning rate over the epochs, from `lr_at` itself."""
    steps = np.unique(np.linspace(0, epochs * steps_per_epoch - 1, 2000).astype(int))
    rates = [
        lr_at(step, steps_per_epoch=steps_per_epoch, epochs=epochs, **schedule) for step in steps
    ]
    title = f"{path.parent.name}: learning rate, warm-up, then cosine, by step"
    with plots.figure(path, title) as ((axes,),):
        axes.plot(steps / steps_per_epoch, rates)
        axes.set(xlabel="epoch", ylabel="learning rate")


def plot_training_curves(path, history, kept_epoch, title):
    """Slice-level loss and accuracy of training and validation by epoch, and the epoch that was
    kept."""
    with plots.figure(path, title, columns=2, height=3.5) as ((loss, accuracy),):
        for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
            label = "training (smoothed labels)" if name == "loss" else "training"
            axes.plot(history.epoch, history[f"train_{name}"], label=label, **plots.LOOK["slice"])
            axes.plot(
                history.epoch, history[f"val_{name}"], label="validation", **plots.LOOK["scan"]
            )
            axes.axvline(
                kept_epoch,
                color="grey",
                linestyle=":",
                linewidth=1,
                label=f"kept: epoch {kept_epoch}",
            )
            axes.set(xlabel="epoch", ylabel=f"{name} (slice-level)")
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            plots.legend_above(axes)
        loss.axhline(math.log(2), color="grey", linewidth=0.8)
        loss.annotate("ln 2: chance", (history.epoch.iloc[0], math.log(2)), fontsize=7, va="bottom")


# ---------------------------------------------------------------- point metrics


def validation_scores(index, logits):
    """Scores of an epoch, from the index of validation slices and their logits z_AD - z_NC (N,).

    Returns (scores, remark). scores: slice-level loss (cross-entropy without label smoothing),
    accuracy and balanced accuracy, and scan-level AUROC. remark: a sentence if every slice gets the
    same prediction, else "".
    """
    is_ad = (index.label == "AD").to_numpy(bool)
    p_ad = expit(logits)
    predicted_ad = p_ad >= metrics.THRESHOLD
    p_label = np.where(is_ad, p_ad, 1 - p_ad)

    slices = metrics.point_scores(is_ad, p_ad, predicted_ad)
    scans = (
        index.assign(p_AD=p_ad).groupby("scan").agg(label=("label", "first"), p_AD=("p_AD", "mean"))
    )
    scan_p_ad = scans.p_AD.round(12).to_numpy()  # equal means stay equal, as in metrics.aggregate
    scan_is_ad = (scans.label == "AD").to_numpy(bool)
    scan_scores = metrics.point_scores(scan_is_ad, scan_p_ad, scan_p_ad >= metrics.THRESHOLD)
    scores = {
        "val_loss": float(-np.log(p_label.clip(min=1e-12)).mean()),
        "val_accuracy": slices["accuracy"],
        "val_balanced_accuracy": slices["balanced_accuracy"],
        "val_scan_auroc": scan_scores["auroc"],
    }
    if predicted_ad.all() or not predicted_ad.any():
        return scores, f"predicts {CLASSES[int(predicted_ad[0])]} for every slice"
    return scores, ""
