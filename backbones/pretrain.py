"""Make the small frozen backbones that ship with the project: `make backbones`, or

    python -m backbones.pretrain --output_dir backbones [--max_steps 6000] [--unaligned]

A `Dinov2WithRegistersModel` and a `CLIPTextModelWithProjection` of about a million parameters each learn to see and to
read, but not to refer, on scenes of `data/shapes` that have a seed of their own and leave the held-out pairs out:

* Every patch tells the shape, colour, texture and size of the object that it shows, where the object's centre lies,
  how large the object is, and which parts of the patch and of its surroundings the object covers. DINOv2's patches
  tell parts and objects apart in a similar way. The patches of a middle layer learn this too, because DETRIS also
  reads those.
* A phrase finds the patches of its object among all patches of the scene, as a caption finds its image in CLIP's
  training. Besides, the phrase is compared with each patch by itself, as in SigLIP's training (arXiv 2303.15343).
* The text tower, which is causal, predicts the next token, so that its words also keep what this comparison does not
  need.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
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

from data.shapes import COLORS, RADII, SHAPES, TEXTURES, Scene, draw_scene, render
from processing_detris import DetrisImageProcessor, DetrisProcessor

SEED = 20_250_108  # far from the seeds of the referring set, so that the backbones have not seen its images
IMAGE_SIZE, PATCH_SIZE = 80, 8
WIDTH = 128
VISION_LAYERS, TEXT_LAYERS, HEADS = 6, 3, 4
REGISTERS = 4
VOCABULARY_SIZE = 1024
TEXT_POSITIONS = 77  # as many as CLIP has, for longer phrases about photographs
TEXT_LENGTH = 16
ATTRIBUTES = {"shape": SHAPES, "color": tuple(COLORS), "texture": TEXTURES, "size": tuple(RADII)}
IGNORED = -100  # a label that cross-entropy leaves out
TEMPERATURE = 0.07
NEXT_TOKEN_WEIGHT = 0.3
SURROUNDINGS_WEIGHT = 4.0
MATCH_WEIGHT = 4.0
MATCH_LOG_SCALE, MATCH_BIAS = 2.3, -4.0  # turn a cosine into a logit when training begins
CELLS = 2  # along a patch's side; a patch tells its surroundings cell by cell
REACH = 2  # patches in each direction that belong to the surroundings
WINDOW = CELLS * (2 * REACH + 1)  # cells along the side of the surroundings
MIDDLE_LAYER = 4  # learns to see like the last layer
SENTENCE_SPREAD = (
    0.1  # standard deviation of a sentence's numbers: DETRIS's kernels, made of them, then start near zero
)
# Words of everyday phrases. The tokenizer would otherwise spell out what people say about photographs.
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
    """`TrainingArguments` with the recipe of the shipped backbones as defaults."""

    output_dir: str = "backbones"
    max_steps: int = 6000
    per_device_train_batch_size: int = 16
    learning_rate: float = 1.2e-3
    adam_beta2: float = 0.98
    weight_decay: float = 0.02
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 300
    max_grad_norm: float = 1.0
    unaligned: bool = field(
        default=False,
        metadata={
            "help": "Match phrases with the patches of a second vision tower that is not saved, so that the two "
            "backbones learn nothing of each other."
        },
    )
    logging_steps: int = 100
    save_strategy: str = "no"
    dataloader_num_workers: int = 1
    remove_unused_columns: bool = False
    report_to: str = "none"


class Scenes(IterableDataset):
    """Endless scenes, divided among the loader's workers."""

    def __iter__(self) -> Iterator[Scene]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in count(first, step):
            yield draw_scene(SEED, "train", index, IMAGE_SIZE)


def phrases_of(scenes: Iterable[Scene]) -> list[str]:
    """List all phrases about all objects of some scenes."""
    return [phrase.text for scene in scenes for phrases in scene.phrases for phrase in phrases]


