"""The adapters against twins written from the paper's formulas, and what PEFT must do with them."""

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from tiny_models import randomize, small_config, small_inputs, small_model
from torch.nn import functional as F
from transformers import CLIPTextModel, Dinov2Model, Dinov2WithRegistersModel

from adapters_detris import (
    DenseAligner,
    DetrisAdapterConfig,
    DetrisAdapterLayer,
    TextAdapter,
    TextAdapterLayer,
    VisionAdapterLayer,
)
from modeling_detris import DetrisForReferringSegmentation


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def conv_norm_relu_twin(hidden_states, weights, name, training=False):
    weight, bias = weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"]
    convolve = {3: F.conv1d, 4: F.conv2d}[weight.ndim]
    hidden_states = convolve(hidden_states, weight, bias, padding=weight.shape[-1] // 2)
    mean, variance = weights[f"{name}.norm.running_mean"], weights[f"{name}.norm.running_var"]
    if training:
        others = [axis for axis in range(hidden_states.ndim) if axis != 1]
        mean, variance = hidden_states.mean(others), hidden_states.var(others, unbiased=False)
    mean, variance, gain, shift = (
        values.reshape(-1, *[1] * (hidden_states.ndim - 2))
        for values in (mean, variance, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
    )
    return (gain * (hidden_states - mean) / (variance + 1e-3).sqrt() + shift).clamp_min(0)


def dense_block_twin(hidden_states, weights, training=False):
    branch1 = conv_norm_relu_twin(hidden_states, weights, "dense.branch1", training)
    branch2 = torch.cat([hidden_states, branch1], 1)
    for step in (0, 1):
        branch2 = conv_norm_relu_twin(branch2, weights, f"dense.branch2.{step}", training)
    branch3 = torch.cat([hidden_states, branch1, branch2], 1)
    for step in (0, 1):
        branch3 = conv_norm_relu_twin(branch3, weights, f"dense.branch3.{step}", training)
    return torch.cat([branch1, branch2, branch3], 1)


def linear(hidden_states, weights, name):
    return hidden_states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention_twin(query, key, value, heads, mask=0.0):
    """Softmax attention, head by head."""
    width = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width) + mask
        scores = (scores - scores.amax(-1, keepdim=True)).exp()
        outputs.append(scores / scores.sum(-1, keepdim=True) @ value[..., part])
    return torch.cat(outputs, -1)


def text_adapter_twin(hidden_states, weights, training=False):
    reduced = linear(hidden_states, weights, "down").clamp_min(0)
    words = dense_block_twin(reduced[:, 1:].transpose(1, 2), weights, training).transpose(1, 2)
    return linear(torch.cat([reduced[:, :1], words], 1) + reduced, weights, "up")


def dense_aligner_twin(hidden_states, words, weights, prefix_length, heads, training=False):
    reduced = linear(hidden_states, weights, "down").clamp_min(0)
    prefix, patches = reduced[:, :prefix_length], reduced[:, prefix_length:]
    side = math.isqrt(patches.shape[1])
    grid = patches.reshape(len(patches), side, side, -1).permute(0, 3, 1, 2)  # row by row
    patches = dense_block_twin(grid, weights, training).permute(0, 2, 3, 1).reshape(patches.shape) + patches
    patches = linear(patches, weights, "word_attention.patch_projection")
    words = linear(words, weights, "word_attention.word_projection")
    weight, bias = (weights[f"word_attention.attention.in_proj_{leaf}"].chunk(3) for leaf in ("weight", "bias"))
    query, key, value = (states @ w.T + b for states, w, b in zip((patches, words, words), weight, bias))
    attended = linear(attention_twin(query, key, value, heads), weights, "word_attention.attention.out_proj")
    aligned = linear(attended, weights, "word_attention.output_projection")
    return linear(torch.cat([prefix, aligned], 1) + reduced, weights, "up")


def weights_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [2, 9])
def test_text_adapter_is_its_formula(training, length):
    adapter = randomize(TextAdapter(24, 32)).train(training)
    hidden_states, weights = torch.randn(3, length, 24), weights_of(adapter)
    torch.testing.assert_close(adapter(hidden_states), text_adapter_twin(hidden_states, weights, training))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("prefix_length", [1, 5])
