"""One epoch: a pass of training steps over the training slices, and the validation behind it.

Not run by itself; train.py calls both, once an epoch, and keeps what they leave.
"""

import time
from itertools import islice

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import parallel
import slices
import utils
from dataset import CLASSES
from engine import micro_batch
from metrics import arrays, point_figures, with_predictions

NOT_FINITE = 20  # steps in a row without a finite gradient end the run


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


def start_of_epoch(job, in_a_row=0.0):
    """The progress within an epoch before its first step (see `train_epoch`)."""
    return {"step": 0, "sums": torch.tensor([0.0, 0.0, 0.0, 0.0, in_a_row], device=job.device)}


def train_epoch(state, batches, n, args, job, *, epoch, forward, mix, progress):
    """One pass over the n training slices, from step progress["step"] on; `forward` is the model, or what wraps it.
    Returns the mean loss and accuracy by slice, and slices a second. A signal ends the pass after the step.

    progress["sums"] is kept on the device: loss, right answers and number of slices of this process, steps that were
    skipped because their gradient was not finite, and how many of them just now in a row (then a ValueError ends the
    run). Everything random in a step comes from (seed, epoch, step), so that it can be gone on with from any of them.
    """
    model, ema, optimizer, scaler = state
    device, ranks, sums = job.device, job.ranks, progress["sums"]
    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing, reduction="none")
    at_once = micro_batch(device, args.image_size, args.image_size)
    start, first, augmentation = time.perf_counter(), progress["step"], torch.Generator()
    bar = tqdm(islice(batches, first, None), f"epoch {epoch}/{args.epochs}", len(batches), initial=first, unit=" steps",
               leave=False, disable=True if ranks.rank > 0 else None)
    for i, (x, y) in enumerate(bar, first):
        utils.seed_everything(args.seed, epoch, i + 1, ranks.rank + 1)  # each process drops other paths ...
        augmentation.manual_seed(utils.seed_of(args.seed, epoch, i + 1))  # ... of the same images
        size = min(args.batch_size, n - i * args.batch_size)  # of the batch, over all processes
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
        found = torch.zeros(3, device=device)
        for at in range(0, len(x), at_once):
            part, labels = x[at : at + at_once], y[at : at + at_once]
            with utils.autocast(device, job.amp):
                logits = forward(part.contiguous(memory_format=torch.channels_last))
                losses = criterion(logits, labels)[: max(0, mine - at)].float()
            loss = losses.sum()
            # the mean over processes of these, summed over the parts, is the mean over the batch; a loss that is not
            # finite shall have no finite gradient, in no process
            scaler.scale(loss * torch.where(loss.isfinite(), ranks.world / size, torch.nan)).backward()
            right = logits.detach().argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
            found += torch.stack((loss.detach(), right[: len(losses)].sum(), torch.full_like(loss, len(losses))))
        scaler.unscale_(optimizer)
        finite = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad).isfinite()
        scaler.step(optimizer)  # if it is finite
        scaler.update()
        if ema is not None:
            ema.update_parameters(model)
        sums[:3] += torch.where(finite, found, 0.0)
        sums[3] += ~finite
        sums[4] = torch.where(finite, 0.0, sums[4] + 1)
        progress["step"] = i + 1
        if i % 10 == 0 or i == len(batches) - 1:  # .tolist() waits for a GPU
            loss, _, used, _, in_a_row = sums.tolist()
            if in_a_row >= NOT_FINITE:
                raise ValueError(f"the loss or its gradient was not finite in {in_a_row:.0f} steps in a row, the last "
                                 f"of them step {i + 1} of epoch {epoch}; lower --lr, or try --amp off")
            rate = (i + 1 - first) * args.batch_size / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss / max(1, used):.4f}, lr {lr:.2e}, {rate:.0f} images/s")
        if parallel.agree(job.signals, ranks):
            break
    loss, right, used = parallel.total(sums[:3].clone(), ranks).tolist()
    used = used or float("nan")
    seen = min(progress["step"] * args.batch_size, n) - first * args.batch_size
    return {"train_loss": loss / used, "train_accuracy": right / used,
            "lr": utils.lr_at(epoch * len(batches) - 1, steps_per_epoch=len(batches), **schedule(args)),
            "images_per_s": max(0, seen) / (time.perf_counter() - start), "skipped_steps": int(sums[3].item())}


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
