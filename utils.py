"""Checkpoints, and what else a run leaves in its folder: data, never code.

Not run by itself. A checkpoint holds plain Python values and tensors, is written beside the old one and moved into its
place, and is read with weights_only=True. A file that is damaged, foreign or of another version gets a sentence.

best_model.pth is a model with all that predict.py needs; last.pth is a run with all that --resume needs.
"""

import argparse
import os
import re
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path, PosixPath
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from adnc.data import subjects
from adnc.files import write_atomically, write_csv, write_json
from modules import PAPER, describe_model, load_weights, make_model
from adnc.data.pixels import mean_slice, stats_range
from adnc.data.augment import MEAN, STD
from adnc.cli import CLASSES, InputError
from adnc.volumes.cut import recorded_look

FORMAT = 3  # raise it when an older checkpoint can no longer be read
# What every checkpoint has; a finished best_model.pth has baselines and calibration as well, a last.pth the RESUMABLE.
KEYS = ("model", "classes", "image_size", "slice_size", "mean", "std", "split_by", "split_hash", "slice_stats",
        "exposure", "init", "flags", "precision", "machine", "weights", "epoch")  # fmt: skip
RESUMABLE = ("ema", "optimizer", "scaler", "history", "step", "sums", "pixels")

# ---------------------------------------------------------------- files


def save_checkpoint(path, **content):
    """Save plain Python values and tensors, so that they load with weights_only=True. OSError if it cannot be done."""

    def write(temporary):
        try:
            torch.save(content | {"format": FORMAT}, temporary)
        except RuntimeError as problem:  # of PyTorch's own writer, on a full disk
            raise OSError(f"no space, or a file system that refuses: {str(problem).splitlines()[0]}") from None

    write_atomically(path, write)


# Plain data that training scripts put beside weights: their flags, paths and scores. NumPy's maker of numbers had
# another name before version 2.
_NUMBER = np.float64(0).__reduce__()[0]
PLAIN = [argparse.Namespace, PosixPath, _NUMBER, (_NUMBER, "numpy.core.multiarray.scalar"),
         (_NUMBER, "numpy._core.multiarray.scalar"), np.dtype,
         *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool"))]


def load_tensors(path):
    """What torch.save wrote, or a .safetensors file, on the CPU, as data and never as code. InputError if it is
    anything else."""
    try:
        if not (stat.S_ISREG(os.stat(path).st_mode) or os.path.isdir(path)):  # a pipe would wait for ever
            raise ValueError("not a regular file")
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        else:
            with open(path, "rb") as file:
                if file.read(4) == b"PK\3\4":  # a zip file, whose directory is at its end
                    raise ValueError("it is cut off")
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that is refused in a moment
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; expected one that torch.save or train.py wrote") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; expected a file, such as best_model.pth of a run") from None
    except Exception as problem:  # torch.load raises nearly anything on a foreign file
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))  # torch colours its advice
        if found := re.search(r"Unsupported \w+: GLOBAL (\S+)", text):
            raise InputError(f"{path} holds {found[1]}, which cannot be read without running code of the file, and "
                             "that is not done; where it was made, save the weights alone: "
                             "torch.save(model.state_dict(), FILE)") from None
        reason = re.split(r"[.:]\s|\n", text)[0]
        reason = reason if " " in reason else "it is of another kind"  # of text pickle says nothing but a number
        raise InputError(f"{path} cannot be read as tensors ({reason}); expected a file of torch.save, or .safetensors"
                         ) from None


def load_checkpoint(path):
    """A checkpoint of `save_checkpoint`. InputError for a file that is damaged, of another kind or of another version:
    the checksums of its parts, its format and its keys are checked, so that it holds what this version wrote."""
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint or not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a checkpoint of this project; expected best_model.pth of a run")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path} has format {checkpoint['format']}, this version reads {FORMAT}; train it again, or "
                         "use the version that wrote it")
    expected = KEYS + RESUMABLE * any(name in checkpoint for name in RESUMABLE)
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        raise InputError(f"{path} is not a whole checkpoint: it has no {', '.join(missing)}; train it again")
    if checkpoint["classes"] != list(CLASSES):
        raise InputError(f"{path} knows the classes {checkpoint['classes']}; expected {list(CLASSES)}")
    return checkpoint


