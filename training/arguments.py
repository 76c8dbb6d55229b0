"""The arguments of `train_hf.py`: three dataclasses, how they are read, and every check of their values.

What is wrong is refused by name and value, before anything else is read.
"""

import itertools
import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_bitsandbytes_available

from configuration_detris import DetrisConfig, short_repr
from data.mixture import parse_mixture
from data.tables import HUB, parse_columns
from data.untrusted import load_yaml
from model_card import METRIC_NAMES
from processing_detris import CLIP_TOKENIZER

WEIGHTS_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
QUANTIZATIONS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "8bit": {"load_in_8bit": True},
}


@dataclass
class ModelArguments:
    """Which model: a saved DETRIS, or a new one around two pretrained backbones."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Saved DETRIS: a folder or a Hub id."})
    vision_backbone: str | None = field(default=None, metadata={"help": "DINOv2 for a new DETRIS: folder or Hub id."})
    text_backbone: str | None = field(default=None, metadata={"help": "CLIP for a new DETRIS."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of CLIP's tokenizer. Default: the model's own, or "
            f"{CLIP_TOKENIZER} if the text backbone is an original file."
        },
    )
    model_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of DetrisConfig for a new DETRIS; JSON on the command line."}
    )
    peft_method: str | None = field(
        default=None,
        metadata={"help": "What a new DETRIS trains inside its backbones: detris, lora, detris+lora or none."},
    )
    quantize_backbones: str | None = field(
        default=None,
        metadata={"help": "'4bit' or '8bit' for the frozen backbones (bitsandbytes, CUDA); needs save_adapter_only."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of the backbones: eager, sdpa, flex_attention, flash_attention_2 (with bf16 or fp16), "
            "or another name that transformers knows. Default: sdpa."
        },
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the square input; else the model's."})
    max_text_length: int | None = field(default=None, metadata={"help": "Tokens of a phrase; else the model's."})

    def __post_init__(self):
        self.model_config = _as_mapping(self.model_config, "model_config")
        DetrisConfig.refuse_unknown(self.model_config)
        _check_texts(self)
        _check_not_empty(self, "model_name_or_path", "vision_backbone", "text_backbone", "tokenizer", "peft_method")
        _check_not_empty(self, "attn_implementation")
        for name in ("image_size", "max_text_length"):
            _check_number(name, getattr(self, name), COUNT, optional=True)
        backbones = [self.vision_backbone, self.text_backbone]
        new = all(backbones)
        if any(backbones) != new or new == bool(self.model_name_or_path):
            raise ValueError("Give either model_name_or_path, or both vision_backbone and text_backbone.")
        saved = self.model_name_or_path
        if saved is not None and (Path(saved).suffix in WEIGHTS_SUFFIXES or Path(saved).is_file()):
            raise ValueError(
                f"model_name_or_path is {saved}, a file of weights: convert it first, by `python "
                f"convert_detris_checkpoint.py {saved} <folder>`, and give that folder."
            )
        for name in ("model_config", "peft_method"):
            if getattr(self, name) and not new:
                raise ValueError(f"{name} describes a new model; the one at model_name_or_path has its own.")
        if self.quantize_backbones not in (None, *QUANTIZATIONS):
            raise ValueError(
                f"quantize_backbones is {self.quantize_backbones!r}: give one of {', '.join(QUANTIZATIONS)}."
            )
        if self.quantize_backbones and not is_bitsandbytes_available():
            raise ValueError("quantize_backbones needs bitsandbytes: install it, or leave the backbones as they are.")
        for name in ("model_name_or_path", "vision_backbone", "text_backbone", "tokenizer"):
            _check_exists_or_may_be_of_hub(name, getattr(self, name))


@dataclass
class DataArguments:
    """Which rows. A row is one referred object with all its phrases (`data/records.py`)."""

    dataset: str = field(
        default="shapes",
        metadata={
            "help": "'shapes', '<name>/<split_by>' such as 'refcoco/unc', 'hub:<id>' of a table on the Hub or of a "
            "set that data.prepare has pushed, a folder of your own with a metadata.jsonl, a folder made by "
            "data.prepare or save_to_disk, a file or folder of a table, or several that are trained on together, as "
            "'refcoco/unc + 0.5*hub:someone/mine:train': the first one's other splits are taken."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read training rows while they are needed from the Parquet files that data.prepare has made or "
            "pushed; dataloader_drop_last is ignored. Resuming needs the same number of processes and workers."
        },
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Streamed rows among which each worker draws the next one."}
    )
    keep_leaks: bool = field(
        default=False, metadata={"help": "Keep training images of a mixture that are in any split tested on."}
    )
    data_root: str | None = field(default=None, metadata={"help": "Folder of the REFER layout, for 'refcoco/unc'."})
    images: str | None = field(
        default=None,
        metadata={
            "help": "Image folder for REFER sets that are not published ones, such as 'rrsisd/unc', and for tables "
            "that hold file names."
        },
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Which columns of a table of a layout of its own hold what, such as 'image=photo mask=polygon "
            "text=caption'; holds for all tables that are read. In a file also a mapping."
        },
    )
    shapes_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "How 'shapes' is drawn: seed, sizes (images by split), image_size, max_objects, object_scale; "
            "JSON on the command line."
        },
    )
    train_split: str = "train"
    eval_split: str = field(default="val", metadata={"help": "Split that chooses the best checkpoint."})
    eval_first_phrase_only: bool = field(
        default=False,
        metadata={"help": "Choose the best checkpoint by each object's first phrase only, as the official code does."},
    )
    test_splits: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Splits that --do_predict runs over: of the data set, as 'val', or of another, as "
            "'refcoco+:unc:testA', 'prepared/mine:val' or 'hub:someone/mine:val'."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Take only the first rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Take only the first rows of each split."})

    def __post_init__(self):
        self.shapes_config = _as_mapping(self.shapes_config, "shapes_config")
        self.columns = _as_columns(self.columns)
        _check_texts(self)
        _check_not_empty(self, "dataset", "data_root", "train_split", "eval_split")
        for name in ("max_train_samples", "max_eval_samples"):
            _check_number(name, getattr(self, name), COUNT, optional=True)
        _check_number("shuffle_buffer_size", self.shuffle_buffer_size, COUNT)
        if self.streaming and self.max_train_samples:
            raise ValueError("streaming reads whole splits: leave max_train_samples out.")
        if not isinstance(self.test_splits, list) or not all(isinstance(name, str) for name in self.test_splits):
            raise ValueError(f"test_splits is {self.test_splits!r}: give a list, such as [val, testA].")
        for name in self.test_splits:
            if name.count(":") == 0 and "/" in name:
                raise ValueError(f"test_splits has {name!r}, a data set without a split: write one, as {name}:val.")
            if os.path.exists(name.rpartition(":")[0]):
                continue
            if name.count(":") > 2 or name.startswith(HUB) and name.count(":") < 2:
                raise ValueError(
                    f"test_splits has {name!r}: give a split of --dataset such as 'val', or data set and split such "
                    "as 'refcoco+:unc:testA', 'prepared/mine:val' or 'hub:someone/mine:val'."
                )
        if self.images is not None and self.data_root is None and not self._may_read_tables():
            raise ValueError(
                "images is the folder of the images of a REFER set or a table: give data_root, too, or leave it out."
            )

    def _may_read_tables(self) -> bool:
        """Whether a data set is of the Hub, or a file or folder here."""
        names = [member.name for member in parse_mixture(self.dataset, self.train_split)]
        names += [name.rpartition(":")[0] for name in self.test_splits]
        return any(name.startswith(HUB) or os.path.exists(name) for name in names)


@dataclass
class DetrisTrainingArguments(TrainingArguments):
    """TrainingArguments with the paper's recipe as defaults. The optimizer is always Adam; `optim` is not read."""

    learning_rate: float = 1e-4
    num_train_epochs: float = 65.0
    per_device_train_batch_size: int = 32
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Objects of an optimizer step over all processes and accumulated steps; takes the place of "
            "per_device_train_batch_size."
        },
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Norm that gradients are clipped to; 0 turns clipping off."}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Any other than 'constant' takes the place of the milestones."}
    )
    milestones: list[float] = field(
        default_factory=lambda: [35.0, 55.0], metadata={"help": "Epochs after which the learning rate drops."}
    )
    milestone_factor: float = field(
        default=0.1, metadata={"help": "Factor that multiplies the learning rate at each milestone."}
    )
    adapter_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "The adapters' learning rate as a multiple of the head's."}
    )
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "mean_iou"
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric."}
    )
    logging_nan_inf_filter: bool = False  # it would wait for the device at each step
    remove_unused_columns: bool = False  # the collators read the rows, not the model
    dataloader_pin_memory: bool = torch.accelerator.is_available()
    use_cpu: bool = not torch.accelerator.is_available()  # without it, bf16 is refused on a CPU
    ddp_find_unused_parameters: bool | None = False  # each parameter that is trained gets a gradient in every step
    # SyncBatchNorm keeps the statistics equal in all processes. Elsewhere the main process's own are those that count:
    # they get saved, and `EvaluatingTrainer.evaluation_loop` gives them to the others, so no step has to.
    ddp_broadcast_buffers: bool | None = False
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Delete an older run's checkpoints, model and results in output_dir; ignored when that run is "
            "resumed."
        },
    )
    save_adapter_only: bool = field(
        default=False,
        metadata={"help": "Save adapters and head alone, with where the frozen backbones are from."},
    )
    save_masks: bool = field(
        default=True, metadata={"help": "Write each predicted mask and a picture of it, not only its IoU."}
    )
    hub_strategy: str = "end"  # before the end there is no card to push
    model_license: str = field(default="mit", metadata={"help": "Licence of the weights, for the model card."})
    report_to: None | str | list[str] = field(
        default_factory=lambda: "tensorboard" if is_tensorboard_available() else "none"
    )

    def __post_init__(self):
        _check_training_arguments(self)
        if not self.do_train:  # nothing is evaluated or saved on the way
            self.eval_strategy = self.save_strategy = "no"
            self.load_best_model_at_end = False
        # Each process reads the backbones: with FSDP, transformers would else fill them in all but one with noise.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        super().__post_init__()
        _check_batches_of_processes(self.accelerator_config)
        # Otherwise the host would wait for the device whenever it copies a batch. PyTorch pins nothing for Apple's
        # GPUs, where a copy that does not wait can read memory that has been freed (pytorch/pytorch#189690).
        if self.dataloader_pin_memory and self.device.type != "mps":
            self.accelerator_config.non_blocking = True
        if self.global_batch_size is not None:
            parts = self.world_size * self.gradient_accumulation_steps
            if self.global_batch_size % parts:
                raise ValueError(
                    f"global_batch_size is {self.global_batch_size}: it must be a positive multiple of {parts}, which "
                    f"is {self.world_size} processes times {self.gradient_accumulation_steps} accumulated steps."
                )
            self.per_device_train_batch_size = self.global_batch_size // parts

    @property
    def n_gpu(self) -> int:
        """At most one: Trainer would spread a single process over all GPUs, without synchronised batch norm."""
        return min(super().n_gpu, 1)


