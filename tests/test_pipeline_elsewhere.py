"""The pipeline travels with models: what processes find that see nothing of this repository but saved files.

Results are compared with those of the classes of this repository, which `tests/test_pipeline_detris.py` tests.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.elsewhere import run_elsewhere
from helpers.hub_client import run_client
from helpers.hub_files import MODEL_CODE, PROCESSOR_CODE
from helpers.hub_server import HubServer
from helpers.pictures import picture
from helpers.tiny_folders import save_tiny_folders
from PIL import Image
from safetensors.torch import load_file

from configuration_detris import SIMILAR_TASKS, TASK, DetrisConfig
from load_detris import load_pipeline
from model_card import EXAMPLE_PHRASE, make_model_card
from modeling_detris import DetrisForReferringSegmentation
from pipeline_detris import CUSTOM_PIPELINES

ROOT = Path(__file__).parents[1]
PHRASES = ["the bed", "a", "the thing that is red"]
CODE = {*MODEL_CODE, *PROCESSOR_CODE}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tiny_backbones, tmp_path_factory) -> Path:
    folder = save_tiny_folders(tiny_backbones, tmp_path_factory.mktemp("saved"))
    Image.fromarray(picture()).save(folder / "photo.png")
    return folder


@pytest.fixture
def expected(folder):
    """The results of a saved model for the photograph, in a type, as tensors."""

    def compute(name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        results = load_pipeline(folder / name, device="cpu", dtype=dtype)(picture(), PHRASES)
        return tensors_of(results)

    return compute


def tensors_of(results: list[dict]) -> dict[str, torch.Tensor]:
    masks = torch.stack([torch.from_numpy(np.array(result["mask"])) for result in results])
    return {"masks": masks, "scores": torch.tensor([result["score"] for result in results])}


# What is run elsewhere begins with this: `keep` writes results down under a name.
BEGIN = f"""
import os, sys
import numpy as np, torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, pipeline

torch.set_num_threads(1)
PHRASES, kept = {PHRASES!r}, {{}}

def keep(name, results):
    assert [result["label"] for result in results] == PHRASES
    assert results[0].keys() == {{"label", "score", "mask", "box"}} and results[0]["mask"].mode == "L"
    kept[name + " masks"] = torch.stack([torch.from_numpy(np.array(result["mask"])) for result in results])
    kept[name + " scores"] = torch.tensor([result["score"] for result in results])
    save_file(kept, "results.safetensors")
"""
FROM_FOLDERS = (
    BEGIN
    + """
folder, backbones = sys.argv[1:]
for name in ("whole", "adapter"):
    place = f"{folder}/{name}"
    pipe = pipeline("referring-image-segmentation", model=place, trust_remote_code=True)
    assert type(pipe).__module__.startswith("transformers_modules.") and "pipeline_detris" not in sys.modules
    keep(f"{name} float32", pipe(f"{folder}/photo.png", PHRASES))
    pipe = pipeline(model=place, trust_remote_code=True, dtype=torch.bfloat16, device="cpu", batch_size=2)
    assert pipe.model.dtype == torch.bfloat16
    keep(f"{name} bfloat16", pipe([f"{folder}/photo.png"] * 3, PHRASES)[2])
moved = {"vision_backbone": f"{backbones}/vision", "text_backbone": f"{backbones}/text"}
pipe = pipeline(model=f"{folder}/adapter", trust_remote_code=True, model_kwargs=moved, local_files_only=True)
keep("moved float32", pipe(f"{folder}/photo.png", PHRASES))

