"""Train a ConvNeXt to tell AD from NC.

    python train.py --demo                             # no data needed: draws a phantom set
    python train.py --recipe phantom --out runs/phantom   # the weights that are shipped
    python train.py --data ADNI/AD_NC --out runs/tiny  # the documented recipe; one CUDA GPU
    python train.py --out runs/tiny --resume           # resume a run, however it was stopped
    torchrun --nproc-per-node 4 train.py --data ADNI/AD_NC --out runs/tiny4     # four GPUs

A run folder holds best_model.pth, last.pth, config.json (every flag), split.csv, training_log.txt,
training_history.csv, lr_schedule.png, training_curves.png, resources.json (time and memory), val/
and test/, and with --tensorboard event files (tensorboard --logdir RUN). best_model.pth is the best
epoch on val, or with --keep last the last one; test is read once, at the end. last.pth is written
after each epoch: `--resume` repeats the epoch that was lost, and ends with the bits that a run
without the stop would have had.
"""

import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentTypeError, BooleanOptionalAction, Namespace
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import entr
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2
from tqdm import tqdm

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))  # under python -P it is missing

from adnc.cli import describe_other_modules

if other := describe_other_modules(__file__):
    raise ImportError(other)

from adnc import CLASSES, distributed
from adnc.cli import (
    AMOUNT,
    COUNT,
    FRACTION,
    POSITIVE,
    SEED,
    SIDE,
    Parser,
    add_subject_pattern,
    number,
    run_script,
)
from adnc.data import pixels, subjects
from adnc.data.augment import MEAN, STD, train_transform
from adnc.errors import InputError, count
from adnc.explain.attribution import measure_map_scale
from adnc.files import (
    fingerprint,
    new_folder,
    read_json,
    require_new,
    unused_name,
    write_csv,
    write_json,
)
from adnc.phantom.draw import draw, is_varied_set, read_soft_labels
from adnc.pretrained import find_state_dict, load_tensors
from adnc.resources import describe_resources, measure_resources, peak_memory
from adnc.scoring import assess
from adnc.scoring.baselines import describe_background, fit_baselines
from adnc.scoring.calibration import (
    apply_calibration,
    calibrate,
    fit_with_dark_share,
    max_coverage,
)
from adnc.tensorboard import ScalarLog, import_writer
from adnc.volumes.look import recorded_look
from dataset import Batches, load_set
from modules import MODEL_ARGS, VARIANTS, describe_model, has_batchnorm, load_weights, make_model
from predict import PHANTOM, predict_logits, predict_slices
from utils import (
    autocast,
    build_model,
    device_name,
    explain_out_of_memory,
    load_checkpoint,
    lr_at,
    make_log,
    pick_amp,
    pick_device,
    plot_lr_schedule,
    plot_training_curves,
    precision_name,
    save_checkpoint,
    seed_everything,
    seed_of,
    validation_scores,
)

# ---------------------------------------------------------------- flags

# Every flag with its value in the documented recipe: the architecture of Liu et al. 2022, but not
# their training settings.
DEFAULTS = dict(
    data=None, demo=False, recipe="default", out=None, resume=False, skip_bad=False,
    subject_pattern=None, no_cache=False,
    split=None, val_fraction=0.1, split_by="subject", fold=None, folds=None, pool_test=False,
    drop_test_subjects=False, subjects=None,
    model="tiny", image_size=224, drop_path=0.1, model_args={}, init=None,
    epochs=100, batch_size=64, lr=1e-4, weight_decay=1e-4, label_smoothing=0.1, clip_grad=1.0,
    warmup_epochs=1, patience=20, keep="best", threshold="0.5", ema=0.0,
    augment="full", mixup=0.0, cutmix=0.0, soft_labels=False,
    amp="auto", compile=False, device="auto", deterministic=False, tensorboard=False, seed=0,
)  # fmt: skip

# For few subjects: chosen on folds of the phantom's local cue, see docs/recipes.md.
SMALL = dict(
    model="narrow",
    image_size=112,
    epochs=10,
    batch_size=32,
    lr=2e-3,
    drop_path=0.0,
    keep="last",
)

# What a recipe changes. Flags that are given win.
RECIPES = {
    "default": {},
    "small": SMALL,
    # Of weights/phantom.pth: learns from drawings alone, see docs/transfer.md.
    "phantom": {**SMALL, "soft_labels": True},
    # The small one, made shorter: with few steps the last epoch is not always the best.
    "demo": dict(
        model="narrow",
        image_size=64,
        epochs=4,
        batch_size=32,
        lr=2e-3,
        drop_path=0.0,
        val_fraction=0.2,
    ),
}

# Flags that may differ when a run is resumed: where it runs, and when it ends. Another number of
# epochs stretches the cosine, which the log reports.
FREE_ON_RESUME = {
    "resume", "out", "data", "device", "epochs", "patience", "threshold", "no_cache", "compile",
    "tensorboard",
}

# Sides of slices, in pixels, that are in the range of training on drawings: a drawing shows a head
# of any size, so that its own number of pixels says nothing.
DRAWN_SIDES = [64, 512]
DEMO_SUBJECTS = 80
PHANTOM_SUBJECTS = 1000  # of the recipe phantom
PHANTOM_VERSION = 2  # raise it when the phantom changes
MAX_NONFINITE_STEPS = 20  # in a row; then the run ends


