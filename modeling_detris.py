"""DETRIS for referring image segmentation: from images and phrases to one mask logit map a phrase.

Source: DETRIS, arXiv 2501.08580; official files `model/segmenter.py`, `model/fusion.py` and `model/layers.py`.

Shapes: `B` images, `N` phrases, `L` tokens a phrase, `g = image_size / patch_size`, `P = 1 + R + g²` vision tokens
with `R` registers, `D` vision width, `C` text width, `S` width of the sentence embedding, `d` decoder width.
"""

import copy
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    ModelOutput,
    cached_file,
    find_adapter_config_file,
    logging,
)
from transformers.utils.hub import resolve_revision
from transformers.utils.quantization_config import QuantizationConfigMixin

try:
    from .adapters_detris import (
        ADAPTER_FIELDS,
        ADAPTER_PARAMETER,
        BACKBONE_MODULES,
        HEAD_MODULES,
        HUB_KWARGS,
        WEIGHT_FILES,
        AdapterConfigs,
        BatchFirstAttention,
        ConvNormReLU,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        check_finite,
        check_shapes,
        discard_adapters,
        fields_of,
        holds_adapters,
        is_bare,
        remove_adapters,
        saved_shapes,
        shapes_of,
        skeleton,
    )
    from .configuration_detris import DetrisConfig, as_value_error, check_count, check_values, errors_begin_with
except ImportError:
    if __package__:
        raise
    from adapters_detris import (
        ADAPTER_FIELDS,
        ADAPTER_PARAMETER,
        BACKBONE_MODULES,
        HEAD_MODULES,
        HUB_KWARGS,
        WEIGHT_FILES,
        AdapterConfigs,
        BatchFirstAttention,
        ConvNormReLU,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        check_finite,
        check_shapes,
        discard_adapters,
        fields_of,
        holds_adapters,
        is_bare,
        remove_adapters,
        saved_shapes,
        shapes_of,
        skeleton,
    )
    from configuration_detris import DetrisConfig, as_value_error, check_count, check_values, errors_begin_with


# Added to the new grid's side when positions are resampled, against rounding (official `interpolate_pos_encoding`).
POSITION_GRID_OFFSET = 0.1
SINE_POSITION_BASE = 10000.0
PHRASE_KERNEL_SIZE = 3
BUILT_IN_ADAPTER = "default"  # PEFT's name for a model's first adapter
NO_ADAPTER = "__base__"  # PEFT's name for the bare backbones in `adapter_names`
BACKBONE_SOURCES = (
    "vision_backbone",
    "vision_backbone_revision",
    "text_backbone",
    "text_backbone_revision",
)
# What else `from_pretrained` takes for adapters without a backbone of their own: hints, and what `AutoModel` hands on.
HINTS = ("low_cpu_mem_usage", "trust_remote_code", "use_safetensors", "weights_only", "_commit_hash", "_from_auto")
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

logger = logging.get_logger(__name__)


