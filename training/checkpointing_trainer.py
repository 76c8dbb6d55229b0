"""Trainer's checkpoints: saved whole or not at all, and resumed exactly or refused."""

import itertools
import shutil
from pathlib import Path

import torch
from torch.distributed.tensor.experimental import implicit_replication
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import ADAPTER_CONFIG_NAME

from .checkpoints import best_model_of, check_tensors, read_state, stop_if_not_finite
from .run_folder import UNFINISHED, lies_in, put_in_place


class CheckpointingTrainer(Trainer):
    """Trainer that gives a checkpoint its name when it is whole, saves only finite weights, and resumes strictly."""

    unfinished: Path | None = None  # where a checkpoint is being written
    resumed: Path | None = None  # the checkpoint that this run has gone on from

    def _get_output_dir(self, trial) -> str:
        """Where Trainer writes checkpoints: the run's folder, or another while one is not whole."""
        return str(self.unfinished or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial) -> None:
        """Save a checkpoint, under another name until all processes have written their parts.

        Trainer calls this when a checkpoint is due.
        """
        run, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written = run / UNFINISHED / name
        if self.args.should_save:
            shutil.rmtree(written.parent, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self.unfinished = written.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.unfinished = None
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(run / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            put_in_place(written, run / name)
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint. Trainer calls this before it is whole, and `_save_checkpoint` once more when it is."""
        if self.unfinished is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Trainer does. Raises FloatingPointError if a weight is not finite."""
        stop_if_not_finite(self.model, f"after step {self.state.global_step}, so that nothing is saved")
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the model, or its adapters, from a checkpoint. Trainer calls this when it resumes.

        Raises:
            ValueError: the checkpoint is of another model.
            FloatingPointError: a weight is not finite.
        """
        self.resumed = Path(resume_from_checkpoint)
        if (self.resumed / ADAPTER_CONFIG_NAME).exists():
            with implicit_replication():  # the model may be divided among processes
                self.model.load_adapter(resume_from_checkpoint)
        else:
            check_tensors(self.resumed, self.model)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        stop_if_not_finite(self.model, f"in {resume_from_checkpoint}")

    def _load_best_model(self) -> None:
        """Load the model, or its adapters, from the best checkpoint. Trainer calls this when training ends."""
        if Path(self.state.best_model_checkpoint, ADAPTER_CONFIG_NAME).exists():
            with implicit_replication():  # the model may be divided among processes
                self.model.load_adapter(self.state.best_model_checkpoint)
        else:
            check_tensors(Path(self.state.best_model_checkpoint), self.model)
            super()._load_best_model()

    def _load_callback_state(self) -> None:
        """Correct the best checkpoint's path and the count of early stopping.

        Trainer calls this when it resumes. It takes the path as it was, though the run's folder may have moved, and
        lets the count begin anew.
        """
        super()._load_callback_state()
        best = best_model_of(self.resumed, read_state(self.resumed))
        if best is not None and lies_in(best, Path(self.args.output_dir)):
            best = Path(self.args.output_dir, best.name)  # the name under which Trainer keeps it
        self.state.best_model_checkpoint = None if best is None else str(best)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                state = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                count = "early_stopping_patience_counter"
                setattr(callback, count, state["attributes"][count])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load their states. Trainer calls this before training, with None if it does not resume.

        Raises:
            ValueError: they are of another model or optimizer.
        """
        if checkpoint is None:
            return
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            for parameter in itertools.chain(*(group["params"] for group in self.optimizer.param_groups)):
                if self.optimizer.state[parameter]["exp_avg"].shape != parameter.shape:
                    raise ValueError("a parameter has another shape there")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{OPTIMIZER_NAME} or {SCHEDULER_NAME} in {checkpoint} is of another model or optimizer ({error}): "
                "resume with the arguments that the run began with."
            ) from error

    def _run_epoch(self, *args, **kwargs) -> None:
        """Train an epoch, unless the run is finished.

        Trainer would train a finished run for one more step, and one that early stopping has ended up to the next
        evaluation.
        """
        ended_early = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        if self.state.global_step < self.state.max_steps and not ended_early:
            super()._run_epoch(*args, **kwargs)
