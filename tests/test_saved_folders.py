"""Folders of models and adapters: what saving leaves, what loading refuses, and what PEFT does with them."""

import copy
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import BACKBONE_FIELDS, randomize, save_backbones, small_config, small_inputs, small_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.integrations import peft as transformers_peft

from configuration_detris import DetrisConfig
from modeling_detris import DetrisForReferringSegmentation
from peft_detris import DetrisAdapterConfig

INPUTS = small_inputs()
LORA = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
ADAPTERS = {
    "vision_adapter_layers": [0],
    "vision_adapter_dim": 16,
    "text_adapter_layers": [1],
    "text_adapter_dim": 16,
    "aligner_attention_dim": 16,
    "aligner_attention_heads": 2,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def logits_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS | inputs).logits


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder with `vision`, `text`, the adapters `adapter` in them, and the same model `whole`."""
    folder = tmp_path_factory.mktemp("saved")
    save_backbones(folder)
    model = DetrisForReferringSegmentation.from_backbones(
        str(folder / "vision"), str(folder / "text"), **BACKBONE_FIELDS
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_adapter(folder / "adapter")
    model.save_pretrained(folder / "whole")
    return folder


@pytest.fixture(params=["whole", "adapter"])
def kind(request) -> str:
    return request.param


# --- Methods of transformers and PEFT --------------------------------------------------------------------------------


def test_adapter_methods_need_no_particular_peft(saved, monkeypatch):
    """transformers 5.24 asks for peft 0.22 in its own methods, and the project runs with older ones."""

    def refuse(min_version):
        raise AssertionError(f"transformers asked for peft {min_version}")

    monkeypatch.setattr(transformers_peft, "check_peft_version", refuse)
    model = DetrisForReferringSegmentation.from_pretrained(saved / "whole")
    first = logits_of(model)
    model.disable_adapters()
    bare = logits_of(model)
    assert not torch.equal(bare, first)
    model.enable_adapters()
    assert torch.equal(logits_of(model), first)
    model.load_adapter(saved / "adapter", adapter_name="same")
    assert model.active_adapters() == ["same"] and torch.equal(logits_of(model), first)
    model.add_adapter(DetrisAdapterConfig(**ADAPTERS), adapter_name="fresh")
    assert model.active_adapters() == ["fresh"] and not torch.equal(logits_of(model), first)
    by_name = logits_of(model, adapter_names=["default", "__base__"])
    assert torch.allclose(by_name, torch.stack([first[0], bare[1]]), atol=1e-5)
    tensors = model.get_adapter_state_dict("same")
    expected = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(saved / "adapter" / "adapter_model.safetensors").items()
    }
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    model.delete_adapter(["fresh", "same"])
    assert list(model.peft_config) == ["default"] and torch.equal(logits_of(model), first)


def test_a_fresh_adapter_is_trained_beside_the_first(saved):
    model = DetrisForReferringSegmentation.from_pretrained(saved / "whole").train()
    model.add_adapter(DetrisAdapterConfig(**ADAPTERS), adapter_name="fresh")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".fresh." in name for name in trained) and not any("detris_adapter.default" in name for name in trained)
    model(**INPUTS, labels=torch.zeros(2, 56, 56)).loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)
    with pytest.raises(ValueError, match="'fresh', which already names something"):
        model.add_adapter(DetrisAdapterConfig(**ADAPTERS), adapter_name="fresh")
    with pytest.raises(TypeError, match="of type dict: give a PeftConfig"):
        model.add_adapter({}, adapter_name="other")


def test_hotswap_says_whether_an_adapter_is_replaced(saved):
    model = DetrisForReferringSegmentation.from_pretrained(saved / "whole")
    with pytest.raises(ValueError, match="does not have an adapter 'new'"):
        model.load_adapter(saved / "adapter", adapter_name="new", hotswap=True)
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        model.load_adapter(saved / "adapter", hotswap=False)
    with torch.no_grad():
        model.neck.aggregation.conv.weight.zero_()
    model.load_adapter(saved / "adapter", hotswap=True)
    assert model.neck.aggregation.conv.weight.any()
    with pytest.raises(ValueError, match="load_adapter replaces an adapter"):
        model.enable_peft_hotswap(target_rank=8)
    with pytest.raises(TypeError, match="takes no adapter_state_dict"):
        model.load_adapter(saved / "adapter", adapter_state_dict={})


def test_peft_loads_with_little_memory_to_equal_logits(saved):
    expected = logits_of(DetrisForReferringSegmentation.from_pretrained(saved / "whole"))
    for name in ("default", "other"):
        model = DetrisForReferringSegmentation.from_pretrained(saved / "whole")
        randomize(model.neck)
        model = PeftModel.from_pretrained(model, saved / "adapter", adapter_name=name, low_cpu_mem_usage=True)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert torch.equal(logits_of(model), expected)


def test_a_model_without_adapters_takes_stock_lora_merges_it_and_saves(tmp_path):
    small_model(small_config(peft_method="none")).save_pretrained(tmp_path / "bare")
    model = DetrisForReferringSegmentation.from_pretrained(tmp_path / "bare")
    weight = model.vision_model.encoder.layer[0].attention.q_proj.weight.clone()
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, **LORA))
    layer = model.vision_model.encoder.layer[0].attention.q_proj
    expected = weight + 12 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    logits = logits_of(peft_model)
    with pytest.raises(ValueError, match="further adapters.* by PeftModel"):
        model.save_pretrained(tmp_path / "unmerged")
    peft_model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(
        DetrisForReferringSegmentation.from_pretrained(tmp_path / "bare"), tmp_path / "lora"
    )
    assert torch.equal(logits_of(again), logits)
    merged = peft_model.merge_and_unload()
    assert torch.allclose(merged.vision_model.encoder.layer[0].attention.q_proj.weight, expected, atol=1e-6)
    merged.save_pretrained(tmp_path / "merged")
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(loaded), logits_of(merged)) and (logits_of(loaded) - logits).abs().max() < 1e-3


def test_stock_lora_beside_detris_adapters_is_refused(saved, tmp_path):
    """PEFT would train both and save LoRA alone."""
    model = DetrisForReferringSegmentation.from_pretrained(saved / "whole")
    before, names = logits_of(model), list(model.state_dict())
    for attempt in (
        lambda: get_peft_model(model, LoraConfig(**LORA)),
        lambda: get_peft_model(model, LoraConfig(**LORA), adapter_name="lora"),
        lambda: model.add_adapter(LoraConfig(**LORA), adapter_name="lora"),
    ):
        with pytest.raises(ValueError, match=r"adapters of type DETRIS.*peft_method='detris\+lora'.*delete_adapter"):
            attempt()
    assert torch.equal(logits_of(model), before) and list(model.state_dict()) == names
    model.delete_adapter("default")
    get_peft_model(model, LoraConfig(**LORA)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="adapters of type .*LORA, so none of type DETRIS"):
        model.load_adapter(saved / "adapter", adapter_name="detris")


def test_input_embeddings_are_those_of_the_phrases():
    model = small_model()
    assert model.get_input_embeddings().weight is model.text_model.embeddings.token_embedding.weight
    model.set_input_embeddings(torch.nn.Embedding(64, 24))
    assert model.get_input_embeddings() is model.text_model.embeddings.token_embedding
    model = small_model()
    model.enable_input_require_grads()  # as PEFT does where layers are checkpointed
    assert model(**INPUTS).logits.requires_grad


# --- Arguments of from_pretrained ------------------------------------------------------------------------------------


def test_unknown_arguments_are_refused_by_name(saved, kind):
    with pytest.raises((TypeError, ValueError), match="flavour"):
        DetrisForReferringSegmentation.from_pretrained(saved / kind, flavour="sweet")
    with pytest.raises((TypeError, ValueError), match="hotswap"):
        DetrisForReferringSegmentation.from_pretrained(saved / kind, hotswap=True)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), "auto"])
def test_a_device_map_of_one_device_is_followed(saved, kind, device_map):
    model = DetrisForReferringSegmentation.from_pretrained(saved / kind, device_map=device_map)
    assert torch.equal(logits_of(model), logits_of(DetrisForReferringSegmentation.from_pretrained(saved / kind)))


@pytest.mark.parametrize("device_map", ["meta", {"": "disk"}, {"": "meta"}])
def test_a_device_map_of_no_device_is_refused(saved, kind, device_map, tmp_path):
    with pytest.raises(ValueError, match="parts of the model on .*one device"):
        DetrisForReferringSegmentation.from_pretrained(saved / kind, device_map=device_map, offload_folder=tmp_path)


@pytest.mark.parametrize("rest", ["disk", "meta", 0])
def test_a_device_map_that_divides_the_model_is_refused(saved, kind, rest, tmp_path):
    with pytest.raises(ValueError, match=rf"parts of the model on .*'{rest}'.*one device"):
        DetrisForReferringSegmentation.from_pretrained(
            saved / kind, device_map={"": "cpu", "neck": rest}, offload_folder=tmp_path
        )


def test_attention_reaches_both_backbones(saved, kind):
    expected = logits_of(DetrisForReferringSegmentation.from_pretrained(saved / kind))
    for attention in ("eager", "sdpa"):
        model = DetrisForReferringSegmentation.from_pretrained(saved / kind, attn_implementation=attention)
        assert model.vision_model.config._attn_implementation == attention
        assert model.text_model.config._attn_implementation == attention
        assert torch.allclose(logits_of(model), expected, atol=1e-4)


def test_what_the_hub_is_asked_with_reaches_the_backbones(saved, monkeypatch):
    asked = []
    read = DetrisForReferringSegmentation._read_backbone.__func__

    def record(cls, source, part, quantization_config=None, **hub_kwargs):
        asked.append((part, hub_kwargs))
        return read(cls, source, part, quantization_config, **hub_kwargs)

    monkeypatch.setattr(DetrisForReferringSegmentation, "_read_backbone", classmethod(record))
    given = {
        "cache_dir": "c",
        "token": "t",
        "local_files_only": True,
        "force_download": True,
        "proxies": {"http": "p"},
    }
    DetrisForReferringSegmentation.from_pretrained(saved / "adapter", revision="main", **given)
    # The revision is that of the adapters.
    assert asked == [("vision", given | {"revision": None}), ("text", given | {"revision": None})]


@pytest.mark.parametrize("changes", [{"adapter_scale": 0.9}, {"aligner_dropout": 0.5}, {"vision_adapter_layers": [1]}])
def test_what_adapters_have_been_trained_with_is_not_changed_on_loading(saved, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} cannot be changed on loading"):
        DetrisForReferringSegmentation.from_pretrained(saved / "adapter", **changes)
    config = DetrisConfig.from_pretrained(saved / "adapter", **changes)  # as AutoModel hands it on
    with pytest.raises(ValueError, match=f"{next(iter(changes))} cannot be changed on loading"):
        DetrisForReferringSegmentation.from_pretrained(saved / "adapter", config=config)


def test_a_folder_without_a_configuration_is_told_so(saved, tmp_path, kind):
    folder = Path(shutil.copytree(saved / kind, tmp_path / kind))
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match="config.json is missing"):
        DetrisForReferringSegmentation.from_pretrained(folder)


def test_backbones_are_found_from_everywhere(saved, tmp_path, monkeypatch):
    shutil.copytree(saved / "whole", tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    DetrisForReferringSegmentation.from_pretrained("whole").save_adapter("adapter")
    monkeypatch.chdir("/")
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(DetrisForReferringSegmentation.from_pretrained(saved / "whole")))


def test_a_pickled_backbone_that_claims_more_than_it_holds_is_refused(saved, tmp_path):
    vision = tmp_path / "vision"
    vision.mkdir()
    shutil.copy(saved / "vision" / "config.json", vision)
    change_json(vision / "config.json", hidden_size=24576)
    shapes = {"embeddings.cls_token": (1, 1, 24576), "encoder.layer.0.mlp.fc1.weight": (98304, 24576)}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, vision / "pytorch_model.bin")
    with pytest.raises(OSError, match="pytorch_model.bin cannot be read .its tensors claim more numbers than it has"):
        DetrisForReferringSegmentation.from_backbones(str(vision), str(saved / "text"), **BACKBONE_FIELDS)


def test_numbers_beyond_float32_and_negative_variances_are_refused(saved, tmp_path, kind):
    for number, (leaf, change) in enumerate(
        (("bias", lambda tensor: tensor.double().fill_(1e300)), ("running_var", lambda tensor: tensor.fill_(-1)))
    ):
        folder = Path(shutil.copytree(saved / kind, tmp_path / str(number)))

        def damage(tensors, leaf=leaf, change=change) -> None:
            name = next(name for name in sorted(tensors) if name.endswith(leaf) and "detris_adapter" in name)
            tensors[name] = change(tensors[name])

        change_tensors(next(folder.glob("*.safetensors")), damage)
        with pytest.raises(ValueError, match=f"{leaf} holds NaN or infinity, or a negative variance"):
            DetrisForReferringSegmentation.from_pretrained(folder)


def test_fields_of_the_configuration_are_changed_on_loading(saved, kind):
    changes = {"mask_threshold": 0.5} | ({"image_size": 28} if kind == "whole" else {})
    model = DetrisForReferringSegmentation.from_pretrained(saved / kind, **changes)
    assert {name: getattr(model.config, name) for name in changes} == changes


# --- Sizes, files and numbers that cannot be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"decoder_layers": 10**5}, "decoder_layers is 100000, but only .* tensors are saved"),
        ("config.json", {"lora_rank": 2**23, "peft_method": "detris+lora"}, "does not fit the configuration"),
        ("config.json", {"decoder_ffn_dim": 2**40}, "does not fit the configuration"),
        ("config.json", {"vision_config": {"num_hidden_layers": 10**6}}, "vision_config.num_hidden_layers is 1000000"),
        ("config.json", {"num_labels": 10**9}, "num_labels is 1000000000: DETRIS has no labels"),
        ("config.json", {"adapter_scale": math.nan}, "adapter_scale is nan"),
        ("config.json", {"mask_threshold": -1}, "mask_threshold is -1: it is a probability"),
        ("config.json", {"mask_threshold": math.nan}, "mask_threshold is nan"),
        ("config.json", {"image_size": 14 * 10**6}, "image_size is 14000000: it must be at most 4096"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("config.json", {"to_dict": 1}, "to_dict is no field"),
    ],
)
def test_sizes_that_a_whole_model_does_not_have_are_refused_before_memory_is_taken(
    saved, tmp_path, file, values, message
):
    folder = Path(shutil.copytree(saved / "whole", tmp_path / "whole"))
    if "vision_config" in values:
        values = {"vision_config": json.loads((folder / file).read_text())["vision_config"] | values["vision_config"]}
    change_json(folder / file, **values)
    with pytest.raises(ValueError, match=message):
        DetrisForReferringSegmentation.from_pretrained(folder)


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "PeftModel"])
def test_widths_that_adapters_do_not_have_are_refused_before_memory_is_taken(saved, tmp_path, way, monkeypatch):
    folder = Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))
    model = DetrisForReferringSegmentation.from_pretrained(saved / "whole")
    for file in ("config.json", "adapter_config.json"):
        change_json(folder / file, aligner_attention_dim=16384)
    built = []
    linear = torch.nn.Linear.__init__

    def record(self, *args, **kwargs):
        linear(self, *args, **kwargs)
        built.append(self.weight.numel() * (not self.weight.is_meta))

    monkeypatch.setattr(torch.nn.Linear, "__init__", record)
    load = {
        "from_pretrained": lambda: DetrisForReferringSegmentation.from_pretrained(folder),
        "load_adapter": lambda: model.load_adapter(folder, adapter_name="other"),
        "PeftModel": lambda: PeftModel.from_pretrained(model, folder, adapter_name="other"),
    }[way]
    with pytest.raises(ValueError, match=r"attention.in_proj_bias .saved: \(48,\), expected: \(49152,\)"):
        load()
    assert max(built, default=0) < 10**6


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


def test_pipes_and_files_are_no_folders(saved, tmp_path, kind):
    folder = Path(shutil.copytree(saved / kind, tmp_path / kind))
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(OSError, match="generation_config.json is neither a file nor a folder"):
        DetrisForReferringSegmentation.from_pretrained(folder)
    (tmp_path / "best_model.pth").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match="best_model.pth is a file.*`python convert_detris_checkpoint.py .*pth <folder>`"
    ):
        DetrisForReferringSegmentation.from_pretrained(tmp_path / "best_model.pth")
    os.mkfifo(tmp_path / "backbone")
    with pytest.raises((OSError, ValueError), match="backbone"):
        DetrisForReferringSegmentation.from_backbones(str(tmp_path / "backbone"), str(saved / "text"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("leaf", ["mask_head.*output_projection.bias", "running_var", "detris_adapter.*up.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(saved, tmp_path, kind, leaf, value):
    folder = Path(shutil.copytree(saved / kind, tmp_path / kind))

    def change(tensors) -> None:
        name = next(name for name in sorted(tensors) if re.search(leaf, name))
        tensors[name].view(-1)[-1] = value

    change_tensors(next(folder.glob("*.safetensors")), change)
    with pytest.raises(ValueError, match=f"{folder}.*the tensor .*{leaf}.* holds NaN or infinity"):
        DetrisForReferringSegmentation.from_pretrained(folder)
    if kind == "adapter":
        with pytest.raises(ValueError, match=f"the tensor .*{leaf}.* holds NaN or infinity"):
            PeftModel.from_pretrained(DetrisForReferringSegmentation.from_pretrained(saved / "whole"), folder)


def test_backbones_that_are_no_numbers_are_refused(saved, tmp_path):
    text = Path(shutil.copytree(saved / "text", tmp_path / "text"))
    change_tensors(text / "model.safetensors", lambda t: t["text_projection.weight"].fill_(math.nan))
    with pytest.raises(ValueError, match="text_projection.weight holds NaN"):
        DetrisForReferringSegmentation.from_backbones(str(saved / "vision"), str(text), **BACKBONE_FIELDS)


# --- Saving ----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_no_number_is_not_saved_and_the_old_one_stays(saved, tmp_path, kind):
    folder = Path(shutil.copytree(saved / kind, tmp_path / kind))
    expected = logits_of(DetrisForReferringSegmentation.from_pretrained(folder))
    model = DetrisForReferringSegmentation.from_pretrained(folder)
    with torch.no_grad():
        model.mask_head.output_projection.bias[0] = math.inf
    with pytest.raises(
        ValueError, match="cannot be saved: the tensor mask_head.output_projection.bias holds NaN or inf"
    ):
        model.save_pretrained(folder) if kind == "whole" else model.save_adapter(folder)
    assert torch.equal(logits_of(DetrisForReferringSegmentation.from_pretrained(folder)), expected)


def save(model: DetrisForReferringSegmentation, way: str, folder: Path) -> None:
    if way == "adapter":
        model.save_adapter(folder)
    else:
        model.save_pretrained(folder, max_shard_size="100KB" if way == "shards" else "5GB")


@pytest.mark.parametrize("before", ["whole", "shards", "adapter"])
@pytest.mark.parametrize("after", ["whole", "shards", "adapter"])
def test_what_is_saved_over_another_kind_of_folder_is_what_is_loaded(saved, tmp_path, before, after):
    first = DetrisForReferringSegmentation.from_pretrained(saved / "adapter")
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.mask_head.output_projection.bias += 1
    save(first, before, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("kept")
    save(second, after, tmp_path / "run")
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "run")
    assert torch.equal(logits_of(loaded), logits_of(second)) and not torch.equal(logits_of(loaded), logits_of(first))
    assert (tmp_path / "run" / "notes.txt").read_text() == "kept"
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("before", [None, "whole", "shards", "adapter"])
@pytest.mark.parametrize("after", ["whole", "shards", "adapter"])
def test_a_kill_while_saving_leaves_the_old_the_new_or_nothing_that_loads(saved, tmp_path, before, after):
    first = DetrisForReferringSegmentation.from_pretrained(saved / "adapter")
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.mask_head.output_projection.bias += 1
    allowed = [logits_of(second)] + ([logits_of(first)] if before else [])
    outcomes, moment = set(), 0
    while True:
        folder = tmp_path / str(moment)
        if before:
            save(first, before, folder)
        if killed_while_saving(second, after, folder, moment) == 0:
            break
        try:
            loaded = logits_of(DetrisForReferringSegmentation.from_pretrained(folder))
        except (OSError, ValueError):
            outcomes.add("refused")
        else:
            (index,) = (index for index, logits in enumerate(allowed) if torch.equal(loaded, logits))
            outcomes.add(("new", "old")[index])
        save(second, after, folder)  # after which nothing is left of the killed one
        assert torch.equal(logits_of(DetrisForReferringSegmentation.from_pretrained(folder)), allowed[0])
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        shutil.rmtree(folder)
        moment += 1
    assert moment > 5 and "refused" in outcomes and ("old" in outcomes) == (before is not None)


def killed_while_saving(model, way: str, folder: Path, moment: int) -> int:
    """Save in a process of its own that ends, as by `kill -9`, at a change of the folder; 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        left = [moment]

        def counted(change):
            def changed(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), 9)
                left[0] -= 1
                return change(*args, **kwargs)

            return changed

        for name in ("mkdir", "unlink", "replace", "rename", "rmdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            save(model, way, folder)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_failed_upload_leaves_what_was_saved_here(saved, tmp_path, monkeypatch):
    asked = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            asked.append((repo_id, kwargs))
            raise ConnectionError("no network")

    monkeypatch.setattr(transformers.modeling_utils, "hf_api", Api)
    model = DetrisForReferringSegmentation.from_pretrained(saved / "whole")
    with pytest.raises(ConnectionError):
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, safe_serialization=True)
    assert asked == [("mine", {"exist_ok": True, "private": True})]
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "mine")
    assert torch.equal(logits_of(loaded), logits_of(model))
    with pytest.raises(TypeError, match="takes no private without push_to_hub"):
        model.save_pretrained(tmp_path / "mine", private=True)


def test_adapters_that_cannot_be_added_leave_no_trace(tmp_path):
    model = small_model(small_config(peft_method="none"))
    before = dict(model.peft_config)
    with pytest.raises(ValueError, match="nowhere"):
        model.add_adapter(LoraConfig(target_modules=["nowhere"]))
    assert dict(model.peft_config) == before
    model.save_pretrained(tmp_path)


def test_an_index_of_weights_names_files_beside_it(saved, tmp_path):
    model = DetrisForReferringSegmentation.from_pretrained(saved / "whole")
    save(model, "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for weight_map in ({}, [], {"a": 1}, {name: f"../{shard}" for name, shard in index["weight_map"].items()}):
        path.write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(ValueError, match="names no files beside it|no index of weights"):
            DetrisForReferringSegmentation.from_pretrained(tmp_path / "shards")
