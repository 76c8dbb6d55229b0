"""The task "referring-image-segmentation" of `transformers.pipeline`: images and phrases in, masks and scores out.

transformers finds this file through the configuration of a saved model, which `CUSTOM_PIPELINES` is entered in.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, Pipeline
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

try:
    from .configuration_detris import (
        TASK,
        checked_threshold,
        errors_begin_with,
        one_line,
        raise_if_out_of_memory,
        short_repr,
    )
except ImportError:
    if __package__:
        raise
    from configuration_detris import (
        TASK,
        checked_threshold,
        errors_begin_with,
        one_line,
        raise_if_out_of_memory,
        short_repr,
    )

PHRASES_AT_ONCE = 8  # so many at least go through the model together, however small the batch of images is
ITEM_KEYS = ("image", "text", "adapter_name")

Results = list[dict[str, Any]]  # of one image: a dict for each of its phrases


class ReferringImageSegmentationPipeline(Pipeline):
    """
    Segments what phrases name in images. The task is called `"referring-image-segmentation"`.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> segment = pipeline("referring-image-segmentation", model="runs/quickstart", trust_remote_code=True)
    >>> results = segment("photo.jpg", ["left cat", "the remote"])
    >>> results[0]
    {'label': 'left cat', 'score': 0.93, 'mask': <PIL.Image.Image image mode=L size=640x480>,
     'box': {'xmin': 7, 'ymin': 52, 'xmax': 317, 'ymax': 472}}

    >>> for results in segment(rows, batch_size=4):  # rows: dicts of an image and its text, such as a data set's
    ...     ...
    ```

    `pipeline` takes a folder or Hub id of a whole model or of adapters, besides `revision`, `device`, `dtype` and
    `model_kwargs`. Whoever has a model and its processor in memory makes the pipeline of them and puts the model into
    evaluation mode by that:

    ```python
    >>> segment = ReferringImageSegmentationPipeline(model=model, processor=processor, device="cuda")
    ```

    Args:
        model (`DetrisForReferringSegmentation`): the model.
        processor (`DetrisProcessor`): its processor.
        threshold, return_probabilities, timeout, batch_size, num_workers: defaults for all calls, see [`__call__`].
        device (`int`, `str` or `torch.device`, *optional*): where to run; by default the first GPU if there is one.

    Raises:
        TypeError: if there is an unknown argument.
        ValueError: if there is no processor, or an argument has a value that cannot work.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.pop("local_files_only", None)  # `transformers.pipeline` passes it on after use
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("processor is missing: give the model's processor, which AutoProcessor loads.")
        self.model.eval()

    def __call__(
        self,
        image: Any,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        threshold: float | None = None,
        adapter_name: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        return_probabilities: bool | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        timeout: float | None = None,
    ) -> Results | list[Results] | Iterator[Results]:
        """
        Segment what phrases name in one image or many.

        Args:
            image: a path, a URL, base64 text, a PIL image, or a NumPy array or torch tensor, as the processor takes
                them. Many images are a list or tuple of such, an array `(B, …)`, a data set, a column of one, or a
                generator. An image with its own text is a dict `{"image": …, "text": …}`, optionally with
                `"adapter_name"`, and so is a row of a data set.
            text: a phrase or a list of phrases, which hold for every image, or a list with a list of phrases for each
                image.
            threshold: a pixel belongs to the mask where its probability is above this; the processor's
                `mask_threshold` by default.
            adapter_name: the adapter to segment with, or a list with one for each phrase; `"__base__"` for none. By
                default the model's active adapter.
            return_probabilities: whether to return the probabilities of all pixels too.
            batch_size: how many images go through the model together, 1 by default. Their phrases go through it by
                `max(batch_size, 8)` at most, so that memory stays bounded.
            num_workers: processes that read and prepare images ahead, none by default.
            timeout: seconds to wait for the server of a URL; by default without end.

        Returns:
            For one image, a list with a dict for each phrase:
            - `label`: the phrase;
            - `score`: the mean probability inside the mask, a float; 0.0 if the mask is empty;
            - `mask`: a PIL image of mode `"L"` and the size of the upright photograph, 255 inside the mask and 0
              outside;
            - `box`: `{"xmin", "ymin", "xmax", "ymax"}` of the mask in pixels, where `xmax` and `ymax` are one beyond
              its last column and row; None if the mask is empty;
            - `probabilities`: with `return_probabilities`, a float32 array `(height, width)` from 0 to 1.

            For a list, tuple or array of images, a list of such lists. For a data set, a column or a generator, an
            iterator over such lists, which reads an image when its turn comes.

        Raises:
            OSError: if an image cannot be read; the message says which.
            TypeError: if an image or a phrase is of another type, or an argument or a key of a dict is unknown.
            ValueError: if text is missing or empty, there are not as many lists as images or not as many adapters as
                phrases, an adapter is unknown, or `threshold` is no probability.
        """
        settings = {"threshold": threshold, "return_probabilities": return_probabilities, "timeout": timeout}
        settings = {name: value for name, value in settings.items() if value is not None}
        settings |= {"batch_size": batch_size, "num_workers": num_workers}
        for name, values in (("text", text), ("adapter_name", adapter_name)):
            if values is not None and not isinstance(values, (str, list, tuple)):
                raise TypeError(
                    f"{name} is of type {type(values).__name__}: give a string, a list of strings, or a list with a "
                    "list of strings for each image; images with texts of their own go in as dicts."
                )
        if _is_one_image(image):
            return next(super().__call__(_Images([image], text, adapter_name, alone=True), **settings))
        if hasattr(image, "__len__") and hasattr(image, "__getitem__"):
            results = super().__call__(_Images(image, text, adapter_name), **settings)
        else:
            results = super().__call__(_stream(image, text, adapter_name), **settings)
        return list(results) if isinstance(image, (list, tuple, np.ndarray, torch.Tensor)) else results

    def _sanitize_parameters(
        self,
        threshold: float | None = None,
        return_probabilities: bool | None = None,
        timeout: float | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise TypeError(f"The pipeline takes no {', '.join(sorted(unknown))}: leave it out.")
        if threshold is not None:
            checked_threshold(threshold, "threshold")
        postprocessing = {"threshold": threshold, "return_probabilities": return_probabilities}
        postprocessing = {name: value for name, value in postprocessing.items() if value is not None}
        return {} if timeout is None else {"timeout": timeout}, {}, postprocessing

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Results]:
        """Return an iterator over the results of items, which [`preprocess`] takes; transformers calls this."""
        if isinstance(inputs, Dataset):
            items = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:
            items, num_workers = PipelineIterator(inputs, self.preprocess, preprocess_params), min(num_workers, 1)
        if num_workers:  # else tokenizers warns of processes that are forked after it has used threads
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        batches = DataLoader(items, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)
        forward_params = {**forward_params, "phrases_at_once": max(batch_size, PHRASES_AT_ONCE)}
        results = (
            self.postprocess(outputs, **postprocess_params)
            for batch in batches
            for outputs in self.forward(batch, **forward_params)
        )
        return _Results(results, len(inputs)) if isinstance(inputs, Dataset) else results

    def preprocess(self, item: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """Read the image of an item `{"image", "text", "adapter_name", "index"}` and prepare its phrases."""
        with _errors_name_image(item.get("index")):
            text = item.get("text")
            if text is None:
                raise ValueError("text is missing: say what to segment, by a phrase or a list of phrases.")
            phrases = [text] if isinstance(text, str) else list(text)
            for n, phrase in enumerate(phrases):
                if not isinstance(phrase, str):
                    raise TypeError(
                        f"phrase {n} of text is {short_repr(phrase)}, of type {type(phrase).__name__}: give a string."
                    )
            names = self._adapter_of_each(item.get("adapter_name"), len(phrases))
            image = _read_image(item["image"], timeout)
            inputs = self.processor(images=[image], text=phrases, return_tensors="pt")
        return {**inputs, "labels": phrases, "adapter_names": names}

    def _adapter_of_each(self, adapter_name: str | Sequence[str] | None, phrases: int) -> list[str | None]:
        names = [adapter_name] * phrases if adapter_name is None or isinstance(adapter_name, str) else adapter_name
        if len(names) != phrases:
            raise ValueError(f"There are {len(names)} adapter_name for {phrases} phrases: give one name, or one each.")
        self.model.check_adapter_names([name for name in names if name is not None])
        return list(names)

    def _forward(self, batch: dict[str, Any], phrases_at_once: int = PHRASES_AT_ONCE) -> list[dict[str, Any]]:
        """Run the model on a batch that `_collate` made; return logits and what [`postprocess`] needs, by images."""
        pixel_values = batch["pixel_values"].to(self.model.dtype)
        names, image_index = batch["adapter_names"], batch["image_index"]
        positions, logits = [], []
        for named in (False, True):  # phrases without a name leave the model as it is
            group = [n for n, name in enumerate(names) if (name is not None) == named]
            for part in torch.tensor(group, dtype=torch.long).split(phrases_at_once) if group else ():
                chosen = part.to(image_index.device)
                images, index = image_index[chosen].unique(return_inverse=True)
                outputs = self.model(
                    pixel_values=pixel_values[images],
                    input_ids=batch["input_ids"][chosen],
                    attention_mask=batch["attention_mask"][chosen],
                    image_index=index,
                    adapter_names=[names[n] for n in part.tolist()] if named else None,
                    return_dict=True,
                )
                positions.append(chosen)
                logits.append(outputs.logits)
        logits = torch.cat(logits)[torch.cat(positions).argsort()]
        counts = [len(labels) for labels in batch["labels"]]
        return [
            {"logits": maps, "original_sizes": size, "labels": labels}
            for maps, size, labels in zip(logits.split(counts), batch["original_sizes"].split(1), batch["labels"])
        ]

    def postprocess(
        self, outputs: dict[str, Any], threshold: float | None = None, return_probabilities: bool = False
    ) -> Results:
        """Make the results of one image from its logits, phrase by phrase, because a map of pixels takes memory."""
        results = []
        for label, logits in zip(outputs["labels"], outputs["logits"]):
            with errors_begin_with(short_repr(label)):
                (details,) = self.processor.post_process_referring_segmentation(
                    SimpleNamespace(logits=logits[None]), outputs["original_sizes"], threshold, output_details=True
                )
            mask = Image.fromarray(details["mask"].numpy().astype(np.uint8) * np.uint8(255))
            result = {"label": label, "score": details["score"], "mask": mask, "box": details["box"]}
            if return_probabilities:
                result["probabilities"] = details["probabilities"].numpy()
            results.append(result)
        return results

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and processor; `kwargs` go to the `save_pretrained` of both."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


# --- images, each with its text and adapters -------------------------------------------------------------------------


class _Images(Dataset):
    """Images of a sequence, which it is asked for when their turn comes, each with its text and adapters."""

    def __init__(self, images: Sequence, text: Any, adapter_name: Any, alone: bool = False):
        self.images, self.text, self.adapter_name, self.alone = images, text, adapter_name, alone
        for name, values in (("text", text), ("adapter_name", adapter_name)):
            if _has_one_for_each(values, name) and len(values) != len(images):
                raise ValueError(
                    f"{name} holds {len(values)} lists for {len(images)} images: give one list for each image, or a "
                    "flat list for all."
                )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _make_item(self.images[index], None if self.alone else index, self.text, self.adapter_name)


class _Results:
    """An iterator with a length, so that progress bars know how far it is."""

    def __init__(self, results: Iterator[Results], length: int):
        self.results, self.length = results, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Results]:
        return self

    def __next__(self) -> Results:
        return next(self.results)


def _stream(images: Iterable, text: Any, adapter_name: Any) -> Iterator[dict[str, Any]]:
    """Yield the items of images that are neither counted nor kept."""
    index = -1
    for index, image in enumerate(images):
        yield _make_item(image, index, text, adapter_name)
    for name, values in (("text", text), ("adapter_name", adapter_name)):
        if _has_one_for_each(values, name) and len(values) != index + 1:
            raise ValueError(f"{name} holds {len(values)} lists, but there were only {index + 1} images.")


def _is_one_image(image: Any) -> bool:
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return image.ndim != 4
    return isinstance(image, (str, bytes, Image.Image, Mapping)) or not (
        isinstance(image, Iterable) or hasattr(image, "__getitem__")
    )


def _has_one_for_each(values: Any, name: str) -> bool:
    """Tell whether there is a list for each image; raise ValueError if there are lists and strings."""
    lists = [isinstance(value, (list, tuple)) for value in values] if isinstance(values, (list, tuple)) else []
    if any(lists) and not all(lists):
        raise ValueError(f"{name} mixes strings with lists: give a flat list for all images, or a list for each.")
    return any(lists)


def _make_item(image: Any, index: int | None, text: Any, adapter_name: Any) -> dict[str, Any]:
    """Return what [`preprocess`] takes for an image, or for a dict of an image and its text.

    Its place among the others is `index`, or None if it was given alone.
    """
    given = {"text": text, "adapter_name": adapter_name}
    if index is not None:
        for name, values in given.items():
            if _has_one_for_each(values, name):
                if index >= len(values):
                    raise ValueError(f"{name} holds {len(values)} lists, but there are more images.")
                given[name] = values[index]
    if isinstance(image, Mapping):
        unknown = [short_repr(key) for key in image if key not in ITEM_KEYS]
        if unknown or "image" not in image:
            what = f"the unknown keys {', '.join(unknown[:10])}" if unknown else "no image"
            raise TypeError(f"A dict for the pipeline has {what}: give {', '.join(ITEM_KEYS)} (the last is optional).")
        if text is not None and "text" in image:
            raise ValueError("text is given twice, in a dict and in the call: leave one of them out.")
        given |= {name: value for name, value in image.items() if value is not None}
        image = given.pop("image")
    return {"image": image, "index": index, **given}


def _read_image(image: Any, timeout: float | None) -> Any:
    """Open a path, URL or base64 text; return anything else as it is, for the processor to take or to refuse.

    A file is opened here and not by `load_image`, because that would clip images of 16 bits.

    Raises:
        OSError: if there is no image; the message names the place.
    """
    source = os.fspath(image) if isinstance(image, os.PathLike) else image
    if not isinstance(source, (str, Image.Image)):
        return source
    image = source
    try:
        if isinstance(source, str):
            image = Image.open(source) if os.path.isfile(source) else load_image(source, timeout=timeout)
        if image.format == "EPS":  # to read it, Pillow would start a program
            raise ValueError("EPS files are programs: convert it to PNG.")
        image.load()
        return image
    except Exception as error:  # a broken file makes Pillow's decoders raise errors of many types
        raise_if_out_of_memory(error)
        name = source if isinstance(source, str) else getattr(source, "filename", "") or "The PIL image"
        raise OSError(f"{one_line(name, 300)} cannot be read as an image: {_reason(source, error)}") from error


def _reason(source: str | Image.Image, error: Exception) -> str:
    if isinstance(source, Image.Image) or source.startswith(("http://", "https://")) or os.path.isfile(source):
        return one_line(error, 200) or type(error).__name__
    if os.path.exists(source):
        return "it is no regular file."
    return "there is no such file, and it is neither a URL nor an image in base64."


@contextmanager
def _errors_name_image(index: int | None) -> Iterator[None]:
    """Say which of many images an error is about."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        if index is None:
            raise
        kind = next(kind for kind in (OSError, TypeError, ValueError) if isinstance(error, kind))
        message, name = str(error), f"images[{index}]"  # the processor sees one image at a time
        message = message.replace("images[0]", name) if "images[0]" in message else f"{name}: {message}"
        raise kind(message) from error


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Put prepared images and their phrases together into one batch."""
    batch = {name: torch.cat([item[name] for item in items]) for name in ("pixel_values", "original_sizes")}
    batch |= {name: torch.cat([item[name] for item in items]) for name in ("input_ids", "attention_mask")}
    counts = torch.tensor([len(item["labels"]) for item in items])
    batch["image_index"] = torch.arange(len(items)).repeat_interleave(counts)  # (N,)
    batch["labels"] = [item["labels"] for item in items]
    batch["adapter_names"] = [name for item in items for name in item["adapter_names"]]
    return batch


# What the configuration of a saved model says under `custom_pipelines`, so that transformers finds this file.
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_detris.ReferringImageSegmentationPipeline", "pt": ["AutoModel"]}}

if TASK not in PIPELINE_REGISTRY.supported_tasks:  # for `pipeline(TASK, model=…)` with a model in memory
    PIPELINE_REGISTRY.register_pipeline(TASK, ReferringImageSegmentationPipeline, pt_model=AutoModel)

__all__ = ["CUSTOM_PIPELINES", "ReferringImageSegmentationPipeline"]
