"""Measure speed side by side with torchvision's ConvNeXt, in one process.

    python -m tools.benchmark --json cpu.json          # the CPU: prediction and training step
    python -m tools.benchmark --gpu --json gpu.json    # a CUDA GPU: also compiled, and whole epochs

The reference is what one writes without this project: torchvision.models.convnext_tiny in a plain
loop and, end to end, ImageFolder with PIL transforms and a DataLoader with a worker a core.
Candidates take turns, so that a machine that slows down slows all of them; printed is the ratio to
the reference, the median over the turns. A candidate that gives another answer is refused. OpenVINO
and ONNX Runtime are candidates for prediction on a CPU if they are installed."""

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

import numpy as np
import pandas as pd
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adnc.cli import COUNT, SIDE, Parser, run_script
from adnc.cpu_engine import make_engine
from adnc.data.augment import eval_transform
from adnc.data.pixels import decode_files
from adnc.errors import InputError
from adnc.files import write_json
from adnc.phantom.anatomy import SLICES, Scan, render
from dataset import Batches, SliceSet
from modules import VARIANTS, convnext, load_weights
from train import TrainState, make_loss, train_one_epoch, train_step
from utils import autocast, has_native_bf16, pick_device, precision_name

# ---------------------------------------------------------------- measuring


def take_turns(candidates, repeats, sync=lambda: None):
    """Seconds of each candidate (a dict of functions), in `repeats` turns after one that does not
    count.

    Returns {name: {"seconds": median, "ratio": median over the turns of first / this}}; the first
    is the reference. """
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
    rows = {}
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(reference, times))
        rows[name] = {"seconds": statistics.median(times), "ratio": ratio}
    return rows


def require(what, difference, limit):
    """InputError for a wrong answer, which is not worth timing."""
    if not difference <= limit:
        raise InputError(
            f"{what}: the largest difference is {difference:.2g}; expected at most {limit:.2g}"
        )
    return float(difference)


def sync_of(device):
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def precisions(device):
    """The dtypes of autocast that are measured on a device, the reference first; None is
    float32."""
    if device.type == "cuda":
        return [torch.float16, torch.bfloat16]
    return [None, torch.bfloat16] if has_native_bf16() else [None]


def show(rows, batch, device, notes=None):
    """Print ratios; images a second only for a GPU, since those of a shared CPU mean nothing."""
    for name, row in rows.items():
        text = f"  {name:<40}{row['ratio']:>6.2f} x"
        if device.type == "cuda":
            text += f"  {batch / row['seconds']:>9,.0f} images/s"
        if notes:
            text += f"  (largest difference of p_AD {notes[name]:.1g})"
        print(text, flush=True)


# ---------------------------------------------------------------- models and slices


