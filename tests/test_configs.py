"""Every recipe in `configs/` against the paper's table, and at work on five photographs."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tokenizers import build_clip_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

import quickstart
from configuration_detris import DetrisConfig
from modeling_detris import DetrisForReferringSegmentation
from train_hf import main, parse_arguments

ROOT = Path(__file__).parents[1]
MINI = ROOT.parent / "shared" / "refer_mini"
VISION = {  # width, layers, heads
    "facebook/dinov2-with-registers-base": (768, 12, 12),
    "facebook/dinov2-with-registers-large": (1024, 24, 16),
}
EVERY_SECOND, EVERY_FOURTH = [1, 3, 5, 7, 9, 11], [2, 6, 10, 14, 18, 22]
BASE = (EVERY_SECOND, 128, EVERY_SECOND, 64, [4, 8])  # vision adapters, text adapters, features
LARGE = (EVERY_FOURTH, 128, EVERY_SECOND, 64, [8, 16])
MIXED = (list(range(1, 24)), 384, list(range(1, 12)), 384, [8, 16])
# The paper's recipes: model, adapters in millions and in percent of the backbones, epochs, milestones, tokens.
RECIPES = {
    "base_refcoco": (BASE, "2.72", "1.81", 65, [35, 55], 17),
    "base_refcocoplus": (BASE, "2.72", "1.81", 65, [35, 55], 17),
    "base_refcocog_umd": (BASE, "2.72", "1.81", 65, [35, 55], 22),
    "base_refcocog_google": (BASE, "2.72", "1.81", 50, [35], 17),
    "large_refcoco": (LARGE, "3.11", "0.85", 50, [35], 17),
    "large_refcocoplus": (LARGE, "3.11", "0.85", 50, [35], 17),
    "large_refcocog_umd": (LARGE, "3.11", "0.85", 50, [35], 22),
    "large_refcocog_google": (LARGE, "3.11", "0.85", 50, [35], 17),
    "large_mixed": (MIXED, "33.3", "9.1", 50, [35], 17),
}
DATASETS = {
    "refcoco": "refcoco/unc",
    "refcocoplus": "refcoco+/unc",
    "refcocog_umd": "refcocog/umd",
    "refcocog_google": "refcocog/google",
    "mixed": "refcoco/unc + refcoco+/unc + refcocog/umd",
}

pytestmark = pytest.mark.usefixtures("one_thread")


def path_of(recipe: str) -> str:
    return str(ROOT / "configs" / f"{recipe}.yaml")


def test_every_recipe_is_checked_here():
    others = {"quickstart", "own_data", "paper_table", "adapters"}
    assert {path.stem for path in (ROOT / "configs").iterdir()} - others == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_the_papers(recipe):
    size, dataset = recipe.split("_", 1)
    adapters, millions, share, epochs, milestones, length = RECIPES[recipe]
    model_args, data_args, args = parse_arguments([path_of(recipe)])
    assert model_args.vision_backbone == f"facebook/dinov2-with-registers-{size}"
    assert model_args.text_backbone == "openai/clip-vit-base-patch16"
    assert data_args.dataset == DATASETS[dataset]
    assert (args.num_train_epochs, args.milestones, args.milestone_factor) == (epochs, milestones, 0.1)
    assert (args.learning_rate, args.weight_decay, args.lr_scheduler_type) == (1e-4, 0, "constant")
    assert (args.global_batch_size, args.dataloader_drop_last, args.bf16) == (32, True, True)
    assert (data_args.eval_split, args.metric_for_best_model, args.load_best_model_at_end) == ("val", "mean_iou", True)

    width, depth, heads = VISION[model_args.vision_backbone]
    vision = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    fields = {name: value for name in ("image_size", "max_text_length") if (value := getattr(model_args, name))}
    config = DetrisConfig(
        vision_config=Dinov2WithRegistersConfig(**vision, image_size=518, patch_size=14),
        text_config=CLIPTextConfig(),  # of CLIP ViT-B/16: 512 wide, 12 layers, 8 heads
        **model_args.model_config | fields,
    )
    names = ("vision_adapter_layers", "vision_adapter_dim", "text_adapter_layers", "text_adapter_dim")
    saved = json.loads(config.to_json_string(use_diff=False))  # tuples become lists
    assert tuple(saved[name] for name in (*names, "feature_layers")) == adapters
    assert (config.image_size, config.max_text_length) == (448, length)
    with torch.device("meta"):
        model = DetrisForReferringSegmentation(config)
    trained, counts = model.num_parameters(only_trainable=True), model.count_parameters()
    assert trained == counts["adapters"] + counts["head"]
    assert f"{counts['adapters'] / 1e6:.{len(millions.split('.')[1])}f}" == millions
    assert f"{100 * counts['adapters'] / counts['backbones']:.{len(share.split('.')[1])}f}" == share


@pytest.mark.parametrize(
    "given, overwrites",
    [([], True), (["--output_dir", "runs/base"], False), (["--output-dir=runs/base"], False)],
    ids=["own folder", "another", "another spelling"],
)
def test_the_quickstart_overwrites_its_own_folder_alone(monkeypatch, given, overwrites):
    monkeypatch.chdir(ROOT)
    started = []

    def train(argv: list[str]) -> None:
        started.append(parse_arguments(argv)[2])
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "train", train)
    with pytest.raises(KeyboardInterrupt):
        quickstart.main(["--methods", "none", *given])
    assert started[0].overwrite_output_dir == overwrites
    assert started[0].output_dir == ("runs/quickstart" if overwrites else "runs/base")


@pytest.fixture(scope="module")
def narrow_backbones(tmp_path_factory):
    """Folders `text`, `base` and `large`: as many layers as the real backbones, 16 wide."""
    folder = tmp_path_factory.mktemp("narrow")
    tokenizer = build_clip_tokenizer([("e", "d</w>"), ("t", "h"), ("th", "e</w>")])
    size = {"hidden_size": 16, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **size,
        num_hidden_layers=12,
        intermediate_size=16,
        projection_dim=16,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    for name, depth in (("base", 12), ("large", 24)):
        vision = Dinov2WithRegistersConfig(**size, num_hidden_layers=depth, mlp_ratio=1, image_size=56, patch_size=14)
        Dinov2WithRegistersModel(vision).save_pretrained(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not MINI.exists(), reason="needs shared/refer_mini beside the repository")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_with_other_backbones_from_the_command_line(recipe, narrow_backbones, tmp_path):
    overrides = {
        "vision_backbone": narrow_backbones / recipe.split("_")[0],
        "text_backbone": narrow_backbones / "text",
        "data_root": MINI,
        "output_dir": tmp_path,
        "max_steps": 2,
        # For speed alone:
        "image_size": 56,
        "global_batch_size": 2,
        "dataloader_num_workers": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    metrics = main([path_of(recipe), *(f"--{name}={value}" for name, value in overrides.items())])
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2
    assert metrics["train_loss"] > 0 and 0 <= metrics["eval_mean_iou"] <= 1
    table = json.loads((tmp_path / "table.json").read_text())
    assert [line["split"] for line in table[:-1]] == parse_arguments([path_of(recipe)])[1].test_splits