def make_tokenizer() -> CLIPTokenizer:
    """Learn a byte-pair vocabulary in CLIP's layout from phrases of the synthetic set and from everyday words."""
    phrases = phrases_of(islice(Scenes(), 3000))
    untrained = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    learned = untrained.train_new_from_iterator([*phrases, *(100 * EVERYDAY_WORDS)], VOCABULARY_SIZE - 258)
    merges = [tuple(pair) for pair in json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    # As in CLIP the end token comes last, because the model finds it by its largest id. Id 0 is free to fill up with.
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=merges)


class Collator:
    """Makes a batch of scenes: `B` images of `g²` patches, and all `N` phrases about their objects."""

    def __init__(self, processor: DetrisProcessor):
        self.processor = processor

    def __call__(self, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        grid, cell = IMAGE_SIZE // PATCH_SIZE, PATCH_SIZE // CELLS
        centers = (np.arange(grid) + 0.5) * PATCH_SIZE
        images, patch_objects, surroundings, attributes, places, phrases, phrase_image, phrase_share = (
            [] for _ in range(8)
        )
        for image, scene in enumerate(scenes):
            pixels, labels = render(scene)
            images.append(pixels)
            masks = (labels == np.arange(len(scene.objects) + 1)[:, None, None]).astype(np.float32)  # (1 + M', S, S)
            share = masks.reshape(-1, grid, PATCH_SIZE, grid, PATCH_SIZE).mean((2, 4)).reshape(len(masks), -1)
            shown = share.argmax(0)  # (g²,)
            cells = masks.reshape(-1, grid * CELLS, cell, grid * CELLS, cell).mean((2, 4))
            cells = np.pad(cells, ((0, 0), *[(REACH * CELLS, REACH * CELLS)] * 2))
            windows = sliding_window_view(cells, (WINDOW, WINDOW), axis=(1, 2))[:, ::CELLS, ::CELLS]
            surroundings.append(windows.reshape(len(masks), grid**2, -1)[shown, np.arange(grid**2)])
            # Objects are numbered through the whole batch. 0 is the background.
            patch_objects.append(np.where(shown > 0, shown + len(attributes), 0))
            for index, thing in enumerate(scene.objects):
                for phrase in scene.phrases[index]:
                    phrases.append(phrase.text)
                    phrase_image.append(image)
                    phrase_share.append(share[index + 1])
                attributes.append([values.index(getattr(thing, name)) + 1 for name, values in ATTRIBUTES.items()])
                places.append([thing.x, thing.y, thing.radius])
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
            "phrase_image": torch.tensor(phrase_image),
            "phrase_share": torch.from_numpy(np.stack(phrase_share)),  # (N, g²)
            "patch_attributes": torch.from_numpy(attributes[patch_objects]),  # (B, g², 4)
            "patch_surroundings": torch.from_numpy(np.stack(surroundings)),  # (B, g², window)
            "patch_geometry": torch.from_numpy(geometry / IMAGE_SIZE).float(),  # (B, g², 3)
        }


