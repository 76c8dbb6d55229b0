"""Several adapters on one model: switched, named for each phrase, added and deleted, by our own and PEFT's calls.

`test_sharing_detris_folders.py` tests the folders that adapters are saved to and loaded from.
"""

import copy
import gc
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.folders import save_whole_and_adapter
from helpers.models import logits_of, randomize, small_config, small_inputs, small_model
from helpers.shared_adapters import (
    ADAPTERS,
    INPUTS,
    STEPS,
    WAYS,
    assert_active,
    belonging_to,
    load,
    sharing,
    switched_off,
    tensors_of,
    train,
    train_adapters,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CLIPTextModel
from transformers.integrations import peft as transformers_peft

from adapter_layers_detris import DetrisAdapterLayer
from modeling_detris import DetrisForReferringSegmentation
from peft_detris import HEAD_MODULES, DetrisAdapterConfig

LORA = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
FRESH_ADAPTERS = {
    "vision_adapter_layers": [0],
    "vision_adapter_dim": 16,
    "text_adapter_layers": [1],
    "text_adapter_dim": 16,
    "aligner_attention_dim": 16,
    "aligner_attention_heads": 2,
}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:`is_gradient_checkpointing`"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    return train_adapters(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder with `vision`, `text`, the adapters `adapter` in them, and the same model `whole`."""
    folder = tmp_path_factory.mktemp("saved")
    save_whole_and_adapter(folder)
    return folder


# --- One model for all -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_each_adapter_gives_what_its_own_checkpoint_gives(trained, way, grad):
    model = sharing(trained, way)
    with torch.set_grad_enabled(grad):
        for name in ("maps", "photos", "icons", "drawings", "photos", "maps"):
            model.set_adapter(name)
            assert torch.equal(model(**INPUTS).logits, trained.logits[name]), name
            with switched_off(model):
                assert torch.equal(model(**INPUTS).logits, trained.logits["bare"]), name
            assert torch.equal(model(**INPUTS).logits, trained.logits[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_switched_off_the_text_backbone_is_hugging_faces_own(trained, way):
    model, text = sharing(trained, way, ["drawings"]), CLIPTextModel.from_pretrained(trained.folder / "text")
    with switched_off(model), torch.no_grad():
        words, _ = (model.get_base_model() if way == "PeftModel" else model).encode_text(INPUTS["input_ids"])
        torch.testing.assert_close(words, text(INPUTS["input_ids"]).last_hidden_state)


@pytest.mark.parametrize("way", WAYS)
def test_under_another_name_an_adapter_has_the_same_values(trained, way):
    shared = tensors_of(sharing(trained, way))
    for name in ADAPTERS:
        own = {  # all tensors of the whole checkpoint that do not belong to the backbones
            key: tensor
            for key, tensor in load_file(trained.folder / name / "whole" / "model.safetensors").items()
            if ".default." in key or key.startswith(HEAD_MODULES)
        }
        own = {key.replace(".base_layer.", "."): tensor for key, tensor in own.items()}
        loaded = belonging_to(name, shared)
        assert loaded.keys() == own.keys()
        assert [key for key, tensor in own.items() if not torch.equal(loaded[key], tensor)] == [], name
        counts = {tensor.item() for key, tensor in loaded.items() if key.endswith("num_batches_tracked")}
        assert counts == {STEPS}
    means = [key for key in belonging_to("photos", shared) if key.endswith("running_mean") and "default" not in key]
    for one, other in itertools.combinations([belonging_to(name, shared) for name in ADAPTERS], 2):
        assert means and not any(torch.equal(one[key], other[key]) for key in means)


def test_both_ways_make_the_same_modules(trained):
    own, by_peft = sharing(trained, "native"), sharing(trained, "PeftModel").get_base_model()
    types = [{name: type(module) for name, module in model.named_modules()} for model in (own, by_peft)]
    assert types[0] == types[1] and DetrisAdapterLayer in type(own.vision_model.encoder.layer[1]).__mro__
    tensors, others = own.state_dict(), by_peft.state_dict()
    assert tensors.keys() == others.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []


def storages(model: torch.nn.Module) -> dict[int, int]:
    """The size in bytes of each storage of a parameter or buffer, by its address."""
    stored = (tensor.untyped_storage() for tensor in itertools.chain(model.parameters(), model.buffers()))
    return {storage.data_ptr(): storage.nbytes() for storage in stored}


@pytest.mark.parametrize("way", WAYS)
def test_memory_holds_the_backbones_once_and_lets_deleted_adapters_go(trained, way):
    bare = copy.deepcopy(trained.whole["bare"])
    before, backbones = storages(bare), {name: tensor.data_ptr() for name, tensor in tensors_of(bare).items()}
    model = load(trained, bare, way)
    after = storages(model)
    assert before.items() <= after.items()
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(model).items() if name in backbones} == backbones
    files = {name: load_file(trained.folder / name / "adapter" / "adapter_model.safetensors") for name in ADAPTERS}
    sizes = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in files.items()}
    assert sum(after.values()) - sum(before.values()) == sum(sizes.values())

    active, left = "icons", sum(after.values())
    for deleted, now_active in (("drawings", "icons"), ("icons", "maps"), ("maps", "photos")):
        held = [weakref.ref(tensor) for tensor in belonging_to(deleted, tensors_of(model)).values()]
        assert len(held) == len(files[deleted])
        model.delete_adapter(deleted)
        gc.collect()
        assert [reference for reference in held if reference() is not None] == []
        left -= sizes[deleted]
        assert sum(storages(model).values()) == left
        assert_active(model, now_active)
        assert torch.equal(logits_of(model), trained.logits[now_active])
        active = now_active
    if way == "native":
        model.delete_adapter(["default", active])
        assert storages(model) == before and model.state_dict().keys() == trained.whole["bare"].state_dict().keys()
        assert torch.equal(logits_of(model), trained.logits["bare"])


@pytest.mark.parametrize("gone", [["drawings"], ["drawings", "maps"]])
@pytest.mark.parametrize("way", WAYS)
def test_after_deleting_the_active_adapter_one_is_active_in_all_layers(trained, way, gone):
    """PEFT would choose one in each layer: none where `drawings` was alone, elsewhere the first by name."""
    model = sharing(trained, way, ["photos", "maps", "drawings"])
    for name in gone:
        model.delete_adapter(name)
    left = "maps" if gone == ["drawings"] else "photos"
    assert_active(model, left)
    assert torch.equal(logits_of(model), trained.logits[left])
    assert not any(parameter.requires_grad for parameter in model.parameters())  # it was not loaded to be trained


def test_a_deleted_adapter_leaves_nothing_in_a_whole_checkpoint(trained, tmp_path):
    """If it was the model's own, the bare backbones and its head remain."""
    model = sharing(trained, names=["maps", "photos"])
    with pytest.raises(ValueError, match=r"further adapters, \['maps', 'photos'\]: save each of them by save_adapter"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    model.delete_adapter("maps")
    model.delete_adapter("photos")
    model.save_pretrained(tmp_path / "bare")
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "bare")
    assert torch.equal(logits_of(loaded), trained.logits["bare"])

    model = copy.deepcopy(trained.whole["drawings"])
    model.disable_adapters()
    without = logits_of(model)
    model.enable_adapters()
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "own")
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "own")
    assert loaded.config.peft_method == "none" and torch.equal(logits_of(loaded), without)
    model.load_adapter(trained.folder / "maps" / "adapter", "default")
    with pytest.raises(ValueError, match=r"further adapters, \['default'\]"):  # it has a head of its own
        model.save_pretrained(tmp_path / "own")


