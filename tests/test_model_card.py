"""A model's card as the Hub reads it: metadata checked by the Hub's rules, figures, and what must not be in it.

The rules are those of huggingface/hub-docs, `modelcard.md` and `docs/hub/model-cards.md`.
"""

import os

import pytest
import yaml
from helpers.models import small_config
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from model_card import METRIC_NAMES, make_model_card
from training.arguments import DataArguments
from training.results import card_name

NAME = "someone/detris-tiny"
FIGURES = {metric: 0.1234 + number / 100 for number, metric in enumerate(METRIC_NAMES)}
TRAINED_ON = [
    "refcoco/unc",
    "0.5*refcoco+/unc",
    "hub:someone/mine",
    "2*hub:someone/else:train",
    "shapes",
    "photographs",
]
RESULTS = [
    {"dataset": "refcoco/unc", "split": "val"} | FIGURES,
    {"dataset": "refcoco/unc", "split": "testA, first 9 objects"} | FIGURES,
    {"dataset": "hub:someone/benchmark", "split": "refcoco_unc_val"} | {"mean_iou": 0.75, "overall_iou": 2 / 3},
    {"dataset": "hub:someone/benchmark", "split": "refcoco_unc_testA"} | {"mean_iou": 0.5},
    {"dataset": "photographs", "split": "val"} | {"mean_iou": 1},
]


def metadata_of(card):
    """The YAML at the top, read without huggingface_hub."""
    _, head, _ = card.content.split("---\n", 2)
    return yaml.safe_load(head)


def check_rules(metadata):
    """What the Hub refuses or ignores."""
    for field in ("datasets", "base_model"):
        for repository in metadata.get(field, []):
            validate_repo_id(repository)
    assert ("base_model" in metadata) == ("base_model_relation" in metadata)
    assert metadata.get("base_model_relation", "finetune") in ("adapter", "finetune", "merge", "quantized")
    for model in metadata.get("model-index", []):
        assert isinstance(model["name"], str) and model["results"]
        for result in model["results"]:
            assert isinstance(result["task"]["type"], str)
            assert all(isinstance(result["dataset"][key], str) and result["dataset"][key] for key in ("type", "name"))
            assert all(
                type(metric["value"]) is float and isinstance(metric["type"], str) for metric in result["metrics"]
            )


@pytest.fixture
def config():
    config = small_config()
    config.vision_backbone, config.text_backbone = "someone/vision", "someone/text"
    return config


@pytest.mark.parametrize("adapter_only", [False, True])
def test_the_hub_finds_figures_and_sources(config, tmp_path, adapter_only):
    make_model_card(config, NAME, "For a test.", TRAINED_ON, RESULTS, adapter_only=adapter_only).save(
        tmp_path / "card.md"
    )
    card = ModelCard.load(tmp_path / "card.md")
    metadata = metadata_of(card)
    check_rules(metadata)
    assert metadata["datasets"] == ["someone/mine", "someone/else"]
    assert metadata["trained_on"] == TRAINED_ON  # from which the card of an evaluation takes them
    assert metadata["base_model"] == ["someone/text", "someone/vision"]
    assert metadata["base_model_relation"] == ("adapter" if adapter_only else "finetune")
    assert card.data.model_name == NAME

    found = {}
    for result in card.data.eval_results:
        place = result.dataset_type, result.dataset_name, result.dataset_split
        found.setdefault(place, {})[result.metric_type] = result.metric_value
        assert METRIC_NAMES[result.metric_type] == result.metric_name
    places = {
        "refcoco/unc": ("refcoco-unc", "refcoco/unc"),  # no id of the Hub's, which would be a link to a stranger's set
        "hub:someone/benchmark": ("someone/benchmark", "someone/benchmark"),
        "photographs": ("photographs", "photographs"),
    }
    assert found == {
        (*places[result["dataset"]], result["split"]): {
            metric: pytest.approx(result[metric], abs=5e-5) for metric in METRIC_NAMES if metric in result
        }
        for result in RESULTS
    }
    assert "| trained on | refcoco/unc + 0.5*refcoco+/unc + someone/mine + 2*someone/else:train + shapes" in card.text
    assert "| someone/benchmark | refcoco_unc_val | 75.00 | 66.67 |" in card.text and "hub:" not in card.text


def test_a_card_without_figures_or_sources_keeps_the_rules(config):
    config.vision_backbone = config.text_backbone = None
    metadata = metadata_of(make_model_card(config, NAME, "For a test."))
    check_rules(metadata)
    assert not {"datasets", "trained_on", "base_model", "base_model_relation", "model-index"} & set(metadata)


@pytest.mark.parametrize(
    "name", ["hub:", "hub:a b/c", "hub:../up", "hub:a/b/c", "hub:a--b/c", "hub:/etc", "x/hub:a/b"]
)
def test_what_is_no_id_is_no_link(config, name):
    metadata = metadata_of(
        make_model_card(config, NAME, "For a test.", [name], [{"dataset": name, "split": "val"} | FIGURES])
    )
    check_rules(metadata)
    assert "datasets" not in metadata and "/" not in metadata["model-index"][0]["results"][0]["dataset"]["type"]


@pytest.mark.parametrize("exists", [True, False])
def test_folders_of_backbones_are_not_told(config, tmp_path, exists):
    """Also not those of the machine that trained, which are not on this one."""
    folder = tmp_path / "secret" / "vision"
    if exists:
        folder.mkdir(parents=True)
    config.vision_backbone = str(folder)
    card = make_model_card(config, NAME, "For a test.", adapter_only=True)
    assert "secret" not in card.content and metadata_of(card)["base_model"] == ["someone/text"]


def test_folders_of_data_are_told_without_their_paths(tmp_path, monkeypatch):
    (tmp_path / "secret" / "mine").mkdir(parents=True)
    (tmp_path / "secret" / "table.parquet").touch()
    monkeypatch.chdir(tmp_path / "secret" / "mine")
    local, refer = DataArguments(), DataArguments(data_root="path/to/refer")
    for given in (str(tmp_path / "secret" / "mine"), "../mine", ".", "../mine/", "../../secret/mine"):
        assert card_name(given, local) == card_name(given, refer) == "mine", given
    assert card_name("../table.parquet", local) == "table.parquet"
    assert card_name("hub:someone/mine", refer) == card_name("someone/mine", local) == "hub:someone/mine"
    for name in ("p/bench", "t/bench"):
        os.makedirs(name)
    both = DataArguments(test_splits=["p/bench:val", "t/bench:val"])
    assert [card_name(name, both) for name in ("p/bench", "t/bench")] == ["p/bench", "t/bench"]
    assert card_name("aerial/unc", refer) == "aerial/unc"  # a set in the REFER layout
    assert card_name("refcoco/unc", local) == "refcoco/unc" and card_name("shapes", local) == "shapes"
    os.makedirs("someone/mine")  # a folder goes before the Hub
    assert card_name("someone/mine", local) == "mine"
