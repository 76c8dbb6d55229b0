"""The adapters as a PEFT method: their layers, what PEFT does with them, and the digest of the backbones."""

import copy
import math

import pytest
import torch
from helpers.adapter_twins import attention_twin, dense_aligner_twin, linear, text_adapter_twin, weights_of
from helpers.models import is_backbone, randomize, small_config, small_inputs, small_model
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch.nn import functional as F
from transformers import CLIPTextModel, Dinov2Model, Dinov2WithRegistersModel

from adapter_layers_detris import DetrisAdapterLayer, TextAdapterLayer, VisionAdapterLayer
from configuration_detris import DetrisConfig
from modeling_detris import DetrisForReferringSegmentation
from peft_detris import ADAPTER_FIELDS, HEAD_MODULES, DetrisAdapterConfig, backbone_digest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:Already found a `peft_config`",
        "ignore:`is_gradient_checkpointing`",
        "ignore:You are trying to modify a model with PEFT for a second time",
    ),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- Layers ----------------------------------------------------------------------------------------------------------


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
    # At the size of the pretraining, where no positions are resampled: Hugging Face does that in another way.
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
    model, inputs = peft_model("detris+lora"), small_inputs(2)
    logits = model(**inputs).logits
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_and_unload):
        with pytest.raises(ValueError, match="^DETRIS adapters are not linear, so they cannot be merged"):
            merge()
    assert torch.equal(model(**inputs).logits, logits)


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
    """With the statistics of batch norms, which are buffers and not parameters."""
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


# --- The method as a whole -------------------------------------------------------------------------------------------

METHODS = ["detris", "lora", "detris+lora", "none"]
BARE = {"peft_method": "none"}


def adapter_config(method="detris", **fields):
    """Adapters in other layers and of other widths than in `small_config`."""
    config = {"vision_adapter_layers": [2], "text_adapter_layers": [1], "text_adapter_dim": 32, "lora_rank": 4}
    config |= {"aligner_attention_dim": 16, "aligner_attention_heads": 2, "aligner_dropout": 0.0}
    return DetrisAdapterConfig(peft_method=method, **config | fields)


def peft_model(method="detris", **fields):
    """A `PeftModel` around a bare model, with adapters and a head that change what it computes."""
    model = get_peft_model(small_model(small_config(**BARE)), adapter_config(method, **fields))
    for name, module in model.named_modules():
        if name.endswith((".detris_adapter.default", ".lora_A", ".lora_B", ".modules_to_save.default")):
            randomize(module, seed=7)
    return model.eval()


def backward(model):
    labels = (torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    model(**small_inputs(3), labels=labels).loss.backward()


@pytest.mark.parametrize("method", METHODS)
def test_get_peft_model_trains_adapters_and_head_alone(method):
    base = small_model(small_config(**BARE))
    own = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, adapter_config(method)).train()
    expected = {"neck.modules_to_save", "decoder.modules_to_save", "mask_head.modules_to_save"}
    if "detris" in method:
        expected |= {"vision_model.encoder.layer.2.detris_adapter", "text_model.encoder.layers.1.detris_adapter"}
    if "lora" in method:
        layers = [f"vision_model.encoder.layer.{layer}.attention" for layer in range(4)]
        layers += [f"text_model.encoder.layers.{layer}.self_attn" for layer in range(3)]
        expected |= {f"{layer}.{part}_proj.lora_{side}" for layer in layers for part in "qv" for side in "AB"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = {name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in trained}
    assert {name.partition(".default.")[0] for name in plain} == expected

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):  # in the first step, LoRA's A gets no gradient, because B is 0
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert trained <= changed
    assert all(".default." in name for name in changed)
    unloaded = model.unload().state_dict()
    assert [name for name in own if is_backbone(name) and not torch.equal(unloaded[name], own[name])] == []


