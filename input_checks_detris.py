"""What the model refuses: inputs that are missing, empty or do not fit each other."""

import torch

try:
    from .configuration_detris import DetrisConfig
except ImportError:
    if __package__:
        raise
    from configuration_detris import DetrisConfig


def check_inputs(
    config: DetrisConfig,
    pixel_values: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    image_index: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> None:
    """Raise ValueError if the model's inputs are missing, empty or do not fit each other.

    Numbers in them are checked where they `can_be_read`. Elsewhere PyTorch raises RuntimeError when the GPU meets an
    `image_index` that is out of range, and wrong labels make the loss NaN.
    """
    if pixel_values is None or input_ids is None:
        given, missing = ("phrases", "pixel_values") if pixel_values is None else ("images", "input_ids")
        raise ValueError(f"The model got {given} but no {missing}: it needs both, so give {missing} too.")
    size = config.image_size
    if pixel_values.shape[1:] != (3, size, size):
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)} but this model takes (images, 3, {size}, {size}): "
            "use its processor, or load the model with image_size= for another size."
        )
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give (phrases, tokens).")
    images, phrases = pixel_values.shape[0], input_ids.shape[0]  # not by `len`, which would fix them in a graph
    if images == 0 or phrases == 0:
        raise ValueError(f"The batch is empty ({images} images, {phrases} phrases): give at least one of each.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give that of input_ids, "
            f"{tuple(input_ids.shape)}."
        )
    if image_index is None:
        if images != phrases:
            raise ValueError(
                f"There are {phrases} phrases for {images} images: give image_index, the image of each phrase."
            )
    elif image_index.shape != input_ids.shape[:1] or image_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"image_index has shape {tuple(image_index.shape)} and type {image_index.dtype}: give one whole number "
            f"for each of the {phrases} phrases."
        )
    else:
        _check_range(image_index, images)
    if labels is not None:
        _check_labels(config, labels, phrases)


def can_be_read(tensor: torch.Tensor) -> bool:
    """Whether the program can read a tensor's numbers without waiting for a GPU or breaking a graph in two."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(image_index: torch.Tensor, images: int) -> None:
    in_range = ((image_index >= 0) & (image_index < images)).all()
    if not can_be_read(image_index):
        torch._assert_async(in_range, "image_index is out of range: images are counted from 0.")
    elif not in_range:
        raise ValueError(
            f"image_index is {image_index.tolist()}, which is out of range: there are {images} images, counted from 0."
        )


def _check_labels(config: DetrisConfig, labels: torch.Tensor, phrases: int) -> None:
    size = config.image_size
    if labels.shape != (phrases, size, size):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: give one mask ({size}, {size}), warped as its image is by the "
            f"processor, for each of the {phrases} phrases."
        )
    if labels.is_complex():
        raise ValueError(f"labels has the type {labels.dtype}: give numbers from 0 to 1.")
    if can_be_read(labels) and not are_masks(labels):
        raise ValueError(
            f"labels holds values from {labels.min().item()} to {labels.max().item()}: give 1 inside the mask, 0 "
            "outside, and numbers between them for soft edges."
        )


def are_masks(labels: torch.Tensor) -> torch.Tensor:
    """Whether all numbers lie in [0, 1]; a tensor of shape `()`, which does not make the CPU wait for a GPU."""
    return ((labels >= 0) & (labels <= 1)).all()