@dataclass
class DetrisOutput(ModelOutput):
    """
    Output of [`DetrisForReferringSegmentation`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            Mean binary cross-entropy over all pixels of the logits.
        logits (`torch.FloatTensor` of shape `(N, 4g, 4g)`):
            Mask logits, one map a phrase, over the square input image.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


def resample_position_table(position_embeddings: torch.Tensor, grid_size: int) -> torch.Tensor:
    """
    Resample DINOv2's position table as the official `interpolate_pos_encoding` does: bicubic, without antialias, and
    with a scale factor of `(grid_size + 0.1) / old grid size`.

    Args:
        position_embeddings (`torch.Tensor` of shape `(1, 1 + old_grid_size², D)`): the table, class token first.
        grid_size (`int`): patches along one side of the new table.

    Returns:
        `torch.Tensor` of shape `(1, 1 + grid_size², D)`.
    """
    class_position, patch_positions = position_embeddings[:, :1], position_embeddings[:, 1:]
    old_grid_size = math.isqrt(patch_positions.shape[1])
    if old_grid_size == grid_size:
        return position_embeddings
    grid = patch_positions.transpose(1, 2).unflatten(2, (old_grid_size, old_grid_size))  # (1, D, g', g')
    scale_factor = (grid_size + POSITION_GRID_OFFSET) / old_grid_size
    grid = F.interpolate(
        grid.float(), scale_factor=(scale_factor, scale_factor), mode="bicubic", recompute_scale_factor=False
    )
    return torch.cat([class_position, grid.flatten(2).transpose(1, 2).to(class_position.dtype)], dim=1)


def _align(model: nn.Module) -> nn.Module:
    # Loaded tensors lie where they lie in the file, unaligned, so that matrix products round otherwise than with those
    # of the model that was saved.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _sine_positions(length: int, dim: int, device: torch.device) -> torch.Tensor:
    """Sine and cosine positions in alternate channels, `(length, dim)` (official `Decoder.pos1d`)."""
    frequencies = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(SINE_POSITION_BASE) / dim))
    angles = torch.arange(length, device=device)[:, None] * frequencies  # (length, dim / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _sine_positions_2d(grid_size: int, dim: int, device: torch.device) -> torch.Tensor:
    """Half the channels tell the column, half the row: `(grid_size², dim)` (official `Decoder.pos2d`)."""
    positions = _sine_positions(grid_size, dim // 2, device)  # (g, d / 2)
    columns = positions[None].expand(grid_size, -1, -1)
    rows = positions[:, None].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


def _are_masks(labels: torch.Tensor) -> torch.Tensor:
    """Whether all numbers lie in [0, 1], as a tensor of shape `()`, so that nobody must wait for a GPU."""
    return ((labels >= 0) & (labels <= 1)).all()


def _commit_of(source: str, revision: str | None) -> str | None:
    """The commit that a Hub id stands for at the moment."""
    if os.path.exists(source):
        return None
    return getattr(resolve_revision(source, revision), "resolved", revision)


def _place_of(source: str | os.PathLike) -> str:
    return os.path.abspath(source) if os.path.exists(source) else os.fspath(source)


def _require_folder(source: str | os.PathLike | None) -> None:
    """Refuse a file with a ValueError, and a folder with pipes or devices, which would be waited for, with OSError."""
    if source is None or not os.path.exists(source):
        return  # None, or a Hub id
    if not os.path.isdir(source):
        raise ValueError(
            f"{source} is a file: give a folder or a Hub id. A checkpoint of the official code is converted first, by "
            f"`python convert_detris_checkpoint.py {source} <folder>`."
        )
    for entry in os.scandir(source):
        if not (entry.is_file() or entry.is_dir()):
            raise OSError(f"{entry.path} is neither a file nor a folder: save or download {source} again.")


@contextmanager
def _saving(folder: Path, replaced: Iterable[str]) -> Iterator[Path]:
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


def _refuse_several_devices(device_map: Any) -> None:
    """Refuse with a ValueError to divide a model: what its parts share is on one device."""
    devices = sorted(set(map(str, device_map.values()))) if isinstance(device_map, dict) else [str(device_map)]
    if len(devices) > 1 or not {"disk", "meta"}.isdisjoint(devices):
        raise ValueError(
            f"device_map puts parts of the model on {devices}: DETRIS runs on one device, so name that, as "
            "device_map='cuda:0' does."
        )


class _TextTower(CLIPTextModelWithProjection):
    """CLIP's text half, read from a whole CLIP without a list of all that is left there."""

    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", "^logit_scale$"]


# By model type: the classes of a backbone's configuration and model.
BACKBONE_CLASSES = {
    "vision": {
        "dinov2": (Dinov2Config, Dinov2Model),
        "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    },
    "text": {"clip": (CLIPTextConfig, _TextTower), "clip_text_model": (CLIPTextConfig, _TextTower)},
}


class _GateLinear(nn.Linear):
    """Square linear layer that starts as those inside `nn.MultiheadAttention` do: uniform within `bound`, no bias."""

    def __init__(self, dim: int, bound: float):
        self.bound = bound
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -self.bound, self.bound)
        nn.init.zeros_(self.bias)


class DetrisSentenceGate(nn.Module):
    """Factor on a feature map that the sentence sets; `(N, d)` to `(N, d, 1, 1)`.

    Officially an attention of the map to the sentence (`CrossAttn`). With one key its softmax is 1 everywhere, so
    query and key weights have no effect and are left out.
    """

    def __init__(self, config: DetrisConfig):
        super().__init__()
        # Officially one matrix holds query, key and value, and Xavier's bound is that of all three.
        self.value = _GateLinear(config.decoder_dim, bound=math.sqrt(6 / (4 * config.decoder_dim)))
        self.output = _GateLinear(config.decoder_dim, bound=math.sqrt(1 / config.decoder_dim))

    def forward(self, sentence: torch.Tensor) -> torch.Tensor:
        return self.output(self.value(sentence))[:, :, None, None]


