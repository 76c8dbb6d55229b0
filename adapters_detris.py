"""The adapters of DETRIS as a PEFT method: what they compute, the layers that hold them, their config and tuner.

Source: DETRIS, arXiv 2501.08580, section 3; official files `model/adapter.py`, `model/clip.py`
(`ResidualAttentionBlock`) and `model/dinov2/layers/block.py` (`Block`).
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import peft.mapping
import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_layers import GradientCheckpointingLayer

PEFT_TYPE = "DETRIS"
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
DENSE_BLOCK_NORM_EPS = 1e-3


class ConvNormReLU(nn.Sequential):
    """Convolution that keeps the size, batch norm, ReLU.

    Shapes: `(N, in_channels, *size)` to `(N, out_channels, *size)`, with one or two spatial `dimensions`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dimensions: int = 2,
        bias: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.conv = CONVOLUTION[dimensions](
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )
        self.norm = BATCH_NORM[dimensions](out_channels, eps=eps)
        self.activation = nn.ReLU(inplace=True)


class DenseBlock(nn.Module):
    """Three densely connected convolution branches that see 1, 3 and 5 positions at a time.

    Shapes: `(N, dim, L)` to the same for text (`dimensions=1`), `(N, dim, g, g)` to the same for images.
    """

    def __init__(self, dim: int, dimensions: int):
        super().__init__()

        def conv(in_channels: int, out_channels: int, kernel_size: int) -> ConvNormReLU:
            return ConvNormReLU(
                in_channels, out_channels, kernel_size, dimensions, bias=True, eps=DENSE_BLOCK_NORM_EPS
            )

        half, quarter, bottleneck = dim // 2, dim // 4, dim // 16
        self.branch1 = conv(dim, half, 1)
        self.branch2 = nn.Sequential(conv(dim + half, bottleneck, 1), conv(bottleneck, quarter, 3))
        self.branch3 = nn.Sequential(conv(dim + half + quarter, bottleneck, 1), conv(bottleneck, quarter, 5))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first = self.branch1(hidden_states)
        second = self.branch2(torch.cat([hidden_states, first], dim=1))
        third = self.branch3(torch.cat([hidden_states, first, second], dim=1))
        return torch.cat([first, second, third], dim=1)


