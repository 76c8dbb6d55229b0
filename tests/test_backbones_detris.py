"""Backbones from their original files and from folders: equal to Hugging Face's, refused by name, read anywhere."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.elsewhere import run_elsewhere
from helpers.folders import build, change_json, change_tensors, save_whole_and_adapter
from helpers.hostile_torchscript import Written
from helpers.models import (
    BACKBONE_FIELDS,
    assert_starts_as_the_paper_says,
    is_backbone,
    logits_of,
    save_backbones,
    small_inputs,
    trainable,
)
from helpers.original_backbones import save_originals
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, PreTrainedModel
from transformers.integrations import flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from backbones_detris import read_clip_text, read_dinov2
from modeling_detris import DetrisForReferringSegmentation


def assert_one_model(folder, text_file, **fields):
    models = []
    for vision, text in ((folder / "vision", folder / "clip"), (folder / "dinov2_pretrain.pth", folder / text_file)):
        torch.manual_seed(1)
        models.append(DetrisForReferringSegmentation.from_backbones(str(vision), str(text), **fields))
    of_folders, of_files = (model.state_dict() for model in models)
    assert of_folders.keys() == of_files.keys()
    assert [name for name, tensor in of_folders.items() if not torch.equal(tensor, of_files[name])] == []
    inputs = torch.randn(1, 3, 448, 448), torch.tensor([[49406, 320, 2368, 49407, 0]])
    with torch.no_grad():
        logits = [model(*inputs).logits for model in models]
    assert torch.equal(*logits) and logits[0].std() > 0


SMALL_FIELDS = {"vision_adapter_layers": [1], "text_adapter_layers": [1], "feature_layers": [0, 1]}


@pytest.mark.slow
@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("text_file", ["ViT-B-16.pt", "clip.pth"])
def test_original_backbone_files_give_the_model_of_hugging_faces_folders(tmp_path, registers, text_file):
    save_originals(tmp_path, 64, 2, 128, 2, registers)
    assert_one_model(tmp_path, text_file, **SMALL_FIELDS)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "depths", "fields"), [(768, (12, 12), {}), (1024, (2, 2), SMALL_FIELDS)])
def test_original_backbones_of_real_width_give_the_model_of_hugging_faces_folders(tmp_path, width, depths, fields):
    """The width tells how many heads there are, which no tensor does. The base size has its real depth too."""
    save_originals(tmp_path, width, depths[0], 512, depths[1])
    assert_one_model(tmp_path, "ViT-B-16.pt", **fields)


def test_files_that_are_no_backbones_are_refused(tmp_path):
    save_originals(tmp_path, 64, 2, 128, 2)
    dinov2, clip = str(tmp_path / "dinov2_pretrain.pth"), str(tmp_path / "ViT-B-16.pt")
    with pytest.raises(ValueError, match="clip.pth is no DINOv2 .* no tensor 'dinov2.patch_embed.proj.weight'. Give"):
        DetrisForReferringSegmentation.from_backbones(str(tmp_path / "clip.pth"), clip, **SMALL_FIELDS)
    with pytest.raises(ValueError, match="pretrain.pth is no CLIP by OpenAI: There is no tensor 'txt_back"):
        DetrisForReferringSegmentation.from_backbones(dinov2, dinov2, **SMALL_FIELDS)
    weights = torch.load(dinov2)
    torch.save(weights | {"head.weight": torch.zeros(1)}, dinov2)
    with pytest.raises(
        ValueError, match=r"1 tensor is unexpected, such as dinov2.head.weight \(saved: .*\). Give the file"
    ):
        DetrisForReferringSegmentation.from_backbones(dinov2, clip, **SMALL_FIELDS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_original_backbones_of_half_width_are_read_as_float32(tmp_path, dtype):
    save_originals(tmp_path, 64, 2, 128, 2)
    for name, read in (("dinov2_pretrain.pth", read_dinov2), ("clip.pth", read_clip_text)):
        weights = torch.load(tmp_path / name)
        narrow = {name: tensor.to(dtype) for name, tensor in weights.items()}
        torch.save({"model": narrow}, tmp_path / "narrow.pth")
        torch.save({name: tensor.float() for name, tensor in narrow.items()}, tmp_path / "wide.pth")
        ours, theirs = read(tmp_path / "narrow.pth").state_dict(), read(tmp_path / "wide.pth").state_dict()
        assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []
        assert ours.keys() == theirs.keys()
        assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert type(read_clip_text(tmp_path / "clip.pth")) is CLIPTextModelWithProjection  # named in what it saves


def test_numbers_of_original_backbones_that_are_none_are_refused_by_name(tmp_path):
    save_originals(tmp_path, 64, 2, 128, 2)
    for name, read, tensor in (
        ("dinov2_pretrain.pth", read_dinov2, "blocks.1.ls1.gamma"),
        ("clip.pth", read_clip_text, "transformer.resblocks.0.ln_2.bias"),
    ):
        weights = torch.load(tmp_path / name)
        weights[tensor][3] = float("inf")
        torch.save(weights, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is no .*{re.escape(tensor)} holds NaN or infinity"):
            read(tmp_path / name)


def test_a_text_backbone_that_would_write_a_file_is_refused_wherever_it_is_named(tmp_path, monkeypatch):
    save_originals(tmp_path, 64, 2, 128, 2)
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Written()).save("hostile.pt")
    fields = {name: value for name, value in SMALL_FIELDS.items()}
    with pytest.raises(ValueError, match="hostile.pt asks for .*Written.__setstate__.* nothing in it was run"):
        DetrisForReferringSegmentation.from_backbones("vision", "hostile.pt", **fields)
    DetrisForReferringSegmentation.from_backbones("vision", "clip", **fields).save_adapter("adapter")
    config = json.loads(Path("adapter/config.json").read_text())
    for place in ("text_backbone", "vision_backbone"):
        Path("adapter/config.json").write_text(json.dumps(config | {place: str(tmp_path / "hostile.pt")}))
        with pytest.raises(ValueError, match="hostile.pt asks for .*Written.__setstate__.* nothing in it was run"):
            DetrisForReferringSegmentation.from_pretrained("adapter")
    assert not Path("written").exists()


# --- where only the model's code is -------------------------------------------------------------------------------

LOAD_ADAPTERS = """
import importlib.util, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

