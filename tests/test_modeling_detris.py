"""The model: the official figures, what each part computes, images and phrases, training, labels, an example."""

import doctest
import math

import pytest
import torch
from helpers.models import (
    OFFICIAL_STAGES,
    OFFICIAL_STEP_SEEDS,
    assert_starts_as_the_paper_says,
    is_backbone,
    official_config,
    official_figures,
    official_inputs,
    official_weights,
    small_config,
    small_inputs,
    small_model,
    trainable,
)
from PIL import Image
from torch import nn
from torch.nn import functional as F

import modeling_detris
from adapters_detris import DenseAligner, TextAdapter
from configuration_detris import DetrisConfig
from convert_detris_checkpoint import convert_state_dict, name_table
from modeling_detris import DetrisForReferringSegmentation, resample_position_table
from processing_detris import DetrisProcessor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gap(ours, expected):
    """The largest difference, as a multiple of the standard deviation of what is expected."""
    assert ours.shape == expected.shape
    return ((ours - expected).abs().max() / expected.std()).item()


# --- The official implementation's figures ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    """Official figures and tensors, and the official weights in this project's layout."""
    figures, tensors = official_figures()
    return figures, tensors, convert_state_dict(official_weights(figures["shapes"]), official_config())


def official_model(official):
    model = DetrisForReferringSegmentation(official_config())
    model.load_state_dict(official[2], strict=True)
    return model


@torch.no_grad()
def test_every_stage_is_the_official_one(official):
    _, tensors, _ = official
    model, stages = official_model(official).eval(), {}
    for name in ("neck", "decoder"):
        getattr(model, name).register_forward_hook(lambda _, inputs, output, name=name: stages.update({name: output}))
    pixel_values, input_ids, _ = official_inputs()
    stages["words"], stages["sentence"] = model.encode_text(input_ids)
    for index, feature_map in enumerate(model.encode_images(pixel_values, stages["words"])):
        stages[f"visual_{index}"] = feature_map
    logits = model(pixel_values, input_ids).logits
    gaps = {name: gap(stages[name][grid], tensors[name]) for name, grid in OFFICIAL_STAGES.items()}
    gaps["logits"] = gap(logits, tensors["logits"])
    assert max(gaps.values()) < 2e-4, gaps


