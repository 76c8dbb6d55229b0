"""What tests of runs share: a model of a few thousand parameters, and how many synthetic images it sees.

`conftest.py` has the fixtures that put them together.
"""

import gc
import os
import traceback
from collections.abc import Callable

SIZES = {"train": 14, "val": 4, "testA": 3, "testB": 0, "unseen": 0}
MODEL_CONFIG = {
    "vision_adapter_layers": [1],
    "vision_adapter_dim": 16,
    "text_adapter_layers": [0],
    "text_adapter_dim": 16,
    "aligner_attention_dim": 16,
    "aligner_attention_heads": 2,
    "feature_layers": [0, 1],
    "decoder_dim": 16,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "decoder_ffn_dim": 16,
    "mask_threshold": 0.1,  # after a few steps the model then segments parts of the images
}


def losses(trainer) -> list[float]:
    """What a Trainer has logged at each of its steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_child(action: Callable[[], None]) -> int:
    """Do `action` in a process that is this one's copy; return its exit status, negative if a signal has ended it."""
    child = os.fork()
    if not child:
        status = 1
        gc.freeze()  # to look through what was there before would take longer than a short run
        try:
            action()
            status = 0
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
