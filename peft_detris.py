"""The adapters of DETRIS as a PEFT method: their configuration and their tuner.

Below these two: which adapters of a model are active, and the digest that says which backbones they belong to.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from transformers import PreTrainedConfig, PreTrainedModel

try:
    from .adapter_layers_detris import CANNOT_BE_MERGED, TextAdapterLayer, VisionAdapterLayer, holds_adapters
    from .checkpoint_files import Shapes, check_finite, check_shapes, hub_kwargs_of, saved_shapes, shapes_of, skeleton
    from .configuration_detris import DetrisConfig, as_value_error, check_count, check_values
except ImportError:
    if __package__:
        raise
    from adapter_layers_detris import CANNOT_BE_MERGED, TextAdapterLayer, VisionAdapterLayer, holds_adapters
    from checkpoint_files import Shapes, check_finite, check_shapes, hub_kwargs_of, saved_shapes, shapes_of, skeleton
    from configuration_detris import DetrisConfig, as_value_error, check_count, check_values

BACKBONE_MODULES = ("vision_model.", "text_model.", "text_projection.")
HEAD_MODULES = ("neck", "decoder", "mask_head")
# Fields of DetrisConfig that trained adapters and heads depend on, though not all change the shapes of tensors.
MODEL_FIELDS = ("feature_layers", "image_size", "decoder_dim", "decoder_layers", "decoder_heads", "decoder_ffn_dim")
ADAPTER_PARAMETER = re.compile(r"\.(detris_adapter|lora_\w+)\.")
PEFT_PREFIX = "base_model.model."  # begins the names of tensors that PEFT saves
BUILT_IN_ADAPTER = "default"  # PEFT's name for a model's first adapter


class PeftMethod(StrEnum):
    """The type of PEFT method. An enumeration like PEFT's own types, because transformers asks for its `value`."""

    DETRIS = "DETRIS"


