"""Converts official checkpoints to this project's layout and back.

    python convert_detris_checkpoint.py best_model.pth detris-base-refcoco --dataset refcoco/unc
    python convert_detris_checkpoint.py x6team/DETRIS --file NAME.pth detris-base-refcoco --dataset refcoco/unc
    python convert_detris_checkpoint.py detris-base-refcoco best_model.pth --to-official

The first command writes a folder that `AutoModel` and `AutoProcessor` load; widths, depths and adapter layers are read
off the checkpoint. The second fetches the checkpoint from a repository on the Hub; without --file it lists those that
are there. The third writes a checkpoint that the official code (jiaqihuang01/DETRIS) loads.
"""

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTokenizer, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME

# Code that the release of 2026-11-26 saved with adapters imports the two readers from here.
from backbones_detris import read_clip_text, read_dinov2  # noqa: F401
from checkpoint_files import (
    bare_state_dict,
    check_names,
    read_tensors,
    refuse_pipes,
    require_file,
    require_plain_tensors,
    skeleton,
    tensors_for_model,
)
from configuration_detris import DetrisConfig, as_value_error, check_values, errors_begin_with, one_line, short_repr
from data.untrusted import load_yaml
from model_card import make_model_card
from modeling_detris import DetrisForReferringSegmentation
from official_layout import (
    MAX_LAYERS,
    NECK_LEVELS,
    UNUSED_TENSOR,
    depth_of,
    expected_tensors,
    name_table,
    numbers_in,
    official_to_ours,
    read_text_config,
    read_vision_config,
    shape_of,
    tensors_to_official,
)
from processing_detris import CLIP_TOKENIZER, DetrisProcessor
from repository_files import (
    conversion_command,
    find_commit,
    find_file,
    list_names,
    may_be_repository,
    official_checkpoints,
)

# Tokens of a phrase by data set, which a checkpoint does not tell (official `config/<dataset>/*.yaml`, `word_len`).
TEXT_LENGTHS = {"refcoco/unc": 17, "refcoco+/unc": 17, "refcocog/umd": 22, "refcocog/google": 17}
# Models whose checkpoints are easily mistaken for an official DETRIS, and how names of their tensors begin. ETRIS
# comes before CRIS, because its names also begin as those of CRIS do.
OTHER_MODELS = {
    "of ETRIS": ("backbone.", "bridger."),
    "of CRIS": ("backbone.", "neck."),
    "of CLIP alone": ("visual.", "token_embedding."),
    "of DINOv2 alone": ("patch_embed.", "blocks."),
    "in the layout of this project already": ("vision_model.", "text_model."),
}


# --- weights ------------------------------------------------------------------------------------------------------


def convert_state_dict(official: Mapping[str, Any], config: DetrisConfig) -> dict[str, torch.Tensor]:
    """
    Convert an official state dict to one that `DetrisForReferringSegmentation(config)` loads with `strict=True`.

    Args:
        official: the official state dict, or a training checkpoint that holds it under `"state_dict"`,
            `"model_state_dict"` or `"model"`; names may begin with `module.` and `_orig_mod.`.
        config: the configuration of the model that will load the result.

    Returns:
        `dict[str, torch.Tensor]` by our names, in float32 whatever type they had. They are views of the official
        tensors where possible.

    Raises:
        ValueError: if `config` is of a kind that the official code does not have, the checkpoint is of another model,
            tensors are missing, too many, of another shape than `config` says or not of plain numbers, or a number is
            NaN or infinite; the message names them.
    """
    _require_official_kind(config)
    official = _official_tensors(official)
    _check_depths(config)
    what = "The official checkpoint does not fit the configuration"
    remedy = "Get the file again, or give the configuration (--recipe) that it was trained with."
    return official_to_ours(official, DetrisForReferringSegmentation, config, name_table(config), what, remedy)


