"""Official checkpoints in this project's layout: every tensor, each in its place, nothing dropped in silence."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.elsewhere import run_elsewhere
from helpers.models import official_config, official_figures, official_inputs
from helpers.original_backbones import Holder
from helpers.released_checkpoints import CONFORMANCE, RELEASED
from helpers.tiny_conversion import write_tiny_conversion
from helpers.warm_python import warm_python
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

from backbones_detris import read_clip_text, read_dinov2
from configuration_detris import DetrisConfig
from convert_detris_checkpoint import (
    convert_state_dict,
    convert_to_official,
    main,
    recognize_config,
)
from modeling_detris import DetrisForReferringSegmentation
from official_layout import name_table

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [(None, ""), ("state_dict", "module."), ("model", "_orig_mod."), ("model_state_dict", "module._orig_mod.")],
)
def test_every_tensor_loads_from_any_wrapping(official, converted, wrapper, prefix):
    checkpoint = {f"{prefix}{name}": tensor for name, tensor in official.items()}
    if wrapper is not None:
        checkpoint = {"epoch": 3, "best_iou": 0.7, "optimizer": {"state": {}}, wrapper: checkpoint}
    ours = convert_state_dict(checkpoint, official_config())
    assert_all_equal(ours, converted)
    model = DetrisForReferringSegmentation(official_config())
    model.load_state_dict(ours, strict=True)
    assert_all_equal(model.state_dict(), ours)


def test_tensors_that_do_not_fit_the_configuration_are_named(official):
    config = official_config()
    without = {name: tensor for name, tensor in official.items() if name != "neck.txt_proj.bias"}
    with pytest.raises(
        ValueError, match=r"^The official .*: 1 tensor is missing, such as neck.txt_proj.bias \(saved: nothing"
    ):
        convert_state_dict(without, config)
    with pytest.raises(
        ValueError, match=r"1 tensor is unexpected, such as neck.new \(saved: a tensor, expected: nothing"
    ):
        convert_state_dict(official | {"neck.new": torch.zeros(1)}, config)
    config.decoder_layers = 3
    with pytest.raises(ValueError, match=r"such as decoder.layers.2.*configuration .* that it was trained with"):
        convert_state_dict(official, config)
    with pytest.raises(ValueError, match="tensors are missing"):
        convert_state_dict({}, official_config())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_other_widths_become_float32(official, dtype):
    narrow = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in official.items()}
    ours = convert_state_dict(narrow, official_config())
    again = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in narrow.items()}
    theirs = convert_state_dict(again, official_config())
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())
    back = convert_to_official(
        {n: t.to(dtype) if t.is_floating_point() else t for n, t in ours.items()}, official_config()
    )
    assert_same_effect(again, back)
    assert {tensor.dtype for tensor in back.values()} == {torch.float32, torch.int64}


NOT_FINITE = [
    ("neck.txt_proj.weight", float("nan")),
    ("dinov2.blocks.1.adapter.D_fc2.bias", float("inf")),
    ("txt_backbone.positional_embedding", float("-inf")),
    ("neck.aggr.1.running_mean", float("nan")),
    ("dinov2.blocks.3.adapter.dense_branch1.bn.running_var", float("inf")),
    ("proj.vis.1.1.running_var", -0.5),
]


@pytest.mark.parametrize(("name", "number"), NOT_FINITE)
def test_numbers_that_are_none_are_refused_by_name_both_ways(official, converted, name, number):
    said = "holds NaN or infinity, or a negative variance"
    spoiled = official[name].clone()
    spoiled.view(-1)[-1] = number
    with pytest.raises(ValueError, match=f" {re.escape(name)} {said}"):
        convert_state_dict(official | {name: spoiled}, official_config())
    our_name = next(names[-1] for theirs, names, _ in name_table(official_config()) if theirs == name)
    spoiled = converted[our_name].clone()
    spoiled.view(-1)[-1] = number
    with pytest.raises(ValueError, match=f" {re.escape(our_name)} {said}"):
        convert_to_official(converted | {our_name: spoiled}, official_config())


def test_a_number_too_large_for_float32_is_refused(official):
    name = "neck.txt_proj.weight"
    wide = official[name].double()
    wide[-1, -1] = 1e300
    with pytest.raises(ValueError, match=f" {name} holds NaN or infinity"):
        convert_state_dict(official | {name: wide}, official_config())


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda tensor: tensor.to_sparse(), "is a sparse, nested or quantised tensor"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "is a sparse, nested or quantised"),
        (lambda tensor: torch.nested.nested_tensor([tensor]), "is a sparse, nested or quantised tensor"),
        (lambda tensor: {"weight": tensor}, "is a dict: save the model's state_dict alone"),
        (lambda tensor: tensor.tolist(), "is a list: save"),
        (lambda tensor: 0.5, "is a float: save"),
        (lambda tensor: tensor[:, :0], "is an empty tensor"),
        (lambda tensor: tensor.to(torch.complex64), "has numbers of type torch.complex64 instead of torch.float32"),
        (lambda tensor: tensor.long(), "has numbers of type torch.int64 instead of torch.float32"),
        (
            lambda tensor: tensor.to(torch.float8_e5m2),
            "has numbers of type torch.float8_e5m2 instead of torch.float32",
        ),
        (lambda tensor: tensor > 0, "has numbers of type torch.bool instead of torch.float32"),
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(official, make, said):
    name = "neck.f5_proj.0.weight"
    with pytest.raises(ValueError, match=f"{re.escape(name)}'? {said}"):
        convert_state_dict(official | {name: make(official[name])}, official_config())
    with pytest.raises(
        ValueError, match="num_batches_tracked has numbers of type torch.float32 instead of torch.int64"
    ):
        convert_state_dict(official | {"neck.aggr.1.num_batches_tracked": torch.tensor(0.0)}, official_config())


OTHERS = {  # names of their checkpoints, as their code makes them
    "of CRIS, not of": ["backbone.visual.conv1.weight", "backbone.token_embedding.weight", "neck.txt_proj.0.weight"],
    "of ETRIS, not of": ["backbone.visual.conv1.weight", "bridger.fusion_v.0.weight", "neck.txt_proj.0.weight"],
    "of CLIP alone": ["visual.conv1.weight", "token_embedding.weight", "transformer.resblocks.0.ln_1.weight"],
    "of DINOv2 alone": ["cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight"],
    "in the layout of this project already": ["vision_model.layernorm.weight", "text_model.final_layer_norm.weight"],
}


@pytest.mark.parametrize("model", OTHERS)
def test_checkpoints_of_other_models_are_named(tmp_path, model):
    checkpoint = {"epoch": 3, "state_dict": {f"module.{name}": torch.ones(2, 2) for name in OTHERS[model]}}
    for read in (recognize_config, lambda official: convert_state_dict(official, official_config())):
        with pytest.raises(ValueError, match=f"a checkpoint {model}"):
            read(checkpoint)
    torch.save(checkpoint, tmp_path / "best_model.pth")
    with pytest.raises(ValueError, match=f"best_model.pth: This is a checkpoint {model}.*: give"):
        main([str(tmp_path / "best_model.pth"), str(tmp_path / "model"), "--dataset", "refcoco/unc"])


# --- files --------------------------------------------------------------------------------------------------------

LOGITS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

folder, torch_threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(torch_threads)
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(**load_file("inputs.safetensors")).logits}, "results.safetensors")
"""


