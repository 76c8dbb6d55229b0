"""The part of the Trainer that evaluates: objects with all their phrases, compared with their true masks."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
import torch
from accelerate.utils import broadcast, gather_object, is_compiled_module
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from processing_detris import foreground

from .collators import EvaluatedObject, EvaluationCollator
from .mask_bits import pack_masks, packed_bytes, unpack_mask
from .stopping import leave_signals_to_main_process

METRIC = Path(__file__).parents[1] / "metrics" / "referring_iou"
PADDING = -100  # in the counts of objects that have fewer phrases than others


class SegmentedObject(NamedTuple):
    """What was found out of an object's `k` phrases."""

    ref_id: int
    size: tuple[int, int]  # of its image: height and width in pixels
    counts: np.ndarray  # (k, 3): pixels in intersection, in union and in the truth
    masks: np.ndarray | None = None  # (k, b): their bits, if they are kept

    def mask(self, phrase: int) -> np.ndarray:
        """The mask of a phrase, `(H, W)` in uint8, 0 and 1."""
        return np.unpackbits(self.masks[phrase], count=self.size[0] * self.size[1]).reshape(self.size)


class EvaluatingTrainer(Trainer):
    """Trainer whose evaluation runs over objects, each with all their phrases, and counts pixels on the device.

    It gives no loss, because the mean over a batch would depend on how rows are spread over processes. The host waits
    for the device once a batch, when it fetches the counts and, if they are kept, the masks. Trainer gathers
    nothing itself, so its arguments about that, such as `eval_accumulation_steps`, change no result.

    Attributes:
        metric: counts pixels, and turns counts into IoU.
    """

    def __init__(self, *args, **kwargs):
        self.evaluation_collator = EvaluationCollator(kwargs["processing_class"])
        self.metric = evaluate.load(str(METRIC), keep_in_memory=True)
        self.receive: Callable[[int, SegmentedObject], None] | None = None  # what `predict` was given
        self.segmented: list[list[SegmentedObject]] = []  # by this process: for each batch its objects, without masks
        self.evaluated_rows = 0  # how many all processes evaluate
        self.kept_loader: torch.utils.data.DataLoader | None = None  # of `eval_dataset`, with workers that live on
        super().__init__(*args, compute_metrics=self.compute_referring_iou, **kwargs)

    def get_eval_dataloader(self, eval_dataset: datasets.Dataset | None = None) -> torch.utils.data.DataLoader:
        """Batches of objects with all their phrases, of `eval_dataset` unless other rows are given.

        Workers that live on are kept for `eval_dataset` alone, which is evaluated again and again.
        """
        args, rows = self.args, self.eval_dataset if eval_dataset is None else eval_dataset
        keeps_workers = args.dataloader_persistent_workers and rows is self.eval_dataset
        if keeps_workers and self.kept_loader is not None and self.kept_loader.dataset is rows:
            return self.kept_loader
        loader = torch.utils.data.DataLoader(
            rows,
            batch_size=args.eval_batch_size,
            collate_fn=self.evaluation_collator,
            persistent_workers=keeps_workers,
            **self.worker_arguments(),
            generator=torch.Generator(),  # a loader draws a seed, which must not change training's random numbers
        )
        loader = self.accelerator.prepare(loader)
        if keeps_workers:
            self.kept_loader = loader
        return loader

    get_test_dataloader = get_eval_dataloader

    def worker_arguments(self) -> dict[str, Any]:
        """What the loaders of evaluation and of streamed rows are told alike of the processes that load."""
        return {
            "worker_init_fn": leave_signals_to_main_process,
            "num_workers": self.args.dataloader_num_workers,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "pin_memory": self.args.dataloader_pin_memory,
        }

    def _wrap_model(self, model: torch.nn.Module, training: bool = True, *args) -> torch.nn.Module:
        """The model as it is trained or evaluated. Trainer calls this.

        With `torch_compile`, Trainer compiles the model for training, or for the first evaluation if nothing is
        trained. All other evaluations would run uncompiled, so this compiles the model for them.
        """
        wrapped = super()._wrap_model(model, training, *args)
        prepared = self.accelerator._models and wrapped is model and not is_compiled_module(model)
        if training or not self.args.torch_compile or not prepared:
            return wrapped
        return torch.compile(model, **self.accelerator.state.dynamo_plugin.to_kwargs())

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the same model in all processes, and put together what they have found.

        Without SyncBatchNorm, each process has running statistics of its own. The main process's are those that get
        saved, so all processes take them.

        Returns:
            As predictions the counts `(R, K, 3)` of all `R` objects, padded; as labels their ids `(R,)`.
        """
        for buffer in self.model.buffers():
            broadcast(buffer)
        self.segmented, self.evaluated_rows = [], len(dataloader.dataset)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        turns = zip(*gather_object([self.segmented]), strict=True)  # the processes take batches by turns
        segmented = [one for turn in turns for batch in turn for one in batch]
        counts, ref_ids = _in_one_array([one.counts for one in segmented]), np.array([one.ref_id for one in segmented])
        metrics = self.compute_metrics(EvalPrediction(predictions=counts, label_ids=ref_ids))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(predictions=counts, label_ids=ref_ids, metrics=output.metrics | metrics)

    @torch.no_grad()
    def prediction_step(
        self, model: torch.nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Segment the phrases of a batch and compare them with the truth; Trainer calls this for each batch.

        Trainer gets nothing to gather, because it would wait for the devices of all processes at each batch.
        `evaluation_loop` gathers everything at the end.

        Raises:
            FloatingPointError: logits are not finite. Their masks would be empty, and would be counted as such.
        """
        first = (len(self.segmented) * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
        # The processes get whole batches by turns, each as many as any other: accelerate fills up the last ones with
        # objects from the beginning, and these are left out here. If no other is left, one of them still goes through
        # the model, because FSDP gathers the weights when all processes have called it.
        new = max(self.evaluated_rows - first, 0)
        inputs["objects"] = inputs["objects"][: max(new, 1)]
        segmented = self._segment(model, inputs, keeps_masks=self.receive is not None)[:new]
        self.segmented.append([one._replace(masks=None) for one in segmented])
        if self.receive is not None:
            for index, one in enumerate(segmented, first):
                self.receive(index, one)
        return None, None, None

    @torch.no_grad()
    def segment(self, row: dict) -> SegmentedObject:
        """Segment a row's phrases as `predict` has done before, but in this process alone."""
        inputs = self._prepare_inputs(self.evaluation_collator([row]))
        (segmented,) = self._segment(self.model.eval(), inputs, keeps_masks=True)
        return segmented

    def _segment(self, model: torch.nn.Module, inputs: dict, keeps_masks: bool) -> list[SegmentedObject]:
        """Segment a batch, of which at most `per_device_eval_batch_size` phrases go through the model at once."""
        objects, image_index = inputs["objects"], inputs["image_index"]
        lengths = [packed_bytes(one.size) for one in objects]
        truths = inputs["truths"][: sum(lengths)].split(lengths)
        owners = [number for number, one in enumerate(objects) for _ in range(one.phrases)]  # of each phrase
        counts, finite, packed = [], [], []
        for first in range(0, len(owners), self.args.eval_batch_size):
            group = owners[first : first + self.args.eval_batch_size]
            phrases, images = slice(first, first + len(group)), slice(group[0], group[-1] + 1)
            logits = model(
                pixel_values=inputs["pixel_values"][images],
                input_ids=inputs["input_ids"][phrases],
                attention_mask=inputs["attention_mask"][phrases],
                image_index=image_index[phrases] - group[0],
            ).logits  # (n, h, w)
            finite.append(logits.isfinite().all(dim=(1, 2)))
            of_images = Counter(group)  # how many of these phrases each image has
            for number, image_logits in zip(of_images, logits.split([*of_images.values()]), strict=True):
                truth = unpack_mask(truths[number], objects[number].size)
                for masks in self._masks_of_image(image_logits, objects[number].size):
                    counts.append(self.metric.count_on_device(masks, truth))
                    if keeps_masks:
                        packed.append(pack_masks(masks).flatten())
        found = torch.cat([torch.cat(counts), torch.cat(finite)[:, None]], dim=1)  # (N, 4)
        return _fetch(objects, found, packed if keeps_masks else None)

    def _masks_of_image(self, logits: torch.Tensor, size: tuple[int, int]) -> Iterator[torch.Tensor]:
        """The masks of an image's phrases, as the processor's post-processing makes them, but without a wait."""
        processor = self.processing_class
        for probabilities in processor.restore_probabilities(logits, [size] * len(logits)):
            yield foreground(probabilities, processor.mask_threshold)

    def compute_referring_iou(self, results: EvalPrediction) -> dict[str, float]:
        """All figures of the metric, from the counts `(R, K, 3)` of all objects."""
        counts = results.predictions.reshape(-1, 3)
        intersection, union, reference_area = counts[counts[:, 0] != PADDING].T
        return self.metric.compute(intersection=intersection, union=union, reference_area=reference_area)

    def predict(
        self, *args, receive: Callable[[int, SegmentedObject], None] | None = None, **kwargs
    ) -> PredictionOutput:
        """Segment all rows, as Trainer does. The predictions returned are counts `(R, K, 3)`.

        Args:
            receive: gets the index of a row, and what was found of it with its masks, as soon as this process has it.
                Each process gets the rows that it has segmented itself.
        """
        self.receive = receive
        try:
            return super().predict(*args, **kwargs)
        finally:
            self.receive = None


def _fetch(
    objects: list[EvaluatedObject], found: torch.Tensor, packed: list[torch.Tensor] | None
) -> list[SegmentedObject]:
    """Bring what was found of `N` phrases to the host, all at once, because the host waits here for the device.

    Args:
        objects: whose phrases these are, one object's after the other's.
        found (`(N, 4)`): each phrase's counts, and whether its logits are finite.
        packed: bytes of the phrases' masks in parts of any length; None if they are not kept.

    Raises:
        FloatingPointError: logits are not finite.
    """
    fetched = torch.cat([found.view(torch.uint8).flatten(), *(packed or [])]).cpu().numpy()
    found, bits = fetched[: found.nbytes].view(np.int32).reshape(-1, 4), fetched[found.nbytes :]
    segmented = []
    for one in objects:
        of_object, found = np.split(found, [one.phrases])
        if not of_object[:, 3].all():
            raise FloatingPointError(
                f"The logits are not finite for a phrase of the object with ref_id {one.ref_id}: the model is broken, "
                "or too large for half precision; evaluate another checkpoint, or without --fp16 and --fp16_full_eval."
            )
        masks, bits = np.split(bits, [one.phrases * packed_bytes(one.size)])
        masks = None if packed is None else masks.reshape(one.phrases, -1)
        segmented.append(SegmentedObject(one.ref_id, one.size, of_object[:, :3].astype(np.int64), masks))
    return segmented


def _in_one_array(counts: list[np.ndarray]) -> np.ndarray:
    """Counts `(k, 3)` of each of `R` objects as one array `(R, K, 3)`, padded."""
    phrases = max(map(len, counts))
    padded = np.full((len(counts), phrases, 3), PADDING)
    for one, of_object in zip(padded, counts, strict=True):
        one[: len(of_object)] = of_object
    return padded
