"""Train a ConvNeXt to tell AD from NC.

    python train.py --demo                             # no data needed: draws a phantom set, under 3 minutes on a CPU
    python train.py --data ADNI/AD_NC --out runs/tiny  # the documented recipe; one CUDA GPU
    torchrun --nproc-per-node 4 train.py --data ADNI/AD_NC --out runs/tiny   # the same on four

A run folder holds best_model.pth, last.pth, config.json (every value), split.csv (who is where), training_log.txt,
training_history.csv, lr_schedule.png, training_curves.png, val/ and test/. The epoch is chosen on val; test is read
once, at the end. `--out RUN --resume` goes on with a run that was stopped.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from dataset import Parser, run

# What --demo changes: small enough for minutes on two cores. 1e-4 is too slow for so few steps.
DEMO = dict(model="atto", image_size=64, epochs=10, batch_size=32, lr=2e-3, drop_path=0.0, val_fraction=0.2)
COVERAGE = 0.9  # that the prediction sets of a run's own evaluation promise
# What may differ when a run goes on: where it runs and when it ends, not how it learns.
FREE_ON_RESUME = {"resume", "out", "data", "device", "epochs", "patience", "tensorboard", "threshold", "no_cache",
                  "compile"}


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument_group("data and output").add_argument
    add("--data", metavar="AD_NC", help="folder with {train,test}/{AD,NC} (default: ./AD_NC, if it is there)")
    add("--demo", action="store_true", help="draw a phantom set into the cache once, and train a small model on it")
    add("--out", metavar="RUN", help="run folder, must be new (default: runs/<time>-<model>)")
    add("--resume", action="store_true", help="go on with the run in --out; its flags are taken from config.json")
    add("--no-cache", action="store_true", help="decode into memory at each start, instead of once into the cache")
    add("--tensorboard", action="store_true", help="also write events for TensorBoard into the run folder")
    add = parser.add_argument_group("split").add_argument
    add("--val-fraction", type=float, default=0.1, metavar="F", help="share of train/ for validation (0.1)")
    add("--split-by", choices=("subject", "slice"), default="subject", help="slice LEAKS, to show what it does")
    add("--fold", type=int, metavar="K", help="hold out fold K (from 0) of --folds of train/ instead of test/")
    add("--folds", type=int, metavar="N", help="number of folds of the cross-validation")
    add("--drop-test-subjects", action="store_true", help="leave out of train/ who also stands in test/")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="tiny", metavar="V", help="atto, femto, pico, nano, tiny, small, base or large (tiny)")
    add("--image-size", type=int, default=224, metavar="PX", help="side of the model's square input (224)")
    add("--drop-path", type=float, default=0.1, metavar="P", help="drop-path rate of the last block (0.1)")
    add("--init", metavar="FILE", help="start from a ConvNeXt state dict of torchvision or timm")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=100, metavar="N", help="length of the schedule (100)")
    add("--batch-size", type=int, default=64, metavar="N", help="slices a step (64)")
    add("--lr", type=float, default=1e-4, help="peak learning rate of AdamW (1e-4)")
    add("--weight-decay", type=float, default=1e-4, metavar="W", help="not on 1-D parameters (1e-4)")
    add("--label-smoothing", type=float, default=0.1, metavar="S", help="of the cross-entropy (0.1)")
    add("--clip-grad", type=float, default=1.0, metavar="NORM", help="largest norm of the gradient (1.0)")
    add("--warmup-epochs", type=float, default=1, metavar="N", help="linear warm-up before the cosine (1)")
    add("--patience", type=int, default=20, metavar="N", help="stop after N epochs without a better val (20; 0: never)")
    add("--threshold", choices=("0.5", "youden"), default="0.5", help="p_AD of an AD; youden: from validation (0.5)")
    add("--ema", type=float, default=0.0, metavar="D", help="validate and keep a moving average, e.g. 0.999 (0: off)")
    add = parser.add_argument_group("augmentation").add_argument
    add("--no-flip", action="store_true", help="no horizontal flip (on AD_NC it swaps front and back)")
    add("--no-augment", action="store_true", help="train on the view of the evaluation; learns by heart soonest")
    add("--mixup", type=float, default=0.0, metavar="A", help="MixUp with Beta(A, A), e.g. 0.2 (0: off)")
    add("--cutmix", type=float, default=0.0, metavar="A", help="CutMix with Beta(A, A), e.g. 1.0 (0: off)")
    add = parser.add_argument_group("machine").add_argument
    add("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto", help="auto: fp16 on CUDA, native bf16 on CPU")
    add("--compile", action="store_true", help="compile the step; for long runs, and needs a C++ compiler or CUDA")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: CUDA if there is one)")
    add("--seed", type=int, default=0, metavar="S", help="of split, weights, order and augmentation (0)")
    return parser


def parse_args(argv=None):
    """The flags; where not given, those of --demo, or on --resume those of the run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**DEMO)
    if args.resume:
        if not args.out:
            parser.error("--resume needs --out RUN, the folder of the run to go on with")
        try:
            config = json.loads((Path(args.out) / "config.json").read_text())
            saved = config["flags"]
            if not saved["demo"]:
                saved["data"] = config["used"]["data"]  # absolute, so that a run goes on from anywhere
        except (OSError, ValueError, KeyError, TypeError) as problem:
            parser.error(f"{args.out} holds no run to go on with ({problem})")
        parser.set_defaults(**{name: value for name, value in saved.items() if name not in ("resume", "out")})
    args = parser.parse_args(argv)
    if args.resume:
        changed = [name for name, value in saved.items()
                   if name not in FREE_ON_RESUME and getattr(args, name, value) != value]
        if changed:
            words = ", ".join(f"--{name.replace('_', '-')} was {saved[name]}" for name in changed)
            parser.error(f"a resumed run keeps its flags ({words}); leave them out, or start a new run")
    _check(parser, args)
    return args