def logits_elsewhere(folder, tmp_path, pixel_values, input_ids):
    """What `AutoModel` computes from a folder in a process that does not see this repository."""
    arguments = [str(folder), str(torch.get_num_threads())]
    inputs = {"pixel_values": pixel_values, "input_ids": input_ids}
    return run_elsewhere(LOGITS, tmp_path / "elsewhere", *arguments, **inputs)["logits"]


def training_checkpoint(weights):
    """As the official `train.py` saves it, Adam and schedule after a step included."""
    copies = [tensor.clone() for name, tensor in weights.items() if name.startswith(("neck", "proj"))]
    trained = [nn.Parameter(copy) for copy in copies if copy.is_floating_point()]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[35])
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "epoch": 3,
        "cur_iou": 0.5,
        "best_iou": 0.5,
        "prec": {"Pr@50": 0.5},
        "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


def spread(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.std()).item()


def assert_same_effect(official, again):
    """All names and shapes are equal, and all tensors but those that do nothing."""
    assert {name: tensor.shape for name, tensor in again.items()} == {n: t.shape for n, t in official.items()}
    for name, tensor in official.items():
        if name == "txt_backbone.logit_scale":
            continue
        if name.startswith("neck.fusion") and "in_proj" in name:  # query and key come first
            tensor, again[name] = tensor.chunk(3)[2], again[name].chunk(3)[2]
        assert torch.equal(again[name], tensor), name


