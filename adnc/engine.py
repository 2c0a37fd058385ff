"""The training loop: the state of a run, a step, an epoch, the validation behind it.

Not run by itself; train.py goes through the epochs and keeps what they leave.
"""

import time
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2
from tqdm import tqdm

from adnc.cpu_engine import micro_batch, predict_logits
from adnc.scoring.metrics import THRESHOLD, arrays, expit, point_scores, with_predictions
from adnc.distributed import seed_everything
from adnc.data.augment import train_transform
from adnc.cli import CLASSES, InputError, lr_at, seed_of

NOT_FINITE = 20  # steps in a row without a finite gradient end the run
SUMS = ("loss", "correct", "slices", "skipped", "skipped_in_a_row")


def make_optimizer(model, lr, weight_decay):
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices and kernels only, not on biases, norms and gamma."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def make_mix(args):
    """MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019), one of them a batch; None if both are off."""
    kinds = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    mixes = [kind(alpha=alpha, num_classes=len(CLASSES)) for kind, alpha in kinds if alpha > 0]
    return v2.RandomChoice(mixes) if mixes else None


class TrainState:
    """All that a training step changes: model, EMA of its weights (or None), optimizer, scaler, history (a row an
    epoch), the step within the epoch behind it, and running sums over these steps.

    Random states are not among it: what is random in a step comes from (seed, epoch, step). `sums` are kept on the
    device: loss, right answers and number of slices of this process, steps skipped because their gradient was not
    finite, and how many of them in a row until now.
    """

    def __init__(self, model, runtime, *, lr, weight_decay=1e-4, ema=0.0):
        self.model = model.to(runtime.device, memory_format=torch.channels_last)
        # with BatchNorm a batch is not taken in parts or filled up: its statistics count
        self.whole = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        self.forward = model  # or what wraps it, see `train.make_batches`
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
        self.optimizer = make_optimizer(model, lr, weight_decay)
        # skips a step whose gradient is not finite; scales the loss for float16 only, elsewhere by 1 (after a skipped
        # step by 1/2, which changes no bit)
        scaling = {} if runtime.amp == torch.float16 else dict(init_scale=1.0, growth_interval=2**31 - 1)
        self.scaler = torch.amp.GradScaler(runtime.device.type, **scaling)
        self.runtime, self.history = runtime, []
        self.sums = {"skipped_in_a_row": torch.zeros((), device=runtime.device)}
        self.start_epoch()

    @property
    def epoch(self):
        """How many epochs are finished."""
        return len(self.history)

    @property
    def kept(self):
        """The model that is validated and kept: the averaged one, if there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def least(self):
        """The size of the smallest batch that a step can be taken on: BatchNorm has no statistics of one slice, and no
        process may be without any."""
        return max(2, self.runtime.world) if self.whole else 1

    def start_epoch(self):
        zero, in_a_row = torch.zeros((), device=self.runtime.device), self.sums["skipped_in_a_row"]
        self.step, self.sums = 0, dict.fromkeys(SUMS, zero) | {"skipped_in_a_row": in_a_row}

    def numbers(self):
        """The running sums as numbers; this waits for a GPU."""
        return dict(zip(SUMS, torch.stack([self.sums[name] for name in SUMS]).tolist()))

    def state_dict(self, sums=None):
        return {"weights": self.model.state_dict(), "ema": self.ema.state_dict() if self.ema is not None else None,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "epoch": self.epoch,
                "history": self.history, "step": self.step, "sums": sums or [self.numbers()] * self.runtime.world}

    def load_state_dict(self, state, same_precision=True):
        """`state["sums"]` has those of each process; where there were others than now, the first takes over what all of
        them have summed. The scale of another precision would be wrong and is not taken over."""
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if same_precision:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.history, self.step, sums, rank = list(state["history"]), state["step"], state["sums"], self.runtime.rank
        mine = sums[rank] if len(sums) == self.runtime.world else sums[0] | {
            name: sum(part[name] for part in sums) * (rank == 0) for name in SUMS[:3]}
        self.sums = {name: torch.tensor(float(mine[name]), device=self.runtime.device) for name in SUMS}


def check_batches(state, n, args):
    """Lines on what BatchNorm does to the batches of n training slices; InputError where it cannot be trained."""
    least = state.least
    if not state.whole:
        return []
    if state.runtime.world > 1 and state.runtime.device.type != "cuda":
        raise InputError("PyTorch has BatchNorm over several processes on CUDA only, and this is "
                         f"{state.runtime.device}; start one process, or take a model without BatchNorm")
    if min(args.batch_size, n) < least:
        raise InputError(f"BatchNorm needs {least} slices in a batch; --batch-size is {args.batch_size}, and there are "
                         f"{n:,} training slices")
    over = n % args.batch_size
    return [f"the last batch of an epoch would have {over} of {n:,} slices, too few for BatchNorm: it is left out, "
            "in each epoch another"] * (0 < over < least)  # fmt: skip


def train_step(state, x, y, *, label_smoothing=0.1, clip_grad=1.0, size=None):
    """One step of the optimizer on images float32 (B, 1, S, S) and labels int (B,) or shares of the classes (B, 2).

    `size` is that of the batch over all processes (B if there is one); the images of this process beyond its share fill
    the batch up and count for nothing. A step whose loss or gradient is not finite is skipped and counted.
    """
    runtime, scaler, size = state.runtime, state.scaler, size or len(x)
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing, reduction="none")
    mine, at_once = runtime.share(size), len(x) if state.whole else micro_batch(runtime.device, *x.shape[2:])
    state.optimizer.zero_grad(set_to_none=True)
    found = torch.zeros(3, device=runtime.device)
    for at in range(0, len(x), at_once):
        part, labels = x[at : at + at_once], y[at : at + at_once]
        with runtime.autocast():
            logits = state.forward(part.contiguous(memory_format=torch.channels_last))
            losses = criterion(logits, labels)[: max(0, mine - at)].float()
        loss = losses.sum()
        # the mean over processes of these, summed over the parts, is the mean over the batch; a loss that is not
        # finite shall have no finite gradient, in no process
        scaler.scale(loss * torch.where(loss.isfinite(), runtime.world / size, torch.nan)).backward()
        right = logits.detach().argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
        found += torch.stack((loss.detach(), right[: len(losses)].sum(), torch.full_like(loss, len(losses))))
    scaler.unscale_(state.optimizer)
    finite = nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad).isfinite()
    scaler.step(state.optimizer)  # if it is finite
    scaler.update()
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    sums = state.sums
    for name, value in zip(SUMS, torch.where(finite, found, 0.0)):
        sums[name] = sums[name] + value
    sums["skipped"] = sums["skipped"] + ~finite
    sums["skipped_in_a_row"] = torch.where(finite, 0.0, sums["skipped_in_a_row"] + 1)
    state.step += 1


def train_one_epoch(state, batches, n, args, mix=None):
    """A pass over the n training slices, from state.step on; a signal ends it after the step. Returns what the history
    says about it: mean loss and slice-level accuracy, learning rate, slices a second. Everything random in a step comes
    from (seed, epoch, step), so that it can be resumed from any of them."""
    runtime, epoch, first = state.runtime, state.epoch + 1, state.step
    device, rank = runtime.device, runtime.rank
    state.model.train()
    start, augmentation, lr = time.perf_counter(), torch.Generator(), 0.0
    bar = tqdm(islice(batches, first, None), f"epoch {epoch}/{args.epochs}", len(batches), initial=first, unit=" steps",
               leave=False, disable=None if runtime.is_rank_0 else True)
    for i, (x, y) in enumerate(bar, first):
        seed_everything(args.seed, epoch, i + 1, rank + 1)  # each process drops other paths ...
        augmentation.manual_seed(seed_of(args.seed, epoch, i + 1))  # ... of the same images
        size = min(args.batch_size, n - i * args.batch_size)  # of the batch, over all processes
        if size < state.least:
            state.step += 1
            continue
        lr = lr_at((epoch - 1) * len(batches) + i, **schedule(args, len(batches)))
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        x = train_transform(x, args.image_size, augment=not args.no_augment, flip=not args.no_flip,
                            generator=augmentation, part=(size, rank, runtime.world))
        if mix is not None:
            x, y = mix(x, y)  # y becomes (N, 2), a share of each class
        train_step(state, x, y, label_smoothing=args.label_smoothing, clip_grad=args.clip_grad, size=size)
        if i % 10 == 0 or i == len(batches) - 1:  # to read the sums waits for a GPU
            now = state.numbers()
            if now["skipped_in_a_row"] >= NOT_FINITE:
                raise InputError(f"the loss or its gradient was not finite in {now['skipped_in_a_row']:.0f} steps in a "
                                 f"row, the last of them step {i + 1} of epoch {epoch}; start a new run with a lower "
                                 "--lr, or with --amp off")
            rate = (i + 1 - first) * args.batch_size / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {now['loss'] / max(1, now['slices']):.4f}, lr {lr:.2e}, {rate:.0f} images/s")
        if runtime.stop_requested():
            break
    loss, correct, used = runtime.total(torch.stack([state.sums[name] for name in SUMS[:3]])).tolist()
    used = used or float("nan")
    done = min(state.step * args.batch_size, n) - first * args.batch_size
    return {"train_loss": loss / used, "train_accuracy": correct / used,
            "lr": lr_at(epoch * len(batches) - 1, **schedule(args, len(batches))),
            "images_per_s": max(0, done) / (time.perf_counter() - start), "skipped_steps": int(state.sums["skipped"])}


def schedule(args, steps_per_epoch):
    """The arguments of `lr_at` that do not change in a run."""
    return dict(steps_per_epoch=steps_per_epoch, epochs=args.epochs, warmup_epochs=args.warmup_epochs, lr=args.lr)


def validate(state, slices, args):
    """Scores of the model that is kept on a SliceSet: slice-level, scan-level AUROC, the loss; and a remark or "". None
    if the run is to stop. (See `inference.predict_logits`, which the final test goes through as well.)"""
    runtime = state.runtime

    def predict(index):
        z = predict_logits(state.kept, replace(slices, index=index), vars(args), runtime, batch_size=args.batch_size,
                           bar="validation" if runtime.is_rank_0 else None)
        return None if z is None else index.assign(logit=z, p_AD=expit(z))

    predictions = runtime.by_parts(slices.index.assign(threshold=THRESHOLD, exposure="", out_of_range=None,
                                                       prediction_set=None), predict)
    if predictions is None:
        return None
    predictions = with_predictions(predictions)
    p = predictions.p_AD.where(predictions.label == "AD", 1 - predictions.p_AD)  # of the right class
    per_slice, per_scan = (point_scores(*arrays(predictions, unit)[:3]) for unit in ("slice", "scan"))
    scores = {
        "val_loss": float(-np.log(p.clip(lower=1e-12)).mean()),
        "val_accuracy": per_slice["accuracy"],
        "val_balanced_accuracy": per_slice["balanced_accuracy"],
        "val_scan_auroc": per_scan["auroc"],
    }
    if predictions.prediction.nunique() == 1:
        return scores, f"predicts {predictions.prediction.iloc[0]} for every slice: not learning yet"
    return scores, ""