AutoModel.from_pretrained(f"{folder}/whole", trust_remote_code=True).save_pretrained("again")
AutoProcessor.from_pretrained(f"{folder}/whole", trust_remote_code=True).save_pretrained("again")
pipe = pipeline("referring-image-segmentation", model="again", trust_remote_code=True)
keep("again float32", pipe(f"{folder}/photo.png", PHRASES))
pipe.save_pretrained("once more")
keep("once more float32", pipeline(model="once more", trust_remote_code=True)(f"{folder}/photo.png", PHRASES))
AutoModel.from_pretrained(f"{folder}/adapter", trust_remote_code=True).save_adapter("again adapter")
AutoProcessor.from_pretrained(f"{folder}/adapter", trust_remote_code=True).save_pretrained("again adapter")
pipe = pipeline(model="again adapter", trust_remote_code=True)
keep("again adapter float32", pipe(f"{folder}/photo.png", PHRASES))
"""
)


@pytest.mark.slow
def test_saved_models_bring_their_pipeline(folder, tiny_backbones, tmp_path, expected):
    results = run_elsewhere(FROM_FOLDERS, tmp_path / "empty", str(folder), str(tiny_backbones))
    for name, source in {
        "whole": "whole",
        "again": "whole",
        "once more": "whole",
        "adapter": "adapter",
        "moved": "adapter",
        "again adapter": "adapter",
    }.items():
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{name} {str(dtype).removeprefix('torch.')}"
            if f"{key} masks" in results:
                assert_same(key, results, expected(source, dtype))
    assert len(results) == 2 * 8
    for name, source in (("again", "whole"), ("once more", "whole"), ("again adapter", "adapter")):
        saved = {path.name for path in (tmp_path / "empty" / name).iterdir()}
        assert saved == {path.name for path in (folder / source).iterdir()} >= CODE


def assert_same(name: str, results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert 0 < (expected["masks"] > 0).sum() < expected["masks"].numel()
    masks, scores = results[f"{name} masks"], results[f"{name} scores"]
    few = 0 if "float32" in name else 0.01 * masks.numel()  # batches of another size round otherwise in bfloat16
    assert (masks != expected["masks"]).sum() <= few, name
    torch.testing.assert_close(scores, expected["scores"], atol=1e-5 if few == 0 else 0.02, rtol=0)


# --- The Hub ---------------------------------------------------------------------------------------------------------

PUSH = """
from transformers import AutoModel, CLIPTextModelWithProjection
from load_detris import load_processor
from modeling_detris import DetrisForReferringSegmentation

AutoModel.from_pretrained("{backbones}/vision").push_to_hub("someone/vision")
CLIPTextModelWithProjection.from_pretrained("{backbones}/text").push_to_hub("someone/text")
processor = load_processor("{folder}/whole")
model = DetrisForReferringSegmentation.from_pretrained("{folder}/whole")
model.push_to_hub("someone/whole")
named = dict(vision_backbone="someone/vision", text_backbone="someone/text")
model = DetrisForReferringSegmentation.from_pretrained("{folder}/adapter", **named)
model.save_adapter("adapter", push_to_hub=True, repo_id="someone/adapter")
for name in ("whole", "adapter"):
    processor.push_to_hub("someone/" + name)
# A later revision of the whole model has the adapter's weights inside.
DetrisForReferringSegmentation.from_pretrained("{folder}/adapter").push_to_hub("someone/whole")
"""
FROM_THE_HUB = (
    BEGIN
    + """
for name in ("whole", "adapter"):
    pipe = pipeline("referring-image-segmentation", model=f"someone/{name}", trust_remote_code=True)
    assert type(pipe).__module__.startswith("transformers_modules.someone."), type(pipe)
    keep(f"{name} float32", pipe("photo.png", PHRASES))