class Pretraining(nn.Module):
    """Both backbones and the heads that teach them. `forward` returns the loss, as `Trainer` asks for.

    Args:
        matched: the tower whose patches phrases are compared with, if that is not `vision`.
    """

    def __init__(
        self,
        vision: Dinov2WithRegistersModel,
        text: CLIPTextModelWithProjection,
        matched: Dinov2WithRegistersModel | None = None,
    ):
        super().__init__()
        self.vision, self.text, self.matched = vision, text, matched
        self.attribute_heads = nn.ModuleList(nn.Linear(WIDTH, len(values) + 1) for values in ATTRIBUTES.values())
        self.surroundings_head = nn.Linear(WIDTH, WINDOW**2)
        self.geometry_head = nn.Linear(WIDTH, 3)
        self.match_scale = nn.Parameter(torch.tensor(MATCH_LOG_SCALE))
        self.match_bias = nn.Parameter(torch.tensor(MATCH_BIAS))

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        phrase_image: torch.Tensor,
        phrase_share: torch.Tensor,
        patch_attributes: torch.Tensor,
        patch_surroundings: torch.Tensor,
        patch_geometry: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        seen = self.vision(pixel_values, output_hidden_states=True)
        on_object = patch_attributes[..., 0] > 0  # (B, g²)
        losses = []
        for hidden_states in (self.vision.layernorm(seen.hidden_states[MIDDLE_LAYER]), seen.last_hidden_state):
            patches = hidden_states[:, 1 + REGISTERS :]  # (B, g², D)
            losses += [
                F.cross_entropy(head(patches).flatten(0, 1), patch_attributes[..., index].flatten())
                for index, head in enumerate(self.attribute_heads)
            ]
            guess = self.surroundings_head(patches)
            losses.append(SURROUNDINGS_WEIGHT * F.binary_cross_entropy_with_logits(guess, patch_surroundings))
            guess = self.geometry_head(patches)[on_object]
            losses.append(F.smooth_l1_loss(guess, patch_geometry[on_object], beta=0.1))

        if self.matched is not None:
            patches = self.matched(pixel_values).last_hidden_state[:, 1 + REGISTERS :]  # (B, g², D)
        text = self.text(input_ids)
        similarity = torch.einsum(
            "nd,npd->np", F.normalize(text.text_embeds, dim=1), F.normalize(patches, dim=2)[phrase_image]
        )
        losses.append(F.cross_entropy(similarity / TEMPERATURE, phrase_share / phrase_share.sum(1, keepdim=True)))
        verdicts = similarity * self.match_scale.exp() + self.match_bias
        losses.append(MATCH_WEIGHT * F.binary_cross_entropy_with_logits(verdicts, phrase_share))

        embedding = self.text.text_model.embeddings.token_embedding.weight
        next_tokens = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, IGNORED)
        logits = text.last_hidden_state[:, :-1] @ embedding.T  # (N, L - 1, V)
        losses.append(
            NEXT_TOKEN_WEIGHT * F.cross_entropy(logits.flatten(0, 1), next_tokens.flatten(), ignore_index=IGNORED)
        )
        return {"loss": torch.stack(losses).sum()}


@torch.no_grad()
def center_sentences(text: CLIPTextModelWithProjection, processor: DetrisProcessor) -> None:
    """Remove the direction that all sentences share from the projection, and scale the rest.

    The loss determines neither. DETRIS makes kernels of sentences, and a large common part would drown what tells
    phrases apart.
    """
    input_ids = processor(text=phrases_of(islice(Scenes(), 500)), return_tensors="pt")["input_ids"]
    weight = text.text_projection.weight  # (S, C)
    shared = F.normalize(text(input_ids).text_embeds.mean(0), dim=0)  # (S,)
    weight -= torch.outer(shared, shared @ weight)
    weight *= SENTENCE_SPREAD / text(input_ids).text_embeds.std()


def main() -> None:
    (arguments,) = HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses()
    if arguments.unaligned and Path(arguments.output_dir).resolve() == Path(__file__).resolve().parent:
        sys.exit(f"{arguments.output_dir} holds the shipped backbones: name another --output_dir for unaligned ones.")
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    vision = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            image_size=IMAGE_SIZE,
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
        image_processor=DetrisImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=tokenizer,
        max_text_length=TEXT_LENGTH,
    )
    matched = Dinov2WithRegistersModel(vision.config) if arguments.unaligned else None
    Trainer(
        model=Pretraining(vision, text, matched),
        args=arguments,
        train_dataset=Scenes(),
        data_collator=Collator(processor),
    ).train()
    center_sentences(text.cpu().eval(), processor)
    folder = Path(arguments.output_dir)
    vision.half().save_pretrained(folder / "vision")
    text.half().save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")


if __name__ == "__main__":
    main()