def test_unloading_gives_the_bare_model_with_the_active_head():
    bare, inputs = small_model(small_config(**BARE)), small_inputs(2)
    model = peft_model("detris+lora")
    model.add_adapter("second", adapter_config("detris", vision_adapter_layers=[0, 2]))
    model.set_adapter("second")
    randomize(model.base_model.model.neck.modules_to_save["second"], seed=3)
    heads = {part: getattr(model.base_model.model, part).modules_to_save["second"] for part in HEAD_MODULES}
    unloaded = model.unload()
    assert type(unloaded) is DetrisForReferringSegmentation and unloaded.config.peft_method == "none"
    assert not [m for m in unloaded.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
    assert unloaded.state_dict().keys() == bare.state_dict().keys() and unloaded.peft_config == {}
    for part, head in heads.items():
        assert getattr(unloaded, part) is head
        getattr(bare, part).load_state_dict(head.state_dict())
    assert torch.equal(unloaded.eval()(**inputs).logits, bare(**inputs).logits)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method", ["lora", "detris+lora"])
def test_low_rank_adapters_are_their_formula(method, dora):
    """Weights of q and v are W + alpha / r * BA with LoRA; DoRA scales the rows of that to learned magnitudes."""
    fields = {"lora_rank": 4, "lora_alpha": 6, "lora_use_dora": dora, "peft_method": method}
    model, inputs = small_model(small_config(**fields)), small_inputs(2)
    logits = model(**inputs).logits
    places = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in places.items():
        weight = module.base_layer.weight + 6 / 4 * module.lora_B.default.weight @ module.lora_A.default.weight
        if dora:
            magnitude = module.lora_magnitude_vector.default.weight
            weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        module.base_layer.weight.data.copy_(weight)
        model.set_submodule(name, module.base_layer)
    assert len(places) == 2 * (4 + 3)
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-4)


