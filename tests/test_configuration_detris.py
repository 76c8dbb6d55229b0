"""DetrisConfig: its defaults are the paper's, it refuses values that cannot work, it is saved and loaded."""

import pytest
from helpers.models import PATCH_SIZE, small_config
from transformers import CLIPTextConfig, Dinov2Config, Dinov2WithRegistersConfig

from configuration_detris import DetrisConfig, one_line


def test_defaults_are_the_base_recipe():
    config = DetrisConfig()
    assert type(config.vision_config) is Dinov2WithRegistersConfig and type(config.text_config) is CLIPTextConfig
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size) == (768, 12, 14)
    assert (vision.num_register_tokens, vision.image_size) == (4, 518)
    assert (text.hidden_size, text.num_hidden_layers, text.projection_dim) == (512, 12, 512)
    assert (text.vocab_size, text.max_position_embeddings, text.hidden_act) == (49408, 77, "quick_gelu")
    assert list(config.vision_adapter_layers) == list(config.text_adapter_layers) == [1, 3, 5, 7, 9, 11]
    assert (config.vision_adapter_dim, config.text_adapter_dim, config.adapter_scale) == (128, 64, 0.2)
    assert (config.aligner_attention_dim, config.aligner_attention_heads, config.aligner_dropout) == (128, 8, 0.1)
    assert list(config.feature_layers) == [4, 8]
    assert (config.decoder_dim, config.decoder_layers, config.decoder_heads) == (512, 3, 8)
    assert (config.decoder_ffn_dim, config.decoder_dropout) == (512, 0.1)
    assert (config.image_size, config.max_text_length, config.mask_threshold) == (448, 17, 0.35)
    assert config.freeze_backbones is True


def test_sub_configs_may_be_objects_and_keep_the_size_of_their_pretraining():
    vision = Dinov2Config(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=518, patch_size=14)
    config = small_config(vision_config=vision, image_size=84)
    assert config.vision_config is vision
    assert (config.image_size, vision.image_size) == (84, 518)


@pytest.mark.parametrize("registers", [True, False])
def test_saving_and_loading_gives_the_same_config(tmp_path, registers):
    config = small_config(registers, vision={"layerscale_value": 0.25}, mask_threshold=0.5, freeze_backbones=False)
    config.save_pretrained(tmp_path)
    loaded = DetrisConfig.from_pretrained(tmp_path)
    # Besides its fields, a saved configuration says which code and version wrote it.
    unlike = {key for key, value in config.to_dict().items() if loaded.to_dict()[key] != value}
    assert unlike <= {"auto_map", "transformers_version"}
    assert loaded.vision_config.layerscale_value == 0.25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_adapter_layers": [1, 4]}, r"vision_adapter_layers names layers \[4\].* layers 0 to 3"),
        ({"text_adapter_layers": [-1]}, r"text_adapter_layers names layers \[-1\].* layers 0 to 2"),
        ({"feature_layers": [0, 7, 9]}, r"feature_layers names layers \[7, 9\].* layers 0 to 3"),
        ({"vision_adapter_layers": [3, 1]}, r"vision_adapter_layers is \[3, 1\]: .* ascending order"),
        ({"text_adapter_layers": [2, 2]}, r"text_adapter_layers is \[2, 2\]: give each layer once"),
        ({"feature_layers": [2, 1]}, r"feature_layers is \[2, 1\]: .* ascending order"),
        ({"vision_adapter_dim": 40}, "vision_adapter_dim is 40: it must be a positive multiple of 16"),
        ({"text_adapter_dim": 0}, "text_adapter_dim is 0: it must be a positive multiple of 16"),
        ({"image_size": 100}, f"image_size is 100: it must be a positive multiple of {PATCH_SIZE}"),
        ({"aligner_attention_dim": 18}, "aligner_attention_dim is 18: it must be a positive multiple of 4"),
        ({"decoder_dim": 36, "decoder_heads": 8}, "decoder_dim is 36: it must be a positive multiple of 8"),
        ({"decoder_dim": 30, "decoder_heads": 3}, "decoder_dim is 30: it must be a positive multiple of 4"),
        ({"aligner_attention_heads": 0}, "aligner_attention_heads is 0"),
        ({"decoder_heads": 0}, "decoder_heads is 0"),
        ({"max_text_length": 17}, "max_text_length is 17: it must lie between 3 and the 16 positions"),
        ({"max_text_length": 2}, "max_text_length is 2: it must lie between 3"),
        ({"mask_threshold": 1.0}, "mask_threshold is 1.0: it is a probability between 0 and 1"),
        ({"vision_config": {"model_type": "vit"}}, "vision_config.model_type is 'vit': give a config of 'dinov2' or"),
        (
            {"text_config": {"model_type": "bert"}},
            "text_config.model_type is 'bert': give a config of",
        ),
        (
            {"text_config": {"model_type": "clip"}},
            "text_config.model_type is 'clip': give a config of",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


def test_whole_numbers_are_taken_for_fractions():
    # A YAML file that says `adapter_scale: 1` means 1.0.
    assert small_config(adapter_scale=1, aligner_dropout=0, decoder_dropout=0).adapter_scale == 1


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one\n  two\tthree\r\n", "one two three"),
        (OSError("a\x1b[31m\0b\udcff"), "a\\x1b[31m\\x00b\\udcff"),
        ("x" * 1000, "x" * 1000),
        ("x" * 1001, "x" * 1000 + " …"),
        ("\0" * 1000, "\\x00" * 250 + " …"),
        (" " * 2000, " …"),
    ],
)
def test_messages_are_cut_to_one_line(message, line):
    assert one_line(message) == line