def two_models(variant, device, in_chans=1, num_classes=2):
    """(torchvision's model, ours) with the same random weights, LayerScale about 0.1 so that every
    block counts. Neither drops paths, which would be random."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"convnext_{variant}")(
        num_classes=num_classes, stochastic_depth_prob=0.0
    )
    theirs.features[0][0] = nn.Conv2d(
        in_chans, VARIANTS[variant]["dims"][0], kernel_size=4, stride=4
    )
    for p in theirs.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, mean=0.0, std=0.03)
        else:
            nn.init.normal_(p, mean=0.1, std=0.1)
    ours = convnext(variant, in_chans=in_chans, num_classes=num_classes)
    load_weights(ours, theirs.state_dict())
    return theirs.to(device), ours.to(device, memory_format=torch.channels_last)


def parity(variant):
    """Our ConvNeXt and torchvision's with the same weights on a batch of 2 x 96 x 96 in float32:
    parameters of both, the largest difference of the logits, and their SD."""
    theirs, ours = (
        model.eval() for model in two_models(variant, "cpu", in_chans=3, num_classes=1000)
    )
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        a, b = ours(x), theirs(x)
    return {
        "ours": sum(p.numel() for p in ours.parameters()),
        "torchvision": sum(p.numel() for p in theirs.parameters()),
        "difference": (a - b).abs().max().item(),
        "SD": b.std().item(),
    }


def some_slices(n):
    """n slices of the phantom, uint8 (n, 1, 240, 256), of a few brains from little to much
    atrophy."""
    latents = np.linspace(-2, 2, min(20, -(-n // SLICES)))
    scans = [
        Scan(i, f"001_S_{i:04d}", "AD", "train", 67, float(latent), 0)
        for i, latent in enumerate(latents)
    ]
    drawn = np.concatenate([render(scan) for scan in scans])
    return torch.from_numpy(drawn[np.arange(n) % len(drawn), None])


def p_ad(logits):
    return logits.float().softmax(1)[:, 1]


# ---------------------------------------------------------------- prediction


def measure_prediction(variant, image_size, batch, device, repeats):
    """From normalised slices to logits: torchvision's model, the engine of predict.py, and other
    runtimes. Returns (rows, differences): of `take_turns`, and the largest difference of p_AD to
    torchvision in float32 of each."""
    theirs, ours = two_models(variant, device)
    theirs.eval()
    x = eval_transform(some_slices(batch).to(device), image_size)

    @torch.inference_mode()
    def reference(amp):
        with autocast(device, amp):
            return theirs(x)

    candidates = {}
    for amp in precisions(device):
        name = precision_name(amp)
        candidates[f"torchvision, {name}"] = functools.partial(reference, amp)
        candidates[f"ours, {name}"] = functools.partial(
            make_engine(ours, device=device, amp=amp), x
        )
        if device.type == "cuda":
            compiled = two_models(variant, device)[1]
            compiled.compile()
            engine = make_engine(compiled, device=device, amp=amp)
            candidates[f"ours, {name}, compiled"] = functools.partial(engine, x)
    if device.type == "cpu":
        candidates.update(other_runtimes(theirs, x))
    exact = p_ad(reference(None))
    differences = {}
    for name, work in candidates.items():
        limit = 1e-4 if name.endswith("float32") else 0.01
        differences[name] = require(f"p_AD of {name}", (p_ad(work()) - exact).abs().max(), limit)
    return take_turns(candidates, repeats, sync_of(device)), differences


def other_runtimes(model, x):
    """{name: function} of torch.compile, ONNX Runtime and OpenVINO in float32, those that are
    installed."""
    candidates = {}
    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    try:
        import openvino
    except ImportError:
        openvino = None
    if onnxruntime is None and openvino is None:
        return candidates
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=True)
        if onnxruntime is not None:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            candidates["ONNX Runtime, float32"] = lambda: torch.from_numpy(
                session.run(None, {"x": x.numpy()})[0]
            )
        if openvino is not None:
            hints = {"INFERENCE_PRECISION_HINT": "f32"}
            compiled = openvino.Core().compile_model(path, "CPU", hints)
            candidates["OpenVINO, float32"] = lambda: torch.from_numpy(compiled(x.numpy())[0])
    return candidates


# ---------------------------------------------------------------- training steps


def plain_step(model, device, amp):
    """A function (x, y) that takes a training step of the recipe as one writes it without this
    project."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    def step(x, y):
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, amp):
            loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def our_step(model, x, y, device, amp, exact_norm):
    """A function that takes a training step of train.py, once the norm of its gradient is right."""
    state = TrainState(model, device=device, amp=amp, lr=1e-6)
    criterion = make_loss(0.1)
    for _ in range(10):  # a GradScaler begins by finding its scale
        skipped = train_step(state, x, y, criterion=criterion, clip_grad=1e9)[3]
        if not skipped:
            break
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    limit = 1e-4 if amp is None else 0.05
    require("the norm of the gradient", abs(norm - exact_norm) / exact_norm, limit)
    return lambda: train_step(state, x, y, criterion=criterion)


def measure_steps(variant, image_size, batch, device, amp, repeats):
    """Training steps of torchvision's model by `plain_step` and of ours as in train.py; rows of
    `take_turns`."""
    x = eval_transform(some_slices(batch).to(device), image_size)
    y = torch.arange(batch, device=device) % 2
    theirs, ours = two_models(variant, device)
    nn.functional.cross_entropy(theirs(x), y, label_smoothing=0.1).backward()
    exact_norm = nn.utils.get_total_norm([p.grad for p in theirs.parameters()]).item()

    name = precision_name(amp)
    candidates = {
        f"torchvision, {name}": functools.partial(plain_step(theirs, device, amp), x, y),
        f"ours, {name}": our_step(ours, x, y, device, amp, exact_norm),
    }
    if device.type == "cuda":
        compiled = two_models(variant, device)[1]
        compiled.compile()
        candidates[f"ours, {name}, compiled"] = our_step(compiled, x, y, device, amp, exact_norm)
    return take_turns(candidates, repeats, sync_of(device))


# ---------------------------------------------------------------- from files to trained weights


def write_jpegs(root, drawn, n):
    """Write n JPEG slices under `root`/AD and NC, no two equal; returns their paths."""
    for i in range(n):
        picture = drawn[i % len(drawn)].copy()
        picture[:8, :128] = np.repeat([255 * (i >> bit & 1) for bit in range(16)], 8)
        path = root / ("AD" if i % 2 else "NC") / f"{i // 20}_{i}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, quality=90)
    return sorted(map(str, root.rglob("*.jpeg")))


