"""The official layout: every tensor's name there and here, what becomes of it, and the sizes that tensors tell."""

import json
import re

import pytest
import torch
from helpers.models import official_config
from helpers.released_checkpoints import RELEASED, RELEASED_RECIPES

from configuration_detris import DetrisConfig
from convert_detris_checkpoint import convert_state_dict, convert_to_official, recognize_config
from modeling_detris import DetrisForReferringSegmentation
from official_layout import (
    depth_of,
    expected_tensors,
    name_table,
    numbers_in,
    official_to_ours,
    read_text_config,
    read_vision_config,
    shape_of,
    tensors_to_official,
    tensors_to_ours,
)


def test_each_name_stands_in_the_table_once(official):
    table = name_table(official_config())
    theirs = [name for name, _, _ in table]
    ours = [name for _, names, _ in table for name in names]
    assert len(set(theirs)) == len(theirs) and len(set(ours)) == len(ours)
    assert official.keys() - set(theirs) == {"txt_backbone.logit_scale"}  # CLIP's, for its own training only


def test_each_kind_of_tensor_becomes_ours(official, converted):
    dino, clip = "dinov2.blocks.1", "txt_backbone.transformer.resblocks.1"
    vision, text = "vision_model.encoder.layer.1", "text_model.encoder.layers.1"
    for theirs, ours in (
        ("txt_backbone.text_projection", "text_projection.weight"),
        ("neck.f5_proj.0.weight", "neck.map_projections.2.conv.weight"),  # a transposed convolution
    ):
        assert torch.equal(converted[ours], official[theirs].transpose(0, 1))
    for theirs, ours in (
        ("neck.f3_proj.0.weight", "neck.map_projections.0.conv.weight"),
        (f"{dino}.adapter.D_fc1.weight", f"{vision}.detris_adapter.default.down.weight"),
        (f"{dino}.ls2.gamma", f"{vision}.base_layer.layer_scale2.lambda1"),
        (f"{clip}.mlp.c_proj.bias", f"{text}.mlp.fc2.bias"),
        ("decoder.layers.0.ffn.4.weight", "decoder.layers.0.feed_forward.4.weight"),
        ("proj.txt.weight", "mask_head.kernel_projection.weight"),
    ):
        assert torch.equal(converted[ours], official[theirs])
    for index, part in enumerate("qkv"):
        rows = slice(index * 64, (index + 1) * 64)
        assert torch.equal(
            converted[f"{vision}.base_layer.attention.{part}_proj.weight"], official[f"{dino}.attn.qkv.weight"][rows]
        )
        rows = slice(index * 512, (index + 1) * 512)
        assert torch.equal(
            converted[f"{text}.self_attn.{part}_proj.bias"], official[f"{clip}.attn.in_proj_bias"][rows]
        )
    gate = official["neck.fusion4.multihead_attn.in_proj_weight"]
    assert torch.equal(converted["neck.gates.1.value.weight"], gate[1024:])
    table = converted["vision_model.embeddings.position_embeddings"]  # as pretrained, the model resamples it
    assert torch.equal(table, official["dinov2.pos_embed"])


@pytest.mark.parametrize(
    ("kind", "ours"), [("same", 1), ("transposed", 1), ("thirds", 3), ("last third", 1)], ids=lambda value: str(value)
)
def test_each_kind_goes_both_ways(kind, ours):
    tensor, table = torch.arange(24.0).view(6, 2, 2), [("theirs", [f"ours.{index}" for index in range(ours)], kind)]
    converted = tensors_to_ours({"theirs": tensor}, table)
    assert list(converted) == table[0][1]
    again = tensors_to_official(converted, table)["theirs"]
    if kind == "last third":  # what has no effect comes back as zeros
        assert not again[:4].any()
        again, tensor = again[4:], tensor[4:]
    assert torch.equal(again, tensor)


def test_a_model_of_other_tensors_than_the_official_one_is_named():
    config = official_config()
    table = name_table(config)
    with pytest.raises(ValueError, match="no model of this configuration: mask_head.kernel_projection.bias does not"):
        expected_tensors(DetrisForReferringSegmentation, config, table[:-1])


@pytest.mark.parametrize(("name", "fields"), RELEASED_RECIPES.items())
def test_released_checkpoints_fit_by_name_and_shape(name, fields):
    path = RELEASED / f"{name}.json"
    if not path.exists():
        pytest.skip(f"needs shared/conformance/checkpoints/{path.name} beside the repository")
    config = DetrisConfig(**fields)
    with torch.device("meta"):
        checkpoint = {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (shape, dtype) in json.loads(path.read_text()).items()
        }
        model = DetrisForReferringSegmentation(config)
    model.load_state_dict(convert_state_dict(checkpoint, config), strict=True, assign=True)


# --- sizes --------------------------------------------------------------------------------------------------------


