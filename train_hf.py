"""Train, evaluate and run DETRIS with the Hugging Face Trainer.

    python train_hf.py configs/quickstart.yaml --learning_rate 5e-4
    accelerate launch --num_processes 4 train_hf.py configs/base_refcoco.yaml --data_root path/to/refer
    python train_hf.py configs/base_refcoco.yaml --data_root path/to/refer --resume_from_checkpoint last
    python train_hf.py --model_name_or_path runs/base_refcoco --data_root path/to/refer \
        --test_splits refcoco:unc:val refcoco:unc:testA refcoco+:unc:val refcocog:umd:test --do_predict

A YAML or JSON file may come first; it holds the same arguments, and those on the command line win. They are the fields
of the three dataclasses below; `--help` lists them with all that `TrainingArguments` brings.
"""

import functools
import json
import logging
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import datasets
import evaluate
import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import (
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PredictionOutput

from configuration_detris import one_line, raise_if_out_of_memory
from convert_detris_checkpoint import make_processor
from data.decoding import read_image, read_mask, read_phrases, read_whole_mask
from data.mixture import SEPARATOR, Member, mix, parse_mixture
from data.prepare import STORED, SUMMARY, require_whole
from data.refer import (
    SOURCES,
    RleMask,
    instead_of_lmdb,
    load_refer,
    require_columns,
    require_regular_files,
    require_rows,
)
from data.shapes import load_shapes
from data.streaming import StreamedBatches, StreamedRows, parquet_files
from gallery import Sample, draw_sample
from model_card import METRIC_NAMES, make_model_card
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
from training.checkpointing_trainer import CheckpointingTrainer
from training.processes import in_all_processes, leave_process_group
from training.run_folder import BeginRun, check_unused, find_checkpoint, lies_in, locked
from training.stopping import RunStopped, StopAtSignal, how_to_go_on, leave_signals_to_main_process

METRIC = Path(__file__).parent / "metrics" / "referring_iou"
RUNS = "streamed_runs"  # in the log history, of which every checkpoint has a copy
PADDING = -100  # what Trainer fills arrays of unequal length with when it gathers them
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves

logger = logging.getLogger(__name__)


# --- data ---------------------------------------------------------------------------------------------------------


def load_splits(name: str, args: DataArguments) -> datasets.DatasetDict:
    """All splits of the data set `name`, images and masks not yet decoded.

    Raises:
        ValueError: there is no such data set, or its columns are not those of `FEATURES`.
        OSError: a file is missing or broken, or the Hub has no such data set.
    """
    if name == "shapes":
        splits = load_shapes(**args.shapes_config)
    elif _is_prepared(name, args):
        splits = _load_prepared(name)
    elif Path(name).is_dir():
        if not any(Path(name, file).exists() for file in SAVED_BY_DATASETS):
            raise ValueError(
                f"The folder {name} was made neither by data.prepare nor by save_to_disk: prepare what it holds by "
                f"`python -m data.prepare <kind> {name} --output …`, and name that folder{instead_of_lmdb(name)}."
            )
        require_regular_files(name)
        try:
            splits = datasets.load_from_disk(name)
        except IndexError as error:  # `datasets` saves splits without rows, but does not read them
            raise ValueError(f"{name} has a split without any row: save it without that split.") from error
        if not isinstance(splits, datasets.DatasetDict):
            raise ValueError(f"{name} holds a single split: save a DatasetDict with named splits.")
        try:
            for rows in splits.values():
                rows.data.validate(full=True)  # Arrow itself follows offsets out of its memory
        except pa.ArrowException as error:
            raise_if_out_of_memory(error)
            raise OSError(f"{name} is broken ({one_line(error)}): save or copy it again.") from error
    elif args.data_root is None:
        raise ValueError(
            f"The data set {name!r} is neither 'shapes' nor a folder: for a REFER data set such as 'refcoco/unc', "
            "data_root must say where it lies."
        )
    else:
        images = {} if args.images is None else {"images": args.images}
        splits = load_refer(args.data_root, *name.partition("/")[::2], **images)
    return _undecoded(name, splits)


def _is_prepared(name: str, args: DataArguments) -> bool:
    """Whether the name is a folder made by data.prepare, or can only be a Hub id: with `data_root` it never is."""
    if Path(name).is_dir():
        return Path(name, SUMMARY).exists()
    return args.data_root is None and "/" in name and name.partition("/")[0] not in SOURCES


def _load_prepared(name: str, files: dict[str, list[str]] | None = None) -> datasets.DatasetDict:
    """All splits of a folder made by data.prepare, or of a Hub id; or the splits of which the files are given."""
    with _finding_prepared(name):
        try:
            return datasets.load_dataset(name) if files is None else datasets.load_dataset("parquet", data_files=files)
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, ValueError) as error:
            raise_if_out_of_memory(error)
            for split, paths in (files or parquet_files(name)).items():
                if not len(StreamedRows(paths)):  # says which file's footer is broken, as `datasets` does not
                    raise ValueError(f"Split {split!r} of {name} has no rows: prepare the data set anew.") from error
            raise OSError(
                f"{name} cannot be read ({one_line(error.__cause__ or error)}): prepare the data set anew."
            ) from error


