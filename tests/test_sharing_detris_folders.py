"""Folders of adapters: saved, loaded elsewhere and into other backbones, damaged and hostile."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.folders import build, change_json, change_tensors, saved_fields
from helpers.hub_files import MODEL_CODE
from helpers.models import BACKBONE_FIELDS, logits_of, randomize
from helpers.shared_adapters import ADAPTERS, INPUTS, WAYS, load, sharing, tensors_of, train_adapters
from helpers.warm_python import warm_python
from peft import PeftModel
from safetensors.torch import load_file, save_file

import sharing_detris
from configuration_detris import DetrisConfig
from modeling_detris import DetrisForReferringSegmentation
from peft_detris import HEAD_MODULES, backbone_digest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:`is_gradient_checkpointing`"),
]

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "config.json"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    return train_adapters(tmp_path_factory.mktemp("trained"))


# --- Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_several_is_saved_and_loaded_by_itself(trained, tmp_path, name):
    sharing(trained).save_adapter(tmp_path, name)
    assert {file.name for file in tmp_path.iterdir()} == ADAPTER_FILES | {*MODEL_CODE}
    own = DetrisForReferringSegmentation.from_pretrained(tmp_path)
    assert torch.equal(logits_of(own), trained.logits[name])
    assert list(own.peft_config) == ["default"] and not own.training
    flags = {key: parameter.requires_grad for key, parameter in own.named_parameters()}
    assert flags == {key: parameter.requires_grad for key, parameter in trained.whole[name].named_parameters()}
    # Into models that have adapters already: their own, or loaded ones.
    for base in (trained.whole["photos"], sharing(trained, names=["maps"])):
        by_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert torch.equal(logits_of(by_peft), trained.logits[name])


@pytest.mark.slow
def test_what_peft_has_saved_is_loaded(trained, tmp_path):
    sharing(trained, "PeftModel").save_pretrained(tmp_path)
    for name in ADAPTERS:
        assert {file.name for file in (tmp_path / name).iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        own = copy.deepcopy(trained.whole["bare"])
        own.load_adapter(tmp_path / name, "any")
        by_peft = PeftModel.from_pretrained(copy.deepcopy(trained.whole["bare"]), tmp_path / name, adapter_name="any")
        assert torch.equal(logits_of(own), trained.logits[name])
        assert torch.equal(logits_of(by_peft), trained.logits[name])


LOAD_ELSEWHERE = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

torch.set_num_threads(int(sys.argv[1]))
inputs, logits = load_file("inputs.safetensors"), {}
for name in sys.argv[3:]:
    folder = f"{sys.argv[2]}/{name}/adapter"
    base = AutoModel.from_pretrained(f"{sys.argv[2]}/bare/whole", trust_remote_code=True)
    own = AutoModel.from_pretrained(folder, trust_remote_code=True)
    by_peft = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        logits |= {f"own {name}": own(**inputs).logits, f"peft {name}": by_peft(**inputs).logits}
assert type(own).__module__.startswith("transformers_modules.") and "adapters_detris" not in sys.modules
save_file(logits, "logits.safetensors")
"""


