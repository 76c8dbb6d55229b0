"""The card (README.md) of a shared model: what it is, what it was trained and tested on, and how to use it."""

import os
import re
from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from configuration_detris import TASK, DetrisConfig
from repository_files import may_be_repository

METRIC_NAMES = {"mean_iou": "mIoU", "overall_iou": "oIoU"} | {f"precision@0.{x}": f"Pr@0.{x}" for x in range(5, 10)}
METRIC_NAMES |= {"giou": "gIoU", "ciou": "cIoU", "n_acc": "N-acc", "t_acc": "T-acc"}  # where some phrases name nothing
HUB_DATASET = re.compile(r"(?:[\d.]+\*)?hub:(?P<id>[^:]+)(?::\w+)?")  # how a data set of the Hub is named here
EXAMPLE_IMAGE = "http://images.cocodataset.org/val2017/000000039769.jpg"  # two cats and two remotes on a couch
EXAMPLE_PHRASE = "the left cat"

CARD = """---
{metadata}
---

# {name}

An image and a phrase go in, the mask of what the phrase names comes out: DETRIS (Huang et al., AAAI 2025,
[arXiv 2501.08580](https://arxiv.org/abs/2501.08580)) for Transformers. {origin}

| | |
|---|---|
| trained inside the backbones | {trained} |
| vision backbone | {vision.num_hidden_layers} layers of width {vision.hidden_size}{vision_source} |
| text backbone | {text.num_hidden_layers} layers of width {text.hidden_size}{text_source} |
| image | {config.image_size} x {config.image_size} pixels |
| phrase | {config.max_text_length} tokens |
| trained on | {trained_on} |

## Results

{results}

## Use

```python
from transformers import pipeline

segment = pipeline("{task}", model="{name}", trust_remote_code=True{pipeline_backbones})
results = segment("photo.jpg", ["{phrase}"])
results[0]["mask"].save("mask.png")
```

Each result holds the `label`, the `score`, the `mask` at the size of the photograph and its `box`. With the model and
its processor:

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True{backbones}).eval()
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
inputs = processor(images=Image.open("photo.jpg"), text=["{phrase}"], return_tensors="pt")
masks = processor.post_process_referring_segmentation(
    model(**inputs), inputs["original_sizes"], image_index=inputs["image_index"]
)
```
{adapter_use}
## Limits

If a phrase names nothing in the image, the model draws a mask all the same, unless it was trained on such phrases. It
inherits what its backbones and its training photographs favour and what they leave out.

## Licences

The official code of DETRIS is under the MIT licence ([jiaqihuang01/DETRIS](https://github.com/jiaqihuang01/DETRIS)),
DINOv2 under Apache 2.0, CLIP under MIT. If the model was trained on photographs of COCO, those have licences of their
own.

## Citation

```bibtex
@inproceedings{{huang2025detris,
  title = {{Densely Connected Parameter-Efficient Tuning for Referring Image Segmentation}},
  author = {{Huang, Jiaqi and Xu, Zunnan and Liu, Ting and Liu, Yong and Han, Haonan and Yuan, Kehong and Li, Xiu}},
  booktitle = {{Proceedings of the AAAI Conference on Artificial Intelligence}},
  year = {{2025}}
}}
```
"""

ADAPTER_USE = """
This repository holds only adapters and head. The frozen backbones are loaded from {place} and checked by a digest.
More adapters can share them:

```python
model.load_adapter("someone/another-adapter", adapter_name="another")  # and activates it
model.set_adapter("default")
```
"""


def describe_trained_parts(config: DetrisConfig) -> str:
    """Say in words what a configuration trains inside the backbones: which adapters, in which layers."""
    parts = []
    if "detris" in config.peft_method:
        for what, layers, dim in (
            ("vision", config.vision_adapter_layers, config.vision_adapter_dim),
            ("text", config.text_adapter_layers, config.text_adapter_dim),
        ):
            if layers:
                parts.append(f"dense adapters of width {dim} in {what} layers {', '.join(map(str, layers))}")
    if "lora" in config.peft_method:
        kind = "DoRA" if config.lora_use_dora else "LoRA"
        parts.append(f"{kind} of rank {config.lora_rank} on {', '.join(config.lora_target_modules)}")
    if not config.freeze_backbones:
        parts.append("the backbones themselves")
    return "; ".join(parts) or "nothing"


