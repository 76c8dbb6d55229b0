"""Trainer's checkpoints, whole or not there at all, and resumed to the same numbers or not at all."""

import itertools
import shutil
from pathlib import Path

import torch
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
        return str(self.unfinished or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial) -> None:
        """As Trainer's, but under another name until all processes have written their parts."""
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
        if self.unfinished is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        stop_if_not_finite(self.model, f"after step {self.state.global_step}, so that nothing is saved")
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.resumed = Path(resume_from_checkpoint)
        if (self.resumed / ADAPTER_CONFIG_NAME).exists():
            self.model.load_adapter(resume_from_checkpoint)
        else:
            check_tensors(self.resumed, self.model)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        stop_if_not_finite(self.model, f"in {resume_from_checkpoint}")

    def _load_best_model(self) -> None:
        if Path(self.state.best_model_checkpoint, ADAPTER_CONFIG_NAME).exists():
            self.model.load_adapter(self.state.best_model_checkpoint)
        else:
            check_tensors(Path(self.state.best_model_checkpoint), self.model)
            super()._load_best_model()

    def _load_callback_state(self) -> None:
        """Correct the best checkpoint's path and early stopping's count, which Trainer reads wrongly or not at all."""
        super()._load_callback_state()
        best = best_model_of(self.resumed, read_state(self.resumed))
        if best is not None and lies_in(best, Path(self.args.output_dir)):
            best = Path(self.args.output_dir, best.name)  # Trainer, who keeps it, compares names
        self.state.best_model_checkpoint = None if best is None else str(best)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):  # else its count of evaluations would begin anew
                state = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                count = "early_stopping_patience_counter"
                setattr(callback, count, state["attributes"][count])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
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
        if self.state.global_step < self.state.max_steps:  # a finished run would be resumed for one step more
            super()._run_epoch(*args, **kwargs)
