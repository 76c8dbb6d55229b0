"""Whole models saved and loaded."""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from transformers import (
    PreTrainedConfig,
)
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
)

try:
    from .backbones_detris import align
    from .checkpoint_files import (
        HUB_KWARGS,
        WEIGHT_FILES,
        check_finite,
        check_shapes,
        saved_shapes,
        shapes_of,
        skeleton,
    )
    from .configuration_detris import DetrisConfig, as_value_error, errors_begin_with
    from .peft_detris import BUILT_IN_ADAPTER, PeftMethod
except ImportError:
    if __package__:
        raise
    from backbones_detris import align
    from checkpoint_files import (
        HUB_KWARGS,
        WEIGHT_FILES,
        check_finite,
        check_shapes,
        saved_shapes,
        shapes_of,
        skeleton,
    )
    from configuration_detris import DetrisConfig, as_value_error, errors_begin_with
    from peft_detris import BUILT_IN_ADAPTER, PeftMethod

BACKBONE_SOURCES = (
    "vision_backbone",
    "vision_backbone_revision",
    "text_backbone",
    "text_backbone_revision",
)
# Weights that may lie in a folder from an earlier saving: whole, in shards or of adapters; {} is for a variant.
WEIGHT_PATTERNS = (
    "model{}.safetensors",
    "model{}-*-of-*.safetensors",
    "model.safetensors.index{}.json",
    "pytorch_model{}.bin",
    "pytorch_model{}-*-of-*.bin",
    "pytorch_model.bin.index{}.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
SAVE_KWARGS = ("max_shard_size", "token")  # what save_pretrained takes besides what is for the Hub
SCRATCH_PREFIX = ".saving-"  # of the folder in which what is being saved lies until it is whole


@contextmanager
def replacing_files(folder: Path, replaced: Iterable[str]) -> Iterator[Path]:
    """Give a folder to save into, whose files then take the place of what was saved in `folder` before.

    An error or the end of the process leaves the old files, or for a moment a folder that no loader takes: the
    configurations leave it first and come back last.

    Args:
        replaced: patterns of the files that the new ones replace, besides those of the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH_PREFIX) as scratch:
        yield Path(scratch)
        configurations = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
        for pattern in (*configurations, *replaced):
            for file in folder.glob(pattern):
                file.unlink()
        for entry in sorted(Path(scratch).iterdir(), key=lambda entry: entry.name in configurations):
            entry.replace(folder / entry.name)


def refuse_several_devices(device_map: Any) -> None:
    """Refuse with a ValueError to divide a model: what its parts share is on one device."""
    devices = sorted(set(map(str, device_map.values()))) if isinstance(device_map, dict) else [str(device_map)]
    if len(devices) > 1 or not {"disk", "meta"}.isdisjoint(devices):
        raise ValueError(
            f"device_map puts parts of the model on {devices}: DETRIS runs on one device, so name that, as "
            "device_map='cuda:0' does."
        )


class WholeModels:
    """Whole models, saved and loaded."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        variant: str | None = None,
        **kwargs,
    ) -> None:
        """Save as [`PreTrainedModel.save_pretrained`] does, but by the names of `state_dict` and always whole.

        By default transformers would write DINOv2's tensors under the names of its version 4, which `Trainer` passes
        over when it resumes, and of a model with adapters only these, which is what [`save_adapter`] does. What the
        folder held before stays until all is written.

        Raises:
            ValueError: if the model holds further adapters, quantised backbones, or NaN or infinity.
        """
        further = [
            name
            for name, config in self.peft_config.items()
            if name != BUILT_IN_ADAPTER or config.peft_type != PeftMethod.DETRIS or config.modules_to_save
        ]
        if further:
            raise ValueError(
                f"The model holds further adapters, {further}: save each of them by save_adapter, or by PeftModel if "
                "they are of another method of PEFT, or merge them first."
            )
        if not all(parameter.is_floating_point() for parameter in self.parameters()):
            raise ValueError("The backbones are quantised, so the model cannot be saved whole: use save_adapter.")
        if kwargs.get("save_original_format"):
            raise ValueError(
                "save_original_format is True, but DETRIS is saved by the names of its state_dict: omit it."
            )
        saving = {"variant": variant, "save_original_format": False}
        saving |= {name: kwargs[name] for name in SAVE_KWARGS if name in kwargs}
        upload = {name: kwargs[name] for name in kwargs.keys() - {*saving, "safe_serialization"}}
        if upload and not push_to_hub:
            raise TypeError(f"save_pretrained takes no {', '.join(sorted(upload))} without push_to_hub: leave it out.")
        if not is_main_process:
            return
        with errors_begin_with("The model cannot be saved"):
            check_finite(self.state_dict() if state_dict is None else state_dict)
        self._enter_auto_map()
        kept = {name: getattr(self.config, name) for name in BACKBONE_SOURCES}
        has_adapters, self._hf_peft_config_loaded = self._hf_peft_config_loaded, False
        for name in BACKBONE_SOURCES:
            # The model brings its backbones along. Where they are from is worth telling only if others can have them,
            # and wrong if they have been trained.
            if not self.config.freeze_backbones or os.path.exists(kept[name] or ""):
                setattr(self.config, name, None)
        replaced = [pattern.format(f".{variant}" if variant else "") for pattern in WEIGHT_PATTERNS]
        try:
            with replacing_files(Path(save_directory), replaced) as folder:
                super().save_pretrained(folder, state_dict=copy.copy(state_dict), **saving)
            if push_to_hub:  # when all is saved here, whatever becomes of the upload
                upload = {"repo_id": Path(save_directory).name} | upload
                with tempfile.TemporaryDirectory() as folder:
                    super().save_pretrained(folder, state_dict=state_dict, push_to_hub=True, **saving, **upload)
        finally:
            self._hf_peft_config_loaded = has_adapters
            for name, value in kept.items():
                setattr(self.config, name, value)

    def _enter_auto_map(self) -> None:
        # transformers enters a class under the last of the auto classes that it was registered for.
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = auto_map | {"AutoModel": f"modeling_detris.{type(self).__name__}"}

    @classmethod
    def _read_config(cls, source: str | None, hub_kwargs: dict, kwargs: dict) -> DetrisConfig:
        """The configuration of a folder or Hub id; takes `config` and the fields to be changed out of `kwargs`."""
        config = kwargs.pop("config", None)
        if isinstance(config, PreTrainedConfig):
            return copy.deepcopy(config)
        if config is None and source is not None and os.path.isdir(source):
            path = os.path.join(source, hub_kwargs.get("subfolder") or "", CONFIG_NAME)
            if not os.path.isfile(path):  # transformers would take the defaults
                raise OSError(f"{path} is missing: save or download {source} again.")
        names = {field.name for field in fields(cls.config_class)} - {"dtype"}
        changes = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        with errors_begin_with(source), as_value_error("its configuration cannot be used"):
            return cls.config_class.from_pretrained(source if config is None else config, **hub_kwargs, **changes)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Self:
        """Load a whole model, and refuse weights that do not fit its configuration."""
        source = pretrained_model_name_or_path
        hub_kwargs = {name: kwargs[name] for name in (*HUB_KWARGS, "subfolder") if name in kwargs}
        refuse_several_devices(kwargs.get("device_map"))
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("use_safetensors is False: a DETRIS is saved as safetensors alone, so leave it out.")
        config = cls._read_config(source, hub_kwargs, kwargs)
        for name in ("quantization_config", "fusion_config"):
            if getattr(config, name, None) is not None:
                raise ValueError(
                    f"{source}: its configuration has a {name}, which a DETRIS is saved without: remove it."
                )
        variant = kwargs.get("variant")
        names = [name for name in WEIGHT_FILES if name.endswith(".safetensors") or "safetensors.index" in name]
        if variant:
            names = [f".{variant}.".join(name.rsplit(".", 1)) for name in names]
        # Before memory is taken for what the configuration says.
        shapes = shapes_of(kwargs.get("state_dict") or {})
        shapes = shapes or (saved_shapes(source, names, **hub_kwargs) if source is not None else {})
        if shapes:  # or else transformers says which file is missing
            with errors_begin_with(source):
                config.check_counts(len(shapes))
                check_shapes(shapes, shapes_of(skeleton(cls, config).state_dict()))
        with errors_begin_with(source), as_value_error("it cannot be loaded"):
            model = super().from_pretrained(source, *args, config=config, **kwargs)
        refuse_several_devices(getattr(model, "hf_device_map", None))
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(f"{source}: max_memory is too little for the model, which is not divided: leave it out.")
        align(model)
        with errors_begin_with(source):
            check_finite(model.state_dict())
        # Loading makes every parameter trainable.
        model._set_trainable()
        return model
