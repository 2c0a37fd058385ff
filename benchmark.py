"""Measure the speed, side by side with torchvision's ConvNeXt in one process.

    python benchmark.py --json cpu.json                # the CPU: prediction, training step, loading; some minutes
    python benchmark.py --gpu --json gpu.json          # a CUDA GPU: ladder of the step, kernels, an epoch; 9 minutes
    python benchmark.py --figure figures/benchmark.png

The reference is what one would write without this project: torchvision.models.convnext_tiny and, end to end,
ImageFolder with PIL transforms and a DataLoader with a worker a core. Candidates take turns, so that a machine that
slows down slows all of them; printed is the ratio to the reference, the median over the turns. What gives another
answer is not timed but refused.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from dataset import Parser, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure a CUDA GPU instead of the CPU")
    parser.add_argument("--compile", action="store_true", help="also predict with torch.compile on the CPU")
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


# Read before torch is imported, so that --help and a mistyped flag answer at once.
ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

import loading  # noqa: E402
import phantom  # noqa: E402
import slices  # noqa: E402
import utils  # noqa: E402
from anatomy import SLICES, render  # noqa: E402
from checkpoint import build_model, load_checkpoint  # noqa: E402
from engine import make_engine, micro_batch  # noqa: E402
from epoch import make_optimizer  # noqa: E402
from modules import VARIANTS, convnext, load_weights  # noqa: E402

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
        raise ValueError(f"{what}: the largest difference is {difference:.2g}; expected at most {limit:.2g}")
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
    """n slices of the phantom, uint8 (n, 1, 240, 256)."""
    drawn = np.concatenate([render(scan) for scan in phantom.plan(20, 1)[: -(-n // SLICES)]])
    return torch.from_numpy(drawn[np.arange(n) % len(drawn), None])


def p_ad(logits):
    return logits.float().softmax(1)[:, 1]


def gradients(model, x, y, device, amp, scale=lambda loss: loss, at_once=2**31):
    """Of the mean loss of a batch, as the recipe has it; `at_once` images at a time, whose gradients are added."""
    for part, labels in zip(x.split(at_once), y.split(at_once)):
        with utils.autocast(device, amp):
            loss = nn.functional.cross_entropy(model(part), labels, label_smoothing=0.1, reduction="sum")
        scale(loss / len(x)).backward()


def step(model, optimizer, x, y, device, amp, scaler=None, at_once=2**31):
    """A training step of the recipe, written once for both models."""
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    optimizer.zero_grad(set_to_none=True)
    gradients(model, x, y, device, amp, scaler.scale, at_once)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


# ---------------------------------------------------------------- the CPU


def predict_on_cpu(args):
    """The engine of predict.py against torchvision's model, both from normalised slices to p_AD."""
    theirs, ours = two_models(args.model, "cpu")
    theirs.eval()
    x, cpu = slices.eval_transform(some_slices(args.batch_size), args.image_size), torch.device("cpu")

    @torch.inference_mode()
    def reference():
        return theirs(x)

    @torch.inference_mode()
    def reference_bf16():
        with utils.autocast(cpu, torch.bfloat16):
            return theirs(x)

    candidates = {"torchvision, float32": reference}
    exact = make_engine(ours, cpu)
    candidates["ours, float32"] = lambda: exact(x)

    def medium():
        torch.set_float32_matmul_precision("medium")  # may compute in bfloat16
        try:
            return exact(x)
        finally:
            torch.set_float32_matmul_precision("highest")

    differences = {"ours, float32": require("the engine in float32", (p_ad(exact(x)) - p_ad(reference())).abs().max(),
                                            1e-4)}  # fmt: skip
    candidates['ours, float32 "medium"'] = medium
    differences['ours, float32 "medium"'] = float((p_ad(medium()) - p_ad(reference())).abs().max())
    if utils.has_native_bf16():
        short = make_engine(ours, cpu, torch.bfloat16)
        candidates |= {"torchvision, bfloat16": reference_bf16, "ours, bfloat16": lambda: short(x)}
        difference = (p_ad(short(x)) - p_ad(reference())).abs().max()
        differences["ours, bfloat16"] = require("the engine in bfloat16", difference, 0.01)
    if args.compile:
        compiled = two_models(args.model, "cpu")[1].eval()
        compiled.compile(dynamic=False)
        at_once = micro_batch(cpu, args.image_size, args.image_size)
        parts = x.contiguous(memory_format=torch.channels_last).split(at_once)

        @torch.inference_mode()
        def compiled_in(amp):
            with utils.autocast(cpu, amp):
                return torch.cat([compiled(part) for part in parts]).float()

        for amp in [None] + [torch.bfloat16] * utils.has_native_bf16():
            name = f"ours without the engine, compiled, {utils.precision_name(amp)}"
            candidates[name] = lambda amp=amp: compiled_in(amp)
            differences[name] = require(name, (p_ad(compiled_in(amp)) - p_ad(reference())).abs().max(), 0.01)
    return take_turns(candidates, args.repeats), differences


