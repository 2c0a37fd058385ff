"""One process or several: what a run needs to know of the others.

Not run by itself; torchrun starts train.py as often as there are GPUs:

    torchrun --nproc-per-node 4 train.py --data AD_NC          # four GPUs; with --nnodes also on several machines

Every process walks through the same batches in the same order, takes every N-th slice of each, and the gradients are
averaged (DistributedDataParallel), so that N processes take the steps that one would take. Process 0 alone writes.
"""

import os
from typing import NamedTuple

import pandas as pd
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Ranks(NamedTuple):
    """This process's number, how many there are, and its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def share(self, n):
        """How many of the n rows of a batch are this process's: those at rank, rank + world, ..."""
        return len(range(self.rank, n, self.world))


def start(device):
    """Join the processes of torchrun, if there are any. Returns (Ranks, device), the device being this process's."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or not {"RANK", "LOCAL_RANK"} <= set(os.environ):  # a scheduler may set the first alone
        return Ranks(), device
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        if device.index is None:
            if ranks.local >= torch.cuda.device_count():
                raise ValueError(f"process {ranks.local} of this machine has no GPU, there are "
                                 f"{torch.cuda.device_count()}; start as many with --nproc-per-node")
            device = torch.device("cuda", ranks.local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return ranks, device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model, ranks, device):
    """The model to call in a training step; its gradients are the means over all processes."""
    if ranks.world == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def one_after_the_other(ranks, work):
    """`work()` in process 0, then in the others: what the first leaves in a cache, they find."""
    first = []
    from_rank_0(ranks, lambda: first.append(work()))
    return first[0] if first else work()


def from_rank_0(ranks, work):
    """What `work()` returns in process 0, in all of them. If it fails on wrong input, the others end without a word."""
    if ranks.world == 1:
        return work()
    value, problem = None, None
    if ranks.rank == 0:
        try:
            value = work()
        except (ValueError, OSError) as found:
            problem = found
    answer = [value, problem is not None]
    dist.broadcast_object_list(answer)
    if problem is not None:
        raise problem
    if answer[1]:
        raise SystemExit(2)
    return answer[0]


def agree(signals, ranks):
    """Whether a signal has reached any of the processes; then it counts as having reached all, so that they stop after
    the same step. The number goes by way of the CPU: it makes no GPU wait."""
    number = torch.tensor(signals.caught or 0)
    if ranks.world > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    signals.asked = number.item() or None
    return signals.asked is not None


def gather(value, ranks):
    """A list of what each process has, in all of them."""
    if ranks.world == 1:
        return [value]
    values = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values


def why_it_ended(problem):
    """A sentence for a RuntimeError that says that another process has ended; None for others."""
    text = str(problem)
    if "DataLoader worker" in text:
        return (f"a process that fetches batches has ended ({text.splitlines()[0]}), most often because memory ran out;"
                " take fewer --workers, or a machine with more memory, and go on with --resume")
    if dist.is_initialized() and (isinstance(problem, dist.DistError) or "gloo" in text or "NCCL" in text):
        return ("another process of this run has ended or cannot be reached, its own message may say why; go on with "
                "--resume")
    return None


def total(values, ranks):
    """The sum of a tensor over all processes."""
    if ranks.world > 1:
        dist.all_reduce(values)
    return values


def by_parts(table, predict, ranks):
    """`predict(part)` of a part of the table in each process, put together in the order of the table: each row once."""
    if ranks.world == 1:
        return predict(table)
    parts = [None] * ranks.world
    dist.all_gather_object(parts, predict(table.iloc[ranks.rank :: ranks.world]))
    return pd.concat([part for part in parts if len(part)]).loc[table.index]
