"""DETRIS for referring image segmentation: from images and phrases to a map of mask logits for each phrase.

The file follows the method: neck, decoder and mask head, and then the model, which encodes phrases and images, calls
these three, and computes the loss. The adapters inside the backbones are in `adapters_detris.py`.

Source: DETRIS, arXiv 2501.08580; official files `model/segmenter.py`, `model/fusion.py` and `model/layers.py`.

Shapes: `B` images, `N` phrases, `L` tokens a phrase, `g = image_size / patch_size`, `P = 1 + R + g²` vision tokens
with `R` registers, `D` vision width, `C` text width, `S` width of the sentence embedding, `d` decoder width.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

try:
    from .adapter_layers_detris import holds_adapters
    from .adapters_detris import BatchFirstAttention, ConvNormReLU
    from .backbones_detris import BACKBONE_CLASSES, FromBackbones
    from .configuration_detris import DetrisConfig
    from .gradient_checkpointing_detris import GradientCheckpointing
    from .input_checks_detris import are_masks, check_inputs
    from .peft_detris import ADAPTER_PARAMETER, BACKBONE_MODULES
    from .recording_detris import segment_and_record, wanted_outputs
    from .saving_detris import WholeModelSaving
    from .sharing_detris import AdapterSharing
    from .switching_detris import AdapterSwitching
except ImportError:
    if __package__:
        raise
    from adapter_layers_detris import holds_adapters
    from adapters_detris import BatchFirstAttention, ConvNormReLU
    from backbones_detris import BACKBONE_CLASSES, FromBackbones
    from configuration_detris import DetrisConfig
    from gradient_checkpointing_detris import GradientCheckpointing
    from input_checks_detris import are_masks, check_inputs
    from peft_detris import ADAPTER_PARAMETER, BACKBONE_MODULES
    from recording_detris import segment_and_record, wanted_outputs
    from saving_detris import WholeModelSaving
    from sharing_detris import AdapterSharing
    from switching_detris import AdapterSwitching


# Added to the side of the new grid when positions are resampled, so that rounding does not lose a row (official
# `interpolate_pos_encoding`).
POSITION_GRID_OFFSET = 0.1
SINE_POSITION_BASE = 10000.0
PHRASE_KERNEL_SIZE = 3


@dataclass
class DetrisOutput(ModelOutput):
    """
    Output of [`DetrisForReferringSegmentation`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            Mean binary cross-entropy over all pixels of the logits.
        logits (`torch.FloatTensor` of shape `(N, 4g, 4g)`):
            Mask logits over the square input image, one map for each phrase.
        text_hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned with `output_hidden_states=True`):
            The embedded phrases and the output of each layer of the text backbone, adapters included, not normalised;
            each `(N, L, C)`.
        vision_hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned with `output_hidden_states=True`):
            The embedded images and the output of each layer of the vision backbone, adapters included, not normalised;
            each `(N, P, D)`. An image with several phrases is repeated for each of them, also where they still agree:
            up to the first layer with an adapter.
        decoder_hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned with `output_hidden_states=True`):
            The patches that the neck made and the output of each layer of the decoder, not normalised; each
            `(N, g², d)`, row by row.
        text_attentions (`tuple[torch.FloatTensor]`, *optional*, returned with `output_attentions=True`):
            The weights of each attention of the text backbone, from tokens to tokens; each `(N, heads, L, L)`.
        vision_attentions (`tuple[torch.FloatTensor]`, *optional*, returned with `output_attentions=True`):
            The weights of each attention of the vision backbone, from its tokens to its tokens; each
            `(N, heads, P, P)`, repeated as `vision_hidden_states` are.
        decoder_attentions (`tuple[torch.FloatTensor]`, *optional*, returned with `output_attentions=True`):
            The weights of each attention of the decoder from patches to patches; each `(N, heads, g², g²)`.
        cross_attentions (`tuple[torch.FloatTensor]`, *optional*, returned with `output_attentions=True`):
            The weights of each attention of the decoder from patches to words; each `(N, heads, g², L)`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    text_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    vision_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    text_attentions: tuple[torch.FloatTensor, ...] | None = None
    vision_attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


