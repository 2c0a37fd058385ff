"""Where a run happens: device, precision, seeds, signals, and one process or several.

Not run by itself; torchrun starts train.py as often as there are GPUs:

    torchrun --nproc-per-node 4 train.py --data AD_NC          # four GPUs; with --nnodes also on several machines

Every process walks through the same batches in the same order, takes every N-th slice of each, and the gradients are
averaged (DistributedDataParallel), so that N processes take the steps that one would take. Process 0 alone writes.
"""

import contextlib
import ctypes
import os
import platform
import random
import re
import signal
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from adnc.cli import STOP_SIGNALS, InputError, Stopped, is_new_request, seed_of

# ---------------------------------------------------------------- device, precision, seeds


def seed_everything(*seeds):
    """Seed Python, NumPy and PyTorch (all devices) from a tuple of whole numbers, such as (seed, epoch)."""
    seed = seed_of(*seeds)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name="auto"):
    """The device of that name; "auto" is CUDA if it is there, else the CPU. InputError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise InputError(f"device {name} cannot be used here ({reason}); choose cpu, cuda, or auto") from None
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
        raise InputError(f"--amp fp16 needs a CUDA GPU, this is {device.type}; choose bf16, off or auto")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[mode]


def precision_name(amp):
    return str(amp or torch.float32).removeprefix("torch.")


# ---------------------------------------------------------------- signals


class StopRequest:
    """STOP_SIGNALS while the context is open. They raise Stopped at once or, within `deferred`, are kept in `caught`
    until the loop polls (`Runtime.stop_requested`); a second one then ends the process at once, unless it is
    the same request: who signals a whole group reaches a process twice, by itself and through torchrun. `agreed` is the
    signal that all processes stop for."""

    def __init__(self):
        self.caught, self.agreed, self.polled, self.before, self.times = None, None, False, {}, []

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not is_new_request(self.times):
            return
        if not self.polled:
            raise Stopped(128 + number)
        if self.caught is not None:
            raise SystemExit(128 + number)
        self.caught = number

    @contextlib.contextmanager
    def deferred(self):
        self.polled = True
        try:
            yield
        finally:
            self.polled = False


# ---------------------------------------------------------------- one process or several


@dataclass
class Runtime:
    """The device, the dtype of autocast (None: float32), the requests to stop, and of several processes this one's
    number, how many there are, and its number on this machine."""

    device: torch.device
    amp: torch.dtype | None = None
    stop: StopRequest | None = None
    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def is_rank_0(self):
        return self.rank == 0

    @property
    def precision(self):
        return precision_name(self.amp)

    @property
    def machine(self):
        """The device, threads and processes on which the bits of a run depend, in words."""
        return f"{self.device_name}, {torch.get_num_threads()} threads, {self.world} processes"

    @property
    def device_name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def autocast(self):
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)

    def share(self, n):
        """How many of the n rows of a batch are this process's: those at rank, rank + world, ..."""
        return len(range(self.rank, n, self.world))

    def wrap(self, model):
        """The model to call in a training step; its gradients are the means over all processes."""
        if self.world == 1:
            return model
        cuda = self.device.type == "cuda"
        if cuda:  # in place; on a CPU there is none, and train.py refuses such models
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=[self.device] if cuda else None)

    def total(self, values, how=dist.ReduceOp.SUM):
        """The sum (or what `how` says) of a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values, how)
        return values

    def gather(self, value):
        """A list of what each process has, in all of them."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def by_parts(self, table, predict):
        """`predict(part)` of a part of the table in each process, joined in the order of the table; None if it is None
        in one of them."""
        parts = self.gather(predict(table.iloc[self.rank :: self.world]))
        if any(part is None for part in parts):
            return None
        at = np.concatenate([np.arange(rank, len(table), self.world) for rank in range(self.world)])
        return pd.concat([part for part in parts if len(part)]).iloc[np.argsort(at)]

    def from_rank_0(self, work):
        """What `work()` returns in process 0, in all of them. If it fails there on wrong input, the others end without
        a word."""
        if self.world == 1:
            return work()
        answer = [None, "failed"]
        try:
            if self.is_rank_0:
                answer = [work(), None]
        except (InputError, OSError):
            dist.broadcast_object_list(answer)
            raise
        dist.broadcast_object_list(answer)
        if answer[1]:
            raise SystemExit(2)
        return answer[0]

    def one_after_the_other(self, work):
        """`work()` in process 0, then in the others: what the first leaves in a cache, they find."""
        first = []
        self.from_rank_0(lambda: first.append(work()))
        return first[0] if first else work()

    def stop_requested(self):
        """Whether a signal has reached any of the processes; then it counts as having reached all, so that they stop
        after the same step. The number goes by way of the CPU: it makes no GPU wait."""
        self.stop.agreed = self.total(torch.tensor(self.stop.caught or 0), dist.ReduceOp.MAX).item() or None
        return self.stop.agreed is not None

    def leave(self):
        """Leave the other processes, if there are any."""
        if self.world > 1:
            dist.destroy_process_group()


