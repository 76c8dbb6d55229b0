"""How rows become a batch: for training with one phrase an object, drawn anew each epoch; for evaluation with all."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data.decoding import read_image, read_mask, read_phrases, read_whole_mask
from processing_detris import DetrisProcessor


class TrainingCollator:
    """Rows to a training batch in which each object is named by one of its phrases, drawn anew every epoch.

    The draw depends on seed, epoch and object alone, so that neither worker processes nor resuming change it. Worker
    processes read the epoch from shared memory, where `TellEpoch` writes it.

    Args:
        processor: turns images, phrases and masks into tensors.
        seed: seeds the draw of phrases.
        has_repetitions: whether the rows are a mixture's, in which each copy of a row has a draw of its own.
    """

    def __init__(self, processor: DetrisProcessor, seed: int, has_repetitions: bool = False):
        self.processor = processor
        self.seed = seed
        self.has_repetitions = has_repetitions
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def draw_phrase(self, row: dict) -> str:
        """One of the row's phrases; raises ValueError if there are none."""
        draw = [self.seed, int(self.epoch), row["ref_id"]]
        if self.has_repetitions:
            draw.append(row["repetition"])
        return random.Random("/".join(map(str, draw))).choice(read_phrases(row))

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """The model's inputs and labels for `B` objects.

        Raises:
            OSError, ValueError: a part of a row is broken; the message names the row.
        """
        inputs = self.processor(
            images=DecodedOnAccess(read_image, rows),
            text=[[self.draw_phrase(row)] for row in rows],
            segmentation_maps=DecodedOnAccess(read_mask, rows),
            return_tensors="pt",
        )
        return {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask", "labels")}


class TellEpoch(TrainerCallback):
    """Tells the training collator which epoch begins, for its draw of phrases."""

    def __init__(self, collator: TrainingCollator):
        self.collator = collator

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.collator.epoch.fill_(int(state.epoch or 0))  # a run that is resumed within an epoch begins at a fraction


@dataclass(frozen=True)
class EvaluatedObject:
    """What the host knows of an object in a batch, so that it need not ask the device."""

    ref_id: int
    phrases: int  # how many there are
    size: tuple[int, int]  # of its image: height and width in pixels


class EvaluationCollator:
    """Rows to a batch with all their phrases, and the masks at original size to compare with.

    Args:
        processor: turns images and phrases into tensors.
    """

    def __init__(self, processor: DetrisProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """The model's inputs for `B` objects and `N` phrases, the `objects`, and their true masks.

        Returns:
            `pixel_values`, `input_ids`, `attention_mask` and `image_index` as tensors; `objects`, a list of
            `EvaluatedObject`; `truths`, a tensor of the bytes of all masks, one after the other (`mask_bits.py`).

        Raises:
            OSError, ValueError: a part of a row is broken; the message names the row.
        """
        sentences = [read_phrases(row) for row in rows]
        inputs = self.processor(images=DecodedOnAccess(read_image, rows), text=sentences, return_tensors="pt")
        masks = [read_whole_mask(row) for row in rows]
        objects = [
            EvaluatedObject(row["ref_id"], len(phrases), mask.shape)
            for row, phrases, mask in zip(rows, sentences, masks, strict=True)
        ]
        # `pixel_values` comes first: Trainer takes the first tensor's length for the number of rows.
        inputs = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask", "image_index")}
        truths = torch.from_numpy(np.concatenate([np.packbits(mask) for mask in masks]))
        return inputs | {"truths": truths, "objects": objects}


class DecodedOnAccess(Sequence):
    """A part of each row, decoded each time it is taken: the photographs of a batch are never in memory together.

    Args:
        read: the function that decodes the part.
        rows: the rows of a batch.
    """

    def __init__(self, read: Callable[[dict], Any], rows: list[dict]):
        self.read = read
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.rows[index])
