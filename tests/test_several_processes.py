"""Training in several processes: what DDP need not do, and the same numbers as in one process."""

import pytest
import torch
from helpers.models import small_config, small_inputs, small_model
from helpers.runs import in_processes
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGURATIONS = {
    "detris": {},
    "lora": {"peft_method": "lora"},
    "detris and lora": {"peft_method": "detris+lora", "lora_use_dora": True},
    "no adapters": {"peft_method": "none"},
    "no registers": {"registers": False},
    "the last layers alone": {"vision_adapter_layers": [3], "text_adapter_layers": [2], "feature_layers": [3]},
    "no adapters in the text": {"text_adapter_layers": []},
    "no adapters in the image": {"vision_adapter_layers": []},
    "no further features": {"feature_layers": []},
    "trained backbones": {"freeze_backbones": False},
    "trained backbones alone": {"freeze_backbones": False, "peft_method": "none", "feature_layers": [0]},
    "trained backbones with LoRA": {"freeze_backbones": False, "peft_method": "detris+lora"},
}


def batch(with_image_index: bool) -> dict[str, torch.Tensor]:
    """Three phrases, on two images if there is an `image_index`."""
    inputs = small_inputs(3, images=2 if with_image_index else 3)
    if with_image_index:
        inputs["image_index"] = torch.tensor([0, 1, 0])
    return inputs | {"labels": (torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(0)) > 0.5).float()}


def ddp_steps(model: torch.nn.Module, broadcast_buffers: bool = False, seed: int = 0) -> None:
    """Compute the gradients of two steps: DDP complains of a parameter without one when the next step begins."""
    parallel = DistributedDataParallel(model, find_unused_parameters=False, broadcast_buffers=broadcast_buffers)
    for step in range(2):
        inputs = batch(with_image_index=step > 0)
        inputs["pixel_values"] = inputs["pixel_values"] + seed
        parallel(**inputs).loss.backward()


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("fields", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_each_trained_parameter_gets_a_gradient(fields, checkpointing):
    model = small_model(small_config(**fields)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    for with_image_index in (False, True):
        model.zero_grad()
        model(**batch(with_image_index)).loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}], ids=str)
def test_ddp_trains_each_configuration_without_a_search(tmp_path, checkpointing):
    def train(rank: int) -> None:
        for fields in CONFIGURATIONS.values():
            model = small_model(small_config(**fields)).train()
            if checkpointing is not None:
                model.gradient_checkpointing_enable(checkpointing)
            ddp_steps(model)
        model.vision_model.embeddings.mask_token.requires_grad = True  # never gets a gradient
        with pytest.raises(RuntimeError, match="did not receive grad"):
            ddp_steps(model)

    in_processes(2, tmp_path, train)


def test_the_saved_statistics_do_not_depend_on_broadcasts(tmp_path):
    """In training a batch norm reads its batch, not its statistics, and those of the main process are its own."""

    def train(rank: int) -> None:
        statistics = []
        for broadcast_buffers in (True, False):
            model = small_model().train()
            ddp_steps(model, broadcast_buffers, seed=rank)
            statistics.append(model.state_dict())
        wrong = [name for name, value in statistics[0].items() if not torch.equal(value, statistics[1][name])]
        assert (wrong == []) == (rank == 0)

    in_processes(2, tmp_path, train)


def test_the_trainer_asks_ddp_for_neither_search_nor_broadcast(make_trainer):
    handler = make_trainer().accelerator.ddp_handler
    assert handler.find_unused_parameters is False and handler.broadcast_buffers is False
    assert make_trainer(ddp_find_unused_parameters=True).accelerator.ddp_handler.find_unused_parameters is True