def _check(parser, args):
    positive = ("epochs", "batch_size", "lr", "clip_grad")
    at_least_0 = ("weight_decay", "warmup_epochs", "patience", "mixup", "cutmix")
    limit = 1e6  # beyond it, and at inf, is a slip of the finger
    ranges = {name: (0, limit) for name in at_least_0}
    ranges |= {name: (0, 0.999999) for name in ("val_fraction", "drop_path", "label_smoothing", "ema")}
    ranges |= {"image_size": (32, 4096), "seed": (0, 2**32 - 1)}
    for name in (*positive, *ranges):
        value, (low, high) = getattr(args, name), ranges.get(name, (0, limit))
        if not low <= value <= high or (name in positive and value == 0):
            expected = f"more than 0, up to {high:.7g}" if name in positive else f"from {low} to {high:.10g}"
            parser.error(f"--{name.replace('_', '-')} is {value}; expected a number {expected}")
    if args.demo and args.data:
        parser.error("--demo draws its own data; leave out --data, or --demo")
    if (args.fold is None) != (args.folds is None):
        parser.error("--fold and --folds go together, as in --fold 0 --folds 5")
    if args.folds is not None and args.drop_test_subjects:
        parser.error("--drop-test-subjects looks into test/, which --folds does not read; leave out one of them")


# Read before torch is imported, so that --help and a mistyped flag answer at once.
ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402
from torchvision.transforms import v2  # noqa: E402
from tqdm import tqdm  # noqa: E402

import dataset  # noqa: E402
import parallel  # noqa: E402
import slices  # noqa: E402
import utils  # noqa: E402
from baselines import fit_baselines  # noqa: E402
from engine import micro_batch  # noqa: E402
from evaluate import PARTS, cell, format_assessment, write_results  # noqa: E402
from loading import find_data, load_data  # noqa: E402
from metrics import arrays, calibrate, conformal_quantile, point_figures, with_predictions  # noqa: E402
from modules import VARIANTS, convnext, load_weights  # noqa: E402
from predict import calibrated, predict_table, run_leaks, run_notes  # noqa: E402

# ---------------------------------------------------------------- optimisation


