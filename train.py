"""Train a ConvNeXt to tell AD from NC.

    python train.py --demo                             # no data needed: draws a phantom set, under 3 minutes on a CPU
    python train.py --data ADNI/AD_NC --out runs/tiny  # the documented recipe; one CUDA GPU
    torchrun --nproc-per-node 4 train.py --data ADNI/AD_NC --out runs/tiny   # the same on four

A run folder holds best_model.pth, last.pth, config.json (every value), split.csv (who is where), training_log.txt,
training_history.csv, lr_schedule.png, training_curves.png, val/ and test/. The epoch is chosen on val; test is read
once, at the end. `--out RUN --resume` goes on with a run that was stopped, at any moment, and ends where it would have
ended. Ctrl-C, SIGTERM and SIGUSR1 end the step, save and say so (exit status 130, 143, 138).
"""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from dataset import Parser, run

# What --demo changes: small enough for minutes on two cores. 1e-4 is too slow for so few steps.
DEMO = dict(model="atto", image_size=64, epochs=10, batch_size=32, lr=2e-3, drop_path=0.0, val_fraction=0.2)
# What may differ when a run goes on: where it runs and when it ends, not how it learns.
FREE_ON_RESUME = {"resume", "out", "data", "device", "epochs", "patience", "tensorboard", "threshold", "no_cache",
                  "compile", "workers"}


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument_group("data and output").add_argument
    add("--data", metavar="AD_NC", help="folder with {train,test}/{AD,NC} (default: ./AD_NC, if it is there)")
    add("--demo", action="store_true", help="draw a phantom set into the cache once, and train a small model on it")
    add("--out", metavar="RUN", help="run folder, must be new (default: runs/<time>-<model>)")
    add("--resume", action="store_true", help="go on with the run in --out; its flags are taken from config.json")
    add("--skip-bad", action="store_true", help="leave out files that cannot be used, and list them in skipped.csv")
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
    add("--workers", type=int, default=0, metavar="N",
        help="processes that fetch batches; the result is the same (0: none, two if a set does not fit onto the GPU)")
    add("--deterministic", action="store_true", help="on CUDA only kernels that give the same bits again; slower")
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
            where = config["used"]["data"]
            if not saved["demo"] and os.path.abspath(saved["data"] or "AD_NC") != where:
                saved["data"] = where  # it goes on from another folder
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
    try:
        _check(parser, args)
    except TypeError:  # of a config.json that was changed by hand
        parser.error(f"{args.out}/config.json holds flags that are no numbers; mend it, or start a new run")
    return args


def _check(parser, args):
    positive = ("epochs", "batch_size", "lr", "clip_grad")
    at_least_0 = ("weight_decay", "warmup_epochs", "patience", "mixup", "cutmix")
    limit = 1e6  # beyond it, and at inf, is a slip of the finger
    ranges = {name: (0, limit) for name in at_least_0}
    ranges |= {name: (0, 0.999999) for name in ("val_fraction", "drop_path", "label_smoothing", "ema")}
    ranges |= {"image_size": (32, 4096), "seed": (0, 2**32 - 1), "workers": (0, 256)}
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

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402

import checkpoint  # noqa: E402
import dataset  # noqa: E402
import parallel  # noqa: E402
import slices  # noqa: E402
import utils  # noqa: E402
from epoch import make_mix, make_optimizer, schedule, start_of_epoch, train_epoch, val_epoch  # noqa: E402
from loading import find_data, load_data  # noqa: E402
from modules import VARIANTS, convnext, load_weights  # noqa: E402
from predict import COVERAGE, assess_run  # noqa: E402


class Job(NamedTuple):
    """Where a run happens: its folder, its log, the device, the dtype of autocast (None: float32), the processes, and
    the signals that may end it."""

    out: Path
    log: Callable
    device: torch.device
    amp: torch.dtype | None
    ranks: parallel.Ranks
    signals: utils.Signals

    @property
    def precision(self):
        return utils.precision_name(self.amp)

    @property
    def how_to_go_on(self):
        words = [utils.near(sys.executable), utils.near(__file__), "--out", self.out, "--resume"]
        return f"go on with:\n  {shlex.join(map(str, words))}"


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
    out = utils.make_folder(args.out)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty, and a run never overwrites another; choose a new --out, or add --resume")
    return out


HEADER = "epoch        lr     loss     acc  val loss  val acc  bal acc   AUROC    img/s"


def format_epoch(row, best, remark):
    if row["skipped_steps"]:
        remark = "; ".join(filter(None, [f"{row['skipped_steps']} steps skipped, not finite", remark]))
    auroc = "-" if row["val_scan_auroc"] is None else f"{row['val_scan_auroc']:.3f}"
    return (f"{row['epoch']:>5}  {row['lr']:>8.2e}  {row['train_loss']:>7.4f}  {row['train_accuracy']:>6.3f}  "
            f"{row['val_loss']:>8.4f}  {row['val_accuracy']:>7.3f}  {row['val_balanced_accuracy']:>7.3f}  {auroc:>6}  "
            f"{row['images_per_s']:>7.1f}  {'best ' if best else ''}{remark}").rstrip()


