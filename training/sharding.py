"""A model that FSDP2 divides among processes (`accelerate launch --use_fsdp --fsdp_version 2`, or `--fsdp`)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch.distributed.fsdp import FSDPModule

from modeling_detris import DetrisForReferringSegmentation
from peft_detris import backbone_digest


def prepare_sharding(accelerator: Accelerator, model: DetrisForReferringSegmentation) -> None:
    """Set how FSDP divides the model, before it does so.

    All weights are gathered when the model is called, and stay until the backward pass. It reads weights of modules
    that it does not call, such as those inside an adapter layer, so these cannot be gathered one by one; and processes
    that evaluate call it as often as their phrases ask for, so a later call must not wait for another process.

    Raises:
        ValueError: it is FSDP's first version, which divides weights in another way, or the model would be compiled.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version is {plugin.fsdp_version}: DETRIS is trained with version 2, so give that.")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "torch_compile gives the weights other names under FSDP, by which no checkpoint could be loaded: leave "
            "out torch_compile or FSDP."
        )
    plugin.auto_wrap_policy, plugin.reshard_after_forward = None, False
    # Half precision is left to autocast, as without FSDP: batch norms keep statistics, and so weights, in float32.
    plugin.mixed_precision_policy = None
    model.forward = accelerator.autocast()(model.forward)
    plugin.set_state_dict_type("FULL_STATE_DICT")
    for config in model.peft_config.values():  # later no process has all weights of the backbones
        config.backbone_digest = backbone_digest(model)


@contextmanager
def of_its_own_class(model: torch.nn.Module) -> Iterator[None]:
    """Give `model` its own class back for a while, because that one is saved with it. FSDP has replaced it."""
    kept = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = kept.__mro__[2]  # after FSDP's class for this model, and its class for all models
    try:
        yield
    finally:
        model.__class__ = kept
