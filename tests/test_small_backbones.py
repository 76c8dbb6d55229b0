"""The shipped backbones: small, of Hugging Face's classes, and able to see and read what the synthetic set shows."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, Dinov2WithRegistersModel

from backbones import pretrain
from backbones.pretrain import IMAGE_SIZE, REGISTERS, TEXT_LENGTH, Collator, Pretraining
from data.shapes import COLORS, HELD_OUT, SHAPES, draw_scene
from processing_detris import DetrisImageProcessor, DetrisProcessor

FOLDER = Path(__file__).parents[1] / "backbones"
TEST_SEED = 7  # neither the referring set's nor the recipe's


@pytest.fixture(scope="module")
def processor():
    return DetrisProcessor(
        image_processor=DetrisImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=CLIPTokenizer.from_pretrained(FOLDER / "text"),
        max_text_length=TEXT_LENGTH,
    )


def test_weights_are_safetensors_of_five_megabytes_at_most():
    weights = [path for path in FOLDER.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    assert {path.suffix for path in weights} == {".safetensors"}
    assert sum(path.stat().st_size for path in weights) <= 5_000_000


def test_tokenizer_keeps_clip_order_and_knows_the_set(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == tokenizer.bos_token_id + 1  # the end has the largest id
    assert tokenizer.convert_ids_to_tokens(0) == "!"  # filling up with 0 hides no word of a phrase
    phrases = [p.text for index in range(200) for group in draw_scene(TEST_SEED, "val", index).phrases for p in group]
    assert max(len(ids) for ids in tokenizer(phrases)["input_ids"]) <= TEXT_LENGTH
    assert tokenizer.tokenize("striped bear") == ["striped</w>", "bear</w>"]


def test_recipe_never_shows_the_held_out_pairs():
    shown = {(thing.color, thing.shape) for i in range(300) for thing in draw_scene(TEST_SEED, "train", i).objects}
    assert shown == set(product(COLORS, SHAPES)) - HELD_OUT


@torch.no_grad()
def test_phrases_find_a_patch_of_their_object(processor):
    vision = Dinov2WithRegistersModel.from_pretrained(FOLDER / "vision", dtype=torch.float32)
    text = CLIPTextModelWithProjection.from_pretrained(FOLDER / "text", dtype=torch.float32)
    batch = Collator(processor)([draw_scene(TEST_SEED, "testA", index, IMAGE_SIZE) for index in range(48)])
    patches = vision(batch["pixel_values"]).last_hidden_state[:, 1 + REGISTERS :]  # (B, g², D)
    sentences = F.normalize(text(batch["input_ids"]).text_embeds, dim=1)  # (N, D)
    similarity = torch.einsum("nd,npd->np", sentences, F.normalize(patches, dim=2)[batch["phrase_image"]])
    found = batch["phrase_share"].gather(1, similarity.argmax(1, keepdim=True)) > 0
    chance = (batch["phrase_share"] > 0).float().mean()
    assert chance < 0.25
    assert found.float().mean() > 0.6


def test_unaligned_backbones_learn_nothing_of_each_other(processor):
    batch = Collator(processor)([draw_scene(TEST_SEED, "train", index, IMAGE_SIZE) for index in range(2)])
    other_phrases = batch | {name: batch[name].roll(1, 0) for name in ("input_ids", "attention_mask")}

    def gradient_of_vision(unaligned: bool, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(0)
        towers = [Dinov2WithRegistersModel.from_pretrained(FOLDER / "vision", dtype=torch.float32) for _ in range(2)]
        text = CLIPTextModelWithProjection.from_pretrained(FOLDER / "text", dtype=torch.float32)
        Pretraining(towers[0], text, towers[1] if unaligned else None)(**batch)["loss"].backward()
        assert text.text_projection.weight.grad.abs().max() > 0
        return torch.cat([weight.grad.flatten() for weight in towers[0].parameters() if weight.grad is not None])

    assert torch.equal(gradient_of_vision(True, batch), gradient_of_vision(True, other_phrases))
    assert not torch.equal(gradient_of_vision(False, batch), gradient_of_vision(False, other_phrases))


def test_unaligned_backbones_do_not_take_the_place_of_the_shipped_ones(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setattr("sys.argv", ["pretrain", "--unaligned"])
    with pytest.raises(SystemExit, match="backbones holds the shipped backbones: name another --output_dir"):
        pretrain.main()


@pytest.mark.parametrize("unaligned", [True, False])
def test_the_option_gives_the_phrases_a_tower_of_their_own(unaligned, tmp_path, monkeypatch):
    made = []

    def stop(model, **_):
        made.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "Trainer", stop)
    monkeypatch.setattr("sys.argv", ["pretrain", "--output_dir", str(tmp_path), "--unaligned", str(unaligned)])
    with pytest.raises(KeyboardInterrupt):
        pretrain.main()
    assert (made[0].matched is not None) == unaligned and made[0].matched is not made[0].vision