def make_model(args, job, last):
    """The model with fresh weights, or those of --init, on the device; and what is known of the latter: None, or the
    file and whom it was trained on, as `dataset.remember` has it (None where it does not say). A run that goes on from
    the checkpoint `last` knows the latter from there."""
    model, init = convnext(args.model, drop_path_rate=args.drop_path), last["init"] if last else None
    if args.init and not last:
        state = checkpoint.load_tensors(args.init)
        loaded, left = load_weights(model, state)
        init = {"file": os.path.basename(args.init), "seen": state.get("seen")}
        job.log(f"--init {args.init}: {len(loaded)} of {len(model.state_dict())} tensors loaded, "
                f"left: {', '.join(left) or 'nothing'}")
        if init["seen"] is None:
            job.log("--init does not say on whom it was trained; if on subjects of val or test, their figures LEAK")
    return model.to(job.device, memory_format=torch.channels_last), init


def write_start(args, job, index):
    """config.json with every flag, split.csv with who is where, and with --skip-bad skipped.csv."""
    packages = ("torchvision", "numpy", "pandas", "pillow", "scikit-learn")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    versions |= {name: metadata.version(name) for name in packages}
    name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"
    used = {"data": os.path.abspath(index.attrs["root"]), "device": name, "amp": job.precision,
            "threads": torch.get_num_threads(), "processes": job.ranks.world}
    utils.write_json(job.out / "config.json", {"flags": vars(args), "used": used, "versions": versions})
    paths = [os.path.relpath(path, index.attrs["root"]) for path in index.path]
    table = index[["path", "label", "scan", "slice", "subject", "split"]].assign(path=paths)
    utils.write_csv(job.out / "split.csv", table)
    if args.skip_bad:
        utils.write_csv(job.out / "skipped.csv", pd.DataFrame(index.attrs["bad"], columns=["path", "reason"]))


def main(args):
    with utils.Signals() as signals:
        try:
            train(args, signals)
        except RuntimeError as problem:  # of somebody else's end; what is meant for developers passes
            reason = parallel.why_it_ended(problem)
            if reason is None:
                raise
            raise OSError(reason) from None
        except utils.Stopped as stop:
            if not stop.told:
                print(f"stopped by {stop} before the first step", file=sys.stderr)
            raise


def train(args, signals):
    """Everything from the flags to the evaluation on test."""
    if args.deterministic:
        utils.make_deterministic()
    ranks, device = parallel.start(utils.pick_device(args.device))
    amp = utils.pick_amp(args.amp, device)
    if args.model not in VARIANTS:
        raise ValueError(f"there is no ConvNeXt variant {args.model!r}; choose one of {', '.join(VARIANTS)}")
    bar = "decoding" if ranks.rank == 0 else None
    index, images = parallel.one_after_the_other(ranks, lambda: load_data(args, find_data(args), bar))
    out = parallel.from_rank_0(ranks, lambda: open_run(args))
    log = utils.make_log(out / "training_log.txt") if ranks.rank == 0 else lambda line: None
    job = Job(out, log, device, amp, ranks, signals)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not args.deterministic

    last = checkpoint.load_checkpoint(out / "last.pth") if args.resume and (out / "last.pth").exists() else None
    if not last and ranks.rank == 0:
        write_start(args, job, index)
    utils.seed_everything(args.seed)
    model, init = make_model(args, job, last)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    state = model, ema, make_optimizer(model, args.lr, args.weight_decay), utils.make_scaler(device, amp)
    facts = checkpoint.describe_model(args, index, images, job, init)
    history, progress = [], start_of_epoch(job)
    if last:
        progress = checkpoint.restore_run(state, last, args, job, facts)
        history = last["history"]
        if ranks.rank == 0:
            write_start(args, job, index)
    elif ranks.rank == 0:  # so that a run that was stopped in its first epoch goes on, too, on the same slices
        checkpoint.save_run(state, job, facts, history, progress)
    job.log(f"ConvNeXt {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {args.image_size} px, "
            f"{device}, {job.precision}{f', {ranks.world} processes' * (ranks.world > 1)}; run folder {out}")
    for line in dataset.describe_split(index, args.split_by) + dataset.describe_transfer(index, init):
        job.log(line)
    if args.skip_bad:
        job.log(f"left out, and listed in skipped.csv: {len(index.attrs['bad'])} files that cannot be used")

    try:
        fit(state, index, images, args, job, facts, history, progress)
        parallel.stop()
        if ranks.rank == 0:
            finish(index, images, args, job)
    except utils.Stopped as stop:
        job.log(f"stopped by {stop}; {job.how_to_go_on}")
        stop.told = True
        raise
    except (ValueError, OSError) as problem:
        kind = OSError if isinstance(problem, OSError) else ValueError
        raise kind(f"{problem}\n{where_it_stands(job)}") from None