def test_dense_aligner_is_its_formula(training, prefix_length):
    aligner = DenseAligner(
        hidden_size=24,
        dim=32,
        text_hidden_size=20,
        prefix_length=prefix_length,
        attention_dim=16,
        attention_heads=4,
        dropout=0.0,
    )
    aligner = randomize(aligner).train(training)
    hidden_states, words = torch.randn(3, prefix_length + 25, 24), torch.randn(3, 6, 20)
    twin = dense_aligner_twin(hidden_states, words, weights_of(aligner), prefix_length, 4, training)
    torch.testing.assert_close(aligner(hidden_states, words), twin, rtol=1e-4, atol=1e-5)


def test_aligner_drops_attention_weights_in_training_only():
    aligner = randomize(DenseAligner(24, 32, 20, prefix_length=1, attention_dim=16, attention_heads=4, dropout=0.5))
    hidden_states, words = torch.randn(2, 1 + 16, 24), torch.randn(2, 6, 20)
    aligner.eval()
    assert torch.equal(aligner(hidden_states, words), aligner(hidden_states, words))
    aligner.word_attention.train()
    assert not torch.equal(aligner(hidden_states, words), aligner(hidden_states, words))


def test_text_layer_adds_the_adapter_that_reads_the_residual_stream():
    layer = small_model(small_config(adapter_scale=0.7)).text_model.encoder.layers[0]
    base, hidden_states = weights_of(layer.base_layer), torch.randn(2, 7, 24)
    causal = torch.full((7, 7), -math.inf).triu(1)

    normed = F.layer_norm(hidden_states, (24,), base["layer_norm1.weight"], base["layer_norm1.bias"])
    query, key, value = (linear(normed, base, f"self_attn.{part}_proj") for part in "qkv")
    stream = hidden_states + linear(attention_twin(query, key, value, 2, causal), base, "self_attn.out_proj")
    normed = F.layer_norm(stream, (24,), base["layer_norm2.weight"], base["layer_norm2.bias"])
    inner = linear(normed, base, "mlp.fc1")
    feed_forward = linear(inner * torch.sigmoid(1.702 * inner), base, "mlp.fc2")
    adapted = text_adapter_twin(stream, weights_of(layer.detris_adapter["default"]))

    expected = stream + feed_forward + 0.7 * adapted
    torch.testing.assert_close(layer(hidden_states, None, is_causal=True), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("registers", [True, False])
def test_vision_layer_scales_mlp_and_adapter_together(registers):
    model = small_model(small_config(registers, adapter_scale=0.7))
    layer, prefix_length = model.vision_model.encoder.layer[1], 5 if registers else 1
    base, hidden_states, words = (
        weights_of(layer.base_layer),
        torch.randn(2, prefix_length + 16, 48),
        torch.randn(2, 7, 24),
    )

    normed = F.layer_norm(hidden_states, (48,), base["norm1.weight"], base["norm1.bias"], eps=1e-6)
    query, key, value = (linear(normed, base, f"attention.{part}_proj") for part in "qkv")
    attended = linear(attention_twin(query, key, value, 4), base, "attention.o_proj")
    stream = hidden_states + base["layer_scale1.lambda1"] * attended
    normed = F.layer_norm(stream, (48,), base["norm2.weight"], base["norm2.bias"], eps=1e-6)
    inner = linear(normed, base, "mlp.fc1")
    feed_forward = linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), base, "mlp.fc2")
    adapted = dense_aligner_twin(normed, words, weights_of(layer.detris_adapter["default"]), prefix_length, 4)

    expected = stream + base["layer_scale2.lambda1"] * (feed_forward + 0.7 * adapted)
    torch.testing.assert_close(layer(hidden_states, words), expected, rtol=1e-4, atol=1e-5)


def adapter_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, DetrisAdapterLayer)}


def test_the_model_is_a_peft_model():
    config = small_model().peft_config["default"]
    assert isinstance(config, DetrisAdapterConfig) and config.peft_type == "DETRIS"
    assert (config.vision_adapter_layers, config.vision_adapter_dim) == ([1, 3], 32)
    assert (config.text_adapter_layers, config.text_adapter_dim, config.adapter_scale) == ([0, 2], 16, 0.2)


