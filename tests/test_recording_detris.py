"""Hidden states and attentions: what they are, that asking for them changes nothing else, and what is refused."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pytest
import torch
from helpers.adapter_twins import attention_twin
from helpers.models import randomize, save_backbones, small_config, small_inputs, small_model
from peft import get_peft_model
from torch import nn
from transformers import CLIPTextModel, Dinov2Model, Dinov2WithRegistersModel

from modeling_detris import DetrisForReferringSegmentation
from peft_detris import DetrisAdapterConfig

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN_STATES = ("text_hidden_states", "vision_hidden_states", "decoder_hidden_states")
ATTENTIONS = ("text_attentions", "vision_attentions", "decoder_attentions", "cross_attentions")
BOTH = {"output_hidden_states": True, "output_attentions": True}
INPUTS = small_inputs(3)


def eager_model(**fields) -> DetrisForReferringSegmentation:
    model = small_model(small_config(**fields))
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def model():
    """It is shared; tests must leave it as it is."""
    return eager_model(decoder_layers=2)


@pytest.fixture(scope="module")
@torch.no_grad()
def outputs(model):
    return model(**INPUTS, **BOTH)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# --- Hidden states ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("registers", [True, False])
def test_without_adapters_they_are_those_of_the_bare_backbones(registers):
    fields = {"peft_method": "none", "vision": {"image_size": 56}}
    model = eager_model(registers=registers, **fields)
    outputs = model(**INPUTS, **BOTH)
    text = CLIPTextModel(model.config.text_config).eval()
    text.load_state_dict(model.text_model.state_dict())
    vision = (Dinov2WithRegistersModel if registers else Dinov2Model)(model.config.vision_config).eval()
    vision.load_state_dict(model.vision_model.state_dict())
    for name, bare in (
        ("text", text(INPUTS["input_ids"], **BOTH)),
        ("vision", vision(INPUTS["pixel_values"], **BOTH)),
    ):
        for kind in ("hidden_states", "attentions"):
            ours, expected = outputs[f"{name}_{kind}"], bare[kind]
            assert len(ours) == len(expected) == {"text": 3, "vision": 4}[name] + (kind == "hidden_states")
            for value, other in zip(ours, expected, strict=True):
                close(value, other)


@torch.no_grad()
def test_they_lead_from_each_stage_to_the_next(model, outputs):
    """Adapters have effect in two layers of each backbone, and each layer gets what the one before it gives."""
    words, sentence = model.encode_text(INPUTS["input_ids"])
    states = outputs.text_hidden_states
    assert [tuple(state.shape) for state in states] == [(3, 7, 24)] * 4
    assert torch.equal(states[0], model.text_model.embeddings(INPUTS["input_ids"]))
    assert torch.equal(model.text_model.final_layer_norm(states[-1]), words)
    causal = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    for layer, (state, following) in zip(model.text_model.encoder.layers, pairwise(states), strict=True):
        close(layer(state, causal), following)

    maps = model.encode_images(INPUTS["pixel_values"], words)
    states = outputs.vision_hidden_states
    assert [tuple(state.shape) for state in states] == [(3, 1 + 4 + 16, 48)] * 5

    def as_map(state):  # without the class token and the four registers, row by row
        return state[:, 5:].reshape(3, 4, 4, 48).permute(0, 3, 1, 2)

    assert torch.equal(as_map(model.vision_model.layernorm(states[-1])), maps[-1])
    for layer, feature_map in zip(model.config.feature_layers, maps[:-1], strict=True):
        assert torch.equal(as_map(states[layer + 1]), feature_map)
    for index, layer in enumerate(model.vision_model.encoder.layer):
        adapted = index in model.config.vision_adapter_layers
        assert torch.equal(layer(states[index], words) if adapted else layer(states[index]), states[index + 1])

    states = outputs.decoder_hidden_states
    assert [tuple(state.shape) for state in states] == [(3, 16, 32)] * 3
    fused = model.neck(maps, sentence)
    assert torch.equal(states[0].transpose(1, 2).reshape(3, 32, 4, 4), fused)
    decoded = model.decoder.norm(states[-1]).transpose(1, 2).reshape(3, 32, 4, 4)
    assert torch.equal(model.mask_head(decoded, sentence), outputs.logits)


# --- Attentions ------------------------------------------------------------------------------------------------------


def test_weights_of_a_row_sum_to_1(outputs):
    shapes = {name: [tuple(weights.shape) for weights in outputs[name]] for name in ATTENTIONS}
    assert shapes == {
        "text_attentions": [(3, 2, 7, 7)] * 3,
        "vision_attentions": [(3, 4, 21, 21)] * 4,
        "decoder_attentions": [(3, 4, 16, 16)] * 2,
        "cross_attentions": [(3, 4, 16, 7)] * 2,
    }
    for name in ATTENTIONS:
        for weights in outputs[name]:
            assert weights.min() >= 0
            close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for weights in outputs.text_attentions:  # no token reads the tokens behind it
        assert not weights.triu(1).any() and weights.std() > 0
    for weights in outputs.cross_attentions:  # no patch reads padding
        padded = (INPUTS["input_ids"] == 0)[:, None, None].expand_as(weights)
        assert not weights[padded].any() and weights[~padded].all()


def combined(weights, value):
    """What an attention gives before its last projection: `weights` (N, heads, Q, K) of a value (N, K, d)."""
    heads = value.unflatten(2, (weights.shape[1], -1)).transpose(1, 2)
    return (weights @ heads).transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["text", "vision"])
def test_weights_of_backbones_reproduce_their_attentions(model, outputs, backbone):
    layers = model.text_model.encoder.layers if backbone == "text" else model.vision_model.encoder.layer
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None] if backbone == "text" else None
    states, attentions = outputs[f"{backbone}_hidden_states"], outputs[f"{backbone}_attentions"]
    for layer, state, weights in zip(layers, states, attentions):
        layer = getattr(layer, "base_layer", layer)
        if backbone == "text":
            attention, normed, last = layer.self_attn, layer.layer_norm1(state), layer.self_attn.out_proj
        else:
            attention, normed, last = layer.attention, layer.norm1(state), layer.attention.o_proj
        close(last(combined(weights, attention.v_proj(normed))), attention(normed, attention_mask=mask)[0])


@torch.no_grad()
def test_weights_of_the_decoder_reproduce_its_layers(model, outputs):
    """With the paper's layer written once more around them."""
    words, _ = model.encode_text(INPUTS["input_ids"])
    states = outputs.decoder_hidden_states
    assert len(model.decoder.layers) == len(outputs.decoder_attentions) == len(outputs.cross_attentions) == 2
    for index, layer in enumerate(model.decoder.layers):
        attention, normed = layer.self_attention, layer.self_attention_norm(states[index])
        value = normed @ attention.in_proj_weight[64:].T + attention.in_proj_bias[64:]
        attended = attention.out_proj(combined(outputs.decoder_attentions[index], value))
        patches = states[index] + layer.self_attention_output_norm(attended)
        attention = layer.word_attention
        value = words @ attention.v_proj_weight.T + attention.in_proj_bias[64:]
        attended = attention.out_proj(combined(outputs.cross_attentions[index], value))
        patches = patches + layer.word_attention_output_norm(attended)
        close(patches + layer.feed_forward(layer.feed_forward_norm(patches)), states[index + 1])