def make_optimizer(model, lr, weight_decay):
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices and kernels only, not on biases, norms and gamma."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def make_mix(args):
    """MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019), one of them a batch; None if both are off."""
    kinds = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    mixes = [kind(alpha=alpha, num_classes=len(dataset.CLASSES)) for kind, alpha in kinds if alpha > 0]
    return v2.RandomChoice(mixes) if mixes else None


def train_epoch(state, batches, n, args, job, *, epoch, forward, mix):
    """One pass over the n training slices; `forward` is the model, or what wraps it. Returns the mean loss and accuracy
    by slice, and slices a second.

    Sums stay on the device; the bar alone asks for one now and then.
    """
    model, ema, optimizer, scaler = state
    device, ranks = job.device, job.ranks
    utils.seed_everything(args.seed, epoch, *[ranks.rank] * (ranks.rank > 0))  # each process drops other paths ...
    augmentation = torch.Generator().manual_seed(utils.seed_of(args.seed, epoch, 0))  # ... of the same images
    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing, reduction="none")
    sums, seen = torch.zeros(2, device=device), 0  # of loss and of right answers
    at_once = micro_batch(device, args.image_size, args.image_size)
    start = time.perf_counter()
    quiet = True if ranks.rank > 0 else None
    bar = tqdm(batches, f"epoch {epoch}/{args.epochs}", unit=" steps", leave=False, disable=quiet)
    for i, (x, y) in enumerate(bar):
        size = min(args.batch_size, n - seen)  # of the batch, over all processes
        mine = ranks.share(size)  # the rest of x fills it up, and counts for nothing
        lr = utils.lr_at((epoch - 1) * len(batches) + i, steps_per_epoch=len(batches), **schedule(args))
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        x = slices.train_transform(x, args.image_size, augment=not args.no_augment, flip=not args.no_flip,
                                   generator=augmentation, part=(size, ranks.rank, ranks.world))
        if mix is not None:
            x, y = mix(x, y)  # y becomes (N, 2), a share of each class
        optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(x), at_once):
            part, labels = x[first : first + at_once], y[first : first + at_once]
            with utils.autocast(device, job.amp):
                logits = forward(part.contiguous(memory_format=torch.channels_last))
                losses = criterion(logits, labels)[: max(0, mine - first)].float()
            # the mean over processes of these, summed over the parts, is the mean over the batch
            scaler.scale(losses.sum() * (ranks.world / size)).backward()
            right = logits.detach().argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
            sums += torch.stack((losses.detach().sum(), right[: len(losses)].sum()))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if ema is not None:
            ema.update_parameters(model)
        seen += size
        if not bar.disable and (i % 10 == 0 or i == len(batches) - 1):  # .item() waits for the device
            rate = seen / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {sums[0].item() * ranks.world / seen:.4f}, lr {lr:.2e}, {rate:.0f} images/s")
    loss, right = (parallel.total(sums, ranks) / seen).tolist()
    rate = seen / (time.perf_counter() - start)
    return {"train_loss": loss, "train_accuracy": right, "lr": lr, "images_per_s": rate}


def schedule(args):
    return dict(epochs=args.epochs, warmup_epochs=args.warmup_epochs, lr=args.lr)


def val_epoch(model, images, table, args, job):
    """Validation through `evaluate`. Returns (figures by slice, scan AUROC and the loss, and a remark or "")."""
    def predict(part):
        return utils.evaluate(model, images, part, rows=part.index, image_size=args.image_size, device=job.device,
                              amp=job.amp, batch_size=args.batch_size, bar=None if job.ranks.rank else "validation")

    predictions = with_predictions(parallel.by_parts(table, predict, job.ranks))
    p = predictions.p_AD.where(predictions.label == "AD", 1 - predictions.p_AD)  # of the right class
    by_slice, by_scan = (point_figures(*arrays(predictions, unit)[:3]) for unit in ("slice", "scan"))
    figures = {
        "val_loss": float(-np.log(p.clip(lower=1e-12)).mean()),
        "val_accuracy": by_slice["accuracy"],
        "val_balanced_accuracy": by_slice["balanced_accuracy"],
        "val_scan_auroc": by_scan["auroc"],
    }
    if predictions.prediction.nunique() == 1:
        return figures, f"predicts {predictions.prediction.iloc[0]} for every slice: not learning yet"
    return figures, ""