def compare_trained(path):
    """The largest difference of p_AD on slices of the phantom between float32 and bfloat16, and the spread of p_AD."""
    checkpoint = load_checkpoint(path)
    model, cpu = build_model(checkpoint).eval(), torch.device("cpu")
    x = slices.eval_transform(some_slices(400), checkpoint["image_size"])
    with torch.inference_mode():
        plain = torch.cat([p_ad(model(part)) for part in x.split(40)])
    exact, short = (p_ad(make_engine(model, cpu, amp)(x)) for amp in (None, torch.bfloat16))
    return {"model": checkpoint["model"]["variant"], "image_size": checkpoint["image_size"], "slices": len(x),
            "p_AD": [plain.min().item(), plain.median().item(), plain.max().item()],
            "float32": require("the engine in float32", (exact - plain).abs().max(), 1e-4),
            "bfloat16": (short - plain).abs().max().item()}  # fmt: skip


def train_on_cpu(args):
    """A training step in each precision: torchvision's model and AdamW as one writes it, and ours, as train.py does."""
    cpu, results = torch.device("cpu"), {}
    x = slices.eval_transform(some_slices(args.batch_size), args.image_size)
    y = torch.arange(args.batch_size) % 2
    at_once = micro_batch(cpu, args.image_size, args.image_size)
    for amp in [None] + [torch.bfloat16] * utils.has_native_bf16():
        theirs, ours = two_models(args.model, "cpu")
        plain = torch.optim.AdamW(theirs.parameters(), lr=1e-6, weight_decay=1e-4)
        fused, scaler = make_optimizer(ours, 1e-6, 1e-4), utils.make_scaler(cpu, amp)
        x_ours = x.contiguous(memory_format=torch.channels_last)
        name = utils.precision_name(amp)
        gradients(theirs, x, y, cpu, amp)
        gradients(ours, x_ours, y, cpu, amp, at_once=at_once)
        a, b = (nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() for model in (theirs, ours))
        require(f"the norm of the gradient in {name}", abs(a - b) / a, 1e-4 if amp is None else 0.02)
        results[name] = take_turns({
            f"torchvision, {name}": lambda: step(theirs, plain, x, y, cpu, amp),  # noqa: B023
            f"ours, {name}": lambda: step(ours, fused, x_ours, y, cpu, amp, scaler, at_once),  # noqa: B023
        }, args.repeats)  # fmt: skip
    return results