def convert_to_official(state_dict: Mapping[str, torch.Tensor], config: DetrisConfig) -> dict[str, torch.Tensor]:
    """
    Convert our state dict to an official one, which the official model loads with `strict=True`.

    Tensors without an effect are written as zeros: the neck's query and key weights, and CLIP's logit scale.

    Args:
        state_dict: the state dict of a `DetrisForReferringSegmentation(config)`.
        config: its configuration.

    Returns:
        `dict[str, torch.Tensor]` by official names, without `module.` in front, in float32 whatever type they had.

    Raises:
        ValueError: if the official code has no such model, tensors do not fit `config`, or a number is NaN or
            infinite; the message names them.
    """
    _require_official_kind(config)
    if config.vision_config.model_type != "dinov2_with_registers":
        raise ValueError(
            f"The vision backbone is of type {config.vision_config.model_type}: the official code has only DINOv2 "
            "with registers."
        )
    _check_depths(config)
    require_plain_tensors(state_dict)
    state_dict = {name: tensor for name, tensor in state_dict.items() if name != UNUSED_TENSOR}
    table, what = name_table(config), "The weights do not fit the configuration"
    check_names(state_dict, [our_name for _, our_names, _ in table for our_name in our_names], what=what)
    expected = expected_tensors(DetrisForReferringSegmentation, config, table)
    weights = tensors_for_model(state_dict, expected, what=what)
    return tensors_to_official(weights, table) | {UNUSED_TENSOR: torch.tensor(0.0)}


