"""Adapters saved, loaded, added, switched and deleted: mixins of the model."""

import copy
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import huggingface_hub
import torch
from peft import PeftConfig
from peft.functional import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedConfig,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import (
    cached_file,
    find_adapter_config_file,
    logging,
)

try:
    from .backbones_detris import place_of, require_folder
    from .checkpoint_files import HUB_KWARGS, check_finite
    from .configuration_detris import DetrisConfig, as_value_error, errors_begin_with
    from .peft_detris import (
        ADAPTER_FIELDS,
        ADAPTER_PARAMETER,
        BACKBONE_MODULES,
        BUILT_IN_ADAPTER,
        HEAD_MODULES,
        AdapterConfigs,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        discard_adapters,
        fields_of,
        is_bare,
    )
    from .saving_detris import WEIGHT_PATTERNS, refuse_several_devices, replacing_files
except ImportError:
    if __package__:
        raise
    from backbones_detris import place_of, require_folder
    from checkpoint_files import HUB_KWARGS, check_finite
    from configuration_detris import DetrisConfig, as_value_error, errors_begin_with
    from peft_detris import (
        ADAPTER_FIELDS,
        ADAPTER_PARAMETER,
        BACKBONE_MODULES,
        BUILT_IN_ADAPTER,
        HEAD_MODULES,
        AdapterConfigs,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        discard_adapters,
        fields_of,
        is_bare,
    )
    from saving_detris import WEIGHT_PATTERNS, refuse_several_devices, replacing_files

NO_ADAPTER = "__base__"  # PEFT's name for the bare backbones in `adapter_names`
# What else `from_pretrained` takes for adapters without a backbone of their own: hints, and what `AutoModel` hands on.
HINTS = ("low_cpu_mem_usage", "trust_remote_code", "use_safetensors", "weights_only", "_commit_hash", "_from_auto")

logger = logging.get_logger(__name__)


