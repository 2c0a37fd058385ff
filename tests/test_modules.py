import numpy as np
import pytest
import torch
import torchvision

from modules import (
    MODEL_ARGS,
    VARIANTS,
    ConvNeXt,
    ConvNeXtBlock,
    DropPath,
    convnext,
    load_weights,
    make_model,
)


def fill(model, seed=0):
    """Weights far from their start, so that LayerScale at 1e-6 does not hide the blocks from a
    comparison."""
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 0.1, std=0.05 if p.ndim > 1 else 0.1)
    return model.eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_tiny_has_the_parameters_of_the_paper():
    assert parameters(convnext("tiny", in_chans=3, num_classes=1000)) == 28_589_128


@pytest.mark.parametrize("variant", ["tiny", "small", "base", "large"])
def test_variant_has_as_many_parameters_as_torchvisions(variant):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"convnext_{variant}")()
        assert parameters(convnext(variant, in_chans=3, num_classes=1000)) == parameters(theirs)


@pytest.mark.parametrize("change", [
    lambda weight: weight.to(torch.int8),
    lambda weight: weight.to(torch.complex64),
    lambda weight: weight * float("nan"),
    lambda weight: weight.to_sparse(),
    lambda weight: weight.to("meta"),
])  # fmt: skip
def test_weights_that_are_no_real_numbers_are_refused(change):
    model = convnext("atto")
    weights = {**model.state_dict(), "norm.weight": change(model.norm.weight.data)}
    with pytest.raises(ValueError, match="norm.weight .* holds no dense, finite, real numbers"):
        load_weights(model, weights)


def test_a_stem_of_another_form_is_left():
    model = convnext("atto", in_chans=1)
    weights = {**model.state_dict(), "downsample_layers.0.0.weight": torch.ones(640)}
    assert "downsample_layers.0.0.weight" in load_weights(model, weights)[1]


def test_outputs_equal_torchvisions_with_its_weights():
    theirs = fill(torchvision.models.convnext_tiny())
    ours = convnext("tiny", in_chans=3, num_classes=1000).eval()
    loaded, left = load_weights(ours, theirs.state_dict())
    assert len(loaded) == len(ours.state_dict()) and left == []
    x = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        expected = theirs(x)
        assert expected.std() > 0.1
        assert (ours(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("variant", ["atto", "femto", "pico", "nano", "tiny"])
def test_outputs_equal_timms_with_its_weights(variant):
    timm = pytest.importorskip("timm", reason="timm is in requirements-dev.txt")
    theirs = fill(timm.create_model(f"convnext_{variant}", num_classes=10))
    ours = convnext(variant, in_chans=3, num_classes=10).eval()
    assert load_weights(ours, theirs.state_dict())[1] == []
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert (ours(x) - theirs(x)).abs().max() < 1e-5


def test_drop_path_rates_equal_torchvisions():
    theirs = torchvision.models.convnext_tiny(stochastic_depth_prob=0.3)
    expected = [m.p for m in theirs.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    ours = [m.p for m in convnext("tiny", drop_path_rate=0.3).modules() if isinstance(m, DropPath)]
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert ours[0] == 0 and ours[-1] == pytest.approx(0.3)


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    y = drop(torch.ones(20_000, 2, 1, 1))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y[:, 0] == y[:, 1]).all()
    assert y.mean() == pytest.approx(1, abs=0.02)  # 5 standard errors of 20,000 draws
    x = torch.randn(3, 2, 1, 1)
    assert drop.eval()(x) is x


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = convnext("atto")
    loss = torch.nn.functional.cross_entropy(
        model(torch.randn(4, 1, 64, 64)), torch.tensor([0, 1, 0, 1])
    )
    loss.backward()
    without = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert without == []


def test_a_block_starts_as_the_identity_and_keeps_the_shape():
    x = torch.randn(2, 40, 9, 7)
    assert (ConvNeXtBlock(40)(x) - x).abs().max() < 1e-4


def test_memory_format_does_not_change_the_outputs():
    model = fill(convnext("atto"))
    x = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        assert (
            model(x.contiguous(memory_format=torch.channels_last)) - expected
        ).abs().max() < 1e-5


def test_names_are_those_of_the_papers_code():
    names = set(convnext("atto").state_dict())
    assert {
        "downsample_layers.0.0.weight",
        "downsample_layers.3.1.bias",
        "stages.2.5.dwconv.weight",
        "stages.0.0.norm.weight",
        "stages.0.1.pwconv1.weight",
        "stages.0.1.pwconv2.bias",
        "stages.3.1.gamma",
        "norm.weight",
        "head.bias",
    } <= names


def test_a_summed_stem_sees_a_grey_image_as_three_equal_channels():
    theirs = fill(convnext("atto", in_chans=3))
    ours = convnext("atto", in_chans=1).eval()
    assert load_weights(ours, theirs.state_dict())[1] == []
    grey = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        assert (ours(grey) - theirs(grey.expand(-1, 3, -1, -1))).abs().max() < 1e-5


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.backbone."])
def test_prefixes_of_wrappers_are_ignored(prefix):
    state = fill(convnext("atto")).state_dict()
    ours = convnext("atto")
    loaded, left = load_weights(ours, {f"{prefix}{name}": tensor for name, tensor in state.items()})
    assert left == [] and set(loaded) == set(state)
    assert all(torch.equal(x, y) for x, y in zip(ours.state_dict().values(), state.values()))


def test_tensors_without_a_partner_are_named():
    state = fill(convnext("atto")).state_dict()
    loaded, left = load_weights(convnext("atto"), {**state, "mask_token": torch.zeros(3)})
    assert left == ["mask_token"] and set(loaded) == set(state)


def test_a_head_of_other_classes_is_left_and_named():
    model = convnext("tiny")
    before = model.head.weight.clone()
    loaded, left = load_weights(model, torchvision.models.convnext_tiny().state_dict())
    assert left == ["head.weight", "head.bias"]
    assert len(loaded) == len(model.state_dict()) - 2
    assert torch.equal(model.head.weight, before)


def test_weights_of_another_network_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="no block of the model could be filled"):
        load_weights(convnext("atto"), torchvision.models.resnet18().state_dict())


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="atto, femto, pico, nano, tiny, small, base, large"):
        convnext("huge")


