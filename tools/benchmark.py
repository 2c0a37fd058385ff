"""Measure the speed, side by side with torchvision's ConvNeXt in one process.

    python benchmark.py --json cpu.json                # the CPU: loading, prediction, training step; some minutes
    python benchmark.py --gpu --json gpu.json          # a CUDA GPU: an epoch from files, prediction, ladder of the step

The reference is what one would write without this project: torchvision.models.convnext_tiny and, end to end,
ImageFolder with PIL transforms and a DataLoader with a worker a core. Candidates take turns, so that a machine that
slows down slows all of them; printed is the ratio to the reference, the median over the turns. What gives another
answer is not timed but refused. --json is written after each part, what matters most first.
"""

import argparse
import functools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from adnc.cli import COUNT, SIDE, InputError, Parser, number, read_flags, run_script


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    add = parser.add_argument_group("machine").add_argument
    add("--gpu", action="store_true", help="measure a CUDA GPU instead of the CPU")
    add("--device", help="of --gpu; cpu rehearses it, in small (cuda)")
    add = parser.add_argument_group("what is measured").add_argument
    add("--model", default="tiny", metavar="V", help="tiny, small, base or large (tiny)")
    add("--image-size", type=SIDE, default=224, metavar="PX", help="side of the model's input (224)")
    add("--batch-size", type=COUNT, default=64, metavar="N", help="slices at once; GPU: also 4 N, 8 N")
    add("--slices", type=number(40, 1e6, int), default=30520, metavar="N",
        help="size of the set that is loaded (30520)")
    add("--repeats", type=COUNT, default=5, metavar="N", help="turns of each candidate (5)")
    args = parser.parse_args(argv)
    if args.device is not None and not args.gpu:
        parser.error("--device goes with --gpu; without it the CPU is measured")
    folder = Path(args.json or ".").parent
    if not folder.is_dir():
        parser.error(f"--json is {args.json}, but there is no folder {folder}; make it first")
    return args


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

import numpy as np
import pandas as pd
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adnc.data import cache
from adnc.data import pixels as slices
from adnc.phantom.anatomy import SLICES, Scan, render
from dataset import SliceSet, make_loader
from adnc.engine import TrainState, train_one_epoch, train_step
from adnc.files import write_json
from adnc.cpu_engine import make_engine
from modules import VARIANTS, convnext, load_weights
from adnc.distributed import Runtime, StopRequest, has_native_bf16, pick_device, precision_name
from adnc.data.augment import eval_transform

WHO = ("torchvision", "ours")  # the first one is the reference

# ---------------------------------------------------------------- measuring


def take_turns(candidates, repeats, sync=lambda: None):
    """Seconds of each candidate (a dict of functions), `repeats` turns after one that does not count.

    Returns {name: {"seconds": median, "ratio": median over the turns of first / this}}; the first is the reference.
    """
    seconds = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, work in candidates.items():
            sync()
            start = time.perf_counter()
            work()
            sync()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    reference = next(iter(seconds.values()))
    return {name: {"seconds": statistics.median(times),
                   "ratio": statistics.median(a / b for a, b in zip(reference, times))}
            for name, times in seconds.items()}  # fmt: skip


def require(what, difference, limit):
    """A wrong answer is not worth timing."""
    if not difference <= limit:
        raise InputError(f"{what}: the largest difference is {difference:.2g}; expected at most {limit:.2g}")
    return float(difference)


def two_models(variant, device, in_chans=1, num_classes=2):
    """(torchvision's model, ours) with the same random weights that let every block speak (LayerScale about 0.1).
    Neither drops paths, for that would be random."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"convnext_{variant}")(num_classes=num_classes, stochastic_depth_prob=0.0)
    theirs.features[0][0] = nn.Conv2d(in_chans, VARIANTS[variant]["dims"][0], kernel_size=4, stride=4)
    for p in theirs.parameters():
        nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 0.1, std=0.03 if p.ndim > 1 else 0.1)
    ours = convnext(variant, in_chans=in_chans, num_classes=num_classes)
    load_weights(ours, theirs.state_dict())
    return theirs.to(device), ours.to(device, memory_format=torch.channels_last)


def parity(variant):
    """Our ConvNeXt beside torchvision's with the same weights, on a batch of 2 x 96 x 96 in float32."""
    theirs, ours = (model.eval() for model in two_models(variant, "cpu", in_chans=3, num_classes=1000))
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        a, b = ours(x), theirs(x)
    counts = (sum(p.numel() for p in model.parameters()) for model in (ours, theirs))
    return dict(zip(("ours", "torchvision"), counts), difference=(a - b).abs().max().item(), SD=b.std().item())


