"""Train, evaluate and run DETRIS with the Hugging Face Trainer.

    python train_hf.py configs/quickstart.yaml --learning_rate 5e-4
    accelerate launch --num_processes 4 train_hf.py configs/base_refcoco.yaml --data_root path/to/refer
    python train_hf.py configs/base_refcoco.yaml --data_root path/to/refer --resume_from_checkpoint last
    python train_hf.py --model_name_or_path runs/base_refcoco --data_root path/to/refer \
        --test_splits refcoco:unc:val refcoco:unc:testA refcoco+:unc:val refcocog:umd:test --do_predict

A YAML or JSON file may come first; it holds the same arguments, and those on the command line win. They are the fields
of the three dataclasses in `training/arguments.py`; `--help` lists them with all that `TrainingArguments` brings.
"""

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from transformers import BitsAndBytesConfig, EarlyStoppingCallback, set_seed

from convert_detris_checkpoint import make_processor
from data.mixture import Member, Mixture
from data.streaming import StreamedRows
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import CLIP_TOKENIZER, DetrisProcessor
from training.arguments import (
    QUANTIZATIONS,
    DataArguments,
    DetrisTrainingArguments,
    ModelArguments,
    check_combination,
    check_fits_model,
    parse_arguments,
)
from training.processes import in_all_processes, leave_process_group
from training.results import evaluate_and_predict, report, write_card, write_report
from training.rows import Rows, load_rows
from training.run_folder import PrepareFolderOnTrainBegin, lock_run_folder
from training.stopping import RunStopped, StopAtSignal, how_to_go_on
from training.trainer import DetrisTrainer

# Arguments that go to the model as they are, if they are given.
OVERRIDES = ("image_size", "max_text_length", "peft_method", "attn_implementation")

logger = logging.getLogger(__name__)


