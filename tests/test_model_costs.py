"""What a forward pass and a training step cost: arithmetic, launches and memory, counted without a GPU.

Models of the paper's size lie on the meta device, where operations have shapes and no values.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.models import small_config, small_inputs, small_model
from peft import get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import modeling_detris
from adapters_detris import ConvNormReLU
from benchmarks.counting import Operations, count_saved_bytes
from configuration_detris import DetrisConfig
from modeling_detris import DetrisForReferringSegmentation
from peft_detris import DetrisAdapterConfig

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated"),
]
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


def base_model(**fields) -> DetrisForReferringSegmentation:
    """A model of the paper's base size on the meta device, in training."""
    with torch.device("meta"):
        return DetrisForReferringSegmentation(DetrisConfig(**fields)).train()


def base_inputs(count: int) -> dict[str, torch.Tensor]:
    """Images, phrases and masks for `base_model`, on the meta device."""
    images, labels = torch.empty(count, 3, 448, 448, device="meta"), torch.empty(count, 448, 448, device="meta")
    return {
        "pixel_values": images,
        "input_ids": torch.zeros(count, 17, dtype=torch.long, device="meta"),
        "labels": labels,
    }


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    """Check that two models, equal before their backward passes, have the same gradients up to rounding."""
    pairs = [(name, ours.grad, p.grad) for (name, ours), p in zip(model.named_parameters(), expected.parameters())]
    scale = torch.stack([gradient.norm() for _, _, gradient in pairs if gradient is not None]).norm()
    for name, ours, gradient in pairs:
        assert (ours is None) == (gradient is None), name
        if gradient is not None:
            assert (ours - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * scale, name


# --- Checkpointing ---------------------------------------------------------------------------------------------------


# In GFLOP a pair: what the layers from the first adapter on cost and, for the second time, their forward pass. Before,
# a graph reached down to the embeddings: 662 and 651.
@pytest.mark.parametrize(("fields", "gflop"), [({}, 602), ({"peft_method": "none"}, 180)])
def test_checkpointing_spares_the_backward_pass_below_the_first_adapter(fields, gflop):
    model = base_model(**fields)
    model.gradient_checkpointing_enable()
    loss = model(**base_inputs(1)).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    decoder = 20  # its forward pass, for the second time, which keeps 2.3 GB out of memory (below)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop + decoder, abs=1)


def detris_in_peft() -> nn.Module:
    fields = {"vision_adapter_layers": [2], "text_adapter_layers": [1]}
    peft_config = DetrisAdapterConfig(**fields, vision_adapter_dim=32, text_adapter_dim=16, aligner_dropout=0.0)
    return get_peft_model(small_model(small_config(peft_method="none")), peft_config)


def lora_without_its_first_layers() -> nn.Module:
    model = small_model(small_config(peft_method="lora"))
    for name, parameter in model.named_parameters():
        if "encoder.layer.0." in name or "encoder.layer.1." in name or "encoder.layers.0." in name:
            parameter.requires_grad = False
    return model


MODELS = {
    "adapters": lambda: small_model(small_config(vision_adapter_layers=[2], text_adapter_layers=[1])),
    "adapters in PEFT": detris_in_peft,
    "lora": lora_without_its_first_layers,
    "no adapters": lambda: small_model(small_config(peft_method="none")),
    "unfrozen": lambda: small_model(small_config(freeze_backbones=False, peft_method="none")),
}
# Vision layers and text layers that gradients reach.
REACHED = {"no adapters": ([], []), "unfrozen": ([0, 1, 2, 3], [0, 1, 2])}


@REENTRANT
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_computes_again_what_gradients_reach_and_nothing_else(name, reentrant, recwarn):
    plain = MODELS[name]().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    graphs, again = ([], []), ([], [])

    def look(tower, index):
        def hook(layer, inputs, output):
            if torch._C._current_graph_task_id() != -1:
                again[tower].append(index)
            elif output.requires_grad:
                graphs[tower].append(index)

        return hook

    layers = (checkpointed.vision_model.encoder.layer, checkpointed.text_model.encoder.layers)
    for tower in (0, 1):
        for index, layer in enumerate(layers[tower]):
            layer.register_forward_hook(look(tower, index))
            inside = getattr(layer, "base_layer", layer)
            (inside.norm1 if tower == 0 else inside.layer_norm1).register_forward_hook(look(tower, index))
    for model in (plain, checkpointed):
        model(**small_inputs(3), labels=torch.ones(3, 56, 56)).loss.backward()
    vision, text = REACHED.get(name, ([2, 3], [1, 2]))
    assert [sorted(set(tower)) for tower in graphs] == [vision, text]
    assert [sorted(set(tower)) for tower in again] == [vision, text]
    assert not any("requires_grad" in str(warning.message) for warning in recwarn)
    assert_same_gradients(checkpointed, plain)


@pytest.mark.slow
@REENTRANT
def test_checkpointing_is_a_part_of_one_graph(reentrant):
    plain = small_model(small_config(text_adapter_layers=[1])).train()
    checkpointed, input_ids = copy.deepcopy(plain), small_inputs(3)["input_ids"]
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled = torch.compile(checkpointed.encode_text, fullgraph=True, backend="aot_eager")
    for encode_text in (plain.encode_text, compiled):
        words, sentences = encode_text(input_ids)
        (words.square().mean() + sentences.sum()).backward()
    assert_same_gradients(checkpointed, plain)


def test_checkpointing_can_be_switched_off_again():
    model = small_model().train()
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    with FlopCounterMode(display=False) as counter:
        loss = model(**small_inputs(2)).logits.mean()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() < 2 * forward


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused_attention(monkeypatch):
    """Attention as a GPU computes it: in one kernel, which keeps neither weights nor dropout's mask."""
    attention = F.scaled_dot_product_attention

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, *args, **options):
        return attention(query, key, value, attn_mask, 0.0, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)


