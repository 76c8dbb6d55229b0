"""The adapters of DETRIS as a PEFT method: the layers that hold them, their configuration and their tuner.

Source: DETRIS, arXiv 2501.08580, section 3; official files `model/clip.py` (`ResidualAttentionBlock`) and
`model/dinov2/layers/block.py` (`Block`).
"""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import peft.mapping
import torch
from peft import LoraConfig, LoraModel, PeftConfig
from peft.functional import delete_adapter, set_adapter
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

try:
    from .adapters_detris import DenseAligner, TextAdapter
    from .checkpoint_files import HUB_KWARGS, Shapes, check_finite, check_shapes, saved_shapes, shapes_of, skeleton
    from .configuration_detris import as_value_error, check_count, check_values
except ImportError:
    if __package__:
        raise
    from adapters_detris import DenseAligner, TextAdapter
    from checkpoint_files import HUB_KWARGS, Shapes, check_finite, check_shapes, saved_shapes, shapes_of, skeleton
    from configuration_detris import as_value_error, check_count, check_values

BACKBONE_MODULES = ("vision_model.", "text_model.", "text_projection.")
HEAD_MODULES = ("neck", "decoder", "mask_head")
# Fields of DetrisConfig whose values adapters and head are trained for, but whose tensors do not show all of them.
MODEL_FIELDS = ("feature_layers", "image_size", "decoder_dim", "decoder_layers", "decoder_heads", "decoder_ffn_dim")
ADAPTER_PARAMETER = re.compile(r"\.(detris_adapter|lora_\w+)\.")
BUILT_IN_ADAPTER = "default"  # PEFT's name for a model's first adapter
CANNOT_BE_MERGED = "DETRIS adapters are not linear, so they cannot be merged into their layers: keep them apart."


class PeftMethod(StrEnum):
    """Type of PEFT method, an enumeration as PEFT's own are: transformers asks for its `value`."""

    DETRIS = "DETRIS"


def holds_adapters(module: nn.Module) -> bool:
    """Whether `module` is a `DetrisAdapterLayer`, of this or of another copy of this file.

    With `trust_remote_code` each repository on the Hub brings a copy. PEFT knows the one that was imported last, which
    need not be the one that a model was built by.
    """
    return hasattr(module, "detris_adapter")


def remove_adapters(model: nn.Module, unused_only: bool = False) -> None:
    """Put the backbones' own layers back in the place of those with adapters, and the active head in that of all.

    With `unused_only` where no adapter is left.
    """
    for name, module in reversed(list(model.named_modules())):  # what lies deepest comes first
        if not isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            continue
        if unused_only and module._get_available_adapters():
            continue
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
        else:
            active = module.active_adapters
            model.set_submodule(name, module.modules_to_save[active[0]] if active else module.original_module)


def activate_adapters(model: PreTrainedModel, names: list[str], frozen: bool = False) -> None:
    """Activate adapters and their head, which is the model's own for the built-in ones."""
    if names:
        set_adapter(model, names, inference_mode=frozen)
    for part in HEAD_MODULES:
        module = getattr(model, part)
        if isinstance(module, ModulesToSaveWrapper):
            # PEFT would leave the model's own frozen, and one that was active before trainable.
            active, heads = module.active_adapters, module.modules_to_save
            module.requires_grad_(False)
            (heads[active[0]] if active else module.original_module).requires_grad_(not frozen)


def discard_adapters(model: PreTrainedModel, names: list[str], active: list[str]) -> list[str]:
    """Delete adapters with their heads. Of the `active` ones the others stay active, or else the last that is left.

    Returns:
        `list[str]`: the names of those active now.
    """
    for name in names:
        model.peft_config.pop(name, None)
    remaining = [name for name in active if name in model.peft_config] or list(model.peft_config)[-1:]
    # First, for in the place of a deleted one PEFT would activate another layer by layer.
    activate_adapters(model, remaining, frozen=any(model.peft_config[name].inference_mode for name in remaining))
    for name in names:
        delete_adapter(model, name, DetrisTuner.prefix)
    # What wraps a layer without need would be saved under other names.
    remove_adapters(model, unused_only=True)
    return remaining


def is_bare(config: PeftConfig) -> bool:
    """Whether it stands for no adapters, but for a model that trains its own head alone."""
    return config.peft_type == PeftMethod.DETRIS and config.peft_method == "none" and not config.modules_to_save


