"""Trainer with DETRIS's optimizer, schedule, streamed rows, evaluation and upload."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import datasets
import evaluate
import huggingface_hub
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast
from huggingface_hub.utils import httpx
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from configuration_detris import one_line
from data.masks import RleMask, encode_mask
from data.mixture import Mixture
from data.streaming import StreamedBatches, StreamedRows
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import DetrisProcessor

from .arguments import DetrisTrainingArguments
from .checkpointing_trainer import CheckpointingTrainer
from .collators import EvaluationCollator, TellEpoch, TrainingCollator
from .sharding import of_its_own_class, prepare_sharding
from .stopping import leave_signals_to_main_process

METRIC = Path(__file__).parents[1] / "metrics" / "referring_iou"
STREAMED_RUNS = "streamed_runs"  # in the log history, of which every checkpoint has a copy
PADDING = -100  # what Trainer fills arrays of unequal length with when it gathers them


class DetrisTrainer(CheckpointingTrainer):
    """Trainer with DETRIS's optimizer, schedule and evaluation.

    Evaluation runs over objects, each with all its phrases. It gives no loss, because the mean over a batch would
    depend on how rows are spread over processes.

    Args:
        model: is trained or evaluated in place.
        args: what to do, and how.
        processor: fits the model's configuration.
        train_dataset: rows to train on; None if nothing is trained.
        eval_dataset: rows that `evaluate` runs over.
        callbacks: callbacks besides this trainer's own.

    Attributes:
        metric: counts pixels, and turns counts into IoU.
        mixture: what `train_dataset` is, if it is a mixture.
        predicted_masks: for each object that `predict` ran over, a COCO RLE for each phrase. None unless `save_masks`.
    """

    def __init__(
        self,
        model: DetrisForReferringSegmentation,
        args: DetrisTrainingArguments,
        processor: DetrisProcessor,
        train_dataset: datasets.Dataset | Mixture | StreamedRows | None = None,
        eval_dataset: datasets.Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.mixture = train_dataset if isinstance(train_dataset, Mixture) else None
        collator = TrainingCollator(processor, args.seed, has_repetitions=self.mixture is not None)
        if self.mixture is not None:
            train_dataset = self.mixture.rows
        if isinstance(train_dataset, datasets.Dataset):  # the collator decodes masks, and only their boxes
            train_dataset = train_dataset.cast_column("mask", RleMask(decode=False))
        self.evaluation_collator = EvaluationCollator(processor)
        self.metric = evaluate.load(str(METRIC), keep_in_memory=True)
        self.predicted_masks: list[list[dict]] | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=self.compute_referring_iou,
            optimizer_cls_and_kwargs=(torch.optim.Adam, adam_arguments(model, args)),
            callbacks=[TellEpoch(collator), CheckStreamingWorkers(), *(callbacks or [])],
        )
        if self.is_fsdp_enabled:
            prepare_sharding(self.accelerator, model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The milestones' schedule, or the one that `lr_scheduler_type` asks for.

        Trainer calls this before the first step, with the number of all steps.
        """
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
        """The loss and gradients of a batch. Trainer updates the weights after it.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        # The sum over all processes, so that all of them stop: one that went on could save weights that others broke.
        if not torch.isfinite(self.accelerator.reduce(loss)):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}: training stops before this step's "
                "update, and the last checkpoint is as it was. Lower the learning rate, or try bf16 or fp32 for fp16."
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the model, or its adapters, and the processor. Trainer calls this for checkpoints and at the end.

        `state_dict` is whole where the model is divided among processes, and else None.
        """
        with of_its_own_class(self.model):
            if not self.args.save_adapter_only:
                super()._save(output_dir, state_dict)
            elif self.args.should_save:
                folder = output_dir or self.args.output_dir
                self.model.save_adapter(folder, state_dict=state_dict)
                self.processing_class.save_pretrained(folder)

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> None:
        """Upload the model or its adapters, the processor and the card, and nothing else that `output_dir` holds."""
        state_dict = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if not self.is_world_process_zero():
            return
        if self.hub_model_id is None:
            self.init_hf_repo()
        with tempfile.TemporaryDirectory() as folder, of_its_own_class(self.model):
            if self.args.save_adapter_only:
                self.model.save_adapter(folder, repo_id=self.hub_model_id, state_dict=state_dict)
            else:
                self.model.save_pretrained(folder, state_dict=state_dict)
            self.processing_class.save_pretrained(folder)
            card = Path(self.args.output_dir) / "README.md"
            if card.exists():
                shutil.copy(card, folder)
            commit = huggingface_hub.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                commit_message=commit_message,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
            )
        print(f"The model was uploaded to {commit.repo_url}.")

    def init_hf_repo(self, token: str | None = None) -> None:
        """Make the repository on the Hub, or find it. Trainer calls this before anything is trained.

        Raises:
            OSError: the Hub cannot be reached.
        """
        try:
            super().init_hf_repo(token)
        except httpx.TransportError as error:
            raise OSError(
                f"The Hub cannot be reached ({one_line(error)}): check the network, or leave push_to_hub out and "
                "upload the finished model later."
            ) from error

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The batches of this process. Trainer calls this when training begins."""
        if not isinstance(self.train_dataset, StreamedRows):
            loader = super().get_train_dataloader()
            inner = getattr(loader, "base_dataloader", loader)  # torch's loader, if accelerate's is around it
            inner.worker_init_fn = functools.partial(leave_signals_to_main_process, also=inner.worker_init_fn)
            return loader
        args = self.args
        workers = max(args.dataloader_num_workers, 1)  # without workers, this process does their work
        loader = torch.utils.data.DataLoader(
            StreamedBatches(
                self.train_dataset, args.train_batch_size, args.process_index, args.world_size, workers, args.seed
            ),
            batch_size=None,  # the dataset gives whole batches
            collate_fn=self.data_collator,
            worker_init_fn=leave_signals_to_main_process,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        # `accelerator.prepare` would divide the batches among the processes, but they are divided already.
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def num_examples(self, dataloader: torch.utils.data.DataLoader) -> int:
        """Rows of an epoch over all processes. Trainer asks for it, to log its speed."""
        batches = dataloader.dataset
        return len(batches.rows) if isinstance(batches, StreamedBatches) else super().num_examples(dataloader)

    def get_eval_dataloader(self, eval_dataset: datasets.Dataset | None = None) -> torch.utils.data.DataLoader:
        """Batches of objects with all their phrases, of `eval_dataset` unless other rows are given."""
        loader = torch.utils.data.DataLoader(
            self.eval_dataset if eval_dataset is None else eval_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.evaluation_collator,
            worker_init_fn=leave_signals_to_main_process,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # a loader draws a seed, which must not change training's random numbers
        )
        return self.accelerator.prepare(loader)

    get_test_dataloader = get_eval_dataloader

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """Evaluate the same model in all processes.

        Without SyncBatchNorm, each process has running statistics of its own. The main process's are those that get
        saved, so all processes take them.
        """
        for buffer in self.model.buffers():
            broadcast(buffer)
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: torch.nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Segment the phrases of `B` objects, at most `K` each, and compare them with the truth.

        Trainer gathers what is returned.

        Returns:
            No loss; pixels in intersection, in union and in the truth `(B, K, 3)`, padded; the objects' ids `(B,)`.

        Raises:
            FloatingPointError: logits are not finite. Their masks would be empty, and would be counted as such.
        """
        counts, ref_ids, encoded = self._segment(model, inputs, encodes=self.predicted_masks is not None)
        if self.predicted_masks is not None:
            self.predicted_masks += self.accelerator.gather_for_metrics(encoded, use_gather_object=True)
        return None, counts, ref_ids

    @torch.no_grad()
    def segment(self, row: dict) -> list[dict]:
        """Segment a row's phrases as `predict` has done before, but in this process alone.

        Returns:
            A COCO RLE for each phrase.
        """
        inputs = self._prepare_inputs(self.evaluation_collator([row]))
        _, _, (masks,) = self._segment(self.model.eval(), inputs, encodes=True)
        return masks

    def _segment(
        self, model: torch.nn.Module, inputs: dict, encodes: bool
    ) -> tuple[torch.Tensor, torch.Tensor, list[list[dict]]]:
        """Segment a batch, of which at most `per_device_eval_batch_size` phrases go through the model at once.

        Returns:
            Counts and ids as from `prediction_step`; for each object a COCO RLE for each phrase, if it `encodes` them.
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
                if encodes:
                    encoded[number].append(encode_mask(prediction.cpu().numpy()))
        return counts, ref_ids, encoded

    def compute_referring_iou(self, results: EvalPrediction) -> dict[str, float]:
        """All figures of the metric, from the counts that `prediction_step` returned for all objects."""
        counts = _in_one_array(results.predictions).reshape(-1, 3)
        intersection, union, reference_area = counts[counts[:, 0] != PADDING].T
        return self.metric.compute(intersection=intersection, union=union, reference_area=reference_area)

    def predict(self, *args, **kwargs) -> PredictionOutput:
        """Segment all rows. The predictions returned are counts `(R, K, 3)`, the masks are in `predicted_masks`."""
        self.predicted_masks = [] if self.args.save_masks else None
        output = super().predict(*args, **kwargs)
        return output._replace(predictions=_in_one_array(output.predictions))


def adam_arguments(model: DetrisForReferringSegmentation, args: DetrisTrainingArguments) -> dict[str, Any]:
    """Adam's arguments, with two groups of parameters: the head, and what is trained inside the backbones."""
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
        # One call for all parameters, which takes a tenth of the time of one call each. Not with fp16: fused Adam
        # itself skips a step whose gradients overflow, and accelerate, not told of it, would move the schedule on.
        "fused": not args.fp16,
    }