def build_model(checkpoint):
    """The model that a checkpoint describes, with its weights; InputError where they are those of another one."""
    try:
        model = make_model(**checkpoint["model"])
        model.load_state_dict(checkpoint["weights"])
    except (RuntimeError, ValueError) as problem:
        first = str(problem).splitlines()[1:2] or [str(problem)]
        raise InputError(f"the weights are not those of a {describe_model(checkpoint['model']['variant'])}: "
                         f"{first[0].strip()}") from None
    return model


def model_options(args):
    """The arguments of `modules.make_model` that the flags of train.py ask for."""
    given = {name: getattr(args, name) for name in PAPER if getattr(args, name) is not None}
    return {"variant": args.model, "in_chans": 1, "num_classes": 2, "drop_path_rate": args.drop_path, **given}


def start_model(args, log, last=None):
    """(model, init): a model with fresh weights, or those of --init; and what is known about the latter: None, or the
    file and the exposure of its training (None where the file does not say). A run that resumes from the checkpoint
    `last` knows init from there."""
    try:
        model = make_model(**model_options(args))
        if last or not args.init:
            return model, last["init"] if last else None
        state = load_tensors(args.init)
        loaded, left, taken = load_weights(model, state)
    except ValueError as problem:
        raise InputError(str(problem)) from None
    exposure = state.get("exposure")
    log(f"--init {args.init}: {len(loaded)} of {len(model.state_dict())} tensors loaded"
        f"{f' from {taken}' * bool(taken)}, left: {', '.join(left) or 'nothing'}")
    if exposure is None:
        log("--init does not say on whom it was trained; if on subjects of val or test, their scores LEAK")
    return model, {"file": os.path.basename(args.init), "exposure": exposure}


# ---------------------------------------------------------------- a run


class Run(NamedTuple):
    """A run's folder, the function that writes its log, its model card (see `model_card`) and what its files show (see
    `record_pixels`)."""

    out: Path
    log: Callable
    card: dict
    pixels: dict

    @property
    def last(self):
        return self.out / "last.pth"

    @property
    def best(self):
        return self.out / "best_model.pth"

    def save(self, state, sums=None):
        """last.pth: all that the run needs to resume. `sums` lists the running sums of each process, where they may
        differ: within an epoch."""
        save_checkpoint(self.last, **self.card, **state.state_dict(sums), pixels=self.pixels)


def record_pixels(slices):
    """What each file of a SliceSet shows, by its path below the folder: the hash of its pixels, or its only grey."""
    names, index = (os.path.relpath(path, slices.root) for path in slices.index.path), slices.index
    return dict(zip(names, index.pixel_hash.where(index.pixel_hash != "", index["median"].map(str))))


def model_card(args, slices, runtime, init=None):
    """What a checkpoint says about its model beside the weights: all that predict.py needs. `init` is that of
    `start_model`; whom its weights have seen, this model has seen."""
    deep = slices.index.bits[slices.index.depth > 0]
    exposure = subjects.record_exposure(slices.index[slices.index.split != "test"])  # trained and chosen on
    if init and init["exposure"]:
        exposure = subjects.merge_exposure(exposure, init["exposure"])
    return {
        "model": model_options(args),
        "classes": list(CLASSES), "image_size": args.image_size, "slice_size": list(slices.images.shape[1:]),
        "mean": MEAN, "std": STD, "split_by": args.split_by, "split_hash": subjects.split_hash(slices.index),
        "slice_stats": stats_range(slices.index[slices.index.split == "train"]), "exposure": exposure, "init": init,
        "extraction": recorded_look(slices.root),  # None: cut elsewhere
        "bits": int(deep.max()) if len(deep) else None,  # of files of 16 bits a pixel
        # what attributions compare a slice with; no slice of a person, but an average of all in training
        "mean_slice": torch.from_numpy(
            mean_slice(slices.images, slices.rows[slices.index.split == "train"]).round().astype("uint8")),
        "flags": vars(args), "precision": runtime.precision, "machine": runtime.machine,
    }  # fmt: skip