# The base recipe: 32 images, and autocast to bfloat16, as `--bf16` does. Before, 12.0 and 5.9 GB.
def test_a_training_step_keeps_little_in_memory(monkeypatch, fused_attention):
    # It reads values, which fake tensors do not have.
    monkeypatch.setattr(modeling_detris, "check_inputs", lambda *_: None)
    model = base_model()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        model.to_empty(device="cpu")
        inputs = {name: torch.empty_like(value, device="cpu") for name, value in base_inputs(32).items()}
        in_memory = [*model.parameters(), *model.buffers(), *inputs.values()]

        def gigabytes(compute: Callable[[], torch.Tensor]) -> float:
            return count_saved_bytes(compute, in_memory) / 1e9

        plain = gigabytes(lambda: model(**inputs).loss)
        layer, hidden_states, words = model.vision_model.encoder.layer[3], (32, 1029, 768), (32, 17, 512)
        again = gigabytes(lambda: layer(torch.empty(hidden_states).requires_grad_(), torch.empty(words)))
        model.gradient_checkpointing_enable()
        checkpointed = gigabytes(lambda: model(**inputs).loss)
    assert plain < 12.1
    assert checkpointed < 3.7
    assert checkpointed + again < 5  # in the backward pass, one layer at a time is computed again


# --- Launches --------------------------------------------------------------------------------------------------------


def launches_of(module: nn.Module, *args, **inputs) -> int:
    values = [value for value in (*args, *inputs.values()) if isinstance(value, torch.Tensor)]
    with torch.no_grad(), Operations([*module.parameters(), *module.buffers(), *values]) as operations:
        module(*args, **inputs)
    return operations.launches


# Of the small model. Before, 328 and 356.
@pytest.mark.parametrize(("training", "launches"), [(False, 309), (True, 337)])
def test_a_forward_pass_launches_few_kernels(training, launches):
    assert launches_of(small_model().train(training), **small_inputs(2)) <= launches


# Four projections and the attention; two more for a mask. Before, 9 and 12: inputs and output were copied.
def test_attention_copies_nothing():
    layer = small_model().decoder.layers[0]
    patches, words, padding = torch.randn(2, 16, 32), torch.randn(2, 7, 24), torch.zeros(2, 7, dtype=torch.bool)
    assert launches_of(layer.self_attention, patches, patches, torch.randn(2, 16, 32)) == 5
    assert launches_of(layer.word_attention, patches, words, torch.randn(2, 7, 24), padding) == 7


def test_neck_and_mask_head_keep_channels_last():
    model, formats = small_model(), []

    def note(module, inputs, output):
        formats.append([values.is_contiguous(memory_format=torch.channels_last) for values in (*inputs, output)])

    for part in (model.neck, model.mask_head):
        for module in part.modules():
            if isinstance(module, (ConvNormReLU, nn.Upsample)):
                module.register_forward_hook(note)
    with torch.no_grad():
        model(**small_inputs(2))
    assert len(formats) == 10
    # The neck reads patches out of the tokens, so an image's do not follow those of the image before.
    assert formats == [[False, True]] * 3 + [[True, True]] * 7


# --- Phrases of an image ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_phrases_share_an_image_until_the_first_aligner_reads_their_words():
    model = base_model().eval()
    images = base_inputs(1)["pixel_values"]

    def gflop(phrases: int) -> float:
        words, image_index = torch.empty(phrases, 17, 512, device="meta"), torch.zeros(phrases, device="meta").long()
        with FlopCounterMode(display=False) as counter:
            model.encode_images(images, words, image_index)
        return counter.get_total_flops() / 1e9

    # In multiply-adds, with 1029 tokens of 768 channels, 1024 of them patches.
    embedding = 1024 * 3 * 14**2 * 768
    layer = 1029 * 768 * (4 * 768 + 2 * 1029 + 2 * 4 * 768)  # attention, MLP
    down = 1029 * 768 * 128
    dense = 1024 * (128 * 64 + 192 * 8 + 9 * 8 * 32 + 224 * 8 + 25 * 8 * 32)
    shared = 2 * (embedding + 2 * layer + down + dense) / 1e9  # 36.8; without the adapted layer 18.7
    assert gflop(8) == pytest.approx(8 * gflop(1) - 7 * shared, rel=1e-6)


SHARING = pytest.mark.parametrize(
    "fields",
    [{"adapter_scale": 0.7}, {"registers": False}, {"vision_adapter_layers": [0]}, {"vision_adapter_layers": [3]}],
    ids=str,
)


@torch.no_grad()
@SHARING
def test_phrases_that_share_an_image_are_segmented_as_alone(fields):
    model, inputs, image_index = small_model(small_config(**fields)), small_inputs(5, images=3), [2, 0, 2, 2, 0]
    alone = model(inputs["pixel_values"][image_index], inputs["input_ids"]).logits
    together = model(**inputs, image_index=torch.tensor(image_index)).logits
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@SHARING
def test_training_counts_an_image_once_for_each_of_its_phrases(fields):
    alone = small_model(small_config(**fields)).train()
    together, inputs, image_index = copy.deepcopy(alone), small_inputs(5, images=3), [2, 0, 2, 2, 0]
    labels = (torch.rand(5, 56, 56, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    alone(inputs["pixel_values"][image_index], inputs["input_ids"], labels=labels).loss.backward()
    together(**inputs, image_index=torch.tensor(image_index), labels=labels).loss.backward()
    assert_same_gradients(together, alone)
    for ours, expected in zip(together.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