def test_a_too_small_input_says_which_size_it_needs():
    with pytest.raises(AssertionError, match="at least 32"):
        convnext("atto")(torch.zeros(1, 1, 31, 64))


def test_all_variants_can_be_built():
    with torch.device("meta"):
        sizes = [parameters(convnext(variant)) for variant in VARIANTS]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    "option",
    [
        {"norm": "batch"},
        {"stem": "conv"},
        {"downsample": "pool"},
        {"layer_scale": 0.5},
        {"init_std": "fan_in"},
        {"head_norm": "batch"},
    ],
)
def test_an_option_changes_its_own_part_alone(option):
    (name,) = option
    torch.manual_seed(0)
    model = convnext("atto", **option)
    n_batch_norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    n_poolings = sum(isinstance(module, torch.nn.MaxPool2d) for module in model.modules())
    assert n_batch_norms == (16 if name == "norm" else 0)
    assert n_poolings == {"stem": 1, "downsample": 3}.get(name, 0)
    assert (model.stages[0][0].gamma == 0.5).all() == (name == "layer_scale")
    std = model.stages[3][0].pwconv1.weight.std().item()
    assert std == pytest.approx(320**-0.5 if name == "init_std" else 0.02, rel=0.05)
    assert parameters(model) == parameters(convnext("atto")) or name in ("stem", "downsample")
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 2)


def test_the_defaults_of_the_options_are_the_papers():
    defaults = ConvNeXt.__init__.__kwdefaults__
    paper = dict(
        norm="layer",
        stem="patch",
        downsample="patch",
        head_norm="layer",
        layer_scale=1e-6,
        init_std=0.02,
    )
    assert {name: defaults[name] for name in MODEL_ARGS} == paper


def test_the_plain_cnn_is_small_and_a_model_like_the_others():
    model = make_model("cnn", drop_path_rate=0.1, norm="layer")  # it has neither
    assert parameters(model) == 97_890 and model(torch.randn(2, 1, 48, 40)).shape == (2, 2)


def test_a_slice_gets_the_same_answer_alone_and_in_a_batch_also_with_batch_norm():
    for name in ("narrow", "cnn"):
        torch.manual_seed(0)
        model, x = make_model(name), torch.randn(6, 1, 64, 64)
        for _ in range(3):
            model(x)  # moves the running statistics
        with torch.inference_mode():
            together = model.eval()(x)
            alone = torch.cat([model(part) for part in x.split(1)])
        assert together.std() > 0.01 and torch.allclose(together, alone, atol=1e-5)


def test_under_autocast_the_outputs_are_torchvisions():
    """Bit for bit: the residual stream is float32, as theirs."""
    torch.manual_seed(0)
    theirs = torchvision.models.convnext_tiny(num_classes=5).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("layer_scale"):
            torch.nn.init.normal_(parameter, std=0.3)
    ours = convnext("tiny", in_chans=3, num_classes=5).eval()
    load_weights(ours, theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))


def test_under_autocast_a_block_with_a_layer_scale_of_1e_6_changes_its_input():
    block = ConvNeXtBlock(8).eval()
    x = torch.randn(1, 8, 8, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32 and not torch.equal(x, y)
