"""Make the small frozen backbones that ship with the project: `make backbones`, or

    python -m backbones.pretrain --output_dir backbones [--max_steps 1500]

A `Dinov2WithRegistersModel` and a `CLIPTextModelWithProjection` of about a million parameters each are trained on
scenes of `data/shapes.py` (from a seed of their own, held-out combinations left out) to see and to read, not to refer:

* every patch tells shape, colour, texture and size of what it shows, where that object's centre lies and how large
  it is, as DINOv2's patches tell parts and objects;
* phrases and objects of one scene find each other, as CLIP's captions and images do;
* the text tower, which is causal, predicts the next token, so that its words keep what the contrast does not need.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from data.shapes import COLORS, RADII, REFERENCE_SIZE, SHAPES, TEXTURES, Scene, draw_scene, render
from processing_detris import DetrisImageProcessor, DetrisProcessor

SEED = 20_250_108  # far from the seeds of the referring set, so that its images stay new
PATCH_SIZE = 8
WIDTH = 128
VISION_LAYERS, TEXT_LAYERS, HEADS = 6, 3, 4
REGISTERS = 4
VOCABULARY_SIZE = 1024
TEXT_POSITIONS = 77  # as CLIP's, for longer phrases about photographs
TEXT_LENGTH = 16
ATTRIBUTES = {"shape": SHAPES, "color": tuple(COLORS), "texture": TEXTURES, "size": tuple(RADII)}
IGNORED = -100  # label that cross-entropy passes over
TEMPERATURE = 0.07
# Words of everyday phrases, so that the tokenizer does not spell out what people say about photographs.
EVERYDAY_WORDS = """
a about above all and animal at back bag ball bear beside between bench big bike bird black blue boat book bottle
bottom bowl boy brown bus cake car cat chair child closest couch cow cub cup dark dog donut door elephant eating
facing far farthest female first food fork front fruit giraffe girl glass glasses gray green guy hair half hand hat
head holding horse in is it jacket kid kite lady laptop large laying leaning left leg light little looking lying male
man metal middle mother motorcycle near next not of on one orange out pants part partly person phone piece pink pizza
plane plant plate player playing pole purple red remote right row sandwich second sheep shirt short sign sitting
skateboard slice small smaller something standing striped surfboard table tall tallest tennis that the their third
tie to top touching toward train tree truck two umbrella van vase very walking wall wearing white window with woman
wooden yellow young zebra
""".split()


@dataclass
class PretrainingArguments(TrainingArguments):
    output_dir: str = "backbones"
    max_steps: int = 1500
    per_device_train_batch_size: int = 32
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 150
    max_grad_norm: float = 1.0
    logging_steps: int = 100
    save_strategy: str = "no"
    dataloader_num_workers: int = 1
    remove_unused_columns: bool = False
    report_to: str = "none"


class Scenes(IterableDataset):
    """Scenes without end, shared out among the loader's workers."""

    def __iter__(self) -> Iterator[Scene]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in count(first, step):
            yield draw_scene(SEED, "train", index)


def make_tokenizer() -> CLIPTokenizer:
    """Learn a byte-pair vocabulary in CLIP's layout from phrases of the synthetic set and everyday words."""
    scenes = islice(Scenes(), 3000)
    phrases = [phrase.text for scene in scenes for phrases in scene.phrases for phrase in phrases]
    untrained = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    learned = untrained.train_new_from_iterator([*phrases, *(100 * EVERYDAY_WORDS)], VOCABULARY_SIZE - 258)
    merges = [tuple(pair) for pair in json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    # As in CLIP the end token comes last: the model finds it by its largest id, and id 0 is left for filling up.
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=merges)