class AdapterSwitching:
    """Adapters added, activated, switched and deleted."""

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configurations of the adapters, by name."""
        return self._adapter_configs

    @peft_config.setter
    def peft_config(self, configs: dict[str, PeftConfig]) -> None:
        self._adapter_configs = configs if isinstance(configs, AdapterConfigs) else AdapterConfigs(configs)

    @peft_config.deleter
    def peft_config(self) -> None:
        # PEFT deletes it when it has merged or removed its own adapters.
        self._adapter_configs = AdapterConfigs()

    @staticmethod
    def part_of(name: str) -> str:
        """Return whether the parameter `name` belongs to the `adapters`, the `backbones` or the `head`."""
        if ADAPTER_PARAMETER.search(name):
            return "adapters"
        return "backbones" if name.startswith(BACKBONE_MODULES) else "head"

    def count_parameters(self) -> dict[str, int]:
        """Return the number of parameters in `adapters`, `head` and `backbones`."""
        counts = {"adapters": 0, "head": 0, "backbones": 0}
        for name, parameter in self.named_parameters():
            counts[self.part_of(name)] += parameter.numel()
        return counts

    def print_trainable_parameters(self) -> None:
        """Print how much is trained, and the adapters' share of the backbones as the paper counts it (table 1)."""
        counts = self.count_parameters()
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        total = sum(counts.values())
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.2f}\n"
            f"adapters: {counts['adapters']:,} || head: {counts['head']:,} || backbones: {counts['backbones']:,} || "
            f"adapters%: {100 * counts['adapters'] / counts['backbones']:.2f} of the backbones"
        )

    def _check_new_name(self, adapter_name: str, tensors: Iterable[str] = ()) -> None:
        parts = {part for name in (*tensors, *self.state_dict()) for part in name.split(".")}
        present = self.peft_config.get(adapter_name)
        if (present is not None and not is_bare(present)) or adapter_name in parts | {NO_ADAPTER}:
            raise ValueError(f"adapter_name is {adapter_name!r}, which already names something: give another.")

    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str = BUILT_IN_ADAPTER) -> None:
        """
        Add fresh adapters, with a head of their own if `modules_to_save` says so, and activate them.

        Args:
            adapter_config (`PeftConfig`): of DETRIS; or of another method of PEFT if the model has no adapters.
            adapter_name (`str`, *optional*, defaults to `"default"`): what to call it.

        Raises:
            TypeError: if it is no configuration of adapters.
            ValueError: if the name is taken, or the adapters do not fit the model, which then stays as it was.
        """
        if not isinstance(adapter_config, PeftConfig):
            raise TypeError(f"adapter_config is of type {type(adapter_config).__name__}: give a PeftConfig.")
        self._check_new_name(adapter_name)
        present = dict(self.peft_config)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # as is meant
                inject_adapter_in_model(adapter_config, self, adapter_name)
        except Exception:
            self.peft_config = present  # PEFT enters a configuration before it is checked
            raise
        self.train(self.training)  # new modules start in training mode
        self.set_adapter(adapter_name)

    def enable_peft_hotswap(self, *args, **kwargs) -> None:
        """Refuse what transformers has for LoRA: [`load_adapter`] replaces an adapter of the same name by itself."""
        raise ValueError("Hotswapping needs no preparation here: load_adapter replaces an adapter of the same name.")

    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters; without adapters in the backbones that of the head."""
        for module in self.modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                return module.active_adapters or [BUILT_IN_ADAPTER]
        return [BUILT_IN_ADAPTER]

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Activate an adapter, and its head, by name; see [`load_adapter`]."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._check_known(names)
        if len(names) != 1:
            raise ValueError(f"adapter_name is {names}: adapters cannot be added up, so activate one.")
        # transformers' own would fail where the head of the built-in adapter is the model's own.
        activate_adapters(self, names)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Delete adapters with their heads; of the built-in adapter the head stays, as the model's own."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_known(names)
        discard_adapters(self, names, self.active_adapters())
        if BUILT_IN_ADAPTER in names:
            self.config.peft_method = "none"

    def _check_known(self, adapter_names: Iterable[str]) -> None:
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"There are no adapters {unknown}: the model has {list(self.peft_config)}.")

    def enable_adapters(self) -> None:
        """Undo [`disable_adapters`]; transformers' own would leave heads switched off."""
        self._switch_adapters(True)

    def disable_adapters(self) -> None:
        """Let the bare backbones and the model's own head compute, until [`enable_adapters`]."""
        self._switch_adapters(False)

    def _switch_adapters(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                module.enable_adapters(enabled)

    @contextmanager
    def _activated(self, adapter_name: str) -> Iterator[None]:
        """Let another adapter, or with `__base__` none, take part for a while."""
        active, requires_grad = self.active_adapters(), [(p, p.requires_grad) for p in self.parameters()]
        wrappers = [m for m in self.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
        disabled = any(wrapper.disable_adapters for wrapper in wrappers)
        try:
            if adapter_name == NO_ADAPTER:
                self.disable_adapters()
            else:
                self.enable_adapters()
                self.set_adapter(adapter_name)
            yield
        finally:
            self.enable_adapters()
            activate_adapters(self, [name for name in active if name in self.peft_config])
            if disabled:
                self.disable_adapters()
            for parameter, flag in requires_grad:
                parameter.requires_grad = flag

    def _segment_by_adapter(self, adapter_names, pixel_values, input_ids, padding, image_index) -> torch.Tensor:
        if self.training:
            raise ValueError("adapter_names are for evaluation: call model.eval(), or train one adapter at a time.")
        if isinstance(adapter_names, str) or len(adapter_names) != len(input_ids):
            raise ValueError(
                f"There are {len(adapter_names)} adapter_names for {len(input_ids)} phrases: give one each."
            )
        self._check_known(set(adapter_names) - {NO_ADAPTER})
        if image_index is None:
            image_index = torch.arange(len(input_ids), device=input_ids.device)
        phrases, logits = [], []
        for name in dict.fromkeys(adapter_names):
            chosen = torch.tensor(
                [n for n, other in enumerate(adapter_names) if other == name], device=input_ids.device
            )
            images, index = image_index[chosen].unique(return_inverse=True)
            with self._activated(name):
                logits.append(self._segment(pixel_values[images], input_ids[chosen], padding[chosen], index))
            phrases.append(chosen)
        return torch.cat(logits)[torch.cat(phrases).argsort()]


class AdapterSharing(AdapterSwitching):
    """Adapters saved and loaded."""

    def save_adapter(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str = BUILT_IN_ADAPTER,
        dtype: torch.dtype | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
    ) -> None:
        """
        Save adapters and head as PEFT does, with the code and a configuration that says where the frozen backbones are
        to be had. [`from_pretrained`], `AutoModel` and [`~peft.PeftModel.from_pretrained`] load the folder.

        Args:
            save_directory (`str` or `os.PathLike`): folder to save to.
            adapter_name (`str`, *optional*, defaults to `"default"`): which of the model's adapters.
            dtype (`torch.dtype`, *optional*): what to save in, such as `torch.bfloat16` for half the size.
            push_to_hub (`bool`, *optional*, defaults to `False`): whether to upload the folder.
            repo_id (`str`, *optional*): the repository on the Hub that it is meant for.

        Raises:
            ValueError: if there is no such adapter, the backbones have been trained too, or lie in that folder, or a
                tensor holds NaN or infinity.
        """
        self._check_known([adapter_name])
        self.check_adapter_target(save_directory)
        if self.peft_config[adapter_name].peft_type != PeftMethod.DETRIS:
            raise ValueError(
                f"{adapter_name!r} is of type {self.peft_config[adapter_name].peft_type}: save it by PeftModel."
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
        tensors = self.get_adapter_state_dict(adapter_name)
        if dtype is not None:
            tensors = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
            }
        with errors_begin_with("The adapters cannot be saved"):
            check_finite(tensors)
        adapter_config = copy.copy(self.peft_config[adapter_name])
        adapter_config.modules_to_save = list(HEAD_MODULES)
        adapter_config.base_model_name_or_path = repo_id  # where AutoModel looks for configuration and code
        self._enter_auto_map()
        config = self._config_with_adapter(adapter_config, repo_id)

        with replacing_files(Path(save_directory), [name.format("") for name in WEIGHT_PATTERNS]) as folder:
            save_file(
                {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
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
        """Refuse the folder of the backbones with a `ValueError`: adapters saved there would replace them."""
        for source in (self.config.vision_backbone, self.config.text_backbone, self.name_or_path):
            if source and os.path.realpath(source) == os.path.realpath(save_directory):
                if find_adapter_config_file(source) is None:  # adapters of its own may be saved over
                    raise ValueError(f"{save_directory} holds the backbones: save the adapters to another folder.")

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Return the tensors of an adapter and its head, by the names that PEFT saves them under.

        Args:
            adapter_name (`str`, *optional*): which of the model's adapters; by default the active one.
            state_dict (`dict`, *optional*): the model's, if it was gathered from several devices.
        """
        adapter_name = adapter_name or self.active_adapters()[0]
        state_dict = self.state_dict() if state_dict is None else state_dict
        tensors = get_peft_model_state_dict(self, state_dict=state_dict, adapter_name=adapter_name)
        for part in HEAD_MODULES:
            module, prefix = getattr(self, part), f"{part}."
            if isinstance(module, ModulesToSaveWrapper):
                if adapter_name in module.modules_to_save:
                    continue  # PEFT has taken it already
                prefix += "original_module."
            tensors |= {
                f"{part}.{name.removeprefix(prefix)}": tensor
                for name, tensor in state_dict.items()
                if name.startswith(prefix)
            }
        return tensors

    def _config_with_adapter(self, adapter_config: DetrisAdapterConfig, repo_id: str | None) -> DetrisConfig:
        """The model's configuration as if these adapters were its own, and where its backbones are to be had."""
        config = copy.deepcopy(self.config)
        for name in ADAPTER_FIELDS:
            setattr(config, name, getattr(adapter_config, name))
        for name in ("vision_backbone", "text_backbone"):
            if getattr(config, name) is None and self.name_or_path:
                # Those of a whole DETRIS, such as one converted from the official layout.
                setattr(config, name, place_of(self.name_or_path))
            if repo_id is not None and os.path.exists(getattr(config, name) or ""):
                logger.warning(
                    f"{name} is {getattr(config, name)}, which others do not have, so it is left out: who loads the "
                    f"adapters must give {name}=, unless you put it on the Hub and build the model from there."
                )
                setattr(config, name, None)
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        Load as [`PreTrainedModel.from_pretrained`] does, but refuse weights that do not fit the configuration.

        What [`save_adapter`] has saved is loaded around its backbones: those it names, or other copies of them that
        `vision_backbone` and `text_backbone` name.

        Raises:
            OSError: if a folder or Hub id cannot be read.
            ValueError: if weights are missing or left over, which transformers would start at random or drop, or if
                adapters were trained in other backbones.
        """
        source = pretrained_model_name_or_path
        require_folder(source)
        if kwargs.get("subfolder") and source is not None:
            require_folder(os.path.join(source, kwargs["subfolder"]))
        # Given a folder of adapters without a config.json, AutoModel loads the model that their adapter_config.json
        # names, and hands on the folder here.
        adapter_kwargs = kwargs.pop("adapter_kwargs", None) or {}
        adapter = adapter_kwargs.pop("_adapter_model_path", None)
        hub_kwargs = {name: kwargs[name] for name in (*HUB_KWARGS, "subfolder") if name in kwargs}
        if adapter is not None and os.fspath(adapter) != os.fspath(source):
            model = cls.from_pretrained(source, *args, **kwargs)
            model.delete_adapter(BUILT_IN_ADAPTER)
            model.load_adapter(adapter, is_trainable=True, adapter_kwargs=adapter_kwargs)
        elif source is not None and find_adapter_config_file(source, **hub_kwargs) is not None:
            model = cls._from_adapter(source, hub_kwargs, kwargs)
        else:
            model = super().from_pretrained(source, *args, **kwargs)
        nothing = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, nothing) if output_loading_info else model

    @classmethod
    def _from_adapter(cls, source: str, hub_kwargs: dict, kwargs: dict) -> Self:
        for part in ("vision", "text"):
            if f"{part}_backbone" in kwargs:  # the revision is that of another repository
                kwargs.setdefault(f"{part}_backbone_revision", None)
        # AutoModel hands on a configuration that has been changed already.
        changed = [name for name in (*ADAPTER_FIELDS, "vision_config", "text_config") if name in kwargs]
        given = kwargs.get("config") if isinstance(kwargs.get("config"), PreTrainedConfig) else None
        config = cls._read_config(source, hub_kwargs, kwargs)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        device, attention = kwargs.pop("device_map", None), kwargs.pop("attn_implementation", None)
        quantization_config = kwargs.pop("quantization_config", None)
        refuse_several_devices(device)
        device = next(iter(device.values())) if isinstance(device, dict) else device
        if device in ("auto", "balanced", "balanced_low_0", "sequential"):
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        unknown = kwargs.keys() - {*HUB_KWARGS, "subfolder", *HINTS}
        if unknown:
            raise TypeError(
                f"from_pretrained takes no {', '.join(sorted(unknown))} for {source}, which holds adapters: leave it "
                "out, or load a whole model."
            )
        for part in ("vision", "text"):
            if getattr(config, f"{part}_backbone") == os.fspath(source):
                raise ValueError(f"{source} holds adapters and names itself as its {part} backbone: get it anew.")
            if getattr(config, f"{part}_backbone") is None:
                raise ValueError(
                    f"{source} holds adapters and does not say which {part} backbone they were trained in: give "
                    f"{part}_backbone=, a Hub id or folder."
                )
        try:
            vision_model, text_model = cls._read_backbones(
                config.vision_backbone,
                config.text_backbone,
                config.vision_backbone_revision,
                config.text_backbone_revision,
                quantization_config,
                # A revision or subfolder is that of the adapters.
                **{name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")},
            )
        except OSError as error:
            raise OSError(
                f"The backbones of {source}, {config.vision_backbone} and {config.text_backbone}, cannot be read: if "
                f"they lie elsewhere, give vision_backbone= and text_backbone=. ({' '.join(str(error).split())})"
            ) from error
        with errors_begin_with(source):
            config = cls.config_class(**config.to_dict() | cls._backbone_configs(vision_model, text_model))
            # Before memory is taken for what the configurations say.
            adapter_config = cls._read_adapter_config(source, hub_kwargs)
            if given is not None:
                own = fields_of(adapter_config, ADAPTER_FIELDS)
                changed += [name for name, value in fields_of(given, ADAPTER_FIELDS).items() if value != own[name]]
            if changed:
                raise ValueError(
                    f"{', '.join(changed)} cannot be changed on loading: the adapters have been trained with what "
                    "their adapter_config.json says."
                )
            config = adapter_config.check_fields(config)
            adapter_config.check_saved_shapes(cls, config)
        model = cls(config, vision_model, text_model)
        model.name_or_path = os.fspath(source)
        model.load_adapter(source, is_trainable=True, **hub_kwargs)
        if attention is not None:
            model.set_attn_implementation(attention)
        model = model.to(dtype or torch.float32).eval()
        model.config.dtype = model.dtype
        return model if device is None else model.to(device)

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike,
        adapter_name: str = BUILT_IN_ADAPTER,
        is_trainable: bool = False,
        adapter_kwargs: dict | None = None,
        hotswap: bool | str = "auto",
        low_cpu_mem_usage: bool = False,
        **kwargs,
    ) -> None:
        """
        Load adapters and head that [`save_adapter`] or PEFT has saved, and activate them. Of an adapter that the model
        has already, the tensors are replaced.

        Args:
            peft_model_id (`str` or `os.PathLike`): folder or Hub id.
            adapter_name (`str`, *optional*, defaults to `"default"`): what to call it here.
            is_trainable (`bool`, *optional*, defaults to `False`): whether a new adapter is to be trained.
            adapter_kwargs, kwargs: `revision`, `token` and so on for the Hub.
            hotswap (`bool` or `"auto"`, *optional*): `True` asks for an adapter of that name to be replaced, `False`
                for a new name; by default both are fine.
            low_cpu_mem_usage (`bool`, *optional*): a hint of transformers, which nothing depends on here.

        Raises:
            OSError: if a file is missing or damaged.
            TypeError: if there are other arguments.
            ValueError: if the adapters do not fit the model, its backbones or the adapter that they replace; the model
                stays as it was.
        """
        hub_kwargs = kwargs | (adapter_kwargs or {})
        unknown = hub_kwargs.keys() - {*HUB_KWARGS, "subfolder"}
        if unknown:
            raise TypeError(f"load_adapter takes no {', '.join(sorted(unknown))}: leave it out.")
        present, active = self.peft_config.get(adapter_name), self.active_adapters()
        if hotswap != "auto" and bool(hotswap) != (present is not None):
            there = "already has" if present else "does not have"
            raise ValueError(f"hotswap is {hotswap}, but the model {there} an adapter {adapter_name!r}.")
        require_folder(peft_model_id)
        adapter_config = self._read_adapter_config(peft_model_id, hub_kwargs)
        # Never PEFT's older, pickled file.
        tensors = load_file(cached_file(peft_model_id, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs))
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        try:
            check_finite(tensors)
            adapter_config.modules_to_save = list(HEAD_MODULES)  # or they would replace the model's own head
            if present is None:
                self._check_new_name(adapter_name, tensors)
                adapter_config.inference_mode = not is_trainable
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # as is meant
                    inject_adapter_in_model(adapter_config, self, adapter_name)
            else:
                adapter_config.check_model(self)
                self._check_same_adapters(present, adapter_config)
                adapter_config.check_saved_shapes(type(self), self.config)
        except Exception as error:
            if present is None:
                discard_adapters(self, [adapter_name], active)
            with errors_begin_with(peft_model_id), as_value_error("its adapters cannot be added"):
                raise error
        set_peft_model_state_dict(self, tensors, adapter_name)
        self.train(self.training)  # new modules start in training mode
        self.enable_adapters()
        activate_adapters(self, [adapter_name], frozen=self.peft_config[adapter_name].inference_mode)

    @staticmethod
    def _read_adapter_config(source: str | os.PathLike, hub_kwargs: dict) -> DetrisAdapterConfig:
        config = DetrisAdapterConfig.from_pretrained(source, **hub_kwargs)
        if config.peft_type != PeftMethod.DETRIS:
            raise ValueError(f"{source} holds adapters of type {config.peft_type}: load them by PeftModel.")
        return config

    @staticmethod
    def _check_same_adapters(present: DetrisAdapterConfig, loaded: DetrisAdapterConfig) -> None:
        for name in ADAPTER_FIELDS:
            old, new = getattr(present, name), getattr(loaded, name)
            if old != new and not name.endswith("dropout"):
                raise ValueError(
                    f"its adapters have {name} {new}, those of the model that they would replace {old}: load them "
                    "under another adapter_name."
                )