def their_epoch(variant, image_size, folder, batch, device, amp):
    """A function that trains for an epoch as one writes it without this project, and returns images
    a second."""
    recipe = v2.Compose([
        v2.Grayscale(),
        v2.RandomResizedCrop(image_size, scale=(0.8, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.RandomRotation(10),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5], [0.5]),
    ])  # fmt: skip
    batches = DataLoader(
        ImageFolder(folder, recipe), batch, shuffle=True, num_workers=os.cpu_count(),
        pin_memory=True, drop_last=True, persistent_workers=True,
    )  # fmt: skip
    step = plain_step(two_models(variant, device)[0], device, amp)

    def epoch():
        start = time.perf_counter()
        for x, y in batches:
            step(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
        sync_of(device)()
        return len(batches) * batch / (time.perf_counter() - start)

    return epoch


def our_epoch(variant, image_size, paths, batch, device, amp):
    """The same as train.py does it: decoded once, before the clock starts."""
    images, _, _ = decode_files(paths, lambda: (240, 256))
    index = pd.DataFrame(
        {"row": np.arange(len(paths)), "label": [Path(path).parent.name for path in paths]}
    )
    batches = Batches(SliceSet(index, images), batch, generator=torch.Generator(), device=device)
    state = TrainState(two_models(variant, device)[1], device=device, amp=amp, lr=1e-6)
    state.model.compile()
    schedule = dict(steps_per_epoch=len(batches), epochs=100, warmup_epochs=1, lr=1e-6)

    def epoch():
        row = train_one_epoch(
            state, batches, criterion=make_loss(0.1), schedule=schedule, image_size=image_size
        )
        return row["images_per_s"]

    return epoch


def measure_epochs(variant, image_size, batch, device, n_slices):
    """Images a second from JPEG files to trained weights, of the reference pipeline and of ours."""
    amp = precisions(device)[-1]
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        n_slices = max(1, n_slices // batch) * batch
        paths = write_jpegs(Path(folder), some_slices(400).numpy()[:, 0], n_slices)
        epochs = {
            "torchvision, ImageFolder": their_epoch(
                variant, image_size, folder, batch, device, amp
            ),
            "ours, compiled": our_epoch(variant, image_size, paths, batch, device, amp),
        }
        for name, epoch in epochs.items():
            epoch()  # warms up
            rates[name] = epoch()
            ratio = rates[name] / next(iter(rates.values()))
            print(f"  {name:<40}{ratio:>6.2f} x  {rates[name]:>9,.0f} images/s", flush=True)
    return rates


# ---------------------------------------------------------------- command


def machine(device):
    """The name of the GPU, or of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    match = (
        re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        if info.exists()
        else None
    )
    return f"{match[1] if match else platform.machine()}, {torch.get_num_threads()} threads"


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--gpu", action="store_true", help="measure a CUDA GPU instead of the CPU")
    add = parser.add_argument_group("what is measured").add_argument
    add(
        "--model",
        default="tiny",
        choices=("tiny", "small", "base", "large"),
        help="of torchvision's (tiny)",
    )
    add(
        "--image-size", type=SIDE, default=224, metavar="PX", help="side of the model's input (224)"
    )
    add(
        "--batch-size",
        type=COUNT,
        default=64,
        metavar="N",
        help="slices at once; on a GPU also 4 N (64)",
    )
    add(
        "--slices",
        type=COUNT,
        default=10240,
        metavar="N",
        help="JPEG files of an epoch, on a GPU (10240)",
    )
    add("--repeats", type=COUNT, default=5, metavar="N", help="turns of each candidate (5)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = pick_device("cuda" if args.gpu else "cpu")
    torch.backends.cudnn.benchmark = args.gpu
    results = {
        "machine": machine(device),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    print(json.dumps(results), flush=True)
    results.update(
        model=args.model,
        image_size=args.image_size,
        batch_size=args.batch_size,
        repeats=args.repeats,
    )

    def keep():  # after each part: a machine may be taken away
        if args.json:
            write_json(args.json, results)

    results["parity"] = found = parity(args.model)
    print(
        f"with torchvision's weights, 3 channels, 1,000 classes: {found['ours']:,} parameters, "
        f"torchvision's has {found['torchvision']:,}; largest difference of the logits "
        f"{found['difference']:.1g}, SD {found['SD']:.2g}"
    )
    batches = [args.batch_size]
    if args.gpu:
        batches.append(4 * args.batch_size)
        print(f"from files to trained weights, batch {batches[-1]}", flush=True)
        results["epoch"] = measure_epochs(
            args.model, args.image_size, batches[-1], device, args.slices
        )
        keep()
    for batch in batches:
        print(f"prediction, {args.model}, {args.image_size} px, batch {batch}", flush=True)
        rows, differences = measure_prediction(
            args.model, args.image_size, batch, device, args.repeats
        )
        results[f"predict, batch {batch}"] = rows
        results[f"difference of p_AD, batch {batch}"] = differences
        show(rows, batch, device, differences)
        keep()
        for amp in precisions(device):
            print(f"training step, {args.model}, {args.image_size} px, batch {batch}", flush=True)
            rows = measure_steps(args.model, args.image_size, batch, device, amp, args.repeats)
            results.setdefault(f"train, batch {batch}", {}).update(rows)
            show(rows, batch, device)
            keep()


if __name__ == "__main__":
    run_script(main)
