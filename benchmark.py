"""Measure the speed, side by side with torchvision's ConvNeXt in one process.

    python benchmark.py --json cpu.json                # the CPU: prediction, training step, loading; some minutes
    python benchmark.py --gpu --json gpu.json          # a CUDA GPU: prediction, an epoch, ladder of the step; 9 minutes

The reference is what one would write without this project: torchvision.models.convnext_tiny and, end to end,
ImageFolder with PIL transforms and a DataLoader with a worker a core. Candidates take turns, so that a machine that
slows down slows all of them; printed is the ratio to the reference, the median over the turns. What gives another
answer is not timed but refused.
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

from utils import InputError, Parser, read_flags, run_script


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure a CUDA GPU instead of the CPU")
    parser.add_argument("--device", help="of --gpu; cpu rehearses it, in small (cuda)")
    parser.add_argument("--model", default="tiny", metavar="V", help="tiny, small, base or large (tiny)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PX", help="side of the model's input (224)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="slices at once; GPU: also 4 N, 8 N")
    parser.add_argument("--slices", type=int, default=30520, metavar="N", help="size of the set that is loaded (30520)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each candidate (5)")
    parser.add_argument("--checkpoint", metavar="FILE", help="best_model.pth: compare p_AD on a trained model, too")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--figure", metavar="FILE", help="draw the ratios there")
    args = parser.parse_args(argv)
    for name, low in (("image_size", 32), ("batch_size", 1), ("slices", 40), ("repeats", 1)):
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected {low} or more")
    if args.device is not None and not args.gpu:
        parser.error("--device goes with --gpu; without it the CPU is measured")
    for name in ("json", "figure"):
        folder = Path(getattr(args, name) or ".").parent
        if not folder.is_dir():
            parser.error(f"--{name} is {getattr(args, name)}, but there is no folder {folder}; make it first")
    return args


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

import numpy as np
import pandas as pd
import torch
import torchvision
from PIL import Image
from torch import nn

import cache
import plots
import slices
from anatomy import SLICES, Scan, render
from checkpoint import build_model, load_checkpoint
from dataset import SliceSet, make_loader
from engine import TrainState, train_one_epoch, train_step
from inference import make_engine
from modules import VARIANTS, convnext, load_weights
from runtime import Runtime, StopRequest, has_native_bf16, pick_device, precision_name
from utils import write_json

BUDGET = 520  # seconds that --gpu may take

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


def two_models(variant, device):
    """(torchvision's model, ours) of one grey channel and two classes, with the same random weights that let every
    block speak (LayerScale about 0.1). Neither drops paths, for that would be random."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"convnext_{variant}")(num_classes=2, stochastic_depth_prob=0.0)
    theirs.features[0][0] = nn.Conv2d(1, VARIANTS[variant]["dims"][0], kernel_size=4, stride=4)
    for p in theirs.parameters():
        nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 0.1, std=0.03 if p.ndim > 1 else 0.1)
    ours = convnext(variant)
    load_weights(ours, theirs.state_dict())
    return theirs.to(device), ours.to(device, memory_format=torch.channels_last)