def resample_position_table(position_embeddings: torch.Tensor, grid_size: int) -> torch.Tensor:
    """
    Resample DINOv2's position table as the official `interpolate_pos_encoding` does: bicubic, without antialias, by
    a factor of `(grid_size + 0.1) / old_grid_size`.

    Args:
        position_embeddings (`torch.Tensor` of shape `(1, 1 + old_grid_size², D)`): the table, class token first.
        grid_size (`int`): number of patches along one side of the new table.

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


class _GateLinear(nn.Linear):
    """Square linear layer, initialised as those in `nn.MultiheadAttention` are: uniform within `bound`, zero bias."""

    def __init__(self, dim: int, bound: float):
        self.bound = bound
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -self.bound, self.bound)
        nn.init.zeros_(self.bias)


class DetrisSentenceGate(nn.Module):
    """Per-channel factor for a feature map, computed from the sentence; `(N, d)` to `(N, d, 1, 1)`.

    In the official code this is an attention of the map to the sentence (`CrossAttn`). The softmax over its only key
    is 1 everywhere, so the weights of query and key have no effect and are left out.
    """

    def __init__(self, config: DetrisConfig):
        super().__init__()
        # The official code holds query, key and value in one matrix, whose size sets Xavier's bound.
        self.value = _GateLinear(config.decoder_dim, bound=math.sqrt(6 / (4 * config.decoder_dim)))
        self.output = _GateLinear(config.decoder_dim, bound=math.sqrt(1 / config.decoder_dim))

    def forward(self, sentence: torch.Tensor) -> torch.Tensor:
        return self.output(self.value(sentence))[:, :, None, None]


class DetrisNeck(nn.Module):
    """Fuses the feature maps of the vision backbone, each gated by the sentence (official `Neck`)."""

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
        coordinates = torch.stack([columns, rows], dim=2).expand(count, -1, -1, -1)  # (N, g, g, 2)
        # Channels last, as the feature maps are: `cat` would not keep that for a map that is expanded.
        located = torch.cat([fused.permute(0, 2, 3, 1), coordinates], dim=3).permute(0, 3, 1, 2)
        return fused + self.coordinate_convolutions(located)


def _sine_positions(length: int, dim: int, device: torch.device) -> torch.Tensor:
    """Position embeddings `(length, dim)`, sine and cosine in alternate channels (official `Decoder.pos1d`)."""
    frequencies = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(SINE_POSITION_BASE) / dim))
    angles = torch.arange(length, device=device)[:, None] * frequencies  # (length, dim / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _sine_positions_2d(grid_size: int, dim: int, device: torch.device) -> torch.Tensor:
    """Position embeddings `(grid_size², dim)`, half for the column and half for the row (official `Decoder.pos2d`)."""
    positions = _sine_positions(grid_size, dim // 2, device)  # (g, d / 2)
    columns = positions[None].expand(grid_size, -1, -1)
    rows = positions[:, None].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


class DetrisDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer in which patches attend to patches and then to words (official `DecoderLayer`).

    Unusually, the result of each attention is normalised once more before it is added.
    """

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
        """Patches `(N, g², d)`, words `(N, L, C)` and `padding` `(N, L)`, true where padded, to `(N, g², d)`."""
        normed = self.self_attention_norm(patches)
        query = normed + patch_positions
        attended = self.self_attention(query, query, normed)
        patches = patches + self.dropout(self.self_attention_output_norm(attended))
        query = self.word_attention_norm(patches) + patch_positions
        attended = self.word_attention(query, words + word_positions, words, padding)
        patches = patches + self.dropout(self.word_attention_output_norm(attended))
        return patches + self.dropout(self.feed_forward(self.feed_forward_norm(patches)))