@pytest.mark.slow
def test_an_adapter_folder_loads_elsewhere_without_this_repository(trained, tmp_path):
    save_file(INPUTS, tmp_path / "inputs.safetensors")
    names = ["drawings", "maps"]
    run = subprocess.run(
        [warm_python(), "-I", "-c", LOAD_ELSEWHERE, str(torch.get_num_threads()), str(trained.folder), *names],
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    logits = load_file(tmp_path / "logits.safetensors")
    assert logits.keys() == {f"{way} {name}" for way in ("own", "peft") for name in names}
    for key, tensor in logits.items():
        assert torch.equal(tensor, trained.logits[key.split()[1]]), key


def test_half_precision_is_that_of_every_tensor(trained, tmp_path):
    model = copy.deepcopy(trained.whole["drawings"])
    model.save_adapter(tmp_path, dtype=torch.bfloat16)
    halved = load_file(tmp_path / "adapter_model.safetensors")
    full = load_file(trained.folder / "drawings" / "adapter" / "adapter_model.safetensors")
    assert halved.keys() == full.keys()
    for name, tensor in full.items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert halved[name].dtype == expected.dtype and torch.equal(halved[name], expected), name
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert 0 < (logits_of(loaded) - trained.logits["drawings"]).abs().max() < 0.05 * trained.logits["drawings"].std()


def test_an_adapter_of_the_base_model_is_small(tmp_path):
    with torch.device("meta"):
        model = DetrisForReferringSegmentation(DetrisConfig())
    for name, module in model.named_modules():
        if name.endswith(".detris_adapter.default") or name in HEAD_MODULES:
            module.to_empty(device="cpu")
            randomize(module)
    sizes = []
    for dtype in (None, torch.bfloat16):
        model.save_adapter(tmp_path, dtype=dtype)
        sizes.append((tmp_path / "adapter_model.safetensors").stat().st_size)
    parameters = sum(p.numel() for p in model.parameters() if not p.is_meta)
    assert parameters > 23.9e6  # 2.72 M in the adapters, 21.2 M in the head
    assert 4 * parameters < sizes[0] <= 110e6 and 2 * parameters < sizes[1] <= 55e6


def test_loading_takes_what_transformers_takes(trained):
    from_pretrained, folder = DetrisForReferringSegmentation.from_pretrained, trained.folder / "photos" / "adapter"
    for dtype in (torch.bfloat16, "bfloat16"):
        assert from_pretrained(folder, dtype=dtype).dtype == torch.bfloat16
    model, info = from_pretrained(folder, dtype="auto", mask_threshold=0.5, output_loading_info=True)
    assert model.dtype == torch.float32 and model.config.mask_threshold == 0.5 and not any(info.values())
    model = from_pretrained(folder, attn_implementation="eager")
    assert {part.config._attn_implementation for part in (model, model.vision_model, model.text_model)} == {"eager"}


@pytest.mark.parametrize("first", ["whole", "adapter"])
def test_a_folder_holds_either_the_whole_model_or_an_adapter(trained, tmp_path, first):
    model = copy.deepcopy(trained.whole["maps"])
    saved = {"whole": lambda: model.save_pretrained(tmp_path, max_shard_size=first and "100KB")}
    saved["adapter"] = lambda: model.save_adapter(tmp_path)
    saved[first]()
    files = {"whole": set(), "adapter": {file.name for file in (trained.folder / "maps" / "adapter").iterdir()}}
    (second,) = saved.keys() - {first}
    saved[second]()
    names = {file.name for file in tmp_path.iterdir()}
    if second == "whole":
        assert "model.safetensors.index.json" in names and not names & (ADAPTER_FILES - {"config.json"})
    else:
        assert names == files["adapter"]
    assert torch.equal(logits_of(DetrisForReferringSegmentation.from_pretrained(tmp_path)), trained.logits["maps"])


def test_trained_backbones_are_not_left_out(trained, tmp_path):
    model = build(trained.folder, freeze_backbones=False)
    with pytest.raises(ValueError, match="freeze_backbones is False.* save the whole model by save_pretrained"):
        model.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_adapters_of_a_whole_model_find_their_backbones_there(trained, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(trained.folder / "drawings" / "whole", whole)
    DetrisForReferringSegmentation.from_pretrained(whole).save_adapter(tmp_path / "adapter")
    saved = saved_fields(tmp_path / "adapter")
    assert saved["vision_backbone"] == saved["text_backbone"] == str(whole)
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), trained.logits["drawings"])

    whole.rename(tmp_path / "moved")
    with pytest.raises(OSError, match=f"{whole}, cannot be read: .* give vision_backbone= and text_backbone="):
        DetrisForReferringSegmentation.from_pretrained(tmp_path / "adapter")
    elsewhere = {"vision_backbone": str(tmp_path / "moved"), "text_backbone": str(trained.folder / "text")}
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "adapter", **elsewhere)
    assert torch.equal(logits_of(loaded), trained.logits["drawings"])