def test_gradients_reach_low_rank_and_dense_adapters_and_no_backbone():
    for model in (peft_model("detris+lora").train(), small_model(small_config(peft_method="detris+lora")).train()):
        backward(model)
        norms = {"detris_adapter": [], "lora_A": [], "lora_B": []}
        for name, parameter in model.named_parameters():
            kinds = [kind for kind in norms if f".{kind}." in name]
            if kinds:
                norms[kinds[0]].append(parameter.grad.norm().item())
            elif is_backbone(name.removeprefix("base_model.model.")):
                assert parameter.grad is None and not parameter.requires_grad, name
        assert min(norms["lora_A"]) > 0 and min(norms["lora_B"]) > 0 and len(norms["lora_A"]) == 14
        # A convolution's bias before a batch norm has no effect.
        assert sum(norm > 0 for norm in norms["detris_adapter"]) > 0.7 * len(norms["detris_adapter"]) > 0


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad", "ignore:`gradient_checkpointing_enable` is deprecated"
)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fields", [{}, {"peft_method": "lora"}, {"peft_method": "lora", "lora_use_dora": True}])
def test_checkpointing_gives_the_same_gradients(fields, reentrant):
    steps = []
    for checkpointing in (False, True):
        model = small_model(small_config(**{"peft_method": "detris+lora"} | fields)).train()
        runs = []
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # Layers without dense adapters.
        for layer in (model.vision_model.encoder.layer[0], model.text_model.encoder.layers[1]):
            q_proj = [module for module in layer.modules() if isinstance(module, LoraLayer)][0]
            q_proj.register_forward_hook(lambda *_, runs=runs: runs.append(torch._C._current_graph_task_id() != -1))
        backward(model)
        assert runs == [False] * 2 + [True] * 2 * checkpointing
        steps.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in steps[0].items():
        torch.testing.assert_close(steps[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_adapter_layers": [2, 9]}, r"vision_adapter_layers names layers \[9\], .* has layers 0 to 3"),
        ({"text_adapter_layers": [1, 0]}, r"text_adapter_layers is \[1, 0\]: give each layer once"),
        ({"vision_adapter_dim": 50}, "vision_adapter_dim is 50: it must be a positive multiple of 16"),
        ({"aligner_attention_heads": 3}, "aligner_attention_dim is 16: it must be a positive multiple of 3"),
        ({"peft_method": "prompt"}, "peft_method is 'prompt': give one of detris, lora, detris.lora, none"),
        ({"peft_method": "lora", "lora_rank": 0}, "lora_rank is 0"),
        ({"peft_method": "lora", "lora_target_modules": []}, "lora_target_modules is empty"),
        # Modules of one backbone only; the other would get no adapters.
        (
            {"peft_method": "lora", "lora_target_modules": ["q_proj", "o_proj"]},
            r"lora_target_modules names \['o_proj'\]",
        ),
        (
            {"peft_method": "detris+lora", "lora_target_modules": ["out_proj"]},
            r"names \['out_proj'\], which .* 'q_proj'",
        ),
        ({"peft_method": "lora", "lora_target_modules": ["mlp"]}, r"names \['mlp'\], .* name linear modules"),
        ({"model_fields": {"decoder_dim": 64}}, "trained with decoder_dim 64, but the model has 32: build it with"),
        ({"backbone_digest": "0" * 64}, "other backbones: their digest is 0{64}, the model's is [0-9a-f]{64}"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_changed(fields, message):
    model, inputs = small_model(), small_inputs(2)
    logits, before = model(**inputs).logits, model.peft_config["default"].to_dict()
    names = list(model.state_dict())
    config = adapter_config()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert list(model.peft_config) == ["default"] and model.peft_config["default"].to_dict() == before
    assert list(model.state_dict()) == names and torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize(
    ("method", "fields"), [("lora", {"vision_adapter_layers": [9]}), ("detris", {"lora_target_modules": ["out_proj"]})]
)
def test_what_a_method_does_not_use_is_not_looked_at(method, fields):
    model = get_peft_model(small_model(small_config(**BARE)), adapter_config(method, **fields))
    assert bool(adapter_layers(model)) == (method == "detris")


@pytest.mark.parametrize("fields", [{"lora_target_modules": ["out_proj"]}, {"lora_rank": 0}])
def test_a_model_is_not_built_with_a_config_that_cannot_work(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        DetrisForReferringSegmentation(small_config(peft_method="lora", **fields))


def test_the_config_is_saved_with_what_it_needs(tmp_path):
    model = peft_model("detris+lora", lora_use_dora=True, lora_target_modules=["k_proj"])
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is DetrisAdapterConfig and config.inference_mode
    for name in ADAPTER_FIELDS:
        assert getattr(config, name) == getattr(model.peft_config["default"], name), name
    assert (config.lora_target_modules, config.lora_use_dora, config.text_adapter_dim) == (["k_proj"], True, 32)
    assert config.modules_to_save == ["neck", "decoder", "mask_head"]
    assert config.model_fields == {
        "feature_layers": [1, 2],
        "image_size": 56,
        "decoder_dim": 32,
        "decoder_layers": 1,
        "decoder_heads": 4,
        "decoder_ffn_dim": 28,
    }
    assert config.backbone_digest == backbone_digest(small_model(small_config(**BARE)))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_lie_where_their_layer_lies(method):
    """And have its precision, so that models on an accelerator and models in bfloat16 can take them."""
    model = small_model(small_config(**BARE)).to("meta", torch.bfloat16)
    model = get_peft_model(model, adapter_config(method))
    for name, parameter in model.named_parameters():
        assert parameter.is_meta and parameter.dtype == torch.bfloat16, name


# --- The digest of the backbones -------------------------------------------------------------------------------------


def bare_twin(**fields):
    """A model with the backbones of `small_model(small_config(**BARE))`, with other adapters and another head."""
    model = small_model(small_config(**fields), seed=5)
    weights = small_model(small_config(**BARE)).state_dict()
    for name, tensor in model.state_dict().items():
        if is_backbone(name) and ".detris_adapter." not in name and ".lora_" not in name:
            tensor.copy_(weights[name.replace(".base_layer.", ".")])
    return model


@pytest.mark.parametrize("fields", [{"peft_method": method} for method in METHODS] + [{"lora_use_dora": True}])
def test_the_digest_is_that_of_the_backbones_alone(fields):
    digest = backbone_digest(small_model(small_config(**BARE)))
    assert len(digest) == 64 and int(digest, 16)
    model = bare_twin(**{"peft_method": "detris+lora"} | fields)
    assert backbone_digest(model) == digest
    assert backbone_digest(get_peft_model(model, adapter_config("detris+lora"))) == digest
    model.vision_model.embeddings.mask_token.data += 1  # which DINOv2 uses only in its pretraining
    assert backbone_digest(model) == digest


def test_the_digest_tells_one_weight():
    model = small_model(small_config(**BARE))
    digests = {backbone_digest(model)}
    backbones = {name: p for name, p in model.named_parameters() if is_backbone(name) and "mask_token" not in name}
    for parameter in backbones.values():
        value = parameter.data.view(-1)[-1].clone()
        parameter.data.view(-1)[-1] = torch.nextafter(value, torch.tensor(10.0))
        digests.add(backbone_digest(model))
        parameter.data.view(-1)[-1] = value
    assert len(digests) == 1 + len(backbones) and backbone_digest(model) in digests
    # It also tells weights in another place or of another shape.
    first, second = (model.vision_model.encoder.layer[layer].norm1.weight for layer in (0, 1))
    first.data, second.data = second.data, first.data
    digests.add(backbone_digest(model))
    first.data = first.data[None]
    digests.add(backbone_digest(model))
    assert len(digests) == 3 + len(backbones)


def test_rounded_weights_have_no_digest():
    model = small_model(small_config(**BARE))
    model.text_model.encoder.layers[0].mlp.bfloat16()
    assert backbone_digest(model) is None
    assert backbone_digest(model.float().to("meta")) is None


def test_no_field_that_describes_adapters_is_left_out():
    others = {"modules_to_save", "model_fields", "backbone_digest"}
    assert {*ADAPTER_FIELDS} == DetrisAdapterConfig.__annotations__.keys() - others
    assert {*ADAPTER_FIELDS} <= DetrisConfig.__annotations__.keys()