def make_parser():
    """The flags. None of them has a default here, so that `merge_flags` knows which were given."""
    parser = Parser(__doc__)
    switch = dict(action="store_true", default=None)
    on_or_off = dict(action=BooleanOptionalAction, default=None)  # may change when it is resumed

    parser.add_argument("misplaced", nargs="?", help=SUPPRESS)  # AD_NC without --data
    data = parser.add_argument_group("data and output")
    add = data.add_argument
    add("--data", metavar="AD_NC", help="folder with {train,test}/{AD,NC} (default: ./AD_NC)")
    add("--demo", **switch, help="draw a phantom set once, and train a small model on it")
    add("--recipe", choices=RECIPES, help="small: for few subjects; phantom: learns from drawings, "
        "draws them without --data; see RECIPES (default)")
    add("--out", metavar="RUN", help="run folder, must not exist (default: runs/<time>-<model>)")
    add("--resume", **switch, help="resume the run in --out, with its flags")
    add("--skip-bad", **switch, help="leave out unusable files, and list them in skipped.csv")
    add("--no-cache", **switch, help="decode into memory at each start, not once into the cache")
    add_subject_pattern(data)

    add = parser.add_argument_group("split").add_argument
    add("--split", metavar="FILE", help="take the split from a split.csv, of a run or made by hand")
    add("--val-fraction", type=FRACTION, metavar="F", help="share of train/ for validation (0.1)")
    add("--split-by", choices=("subject", "slice"), help="slice: LEAKY, to show a leak (subject)")
    add("--fold", type=int, metavar="K", help="hold out fold K, from 0, of train/ instead of test/")
    add("--folds", type=int, metavar="N", help="number of folds of the cross-validation")
    add("--pool-test", **switch, help="folds of train/ and test/ together, for few subjects")
    add("--drop-test-subjects", **switch, help="leave subjects of test/ out of train/")
    add("--subjects", type=COUNT, metavar="N", help="use N subjects of train/ only, for training, "
        "validation and folds together (all)")

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="V", help=f"{', '.join(VARIANTS)}; or cnn, a plain CNN (tiny)")
    add("--image-size", type=SIDE, metavar="PX", help="side of the square input in pixels (224)")
    add("--drop-path", type=FRACTION, metavar="P", help="drop-path rate of the last block (0.1)")
    options = ", ".join(MODEL_ARGS)
    add("--model-args", nargs="+", action="extend", metavar="KEY=VALUE",
        help=f"changes to the paper's: {options}")  # fmt: skip
    add("--init", metavar="FILE", help="start from weights of torchvision, timm or this project; "
        "phantom: from weights/phantom.pth")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=COUNT, metavar="N", help="length of the schedule (100)")
    add("--batch-size", type=COUNT, metavar="N", help="slices per step (64)")
    add("--lr", type=POSITIVE, help="peak learning rate of AdamW (1e-4)")
    add("--weight-decay", type=AMOUNT, metavar="W", help="not on 1-D parameters (1e-4)")
    add("--label-smoothing", type=FRACTION, metavar="S", help="of the cross-entropy (0.1)")
    add("--clip-grad", type=POSITIVE, metavar="NORM", help="largest norm of the gradient (1.0)")
    add("--warmup-epochs", type=AMOUNT, metavar="N", help="linear warm-up before the cosine (1)")
    whole = number(0, 1e6, int)
    add("--patience", type=whole, metavar="N", help="stop after N epochs without a better one; 0: "
        "never (20)")
    add("--keep", choices=("best", "last"), help="last: no choice on val, no early stop (best)")
    add("--threshold", choices=("0.5", "youden"), help="p_AD of an AD; youden: fitted on val (0.5)")
    add("--ema", type=FRACTION, metavar="D", help="decay of the averaged weights; 0: none (0)")

    add = parser.add_argument_group("augmentation").add_argument
    kinds = ("full", "no-flip", "none")
    add("--augment", choices=kinds, help="on AD_NC a flip swaps front and back (full)")
    add("--soft-labels", **switch, help="learn how much fluid a drawn slice shows, not its class; "
        "for sets of tools.phantom --cue varied")
    add("--mixup", type=AMOUNT, metavar="A", help="MixUp with Beta(A, A), e.g. 0.2; 0: off (0)")
    add("--cutmix", type=AMOUNT, metavar="A", help="CutMix with Beta(A, A), e.g. 1.0; 0: off (0)")

    add = parser.add_argument_group("machine").add_argument
    modes = ("auto", "fp16", "bf16", "off")
    add("--amp", choices=modes, help="auto: bf16 if the device has it, else fp16 on CUDA (auto)")
    add("--tensorboard", **on_or_off, help="also log history and scores for TensorBoard")
    add("--compile", **on_or_off, help="compile the model, for long runs; needs a C++ compiler")
    add("--device", help="cpu, cuda, cuda:1, ...; auto is CUDA if there is a GPU (auto)")
    add("--deterministic", **switch, help="on CUDA use only kernels that repeat their bits; slower")
    add("--seed", type=SEED, metavar="S", help="of split, weights, order and augmentation (0)")
    return parser


def merge_flags(given, saved=None):
    """The value of every flag: flags that are given win over the saved ones of a run that is
    resumed, or over the recipe's, and those over the defaults. All are dicts by name."""
    if saved is not None:
        return {**DEFAULTS, **saved, **given}
    recipe = given.get("recipe", "demo" if given.get("demo") else "default")
    return {**DEFAULTS, **RECIPES[recipe], "recipe": recipe, **given}