@pytest.fixture
def convert_tiny(official, tmp_path):
    """A function that converts a tiny checkpoint, or the file it is given, and returns the folder."""
    tiny_arguments = write_tiny_conversion(tmp_path)
    checkpoint = tmp_path / "best_model.pth"

    def convert(content=None, arguments=(), **options):
        if content is not None:
            torch.save(content, checkpoint, **options)
        main([str(checkpoint), str(tmp_path / "model"), *tiny_arguments, *arguments])
        return tmp_path / "model"

    convert.checkpoint = checkpoint
    return convert


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_checkpoint_becomes_a_folder_and_goes_back(official, convert_tiny, tmp_path, legacy):
    folder = convert_tiny(training_checkpoint(official), _use_new_zipfile_serialization=not legacy)
    pixel_values, input_ids, _ = official_inputs()
    expected = official_figures()[1]["logits"]
    assert spread(logits_elsewhere(folder, tmp_path, pixel_values, input_ids), expected) < 2e-4
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-segmentation"
    assert "best_model.pth" in card.text and "112 x 112" in card.text and "9 tokens" in card.text

    main([str(folder), str(tmp_path / "again.pth"), "--to-official"])
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert_same_effect(official, {name.removeprefix("module."): t for name, t in again["state_dict"].items()})
    assert all(name.startswith("module.") for name in again["state_dict"])  # as DataParallel wants them
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"tokenizer", "recipe.yaml", "best_model.pth", "model", "again.pth", "elsewhere"}


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [(["--dataset", "refcocog/umd"], 22), (["--dataset", "refcoco+/unc"], 17), (["--max_text_length", "30"], 30)],
)
def test_phrases_are_as_long_as_their_dataset_has_them(official, convert_tiny, tmp_path, arguments, tokens):
    torch.save(official, convert_tiny.checkpoint)
    common = [str(convert_tiny.checkpoint), str(tmp_path / "model"), "--tokenizer", str(tmp_path / "tokenizer")]
    main([*common, *arguments])
    config = DetrisConfig.from_pretrained(tmp_path / "model")
    assert (config.max_text_length, config.image_size) == (tokens, 448)
    assert json.loads((tmp_path / "model" / "processor_config.json").read_text())["max_text_length"] == tokens


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_named(official, tmp_path, monkeypatch, recipe):
    if recipe.stem == "own_data":
        pytest.skip("no recipe of the paper")
    taken = {}
    monkeypatch.setattr("convert_detris_checkpoint.from_official", lambda *_, **fields: taken.update(fields))
    main(["best_model.pth", "model", "--recipe", str(recipe)])
    assert taken.get("max_text_length", 17) == (22 if "umd" in recipe.stem else 17)
    assert (taken.get("feature_layers") == [8, 16]) == recipe.stem.startswith("large")


@pytest.mark.parametrize("arguments", [[], ["--dataset", "refcocoo/unc"]])
def test_a_phrase_length_that_nothing_tells_is_asked_for(official, tmp_path, arguments):
    torch.save(official, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="does not tell how long phrases are.*--max_text_length"):
        main([str(tmp_path / "bare.pth"), str(tmp_path / "model"), *arguments])
    assert not (tmp_path / "model").exists()