class CheckStreamingWorkers(TrainerCallback):
    """Refuses to resume a run that would divide streamed rows among another number of workers.

    When a run begins, the number is written into its log history, which every checkpoint holds.

    Raises:
        ValueError: in Trainer, when training begins.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: torch.utils.data.DataLoader,
        **kwargs,
    ) -> None:
        batches, begins = train_dataloader.dataset, not state.global_step
        runs = batches.runs if isinstance(batches, StreamedBatches) else 0
        logged = [entry[STREAMED_RUNS] for entry in state.log_history if STREAMED_RUNS in entry]
        before = logged[0] if logged else runs if begins else 0
        if runs != before:
            raise ValueError(
                f"The run to resume streamed its rows to {before} workers in all processes, this one does to {runs}, "
                "which would read rows twice or not at all: give the same streaming, number of processes and "
                "dataloader_num_workers."
            )
        if runs and begins:
            state.log_history.append({"step": 0, STREAMED_RUNS: runs})


def _in_one_array(counts: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """Counts `(R, K, 3)` of all objects. Without `eval_do_concat_batches` each batch has its own array and `K`."""
    if isinstance(counts, np.ndarray):
        return counts
    phrases = max(batch.shape[1] for batch in counts)
    padding = [((0, 0), (0, phrases - batch.shape[1]), (0, 0)) for batch in counts]
    return np.concatenate([np.pad(batch, pad, constant_values=PADDING) for batch, pad in zip(counts, padding)])
