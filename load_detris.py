"""A saved DETRIS as a pipeline, from a folder or the Hub, loaded by the classes of this repository.

A model on the Hub brings a copy of the code that it was saved with. `pipeline(…, trust_remote_code=True)` runs that
copy; here nothing that lies beside a model is run, so that anybody's model may be named.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import CLIPTokenizer
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, PROCESSOR_NAME, find_adapter_config_file

from backbones_detris import refuse_file
from configuration_detris import DetrisConfig, as_value_error, errors_begin_with, read_regular, short_repr
from modeling_detris import DetrisForReferringSegmentation
from peft_detris import BUILT_IN_ADAPTER
from pipeline_detris import ReferringImageSegmentationPipeline
from processing_detris import DetrisImageProcessor, DetrisProcessor
from repository_files import (
    OFFICIAL_SUFFIX,
    conversion_command,
    find_commit,
    find_file,
    refuse_official_checkpoints,
    require_repository_id,
)
from switching_detris import NO_ADAPTER

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    model: str | os.PathLike,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    vision_backbone: str | None = None,
    text_backbone: str | None = None,
) -> ReferringImageSegmentationPipeline:
    """
    Load model and processor, further adapters if there are any, and put them into a pipeline.

    Args:
        model: folder or Hub id of a whole DETRIS, or of adapters, which are loaded into the backbones that they name.
        adapters: folders or Hub ids of further adapters, by the names that they get. The adapters of `model` are
            called `"default"` and stay the active ones.
        device: such as `"cpu"`, `"cuda:1"` or 1 for the second accelerator; by default the first accelerator, or the
            CPU if there is none.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; by default the one that a whole model was saved in, and
            float32 for adapters.
        revision: branch, tag or commit of the repository `model`.
        vision_backbone, text_backbone: folders or Hub ids of the backbones, if they lie elsewhere than adapters say.

    Raises:
        OSError: if a folder, repository or file is missing, damaged or cannot be reached.
        TypeError: if an argument is of another type.
        ValueError: if an argument has an impossible value, or files do not fit each other.
    """
    source = _path_or_id(model, "model")
    device, dtype = find_device(device), find_dtype(dtype)
    adapters = _check_adapter_names(adapters)
    if not os.path.isdir(source):
        revision = find_commit(source, revision)
    elif revision is not None:
        raise ValueError(f"revision is {revision!r}, but {source} is a folder, which has none: leave it out.")
    has_adapters = _require_model(source, revision)
    for adapter in adapters.values():
        _require_adapters(adapter)
    backbones = {"vision_backbone": vision_backbone, "text_backbone": text_backbone}
    backbones = {name: value for name, value in backbones.items() if value is not None}
    if backbones and not has_adapters:
        raise ValueError(f"{source} is a whole model with backbones of its own: leave {' and '.join(backbones)} out.")

    processor = load_processor(source, revision)
    options = backbones if dtype is None or adapters else backbones | {"dtype": dtype}
    detris = DetrisForReferringSegmentation.from_pretrained(source, revision=revision, **options)
    for name, adapter in adapters.items():
        detris.load_adapter(adapter, adapter_name=name)
    if adapters:
        detris.set_adapter(BUILT_IN_ADAPTER)
        detris.to(dtype or detris.dtype)  # only now, because adapters know their backbones by numbers in float32
        detris.config.dtype = detris.dtype
    _check_processor(processor, detris.config, source)
    return ReferringImageSegmentationPipeline(model=detris.eval(), processor=processor, device=device)


def load_processor(source: str, revision: str | None = None) -> DetrisProcessor:
    """
    Load the processor that lies beside a model.

    `DetrisProcessor.from_pretrained` would load its parts by transformers' Auto classes, which ask to run the code
    beside them.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit of the repository.

    Raises:
        OSError: if a file is missing or cannot be reached.
        ValueError: if a file is broken or says what is impossible.
    """
    path = find_file(source, PROCESSOR_NAME, revision)
    if path is None:
        raise OSError(
            f"{source} holds a model but no processor, because it has no {PROCESSOR_NAME}: save one beside it by "
            f"`DetrisProcessor.from_config(model.config, tokenizer).save_pretrained({source!r})`."
        )
    with errors_begin_with(source), as_value_error("its processor cannot be read"):
        fields = json.loads(read_regular(path))
        if not isinstance(fields, dict):
            raise ValueError(f"its {PROCESSOR_NAME} holds no fields: save or download it again.")
        image_processor = DetrisImageProcessor.from_pretrained(source, revision=revision)
        tokenizer = CLIPTokenizer.from_pretrained(source, revision=revision)
        own_fields = {name: fields[name] for name in ("max_text_length", "mask_threshold") if name in fields}
        return DetrisProcessor(image_processor, tokenizer, **own_fields)


def _check_processor(processor: DetrisProcessor, config: DetrisConfig, source: str) -> None:
    """Raise ValueError if the processor makes what the model does not read."""
    side, symbols = processor.image_processor.size["height"], len(processor.tokenizer)
    if side != config.image_size or symbols > config.text_config.vocab_size:
        raise ValueError(
            f"{source}: its processor makes images of {side} pixels and knows {symbols} symbols, but its model reads "
            f"{config.image_size} pixels and {config.text_config.vocab_size} symbols: save the processor again."
        )


def named_adapters(given: Iterable[str]) -> dict[str, str]:
    """
    Read the adapters of a command line, each `name=path`, or `path` alone, whose last part is then the name.

    Returns:
        What [`load_pipeline`] takes as `adapters`.

    Raises:
        ValueError: if one has no name or no path, or two have the same name.
    """
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or os.path.isdir(text):
            name, path = Path(text).name.replace(".", "_"), text
        if not name or not path:
            raise ValueError(f"--adapter is {short_repr(text)}: give name=path, as in refcoco+=runs/refcocoplus.")
        if name in adapters:
            raise ValueError(f"Two adapters are called {short_repr(name)}: give them names by --adapter name=path.")
        adapters[name] = path
    return adapters


# --- places -------------------------------------------------------------------------------------------------------


def _path_or_id(source: str | os.PathLike, what: str) -> str:
    """Return a folder or Hub id as text; refuse what can be neither, and files, with an error that says what to do."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"{what} is of type {type(source).__name__}: give a folder or a Hub id.")
    source = os.fspath(source)
    if not source:
        raise ValueError(f"{what} is empty: give a folder or a Hub id.")
    if not os.path.exists(source):
        require_repository_id(source)
    elif not os.path.isdir(source):
        if source.endswith(OFFICIAL_SUFFIX):
            raise OSError(
                f"{source} is a checkpoint file, not a saved model: if it is an official one, convert it by "
                f"`{conversion_command(source)}` and load what that writes."
            )
        raise OSError(f"{source} is a file: give the folder of a saved model, or a Hub id.")
    else:
        refuse_file(source)
    return source


