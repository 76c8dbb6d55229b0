"""Images and phrases to what DETRIS reads, and its logits back to masks at the size of the photographs.

The results equal those of the official code (jiaqihuang01/DETRIS, commit c94b1e1: `utils/dataset.py` on the way in,
`engine/engine.py` on the way back). `images_detris.py` reads images and masks of every kind, and `letterbox_detris.py`
has the arithmetic of the square that they are warped to.
"""

import copy
import html
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import ftfy
import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

try:
    from .configuration_detris import MAX_IMAGE_SIZE, DetrisConfig, checked_threshold, one_line, short_repr
    from .images_detris import as_mask, as_rgb, as_sequence
    from .letterbox_detris import MAX_SIDE, BoxedMask, letterbox_image, letterbox_mask, undo_letterbox
except ImportError:
    if __package__:
        raise
    from configuration_detris import MAX_IMAGE_SIZE, DetrisConfig, checked_threshold, one_line, short_repr
    from images_detris import as_mask, as_rgb, as_sequence
    from letterbox_detris import MAX_SIDE, BoxedMask, letterbox_image, letterbox_mask, undo_letterbox

logger = logging.get_logger(__name__)

CLIP_TOKENIZER = "openai/clip-vit-base-patch16"  # on the Hub; all CLIP models have the same tokenizer
MAX_TEXT_LENGTH = 1_024  # tokens; CLIP's text model reads 77
MIN_STD = 1 / 255  # one grey level
RESTORED_AT_ONCE = 2**25  # pixels of masks that are brought to their image's size together, in 128 MiB of float32
# Fields of saved files that tell transformers which classes to load.
CLASS_FIELDS = ("auto_map", "image_processor_type", "feature_extractor_type", "processor_class")
# One can iterate over these too, but not to get phrases.
NO_PHRASES = (bytes, bytearray, Mapping, Set, np.ndarray, torch.Tensor)
BYTE_SYMBOLS = 512  # each of the 256 bytes, inside a word and at the end of one