# --- Several phrases of an image, adapters of their own --------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("adapter_layers", [[1, 3], [0], [3], []])
@pytest.mark.parametrize("image_index", [[2, 0, 2, 2, 0], [4, 0, 3, 1, 2]])
def test_phrases_that_share_an_image_have_what_they_have_alone(adapter_layers, image_index):
    model = eager_model(vision_adapter_layers=adapter_layers)
    images, image_index = max(image_index) + 1, torch.tensor(image_index)
    inputs = small_inputs(phrases=5, images=images)
    alone = model(inputs["pixel_values"][image_index], inputs["input_ids"], **BOTH)
    shared = model(**inputs, image_index=image_index, **BOTH)
    assert torch.equal(
        model(**inputs, image_index=image_index, output_hidden_states=True).logits,
        model(**inputs, image_index=image_index).logits,
    )
    for name in (*HIDDEN_STATES, *ATTENTIONS):
        for ours, expected in zip(shared[name], alone[name], strict=True):
            close(ours, expected)


def with_further_adapters(model: DetrisForReferringSegmentation) -> DetrisForReferringSegmentation:
    fields = {"vision_adapter_layers": [0, 2], "vision_adapter_dim": 16, "text_adapter_layers": [1]}
    fields |= {"aligner_attention_dim": 16, "aligner_attention_heads": 4, "text_adapter_dim": 16}
    model.add_adapter(DetrisAdapterConfig(**fields), "other")
    randomize(model, seed=1)
    model.set_adapter("default")
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("image_index", [None, [1, 1, 0, 2, 1]])
def test_each_phrase_has_those_of_its_own_adapter(image_index):
    model = with_further_adapters(eager_model())
    names = ["other", "__base__", "default", "other", "default"]
    inputs = small_inputs(5)
    index = torch.arange(5) if image_index is None else torch.tensor(image_index)
    by_name = model(**inputs, adapter_names=names, image_index=None if image_index is None else index, **BOTH)
    assert model.active_adapters() == ["default"]
    for n, name in enumerate(names):
        phrase = {"pixel_values": inputs["pixel_values"][index[n], None], "input_ids": inputs["input_ids"][n, None]}
        if name == "__base__":
            model.disable_adapters()
        else:
            model.set_adapter(name)
        alone = model(**phrase, **BOTH)
        model.enable_adapters()
        for kind in (*HIDDEN_STATES, *ATTENTIONS):
            for ours, expected in zip(by_name[kind], alone[kind], strict=True):
                close(ours[n, None], expected)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "detris+lora", "none"])
