"""Several processes, one for each GPU, started by torchrun.

    torchrun --nproc-per-node 4 train.py --data AD_NC

Every process walks through the same batches in the same order and takes every N-th slice of each;
the gradients are averaged by DistributedDataParallel. Process 0 alone validates, writes and prints.
"""

import os
import signal
import socket
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from adnc.errors import InputError

# How long a process waits for the others: at the start, and later, when the first may decode a
# large set.
LONGEST_START = timedelta(minutes=2)
LONGEST_WAIT = timedelta(minutes=30)


@dataclass
class World:
    """This process's number and how many processes there are. One process is a world of its own."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self):
        return self.rank == 0

    def wrap(self, model, device):
        """The module to call in a training step: its gradients are means over all processes."""
        if self.size == 1:
            return model
        if device.type == "cuda":  # in place
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            return DistributedDataParallel(model, device_ids=[device])
        return DistributedDataParallel(model)

    def sum(self, values):
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value):
        """What process 0 holds, in all of them."""
        values = [value]
        if self.size > 1:
            with one_line_if_others_ended():
                dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def main_first(self):
        """A block that process 0 runs before the others, such as one that fills a cache."""
        if self.size > 1 and not self.is_main:
            with one_line_if_others_ended():
                dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()

    def needed(self):
        """A block that needs the other processes, if there are any."""
        return one_line_if_others_ended() if self.size > 1 else nullcontext()

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()


@contextmanager
def one_line_if_others_ended():
    """A block that needs the other processes. InputError if one of them has ended."""
    try:
        yield
    except RuntimeError as problem:
        if "closed" not in str(problem) and "reset" not in str(problem):
            raise
        raise InputError("another process has ended; its error says why") from None


ADVICE = (
    "start several processes with torchrun, which sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR "
    "and MASTER_PORT, or unset WORLD_SIZE to train with one"
)


# Variables of schedulers for the number of processes. They say nothing about how to meet.
SCHEDULERS = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def read_launcher():
    """(rank, local rank, number of processes) from the variables that torchrun sets, or None for
    one process.

    InputError if only some of them are set, or not to numbers: each process would train alone.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return None
    if "WORLD_SIZE" not in os.environ:
        raise InputError(f"RANK is set, and WORLD_SIZE is not; {ADVICE}")
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name)
        if value is not None and not value.isdecimal():
            raise InputError(f"the variable {name} is {value!r}, not a number; {ADVICE}")
        numbers[name] = value and int(value)
    if numbers["WORLD_SIZE"] == 0:
        raise InputError(f"the variable WORLD_SIZE is 0; {ADVICE}")
    if numbers["WORLD_SIZE"] == 1 or numbers["RANK"] is None:  # of a scheduler, perhaps
        return None
    needed = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {numbers['WORLD_SIZE']} and RANK is {numbers['RANK']}, but without "
            f"{' and '.join(missing)}; {ADVICE}"
        )
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise InputError(
            f"RANK is {numbers['RANK']}, and WORLD_SIZE {numbers['WORLD_SIZE']}; {ADVICE}"
        )
    return numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"]


def own_device(name):
    """The device of this process, of a --device: on CUDA each process of torchrun gets the GPU of
    its number on this machine, and opens no other one. InputError if there are too few."""
    launched = read_launcher()
    on_cuda = name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())
    if launched is None or not on_cuda:
        return name
    _, local_rank, _ = launched
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise InputError(
            f"process {local_rank} on this machine has no GPU ({gpus} available); start with "
            f"--nproc-per-node {gpus}"
        )
    return f"cuda:{local_rank}"


def join(device):
    """(World, device) of this process; joins the processes of torchrun, if it was started by
    torchrun, with the device of `own_device`.

    InputError if another process does not come within LONGEST_START.
    """
    launched = read_launcher()
    if launched is None:
        for name in SCHEDULERS:
            if os.environ.get(name, "1") != "1":
                print(
                    f"{name} is {os.environ[name]}, and this process trains alone: to train with "
                    "several, start them with torchrun",
                    flush=True,
                )
        return World(), device
    rank, local_rank, size = launched
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if local_rank == 0:
        print(
            f"process {rank} of {size} waits for the others at {address}, at most "
            f"{LONGEST_START.total_seconds():.0f} seconds",
            flush=True,
        )
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    except OSError as problem:  # PyTorch would try again and again
        raise InputError(f"{address} is not known on this machine ({problem}); {ADVICE}") from None
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        with ended_by_ctrl_c():
            store, _, _ = next(rendezvous("env://", timeout=LONGEST_START))
            store.set_timeout(LONGEST_WAIT)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT
            )
    except (RuntimeError, ValueError) as problem:  # a port in use, an address that is not found
        reason = str(problem).splitlines()[0]
        raise InputError(
            f"process {rank} of {size} cannot join the others at {address} ({reason}); {ADVICE}"
        ) from None
    return World(rank, size), device


@contextmanager
def ended_by_ctrl_c():
    """A block in which Ctrl-C ends the process at once: Python's own handler would only be called
    when PyTorch, which waits in C++, returns."""
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