torch.set_num_threads(1)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.") and not importlib.util.find_spec("train_hf")
with torch.no_grad():
    save_file({"logits": model(**load_file("inputs.safetensors")).logits}, "results.safetensors")
"""
BUILD = """
import importlib.util, json, sys
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, "")  # which -I leaves out
from modeling_detris import DetrisForReferringSegmentation

assert not importlib.util.find_spec("train_hf") and not importlib.util.find_spec("convert_detris_checkpoint")
torch.set_num_threads(1)
torch.manual_seed(1)
model = DetrisForReferringSegmentation.from_backbones(*sys.argv[1:3], **json.loads(sys.argv[3]))
with torch.no_grad():
    save_file({"logits": model(**load_file("inputs.safetensors")).logits}, "results.safetensors")
"""


@pytest.mark.slow
def test_original_files_are_read_where_only_the_models_code_is(tmp_path, one_thread):
    save_originals(tmp_path, 64, 2, 128, 2)
    originals = str(tmp_path / "dinov2_pretrain.pth"), str(tmp_path / "ViT-B-16.pt")
    torch.manual_seed(1)
    model = DetrisForReferringSegmentation.from_backbones(*originals, **SMALL_FIELDS)
    model.save_adapter(tmp_path / "adapter")
    inputs = {"pixel_values": torch.randn(1, 3, 448, 448), "input_ids": torch.tensor([[49406, 320, 2368, 49407, 0]])}
    with torch.no_grad():
        expected = model(**inputs).logits
    loaded = run_elsewhere(LOAD_ADAPTERS, tmp_path / "elsewhere", str(tmp_path / "adapter"), **inputs)
    assert torch.equal(loaded["logits"], expected)

    (tmp_path / "code").mkdir()
    for file in (tmp_path / "adapter").glob("*.py"):
        shutil.copy(file, tmp_path / "code")
    built = run_elsewhere(BUILD, tmp_path / "code", *originals, json.dumps(SMALL_FIELDS), **inputs)
    assert torch.equal(built["logits"], expected)


# --- models built around backbones -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder with the backbones `vision` and `text`, and around them the model `whole` and the adapters `adapter`."""
    folder = tmp_path_factory.mktemp("saved")
    save_whole_and_adapter(folder)
    return folder