def test_all_methods_of_peft_have_them(method):
    model = eager_model(peft_method=method)
    outputs = model(**INPUTS, **BOTH)
    close(outputs.logits, model(**INPUTS).logits)
    assert [len(outputs[name]) for name in (*HIDDEN_STATES, *ATTENTIONS)] == [4, 5, 2, 3, 4, 1, 1]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:`is_gradient_checkpointing` is deprecated")
def test_a_peft_model_has_them():
    model = get_peft_model(eager_model(peft_method="none"), DetrisAdapterConfig(vision_adapter_layers=[1]))
    model.eval()
    outputs = model(**INPUTS, **BOTH)
    close(outputs.logits, model(**INPUTS).logits)
    with model.disable_adapter():
        bare = model(**INPUTS, **BOTH)
    assert torch.equal(bare.vision_hidden_states[1], outputs.vision_hidden_states[1])
    assert not torch.equal(bare.vision_hidden_states[2], outputs.vision_hidden_states[2])


# --- Asking for them changes nothing else ----------------------------------------------------------------------------


@torch.no_grad()
def test_logits_stay_what_they_are(model, outputs):
    logits = model(**INPUTS).logits
    assert torch.equal(model(**INPUTS, output_hidden_states=True).logits, logits)
    # Attentions that return their weights are computed step by step, which rounds in another way.
    close(outputs.logits, logits)
    assert torch.equal(model(**INPUTS).logits, logits)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_only_what_is_asked_for_is_returned(model):
    assert set(model(**INPUTS)) == {"logits"}
    assert set(model(**INPUTS, output_hidden_states=True)) == {"logits", *HIDDEN_STATES}
    assert set(model(**INPUTS, output_attentions=True)) == {"logits", *ATTENTIONS}
    options = {**INPUTS, "labels": torch.ones(3, 56, 56), "output_hidden_states": True}
    outputs = model(**options)
    assert list(outputs) == ["loss", "logits", *HIDDEN_STATES]
    as_tuple = model(**options, return_dict=False)
    assert len(as_tuple) == 5 and torch.equal(as_tuple[0], outputs.loss)
    for ours, name in zip(as_tuple[2:], HIDDEN_STATES, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, outputs[name], strict=True))
    assert list(model(**options, output_attentions=True)) == ["loss", "logits", *HIDDEN_STATES, *ATTENTIONS]