def write_start(out, args, slices, runtime):
    """config.json with every flag, split.csv with who is where, and with --skip-bad skipped.csv."""
    packages = ("torchvision", "numpy", "pandas", "pillow", "scikit-learn")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    versions |= {name: metadata.version(name) for name in packages}
    used = {"data": os.path.abspath(slices.root), "device": runtime.device_name, "amp": runtime.precision,
            "threads": torch.get_num_threads(), "processes": runtime.world}
    write_json(out / "config.json", {"flags": vars(args), "used": used, "versions": versions})
    index = slices.index[["path", "label", "scan", "slice", "subject", "split", "group"]]
    write_csv(out / "split.csv", index.assign(path=[os.path.relpath(path, slices.root) for path in index.path]))
    if args.skip_bad:
        write_csv(out / "skipped.csv", pd.DataFrame(slices.bad, columns=["path", "reason"]))


def check_best(run, last):
    """InputError where best_model.pth is gone, or of another run than last.pth, as loaded."""
    if not last["history"]:
        return
    if not run.best.exists():
        raise InputError(f"{run.best} is gone, and {run.last} cannot give the best epoch back; restore it, or start a "
                         "new run")
    best, rows = load_checkpoint(run.best), {row["epoch"]: row for row in last["history"]}
    ahead = best["epoch"] == last["epoch"] + 1  # killed between the two: the epoch is repeated
    if not (ahead or str(rows.get(best["epoch"])) == str(best.get("val"))) or any(
            best[name] != last[name] for name in ("model", "split_hash", "image_size")):
        raise InputError(f"{run.best} is of another run than {run.last}; restore its own, or start a new run")


def restore_run(state, last, args, run, runtime):
    """Put last.pth, as loaded, back into `state` and log what will differ. InputError where it is of other slices, or
    does not fit."""
    if "optimizer" not in last:
        raise InputError(f"{run.last} holds a model and not a training to resume; restore it, or start a new run")
    check_best(run, last)
    if args.epochs < last["epoch"] + (last["step"] > 0):
        steps = f" and {last['step']} steps of the next" * (last["step"] > 0)
        raise InputError(f"--epochs is {args.epochs}, but {run.out} has trained {last['epoch']}{steps}; expected no "
                         "fewer")
    if last["split_hash"] != run.card["split_hash"]:
        raise InputError(f"these slices are not those that {run.out} was trained on; expected the same files and "
                         "split, and the same subjects in the scans")
    changed = [name for name, pixels in run.pixels.items() if last["pixels"].get(name) != pixels]
    if changed:
        raise InputError(f"{len(changed):,} of {len(run.pixels):,} files do not show what they showed when {run.out} "
                         f"was started, first {changed[0]}; restore them, or start a new run")
    try:
        state.load_state_dict(last, same_precision=last["precision"] == runtime.precision)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
        raise InputError(f"{run.last} does not fit the run ({str(problem).splitlines()[0]}); expected its own last.pth"
                         ) from None
    if (run.out / "test" / "metrics.json").exists():
        run.log(f"this run had come to its end: what {run.out / 'test'} holds is replaced, and if it trains on, its "
                "test scores are no longer the first")
    run.log(f"resumed after epoch {state.epoch}" + f" and {state.step} steps of the next" * (state.step > 0))
    if last["flags"]["epochs"] != args.epochs:
        run.log(f"--epochs was {last['flags']['epochs']}: the cosine now ends at epoch {args.epochs}, so that the "
                "learning rate jumps here, and the run is not the one that started with this length")
    if last["precision"] != runtime.precision:
        run.log(f"the run so far was in {last['precision']}, it resumes in {runtime.precision}")
    if last["machine"] != run.card["machine"]:
        run.log(f"the run so far was on {last['machine']}, it resumes on {run.card['machine']}: its bits will differ")