class DetrisDecoder(nn.Module):
    """Lets patches attend to each other and to the words, in several layers (official `Decoder`)."""

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
    """Enlarges the map four times and convolves it with a kernel made from the sentence (official `Projector`)."""

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
        # The official code applies the 1x1 convolution and then the phrase's 3x3 kernel. Both are linear, so here they
        # are composed into nine 1x1 kernels, one for each tap of the 3x3 kernel, which is exact and spares a
        # convolution of the widest map. `fold` shifts and adds the nine maps; its offsets run in the opposite
        # direction to a convolution's, hence the flip. Each tap adds its part of the 1x1 convolution's bias before the
        # shift, because the official code pads with zeros after the 1x1 convolution.
        kernel = kernel.flip(2)
        # `einsum` rounds in the same way whether the weights are frozen or not; `@` does not.
        taps = torch.einsum("nok,oi->nki", kernel, self.output_projection.weight.flatten(1))  # (N, 9, d / 2)
        tap_biases = torch.einsum("nok,o->nk", kernel, self.output_projection.bias)[:, :, None]  # (N, 9, 1)
        responses = torch.baddbmm(tap_biases, taps, feature_map.flatten(2))  # (N, 9, (4g)²)
        # Nine maps are summed, which half precision is too coarse for.
        responses = responses.to(torch.promote_types(responses.dtype, torch.float32))
        logits = F.fold(responses, feature_map.shape[2:], PHRASE_KERNEL_SIZE, padding=PHRASE_KERNEL_SIZE // 2)
        return logits.squeeze(1) + bias[:, None, None]


class DetrisForReferringSegmentation(
    AdapterSharing, AdapterSwitching, WholeModelSaving, FromBackbones, GradientCheckpointing, PreTrainedModel
):
    """
    Segments what phrases name in images (official `model/segmenter.py`).

    Hugging Face's DINOv2 and CLIP text models, both frozen, hold DETRIS adapters in their layers; a neck, a decoder
    and a mask head follow them. The adapters are layers of PEFT, which the attribute `peft_config` describes.
    """

    config_class = DetrisConfig
    base_model_prefix = "detris"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    model_tags = ["detris", "referring-image-segmentation"]  # of its card on the Hub
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # as in both backbones
    _no_split_modules = ["VisionAdapterLayer", "TextAdapterLayer", "DetrisDecoderLayer"]

    def __init__(
        self,
        config: DetrisConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: CLIPTextModelWithProjection | None = None,
    ):
        super().__init__(config)
        config.check_fields()  # they may have been changed since the configuration was made
        vision_class = BACKBONE_CLASSES["vision"][config.vision_config.model_type][1]
        self.vision_model = vision_model or vision_class(config.vision_config)
        text_model = text_model or CLIPTextModelWithProjection(config.text_config)
        self.text_model, self.text_projection = text_model.text_model, text_model.text_projection
        # Backbones that are given keep their own configurations. The model takes these in place of its copies, so that
        # `set_attn_implementation` reaches the backbones.
        config.vision_config, config.text_config = self.vision_model.config, self.text_model.config
        self.neck = DetrisNeck(config)
        self.decoder = DetrisDecoder(config)
        self.mask_head = DetrisMaskHead(config)
        self.post_init()
        # After `post_init`, which would initialise adapters inside a new backbone by the backbone's own rules.
        self._insert_built_in_adapters()
        self._set_trainable()

    def encode_text(self, input_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encode phrases `(N, L)` into words `(N, L, C)`, normalised but not projected, and sentences `(N, S)`.
        """
        # Without a mask: with one, CLIP would compute other values at padding positions, which the text adapters read.
        words = self.text_model(input_ids, return_dict=True).last_hidden_state  # (N, L, C)
        # The end token is the one with the largest id.
        end_of_text = words[torch.arange(words.shape[0], device=words.device), input_ids.argmax(dim=1)]  # (N, C)
        return words, self.text_projection(end_of_text)

    def encode_images(
        self, pixel_values: torch.FloatTensor, words: torch.Tensor, image_index: torch.LongTensor | None = None
    ) -> list[torch.Tensor]:
        """
        Encode images, once for each phrase, whose words the dense aligners read.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, image_size, image_size)`): normalised images.
            words (`torch.FloatTensor` of shape `(N, L, C)`): from [`encode_text`].
            image_index (`torch.LongTensor` of shape `(N,)`, *optional*): the image that each phrase refers to.

        Returns:
            `list` of feature maps `(N, D, g, g)`: the output of each of `feature_layers`, and the normalised output of
            the last layer.
        """
        hidden_states = self._embed_patches(pixel_values)  # (B, P, D)
        features = []
        for index, layer in enumerate(self.vision_model.encoder.layer):
            if holds_adapters(layer) and layer.active_name is not None:
                # Until this layer reads words, an image is computed once for all its phrases.
                hidden_states = layer(hidden_states, words, image_index)
                if image_index is not None:
                    features = [states.index_select(0, image_index) for states in features]
                    image_index = None
            else:
                hidden_states = layer(hidden_states)
            if index in self.config.feature_layers:
                features.append(hidden_states)
        features.append(self.vision_model.layernorm(hidden_states))
        if image_index is not None:
            features = [states.index_select(0, image_index) for states in features]
        grid_size = self.config.grid_size
        return [
            states[:, self.config.prefix_length :].transpose(1, 2).unflatten(2, (grid_size, grid_size))
            for states in features
        ]

    def _embed_patches(self, pixel_values: torch.FloatTensor) -> torch.Tensor:
        # Repeats the backbone's own embeddings, except that positions are resampled in the official way. The
        # pretrained table itself is not changed, so each image size is resampled from the original.
        embeddings = self.vision_model.embeddings
        positions = resample_position_table(embeddings.position_embeddings, self.config.grid_size)
        patches = embeddings.patch_embeddings(pixel_values) + positions[:, 1:]  # (B, g², D)
        prefix = embeddings.cls_token + positions[:, :1]
        if self.config.prefix_length > 1:
            prefix = torch.cat([prefix, embeddings.register_tokens], dim=1)  # which have no position
        hidden_states = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
        return embeddings.dropout(hidden_states)

    def _segment(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        padding: torch.Tensor,
        image_index: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Run the method with the active adapters. `padding` `(N, L)` is true where a token is padding; returns
        `logits` `(N, 4g, 4g)`.
        """
        words, sentence = self.encode_text(input_ids)
        feature_maps = self.encode_images(pixel_values, words, image_index)
        feature_map = self.decoder(self.neck(feature_maps, sentence), words, padding)
        return {"logits": self.mask_head(feature_map, sentence)}

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        labels: torch.FloatTensor | None = None,
        adapter_names: list[str] | None = None,
        return_dict: bool | None = None,
        original_sizes: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> DetrisOutput | tuple:
        r"""
        Segment what phrases name in images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, image_size, image_size)`):
                Letterboxed, normalised images, from [`DetrisImageProcessor`].
            input_ids (`torch.LongTensor` of shape `(N, L)`):
                Phrases, padded with id 0, from [`DetrisProcessor`].
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*):
                1 where the decoder may read a word. By default this is wherever `input_ids` is not 0.
            image_index (`torch.LongTensor` of shape `(N,)`, *optional*):
                The image that each phrase refers to. By default phrase `n` refers to image `n`.
            labels (`torch.FloatTensor` of shape `(N, image_size, image_size)`, *optional*):
                Masks, warped as the images are, with numbers from 0 to 1; soft edges stay soft. On a GPU, other
                numbers do not raise an error, which would have to wait for the GPU, but make the loss NaN.
            adapter_names (`list[str]` of length `N`, *optional*):
                The adapter to segment each phrase with, or `"__base__"` for none; not in training. By default the
                active one.
            return_dict (`bool`, *optional*):
                Whether to return a [`DetrisOutput`] and not a tuple. By default the configuration says so.
            original_sizes (`torch.LongTensor` of shape `(B, 2)`, *optional*):
                Not read. The processor returns the images' sizes, which its post-processing needs, together with the
                model's inputs.
            output_hidden_states (`bool`, *optional*):
                Whether to return the hidden states of all layers. By default the configuration says so.
            output_attentions (`bool`, *optional*):
                Whether to return the weights of all attentions, for which the backbones must use eager attention. By
                default the configuration says so.

        Returns:
            [`DetrisOutput`] or a tuple of its values.

        Raises:
            ValueError: if inputs are missing, empty or do not fit each other, or if attentions are wanted that the
                backbones do not return; the message names them and the remedy.

        Examples:

        ```python
        >>> import torch
        >>> from PIL import Image
        >>> from transformers import AutoProcessor
        >>> from modeling_detris import DetrisForReferringSegmentation

        >>> model = DetrisForReferringSegmentation.from_pretrained("runs/refcoco")
        >>> processor = AutoProcessor.from_pretrained("runs/refcoco", trust_remote_code=True)

        >>> image = Image.open("photo.jpg")
        >>> phrases = ["left cat", "the remote"]
        >>> inputs = processor(images=image, text=phrases, return_tensors="pt")

        >>> with torch.inference_mode():
        ...     outputs = model(**inputs)
        >>> outputs.logits.shape  # one map for each phrase, over the letterboxed image
        torch.Size([2, 128, 128])

        >>> masks = processor.post_process_referring_segmentation(
        ...     outputs, target_sizes=inputs["original_sizes"], image_index=inputs["image_index"]
        ... )
        >>> masks[0].shape == (image.height, image.width)  # true where the left cat is
        True
        ```
        """
        check_inputs(self.config, pixel_values, input_ids, attention_mask, image_index, labels)
        padding = input_ids == 0 if attention_mask is None else attention_mask == 0  # (N, L)
        segment = self._segment
        hidden_states, attentions = wanted_outputs(self, output_hidden_states, output_attentions)
        if hidden_states or attentions:
            segment = partial(segment_and_record, self, hidden_states, attentions)
        if adapter_names is not None:
            segment = partial(self._segment_by_adapter, segment, adapter_names)
        outputs = segment(pixel_values, input_ids, padding, image_index)
        loss = None
        if labels is not None:
            logits = outputs["logits"]  # (N, 4g, 4g)
            # As in the official code, labels are sampled by nearest neighbour at the size of the logits.
            target = F.interpolate(labels[:, None].to(logits.dtype), size=logits.shape[1:], mode="nearest").squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, target)
            # `check_inputs` does not read labels on a GPU. If they are wrong, the loss stops the run.
            loss = loss.masked_fill(~are_masks(labels), math.nan)
        output = DetrisOutput(loss=loss, **outputs)
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        """transformers asks for the embeddings of tokens, here those of the phrases."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace what [`get_input_embeddings`] returns."""
        self.text_model.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers calls this for each new module of the head, which the paper initialises as PyTorch does."""
        # Backbones and adapters are initialised by themselves.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()

    def _set_trainable(self) -> None:
        for name, parameter in self.named_parameters():
            # DINOv2 uses its mask token only in its own pretraining, so it never gets a gradient here.
            in_use = not name.endswith(".mask_token")
            parameter.requires_grad = in_use and (
                self.part_of(name) != "backbones" or not self.config.freeze_backbones
            )

    @staticmethod
    def part_of(name: str) -> str:
        """Return the part that the parameter `name` belongs to: `adapters`, `backbones` or `head`."""
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
        """Print how many parameters are trained, and the adapters' share of the backbones (the paper's table 1)."""
        counts = self.count_parameters()
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        total = sum(counts.values())
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.2f}\n"
            f"adapters: {counts['adapters']:,} || head: {counts['head']:,} || backbones: {counts['backbones']:,} || "
            f"adapters%: {100 * counts['adapters'] / counts['backbones']:.2f} of the backbones"
        )


DetrisForReferringSegmentation.register_for_auto_class("AutoModel")
DetrisForReferringSegmentation.register_for_auto_class("AutoModelForImageSegmentation")

__all__ = ["DetrisForReferringSegmentation", "DetrisOutput", "resample_position_table"]
