"""Make the small frozen backbones that ship with the project: `make backbones`, or

    python -m backbones.pretrain --output_dir backbones [--max_steps 6000]

A `Dinov2WithRegistersModel` and a `CLIPTextModelWithProjection` of about a million parameters each are trained on
scenes of `data/shapes/` (from a seed of their own, held-out combinations left out) to see and to read, not to refer:

* every patch tells shape, colour, texture and size of what it shows, where that object's centre lies, how large it is
  and what of the patch and its surroundings it covers, as DINOv2's patches tell parts and objects; a middle layer's
  patches too, since DETRIS reads those as well;
* phrases find the patches of their object among all patches of the scene, as CLIP's captions find their image, and
  each patch is told apart by itself, as SigLIP does (arXiv 2303.15343);
* the text tower, which is causal, predicts the next token, so that its words keep what the contrast does not need.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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

SEED = 20_250_108  # far from the seeds of the referring set, so that its images stay new
IMAGE_SIZE, PATCH_SIZE = 80, 8
WIDTH = 128
VISION_LAYERS, TEXT_LAYERS, HEADS = 6, 3, 4
REGISTERS = 4
VOCABULARY_SIZE = 1024
TEXT_POSITIONS = 77  # as CLIP's, for longer phrases about photographs
TEXT_LENGTH = 16
ATTRIBUTES = {"shape": SHAPES, "color": tuple(COLORS), "texture": TEXTURES, "size": tuple(RADII)}
IGNORED = -100  # label that cross-entropy passes over
TEMPERATURE = 0.07
NEXT_TOKEN_WEIGHT = 0.3
SURROUNDINGS_WEIGHT = 4.0
MATCH_WEIGHT = 4.0
MATCH_LOG_SCALE, MATCH_BIAS = 2.3, -4.0  # from cosine to logit, at the start
CELLS = 2  # a patch's surroundings are told cell by cell, so many along a patch's side
REACH = 2  # and so many patches far
WINDOW = CELLS * (2 * REACH + 1)
MIDDLE_LAYER = 4  # its output is taught to see like the last one's
SENTENCE_SPREAD = 0.1  # standard deviation of a sentence's numbers; DETRIS's kernels start near zero from it
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
    max_steps: int = 6000
    per_device_train_batch_size: int = 16
    learning_rate: float = 1.2e-3
    adam_beta2: float = 0.98
    weight_decay: float = 0.02
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 300
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
            yield draw_scene(SEED, "train", index, IMAGE_SIZE)


def phrases_of(scenes: Iterable[Scene]) -> list[str]:
    return [phrase.text for scene in scenes for phrases in scene.phrases for phrase in phrases]


def make_tokenizer() -> CLIPTokenizer:
    """Learn a byte-pair vocabulary in CLIP's layout from phrases of the synthetic set and everyday words."""
    phrases = phrases_of(islice(Scenes(), 3000))
    untrained = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    learned = untrained.train_new_from_iterator([*phrases, *(100 * EVERYDAY_WORDS)], VOCABULARY_SIZE - 258)
    merges = [tuple(pair) for pair in json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    # As in CLIP the end token comes last: the model finds it by its largest id, and id 0 is left for filling up.
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=merges)


class Collator:
    """Scenes to a batch: `B` images of `g²` patches and `N` phrases, one of each object."""

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
            # Objects are counted through the batch; 0 stays background.
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
    """Both backbones under the heads that teach them; `forward` returns the loss for `Trainer`."""

    def __init__(self, vision: Dinov2WithRegistersModel, text: CLIPTextModelWithProjection):
        super().__init__()
        self.vision, self.text = vision, text
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
    """Remove from the projection the direction that all sentences share, and scale the rest.

    The contrast leaves both open, and DETRIS makes kernels of sentences: a large common part would drown what tells
    phrases apart.
    """
    input_ids = processor(text=phrases_of(islice(Scenes(), 500)), return_tensors="pt")["input_ids"]
    weight = text.text_projection.weight  # (S, C)
    shared = F.normalize(text(input_ids).text_embeds.mean(0), dim=0)  # (S,)
    weight -= torch.outer(shared, shared @ weight)
    weight *= SENTENCE_SPREAD / text(input_ids).text_embeds.std()


def main() -> None:
    (arguments,) = HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses()
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
    Trainer(
        model=Pretraining(vision, text),
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