def test_a_call_that_fails_leaves_no_hook():
    model = eager_model()
    model.mask_head.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**INPUTS, **BOTH)
    model.mask_head._forward_hooks.clear()
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_threads_that_share_a_model_have_their_own():
    """One asks for all, one for hidden states, one for nothing, all while the others' hooks are there."""
    model, meet, options = eager_model(), Barrier(3), [BOTH, {"output_hidden_states": True}, {}]
    inputs = [INPUTS, small_inputs(2), small_inputs(4)]

    def wait_for_the_others(*call):
        meet.wait(timeout=30)

    handles = [part.register_forward_hook(wait_for_the_others) for part in (model.text_model.embeddings, model.neck)]

    @torch.no_grad()
    def segment(n):
        return model(**inputs[n], **options[n])

    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(segment, range(3)))
    for handle in handles:
        handle.remove()
    for n, ours in enumerate(together):
        expected = segment(n)
        assert list(ours) == list(expected)
        for name in expected:
            values = (ours[name], expected[name]) if name != "logits" else ([ours[name]], [expected[name]])
            assert all(torch.equal(*pair) for pair in zip(*values, strict=True)), name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_them_and_stay_what_they_are(checkpointing):
    def step(**options):
        model = eager_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        outputs = model(**INPUTS, labels=torch.ones(3, 56, 56), **options)
        return model, outputs

    plain, expected = step()
    expected.loss.backward()
    model, outputs = step(**BOTH)
    outputs.loss.backward(retain_graph=True)
    for (name, ours), parameter in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (parameter.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    parts = (model.text_model.encoder.layers[2], model.vision_model.encoder.layer[3], model.decoder.layers[0])
    for name, part in zip(HIDDEN_STATES, parts):
        trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(outputs[name][-1].square().sum(), trained, retain_graph=True)
        assert any(gradient.abs().sum() > 0 for gradient in gradients), name


def test_a_compiled_model_returns_them_too(model, outputs):
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        ours = compiled(**INPUTS, **BOTH)
    for name in (*HIDDEN_STATES, *ATTENTIONS):
        assert all(torch.equal(*pair) for pair in zip(ours[name], outputs[name], strict=True)), name


@torch.no_grad()
def test_half_precision_keeps_its_type():
    half = eager_model().to(torch.bfloat16)(**INPUTS, **BOTH)
    for name in (*HIDDEN_STATES, *ATTENTIONS):
        assert all(value.dtype == torch.bfloat16 and value.isfinite().all() for value in half[name]), name


@torch.no_grad()
def test_an_attention_returns_weights_on_request():
    attention = randomize(DetrisForReferringSegmentation(small_config()).decoder.layers[0].word_attention).eval()
    query, words, padding = torch.randn(2, 9, 32), torch.randn(2, 5, 24), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    attended, weights = attention(query, words, words, padding, need_weights=True)
    close(attended, attention(query, words, words, padding))
    twin = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True).eval()
    twin.load_state_dict(attention.state_dict())
    close(weights, twin(query, words, words, padding, average_attn_weights=False)[1])
    q, k, v = (
        states @ weight.T + bias
        for states, weight, bias in zip(
            (query, words, words),
            (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight),
            attention.in_proj_bias.chunk(3),
        )
    )
    mask = torch.zeros(2, 1, 5).masked_fill(padding[:, None], -math.inf)
    close(combined(weights, v), attention_twin(q, k, v, 4, mask))


# --- Settings --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_configuration_may_ask_for_them(tmp_path):
    small_model().save_pretrained(tmp_path)
    options = {"attn_implementation": "eager", **BOTH}
    model = DetrisForReferringSegmentation.from_pretrained(tmp_path, **options)
    assert set(model(**INPUTS)) == {"logits", *HIDDEN_STATES, *ATTENTIONS}
    assert set(model(**INPUTS, output_hidden_states=False)) == {"logits", *ATTENTIONS}
    model.config.output_attentions = False
    assert set(model(**INPUTS)) == {"logits", *HIDDEN_STATES}
    model.save_pretrained(tmp_path / "again")
    assert set(DetrisForReferringSegmentation.from_pretrained(tmp_path / "again")(**INPUTS)) == {
        "logits",
        *HIDDEN_STATES,
    }


@pytest.mark.parametrize("part", ["vision", "text"])
def test_attention_that_returns_no_weights_is_refused(part):
    model = eager_model()
    model.set_attn_implementation({f"{part}_config": "sdpa"})
    with pytest.raises(ValueError, match=f'sdpa attention, which the {part} backbone.*attn_implementation="eager"'):
        model(**INPUTS, output_attentions=True)
    model(**INPUTS, output_hidden_states=True)
    model.set_attn_implementation("eager")
    model(**INPUTS, output_attentions=True)


def test_backbones_read_from_elsewhere_are_asked_themselves(tmp_path):
    """Their configurations are taken into the model's."""
    save_backbones(tmp_path)
    fields = {name: getattr(small_config(), name) for name in ("feature_layers", "vision_adapter_layers")}
    fields |= {"text_adapter_layers": [0], "image_size": 56, "max_text_length": 7}
    model = DetrisForReferringSegmentation.from_backbones(str(tmp_path / "vision"), str(tmp_path / "text"), **fields)
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model(**INPUTS, output_attentions=True)
    model.set_attn_implementation("eager")
    assert len(model(**INPUTS, output_attentions=True).vision_attentions) == 4
    model.save_adapter(tmp_path / "adapter")
    options = {"attn_implementation": "eager", "output_attentions": True}
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "adapter", **options)
    assert len(loaded(**INPUTS).vision_attentions) == 4


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("value", [1, [0], "yes"])
def test_other_values_than_true_and_false_are_refused(model, name, value):
    with pytest.raises(ValueError, match=f"{name} is .*: give True for those of all layers, or False"):
        model(**INPUTS, **{name: value})