def parse_args(argv=None):
    """The flags as a Namespace, checked; with --resume those of the run, from its last.pth."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    given = {name: value for name, value in given.items() if value is not None}
    if "misplaced" in given:
        flag = "--data"
        if given.get("resume") or given.get("demo"):
            flag = "--out"
        word = given["misplaced"]
        parser.error(f"{word} belongs to no flag; did you mean {flag} {word}?")
    if "model_args" in given:
        try:
            given["model_args"] = parse_model_args(given["model_args"])
        except ValueError as problem:
            parser.error(f"--model-args: {problem}")
    saved = None
    if given.get("resume"):
        if "out" not in given:
            parser.error("--resume needs --out RUN, the folder of the run to resume")
        saved = read_saved_flags(Path(given["out"]), given, parser)
    args = Namespace(**merge_flags(given, saved))

    if args.model not in (*VARIANTS, "cnn"):
        parser.error(f"there is no --model {args.model}; choose one of {', '.join(VARIANTS)}, cnn")
    if args.warmup_epochs > args.epochs:
        parser.error(
            f"--warmup-epochs is {args.warmup_epochs:g}, longer than --epochs {args.epochs}: "
            "the learning rate would never reach --lr"
        )
    if args.demo and args.data:
        parser.error("--demo draws its own data; leave out --data or --demo")
    if args.soft_labels and (args.mixup or args.cutmix):
        parser.error("--soft-labels are no classes, which --mixup and --cutmix mix; leave one out")
    if (args.fold is None) != (args.folds is None):
        parser.error("--fold and --folds go together, as in --fold 0 --folds 5")
    if args.pool_test and args.folds is None:
        parser.error("--pool-test puts test/ into the folds; it goes with --fold and --folds")
    if args.folds is not None and args.drop_test_subjects:
        parser.error(
            "--drop-test-subjects looks into test/, which --folds does not read; leave out one of "
            "them"
        )
    if args.split:
        for name in ("folds", "drop_test_subjects", "subjects", "split_by", "val_fraction"):
            if name in given:
                parser.error(
                    f"--split names the split of every slice; leave out --{name.replace('_', '-')}"
                )
    if args.init and args.init != "phantom" and not args.resume and not os.path.isfile(args.init):
        parser.error(
            f"there is no file --init {args.init}; expected phantom, the weights that saw drawings "
            "alone, or a file of weights"
        )
    if args.tensorboard:
        import_writer()  # if it is missing, this fails before the data are read
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++", "cl")
    if args.compile and not any(map(shutil.which, compilers)):
        parser.error("--compile needs a C++ compiler; install one such as g++, or use --no-compile")
    if args.model == "cnn":
        if args.model_args:
            parser.error("--model cnn takes no --model-args; leave them out")
        if given.get("drop_path"):
            parser.error("--model cnn has no residual blocks to drop; leave out --drop-path")
        args.drop_path = 0.0
    return args


def read_saved_flags(out, given, parser):
    """The flags of the run in folder `out`, as the resumed run needs them; an error of the parser
    if one of those that are `given` now is another one and must not be."""
    if not out.exists():
        raise InputError(f"{out} does not exist; --resume expects the folder of a run in --out")
    if not (out / "last.pth").exists():
        raise InputError(
            f"{out} holds no last.pth to resume: it is no run of train.py, or one that was stopped "
            "before it began; start the run under a new --out"
        )
    last = load_checkpoint(out / "last.pth")
    if "optimizer" not in last:
        raise InputError(
            f"{out / 'last.pth'} holds a model and no training to resume; restore it, or start a "
            "new run"
        )
    saved = {**DEFAULTS, **last["flags"]}  # of a run of an earlier version some are missing
    changed = [
        f"--{name.replace('_', '-')} was {saved[name]}"
        for name, value in given.items()
        if name not in FREE_ON_RESUME and saved[name] != value
    ]
    if changed:
        parser.error(
            f"a resumed run keeps its flags ({', '.join(changed)}); leave them out, or start a new "
            "run"
        )
    if not saved["demo"] and os.path.abspath(saved["data"] or "AD_NC") != last["data"]:
        saved["data"] = last["data"]  # where it led then, since it leads elsewhere from here
    return saved


def parse_model_args(words):
    """KEY=VALUE words as a dict for `modules.convnext`. ValueError for an unknown key or value."""
    options = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in MODEL_ARGS:
            raise ValueError(
                f"there is no {key or word}; expected one of {', '.join(MODEL_ARGS)}, as in "
                "norm=batch"
            )
        choices = MODEL_ARGS[key]
        if choices and value not in choices:
            raise ValueError(f"{key} is {value or 'empty'}; choose {' or '.join(choices)}")
        if choices or (key, value) == ("init_std", "fan_in"):
            options[key] = value
        else:
            try:
                options[key] = POSITIVE(value)
            except ArgumentTypeError:
                raise ValueError(
                    f"{key} is {value or 'empty'}; expected a number above 0"
                ) from None
    return options


# ---------------------------------------------------------------- loss, optimizer, state


def make_loss(label_smoothing=0.1):
    """The loss as a function of logits (N, 2) and labels int (N,) or class shares (N, 2), returning
    (N,).

    Cross-entropy with label smoothing. For another loss change this function; the loss of the
    validation, in the log and for ties, is the cross-entropy in any case.
    """
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing, reduction="none")


def make_optimizer(model, lr, weight_decay):
    """AdamW (Loshchilov & Hutter 2019), with decay on matrices and kernels, not on biases, norms
    and gamma."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        dict(params=decayed, weight_decay=weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def make_mix(mixup=0.0, cutmix=0.0):
    """MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019), one of them per batch; None if both
    are off."""
    mixes = []
    if mixup > 0:
        mixes.append(v2.MixUp(alpha=mixup, num_classes=len(CLASSES)))
    if cutmix > 0:
        mixes.append(v2.CutMix(alpha=cutmix, num_classes=len(CLASSES)))
    return v2.RandomChoice(mixes) if mixes else None


def averaging(decay):
    """A moving average for AveragedModel, with the decay min(`decay`, (1 + n) / (10 + n)) after n
    steps.

    Without this warm-up, which is that of TensorFlow's ExponentialMovingAverage, an average over
    1,000 steps would still hold the random first weights after 40.
    """

    def average(averaged, current, n_steps):
        n = int(n_steps)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, n_steps)

    return average