def test_other_copies_of_the_backbones_have_no_revision(trained, tmp_path):
    shutil.copytree(trained.folder / "maps" / "adapter", tmp_path / "adapter")
    fields = saved_fields(tmp_path / "adapter") | {"vision_backbone": "someone/vision"}
    fields["vision_backbone_revision"] = "0" * 40
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(OSError, match="someone/vision and .* give vision_backbone="):
        DetrisForReferringSegmentation.from_pretrained(tmp_path / "adapter")
    model = DetrisForReferringSegmentation.from_pretrained(
        tmp_path / "adapter", vision_backbone=str(trained.folder / "vision")
    )
    assert torch.equal(logits_of(model), trained.logits["maps"]) and model.config.vision_backbone_revision is None


def test_adapters_for_the_hub_name_no_folder_of_this_machine(trained, tmp_path):
    model = copy.deepcopy(trained.whole["maps"])
    model.save_adapter(tmp_path, repo_id="someone/maps")
    assert saved_fields(tmp_path)["vision_backbone"] is saved_fields(tmp_path)["text_backbone"] is None
    text = " ".join(file.read_text() for file in tmp_path.glob("*.json"))
    assert str(trained.folder) not in text and "someone/maps" in text
    with pytest.raises(ValueError, match="which vision backbone they were trained in: give vision_backbone="):
        DetrisForReferringSegmentation.from_pretrained(tmp_path)
    elsewhere = {f"{part}_backbone": str(trained.folder / part) for part in ("vision", "text")}
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path, **elsewhere)
    assert torch.equal(logits_of(loaded), trained.logits["maps"])