def _official_tensors(official: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Find the weights in a checkpoint of DETRIS; raises ValueError if their names are those of another model."""
    tensors = bare_state_dict(official)
    for model, beginnings in OTHER_MODELS.items():
        if all(any(name.startswith(beginning) for name in tensors) for beginning in beginnings):
            raise ValueError(f"This is a checkpoint {model}, not of an official DETRIS: give one of those.")
    require_plain_tensors(tensors)
    return tensors


def _check_depths(config: DetrisConfig) -> None:
    """Refuse more layers than any model has with a ValueError, because listing and building each one takes time."""
    for field, depth in config.depths.items():
        if depth > MAX_LAYERS:
            raise ValueError(f"{field} is {short_repr(depth)}: no DETRIS has more than {MAX_LAYERS}.")


def _require_official_kind(config: DetrisConfig) -> None:
    """Refuse a model of a kind that the official code does not have with a ValueError."""
    if config.peft_method != "detris":
        raise ValueError(f"peft_method is {config.peft_method}: the official code has adapters of DETRIS only.")
    if len(config.feature_layers) + 1 != len(NECK_LEVELS):
        raise ValueError(
            f"feature_layers is {list(config.feature_layers)}: an official DETRIS has {len(NECK_LEVELS) - 1}."
        )


# --- recognition --------------------------------------------------------------------------------------------------


def recognize_config(official: Mapping[str, Any], **fields) -> DetrisConfig:
    """
    Read a configuration off an official state dict.

    Args:
        official: as for [`convert_state_dict`].
        **fields: fields of [`DetrisConfig`] that tensors do not show, or that are to differ from what they show;
            `vision_config` and `text_config` as mappings of the fields that differ.

    Raises:
        ValueError: if it is the checkpoint of another model, a tensor that a size is read from is missing or
            misshapen, or a size or field is invalid.
    """
    DetrisConfig.refuse_unknown(fields)
    official = _official_tensors(official)
    vision, text = "dinov2.blocks", "txt_backbone.transformer.resblocks"
    try:
        backbones = {"vision_config": read_vision_config(official), "text_config": read_text_config(official)}
        depth = backbones["vision_config"].num_hidden_layers
        recognized = {
            "feature_layers": [depth // 3, 2 * depth // 3],  # as in all official recipes
            "decoder_dim": shape_of(official, "neck.txt_proj.weight", 2)[0],
            "decoder_layers": depth_of(official, "decoder.layers"),
            "decoder_ffn_dim": shape_of(official, "decoder.layers.0.ffn.0.weight", 2)[0],
        }
        for side, layers in (("vision", vision), ("text", text)):
            adapted = sorted(map(int, numbers_in(official, rf"{re.escape(layers)}\.(\d+)\.adapter\.")))
            recognized[f"{side}_adapter_layers"] = adapted
            if adapted:
                adapter = f"{layers}.{adapted[0]}.adapter"
                recognized[f"{side}_adapter_dim"] = shape_of(official, f"{adapter}.D_fc1.weight", 2)[0]
                if side == "vision":
                    width = shape_of(official, f"{adapter}.cross.image_proj.weight", 2)[0]
                    recognized["aligner_attention_dim"] = width
    except ValueError as error:
        raise ValueError(f"{error} It is no whole official DETRIS: get the file again.") from None
    for name, config in backbones.items():
        backbones[name] = _config_with_fields(config, name, fields.pop(name, {}))
    return _build_config(DetrisConfig, "model_config", backbones | recognized | fields)


def _config_with_fields(config: PreTrainedConfig, name: str, fields: Any) -> PreTrainedConfig:
    """Change fields of a recognized configuration to what a recipe says; raises ValueError if they contradict it."""
    known = {field.name for field in dataclasses.fields(config)}
    if not isinstance(fields, Mapping) or not fields.keys() <= known | {"model_type"}:
        raise ValueError(f"{name} is {short_repr(fields)}: give a mapping of fields that {type(config).__name__} has.")
    for field in ("model_type", "num_hidden_layers"):
        found = getattr(config, field)
        if fields.get(field, found) != found:
            raise ValueError(f"{name}.{field} is {short_repr(fields[field])}, but the checkpoint has {found}.")
    return _build_config(type(config), name, config.to_dict() | fields)


def _build_config(config_class: type[PreTrainedConfig], name: str, fields: dict[str, Any]) -> PreTrainedConfig:
    with as_value_error(f"{name} has a field of a wrong type"):
        check_values(fields, name)
        return config_class(**fields)


# --- files --------------------------------------------------------------------------------------------------------


def from_official(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: str = CLIP_TOKENIZER,
    dataset: str = "",
    origin: str | None = None,
    **fields,
) -> None:
    """
    Write an official checkpoint as a folder of model, processor and model card; the folder appears when it is whole.

    Args:
        checkpoint: official `.pth`, a training checkpoint or a bare state dict.
        output_dir: folder to make.
        tokenizer: Hub id or folder of CLIP's tokenizer.
        dataset: what it was trained on, for the model card.
        origin: where the checkpoint comes from, for the model card; by default its file's name in backticks.
        **fields: as for [`recognize_config`].

    Raises:
        OSError: if a file is missing or damaged, or `output_dir` exists.
        ValueError: if the checkpoint is not a whole official DETRIS, or the tokenizer does not fit it.
    """
    output_dir = Path(output_dir)
    refuse_existing(output_dir)
    official = read_tensors(checkpoint)
    with errors_begin_with(checkpoint):
        config = recognize_config(official, **fields)
        processor = make_processor(tokenizer, config)
        tensors = convert_state_dict(official, config)
    model = skeleton(DetrisForReferringSegmentation, config)
    model.load_state_dict(tensors, assign=True)
    origin = (
        f"Converted from {origin or f'`{Path(checkpoint).name}`'}, a checkpoint in the official layout, as float32."
    )
    card = make_model_card(config, output_dir.name, origin, dataset.split(" + ") if dataset else [])
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card.save(folder / "README.md")
        folder.rename(output_dir)


def refuse_existing(output_dir: str | os.PathLike) -> None:
    """Refuse a folder to make that is there already with a FileExistsError."""
    if os.path.exists(output_dir):
        raise FileExistsError(f"{output_dir} exists: name a folder that does not.")


def make_processor(tokenizer_name: str, config: DetrisConfig) -> DetrisProcessor:
    """
    Build the processor of a model with this configuration.

    Args:
        tokenizer_name: Hub id or folder of CLIP's tokenizer.

    Raises:
        OSError: if the tokenizer cannot be read.
        ValueError: if it has more symbols than the model's text backbone reads.
    """
    refuse_pipes(tokenizer_name)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_name)
    except MemoryError:
        raise
    except Exception as error:  # `tokenizers` raises no other for broken files
        raise OSError(
            f"The tokenizer {tokenizer_name} cannot be read ({one_line(error)}): give the Hub id or folder of CLIP's."
        ) from error
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer of {tokenizer_name} has {len(tokenizer)} symbols, but the text backbone reads "
            f"{config.text_config.vocab_size}: give the tokenizer that belongs to it."
        )
    return DetrisProcessor.from_config(config, tokenizer)


def to_official(folder: str | os.PathLike, checkpoint: str | os.PathLike) -> None:
    """
    Write a saved DETRIS as a checkpoint that the official test script loads; the file appears when it is whole.

    Raises:
        OSError: if the folder cannot be read, or `checkpoint` exists.
        ValueError: if the model is of a kind that the official code does not have, or a number is NaN or infinite.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.exists():
        raise FileExistsError(f"{checkpoint} exists: name a file that does not.")
    weights = Path(folder) / SAFE_WEIGHTS_NAME
    require_file(weights, "give the path of a whole DETRIS, saved as a folder in one piece")
    refuse_pipes(folder)
    config = DetrisConfig.from_pretrained(folder)
    try:
        tensors = load_file(weights)  # maps the file; building a model would copy it
    except SafetensorError as error:
        raise OSError(f"{weights} is cut short or damaged ({one_line(error)}): save or download it again.") from None
    with errors_begin_with(folder):
        official = convert_to_official(tensors, config)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=f".{checkpoint.name}-") as scratch:
        # The official code trains and tests inside DataParallel, which puts `module.` in front of the names.
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in official.items()}}, f"{scratch}/model")
        os.rename(f"{scratch}/model", checkpoint)