class DetrisImageProcessor(BaseImageProcessor):
    """Warps images, and the masks to train on, to a square: scales them to fit and centres them (a letterbox).

    Images are PIL images, NumPy arrays or torch tensors. They have one to four channels, first or last, and hold
    integers from 0 to 255, 16-bit integers, or floats from 0 to 1. Grey, palette and CMYK images become RGB.
    Photographs are turned upright by their EXIF rotation, and their original size is the one of the upright image.
    Transparency is dropped, as Pillow's `convert("RGB")` and the official reader do. An array whose channels could be
    first or last is read as channels first.

    Args:
        size (`dict[str, int]`): `{"height": side, "width": side}` of the square, in pixels.
        image_mean, image_std (`list[float]`): of red, green and blue, for values from 0 to 1; CLIP's by default. What
            lies outside the image has the mean colour, rounded to whole grey levels as in the official code.

    Raises:
        TypeError: if there is an unknown field.
        ValueError: if `size` is no square of at most 4,096 pixels, or mean or deviation are not three numbers to 1.
    """

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs,
    ):
        size = DetrisConfig.image_size if size is None else size
        side = size.get("height") if isinstance(size, Mapping) else size
        self.size = {"height": side, "width": side}
        if type(side) is not int or not 1 <= side <= MAX_IMAGE_SIZE or size not in (side, self.size):
            raise ValueError(
                f"size is {short_repr(size)}, but DETRIS sees squares: give {{'height': side, 'width': side}} in "
                f"pixels, at most {MAX_IMAGE_SIZE:,}."
            )
        self.image_mean = _checked_channels(OPENAI_CLIP_MEAN if image_mean is None else image_mean, "image_mean", 0)
        self.image_std = _checked_channels(OPENAI_CLIP_STD if image_std is None else image_std, "image_std", MIN_STD)
        class_fields = {name: kwargs.pop(name) for name in CLASS_FIELDS if name in kwargs}
        _refuse_contradictions(kwargs, _fixed_image_arguments(self))
        super().__init__(**class_fields)

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """transformers calls this to read a saved configuration; raises ValueError if the file holds none."""
        with _configuration_errors(pretrained_model_name_or_path):
            fields, kwargs = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
            return {**fields}, kwargs

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        image_index: np.ndarray | None = None,
        return_tensors: str | None = None,
        **fixed: Any,
    ) -> BatchFeature:
        """Warp `B` images to squares, and with them the masks of `N` phrases that speak of them.

        Args:
            images: one image, or a sequence or batch of `B`. A sequence is asked for one image after the other, so
                that a column of `datasets`, which decodes an image when asked for it, never holds all of them.
            segmentation_maps: `(height, width)` maps of 0 and 1, of bool, of floats from 0 to 1, or of integers with
                255 as the foreground. Give one for each phrase, or one for each image, which its phrases then share.
                An axis of one channel may come first or last. A [`BoxedMask`] spares the work outside its box.
            image_index (`(N,)`): which image each phrase speaks of; by default there is one phrase for each image.
            return_tensors: `"pt"` for torch tensors; NumPy arrays by default.
            fixed: arguments of other image processors, such as `do_normalize=True`, that ask for what is done anyway.

        Returns:
            `pixel_values (B, 3, side, side)`, normalised; `original_sizes (B, 2)`, heights and widths in pixels; and,
            if there are maps, `labels (N, side, side)` from 0 to 1, with soft edges.

        Raises:
            OSError: if a file is truncated or broken.
            TypeError: if an image is of another type, or an argument is unknown or contradicts the checkpoint.
            ValueError: if there is no image, an image or a map cannot be read as one, there are neither as many maps
                as phrases nor as many as images, or a map is not as large as its image.
        """
        _refuse_contradictions(fixed, _fixed_image_arguments(self))
        images = as_sequence(images, (4,), "images")
        side, sizes = self.size["height"], []
        pixel_values = np.empty((len(images), 3, side, side), np.float32)
        for i, image in enumerate(images):
            image = as_rgb(image, f"images[{i}]")
            sizes.append(image.shape[:2])
            letterbox_image(image, self.image_mean, self.image_std, pixel_values[i])
        data = {"pixel_values": pixel_values, "original_sizes": np.array(sizes)}
        if segmentation_maps is not None:
            image_index = np.arange(len(images)) if image_index is None else image_index
            maps = as_sequence(segmentation_maps, (3, 4), "segmentation_maps")
            data["labels"] = self._letterbox_segmentation_maps(maps, sizes, image_index)
        return BatchFeature(data, tensor_type=return_tensors)

    def _letterbox_segmentation_maps(
        self, maps: list, sizes: list[tuple[int, int]], image_index: np.ndarray
    ) -> np.ndarray:
        if len(maps) not in (len(image_index), len(sizes)):
            raise ValueError(
                f"{len(maps)} segmentation_maps for {len(image_index)} phrases of {len(sizes)} images: give one for "
                "each phrase, or one for each image."
            )
        shared = len(maps) != len(image_index)
        labels = np.zeros((len(maps), self.size["height"], self.size["width"]), np.float32)
        for i, owner in enumerate(range(len(sizes)) if shared else image_index):
            name, given = f"segmentation_maps[{i}]", maps[i]
            values, top, left, size = given if isinstance(given, BoxedMask) else (given, 0, 0, None)
            mask = as_mask(values, name)
            size = tuple(size or mask.shape)
            if size != sizes[owner]:
                raise ValueError(
                    f"{name} has (height, width) {size}, but its image, images[{owner}], has {sizes[owner]} "
                    "when upright: give a map of the image's size."
                )
            letterbox_mask(BoxedMask(mask, top, left, size), labels[i])
        return labels[image_index] if shared else labels


