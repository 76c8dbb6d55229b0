"""The backbones' layers with adapters inside: each wraps a layer of DINOv2 or CLIP and computes it with its adapter.

Source: DETRIS, arXiv 2501.08580, section 3; official files `model/clip.py` (`ResidualAttentionBlock`) and
`model/dinov2/layers/block.py` (`Block`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

try:
    from .adapters_detris import DenseAligner, TextAdapter
except ImportError:
    if __package__:
        raise
    from adapters_detris import DenseAligner, TextAdapter

CANNOT_BE_MERGED = "DETRIS adapters are not linear, so they cannot be merged into their layers: keep them apart."


class DetrisAdapterLayer(GradientCheckpointingLayer, BaseTunerLayer):
    """Wraps a backbone layer, holds adapters by name and applies the active one.

    Gradient checkpointing acts on this layer, not on the one inside, so that the activations of adapters are not kept
    in memory either.
    """

    # PEFT looks in these attributes for the modules of an adapter and for its other values, by the adapter's name.
    adapter_layer_names = ("detris_adapter",)
    other_param_names = ("scale",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.detris_adapter = nn.ModuleDict()
        self.scale = {}

    def make_adapter(self, config: PeftConfig, model_config: PreTrainedConfig) -> nn.Module:
        """Build an adapter that fits the layer."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: PeftConfig, model_config: PreTrainedConfig) -> None:
        """Add an adapter, in the precision and on the device of the layer."""
        weight = next(parameter for parameter in self.base_layer.parameters() if parameter.is_floating_point())
        adapter = self.make_adapter(config, model_config).to(weight.dtype)
        # With low_cpu_mem_usage, PEFT builds adapters on the meta device and fills them later.
        if not any(parameter.is_meta for parameter in adapter.parameters()):
            adapter = adapter.to(weight.device)
        self.detris_adapter[adapter_name] = adapter
        self.scale[adapter_name] = config.adapter_scale
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def active_name(self) -> str | None:
        """The name of the adapter that takes part; `None` if none does."""
        names = [name for name in self.active_adapters if name in self.detris_adapter]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(f"DETRIS adapters cannot be added up: activate one of {names} with set_adapter.")
        return names[0]

    def _adapt(self, adapter_name: str, *args: torch.Tensor | None) -> torch.Tensor:
        # Checkpointing computes the layer again during the backward pass. By then the batch norms have counted this
        # batch; counting it twice would make the running statistics differ from those of a run without checkpointing.
        recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        with _running_statistics_kept(self) if recomputing else nullcontext():
            return self.detris_adapter[adapter_name](*args)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT calls this to merge adapters into the layer, which is not possible."""
        raise ValueError(CANNOT_BE_MERGED)


class TextAdapterLayer(DetrisAdapterLayer):
    """CLIP encoder layer with a text adapter; `(N, L, C)` to `(N, L, C)`."""

    def make_adapter(self, config: PeftConfig, model_config: PreTrainedConfig) -> nn.Module:
        return TextAdapter(self.get_base_layer().embed_dim, config.text_adapter_dim)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapter_name, layer = self.active_name, self.base_layer
        if adapter_name is None:
            return layer(hidden_states, *args, **kwargs)
        attention_output, _ = layer.self_attn(layer.layer_norm1(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + attention_output
        # The adapter reads the residual stream, not its norm (official `ResidualAttentionBlock.forward`).
        adapted = self._adapt(adapter_name, hidden_states)
        hidden_states = hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
        return torch.add(hidden_states, adapted, alpha=self.scale[adapter_name])


class VisionAdapterLayer(DetrisAdapterLayer):
    """DINOv2 layer with a dense aligner; `(N, P, D)` and words `(N, L, C)` to `(N, P, D)`.

    The first one of the model may get the images themselves, `(B, P, D)`, and `image_index` `(N,)`, the image of each
    phrase. It then computes attention and MLP once for each image; in evaluation also what its adapter does before it
    reads the words.
    """

    def make_adapter(self, config: PeftConfig, model_config: PreTrainedConfig) -> nn.Module:
        return DenseAligner(
            hidden_size=self.get_base_layer().norm1.normalized_shape[0],
            dim=config.vision_adapter_dim,
            text_hidden_size=model_config.text_config.hidden_size,
            prefix_length=model_config.prefix_length,
            attention_dim=config.aligner_attention_dim,
            attention_heads=config.aligner_attention_heads,
            dropout=config.aligner_dropout,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        text_hidden_states: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        adapter_name, layer = self.active_name, self.base_layer
        if adapter_name is None:
            return layer(hidden_states)
        attention_output, _ = layer.attention(layer.norm1(hidden_states))
        hidden_states = hidden_states + layer.drop_path(layer.layer_scale1(attention_output))
        normed = layer.norm2(hidden_states)
        mlp_output = layer.mlp(normed)
        adapted = self._adapt(adapter_name, normed, text_hidden_states, image_index)
        if image_index is not None:
            # Not by `[image_index]`: compilers expect other strides of it than it has if there is one image.
            hidden_states, mlp_output = (
                hidden_states.index_select(0, image_index),
                mlp_output.index_select(0, image_index),
            )
        added = torch.add(mlp_output, adapted, alpha=self.scale[adapter_name])
        return hidden_states + layer.drop_path(layer.layer_scale2(added))


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let the batch norms of `module` normalise by the batch without counting it."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        # Not `track_running_stats = False`: the layer would then save fewer tensors for the backward pass than when it
        # was computed first, and non-reentrant checkpointing compares their number.
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def holds_adapters(module: nn.Module) -> bool:
    """Whether `module` is a `DetrisAdapterLayer`, of this file or of another copy of it.

    With `trust_remote_code`, each repository on the Hub brings a copy of this file. PEFT knows the copy that was
    imported last, which need not be the copy that built the model.
    """
    return hasattr(module, "detris_adapter")