# ---------------------------------------------------------------- the run


class Job(NamedTuple):
    """Where a run happens: its folder, its log, the device, the dtype of autocast (None: float32), the processes."""

    out: Path
    log: Callable
    device: torch.device
    amp: torch.dtype | None
    ranks: parallel.Ranks

    @property
    def precision(self):
        return utils.precision_name(self.amp)


def open_run(args):
    """The run's folder: made new, or on --resume the one that is there."""
    if args.resume:
        if (Path(args.out) / "best_model.pth").exists() and not (Path(args.out) / "last.pth").exists():
            raise ValueError(f"{args.out} has a best_model.pth but no last.pth to go on from, and a run never "
                             "overwrites another; choose a new --out")
        return Path(args.out)
    if args.out is None:
        leaky = "-LEAKY" if args.split_by == "slice" else ""
        return utils.new_folder(f"runs/{datetime.now():%Y%m%d-%H%M%S}-{args.model}{leaky}")
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, and a run never overwrites another; choose a new --out, or add --resume")
    out.mkdir(parents=True, exist_ok=True)
    return out


HEADER = "epoch        lr     loss     acc  val loss  val acc  bal acc   AUROC    img/s"


def format_epoch(row, best, remark):
    auroc = "-" if row["val_scan_auroc"] is None else f"{row['val_scan_auroc']:.3f}"
    return (f"{row['epoch']:>5}  {row['lr']:>8.2e}  {row['train_loss']:>7.4f}  {row['train_accuracy']:>6.3f}  "
            f"{row['val_loss']:>8.4f}  {row['val_accuracy']:>7.3f}  {row['val_balanced_accuracy']:>7.3f}  {auroc:>6}  "
            f"{row['images_per_s']:>7.1f}  {'best ' if best else ''}{remark}").rstrip()


def make_model(args, job, resumed):
    """The model with fresh weights, or those of --init, on the device; and what is known of the latter: None, or the
    file and whom it was trained on, as `dataset.remember` has it (None where it does not say)."""
    model, init = convnext(args.model, drop_path_rate=args.drop_path), None
    if args.init and not resumed:
        state = utils.load_tensors(args.init)
        loaded, left = load_weights(model, state)
        init = {"file": os.path.basename(args.init), "seen": state.get("seen")}
        job.log(f"--init {args.init}: {len(loaded)} of {len(model.state_dict())} tensors loaded, "
                f"left: {', '.join(left) or 'nothing'}")
        if init["seen"] is None:
            job.log("--init does not say on whom it was trained; if on subjects of val or test, their figures LEAK")
    return model.to(job.device, memory_format=torch.channels_last), init


def write_start(args, job, index):
    """config.json with every flag, and split.csv with who is where."""
    packages = ("torchvision", "numpy", "pandas", "pillow", "scikit-learn")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    versions |= {name: metadata.version(name) for name in packages}
    name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"
    used = {"data": os.path.abspath(index.attrs["root"]), "device": name, "amp": job.precision,
            "threads": torch.get_num_threads()}
    utils.write_json(job.out / "config.json", {"flags": vars(args), "used": used, "versions": versions})
    paths = [os.path.relpath(path, index.attrs["root"]) for path in index.path]
    utils.write_csv(job.out / "split.csv", index.drop(columns="pixels").assign(path=paths))