def load_on_cpu(args):
    """Decode a set of JPEG slices into the cache, and start again from it; seconds, and memory beyond what was used."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        drawn, root = some_slices(40).numpy()[:, 0].copy(), Path(folder) / "set"
        root.mkdir()
        from PIL import Image

        for number in range(args.slices):
            picture = drawn[number % len(drawn)]
            picture[:8, :128] = np.repeat([255 * (number >> bit & 1) for bit in range(16)], 8)  # no two are equal
            Image.fromarray(picture).save(root / f"{number // 20}_{number % 20}.jpeg", quality=90)
        paths = sorted(map(str, root.iterdir()))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            images, _, errors = loading.decode_once(paths, lambda: (240, 256), root)
            seconds.append(time.perf_counter() - start)
        rows = np.linspace(0, len(paths) - 1, 50).astype(int)
        if errors or not all(np.array_equal(images[row], slices.decode(paths[row])) for row in rows):
            raise ValueError("what the cache holds is not what the files hold")
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**20
    return {"slices": args.slices, "first_start_s": seconds[0], "later_start_s": seconds[1], "peak_GiB": peak}


def measure_cpu(args):
    results = {"device": "cpu"}
    if args.checkpoint:  # a wrong one is told at once
        build_model(load_checkpoint(args.checkpoint))
    results["load"] = found = load_on_cpu(args)  # first: the system remembers only the most memory that was ever used
    print(f"loading {found['slices']:,} JPEG slices: first start {found['first_start_s']:.1f} s, later "
          f"{found['later_start_s']:.2f} s, peak memory {found['peak_GiB']:.2f} GiB beyond what was used before")
    print(f"prediction, {args.model}, {args.image_size} px, batch {args.batch_size}, {torch.get_num_threads()} threads",
          flush=True)  # fmt: skip
    results["predict"], results["difference_of_p_AD"] = predict_on_cpu(args)
    show(results["predict"], results["difference_of_p_AD"])
    if args.checkpoint:
        results["trained"] = trained = compare_trained(args.checkpoint)
        low, median, high = trained["p_AD"]
        print(f"trained {trained['model']}, {trained['image_size']} px, {trained['slices']} slices with p_AD "
              f"from {low:.2f} to {high:.2f} (median {median:.2f}): largest difference of p_AD to the plain model in "
              f"float32 {trained['float32']:.1g} in float32, {trained['bfloat16']:.1g} in bfloat16", flush=True)
    print(f"training step, {args.model}, {args.image_size} px, batch {args.batch_size}", flush=True)
    results["train"] = train_on_cpu(args)
    for rows in results["train"].values():
        show(rows)
    return results


def show(rows, differences=None, images=None):
    for name, row in rows.items():
        rate = f"  {images / row['seconds']:>9,.0f} images/s" if images else ""
        difference = (differences or {}).get(name)
        note = f"  (largest difference of p_AD {difference:.1g})" if difference is not None else ""
        print(f"  {name:<50}{row['ratio']:>6.2f} x{rate}{note}", flush=True)


# ---------------------------------------------------------------- a GPU


def step_on_gpu(kind, variant, batch, image_size, device):
    """A function that takes one training step of a rung of the ladder, once its gradients are right."""
    theirs, ours = two_models(variant, device)
    x = torch.randn(batch, 1, image_size, image_size, device=device)
    y = torch.arange(batch, device=device) % 2
    amp = torch.bfloat16 if "bf16" in kind else half_of(device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    if kind.startswith("torchvision"):
        model, optimizer = theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-6)
    else:
        model, optimizer = ours, make_optimizer(ours, 1e-6, 1e-4)
        x = x.contiguous(memory_format=torch.channels_last)
    if "compiled" in kind:
        model.compile(dynamic=False)
    if "tuned" in kind:
        model.compile(dynamic=False, mode="max-autotune-no-cudagraphs")
    norms = []
    for tried, how in ((theirs, None), (model, amp)):
        tried.zero_grad(set_to_none=True)
        gradients(tried, x, y, device, how, lambda loss: loss * 1024)  # so that none is too small for fp16
        norms.append(nn.utils.get_total_norm([p.grad for p in tried.parameters()]).item())
    require(f"the norm of the gradient of {kind}", abs(norms[1] - norms[0]) / norms[0], 0.05)
    return lambda: step(model, optimizer, x, y, device, amp, scaler)


LADDER = ("torchvision fp16", "ours fp16", "torchvision bf16", "ours bf16", "ours fp16 compiled", "ours bf16 compiled",
          "ours bf16 tuned")  # fmt: skip


def half_of(device):
    return torch.float16 if device.type == "cuda" else torch.bfloat16  # a CPU has none, and only rehearses


def sync_of(device):
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def depthwise_on_gpu(device, batch):
    """Milliseconds of the depthwise 7x7: forward, gradient of the input and of the weight, by shape, layout, type."""
    rows = []
    gradient = torch.ops.aten.convolution_backward
    for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7)):
        for dtype in {half_of(device), torch.bfloat16}:
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
                x = x.contiguous(memory_format=layout)
                w, g = torch.randn(channels, 1, 7, 7, device=device, dtype=dtype), torch.randn_like(x)
                rest = ([channels], [1, 1], [3, 3], [1, 1], False, [0, 0], channels)
                kinds = {
                    "forward": lambda: torch.conv2d(x, w, None, 1, 3, 1, channels),  # noqa: B023
                    "input": lambda: gradient(g, x, w, *rest, [True, False, False]),  # noqa: B023
                    "weight": lambda: gradient(g, x, w, *rest, [False, True, False]),  # noqa: B023
                }
                row = {"channels": channels, "side": side, "dtype": str(dtype)[6:], "layout": str(layout)[6:]}
                for name, work in kinds.items():
                    row[name] = 1e3 * take_turns({name: work}, 5, sync_of(device))[name]["seconds"]
                rows.append(row)
                print("  {channels:>4} x {side:<3}{dtype:<9}{layout:<18}{forward:>8.3f}{input:>8.3f}{weight:>8.3f} ms"
                      .format(**row), flush=True)  # fmt: skip
    return rows


def epoch_on_gpu(args, device):
    """Images a second from JPEG files to trained weights: the reference pipeline, and ours with its cache (which is
    built before the clock starts, as the workers of the reference are started)."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    batch = 4 * args.batch_size
    n = max(1, min(args.slices, 10240) // batch) * batch
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        from PIL import Image

        drawn = some_slices(400).numpy()[:, 0]
        for number in range(n):
            path = Path(folder) / "set" / ("AD" if number % 2 else "NC") / f"{number // 20}_{number}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn[number % len(drawn)]).save(path, quality=90)
        recipe = v2.Compose([
            v2.Grayscale(), v2.RandomResizedCrop(args.image_size, scale=(0.8, 1.0)), v2.RandomHorizontalFlip(),
            v2.RandomRotation(10), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]),
        ])  # fmt: skip
        theirs = ImageFolder(f"{folder}/set", recipe)
        paths, labels = [path for path, _ in theirs.samples], np.array([label for _, label in theirs.samples])
        images, _, _ = loading.decode_once(paths, lambda: (240, 256), folder)
        loaders = {
            "torchvision": DataLoader(theirs, batch, shuffle=True, num_workers=os.cpu_count(), pin_memory=True,
                                      drop_last=True, persistent_workers=True),
            "ours": slices.make_loader(images, np.arange(n), labels, batch, torch.Generator(), device),
        }  # fmt: skip
        results = {}
        for name, batches in loaders.items():
            models = two_models(args.model, device)
            model = models[name == "ours"]
            optimizer = make_optimizer(model, 1e-6, 1e-4) if name == "ours" else torch.optim.AdamW(model.parameters())
            scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
            if name == "ours":
                model.compile(dynamic=False)
            for _ in range(2):  # the first one warms up
                start, seen, waited = time.perf_counter(), 0, 0.0
                before = time.perf_counter()
                for x, y in batches:
                    waited += time.perf_counter() - before
                    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                    if name == "ours":
                        x = slices.train_transform(x, args.image_size).contiguous(memory_format=torch.channels_last)
                    step(model, optimizer, x, y, device, half_of(device), scaler)
                    seen += len(x)
                    before = time.perf_counter()
                sync_of(device)()
                took = time.perf_counter() - start
            results[name] = {"images_per_s": seen / took, "waiting": waited / took}
            print(f"  {name:<34}{seen / took:>9,.0f} images/s, {waited / took:.1%} of it waiting for data", flush=True)
        results["ratio"] = results["ours"]["images_per_s"] / results["torchvision"]["images_per_s"]
        print(f"  ratio {results['ratio']:.2f}")
    return results


