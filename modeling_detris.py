"""DETRIS for referring image segmentation: from images and phrases to one mask logit map a phrase.

Source: DETRIS, arXiv 2501.08580; official files `model/segmenter.py`, `model/fusion.py` and `model/layers.py`.

Shapes: `B` images, `N` phrases, `L` tokens a phrase, `g = image_size / patch_size`, `P = 1 + R + g²` vision tokens
with `R` registers, `D` vision width, `C` text width, `S` width of the sentence embedding, `d` decoder width.
"""

import copy
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, CLIPTextModelWithProjection, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
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
        BatchFirstAttention,
        ConvNormReLU,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        check_tensors,
        discard_adapters,
        fields_of,
        holds_adapters,
        remove_adapters,
    )
    from .configuration_detris import DetrisConfig
except ImportError:
    if __package__:
        raise
    from adapters_detris import (
        ADAPTER_FIELDS,
        ADAPTER_PARAMETER,
        BACKBONE_MODULES,
        HEAD_MODULES,
        BatchFirstAttention,
        ConvNormReLU,
        DetrisAdapterConfig,
        PeftMethod,
        activate_adapters,
        check_tensors,
        discard_adapters,
        fields_of,
        holds_adapters,
        remove_adapters,
    )
    from configuration_detris import DetrisConfig


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
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

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


def _commit_of(source: str, revision: str | None) -> str | None:
    """The commit that a Hub id stands for at the moment."""
    if os.path.exists(source):
        return None
    return getattr(resolve_revision(source, revision), "resolved", revision)


def _place_of(source: str | os.PathLike) -> str:
    return os.path.abspath(source) if os.path.exists(source) else os.fspath(source)