def test_what_is_loaded_is_active(trained):
    model = sharing(trained, names=["photos"])
    for name in ("drawings", "icons", "photos"):  # the model has the last one already
        model.load_adapter(trained.folder / name / "adapter", name)
        assert_active(model, name)
        assert torch.equal(logits_of(model), trained.logits[name])
    model.disable_adapters()
    model.load_adapter(trained.folder / "maps" / "adapter", "maps")
    assert torch.equal(logits_of(model), trained.logits["maps"])


def test_a_head_alone_is_an_adapter_too(trained):
    model = sharing(trained, names=["icons"])
    assert_active(model, "icons")
    logits_of(model, **INPUTS, adapter_names=["__base__", "icons"])
    assert torch.equal(logits_of(model), trained.logits["icons"])
    model.set_adapter("default")
    assert_active(model, "default")
    assert torch.equal(logits_of(model), trained.logits["bare"])


def test_only_the_active_adapter_is_trained(trained):
    """Its head is trained too; the head of the model's own adapters is the model's own."""
    model = sharing(trained, is_trainable=True)
    model.delete_adapter("photos")
    model.load_adapter(trained.folder / "photos" / "adapter", "photos")  # frozen
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name in ("maps", "default", "drawings"):
        model.set_adapter(name)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        train(model, phrases=3, steps=1)
        changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
        part = ".original_module." if name == "default" else f".{name}."
        assert all(part in key for key in changed)
        assert len(changed) > 0.9 * len([key for key in before if part in key])
    model.set_adapter("photos")
    assert torch.equal(logits_of(model), trained.logits["photos"])


@pytest.mark.parametrize("way", WAYS)
def test_only_one_adapter_is_active_at_a_time(trained, way):
    model = sharing(trained, way)
    with pytest.raises(ValueError, match="adapters cannot be added up, so activate one"):
        (model.base_model if way == "PeftModel" else model).set_adapter(["photos", "maps"])
    assert torch.equal(logits_of(model), trained.logits[list(ADAPTERS)[-1]])