@contextmanager
def _finding_prepared(name: str) -> Iterator[None]:
    """Say plainly that a folder made by data.prepare is not whole, or that there is no such folder or Hub id."""
    if Path(name).is_dir():
        require_whole(name)
    try:
        yield
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise OSError(f"{name!r} is no folder here, nor to be had from the Hub ({error}): check its name.") from error


def _undecoded(name: str, splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """The splits with images and masks as they are stored: the collators decode them, and name the row that fails."""
    undecoded = datasets.DatasetDict()
    for split, rows in splits.items():
        where = f"Split {split!r} of {name}"
        require_columns(where, rows.column_names)
        for column, feature in STORED.items():
            if rows.features[column] != feature:
                try:
                    rows = rows.cast_column(column, feature)
                except (pa.ArrowException, TypeError, ValueError) as error:
                    raise ValueError(
                        f"Column {column!r} in split {split!r} of {name} is not what data/README.md describes "
                        f"({one_line(error)}): prepare the data set anew."
                    ) from error
        require_rows(where, rows)
        undecoded[split] = rows
    return undecoded


def select_split(splits: datasets.DatasetDict, name: str, max_samples: int | None) -> datasets.Dataset:
    """The first `max_samples` rows of a split.

    Raises:
        ValueError: the split does not exist or is empty.
    """
    if name not in splits or not len(splits[name]):
        filled = {split: len(rows) for split, rows in splits.items() if len(rows)}
        problem = "is empty" if name in splits else "does not exist"
        raise ValueError(f"Split {name!r} {problem}; splits with rows are {filled}.")
    return splits[name].take(min(max_samples or len(splits[name]), len(splits[name])))


def load_rows(
    args: DataArguments, do_train: bool, do_eval: bool, do_predict: bool
) -> tuple[datasets.Dataset | StreamedRows | None, datasets.Dataset | None, dict[str, datasets.Dataset]]:
    """Rows to train on, to choose the checkpoint by, and of each test split, as far as they are asked for.

    A data set is read once, and only if one of its splits is asked for; of a streamed one no other training rows.

    Raises:
        ValueError: a data set or split does not exist, is empty, or cannot be mixed or streamed.
        OSError: a file is missing or broken.
    """
    members = parse_mixture(args.dataset, args.train_split)
    first_set = members[0].name
    streamed = args.streaming and do_train
    files = _files_to_stream(members, args) if streamed else {}

    @functools.cache
    def splits_of(name: str) -> datasets.DatasetDict:
        if not streamed or name != first_set:
            return load_splits(name, args)
        wanted = ([args.eval_split] if do_eval else []) + (args.test_splits if do_predict else [])
        held = {split: paths for split, paths in files.items() if split in wanted}
        return _undecoded(name, _load_prepared(name, held) if held else datasets.DatasetDict())

    train_rows = eval_rows = None
    if do_train:
        foreign = any(":" in name for name in args.test_splits)
        if streamed:
            train_rows = StreamedRows(files[members[0].split], args.shuffle_buffer_size)
            if foreign:
                logger.warning("Streamed rows stay in training even if their images are in a split that is tested on.")
        elif len(members) == 1 and members[0].weight == 1 and not foreign:
            train_rows = select_split(splits_of(first_set), members[0].split, args.max_train_samples)
        else:
            train_rows = _mix(members, splits_of, args)
    if do_eval:
        eval_rows = select_split(splits_of(first_set), args.eval_split, args.max_eval_samples)
        if args.eval_first_phrase_only:
            first = [sentences[:1] for sentences in eval_rows["sentences"]]
            feature = eval_rows.features["sentences"]
            eval_rows = eval_rows.remove_columns("sentences").add_column("sentences", first, feature=feature)
    test_rows = {}
    for name in args.test_splits if do_predict else []:
        dataset, split = _dataset_and_split(name, first_set)
        test_rows[name] = select_split(splits_of(dataset), split, args.max_eval_samples)
    return train_rows, eval_rows, test_rows


def _dataset_and_split(name: str, default: str) -> tuple[str, str]:
    """A test split's data set, such as 'refcoco+/unc', and its own name."""
    dataset, _, split = name.rpartition(":")
    return dataset.replace(":", "/") or default, split


def _files_to_stream(members: list[Member], args: DataArguments) -> dict[str, list[str]]:
    """The Parquet files of each split of the one data set that is streamed."""
    if len(members) > 1:
        raise ValueError(f"streaming takes one data set, not the mixture {args.dataset!r}.")
    name, split = members[0].name, members[0].split
    if not _is_prepared(name, args):
        raise ValueError(
            f"{name!r} cannot be streamed: give a folder or Hub id that `python -m data.prepare` has made."
        )
    with _finding_prepared(name):
        files = parquet_files(name)
    if split not in files:
        raise ValueError(f"{name} has no split {split!r} to train on: it has {list(files)}.")
    return files


def _mix(
    members: list[Member], splits_of: Callable[[str], datasets.DatasetDict], args: DataArguments
) -> datasets.Dataset:
    """The rows of a mixture, without images of any split that is tested on; their description says what has left."""
    splits, tested = {member.name: splits_of(member.name) for member in members}, []
    for name in args.test_splits:
        dataset, split = _dataset_and_split(name, "")
        if dataset:  # other splits than training's leave in any case
            tested.append((dataset, select_split(splits_of(dataset), split, None)))
    rows, leaks = mix(members, splits, tested, args.keep_leaks)
    what = "STAY in training, although" if args.keep_leaks else "leave training, for"
    rows = rows.take(min(args.max_train_samples or len(rows), len(rows)))
    rows.info.description = (
        " ".join(
            f"{_name_of(leak.name)}: {leak.objects} of {leak.of_objects} objects ({leak.phrases} phrases) {what} "
            "their images are in a split that is tested on."
            for leak in leaks
            if leak.objects
        )
        or "No image was found, by its file or its number in COCO, in a split that is tested on."
    )
    logger.warning(rows.info.description)
    return rows


class ReadWhenAsked(Sequence):
    """What `read` makes of each row, made when it is taken: a batch's decoded photographs are never all in memory."""

    def __init__(self, read: Callable[[dict], Any], rows: list[dict]):
        self.read = read
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.rows[index])