def flip(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 64)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda weights, path: None, OSError, r"best_model.pth does not exist: give"),
        (
            lambda weights, path: (torch.save(weights, path), os.truncate(path, 200_000)),
            OSError,
            "cut short or damaged",
        ),
        (lambda weights, path: (torch.save(weights, path), flip(path)), OSError, "cut short or damaged .*copy"),
        (
            lambda weights, path: torch.jit.script(Holder({"a.b": torch.ones(1)})).save(path),
            ValueError,
            "There is no tensor 'dinov2.patch_embed.proj.weight'",
        ),
        (lambda weights, path: path.write_text("not found"), ValueError, r"no PyTorch checkpoint \(.*\): give"),
        (lambda weights, path: torch.save(weights | {"x": Hostile()}, path), ValueError, "posix.system.*nothing.*run"),
        (lambda weights, path: torch.save([1, 2], path), ValueError, "holds no state dict.*give a model's"),
        (
            lambda weights, path: torch.save({n: t for n, t in weights.items() if n != "decoder.norm.bias"}, path),
            ValueError,
            r"does not fit the configuration: 1 tensor is missing, such as decoder.norm.bias \(saved: nothing",
        ),
        (
            lambda weights, path: torch.save({n: t for n, t in weights.items() if n != "neck.txt_proj.weight"}, path),
            ValueError,
            "best_model.pth: There is no tensor 'neck.txt_proj.weight'.*get the file again",
        ),
        (
            lambda weights, path: torch.save(weights | {"dinov2.pos_embed": torch.zeros(7)}, path),
            ValueError,
            r"best_model.pth: dinov2.pos_embed has the shape \(7,\), which tells no sizes. It is no whole",
        ),
        (
            lambda weights, path: torch.save(weights | {"neck.txt_proj.weight": torch.zeros(7, 512)}, path),
            ValueError,
            "best_model.pth: decoder_dim is 7",
        ),
        (
            lambda weights, path: torch.save(weights | {"neck.f5_proj.0.weight": torch.zeros(())}, path),
            ValueError,
            r"neck.f5_proj.0.weight \(saved: \(\), expected: \(64, 512, 1, 1\)",
        ),
        (
            lambda weights, path: torch.save(weights | {"neck.new": torch.zeros(1)}, path),
            ValueError,
            r"1 tensor is unexpected, such as neck.new \(saved: a tensor, expected: nothing",
        ),
        (
            lambda weights, path: torch.save(weights | {"proj.vis.4.bias": torch.zeros(7)}, path),
            ValueError,
            r"best_model.pth: .* 1 tensor has another shape, .* proj.vis.4.bias \(saved: \(7,\), expected: \(256,\)",
        ),
    ],
)
def test_a_damaged_checkpoint_gets_one_sentence_and_leaves_no_folder(
    official, convert_tiny, tmp_path, monkeypatch, damage, error, message
):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()} | {"best_model.pth"}
    damage(official, convert_tiny.checkpoint)
    with pytest.raises(error, match=message) as caught:
        convert_tiny()
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= before  # neither a folder nor what hostile code would make


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "recipe.yaml is no recipe: give a file"),
        ("a: [", "recipe.yaml is not YAML"),
        ("model_config: [1]", "recipe.yaml is no recipe"),
        ("model_config: {vision_adapter_layer: [1]}", r"\['vision_adapter_layer'\] are no fields of DetrisConfig"),
        ("model_config: {feature_layers: [1]}", r"feature_layers is \[1\]: an official DETRIS has 2"),
        ("just text", "recipe.yaml is no recipe"),
        ("3", "recipe.yaml is no recipe"),
        ("\udcff", "recipe.yaml is not YAML"),
        ("a: " + "9" * 5000, "recipe.yaml is not YAML"),
        ("[" * 5000, "recipe.yaml is not YAML"),
        ("a: b\n" * 50_000, "recipe.yaml has over 100,000 bytes"),
        ("!!python/object/apply:os.system ['touch written']", "recipe.yaml is not YAML"),
        ("model_config: {vision_config: &a {of: *a}}", r"recipe.yaml is not YAML \(an alias, \*a, stands"),
        (  # 2**60 values
            "a0: &a0 [1, 2]\n"
            + "".join(f"a{step}: &a{step} [*a{step - 1}, *a{step - 1}]\n" for step in range(1, 60))
            + "model_config: {feature_layers: *a59}",
            r"recipe.yaml is not YAML \(an alias",
        ),
        ("model_config: {1: 2}", "model_config names its fields by text only"),
        ("image_size: large", "image_size is 'large', but it must be of type int"),
        ("image_size: [112]", r"image_size is \[112\], but it must be of type int"),
        ("image_size: true", "image_size is True, but it must be of type int"),
        ("image_size: 112.5", "image_size is 112.5, but it must be of type int"),
        ("max_text_length: .nan", "max_text_length is nan, but it must be of type int"),
        ("max_text_length: 0", "max_text_length is 0: it must lie between 3 and"),
        ("dataset: [refcoco/unc]", r"dataset is \['refcoco/unc'\], but it must be of type str"),
        ("model_config: {decoder_layers: many}", "cannot be used: .*'decoder_layers'"),
        ("model_config: {decoder_layers: 1000000000}", "decoder_layers is 1000000000: no DETRIS has more"),
        ("model_config: {adapter_scale: .nan}", "model_config.adapter_scale is nan: give a finite number"),
        ("model_config: {feature_layers: all}", "cannot be used: .*'feature_layers'"),
        ("model_config: {vision_config: base}", "vision_config is 'base': give a mapping of fields"),
        ("model_config: {vision_config: {num_atention_heads: 4}}", "give a mapping of fields that Dinov2With"),
        ("model_config: {vision_config: {num_attention_heads: four}}", "vision_config has a field of a wrong type"),
        ("model_config: {vision_config: {num_attention_heads: 0}}", "No model can be built from its configuration: "),
        (
            "model_config: {vision_config: {layer_norm_eps: .inf}}",
            "vision_config.layer_norm_eps is inf: give a finite",
        ),
        ("model_config: {vision_config: {num_hidden_layers: 1000000000}}", "but the checkpoint has 4"),
        ("model_config: {vision_config: {model_type: dinov2}}", "is 'dinov2', but the checkpoint has dinov2_with_reg"),
        ("model_config: {vision_config: {hidden_act: text}}", "No model can be built from its configuration: "),
        ("model_config: {text_config: {projection_dim: [1]}}", "text_config has a field of a wrong type"),
    ],
)
def test_what_is_no_recipe_is_refused(official, convert_tiny, tmp_path, monkeypatch, in_time, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(content.encode(errors="surrogateescape"))
    torch.save(official, convert_tiny.checkpoint)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message) as caught:
        convert_tiny(arguments=["--dataset", "refcoco/unc"] if "max_text_length" not in content else [])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert {path.name for path in tmp_path.iterdir()} == before


