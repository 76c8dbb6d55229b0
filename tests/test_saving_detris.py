"""Folders of whole models and of adapters: what saving leaves in them, and what loading takes and refuses."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from helpers.folders import build, change_json, change_tensors, save_whole_and_adapter, saved_fields
from helpers.models import logits_of, small_config, small_inputs, small_model
from helpers.warm_python import warm_python
from peft import PeftModel
from safetensors.torch import load_file, save_file

from configuration_detris import DetrisConfig
from modeling_detris import DetrisForReferringSegmentation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder with `vision`, `text`, the adapters `adapter` in them, and the same model `whole`."""
    folder = tmp_path_factory.mktemp("saved")
    save_whole_and_adapter(folder)
    return folder


@pytest.fixture(params=["whole", "adapter"])
def kind(request) -> str:
    return request.param


# --- Loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    small_model().save_pretrained(folder)
    return folder


def test_loading_gives_every_tensor_back(whole):
    weights, loaded = small_model().state_dict(), DetrisForReferringSegmentation.from_pretrained(whole).state_dict()
    assert weights.keys() == loaded.keys()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, loaded[name])] == []


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"decoder_dim": 64}, r"decoder.layers.0.feed_forward.0.weight .saved: \(28, 32\), expected: \(28, 64\)"),
        ({"vision_adapter_dim": 48}, r"branch1.conv.bias .saved: \(16,\), expected: \(24,\)"),
        (
            {"vision_adapter_layers": [1, 2, 3]},
            "67 tensors .* 18 are unexpected, .*vision_model.encoder.layer.2.*",
        ),
        ({"text_adapter_layers": [0]}, "text_model.encoder.layers.2.* expected: nothing"),
        ({"decoder_layers": 2}, "26 tensors .*decoder.layers.1.* .saved: nothing"),
    ],
)
def test_weights_of_another_shape_are_refused(whole, fields, wrong):
    with pytest.raises(ValueError, match=f"{whole}: what is saved does not fit the configuration.*{wrong}"):
        DetrisForReferringSegmentation.from_pretrained(whole, config=small_config(**fields))


LOAD_ELSEWHERE = """
import inspect, json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageSegmentation

saved, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
inputs, logits, report = load_file("inputs.safetensors"), {}, {}
report["config"] = type(AutoConfig.from_pretrained(saved, trust_remote_code=True)).__name__
for name, auto_class, folder in (
    ("AutoModel", AutoModel, saved),
    ("AutoModelForImageSegmentation", AutoModelForImageSegmentation, saved),
    ("once more", AutoModel, "again"),
):
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    with torch.no_grad():
        logits[name] = model(**inputs).logits
    report[name] = [type(model).__name__, *map(sorted, (info["missing_keys"], info["unexpected_keys"]))]
    model.save_pretrained("again")
report["code"] = inspect.getfile(type(model))
report["statistics"] = model.state_dict()["neck.aggregation.norm.num_batches_tracked"].item()
save_file(logits, "logits.safetensors")
print(json.dumps(report))
"""


@pytest.mark.slow
def test_saved_model_loads_elsewhere_without_this_repository(tmp_path):
    model, inputs = small_model(), small_inputs(3)
    inputs["image_index"] = torch.tensor([0, 2, 1])
    model.neck.aggregation.norm.num_batches_tracked.fill_(7)
    model.save_pretrained(tmp_path / "saved")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_file(inputs, elsewhere / "inputs.safetensors")
    # With `-I`, Python imports nothing from the working directory and from PYTHONPATH.
    run = subprocess.run(
        [warm_python(), "-I", "-c", LOAD_ELSEWHERE, str(tmp_path / "saved"), str(torch.get_num_threads())],
        cwd=elsewhere,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report.pop("config") == "DetrisConfig" and report.pop("statistics") == 7
    assert Path(report.pop("code")).is_relative_to(tmp_path / "modules")
    assert report == {name: [type(model).__name__, [], []] for name in report} and len(report) == 3
    with torch.no_grad():
        expected = model(**inputs).logits
    for name, logits in load_file(elsewhere / "logits.safetensors").items():
        assert torch.equal(logits, expected), name


# --- Arguments of from_pretrained ------------------------------------------------------------------------------------


def test_unknown_arguments_are_refused_by_name(saved, kind):
    with pytest.raises((TypeError, ValueError), match="flavour"):
        DetrisForReferringSegmentation.from_pretrained(saved / kind, flavour="sweet")
    with pytest.raises((TypeError, ValueError), match="hotswap"):
        DetrisForReferringSegmentation.from_pretrained(saved / kind, hotswap=True)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"neck": "cpu"}, {}, torch.device("cpu"), "auto"])
