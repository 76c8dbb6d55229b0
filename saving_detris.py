"""Whole models saved and loaded: a mixin of the model.

What is saved replaces the files of an earlier model only when it is complete, and what is loaded is compared with its
configuration before memory is taken. `sharing_detris.py` does the same for adapters.
"""

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
from transformers import PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file

try:
    from .checkpoint_files import (
        check_finite,
        check_shapes,
        copy_out_of_file,
        hub_kwargs_of,
        saved_shapes,
        shapes_of,
        skeleton,
        weight_files,
    )
    from .configuration_detris import DetrisConfig, as_value_error, errors_begin_with, one_line
    from .handler import EndpointHandler  # so that it is saved with every model, like all that is imported here
    from .peft_detris import BUILT_IN_ADAPTER, PeftMethod
    from .pipeline_detris import CUSTOM_PIPELINES
    from .repository_files import refuse_official_checkpoints
except ImportError:
    if __package__:
        raise
    from checkpoint_files import (
        check_finite,
        check_shapes,
        copy_out_of_file,
        hub_kwargs_of,
        saved_shapes,
        shapes_of,
        skeleton,
        weight_files,
    )
    from configuration_detris import DetrisConfig, as_value_error, errors_begin_with, one_line
    from handler import EndpointHandler  # noqa: F401
    from peft_detris import BUILT_IN_ADAPTER, PeftMethod
    from pipeline_detris import CUSTOM_PIPELINES
    from repository_files import refuse_official_checkpoints

# Fields of the configuration that say where the backbones came from.
BACKBONE_SOURCES = ("vision_backbone", "vision_backbone_revision", "text_backbone", "text_backbone_revision")
# Weights of an earlier model that may lie in a folder: whole, in shards or of adapters. {} stands for a variant.
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
SAVE_KWARGS = ("max_shard_size", "token")  # what save_pretrained takes besides the arguments for an upload
SCRATCH_PREFIX = ".saving-"  # of the folder that files are saved into until all are complete