pipe = pipeline(model="someone/whole", revision=REVISION, trust_remote_code=True)
keep("earlier float32", pipe("photo.png", PHRASES))
pipe.push_to_hub("someone/piped")
"""
)


@pytest.mark.slow
def test_models_on_the_hub_bring_their_pipeline(folder, tiny_backbones, tmp_path, expected):
    (tmp_path / "photo.png").symlink_to(folder / "photo.png")
    with HubServer() as server:
        run_client(PUSH.format(folder=folder, backbones=tiny_backbones), server, tmp_path, isolated=False)
        for name in ("whole", "adapter"):
            files = server.files(f"someone/{name}")
            assert CODE <= files.keys() and json.loads(files["config.json"])["custom_pipelines"] == CUSTOM_PIPELINES
        *_, earlier, _ = server.revisions("someone/whole")
        run_client(f"REVISION = {earlier!r}\n{FROM_THE_HUB}", server, tmp_path)
        again = server.files("someone/piped")
        assert again.keys() == server.files("someone/whole").keys()
        assert all(again[name] == (ROOT / name).read_bytes() for name in CODE)
    results = load_file(tmp_path / "results.safetensors")
    for name, source in (("whole", "adapter"), ("adapter", "adapter"), ("earlier", "whole")):
        assert_same(f"{name} float32", results, expected(source))
    assert not torch.equal(results["whole float32 masks"], results["earlier float32 masks"])


# --- Other tasks, older and hostile configurations -------------------------------------------------------------------

WRONG_TASK = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import pipeline

errors = []
for trust in (True, False):
    try:
        pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=trust)
    except Exception as error:
        errors.append([type(error).__name__, str(error)])
json.dump(errors, open("errors.json", "w"))
save_file({"nothing": torch.zeros(1)}, "results.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_the_task_of_the_card_leads_to_ours(folder, tmp_path, name):
    run_elsewhere(WRONG_TASK, tmp_path / "empty", str(folder / name))
    trusted, untrusted = json.loads((tmp_path / "empty" / "errors.json").read_text())
    assert trusted == [
        "ValueError",
        'The task is "image-segmentation", but DETRIS segments what phrases name: use '
        f'pipeline("referring-image-segmentation", model="{folder / name}", trust_remote_code=True) and give it an '
        "image and phrases.",
    ]
    assert untrusted[0] == "ValueError" and "trust_remote_code=True" in untrusted[1] and "DETRIS" not in untrusted[1]


def test_which_tasks_a_configuration_is_read_for(folder):
    for task in SIMILAR_TASKS:
        with pytest.raises(ValueError, match=f'The task is "{task}"'):
            DetrisConfig.from_pretrained(folder / "whole", _from_pipeline=task)
    for task in (None, TASK, "somebodys-own-task"):
        config = DetrisConfig.from_pretrained(folder / "whole", _from_pipeline=task)
        assert config.custom_pipelines == CUSTOM_PIPELINES


def test_an_older_configuration_gets_its_pipeline_when_the_model_is_saved_again(folder, tmp_path):
    model = DetrisForReferringSegmentation.from_pretrained(Path(__file__).parent / "fixtures" / "released" / "whole")
    assert not hasattr(model.config, "custom_pipelines")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == CUSTOM_PIPELINES


IMPL = "pipeline_detris.ReferringImageSegmentationPipeline"


@pytest.mark.parametrize(
    "value",
    [None, 3, "x", [], {TASK: None}, {TASK: {}}, {TASK: {"impl": 3}}, {TASK: {"impl": "a.b.c", "pt": ["AutoModel"]}}]
    + [{TASK: {"impl": IMPL, "pt": names}} for names in ("AutoModel", 3, ["os"], [3], [None])],
)
def test_a_strangers_custom_pipelines_are_refused_if_transformers_could_not_read_them(value):
    with pytest.raises(ValueError, match="^custom_pipelines is .*leave it out or save the model again"):
        DetrisConfig(custom_pipelines=value)


def test_custom_pipelines_of_others_are_kept():
    for impl in (IMPL, f"someone/else--{IMPL}"):
        tasks = {"another-task": {"impl": impl, "pt": ["AutoModelForImageSegmentation"]}}
        assert DetrisConfig(custom_pipelines=tasks).custom_pipelines == tasks


# --- The card --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_the_code_of_the_card_runs_elsewhere(folder, tiny_backbones, tmp_path, name):
    config = DetrisConfig.from_pretrained(folder / name)
    card = make_model_card(config, str(folder / name), "For a test.", adapter_only=name == "adapter").text
    use = card.partition("## Use\n")[2].partition("\n## ")[0]
    by_pipeline, by_hand, *further = (block.partition("```")[0] for block in use.split("```python\n")[1:])
    assert len(further) == (name == "adapter")
    code = f"import torch\ntorch.set_num_threads(1)\n{by_pipeline}\n{by_hand}"
    for part in ("vision", "text"):
        for mark in (f'"{part}_backbone": "…"', f'{part}_backbone="…"'):
            assert (mark in code) == (name == "adapter")
            code = code.replace(mark, mark.replace("…", str(tiny_backbones / part)))
    (tmp_path / "empty").mkdir()
    Image.fromarray(picture(30, 44)).save(tmp_path / "empty" / "photo.jpg", quality=95)
    code += """
from safetensors.torch import save_file
save_file({"by hand": masks[0]}, "results.safetensors")
"""
    results = run_elsewhere(code, tmp_path / "empty")
    mask = np.asarray(Image.open(tmp_path / "empty" / "mask.png"))
    expected = load_pipeline(folder / name, device="cpu")(tmp_path / "empty" / "photo.jpg", EXAMPLE_PHRASE)
    assert np.array_equal(mask, np.asarray(expected[0]["mask"]))
    assert np.array_equal(mask > 0, results["by hand"].numpy())
