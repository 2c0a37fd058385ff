"""The benchmark measures what it says, and refuses to time a wrong answer."""

import json
import time

import command
import pytest
import torch
from conftest import ROOT

from tools import benchmark


def test_candidates_take_turns_and_the_ratio_is_that_of_the_first():
    order = []

    def work(name, seconds):
        order.append(name)
        time.sleep(seconds)

    rows = benchmark.take_turns({"slow": lambda: work("slow", 0.08), "fast": lambda: work("fast", 0.02)}, 3)
    assert order == ["slow", "fast"] * 4  # the first turn warms up
    assert rows["slow"]["ratio"] == 1 and 2 < rows["fast"]["ratio"] < 5 and rows["slow"]["seconds"] >= 0.08


@pytest.mark.parametrize("difference", [0.02, float("nan")])
def test_a_wrong_answer_is_refused(difference):
    with pytest.raises(ValueError, match=r"the engine: the largest difference is .*; expected at most 0\.01"):
        benchmark.require("the engine", difference, 0.01)
    assert benchmark.require("the engine", 0.005, 0.01) == 0.005


def test_the_models_that_are_compared_give_the_same_answer():
    theirs, ours = benchmark.two_models("tiny", "cpu")
    x = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        a, b = theirs.eval()(x), ours.eval()(x)
    assert a.std() > 0.01 and torch.allclose(a, b, atol=1e-5)


def test_the_cpu_part_runs_in_small_and_writes_its_numbers(tmp_path):
    words = ["--image-size", "32", "--batch-size", "2", "--slices", "45", "--repeats", "1", "--json",
             tmp_path / "cpu.json"]
    done = command.run(ROOT / "benchmark.py", *words)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert results["predict"]["torchvision, float32"]["ratio"] == 1 and results["load"]["slices"] == 45
    assert results["difference_of_p_AD"]["ours, float32"] < 1e-4
    assert results["train"]["batch 2"]["ours, float32"]["ratio"] > 0
    shares = results["profile"]["torchvision"]
    assert abs(sum(shares.values()) - 1) < 1e-6 and min(shares.values()) >= 0 and len(results["profile"]["ours"]) > 10
    assert results["parity"]["ours"] == results["parity"]["torchvision"] and results["parity"]["difference"] < 1e-4


def test_slices_are_repeated_where_more_are_asked_for_than_are_drawn():
    few = benchmark.some_slices(40)
    assert few.shape == (40, 1, 240, 256) and len(benchmark.some_slices(1500)) == 1500


@pytest.mark.parametrize("words", [["--json", "nowhere/x.json"], ["--device", "cpu"],
                                   ["--batch-size", "0"]])  # fmt: skip
def test_wrong_flags_are_reported_before_anything_is_measured(words, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_args(words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_reported(tmp_path):
    done = command.run(ROOT / "benchmark.py", "--gpu")
    assert done.returncode == 2 and "device cuda cannot be used here" in done.stderr