def test_sizes_of_zero_are_not_taken_for_none_given(official, convert_tiny, tmp_path):
    torch.save(official, convert_tiny.checkpoint)
    for argument, message in (
        ("--max_text_length", "max_text_length is 0: it must"),
        ("--image_size", "image_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_tiny(arguments=[argument, "0"])
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_of_more_symbols_than_the_checkpoint_reads_is_refused(
    official, convert_tiny, tiny_tokenizer, tmp_path
):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer has 517 symbols, but the text backbone reads 512: give"):
        convert_tiny(official)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer"),
        ({"tokenizer.json": "{"}, "The tokenizer .* cannot be read .*: give the Hub id or folder of CLIP's"),
        ({"tokenizer_config.json": "{"}, "The tokenizer .* cannot be read .*: give the Hub id or folder of CLIP's"),
        ({"vocab.json": "[]", "merges.txt": ""}, "The tokenizer .* cannot be read .*: give the Hub id or folder"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "The tokenizer .* cannot be read .*: give the Hub id or"),
    ],
)
def test_what_is_no_tokenizer_is_refused(official, convert_tiny, tmp_path, files, message):
    torch.save(official, convert_tiny.checkpoint)
    (tmp_path / "other").mkdir()
    for name, text in files.items():
        (tmp_path / "other" / name).write_text(text)
    with pytest.raises((OSError, ValueError), match=message) as caught:
        convert_tiny(arguments=["--tokenizer", str(tmp_path / "other")])
    assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()