class TrainState:
    """What an epoch changes: model, moving average of its weights (or None), optimizer, scaler and
    history. `state_dict` holds all of it.

    Random states are not part of it: the random numbers of a step come from (seed, epoch, step).
    """

    def __init__(self, model, *, device, amp, lr, weight_decay=1e-4, ema=0.0, world=None):
        self.device, self.amp = device, amp
        self.world = world or distributed.World()
        self.model = model.to(device, memory_format=torch.channels_last)
        self.ema = None
        if ema:
            self.ema = AveragedModel(model, multi_avg_fn=averaging(ema), use_buffers=True)
        self.optimizer = make_optimizer(model, lr, weight_decay)
        # The scaler skips a step whose gradient is not finite. It scales the loss for float16
        # alone; elsewhere by 1.
        scaling = {} if amp == torch.float16 else {"init_scale": 1.0}
        self.scaler = torch.amp.GradScaler(device.type, **scaling)
        self.forward = self.world.wrap(self.model, device)
        self.history = []  # one dict per epoch
        # Steps skipped in a row until now. Not saved: a resumed run counts from 0.
        self.nonfinite_in_a_row = torch.zeros((), device=device)

    @property
    def epoch(self):
        """How many epochs are finished."""
        return len(self.history)

    @property
    def model_to_validate(self):
        """The model that is validated and saved: the averaged one, if there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def min_batch(self):
        """The smallest batch for a step: BatchNorm needs two slices, and every process needs
        one."""
        return max(2 if has_batchnorm(self.model) else 1, self.world.size)

    def state_dict(self):
        return {
            "weights": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state, same_precision=True):
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if same_precision:  # else the scale would be wrong
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.history = list(state["history"])


# ---------------------------------------------------------------- a step, an epoch, the validation


def train_step(state, x, y, *, criterion, clip_grad=1.0, batch_size=None):
    """One step on images float32 (B, 1, S, S) and labels int (B,) or class shares (B, 2), on the
    device.

    `batch_size` is the number of slices over all processes, B if there is one process. A step whose
    loss, gradient or running statistics are not finite is skipped: it changes no weight, no running
    statistic, no average and nothing of the optimizer. Returns a tensor (4,) on the device: the sum
    of the losses, the number of correct predictions and of slices (all 0 if skipped), and 1 if the
    step was skipped, else 0.
    """
    state.optimizer.zero_grad(set_to_none=True)
    buffers = list(state.model.buffers())
    before = [buffer.clone() for buffer in buffers]
    with autocast(state.device, state.amp):
        logits = state.forward(x.contiguous(memory_format=torch.channels_last))
        loss = criterion(logits, y).float().sum()
    # Gradients are averaged over the processes, so that this makes them those of the mean loss of
    # the whole batch. NaN if the loss is not finite or a variance of BatchNorm has overflowed: then
    # no gradient is finite, in any process, and the step is skipped.
    forward_is_finite = torch.stack([values.isfinite().all() for values in (loss, *buffers)]).all()
    per_slice = state.world.size / (batch_size or len(x))
    state.scaler.scale(loss * torch.where(forward_is_finite, per_slice, torch.nan)).backward()

    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients)
    finite = grad_norm.isfinite()
    # Finite gradients whose norm overflows would be clipped to 0, and the optimizer would take a
    # step without them: one NaN tells the scaler to skip it.
    gradients[0].mul_(torch.where(finite, 1.0, torch.nan))
    scale = state.scaler.scale(torch.ones_like(loss))
    state.scaler.unscale_(state.optimizer)
    nn.utils.clip_grads_with_norm_(state.model.parameters(), clip_grad, grad_norm / scale)
    state.scaler.step(state.optimizer)  # does nothing if a gradient is not finite
    # After a skipped step the scaler halves its scale. Only that of float16 grows back; others stay
    # at 1, as their gradients would vanish after a hundred skipped steps.
    state.scaler.update(None if state.amp == torch.float16 else 1.0)
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(finite, buffer, old))
    if state.ema is not None and finite:
        state.ema.update_parameters(state.model)

    labels = y if y.ndim == 1 else y.argmax(1)
    correct = (logits.detach().argmax(1) == labels).sum()
    sums = torch.stack((loss.detach(), correct, torch.full_like(loss, len(x))))
    return torch.cat((torch.where(finite, sums, 0.0), (~finite).float()[None]))


def train_one_epoch(
    state,
    batches,
    *,
    criterion,
    schedule,
    image_size,
    seed=0,
    clip_grad=1.0,
    augment="full",
    mix=None,
):
    """A pass over `batches`. `schedule` holds the arguments of `lr_at`. Returns the row of the
    history: mean loss and accuracy per slice, the last learning rate, slices per second and the
    number of skipped steps."""
    epoch, n_slices, size = state.epoch + 1, len(batches.rows), batches.batch_size
    world = state.world
    state.model.train()
    start = time.perf_counter()
    augmentation = torch.Generator()
    sums = torch.zeros(4, device=state.device)
    bar = tqdm(
        batches, f"epoch {epoch}/{schedule['epochs']}", unit=" steps", leave=False,
        disable=None if world.is_main else True,
    )  # fmt: skip
    for step, (x, y) in enumerate(bar):
        batch_size = min(size, n_slices - step * size)  # over all processes
        if batch_size < state.min_batch:
            continue
        # Each process draws its own DropPath and MixUp, but augments an image as one process would.
        # Counted from 1, since trailing zeros do not change the seed.
        seed_everything(seed, epoch, step + 1, world.rank + 1)
        augmentation.manual_seed(seed_of(seed, epoch, step + 1))

        lr = lr_at((epoch - 1) * len(batches) + step, **schedule)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        x = train_transform(
            x, image_size, augment=augment != "none", flip=augment == "full",
            generator=augmentation, share=(batch_size, world.rank, world.size),
        )  # fmt: skip
        if mix is not None:
            x, y = mix(x, y)  # y becomes (B, 2), a share of each class
        done = train_step(
            state, x, y, criterion=criterion, clip_grad=clip_grad, batch_size=batch_size
        )
        sums += done
        state.nonfinite_in_a_row = (state.nonfinite_in_a_row + 1) * done[3]

        if step % 10 == 0 or step == len(batches) - 1:  # reading a number waits for a GPU
            n_nonfinite = int(state.nonfinite_in_a_row)
            if n_nonfinite >= MAX_NONFINITE_STEPS:
                raise InputError(
                    f"the loss or its gradient was not finite in {n_nonfinite} steps in "
                    f"a row, the last of them step {step + 1} of epoch {epoch}; start a new run "
                    "with a lower --lr, or with --amp off"
                )
            mean_loss = (sums[0] / sums[2].clamp(min=1)).item()
            bar.set_postfix_str(f"loss {mean_loss:.4f}, lr {lr:.2e}")

    loss, correct, used, skipped = world.sum(sums).tolist()
    used = used or float("nan")
    return {
        "train_loss": loss / used,
        "train_accuracy": correct / used,
        "lr": lr_at(epoch * len(batches) - 1, **schedule),
        "images_per_s": n_slices / (time.perf_counter() - start),
        "skipped_steps": int(skipped) // world.size,
    }


def validate(state, slices, *, image_size, batch_size):
    """(scores, remark) of the kept model on a SliceSet: see `utils.validation_scores`. In process 0
    alone, for all; along the inference path of the final test."""
    answer = None
    if state.world.is_main:
        logits = predict_logits(
            state.model_to_validate, slices, image_size=image_size, device=state.device,
            amp=state.amp, batch_size=batch_size, progress="validation",
        )  # fmt: skip
        answer = validation_scores(slices.index, logits)
    return state.world.broadcast(answer)


# ---------------------------------------------------------------- all epochs

ABOUT_ROWS = "losses and accuracies of slices, AUROC of scans:"
HEADER = "epoch        lr     loss     acc  val loss  val acc  bal acc  scan AUROC    img/s"


def format_epoch(row, best, *remarks):
    """A row of the epoch table, aligned with HEADER; remarks that are None are left out."""
    auroc = "-" if row["val_scan_auroc"] is None else f"{row['val_scan_auroc']:.3f}"
    cells = [
        f"{row['epoch']:>5}",
        f"{row['lr']:>8.2e}",
        f"{row['train_loss']:>7.4f}",
        f"{row['train_accuracy']:>6.3f}",
        f"{row['val_loss']:>8.4f}",
        f"{row['val_accuracy']:>7.3f}",
        f"{row['val_balanced_accuracy']:>7.3f}",
        f"{auroc:>10}",
        f"{row['images_per_s']:>7.1f}",
    ]
    if best:
        cells.append("best")
    if row["skipped_steps"]:
        cells.append(f"{row['skipped_steps']} steps skipped, not finite")
    return "  ".join([*cells, *(remark for remark in remarks if remark)])


def guessing_losses(p_ad, label_smoothing):
    """(guessing, lowest): the cross-entropy of a model that always predicts the frequency of AD,
    and of a perfect one, with label smoothing. p_ad (N,): the labels, 0 and 1 or soft ones."""
    target = (1 - label_smoothing) * np.asarray(p_ad) + label_smoothing / 2
    mean = target.mean()
    guessing, lowest = entr(mean) + entr(1 - mean), (entr(target) + entr(1 - target)).mean()
    return float(guessing), float(lowest)


def read_labels(train, soft_labels):
    """What the training slices of a SliceSet are trained on: the probability of AD, float64 (N,),
    which is 0 or 1 without `soft_labels`."""
    if soft_labels:
        return read_soft_labels(train.index, train.root)
    return train.is_ad.astype(float)


def describe_standstill(history, guessing, lowest):
    """A remark if the training loss is still that of guessing, and has not fallen for three epochs;
    else None."""
    losses = [row["train_loss"] for row in history[-3:]]
    margin = 0.02 * (guessing - lowest)
    if len(losses) < 3 or losses[-1] < max(guessing, losses[0]) - margin:
        return None
    return f"training loss not below {guessing:.3f}, that of guessing: not learning"


def describe_end(history, keep, guessing):
    """Lines on a run whose training loss did not end below that of guessing."""
    loss, kept = history[-1]["train_loss"], kept_row(history, keep)
    if loss < guessing:
        return
    what = f"the training loss ended at {loss:.4g}, not below {guessing:.3f}, that of guessing"
    if kept["train_loss"] < guessing:
        yield (
            f"{what}; at epoch {kept['epoch']}, which was kept, it was below, "
            f"{kept['train_loss']:.4g}; try a lower --lr"
        )
    else:
        yield f"{what}: the model has not learned; try a lower --lr"


def kept_row(history, keep):
    """The row of the epoch that is kept, or None: the last one, or the best by validation accuracy.
    Ties: lower loss, then earlier epoch."""
    if not history:
        return None
    if keep == "last":
        return history[-1]
    return max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))


def save_model(out, record, state):
    """Write best_model.pth: the model of the epoch that has just ended."""
    weights = state.model_to_validate.state_dict()
    save_checkpoint(out / "best_model.pth", **record, weights=weights, epoch=state.epoch)


def fit(state, slices, labels, args, out, record, log):
    """Train on the `labels` of `read_labels`, up to args.epochs, and keep the epoch that --keep
    names. best_model.pth, last.pth and training_history.csv are written after each epoch. Returns
    the ScalarLog of --tensorboard, or None."""
    world, order = state.world, torch.Generator()
    train, val = slices.part("train"), slices.part("val")
    batches = Batches(
        train,
        args.batch_size,
        generator=order,
        device=state.device,
        rank=world.rank,
        world=world.size,
        p_ad=labels if args.soft_labels else None,
    )
    schedule = dict(
        steps_per_epoch=len(batches),
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        lr=args.lr,
    )
    criterion = make_loss(args.label_smoothing)
    losses = guessing_losses(labels, args.label_smoothing)
    mix = make_mix(args.mixup, args.cutmix)
    if args.compile:
        state.model.compile()
        log("the model is compiled: the first step takes a minute or more")
    if world.is_main:
        plot_lr_schedule(out / "lr_schedule.png", **schedule)
        if state.history:  # a kill after last.pth leaves the other files an epoch behind
            write_csv(out / "training_history.csv", pd.DataFrame(state.history))
            if kept_row(state.history, args.keep) is state.history[-1]:
                save_model(out, record, state)

    scalars = None
    if args.tensorboard and world.is_main:
        scalars = ScalarLog(out, state.history)
    log(ABOUT_ROWS)
    if args.soft_labels:
        log(
            "loss and acc are those of the soft labels (acc: both on one side of 0.5), those of "
            "validation of the classes"
        )
    log(HEADER)
    while state.epoch < args.epochs:
        best = kept_row(state.history, args.keep)
        if best is not None and 0 < args.patience <= state.epoch - best["epoch"]:
            log(f"stopped early: no better validation in {args.patience} epochs")
            break
        if record["test_read"]:
            log(
                f"test was read after epoch {state.epoch}, and the run now trains on: all later "
                "scores on test say so"
            )
            record["test_read_after"] = [*record["test_read_after"], state.epoch]
            record["test_read"] = False
        order.manual_seed(seed_of(args.seed, state.epoch + 1))
        row = train_one_epoch(
            state,
            batches,
            criterion=criterion,
            schedule=schedule,
            image_size=args.image_size,
            seed=args.seed,
            clip_grad=args.clip_grad,
            augment=args.augment,
            mix=mix,
        )
        start = time.perf_counter()
        scores, remark = validate(
            state, val, image_size=args.image_size, batch_size=args.batch_size
        )
        scores["val_seconds"] = time.perf_counter() - start
        scores |= peak_memory(state.device)
        state.history.append({"epoch": state.epoch + 1, **row, **scores})

        is_best = kept_row(state.history, args.keep) is state.history[-1]
        if world.is_main:
            save_checkpoint(out / "last.pth", **record, **state.state_dict())
            if is_best:
                save_model(out, record, state)
            write_csv(out / "training_history.csv", pd.DataFrame(state.history))
            if scalars:
                scalars.add_row(state.history[-1])
            still = describe_standstill(state.history, *losses)
            log(format_epoch(state.history[-1], is_best and args.keep == "best", remark, still))

    if world.is_main:
        n_slices = f"{len(train.index):,} training and {len(val.index):,} validation slices"
        title = f"{out.name}: {args.model}, {n_slices}"
        if args.split_by == "slice":
            title += ", LEAKY split by slice"
        best = kept_row(state.history, args.keep)
        plot_training_curves(
            out / "training_curves.png", pd.DataFrame(state.history), best["epoch"], title
        )
    return scalars


# ---------------------------------------------------------------- data, weights, run folder


def find_data(args):
    """The folder AD_NC to train on; for --demo it is drawn into the cache, once."""
    if args.data:
        if args.resume and not os.path.isdir(args.data):
            raise InputError(
                f"the data of the run are no longer at {args.data}; name their new place with "
                "--data"
            )
        return args.data
    if args.demo:
        return draw_once(DEMO_SUBJECTS, "global", 0)
    if args.recipe == "phantom":
        return draw_once(PHANTOM_SUBJECTS, "varied", args.seed)
    if os.path.isdir("AD_NC"):
        return "AD_NC"
    raise InputError(
        "no data: there is no ./AD_NC here, and neither --data nor --demo was given\n"
        "  python train.py --data AD_NC    trains on {train,test}/{AD,NC}/<scan>_<slice>.jpeg\n"
        "  python train.py --demo          needs no data: it draws a synthetic set first"
    )


def draw_once(n_subjects, cue, seed):
    """The AD_NC of a phantom set in the cache, drawn on the first call."""
    name = f"phantom-{cue}-{n_subjects}-{seed}-v{PHANTOM_VERSION}"
    folder = pixels.cache_folder() / name
    if not folder.is_dir():
        print(
            f"drawing a phantom set of {n_subjects:,} subjects into {folder}, once; this takes a "
            "few minutes",
            flush=True,
        )
        pixels.make_cache_folder()
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            draw(Path(temporary) / "set", n_subjects, seed, cue=cue)
            try:
                os.rename(Path(temporary) / "set", folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    return folder / "AD_NC"


def load_init(model, path, log):
    """Fill the model from the file of --init. Returns what is known about these weights: the file's
    name and the exposure of their training, None if the file does not record it."""
    if path == "phantom":
        path = PHANTOM
    content = load_tensors(path)
    named = content if isinstance(content, dict) else {}  # else find_state_dict refuses it
    is_ours = {"format", "exposure", "model"} <= named.keys()
    if is_ours:
        content = load_checkpoint(path)  # refuses another version
    if is_ours and "members" in content:
        raise InputError(f"--init {path} is an ensemble; expected a single model")
    try:
        loaded, left = load_weights(model, find_state_dict(content))
    except ValueError as problem:
        advice = ""
        if is_ours:
            advice = f"; these are weights of --model {content['model']['variant']}"
        raise InputError(f"--init {path}: {problem}{advice}") from None
    log(
        f"--init {path}: {len(loaded)} of {len(model.state_dict())} tensors loaded, left: "
        f"{', '.join(left) or 'none'}"
    )
    exposure = content["exposure"] if is_ours else None
    if exposure is None:
        log(
            "--init does not record its training subjects; if subjects of val or test are among "
            "them, scores LEAK"
        )
    return {"file": os.path.basename(path), "exposure": exposure}


def make_record(args, slices, state, model_args, init):
    """What a checkpoint records beside the weights: everything that predict.py needs.

    `exposure` holds the subjects and scans that the weights were trained and chosen on. `test_read`
    is whether test was evaluated after the last epoch; `test_read_after` are the epochs after which
    it was, and the run then trained on.
    """
    index = slices.index
    train = index[index.split == "train"]
    deep = index.bits[index.depth > 0]
    drawn = is_varied_set(slices.root, index)
    exposure = subjects.record_exposure(index[index.split != "test"], drawn)  # trained, chosen on
    if init and init["exposure"]:
        exposure = subjects.merge_exposure(exposure, init["exposure"])  # inherited from --init
    elif init:  # it may have seen anyone
        exposure.update(drawn=False, unknown=True)
    mean_slice = pixels.mean_slice(slices.images, slices.rows[index.split == "train"])
    slice_stats = pixels.stats_range(train)
    if exposure["drawn"]:
        slice_stats["height"] = slice_stats["width"] = DRAWN_SIDES
    names = index.path.map(lambda path: os.path.relpath(path, slices.root))
    return {
        "model": model_args,
        "classes": list(CLASSES),
        "image_size": args.image_size,
        "slice_size": list(slices.images.shape[1:]),
        "mean": MEAN,
        "std": STD,
        "bits": int(deep.max()) if len(deep) else None,  # of 16-bit files
        "extraction": recorded_look(slices.root),  # how volumes were cut; None: elsewhere
        "slice_stats": slice_stats,
        # The average of all training slices, which attributions compare a slice with.
        "mean_slice": torch.from_numpy(mean_slice.round().astype(np.uint8)),
        "split_by": args.split_by,
        "split_hash": subjects.split_hash(index),
        "data_hash": fingerprint("\n".join(sorted(names + " " + index.pixel_hash))),
        "group_hash": fingerprint("\n".join(sorted(set(index.scan + " " + index.group)))),
        "exposure": exposure,
        "init": init,
        "test_read": False,
        "test_read_after": [],
        "data": os.path.abspath(slices.root),
        "flags": vars(args),
        "precision": precision_name(state.amp),
        "machine": describe_machine(state),
        "earlier_epochs": [],  # the --epochs that the run had before it was resumed with others
        "epochs_elsewhere": 0,  # trained on another machine, or in another precision
        "versions": package_versions(),
        "earlier_versions": [],  # of the packages that the run used before it was resumed
    }


def package_versions():
    versions = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
    for name in ("torchvision", "numpy", "pandas", "pillow", "scikit-learn"):
        versions[name] = metadata.version(name)
    return versions


def describe_machine(state):
    """What the bits of a run depend on, beside the versions of the packages."""
    threads = count(torch.get_num_threads(), "thread")
    return f"{device_name(state.device)}, {threads}, {count(state.world.size, 'process')}"


def write_start(out, args, slices, record):
    """config.json with every flag, split.csv, and with --skip-bad skipped.csv."""
    used = {name: record[name] for name in ("data", "precision", "machine")}
    history = {name: record[name] for name in ("earlier_epochs", "versions", "earlier_versions")}
    write_json(out / "config.json", {"flags": vars(args), "used": used, **history})
    split = pd.concat([slices.index, slices.unused.assign(split=subjects.UNUSED)])
    split = split[["path", "label", "scan", "slice", "subject", "split", "group"]]
    split = split.assign(path=[os.path.relpath(path, slices.root) for path in split.path])
    write_csv(out / "split.csv", split)
    if args.skip_bad:
        write_csv(out / "skipped.csv", pd.DataFrame(slices.bad, columns=["path", "reason"]))


def restore(state, last, record, args, out, log):
    """Put last.pth, as loaded, back into `state`, and log what differs now. InputError if the data
    changed."""
    if args.epochs < last["epoch"]:
        raise InputError(
            f"--epochs is {args.epochs}, but {out} has trained {last['epoch']}; expected no fewer"
        )
    if last["split_hash"] != record["split_hash"]:
        raise InputError(
            f"the slices are not those that {out} was trained on; expected the same files, split "
            "and subjects"
        )
    if last["data_hash"] != record["data_hash"]:
        raise InputError(
            f"some files show other pixels than when {out} was started; restore them, or start a "
            "new run"
        )
    kept = kept_row(last["history"], args.keep)
    # The model of the last epoch is in last.pth, too.
    if kept and kept["epoch"] < last["epoch"] and not (out / "best_model.pth").exists():
        raise InputError(f"{out / 'best_model.pth'} is gone; restore it, or start a new run")
    state.load_state_dict(last, same_precision=last["precision"] == record["precision"])
    for name in ("test_read", "test_read_after"):
        record[name] = last[name]
    record["earlier_epochs"] = last.get("earlier_epochs", [])

    log(f"resumed after epoch {state.epoch}")
    if last["flags"]["epochs"] != args.epochs and state.epoch > 0:
        change = f"the cosine now ends at epoch {args.epochs}, the learning rate jumps here"
        if args.epochs == state.epoch:
            change = "the run ends here, in the middle of its schedule"
        log(
            f"--epochs was {last['flags']['epochs']}: {change}, and the run is not the one that "
            "started with this length (config.json keeps both)"
        )
        record["earlier_epochs"] = [*record["earlier_epochs"], last["flags"]["epochs"]]
    if last["flags"]["compile"] != args.compile:
        was, now = (
            "compiled" if compiled else "not compiled"
            for compiled in (last["flags"]["compile"], args.compile)
        )
        log(f"so far the run was {was}, now it is {now}: its bits will differ")
    record["epochs_elsewhere"] = last.get("epochs_elsewhere", 0)
    for name in ("precision", "machine"):
        if last[name] != record[name]:
            record["epochs_elsewhere"] = last["epoch"]
            log(f"so far the run used {last[name]}, now {record[name]}: its bits will differ")
    before, now = last.get("versions", {}), record["versions"]
    record["earlier_versions"] = last.get("earlier_versions", [])
    changed = [name for name in now if before.get(name, "unknown") != now[name]]
    if changed:
        record["earlier_versions"] = [*record["earlier_versions"], before]
        was = ", ".join(f"{name} {before.get(name, 'unknown')}" for name in changed)
        are = ", ".join(f"{name} {now[name]}" for name in changed)
        log(f"so far the run used {was}, now {are}: its bits may differ (config.json keeps both)")


def check_batches(state, n_slices, batch_size):
    """Lines on batches that BatchNorm or several processes leave out; InputError if nothing can be
    trained."""
    if has_batchnorm(state.model) and state.world.size > 1 and state.device.type != "cuda":
        raise InputError(
            "PyTorch has BatchNorm over several processes on CUDA only; start one process"
        )
    if min(batch_size, n_slices) < state.min_batch:
        raise InputError(
            f"a batch needs {state.min_batch} slices or more (BatchNorm, or one for each process); "
            f"--batch-size is {batch_size}, and there are {n_slices:,} training slices"
        )
    if batch_size > n_slices:
        yield (
            f"--batch-size is {batch_size}, and there are {n_slices:,} training slices: one step "
            "an epoch"
        )
    rest = n_slices % batch_size
    if 0 < rest < state.min_batch:
        yield (
            f"the last batch of each epoch has {rest} of {n_slices:,} slices, too few for "
            f"BatchNorm or for {state.world.size} processes; it is left out. Which slices it has "
            "changes with each epoch"
        )


def describe_average(decay, n_steps):
    """A line if a run is shorter than what --ema averages over."""
    if decay and n_steps < 1 / (1 - decay):
        yield (
            f"--ema {decay:g} averages over about {1 / (1 - decay):,.0f} steps, and the run has "
            f"{n_steps:,}: its decay starts low and ends at {(1 + n_steps) / (10 + n_steps):.2f}"
        )


def command(*words):
    """A command as the user would type it here: relative paths for what is below the working
    directory."""
    relative = []
    for word in map(str, words):
        if os.path.isabs(word) and not os.path.relpath(word).startswith(".."):
            word = os.path.relpath(word)
        relative.append(word)
    return shlex.join(relative)


# ---------------------------------------------------------------- the final evaluation


def evaluate_kept_model(slices, args, out, test_read_after, *, device, amp, log):
    """Calibrate the kept model on val, then evaluate it on val and, once, on test, along the path
    of predict.py.

    What is learned here, from train and val alone, goes into best_model.pth: baselines and
    calibration. So does the conclusion from test. Returns the last lines of the log: the three
    sentences of the conclusion, and before them a warning if the model failed on val.
    """
    path = out / "best_model.pth"
    checkpoint = load_checkpoint(path)
    checkpoint["test_read_after"] = test_read_after
    for line in describe_background(slices.index):
        log(line)
    log("fitting the baselines, and measuring the scale of attribution maps")
    checkpoint["baselines"] = fit_baselines(slices)
    checkpoint["map_scale"] = measure_map_scale(
        checkpoint, build_model(checkpoint), slices.part("train"), device
    )
    titles = {"val": "validation (epoch and calibration were chosen on it)", "test": "test"}
    if args.keep == "last":
        log(f"last epoch {checkpoint['epoch']}")
        titles["val"] = "validation (calibration was chosen on it)"
    else:
        log(f"best epoch {checkpoint['epoch']}, chosen by validation accuracy")
    if args.folds is not None:
        pooled = " and test" if args.pool_test else ""
        titles["test"] = f"fold {args.fold} of {args.folds}, held out of train{pooled}"

    warning = None
    init = checkpoint["init"]
    for split, title in titles.items():
        part = slices.part(split)
        # In the order of predict.py: same batches, same bits.
        part.index = part.index.sort_values(["scan", "slice"])
        exposure = checkpoint["exposure"]
        stated = assess.statements(checkpoint)
        leaks, notes = stated["leaks"], stated["notes"]
        if split == "val":  # it was chosen on by design: seen means seen by the weights of --init
            exposure = subjects.record_exposure(slices.index[:0])
            if init:
                exposure = init["exposure"] or {**exposure, "unknown": True}
            if leaks:
                leaks = ["trained on other slices of the same scans"]
        predictions = predict_slices(
            checkpoint, part, device=device, amp=amp, batch_size=args.batch_size, exposure=exposure
        )
        if split == "val":
            calibration = calibrate(predictions, args.threshold)
            calibration["with_dark_share"] = fit_with_dark_share(predictions)
            checkpoint["calibration"] = calibration
            save_checkpoint(path, **checkpoint)
            log(describe_calibration(calibration, predictions))
        predictions = apply_calibration(predictions, calibration, assess.COVERAGE)
        scores = assess.write_results(
            predictions,
            out / split,
            title=title,
            leaks=leaks,
            notes=notes,
            coverage=assess.COVERAGE,
            calibration=calibration,
        )
        if split == "val":  # it was chosen on: a line is enough
            log(
                f"{scores['title']}: accuracy slice-level "
                f"{assess.cell(scores['slice'], 'accuracy')}, scan-level "
                f"{assess.cell(scores['scan'], 'accuracy')}"
            )
            share_ad = part.is_ad.mean()
            larger = max(share_ad, 1 - share_ad)
            if scores["slice"]["accuracy"] <= larger:
                warning = (
                    "on validation the kept model is no better than the larger class: slice-level "
                    f"accuracy {scores['slice']['accuracy']:.3f}, larger class {larger:.3f}"
                )
    *lines, first, second, third = assess.format_assessment(scores)
    log("\n".join(lines))
    checkpoint["conclusion"] = scores["conclusion"]  # of test, for the report of a prediction
    save_checkpoint(path, **checkpoint)
    return [line for line in (warning, first, second, third) if line]


def write_resources(out, state, n_train, epochs_elsewhere):
    """Write resources.json, what the run has cost on this machine; returns a line about it. That of
    another machine stays if this one has trained no epoch."""
    if epochs_elsewhere == state.epoch and (out / "resources.json").exists():
        return "resources.json stays as it is: no epoch was trained on this machine"
    checkpoint = load_checkpoint(out / "best_model.pth")
    used = measure_resources(
        build_model(checkpoint).to(state.device, memory_format=torch.channels_last),
        state.history[epochs_elsewhere:],
        image_size=checkpoint["image_size"],
        n_train=n_train,
        device=state.device,
        amp=state.amp,
    )
    used["machine"] = describe_machine(state)
    used["precision"] = precision_name(state.amp)
    used["versions"] = package_versions()
    write_json(out / "resources.json", used)
    return describe_resources(used)


def describe_calibration(calibration, predictions):
    unit = "subjects"
    if predictions.subject.isna().any():
        unit = "subjects (or scans of unknown subjects)"
    text = (
        f"calibrated on the {calibration['groups']} {unit} of validation: temperature "
        f"{calibration['temperature']:.3f}, threshold {calibration['threshold']:.3f}"
    )
    if max_coverage(calibration, assess.COVERAGE) is not None:
        text += (
            f"; too few subjects for a coverage of {assess.COVERAGE}: every prediction set is AD|NC"
        )
    return text


# ---------------------------------------------------------------- from the flags to the evaluation


def main(argv=None):
    args = parse_args(argv)
    if args.out and not args.resume:
        require_new(args.out, "--out, or add --resume")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS demands
        torch.use_deterministic_algorithms(True)
    world, device = distributed.join(pick_device(distributed.own_device(args.device)))
    amp = pick_amp(args.amp, device)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not args.deterministic

    advice = f"lower --batch-size ({args.batch_size}) first, then --image-size ({args.image_size})"
    with explain_out_of_memory(advice):
        train(args, world, device, amp)


def train(args, world, device, amp):
    """Read the data, build the model, make or open the run folder, train, evaluate."""
    with world.main_first():  # one process fills the cache
        split_file = args.split
        if args.resume and split_file:
            split_file = Path(args.out) / "split.csv"  # the same split, which cannot have moved
        slices = load_set(
            find_data(args),
            val_fraction=args.val_fraction,
            split_by=args.split_by,
            seed=args.seed,
            split_file=split_file,
            fold=args.fold,
            folds=args.folds,
            pool_test=args.pool_test,
            drop_test_subjects=args.drop_test_subjects,
            n_subjects=args.subjects,
            skip_bad=args.skip_bad,
            use_cache=not args.no_cache,
            subject_pattern=args.subject_pattern,
            progress="decoding" if world.is_main else None,
        )

    lines = []  # for the log, whose folder is made when nothing can fail any more
    seed_everything(args.seed)
    model_args = dict(
        variant=args.model, in_chans=1, num_classes=len(CLASSES), drop_path_rate=args.drop_path,
        **args.model_args,
    )  # fmt: skip
    model = make_model(**model_args)
    last, init = None, None
    if args.resume:
        last = load_checkpoint(Path(args.out) / "last.pth")
        init = last["init"]
    elif args.init:
        init = load_init(model, args.init, lines.append)
    state = TrainState(
        model,
        device=device,
        amp=amp,
        lr=args.lr,
        weight_decay=args.weight_decay,
        ema=args.ema,
        world=world,
    )
    record = make_record(args, slices, state, model_args, init)
    labels = read_labels(slices.part("train"), args.soft_labels)
    n_train = len(labels)
    lines += check_batches(state, n_train, args.batch_size)
    lines += describe_average(args.ema, args.epochs * math.ceil(n_train / args.batch_size))

    out = Path(args.out) if args.out else None
    if world.is_main and not args.resume:
        if out is None:
            leaky = "-LEAKY" if args.split_by == "slice" else ""
            out = unused_name(f"runs/{datetime.now():%Y%m%d-%H%M%S}-{args.model}{leaky}")
        new_folder(out)
    out = Path(world.broadcast(str(out)))
    log = make_log(out / "training_log.txt") if world.is_main else lambda line="": None
    if last:
        restore(state, last, record, args, out, log)
    if world.is_main:
        write_start(out, args, slices, record)
        # So that a run stopped in its first epoch can be resumed, and with the flags given now.
        save_checkpoint(out / "last.pth", **record, **state.state_dict())

    n_parameters = sum(p.numel() for p in model.parameters())
    log(
        f"{describe_model(args.model)}, {n_parameters:,} parameters, {args.image_size} px, "
        f"{device}, {precision_name(amp)}, {count(world.size, 'process')}; "
        f"run folder {out}"
    )
    for line in slices.notes:
        log(line)
    if len(slices.unused):
        log(f"not used: {count(len(slices.unused), 'slice')} of the set, as split.csv says")
    for line in subjects.describe_split(slices.index, args.split_by, slices.dropped):
        log(line)
    for line in subjects.describe_validation(slices.index):
        log(line)
    for line in subjects.describe_transfer(slices.index, init):
        log(line)
    if init and init["exposure"]:
        for line in subjects.describe_same_names(slices.index, init["exposure"]):
            log(f"--init: {line}")
    if device.type == "cpu" and is_busy():
        log("this machine is busy: set OMP_NUM_THREADS=1, or training may take many times as long")
    for line in lines:
        log(line)
    if args.skip_bad:
        log(f"left out, and listed in skipped.csv: {len(slices.bad)} files that cannot be used")

    resume = command(sys.executable, os.path.abspath(__file__), "--out", out, "--resume")
    resume = f"{out / 'last.pth'} holds the last finished epoch; resume with:\n  {resume}"
    try:
        with world.needed():
            scalars = fit(state, slices, labels, args, out, record, log)
        world.leave()
        if world.is_main:
            record["test_read"] = True
            save_checkpoint(out / "last.pth", **record, **state.state_dict())
            last_lines = evaluate_kept_model(
                slices, args, out, record["test_read_after"], device=device, amp=amp, log=log
            )
            log("measuring the latency of a prediction")
            log(write_resources(out, state, n_train, record["epochs_elsewhere"]))
            if scalars:
                epoch = kept_row(state.history, args.keep)["epoch"]
                for part in ("val", "test"):
                    scalars.add_scores(part, read_json(out / part / "metrics.json"), epoch)
                scalars.close()
    except KeyboardInterrupt:
        log(f"stopped by Ctrl-C; {resume}")
        sys.exit(130)
    except OSError as problem:
        raise OSError(f"{problem}\n{resume}") from None

    if not world.is_main:
        return
    log(f"pictures in {out} and {out / 'test'}")
    if args.folds is None:
        log(f"predict again with:\n  {how_to_predict(slices.root, out, assess.is_drawn(record))}")
    if args.demo:
        log("this was a demonstration on drawings: what follows says nothing about real slices")
    guessing, _ = guessing_losses(labels, args.label_smoothing)
    for line in (*describe_end(state.history, args.keep, guessing), *last_lines):
        log(line)


def is_busy():
    """Whether other processes use the cores, and PyTorch was not told to use one thread."""
    if torch.get_num_threads() == 1 or not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def how_to_predict(root, out, drawn):
    """The command that predicts test/ with the model of a run; `drawn` is whether it has seen
    drawings alone, and so gives no prediction sets."""
    predict = Path(__file__).with_name("predict.py")
    model = ["--checkpoint", out / "best_model.pth"]
    if not drawn:
        model += ["--coverage", assess.COVERAGE]
    return command(sys.executable, predict, Path(root) / "test", *model)


if __name__ == "__main__":
    run_script(main)