def make_model_card(
    config: DetrisConfig,
    name: str,
    origin: str,
    trained_on: Sequence[str] = (),
    results: list[dict] | None = None,
    license: str = "mit",
    adapter_only: bool = False,
) -> ModelCard:
    """Make the card of a DETRIS.

    Args:
        config: the model's configuration.
        name: the model's name; on the Hub `owner/name`.
        origin: a sentence that says where the weights come from.
        trained_on: the names of the data sets that it was trained on, after their weights if these are not 1, such as
            `refcoco/unc`, `0.5*refcoco+/unc` and `hub:someone/mine`. Those of the Hub become links.
        results: for each split that it was tested on: `dataset`, named likewise, `split`, and the metrics by name,
            from 0 to 1. They become the card's `model-index`, which the Hub shows beside the model. Its newer folder
            `.eval_results` takes only data sets that are registered there as benchmarks; we know no referring set
            among them.
        license: the licence of the weights, by the Hub's abbreviation.
        adapter_only: whether adapters and head were saved without the backbones.
    """
    results = results or []
    sources = [config.vision_backbone, config.text_backbone]
    hub_sources = sorted({source for source in sources if source and _is_of_hub(source)})
    metadata = ModelCardData(
        license=license,
        library_name="peft" if adapter_only else "transformers",
        pipeline_tag="image-segmentation",
        tags=["detris", "referring-image-segmentation", "transformers"],
        datasets=list(dict.fromkeys(filter(None, map(_hub_id, trained_on)))) or None,
        trained_on=list(trained_on) or None,  # no field of the Hub's: names that are no ids of it have no place there
        metrics=["mean_iou"],
        base_model=hub_sources or None,
        # The Hub would take what has two base models for a merge of their weights.
        base_model_relation=("adapter" if adapter_only else "finetune") if hub_sources else None,
        widget=[{"src": EXAMPLE_IMAGE, "text": EXAMPLE_PHRASE, "example_title": EXAMPLE_PHRASE}],
        model_name=name if results else None,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                task_name="Referring image segmentation",
                dataset_type=_hub_id(result["dataset"]) or re.sub(r"[^\w.+-]", "-", result["dataset"]),
                dataset_name=_without_prefix(result["dataset"]),
                dataset_split=result["split"],
                metric_type=metric,
                metric_name=METRIC_NAMES[metric],
                metric_value=round(float(result[metric]), 4),
            )
            for result in results
            for metric in METRIC_NAMES
            if metric in result
        ]
        or None,
    )
    metrics = [metric for metric in METRIC_NAMES if any(metric in result for result in results)]
    headings = " | ".join(METRIC_NAMES[metric] for metric in metrics)
    lines = [f"| data set | split | {headings} |", "|---|---|" + "---:|" * len(metrics)]
    for result in results:
        figures = " | ".join(f"{100 * result[metric]:.2f}" if metric in result else "" for metric in metrics)
        lines.append(f"| {_in_cell(result['dataset'])} | {result['split']} | {figures} |")
    vision_source, text_source = (f", `{source}`" if source in hub_sources else "" for source in sources)
    place = "where they are published" if hub_sources else "the folders that you name"
    unnamed = adapter_only and not hub_sources
    return ModelCard(
        CARD.format(
            metadata=metadata.to_yaml().strip(),
            name=name,
            origin=origin,
            config=config,
            trained=describe_trained_parts(config),
            vision=config.vision_config,
            text=config.text_config,
            vision_source=vision_source,
            text_source=text_source,
            trained_on=" + ".join(map(_in_cell, trained_on)) or "not said",
            results="\n".join(lines) if results else "None measured.",
            task=TASK,
            phrase=EXAMPLE_PHRASE,
            adapter_use=ADAPTER_USE.format(place=place) if adapter_only else "",
            backbones=', vision_backbone="…", text_backbone="…"' if unnamed else "",
            pipeline_backbones=(
                ',\n    model_kwargs={"vision_backbone": "…", "text_backbone": "…"}' if unnamed else ""
            ),
        )
    )


def _is_of_hub(source: str) -> bool:
    """Whether backbones come from the Hub, not from a folder, be it on this machine or on the one that trained."""
    return not os.path.exists(source) and may_be_repository(source)


def _hub_id(dataset: str) -> str | None:
    """The id of a data set that is named `hub:<id>`, be it with a weight or a split; None for other names."""
    match = HUB_DATASET.fullmatch(dataset)
    return match["id"] if match and may_be_repository(match["id"]) else None


def _in_cell(dataset: str) -> str:
    """A data set's name in a cell of a table, which `|` would end."""
    return _without_prefix(dataset).replace("|", "\\|")


def _without_prefix(dataset: str) -> str:
    """How people read a data set's name: without the `hub:` before its id."""
    return dataset.replace("hub:", "", 1) if _hub_id(dataset) else dataset
