"""The benchmark compares models with the same answers, and times them in turns."""

import json
import time

import command
import pytest

from tools import benchmark


def test_candidates_take_turns_and_the_ratio_is_relative_to_the_first():
    order = []

    def work(name, seconds):
        order.append(name)
        time.sleep(seconds)

    candidates = {"slow": lambda: work("slow", 0.08), "fast": lambda: work("fast", 0.02)}
    rows = benchmark.take_turns(candidates, 3)
    assert order == ["slow", "fast"] * 4  # the first turn warms up
    assert rows["slow"]["ratio"] == 1
    assert 2 < rows["fast"]["ratio"] < 5
    assert rows["slow"]["seconds"] >= 0.08


@pytest.mark.parametrize("difference", [0.02, float("nan")])
def test_a_wrong_answer_is_an_error(difference):
    message = r"the engine: the largest difference is .*; expected at most 0\.01"
    with pytest.raises(ValueError, match=message):
        benchmark.require_close("the engine", difference, 0.01)
    assert benchmark.require_close("the engine", 0.005, 0.01) == 0.005


def test_slices_repeat_if_more_are_asked_for_than_are_drawn(monkeypatch):
    monkeypatch.setattr(benchmark, "SLICES", 200)  # of which `render` draws 20
    assert benchmark.draw_slices(50).shape == (50, 1, 240, 256)


def test_the_cpu_part_writes_its_numbers(tmp_path):
    file = tmp_path / "cpu.json"
    small = ["--image-size", "32", "--batch-size", "2", "--repeats", "1"]
    benchmark.main([*small, "--json", str(file)])
    results = json.loads(file.read_text())
    assert results["parity"]["ours"] == results["parity"]["torchvision"] == 28_589_128
    assert results["parity"]["difference"] < 1e-4 < 0.01 < results["parity"]["SD"]
    assert results["prediction"]["torchvision, float32"]["ratio"] == 1
    assert results["prediction"]["ours, float32"]["difference of p_AD"] < 1e-4
    assert results["training step"]["ours, float32"]["ratio"] > 0


@pytest.mark.parametrize("words", [
    ["--json", "nowhere/x.json"], ["--device", "cpu"], ["--batch-size", "0"],
])  # fmt: skip
def test_wrong_flags_are_reported_before_anything_is_measured(words, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_args(words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_missing_gpu_is_reported():
    done = command.run("tools.benchmark", "--gpu")
    assert done.returncode == 2
    assert "device cuda cannot be used here" in done.stderr