def test_sizes_of_the_backbones_are_read_off_their_tensors(official):
    config = official_config()
    for read, backbone in (
        (read_vision_config(official), config.vision_config),
        (read_text_config(official), config.text_config),
    ):
        assert read.model_type == backbone.model_type
        differ = {name for name, value in read.to_dict().items() if getattr(backbone, name) != value}
        assert differ <= {"num_attention_heads", "transformers_version"}, differ  # which tensors do not show
    plain = {name: tensor for name, tensor in official.items() if name != "dinov2.register_tokens"}
    assert read_vision_config(plain).model_type == "dinov2"
    with pytest.raises(ValueError, match="dinov2.pos_embed has 11 positions, not one and those of a square"):
        read_vision_config(official | {"dinov2.pos_embed": torch.zeros(1, 11, 64)})


def test_sizes_that_names_and_shapes_do_not_tell_are_refused():
    names = ["layers.0.weight", "layers.1.weight", "layers.1.bias", "other.7.weight"]
    assert numbers_in(names, r"layers\.(\d+)\.w") == {"0", "1"} and depth_of(names, "layers") == 2
    with pytest.raises(ValueError, match="The 1 other are not numbered from 0 to 0"):
        depth_of(names, "other")
    assert shape_of({"a": torch.zeros(2, 3)}, "a", 2) == (2, 3)
    with pytest.raises(ValueError, match=r"a has the shape \(2, 3\), which tells no sizes"):
        shape_of({"a": torch.zeros(2, 3)}, "a", 3)
    with pytest.raises(ValueError, match="There is no tensor 'b'"):
        shape_of({"a": torch.zeros(2, 3)}, "b", 2)


@pytest.mark.parametrize("name", RELEASED_RECIPES)
def test_released_recipes_are_recognized(name):
    path = RELEASED / f"{name}.json"
    if not path.exists():
        pytest.skip(f"needs shared/conformance/checkpoints/{path.name} beside the repository")
    with torch.device("meta"):
        checkpoint = {name: torch.empty(shape) for name, (shape, _) in json.loads(path.read_text()).items()}
    # Only what is written down: how a configuration was made, or in which order, is no matter.
    recognized, expected = (
        json.loads(config.to_json_string())
        for config in (recognize_config(checkpoint), DetrisConfig(**RELEASED_RECIPES[name]))
    )
    assert recognized == expected


NUMBERED = {
    "dinov2.blocks": "norm1.weight",
    "txt_backbone.transformer.resblocks": "ln_1.weight",
    "decoder.layers": "norm1.weight",
}


@pytest.mark.parametrize("modules", NUMBERED)
def test_layers_are_counted_before_any_is_built(official, in_time, modules):
    leaf, one = NUMBERED[modules], torch.ones(1)
    many = official | {f"{modules}.{index}.{leaf}": one for index in range(20_000)}
    with pytest.raises(ValueError, match=f"There are 20000 {re.escape(modules)}, but at most 256"):
        recognize_config(many)
    with pytest.raises(ValueError, match=rf": 199\d\d tensors are unexpected, such as {re.escape(modules)}\.10\."):
        convert_state_dict(many, official_config())
    for number in ("999999", "9" * 5000, "007", "\u0664"):
        with pytest.raises(ValueError, match=f"{re.escape(modules)} are not numbered from 0 to"):
            recognize_config(official | {f"{modules}.{number}.{leaf}": one})
    for number in ("999999", "9" * 5000):
        with pytest.raises(ValueError, match=rf": 1 tensor is unexpected, such as {re.escape(modules)}\.9999"):
            convert_state_dict(official | {f"{modules}.{number}.{leaf}": one}, official_config())


@pytest.mark.parametrize("field", ["vision_config", "text_config", "decoder_layers"])
def test_a_configuration_of_more_layers_than_any_model_has_is_refused(official, converted, in_time, field):
    config = official_config()
    if field == "decoder_layers":
        config.decoder_layers = 10**9
    else:
        getattr(config, field).num_hidden_layers = 10**9
    for convert, tensors in ((convert_state_dict, official), (convert_to_official, converted)):
        with pytest.raises(ValueError, match=f"{field}.* is 1000000000: no DETRIS has more than 256"):
            convert(tensors, config)


def test_names_are_compared_before_a_model_is_built():
    row = ("neck.txt_proj.bias", ["neck.sentence_projection.bias"], "same")
    with pytest.raises(ValueError, match=r"^It is no DETRIS: 1 tensor is missing and 1 is unexpected, such as neck"):
        official_to_ours({"x": torch.ones(1)}, None, None, [row], "It is no DETRIS", "Get it again.")


def test_clips_temperature_among_our_tensors_is_ignored(converted):
    expected = convert_to_official(converted, official_config())
    back = convert_to_official(converted | {"txt_backbone.logit_scale": torch.ones(())}, official_config())
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in expected)