class TextAdapter(nn.Module):
    """Adapter of a text layer; `(N, L, C)` to `(N, L, C)`.

    Padding positions take part in its convolutions, so what it returns depends on `L` (official `TextAdapter`).
    """

    def __init__(self, hidden_size: int, dim: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, dim)
        self.dense = DenseBlock(dim, dimensions=1)
        self.up = nn.Linear(dim, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.down(hidden_states).relu()  # (N, L, d)
        start, words = hidden_states[:, :1], hidden_states[:, 1:]
        words = self.dense(words.transpose(1, 2)).transpose(1, 2)
        # The start token skips the convolutions but not the sum: it goes on doubled, as officially.
        return self.up(torch.cat([start, words], dim=1) + hidden_states)


class WordAttention(nn.Module):
    """Attention from image patches to all `L` words of their phrase, padding included (official `CrossAttention`).

    Shapes: patches `(N, g², d)` and words `(N, L, C)` to `(N, g², d)`.
    """

    def __init__(self, dim: int, text_hidden_size: int, attention_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.patch_projection = nn.Linear(dim, attention_dim)
        self.word_projection = nn.Linear(text_hidden_size, attention_dim)
        self.attention = nn.MultiheadAttention(attention_dim, num_heads, dropout=dropout, batch_first=True)
        self.output_projection = nn.Linear(attention_dim, dim)

    def forward(self, patches: torch.Tensor, text_hidden_states: torch.Tensor) -> torch.Tensor:
        query, words = self.patch_projection(patches), self.word_projection(text_hidden_states)
        return self.output_projection(self.attention(query, words, words, need_weights=False)[0])


class DenseAligner(nn.Module):
    """Adapter of a vision layer, which mixes the words into the patches; `(N, P, D)` to `(N, P, D)`.

    `P = prefix_length + g²`: class and register tokens come first and skip convolutions and attention.
    """

    def __init__(
        self,
        hidden_size: int,
        dim: int,
        text_hidden_size: int,
        prefix_length: int,
        attention_dim: int,
        attention_heads: int,
        dropout: float,
    ):
        super().__init__()
        self.prefix_length = prefix_length
        self.down = nn.Linear(hidden_size, dim)
        self.dense = DenseBlock(dim, dimensions=2)
        self.word_attention = WordAttention(dim, text_hidden_size, attention_dim, attention_heads, dropout)
        self.up = nn.Linear(dim, hidden_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, hidden_states: torch.Tensor, text_hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.down(hidden_states).relu()  # (N, P, d)
        prefix, patches = hidden_states[:, : self.prefix_length], hidden_states[:, self.prefix_length :]
        side = math.isqrt(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (N, d, g, g)
        aligned = self.dense(grid).flatten(2).transpose(1, 2) + patches
        aligned = self.word_attention(aligned, text_hidden_states)
        return self.up(torch.cat([prefix, aligned], dim=1) + hidden_states)


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let the batch norms of `module` normalise by the batch without counting it."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        # Switching `track_running_stats` off would save fewer tensors than the first pass did.
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


class DetrisAdapterLayer(GradientCheckpointingLayer, BaseTunerLayer):
    """A backbone layer with its adapters, one for each adapter name; the active one takes part.

    Checkpointing this layer, not the one it wraps, keeps the adapters' activations out of memory too.
    """

    adapter_layer_names = ("detris_adapter",)
    other_param_names = ("scale",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.detris_adapter = nn.ModuleDict()
        self.scale = {}

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.gradient_checkpointing and self.training and not hidden_states.requires_grad:
            # Reentrant checkpointing gives no gradients to a layer whose input needs none.
            hidden_states = hidden_states.detach().requires_grad_(torch.is_grad_enabled())
        return super().__call__(hidden_states, *args, **kwargs)

    def make_adapter(self, config: "DetrisAdapterConfig") -> nn.Module:
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: "DetrisAdapterConfig") -> None:
        self.detris_adapter[adapter_name] = self.make_adapter(config)
        self.scale[adapter_name] = config.scale
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _active_name(self) -> str | None:
        names = [name for name in self.active_adapters if name in self.detris_adapter]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(f"DETRIS adapters cannot be added up: activate one of {names} with set_adapter.")
        return names[0]

    def _adapt(self, adapter_name: str, *args: torch.Tensor) -> torch.Tensor:
        # Checkpointing computes the layer again while gradients flow back. The batch norms have counted this batch
        # by then, and counting it twice would make running statistics differ from those without checkpointing.
        recomputing = torch._C._current_graph_task_id() != -1
        with _running_statistics_kept(self) if recomputing else nullcontext():
            return self.scale[adapter_name] * self.detris_adapter[adapter_name](*args)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("DETRIS adapters are not linear, so they cannot be merged into their layer: keep them apart.")


class TextAdapterLayer(DetrisAdapterLayer):
    """CLIP encoder layer with a text adapter; `(N, L, C)` to `(N, L, C)`."""

    def make_adapter(self, config: "DetrisAdapterConfig") -> nn.Module:
        return TextAdapter(self.get_base_layer().embed_dim, config.text_dim)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapter_name, layer = self._active_name(), self.base_layer
        if adapter_name is None:
            return layer(hidden_states, *args, **kwargs)
        attention_output, _ = layer.self_attn(layer.layer_norm1(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + attention_output
        # The adapter reads the residual stream, not its norm (official `ResidualAttentionBlock.forward`).
        adapted = self._adapt(adapter_name, hidden_states)
        return hidden_states + layer.mlp(layer.layer_norm2(hidden_states)) + adapted


class VisionAdapterLayer(DetrisAdapterLayer):
    """DINOv2 layer with a dense aligner; `(N, P, D)` and words `(N, L, C)` to `(N, P, D)`."""

    def make_adapter(self, config: "DetrisAdapterConfig") -> nn.Module:
        return DenseAligner(
            hidden_size=self.get_base_layer().norm1.normalized_shape[0],
            dim=config.vision_dim,
            text_hidden_size=config.text_hidden_size,
            prefix_length=config.prefix_length,
            attention_dim=config.attention_dim,
            attention_heads=config.attention_heads,
            dropout=config.dropout,
        )

    def forward(self, hidden_states: torch.Tensor, text_hidden_states: torch.Tensor) -> torch.Tensor:
        adapter_name, layer = self._active_name(), self.base_layer
        if adapter_name is None:
            return layer(hidden_states)
        attention_output, _ = layer.attention(layer.norm1(hidden_states))
        hidden_states = hidden_states + layer.drop_path(layer.layer_scale1(attention_output))
        normed = layer.norm2(hidden_states)
        adapted = self._adapt(adapter_name, normed, text_hidden_states)
        return hidden_states + layer.drop_path(layer.layer_scale2(layer.mlp(normed) + adapted))


@dataclass
class DetrisAdapterConfig(PeftConfig):
    """PEFT configuration of the DETRIS adapters.

    Layers are counted from 0. `modules_to_save` names what else is trained and saved (neck, decoder, mask head).
    """

    vision_layers: list[int] = field(default_factory=list, metadata={"help": "Vision layers with a dense aligner."})
    vision_dim: int = field(default=128, metadata={"help": "Width of the dense aligners."})
    text_layers: list[int] = field(default_factory=list, metadata={"help": "Text layers with a text adapter."})
    text_dim: int = field(default=64, metadata={"help": "Width of the text adapters."})
    scale: float = field(default=0.2, metadata={"help": "Factor on what an adapter adds."})
    text_hidden_size: int = field(default=512, metadata={"help": "Width of the words that the aligners read."})
    prefix_length: int = field(default=5, metadata={"help": "Class and register tokens in front of the patches."})
    attention_dim: int = field(default=128, metadata={"help": "Width of the aligners' attention to the words."})
    attention_heads: int = field(default=8, metadata={"help": "Heads of that attention."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout on that attention's weights."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules trained and saved."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class DetrisTuner(BaseTuner):
    """Puts the adapters into the layers of `vision_model` and `text_model`; see `DetrisAdapterConfig`."""

    prefix = "detris_adapter"
    tuner_layer_cls = DetrisAdapterLayer
    target_module_mapping = {}

    def _prepare_adapter_config(self, peft_config: DetrisAdapterConfig, model_config: dict) -> DetrisAdapterConfig:
        names = [f"vision_model.encoder.layer.{layer}" for layer in peft_config.vision_layers]
        names += [f"text_model.encoder.layers.{layer}" for layer in peft_config.text_layers]
        # One expression, not a list: PEFT shortens long lists to suffixes, which would hit more layers than these.
        peft_config.target_modules = "|".join(map(re.escape, names))
        return peft_config

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for the name right before the last part of the key, but an adapter has modules of its own.
        return key.replace(f".{cls.prefix}.{adapter_name}.", f".{cls.prefix}.", 1)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key) -> None:
        if not isinstance(target, DetrisAdapterLayer):
            wrapper = VisionAdapterLayer if current_key.startswith("vision_model.") else TextAdapterLayer
            wrapped = wrapper(target)
            self._replace_module(parent, target_name, wrapped, target)
            target = wrapped
        target.update_layer(adapter_name, peft_config)


peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = DetrisAdapterConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = DetrisTuner
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = DetrisTuner.prefix
