"""Models, adapters and processors loaded into a pipeline by this repository's own classes.

What the loaded models compute is compared with the figures of the last release, see `tests/test_released_models.py`.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.hub_client import run_client
from helpers.hub_server import HubServer
from helpers.pictures import picture
from safetensors.torch import load_file, save_file

from load_detris import find_device, find_dtype, load_pipeline, load_processor, named_adapters
from modeling_detris import DetrisForReferringSegmentation
from pipeline_detris import ReferringImageSegmentationPipeline
from processing_detris import DetrisProcessor

RELEASED = Path(__file__).parent / "fixtures" / "released"
WHOLE, ADAPTER = RELEASED / "whole", RELEASED / "adapter"
BACKBONES = {"vision_backbone": str(WHOLE), "text_backbone": str(WHOLE)}
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
PHRASES = ["the bed", "a"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def figures() -> dict[str, torch.Tensor]:
    return load_file(RELEASED / "figures.safetensors")


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder of adapters with their processor, as training leaves it."""
    folder = shutil.copytree(ADAPTER, tmp_path / "adapter")
    for name in PROCESSOR_FILES:
        shutil.copy(WHOLE / name, folder)
    return folder


@pytest.fixture
def whole(tmp_path) -> Path:
    return shutil.copytree(WHOLE, tmp_path / "whole")


@torch.no_grad()
def logits_of(pipe: ReferringImageSegmentationPipeline, figures, **options) -> torch.Tensor:
    inputs = {name: figures[name] for name in ("pixel_values", "input_ids", "image_index")}
    return pipe.model(**inputs, **options).logits


# --- what is loaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_whole_model(figures, kind):
    pipe = load_pipeline(kind(WHOLE), device="cpu")
    assert type(pipe) is ReferringImageSegmentationPipeline
    assert type(pipe.model) is DetrisForReferringSegmentation and type(pipe.processor) is DetrisProcessor
    assert not pipe.model.training and pipe.model.dtype == torch.float32
    torch.testing.assert_close(logits_of(pipe, figures), figures["whole_logits"])
    # Tokens: the 256 bytes from "!" on, the same at a word's end, the merges "ed", "th" and "the", start, end.
    tokens = pipe.processor(text=PHRASES)["input_ids"].tolist()
    assert tokens == [[515, 514, 65, 512, 516, 0, 0, 0, 0], [515, 256 + 64, 516, 0, 0, 0, 0, 0, 0]]
    assert (pipe.processor.mask_threshold, pipe.processor.image_processor.size["height"]) == (0.35, 32)


def test_adapters_in_backbones_that_lie_elsewhere(figures, adapter):
    pipe = load_pipeline(adapter, device="cpu", **BACKBONES)
    torch.testing.assert_close(logits_of(pipe, figures), figures["adapter_logits"])


def test_further_adapters_stand_by_until_they_are_named(figures):
    pipe = load_pipeline(WHOLE, {"second": ADAPTER, "third one": str(ADAPTER)}, device="cpu")
    assert pipe.model.active_adapters() == ["default"]
    assert set(pipe.model.peft_config) == {"default", "second", "third one"}
    torch.testing.assert_close(logits_of(pipe, figures), figures["whole_logits"])
    count = len(figures["input_ids"])
    for name in ("second", "third one"):
        logits = logits_of(pipe, figures, adapter_names=[name] * count)
        torch.testing.assert_close(logits, figures["adapter_logits"])


def test_the_pipeline_gives_what_model_and_processor_give_by_hand():
    image = picture()
    pipe = load_pipeline(WHOLE, {"second": ADAPTER}, device="cpu")
    inputs = pipe.processor(images=image, text=PHRASES, return_tensors="pt")
    model = DetrisForReferringSegmentation.from_pretrained(WHOLE)
    model.load_adapter(str(ADAPTER), adapter_name="second")
    for adapter_name in ("second", "default"):
        model.set_adapter(adapter_name)
        with torch.no_grad():
            outputs = model.eval()(**inputs)
        masks = pipe.processor.post_process_referring_segmentation(outputs, target_sizes=[image.shape[:2]])
        results = pipe(image, PHRASES, adapter_name=adapter_name)
        assert [result["label"] for result in results] == PHRASES
        for result, mask in zip(results, masks):
            assert list(result["mask"].tobytes()) == (mask.flatten().int() * 255).tolist()


@pytest.mark.filterwarnings("error:The backbones are not in float32")
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_numbers_of_another_width(figures, adapter, dtype):
    for pipe in (
        load_pipeline(WHOLE, None, "cpu", dtype),
        load_pipeline(WHOLE, {"second": ADAPTER}, "cpu", dtype),
        load_pipeline(adapter, None, "cpu", dtype, **BACKBONES),
    ):
        widths = {p.dtype for p in (*pipe.model.parameters(), *pipe.model.buffers()) if p.is_floating_point()}
        assert widths == {find_dtype(dtype)} and pipe.model.config.dtype == find_dtype(dtype)