def parse_arguments(
    argv: list[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, DetrisTrainingArguments]:
    """Arguments from a YAML or JSON file, if one comes first, and from the command line, which wins.

    Args:
        description: the program's description, for `--help`.

    Raises:
        ValueError: an argument is unknown, or its value is invalid.
        OSError: the file cannot be read.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, DetrisTrainingArguments), description=description, allow_abbrev=False
    )
    parser.error = _refuse_arguments
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        path, argv = argv[0], argv[1:]
        defaults = load_yaml(path)
        if not isinstance(defaults, dict):
            raise ValueError(f"{path} holds no arguments: write one to a line, such as 'learning_rate: 1e-4'.")
        known = {argument.name for dataclass in parser.dataclass_types for argument in fields(dataclass)}
        unknown = set(defaults) - known
        if unknown:
            raise ValueError(
                f"{path} sets {sorted(unknown, key=str)}, which are no arguments; `--help` lists those there are."
            )
        # As text, a number of the file is read like one of the command line: 1.5 is no seed.
        numbers = {name: str(value) for name, value in defaults.items() if type(value) in (int, float)}
        parser.set_defaults(**defaults | numbers)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def check_combination(
    model_args: ModelArguments, data_args: DataArguments, training_args: DetrisTrainingArguments
) -> None:
    """Refuse arguments that are valid one by one, but together make no run.

    Raises:
        ValueError: says which argument is missing, or which one has to go.
    """
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("There is nothing to do: give --do_train, --do_eval, --do_predict or several of them.")
    if training_args.do_predict and not data_args.test_splits:
        raise ValueError("do_predict needs test_splits: name the splits to segment.")
    if training_args.resume_from_checkpoint and not training_args.do_train:
        raise ValueError(
            "resume_from_checkpoint goes on with training: give --do_train, or model_name_or_path instead."
        )
    if training_args.resume_from_checkpoint and (
        training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    ):
        raise ValueError(
            "A run with FSDP cannot be resumed, because its checkpoints hold no optimizer that another run can read: "
            "resume a run without FSDP, or start a new one from the checkpoint by --model_name_or_path."
        )
    if training_args.do_train and model_args.quantize_backbones and not training_args.save_adapter_only:
        raise ValueError("Quantised backbones cannot be saved: give --save_adapter_only too.")


def check_fits_model(training_args: DetrisTrainingArguments, config: DetrisConfig) -> None:
    """Refuse with a ValueError to train backbones that would not be saved."""
    if training_args.do_train and training_args.save_adapter_only and not config.freeze_backbones:
        raise ValueError(
            "save_adapter_only leaves out the backbones, but freeze_backbones is false: leave save_adapter_only out."
        )


# --- checks of single values ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """Which finite numbers an argument may be."""

    low: float = 0
    high: float = math.inf
    above: bool = False  # `low` itself is excluded
    whole: bool = False

    def admit(self, value: Any) -> bool:
        """Return whether the value is a finite number within the bounds, and a whole one if it must be."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        if isinstance(value, int) and abs(value) >= 2**63:  # larger ones do not even fit a float
            return False
        return math.isfinite(value) and (self.low < value if self.above else self.low <= value) and value < self.high

    def __str__(self) -> str:
        kind, least = "whole" if self.whole else "finite", "above" if self.above else "of at least"
        below = "" if self.high == math.inf else f" and below {self.high}"
        return f"a {kind} number {least} {self.low}{below}"


NON_NEGATIVE, POSITIVE = Bounds(), Bounds(above=True)
NON_NEGATIVE_WHOLE, COUNT = Bounds(whole=True), Bounds(1, whole=True)
SEED = Bounds(0, 2**32, whole=True)  # NumPy takes no larger seed
NUMBERS = {
    "learning_rate": NON_NEGATIVE,
    "adapter_learning_rate_multiplier": NON_NEGATIVE,
    "weight_decay": NON_NEGATIVE,
    "adam_beta1": Bounds(0, 1),
    "adam_beta2": Bounds(0, 1),
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NON_NEGATIVE,
    "milestone_factor": POSITIVE,
    "num_train_epochs": POSITIVE,
    "warmup_steps": NON_NEGATIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "dataloader_num_workers": NON_NEGATIVE_WHOLE,
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_delay": NON_NEGATIVE,
    "ddp_timeout": COUNT,
    "seed": SEED,
}
OPTIONAL_NUMBERS = {
    "global_batch_size": COUNT,
    "eval_steps": POSITIVE,
    "eval_accumulation_steps": COUNT,
    "save_total_limit": COUNT,
    "early_stopping_patience": COUNT,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "data_seed": SEED,
}


def _check_number(name: str, value: Any, bounds: Bounds, optional: bool = False) -> None:
    """Raise a ValueError that names the argument if its value is not within bounds; `optional` admits None."""
    if not (optional and value is None or bounds.admit(value)):
        leave_out = ", or leave it out" if optional else ""
        raise ValueError(f"{name} is {short_repr(value)}: give {bounds}{leave_out}.")


def _check_texts(args: Any) -> None:
    """Raise a ValueError that names the first argument that must be text and is not: YAML reads `[a]` as a list."""
    for name, kind in get_type_hints(type(args)).items():
        value = getattr(args, name)
        optional = kind == str | None
        if name == "fsdp" and value is True:  # without a value on the command line
            continue
        if (optional or kind is str) and not (optional and value is None or isinstance(value, (str, os.PathLike))):
            raise ValueError(f"{name} is {short_repr(value)}: give text, between quotes if it is in a file.")


def _check_not_empty(args: Any, *names: str) -> None:
    """Refuse empty texts, which a shell writes for a variable that is not set: they would count as not given."""
    for name in names:
        if getattr(args, name) == "":
            raise ValueError(f"{name} is empty: give a value, or leave it out.")


def _check_training_arguments(args: DetrisTrainingArguments) -> None:
    """Raise a ValueError that names the first training argument whose value is invalid."""
    _check_texts(args)
    for name, bounds in NUMBERS.items():
        _check_number(name, getattr(args, name), bounds)
    for name, bounds in OPTIONAL_NUMBERS.items():
        _check_number(name, getattr(args, name), bounds, optional=True)
    if args.max_steps != -1:
        _check_number("max_steps", args.max_steps, COUNT)
    if not isinstance(args.milestones, list):
        raise ValueError(f"milestones is {args.milestones!r}: give a list of epochs, such as [35, 55].")
    for milestone in args.milestones:
        _check_number("A milestone", milestone, POSITIVE)
    if any(later <= earlier for earlier, later in itertools.pairwise(args.milestones)):
        raise ValueError(f"milestones is {args.milestones}: give each epoch once, in their order.")
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        raise ValueError(
            f"warmup_steps is {args.warmup_steps}, but the milestones' schedule has no warm-up: give another "
            "lr_scheduler_type, such as constant_with_warmup."
        )
    if args.logging_nan_inf_filter:
        raise ValueError(
            "logging_nan_inf_filter is true, but a loss that is not finite stops the training: leave it out."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name) and args.push_to_hub:
            raise ValueError(
                f"{name} rounds the weights in memory, and push_to_hub would upload them so: leave one of them out, "
                "or evaluate by autocast, with bf16."
            )
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor is {args.label_smoothing_factor}: DETRIS's loss has none, give 0.")
    if args.metric_for_best_model is not None:
        if args.metric_for_best_model.removeprefix("eval_") not in METRIC_NAMES:
            raise ValueError(
                f"metric_for_best_model is {args.metric_for_best_model!r}: give one of {', '.join(METRIC_NAMES)}."
            )
    if args.batch_eval_metrics:
        raise ValueError("batch_eval_metrics is true, but the metric is of whole splits: leave it out.")
    if args.prediction_loss_only:
        raise ValueError("prediction_loss_only is true, but an evaluation gives metrics and no loss: leave it out.")
    if args.include_for_metrics:
        raise ValueError(
            f"include_for_metrics is {args.include_for_metrics}, but the metric reads counts alone: leave it out."
        )
    if args.parallelism_config is not None:
        raise ValueError("parallelism_config is given, but DETRIS is trained by data parallelism alone: leave it out.")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise ValueError(
            "dataloader_persistent_workers is true, but there are no workers: give dataloader_num_workers, too."
        )
    _check_not_empty(args, "output_dir", "resume_from_checkpoint")


def _check_batches_of_processes(config: AcceleratorConfig) -> None:
    """Refuse with a ValueError to divide rows among processes in another way than whole batches by turns.

    `EvaluatingTrainer` knows from this order which rows a batch holds, and where its objects were evaluated already.
    """
    for name, usual in (("split_batches", False), ("dispatch_batches", False), ("even_batches", True)):
        value = getattr(config, name)
        if value not in (None, usual):
            raise ValueError(
                f"accelerator_config sets {name} to {str(value).lower()}, but each process reads whole batches of its "
                f"own, as many as any other: leave {name} out."
            )


def _check_exists_or_may_be_of_hub(name: str, value: str | None) -> None:
    """Refuse with a ValueError what is no file or folder here, and cannot be an id on the Hub either."""
    if value is None or os.path.exists(value):
        return
    try:
        validate_repo_id(value)
    except HFValidationError:
        raise ValueError(
            f"{name} is {value}: there is no such file or folder here, and no id on the Hub is like it."
        ) from None


def _as_mapping(value: dict | str | None, name: str) -> dict:
    """A dictionary argument: a mapping in a file, JSON on the command line. Raises ValueError if it is neither."""
    try:
        value = json.loads(value) if isinstance(value, str) else {} if value is None else value
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is {short_repr(value)}, which is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}: give a mapping, on the command line as JSON like '{{\"key\": 1}}'.")
    return value


def _as_columns(value: list[str] | dict[str, str] | None) -> dict[str, str]:
    """The names of a table's columns by what they hold: `image=photo …` in a list, or a mapping in a file.

    Raises:
        ValueError: it is neither, or says twice which column something is.
    """
    if isinstance(value, list) and all(isinstance(pair, str) for pair in value):
        return parse_columns(value)
    columns = {} if value is None else value
    if not isinstance(columns, dict) or not all(
        isinstance(text, str) and text for text in [*columns, *columns.values()]
    ):
        raise ValueError(
            f"columns is {short_repr(value)}: give what each column holds and its name, such as 'image=photo "
            "mask=polygon text=caption'."
        )
    return columns


def _refuse_arguments(message: str) -> None:
    """Takes the place of `ArgumentParser.error`, which prints hundreds of options."""
    raise ValueError(f"{message} (`--help` lists all arguments)")