def main(args):
    ranks, device = parallel.start(utils.pick_device(args.device))
    amp = utils.pick_amp(args.amp, device)
    if args.model not in VARIANTS:
        raise ValueError(f"there is no ConvNeXt variant {args.model!r}; choose one of {', '.join(VARIANTS)}")
    bar = "decoding" if ranks.rank == 0 else None
    index, images = parallel.one_after_the_other(ranks, lambda: load_data(args, find_data(args), bar))
    out = parallel.from_rank_0(ranks, lambda: open_run(args))
    log = utils.make_log(out / "training_log.txt") if ranks.rank == 0 else lambda line: None
    job = Job(out, log, device, amp, ranks)
    torch.backends.cudnn.benchmark = device.type == "cuda"

    resumed = args.resume and (out / "last.pth").exists()
    utils.seed_everything(args.seed)
    model, init = make_model(args, job, resumed)
    if resumed:
        init = utils.load_checkpoint(out / "last.pth").get("init")
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    state = model, ema, make_optimizer(model, args.lr, args.weight_decay), scaler
    facts = utils.describe_model(args, index, images, job.precision, init)
    history = restore(state, args, job, facts) if resumed else []
    if ranks.rank == 0:
        write_start(args, job, index)
    job.log(f"ConvNeXt {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {args.image_size} px, "
            f"{device}, {job.precision}{f', {ranks.world} processes' * (ranks.world > 1)}; run folder {out}")
    for line in dataset.describe_split(index, args.split_by) + dataset.describe_transfer(index, init):
        job.log(line)

    fit(state, index, images, args, job, facts, history)
    parallel.stop()
    if ranks.rank == 0:
        finish(index, images, args, job)


def restore(state, args, job, facts):
    """Put last.pth back into `state`; returns the history up to it. Another set of slices is a ValueError."""
    last = utils.load_checkpoint(job.out / "last.pth")
    if last["split_hash"] != facts["split_hash"]:
        raise ValueError(f"these slices are not those that {job.out} was trained on; expected the same files and split")
    utils.restore_state(state, last)
    job.log(f"resumed after epoch {last['epoch']}")
    if last["flags"]["epochs"] != args.epochs:
        job.log(f"--epochs was {last['flags']['epochs']}: the cosine now ends at epoch {args.epochs}, so that the "
                "learning rate jumps here, and the run is not the one that started with this length")
    if last["precision"] != job.precision:
        job.log(f"the run so far was in {last['precision']}, it goes on in {job.precision}")
    return last["history"]


def is_better(row, best):
    """By validation accuracy; the lower loss decides between equals. A whole-class guess ties for many epochs."""
    return best is None or (row["val_accuracy"], -row["val_loss"]) > (best["val_accuracy"], -best["val_loss"])