def some_slices(n):
    """n slices of the phantom, uint8 (n, 1, 240, 256), of a few brains from little to much atrophy."""
    latent = np.linspace(-2, 2, min(20, -(-n // SLICES)))
    scans = [Scan(i, f"001_S_{i:04d}", "AD", "train", 67, float(a), 0) for i, a in enumerate(latent)]
    drawn = np.concatenate([render(scan) for scan in scans])
    return torch.from_numpy(drawn[np.arange(n) % len(drawn), None])


def p_ad(logits):
    return logits.float().softmax(1)[:, 1]


def plain_step(model, optimizer, x, y, runtime, scaler):
    """A training step of the recipe as one writes it without this project."""
    optimizer.zero_grad(set_to_none=True)
    with runtime.autocast():
        loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


# ---------------------------------------------------------------- prediction and training steps


def predict(args, device, batch, repeats):
    """From normalised slices to p_AD: torchvision's model, and the engine of predict.py. Returns what `take_turns`
    does, and the largest difference of p_AD to torchvision in float32 for each candidate."""
    theirs, ours = two_models(args.model, device)
    theirs.eval()
    x = slices.eval_transform(some_slices(batch).to(device), args.image_size)

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
    return take_turns(candidates, repeats, sync_of(device)), differences


def precisions(device):
    """What is measured on a device, the reference first."""
    if device.type == "cuda":
        return [torch.float16, torch.bfloat16]
    return [None] + [torch.bfloat16] * has_native_bf16()


def step_of(kind, args, batch, device):
    """A function that takes a training step of `kind`, such as "ours, float16, compiled": of torchvision's model as one
    writes it without this project, or of ours as train.py does, once the norm of its gradient is right."""
    who, precision, *how = kind.split(", ")
    theirs, ours = two_models(args.model, device)
    runtime = Runtime(device, {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": None}[precision])
    x = slices.eval_transform(some_slices(batch).to(device), args.image_size)
    y = torch.arange(batch, device=device) % 2
    if who == "torchvision":
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-6, weight_decay=1e-4)
        scaler = torch.amp.GradScaler(device.type, enabled=runtime.amp == torch.float16)
        return lambda: plain_step(theirs, optimizer, x, y, runtime, scaler)
    nn.functional.cross_entropy(theirs(x), y, label_smoothing=0.1).backward()
    exact = nn.utils.get_total_norm([p.grad for p in theirs.parameters()]).item()
    state = TrainState(ours, runtime, lr=1e-6)
    if how:
        ours.compile(dynamic=False, mode="max-autotune-no-cudagraphs" if how == ["tuned"] else None)
    for _ in range(10):  # a GradScaler begins by finding its scale
        train_step(state, x, y, clip_grad=1e9)
        if state.numbers()["skipped_in_a_row"] == 0:
            break
    norm = nn.utils.get_total_norm([p.grad for p in ours.parameters()]).item()
    require(f"the norm of the gradient of {kind}", abs(norm - exact) / exact, 1e-4 if precision == "float32" else 0.05)
    return lambda: train_step(state, x, y)


def compare_trained(path):
    """The largest difference of p_AD on slices of the phantom between float32 and bfloat16, and the spread of p_AD."""
    checkpoint = load_checkpoint(path)
    model, cpu = build_model(checkpoint).eval(), torch.device("cpu")
    x = slices.eval_transform(some_slices(400), checkpoint["image_size"])
    with torch.inference_mode():
        plain = torch.cat([p_ad(model(part)) for part in x.split(40)])
    exact, short = (p_ad(make_engine(model, Runtime(cpu, amp))(x)) for amp in (None, torch.bfloat16))
    return {"model": checkpoint["model"]["variant"], "image_size": checkpoint["image_size"], "slices": len(x),
            "p_AD": [plain.min().item(), plain.median().item(), plain.max().item()],
            "float32": require("the engine in float32", (exact - plain).abs().max(), 1e-4),
            "bfloat16": (short - plain).abs().max().item()}  # fmt: skip


def sync_of(device):
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


# ---------------------------------------------------------------- from files to batches, and to trained weights


def write_jpegs(root, drawn, n):
    """Write n JPEG slices under `root`/AD and NC, no two equal; returns their paths."""
    for number in range(n):
        picture = drawn[number % len(drawn)].copy()
        picture[:8, :128] = np.repeat([255 * (number >> bit & 1) for bit in range(16)], 8)
        path = root / ("AD" if number % 2 else "NC") / f"{number // 20}_{number}.jpeg"
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


class Waiting:
    """Batches, and the seconds that a loop over them has waited for the next one."""

    def __init__(self, batches):
        self.batches, self.seconds = batches, 0.0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        batches = iter(self.batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.seconds += time.perf_counter() - start
            yield batch


def their_epoch(args, folder, batch, runtime):
    """An epoch of the reference pipeline: ImageFolder with PIL transforms, a worker a core, torchvision's model.
    Returns a function, and the Waiting that it goes through."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    recipe = v2.Compose([
        v2.Grayscale(), v2.RandomResizedCrop(args.image_size, scale=(0.8, 1.0)), v2.RandomHorizontalFlip(),
        v2.RandomRotation(10), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]),
    ])  # fmt: skip
    batches = Waiting(DataLoader(ImageFolder(folder, recipe), batch, shuffle=True, num_workers=os.cpu_count(),
                                 pin_memory=True, drop_last=True, persistent_workers=True))
    model = two_models(args.model, runtime.device)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp == torch.float16)

    def epoch():
        for x, y in batches:
            x, y = (part.to(runtime.device, non_blocking=True) for part in (x, y))
            plain_step(model, optimizer, x, y, runtime, scaler)

    return epoch, batches


def our_epoch(args, folder, batch, runtime):
    """The same of ours: decoded slices from the cache, which is built before the clock starts."""
    paths = sorted(map(str, Path(folder).rglob("*.jpeg")))
    images, _, _ = cache.decode(paths, lambda: (240, 256), folder)
    index = pd.DataFrame({"row": np.arange(len(paths)), "label": [Path(path).parent.name for path in paths]})
    batches = Waiting(make_loader(SliceSet(index, images), batch, generator=torch.Generator(), device=runtime.device))
    state = TrainState(two_models(args.model, runtime.device)[1], runtime, lr=1e-6)
    state.model.compile(dynamic=False)
    recipe = argparse.Namespace(seed=0, epochs=100, warmup_epochs=1, lr=1e-6, batch_size=batch, no_augment=False,
                                image_size=args.image_size, no_flip=False, label_smoothing=0.1, clip_grad=1.0)

    def epoch():
        state.start_epoch()
        train_one_epoch(state, batches, len(paths), recipe)

    return epoch, batches


def epoch_on_gpu(args, device):
    """Images a second from JPEG files to trained weights: the reference pipeline, and ours with its cache."""
    batch, results = 4 * args.batch_size, {}
    n = max(1, min(args.slices, 10240) // batch) * batch
    runtime = Runtime(device, precisions(device)[-1], StopRequest())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        write_jpegs(Path(folder) / "set", some_slices(400).numpy()[:, 0], n)
        for name, prepare in (("torchvision", their_epoch), ("ours", our_epoch)):
            epoch, batches = prepare(args, f"{folder}/set", batch, runtime)
            for _ in range(2):  # the first one warms up
                batches.seconds, start = 0.0, time.perf_counter()
                epoch()
                sync_of(device)()
                took = time.perf_counter() - start
            results[name] = {"images_per_s": n / took, "waiting": batches.seconds / took}
            print(f"  {name:<34}{n / took:>9,.0f} images/s, {batches.seconds / took:.1%} of it waiting for data",
                  flush=True)  # fmt: skip
    results["ratio"] = results["ours"]["images_per_s"] / results["torchvision"]["images_per_s"]
    print(f"  ratio {results['ratio']:.2f}")
    return results


# ---------------------------------------------------------------- what is measured where


def measure_cpu(args):
    results, cpu = {"device": "cpu"}, torch.device("cpu")
    if args.checkpoint:  # a wrong one is refused at once
        build_model(load_checkpoint(args.checkpoint))
    results["load"] = found = load_on_cpu(args)  # first: the system remembers only the most memory that was ever used
    print(f"loading {found['slices']:,} JPEG slices: first start {found['first_start_s']:.1f} s, later "
          f"{found['later_start_s']:.2f} s, peak memory {found['peak_GiB']:.2f} GiB beyond what was used before")
    what = f"{args.model}, {args.image_size} px, batch {args.batch_size}, {torch.get_num_threads()} threads"
    print(f"prediction, {what}", flush=True)
    results["predict"], results["difference_of_p_AD"] = predict(args, cpu, args.batch_size, args.repeats)
    show(results["predict"], results["difference_of_p_AD"])
    if args.checkpoint:
        results["trained"] = trained = compare_trained(args.checkpoint)
        low, median, high = trained["p_AD"]
        print(f"trained {trained['model']}, {trained['image_size']} px, {trained['slices']} slices with p_AD "
              f"from {low:.2f} to {high:.2f} (median {median:.2f}): largest difference of p_AD to the plain model in "
              f"float32 {trained['float32']:.1g} in float32, {trained['bfloat16']:.1g} in bfloat16", flush=True)
    print(f"training step, {what}", flush=True)
    results["train"] = {}
    for amp in precisions(cpu):
        name = precision_name(amp)
        steps = {kind: step_of(kind, args, args.batch_size, cpu) for kind in (f"torchvision, {name}", f"ours, {name}")}
        results["train"][name] = take_turns(steps, args.repeats)
        show(results["train"][name])
    return results


def measure_gpu(args):
    device, start = pick_device(args.device or "cuda"), time.perf_counter()
    cuda, large = device.type == "cuda", 4 * args.batch_size
    results = {"device": torch.cuda.get_device_name(device) if cuda else "rehearsal on the CPU", "train": {}}
    torch.backends.cudnn.benchmark = True
    print(f"{results['device']}, torch {torch.__version__}\nprediction, batch {large}")
    results["predict"], results["difference_of_p_AD"] = predict(args, device, large, 10)
    show(results["predict"], results["difference_of_p_AD"], large)
    print(f"from files to trained weights, batch {large}")
    results["epoch"] = epoch_on_gpu(args, device)
    names = [precision_name(amp) for amp in precisions(device)]
    eager = [f"{who}, {name}" for name in names for who in ("torchvision", "ours")]
    compiled = [eager[0], *(f"ours, {name}, compiled" for name in names)]
    small, tuned = args.batch_size, [eager[0], f"ours, {names[-1]}, tuned"]
    plan = [(large, eager, 0.8), (large, compiled, 0.6), (small, eager, 0.8), (2 * large, eager, 0.8),
            (large, tuned, 0.5), (small, compiled, 0.6), (2 * large, compiled, 0.6)]  # what matters most, first
    for batch, kinds, latest in plan:
        keep(args, results)
        if time.perf_counter() - start > BUDGET * latest:
            print(f"out of time before batch {batch}, {'; '.join(kinds)}")
            continue
        print(f"training step, batch {batch}")
        torch._dynamo.reset()  # or it takes another batch size for a size that varies
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        rows = take_turns({kind: step_of(kind, args, batch, device) for kind in kinds}, 10, sync_of(device))
        show(rows, images=batch)
        results["train"].setdefault(f"batch {batch}", {}).update(rows)
        if cuda:
            print(f"  peak memory of these together {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    return results


def show(rows, differences=None, images=None):
    for name, row in rows.items():
        rate = f"  {images / row['seconds']:>9,.0f} images/s" if images else ""
        note = f"  (largest difference of p_AD {differences[name]:.1g})" if differences else ""
        print(f"  {name:<50}{row['ratio']:>6.2f} x{rate}{note}", flush=True)


# ---------------------------------------------------------------- the command


def keep(args, results):
    """Add to the results where they come from, and write them: also half-way, for a machine may be taken away."""
    results |= {"model": args.model, "image_size": args.image_size, "batch_size": args.batch_size,
                "machine": results["device"] if args.gpu else machine(), "python": sys.version.split()[0],
                "torch": torch.__version__, "torchvision": torchvision.__version__, "repeats": args.repeats}
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
    results = measure_gpu(args) if args.gpu else measure_cpu(args)
    keep(args, results)
    if args.figure:
        title = f"{args.model}, {args.image_size} px, {results['machine']}"
        rows = {f"predict: {name}": row for name, row in results["predict"].items()}
        rows |= {f"train, {group}: {name}": row for group, part in results["train"].items()
                 for name, row in part.items()}  # fmt: skip
        plots.plot_speed(args.figure, {name: row["ratio"] for name, row in rows.items()}, title)
    print(json.dumps({name: results[name] for name in ("machine", "python", "torch", "torchvision")}))


if __name__ == "__main__":
    run_script(main, ARGS)
