"""The benchmark compares models with the same answers, and times them in turns."""

import json
import time
from importlib.util import find_spec
from types import SimpleNamespace

import command
import pytest
import torch

from modules import make_model
from tools import benchmark


def test_candidates_take_turns_and_the_ratio_is_relative_to_the_first():
    order = []

    def work(name, seconds):
        order.append(name)
        time.sleep(seconds)

    candidates = {"slow": lambda: work("slow", 0.08), "fast": lambda: work("fast", 0.02)}
    rows = benchmark.take_turns(candidates, 3)
    assert order[:4] == order[4:] == ["slow", "fast", "fast", "slow"]  # the first turn warms up
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


def test_whole_epochs_take_turns(ad_nc, monkeypatch):
    def two_small_models(variant, device):
        return make_model("narrow"), make_model("narrow")

    monkeypatch.setattr(benchmark, "two_models", two_small_models)
    monkeypatch.setattr(benchmark, "draw", lambda folder, subjects: ad_nc)
    rows = benchmark.measure_epochs("tiny", 32, 16, torch.device("cpu"), 10, 1, False)
    assert list(rows) == ["torchvision, ImageFolder", "ours, decoded before"]
    assert rows["torchvision, ImageFolder"]["ratio"] == 1
    for row in rows.values():
        assert row["rate"] * row["seconds"] == pytest.approx(60)  # slices of train/


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


class FakeQueue:
    """As openvino.AsyncInferQueue with two requests, which end in the wrong order."""

    def __init__(self, function):
        self.function, self.started = function, []

    def __len__(self):
        return 2

    def set_callback(self, callback):
        self.callback = callback

    def start_async(self, inputs, userdata):
        self.started.append((inputs["x"], userdata))

    def wait_all(self):
        while self.started:
            x, userdata = self.started.pop()
            tensor = SimpleNamespace(data=self.function(x))
            request = SimpleNamespace(get_output_tensor=lambda i, tensor=tensor: tensor)
            self.callback(request, userdata)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_parts_of_a_batch_come_back_in_order(n):
    predict = benchmark.predict_in_parts(FakeQueue(lambda x: x * 2))
    x = torch.arange(3.0 * n).reshape(n, 3)
    assert torch.equal(predict(x), x * 2) and torch.equal(predict(x + 1), x * 2 + 2)


def test_other_runtimes_give_the_answers_of_the_model():
    pytest.importorskip("onnxscript")
    if not (find_spec("onnxruntime") or find_spec("openvino")):
        pytest.skip("neither ONNX Runtime nor OpenVINO is installed")
    model, _ = benchmark.two_models("tiny", torch.device("cpu"))
    x = torch.randn(3, 1, 64, 64)
    expected = benchmark.plain_prediction(model.eval(), torch.device("cpu"), None)(x)
    candidates = benchmark.other_runtimes(model, x)[None]
    assert candidates
    for predict in candidates.values():
        torch.testing.assert_close(predict(x), expected, atol=1e-4, rtol=1e-3)