def finish(index, images, args, job):
    """The evaluation of the best model, and how to repeat it."""
    assess_run(index, images, args, job)
    job.log(f"pictures in {job.out} and {job.out / 'test'}")
    if args.folds is None:
        predict, test = Path(__file__).with_name("predict.py"), Path(index.attrs["root"]) / "test"
        words = [utils.near(sys.executable), utils.near(predict), test, "--checkpoint", job.out / "best_model.pth",
                 "--coverage", COVERAGE]
        job.log("predict again with:\n  " + shlex.join(map(str, words)))


def where_it_stands(job):
    """What is left of a run that had to end, for its error: what the file holds, not what was to be written."""
    if not (job.out / "last.pth").exists():
        return f"nothing is left of the run: {job.out / 'last.pth'} is gone"
    epoch = checkpoint.load_checkpoint(job.out / "last.pth")["epoch"]
    best = f", and {job.out / 'best_model.pth'} the best epoch so far" * (job.out / "best_model.pth").exists()
    return (f"the last good checkpoint is {job.out / 'last.pth'}, after epoch {epoch}{best}; {job.how_to_go_on}")


def is_better(row, best):
    """By validation accuracy; the lower loss decides between equals. A whole-class guess ties for many epochs."""
    return best is None or (row["val_accuracy"], -row["val_loss"]) > (best["val_accuracy"], -best["val_loss"])


def save_where_it_is(state, job, facts, history, progress, steps):
    """last.pth of a run that was asked to stop, within the epoch behind `history`."""
    with contextlib.suppress(utils.Stopped), job.signals.held():
        everybody = parallel.gather(progress["sums"].tolist(), job.ranks)
        if job.ranks.rank == 0:
            checkpoint.save_run(state, job, facts, history, progress, everybody)
        job.log(f"saved after step {progress['step']} of {steps} of epoch {len(history) + 1}")


def fit(state, index, images, args, job, facts, history, progress):
    """Train up to args.epochs, keep the best epoch by validation accuracy, stop early. What is saved is always a whole
    state: a signal waits for the end of the step, or of a save."""
    model, ema = state[:2]
    kept = ema.module if ema is not None else model
    train, val = (index.split == "train").to_numpy(), (index.split == "val").to_numpy()
    order, n = torch.Generator(), int(train.sum())
    ranks, main = job.ranks, job.ranks.rank == 0
    # a compiled step needs one shape, several processes need the same number of images
    size = -(-args.batch_size // ranks.world) if args.compile or ranks.world > 1 else 0
    batches = slices.make_loader(images, index.index[train], index.label[train] == "AD", args.batch_size, order,
                                 job.device, (ranks.rank, ranks.world, size), args.workers)
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
        if history:  # a killed run may have saved an epoch and not yet listed it
            utils.write_csv(job.out / "training_history.csv", pd.DataFrame(history))
    job.log(HEADER)
    job.signals.alone = ranks.world == 1
    for epoch in range(len(history) + 1, args.epochs + 1):
        if best is not None and 0 < args.patience <= len(history) - best["epoch"]:
            job.log(f"stopped early: no better validation in {args.patience} epochs")
            break
        order.manual_seed(utils.seed_of(args.seed, epoch))
        try:
            with job.signals.held():
                row = {"epoch": epoch} | train_epoch(state, batches, n, args, job, epoch=epoch, forward=forward,
                                                     mix=mix, progress=progress)
            figures, remark = val_epoch(kept, images, index[val], args, job)
            with job.signals.held():
                row |= figures
                history.append(row)
                better = is_better(row, best)
                best, progress = row if better else best, start_of_epoch(job, progress["sums"][4].item())
                if main:
                    if better:
                        content = dict(weights=kept.state_dict(), epoch=epoch, val=row)
                        checkpoint.save_checkpoint(job.out / "best_model.pth", **content, **facts)
                    checkpoint.save_run(state, job, facts, history, progress)
                    utils.write_csv(job.out / "training_history.csv", pd.DataFrame(history))
                    write_events(row)
                    job.log(format_epoch(row, better, remark))
                parallel.agree(job.signals, ranks)
        except utils.Stopped:
            save_where_it_is(state, job, facts, history, progress, len(batches))
            raise
    job.signals.alone = True
    leaky = ", LEAKY split by slice" if args.split_by == "slice" else ""
    if main:
        title = f"{args.model}{leaky}"
        utils.plot_history(job.out / "training_curves.png", pd.DataFrame(history), best["epoch"], title)


if __name__ == "__main__":
    run(main, ARGS)
