"""Hidden states and attention weights, recorded while the model runs, for those who ask for them.

Forward hooks record them. The hooks exist only during the calls that ask, so all other calls run as if this file did
not exist. transformers' own recording (`_can_record_outputs`) cannot do this: a backbone would record the layers
inside its adapter layers, which do not run as a whole when an adapter is active.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

try:
    from .adapter_layers_detris import holds_adapters
    from .adapters_detris import BatchFirstAttention
except ImportError:
    if __package__:
        raise
    from adapter_layers_detris import holds_adapters
    from adapters_detris import BatchFirstAttention

# What is recorded in this thread. Hooks of another thread, which may use the same model, see their own.
_recorded_here: ContextVar[dict[str, list[torch.Tensor]] | None] = ContextVar("_recorded_here", default=None)


def wanted_outputs(
    model: PreTrainedModel, output_hidden_states: bool | None, output_attentions: bool | None
) -> tuple[bool, bool]:
    """Tell whether hidden states and attentions are wanted; by default the model's configuration says so.

    Raises:
        ValueError: if attentions are wanted of backbones whose attention does not return its weights, or if an
            argument is neither True nor False.
    """
    wanted = []
    for name, given in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
        if given is not None and not isinstance(given, bool):
            raise ValueError(f"{name} is {given!r}: give True for those of all layers, or False.")
        wanted.append(bool(getattr(model.config, name) if given is None else given))
    if wanted[1]:
        for part, backbone in (("vision", model.vision_model), ("text", model.text_model)):
            attention = backbone.config._attn_implementation
            if attention != "eager":
                raise ValueError(
                    f"output_attentions is True, but {attention} attention, which the {part} backbone uses, returns "
                    'no weights: load the model with attn_implementation="eager", or call '
                    'model.set_attn_implementation("eager").'
                )
    return wanted[0], wanted[1]


@torch.compiler.disable  # hooks that come and go would break the graph at each layer
def segment_and_record(
    model: PreTrainedModel, hidden_states: bool, attentions: bool, *inputs: torch.Tensor | None
) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
    """Run `model._segment` on `inputs`, and add to what it returns the hidden states and attentions that are wanted.

    The last one of `inputs` is `image_index`. What the vision backbone computed once for all phrases of an image is
    repeated for each of them.
    """
    with _recording(model, hidden_states, attentions) as recorded:
        outputs = model._segment(*inputs)
    image_index = inputs[-1]
    if image_index is not None:
        # Besides the outputs of the shared layers, the input of the first one and the attention of the next one.
        shared = count_shared_layers(model.vision_model.encoder.layer) + 1
        for name in ("vision_attentions", "vision_hidden_states"):
            values = recorded.get(name, [])
            values[:shared] = [value[image_index] for value in values[:shared]]
    return outputs | {name: tuple(values) for name, values in recorded.items()}


def count_shared_layers(layers: nn.ModuleList) -> int:
    """Count the layers of the vision backbone in front of the first that reads words.

    They compute the same for all phrases of an image.
    """
    for index, layer in enumerate(layers):
        if holds_adapters(layer) and layer.active_name is not None:
            return index
    return len(layers)


@contextmanager
def _recording(
    model: PreTrainedModel, hidden_states: bool, attentions: bool
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record what the modules of `model` compute inside this context, in this thread."""
    text_layers, vision_layers = model.text_model.encoder.layers, model.vision_model.encoder.layer
    decoder_layers = model.decoder.layers
    recorded: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as stack:
        if hidden_states:
            _record_states(stack, recorded, "text_hidden_states", text_layers)
            _record_states(stack, recorded, "vision_hidden_states", vision_layers)
            _record_states(stack, recorded, "decoder_hidden_states", decoder_layers)
        if attentions:
            _record_weights(stack, recorded, "text_attentions", [_unwrapped(x).self_attn for x in text_layers])
            _record_weights(stack, recorded, "vision_attentions", [_unwrapped(x).attention for x in vision_layers])
            _record_weights(stack, recorded, "decoder_attentions", [x.self_attention for x in decoder_layers])
            _record_weights(stack, recorded, "cross_attentions", [x.word_attention for x in decoder_layers])
            for layer in decoder_layers:
                # Checkpointing would compute the layer again once the hooks are gone, and then by another attention.
                stack.callback(setattr, layer, "gradient_checkpointing", layer.gradient_checkpointing)
                layer.gradient_checkpointing = False
        token = _recorded_here.set(recorded)
        stack.callback(_recorded_here.reset, token)
        yield recorded


def _unwrapped(layer: nn.Module) -> nn.Module:
    return layer.base_layer if holds_adapters(layer) else layer


def _record_states(
    stack: ExitStack, recorded: dict[str, list[torch.Tensor]], name: str, layers: nn.ModuleList
) -> None:
    """Record the input of the first layer and the outputs of all, until the `stack` is closed."""
    recorded[name] = []

    def record_input(layer: nn.Module, arguments: tuple) -> None:
        if _recorded_here.get() is recorded:
            recorded[name].append(arguments[0])

    def record_output(layer: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        if _recorded_here.get() is recorded:
            recorded[name].append(output)

    stack.callback(layers[0].register_forward_pre_hook(record_input).remove)
    for layer in layers:
        stack.callback(layer.register_forward_hook(record_output).remove)


def _record_weights(
    stack: ExitStack, recorded: dict[str, list[torch.Tensor]], name: str, attentions: list[nn.Module]
) -> None:
    """Record the weights of attentions, until the `stack` is closed."""
    recorded[name] = []

    def ask_for_weights(attention: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple | None:
        if _recorded_here.get() is recorded:
            return arguments, options | {"need_weights": True}

    def record_weights(attention: nn.Module, arguments: tuple, output: Any) -> Any:
        if _recorded_here.get() is recorded:
            attended, weights = output
            recorded[name].append(weights)
            # A layer of the decoder gets what it gets without recording.
            return attended if isinstance(attention, BatchFirstAttention) else output

    for attention in attentions:
        if isinstance(attention, BatchFirstAttention):
            stack.callback(attention.register_forward_pre_hook(ask_for_weights, with_kwargs=True).remove)
        stack.callback(attention.register_forward_hook(record_weights).remove)
