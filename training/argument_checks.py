"""Numbers among the arguments, checked before anything is read: a wrong one is refused by its name and value."""

import itertools
import math
import os
from dataclasses import dataclass
from typing import Any, get_type_hints

from configuration_detris import short_repr
from model_card import METRIC_NAMES


@dataclass(frozen=True)
class Bounds:
    """Which finite numbers an argument may be."""

    low: float = 0
    high: float = math.inf
    above: bool = False  # `low` itself is excluded
    whole: bool = False

    def admit(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        if isinstance(value, int) and abs(value) >= 2**63:  # too large for a float, too
            return False
        return math.isfinite(value) and (self.low < value if self.above else self.low <= value) and value < self.high

    def __str__(self) -> str:
        kind, least = "whole" if self.whole else "finite", "above" if self.above else "of at least"
        below = "" if self.high == math.inf else f" and below {self.high}"
        return f"a {kind} number {least} {self.low}{below}"


ANY, POSITIVE, COUNT = Bounds(), Bounds(above=True), Bounds(1, whole=True)
NATURAL, SEED = Bounds(whole=True), Bounds(0, 2**32, whole=True)  # NumPy takes no larger seed
NUMBERS = {
    "learning_rate": ANY,
    "adapter_learning_rate_multiplier": ANY,
    "weight_decay": ANY,
    "adam_beta1": Bounds(0, 1),
    "adam_beta2": Bounds(0, 1),
    "adam_epsilon": POSITIVE,
    "max_grad_norm": ANY,
    "milestone_factor": POSITIVE,
    "num_train_epochs": POSITIVE,
    "warmup_steps": ANY,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "dataloader_num_workers": NATURAL,
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_delay": ANY,
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


def check_number(name: str, value: Any, bounds: Bounds, optional: bool = False) -> None:
    """Raise a ValueError that names the argument if its value is not within bounds; `optional` admits None."""
    if not (optional and value is None or bounds.admit(value)):
        leave_out = ", or leave it out" if optional else ""
        raise ValueError(f"{name} is {short_repr(value)}: give {bounds}{leave_out}.")


def check_texts(args: Any) -> None:
    """Raise a ValueError that names the first argument that must be text and is not: YAML reads `[a]` as a list."""
    for name, kind in get_type_hints(type(args)).items():
        value = getattr(args, name)
        optional = kind == str | None
        if (optional or kind is str) and not (optional and value is None or isinstance(value, (str, os.PathLike))):
            raise ValueError(f"{name} is {short_repr(value)}: give text, between quotes if it is in a file.")


def check_not_empty(args: Any, *names: str) -> None:
    """An empty text, as of a shell's variable that is not set, would count as not given."""
    for name in names:
        if getattr(args, name) == "":
            raise ValueError(f"{name} is empty: give a value, or leave it out.")


def refuse_arguments(message: str) -> None:
    """In the place of `ArgumentParser.error`, which prints hundreds of options."""
    raise ValueError(f"{message} (`--help` lists all arguments)")


def check_training_arguments(args: Any) -> None:
    """Raise a ValueError that names the first of the training arguments whose value is invalid."""
    check_texts(args)
    for name, bounds in NUMBERS.items():
        check_number(name, getattr(args, name), bounds)
    for name, bounds in OPTIONAL_NUMBERS.items():
        check_number(name, getattr(args, name), bounds, optional=True)
    if args.max_steps != -1:
        check_number("max_steps", args.max_steps, COUNT)
    if not isinstance(args.milestones, list):
        raise ValueError(f"milestones is {args.milestones!r}: give a list of epochs, such as [35, 55].")
    for milestone in args.milestones:
        check_number("A milestone", milestone, POSITIVE)
    if any(later <= earlier for earlier, later in itertools.pairwise(args.milestones)):
        raise ValueError(f"milestones is {args.milestones}: give each epoch once, in their order.")
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        raise ValueError(
            f"warmup_steps is {args.warmup_steps}, but the milestones' schedule has no warm-up: give another "
            "lr_scheduler_type, such as constant_with_warmup."
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
    check_not_empty(args, "output_dir", "resume_from_checkpoint")