@pytest.mark.parametrize(
    ("vision_depth", "vision_layers", "text_layers"),
    # PEFT shortens a list of more than 20 names to suffixes, which other layers have too.
    [(4, [1, 3], [0, 2]), (4, [2], []), (4, [], [1]), (24, list(range(1, 24)), [1])],
)
def test_exactly_the_named_layers_hold_adapters(vision_depth, vision_layers, text_layers):
    config = small_config(
        vision={"num_hidden_layers": vision_depth},
        vision_adapter_layers=vision_layers,
        text_adapter_layers=text_layers,
    )
    with torch.device("meta"):
        layers = adapter_layers(DetrisForReferringSegmentation(config))
    assert {name for name, layer in layers.items() if type(layer) is VisionAdapterLayer} == {
        f"vision_model.encoder.layer.{layer}" for layer in vision_layers
    }
    assert {name for name, layer in layers.items() if type(layer) is TextAdapterLayer} == {
        f"text_model.encoder.layers.{layer}" for layer in text_layers
    }


def backbone_weights(model, backbone):
    return {
        name.removeprefix(f"{backbone}.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{backbone}.") and ".detris_adapter." not in name
    }


@pytest.mark.parametrize("registers", [True, False])
def test_switched_off_the_backbones_are_hugging_faces_own(registers):
    # At the size of its pretraining: Hugging Face resamples positions otherwise.
    model, inputs = small_model(small_config(registers, vision={"image_size": 56})), small_inputs(2)
    adapted_words = model.encode_text(inputs["input_ids"])[0]
    adapted_map = model.encode_images(inputs["pixel_values"], adapted_words)[-1]
    for layer in adapter_layers(model).values():
        layer.enable_adapters(False)
    words = model.encode_text(inputs["input_ids"])[0]
    last_map = model.encode_images(inputs["pixel_values"], words)[-1]

    vision = (Dinov2WithRegistersModel if registers else Dinov2Model)(model.config.vision_config).eval()
    vision.load_state_dict(backbone_weights(model, "vision_model"), strict=True)
    patches = vision(inputs["pixel_values"]).last_hidden_state[:, -16:]
    torch.testing.assert_close(last_map.flatten(2).transpose(1, 2), patches)
    text = CLIPTextModel(model.config.text_config).eval()
    text.load_state_dict(backbone_weights(model, "text_model"), strict=True)
    torch.testing.assert_close(words, text(inputs["input_ids"]).last_hidden_state)
    assert (adapted_words - words).abs().max() > 0.1 and (adapted_map - last_map).abs().max() > 0.1


def test_merging_is_refused():
    for layer in adapter_layers(small_model()).values():
        with pytest.raises(ValueError, match="cannot be merged"):
            layer.merge()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_of_several_adapters_one_is_active():
    model, inputs = small_model(), small_inputs(2)
    first = model(**inputs).logits
    inject_adapter_in_model(copy.deepcopy(model.peft_config["default"]), model, "second")
    layers = adapter_layers(model.eval()).values()
    for layer in layers:
        layer.set_adapter("second")
        assert not any(p.requires_grad for p in layer.detris_adapter["default"].parameters())
        assert all(p.requires_grad for p in layer.detris_adapter["second"].parameters())
    assert not torch.allclose(model(**inputs).logits, first, atol=1e-3)
    for layer in layers:
        layer.set_adapter("default")
    assert torch.equal(model(**inputs).logits, first)
    for layer in layers:
        layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"activate one of \['default', 'second'\] with set_adapter"):
        model(**inputs)


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_peft_saves_and_loads_the_adapters_under_any_name(tmp_path, adapter_name):
    """Batch-norm statistics travel too: they are buffers, not parameters."""
    plain = small_model(small_config(vision_adapter_layers=[], text_adapter_layers=[]))
    adapters = copy.deepcopy(small_model().peft_config["default"])
    adapters.modules_to_save = ["neck", "decoder", "mask_head"]
    inputs = small_inputs(2)
    unadapted = plain(**inputs).logits
    trained = get_peft_model(copy.deepcopy(plain), adapters)
    for name, module in trained.named_modules():
        if name.endswith((".detris_adapter.default", ".modules_to_save.default")):
            randomize(module, seed=7)
    trained.eval()
    logits = trained(**inputs).logits
    assert (logits - unadapted).abs().max() > 0.1

    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path, adapter_name=adapter_name).eval()
    torch.testing.assert_close(loaded(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(**inputs).logits, unadapted, rtol=1e-5, atol=1e-5)