# --- the Hub ------------------------------------------------------------------------------------------------------


def fetch_checkpoint(repository: str, file: str, revision: str | None = None) -> tuple[str, str]:
    """
    Fetch a file of a repository on the Hub into the cache, or find it there.

    Args:
        repository: Hub id.
        file: path of the file inside the repository.
        revision: branch, tag or commit; by default the main branch.

    Returns:
        where the file lies on this machine, and the commit that it is from.

    Raises:
        OSError: if there is no such repository, revision or file, or the Hub cannot be reached.
        ValueError: if `file` is no path inside a repository.
    """
    path = PurePosixPath(file)
    if not path.name or path.is_absolute() or ".." in path.parts or "\\" in file or not file.isprintable():
        raise ValueError(f"--file is {short_repr(file)}: give the path of a file inside {repository}.")
    commit = find_commit(repository, revision)
    checkpoint = find_file(repository, file, commit)
    if checkpoint is None:
        there = list_names(official_checkpoints(repository, commit)) or "none"
        raise FileNotFoundError(f"{repository} has no file {file}: give one of its .pth files, which are {there}.")
    return checkpoint, commit.resolved


def print_checkpoints(repository: str, revision: str | None = None) -> str:
    """
    Print the `.pth` files of a repository on the Hub with their sizes, and return the name of the first.

    Raises:
        OSError: if there is no such repository or revision, the Hub cannot be reached, or there are no such files.
    """
    commit = find_commit(repository, revision)
    sizes = official_checkpoints(repository, commit)
    if not sizes:
        raise FileNotFoundError(
            f"{repository} holds no .pth file: name a repository of official checkpoints, such as x6team/DETRIS."
        )
    print(f"{repository} at commit {commit.resolved}:")
    for name, size in sizes.items():
        shown = "size unknown" if size is None else f"{size / 2**20:,.1f} MiB"
        print(f"{shown:>14}  {one_line(name)}")
    return next(iter(sizes))


def is_on_hub(source: str, file: str | None, revision: str | None) -> bool:
    """
    Whether a source means a repository on the Hub. What is on this machine always means itself.

    Raises:
        ValueError: if a file or revision of a repository is asked for, but the source is on this machine.
    """
    if not os.path.exists(source):
        return bool(file or revision) or ("/" in source and may_be_repository(source))
    for name, value in (("file", file), ("revision", revision)):
        if value is not None:
            raise ValueError(
                f"--{name} is for repositories on the Hub, but {source} is on this machine: leave it out."
            )
    return False


# --- the command line ---------------------------------------------------------------------------------------------


