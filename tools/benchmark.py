"""Measure speed side by side with torchvision's ConvNeXt, in one process.

    python -m tools.benchmark --json cpu.json                   # the CPU: prediction, training step
    python -m tools.benchmark --compile --json cpu.json         # also torch.compile
    python -m tools.benchmark --gpu --compile --json gpu.json   # a CUDA GPU: also whole epochs

The reference is what one writes without this project: torchvision.models.convnext_tiny in a plain
loop, and for whole epochs ImageFolder with a DataLoader. Candidates take turns, so that a machine
that slows down slows all of them. The printed ratio is the speed relative to the reference, the
median over the turns. A candidate with another answer than the reference is an error. Further
candidates for prediction on a CPU: OpenVINO and ONNX Runtime (with onnx and onnxscript), if they
are installed, and with --compile torch.compile with freezing.
"""

import copy
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adnc.cli import COUNT, SIDE, Parser, number, run_script
from adnc.cpu_engine import make_engine
from adnc.data.augment import eval_transform
from adnc.errors import InputError, count
from adnc.files import require_new, write_json
from adnc.phantom.anatomy import SLICES, Scan, render
from adnc.phantom.draw import draw
from adnc.resources import wait_for
from dataset import Batches, decode_set
from modules import VARIANTS, convnext, load_weights
from train import TrainState, make_loss, train_one_epoch, train_step
from utils import autocast, device_name, has_native_bf16, pick_device, precision_name

TINY_LR = 1e-6  # the weights of all candidates stay about the same

# ---------------------------------------------------------------- measuring


def take_turns(candidates, repeats, wait=lambda: None):
    """Time each candidate (a dict of functions) in `repeats` turns, after one that does not count.

    Every second turn goes backwards, so that no candidate always follows the same one, whose
    threads may still be waiting for work. `wait` waits for the device. Returns {name: {"seconds":
    median, "ratio": median over the turns of reference / candidate}}; the first candidate is the
    reference.
    """
    seconds = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        names = list(candidates)
        if turn % 2:
            names.reverse()
        for name in names:
            wait()
            start = time.perf_counter()
            candidates[name]()
            wait()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)

    reference = next(iter(seconds.values()))
    rows = {}
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(reference, times))
        rows[name] = {"seconds": statistics.median(times), "ratio": ratio}
    return rows


def require_close(what, difference, limit):
    """The difference as a float. InputError if it is above the limit, or not a number."""
    if not difference <= limit:
        raise InputError(
            f"{what}: the largest difference is {difference:.2g}; expected at most {limit:.2g}"
        )
    return float(difference)


def precisions(device):
    """The dtypes of autocast that are measured on a device; None is float32."""
    if device.type == "cuda":
        return [torch.float16, torch.bfloat16]
    if has_native_bf16():
        return [None, torch.bfloat16]
    return [None]


# ---------------------------------------------------------------- models and slices


def two_models(variant, device, in_chans=1, num_classes=2):
    """(torchvision's model, ours) with the same random weights and without DropPath.

    LayerScale is about 0.1: at the 1e-6 of a new model the blocks would have no visible effect.
    """
    torch.manual_seed(0)
    make = getattr(torchvision.models, f"convnext_{variant}")
    theirs = make(num_classes=num_classes, stochastic_depth_prob=0.0)
    first_dim = VARIANTS[variant]["dims"][0]
    theirs.features[0][0] = nn.Conv2d(in_chans, first_dim, kernel_size=4, stride=4)
    for p in theirs.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, mean=0.0, std=0.03)
        else:
            nn.init.normal_(p, mean=0.1, std=0.1)
    ours = convnext(variant, in_chans=in_chans, num_classes=num_classes)
    load_weights(ours, theirs.state_dict())
    return theirs.to(device), ours.to(device, memory_format=torch.channels_last)


def measure_parity(variant):
    """Number of parameters and logits of both models, with the same weights, in float32.

    The input is a batch of 2 x 3 x 96 x 96, the output has 1,000 classes.
    """
    theirs, ours = two_models(variant, "cpu", in_chans=3, num_classes=1000)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected, answer = theirs.eval()(x), ours.eval()(x)
    return {
        "ours": sum(p.numel() for p in ours.parameters()),
        "torchvision": sum(p.numel() for p in theirs.parameters()),
        "difference": (answer - expected).abs().max().item(),
        "SD": expected.std().item(),
    }


