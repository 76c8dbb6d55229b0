"""Adapters saved and loaded: a mixin of the model.

Saved adapters name the backbones that they were trained in, and do not contain them. `switching_detris.py` adds,
activates and deletes adapters of a model in memory.
"""

import copy
import os
from pathlib import Path
from typing import Any, Self

import huggingface_hub
import torch
from peft.functional import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file, find_adapter_config_file, logging

try:
    from .backbones_detris import absolute_if_local, check_attention, refuse_file
    from .checkpoint_files import HUB_KWARGS, check_finite, hub_kwargs_of
    from .configuration_detris import DetrisConfig, as_value_error, errors_begin_with
    from .peft_detris import (
        ADAPTER_FIELDS,
        BUILT_IN_ADAPTER,
        HEAD_MODULES,
        PEFT_PREFIX,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        discard_adapters,
        fields_of,
    )
    from .saving_detris import WEIGHT_PATTERNS, replacing_files, single_device
except ImportError:
    if __package__:
        raise
    from backbones_detris import absolute_if_local, check_attention, refuse_file
    from checkpoint_files import HUB_KWARGS, check_finite, hub_kwargs_of
    from configuration_detris import DetrisConfig, as_value_error, errors_begin_with
    from peft_detris import (
        ADAPTER_FIELDS,
        BUILT_IN_ADAPTER,
        HEAD_MODULES,
        PEFT_PREFIX,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        discard_adapters,
        fields_of,
    )
    from saving_detris import WEIGHT_PATTERNS, replacing_files, single_device

# Arguments of `from_pretrained` without effect on adapters: hints, and what `AutoModel` adds.
HINTS = ("low_cpu_mem_usage", "trust_remote_code", "use_safetensors", "weights_only")
IGNORED_KWARGS = (*HINTS, "_commit_hash", "_from_auto", "_from_pipeline")

logger = logging.get_logger(__name__)


