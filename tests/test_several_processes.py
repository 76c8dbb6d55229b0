"""Training in several processes: what DDP need not do, and the same numbers as in one process."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import TorchDynamoPlugin
from helpers.models import small_config, small_inputs, small_model
from helpers.runs import in_processes
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import train_hf
from modeling_detris import DetrisForReferringSegmentation
from training.sharding import prepare_sharding

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


# --- FSDP -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def train_in_two(config_file, tmp_path, monkeypatch):
    """Runs train_hf.py in two processes, with FSDP or DDP; returns the folder that it leaves behind.

    accelerate has no FSDP on CPUs, so it is told that the processes have GPUs, but is to use their CPUs.
    """

    def train(name: str, fsdp: bool, *arguments: str) -> Path:
        def run(rank: int) -> None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ["MASTER_ADDR"] = "localhost"  # is asked for, though the group exists already
            if fsdp:
                # What `accelerate launch` writes, and what people are asked for who let it ask them.
                os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
                os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
                os.environ |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
                PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
                PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
            AcceleratorState._reset_state(reset_partial_state=True)
            train_hf.main([config_file, "--use_cpu", "--output_dir", str(tmp_path / name), *arguments])

        (tmp_path / f"store of {name}").mkdir()
        in_processes(2, tmp_path / f"store of {name}", run)
        return tmp_path / name

    return train


def assert_same_tensors(of_one: dict[str, torch.Tensor], of_other: dict[str, torch.Tensor]) -> None:
    assert of_one.keys() == of_other.keys() and of_one
    for name, tensor in of_one.items():
        assert torch.allclose(tensor, of_other[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.slow
def test_fsdp_trains_saves_and_evaluates_adapters_as_ddp_does(train_in_two):
    """Each phrase of val is segmented alone, and objects have unequally many: no process may wait for the other."""
    arguments = ["--do_train", "--do_predict", "--test_splits", "val", "--save_adapter_only", "--bf16"]
    arguments += ["--max_steps", "3", "--learning_rate", "1e-3", "--eval_strategy", "steps", "--eval_steps", "1"]
    arguments += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "3"]
    arguments += ["--per_device_eval_batch_size", "1"]
    of_ddp, of_fsdp = train_in_two("ddp", False, *arguments), train_in_two("fsdp", True, *arguments)
    weights = Path("adapter_model.safetensors")
    for folder in (".", "checkpoint-1", "checkpoint-3"):  # the run ends with its best checkpoint
        assert_same_tensors(load_file(of_fsdp / folder / weights), load_file(of_ddp / folder / weights))
    for name in ("adapter_config.json", "config.json", "predictions/val/results.jsonl"):
        assert (of_fsdp / name).read_text() == (of_ddp / name).read_text(), name
    inputs = {"pixel_values": torch.ones(1, 3, 32, 32), "input_ids": torch.tensor([[5, 6, 7]])}
    logits = [DetrisForReferringSegmentation.from_pretrained(folder)(**inputs).logits for folder in (of_ddp, of_fsdp)]
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.slow
def test_fsdp_saves_whole_models(train_in_two):
    arguments = ["--do_train", "--max_steps", "1", "--load_best_model_at_end", "false", "--eval_strategy", "no"]
    run = train_in_two("fsdp", True, *arguments, "--save_strategy", "steps", "--save_steps", "1")
    tensors = load_file(run / "model.safetensors")
    assert_same_tensors(tensors, load_file(run / "checkpoint-1" / "model.safetensors"))
    model = DetrisForReferringSegmentation.from_pretrained(run)
    assert_same_tensors(tensors, model.state_dict())
    assert model.config.auto_map["AutoModel"] == "modeling_detris.DetrisForReferringSegmentation"


def test_what_fsdp_cannot_do_is_refused(config_file, monkeypatch):
    def prepare(version: int, backend: str) -> None:
        plugins = {
            "fsdp_plugin": SimpleNamespace(fsdp_version=version),
            "dynamo_plugin": TorchDynamoPlugin(backend=backend),
        }
        prepare_sharding(SimpleNamespace(state=SimpleNamespace(**plugins)), small_model())

    with pytest.raises(ValueError, match="fsdp_version is 1: DETRIS is trained with version 2"):
        prepare(1, "no")
    with pytest.raises(ValueError, match="torch_compile gives the weights other names under FSDP"):
        prepare(2, "inductor")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="A run with FSDP cannot be resumed, .*--model_name_or_path"):
        train_hf.main([config_file, "--do_train", "--resume_from_checkpoint", "last"])