def _read_recipe(path: Path) -> dict[str, Any]:
    """Read a file like those in configs/; raises OSError or ValueError if it is none."""
    require_file(path, "give the path of a file such as those in configs/")
    recipe = load_yaml(path)
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model_config", {}), dict):
        raise ValueError(f"{path} is no recipe: give a file such as those in configs/.")
    for name, kind in (("dataset", str), ("image_size", int), ("max_text_length", int)):
        if recipe.get(name) is not None and type(recipe[name]) is not kind:
            raise ValueError(f"{path}: {name} is {short_repr(recipe[name])}, but it must be of type {kind.__name__}.")
    if not all(isinstance(name, str) for name in recipe.get("model_config", {})):
        raise ValueError(f"{path}: model_config names its fields by text only.")
    return recipe


def _read_fields(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Find the data set and the fields of the configuration that the checkpoint does not tell."""
    recipe = _read_recipe(Path(arguments.recipe)) if arguments.recipe else {}
    dataset = arguments.dataset or recipe.get("dataset")
    if arguments.max_text_length is not None:
        recipe["max_text_length"] = arguments.max_text_length
    elif arguments.dataset in TEXT_LENGTHS:
        recipe["max_text_length"] = TEXT_LENGTHS[arguments.dataset]
    if recipe.get("max_text_length") is None and not arguments.recipe:  # a recipe that says nothing has the default
        raise ValueError(
            f"A checkpoint does not tell how long phrases are, and dataset is {dataset!r}: give --dataset as one of "
            f"{', '.join(TEXT_LENGTHS)}, or --max_text_length, or --recipe."
        )
    if arguments.image_size is not None:
        recipe["image_size"] = arguments.image_size
    sizes = {name: recipe[name] for name in ("image_size", "max_text_length") if recipe.get(name) is not None}
    return dataset or "", recipe.get("model_config", {}) | sizes


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        help="official checkpoint, or the repository on the Hub that has it; with --to-official a saved DETRIS",
    )
    parser.add_argument(
        "output",
        nargs="?",
        help="folder to make; with --to-official the checkpoint to write; none to list a repository",
    )
    parser.add_argument("--file", help="the checkpoint in a repository on the Hub; without it they are listed")
    parser.add_argument("--revision", help="branch, tag or commit of the repository; its main branch by default")
    parser.add_argument("--to-official", action="store_true", help="write an official checkpoint")
    parser.add_argument(
        "--dataset", help=f"what it was trained on, which says the phrase length: {', '.join(TEXT_LENGTHS)}"
    )
    parser.add_argument("--max_text_length", type=int, help="tokens of a phrase, instead")
    parser.add_argument("--recipe", help="file in configs/ whose model_config and sizes are taken, instead")
    parser.add_argument("--image_size", type=int, help="side of the square input; 448 in all official recipes")
    parser.add_argument("--tokenizer", default=CLIP_TOKENIZER, help="Hub id or folder of CLIP's tokenizer")
    return parser.parse_intermixed_args(argv)  # so that options may stand between source and output


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    arguments = _parse(argv)
    source, output, file, revision = arguments.source, arguments.output, arguments.file, arguments.revision
    if arguments.to_official:
        for name in ("file", "revision", "dataset", "max_text_length", "recipe", "image_size"):
            if getattr(arguments, name) is not None:
                raise ValueError(
                    f"--{name} has no effect with --to-official, which takes all from the folder: leave it."
                )
        if output is None:
            raise ValueError("The checkpoint to write is missing: name it after the folder.")
        to_official(source, output)
        return
    on_hub = is_on_hub(source, file, revision)
    if on_hub and file is None:
        first = print_checkpoints(source, revision)
        command = one_line(conversion_command(source, first, revision))
        raise ValueError(f"Nothing was converted: name one of these files by --file, as `{command}` does.")
    if output is None:
        raise ValueError(f"The folder to make is missing: name it after {source}.")
    dataset, fields = _read_fields(arguments)
    origin = None
    if on_hub:
        refuse_existing(output)  # before much is fetched in vain
        source, commit = fetch_checkpoint(source, file, revision)
        origin = f"`{file}` of `{arguments.source}` on the Hub at commit `{commit}`"
    from_official(source, output, arguments.tokenizer, dataset, origin, **fields)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