class TrainingCollator(TrainerCallback):
    """Rows to a training batch in which each object is named by one of its phrases, drawn anew every epoch.

    The draw depends on seed, epoch and object alone, so that neither worker processes nor resuming change it. Workers
    read the epoch from shared memory, where the Trainer's callback writes it.
    """

    def __init__(self, processor: DetrisProcessor, seed: int):
        self.processor = processor
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.epoch.fill_(int(state.epoch or 0))  # when resumed within an epoch it is a fraction

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        """Keep in the checkpoints among how many workers streamed rows are divided, which must stay as it is."""
        rows = train_dataloader.dataset
        runs = rows.runs if isinstance(rows, StreamedBatches) else 0
        before = next((entry[RUNS] for entry in state.log_history if RUNS in entry), 0 if state.global_step else runs)
        if runs != before:
            raise ValueError(
                f"The run to resume streamed its rows to {before} workers in all processes, this one does to {runs}, "
                "which would read rows twice or not at all: give the same streaming, number of processes and "
                "dataloader_num_workers."
            )
        if runs and not state.global_step:
            state.log_history.append({"step": 0, RUNS: runs})

    def draw_phrase(self, row: dict) -> str:
        draw = [self.seed, int(self.epoch), row["ref_id"]]
        if "repetition" in row:  # of a mixture, whose weights repeat rows
            draw.append(row["repetition"])
        return random.Random("/".join(map(str, draw))).choice(read_phrases(row))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        inputs = self.processor(
            images=ReadWhenAsked(read_image, rows),
            text=[[self.draw_phrase(row)] for row in rows],
            segmentation_maps=ReadWhenAsked(read_mask, rows),
            return_tensors="pt",
        )
        return {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask", "labels")}


class EvaluationCollator:
    """Rows to a batch with all their phrases, and the masks (H, W) at original size to compare with."""

    def __init__(self, processor: DetrisProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        sentences = [read_phrases(row) for row in rows]
        inputs = self.processor(images=ReadWhenAsked(read_image, rows), text=sentences, return_tensors="pt")
        masks, ref_ids = [read_whole_mask(row) for row in rows], torch.tensor([row["ref_id"] for row in rows])
        # `pixel_values` comes first: Trainer takes the first tensor's length for the number of rows.
        return {**inputs, "masks": masks, "ref_ids": ref_ids}


# --- training -----------------------------------------------------------------------------------------------------


def build_model(args: ModelArguments) -> tuple[DetrisForReferringSegmentation, DetrisProcessor]:
    """The model, and the processor that fits its configuration.

    Raises:
        OSError: a folder or Hub id cannot be read.
        ValueError: a field of the configuration is invalid, or the tokenizer has more symbols than the model.
    """
    overrides = {name: getattr(args, name) for name in ("image_size", "max_text_length", "peft_method")}
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


class DetrisTrainer(CheckpointingTrainer):
    """Trainer with DETRIS's optimizer, schedule and evaluation; `predicted_masks` holds what `predict` segmented.

    Evaluation runs over objects, each with all its phrases, and gives no loss: a batch's mean would depend on how rows
    are spread over processes.
    """

    def __init__(
        self,
        model: DetrisForReferringSegmentation,
        args: DetrisTrainingArguments,
        processor: DetrisProcessor,
        train_dataset: datasets.Dataset | StreamedRows | None = None,
        eval_dataset: datasets.Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        collator = TrainingCollator(processor, args.seed)
        if isinstance(train_dataset, datasets.Dataset):  # the collator decodes masks in their boxes alone
            train_dataset = train_dataset.cast_column("mask", RleMask(decode=False))
        self.evaluation_collator = EvaluationCollator(processor)
        self.metric = evaluate.load(str(METRIC), keep_in_memory=True)
        self.predicted_masks: list[list[dict]] | None = None  # for each object, one COCO RLE for each phrase
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=self.compute_referring_iou,
            optimizer_cls_and_kwargs=(torch.optim.Adam, adam_arguments(model, args)),
            callbacks=[collator, *(callbacks or [])],
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.args.lr_scheduler_type == "constant" and self.lr_scheduler is None:
            batches = len(self.get_train_dataloader())
            steps_per_epoch = -(-batches // self.args.gradient_accumulation_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(
                optimizer or self.optimizer,
                milestones=[round(epoch * steps_per_epoch) for epoch in self.args.milestones],
                gamma=self.args.milestone_factor,
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # Summed, so that all processes stop: one that went on could save weights that others have broken.
        if not torch.isfinite(self.accelerator.reduce(loss)):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}: training stops before this step's "
                "update, and the last checkpoint is as it was. Lower the learning rate, or try bf16 or fp32 for fp16."
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.save_adapter_only:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_adapter(folder)
            self.processing_class.save_pretrained(folder)

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> None:
        """Upload the model or its adapters, the processor and the card, and nothing else that `output_dir` holds."""
        if not self.is_world_process_zero():
            return
        if self.hub_model_id is None:
            self.init_hf_repo()
        with tempfile.TemporaryDirectory() as folder:
            if self.args.save_adapter_only:
                self.model.save_adapter(folder, repo_id=self.hub_model_id)
            else:
                self.model.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            card = Path(self.args.output_dir) / "README.md"
            if card.exists():
                shutil.copy(card, folder)
            huggingface_hub.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                commit_message=commit_message,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
            )

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        if not isinstance(self.train_dataset, StreamedRows):
            loader = super().get_train_dataloader()
            inner = getattr(loader, "base_dataloader", loader)  # accelerate's has torch's inside
            inner.worker_init_fn = functools.partial(leave_signals_to_main_process, also=inner.worker_init_fn)
            return loader
        args = self.args
        workers = max(args.dataloader_num_workers, 1)  # without any this process does their work
        loader = torch.utils.data.DataLoader(
            StreamedBatches(
                self.train_dataset, args.train_batch_size, args.process_index, args.world_size, workers, args.seed
            ),
            batch_size=None,  # the rows come in batches
            collate_fn=self.data_collator,
            worker_init_fn=leave_signals_to_main_process,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        # `accelerator.prepare` would divide among the processes what is divided already.
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def num_examples(self, dataloader: torch.utils.data.DataLoader) -> int:
        batches = dataloader.dataset
        return len(batches.rows) if isinstance(batches, StreamedBatches) else super().num_examples(dataloader)

    def get_eval_dataloader(self, eval_dataset: datasets.Dataset | None = None) -> torch.utils.data.DataLoader:
        loader = torch.utils.data.DataLoader(
            self.eval_dataset if eval_dataset is None else eval_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.evaluation_collator,
            worker_init_fn=leave_signals_to_main_process,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # a loader draws a seed: training's random numbers stay as they are
        )
        return self.accelerator.prepare(loader)

    get_test_dataloader = get_eval_dataloader

    def evaluation_loop(self, *args, **kwargs):
        for buffer in self.model.buffers():
            # Processes without SyncBatchNorm have running statistics of their own: evaluate those that get saved.
            broadcast(buffer)
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: torch.nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Segment the phrases of `B` objects, at most `K` each, and at most `per_device_eval_batch_size` at once.

        Returns:
            No loss; pixels in intersection, in union and in the truth `(B, K, 3)`, padded; the objects' ids `(B,)`.

        Raises:
            FloatingPointError: logits are not finite; masks of them would be empty, and count as such.
        """
        masks, ref_ids, original_sizes = (inputs.pop(name) for name in ("masks", "ref_ids", "original_sizes"))
        image_index = inputs["image_index"]  # (N,)
        counts = torch.full((len(masks), int(image_index.bincount().max()), 3), PADDING, device=ref_ids.device)
        encoded = [[] for _ in masks]
        seen = [0] * len(masks)  # phrases of each object
        for phrases in torch.arange(len(image_index), device=image_index.device).split(self.args.eval_batch_size):
            images, index = image_index[phrases].unique(return_inverse=True)
            texts = {name: inputs[name][phrases] for name in ("input_ids", "attention_mask")}
            output = model(pixel_values=inputs["pixel_values"][images], image_index=index, **texts)
            objects = images[index].tolist()
            try:
                predictions = self.processing_class.post_process_referring_segmentation(
                    output, original_sizes[images.to(original_sizes.device)], image_index=index
                )
            except ValueError as error:
                finite = output.logits.isfinite().all(dim=(1, 2)).tolist()  # of each phrase
                if all(finite):
                    raise
                raise FloatingPointError(
                    f"The logits are not finite for a phrase of the object with ref_id "
                    f"{ref_ids[objects[finite.index(False)]]}: the model is broken, or too large for half precision; "
                    "evaluate another checkpoint, or without --fp16 and --fp16_full_eval."
                ) from error
            for number, prediction in zip(objects, predictions, strict=True):
                counts[number, seen[number]] = torch.tensor(self.metric.count(prediction, masks[number]))
                seen[number] += 1
                if self.predicted_masks is not None:
                    encoded[number].append(_encode(prediction))
        if self.predicted_masks is not None:
            self.predicted_masks += self.accelerator.gather_for_metrics(encoded, use_gather_object=True)
        return None, counts, ref_ids

    def compute_referring_iou(self, results: EvalPrediction) -> dict[str, float]:
        counts = _in_one_array(results.predictions).reshape(-1, 3)
        intersection, union, reference_area = counts[counts[:, 0] != PADDING].T
        return self.metric.compute(intersection=intersection, union=union, reference_area=reference_area)

    def predict(self, *args, **kwargs) -> PredictionOutput:
        self.predicted_masks = [] if self.args.save_masks else None
        output = super().predict(*args, **kwargs)
        return output._replace(predictions=_in_one_array(output.predictions))


def _in_one_array(counts: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """Counts (R, K, 3) of all objects; without `eval_do_concat_batches` they come by batches, each with its own K."""
    if isinstance(counts, np.ndarray):
        return counts
    phrases = max(batch.shape[1] for batch in counts)
    padding = [((0, 0), (0, phrases - batch.shape[1]), (0, 0)) for batch in counts]
    return np.concatenate([np.pad(batch, pad, constant_values=PADDING) for batch, pad in zip(counts, padding)])


def adam_arguments(model: DetrisForReferringSegmentation, args: DetrisTrainingArguments) -> dict[str, Any]:
    """Adam's arguments, with what is trained inside the backbones and the head as two groups of parameters."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[model.part_of(name) == "head"].append(parameter)
    inner_learning_rate = args.learning_rate * args.adapter_learning_rate_multiplier
    return {
        "params": [
            {"params": groups[True], "lr": args.learning_rate},
            {"params": groups[False], "lr": inner_learning_rate},
        ],
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "fused": True,  # one call for all parameters: a tenth of the time of a call for each
    }


def _encode(mask: torch.Tensor) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.cpu().numpy(), dtype=np.uint8))


# --- prediction ---------------------------------------------------------------------------------------------------


def write_predictions(
    folder: Path, rows: datasets.Dataset, counts: np.ndarray, masks: list[list[dict]] | None, metric: evaluate.Metric
) -> None:
    """Write a line of `results.jsonl` for each phrase, its mask (PNG, 0 and 255) and a picture of it over its image.

    Args:
        folder: is made anew, so that nothing of an earlier run is left in it.
        rows: `R` rows.
        counts (`(R, K, 3)`): pixels in intersection, in union and in the truth.
        masks: for each row, a COCO RLE for each phrase; `None` leaves masks and pictures out.
        metric: turns counts into IoU.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if masks is not None:
        (folder / "masks").mkdir()
        (folder / "overlays").mkdir()
    with open(folder / "results.jsonl", "w", encoding="utf-8") as file:
        for index, (row, row_counts) in enumerate(zip(rows, counts.tolist(), strict=True)):
            if masks is not None:
                image, truth = datasets.Image().decode_example(row["image"]), read_whole_mask(row)
            for phrase, sentence in enumerate(row["sentences"]):
                intersection, union, reference_area = row_counts[phrase]
                result = {
                    "ref_id": row["ref_id"],
                    "image_id": row["image_id"],
                    "sentence": sentence,
                    "iou": float(metric.iou(intersection, union)),
                    "intersection": intersection,
                    "union": union,
                    "reference_area": reference_area,
                }
                if masks is not None:
                    mask, name = coco_mask.decode(masks[index][phrase]), f"{row['ref_id']}_{phrase}"
                    result["mask"] = f"masks/{name}.png"
                    Image.fromarray(mask * 255).save(folder / result["mask"])
                    picture = draw_sample(Sample(image, sentence, truth, mask, result["iou"]))
                    picture.save(folder / "overlays" / f"{name}.jpg")
                file.write(json.dumps(result, ensure_ascii=False) + "\n")


def write_table(folder: Path, lines: list[dict[str, Any]]) -> str:
    """Write the paper's table, in percent, as `table.txt`, `table.md` and `table.json`, and return it as text.

    Args:
        folder: exists.
        lines: for each split its name, objects, phrases and figures by `METRIC_NAMES`; their plain mean comes last,
            each over the splits that have it.
    """
    heads = [head for head in METRIC_NAMES.values() if any(head in line for line in lines)]
    mean = {head: statistics.fmean(line[head] for line in lines if head in line) for head in heads}
    mean = {"split": "mean of the rows"} | mean
    table = pd.DataFrame([*lines, mean | {"objects": "", "phrases": ""}])
    text = table.to_string(index=False, float_format="{:.2f}".format, na_rep="-")
    header, *body = table.to_csv(sep="|", index=False, float_format="%.2f", na_rep="-").splitlines()
    markdown = [header, "|".join(["---"] + ["---:"] * (len(table.columns) - 1)), *body]
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "table.md").write_text("".join(f"|{line}|\n" for line in markdown), encoding="utf-8")
    (folder / "table.json").write_text(json.dumps([*lines, mean], indent=2) + "\n", encoding="utf-8")
    return text


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the arguments ask for and return all metrics.

    Raises:
        ValueError, OSError: an argument, the data, the model, the checkpoint or the output folder is invalid.
        FloatingPointError: loss, logits or weights are not finite.
        SystemExit: SIGTERM or SIGINT has stopped the run; its code is 128 and the signal's number.
    """
    with ExitStack() as stack:
        return run(*prepare(sys.argv[1:] if argv is None else argv, stack))


def prepare(
    argv: list[str], stack: ExitStack
) -> tuple[DetrisTrainer, DataArguments, dict[str, datasets.Dataset], BeginRun]:
    """All that can refuse a run: its arguments, folder and checkpoint first, then what takes long, data and model.

    Args:
        stack: holds the run's folder until it is closed.

    Returns:
        The trainer, the data's arguments, the rows of each test split, and what training's begin does.
    """
    model_args, data_args, training_args = parse_arguments(argv, __doc__)
    check_combination(model_args, data_args, training_args)
    output_dir, broken = Path(training_args.output_dir), []
    in_all_processes(lambda: stack.enter_context(locked(output_dir, training_args.should_save)))
    if training_args.resume_from_checkpoint:
        found, broken = in_all_processes(lambda: find_checkpoint(training_args))
        training_args.resume_from_checkpoint = str(found)
    checkpoint = training_args.resume_from_checkpoint
    goes_on = bool(checkpoint) and lies_in(checkpoint, output_dir)
    if training_args.do_train and not goes_on:
        sources = (model_args.model_name_or_path, model_args.vision_backbone, model_args.text_backbone)
        sources += (model_args.tokenizer, checkpoint)
        in_all_processes(lambda: check_unused(output_dir, training_args.overwrite_output_dir, sources))

    def read_rows() -> tuple:
        with training_args.main_process_first(desc="reading the data"):
            return load_rows(data_args, training_args.do_train, training_args.do_eval, training_args.do_predict)

    train_rows, eval_rows, test_rows = in_all_processes(read_rows)
    batch_size = training_args.train_batch_size * training_args.world_size
    drops_last = training_args.dataloader_drop_last and not data_args.streaming
    if training_args.do_train and drops_last and len(train_rows) < batch_size:
        logger.warning(f"dataloader_drop_last is off: {len(train_rows)} objects fill no batch of {batch_size}.")
        training_args.dataloader_drop_last = False

    set_seed(training_args.seed)
    model, processor = in_all_processes(lambda: build_model(model_args))
    check_fits_model(training_args, model.config)
    if training_args.do_train and training_args.save_adapter_only:
        in_all_processes(lambda: model.check_adapter_target(training_args.output_dir))
    if training_args.world_size > 1 and training_args.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    callbacks = []
    if training_args.do_train and training_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(training_args.early_stopping_patience))
    trainer = in_all_processes(
        lambda: DetrisTrainer(model, training_args, processor, train_rows, eval_rows, callbacks)
    )
    return trainer, data_args, test_rows, BeginRun(training_args.overwrite_output_dir and not goes_on, broken)