def test_pipes_and_devices_are_not_read(official, convert_tiny, tmp_path, in_time):
    torch.save(official, convert_tiny.checkpoint)
    folder = convert_tiny()
    checkpoint, pipe, out = str(convert_tiny.checkpoint), str(tmp_path / "pipe"), str(tmp_path / "out")
    os.mkfifo(pipe)
    for given in (pipe, "/dev/zero", str(tmp_path)):
        for arguments in (
            [given, out, "--dataset", "refcoco/unc"],
            [checkpoint, out, "--recipe", given],
            [given, out, "--to-official"],
        ):
            with pytest.raises(OSError, match="is no regular file: give|model.safetensors does not exist: give"):
                main(arguments)
        for read in (read_dinov2, read_clip_text):
            with pytest.raises(OSError, match="is no regular file: give"):
                read(given)
    for given in (pipe, "/dev/zero"):
        with pytest.raises(OSError, match=f"{given} is neither a file nor a folder: give"):
            main([checkpoint, out, "--dataset", "refcoco/unc", "--tokenizer", given])
    for place, arguments, said in (
        (
            tmp_path / "tokenizer" / "tokenizer.json",
            [checkpoint, out, "--tokenizer", str(tmp_path / "tokenizer")],
            "is neither a file nor a folder: save",
        ),
        (folder / "config.json", [str(folder), out, "--to-official"], "is neither a file nor a folder: save"),
        (folder / "model.safetensors", [str(folder), out, "--to-official"], "is no regular file: give"),
    ):
        place.unlink(missing_ok=True)
        os.mkfifo(place)
        with pytest.raises(OSError, match=f"{place.name} {said}"):
            main([*arguments, *([] if "--to-official" in arguments else ["--dataset", "refcoco/unc"])])
    assert not Path(out).exists()


def test_tensors_that_share_memory_or_repeat_numbers_become_a_model_of_its_own(official, convert_tiny):
    weights = dict(official)
    weights["dinov2.blocks.1.norm1.weight"] = weights["dinov2.blocks.0.norm1.weight"]  # two names, one storage
    weights["dinov2.norm.weight"] = weights["dinov2.blocks.0.norm1.weight"].flip(0)[:1].expand(64)
    weights["txt_backbone.positional_embedding"] = torch.randn(512, 77).t()
    shared = torch.randn(128)
    weights["dinov2.blocks.2.ls1.gamma"], weights["dinov2.blocks.2.ls2.gamma"] = shared[:64], shared[32:96]
    weights["dinov2.blocks.3.attn.qkv.bias"] = torch.ones(1).expand(192)
    folder = convert_tiny(weights)
    model = DetrisForReferringSegmentation.from_pretrained(folder)
    expected = convert_state_dict({name: tensor.clone() for name, tensor in weights.items()}, official_config())
    assert_all_equal(model.state_dict(), expected)
    directly = convert_state_dict(weights, official_config())
    assert_all_equal(directly, expected)
    for number, tensor in enumerate(directly.values()):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(directly.values()))


def assert_all_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def test_a_folder_that_is_no_whole_detris_is_refused_on_the_way_back(official, convert_tiny, tmp_path, in_time):
    folder, out = convert_tiny(official), str(tmp_path / "again.pth")
    config, weights = (folder / "config.json").read_text(), load_file(folder / "model.safetensors")

    def refused(error, message):
        with pytest.raises(error, match=message) as caught:
            main([str(folder), out, "--to-official"])
        assert "\n" not in str(caught.value) and not Path(out).exists()

    name = "neck.aggregation.norm.running_mean"
    save_file(weights | {name: weights[name] * float("nan")}, folder / "model.safetensors")
    refused(ValueError, f"model: .* {name} holds NaN or infinity")
    save_file({n: t for n, t in weights.items() if n != name}, folder / "model.safetensors")
    refused(
        ValueError,
        rf"model: The weights do not fit .*: 1 tensor is missing, such as {name} \(saved: nothing",
    )
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads(config) | {"decoder_layers": 10**8}))
    refused(ValueError, "decoder_layers is 100000000: no DETRIS has more than 256")
    (folder / "config.json").write_text(config)
    os.truncate(folder / "model.safetensors", 1000)
    refused(OSError, "model.safetensors is cut short or damaged")
    (folder / "model.safetensors").unlink()
    refused(OSError, "model.safetensors does not exist: give the path of a whole DETRIS")
    with pytest.raises(ValueError, match="--dataset has no effect with --to-official"):
        main([str(folder), out, "--to-official", "--dataset", "refcoco/unc"])


def test_a_folder_in_bfloat16_goes_back_as_float32(official, convert_tiny, tmp_path):
    folder = convert_tiny(official)
    DetrisForReferringSegmentation.from_pretrained(folder).bfloat16().save_pretrained(tmp_path / "half")
    main([str(tmp_path / "half"), str(tmp_path / "again.pth"), "--to-official"])
    again = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
    half = {name: t.bfloat16().float() if t.is_floating_point() else t for name, t in official.items()}
    assert_same_effect(half, {name.removeprefix("module."): tensor for name, tensor in again.items()})