def draw_slices(n):
    """n slices of the phantom, uint8 (n, 1, 240, 256), of up to 20 brains."""
    atrophies = np.linspace(-2, 2, min(20, -(-n // SLICES)))
    scans = []
    for i, atrophy in enumerate(atrophies):
        scans.append(Scan(i, f"001_S_{i:04d}", "AD", "train", 67, float(atrophy), 0))
    slices = np.concatenate([render(scan) for scan in scans])
    return torch.from_numpy(slices[np.arange(n) % len(slices), None])


# ---------------------------------------------------------------- prediction


def measure_prediction(variant, image_size, batch_size, device, repeats, with_compile):
    """Time from normalised slices to logits; rows of `take_turns`.

    Each row has the largest difference of p_AD from torchvision's model in float32 as well.
    """
    theirs, ours = two_models(variant, device)
    theirs.eval()
    x = eval_transform(draw_slices(batch_size).to(device), image_size)

    expected = p_ad(plain_prediction(theirs, device, None)(x))
    candidates, differences = {}, {}
    runtimes = {}
    if device.type == "cpu":
        runtimes = other_runtimes(theirs, x)
    for amp in precisions(device):
        precision = precision_name(amp)
        here = {
            f"torchvision, {precision}": plain_prediction(theirs, device, amp),
            f"ours, {precision}": make_engine(ours, device=device, amp=amp),
        }
        if with_compile:
            frozen = {"freezing": True} if device.type == "cpu" else None
            compiled = torch.compile(copy.deepcopy(theirs), options=frozen)
            here[f"torchvision, {precision}, compiled"] = plain_prediction(compiled, device, amp)
        if with_compile and device.type == "cuda":  # on a CPU the engine is not compiled
            compiled = copy.deepcopy(ours)
            compiled.compile()
            engine = make_engine(compiled, device=device, amp=amp)
            here[f"ours, {precision}, compiled"] = engine
        here |= runtimes.get(amp, {})

        limit = 1e-4 if amp is None else 0.01
        for name, predict in here.items():
            difference = (p_ad(predict(x)) - expected).abs().max()
            differences[name] = require_close(f"p_AD of {name}", difference, limit)
        candidates |= here

    work = {name: functools.partial(predict, x) for name, predict in candidates.items()}
    rows = take_turns(work, repeats, functools.partial(wait_for, device))
    for name, row in rows.items():
        row["difference of p_AD"] = differences[name]
    return rows


def p_ad(logits):
    return logits.float().softmax(1)[:, 1]


def plain_prediction(model, device, amp):
    """A function from images to logits as one writes it without this project."""

    @torch.inference_mode()
    def predict(x):
        with autocast(device, amp):
            return model(x)

    return predict


RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
EXPORT = ("onnx", "onnxscript")  # what they need, to read a model of PyTorch


def installed_runtimes():
    """The packages of RUNTIMES that can be timed here."""
    if not all(find_spec(name) for name in EXPORT):
        return []
    return [name for name in RUNTIMES if find_spec(name)]


def other_runtimes(model, x):
    """{dtype, None for float32: {name: function from images to logits}} of ONNX Runtime and
    OpenVINO, each if it is installed.

    They have the threads of PyTorch, and are given the size of the batch x in advance, which is
    faster.
    """
    installed = installed_runtimes()
    runtimes = {amp: {} for amp in precisions(torch.device("cpu"))}
    if not installed:
        return runtimes
    batch = torch.export.Dim("batch")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(
            model, (x[:2],), path, input_names=["x"], dynamo=True, dynamic_shapes=({0: batch},),
            verbose=False,
        )  # fmt: skip
        if "onnxruntime" in installed:
            runtimes[None] |= onnx_runtime(path, len(x))
        if "openvino" in installed:
            for amp, candidates in runtimes.items():
                candidates |= open_vino(path, x.shape, amp)
    return runtimes


def onnx_runtime(path, batch_size):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_free_dimension_override_by_name("batch", batch_size)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(x):
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return {"ONNX Runtime, float32": predict}


def open_vino(path, shape, amp):
    """OpenVINO in a precision, with its two hints: one request for the whole batch (latency), or as
    many at once as it proposes, each with a part of the batch (throughput)."""
    import openvino

    core, candidates = openvino.Core(), {}
    for hint in ("LATENCY", "THROUGHPUT"):
        properties = {
            "INFERENCE_PRECISION_HINT": "f32" if amp is None else "bf16",
            "PERFORMANCE_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        model = core.read_model(path)
        queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", properties))
        name = f"OpenVINO, {precision_name(amp)}, {hint.lower()}"
        n_slices, n_parts = shape[0], len(queue)
        if n_slices % n_parts == 0:
            model.reshape([n_slices // n_parts, *shape[1:]])
            queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", properties), n_parts)
        else:
            name += f", {n_parts} unequal parts"  # for which it cannot know the size of the batch
        candidates[name] = predict_in_parts(queue)
    return candidates


def predict_in_parts(queue):
    """A function from images to logits by an AsyncInferQueue, a part of the batch for each of its
    requests."""

    def predict(x):
        parts = x.chunk(len(queue))
        logits = [None for _ in parts]

        def keep(request, i):
            logits[i] = torch.from_numpy(request.get_output_tensor(0).data.copy())

        queue.set_callback(keep)
        for i, part in enumerate(parts):
            queue.start_async({"x": part.numpy()}, i)
        queue.wait_all()
        return torch.cat(logits)

    return predict


# ---------------------------------------------------------------- training steps


def plain_step(model, device, amp):
    """A function (x, y): a training step of the recipe as one writes it without this project."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY_LR, weight_decay=1e-4)
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


def our_step(model, device, amp):
    """A function (x, y): a training step of train.py."""
    state = TrainState(model, device=device, amp=amp, lr=TINY_LR)
    return functools.partial(train_step, state, criterion=make_loss(0.1), clip_grad=1.0)


def gradient_norm(model, x, y, device, amp):
    """The norm of the gradient of one training step of train.py, before it is clipped."""
    state = TrainState(model, device=device, amp=amp, lr=TINY_LR)
    for _ in range(10):  # the GradScaler of float16 skips steps until it has its scale
        skipped = train_step(state, x, y, criterion=make_loss(0.1), clip_grad=1e9)[3]
        if not skipped:
            break
    return nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def measure_steps(variant, image_size, batch_size, device, repeats, with_compile):
    """Time training steps, in each precision against torchvision's model; rows of `take_turns`."""
    x = eval_transform(draw_slices(batch_size).to(device), image_size)
    y = torch.arange(batch_size, device=device) % 2
    theirs, ours = two_models(variant, device)
    nn.functional.cross_entropy(theirs(x), y, label_smoothing=0.1).backward()
    expected = nn.utils.get_total_norm([p.grad for p in theirs.parameters()]).item()

    rows = {}
    for amp in precisions(device):
        name = precision_name(amp)
        norm = gradient_norm(ours, x, y, device, amp)
        limit = 1e-4 if amp is None else 0.05
        what = f"the norm of the gradient in {name}, relative to torchvision's"
        require_close(what, abs(norm / expected - 1), limit)

        steps = {
            f"torchvision, {name}": plain_step(theirs, device, amp),
            f"ours, {name}": our_step(ours, device, amp),
        }
        if with_compile:
            compiled = [copy.deepcopy(model) for model in (theirs, ours)]
            for model in compiled:
                model.compile()
            steps[f"torchvision, {name}, compiled"] = plain_step(compiled[0], device, amp)
            steps[f"ours, {name}, compiled"] = our_step(compiled[1], device, amp)
        work = {key: functools.partial(step, x, y) for key, step in steps.items()}
        rows.update(take_turns(work, repeats, functools.partial(wait_for, device)))
    return rows


# ---------------------------------------------------------------- whole epochs


def their_epoch(variant, image_size, batch_size, root, device, amp):
    """A function that trains for an epoch as one writes it without this project."""
    recipe = v2.Compose([
        v2.Grayscale(),
        v2.RandomResizedCrop(image_size, scale=(0.8, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.RandomRotation(10),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5], [0.5]),
    ])  # fmt: skip
    images = ImageFolder(root / "train", recipe)
    batches = DataLoader(
        images,
        batch_size,
        shuffle=True,
        num_workers=os.cpu_count(),
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )
    step = plain_step(two_models(variant, device)[0], device, amp)

    def epoch():
        for x, y in batches:
            step(x.to(device, non_blocking=True), y.to(device, non_blocking=True))

    return epoch


def our_epoch(variant, image_size, batch_size, slices, device, amp, with_compile=False):
    """The same as train.py does it, with slices that were decoded before."""
    batches = Batches(slices, batch_size, generator=torch.Generator(), device=device)
    state = TrainState(two_models(variant, device)[1], device=device, amp=amp, lr=TINY_LR)
    if with_compile:
        state.model.compile()
    schedule = dict(steps_per_epoch=len(batches), epochs=100, warmup_epochs=1, lr=TINY_LR)

    return functools.partial(
        train_one_epoch,
        state,
        batches,
        criterion=make_loss(0.1),
        schedule=schedule,
        image_size=image_size,
    )


def measure_epochs(variant, image_size, batch_size, device, subjects, repeats, with_compile):
    """Time whole epochs: torchvision's model with JPEG files that each epoch decodes, and ours with
    slices that a run decodes once, before. Rows of `take_turns`, with slices per second as
    "rate"."""
    amp = precisions(device)[-1]
    with tempfile.TemporaryDirectory() as folder:
        root = draw(Path(folder) / "phantom", subjects)
        slices = decode_set(root, use_cache=False).part("train")
        size = (variant, image_size, batch_size)
        epochs = {
            "torchvision, ImageFolder": their_epoch(*size, root, device, amp),
            "ours, decoded before": our_epoch(*size, slices, device, amp),
        }
        if with_compile:
            epochs["ours, decoded before, compiled"] = our_epoch(*size, slices, device, amp, True)
        rows = take_turns(epochs, repeats, functools.partial(wait_for, device))
    return {name: {**row, "rate": len(slices) / row["seconds"]} for name, row in rows.items()}


# ---------------------------------------------------------------- command


def machine_name(device):
    """The name of the GPU, or of the processor with the number of threads."""
    if device.type == "cuda":
        return device_name(device)
    return f"{device_name(device)}, {count(torch.get_num_threads(), 'thread')}"


def format_rows(rows, batch_size, device):
    """Lines with ratios; slices per second only of a GPU, since those of a shared CPU vary."""
    for name, row in rows.items():
        line = f"  {name:<40}{row['ratio']:>6.2f} x"
        if device.type == "cuda":
            rate = row["rate"] if "rate" in row else batch_size / row["seconds"]
            line += f"  {rate:>9,.0f} slices/s"
        if "difference of p_AD" in row:
            line += f"  (largest difference of p_AD {row['difference of p_AD']:.1g})"
        yield line


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--gpu", action="store_true", help="measure a CUDA GPU instead of the CPU")
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile, which needs a C++ compiler"
    )
    add = parser.add_argument_group("what is measured").add_argument
    variants, subjects = ("tiny", "small", "base", "large"), number(10, 5000, int)
    add("--model", default="tiny", choices=variants, help="variant of torchvision's (tiny)")
    add("--image-size", type=SIDE, default=224, metavar="PX", help="side of the input (224)")
    add("--batch-size", type=COUNT, default=64, metavar="N", help="slices at once (64)")
    add("--subjects", type=subjects, default=240, metavar="N", help="of whole epochs (240)")
    add("--repeats", type=COUNT, default=5, metavar="N", help="turns of each candidate (5)")
    args = parser.parse_args(argv)

    if args.json and not Path(args.json).parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {Path(args.json).parent}")
    if args.json:
        require_new(args.json, "--json")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = pick_device("cuda" if args.gpu else "cpu")
    torch.backends.cudnn.benchmark = args.gpu
    results = {
        "machine": machine_name(device),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    print(json.dumps(results), flush=True)
    results["flags"] = vars(args)
    if device.type == "cpu":
        for name, title in RUNTIMES.items():
            if name in installed_runtimes():
                results[name] = import_module(name).__version__
                print(f"{title} {results[name]}")
            else:
                print(f"left out: {title}, which needs the packages {name}, onnx and onnxscript")

    results["parity"] = parity = measure_parity(args.model)
    print(
        f"with torchvision's weights, 3 channels, 1,000 classes: {parity['ours']:,} parameters, "
        f"torchvision's has {parity['torchvision']:,}; largest difference of the logits "
        f"{parity['difference']:.1g}, SD {parity['SD']:.2g}"
    )

    size = (args.model, args.image_size, args.batch_size, device)
    parts = {
        "prediction": lambda: measure_prediction(*size, args.repeats, args.compile),
        "training step": lambda: measure_steps(*size, args.repeats, args.compile),
    }
    if args.gpu:
        parts["whole epochs"] = lambda: measure_epochs(
            *size, args.subjects, args.repeats, args.compile
        )
    for part, measure in parts.items():
        print(f"{part}, {args.model}, {args.image_size} px, batch {args.batch_size}", flush=True)
        results[part] = measure()
        for line in format_rows(results[part], args.batch_size, device):
            print(line, flush=True)
        if args.json:  # after each part: a machine may be taken away
            write_json(args.json, results)


if __name__ == "__main__":
    run_script(main)
