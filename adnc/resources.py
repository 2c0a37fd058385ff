"""What a run costs: size of the model, time, memory, and latency of a prediction."""

import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from adnc.cpu_engine import make_engine

BATCHES = (1, 64)  # slices in a prediction whose latency is measured
WARMUP, REPEATS = 5, 20
MEMORY = ("process", "gpu_allocated", "gpu_reserved")
LONGEST = 60  # seconds for each batch size; then it stops early


def measure_resources(model, history, *, image_size, n_train, device, amp):
    """What a trained model and its training cost, as plain values for resources.json.

    history: the rows of training_history.csv of the epochs that this machine trained. n_train:
    training slices. Times are those of the median epoch, in seconds, since the first epoch of a
    process is slower. Memory is the peak of the process until the end of these epochs, in bytes.
    What is unknown is None.
    """
    slices_per_s = median(history, "images_per_s")
    latency, repeats = measure_latency(model, image_size, device, amp)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": count_multiply_adds(model, image_size),
        "image_size": image_size,
        "epochs": len(history),
        "train_seconds": n_train / slices_per_s if slices_per_s else None,
        "val_seconds": median(history, "val_seconds"),
        "train_slices_per_s": slices_per_s,
        "memory": {
            name: max(values_of(history, f"memory_{name}"), default=None) for name in MEMORY
        },
        "latency": latency,
        "latency_repeats": repeats,
    }


def values_of(history, name):
    """The values of a column of training_history.csv, without missing ones: rows of an epoch that
    an earlier version trained may lack it."""
    return [row[name] for row in history if row.get(name) is not None]


def median(history, name):
    """The median of a column of training_history.csv, or None."""
    values = values_of(history, name)
    return statistics.median(values) if values else None


def count_multiply_adds(model, image_size, in_chans=1):
    """Multiply-adds of the convolutions and linear layers of a model for one image.

    The papers count these and call them FLOPs: 4.5 G for ConvNeXt-T at 224 px and 3 channels.
    """
    parameter = next(model.parameters())
    x = torch.zeros(1, in_chans, image_size, image_size, device=parameter.device)
    was_training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    model.train(was_training)
    return counter.get_total_flops() // 2  # it counts two operations for each multiply-add


def peak_memory(device):
    """The peak memory of this process since its start, in bytes, as columns of the history.

    memory_process is the maximum resident size, with the pages of the memory-mapped cache that were
    read; memory_gpu_allocated and memory_gpu_reserved are PyTorch's. None where unknown.
    """
    memory = dict.fromkeys(f"memory_{name}" for name in MEMORY)
    try:
        import resource  # not on Windows
    except ImportError:
        pass
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory["memory_process"] = peak if sys.platform == "darwin" else peak * 1024
    if device.type == "cuda":
        memory["memory_gpu_allocated"] = torch.cuda.max_memory_allocated(device)
        memory["memory_gpu_reserved"] = torch.cuda.max_memory_reserved(device)
    return memory


def measure_latency(model, image_size, device, amp):
    """The latency of a prediction from normalised slices to logits, as predict.py computes them:
    ({batch size: median seconds}, {batch size: repeats}), as text keys.

    The median is that of REPEATS after WARMUP, synchronised. If they take over LONGEST, it stops
    early, and at least the last turn counts.
    """
    engine = make_engine(model.eval(), device=device, amp=amp)
    latency, repeats = {}, {}
    for size in BATCHES:
        x = torch.zeros(size, 1, image_size, image_size, device=device)
        times = []
        while len(times) < WARMUP + REPEATS and sum(times) < LONGEST:
            wait_for(device)
            start = time.perf_counter()
            engine(x)
            wait_for(device)
            times.append(time.perf_counter() - start)
        warm = times[WARMUP:]
        if not warm:
            warm = times[-1:]
        latency[str(size)] = statistics.median(warm)
        repeats[str(size)] = len(warm)
    return latency, repeats


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_resources(used):
    """The content of resources.json in one line."""
    memory = used["memory"]
    parts = [
        f"{used['parameters'] / 1e6:.2f} M parameters",
        f"{used['multiply_adds'] / 1e9:.3f} G multiply-adds a slice at {used['image_size']} px",
        f"{seconds(used['train_seconds'])} an epoch, {seconds(used['val_seconds'])} its validation",
        f"{per_second(used['train_slices_per_s'])} slices/s",
        f"peak memory of the process {gib(memory['process'])}",
    ]
    if memory["gpu_allocated"] is not None:
        parts.append(
            f"of the GPU {gib(memory['gpu_allocated'])} allocated, {gib(memory['gpu_reserved'])} "
            "reserved"
        )
    latency = [f"{1000 * used['latency'][str(size)]:.1f} ms" for size in BATCHES]
    parts.append(f"prediction of 1 slice {latency[0]}, of 64 {latency[1]}")
    return f"resources: {'; '.join(parts)} ({used['machine']}, {used['precision']})"


def latency_cell(used, size):
    """The latency of a prediction of `size` slices, with the number of its repeats if these are
    fewer than planned."""
    text = f"{1000 * used['latency'][str(size)]:.1f} ms"
    repeats = used["latency_repeats"][str(size)]
    if repeats < REPEATS:
        text += f" (median of {repeats})"
    return text


def seconds(value):
    return "-" if value is None else f"{value:.1f} s"


def per_second(value):
    return "-" if value is None else f"{value:.0f}"


def gib(n_bytes):
    """Bytes as text; "-" if unknown."""
    return "-" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"


RESOURCES = [
    "run", "parameters", "multiply-adds", "px", "epoch: training", "validation", "slices/s",
    "memory", "GPU allocated", "GPU reserved", "latency of 1", "of 64", "machine", "torch",
]  # fmt: skip


def resource_rows(runs):
    """Rows of a table, the header first, of (name, content of resources.json) of each run."""
    rows = [RESOURCES]
    for name, used in runs:
        rows.append([
            name,
            f"{used['parameters'] / 1e6:.2f} M",
            f"{used['multiply_adds'] / 1e9:.3f} G",
            str(used["image_size"]),
            seconds(used["train_seconds"]),
            seconds(used["val_seconds"]),
            per_second(used["train_slices_per_s"]),
            gib(used["memory"]["process"]),
            gib(used["memory"]["gpu_allocated"]),
            gib(used["memory"]["gpu_reserved"]),
            latency_cell(used, 1),
            latency_cell(used, 64),
            f"{used['machine']}, {used['precision']}",
            used["versions"]["torch"],
        ])  # fmt: skip
    return rows