class AdapterConfigs(dict):
    """The configurations of a model's adapters by name, in which PEFT enters those that it adds.

    Raises:
        ValueError: if adapters of PEFT's other methods are to stand beside those of DETRIS. PEFT would train both and
            save its own alone.
    """

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        for other in self.values():
            if other.peft_type != config.peft_type and not is_bare(other):
                raise ValueError(
                    f"The model has adapters of type {other.peft_type}, so none of type {config.peft_type} can be "
                    "added: build it with peft_method='detris+lora' to train both, or delete_adapter first."
                )
        super().__setitem__(name, config)

    def update(self, configs: dict[str, PeftConfig]) -> None:
        for name, config in configs.items():
            self[name] = config


def fields_of(config: PreTrainedConfig | PeftConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a configuration, as JSON keeps them."""
    values = {name: getattr(config, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def backbone_digest(model: nn.Module) -> str | None:
    """SHA-256 of the backbones' weights, by name, of a DETRIS or a PEFT model around one.

    Returns:
        `str` of 64 hexadecimal digits, or `None` if some of them are not held in float32: rounded or quantised weights
        do not tell which ones they were made from.
    """
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        # The mask token serves DINOv2's pretraining alone.
        if not ADAPTER_PARAMETER.search(name) and not name.endswith(".mask_token")
    }
    digest = hashlib.sha256()
    for name, parameter in sorted(weights.items()):
        if not name.startswith(BACKBONE_MODULES):
            continue
        if parameter.dtype != torch.float32 or parameter.is_meta:
            return None
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let the batch norms of `module` normalise by the batch without counting it."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        # Switching `track_running_stats` off would save fewer tensors than the first pass did.
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


class DetrisAdapterLayer(GradientCheckpointingLayer, BaseTunerLayer):
    """A backbone layer with its adapters, one for each adapter name; the active one takes part.

    Checkpointing this layer, not the one it wraps, keeps the adapters' activations out of memory too.
    """

    adapter_layer_names = ("detris_adapter",)
    other_param_names = ("scale",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.detris_adapter = nn.ModuleDict()
        self.scale = {}

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.gradient_checkpointing and self.training and not hidden_states.requires_grad:
            # Reentrant checkpointing gives no gradients to a layer whose input needs none.
            hidden_states = hidden_states.detach().requires_grad_(torch.is_grad_enabled())
        return super().__call__(hidden_states, *args, **kwargs)

    def make_adapter(self, config: "DetrisAdapterConfig", model_config: PreTrainedConfig) -> nn.Module:
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: "DetrisAdapterConfig", model_config: PreTrainedConfig) -> None:
        weight = next(parameter for parameter in self.base_layer.parameters() if parameter.is_floating_point())
        adapter = self.make_adapter(config, model_config).to(weight.dtype)
        if not any(parameter.is_meta for parameter in adapter.parameters()):  # PEFT fills low_cpu_mem_usage's later
            adapter = adapter.to(weight.device)
        self.detris_adapter[adapter_name] = adapter
        self.scale[adapter_name] = config.adapter_scale
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def active_name(self) -> str | None:
        """The adapter that takes part, if any does."""
        names = [name for name in self.active_adapters if name in self.detris_adapter]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(f"DETRIS adapters cannot be added up: activate one of {names} with set_adapter.")
        return names[0]

    def _adapt(self, adapter_name: str, *args: torch.Tensor) -> torch.Tensor:
        # Checkpointing computes the layer again while gradients flow back. The batch norms have counted this batch
        # by then, and counting it twice would make running statistics differ from those without checkpointing.
        recomputing = torch._C._current_graph_task_id() != -1
        with _running_statistics_kept(self) if recomputing else nullcontext():
            return self.scale[adapter_name] * self.detris_adapter[adapter_name](*args)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_BE_MERGED)


class TextAdapterLayer(DetrisAdapterLayer):
    """CLIP encoder layer with a text adapter; `(N, L, C)` to `(N, L, C)`."""

    def make_adapter(self, config: "DetrisAdapterConfig", model_config: PreTrainedConfig) -> nn.Module:
        return TextAdapter(self.get_base_layer().embed_dim, config.text_adapter_dim)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapter_name, layer = self.active_name, self.base_layer
        if adapter_name is None:
            return layer(hidden_states, *args, **kwargs)
        attention_output, _ = layer.self_attn(layer.layer_norm1(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + attention_output
        # The adapter reads the residual stream, not its norm (official `ResidualAttentionBlock.forward`).
        adapted = self._adapt(adapter_name, hidden_states)
        return hidden_states + layer.mlp(layer.layer_norm2(hidden_states)) + adapted


class VisionAdapterLayer(DetrisAdapterLayer):
    """DINOv2 layer with a dense aligner; `(N, P, D)` and words `(N, L, C)` to `(N, P, D)`."""

    def make_adapter(self, config: "DetrisAdapterConfig", model_config: PreTrainedConfig) -> nn.Module:
        return DenseAligner(
            hidden_size=self.get_base_layer().norm1.normalized_shape[0],
            dim=config.vision_adapter_dim,
            text_hidden_size=model_config.text_config.hidden_size,
            prefix_length=model_config.prefix_length,
            attention_dim=config.aligner_attention_dim,
            attention_heads=config.aligner_attention_heads,
            dropout=config.aligner_dropout,
        )

    def forward(self, hidden_states: torch.Tensor, text_hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        adapter_name, layer = self.active_name, self.base_layer
        if adapter_name is None:
            return layer(hidden_states)
        attention_output, _ = layer.attention(layer.norm1(hidden_states))
        hidden_states = hidden_states + layer.drop_path(layer.layer_scale1(attention_output))
        normed = layer.norm2(hidden_states)
        adapted = self._adapt(adapter_name, normed, text_hidden_states)
        return hidden_states + layer.drop_path(layer.layer_scale2(layer.mlp(normed) + adapted))


@dataclass
class DetrisAdapterConfig(PeftConfig):
    """PEFT configuration of the DETRIS adapters, of LoRA's beside or instead of them, and of the head.

    The fields are those of [`DetrisConfig`]. `model_fields` and `backbone_digest` are filled in, and compared with the
    model that saved adapters are loaded into.
    """

    peft_method: str = field(default="detris", metadata={"help": "'detris', 'lora', 'detris+lora' or 'none'."})
    vision_adapter_layers: list[int] = field(default_factory=list, metadata={"help": "Those with a dense aligner."})
    vision_adapter_dim: int = field(default=128, metadata={"help": "Width of the dense aligners."})
    text_adapter_layers: list[int] = field(default_factory=list, metadata={"help": "Those with a text adapter."})
    text_adapter_dim: int = field(default=64, metadata={"help": "Width of the text adapters."})
    adapter_scale: float = field(default=0.2, metadata={"help": "Factor on what an adapter adds."})
    aligner_attention_dim: int = field(default=128, metadata={"help": "Width of their attention to the words."})
    aligner_attention_heads: int = field(default=8, metadata={"help": "Heads of that attention."})
    aligner_dropout: float = field(default=0.1, metadata={"help": "Dropout on that attention's weights."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of low-rank adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Their scale, as a multiple of 1 / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on their input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear modules of a layer that hold one."}
    )
    lora_use_dora: bool = field(default=False, metadata={"help": "Whether they are those of DoRA."})
    modules_to_save: list[str] | None = field(
        default_factory=lambda: list(HEAD_MODULES), metadata={"help": "Other modules trained and saved."}
    )
    model_fields: dict[str, Any] | None = field(
        default=None, metadata={"help": "Fields of the model's configuration that the adapters and head depend on."}
    )
    backbone_digest: str | None = field(
        default=None, metadata={"help": "SHA-256 of the backbones' weights, set when the adapters are saved."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftMethod.DETRIS
        self.saved_shapes: Shapes | None = None  # of the tensors in the folder that it was read from

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs
    ) -> "DetrisAdapterConfig":
        """Read `adapter_config.json` as PEFT does, and the shapes of the tensors beside it, to compare them later.

        Raises:
            OSError: if a file is missing or damaged.
            ValueError: if the configuration is none.
        """
        source = os.fspath(pretrained_model_name_or_path)
        with as_value_error(f"The {CONFIG_NAME} of {source} cannot be read"):
            config = super().from_pretrained(source, subfolder, **kwargs)
            check_values({field.name: getattr(config, field.name) for field in fields(config)})
        if config.peft_type != PeftMethod.DETRIS:
            return config
        hub_kwargs = {name: value for name, value in kwargs.items() if name in HUB_KWARGS}
        shapes = saved_shapes(source, [SAFETENSORS_WEIGHTS_NAME], subfolder=subfolder or "", **hub_kwargs)
        if shapes:  # or else who loads the tensors says that the file is missing
            config.saved_shapes = {name.removeprefix("base_model.model."): shape for name, shape in shapes.items()}
        return config

    @property
    def has_lora(self) -> bool:
        return "lora" in self.peft_method

    @property
    def dense_layers(self) -> tuple[list[int], list[int]]:
        """Vision and text layers that hold DETRIS's own adapters."""
        dense = "detris" in self.peft_method
        return (self.vision_adapter_layers, self.text_adapter_layers) if dense else ([], [])

    def check_fields(self, model_config: PreTrainedConfig) -> PreTrainedConfig:
        """The model's configuration with the fields of these adapters; ValueError if they cannot be."""
        return type(model_config)(**model_config.to_dict() | fields_of(self, ADAPTER_FIELDS))

    def check_saved_shapes(self, model_class: type[PreTrainedModel], model_config: PreTrainedConfig) -> None:
        """Refuse fields that cannot be with a `ValueError`, or saved tensors that do not fit them and the model.

        This takes no memory: sizes that a stranger wrote are compared before anything is built of them.
        """
        model_config = self.check_fields(model_config)
        if self.saved_shapes is None:
            return
        check_count("decoder_layers", model_config.decoder_layers, len(self.saved_shapes))
        check_shapes(self.saved_shapes, shapes_of(skeleton(model_class, model_config).get_adapter_state_dict()))

    def check_model(self, model: PreTrainedModel) -> None:
        """
        Refuse a model whose configuration or backbones are not those that the adapters were trained with.

        Raises:
            ValueError: if they differ, or a field has a value that cannot work; the message names both sides, or field
                and value.
        """
        self.check_fields(model.config)
        for layer in (model.vision_model.encoder.layer[0], model.text_model.encoder.layers[0]):
            linear = [name for name, part in layer.named_modules() if isinstance(part, (nn.Linear, LoraLayer))]
            own = [name for name in linear if not ADAPTER_PARAMETER.search(f".{name}.")]
            missing = set(self.lora_target_modules) - {name.rpartition(".")[2] for name in own}
            if missing and self.has_lora:
                raise ValueError(
                    f"lora_target_modules names {sorted(missing)}, which the layers of a backbone do not have: name "
                    "linear modules that those of both have, such as 'q_proj', 'k_proj' and 'v_proj'."
                )
        fields_of_model = fields_of(model.config, MODEL_FIELDS)
        for name, value in (self.model_fields or {}).items():
            if fields_of_model.get(name) != value:
                raise ValueError(
                    f"The adapters were trained with {name} {value}, but the model has {fields_of_model.get(name)}: "
                    f"build it with {name}={value}."
                )
        digest = self.backbone_digest and backbone_digest(model)
        if digest != self.backbone_digest:
            if digest is None:
                warnings.warn(
                    "The backbones are not in float32, so it is not checked that the adapters were trained in them.",
                    stacklevel=2,
                )
                return
            raise ValueError(
                f"The adapters were trained in other backbones: theirs have the digest {self.backbone_digest}, these "
                f"{digest}. Load them onto the backbones that they were trained in."
            )


class DetrisTuner(BaseTuner):
    """Puts the adapters into the layers of `vision_model` and `text_model`; see `DetrisAdapterConfig`."""

    prefix = "detris_adapter"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping = {}

    def __init__(self, model: PreTrainedModel, *args, **kwargs):
        present = dict(getattr(model, "peft_config", {}))
        try:
            super().__init__(model, *args, **kwargs)
            # PEFT would leave the head of those that were active before.
            (name,) = self.active_adapters
            activate_adapters(model, [name], frozen=self.peft_config[name].inference_mode)
        except Exception:
            model.peft_config = present  # PEFT enters a configuration before it is checked
            raise

    def inject_adapter(self, model: PreTrainedModel, adapter_name: str, *args, **kwargs) -> None:
        config = self.peft_config[adapter_name]
        config.check_model(model)
        config.check_saved_shapes(type(model), model.config)
        if config.model_fields is None:
            config.model_fields = fields_of(model.config, MODEL_FIELDS)
        layers = [module for module in model.modules() if holds_adapters(module)]
        if any(adapter_name in layer.detris_adapter for layer in layers):
            # The model brings adapters of that name, which would stay wherever the new ones have none.
            delete_adapter(model, adapter_name, self.prefix)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: DetrisAdapterConfig, model_config: dict) -> DetrisAdapterConfig:
        vision_layers, text_layers = peft_config.dense_layers
        if peft_config.has_lora:
            vision_layers = range(model_config["vision_config"]["num_hidden_layers"])
            text_layers = range(model_config["text_config"]["num_hidden_layers"])
        names = [f"vision_model.encoder.layer.{layer}" for layer in vision_layers]
        names += [f"text_model.encoder.layers.{layer}" for layer in text_layers]
        # A regular expression: PEFT shortens long lists to suffixes, which would hit more layers than these.
        peft_config.target_modules = "|".join(map(re.escape, names)) or DUMMY_TARGET_MODULES
        return peft_config

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key) -> None:
        if peft_config.has_lora:
            # Here, for PEFT looks for no targets inside a layer that has been wrapped.
            self._add_lora(peft_config, adapter_name, target)
        vision_layers, text_layers = peft_config.dense_layers
        in_vision = current_key.startswith("vision_model.")
        if int(target_name) not in (vision_layers if in_vision else text_layers):
            return
        if not holds_adapters(target):
            wrapped = VisionAdapterLayer(target) if in_vision else TextAdapterLayer(target)
            self._replace_module(parent, target_name, wrapped, target)
            target = wrapped
        target.update_layer(adapter_name, peft_config, self.model.config)

    def _add_lora(self, peft_config: DetrisAdapterConfig, adapter_name: str, layer: nn.Module) -> None:
        lora_config = LoraConfig(
            r=peft_config.lora_rank,
            lora_alpha=peft_config.lora_alpha,
            lora_dropout=peft_config.lora_dropout,
            target_modules=peft_config.lora_target_modules,
            use_dora=peft_config.lora_use_dora,
            inference_mode=peft_config.inference_mode,
        )
        size = {"r": lora_config.r, "lora_alpha": lora_config.lora_alpha}
        targets = [
            (name, module)
            for name, module in layer.named_modules()
            if name.rpartition(".")[2] in lora_config.target_modules and self.prefix not in name
        ]
        for name, module in targets:
            if isinstance(module, LoraLayer):
                module.update_layer(adapter_name, **size, config=lora_config)
            else:
                backbone = self.model.vision_model  # transformers marks what it has quantised
                quantized = {
                    f"loaded_in_{bits}bit": getattr(backbone, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)
                }
                module = LoraModel._create_new_module(
                    lora_config, adapter_name, module, target_name=name, **size, **quantized
                )
                layer.set_submodule(name, module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs) -> Iterator[None]:
        # PEFT keeps `adapter_names` from the model, because other methods hand them to their layers.
        if adapter_names is None:
            yield
            return
        handle = self.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"adapter_names": adapter_names}), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Adapters take and give what their layer does, so they keep its precision.
        pass

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_BE_MERGED)

    def unload(self) -> nn.Module:
        # PEFT's own begins with what lies outermost and then does not find what lies in it.
        remove_adapters(self.model)
        self.model.peft_config, self.model.config.peft_method = {}, "none"
        return self.model

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"adapter_name is {adapter_name}: adapters cannot be added up, so activate one.")
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.active_adapter = discard_adapters(self.model, [adapter_name], self.active_adapters)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names) -> dict:
        # Called when adapters are saved; their configuration is saved afterwards.
        config.backbone_digest = backbone_digest(model) or config.backbone_digest
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # A layer is wrapped or not depending on what other adapters the model has.
        key = key.replace(".base_layer.", ".")
        if f".{cls.prefix}." in key:
            # PEFT looks for the name right before the last part of the key, but an adapter has modules of its own.
            return key.replace(f".{cls.prefix}.{adapter_name}.", f".{cls.prefix}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict) -> dict:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT would leave missing ones at random, and let those that are too many overwrite the backbones.
        own = re.compile(rf"\.({cls.prefix}|lora_\w+|modules_to_save)\.{re.escape(adapter_name)}\.")
        expected = {
            name: tensor
            for name, tensor in model.state_dict().items()
            # Without PeftModel around it, a model may load its own head.
            if own.search(f".{name}.") or (name in state_dict and name.startswith(HEAD_MODULES))
        }
        check_shapes(shapes_of(state_dict), shapes_of(expected))
        check_finite(state_dict)
        return state_dict


# What DetrisConfig says of adapters, by the same names.
ADAPTER_FIELDS = tuple(
    field.name
    for field in fields(DetrisAdapterConfig)
    if field.name in DetrisAdapterConfig.__annotations__
    and field.name not in ("modules_to_save", "model_fields", "backbone_digest")
)

peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftMethod.DETRIS] = DetrisAdapterConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftMethod.DETRIS] = DetrisTuner
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftMethod.DETRIS] = DetrisTuner.prefix