def test_a_training_step_has_the_official_loss_and_gradients(official):
    figures, tensors, _ = official
    model = official_model(official).train()
    pixel_values, input_ids, labels = official_inputs()
    output = model(pixel_values, input_ids, labels=labels)
    assert output.loss.item() == pytest.approx(figures["training_loss"], rel=1e-5)
    assert gap(output.logits, tensors["training_logits"]) < 2e-4
    output.loss.backward()
    ours = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    our_names = {official_name: names for official_name, names, _ in name_table(model.config)}
    expected = {name: norm for theirs, norm in figures["gradient_norms"].items() for name in our_names[theirs]}
    assert len(expected) == len(figures["gradient_norms"])  # each official tensor has exactly one of ours
    # The whole gradient has norm 96. A bias before a batch norm has no effect: its gradient is only rounding.
    assert ours == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_eight_steps_of_adam_are_the_official_ones(official):
    figures, tensors, _ = official
    model = official_model(official).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    losses = []
    for seed in OFFICIAL_STEP_SEEDS:
        pixel_values, input_ids, labels = official_inputs(seed)
        loss = model(pixel_values, input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert gap(torch.stack(losses), torch.tensor(figures["losses_of_8_steps"])) < 5e-3
    pixel_values, input_ids, _ = official_inputs()
    with torch.no_grad():
        logits = model.eval()(pixel_values, input_ids).logits
    assert gap(logits, tensors["logits_after_8_steps"]) < 2e-2


@pytest.mark.parametrize(
    ("vision", "fields", "share", "millions"),
    [
        ((768, 12, 12), {}, "1.81", "2.72"),
        ((1024, 24, 16), {"vision_adapter_layers": [2, 6, 10, 14, 18, 22], "feature_layers": [8, 16]}, "0.85", "3.11"),
        (
            (1024, 24, 16),
            {
                "vision_adapter_layers": list(range(1, 24)),
                "vision_adapter_dim": 384,
                "text_adapter_layers": list(range(1, 12)),
                "text_adapter_dim": 384,
                "feature_layers": [8, 16],
            },
            "9.1",
            "33.3",
        ),
    ],
    ids=["base", "large", "large_mixed"],
)
def test_trained_share_is_the_papers(capsys, vision, fields, share, millions):
    vision_config = dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads"), vision))
    vision_config |= {"model_type": "dinov2_with_registers", "image_size": 518, "patch_size": 14}
    with torch.device("meta"):
        model = DetrisForReferringSegmentation(DetrisConfig(vision_config=vision_config, **fields))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    adapters = sum(size for name, size in trained.items() if name.startswith(("vision_model", "text_model")))
    digits = len(share.split(".")[1])
    assert f"{100 * adapters / frozen:.{digits}f}" == share
    assert f"{adapters / 1e6:.{len(millions.split('.')[1])}f}" == millions
    assert model.count_parameters() == {
        "adapters": adapters,
        "head": sum(trained.values()) - adapters,
        "backbones": frozen,
    }
    model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    total = frozen + sum(trained.values())
    assert first.startswith(f"trainable params: {sum(trained.values()):,} || all params: {total:,} || trainable%: ")
    assert f"adapters: {adapters:,} ||" in second and f"adapters%: {100 * adapters / frozen:.2f} of" in second


# --- Parts against twins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 7])
def test_mask_head_is_a_1x1_convolution_and_then_each_phrases_own_3x3(size):
    head = small_model().mask_head
    feature_map, sentence = torch.randn(3, 32, size, size), torch.randn(3, 20)
    enlarged = head.convolutions(feature_map)
    assert enlarged.shape == (3, 16, 4 * size, 4 * size)
    projected = F.conv2d(enlarged, head.output_projection.weight, head.output_projection.bias)
    parameters = F.linear(sentence, head.kernel_projection.weight, head.kernel_projection.bias)
    kernels, biases = parameters[:, :-1].reshape(3, 16, 3, 3), parameters[:, -1]
    # Each phrase is a group. Zeros are padded after the 1x1 convolution, so outside the map its bias is not added.
    expected = F.conv2d(projected.flatten(0, 1)[None], kernels, biases, padding=1, groups=3)[0]
    torch.testing.assert_close(head(feature_map, sentence), expected, rtol=1e-4, atol=1e-4)


def test_sentence_gate_is_an_attention_to_one_key():
    gate, attention = small_model().neck.gates[0], nn.MultiheadAttention(32, 8, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight[64:].copy_(gate.value.weight)
        attention.in_proj_bias.normal_()[64:].copy_(gate.value.bias)
        attention.out_proj.load_state_dict(gate.output.state_dict())
    sentence, patches = torch.randn(3, 32), torch.randn(3, 16, 32)
    attended, _ = attention(patches, sentence[:, None], sentence[:, None])
    torch.testing.assert_close(gate(sentence).flatten(2).transpose(1, 2).expand(-1, 16, -1), attended)


def cubic_weights(old_size, new_size):
    """Bicubic interpolation along one axis, as a matrix: Keys' kernel with a = -0.75, and repeated borders."""
    matrix = torch.zeros(new_size, old_size, dtype=torch.float64)
    for new in range(new_size):
        position = (new + 0.5) * old_size / (new_size + 0.1) - 0.5
        for old in range(math.floor(position) - 1, math.floor(position) + 3):
            t = abs(position - old)
            near = 1.25 * t**3 - 2.25 * t**2 + 1
            far = -0.75 * t**3 + 3.75 * t**2 - 6 * t + 3
            matrix[new, min(max(old, 0), old_size - 1)] += near if t <= 1 else far
    return matrix


def resampled_twin(table, grid_size):
    old_size = math.isqrt(table.shape[1] - 1)
    weights = cubic_weights(old_size, grid_size)
    grid = table[0, 1:].double().reshape(old_size, old_size, -1)
    grid = torch.einsum("yi,xj,ijd->yxd", weights, weights, grid)
    return torch.cat([table[:, :1], grid.reshape(1, grid_size**2, -1).to(table.dtype)], dim=1)


@pytest.mark.parametrize(("old_size", "new_size"), [(37, 8), (37, 32), (5, 9)])
def test_position_table_is_resampled_bicubically_without_antialias(old_size, new_size):
    table = torch.randn(1, 1 + old_size**2, 6)
    torch.testing.assert_close(resample_position_table(table, new_size), resampled_twin(table, new_size))
    assert torch.equal(resample_position_table(table, old_size), table)


def test_sine_positions_are_their_formula():
    length, dim = 5, 12
    expected = torch.zeros(length, dim)
    for position in range(length):
        for channel in range(dim):
            angle = position / 10000 ** (2 * (channel // 2) / dim)
            expected[position, channel] = math.cos(angle) if channel % 2 else math.sin(angle)
    ours = modeling_detris._sine_positions(length, dim, torch.device("cpu"))
    torch.testing.assert_close(ours, expected)
    on_grid = modeling_detris._sine_positions_2d(length, 2 * dim, torch.device("cpu"))
    for row in range(length):
        for column in range(length):
            torch.testing.assert_close(on_grid[row * length + column], torch.cat([expected[column], expected[row]]))


def test_loss_is_the_cross_entropy_with_the_nearest_label():
    model, inputs = small_model(), small_inputs(2)
    labels = torch.rand(2, 56, 56)  # soft edges; 56 is not a multiple of 16, the size of the logits
    output = model(**inputs, labels=labels)
    expected = 0.0
    for phrase in range(2):
        for row in range(16):
            for column in range(16):
                target = labels[phrase, row * 56 // 16, column * 56 // 16].item()
                logit = output.logits[phrase, row, column].double()
                expected -= target * F.logsigmoid(logit) + (1 - target) * F.logsigmoid(-logit)
    assert output.loss.item() == pytest.approx(expected.item() / (2 * 16 * 16), rel=1e-5)
    as_tuple = model(**inputs, labels=labels, return_dict=False)
    assert [torch.equal(*pair) for pair in zip(as_tuple, (output.loss, output.logits), strict=True)] == [True, True]


def test_words_are_read_where_the_ids_are_not_0():
    model, inputs = small_model(), small_inputs(3)
    logits = model(**inputs).logits
    mask = (inputs["input_ids"] != 0).long()
    assert torch.equal(model(**inputs, attention_mask=mask).logits, logits)
    assert gap(model(**inputs, attention_mask=torch.ones_like(mask)).logits, logits) > 0.01


def test_sizes_of_images_are_taken_and_left():
    model, inputs = small_model(), small_inputs(2)
    logits = model(**inputs).logits
    assert torch.equal(model(**inputs, original_sizes=torch.tensor([[30, 44], [9, 9]])).logits, logits)
    assert torch.equal(model(**inputs, original_sizes="anything").logits, logits)


# --- Shapes, images and phrases --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "fields"),
    [
        (True, {}),
        (False, {"image_size": 84}),
        (True, {"image_size": 112, "feature_layers": [0, 1, 3]}),
        (False, {"feature_layers": []}),
        (True, {"vision_adapter_layers": [], "text_adapter_layers": []}),
        (True, {"decoder_dim": 48, "decoder_layers": 2}),
        (True, {"vision": {"use_swiglu_ffn": True}}),
    ],
)
def test_logits_are_four_times_the_patch_grid(registers, fields):
    config = small_config(registers, **fields)
    logits = small_model(config)(**small_inputs(2, size=config.image_size)).logits
    assert logits.shape == (2, 4 * config.image_size // 14, 4 * config.image_size // 14)
    assert logits.isfinite().all() and gap(logits[:1], logits[1:]) > 0.01


def test_other_samples_of_the_batch_do_not_change_a_sample():
    model, inputs = small_model(), small_inputs(4)
    together = model(**inputs).logits
    for index in range(4):
        alone = model(**{name: values[index : index + 1] for name, values in inputs.items()}).logits
        assert gap(together[index : index + 1], alone) < 1e-5


@pytest.mark.parametrize(
    ("adapter_layers", "feature_layers", "layers_per_image"),
    [([1, 3], [1, 2], 1), ([3], [0, 1], 3), ([2], [0, 3], 2), ([0], [1], 0), ([], [1, 2], 4)],
)
def test_phrases_that_share_an_image_get_what_they_get_alone(adapter_layers, feature_layers, layers_per_image):
    model = small_model(small_config(vision_adapter_layers=adapter_layers, feature_layers=feature_layers))
    inputs, image_index = small_inputs(phrases=5, images=3), torch.tensor([2, 0, 2, 2, 0])
    repeated = model(inputs["pixel_values"][image_index], inputs["input_ids"]).logits
    rows = []
    for layer in model.vision_model.encoder.layer:
        layer.register_forward_hook(lambda layer, arguments, output: rows.append(len(output)))
    shared = model(**inputs, image_index=image_index).logits
    assert gap(shared, repeated) < 1e-5
    assert rows == [3] * layers_per_image + [5] * (4 - layers_per_image)


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("new_size", [28, 84])
def test_any_image_size_is_resampled_from_the_pretrained_table(tmp_path, registers, new_size):
    model, inputs = small_model(small_config(registers)), small_inputs(2, size=new_size)
    weights = model.state_dict()
    table = "vision_model.embeddings.position_embeddings"
    weights[table] = resampled_twin(weights[table], new_size // 14)
    built = small_model(small_config(registers, vision={"image_size": new_size}, image_size=new_size))
    built.load_state_dict(weights, strict=True)
    expected = built(**inputs).logits

    model.save_pretrained(tmp_path / "saved")
    loaded = DetrisForReferringSegmentation.from_pretrained(tmp_path / "saved", image_size=new_size)
    assert loaded.config.image_size == new_size and not loaded.get_parameter(table).requires_grad
    assert gap(loaded(**inputs).logits, expected) < 1e-4
    loaded.save_pretrained(tmp_path / "again")  # nothing of the table is lost
    again = DetrisForReferringSegmentation.from_pretrained(tmp_path / "again", image_size=56)
    assert torch.equal(again(**small_inputs(2)).logits, model(**small_inputs(2)).logits)
    with pytest.raises(ValueError, match="image_size is 57: it must be a positive multiple of 14"):
        DetrisForReferringSegmentation.from_pretrained(tmp_path / "saved", image_size=57)


# --- Attention and training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("implementation", "backbone_calls"), [("sdpa", 7), ("eager", 0)])
def test_backbones_take_the_attention_they_are_told(tmp_path, monkeypatch, implementation, backbone_calls):
    small_model().save_pretrained(tmp_path)
    model = DetrisForReferringSegmentation.from_pretrained(tmp_path, attn_implementation=implementation)
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    model(**small_inputs(2))
    # Our own attentions always use SDPA: one in each of two aligners, and two in the decoder layer.
    assert len(calls) == backbone_calls + 4


def training_step(prepare, dtype=torch.float32):
    """Gradients and batch-norm statistics of one training step of a `small_model` that `prepare` changes."""
    model, inputs = small_model().train(), small_inputs(3)
    prepare(model)
    labels = (torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    model(**inputs, labels=labels).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return gradients, {name: buffer.clone() for name, buffer in model.named_buffers() if ".norm." in name}


@pytest.fixture(scope="module")
def plain_step():
    return training_step(lambda model: None)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
        lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    ],
    ids=["eager", "checkpointing", "not reentrant", "reentrant"],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradients_and_statistics_do_not_depend_on_how_they_are_computed(plain_step, prepare):
    gradients, statistics = training_step(prepare)
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    scale = torch.stack([gradient.norm() for gradient in plain_step[0].values()]).norm()
    for name, gradient in plain_step[0].items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * scale, name
    for name, buffer in plain_step[1].items():
        torch.testing.assert_close(statistics[name], buffer, rtol=1e-5, atol=1e-6, msg=name)
        assert name.endswith(("mean", "var")) or buffer == 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_adapters_are_inside_the_checkpointed_layers():
    model, runs = small_model().train(), []
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, (DenseAligner, TextAdapter)):
            module.down.register_forward_hook(lambda *_: runs.append(torch._C._current_graph_task_id() != -1))
    loss = model(**small_inputs(3)).logits.mean()
    assert runs == [False] * 4
    loss.backward()
    assert runs[4:] == [True] * 4


def test_no_graph_is_kept_before_the_first_adapter():
    model = small_model(small_config(vision_adapter_layers=[2], text_adapter_layers=[1])).train()
    graphs = {"vision": [], "text": []}
    modules = {
        "vision": [model.vision_model.embeddings.dropout, *model.vision_model.encoder.layer],
        "text": [model.text_model.embeddings, *model.text_model.encoder.layers],
    }
    for tower, parts in modules.items():
        for part in parts:
            part.register_forward_hook(lambda *call, tower=tower: graphs[tower].append(call[-1].requires_grad))
    model(**small_inputs(2))
    assert graphs == {"vision": [False, False, False, True, True], "text": [False, False, True, True]}


@pytest.mark.parametrize("source", ["built", "loaded"])
def test_frozen_backbones_get_no_gradient_and_all_else_does(tmp_path, source):
    model = small_model()
    if source == "loaded":
        model.save_pretrained(tmp_path)
        model = DetrisForReferringSegmentation.from_pretrained(tmp_path)
    model.train()
    model(**small_inputs(3), labels=torch.ones(3, 56, 56)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != is_backbone(name), name
        assert (parameter.grad is None) == is_backbone(name), name


@pytest.mark.parametrize("source", ["built", "loaded"])
def test_backbones_are_trained_too_when_not_frozen(tmp_path, source):
    model = small_model(small_config(freeze_backbones=False))
    if source == "loaded":
        model.save_pretrained(tmp_path)
        model = DetrisForReferringSegmentation.from_pretrained(tmp_path)
    model.train()
    model(**small_inputs(3), labels=torch.ones(3, 56, 56)).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"vision_model.embeddings.mask_token"}  # which DINOv2 uses only in its pretraining
    assert trainable(model) == dict(model.named_parameters()).keys() - without


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    model, inputs = small_model(), small_inputs(3)
    logits = model(**inputs).logits
    with torch.autocast("cpu", dtype=dtype):
        mixed = model(**inputs).logits
        loss = model.train()(**inputs, labels=torch.ones(3, 56, 56)).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    half = small_model().to(dtype)(**inputs).logits
    for ours in (mixed, half):
        assert ours.dtype == torch.float32 and gap(ours, logits) < 0.2


# --- Fresh models ----------------------------------------------------------------------------------------------------


def test_a_new_model_starts_as_the_paper_says():
    assert_starts_as_the_paper_says(DetrisForReferringSegmentation(small_config()))


# --- Labels and embeddings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64, torch.bfloat16])
def test_labels_of_any_type_give_the_same_loss(dtype):
    model, labels = small_model(), torch.zeros(2, 56, 56)
    labels[:, 10:40, 20:50] = 1
    expected = model(**small_inputs(2), labels=labels).loss
    assert torch.equal(model(**small_inputs(2), labels=labels.to(dtype)).loss, expected)


def test_input_embeddings_are_those_of_the_phrases():
    model = small_model()
    assert model.get_input_embeddings().weight is model.text_model.embeddings.token_embedding.weight
    model.set_input_embeddings(torch.nn.Embedding(64, 24))
    assert model.get_input_embeddings() is model.text_model.embeddings.token_embedding
    model = small_model()
    model.enable_input_require_grads()  # PEFT calls this if layers are checkpointed
    assert model(**small_inputs()).logits.requires_grad


# --- Documentation ---------------------------------------------------------------------------------------------------


def test_the_example_of_forward_runs(tmp_path, monkeypatch, tiny_tokenizer):
    """On random pixels, with an untrained model in the place of the model that it names."""
    text_config = small_config().text_config.to_dict() | {
        "vocab_size": len(tiny_tokenizer),
        "bos_token_id": tiny_tokenizer.bos_token_id,
        "eos_token_id": tiny_tokenizer.eos_token_id,
    }
    model = small_model(small_config(text_config=text_config, image_size=448, max_text_length=12))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("runs/refcoco")
    DetrisProcessor.from_config(model.config, tiny_tokenizer).save_pretrained("runs/refcoco")
    pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save("photo.jpg")

    source = DetrisForReferringSegmentation.forward.__doc__.replace("```", "")
    example = doctest.DocTestParser().get_doctest(source, {}, "forward", None, None)
    report = []
    assert len(example.examples) > 10
    assert doctest.DocTestRunner().run(example, out=report.append).failed == 0, "".join(report)
