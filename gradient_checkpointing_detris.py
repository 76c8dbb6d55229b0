"""Gradient checkpointing of the layers that gradients reach, and of no others: a mixin of the model.

transformers checkpoints all layers, and makes the embeddings' outputs require gradients so that reentrant
checkpointing computes any. Below the first adapter no parameter is trained, so a backward pass there, and the forward
pass that it repeats, would be for nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


class GradientCheckpointing:
    """Checkpoints what needs gradients."""

    def enable_input_require_grads(self) -> None:
        """Leave the embeddings' outputs as they are.

        transformers and PEFT call this where checkpointing is switched on; the trained layers see to it themselves.
        """

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Switch checkpointing on or off. transformers calls this."""
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer._gradient_checkpointing_func = partial(_run_layer, layer, gradient_checkpointing_func)


def _run_layer(
    layer: nn.Module, checkpoint_function: Callable, compute: Callable, hidden_states: torch.Tensor, *args: Any
) -> torch.Tensor:
    """Compute the output of `layer`, and checkpoint it if gradients reach it."""
    if not any(isinstance(value, torch.Tensor) and value.requires_grad for value in (hidden_states, *args)):
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            return compute(hidden_states, *args)
        reentrant = getattr(checkpoint_function, "keywords", {}).get("use_reentrant", True)
        if reentrant and not torch.compiler.is_compiling():
            # Reentrant checkpointing computes no gradients for a layer whose inputs need none. A compiled graph does.
            hidden_states = hidden_states.detach().requires_grad_()
    return checkpoint_function(compute, hidden_states, *args)