class WholeModelSaving:
    """Whole models, with backbones, adapters and head, saved and loaded."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        variant: str | None = None,
        **kwargs,
    ) -> None:
        """Save as [`PreTrainedModel.save_pretrained`] does, but always the whole model, by the names of `state_dict`.

        transformers by itself would save DINOv2's tensors under the names of its version 4, which `Trainer` ignores
        when it resumes, and would save only the adapters of a model that has some, which [`save_adapter`] is for. An
        earlier model in the folder stays until the new one is complete.

        Raises:
            ValueError: if the model holds further adapters, quantised backbones, or NaN or infinity.
        """
        self._check_is_one_whole()
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
        replaced = [pattern.format(f".{variant}" if variant else "") for pattern in WEIGHT_PATTERNS]
        with self._published_as_whole():
            with replacing_files(Path(save_directory), replaced) as folder:
                super().save_pretrained(folder, state_dict=copy.copy(state_dict), **saving)
            if push_to_hub:  # only now, so that the model is saved here even if the upload fails
                upload = {"repo_id": Path(save_directory).name} | upload
                with tempfile.TemporaryDirectory() as folder:
                    super().save_pretrained(folder, state_dict=state_dict, push_to_hub=True, **saving, **upload)

    def _check_is_one_whole(self) -> None:
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

    @contextmanager
    def _published_as_whole(self) -> Iterator[None]:
        """Let transformers save the whole model, and name only backbones that others can get."""
        self._enter_code()
        kept = {name: getattr(self.config, name) for name in BACKBONE_SOURCES}
        has_adapters, self._hf_peft_config_loaded = self._hf_peft_config_loaded, False
        for name, value in kept.items():
            # Others cannot get backbones from a folder on this machine, nor backbones that have been trained since.
            if not self.config.freeze_backbones or os.path.exists(value or ""):
                setattr(self.config, name, None)
        try:
            yield
        finally:
            self._hf_peft_config_loaded = has_adapters
            for name, value in kept.items():
                setattr(self.config, name, value)

    def _enter_code(self) -> None:
        """Enter the model's class and its pipeline in the configuration, where `AutoModel` and `pipeline` look."""
        # transformers would name the auto class that the model was registered for last.
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = auto_map | {"AutoModel": f"modeling_detris.{type(self).__name__}"}
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)  # transformers changes what it reads

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs) -> Self:
        """Load a whole model, and refuse weights that do not fit its configuration.

        This is the second of three in a chain. `AdapterSharing.from_pretrained`, which users call, loads adapters and
        passes all else on to this one, which calls transformers' own.
        """
        source = pretrained_model_name_or_path
        hub_kwargs = hub_kwargs_of(kwargs)
        if kwargs.get("max_memory") is not None:
            raise ValueError("max_memory divides a model among devices, but DETRIS runs on one: leave it out.")
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("use_safetensors is False: a DETRIS is only saved as safetensors, so leave it out.")
        config = cls._read_config(source, hub_kwargs, kwargs)
        for name in ("quantization_config", "fusion_config"):
            if getattr(config, name, None) is not None:
                raise ValueError(
                    f"{source}: its configuration has a {name}, which a DETRIS is saved without: remove it."
                )
        shapes = shapes_of(kwargs.get("state_dict") or {})
        if not shapes and source is not None:
            shapes = saved_shapes(source, weight_files(kwargs.get("variant")), **hub_kwargs)
        if shapes:  # else transformers says which file is missing
            with errors_begin_with(source):
                # Before memory is taken for the sizes that the configuration names.
                config.check_depths(len(shapes))
                check_shapes(shapes, shapes_of(skeleton(cls, config).state_dict()))
        with errors_begin_with(source), as_value_error("it cannot be loaded"):
            model = super().from_pretrained(source, *args, config=config, **kwargs)
        copy_out_of_file(model)
        with errors_begin_with(source):
            check_finite(model.state_dict())
        model._set_trainable()  # transformers has made every parameter trainable
        return model

    @classmethod
    def _read_config(cls, source: str | os.PathLike | None, hub_kwargs: dict, kwargs: dict) -> DetrisConfig:
        """Read the configuration of a folder or Hub id.

        Args:
            kwargs: arguments of `from_pretrained`. `config`, and fields of the configuration that are to be changed,
                are taken out.
        """
        config = kwargs.pop("config", None)
        if isinstance(config, PreTrainedConfig):
            return copy.deepcopy(config)
        if config is None and source is not None:
            if cached_file(source, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs) is None:
                refuse_official_checkpoints(source, hub_kwargs.get("revision"), hub_kwargs.get("token"))
                path = os.path.join(source, hub_kwargs.get("subfolder") or "", CONFIG_NAME)
                raise OSError(f"{path} is missing: save or download {source} again.")  # else all has its default
        names = {field.name for field in fields(cls.config_class)} - {"dtype"} | {"output_attentions"}
        changes = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        with errors_begin_with(source), as_value_error("its configuration cannot be used"):
            return cls.config_class.from_pretrained(source if config is None else config, **hub_kwargs, **changes)


def single_device(device_map: Any) -> Any:
    """The device that a `device_map` puts the whole model on; `None` if it is `None`.

    Raises:
        ValueError: if it divides the model, whose parts read each other's weights, or if there is no such device.
    """
    devices = {
        str(device): device for device in (device_map.values() if isinstance(device_map, dict) else [device_map])
    }
    if len(devices) > 1 or not {"disk", "meta"}.isdisjoint(devices):
        raise ValueError(
            f"device_map puts parts of the model on {sorted(devices)}: DETRIS runs on one device, so name that, as "
            "device_map='cuda:0' does."
        )
    device = next(iter(devices.values()), None)
    if device in ("auto", "balanced", "balanced_low_0", "sequential"):
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(
                f"device_map names {device!r}, which is no device of this machine: give another, such as 'cpu'. "
                f"({one_line(error)})"
            ) from error
    return device


@contextmanager
def replacing_files(folder: Path, replaced: Iterable[str]) -> Iterator[Path]:
    """Give a folder to save into, whose files then replace the files of an earlier model in `folder`.

    If saving fails or the process ends, `folder` holds the earlier files, or in one short moment files that no loader
    takes: the configurations are the first files to be deleted and the last to be moved in.

    Args:
        replaced: patterns of file names. Files that match are deleted, and so are files of the same name as a new one.
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