@pytest.mark.parametrize("base", ["photos/whole", "photos/adapter"])
def test_adapters_saved_by_peft_are_found_through_the_model_that_they_name(trained, tmp_path, base):
    """`AutoModel.from_pretrained` calls this with the named model, and with the folder of the adapters."""
    model = DetrisForReferringSegmentation.from_pretrained(str(trained.folder / base))
    by_peft = PeftModel.from_pretrained(model, trained.folder / "maps" / "adapter", adapter_name="maps")
    by_peft.save_pretrained(tmp_path, selected_adapters=["maps"])
    named = json.loads((tmp_path / "maps" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(trained.folder / base)
    loaded = DetrisForReferringSegmentation.from_pretrained(
        named, adapter_kwargs={"_adapter_model_path": str(tmp_path / "maps")}
    )
    assert torch.equal(logits_of(loaded), trained.logits["maps"])


def test_adapters_are_never_saved_over_their_backbones(trained, tmp_path):
    whole, vision = tmp_path / "whole", tmp_path / "vision"
    shutil.copytree(trained.folder / "photos" / "whole", whole)
    shutil.copytree(trained.folder / "vision", vision)
    (tmp_path / "model_notes.safetensors").write_text("kept")
    of_parts = DetrisForReferringSegmentation.from_backbones(vision, trained.folder / "text", **BACKBONE_FIELDS)
    for model, folder in ((DetrisForReferringSegmentation.from_pretrained(whole), whole), (of_parts, vision)):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match="holds the backbones: save the adapters to another folder"):
            model.save_adapter(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        model.save_adapter(tmp_path)
    assert (tmp_path / "model_notes.safetensors").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": torch.int8}, "dtype is torch.int8: give a floating-point type"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16': give a floating-point type"),
        ({"push_to_hub": True}, "push_to_hub needs repo_id"),
    ],
)
def test_bad_arguments_of_save_adapter_leave_no_folder(trained, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        trained.whole["bare"].save_adapter(tmp_path / "folder", **arguments)
    assert not (tmp_path / "folder").exists()


def test_a_disk_that_is_full_leaves_the_adapters_that_were_there(trained, tmp_path, monkeypatch):
    model = sharing(trained)
    model.save_adapter(tmp_path, "photos")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharing_detris, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_adapter(tmp_path, "maps")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- Other backbones -------------------------------------------------------------------------------------------------


def state_of(model: torch.nn.Module) -> dict:
    """What must be the same before and after something was refused."""
    return {
        "adapters": {name: config.to_dict() | {"backbone_digest": ""} for name, config in model.peft_config.items()},
        "modules": {name: type(module) for name, module in model.named_modules()},
        "tensors": {name: (tensor.data_ptr(), tensor.requires_grad) for name, tensor in tensors_of(model).items()},
        "logits": logits_of(model).tolist(),
        "training": {module.training for module in model.modules()},
    }


@pytest.fixture(scope="module")
def other_backbones(trained, tmp_path_factory) -> Path:
    """Folder with backbones that differ from those of `trained` in one weight of `vision`."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(trained.folder / "vision", folder / "vision")
    shutil.copytree(trained.folder / "text", folder / "text")
    weights = load_file(folder / "vision" / "model.safetensors")
    weights[min(weights)].view(-1)[0] += 1e-3
    save_file(weights, folder / "vision" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("way", [*WAYS, "native, replaced", "PeftModel, another", "from_pretrained"])
def test_other_backbones_are_refused_with_both_digests(trained, other_backbones, way):
    folder = trained.folder / "photos" / "adapter"
    other = build(other_backbones, **ADAPTERS["photos"] if "replaced" in way else {"peft_method": "none"})
    model = other
    if way == "PeftModel, another":
        shutil.copytree(trained.folder / "maps" / "adapter", other_backbones / "maps", dirs_exist_ok=True)
        fields = json.loads((folder / "adapter_config.json").read_text())
        fields |= {"backbone_digest": backbone_digest(other), "peft_method": "lora", "lora_rank": 4}
        (other_backbones / "maps" / "adapter_config.json").write_text(json.dumps(fields | {"lora_use_dora": True}))
        model = PeftModel.from_pretrained(other, other_backbones / "maps", adapter_name="maps").eval()
    before = state_of(model)
    refuse = {
        "native": lambda: model.load_adapter(folder, "new"),
        "native, replaced": lambda: model.load_adapter(folder),
        "PeftModel": lambda: PeftModel.from_pretrained(model, folder),
        "PeftModel, another": lambda: model.load_adapter(folder, "new"),
        "from_pretrained": lambda: DetrisForReferringSegmentation.from_pretrained(
            folder, vision_backbone=str(other_backbones / "vision")
        ),
    }[way]
    theirs, ours = backbone_digest(trained.whole["bare"]), backbone_digest(other)
    assert theirs != ours
    with pytest.raises(ValueError, match=f"other backbones: their digest is {theirs}, the model's is {ours}"):
        refuse()
    assert state_of(model) == before


@pytest.mark.parametrize("way", WAYS)
def test_rounded_backbones_are_not_told_apart_and_take_adapters_of_their_precision(trained, way):
    model = copy.deepcopy(trained.whole["bare"]).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="not in float32, so it is not checked"):
        model = load(trained, model, way, ["photos"])
    assert {tensor.dtype for tensor in tensors_of(model).values() if tensor.is_floating_point()} == {torch.bfloat16}
    logits = logits_of(model, pixel_values=INPUTS["pixel_values"].bfloat16(), input_ids=INPUTS["input_ids"]).float()
    assert (logits - trained.logits["photos"]).abs().max() < 0.3 * trained.logits["photos"].std()


def test_adapters_that_name_themselves_as_backbone_are_refused(trained, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(trained.folder / "photos" / "adapter", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_backbone": str(folder)}))
    with pytest.raises(ValueError, match="names itself as its vision backbone"):
        DetrisForReferringSegmentation.from_pretrained(folder)


# --- Damaged and hostile folders -------------------------------------------------------------------------------------


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


Damage = Callable[[Path], object]  # changes a folder of adapters


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda folder: change_tensors(folder / "adapter_model.safetensors", change)


def changed_fields(**values) -> Damage:
    return lambda folder: change_json(folder / "adapter_config.json", **values)


def shortened(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"neck": Trap(folder / "sprung")}, folder / "adapter_model.bin")


def pickled_plainly(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"neck": Trap(folder / "sprung")}))


PREFIX = "base_model.model"
DENSE = f"{PREFIX}.text_model.encoder.layers.0.detris_adapter.dense.branch1.norm"
TENSORS_WRONG = "1 (tensor is missing|tensor is unexpected|tensor has another shape).*such as "
DAMAGES = {
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        OSError,
        "adapter_model.safetensors",
    ),
    "pickled": (pickled, OSError, "adapter_model.safetensors"),
    "pickled plainly": (pickled_plainly, OSError, "adapter_model.safetensors"),
    "cut short": (shortened, OSError, "adapter_model.safetensors cannot be read .*incomplete"),
    "cut in the header": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345"),
        OSError,
        "adapter_model.safetensors cannot be read .*header",
    ),
    "statistic missing": (
        changed_tensors(lambda t: t.pop(f"{DENSE}.running_mean")),
        ValueError,
        TENSORS_WRONG + ".*running_mean",
    ),
    "head missing": (
        changed_tensors(lambda t: t.pop(f"{PREFIX}.neck.sentence_projection.bias")),
        ValueError,
        TENSORS_WRONG + "neck.sentence_projection.bias",
    ),
    "another shape": (
        changed_tensors(lambda t: t.update({f"{DENSE}.weight": torch.zeros(9)})),
        ValueError,
        TENSORS_WRONG + ".*norm.weight",
    ),
    "another shape of the head": (
        changed_tensors(lambda t: t.update({f"{PREFIX}.mask_head.output_projection.bias": torch.zeros(3)})),
        ValueError,
        TENSORS_WRONG + ".*mask_head.*output_projection.bias",
    ),
    "a backbone's tensor": (
        changed_tensors(lambda t: t.update({f"{PREFIX}.vision_model.layernorm.weight": torch.zeros(48)})),
        ValueError,
        TENSORS_WRONG + ".*vision_model.layernorm.weight",
    ),
    "an unknown tensor": (changed_tensors(lambda t: t.update(foo=torch.zeros(1))), ValueError, TENSORS_WRONG + "foo"),
    "another method of PEFT": (
        lambda folder: (folder / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "target_modules": ["q_proj"]}'
        ),
        ValueError,
        "adapters of type .*LORA",
    ),
    "unknown method of PEFT": (
        changed_fields(peft_type="NOPE"),
        ValueError,
        "adapter_config.json .*cannot be read.*NOPE",
    ),
    "no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        ValueError,
        "adapter_config.json .*cannot be read.*line 1",
    ),
    "another head": (
        changed_fields(model_fields={"decoder_heads": 8}),
        ValueError,
        "trained with decoder_heads 8, but the model has 4: build it with decoder_heads=8",
    ),
    "layers that are not there": (
        changed_fields(vision_adapter_layers=[1, 9]),
        ValueError,
        r"vision_adapter_layers names layers \[9\]",
    ),
    "width that does not divide": (
        changed_fields(text_adapter_dim=50),
        ValueError,
        "text_adapter_dim is 50: .* multiple of 16",
    ),
    "width that no tensor has": (
        changed_fields(vision_adapter_dim=160),
        ValueError,
        r"vision_adapter_dim 160, but those .* replace have 32"
        r"|72 tensors have another shape, .*dense.branch1.conv.bias .saved: \(16,\), expected: \(80,\)",
    ),
    "width that is no number": (changed_fields(text_adapter_dim="wide"), ValueError, "text_adapter_dim.*expected int"),
    "unknown peft_method": (changed_fields(peft_method="prompt"), ValueError, "peft_method is 'prompt'"),
    "unknown modules": (
        changed_fields(peft_method="detris+lora", lora_target_modules=["out_proj"]),
        ValueError,
        r"lora_target_modules names \['out_proj'\]",
    ),
}


@pytest.fixture
def damaged(trained, tmp_path):
    """Make a damaged copy of the adapter `photos`."""

    def make(damage) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(trained.folder / "photos" / "adapter", folder)
        damage(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def unharmed(trained) -> list[tuple]:
    """Models that no damaged file changes, each with the name of the adapter that it is to load, and its state."""
    models = [sharing(trained, names=["maps", "icons"], is_trainable=True), copy.deepcopy(trained.whole["photos"])]
    return [(model, name, state_of(model)) for model, name in zip(models, ("new", "default"))]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_the_model_stays_as_it_was(unharmed, damaged, damage):
    damage, error, message = DAMAGES[damage]
    folder = damaged(damage)
    for model, name, before in unharmed:
        with pytest.raises(error, match=message):
            model.load_adapter(folder, name)
        assert state_of(model) == before
    with pytest.raises(error, match=message):
        DetrisForReferringSegmentation.from_pretrained(folder)
    assert not (folder / "sprung").exists()


# The other damages PEFT finds itself, with messages of its own: unreadable files, and parts missing in the head.
@pytest.mark.parametrize(
    "damage",
    [
        "statistic missing",
        "another shape",
        "another shape of the head",
        "a backbone's tensor",
        "an unknown tensor",
        "another head",
        "layers that are not there",
        "width that does not divide",
        "unknown peft_method",
        "unknown modules",
    ],
)
def test_peft_refuses_what_does_not_fit(trained, damaged, damage):
    damage, error, message = DAMAGES[damage]
    model = sharing(trained, "PeftModel", ["maps"])
    with pytest.raises(error, match=message):
        model.load_adapter(damaged(damage), "new")
    assert torch.equal(logits_of(model), trained.logits["maps"])


@pytest.mark.parametrize("trap", [pickled, pickled_plainly])
def test_peft_runs_no_code_of_a_folder_either(trained, damaged, trap):
    folder = damaged(trap)
    with pytest.raises(pickle.UnpicklingError):
        PeftModel.from_pretrained(copy.deepcopy(trained.whole["bare"]), folder)
    assert not (folder / "sprung").exists()
    with open(folder / "adapter_model.bin", "rb") as file:
        if trap is pickled_plainly:
            pickle.load(file)  # the trap works where code is run
            assert (folder / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("adapter_scale", 0.25), ("aligner_attention_heads", 2), ("vision_adapter_layers", [1])]
)
def test_adapters_replace_their_like_alone(trained, damaged, name, value):
    """Even if the shapes of tensors do not show that they are of another kind."""
    folder = damaged(changed_fields(**{name: value}))
    model = copy.deepcopy(trained.whole["photos"])
    before = state_of(model)
    old = re.escape(str(model.peft_config["default"].to_dict()[name]))
    new = re.escape(str(value))
    message = f"its adapters have {name} {new}, but those .* would replace have {old}: .* another adapter_name"
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder)
    assert state_of(model) == before


def test_an_adapter_brings_its_head_whatever_its_configuration_says(trained, damaged):
    """Without a head of its own, it would overwrite the head of the model's own adapters."""
    model = copy.deepcopy(trained.whole["bare"])
    model.load_adapter(damaged(changed_fields(modules_to_save=None)), "photos")
    assert torch.equal(logits_of(model), trained.logits["photos"])
    model.set_adapter("default")
    assert torch.equal(logits_of(model), trained.logits["bare"])


def test_what_is_told_first_if_several_things_are_wrong(trained, damaged):
    folder = damaged(lambda folder: None)
    with pytest.raises(TypeError, match="takes no foo"):
        DetrisForReferringSegmentation.from_pretrained(folder, lora_rank=4, foo=1)
    with pytest.raises(OSError, match="The backbones of .* cannot be read"):
        DetrisForReferringSegmentation.from_pretrained(folder, lora_rank=4, vision_backbone=str(folder / "nowhere"))
    with pytest.raises(ValueError, match="lora_rank cannot be changed on loading"):
        DetrisForReferringSegmentation.from_pretrained(folder, lora_rank=4)
    DAMAGES["another method of PEFT"][0](folder)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match="config.json is missing"):
        DetrisForReferringSegmentation.from_pretrained(folder)