class DetrisNeck(nn.Module):
    """Fuses the vision backbone's feature maps under the sentence (official `Neck`)."""

    def __init__(self, config: DetrisConfig):
        super().__init__()
        dim, maps = config.decoder_dim, len(config.feature_layers) + 1
        self.sentence_projection = nn.Linear(config.text_config.projection_dim, dim)
        self.map_projections = nn.ModuleList(
            ConvNormReLU(config.vision_config.hidden_size, dim, kernel_size=1) for _ in range(maps)
        )
        self.gates = nn.ModuleList(DetrisSentenceGate(config) for _ in range(maps))
        self.aggregation = ConvNormReLU(maps * dim, dim, kernel_size=1)
        self.coordinate_convolutions = nn.Sequential(
            ConvNormReLU(dim + 2, dim, kernel_size=3), ConvNormReLU(dim, dim, kernel_size=3)
        )

    def forward(self, feature_maps: list[torch.Tensor], sentence: torch.Tensor) -> torch.Tensor:
        """Feature maps `(N, D, g, g)` and sentence `(N, S)` to `(N, d, g, g)`."""
        sentence = self.sentence_projection(sentence)  # (N, d)
        gated = [
            projection(feature_map) * gate(sentence)
            for projection, gate, feature_map in zip(self.map_projections, self.gates, feature_maps, strict=True)
        ]
        fused = self.aggregation(torch.cat(gated, dim=1))  # (N, d, g, g)
        count, _, height, width = fused.shape
        rows = torch.linspace(-1, 1, height, device=fused.device, dtype=fused.dtype)
        columns = torch.linspace(-1, 1, width, device=fused.device, dtype=fused.dtype)
        rows, columns = torch.meshgrid(rows, columns, indexing="ij")
        coordinates = torch.stack([columns, rows]).expand(count, -1, -1, -1)  # (N, 2, g, g)
        return fused + self.coordinate_convolutions(torch.cat([fused, coordinates], dim=1))


class DetrisDecoderLayer(nn.Module):
    """Pre-norm transformer layer from patches to words that norms attentions once more (official `DecoderLayer`)."""

    def __init__(self, config: DetrisConfig):
        super().__init__()
        dim, words_dim, ffn_dim = config.decoder_dim, config.text_config.hidden_size, config.decoder_ffn_dim
        attention = {"num_heads": config.decoder_heads, "dropout": config.decoder_dropout}
        self.self_attention_norm = nn.LayerNorm(dim)
        self.self_attention = BatchFirstAttention(dim, **attention)
        self.self_attention_output_norm = nn.LayerNorm(dim)
        self.word_attention_norm = nn.LayerNorm(dim)
        self.word_attention = BatchFirstAttention(dim, kdim=words_dim, vdim=words_dim, **attention)
        self.word_attention_output_norm = nn.LayerNorm(dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, ffn_dim),
            nn.ReLU(),
            nn.Dropout(config.decoder_dropout),
            nn.LayerNorm(ffn_dim),
            nn.Linear(ffn_dim, dim),
        )
        self.dropout = nn.Dropout(config.decoder_dropout)

    def forward(
        self,
        patches: torch.Tensor,
        words: torch.Tensor,
        patch_positions: torch.Tensor,
        word_positions: torch.Tensor,
        padding: torch.Tensor,
    ) -> torch.Tensor:
        """Patches `(N, g², d)`, words `(N, L, C)` and where they are padding `(N, L)` to patches `(N, g², d)`."""
        normed = self.self_attention_norm(patches)
        query = normed + patch_positions
        attended = self.self_attention(query, query, normed)
        patches = patches + self.dropout(self.self_attention_output_norm(attended))
        query = self.word_attention_norm(patches) + patch_positions
        attended = self.word_attention(query, words + word_positions, words, padding)
        patches = patches + self.dropout(self.word_attention_output_norm(attended))
        return patches + self.dropout(self.feed_forward(self.feed_forward_norm(patches)))


