"""What a run costs, and its scalars for TensorBoard."""

import json
import sys

import pandas as pd
import pytest
import torch
from conftest import train_small

import train
from adnc import resources
from adnc.errors import InputError
from modules import convnext, make_model
from tools import evaluate
from utils import build_model, load_checkpoint


def test_convnext_t_has_the_parameters_and_multiply_adds_of_the_paper():
    # Liu et al. 2022, table 1: 28.6 M parameters, 4.5 G FLOPs (multiply-adds) at 224 px
    model = convnext("tiny", in_chans=3, num_classes=1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 28.6
    assert round(resources.count_multiply_adds(model, 224, in_chans=3) / 1e9, 1) == 4.5


def test_multiply_adds_of_a_convolution_are_those_of_its_definition():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1, bias=False))
    assert resources.count_multiply_adds(model, 10) == 10 * 10 * 8 * 9
    depthwise = torch.nn.Conv2d(4, 4, 7, padding=3, groups=4)
    assert resources.count_multiply_adds(depthwise, 5, in_chans=4) == 5 * 5 * 4 * 49


@pytest.mark.parametrize("variant", ["narrow", "cnn"])
def test_counting_leaves_the_model_as_it_is(variant):
    model = make_model(variant).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resources.count_multiply_adds(model, 64)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_writes_what_it_has_cost(run_folder):
    used = json.loads((run_folder / "resources.json").read_text())
    model = build_model(load_checkpoint(run_folder / "best_model.pth"))
    history = pd.read_csv(run_folder / "training_history.csv")
    assert used["parameters"] == sum(p.numel() for p in model.parameters())
    assert used["multiply_adds"] == resources.count_multiply_adds(model, 32)
    assert used["epochs"] == len(history) == 6
    assert used["train_slices_per_s"] == pytest.approx(history.images_per_s.median(), rel=1e-5)
    assert used["val_seconds"] == pytest.approx(history.val_seconds.median(), rel=1e-5)
    assert used["memory"]["process"] == history.memory_process.max() > 50 * 2**20
    assert used["memory"]["gpu_allocated"] is None and history.memory_gpu_allocated.isna().all()
    assert 0 < used["latency"]["1"] and 0 < used["latency"]["64"]
    assert used["machine"].startswith("cpu (") and used["latency_repeats"]["64"] > 0
    assert used["versions"]["torch"] == torch.__version__
    log = (run_folder / "training_log.txt").read_text()
    assert log.count("resources: ") == 1 and resources.describe_resources(used) in log


def test_the_memory_of_a_run_is_that_of_its_largest_epoch_whichever_process_trained_it():
    row = {"images_per_s": 1.0, "val_seconds": 1.0, "memory_gpu_allocated": None}
    history = [{**row, "memory_process": 7, "memory_gpu_reserved": None}]
    history.append({**row, "memory_process": 5, "memory_gpu_reserved": 2})  # resumed
    options = dict(image_size=32, n_train=10, device=torch.device("cpu"), amp=None)
    used = resources.measure_resources(make_model("narrow"), history, **options)
    assert used["memory"] == {"process": 7, "gpu_allocated": None, "gpu_reserved": 2}
    old = [{"images_per_s": 1.0}]  # of a run that an earlier version trained
    used = resources.measure_resources(make_model("narrow"), old, **options)
    assert used["val_seconds"] is None and used["memory"]["process"] is None


def test_the_costs_of_a_run_that_changed_its_machine_are_those_of_the_last_one(
    ad_nc, tmp_path, monkeypatch
):
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "1")
    first = json.loads((run / "resources.json").read_text())
    monkeypatch.setattr(train, "describe_machine", lambda state: "another machine")
    train.main(["--out", str(run), "--resume"])
    assert json.loads((run / "resources.json").read_text()) == first  # it trained no epoch
    train.main(["--out", str(run), "--resume", "--epochs", "3"])
    used = json.loads((run / "resources.json").read_text())
    assert "another machine" in resources.describe_resources(used)
    history = pd.read_csv(run / "training_history.csv")
    assert used["epochs"] == 2 and len(history) == 3
    assert used["train_slices_per_s"] == pytest.approx(history.images_per_s[1:].median(), rel=1e-5)


def test_latency_is_the_median_of_the_turns_after_the_warm_up(monkeypatch):
    seconds = iter([9.0, 9.0, 1.0, 5.0, 2.0, 9.0, 8.0, 4.0, 6.0, 5.0, 40.0, 30.0])
    clock = [0.0]

    def engine(x):
        clock[0] += next(seconds)

    monkeypatch.setattr(resources, "make_engine", lambda *args, **kwargs: engine)
    monkeypatch.setattr(resources.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(resources, "WARMUP", 2)
    monkeypatch.setattr(resources, "REPEATS", 3)
    latency = resources.measure_latency(make_model("narrow"), 32, torch.device("cpu"), None)
    assert latency == ({"1": 2.0, "64": 5.0}, {"1": 3, "64": 3})

    monkeypatch.setattr(resources, "BATCHES", (1,))  # of a slow model
    latency = resources.measure_latency(make_model("narrow"), 32, torch.device("cpu"), None)
    assert latency == ({"1": 30.0}, {"1": 1})


def test_the_costs_of_several_runs_are_a_table(run_folder, tmp_path, capsys):
    evaluate.main([str(run_folder), str(run_folder), "--resources"])
    head, _, row, same = capsys.readouterr().out.splitlines()
    assert head.count("|") == row.count("|") == len(resources.RESOURCES) + 1
    assert row == same and row.startswith(f"| {run_folder} ") and "process, float32" in row
    few = {"latency": {"1": 0.5}, "latency_repeats": {"1": resources.REPEATS - 1}}
    assert resources.latency_cell(few, 1) == f"500.0 ms (median of {resources.REPEATS - 1})"
    with pytest.raises(SystemExit):
        evaluate.parse_args([str(run_folder), "--resources", "--part", "val"])
    with pytest.raises(InputError, match="resources.json does not exist; expected finished runs"):
        evaluate.main([str(tmp_path), "--resources"])


# ---------------------------------------------------------------- TensorBoard


def read_scalars(run):
    """{tag: {step: value}} of the events in a folder; no step twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        values = [(event.step, event.value) for event in events.Scalars(tag)]
        scalars[tag] = dict(values)
        assert len(scalars[tag]) == len(values)
    return scalars


def test_a_resumed_run_has_its_scalars_once(ad_nc, tmp_path):
    pytest.importorskip("tensorboard")
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "2", "--tensorboard")
    train.main(["--out", str(run), "--resume", "--epochs", "3"])
    scalars = read_scalars(run)
    history = pd.read_csv(run / "training_history.csv").set_index("epoch")
    assert list(history.index) == [1, 2, 3]
    columns = {"train/loss": "train_loss", "lr": "lr", "val/accuracy": "val_accuracy"}
    for tag, column in columns.items():
        assert scalars[tag] == pytest.approx(history[column].to_dict(), rel=1e-5)
    scores = json.loads((run / "test" / "metrics.json").read_text())
    (value,) = scalars["final_test/scan_auroc"].values()
    assert value == pytest.approx(scores["scan"]["auroc"])


def test_without_tensorboard_a_sentence_says_what_to_install(ad_nc, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="--tensorboard needs tensorboard; install it with"):
        train_small(ad_nc, tmp_path / "run", "--tensorboard")
    assert not (tmp_path / "run").exists()