@pytest.mark.parametrize(
    ("registers", "text", "image_size", "dtype"),
    [
        (True, "projection", 70, torch.float32),
        (False, "whole CLIP", 56, torch.float32),
        (True, "whole CLIP", 84, torch.float16),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_from_backbones_takes_their_weights_and_starts_the_rest(tmp_path, registers, text, image_size, dtype):
    vision_weights, text_weights = save_backbones(tmp_path, registers, text, dtype)
    model = DetrisForReferringSegmentation.from_backbones(
        str(tmp_path / "vision"), str(tmp_path / "text"), **BACKBONE_FIELDS | {"image_size": image_size}
    )
    expected = {f"vision_model.{name}": weight for name, weight in vision_weights.items()}
    expected |= {name: weight for name, weight in text_weights.items() if name.startswith("text_")}
    ours = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters() if is_backbone(n)}
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(ours[name], weight.float()), name
    assert model.dtype == torch.float32 and not model.training
    assert not any(is_backbone(name) for name in trainable(model)) and trainable(model)
    assert_starts_as_the_paper_says(model)
    inputs = small_inputs(2, size=image_size)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(DetrisForReferringSegmentation.from_pretrained(tmp_path / "saved")(**inputs).logits, logits)
    assert model.text_model.config._attn_implementation == model.vision_model.config._attn_implementation == "sdpa"


def test_from_backbones_refuses_what_is_no_backbone(tmp_path):
    save_backbones(tmp_path, text="no projection")
    vision, text = str(tmp_path / "vision"), str(tmp_path / "text")
    with pytest.raises(ValueError, match="text_projection"):  # which would get random numbers
        DetrisForReferringSegmentation.from_backbones(vision, text, **BACKBONE_FIELDS)
    with pytest.raises(ValueError, match="vision.* [Gg]ive .* a CLIP model for text"):
        DetrisForReferringSegmentation.from_backbones(vision, vision, **BACKBONE_FIELDS)
    save_backbones(tmp_path, text="projection")
    with pytest.raises(ValueError, match="model_type 'clip_text_model': give a DINOv2 model"):
        DetrisForReferringSegmentation.from_backbones(text, text, **BACKBONE_FIELDS)
    with pytest.raises(OSError, match="missing"):
        DetrisForReferringSegmentation.from_backbones(str(tmp_path / "missing"), text, **BACKBONE_FIELDS)


def test_a_pickled_backbone_that_claims_more_than_it_holds_is_refused(saved, tmp_path):
    vision = tmp_path / "vision"
    vision.mkdir()
    shutil.copy(saved / "vision" / "config.json", vision)
    change_json(vision / "config.json", hidden_size=24576)
    shapes = {"embeddings.cls_token": (1, 1, 24576), "encoder.layer.0.mlp.fc1.weight": (98304, 24576)}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, vision / "pytorch_model.bin")
    with pytest.raises(OSError, match="pytorch_model.bin cannot be read .its tensors claim more numbers than it has"):
        DetrisForReferringSegmentation.from_backbones(str(vision), str(saved / "text"), **BACKBONE_FIELDS)


def test_a_backbone_is_not_built_from_a_configuration_that_its_files_do_not_fill(saved, tmp_path):
    vision = Path(shutil.copytree(saved / "vision", tmp_path / "vision"))
    for values, message in (
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, but only .* tensors"),
        ({"hidden_size": 4096}, "asks for .* numbers, but .* are saved"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"model_type": "llama"}, "model_type 'llama'"),
    ):
        shutil.copy(saved / "vision" / "config.json", vision)
        change_json(vision / "config.json", **values)
        with pytest.raises(ValueError, match=message):
            DetrisForReferringSegmentation.from_backbones(str(vision), str(saved / "text"), **BACKBONE_FIELDS)