def build_model(args: ModelArguments) -> tuple[DetrisForReferringSegmentation, DetrisProcessor]:
    """The model, and the processor that fits its configuration.

    Raises:
        OSError: a folder or Hub id cannot be read.
        ValueError: a field of the configuration is invalid, or the tokenizer has more symbols than the model reads.
    """
    overrides = {name: getattr(args, name) for name in OVERRIDES}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if args.quantize_backbones is not None:
        overrides["quantization_config"] = BitsAndBytesConfig(**QUANTIZATIONS[args.quantize_backbones])
    if args.model_name_or_path is None:
        model = DetrisForReferringSegmentation.from_backbones(
            args.vision_backbone, args.text_backbone, **args.model_config | overrides
        )
    else:
        model = DetrisForReferringSegmentation.from_pretrained(args.model_name_or_path, **overrides)
    source = args.model_name_or_path or args.text_backbone
    name = args.tokenizer or (CLIP_TOKENIZER if Path(source).is_file() else source)
    return model, make_processor(name, model.config)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return all metrics.

    Raises:
        ValueError, OSError: an argument, the data, the model, the checkpoint or the output folder is invalid.
        FloatingPointError: loss, logits or weights are not finite.
        SystemExit: SIGTERM or SIGINT has stopped the run; its code is 128 and the signal's number.
    """
    with ExitStack() as stack:
        return run(prepare(sys.argv[1:] if argv is None else argv, stack))


class PreparedRun(NamedTuple):
    """What a run needs, put together by `prepare`."""

    trainer: DetrisTrainer
    data_args: DataArguments
    members: list[Member]  # the data sets that `dataset` names
    test_rows: dict[str, datasets.Dataset]  # by the names of the test splits
    folder: PrepareFolderOnTrainBegin


def prepare(argv: list[str], stack: ExitStack) -> PreparedRun:
    """Run every step that can reject the run: arguments, folder and checkpoint first, then the slow data and model.

    Args:
        stack: holds the run's folder until it is closed.
    """
    model_args, data_args, training_args = parse_arguments(argv, __doc__)
    check_combination(model_args, data_args, training_args)
    sources = (model_args.model_name_or_path, model_args.vision_backbone, model_args.text_backbone)
    folder = lock_run_folder(training_args, (*sources, model_args.tokenizer), stack)
    rows = read_rows(data_args, training_args)
    if training_args.do_train and not data_args.streaming:
        disable_drop_last_if_one_batch(training_args, len(rows.train))
    trainer = make_trainer(model_args, training_args, rows.train, rows.evaluation)
    return PreparedRun(trainer, data_args, rows.members, rows.tests, folder)


def disable_drop_last_if_one_batch(args: DetrisTrainingArguments, rows: int) -> None:
    """Switch `dataloader_drop_last` off if the rows fill no whole batch: it would drop them all."""
    batch_size = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch_size:
        logger.warning(f"dataloader_drop_last is off: {rows} objects fill no batch of {batch_size}.")
        args.dataloader_drop_last = False


def read_rows(data_args: DataArguments, training_args: DetrisTrainingArguments) -> Rows:
    """All rows. The main process reads them first, so that the others find in the cache what it downloaded."""

    def read() -> Rows:
        with training_args.main_process_first(desc="reading the data"):
            return load_rows(data_args, training_args.do_train, training_args.do_eval, training_args.do_predict)

    return in_all_processes(read)


def make_trainer(
    model_args: ModelArguments,
    args: DetrisTrainingArguments,
    train_rows: datasets.Dataset | Mixture | StreamedRows | None,
    eval_rows: datasets.Dataset | None,
) -> DetrisTrainer:
    """A trainer with its model. Raises OSError or ValueError if the model cannot be built, or not trained as asked."""
    set_seed(args.seed)
    model, processor = in_all_processes(lambda: build_model(model_args))
    check_fits_model(args, model.config)
    if args.do_train and args.save_adapter_only:
        in_all_processes(lambda: model.check_adapter_target(args.output_dir))
    if args.world_size > 1 and args.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    callbacks = []
    if args.do_train and args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    return in_all_processes(lambda: DetrisTrainer(model, args, processor, train_rows, eval_rows, callbacks))


def run(prepared: PreparedRun) -> dict[str, float]:
    """Train, evaluate, predict and push, as far as it is asked for; return all metrics.

    Raises:
        SystemExit: a signal has stopped the run.
    """
    trainer, args = prepared.trainer, prepared.trainer.args
    members = prepared.members
    metrics, stopped = {}, False
    trainer.add_callback(prepared.folder)
    with StopAtSignal() as stop:
        trainer.add_callback(stop)
        try:
            if args.do_train:
                metrics |= train(trainer)
            evaluated = evaluate_and_predict(trainer, prepared.data_args, members, prepared.test_rows)
        except RunStopped:
            stopped = True
    if stopped:
        in_training = args.do_train and not metrics
        if in_training:
            trainer.callback_handler.on_train_end(args, trainer.state, trainer.control)  # loggers write what they hold
        if trainer.is_world_process_zero():
            said = how_to_go_on(stop.received, args, trainer.state, in_training)
            print(f"\n{said}", file=sys.stderr)  # below a progress bar
    else:
        metrics |= evaluated.metrics
        if trainer.is_world_process_zero():
            write_card(trainer, prepared.data_args, members, evaluated.card)
            write_report(trainer, prepared.data_args, evaluated)
        if args.push_to_hub:
            trainer.push_to_hub()
    # Otherwise a process could end, and its launcher end the others, while the main process still writes.
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    if stopped:
        raise SystemExit(128 + stop.received)
    return metrics


def train(trainer: DetrisTrainer) -> dict[str, float]:
    """Train, save the model, and return what is known of the training."""
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # any other call would push the model before it is evaluated
    trainer.save_state()
    trained = {"trained_parameters": trainer.model.num_parameters(only_trainable=True)}
    return report(trainer, "train", result.metrics | trained)


def run_as_program() -> None:
    """`main` for the command line: prints user errors as one sentence and bugs with a traceback."""
    with ExitStack() as stack:
        prepared = None
        try:
            prepared = prepare(sys.argv[1:], stack)
            run(prepared)
        except FloatingPointError as error:
            print(error, file=sys.stderr)
            sys.exit(1)
        except (ValueError, OSError) as error:
            if prepared is not None and (prepared.folder.begun or not prepared.trainer.args.do_train):
                raise
            logger.debug("The run is refused.", exc_info=True)
            # All processes reject what `prepare` rejects, so one process of each machine prints the error. Before they
            # form a group, each process prints it: the launcher may end the others as soon as one has ended.
            in_process_group = torch.distributed.is_initialized()
            if prepared is not None or not in_process_group or os.environ.get("LOCAL_RANK", "0") == "0":
                print(error, file=sys.stderr)
            leave_process_group()
            sys.exit(2)


if __name__ == "__main__":
    run_as_program()
