"""Adapters of several kinds, each trained in a model of its own, and models that share them."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from helpers.folders import build
from helpers.models import logits_of, randomize, save_backbones, small_inputs
from modeling_detris import DetrisForReferringSegmentation
from peft_detris import HEAD_MODULES

ADAPTERS = {
    "photos": {"adapter_scale": 0.5},
    "drawings": {
        "peft_method": "detris+lora",
        "vision_adapter_layers": [2, 3],
        "vision_adapter_dim": 16,
        "text_adapter_layers": [1],
        "lora_target_modules": ["q_proj", "k_proj"],
    },
    "maps": {"peft_method": "lora", "lora_use_dora": True, "lora_rank": 4},
    "icons": {"peft_method": "none"},  # only a head
}
STEPS = 3
WAYS = ["native", "PeftModel"]
INPUTS = small_inputs(2)


def train(model: torch.nn.Module, phrases: int, steps: int = STEPS) -> None:
    """Take steps of Adam on random data, which the number of `phrases` seeds."""
    labels = (torch.rand(phrases, 56, 56, generator=torch.Generator().manual_seed(phrases)) > 0.5).float()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**small_inputs(phrases), labels=labels).loss.backward()
        optimizer.step()
    model.eval()


def train_adapters(folder: Path) -> SimpleNamespace:
    """Train each of `ADAPTERS` in a model of its own, with other data and the same backbones.

    Returns:
        `folder`, which holds the backbones `vision` and `text`, and for each adapter `<name>/whole` and
        `<name>/adapter`; `whole`, the models loaded from there by name, and `logits`, theirs. `bare` is another model,
        without adapters. `loaded` is for [`sharing`].
    """
    save_backbones(folder)
    torch.manual_seed(0)
    for phrases, (name, fields) in enumerate(ADAPTERS.items(), start=3):
        model = build(folder, **fields)
        train(model, phrases)
        model.save_pretrained(folder / name / "whole")
        model.save_adapter(folder / name / "adapter")
    bare = build(folder, peft_method="none")
    for part in HEAD_MODULES:
        randomize(getattr(bare, part), seed=1)
    bare.save_pretrained(folder / "bare" / "whole")
    whole = {
        name: DetrisForReferringSegmentation.from_pretrained(folder / name / "whole") for name in (*ADAPTERS, "bare")
    }
    logits = {name: logits_of(model) for name, model in whole.items()}
    for one, other in itertools.combinations(logits.values(), 2):
        assert (one - other).abs().max() > 1e-2
    return SimpleNamespace(folder=folder, whole=whole, logits=logits, loaded={})


def load(trained: SimpleNamespace, model: torch.nn.Module, way: str = "native", names=tuple(ADAPTERS), **kwargs):
    """Let a bare model load adapters, by itself or in a `PeftModel`, activate the last, and return what has loaded."""
    for name in names:
        folder = trained.folder / name / "adapter"
        if way == "PeftModel" and not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(model, folder, adapter_name=name, **kwargs)
        else:
            model.load_adapter(folder, name, **kwargs)
    model.set_adapter(names[-1])
    return model.eval()


def sharing(trained: SimpleNamespace, way: str = "native", names=tuple(ADAPTERS), **kwargs) -> torch.nn.Module:
    """A copy of a bare model that has loaded adapters, so that most tests need not load them again."""
    key = (way, *names, *kwargs)
    if key not in trained.loaded:
        trained.loaded[key] = load(trained, copy.deepcopy(trained.whole["bare"]), way, names, **kwargs)
    return copy.deepcopy(trained.loaded[key])


@contextmanager
def switched_off(model: torch.nn.Module) -> Iterator[None]:
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        model.disable_adapters()
        yield
        model.enable_adapters()


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers themselves, by the names that they would have without wrappers around modules."""
    own = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        for wrapper in (".base_layer.", ".original_module."):
            name = name.replace(wrapper, ".")
        assert own.setdefault(name.removeprefix("base_model.model."), tensor) is tensor
    return own


def belonging_to(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter and its head, by the names that they have in a model with no other adapter."""
    return {
        key.replace(f".modules_to_save.{name}.", ".").replace(f".{name}.", ".default."): tensor
        for key, tensor in tensors.items()
        if f".{name}." in key
    }


def assert_active(model: torch.nn.Module, name: str) -> None:
    """Check that an adapter is active in the model and in each layer, and its head, which `default` does not have."""
    active = model.active_adapters
    assert (active if isinstance(model, PeftModel) else active()) == [name]
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            assert module.active_adapters == ([] if name == "default" else [name])
        elif isinstance(module, BaseTunerLayer):
            assert module.active_adapters == [name]