class DetrisDecoder(nn.Module):
    """Lets the patches read each other and the words (official `Decoder`)."""

    def __init__(self, config: DetrisConfig):
        super().__init__()
        self.layers = nn.ModuleList(DetrisDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.decoder_dim)

    def forward(self, feature_map: torch.Tensor, words: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """Feature map `(N, d, g, g)`, words `(N, L, C)` and padding `(N, L)` to a feature map `(N, d, g, g)`."""
        dim, grid_size = feature_map.shape[1], feature_map.shape[2]
        patches = feature_map.flatten(2).transpose(1, 2)  # (N, g², d)
        patch_positions = _sine_positions_2d(grid_size, dim, patches.device).to(patches.dtype)
        word_positions = _sine_positions(words.shape[1], words.shape[2], words.device).to(words.dtype)
        for layer in self.layers:
            patches = layer(patches, words, patch_positions, word_positions, padding)
        return self.norm(patches).transpose(1, 2).unflatten(2, (grid_size, grid_size))


class DetrisMaskHead(nn.Module):
    """Enlarges the feature map fourfold and convolves it with the sentence's own kernel (official `Projector`)."""

    def __init__(self, config: DetrisConfig):
        super().__init__()
        dim, half = config.decoder_dim, config.decoder_dim // 2
        self.convolutions = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            ConvNormReLU(dim, dim, kernel_size=3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            ConvNormReLU(dim, half, kernel_size=3),
        )
        self.output_projection = nn.Conv2d(half, half, kernel_size=1)
        self.kernel_projection = nn.Linear(config.text_config.projection_dim, half * PHRASE_KERNEL_SIZE**2 + 1)

    def forward(self, feature_map: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
        """Feature map `(N, d, g, g)` and sentence `(N, S)` to logits `(N, 4g, 4g)`."""
        feature_map = self.convolutions(feature_map)  # (N, d / 2, 4g, 4g)
        parameters = self.kernel_projection(sentence)
        kernel = parameters[:, :-1].unflatten(1, (-1, PHRASE_KERNEL_SIZE**2))  # (N, d / 2, 9)
        bias = parameters[:, -1]  # (N,)
        # The 1x1 convolution and the phrase's 3x3 kernel are linear, so they are composed into one 1x1 kernel for each
        # of the nine taps: exact, and the widest map needs no convolution of its own. Shifting and adding the taps'
        # maps is `fold`, whose offsets run against those of a convolution, hence the flip. A tap's part of the 1x1
        # convolution's bias is added before, since zero padding comes after that convolution.
        kernel = kernel.flip(2)
        taps = torch.einsum("nok,oi->nki", kernel, self.output_projection.weight.flatten(1))  # (N, 9, d / 2)
        tap_biases = torch.einsum("nok,o->nk", kernel, self.output_projection.bias)  # (N, 9)
        responses = taps @ feature_map.flatten(2) + tap_biases[:, :, None]  # (N, 9, (4g)²)
        # Nine maps are summed: not in half precision.
        responses = responses.to(torch.promote_types(responses.dtype, torch.float32))
        logits = F.fold(responses, feature_map.shape[2:], PHRASE_KERNEL_SIZE, padding=PHRASE_KERNEL_SIZE // 2).squeeze(
            1
        )
        return logits + bias[:, None, None]


class DetrisForReferringSegmentation(PreTrainedModel):
    """
    Segments what phrases name in images: Hugging Face's DINOv2 and CLIP text models, frozen, with DETRIS adapters in
    their layers, and a neck, decoder and mask head behind them (official `model/segmenter.py`).

    The adapters are PEFT layers; the attribute `peft_config` describes them.
    """

    config_class = DetrisConfig
    base_model_prefix = "detris"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    model_tags = ["detris", "referring-image-segmentation"]  # on the Hub
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["VisionAdapterLayer", "TextAdapterLayer", "DetrisDecoderLayer"]

    def __init__(
        self,
        config: DetrisConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: CLIPTextModelWithProjection | None = None,
    ):
        super().__init__(config)
        config.check_fields()  # loading may have changed some
        vision_class = BACKBONE_CLASSES["vision"][config.vision_config.model_type][1]
        self.vision_model = vision_model or vision_class(config.vision_config)
        text_model = text_model or CLIPTextModelWithProjection(config.text_config)
        self.text_model, self.text_projection = text_model.text_model, text_model.text_projection
        self.neck = DetrisNeck(config)
        self.decoder = DetrisDecoder(config)
        self.mask_head = DetrisMaskHead(config)
        self.post_init()
        # After `post_init`, which starts all that stands inside a backbone by the backbone's rules, if it is new.
        adapter_config = DetrisAdapterConfig(**fields_of(config, ADAPTER_FIELDS))
        adapter_config.modules_to_save = None  # the head is the model's own
        inject_adapter_in_model(adapter_config, self, BUILT_IN_ADAPTER)
        self._hf_peft_config_loaded = True  # what transformers asks for
        self._set_trainable()

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

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of the phrases' tokens."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings of the phrases' tokens."""
        self.text_model.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The paper starts its head from PyTorch's defaults. Backbones and adapters have been initialised on their own.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()

    @staticmethod
    def part_of(name: str) -> str:
        """Return whether the parameter `name` belongs to the `adapters`, the `backbones` or the `head`."""
        if ADAPTER_PARAMETER.search(name):
            return "adapters"
        return "backbones" if name.startswith(BACKBONE_MODULES) else "head"

    def _set_trainable(self) -> None:
        for name, parameter in self.named_parameters():
            # DINOv2's mask token serves its pretraining alone and never gets a gradient here.
            in_use = not name.endswith(".mask_token")
            parameter.requires_grad = in_use and (
                self.part_of(name) != "backbones" or not self.config.freeze_backbones
            )

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
            with _saving(Path(save_directory), replaced) as folder:
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

        with _saving(Path(save_directory), [name.format("") for name in WEIGHT_PATTERNS]) as folder:
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
                setattr(config, name, _place_of(self.name_or_path))
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
        _require_folder(source)
        if kwargs.get("subfolder") and source is not None:
            _require_folder(os.path.join(source, kwargs["subfolder"]))
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
            model = cls._from_whole(source, args, hub_kwargs, kwargs)
        nothing = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, nothing) if output_loading_info else model

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
    def _from_whole(cls, source: str | None, args: tuple, hub_kwargs: dict, kwargs: dict):
        _refuse_several_devices(kwargs.get("device_map"))
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
        _refuse_several_devices(getattr(model, "hf_device_map", None))
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(f"{source}: max_memory is too little for the model, which is not divided: leave it out.")
        _align(model)
        with errors_begin_with(source):
            check_finite(model.state_dict())
        # Loading makes every parameter trainable.
        model._set_trainable()
        return model

    @classmethod
    def _from_adapter(cls, source: str, hub_kwargs: dict, kwargs: dict) -> "DetrisForReferringSegmentation":
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
        _refuse_several_devices(device)
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

    @staticmethod
    def _backbone_configs(vision_model: PreTrainedModel, text_model: PreTrainedModel) -> dict[str, dict]:
        """Copies of the backbones' configurations, which have settled which attention they use."""
        return {
            "vision_config": vision_model.config.to_dict() | {"_name_or_path": ""},
            "text_config": text_model.config.to_dict() | {"_name_or_path": ""},
        }

    @classmethod
    def from_backbones(
        cls,
        vision: str,
        text: str,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        **config_fields,
    ) -> "DetrisForReferringSegmentation":
        """
        Build a fresh DETRIS: pretrained backbones, untrained adapters and head.

        Args:
            vision (`str`):
                Hub id or folder of a DINOv2 model, with or without registers, or of a whole DETRIS, or an original
                `.pth` file.
            text (`str`):
                Hub id or folder of a CLIP model, whose text tower is taken, or of a whole DETRIS, or OpenAI's original
                file.
            vision_revision, text_revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            quantization_config (*optional*):
                Loads the frozen backbones quantised, such as `transformers.BitsAndBytesConfig`.
            **config_fields: further fields of [`DetrisConfig`].

        Returns:
            `DetrisForReferringSegmentation` in evaluation mode.

        Raises:
            OSError: if a folder or Hub id cannot be read.
            ValueError: if the backbones or fields do not fit together.
        """
        DetrisConfig.refuse_unknown(config_fields)
        vision_model, text_model = cls._read_backbones(
            vision, text, vision_revision, text_revision, quantization_config
        )
        config_fields |= {
            **cls._backbone_configs(vision_model, text_model),
            "vision_backbone": _place_of(vision),
            "vision_backbone_revision": _commit_of(vision, vision_revision),
            "text_backbone": _place_of(text),
            "text_backbone_revision": _commit_of(text, text_revision),
        }
        config = DetrisConfig(**config_fields)
        return cls(config, vision_model, text_model).eval()

    @classmethod
    def _read_backbones(
        cls, vision: str, text: str, vision_revision=None, text_revision=None, quantization_config=None, **hub_kwargs
    ) -> tuple[PreTrainedModel, CLIPTextModelWithProjection]:
        return (
            cls._read_backbone(vision, "vision", quantization_config, revision=vision_revision, **hub_kwargs),
            cls._read_backbone(text, "text", quantization_config, revision=text_revision, **hub_kwargs),
        )

    @classmethod
    def _read_backbone(cls, source: str, part: str, quantization_config=None, **hub_kwargs) -> PreTrainedModel:
        if os.path.exists(source) and not os.path.isdir(source):
            model = cls._read_original_backbone(source, part)
        else:
            _require_folder(source)
            config = DetrisConfig.get_config_dict(source, **hub_kwargs)[0]
            if config.get("model_type") == DetrisConfig.model_type:
                return cls._backbone_of_whole(source, part, hub_kwargs)
            model = cls._read_saved_backbone(source, part, config, quantization_config, hub_kwargs)
        with errors_begin_with(source):
            check_finite(model.state_dict())
        return model

    @staticmethod
    def _read_original_backbone(source: str, part: str) -> PreTrainedModel:
        try:  # only those who build a new DETRIS need this, and have the repository
            from convert_detris_checkpoint import read_clip_text, read_dinov2
        except ModuleNotFoundError as error:
            if error.name != "convert_detris_checkpoint":
                raise
            raise ValueError(
                f"{source} is a file: give a folder or a Hub id, or work in this project's repository, which has "
                "convert_detris_checkpoint.py to read it."
            ) from None
        return _align((read_clip_text if part == "text" else read_dinov2)(source))

    @classmethod
    def _backbone_of_whole(cls, source: str, part: str, hub_kwargs: dict) -> PreTrainedModel:
        if find_adapter_config_file(source, **hub_kwargs) is not None:
            raise ValueError(f"{source} holds adapters without backbones: name the backbones that they stand in.")
        whole = cls.from_pretrained(source, **hub_kwargs)
        remove_adapters(whole)
        if part == "vision":
            return whole.vision_model
        with torch.device("meta"):
            tower = _TextTower(whole.config.text_config)
        tower.text_model, tower.text_projection = whole.text_model, whole.text_projection
        return tower

    @staticmethod
    def _read_saved_backbone(
        source: str, part: str, config: dict[str, Any], quantization_config, hub_kwargs: dict
    ) -> PreTrainedModel:
        classes = BACKBONE_CLASSES[part]
        if config.get("model_type") not in classes:
            raise ValueError(
                f"{source} has the model_type {config.get('model_type')!r}: give a DINOv2 model for vision and a CLIP "
                "model for text."
            )
        config_class, model_class = classes[config["model_type"]]
        with as_value_error(f"The config.json of {source} cannot be used"):
            check_values(config)
            backbone_config = config_class.from_pretrained(source, **hub_kwargs)
        # Before memory is taken for what the configuration says. Names may be those of older versions: transformers
        # knows them, so only the numbers are compared here.
        shapes = saved_shapes(source, WEIGHT_FILES, **hub_kwargs)
        if shapes:
            with errors_begin_with(source):
                check_count("num_hidden_layers", backbone_config.num_hidden_layers, len(shapes))
                asked = sum(map(math.prod, shapes_of(skeleton(model_class, backbone_config).state_dict()).values()))
                held = sum(map(math.prod, shapes.values()))
                if asked > 2 * held:  # what is a little too much, or missing, transformers tells by name
                    raise ValueError(
                        f"its configuration asks for {asked:,} numbers, but {held:,} are saved: download it again."
                    )
        quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
        # In float32, whatever they are stored in: adapters and head are trained in it.
        model, info = model_class.from_pretrained(
            source, config=backbone_config, dtype=torch.float32, output_loading_info=True, **hub_kwargs, **quantized
        )
        if info["missing_keys"]:
            raise ValueError(
                f"{source} lacks {len(info['missing_keys'])} tensors of its backbone, such as "
                f"{min(info['missing_keys'])}: give a DINOv2 model for vision and a CLIP model for text."
            )
        return model if quantized else _align(model)

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
        _require_folder(peft_model_id)
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

    @staticmethod
    def _check_same_adapters(present: DetrisAdapterConfig, loaded: DetrisAdapterConfig) -> None:
        for name in ADAPTER_FIELDS:
            old, new = getattr(present, name), getattr(loaded, name)
            if old != new and not name.endswith("dropout"):
                raise ValueError(
                    f"its adapters have {name} {new}, those of the model that they would replace {old}: load them "
                    "under another adapter_name."
                )

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

    def encode_text(self, input_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encode phrases: words `(N, L, C)`, normed but not projected, and sentences `(N, S)`, from `input_ids` `(N, L)`.
        """
        # Without a mask: padding positions take part in the text adapters, and CLIP would change them if it had one.
        words = self.text_model(input_ids).last_hidden_state  # (N, L, C)
        # The end token has the largest id.
        end_of_text = words[torch.arange(len(words), device=words.device), input_ids.argmax(dim=1)]  # (N, C)
        return words, self.text_projection(end_of_text)

    def encode_images(
        self, pixel_values: torch.FloatTensor, words: torch.Tensor, image_index: torch.LongTensor | None = None
    ) -> list[torch.Tensor]:
        """
        Encode images under their phrases' words.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, image_size, image_size)`): normalised images.
            words (`torch.FloatTensor` of shape `(N, L, C)`): from [`encode_text`].
            image_index (`torch.LongTensor` of shape `(N,)`, *optional*): the image each phrase speaks of.

        Returns:
            `list` of the feature maps `(N, D, g, g)`: after each of `feature_layers`, and the last, normalised one.
        """
        hidden_states = self._embed_patches(pixel_values)  # (B, P, D)
        features = []
        for index, layer in enumerate(self.vision_model.encoder.layer):
            if holds_adapters(layer) and layer.active_name is not None:
                if image_index is not None:
                    # Until here an image is the same for all its phrases. What has been kept follows.
                    hidden_states, *features = (states[image_index] for states in (hidden_states, *features))
                    image_index = None
                hidden_states = layer(hidden_states, words)
            else:
                hidden_states = layer(hidden_states)
            if index in self.config.feature_layers:
                features.append(hidden_states)
        features.append(self.vision_model.layernorm(hidden_states))
        if image_index is not None:
            features = [states[image_index] for states in features]
        grid_size = self.config.grid_size
        return [
            states[:, self.config.prefix_length :].transpose(1, 2).unflatten(2, (grid_size, grid_size))
            for states in features
        ]

    def _embed_patches(self, pixel_values: torch.FloatTensor) -> torch.Tensor:
        # What the backbone's embeddings do themselves, but for the resampling, which is the official one. The table
        # stays as it was pretrained, so that every image size is resampled from the original and none loses anything.
        embeddings = self.vision_model.embeddings
        patches = embeddings.patch_embeddings(pixel_values)  # (B, g², D)
        class_tokens = embeddings.cls_token.expand(len(patches), -1, -1)
        hidden_states = torch.cat([class_tokens, patches], dim=1)
        hidden_states = hidden_states + resample_position_table(embeddings.position_embeddings, self.config.grid_size)
        if self.config.prefix_length > 1:
            registers = embeddings.register_tokens.expand(len(patches), -1, -1)
            hidden_states = torch.cat([hidden_states[:, :1], registers, hidden_states[:, 1:]], dim=1)
        return embeddings.dropout(hidden_states)

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        labels: torch.FloatTensor | None = None,
        adapter_names: list[str] | None = None,
        return_dict: bool | None = None,
    ) -> DetrisOutput | tuple:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, image_size, image_size)`):
                Letterboxed, normalised images, from [`DetrisImageProcessor`].
            input_ids (`torch.LongTensor` of shape `(N, L)`):
                Phrases, filled up with id 0, from [`DetrisProcessor`].
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*):
                1 where the decoder may read a word. By default wherever `input_ids` is not 0.
            image_index (`torch.LongTensor` of shape `(N,)`, *optional*):
                The image that each phrase speaks of. By default phrase `n` speaks of image `n`.
            labels (`torch.FloatTensor` of shape `(N, image_size, image_size)`, *optional*):
                Masks warped as the images are, in [0, 1]; soft edges stay soft. In training on a GPU, other numbers
                make the loss NaN instead of raising an error, which would have to wait for the GPU.
            adapter_names (`list[str]` of length `N`, *optional*):
                The adapter that each phrase is segmented with, `"__base__"` for none; not in training. By default the
                active one.

        Returns:
            [`DetrisOutput`].

        Raises:
            ValueError: if inputs are missing, empty or do not fit each other; the message says which and how.
        """
        self._check_inputs(pixel_values, input_ids, attention_mask, image_index, labels)
        padding = input_ids == 0 if attention_mask is None else attention_mask == 0  # (N, L)
        if adapter_names is None:
            logits = self._segment(pixel_values, input_ids, padding, image_index)  # (N, 4g, 4g)
        else:
            logits = self._segment_by_adapter(adapter_names, pixel_values, input_ids, padding, image_index)
        loss = None
        if labels is not None:
            # Nearest neighbour at the size of the logits, as officially.
            target = F.interpolate(labels[:, None].to(logits.dtype), size=logits.shape[1:], mode="nearest").squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, target)
            # `_check_labels` does not read what lies on a GPU in training. There the loss tells, and stops the run.
            loss = loss.masked_fill(~_are_masks(labels), math.nan)
        output = DetrisOutput(loss=loss, logits=logits)
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    def _segment(self, pixel_values, input_ids, padding, image_index) -> torch.Tensor:
        words, sentence = self.encode_text(input_ids)
        feature_maps = self.encode_images(pixel_values, words, image_index)
        feature_map = self.decoder(self.neck(feature_maps, sentence), words, padding)
        return self.mask_head(feature_map, sentence)

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

    def _check_inputs(self, pixel_values, input_ids, attention_mask, image_index, labels) -> None:
        if pixel_values is None or input_ids is None:
            given, missing = ("phrases", "pixel_values") if pixel_values is None else ("images", "input_ids")
            raise ValueError(f"The model got {given} but no {missing}: it needs both, so give {missing} too.")
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)} but this model takes (images, 3, {size}, "
                f"{size}): use its processor, or load the model with image_size= for another size."
            )
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give (phrases, tokens).")
        if not len(pixel_values) or not len(input_ids):
            raise ValueError(
                f"The batch is empty ({len(pixel_values)} images, {len(input_ids)} phrases): give at least one of "
                "each."
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: give that of input_ids, "
                f"{tuple(input_ids.shape)}."
            )
        if image_index is None:
            if len(pixel_values) != len(input_ids):
                raise ValueError(
                    f"There are {len(input_ids)} phrases for {len(pixel_values)} images: give image_index, the image "
                    "of each phrase."
                )
        elif image_index.shape != input_ids.shape[:1] or image_index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"image_index has shape {tuple(image_index.shape)} and type {image_index.dtype}: give one whole "
                f"number for each of the {len(input_ids)} phrases."
            )
        elif not 0 <= image_index.min() <= image_index.max() < len(pixel_values):
            raise ValueError(
                f"image_index is {image_index.tolist()}, which is out of range: there are {len(pixel_values)} images, "
                "counted from 0."
            )
        if labels is not None:
            self._check_labels(labels, len(input_ids))

    def _check_labels(self, labels: torch.Tensor, phrases: int) -> None:
        size = self.config.image_size
        if labels.shape != (phrases, size, size):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}: give one mask ({size}, {size}), warped as its image is by "
                f"the processor, for each of the {phrases} phrases."
            )
        if labels.is_complex():
            raise ValueError(f"labels has the type {labels.dtype}: give numbers from 0 to 1.")
        readable = not self.training or labels.device.type == "cpu"
        if readable and not torch.compiler.is_compiling() and not _are_masks(labels):
            raise ValueError(
                f"labels holds values from {labels.min().item()} to {labels.max().item()}: give 1 inside the mask, 0 "
                "outside, and numbers between them for soft edges."
            )


DetrisForReferringSegmentation.register_for_auto_class("AutoModel")
DetrisForReferringSegmentation.register_for_auto_class("AutoModelForImageSegmentation")

__all__ = ["DetrisForReferringSegmentation", "DetrisOutput", "resample_position_table"]
