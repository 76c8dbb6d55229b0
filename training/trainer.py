"""Trainer with DETRIS's optimizer, schedule, streamed rows, evaluation and upload."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
from accelerate.data_loader import prepare_data_loader
from huggingface_hub.utils import httpx
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from configuration_detris import one_line
from data.masks import RleMask
from data.mixture import Mixture
from data.streaming import StreamedBatches, StreamedRows
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import DetrisProcessor

from .arguments import DetrisTrainingArguments
from .checkpointing_trainer import CheckpointingTrainer
from .collators import TellEpoch, TrainingCollator
from .evaluating_trainer import EvaluatingTrainer
from .sharding import of_its_own_class, prepare_sharding
from .stopping import leave_signals_to_main_process

STREAMED_RUNS = "streamed_runs"  # in the log history, of which every checkpoint has a copy
NEVER = 2**62  # a step that no run reaches


class DetrisTrainer(EvaluatingTrainer, CheckpointingTrainer):
    """Trainer with DETRIS's optimizer, schedule and evaluation.

    Args:
        model: is trained or evaluated in place.
        args: what to do, and how.
        processor: fits the model's configuration.
        train_dataset: rows to train on; None if nothing is trained.
        eval_dataset: rows that `evaluate` runs over.
        callbacks: callbacks besides this trainer's own.

    Attributes:
        mixture: what `train_dataset` is, if it is a mixture.
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
        self.first_bad_step: torch.Tensor | None = None  # on the device: the first whose loss was not finite, or NEVER
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
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

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as Trainer does. A loss that an earlier call has noted is forgotten."""
        self.first_bad_step = None
        return super().train(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """The loss and gradients of a batch. Trainer updates the weights after it.

        A loss that is not finite is noted on the device: to read it, the host would have to wait at each step.
        """
        loss, step = super().training_step(*args, **kwargs), self.state.global_step + 1
        if self.first_bad_step is None:
            self.first_bad_step = torch.full((), NEVER, device=loss.device)
        self.first_bad_step = torch.where(loss.isfinite(), self.first_bad_step, self.first_bad_step.clamp(max=step))
        return loss

    def stop_if_loss_was_not_finite(self) -> None:
        """Stop all processes if one has had a loss that is not finite since this was asked before.

        Raises:
            FloatingPointError: names the first step with such a loss.
        """
        if self.first_bad_step is None:
            return
        first = int(self.accelerator.gather(self.first_bad_step).min())
        if first < NEVER:
            raise FloatingPointError(
                f"The loss of step {first} is not finite: training stops after step {self.state.global_step}. The "
                "weights in memory are lost and are not saved; the last checkpoint is as it was. Lower the learning "
                "rate, or try bf16 or fp32 for fp16."
            )
        self.first_bad_step = None

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Log, evaluate and save what is due, unless a loss was not finite. Trainer calls this after each step."""
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.stop_if_loss_was_not_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Trainer does. Raises FloatingPointError if a loss or a weight is not finite."""
        self.stop_if_loss_was_not_finite()
        super().save_model(output_dir, _internal_call)

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
            persistent_workers=args.dataloader_persistent_workers,
            **self.worker_arguments(),
        )
        # `accelerator.prepare` would divide the batches among the processes, but they are divided already.
        return prepare_data_loader(
            loader,
            args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=args.accelerator_config.non_blocking,
        )

    def num_examples(self, dataloader: torch.utils.data.DataLoader) -> int:
        """Rows of an epoch over all processes. Trainer asks for it, to log its speed."""
        batches = dataloader.dataset
        return len(batches.rows) if isinstance(batches, StreamedBatches) else super().num_examples(dataloader)


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
        # One call for all parameters, which takes a tenth of the time of one call each. With fp16 fused Adam itself
        # skips a step whose gradients overflow; accelerate is not told of it and would move the schedule on.
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
