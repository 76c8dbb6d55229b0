"""SIGTERM and SIGINT: a run saves a checkpoint at the end of its step, or leaves its evaluation, and ends."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import LAST, checkpoints_in

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunStopped(Exception):
    """A signal has ended the run."""


class StopAtSignal(TrainerCallback):
    """Within `with`, a SIGTERM or SIGINT stops the run in good order; a second SIGINT ends the process at once.

    A checkpoint saved here must lead to the same numbers as the run would without the signal. So none is saved where
    an evaluation is due: resuming would skip it, and with it perhaps the best checkpoint. All processes stop at the
    same place, whichever of them got the signal.

    Raises:
        RunStopped: in Trainer, after the checkpoint has been saved, or within an evaluation.
    """

    def __init__(self):
        self.received = 0  # number of the signal
        self.agreed = False  # by all processes
        self.group: torch.distributed.ProcessGroup | None = None  # of all processes, on their CPUs

    def __enter__(self) -> "StopAtSignal":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, error_type, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received and not self.agreed and error_type is None:  # it came after the last step and batch
            signal.raise_signal(self.received)

    def _receive(self, number: int, frame) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not by `print`, which may be what the signal has interrupted.
        os.write(2, f"\n{signal.Signals(number).name}: stopping. A second Ctrl-C ends the run at once.\n".encode())

    def _agree(self, args: TrainingArguments) -> bool:
        """Whether any process has received a signal. All processes call this at the same place.

        They agree by their CPUs, because an answer of a GPU would come only when it has done all its work.
        """
        received = self.received
        if args.world_size > 1:
            self.group = self.group or torch.distributed.new_group(backend="gloo")
            of_all = torch.tensor(received)
            torch.distributed.all_reduce(of_all, op=torch.distributed.ReduceOp.MAX, group=self.group)
            received = int(of_all)
        self.received = received or self.received  # a signal may have come meanwhile: all agree on it next time
        self.agreed = bool(received)
        return self.agreed

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        within_epoch = state.epoch % 1 != 0
        if self._agree(args) and within_epoch and not control.should_evaluate:
            control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.agreed and not control.should_evaluate:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.agreed:
            raise RunStopped

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if self._agree(args):
            raise RunStopped


def leave_signals_to_main_process(worker: int, also: Callable[[int], None] | None = None) -> None:
    """Make a loader worker ignore signals sent to the whole process group. The main process ends it.

    This is a loader's `worker_init_fn`. The main process needs its workers until its own step or evaluation ends; then
    it sends each of them SIGTERM, which the worker tells from others by its sender.

    Args:
        worker: the worker's number.
        also: a function to call first, with the worker's number.
    """
    if also is not None:
        also(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux has it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_signals, daemon=True).start()


def _end_when_parent_signals() -> None:
    """Wait for a SIGTERM of the parent process and end then; ignore those of others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def how_to_go_on(number: int, args: TrainingArguments, state: TrainerState, in_training: bool) -> str:
    """Return the log message that says how to resume a run that a signal stopped.

    Args:
        number: the signal's number.
        in_training: False if training has ended and the model is saved.
    """
    name = signal.Signals(number).name
    if not args.do_train:
        return f"{name} has stopped the evaluation: start it again."
    if not in_training:
        return (
            f"{name} has stopped the evaluation; the trained model is in {args.output_dir}: evaluate it with "
            f"--model_name_or_path {args.output_dir} instead of --do_train and the arguments that named the model."
        )
    checkpoints = checkpoints_in(Path(args.output_dir))
    where = f"{name} has stopped the training at step {state.global_step} of {state.max_steps}"
    if not checkpoints:
        return f"{where}, before its first checkpoint: start it again."
    return f"{where}: go on from {checkpoints[-1].name} by the same command with --resume_from_checkpoint {LAST}."
