"""The adapters compute what twins of them compute, which are written from the paper's formulas."""

import pytest
import torch
from helpers.adapter_twins import dense_aligner_twin, text_adapter_twin, weights_of
from helpers.models import randomize

from adapters_detris import BatchFirstAttention, DenseAligner, TextAdapter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [2, 9])
def test_text_adapter_is_its_formula(training, length):
    adapter = randomize(TextAdapter(24, 32)).train(training)
    hidden_states, weights = torch.randn(3, length, 24), weights_of(adapter)
    torch.testing.assert_close(adapter(hidden_states), text_adapter_twin(hidden_states, weights, training))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("prefix_length", [1, 5])
def test_dense_aligner_is_its_formula(training, prefix_length):
    aligner = DenseAligner(
        hidden_size=24,
        dim=32,
        text_hidden_size=20,
        prefix_length=prefix_length,
        attention_dim=16,
        attention_heads=4,
        dropout=0.0,
    )
    aligner = randomize(aligner).train(training)
    hidden_states, words = torch.randn(3, prefix_length + 25, 24), torch.randn(3, 6, 20)
    twin = dense_aligner_twin(hidden_states, words, weights_of(aligner), prefix_length, 4, training)
    torch.testing.assert_close(aligner(hidden_states, words), twin, rtol=1e-4, atol=1e-5)


def test_aligner_drops_attention_weights_in_training_only():
    aligner = randomize(DenseAligner(24, 32, 20, prefix_length=1, attention_dim=16, attention_heads=4, dropout=0.5))
    hidden_states, words = torch.randn(2, 1 + 16, 24), torch.randn(2, 6, 20)
    aligner.eval()
    assert torch.equal(aligner(hidden_states, words), aligner(hidden_states, words))
    aligner.word_attention.train()
    assert not torch.equal(aligner(hidden_states, words), aligner(hidden_states, words))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 12}], ids=["one width", "three widths"])
def test_attention_is_that_of_pytorch_without_its_copies(widths, padded, need_weights):
    ours = randomize(BatchFirstAttention(16, 4, dropout=0.5, **widths))
    theirs = torch.nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True, **widths)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(3, 6, 16), torch.randn(3, 5, ours.kdim), torch.randn(3, 5, ours.vdim)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]) == 1 if padded else None
    for training in (False, True):
        results = []
        for attention in (ours.train(training), theirs.train(training)):
            torch.manual_seed(1)  # the same weights are dropped
            options = {} if attention is ours else {"average_attn_weights": False}
            result = attention(query, key, value, key_padding_mask=padding, need_weights=need_weights, **options)
            result = result if isinstance(result, tuple) else (result, None)
            result[0].square().sum().backward()
            results.append([*result, attention.in_proj_bias.grad, attention.out_proj.weight.grad])
            attention.zero_grad()
        for computed, expected in zip(*results, strict=True):
            assert (computed is None) == (expected is None)
            if computed is not None:
                torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-5)