def predict_on_gpu(args, device):
    batch = 4 * args.batch_size
    theirs, ours = two_models(args.model, device)
    theirs.eval()
    x = torch.randn(batch, 1, args.image_size, args.image_size, device=device)
    run = make_engine(ours, device, half_of(device))

    @torch.inference_mode()
    def reference():
        with utils.autocast(device, half_of(device)):
            return theirs(x)

    with torch.inference_mode():
        exact = p_ad(theirs(x))
    require("prediction in fp16", (p_ad(run(x)) - exact).abs().max(), 0.01)
    _, fast = two_models(args.model, device)
    fast.compile(dynamic=False)
    compiled = make_engine(fast, device, half_of(device))
    require("compiled prediction in fp16", (p_ad(compiled(x)) - exact).abs().max(), 0.01)
    candidates = {"torchvision fp16": reference, "ours fp16": lambda: run(x), "ours fp16 compiled": lambda: compiled(x)}
    return take_turns(candidates, 10, sync_of(device))


def measure_gpu(args):
    device, start = utils.pick_device(args.device or "cuda"), time.perf_counter()
    cuda, large = device.type == "cuda", 4 * args.batch_size
    results = {"device": torch.cuda.get_device_name(device) if cuda else "rehearsal on the CPU", "ladder": {}}
    torch.backends.cudnn.benchmark = True
    print(f"{results['device']}, torch {torch.__version__}")
    print(f"depthwise 7x7, batch {large}: forward, gradient of the input, of the weight")
    results["depthwise"] = depthwise_on_gpu(device, large)
    print(f"prediction, batch {large}")
    results["predict"] = predict_on_gpu(args, device)
    show(results["predict"], images=large)
    print(f"from files to trained weights, batch {large}, fp16")
    results["epoch"] = epoch_on_gpu(args, device)
    small, eager, compiled, tuned = args.batch_size, LADDER[:4], (LADDER[0], *LADDER[4:6]), (LADDER[0], LADDER[6])
    plan = [(large, eager, 0.8), (large, compiled, 0.6), (small, eager, 0.8), (2 * large, eager, 0.8),
            (large, tuned, 0.5), (small, compiled, 0.6), (2 * large, compiled, 0.6)]  # what matters most, first
    for batch, names, latest in plan:
        keep(args, results)
        if time.perf_counter() - start > BUDGET * latest:
            print(f"out of time before batch {batch}, {', '.join(names)}")
            continue
        print(f"training step, batch {batch}")
        torch._dynamo.reset()  # or it takes another batch size for a size that varies
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        candidates = {name: step_on_gpu(name, args.model, batch, args.image_size, device) for name in names}
        rows = take_turns(candidates, 10, sync_of(device))
        show(rows, images=batch)
        results["ladder"].setdefault(str(batch), {}).update(rows)
        if cuda:
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(f"  peak memory of these together {peak:.1f} GiB", flush=True)
    return results