@dataclass
class DetrisAdapterConfig(PeftConfig):
    """PEFT configuration of the DETRIS adapters, of LoRA's beside them or in their place, and of the head.

    Fields of the same name as in [`DetrisConfig`] mean the same and have the same defaults, except that by default no
    layers hold adapters.

    Args:
        modules_to_save: other modules that are trained and saved with the adapters; by default the whole head.
        model_fields: fields of the model's configuration that adapters and head depend on. They are filled in when
            the adapters are added, and compared with the model that saved adapters are loaded into.
        backbone_digest: SHA-256 of the backbones' weights, filled in when the adapters are saved, and compared too.
    """

    peft_method: str = DetrisConfig.peft_method
    vision_adapter_layers: list[int] = field(default_factory=list)
    vision_adapter_dim: int = DetrisConfig.vision_adapter_dim
    text_adapter_layers: list[int] = field(default_factory=list)
    text_adapter_dim: int = DetrisConfig.text_adapter_dim
    adapter_scale: float = DetrisConfig.adapter_scale
    aligner_attention_dim: int = DetrisConfig.aligner_attention_dim
    aligner_attention_heads: int = DetrisConfig.aligner_attention_heads
    aligner_dropout: float = DetrisConfig.aligner_dropout
    lora_rank: int = DetrisConfig.lora_rank
    lora_alpha: int = DetrisConfig.lora_alpha
    lora_dropout: float = DetrisConfig.lora_dropout
    lora_target_modules: list[str] = field(default_factory=lambda: list(DetrisConfig.lora_target_modules))
    lora_use_dora: bool = DetrisConfig.lora_use_dora
    modules_to_save: list[str] | None = field(default_factory=lambda: list(HEAD_MODULES))
    model_fields: dict[str, Any] | None = None
    backbone_digest: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftMethod.DETRIS
        # Shapes of the tensors saved beside the adapter_config.json; None once they are checked.
        self.saved_shapes: Shapes | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs
    ) -> PeftConfig:
        """Read `adapter_config.json` as PEFT does, and the shapes of the tensors beside it.

        Returns:
            `DetrisAdapterConfig`, or another `PeftConfig` if the file describes adapters of another method.

        Raises:
            OSError: if a file is missing or damaged.
            ValueError: if the file holds no configuration.
        """
        source = os.fspath(pretrained_model_name_or_path)
        with as_value_error(f"The {CONFIG_NAME} of {source} cannot be read"):
            config = super().from_pretrained(source, subfolder, **kwargs)
            check_values({field.name: getattr(config, field.name) for field in fields(config)})
        if config.peft_type != PeftMethod.DETRIS:
            return config
        hub_kwargs = hub_kwargs_of(kwargs | {"subfolder": subfolder or ""})
        shapes = saved_shapes(source, [SAFETENSORS_WEIGHTS_NAME], **hub_kwargs)
        if shapes:  # if the file is missing, the caller that loads the tensors says so
            config.saved_shapes = {name.removeprefix(PEFT_PREFIX): shape for name, shape in shapes.items()}
        return config

    @property
    def has_lora(self) -> bool:
        """Whether there are low-rank adapters."""
        return "lora" in self.peft_method

    @property
    def dense_layers(self) -> tuple[list[int], list[int]]:
        """The vision and the text layers that hold adapters of DETRIS's own kind."""
        dense = "detris" in self.peft_method
        return (self.vision_adapter_layers, self.text_adapter_layers) if dense else ([], [])

    def applied_to(self, model_config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the model's configuration with the fields of these adapters; ValueError if they do not fit it."""
        return type(model_config)(**model_config.to_dict() | fields_of(self, ADAPTER_FIELDS))

    def check_saved_shapes(self, model_class: type[PreTrainedModel], model_config: PreTrainedConfig) -> None:
        """Raise ValueError if the saved tensors do not fit these fields and the model, or the fields cannot work.

        This takes no memory for weights: sizes in a stranger's file are checked before modules of that size are built.
        """
        model_config = self.applied_to(model_config)
        if self.saved_shapes is None:
            return
        check_count("decoder_layers", model_config.decoder_layers, len(self.saved_shapes))
        check_shapes(self.saved_shapes, shapes_of(skeleton(model_class, model_config).get_adapter_state_dict()))

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the adapters were trained with another configuration or in other backbones than the
        model's, or if a field has a value that cannot work.
        """
        self.applied_to(model.config)
        if self.has_lora:
            self._check_lora_targets(model)
        fields_of_model = fields_of(model.config, MODEL_FIELDS)
        for name, value in (self.model_fields or {}).items():
            if fields_of_model.get(name) != value:
                raise ValueError(
                    f"The adapters were trained with {name} {value}, but the model has {fields_of_model.get(name)}: "
                    f"build it with {name}={value}."
                )
        if self.backbone_digest:
            self._check_digest(model)

    def _check_lora_targets(self, model: PreTrainedModel) -> None:
        for layer in (model.vision_model.encoder.layer[0], model.text_model.encoder.layers[0]):
            linear = [name for name, part in layer.named_modules() if isinstance(part, (nn.Linear, LoraLayer))]
            own = [name for name in linear if not ADAPTER_PARAMETER.search(f".{name}.")]
            missing = set(self.lora_target_modules) - {name.rpartition(".")[2] for name in own}
            if missing:
                raise ValueError(
                    f"lora_target_modules names {sorted(missing)}, which the layers of a backbone do not have: name "
                    "linear modules that both have, such as 'q_proj', 'k_proj' and 'v_proj'."
                )

    def _check_digest(self, model: PreTrainedModel) -> None:
        digest = backbone_digest(model)
        if digest is None:
            warnings.warn(
                "The backbones are not in float32, so it is not checked that the adapters were trained in them.",
                stacklevel=3,
            )
        elif digest != self.backbone_digest:
            raise ValueError(
                f"The adapters were trained in other backbones: their digest is {self.backbone_digest}, the model's "
                f"is {digest}. Load them onto the backbones that they were trained in."
            )


# The fields that describe adapters, which `DetrisConfig` has too, by the same names.
OTHER_FIELDS = ("modules_to_save", "model_fields", "backbone_digest")
ADAPTER_FIELDS = tuple(name for name in DetrisAdapterConfig.__annotations__ if name not in OTHER_FIELDS)


def fields_of(config: PreTrainedConfig | PeftConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """Return fields of a configuration, with lists in the place of tuples, as JSON has them."""
    values = {name: getattr(config, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# --- Tuner ----------------------------------------------------------------------------------------------------------


class DetrisTuner(BaseTuner):
    """Puts the adapters of a `DetrisAdapterConfig` into the layers of `vision_model` and `text_model`.

    PEFT makes one when it adds adapters to a model (`get_peft_model`, `inject_adapter_in_model`), and calls the class
    methods when it saves or loads their tensors.
    """

    prefix = "detris_adapter"  # the part of a module's name that PEFT knows adapters of this method by
    tuner_layer_cls = BaseTunerLayer  # the layers that PEFT switches: ours, and LoRA's inside them
    target_module_mapping = {}  # PEFT asks for target modules by model type; `_prepare_adapter_config` sets them

    def __init__(self, model: PreTrainedModel, *args, **kwargs):
        """PEFT calls this to add adapters to a model. If they do not fit, the model stays as it was."""
        present = dict(getattr(model, "peft_config", {}))
        try:
            super().__init__(model, *args, **kwargs)
            (name,) = self.active_adapters
            # PEFT would leave the previously active head active.
            activate_adapters(model, [name], frozen=self.peft_config[name].inference_mode)
        except Exception:
            model.peft_config = present  # PEFT enters a configuration before it checks it
            raise

    def inject_adapter(self, model: PreTrainedModel, adapter_name: str, *args, **kwargs) -> None:
        """PEFT calls this to add the adapters of a configuration. All checks come before the model is changed."""
        config = self.peft_config[adapter_name]
        config.check_model(model)
        config.check_saved_shapes(type(model), model.config)
        if config.model_fields is None:
            config.model_fields = fields_of(model.config, MODEL_FIELDS)
        layers = [module for module in model.modules() if holds_adapters(module)]
        if any(adapter_name in layer.detris_adapter for layer in layers):
            # The model has adapters of that name, which would stay in layers where the new configuration has none.
            delete_adapter(model, adapter_name, self.prefix)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: DetrisAdapterConfig, model_config: dict) -> DetrisAdapterConfig:
        """PEFT calls this before it looks for the modules to replace, which `target_modules` names."""
        vision_layers, text_layers = peft_config.dense_layers
        if peft_config.has_lora:
            vision_layers = range(model_config["vision_config"]["num_hidden_layers"])
            text_layers = range(model_config["text_config"]["num_hidden_layers"])
        names = [f"vision_model.encoder.layer.{layer}" for layer in vision_layers]
        names += [f"text_model.encoder.layers.{layer}" for layer in text_layers]
        # A regular expression, because PEFT shortens long lists to suffixes, which other layers have too.
        peft_config.target_modules = "|".join(map(re.escape, names)) or DUMMY_TARGET_MODULES
        return peft_config

    def _create_and_replace(
        self,
        peft_config: DetrisAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """PEFT calls this for each module that `target_modules` names.

        `target` is a layer of a backbone, wrapped or not, `target_name` its number and `current_key` its full name.
        """
        if peft_config.has_lora:
            # PEFT does not look for targets inside a layer that has been replaced, so LoRA is added from here.
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
        backbone = self.model.vision_model  # transformers marks a model that it has quantised
        quantized = {f"loaded_in_{bits}bit": getattr(backbone, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)}
        for name, module in list(layer.named_modules()):
            if name.rpartition(".")[2] not in lora_config.target_modules or self.prefix in name:
                continue
            if isinstance(module, LoraLayer):
                module.update_layer(adapter_name, **size, config=lora_config)
            else:
                module = LoraModel._create_new_module(
                    lora_config, adapter_name, module, target_name=name, **size, **quantized
                )
                layer.set_submodule(name, module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs) -> Iterator[None]:
        """PEFT runs the model inside this context, which gets the arguments of the call.

        PEFT keeps `adapter_names` from the model, because other methods pass them to their layers. Here they are given
        back to the model, whose `forward` takes them.
        """
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
        """PEFT calls this to turn new adapters into float32. They stay in the precision of their layer instead."""

    def _check_merge_allowed(self) -> None:
        """PEFT calls this before it merges adapters into their layers."""
        raise ValueError(CANNOT_BE_MERGED)

    def unload(self) -> nn.Module:
        """PEFT calls this to take all adapters out of the model, which keeps the active head, and to return it."""
        # PEFT's own `unload` unwraps the outermost layers first, and then does not find the layers inside them.
        remove_adapters(self.model)
        self.model.peft_config, self.model.config.peft_method = {}, "none"
        return self.model

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """PEFT calls this to activate an adapter; `inference_mode` freezes it."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"adapter_name is {adapter_name}: adapters cannot be added up, so activate one.")
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT calls this to delete an adapter, and reads in `active_adapter` which ones are active afterwards."""
        self.active_adapter = discard_adapters(self.model, [adapter_name], self.active_adapters)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: DetrisAdapterConfig, *args, **kwargs
    ) -> dict[str, torch.Tensor]:
        """PEFT calls this when it saves adapters, for their tensors."""
        # PEFT saves the configuration afterwards, so the digest is entered here.
        config.backbone_digest = backbone_digest(model) or config.backbone_digest
        return super()._get_adapter_state_dict(model, config, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT calls this for the name that a tensor of the model has in a file, when it saves and when it loads."""
        # Whether a layer is wrapped depends on which other adapters the model has.
        key = key.replace(".base_layer.", ".")
        if f".{cls.prefix}." in key:
            # PEFT expects the adapter's name right before the last part of the key; our adapters have modules inside.
            return key.replace(f".{cls.prefix}.{adapter_name}.", f".{cls.prefix}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DetrisAdapterConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT calls this before it loads the tensors of a file, for the names that they have in the model.

        The tensors are checked too: PEFT would leave missing ones at random values, and let superfluous ones overwrite
        the backbones.
        """
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = re.compile(rf"\.({cls.prefix}|lora_\w+|modules_to_save)\.{re.escape(adapter_name)}\.")
        expected = {
            name: tensor
            for name, tensor in model.state_dict().items()
            # A model without a PeftModel around it may load its own head.
            if own.search(f".{name}.") or (name in state_dict and name.startswith(HEAD_MODULES))
        }
        check_shapes(shapes_of(state_dict), shapes_of(expected))
        check_finite(state_dict)
        return state_dict


# --- Which adapters of a model are active ---------------------------------------------------------------------------


def activate_adapters(model: PreTrainedModel, names: list[str], frozen: bool = False) -> None:
    """Activate adapters and their head, which for the built-in ones is the model's own."""
    if names:
        set_adapter(model, names, inference_mode=frozen)
    for part in HEAD_MODULES:
        module = getattr(model, part)
        if isinstance(module, ModulesToSaveWrapper):
            # PEFT would leave the model's own head frozen, and the head that was active before trainable.
            active, heads = module.active_adapters, module.modules_to_save
            module.requires_grad_(False)
            (heads[active[0]] if active else module.original_module).requires_grad_(not frozen)


def discard_adapters(model: PreTrainedModel, names: list[str], active: list[str]) -> list[str]:
    """Delete adapters with their heads. Adapters in `active` that are not deleted stay active; if none is left, the
    last remaining adapter becomes active.

    Returns:
        `list[str]`: the names of the adapters that are active now.
    """
    for name in names:
        model.peft_config.pop(name, None)
    remaining = [name for name in active if name in model.peft_config] or list(model.peft_config)[-1:]
    # Before anything is deleted, because PEFT would choose in each layer anew what replaces a deleted adapter.
    activate_adapters(model, remaining, frozen=any(model.peft_config[name].inference_mode for name in remaining))
    for name in names:
        delete_adapter(model, name, DetrisTuner.prefix)
    # The tensors of a layer that stays wrapped would be saved under other names.
    remove_adapters(model, unused_only=True)
    return remaining


def remove_adapters(model: nn.Module, unused_only: bool = False) -> None:
    """Unwrap the layers of the backbones, and put the active head in the place of all heads.

    With `unused_only`, layers and heads that still hold an adapter stay wrapped.
    """
    for name, module in reversed(list(model.named_modules())):  # the innermost modules first
        if not isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            continue
        if unused_only and module._get_available_adapters():
            continue
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
        else:
            active = module.active_adapters
            model.set_submodule(name, module.modules_to_save[active[0]] if active else module.original_module)


# --- Which backbones adapters belong to -----------------------------------------------------------------------------


def backbone_digest(model: nn.Module) -> str | None:
    """SHA-256 of the names, shapes and weights of the backbones of a DETRIS, or of a PEFT model around one.

    Returns:
        `str` of 64 hexadecimal digits, or `None` if some weights are not held in float32, because rounded or quantised
        weights do not tell which weights they were made from, or if they are divided among several devices.
    """
    weights = {
        name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        # DINOv2 uses its mask token only in its own pretraining.
        if not ADAPTER_PARAMETER.search(name) and not name.endswith(".mask_token")
    }
    digest = hashlib.sha256()
    for name, parameter in sorted(weights.items()):
        if not name.startswith(BACKBONE_MODULES):
            continue
        if parameter.dtype != torch.float32 or parameter.is_meta or type(parameter) is not nn.Parameter:
            return None
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftMethod.DETRIS] = DetrisAdapterConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftMethod.DETRIS] = DetrisTuner
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftMethod.DETRIS] = DetrisTuner.prefix
