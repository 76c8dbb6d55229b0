"""Official checkpoints in this project's layout: every tensor, each in its place, nothing dropped in silence."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import official_config, official_figures, official_weights

from configuration_detris import DetrisConfig
from convert_detris_checkpoint import convert_state_dict, name_table
from modeling_detris import DetrisForReferringSegmentation, resample_position_table

RELEASED = Path(__file__).parents[2] / "shared" / "conformance" / "checkpoints"


@pytest.fixture(scope="module")
def official():
    return official_weights(official_figures()[0]["shapes"])


@pytest.fixture(scope="module")
def converted(official):
    return convert_state_dict(official, official_config())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_tensor_loads_from_any_wrapping(official, converted, prefix, wrapped):
    checkpoint = {f"{prefix}{name}": tensor for name, tensor in official.items()}
    if wrapped:
        checkpoint = {"epoch": 3, "best_iou": 0.7, "optimizer": {"state": {}}, "state_dict": checkpoint}
    ours = convert_state_dict(checkpoint, official_config())
    assert ours.keys() == converted.keys() and all(torch.equal(ours[name], converted[name]) for name in ours)
    model = DetrisForReferringSegmentation(official_config())
    model.load_state_dict(ours, strict=True)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())


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
    table = converted["vision_model.embeddings.position_embeddings"]
    assert table.shape == (1, 1 + 8 * 8, 64)
    assert torch.equal(table, resample_position_table(official["dinov2.pos_embed"], 8))


def test_tensors_that_do_not_fit_the_configuration_are_named(official):
    config = official_config()
    without = {name: tensor for name, tensor in official.items() if name != "neck.txt_proj.bias"}
    with pytest.raises(ValueError, match=r"1 tensors are missing \(neck.txt_proj.bias\) and 0 are too many"):
        convert_state_dict(without, config)
    with pytest.raises(ValueError, match=r"0 tensors are missing \(none\) and 1 are too many \(neck.new\)"):
        convert_state_dict(official | {"neck.new": torch.zeros(1)}, config)
    config.decoder_layers = 3
    with pytest.raises(ValueError, match=r"missing \(decoder.layers.2.*configuration that it was trained with"):
        convert_state_dict(official, config)
    with pytest.raises(ValueError, match="tensors are missing"):
        convert_state_dict({}, official_config())


def test_a_tensor_of_another_shape_is_named(official):
    wider = DetrisConfig.from_dict(official_config().to_dict() | {"decoder_ffn_dim": 128})
    model = DetrisForReferringSegmentation(wider)
    with pytest.raises(RuntimeError, match=r"size mismatch for decoder.layers.0.feed_forward.0.weight"):
        model.load_state_dict(convert_state_dict(official, wider), strict=True)


LARGE = {
    "vision_config": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "feature_layers": [8, 16],
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("base", {}),
        ("large", LARGE | {"vision_adapter_layers": [2, 6, 10, 14, 18, 22]}),
        (
            "large_mixed",
            LARGE
            | {
                "vision_adapter_layers": list(range(1, 24)),
                "vision_adapter_dim": 384,
                "text_adapter_layers": list(range(1, 12)),
                "text_adapter_dim": 384,
            },
        ),
    ],
)
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