def test_memory_that_runs_out_is_told_as_that(official, monkeypatch):
    for error in (MemoryError, torch.OutOfMemoryError):

        def fail(*_, error=error):
            raise error("out of memory")

        monkeypatch.setattr("official_layout.skeleton", fail)
        with pytest.raises(error):
            convert_state_dict(official, official_config())


def test_what_is_there_is_not_written_over(official, convert_tiny, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model exists: name a folder that does not"):
        convert_tiny(official)
    with pytest.raises(FileExistsError, match="best_model.pth exists: name a file that does not"):
        main([str(tmp_path / "model"), str(convert_tiny.checkpoint), "--to-official"])
    assert list((tmp_path / "model").iterdir()) == []


def test_a_failure_while_writing_leaves_no_folder(official, convert_tiny, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert_detris_checkpoint.DetrisProcessor.save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            convert_tiny(official)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "recipe.yaml", "best_model.pth"}


def test_models_that_the_official_code_does_not_have_stay_here(tmp_path):
    config = DetrisConfig(
        vision_config={"model_type": "dinov2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1},
        text_config={"model_type": "clip_text_model", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64},
        vision_adapter_layers=[1],
        text_adapter_layers=[1],
        feature_layers=[0, 1],
    )
    config.save_pretrained(tmp_path)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: The vision backbone is of type dinov2: the"):
        main([str(tmp_path), str(tmp_path / "official.pth"), "--to-official"])


def test_weights_without_registers_do_not_become_official(converted):
    config = official_config()
    vision_config = config.vision_config.to_dict() | {"model_type": "dinov2"}
    weights = {name: tensor for name, tensor in converted.items() if not name.endswith("register_tokens")}
    assert len(weights) == len(converted) - 1
    with pytest.raises(ValueError, match="The vision backbone is of type dinov2: the official code has only DINOv2 w"):
        convert_to_official(weights, DetrisConfig(**config.to_dict() | {"vision_config": vision_config}))


def test_a_configuration_in_itself_is_refused(official):
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="model_config has a field of a wrong type: maximum recursion depth"):
        recognize_config(official, feature_layers=endless)


def peak_memory(arguments):
    """Bytes that a conversion in a process of its own has in memory at most, Python and torch included."""
    script = "import sys; from convert_detris_checkpoint import main; main(sys.argv[1:]); "
    # Not `getrusage`, whose maximum includes what the process that started this one had.
    script += "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    run = subprocess.run(
        [warm_python(), "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return 1024 * int(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "large_mixed"])
def test_released_sizes_become_folders_and_go_back(clip_tokenizer, tmp_path, name):
    """The smallest and the largest. `large` has the tensors of `base` at the depth of `large_mixed`.

    tests/test_official_layout.py compares the names, shapes and configuration of all three.
    """
    if not CONFORMANCE.exists():
        pytest.skip("needs shared/conformance beside the repository")
    sys.path.insert(0, str(CONFORMANCE))  # its `weights` and `check` belong together
    try:
        check = importlib.import_module("check")
    finally:
        sys.path.remove(str(CONFORMANCE))
    official = check.synthesize(check.load_specs(RELEASED / f"{name}.json"), 0)
    torch.save(training_checkpoint(official), tmp_path / "best_model.pth")
    clip_tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["--dataset", "refcoco/unc", "--tokenizer", str(tmp_path / "tokenizer")]
    peak = peak_memory([str(tmp_path / "best_model.pth"), str(tmp_path / "model"), *arguments])
    bare_size = sum(tensor.nbytes for tensor in official.values())
    assert peak < 2.2 * bare_size

    expected = load_file(CONFORMANCE / "expected" / f"{name}.safetensors")
    pixel_values, input_ids, _ = check.inputs_of(448, 17, 49408, 2, int(expected["pixel_seed"]))
    logits = logits_elsewhere(tmp_path / "model", tmp_path, pixel_values, input_ids)
    assert spread(logits, expected["logits"][:, 0]) < 2e-4

    assert peak_memory([str(tmp_path / "model"), str(tmp_path / "again.pth"), "--to-official"]) < 2.2 * bare_size
    again = torch.load(tmp_path / "again.pth", weights_only=True, mmap=True)["state_dict"]
    assert_same_effect(official, {name.removeprefix("module."): tensor for name, tensor in again.items()})