def test_a_device_map_of_one_device_is_followed(saved, kind, device_map):
    model = DetrisForReferringSegmentation.from_pretrained(saved / kind, device_map=device_map)
    assert torch.equal(logits_of(model), logits_of(DetrisForReferringSegmentation.from_pretrained(saved / kind)))


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Fails if a file of a model is opened."""
    for name in ("_read_config", "_read_backbones"):
        monkeypatch.setattr(DetrisForReferringSegmentation, name, None)


@pytest.mark.parametrize("device_map", ["meta", "disk", {"": "disk"}, {"": "meta"}])
@pytest.mark.usefixtures("nothing_is_read")
def test_a_device_map_of_no_device_is_refused(saved, kind, device_map, tmp_path):
    with pytest.raises(ValueError, match="parts of the model on .*one device"):
        DetrisForReferringSegmentation.from_pretrained(saved / kind, device_map=device_map, offload_folder=tmp_path)


@pytest.mark.parametrize("rest", ["disk", "meta", 0])
@pytest.mark.usefixtures("nothing_is_read")
def test_a_device_map_that_divides_the_model_is_refused(saved, kind, rest, tmp_path):
    for device_map in ({"": "cpu", "neck": rest}, {"vision_model": "cpu", "": rest}):
        with pytest.raises(ValueError, match=rf"parts of the model on .*'{rest}'.*one device"):
            DetrisForReferringSegmentation.from_pretrained(
                saved / kind, device_map=device_map, offload_folder=tmp_path
            )


@pytest.mark.parametrize("device_map", ["nonsense", 99, {"": "cuda:99"}, [0]])
@pytest.mark.usefixtures("nothing_is_read")
def test_a_device_that_there_is_not_is_refused(saved, kind, device_map):
    with pytest.raises(ValueError, match="device_map names .*, which is no device of this machine: give another"):
        DetrisForReferringSegmentation.from_pretrained(saved / kind, device_map=device_map)


@pytest.mark.parametrize("device_map", ["auto", "balanced", {"": "auto"}])
def test_of_several_devices_one_is_taken(saved, kind, device_map, monkeypatch):
    """Where transformers would divide the model among all of them. Here `cpu` stands for the accelerator."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu", 0))
    monkeypatch.setattr("transformers.integrations.accelerate.infer_auto_device_map", None)
    model = DetrisForReferringSegmentation.from_pretrained(saved / kind, device_map=device_map)
    assert model.device.type == "cpu"


def test_a_limit_of_memory_that_would_divide_the_model_is_refused(saved, kind):
    with pytest.raises((TypeError, ValueError), match="max_memory.*leave it out"):
        DetrisForReferringSegmentation.from_pretrained(saved / kind, device_map="auto", max_memory={"cpu": "1KB"})


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
    # The revision belongs to the adapters, so it is not passed on.
    assert asked == [("vision", given | {"revision": None}), ("text", given | {"revision": None})]


@pytest.mark.parametrize("changes", [{"adapter_scale": 0.9}, {"aligner_dropout": 0.5}, {"vision_adapter_layers": [1]}])
def test_what_adapters_have_been_trained_with_is_not_changed_on_loading(saved, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} cannot be changed on loading"):
        DetrisForReferringSegmentation.from_pretrained(saved / "adapter", **changes)
    config = DetrisConfig.from_pretrained(saved / "adapter", **changes)  # AutoModel passes such a configuration
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


def test_an_index_of_weights_names_files_beside_it(saved, tmp_path):
    model = DetrisForReferringSegmentation.from_pretrained(saved / "whole")
    save(model, "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for weight_map in ({}, [], {"a": 1}, {name: f"../{shard}" for name, shard in index["weight_map"].items()}):
        path.write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(ValueError, match="names no files beside it|no index of weights"):
            DetrisForReferringSegmentation.from_pretrained(tmp_path / "shards")


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


def test_a_whole_model_publishes_no_folder_of_this_machine(saved, tmp_path):
    model = build(saved)
    model.config.text_backbone, model.config.text_backbone_revision = "someone/text", "0" * 40
    before = {name: getattr(model.config, name) for name in DetrisConfig.__annotations__}
    model.save_pretrained(tmp_path)
    assert model.config.vision_backbone == str(saved / "vision")
    assert {name: getattr(model.config, name) for name in before} == before
    fields = saved_fields(tmp_path)
    assert fields["vision_backbone"] is None
    assert (fields["text_backbone"], fields["text_backbone_revision"]) == ("someone/text", "0" * 40)
    model.config.freeze_backbones = False
    model.save_pretrained(tmp_path)  # the backbones may have been trained, so nobody else has them
    assert saved_fields(tmp_path)["text_backbone"] is saved_fields(tmp_path)["text_backbone_revision"] is None


def save(model: DetrisForReferringSegmentation, way: str, folder: Path) -> None:
    if way == "adapter":
        model.save_adapter(folder)
    else:
        model.save_pretrained(folder, max_shard_size="400KB" if way == "shards" else "5GB")  # three shards


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "whole"), (None, "shards"), (None, "adapter"), ("whole", "shards"), ("whole", "adapter")]
    + [("shards", "whole"), ("adapter", "whole"), ("adapter", "adapter")],
)
def test_a_kill_while_saving_leaves_the_old_the_new_or_nothing_that_loads(saved, tmp_path, before, after):
    first = DetrisForReferringSegmentation.from_pretrained(saved / "adapter")
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.mask_head.output_projection.bias += 1
    allowed = [logits_of(second)] + ([logits_of(first)] if before else [])
    save(second, after, tmp_path / "undisturbed")
    whole = files_of(tmp_path / "undisturbed")
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "undisturbed")
    assert torch.equal(logits_of(loaded), allowed[0])
    if before:
        save(first, before, tmp_path / "before")
    outcomes, moment = set(), 0
    while True:
        folder = tmp_path / str(moment)
        if before:
            shutil.copytree(tmp_path / "before", folder)
        if killed_while_saving(second, after, folder, moment) == 0:
            break
        try:
            loaded = logits_of(DetrisForReferringSegmentation.from_pretrained(folder))
        except (OSError, ValueError):
            outcomes.add("refused")
        else:
            (index,) = (index for index, logits in enumerate(allowed) if torch.equal(loaded, logits))
            outcomes.add(("new", "old")[index])
        save(second, after, folder)  # removes what the killed saving has left
        assert files_of(folder) == whole
        shutil.rmtree(folder)
        moment += 1
    assert moment > 5 and "refused" in outcomes and ("old" in outcomes) == (before is not None)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_while_saving(model, way: str, folder: Path, moment: int) -> int:
    """Save in another process that is killed at a change of the folder; return 0 if it ended before it was killed."""
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