def _require_model(source: str, revision: str | None) -> bool:
    """Refuse a place that holds no DETRIS with an OSError or ValueError; return whether it holds adapters."""
    if find_file(source, CONFIG_NAME, revision) is None:
        refuse_official_checkpoints(source, revision)
        raise OSError(f"{source} holds no model, because it has no {CONFIG_NAME}: name the place of a saved DETRIS.")
    kind = DetrisConfig.get_config_dict(source, revision=revision)[0].get("model_type")
    if kind != DetrisConfig.model_type:
        raise ValueError(f"{source} holds a model of type {short_repr(kind)}, not a DETRIS: name the place of one.")
    return find_adapter_config_file(source, revision=revision) is not None  # as the model's own loader decides


def _require_adapters(source: str) -> None:
    if find_file(source, ADAPTER_CONFIG_NAME) is None:
        refuse_official_checkpoints(source)
        raise OSError(f"{source} holds no adapters, because it has no {ADAPTER_CONFIG_NAME}: name the place of some.")


def _check_adapter_names(adapters: Mapping[str, str | os.PathLike] | None) -> dict[str, str]:
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"adapters is of type {type(adapters).__name__}: give a mapping from name to folder or Hub id."
        )
    for name in adapters:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"{short_repr(name)} cannot name adapters: give a text without dots.")
        if name in (BUILT_IN_ADAPTER, NO_ADAPTER):
            raise ValueError(
                f"{name!r} cannot name further adapters, because it means those of the model or none: give another."
            )
    return {name: _path_or_id(source, f"The place of the adapters {name!r}") for name, source in adapters.items()}


# --- device and precision -----------------------------------------------------------------------------------------


def find_device(device: str | int | torch.device | None = None) -> torch.device:
    """
    Find the device to compute on.

    Args:
        device: as for [`load_pipeline`]; -1 is the CPU, as in all pipelines of transformers.

    Raises:
        ValueError: if there is no such device on this machine.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator else 0
    present = f"cpu and {count} of {accelerator.type}" if accelerator else "cpu alone"
    if device is None:
        return torch.device(accelerator.type, 0) if accelerator else torch.device("cpu")
    unknown = ValueError(f"device is {short_repr(device)}, but PyTorch sees {present} here: give one of these.")
    if isinstance(device, int) and not isinstance(device, bool):
        if device == -1:
            return torch.device("cpu")
        if not 0 <= device < count:
            raise unknown
        return torch.device(accelerator.type, device)
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise unknown from None
    on_accelerator = accelerator is not None and found.type == accelerator.type and (found.index or 0) < count
    if found.type != "cpu" and not on_accelerator:
        raise unknown
    return found


def find_dtype(dtype: str | torch.dtype | None = None) -> torch.dtype | None:
    """Return a precision given by its name or as it is; ValueError if the model does not compute in it."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype is {short_repr(dtype)}: give {', '.join(DTYPES)}.")
    return found