def fit(state, index, images, args, job, facts, history):
    """Train up to args.epochs, keep the best epoch by validation accuracy, stop early. Everything random in an epoch
    comes from (seed, epoch), so that a resumed run repeats what an unbroken one does."""
    model, ema = state[:2]
    kept = ema.module if ema is not None else model
    train, val = (index.split == "train").to_numpy(), (index.split == "val").to_numpy()
    order = torch.Generator()
    ranks, main = job.ranks, job.ranks.rank == 0
    # a compiled step needs one shape, several processes need the same number of images
    size = -(-args.batch_size // ranks.world) if args.compile or ranks.world > 1 else 0
    batches = slices.make_loader(images, index.index[train], index.label[train] == "AD", args.batch_size, order,
                                 job.device, (ranks.rank, ranks.world, size))
    if args.compile:
        model.compile(dynamic=False)  # in place: the names of the weights stay clean
        job.log("the step is compiled: the first one takes a minute or more")
    forward = parallel.wrap(model, ranks, job.device)
    mix, best = make_mix(args), None
    for row in history:
        best = row if is_better(row, best) else best
    write_events = utils.open_tensorboard(job.out) if args.tensorboard and main else lambda row: None
    if main:
        utils.plot_lr(job.out / "lr_schedule.png", steps_per_epoch=len(batches), **schedule(args))
    job.log(HEADER)
    for epoch in range(len(history) + 1, args.epochs + 1):
        if best is not None and 0 < args.patience <= len(history) - best["epoch"]:
            job.log(f"stopped early: no better validation in {args.patience} epochs")
            break
        order.manual_seed(utils.seed_of(args.seed, epoch))
        row = {"epoch": epoch} | train_epoch(state, batches, int(train.sum()), args, job, epoch=epoch, forward=forward,
                                             mix=mix)
        if not np.isfinite(row["train_loss"]):
            raise ValueError(f"the loss of epoch {epoch} is {row['train_loss']}; lower --lr, or try --amp off" +
                             (f". {job.out} keeps the epochs before" if history else ""))
        figures, remark = val_epoch(kept, images, index[val], args, job)
        row |= figures
        history.append(row)
        better = is_better(row, best)
        best = row if better else best
        if not main:
            continue
        if better:
            utils.save_checkpoint(job.out / "best_model.pth", weights=kept.state_dict(), epoch=epoch, val=row, **facts)
        utils.save_state(state, job.out / "last.pth", epoch=epoch, history=history, **facts)
        utils.write_csv(job.out / "training_history.csv", pd.DataFrame(history))
        write_events(row)
        job.log(format_epoch(row, best is row, remark))
    leaky = ", LEAKY split by slice" if args.split_by == "slice" else ""
    if main:
        title = f"{args.model}{leaky}"
        utils.plot_history(job.out / "training_curves.png", pd.DataFrame(history), best["epoch"], title)


def finish(index, images, args, job):
    """Calibrate the best model on val, then evaluate it on val and, once, on test, by the road that predict.py takes.

    What is learned here, from train and val alone, goes into best_model.pth: the baselines and the calibration.
    """
    out, log = job.out, job.log
    checkpoint = utils.load_checkpoint(out / "best_model.pth")
    log(f"best epoch {checkpoint['epoch']}, chosen by validation accuracy")
    checkpoint["baselines"] = fit_baselines(index, images)
    titles = dict(PARTS)
    if args.folds is not None:
        titles["test"] = f"fold {args.fold} of {args.folds}, held out of train"
    for split, title in titles.items():
        rows = (index.split == split).to_numpy()
        # in the order of predict.py, so that its batches, and with them the last digits, are the same
        table = index.loc[rows, ["path", "scan", "slice", "subject", "label", "pixels"]].sort_values(["scan", "slice"])
        # val was chosen on, and is in checkpoint["seen"]; what is asked of it is whether --init was trained on it
        init = checkpoint.get("init") or {}
        seen = checkpoint["seen"] if split == "test" else init.get("seen") or dataset.remember(index[:0])
        predictions = predict_table(checkpoint, table, device=job.device, amp=job.amp, images=images, seen=seen)
        if split == "val":
            checkpoint["calibration"] = calibrate(predictions, args.threshold)
            utils.save_checkpoint(out / "best_model.pth", **checkpoint)
            log("calibrated on the {subjects} subjects of validation: temperature {temperature:.3f}, threshold "
                "{threshold:.3f}".format(**checkpoint["calibration"]))
            if conformal_quantile(checkpoint["calibration"], COVERAGE) == float("inf"):
                log(f"these are too few subjects to promise a coverage of {COVERAGE}: every prediction set is AD|NC")
        leaks = run_leaks(checkpoint)
        if leaks and split == "val":
            leaks = ["split by slice, its scans were trained on"]
        figures = write_results(calibrated(predictions, checkpoint, COVERAGE), out / split, title=title, leaks=leaks,
                                notes=run_notes(checkpoint), coverage=COVERAGE, calibration=checkpoint["calibration"])
        if split == "val":  # it was chosen on: a line is enough
            log(f"{figures['title']}: accuracy by slice {cell(figures['slice'], 'accuracy')}, "
                f"by scan {cell(figures['scan'], 'accuracy')}")
            continue
        for line in format_assessment(figures):
            log(line)
    log(f"pictures in {out} and {out / 'test'}")
    if args.folds is None:
        predict, test = Path(__file__).with_name("predict.py"), Path(index.attrs["root"]) / "test"
        words = [utils.near(sys.executable), utils.near(predict), test, "--checkpoint", out / "best_model.pth",
                 "--coverage", COVERAGE]
        log("predict again with:\n  " + shlex.join(map(str, words)))


if __name__ == "__main__":
    run(main, ARGS)