def test_backbones_that_are_no_numbers_are_refused(saved, tmp_path):
    text = Path(shutil.copytree(saved / "text", tmp_path / "text"))
    change_tensors(text / "model.safetensors", lambda t: t["text_projection.weight"].fill_(math.nan))
    with pytest.raises(ValueError, match="text_projection.weight holds NaN"):
        DetrisForReferringSegmentation.from_backbones(str(saved / "vision"), str(text), **BACKBONE_FIELDS)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["from_backbones", "whole", "adapter", "set"])
def load(request, saved):
    """A way to ask for an attention."""
    if request.param == "from_backbones":
        return lambda attention: build(saved, attn_implementation=attention)
    if request.param == "set":
        return lambda attention: set_attention(build(saved), attention)
    return lambda attention: DetrisForReferringSegmentation.from_pretrained(
        saved / request.param, attn_implementation=attention
    )


def set_attention(model, attention):
    model.set_attn_implementation(attention)
    return model


def attentions_of(model) -> list[str]:
    """What the layers themselves will use, also those inside adapter layers, of vision and of text."""
    used = []
    for backbone, layers in (
        (model.vision_model, model.vision_model.encoder.layer),
        (model.text_model, model.text_model.encoder.layers),
    ):
        configs = [module.config for layer in layers for module in layer.modules() if hasattr(module, "is_causal")]
        assert len(configs) == len(layers)
        (name,) = {config._attn_implementation for config in (backbone.config, *configs)}
        used.append(name)
    return used


def test_an_attention_reaches_every_layer_of_both_backbones(load):
    assert attentions_of(load("flex_attention")) == ["flex_attention"] * 2
    assert attentions_of(load("eager")) == ["eager"] * 2


def test_each_backbone_can_have_its_own_attention(load):
    assert attentions_of(load({"vision_config": "eager"})) == ["eager", "sdpa"]
    assert attentions_of(load({"text_config": "eager", "vision_config": "flex_attention"})) == [
        "flex_attention",
        "eager",
    ]


@pytest.mark.parametrize("wrong", [3, {"vision": "eager"}, {"vision_config": None}, ["eager"]])
def test_what_names_no_attention_is_refused(load, wrong):
    with pytest.raises(ValueError, match=r"attn_implementation is .*: give a name such as 'sdpa', or a dict"):
        load(wrong)


def test_an_attention_that_there_is_not_is_refused(load):
    with pytest.raises(ValueError, match='attn_implementation="nonsense"'):
        load("nonsense")
    if not is_flash_attn_2_available():
        with pytest.raises(ValueError, match="FlashAttention2 .* doesn't seem to be installed"):
            load("flash_attention_2")


@pytest.mark.slow
def test_all_attentions_give_the_same_logits(saved, monkeypatch):
    """Flex attention without its compiler, and for flash attention, which needs a GPU, one that is called as it is."""
    monkeypatch.setattr(flex_attention, "WrappedFlexAttention", lambda training: lambda: flex_attention.flex_attention)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *args, **kwargs: None)
    causal = []

    def like_flash(module, query, key, value, attention_mask, scaling, is_causal=None, **kwargs):
        assert attention_mask is None
        causal.append(module.is_causal if is_causal is None else is_causal)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal[-1], scale=scaling)
        return attended.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", like_flash)
    model = DetrisForReferringSegmentation.from_pretrained(saved / "whole", attn_implementation="eager")
    expected = logits_of(model)
    for attention in ("sdpa", "flex_attention", "flash_attention_2"):
        model.set_attn_implementation(attention)
        assert torch.allclose(logits_of(model), expected, atol=1e-5 * expected.abs().max())
        with pytest.raises(ValueError, match=f'{attention} attention, .*returns no weights: .*="eager"'):
            model(**small_inputs(), output_attentions=True)
    assert causal == [True] * 3 + [False] * 4  # the layers of the text, then those of the image