class _TextTower(CLIPTextModelWithProjection):
    """CLIP's text half, read from a whole CLIP without a list of all that is left there."""

    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", "^logit_scale$"]


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
        self.vision_model = vision_model or AutoModel.from_config(config.vision_config)
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
        self._hf_peft_config_loaded = True  # what transformers' adapter methods ask for
        self._set_trainable()

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
        self, save_directory: str | os.PathLike, *args, save_original_format: bool = False, **kwargs
    ) -> None:
        """Save as [`PreTrainedModel.save_pretrained`] does, but by the names of `state_dict` and always whole.

        By default transformers would write DINOv2's tensors under the names of its version 4, which `Trainer` passes
        over when it resumes, and of a model with adapters only these, which is what [`save_adapter`] does.

        Raises:
            ValueError: if the model holds further adapters or quantised backbones.
        """
        further = [
            name for name, config in self.peft_config.items() if name != BUILT_IN_ADAPTER or config.modules_to_save
        ]
        if further:
            raise ValueError(f"The model holds further adapters, {further}: save each of them by save_adapter.")
        if not all(parameter.is_floating_point() for parameter in self.parameters()):
            raise ValueError("The backbones are quantised, so the model cannot be saved whole: use save_adapter.")
        self._enter_auto_map()
        kept = {name: getattr(self.config, name) for name in BACKBONE_SOURCES}
        has_adapters, self._hf_peft_config_loaded = self._hf_peft_config_loaded, False
        for name in BACKBONE_SOURCES:
            # The model brings its backbones along. Where they are from is worth telling only if others can have them,
            # and wrong if they have been trained.
            if not self.config.freeze_backbones or os.path.exists(kept[name] or ""):
                setattr(self.config, name, None)
        try:
            super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
        finally:
            self._hf_peft_config_loaded = has_adapters
            for name, value in kept.items():
                setattr(self.config, name, value)
        for name in (ADAPTER_CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):  # of adapters that were saved there before
            Path(save_directory, name).unlink(missing_ok=True)

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
            ValueError: if there is no such adapter, the backbones have been trained too, or lie in that folder.
        """
        self._check_known([adapter_name])
        self.check_adapter_target(save_directory)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {dtype!r}: give a floating-point type such as torch.bfloat16.")
        if push_to_hub and not repo_id:
            raise ValueError("push_to_hub needs repo_id: name the repository, such as 'someone/detris-adapter'.")
        if not self.config.freeze_backbones:
            raise ValueError(
                "freeze_backbones is False, so the backbones are not what they came from: save the whole model by "
                "save_pretrained."
            )
        tensors = self._adapter_state_dict(adapter_name)
        if dtype is not None:
            tensors = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
            }
        adapter_config = copy.copy(self.peft_config[adapter_name])
        adapter_config.modules_to_save = list(HEAD_MODULES)
        adapter_config.base_model_name_or_path = repo_id  # where AutoModel looks for configuration and code
        self._enter_auto_map()
        config = self._config_with_adapter(adapter_config, repo_id)

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f"{SAFETENSORS_WEIGHTS_NAME}.tmp"  # what was there stays until the new is whole
        try:
            save_file(
                {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
                scratch,
                metadata={"format": "pt"},
            )
            scratch.replace(folder / SAFETENSORS_WEIGHTS_NAME)
        finally:
            scratch.unlink(missing_ok=True)
        custom_object_save(self, folder, config)
        config.save_pretrained(folder)
        adapter_config.save_pretrained(folder)
        for pattern in ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"):
            for file in folder.glob(pattern):  # of a whole model that was saved here before
                file.unlink()
        if push_to_hub:
            huggingface_hub.create_repo(repo_id, exist_ok=True)
            huggingface_hub.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload adapters and head"
            )

    def check_adapter_target(self, save_directory: str | os.PathLike) -> None:
        """Refuse the folder of the backbones with a `ValueError`: adapters saved there would replace them."""
        for source in (self.config.vision_backbone, self.config.text_backbone, self.name_or_path):
            if source and os.path.realpath(source) == os.path.realpath(save_directory):
                if find_adapter_config_file(source) is None:  # adapters of its own may be saved over
                    raise ValueError(f"{save_directory} holds the backbones: save the adapters to another folder.")

    def _adapter_state_dict(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Tensors of an adapter and its head, by the names that PEFT saves them under."""
        tensors = get_peft_model_state_dict(self, adapter_name=adapter_name)
        for part in HEAD_MODULES:
            module = getattr(self, part)
            if isinstance(module, ModulesToSaveWrapper):
                if adapter_name in module.modules_to_save:
                    continue  # PEFT has taken it already
                module = module.original_module
            tensors |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
        return tensors

    def _config_with_adapter(self, adapter_config: DetrisAdapterConfig, repo_id: str | None) -> DetrisConfig:
        """The model's configuration as if these adapters were its own, and where its backbones are to be had."""
        config = copy.deepcopy(self.config)
        for name in ADAPTER_FIELDS:
            setattr(config, name, getattr(adapter_config, name))
        for name in ("vision_backbone", "text_backbone"):
            if getattr(config, name) is None and self.name_or_path:
                # Those of a whole DETRIS, such as one converted from the official layout.
                setattr(config, name, self.name_or_path)
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
        # Where AutoModel comes from adapters that PEFT has saved to the model that they name as theirs.
        adapter_kwargs = kwargs.pop("adapter_kwargs", None) or {}
        adapter = adapter_kwargs.pop("_adapter_model_path", None)
        if adapter is not None and os.fspath(adapter) != os.fspath(source):
            model = cls.from_pretrained(source, *args, **kwargs)
            model.delete_adapter(BUILT_IN_ADAPTER)
            model.load_adapter(adapter, is_trainable=True, adapter_kwargs=adapter_kwargs)
            return (model, {"missing_keys": set(), "unexpected_keys": set()}) if output_loading_info else model
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        if source is not None and find_adapter_config_file(source, **hub_kwargs) is not None:
            model = cls._from_adapter(source, hub_kwargs, kwargs)
            return (model, {"missing_keys": set(), "unexpected_keys": set()}) if output_loading_info else model
        model, loading_info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        missing, unexpected = sorted(loading_info["missing_keys"]), sorted(loading_info["unexpected_keys"])
        if missing or unexpected:
            raise ValueError(
                f"{source} does not fit the configuration: {len(missing)} tensors are missing "
                f"({', '.join(missing[:3]) or 'none'}) and {len(unexpected)} are too many "
                f"({', '.join(unexpected[:3]) or 'none'}). Load it with the configuration that it was saved with."
            )
        _align(model)
        # Loading makes every parameter trainable.
        model._set_trainable()
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _from_adapter(cls, source: str, hub_kwargs: dict, kwargs: dict) -> "DetrisForReferringSegmentation":
        for part in ("vision", "text"):
            if f"{part}_backbone" in kwargs:  # the revision is that of another repository
                kwargs.setdefault(f"{part}_backbone_revision", None)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        config = kwargs.pop("config", None)
        if config is None:
            config = DetrisConfig.from_pretrained(source, **kwargs)
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
                kwargs.get("quantization_config"),
            )
        except OSError as error:
            raise OSError(
                f"The backbones of {source}, {config.vision_backbone} and {config.text_backbone}, cannot be read: if "
                f"they lie elsewhere, give vision_backbone= and text_backbone=. ({error})"
            ) from error
        model = cls(config, vision_model, text_model)
        model.name_or_path = os.fspath(source)
        model.load_adapter(source, is_trainable=True, **hub_kwargs)
        if "attn_implementation" in kwargs:
            model.set_attn_implementation(kwargs["attn_implementation"])
        return model.to(dtype or torch.float32).eval()

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
        # Copies of their configurations: the backbones have settled which attention they use.
        config_fields |= {
            "vision_config": vision_model.config.to_dict() | {"_name_or_path": ""},
            "text_config": text_model.config.to_dict() | {"_name_or_path": ""},
            "vision_backbone": _place_of(vision),
            "vision_backbone_revision": _commit_of(vision, vision_revision),
            "text_backbone": _place_of(text),
            "text_backbone_revision": _commit_of(text, text_revision),
        }
        config = DetrisConfig(**config_fields)
        return cls(config, vision_model, text_model).eval()

    @classmethod
    def _read_backbones(
        cls, vision: str, text: str, vision_revision=None, text_revision=None, quantization_config=None
    ) -> tuple[PreTrainedModel, CLIPTextModelWithProjection]:
        return (
            cls._read_backbone(vision, AutoModel, vision_revision, quantization_config),
            cls._read_backbone(text, _TextTower, text_revision, quantization_config),
        )

    @classmethod
    def _read_backbone(cls, source: str, model_class: type, revision=None, quantization_config=None):
        if os.path.isfile(source):
            try:  # only those who build a new DETRIS need this, and have the repository
                from convert_detris_checkpoint import read_clip_text, read_dinov2
            except ModuleNotFoundError as error:
                if error.name != "convert_detris_checkpoint":
                    raise
                raise ValueError(
                    f"{source} is a file: give a folder or a Hub id, or work in this project's repository, which has "
                    "convert_detris_checkpoint.py to read it."
                ) from None
            return _align((read_clip_text if model_class is _TextTower else read_dinov2)(source))
        if PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type") == DetrisConfig.model_type:
            whole = cls.from_pretrained(source, revision=revision)
            remove_adapters(whole)
            if model_class is AutoModel:
                return whole.vision_model
            with torch.device("meta"):
                tower = _TextTower(whole.config.text_config)
            tower.text_model, tower.text_projection = whole.text_model, whole.text_projection
            return tower
        quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
        # In float32, whatever they are stored in: adapters and head are trained in it.
        model, info = model_class.from_pretrained(
            source, revision=revision, dtype=torch.float32, output_loading_info=True, **quantized
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

        Raises:
            ValueError: if the adapters do not fit the model, its backbones or the adapter that they replace; the model
                stays as it was.
        """
        hub_kwargs = {name: value for name, value in (kwargs | (adapter_kwargs or {})).items() if name in HUB_KWARGS}
        try:
            adapter_config = PeftConfig.from_pretrained(peft_model_id, **hub_kwargs)
            if adapter_config.peft_type != PeftMethod.DETRIS:
                raise ValueError(
                    f"{peft_model_id} holds adapters of type {adapter_config.peft_type}: load them by PeftModel."
                )
            # Never PEFT's older, pickled file.
            tensors = load_file(cached_file(peft_model_id, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs))
        except (JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{peft_model_id} cannot be read as adapters ({error}): save or download them anew."
            ) from error
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        present, active = self.peft_config.get(adapter_name), self.active_adapters()
        try:
            if present is None:
                parts = {part for name in (*tensors, *self.state_dict()) for part in name.split(".")}
                if adapter_name in parts | {NO_ADAPTER}:
                    raise ValueError(f"adapter_name is {adapter_name!r}, which already names something: give another.")
                sizes = {size for tensor in tensors.values() for size in tensor.shape}
                adapter_config.check_sizes(self, sizes)
                adapter_config.inference_mode = not is_trainable
                adapter_config.modules_to_save = list(HEAD_MODULES)  # or they would replace the model's own head
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # as is meant
                    inject_adapter_in_model(adapter_config, self, adapter_name)
            else:
                adapter_config.check_model(self)
                self._check_same_adapters(present, adapter_config)
            check_tensors(tensors, self._adapter_state_dict(adapter_name))
        except Exception as error:
            if present is None:
                discard_adapters(self, [adapter_name], active)
            raise ValueError(f"{peft_model_id}: {error}") from error
        set_peft_model_state_dict(self, tensors, adapter_name)
        self.train(self.training)  # new modules start in training mode
        self.enable_adapters()
        activate_adapters(self, [adapter_name], frozen=self.peft_config[adapter_name].inference_mode)

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
        for module in self.modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                module.enable_adapters(True)

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
            labels (`torch.FloatTensor` of shape `(N, H, W)`, *optional*):
                Masks warped as the images are, in [0, 1]; soft edges stay soft.
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
        if labels is not None and (labels.ndim != 3 or len(labels) != len(input_ids)):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}: give one mask (height, width) for each of the "
                f"{len(input_ids)} phrases."
            )


DetrisForReferringSegmentation.register_for_auto_class("AutoModel")
DetrisForReferringSegmentation.register_for_auto_class("AutoModelForImageSegmentation")

__all__ = ["DetrisForReferringSegmentation", "DetrisOutput", "resample_position_table"]
