"""torch.compile and torch.export: one graph, free numbers of images and phrases, and the numbers of eager mode."""

import functools

import pytest
import torch
from helpers.models import small_config, small_inputs, small_model
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.export import Dim

from modeling_detris import DetrisForReferringSegmentation

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny_model(registers=True, **fields):
    """A model of few layers, so that compiling takes little time; the first of two vision layers reads no words."""
    fields |= {"vision_adapter_layers": [1], "text_adapter_layers": [0], "feature_layers": [0]}
    text_config = small_config().text_config.to_dict() | {"num_hidden_layers": 1}
    return small_model(small_config(registers, {"num_hidden_layers": 2}, text_config=text_config, **fields))


def inputs_for(images, phrases, labels=False, shared=True):
    """Inputs with phrases for several images; with `labels` too, and without `image_index` unless `shared`."""
    inputs = small_inputs(phrases, images)
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    if shared:
        inputs["image_index"] = torch.arange(phrases) % images
    if labels:
        inputs["labels"] = (torch.rand(phrases, 56, 56, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    return inputs


@pytest.mark.parametrize(
    ("method", "registers", "mode", "shared"),
    [
        ("detris", True, "evaluation", True),
        pytest.param("detris", False, "training", False, marks=pytest.mark.slow),
        pytest.param("detris", True, "checkpointing", True, marks=pytest.mark.slow),
        pytest.param("lora", False, "evaluation", False, marks=pytest.mark.slow),
        pytest.param("detris+lora", False, "checkpointing", False, marks=pytest.mark.slow),
        pytest.param("none", True, "training", True, marks=pytest.mark.slow),
    ],
)
def test_the_model_is_one_graph(method, registers, mode, shared):
    model = tiny_model(registers, peft_method=method).train(mode != "evaluation")
    if mode == "checkpointing":
        model.gradient_checkpointing_enable()
    # Only AOTAutograd computes checkpointed layers again as part of a graph.
    backend = CompileCounterWithBackend("aot_eager" if mode == "checkpointing" else "eager")
    inputs = inputs_for(2 if shared else 3, 3, labels=True, shared=shared)
    loss = torch.compile(model, backend=backend, fullgraph=True)(**inputs).loss
    loss.backward()
    assert backend.frame_count == 1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


PAIRS = [(2, 5), (3, 4), (4, 4), (5, 9), (6, 2), (1, 5), (1, 1), (8, 8)]  # images and phrases


@pytest.mark.slow
def test_eight_pairs_of_counts_need_three_graphs():
    """PyTorch compiles a count of one apart: one graph is for one image, and one for one image with one phrase."""
    model, backend = tiny_model(), CompileCounter()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for images, phrases in PAIRS:
        inputs = inputs_for(images, phrases, labels=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert backend.frame_count <= 3


@pytest.mark.slow
@pytest.mark.parametrize(("images", "phrases"), [(1, 2), (2, 3)])
def test_what_phrases_share_is_laid_out_as_the_graph_expects(images, phrases):
    """AOTAutograd, which all compilers but `eager` build on, knows strides beforehand and relies on them."""
    model, inputs = tiny_model(), inputs_for(images, phrases)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def step(model, call, inputs):
    """Logits, loss, gradients and batch-norm statistics of a training step."""
    output = call(**inputs)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if ".norm." in name}
    return output.logits.detach(), output.loss.detach(), gradients, statistics


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "checkpointing"), [("aot_eager", True), ("inductor", False)])
def test_a_compiled_step_has_eager_modes_numbers(backend, checkpointing):
    """Batch norm counts a batch once, though a checkpointed layer is computed twice."""
    inputs = inputs_for(2, 3, labels=True)
    model = tiny_model().train()
    logits, loss, gradients, statistics = step(model, model, inputs)
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    compiled = step(model, torch.compile(model, backend=backend, fullgraph=True), inputs)

    def gap(ours, expected):
        return ((ours - expected).norm() / expected.norm()).item()

    assert gap(compiled[0], logits) < 1e-5
    assert gap(compiled[1], loss) < 1e-5
    # The bias of a convolution before a batch norm has no effect: its gradient is only rounding.
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (compiled[2][name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7 * whole, name
    assert len(statistics) > 20
    for name, buffer in statistics.items():
        torch.testing.assert_close(compiled[3][name], buffer, rtol=1e-5, atol=1e-6, msg=name)
        assert name.endswith(("mean", "var")) or buffer == 1


@pytest.mark.slow
def test_trainer_evaluates_the_compiled_model(make_trainer, monkeypatch):
    """During training, after it, without it, and a second time."""
    forward, uncompiled = DetrisForReferringSegmentation.forward, []

    @functools.wraps(forward)
    def watched(*args, **kwargs):
        if not torch.compiler.is_compiling():  # PyTorch drops these lines when it compiles the function
            uncompiled.append(args)
        return forward(*args, **kwargs)

    monkeypatch.setattr(DetrisForReferringSegmentation, "forward", watched)
    options = {"rows": 4, "per_device_eval_batch_size": 16, "torch_compile": True, "torch_compile_backend": "eager"}
    trainer = make_trainer(eval_strategy="epoch", num_train_epochs=1, bf16=True, **options)
    trainer.train()
    graphs = counters["stats"]["unique_graphs"]
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert counters["stats"]["unique_graphs"] == graphs <= 4

    trainer = make_trainer(**options)
    trainer.evaluate()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert not uncompiled and not counters["graph_break"]


@pytest.mark.slow
def test_an_exported_program_takes_other_counts():
    model = tiny_model()
    images, phrases = Dim("images"), Dim("phrases")
    shapes = {name: {0: images if name == "pixel_values" else phrases} for name in inputs_for(2, 3)}
    program = torch.export.export(model, (), inputs_for(2, 3), dynamic_shapes=shapes, strict=True).module()
    for counts in ((1, 1), (1, 5), (4, 4), (5, 2)):
        inputs = inputs_for(*counts)
        torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)
    with pytest.raises(RuntimeError, match="image_index is out of range"):
        program(**inputs_for(2, 2) | {"image_index": torch.tensor([0, -1])})