class Collator:
    """Scenes to a batch: `B` images of `g²` patches, `M` objects and `N` phrases, each of one object."""

    def __init__(self, processor: DetrisProcessor):
        self.processor = processor

    def __call__(self, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        grid = REFERENCE_SIZE // PATCH_SIZE
        centers = (np.arange(grid) + 0.5) * PATCH_SIZE
        images, patch_objects, shares, attributes, places, object_image, phrases, phrase_object = (
            [] for _ in range(8)
        )
        for image, scene in enumerate(scenes):
            pixels, labels = render(scene)
            images.append(pixels)
            cells = labels.reshape(grid, PATCH_SIZE, grid, PATCH_SIZE).swapaxes(1, 2).reshape(grid**2, -1)
            share = np.stack([(cells == index).mean(1) for index in range(len(scene.objects) + 1)])  # (1 + M', g²)
            shown = share.argmax(0)
            # Objects are counted through the batch; 0 stays background.
            patch_objects.append(np.where(shown > 0, shown + len(attributes), 0))
            for index, thing in enumerate(scene.objects):
                phrases += [phrase.text for phrase in scene.phrases[index]]
                phrase_object += [len(attributes)] * len(scene.phrases[index])
                attributes.append([values.index(getattr(thing, name)) + 1 for name, values in ATTRIBUTES.items()])
                places.append([thing.x, thing.y, thing.radius])
                shares.append(share[index + 1])
                object_image.append(image)
        attributes = np.array([[0] * len(ATTRIBUTES), *attributes])  # background first
        places = np.array([[0.0, 0.0, 0.0], *places], dtype=np.float32)
        patch_objects = np.stack(patch_objects)  # (B, g²)
        own = np.stack(np.meshgrid(centers, centers), -1).reshape(-1, 2)  # (g², 2) x, y
        geometry = places[patch_objects]  # (B, g², 3)
        geometry[..., :2] -= own
        batch = self.processor(text=phrases, return_tensors="pt")
        return {
            "pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"],
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "phrase_object": torch.tensor(phrase_object),
            "object_image": torch.tensor(object_image),
            "object_share": torch.from_numpy(np.stack(shares)).float(),  # (M, g²)
            "patch_attributes": torch.from_numpy(attributes[patch_objects]),  # (B, g², 4)
            "patch_geometry": torch.from_numpy(geometry / REFERENCE_SIZE).float(),  # (B, g², 3)
        }


class Pretraining(nn.Module):
    """Both backbones under the heads that teach them; `forward` returns the loss for `Trainer`."""

    def __init__(self, vision: Dinov2WithRegistersModel, text: CLIPTextModelWithProjection):
        super().__init__()
        self.vision, self.text = vision, text
        self.attribute_heads = nn.ModuleList(nn.Linear(WIDTH, len(values) + 1) for values in ATTRIBUTES.values())
        self.geometry_head = nn.Linear(WIDTH, 3)
        self.object_projection = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        phrase_object: torch.Tensor,
        object_image: torch.Tensor,
        object_share: torch.Tensor,
        patch_attributes: torch.Tensor,
        patch_geometry: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        patches = self.vision(pixel_values).last_hidden_state[:, 1 + REGISTERS :]  # (B, g², D)
        losses = [
            F.cross_entropy(head(patches).flatten(0, 1), patch_attributes[..., index].flatten())
            for index, head in enumerate(self.attribute_heads)
        ]
        on_object = patch_attributes[..., 0] > 0  # (B, g²)
        losses.append(F.smooth_l1_loss(self.geometry_head(patches)[on_object], patch_geometry[on_object], beta=0.1))

        text = self.text(input_ids)
        weights = object_share / object_share.sum(1, keepdim=True).clamp_min(1e-6)
        objects = torch.einsum("mp,mpd->md", weights, patches[object_image])  # (M, D)
        objects = F.normalize(self.object_projection(objects), dim=1)
        similarity = F.normalize(text.text_embeds, dim=1) @ objects.T / TEMPERATURE  # (N, M)
        # A phrase is unambiguous in its own scene only.
        same_scene = object_image[phrase_object][:, None] == object_image[None]
        losses.append(F.cross_entropy(similarity.masked_fill(~same_scene, -torch.inf), phrase_object))

        embedding = self.text.text_model.embeddings.token_embedding.weight
        next_tokens = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, IGNORED)
        logits = text.last_hidden_state[:, :-1] @ embedding.T  # (N, L - 1, V)
        losses.append(0.5 * F.cross_entropy(logits.flatten(0, 1), next_tokens.flatten(), ignore_index=IGNORED))
        return {"loss": torch.stack(losses).sum()} | {f"part_{index}": loss for index, loss in enumerate(losses)}


def main() -> None:
    (arguments,) = HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    vision = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            image_size=REFERENCE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=WIDTH,
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=HEADS,
            num_register_tokens=REGISTERS,
        )
    )
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=TEXT_POSITIONS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    processor = DetrisProcessor(
        image_processor=DetrisImageProcessor(size={"height": REFERENCE_SIZE, "width": REFERENCE_SIZE}),
        tokenizer=tokenizer,
        max_text_length=TEXT_LENGTH,
    )
    Trainer(
        model=Pretraining(vision, text),
        args=arguments,
        train_dataset=Scenes(),
        data_collator=Collator(processor),
    ).train()
    folder = Path(arguments.output_dir)
    vision.half().save_pretrained(folder / "vision")
    text.half().save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")


if __name__ == "__main__":
    main()