def test_adapters_of_other_backbones_are_refused_in_every_width(whole):
    weights = load_file(whole / "model.safetensors")
    weights["vision_model.layernorm.bias"] += 1
    save_file(weights, whole / "model.safetensors", {"format": "pt"})
    for dtype in (None, "bfloat16"):
        refused(ValueError, "The adapters were trained in other backbones", whole, {"x": ADAPTER}, dtype=dtype)


def test_a_model_saved_in_bfloat16_stays_so(whole):
    DetrisForReferringSegmentation.from_pretrained(whole).bfloat16().save_pretrained(whole)
    assert load_pipeline(whole, device="cpu").model.dtype == torch.bfloat16
    assert load_pipeline(whole, device="cpu", dtype="float32").model.dtype == torch.float32


def test_no_code_beside_a_model_is_run_and_nobody_is_asked(whole, monkeypatch):
    hostile = f"open({str(whole / 'has run')!r}, 'w').write('!')\n"
    for name in ("configuration_detris", "modeling_detris", "processing_detris", "pipeline_detris", "hostile"):
        (whole / f"{name}.py").write_text(hostile)
    config = json.loads((whole / "config.json").read_text())
    impl = {"impl": "hostile.Pipeline", "pt": ["AutoModel"], "type": "multimodal"}
    config["custom_pipelines"] = {"referring-image-segmentation": impl}
    config["auto_map"] = {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}
    (whole / "config.json").write_text(json.dumps(config))
    for name, hooks in (
        ("tokenizer_config.json", {"AutoTokenizer": ["hostile.Tokenizer", "hostile.Tokenizer"]}),
        ("processor_config.json", {"AutoProcessor": "hostile.Processor", "AutoImageProcessor": "hostile.Images"}),
    ):
        saved = json.loads((whole / name).read_text())
        audio = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "someone/other"}
        (whole / name).write_text(json.dumps(saved | {"auto_map": hooks, "audio_tokenizer": audio}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    pipe = load_pipeline(whole, device="cpu")
    assert type(pipe.model) is DetrisForReferringSegmentation and len(pipe(picture(), "the bed")) == 1
    assert not (whole / "has run").exists()


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(error: type[Exception], message: str, *arguments, **options) -> None:
    with pytest.raises(error, match=message) as caught:
        load_pipeline(*arguments, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_places_that_hold_no_model(tmp_path, monkeypatch, whole, in_time):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("clip").mkdir()
    Path("clip/config.json").write_text('{"model_type": "clip"}')
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    Path("photo.jpg").touch()
    refused(OSError, "^no/such/folder does not exist: give a folder, or a Hub id", "no/such/folder")
    refused(OSError, r"^\.\./detris does not exist: give a folder, or a Hub id", "../detris")
    refused(
        OSError, "^runs/quickstart is neither on this machine nor in the cache of the Hub.*: uns", "runs/quickstart"
    )
    refused(OSError, "^empty holds no model, because it has no config.json: name", "empty")
    refused(ValueError, "^clip holds a model of type 'clip', not a DETRIS: name", "clip")
    refused((OSError, ValueError), "broken", "broken")
    refused(OSError, "^photo.jpg is a file: give the folder of a saved model, or a Hub id", "photo.jpg")
    refused(TypeError, "^model is of type int: give a folder or a Hub id", 3)
    refused(ValueError, "^model is empty: give a folder or a Hub id", "")
    refused(ValueError, "^revision is 'main', but whole is a folder, which has none", "whole", revision="main")
    Path("whole/model.safetensors").unlink()
    refused(OSError, "no file named model.safetensors", "whole")
    os.mkfifo("whole/model.safetensors")
    refused(OSError, "model.safetensors is neither a file nor a folder", "whole")


def test_official_checkpoints_come_with_the_command_that_converts_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my runs").mkdir()
    for name in ("last.pth", "best.pth"):
        Path("my runs", name).touch()
    command = r"`python convert_detris_checkpoint.py 'my runs/best.pth' out/ --dataset refcoco/unc`"
    said = (
        rf"my runs holds official checkpoints and no config.json \(best.pth, last.pth\): convert one .* by {command}"
    )
    refused(OSError, said, "my runs")
    refused(OSError, said, WHOLE, {"second": "my runs"})
    with pytest.raises(OSError, match=said):
        DetrisForReferringSegmentation.from_pretrained("my runs")
    refused(OSError, rf"my runs/best.pth is a checkpoint file, not .*, convert it by {command}", "my runs/best.pth")
    refused(OSError, "my runs/none.pth does not exist", "my runs/none.pth")
    for number in range(30):
        Path("my runs", f"{number}.pth").touch()
    refused(OSError, r"\(0.pth, 1.pth, 10.pth, .* and 12 more\)", "my runs")


def test_a_processor_that_is_missing_or_does_not_fit(whole):
    config = json.loads((whole / "processor_config.json").read_text())
    larger = config | {"image_processor": config["image_processor"] | {"size": {"height": 64, "width": 64}}}
    for content, error, message in (
        (None, OSError, f"{whole} holds a model but no processor, because it has no processor_config.json: save one"),
        (larger, ValueError, f"{whole}: its processor makes images of 64 pixels .* model reads 32 pixels"),
        ([1], ValueError, f"{whole}: its processor_config.json holds no fields"),
        (config | {"mask_threshold": 7}, ValueError, f"{whole}: mask_threshold is 7"),
    ):
        (whole / "processor_config.json").unlink()
        if content is not None:
            (whole / "processor_config.json").write_text(json.dumps(content))
        refused(error, message, whole)
        (whole / "processor_config.json").write_text(json.dumps(config))
    (whole / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"{whole}: its processor cannot be read"):
        load_processor(str(whole))
    (whole / "tokenizer.json").unlink()
    refused(ValueError, f"{whole}: The tokenizer has . symbols.*: its tokenizer.json is missing", whole)


@pytest.mark.parametrize("name", ["", "a.b", 3, "default", "__base__"])
def test_adapter_names_that_cannot_be(name):
    refused(ValueError, f"^{re.escape(repr(name))} cannot name (further )?adapters", WHOLE, {name: ADAPTER})


def test_adapters_that_cannot_be_loaded(adapter, tmp_path):
    refused(TypeError, "adapters is of type list: give a mapping from name", WHOLE, [ADAPTER])
    refused(TypeError, "The place of the adapters 'x' is of type int", WHOLE, {"x": 3})
    refused(OSError, "released/whole holds no adapters, because it has no adapter_config.json", WHOLE, {"x": WHOLE})
    refused(OSError, "no/such/folder does not exist", WHOLE, {"x": "no/such/folder"})
    refused(
        ValueError, "adapter_name is 'vision_model', which already names something", WHOLE, {"vision_model": ADAPTER}
    )
    refused(OSError, "The backbones of .*adapter, .*: if they lie elsewhere, give vision_backbone= and", adapter)
    refused(
        ValueError,
        "released/whole is a whole model with backbones of its own: leave vision_backbone and text_ba",
        WHOLE,
        **BACKBONES,
    )


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:7", "meta", 99, -2, True, 1.5, "cpu:x", "", []])
def test_devices_that_are_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    refused(ValueError, f"^device is {re.escape(repr(device))}, but PyTorch sees cpu alone here", WHOLE, device=device)


def test_devices_where_there_is_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert find_device() == find_device(0) == find_device("cuda:0") == torch.device("cuda:0")
    assert find_device(1) == find_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert find_device("cuda") == torch.device("cuda")
    assert find_device(-1) == find_device("cpu") == torch.device("cpu")
    for device in (2, "cuda:2", "mps", "xpu:0"):
        with pytest.raises(ValueError, match="but PyTorch sees cpu and 2 of cuda here: give one of these"):
            find_device(device)


@pytest.mark.parametrize("dtype", ["fp16", "int8", torch.int64, torch.float64, 16, "", [], "9" * 1000])
def test_precisions_that_there_are_not(dtype):
    refused(ValueError, "^dtype is .*: give float32, bfloat16, float16.$", WHOLE, dtype=dtype)


# --- the Hub ------------------------------------------------------------------------------------------------------

ON_THE_HUB = """
import json
import os
from pathlib import Path

import huggingface_hub as hub
from safetensors.torch import load_file, save_file

for name in ("whole", "official", "empty", "gated"):
    hub.create_repo(f"someone/{name}")
revisions = []
for threshold in (0.25, 0.75):
    config = json.loads((Path(WHOLE) / "processor_config.json").read_text()) | {"mask_threshold": threshold}
    revisions.append(hub.upload_folder(repo_id="someone/whole", folder_path=WHOLE, commit_message="Upload").oid)
    revisions[-1] = hub.upload_file(
        repo_id="someone/whole", path_in_repo="processor_config.json", path_or_fileobj=json.dumps(config).encode()
    ).oid
for path in ("detris_b.pth", "large/detris_l.pth"):
    hub.upload_file(repo_id="someone/official", path_in_repo=path, path_or_fileobj=b"weights")

from load_detris import load_pipeline
from modeling_detris import DetrisForReferringSegmentation

figures = load_file(FIGURES)
inputs = {name: figures[name] for name in ("pixel_values", "input_ids", "image_index")}
thresholds = []
for revision in (None, "main", *revisions):
    pipe = load_pipeline("someone/whole", device="cpu", revision=revision)
    assert type(pipe.model).__module__ == "modeling_detris"
    assert (pipe.model(**inputs).logits - figures["whole_logits"]).abs().max() < 1e-4
    thresholds.append(pipe.processor.mask_threshold)

messages = []
for load, arguments in (
    (load_pipeline, {"model": "someone/official"}),
    (load_pipeline, {"model": "someone/official", "revision": "main"}),
    (load_pipeline, {"model": "someone/whole", "adapters": {"x": "someone/official"}}),
    (DetrisForReferringSegmentation.from_pretrained, {"pretrained_model_name_or_path": "someone/official"}),
    (load_pipeline, {"model": "someone/empty"}),
    (load_pipeline, {"model": "someone/gated"}),
    (load_pipeline, {"model": "someone/nothing"}),
    (load_pipeline, {"model": "someone/whole", "revision": "v9"}),
    (load_pipeline, {"model": "someone/whole", "revision": "0" * 40}),
):
    try:
        load(**arguments)
    except OSError as error:
        messages.append(str(error))
print(json.dumps([thresholds, messages]))
"""


WITHOUT_A_SERVER = """
import json
import time
from load_detris import load_pipeline

time.sleep = lambda seconds: None  # as the client does between two attempts
messages = []
for model in ("someone/other", "runs/quickstart"):
    try:
        load_pipeline(model)
    except OSError as error:
        messages.append(str(error))
print(json.dumps([load_pipeline("someone/whole", device="cpu").processor.mask_threshold, messages]))
"""


@pytest.mark.slow
def test_models_on_the_hub(tmp_path):
    code = f"WHOLE, FIGURES = {str(WHOLE)!r}, {str(RELEASED / 'figures.safetensors')!r}\n{ON_THE_HUB}"
    with HubServer() as server:
        server.gated.add("someone/gated")
        options = {"server": server, "folder": tmp_path, "isolated": False, "cache": tmp_path / "cache"}
        thresholds, messages = json.loads(run_client(code, **options).splitlines()[-1])
    assert thresholds == [0.75, 0.75, 0.25, 0.75]
    command = "python convert_detris_checkpoint.py someone/official --file detris_b.pth{} out/ --dataset refcoco/unc"
    listed = "someone/official holds official checkpoints and no config.json (detris_b.pth, large/detris_l.pth): "
    plain = f"{listed}convert one of them by `{command.format('')}` and load what it writes."
    assert messages == [
        plain,
        plain.replace(command.format(""), command.format(" --revision main")),
        plain,
        plain,
        "someone/empty holds no model, because it has no config.json: name the place of a saved DETRIS.",
        "someone/gated is a gated repository on the Hub: ask for access on its page there, log in by `hf auth login`, "
        "and try again.",
        "someone/nothing is neither on this machine nor a repository on the Hub that you may read: check the name, "
        "and log in by `hf auth login` if the repository is private.",
        "someone/whole has no revision v9: give a branch, a tag or a whole commit id of it.",
        f"someone/whole has no revision {'0' * 40}: give a branch, a tag or a whole commit id of it.",
    ]
    threshold, messages = json.loads(run_client(WITHOUT_A_SERVER, **options).splitlines()[-1])
    assert threshold == 0.75
    for name, message in zip(("someone/other", "runs/quickstart"), messages, strict=True):
        said = (
            rf"{name} is not on this machine, and the Hub cannot be reached \(.*refused\): check the network and try.*"
        )
        assert re.fullmatch(said, message)


# --- adapters of a command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, named",
    [
        ([], {}),
        (["refcoco+=x/y", "b=c=d"], {"refcoco+": "x/y", "b": "c=d"}),
        (["runs/mine", "runs/v1.5/"], {"mine": "runs/mine", "v1_5": "runs/v1.5/"}),
    ],
)
def test_adapters_of_a_command_line_have_names(given, named):
    assert named_adapters(given) == named


def test_a_folder_with_a_sign_of_equality_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert named_adapters(["lr=1"]) == {"lr=1": "lr=1"}


@pytest.mark.parametrize(
    "given, message",
    [(["=b"], "'=b': give name=path"), (["a="], "'a=': give name=path"), (["a=b", "x/a"], "adapters are called 'a'")],
)
def test_adapters_without_a_name_of_their_own_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        named_adapters(given)