def some_slices(n):
    """n slices of the phantom, uint8 (n, 1, 240, 256), of a few brains from little to much atrophy."""
    latent = np.linspace(-2, 2, min(20, -(-n // SLICES)))
    scans = [Scan(i, f"001_S_{i:04d}", "AD", "train", 67, float(a), 0) for i, a in enumerate(latent)]
    drawn = np.concatenate([render(scan) for scan in scans])
    return torch.from_numpy(drawn[np.arange(n) % len(drawn), None])


def p_ad(logits):
    return logits.float().softmax(1)[:, 1]


def plain_step(model, runtime):
    """A function (x, y) that takes a training step of the recipe as one writes it without this project."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp == torch.float16)

    def step(x, y):
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast():
            loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


# ---------------------------------------------------------------- prediction and training steps


def measure_prediction(args, results, device, batch):
    """From normalised slices to p_AD: torchvision's model, and the engine of predict.py; and the largest difference of
    p_AD to torchvision in float32 for each candidate."""
    print(f"prediction, {args.model}, {args.image_size} px, batch {batch}", flush=True)
    theirs, ours = two_models(args.model, device)
    theirs.eval()
    x = eval_transform(some_slices(batch).to(device), args.image_size)

    @torch.inference_mode()
    def reference(runtime):
        with runtime.autocast():
            return theirs(x)

    exact, candidates, limits = p_ad(reference(Runtime(device))), {}, {"ours, float32": 1e-4}
    for amp in precisions(device):
        runtime = Runtime(device, amp)
        candidates[f"torchvision, {runtime.precision}"] = functools.partial(reference, runtime)
        candidates[f"ours, {runtime.precision}"] = functools.partial(make_engine(ours, runtime), x)
        if device.type == "cuda":
            compiled = two_models(args.model, device)[1]
            compiled.compile(dynamic=False)
            candidates[f"ours, {runtime.precision}, compiled"] = functools.partial(make_engine(compiled, runtime), x)
    differences = {name: require(f"p_AD of {name}", (p_ad(work()) - exact).abs().max(), limits.get(name, 0.01))
                   for name, work in candidates.items()}  # fmt: skip
    results["predict"] = take_turns(candidates, args.repeats, sync_of(device))
    results["difference_of_p_AD"] = differences
    notes = {name: f"  (largest difference of p_AD {value:.1g})" for name, value in differences.items()}
    show(results["predict"], batch, device, notes)


def precisions(device):
    """What is measured on a device, the reference first."""
    if device.type == "cuda":
        return [torch.float16, torch.bfloat16]
    return [None] + [torch.bfloat16] * has_native_bf16()


def step_of(kind, args, batch, device):
    """A function that takes a training step of `kind`, such as "ours, float16, compiled": of torchvision's model by
    `plain_step`, or of ours as train.py does, once the norm of its gradient is right."""
    who, precision, *how = kind.split(", ")
    theirs, ours = two_models(args.model, device)
    runtime = Runtime(device, {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": None}[precision])
    x = eval_transform(some_slices(batch).to(device), args.image_size)
    y = torch.arange(batch, device=device) % 2
    if who == "torchvision":
        return functools.partial(plain_step(theirs, runtime), x, y)
    nn.functional.cross_entropy(theirs(x), y, label_smoothing=0.1).backward()
    exact = nn.utils.get_total_norm([p.grad for p in theirs.parameters()]).item()
    state = TrainState(ours, runtime, lr=1e-6)
    if how == ["compiled"]:
        ours.compile(dynamic=False)
    for _ in range(10):  # a GradScaler begins by finding its scale
        train_step(state, x, y, clip_grad=1e9)
        if state.numbers()["skipped_in_a_row"] == 0:
            break
    norm = nn.utils.get_total_norm([p.grad for p in ours.parameters()]).item()
    require(f"the norm of the gradient of {kind}", abs(norm - exact) / exact, 1e-4 if precision == "float32" else 0.05)
    return lambda: train_step(state, x, y)


def sync_of(device):
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


# ---------------------------------------------------------------- from files to batches, and to trained weights


def write_jpegs(root, drawn, n):
    """Write n JPEG slices under `root`/AD and NC, no two equal; returns their paths."""
    for i in range(n):
        picture = drawn[i % len(drawn)].copy()
        picture[:8, :128] = np.repeat([255 * (i >> bit & 1) for bit in range(16)], 8)
        path = root / ("AD" if i % 2 else "NC") / f"{i // 20}_{i}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, quality=90)
    return sorted(map(str, root.rglob("*.jpeg")))


def load_on_cpu(args):
    """Decode a set of JPEG slices into the cache, and start again from it; seconds, and memory beyond what was used."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        paths = write_jpegs(Path(folder) / "set", some_slices(40).numpy()[:, 0], args.slices)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            images, _, errors = cache.decode(paths, lambda: (240, 256), folder)
            seconds.append(time.perf_counter() - start)
        rows = np.linspace(0, len(paths) - 1, 50).astype(int)
        if any(errors) or not all(np.array_equal(images[row], slices.decode(paths[row])) for row in rows):
            raise RuntimeError("what the cache holds is not what the files hold")
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**20
    return {"slices": args.slices, "first_start_s": seconds[0], "later_start_s": seconds[1], "peak_GiB": peak}


def their_epoch(args, folder, batch, runtime):
    """A function that trains for an epoch as one writes it without this project: ImageFolder with PIL transforms, a
    worker a core, torchvision's model. It returns images a second."""
    recipe = v2.Compose([
        v2.Grayscale(), v2.RandomResizedCrop(args.image_size, scale=(0.8, 1.0)), v2.RandomHorizontalFlip(),
        v2.RandomRotation(10), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]),
    ])  # fmt: skip
    batches = DataLoader(ImageFolder(folder, recipe), batch, shuffle=True, num_workers=os.cpu_count(), pin_memory=True,
                         drop_last=True, persistent_workers=True)
    step = plain_step(two_models(args.model, runtime.device)[0], runtime)

    def epoch():
        start = time.perf_counter()
        for x, y in batches:
            step(*(part.to(runtime.device, non_blocking=True) for part in (x, y)))
        sync_of(runtime.device)()
        return len(batches) * batch / (time.perf_counter() - start)

    return epoch


def our_epoch(args, folder, batch, runtime):
    """The same of ours: decoded slices from the cache, which is built before the clock starts."""
    paths = sorted(map(str, Path(folder).rglob("*.jpeg")))
    images, _, _ = cache.decode(paths, lambda: (240, 256), folder)
    index = pd.DataFrame({"row": np.arange(len(paths)), "label": [Path(path).parent.name for path in paths]})
    batches = make_loader(SliceSet(index, images), batch, generator=torch.Generator(), device=runtime.device)
    state = TrainState(two_models(args.model, runtime.device)[1], runtime, lr=1e-6)
    state.model.compile(dynamic=False)
    recipe = argparse.Namespace(seed=0, epochs=100, warmup_epochs=1, lr=1e-6, batch_size=batch, no_augment=False,
                                image_size=args.image_size, no_flip=False, label_smoothing=0.1, clip_grad=1.0)

    def epoch():
        state.start_epoch()
        return train_one_epoch(state, batches, len(paths), recipe)["images_per_s"]

    return epoch


def epochs_from_files(args, device, batch):
    """Images a second from JPEG files to trained weights, of the reference pipeline and of ours with its cache."""
    runtime = Runtime(device, precisions(device)[-1], StopRequest())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        n = max(1, min(args.slices, 10240) // batch) * batch
        write_jpegs(Path(folder) / "set", some_slices(400).numpy()[:, 0], n)
        rates = {}
        for name, prepare in (("torchvision", their_epoch), ("ours, compiled", our_epoch)):
            epoch = prepare(args, f"{folder}/set", batch, runtime)
            epoch()  # warms up
            rates[name] = epoch()
            ratio = rates[name] / rates["torchvision"]
            print(f"  {name:<50}{ratio:>6.2f} x  {rates[name]:>9,.0f} images/s", flush=True)
    return rates


# ---------------------------------------------------------------- what is measured where


def measure_cpu(args, results):
    cpu = torch.device("cpu")
    results["load"] = found = load_on_cpu(args)  # first: the system remembers only the most memory that was ever used
    print(f"loading {found['slices']:,} JPEG slices: first start {found['first_start_s']:.1f} s, later "
          f"{found['later_start_s']:.2f} s, peak memory {found['peak_GiB']:.2f} GiB beyond what was used before")
    results["parity"] = found = parity(args.model)
    print(f"with torchvision's weights, 3 channels, 1,000 classes: {found['ours']:,} parameters, torchvision's has "
          f"{found['torchvision']:,}; largest difference of the logits {found['difference']:.1g}, SD {found['SD']:.2g}")
    measure_prediction(args, results, cpu, args.batch_size)
    for amp in precisions(cpu):
        measure_steps(args, results, cpu, args.batch_size, amp)
    measure_profile(args, results, cpu, precision_name(precisions(cpu)[-1]))


def measure_gpu(args, results):
    device, large = pick_device(args.device or "cuda"), 4 * args.batch_size
    torch.backends.cudnn.benchmark = True
    print(f"from files to trained weights, batch {large}", flush=True)
    results["epoch"] = epochs_from_files(args, device, large)
    keep(args, results)
    measure_prediction(args, results, device, large)
    for batch in (large, args.batch_size, 2 * large):
        for amp in precisions(device):
            keep(args, results)
            measure_steps(args, results, device, batch, amp)


def measure_steps(args, results, device, batch, amp):
    print(f"training step, {args.model}, {args.image_size} px, batch {batch}", flush=True)
    kinds = [f"{who}, {precision_name(amp)}" for who in WHO]
    kinds += [f"{kinds[-1]}, compiled"] * args.gpu
    torch._dynamo.reset()  # or it takes another batch size for a size that varies
    rows = take_turns({kind: step_of(kind, args, batch, device) for kind in kinds}, args.repeats, sync_of(device))
    results.setdefault("train", {}).setdefault(f"batch {batch}", {}).update(rows)
    show(rows, batch, device)


def measure_profile(args, results, device, precision):
    """Where the time of a step goes: that of each operator itself, in units of a whole step of torchvision's."""
    found = {}
    for who in WHO:
        step = step_of(f"{who}, {precision}", args, args.batch_size, device)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
        found[who] = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    whole = sum(found[WHO[0]].values())
    table = pd.DataFrame(found).fillna(0) / whole
    table = table.loc[table.max(axis=1).sort_values(ascending=False).index]
    results["profile"] = table.to_dict()
    rest = table.iloc[10:].sum().rename("all others").to_frame().T
    print(f"where a step in {precision} goes, by operator, of {' and '.join(WHO)} (1: a step of the first)")
    print(pd.concat([table.iloc[:10], rest]).to_string(header=False, float_format="%.3f"), flush=True)


def show(rows, batch, device, notes=None):
    """Ratios; images a second only of a GPU, for those of a CPU that others use as well mean nothing."""
    for name, row in rows.items():
        rate = f"  {batch / row['seconds']:>9,.0f} images/s" if device.type == "cuda" else ""
        print(f"  {name:<50}{row['ratio']:>6.2f} x{rate}{(notes or {}).get(name, '')}", flush=True)


# ---------------------------------------------------------------- the command


def keep(args, results):
    """Write the results so far, for a machine may be taken away."""
    if args.json:
        write_json(args.json, results)


def machine():
    """The processor's name, and how many of its cores are used."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def main(args):
    if args.model not in ("tiny", "small", "base", "large"):
        raise InputError(f"torchvision has no ConvNeXt {args.model!r}; choose tiny, small, base or large")
    gpu = args.gpu and pick_device(args.device or "cuda").type == "cuda"
    where = {"machine": torch.cuda.get_device_name() if gpu else machine(), "python": sys.version.split()[0],
             "torch": torch.__version__, "torchvision": torchvision.__version__}
    print(json.dumps(where), flush=True)
    results = where | {name: getattr(args, name) for name in ("model", "image_size", "batch_size", "repeats")}
    (measure_gpu if args.gpu else measure_cpu)(args, results)
    keep(args, results)


if __name__ == "__main__":
    run_script(main, ARGS)