class DetrisProcessor(ProcessorMixin):
    """Turns images and referring expressions into the inputs of DETRIS, and its logits into masks.

    Args:
        image_processor (`DetrisImageProcessor`): warps the images.
        tokenizer (`CLIPTokenizer`): splits the phrases into tokens.
        max_text_length (`int`): tokens `L` of a phrase, its start and end included; longer phrases are cut.
        mask_threshold (`float`): a pixel is foreground where its probability is above this.

    Raises:
        ValueError: if `max_text_length` leaves no room for a word or is above 1,024, if `mask_threshold` is no
            probability, or if the tokenizer has no vocabulary.
    """

    def __init__(
        self,
        image_processor: DetrisImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int = DetrisConfig.max_text_length,
        mask_threshold: float = DetrisConfig.mask_threshold,
    ):
        if type(max_text_length) is not int or not 3 <= max_text_length <= MAX_TEXT_LENGTH:
            raise ValueError(
                f"max_text_length is {short_repr(max_text_length)}: start, end and at least one word need 3 or more "
                f"tokens, and at most {MAX_TEXT_LENGTH:,} are allowed."
            )
        if len(tokenizer) < BYTE_SYMBOLS:  # without its file `from_pretrained` makes a tokenizer that is all but empty
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} symbols, but a CLIP tokenizer spells every byte and has "
                f"{BYTE_SYMBOLS} or more: its tokenizer.json is missing, or the Hub was not reached; save or download "
                "it again, or name another tokenizer."
            )
        super().__init__(image_processor, tokenizer)
        self.max_text_length = max_text_length
        self.mask_threshold = checked_threshold(mask_threshold, "mask_threshold")
        self._has_warned_of_long_phrase = False

    def __reduce__(self) -> tuple:
        """Pickle what decides the results alone: by its hash `datasets` knows whether it has mapped rows before."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer._set_processor_class(None)
        kept = tokenizer.init_kwargs.keys() - {*CLASS_FIELDS}
        tokenizer.init_kwargs = {name: value for name, value in tokenizer.init_kwargs.items() if name in kept}
        images = self.image_processor
        image_arguments = images.size, images.image_mean, images.image_std
        arguments = tokenizer, self.max_text_length, self.mask_threshold
        return _make_processor, (type(self), type(images), image_arguments, *arguments)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """transformers calls this to read a saved configuration; raises ValueError if the file holds none."""
        with _configuration_errors(pretrained_model_name_or_path):
            fields, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
            return {**fields}, kwargs

    @classmethod
    def from_config(cls, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> "DetrisProcessor":
        """Make the processor that fits a [`DetrisConfig`] from it and CLIP's tokenizer."""
        image_processor = DetrisImageProcessor(size={"height": config.image_size, "width": config.image_size})
        return cls(image_processor, tokenizer, config.max_text_length, config.mask_threshold)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        segmentation_maps: ImageInput | None = None,
        return_tensors: str | None = None,
        **fixed: Any,
    ) -> BatchFeature:
        """Prepare images, phrases, or both. There are no further options, because the checkpoint fixes the rest.

        Args:
            images: one image, or a list or batch of `B`; see [`DetrisImageProcessor`].
            text: a phrase; a list of phrases, all about the one image or one for each image; or a list that has a list
                of phrases for each image. Arrays of strings and columns of `datasets` count as lists.
            segmentation_maps: the phrases' masks, to train on; see [`DetrisImageProcessor.preprocess`].
            return_tensors: `"pt"` for torch tensors; NumPy arrays by default.
            fixed: arguments of other processors, such as `padding="max_length"`, that ask for what is done anyway.

        Returns:
            For images: `pixel_values (B, 3, side, side)` and `original_sizes (B, 2)`, heights and widths in pixels.
            For text: `input_ids (N, L)` and `attention_mask (N, L)`. For both together also `image_index (N,)`, which
            image each phrase speaks of. For maps: `labels (N, side, side)`.

        Raises:
            OSError: if an image file is truncated or broken.
            TypeError: if an image or a phrase is of another type, or an argument is unknown or contradicts the model.
            ValueError: if there is nothing to prepare, a phrase has no words, it is unclear which image a phrase
                speaks of, or images and maps do not fit.
        """
        _refuse_contradictions(fixed, self._fixed_text_arguments() | _fixed_image_arguments(self.image_processor))
        if _holds_text(images) and text is not None and not _holds_text(text):
            raise TypeError("images holds text and text does not: they are swapped, give images=…, text=….")
        if images is None and (text is None or segmentation_maps is not None):
            raise ValueError("images is missing: give images, or text without segmentation_maps.")
        data, image_index = {}, None
        if text is not None:
            image_count = None if images is None else len(as_sequence(images, (4,), "images"))
            phrases, image_index = _pair_text_with_images(text, image_count)
            input_ids = self._tokenize(phrases)
            # Id 0 fills up, as in the official code, although it is also the token of a "!" inside a word.
            data = {"input_ids": input_ids, "attention_mask": (input_ids != 0).astype(np.int64)}
        if images is not None:
            data |= self.image_processor(images, segmentation_maps=segmentation_maps, image_index=image_index)
            if text is not None:
                data["image_index"] = image_index
        return BatchFeature(data, tensor_type=return_tensors)

    def _fixed_text_arguments(self) -> dict[str, tuple]:
        """Return the arguments that other processors take for text, each with the values that change nothing here."""
        left_out = ("token_type_ids", "overflowing_tokens", "special_tokens_mask", "offsets_mapping", "length")
        return {f"return_{what}": (False,) for what in left_out} | {
            "padding": ("max_length", True),
            "truncation": (True, "longest_first", "only_first"),
            "max_length": (self.max_text_length,),
            "add_special_tokens": (True,),
            "padding_side": ("right",),
            "truncation_side": ("right",),
            "return_attention_mask": (True,),
            "is_split_into_words": (False,),
            "stride": (0,),
            "verbose": (True, False),
        }

    def _tokenize(self, phrases: list[str]) -> np.ndarray:
        """Return CLIP's tokens `(N, L)`: long phrases are cut and end with the end token, short ones filled up with 0.

        Text is repaired, unescaped, stripped and lower-cased here and not by the tokenizer, so that any tokenizer with
        CLIP's merges gives the official ids (OpenAI's `simple_tokenizer.py`; `tokenize` in the official
        `utils/dataset.py`).
        """
        texts = [html.unescape(html.unescape(ftfy.fix_text(phrase))) for phrase in phrases]
        texts = [re.sub(r"\s+", " ", text).strip().lower() for text in texts]
        length = self.max_text_length
        input_ids = np.zeros((len(phrases), length), np.int64)
        for n, ids in enumerate(self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]):
            if len(ids) < 3:
                raise ValueError(
                    f"phrase {n} of text is {short_repr(phrases[n])}, which has no words: say what to segment."
                )
            if len(ids) > length:
                if not self._has_warned_of_long_phrase:
                    self._has_warned_of_long_phrase = True  # `warning_once` would warn of each phrase once
                    logger.warning(
                        f"The phrase {short_repr(phrases[n])} has {len(ids)} tokens and is cut to "
                        f"max_text_length={length}. Further long phrases are cut without a warning: shorten "
                        "them, or use a model with a larger max_text_length."
                    )
                ids = [*ids[: length - 1], self.tokenizer.eos_token_id]
            input_ids[n, : len(ids)] = ids
        return input_ids

    @torch.no_grad()
    def post_process_referring_segmentation(
        self,
        outputs: Any,
        target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        threshold: float | None = None,
        image_index: torch.Tensor | list[int] | None = None,
        original_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        output_details: bool = False,
    ) -> list[torch.Tensor] | list[dict[str, Any]]:
        """Make the masks of `N` phrases at the sizes of their images (official `engine/engine.py`, `inference`).

        Args:
            outputs: what the model returned, or anything else whose `logits` are `(N, h, w)`.
            target_sizes: heights and widths in pixels: `(N, 2)` for the phrases, `(1, 2)` for one image that all
                phrases share, or, together with `image_index`, `(B, 2)` for the images. They must be the sizes of the
                upright images, which the processor returned as `original_sizes`.
            threshold: a pixel is foreground where its probability is above this; `mask_threshold` by default.
            image_index (`(N,)`): which image each phrase speaks of.
            original_sizes: another name for `target_sizes`.
            output_details: whether to return a dict for each phrase and not its mask alone.

        Returns:
            `N` boolean masks `(height, width)` on the logits' device. With `output_details`, `N` dicts of
            - `mask`: the same mask;
            - `probabilities`: a float32 tensor `(height, width)` on the same device, from 0 to 1. Where interpolation
              overshoots, they are cut off there, after the mask has been made;
            - `score`: the mean of these probabilities inside the mask, a float; 0.0 if the mask is empty;
            - `box`: the pixels that the mask spans, `{"xmin", "ymin", "xmax", "ymax"}`, where `xmax` and `ymax` are
              one beyond its last column and row; None if the mask is empty.

        Raises:
            ValueError: if there are no sizes or both, sizes, `image_index` and phrases do not fit together, the
                threshold is no probability, or logits are not finite (for this check the CPU waits once for a GPU).
        """
        logits = outputs.logits
        threshold = checked_threshold(self.mask_threshold if threshold is None else threshold, "threshold")
        sizes = _sizes_of_phrases(logits, target_sizes, original_sizes, image_index)
        _refuse_infinite(logits)
        results = []
        for probabilities in self.restore_probabilities(logits, sizes):
            masks = foreground(probabilities, threshold)
            results += map(details_of, masks, probabilities) if output_details else masks
        return results

    def restore_probabilities(self, logits: torch.Tensor, sizes: Iterable[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """Bring logits of `N` phrases to the sizes of their images. Nothing is checked, and nobody waits for a GPU.

        Args:
            logits (`(N, h, w)`): of any floating type.
            sizes: the height and width in pixels of each phrase's image.

        Yields:
            Probabilities `(n, height, width)` in float32 of the next `n` phrases, whose images have the same size.
            Interpolation can overshoot 0 and 1 a little. `foreground` makes masks of them.
        """
        side, first = self.image_processor.size["height"], 0
        for size, phrases in groupby(map(tuple, sizes)):
            last = first + len(list(phrases))
            for part in logits[first:last].split(max(1, RESTORED_AT_ONCE // (size[0] * size[1]))):
                with torch.autocast(logits.device.type, enabled=False):  # half precision would shift masks' edges
                    probabilities = undo_letterbox(part.float().sigmoid(), size, side)
                yield probabilities
            first = last


DetrisImageProcessor.register_for_auto_class()
DetrisProcessor.register_for_auto_class()


# --- phrases in every container --------------------------------------------------------------------------------------


def _holds_text(values: Any) -> bool:
    """Tell whether values are a text, or lists whose first element is one."""
    while isinstance(values, (list, tuple)) and values:
        values = values[0]
    return isinstance(values, str)


def _as_phrases(text: Any, name: str) -> list:
    """Return a phrase, or what any ordered container of phrases or of lists of phrases holds, as a list."""
    if isinstance(text, np.ndarray) and text.dtype.kind in "UO":
        text = text.tolist()  # an array without axes becomes its only phrase
    if isinstance(text, str):
        return [text]
    if not isinstance(text, Iterable) or isinstance(text, NO_PHRASES):
        raise TypeError(
            f"{name} is of type {type(text).__name__}: give a phrase, a list of phrases, or a list with a list of "
            "phrases for each image."
        )
    return list(text)


def _pair_text_with_images(text: Any, image_count: int | None) -> tuple[list[str], np.ndarray]:
    """Return all phrases in one list, and the index of each one's image; `image_count` is None without images."""
    texts = _as_phrases(text, "text")
    if not texts:
        raise ValueError("text is empty: give at least one phrase.")
    if isinstance(texts[0], str):
        groups = [texts] if image_count == 1 else [[phrase] for phrase in texts]
    else:
        groups = [_as_phrases(group, f"text[{index}]") for index, group in enumerate(texts)]
        if not all(groups):
            raise ValueError(f"text[{groups.index([])}] is empty: give at least one phrase for each image.")
    if image_count not in (None, len(groups)):
        raise ValueError(
            f"{len(groups)} texts for {image_count} images: give one phrase for each image, or a list with a list "
            "of phrases for each image."
        )
    phrases = [phrase for group in groups for phrase in group]
    for n, phrase in enumerate(phrases):
        if not isinstance(phrase, str):
            raise TypeError(
                f"phrase {n} of text is {short_repr(phrase)}, of type {type(phrase).__name__}: give a string."
            )
    return phrases, np.repeat(np.arange(len(groups)), [len(group) for group in groups])


# --- from logits to masks --------------------------------------------------------------------------------------------


def _sizes_of_phrases(
    logits: torch.Tensor, target_sizes: Any, original_sizes: Any, image_index: Any
) -> list[tuple[int, int]]:
    """Return the height and width of each phrase's image; refuse sizes that do not fit with a ValueError."""
    if target_sizes is not None and original_sizes is not None:
        raise ValueError("target_sizes and original_sizes are two names for the same sizes: give one of them.")
    name, given = ("target_sizes", target_sizes) if original_sizes is None else ("original_sizes", original_sizes)
    if given is None:
        raise ValueError(
            "target_sizes is missing: give the (height, width) of each image, which the processor returned as "
            "original_sizes."
        )
    sizes = torch.as_tensor(given, device="cpu")
    pairs = sizes.ndim == 2 and sizes.shape[1] == 2
    if not pairs or sizes.is_floating_point() or not ((sizes >= 1) & (sizes <= MAX_SIDE)).all():
        raise ValueError(
            f"{name} is {given}: give a (height, width) in whole pixels for each image, at most {MAX_SIDE:,}."
        )
    if image_index is None:
        sizes = sizes.expand(len(logits), 2) if len(sizes) == 1 else sizes
    else:
        image_index = torch.as_tensor(image_index, dtype=torch.long, device="cpu")
        if image_index.numel() and not (0 <= image_index.min() and image_index.max() < len(sizes)):
            raise ValueError(f"image_index is {image_index.tolist()}, but {name} has {len(sizes)} images.")
        sizes = sizes[image_index]
    if logits.ndim != 3 or len(sizes) != len(logits):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit the sizes of {len(sizes)} phrases: give (N, h, w) and "
            f"N {name}, or an image_index of N entries."
        )
    return sizes.tolist()


def _refuse_infinite(logits: torch.Tensor) -> None:
    finite = logits.isfinite()
    if not finite.all():
        phrase = int((~finite).flatten(1).any(1).int().argmax())
        raise ValueError(
            f"The logits of phrase {phrase} are not finite, so there is no mask: look for NaN or infinite numbers in "
            "the model's weights and inputs, or take fp32 or bf16 for fp16."
        )


def foreground(probabilities: torch.Tensor, threshold: float) -> torch.Tensor:
    """The mask of a map of probabilities: the pixels above the threshold (official `engine/engine.py`)."""
    return probabilities > threshold


def details_of(mask: torch.Tensor, probabilities: torch.Tensor) -> dict[str, Any]:
    """Return a mask `(height, width)` with the probabilities that it was made of, its score and its box."""
    probabilities = probabilities.clamp(0, 1)
    rows, columns = (mask.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
    score, box = 0.0, None
    if rows:
        score = probabilities[mask].mean().item()
        box = {"xmin": columns[0], "ymin": rows[0], "xmax": columns[-1] + 1, "ymax": rows[-1] + 1}
    return {"mask": mask, "probabilities": probabilities, "score": score, "box": box}


# --- arguments and saved fields --------------------------------------------------------------------------------------


@contextmanager
def _configuration_errors(source: str | os.PathLike) -> Iterator[None]:
    """Turn the errors that a saved configuration causes into a ValueError with the place, the cause and a remedy."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"The processor's configuration in {source} is no JSON object of fields ({one_line(error)}): save or "
            "download it again."
        ) from error


def _fixed_image_arguments(processor: DetrisImageProcessor) -> dict[str, tuple]:
    """Return the arguments that other image processors take, each with the values that change nothing here."""
    done = ("resize", "rescale", "normalize", "convert_rgb", "pad")
    return {f"do_{what}": (True,) for what in done} | {
        "do_center_crop": (False,),
        "rescale_factor": (1 / 255,),
        "data_format": ("channels_first", ChannelDimension.FIRST),
        "size": (processor.size, processor.size["height"]),
        "image_mean": (processor.image_mean,),
        "image_std": (processor.image_std,),
    }


def _refuse_contradictions(given: Mapping[str, Any], fixed: Mapping[str, tuple]) -> None:
    """Refuse arguments that are unknown, or whose value is neither None nor a `fixed` one, with a TypeError."""
    for name, value in given.items():
        if name not in fixed:
            raise TypeError(
                f"There is no argument {name!r}: leave it out, the checkpoint says how inputs are prepared."
            )
        value = list(value) if isinstance(value, (tuple, np.ndarray)) else value
        agrees = any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in fixed[name])
        if value is not None and not agrees:
            raise TypeError(
                f"{name} is {short_repr(value)}, but here it is always {fixed[name][0]!r}: leave it out, or load "
                "a checkpoint made with another."
            )


def _checked_channels(values: Any, name: str, least: float) -> list[float]:
    """Return three numbers from `least` to 1, one for each channel; refuse anything else with a ValueError."""
    if (
        not isinstance(values, (list, tuple))
        or len(values) != 3
        or not all(isinstance(v, (int, float)) and not isinstance(v, bool) and least <= v <= 1 for v in values)
    ):
        raise ValueError(
            f"{name} is {short_repr(values)}: give three numbers from {least:.3g} to 1, for red, green and blue "
            "from 0 to 1."
        )
    return list(values)


def _make_processor(cls: type, image_class: type, image_arguments: tuple, *arguments: Any) -> DetrisProcessor:
    """Make a processor from its image processor's class and arguments, and from its own further arguments."""
    return cls(image_class(*image_arguments), *arguments)