# ---------------------------------------------------------------- the command


def keep(args, results):
    """Add to the results where they come from, and write them: also half-way, for a machine may be taken away."""
    results |= {"model": args.model, "image_size": args.image_size, "batch_size": args.batch_size,
                "machine": results["device"] if args.gpu else machine(), "python": sys.version.split()[0],
                "torch": torch.__version__, "torchvision": torchvision.__version__, "repeats": args.repeats}
    if args.json:
        utils.write_json(args.json, results)


def ratios_of(results):
    """What --figure draws."""
    steps = results["train"] if "train" in results else {f"batch {n}": part for n, part in results["ladder"].items()}
    rows = {f"predict: {name}": row for name, row in results["predict"].items()}
    rows |= {f"train, {group}: {name}": row for group, part in steps.items() for name, row in part.items()}
    return {name: row["ratio"] for name, row in rows.items()}


def machine():
    """The processor's name, and how many of its cores are used."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def main(args):
    if args.model not in ("tiny", "small", "base", "large"):
        raise ValueError(f"torchvision has no ConvNeXt {args.model!r}; choose tiny, small, base or large")
    results = measure_gpu(args) if args.gpu else measure_cpu(args)
    keep(args, results)
    if args.figure:
        title = f"{args.model}, {args.image_size} px, {results['machine']}"
        utils.plot_speed(args.figure, ratios_of(results), title)
    print(json.dumps({name: results[name] for name in ("machine", "python", "torch", "torchvision")}))


if __name__ == "__main__":
    run(main, ARGS)