class AdapterSharing:
    """Adapters saved and loaded, with heads. Calls `AdapterSwitching`, `WholeModelSaving` and `FromBackbones`."""

    def save_adapter(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str = BUILT_IN_ADAPTER,
        dtype: torch.dtype | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Save adapters and their head as PEFT does, with the code and a configuration that names the frozen backbones.
        [`from_pretrained`], `AutoModel` and [`~peft.PeftModel.from_pretrained`] load the folder.

        Args:
            save_directory (`str` or `os.PathLike`): folder to save to.
            adapter_name (`str`, *optional*, defaults to `"default"`): the model's adapters to save.
            dtype (`torch.dtype`, *optional*): precision to save in, such as `torch.bfloat16` for half the size.
            push_to_hub (`bool`, *optional*, defaults to `False`): whether to upload the folder.
            repo_id (`str`, *optional*): the repository on the Hub that the folder is meant for.
            state_dict (`dict`, *optional*): the model's, if it was gathered from several devices.

        Raises:
            ValueError: if there are no such adapters, the backbones have been trained too, the folder is where the
                backbones lie, or a tensor holds NaN or infinity.
        """
        self._check_known([adapter_name])
        self.check_adapter_target(save_directory)
        if self.peft_config[adapter_name].peft_type != PeftMethod.DETRIS:
            raise ValueError(
                f"{adapter_name!r} is of type {self.peft_config[adapter_name].peft_type.value}: save it by PeftModel."
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {dtype!r}: give a floating-point type such as torch.bfloat16.")
        if push_to_hub and not repo_id:
            raise ValueError("push_to_hub needs repo_id: name the repository, such as 'someone/detris-adapter'.")
        if not self.config.freeze_backbones:
            raise ValueError(
                "freeze_backbones is False, so the backbones are not what they came from: save the whole model by "
                "save_pretrained."
            )
        tensors = self.get_adapter_state_dict(adapter_name, state_dict)
        if dtype is not None:
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        with errors_begin_with("The adapters cannot be saved"):
            check_finite(tensors)
        adapter_config = copy.copy(self.peft_config[adapter_name])
        adapter_config.modules_to_save = list(HEAD_MODULES)
        adapter_config.base_model_name_or_path = repo_id  # AutoModel looks there for configuration and code
        self._enter_code()
        config = self._config_with_adapter(adapter_config, repo_id)
        with replacing_files(Path(save_directory), [name.format("") for name in WEIGHT_PATTERNS]) as folder:
            save_file(
                {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()},
                folder / SAFETENSORS_WEIGHTS_NAME,
                metadata={"format": "pt"},
            )
            custom_object_save(self, folder, config)
            config.save_pretrained(folder)
            adapter_config.save_pretrained(folder)
        if push_to_hub:
            huggingface_hub.create_repo(repo_id, exist_ok=True)
            huggingface_hub.upload_folder(
                repo_id=repo_id, folder_path=save_directory, commit_message="Upload adapters and head"
            )

    def check_adapter_target(self, save_directory: str | os.PathLike) -> None:
        """Raise ValueError if the folder holds the backbones, which adapters saved there would replace."""
        for source in (self.config.vision_backbone, self.config.text_backbone, self.name_or_path):
            if source and os.path.realpath(source) == os.path.realpath(save_directory):
                if find_adapter_config_file(source) is None:  # a folder of adapters may be saved over
                    raise ValueError(f"{save_directory} holds the backbones: save the adapters to another folder.")

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Return the tensors of an adapter and its head, by the names that PEFT saves them under.

        Args:
            adapter_name (`str`, *optional*): one of the model's adapters; by default the active one.
            state_dict (`dict`, *optional*): the model's, if it was gathered from several devices.
        """
        adapter_name = adapter_name or self.active_adapters()[0]
        state_dict = self.state_dict() if state_dict is None else state_dict
        tensors = get_peft_model_state_dict(self, state_dict=state_dict, adapter_name=adapter_name)
        for part in HEAD_MODULES:
            module, prefix = getattr(self, part), f"{part}."
            if isinstance(module, ModulesToSaveWrapper):
                if adapter_name in module.modules_to_save:
                    continue  # PEFT has returned this head
                prefix += "original_module."
            tensors |= {
                f"{part}.{name.removeprefix(prefix)}": tensor
                for name, tensor in state_dict.items()
                if name.startswith(prefix)
            }
        return tensors

    def _config_with_adapter(self, adapter_config: DetrisAdapterConfig, repo_id: str | None) -> DetrisConfig:
        """The model's configuration as if these adapters were its own, with the place of its backbones."""
        config = copy.deepcopy(self.config)
        for name in ADAPTER_FIELDS:
            setattr(config, name, getattr(adapter_config, name))
        for name in ("vision_backbone", "text_backbone"):
            if getattr(config, name) is None and self.name_or_path:
                # The backbones inside a whole DETRIS, such as one converted from an official checkpoint.
                setattr(config, name, absolute_if_local(self.name_or_path))
            if repo_id is not None and os.path.exists(getattr(config, name) or ""):
                logger.warning(
                    f"{name} is {getattr(config, name)}, which others do not have, so it is left out. Whoever loads "
                    f"the adapters must give {name}=, unless you put it on the Hub and build the model from there."
                )
                setattr(config, name, None)
        return config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        output_loading_info: bool = False,
        **kwargs,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """
        Load as [`PreTrainedModel.from_pretrained`] does, but refuse weights that do not fit the configuration.

        Adapters that [`save_adapter`] saved are loaded into the backbones that they name, or into other copies of them
        that `vision_backbone` and `text_backbone` name. All else goes to the next `from_pretrained` in the chain:
        `WholeModelSaving`'s, which calls transformers' own.

        Raises:
            OSError: if a folder or Hub id cannot be read.
            ValueError: if weights are missing or superfluous (transformers would leave them random, or drop them), or
                if adapters were trained in other backbones.
        """
        source = pretrained_model_name_or_path
        refuse_file(source)
        if kwargs.get("subfolder") and source is not None:
            refuse_file(os.path.join(source, kwargs["subfolder"]))
        check_attention(kwargs.get("attn_implementation"))
        kwargs["device_map"] = single_device(kwargs.get("device_map"))
        adapter_kwargs = kwargs.pop("adapter_kwargs", None) or {}
        # PEFT saves adapters without a config.json. Given such a folder, AutoModel calls this with the model that
        # adapter_config.json names, and with the folder under this key.
        adapter = adapter_kwargs.pop("_adapter_model_path", None)
        if adapter is not None and os.fspath(adapter) != os.fspath(source):
            model = cls.from_pretrained(source, *args, **kwargs)
            model.delete_adapter(BUILT_IN_ADAPTER)
            model.load_adapter(adapter, is_trainable=True, adapter_kwargs=adapter_kwargs)
        elif source is not None and find_adapter_config_file(source, **hub_kwargs_of(kwargs)) is not None:
            model = cls._from_adapter(source, kwargs)
        else:
            model = super().from_pretrained(source, *args, **kwargs)
        loading_info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _from_adapter(cls, source: str | os.PathLike, kwargs: dict[str, Any]) -> Self:
        """Build a model around the backbones that saved adapters name, and load the adapters into it.

        `source` is the adapters' folder or Hub id, and `kwargs` are arguments of [`from_pretrained`].
        """
        hub_kwargs, given = hub_kwargs_of(kwargs), dict(kwargs)
        for part in ("vision", "text"):
            if f"{part}_backbone" in kwargs:  # the saved revision belongs to another repository
                kwargs.setdefault(f"{part}_backbone_revision", None)
        config = cls._read_config(source, hub_kwargs, kwargs)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        device = kwargs.pop("device_map")
        attention = kwargs.pop("attn_implementation", None)
        quantization_config = kwargs.pop("quantization_config", None)
        unknown = kwargs.keys() - {*HUB_KWARGS, "subfolder", *IGNORED_KWARGS}
        if unknown:
            raise TypeError(
                f"from_pretrained takes no {', '.join(sorted(unknown))} for {source}, which holds adapters: leave it "
                "out, or load a whole model."
            )
        vision_model, text_model = cls._read_named_backbones(source, config, quantization_config, hub_kwargs)
        adapter_config = _read_adapter_config(source, hub_kwargs)
        with errors_begin_with(source):
            config = cls.config_class(**config.to_dict() | cls._backbone_configs(vision_model, text_model))
            _refuse_changes(adapter_config, given)
            # Before memory is taken for the sizes that the configurations name.
            config = adapter_config.applied_to(config)
            adapter_config.check_saved_shapes(cls, config)
        adapter_config.saved_shapes = None  # checked, so that loading does not build a weightless model again
        model = cls(config, vision_model, text_model)
        model.name_or_path = os.fspath(source)
        model._load_adapter(source, adapter_config, BUILT_IN_ADAPTER, is_trainable=True, hub_kwargs=hub_kwargs)
        model = model.to(device=device, dtype=dtype or torch.float32).eval()
        model.config.dtype = model.dtype
        if attention is not None:
            model.set_attn_implementation(attention)
        return model

    @classmethod
    def _read_named_backbones(
        cls, source: str | os.PathLike, config: DetrisConfig, quantization_config: Any, hub_kwargs: dict[str, Any]
    ) -> tuple[PreTrainedModel, CLIPTextModelWithProjection]:
        """Read the backbones that the configuration beside saved adapters names."""
        for part in ("vision", "text"):
            backbone = getattr(config, f"{part}_backbone")
            if backbone == os.fspath(source):
                raise ValueError(
                    f"{source} holds adapters and names itself as its {part} backbone: download it again."
                )
            if backbone is None:
                raise ValueError(
                    f"{source} holds adapters and does not say which {part} backbone they were trained in: give "
                    f"{part}_backbone=, a Hub id or folder."
                )
        try:
            return cls._read_backbones(
                config.vision_backbone,
                config.text_backbone,
                config.vision_backbone_revision,
                config.text_backbone_revision,
                quantization_config,
                # A revision or subfolder among the arguments is where the adapters are.
                **{name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")},
            )
        except OSError as error:
            raise OSError(
                f"The backbones of {source}, {config.vision_backbone} and {config.text_backbone}, cannot be read: if "
                f"they lie elsewhere, give vision_backbone= and text_backbone=. ({' '.join(str(error).split())})"
            ) from error

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike,
        adapter_name: str = BUILT_IN_ADAPTER,
        is_trainable: bool = False,
        adapter_kwargs: dict[str, Any] | None = None,
        hotswap: bool | str = "auto",
        low_cpu_mem_usage: bool = False,
        **kwargs,
    ) -> None:
        """
        Load adapters and their head that [`save_adapter`] or PEFT saved, and activate them. If the model has adapters
        of that name already, their tensors are replaced.

        Args:
            peft_model_id (`str` or `os.PathLike`): folder or Hub id.
            adapter_name (`str`, *optional*, defaults to `"default"`): the name that they get in this model.
            is_trainable (`bool`, *optional*, defaults to `False`): whether new adapters are to be trained.
            adapter_kwargs, kwargs: `revision`, `token` and so on for the Hub.
            hotswap (`bool` or `"auto"`, *optional*): `True` demands that adapters of that name are replaced, `False`
                that the name is new; by default both are fine.
            low_cpu_mem_usage (`bool`, *optional*): a hint of transformers without effect here.

        Raises:
            OSError: if a file is missing or damaged.
            TypeError: if there are other arguments.
            ValueError: if the adapters do not fit the model, its backbones or the adapters that they replace; the
                model stays as it was.
        """
        hub_kwargs = kwargs | (adapter_kwargs or {})
        unknown = hub_kwargs.keys() - {*HUB_KWARGS, "subfolder"}
        if unknown:
            raise TypeError(f"load_adapter takes no {', '.join(sorted(unknown))}: leave it out.")
        present = self.peft_config.get(adapter_name)
        if hotswap != "auto" and bool(hotswap) != (present is not None):
            there = "already has" if present else "does not have"
            raise ValueError(f"hotswap is {hotswap}, but the model {there} an adapter {adapter_name!r}.")
        refuse_file(peft_model_id)
        adapter_config = _read_adapter_config(peft_model_id, hub_kwargs)
        self._load_adapter(peft_model_id, adapter_config, adapter_name, is_trainable, hub_kwargs)

    def _load_adapter(
        self,
        source: str | os.PathLike,
        adapter_config: DetrisAdapterConfig,
        adapter_name: str,
        is_trainable: bool,
        hub_kwargs: dict[str, Any],
    ) -> None:
        present, active = self.peft_config.get(adapter_name), self.active_adapters()
        # Never from PEFT's older file, which is a pickle.
        tensors = load_file(cached_file(source, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs))
        tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        try:
            check_finite(tensors)  # `DetrisTuner` checks them only after the adapters have been added
            adapter_config.modules_to_save = list(HEAD_MODULES)  # else the head would replace the model's own
            if present is None:
                self._check_new_name(adapter_name, tensors)
                adapter_config.inference_mode = not is_trainable
                self._inject(adapter_config, adapter_name)
            else:
                adapter_config.check_model(self)
                _check_same_adapters(present, adapter_config)
                adapter_config.check_saved_shapes(type(self), self.config)
        except Exception as error:
            if present is None:
                discard_adapters(self, [adapter_name], active)
            with errors_begin_with(source), as_value_error("its adapters cannot be added"):
                raise error
        set_peft_model_state_dict(self, tensors, adapter_name)
        self.train(self.training)  # new modules start in training mode
        self.enable_adapters()
        activate_adapters(self, [adapter_name], frozen=self.peft_config[adapter_name].inference_mode)


def _read_adapter_config(source: str | os.PathLike, hub_kwargs: dict[str, Any]) -> DetrisAdapterConfig:
    with errors_begin_with(source):
        config = DetrisAdapterConfig.from_pretrained(source, **hub_kwargs)
    if config.peft_type != PeftMethod.DETRIS:
        raise ValueError(f"{source} holds adapters of type {config.peft_type.value}: load them by PeftModel.")
    return config


def _refuse_changes(adapter_config: DetrisAdapterConfig, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if arguments of `from_pretrained` change what the adapters were trained with."""
    changed = [name for name in (*ADAPTER_FIELDS, "vision_config", "text_config") if name in kwargs]
    if isinstance(kwargs.get("config"), PreTrainedConfig):  # AutoModel applies changes and passes the configuration
        saved = fields_of(adapter_config, ADAPTER_FIELDS)
        given = fields_of(kwargs["config"], ADAPTER_FIELDS)
        changed += [name for name, value in given.items() if value != saved[name]]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} cannot be changed on loading: the adapters have been trained with what their "
            "adapter_config.json says."
        )


def _check_same_adapters(present: DetrisAdapterConfig, loaded: DetrisAdapterConfig) -> None:
    """Raise ValueError if loaded adapters are of another kind than the model's, which they would replace."""
    for name in ADAPTER_FIELDS:
        old, new = getattr(present, name), getattr(loaded, name)
        if old != new and not name.endswith("dropout"):
            raise ValueError(
                f"its adapters have {name} {new}, but those that they would replace have {old}: load them under "
                "another adapter_name."
            )
