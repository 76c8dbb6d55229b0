"""Adapters added, activated, switched off and deleted: a mixin of the model.

A model can hold several adapters, each with a head of its own, around backbones that lie in memory once. One adapter
is active at a time. `sharing_detris.py` saves and loads them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.functional import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch.utils._pytree import tree_map

try:
    from .peft_detris import (
        ADAPTER_FIELDS,
        BUILT_IN_ADAPTER,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        discard_adapters,
        fields_of,
    )
except ImportError:
    if __package__:
        raise
    from peft_detris import (
        ADAPTER_FIELDS,
        BUILT_IN_ADAPTER,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        discard_adapters,
        fields_of,
    )

NO_ADAPTER = "__base__"  # PEFT's name for the bare backbones in `adapter_names`


class AdapterSwitching:
    """Adapters added, activated, switched off and deleted."""

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configurations of the adapters, by name."""
        return self._adapter_configs

    @peft_config.setter
    def peft_config(self, configs: dict[str, PeftConfig]) -> None:
        self._adapter_configs = configs if isinstance(configs, AdapterConfigs) else AdapterConfigs(configs)

    @peft_config.deleter
    def peft_config(self) -> None:
        # PEFT deletes the attribute after it has merged or removed adapters of its own methods.
        self._adapter_configs = AdapterConfigs()

    def _insert_built_in_adapters(self) -> None:
        """Put the adapters that the model's own configuration describes into its backbones, and activate them."""
        adapter_config = DetrisAdapterConfig(**fields_of(self.config, ADAPTER_FIELDS))
        adapter_config.modules_to_save = None  # the built-in adapters use the model's own head
        inject_adapter_in_model(adapter_config, self, BUILT_IN_ADAPTER)
        self._hf_peft_config_loaded = True  # transformers reads here whether a model has adapters

    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str = BUILT_IN_ADAPTER) -> None:
        """
        Add fresh adapters, with a head of their own if `modules_to_save` says so, and activate them.

        Args:
            adapter_config (`PeftConfig`): of DETRIS; or of another method of PEFT if the model has no adapters.
            adapter_name (`str`, *optional*, defaults to `"default"`): the name of the new adapters.

        Raises:
            TypeError: if `adapter_config` is no configuration of adapters.
            ValueError: if the name is taken, or the adapters do not fit the model, which then stays as it was.
        """
        if not isinstance(adapter_config, PeftConfig):
            raise TypeError(f"adapter_config is of type {type(adapter_config).__name__}: give a PeftConfig.")
        self._check_new_name(adapter_name)
        present = dict(self.peft_config)
        try:
            self._inject(adapter_config, adapter_name)
        except Exception:
            self.peft_config = present  # PEFT enters a configuration before it checks it
            raise
        self.train(self.training)  # new modules start in training mode
        self.set_adapter(adapter_name)

    def _inject(self, adapter_config: PeftConfig, adapter_name: str) -> None:
        with warnings.catch_warnings():
            # PEFT warns that the model has adapters already, which is intended.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(adapter_config, self, adapter_name)

    def _check_new_name(self, adapter_name: str, tensors: Iterable[str] = ()) -> None:
        """Raise ValueError if the name is taken, or is a part of a tensor's name, where PEFT would mistake it."""
        parts = {part for name in (*tensors, *self.state_dict()) for part in name.split(".")}
        present = self.peft_config.get(adapter_name)
        taken = present is not None and not describes_no_adapters(present)
        if taken or adapter_name in parts | {NO_ADAPTER}:
            raise ValueError(f"adapter_name is {adapter_name!r}, which already names something: give another.")

    def enable_peft_hotswap(self, *args, **kwargs) -> None:
        """Refuse transformers' preparation for hotswapping, which is for LoRA and not needed here."""
        raise ValueError("Hotswapping needs no preparation here: load_adapter replaces an adapter of the same name.")

    def active_adapters(self) -> list[str]:
        """Return the active adapters' names. Without adapters, `["default"]`, which names the model's own head."""
        for module in self.modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                return module.active_adapters or [BUILT_IN_ADAPTER]
        return [BUILT_IN_ADAPTER]

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Activate an adapter and its head by name.

        Raises:
            ValueError: if there is no such adapter, or if several are named.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._check_known(names)
        if len(names) != 1:
            raise ValueError(f"adapter_name is {names}: adapters cannot be added up, so activate one.")
        # Not by transformers' own `set_adapter`, which fails for the built-in adapter: its head has no name.
        activate_adapters(self, names)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Delete adapters with their heads. The head of the built-in adapter stays, because it is the model's own.

        Raises:
            ValueError: if there are no such adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_known(names)
        discard_adapters(self, names, self.active_adapters())
        if BUILT_IN_ADAPTER in names:
            self.config.peft_method = "none"

    def check_adapter_names(self, adapter_names: Iterable[str]) -> None:
        """Raise ValueError if a phrase cannot be segmented with one of these, as `adapter_names` of [`forward`]."""
        self._check_known(set(adapter_names) - {NO_ADAPTER})

    def _check_known(self, adapter_names: Iterable[str]) -> None:
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"There are no adapters {unknown}: the model has {list(self.peft_config)}.")

    def enable_adapters(self) -> None:
        """Undo [`disable_adapters`]; transformers' own method would leave heads switched off."""
        self._switch_adapters(True)

    def disable_adapters(self) -> None:
        """Compute with the bare backbones and the model's own head until [`enable_adapters`] is called."""
        self._switch_adapters(False)

    def _switch_adapters(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                module.enable_adapters(enabled)

    def _segment_by_adapter(
        self,
        segment: Callable[..., dict[str, Any]],
        adapter_names: list[str],
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        padding: torch.Tensor,
        image_index: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Let `segment`, which takes the other arguments, segment each phrase with the adapter named for it."""
        if self.training:
            raise ValueError("adapter_names are for evaluation: call model.eval(), or train one adapter at a time.")
        if isinstance(adapter_names, str) or len(adapter_names) != len(input_ids):
            raise ValueError(
                f"There are {len(adapter_names)} adapter_names for {len(input_ids)} phrases: give one each."
            )
        self.check_adapter_names(adapter_names)
        if image_index is None:
            image_index = torch.arange(len(input_ids), device=input_ids.device)
        phrases, outputs = [], []
        for name in dict.fromkeys(adapter_names):
            positions = [n for n, other in enumerate(adapter_names) if other == name]
            chosen = torch.tensor(positions, device=input_ids.device)
            images, index = image_index[chosen].unique(return_inverse=True)
            with self._activated(name):
                outputs.append(segment(pixel_values[images], input_ids[chosen], padding[chosen], index))
            phrases.append(chosen)
        order = torch.cat(phrases).argsort()
        return tree_map(lambda *parts: torch.cat(parts)[order], *outputs)

    @contextmanager
    def _activated(self, adapter_name: str) -> Iterator[None]:
        """Compute with another adapter, or with none for `__base__`; afterwards all is as it was."""
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


class AdapterConfigs(dict):
    """The configurations of a model's adapters, by name. PEFT writes that of each adapter it adds into this dict.

    Assigning raises ValueError if adapters of DETRIS and of another method of PEFT would stand side by side. PEFT
    would train both and save only its own.
    """

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        for other in self.values():
            if other.peft_type != config.peft_type and not describes_no_adapters(other):
                old, new = other.peft_type.value, config.peft_type.value
                raise ValueError(
                    f"The model has adapters of type {old}, so none of type {new} can be added: build it with "
                    "peft_method='detris+lora' to train both, or delete_adapter first."
                )
        super().__setitem__(name, config)

    def update(self, configs: dict[str, PeftConfig]) -> None:
        for name, config in configs.items():
            self[name] = config


def describes_no_adapters(config: PeftConfig) -> bool:
    """Whether a configuration describes neither adapters nor a head: only the model's own head is trained."""
    return config.peft_type == PeftMethod.DETRIS and config.peft_method == "none" and not config.modules_to_save