LONGEST_WAIT = timedelta(minutes=30)  # of one process for the others; the first may be decoding a large set


def join_processes(device, amp, stop):
    """The Runtime of this process; joins the processes of torchrun, if there are any."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or not {"RANK", "LOCAL_RANK"} <= set(os.environ):  # a scheduler may set the first alone
        return Runtime(device, amp, stop)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if sys.platform == "linux":  # torchrun hands on some signals and dies of the others, and then nobody ends this
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a signal when the parent is gone
    if device.type == "cuda":
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", world)) > 1:
            raise InputError(f"--device {device} is one GPU for {world} processes; leave it out, and each gets its own")
        if device.index is None:
            if local >= torch.cuda.device_count():
                raise InputError(f"process {local} of this machine has no GPU, there are "
                                 f"{torch.cuda.device_count()}; start as many with --nproc-per-node")
            device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    return Runtime(device, amp, stop, rank, world, local)


def start(args, stop):
    """The Runtime that the flags of train.py ask for."""
    if args.deterministic:  # on CUDA only kernels that give the same bits again, or an error; before CUDA is used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    device = pick_device(args.device)
    runtime = join_processes(device, pick_amp(args.amp, device), stop)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not args.deterministic
    return runtime


@contextlib.contextmanager
def explain_end(args):
    """Turns what `why_it_ended` knows about into an OSError."""
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        reason = why_it_ended(problem, args)
        if reason is None:
            raise
        raise OSError(reason) from None


# What PyTorch says on a CPU, and what CUDA's libraries say instead of OutOfMemoryError.
OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|bad_alloc|_ALLOC_FAILED|out of memory", re.I)


def why_it_ended(problem, args):
    """A sentence for a RuntimeError or MemoryError that the user can do something about; None for a defect of this
    program. `args` are the flags of the command."""
    text = str(problem)
    first = text.splitlines()[0][:200] if text else "no more is said"
    if isinstance(problem, (MemoryError, torch.cuda.OutOfMemoryError)) or OUT_OF_MEMORY.search(text):
        where = " of the GPU" * (isinstance(problem, torch.cuda.OutOfMemoryError) or "CUDA" in text)
        size = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in ("batch_size", "image_size")
                if hasattr(args, name)]  # fmt: skip
        lower = ("take a larger machine, or less at once", "lower --batch-size, or give it fewer files at once",
                 "lower --batch-size first, then take a smaller model, image size or set")[len(size)]
        return f"the memory{where} ran out{' at ' * bool(size)}{' and '.join(size)} ({first}); {lower}"
    if re.search("DataLoader (timed out|worker.*(Bus error|shared memory))", text, re.DOTALL):
        instead = "take --workers 0" if hasattr(args, "workers") else "give it fewer files at once"
        return (f"a batch did not come from the processes that fetch them ({first}), most often because /dev/shm is "
                f"full: make room there, or {instead}")
    if "DataLoader worker" in text:
        fewer = "use fewer --workers" if hasattr(args, "workers") else "give it fewer files at once"
        return (f"a process that fetches batches has ended ({first}), most often because memory ran out; {fewer}, or a "
                "machine with more memory")
    if dist.is_initialized() and (isinstance(problem, dist.DistError) or "gloo" in text or "NCCL" in text):
        return "another process of this run has ended or cannot be reached, its own message may say why"
    return None