# --- An adapter for each phrase --------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_index", [None, [1, 0, 1, 1, 0]])
@pytest.mark.parametrize(
    ("way", "active"),
    # A PeftModel that is switched off does not pass the names on.
    [("native", "photos"), ("native", "switched off"), ("PeftModel", "photos")],
)
def test_each_phrase_gets_its_own_adapter(trained, way, active, image_index):
    names = ["maps", "__base__", "drawings", "maps", "icons"]
    model = sharing(trained, way, ["maps", "drawings", "icons", "photos"])
    inputs = small_inputs(5, images=5 if image_index is None else 2)
    images = range(5) if image_index is None else image_index
    if image_index is not None:
        inputs["image_index"] = torch.tensor(image_index)
    if active == "switched off":
        model.disable_adapters()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    logits = logits_of(model, **inputs, adapter_names=names)
    for n, (name, image) in enumerate(zip(names, images)):
        own = trained.whole["bare" if name == "__base__" else name]
        alone = {"pixel_values": inputs["pixel_values"][image, None], "input_ids": inputs["input_ids"][n, None]}
        torch.testing.assert_close(logits[n, None], logits_of(own, **alone), rtol=1e-4, atol=1e-5)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(logits_of(model), trained.logits["bare" if active == "switched off" else active])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("names", "training", "message"),
    [
        (["maps", "maps"], True, "adapter_names are for evaluation: call model.eval()"),
        (["maps"], False, "There are 1 adapter_names for 2 phrases: give one each"),
        (
            ["maps", "charts"],
            False,
            r"There are no adapters \['charts'\]: the model has \['default', 'maps', 'photos'\]",
        ),
    ],
)
def test_adapter_names_that_cannot_be_are_refused(trained, way, names, training, message):
    model = sharing(trained, way, ["maps", "photos"]).train(training)
    with pytest.raises(ValueError, match=message):
        model(**INPUTS, adapter_names=names)
    assert torch.equal(logits_of(model.eval()), trained.logits["photos"])


@pytest.mark.parametrize("ask", ["set_adapter", "delete_adapter", "save_adapter"])
def test_unknown_adapters_are_refused(trained, tmp_path, ask):
    model = sharing(trained, names=["maps"])
    arguments = [tmp_path, "charts"] if ask == "save_adapter" else [["maps", "charts"]]
    with pytest.raises(ValueError, match=r"no adapters \['charts'\]: the model has \['default', 'maps'\]"):
        getattr(model, ask)(*arguments)
    assert torch.equal(logits_of(model), trained.logits["maps"]) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["__base__", "", "a.b", "0", "dense", "neck", "layer", "detris_adapter", "keys"])
def test_names_that_stand_for_something_else_are_refused(trained, name):
    model = sharing(trained, names=["maps"])
    with pytest.raises(ValueError, match="adapter"):
        model.load_adapter(trained.folder / "photos" / "adapter", name)
    assert_active(model, "maps")
    assert list(model.peft_config) == ["default", "maps"]
    assert torch.equal(logits_of(model), trained.logits["maps"])


def test_without_adapters_phrases_still_take_the_bare_backbones(trained):
    model = copy.deepcopy(trained.whole["bare"])
    model.delete_adapter("default")
    torch.testing.assert_close(logits_of(model, **INPUTS, adapter_names=["__base__"] * 2), trained.logits["bare"])


# --- Methods of transformers and PEFT --------------------------------------------------------------------------------


def test_adapter_methods_need_no_particular_peft(saved, monkeypatch):
    """The methods of transformers 5.24 ask for peft 0.22, but the project runs with older versions."""

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
    model.add_adapter(DetrisAdapterConfig(**FRESH_ADAPTERS), adapter_name="fresh")
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
    model.add_adapter(DetrisAdapterConfig(**FRESH_ADAPTERS), adapter_name="fresh")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".fresh." in name for name in trained) and not any("detris_adapter.default" in name for name in trained)
    model(**INPUTS, labels=torch.zeros(2, 56, 56)).loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)
    with pytest.raises(ValueError, match="'fresh', which already names something"):
        model.add_adapter(DetrisAdapterConfig(**FRESH_ADAPTERS), adapter_name="fresh")
    with pytest.raises(TypeError, match="of type dict: give a PeftConfig"):
        model.add_adapter({}, adapter_name="other")


def test_adapters_that_cannot_be_added_leave_no_trace(tmp_path):
    model = small_model(small_config(peft_method="none"))
    before = dict(model.peft_config)
    with pytest.raises(ValueError, match="nowhere"):
        model.add_adapter(LoraConfig(target_modules=["nowhere"]))
    assert dict(model.peft_config) == before
    model.save_pretrained(tmp_path)


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
    """PEFT would train both, but save only LoRA."""
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