def run(
    trainer: DetrisTrainer, data_args: DataArguments, test_rows: dict[str, datasets.Dataset], begin: BeginRun
) -> dict[str, float]:
    """Train, evaluate, predict and push, as far as it is asked for; return all metrics.

    Raises:
        SystemExit: a signal has stopped the run.
    """
    args, metrics, stopped = trainer.args, {}, False
    members = parse_mixture(data_args.dataset, data_args.train_split)
    trainer.add_callback(begin)
    with StopAtSignal() as stop:
        trainer.add_callback(stop)
        try:
            if args.do_train:
                metrics |= train(trainer)
            evaluated, results = evaluate_and_predict(trainer, data_args, members, test_rows)
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
        metrics |= evaluated
        if trainer.is_world_process_zero():
            write_card(trainer, members, results)
        if args.push_to_hub:
            trainer.push_to_hub()
    # Without it a process could end, and its launcher end the others, while the main one still writes.
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
    trainer.save_model(_internal_call=True)  # or it would be pushed before it is evaluated
    trainer.save_state()
    trained = {"trained_parameters": trainer.model.num_parameters(only_trainable=True)}
    return _report(trainer, "train", result.metrics | trained)


def evaluate_and_predict(
    trainer: DetrisTrainer, data_args: DataArguments, members: list[Member], test_rows: dict[str, datasets.Dataset]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Evaluate and predict, as far as it is asked for, and write predictions and table.

    Returns:
        All metrics; for each split `dataset`, `split` and its metrics.
    """
    args, metrics = trainer.args, {}
    output_dir = Path(args.output_dir)
    own_set = _name_of(members[0].name)
    lines, results = [], []
    first_phrase = ", first phrases" if data_args.eval_first_phrase_only else ""
    first_objects = f", first {data_args.max_eval_samples} objects" if data_args.max_eval_samples else ""
    if args.do_eval:
        figures = _report(trainer, "eval", trainer.evaluate())
        metrics |= figures
        results.append(
            {"dataset": own_set, "split": data_args.eval_split + first_phrase + first_objects}
            | {key: figures[f"eval_{key}"] for key in METRIC_NAMES if f"eval_{key}" in figures}
        )
    for split, rows in test_rows.items():
        # It also names files, where "train" and "eval" are those of training.
        name = f"test_{split}" if split in ("train", "eval") else re.sub("[:/]", "_", split)
        output = trainer.predict(rows, metric_key_prefix=name)
        metrics |= _report(trainer, name, output.metrics)
        figures = {key: output.metrics[f"{name}_{key}"] for key in METRIC_NAMES if f"{name}_{key}" in output.metrics}
        dataset, split_name = _dataset_and_split(split, "")
        label = f"{_name_of(dataset)}:{split_name}" if Path(dataset).is_absolute() else split
        line = {"split": label, "objects": len(rows), "phrases": int((output.predictions[..., 0] != PADDING).sum())}
        lines.append(line | {METRIC_NAMES[key]: 100 * value for key, value in figures.items()})
        result = {"dataset": _name_of(dataset) or own_set, "split": split_name + first_objects}
        if not any(result.items() <= other.items() for other in results):  # or do_eval has run over it, too
            results.append(result | figures)
        if trainer.is_world_process_zero():
            folder = output_dir / "predictions" / name
            write_predictions(folder, rows, output.predictions, trainer.predicted_masks, trainer.metric)
    if lines and trainer.is_world_process_zero():
        print(f"\n{write_table(output_dir, lines)}\n")
    return metrics, results


def write_card(trainer: DetrisTrainer, members: list[Member], results: list[dict[str, Any]]) -> None:
    """Write the model card into the output folder.

    Args:
        members: what was trained on, if anything was.
        results: for each split that was evaluated, `dataset`, `split` and the metrics by `METRIC_NAMES`.
    """
    args = trainer.args
    origin, dataset = "Evaluated with `train_hf.py`.", ""
    if args.do_train:
        dataset = SEPARATOR.join(
            (f"{member.weight:g}*" if member.weight != 1 else "") + _name_of(member.name) for member in members
        )
        origin = (
            f"Trained with `train_hf.py`: {trainer.state.global_step} steps of "
            f"{args.train_batch_size * args.world_size * args.gradient_accumulation_steps} objects, learning rate "
            f"{args.learning_rate:g}, seed {args.seed}."
        )
        if "repetition" in getattr(trainer.train_dataset, "column_names", []):  # a mixture, which says what has left
            origin += f" {trainer.train_dataset.info.description}"
        elif {result["dataset"] for result in results} - {_name_of(members[0].name)}:
            origin += " Its training images were not compared with those of the other data sets it is tested on."
    name = trainer.hub_model_id or Path(args.output_dir).name
    card = make_model_card(
        trainer.model.config, name, origin, dataset, results, args.model_license, args.save_adapter_only
    )
    card.save(Path(args.output_dir) / "README.md")


def _name_of(dataset: str) -> str:
    return Path(dataset).name if Path(dataset).is_dir() else dataset  # no paths of this machine


def _report(trainer: Trainer, name: str, metrics: dict[str, float]) -> dict[str, float]:
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, metrics)
    return metrics


def run_as_program() -> None:
    """`main` for the command line: a person's fault is told in its one sentence, ours with its traceback."""
    with ExitStack() as stack:
        prepared = ()
        try:
            prepared = prepare(sys.argv[1:], stack)
            run(*prepared)
        except FloatingPointError as error:
            print(error, file=sys.stderr)
            sys.exit(1)
        except (ValueError, OSError) as error:
            if prepared and (prepared[-1].begun or not prepared[0].args.do_train):
                raise
            logger.debug("The run is refused.", exc_info=True)
            # What `prepare` refuses all processes refuse, but before they meet one may end before another has spoken.
            told_by_another = (
                not prepared and torch.distributed.is_initialized() and os.environ.get("LOCAL_RANK", "0") != "0"
            )
            if not told_by_another:
                print(error, file=sys.stderr)
            leave_process_group()
            sys.exit(2)


if __name__ == "__main__":
    run_as_program()
