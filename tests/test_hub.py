"""What others find on the Hub after a model, its processor or a data set has been pushed there.

The Hub is `HubServer`.
"""

import hashlib
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers.hub_client import run_client
from helpers.hub_files import MODEL_CODE, PROCESSOR_CODE
from helpers.hub_server import HubServer
from helpers.models import randomize
from helpers.refer_folder import ReferFolder, same_rows
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from data.masks import RleMask
from data.shapes import load_shapes
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import DetrisProcessor

ROOT = Path(__file__).parents[1]
CODE = [*MODEL_CODE, *PROCESSOR_CODE]
PHRASES = ["the red one", "third", "the cat that is behind the red hat"]


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


def tiny_model(tiny_backbones: Path, seed: int = 0) -> DetrisForReferringSegmentation:
    model = DetrisForReferringSegmentation.from_backbones(
        str(tiny_backbones / "vision"),
        str(tiny_backbones / "text"),
        vision_adapter_layers=[1],
        vision_adapter_dim=16,
        text_adapter_layers=[0],
        text_adapter_dim=16,
        aligner_attention_dim=16,
        aligner_attention_heads=2,
        feature_layers=[0, 1],
        decoder_dim=32,
        decoder_layers=1,
        decoder_heads=2,
        decoder_ffn_dim=32,
        image_size=32,
        max_text_length=9,
    )
    return randomize(model, seed)


# --- Models and processors -------------------------------------------------------------------------------------------

PUSH = """
from transformers import CLIPTokenizer
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import DetrisProcessor

for training in ("short", "long"):
    model = DetrisForReferringSegmentation.from_pretrained(training)
    model.push_to_hub("someone/detris-tiny")
processor = DetrisProcessor.from_config(model.config, CLIPTokenizer.from_pretrained("tokenizer"))
processor.push_to_hub("someone/detris-tiny")
"""


@pytest.fixture(scope="module")
def pushed(tiny_backbones, tmp_path_factory):
    """`someone/detris-tiny` on `server`: a model, a later revision of it with other weights, and their processor."""
    folder = tmp_path_factory.mktemp("pushed")
    short, long = tiny_model(tiny_backbones, seed=0), tiny_model(tiny_backbones, seed=1)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_backbones / "text")
    processor = DetrisProcessor.from_config(short.config, tokenizer)
    for part, name in ((short, "short"), (long, "long"), (tokenizer, "tokenizer")):
        part.save_pretrained(folder / name)
    with HubServer() as server:
        run_client(PUSH, server, folder, isolated=False)
        _, after_short, *_ = server.revisions("someone/detris-tiny")
        yield SimpleNamespace(server=server, short=short, long=long, processor=processor, after_short=after_short)


LOAD = """
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained("someone/detris-tiny", trust_remote_code=True)
inputs = processor(images=np.load("../image.npy"), text=PHRASES, return_tensors="pt")
inputs.pop("original_sizes")
results = dict(inputs)
for name, revision in REVISIONS:
    model = AutoModel.from_pretrained("someone/detris-tiny", revision=revision, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.someone."), type(model).__module__
    with torch.no_grad():
        results[name] = model(**inputs).logits
save_file(results, "../results.safetensors")
"""


@pytest.mark.slow
def test_pushed_model_and_processor_load_elsewhere(pushed, tmp_path, one_thread):
    image = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    np.save(tmp_path / "image.npy", image)
    (tmp_path / "empty").mkdir()
    revisions = [("short", pushed.after_short), ("long", "main")]
    run_client(f"PHRASES = {PHRASES}\nREVISIONS = {revisions}\n{LOAD}", pushed.server, tmp_path / "empty")

    results = load_file(tmp_path / "results.safetensors")
    inputs = pushed.processor(images=image, text=PHRASES, return_tensors="pt")
    inputs.pop("original_sizes")
    for name, value in inputs.items():
        assert torch.equal(results.pop(name), value), name
    with torch.no_grad():
        expected = {name: getattr(pushed, name)(**inputs).logits for name, _ in revisions}
    assert results.keys() == expected.keys() and not torch.allclose(expected["short"], expected["long"])
    for name, logits in expected.items():
        assert torch.equal(results[name], logits), name


@pytest.mark.slow
def test_pushed_repository_holds_what_is_needed_and_nothing_else(pushed):
    files = pushed.server.files("someone/detris-tiny")
    of_the_model = {"config.json", "model.safetensors"}
    of_the_processor = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    of_the_hub = {".gitattributes", "README.md"}
    assert set(files) == {*CODE} | of_the_model | of_the_processor | of_the_hub
    for name in CODE:
        assert files[name] == (ROOT / name).read_bytes(), name


PUSH_INTO_A_CUT = """
from unittest import mock
import pytest
from modeling_detris import DetrisForReferringSegmentation

model = DetrisForReferringSegmentation.from_pretrained("trained")
with mock.patch("time.sleep"):  # the client tries five times more, and waits 23 seconds in between
    with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'"):
        model.push_to_hub("someone/detris-cut")
"""
PUSH_AGAIN = """
import torch
from transformers import AutoModel
from modeling_detris import DetrisForReferringSegmentation

model = DetrisForReferringSegmentation.from_pretrained("trained")
model.push_to_hub("someone/detris-cut")
weights = AutoModel.from_pretrained("someone/detris-cut", trust_remote_code=True).state_dict()
assert weights.keys() == model.state_dict().keys()
assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
"""


@pytest.mark.slow
def test_an_upload_that_is_cut_leaves_nothing_and_can_be_repeated(server, tiny_backbones, tmp_path):
    tiny_model(tiny_backbones).save_pretrained(tmp_path / "trained")
    server.fail_uploads_after = 0
    run_client(PUSH_INTO_A_CUT, server, tmp_path, isolated=False)
    assert [set(files) for files in server.revisions("someone/detris-cut").values()] == [{".gitattributes"}]
    server.fail_uploads_after = None
    run_client(PUSH_AGAIN, server, tmp_path, isolated=False)
    empty, complete = server.revisions("someone/detris-cut").values()
    assert {"config.json", "model.safetensors", "modeling_detris.py"} <= complete.keys() - empty.keys()


# --- What train_hf.py pushes -----------------------------------------------------------------------------------------

TRAIN_AND_PUSH = """
import sys
from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection
from train_hf import main

AutoModel.from_pretrained("vision").push_to_hub("someone/tiny-vision")
CLIPTextModelWithProjection.from_pretrained("text").push_to_hub("someone/tiny-text")
AutoTokenizer.from_pretrained("text").push_to_hub("someone/tiny-text")
for name, arguments in RUNS.items():
    main(ARGUMENTS + ["--output_dir", name, "--hub_model_id", f"someone/{name}", *arguments])
"""
LOAD_BOTH = """
import json
from pathlib import Path
import torch
from huggingface_hub import ModelCard, model_info
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)
logits = {}
for name in ("detris-whole", "detris-adapter"):
    processor = AutoProcessor.from_pretrained(f"someone/{name}", trust_remote_code=True)
    inputs = processor(images=torch.arange(3 * 20 * 30).reshape(3, 20, 30) % 256, text=PHRASES, return_tensors="pt")
    inputs.pop("original_sizes")
    model = AutoModel.from_pretrained(f"someone/{name}", trust_remote_code=True)
    with torch.no_grad():
        logits[name] = model(**inputs).logits
assert not torch.equal(logits["detris-whole"], logits["detris-adapter"])
base = AutoModel.from_pretrained("someone/detris-whole", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "someone/detris-adapter", adapter_name="other")
with torch.no_grad():
    logits["peft"] = model(**inputs).logits
save_file(logits | dict(inputs), "../results.safetensors")
"""


@pytest.fixture(scope="module")
def trained(tiny_backbones, tmp_path_factory):
    """A server with backbones, and with a whole DETRIS and adapters that train_hf.py has trained and pushed."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("vision", "text"):
        (folder / name).symlink_to(tiny_backbones / name)
    model_config = {"vision_adapter_layers": [1], "vision_adapter_dim": 16, "text_adapter_layers": [0]} | {
        "text_adapter_dim": 16,
        "aligner_attention_dim": 16,
        "feature_layers": [0, 1],
        "decoder_dim": 16,
        "decoder_layers": 1,
        "decoder_ffn_dim": 16,
    }
    arguments = ["--vision_backbone", "someone/tiny-vision", "--text_backbone", "someone/tiny-text"]
    arguments += ["--image_size", "32", "--max_text_length", "24", "--model_config", json.dumps(model_config)]
    arguments += ["--shapes_config", json.dumps({"sizes": {"train": 4, "val": 2}, "image_size": 48})]
    arguments += ["--do_train", "--do_predict", "--test_splits", "val", "--max_steps", "3", "--learning_rate", "1e-2"]
    arguments += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    arguments += [
        "--per_device_train_batch_size",
        "2",
        "--push_to_hub",
        "--disable_tqdm",
        "true",
        "--report_to",
        "none",
    ]
    runs = {
        "detris-whole": [],
        "detris-adapter": ["--save_adapter_only", "--peft_method", "detris+lora", "--seed", "1"],
    }
    with HubServer() as server:
        run_client(f"ARGUMENTS = {arguments}\nRUNS = {runs}\n{TRAIN_AND_PUSH}", server, folder, isolated=False)
        yield SimpleNamespace(server=server, folder=folder)


@pytest.mark.slow
def test_what_was_trained_and_pushed_loads_elsewhere(trained, tiny_backbones, tmp_path, one_thread):
    (tmp_path / "empty").mkdir()
    run_client(f"PHRASES = {PHRASES}\n{LOAD_BOTH}", trained.server, tmp_path / "empty")
    results = load_file(tmp_path / "results.safetensors")
    expected = {name: results.pop(name) for name in ("detris-whole", "detris-adapter", "peft")}
    backbones = {"vision_backbone": str(tiny_backbones / "vision"), "text_backbone": str(tiny_backbones / "text")}
    for name, folder, fields in (
        ("detris-whole", "detris-whole", {}),
        ("detris-adapter", "detris-adapter", backbones),
        ("peft", "detris-adapter", backbones),
    ):
        model = DetrisForReferringSegmentation.from_pretrained(trained.folder / folder, **fields)
        with torch.no_grad():
            assert torch.equal(model(**results).logits, expected[name]), name


@pytest.mark.slow
def test_pushed_adapters_name_their_backbones_and_bring_nothing_else(trained):
    files = trained.server.files("someone/detris-adapter")
    of_the_adapter = {"adapter_config.json", "adapter_model.safetensors", "config.json"}
    of_the_processor = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == {*CODE, ".gitattributes", "README.md"} | of_the_adapter | of_the_processor
    config, adapter_config = json.loads(files["config.json"]), json.loads(files["adapter_config.json"])
    assert (config["vision_backbone"], config["text_backbone"]) == ("someone/tiny-vision", "someone/tiny-text")
    last_commits = {name: list(trained.server.revisions(f"someone/tiny-{name}"))[-1] for name in ("vision", "text")}
    assert config["vision_backbone_revision"] == last_commits["vision"]
    assert config["text_backbone_revision"] == last_commits["text"]
    assert adapter_config["base_model_name_or_path"] == "someone/detris-adapter"
    assert len(adapter_config["backbone_digest"]) == 64
    assert len(files["adapter_model.safetensors"]) < len(
        trained.server.files("someone/detris-whole")["model.safetensors"]
    )


@pytest.mark.parametrize("name", ["detris-whole", "detris-adapter"])
def test_pushed_card_tells_data_metrics_licence_and_citation(trained, name):
    card = ModelCard(trained.server.files(f"someone/{name}")["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag, card.data.trained_on) == (
        "mit",
        "image-segmentation",
        ["shapes"],
    )
    assert card.data.datasets is None  # the synthetic set is not the Hub's
    assert card.data.base_model == ["someone/tiny-text", "someone/tiny-vision"] and card.data.widget[0]["text"]
    assert card.data.base_model_relation == ("adapter" if name == "detris-adapter" else "finetune")
    figures = json.loads((trained.folder / name / "val_results.json").read_text())
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"mean_iou", "overall_iou", *(f"precision@0.{x}" for x in range(5, 10))}
    for metric, result in results.items():
        assert (result.dataset_name, result.dataset_split) == ("shapes", "val")
        assert result.metric_value == pytest.approx(figures[f"val_{metric}"], abs=1e-4)
    assert "huang2025detris" in card.text and f'from_pretrained("someone/{name}"' in card.text
    assert ("rank 8" in card.text) == (name == "detris-adapter")


# --- Data sets -------------------------------------------------------------------------------------------------------

PUSH_ROWS = """
import datasets
import data.refer

splits = datasets.load_from_disk("splits")
splits.push_to_hub("someone/shapes")
plain = {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")}
splits.cast_column("mask", plain).push_to_hub("someone/shapes-plain")
"""
LOAD_ROWS = """
import datasets

datasets.load_dataset("someone/shapes-plain").save_to_disk("../plain")
import data.refer  # from here on, the masks' own type is known
datasets.load_dataset("someone/shapes").save_to_disk("../loaded")
"""


@pytest.mark.slow
def test_pushed_rows_come_back(server, tmp_path):
    splits = load_shapes(seed=3, sizes={"train": 3, "val": 2, "testA": 1, "testB": 1, "unseen": 1}, image_size=48)
    splits.save_to_disk(tmp_path / "splits")
    run_client(PUSH_ROWS, server, tmp_path, isolated=False)
    (tmp_path / "empty").mkdir()
    run_client(LOAD_ROWS, server, tmp_path / "empty", isolated=False)
    loaded, plain = (datasets.load_from_disk(tmp_path / name) for name in ("loaded", "plain"))
    assert list(loaded) == list(plain) == list(splits)
    for split, rows in splits.items():
        same_rows(loaded[split], rows)
        same_rows(plain[split].cast_column("mask", RleMask()), rows)


PREPARE_ROWS = """
from data import prepare

arguments = ["refer", "refer", "--name", "refcoco/unc", "--output", "out", "--num_proc", "1"]
prepare.main([*arguments, "--push_to_hub", "someone/mine"])
"""
STREAM_ROWS = """
import io
import json

import datasets
import numpy as np
from data.decoding import read_image, read_whole_mask
from data.streaming import StreamedBatches
from train_hf import DataArguments, load_rows

datasets.disable_progress_bars()
_, streamed, eval_rows, _ = load_rows(DataArguments(dataset="someone/mine", streaming=True), True, True, False)
_, rows, _, _ = load_rows(DataArguments(dataset="someone/mine"), True, False, False)
expected = {row["ref_id"]: row for row in rows}
(batch,) = StreamedBatches(streamed, len(streamed), 0, 1, 1, 0)
for row in batch:
    assert np.array_equal(read_whole_mask(row), read_whole_mask(expected[row["ref_id"]]))
    assert np.array_equal(read_image(row), read_image(expected[row["ref_id"]]))
print(json.dumps([sorted(row["ref_id"] for row in batch), eval_rows["ref_id"][:]]))
"""


@pytest.mark.slow
def test_prepared_rows_are_pushed_and_streamed_back(server, tmp_path):
    refer = ReferFolder(tmp_path / "refer")
    refer.write()
    run_client(PREPARE_ROWS, server, tmp_path, isolated=False)
    shutil.rmtree(refer.root)  # the images have been pushed with the rows
    streamed = json.loads(run_client(STREAM_ROWS, server, tmp_path, isolated=False).splitlines()[-1])
    of_split = {split: [ref["ref_id"] for ref in refer.refs if ref["split"] == split] for split in ("train", "val")}
    assert streamed == list(of_split.values())


# --- The server itself -----------------------------------------------------------------------------------------------


def request(address: str, method: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Send a request without `huggingface_hub`; return the status and the content of the answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers, method=method)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_commit_needs_its_large_files(server):
    content = b"weights"
    oid = hashlib.sha256(content).hexdigest()
    lines = [("header", {"summary": "half"}), ("lfsFile", {"path": "a.safetensors", "oid": oid, "size": len(content)})]
    commit = "\n".join(json.dumps({"key": key, "value": value}) for key, value in lines).encode()
    request(f"{server.endpoint}/api/repos/create", "POST", b'{"name": "half", "organization": "someone"}')

    def send_commit() -> int:
        return request(f"{server.endpoint}/api/models/someone/half/commit/main", "POST", commit)[0]

    assert send_commit() == 400
    assert request(f"{server.endpoint}/objects/{oid}", "PUT", content[:-1])[0] == 400
    assert send_commit() == 400 and list(server.files("someone/half")) == [".gitattributes"]
    assert request(f"{server.endpoint}/objects/{oid}", "PUT", content)[0] == 200
    assert send_commit() == 200 and server.files("someone/half")["a.safetensors"] == content
    part = request(f"{server.endpoint}/someone/half/resolve/main/a.safetensors", "GET", Range="bytes=2-4")
    assert part == (206, content[2:5])


ASK = """
import pathlib
import huggingface_hub as hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

def download(repository, file, revision=None):
    return pathlib.Path(hub.hf_hub_download(repository, file, revision=revision)).read_text()

assert hub.whoami()["name"] == "someone"
hub.create_repo("someone/notes")
with pytest.raises(HfHubHTTPError, match="409"):
    hub.create_repo("someone/notes")
first, second = (
    hub.upload_file(repo_id="someone/notes", path_in_repo="a/note.txt", path_or_fileobj=text).oid
    for text in (b"first", b"second")
)
hub.delete_file("a/note.txt", "someone/notes")
assert hub.list_repo_files("someone/notes") == [".gitattributes"]
assert hub.list_repo_files("someone/notes", revision=first) == [".gitattributes", "a/note.txt"]
assert download("someone/notes", "a/note.txt", first) == "first"
assert download("someone/notes", "a/note.txt", second) == "second"
with pytest.raises(EntryNotFoundError):
    download("someone/notes", "a/note.txt")
with pytest.raises(RevisionNotFoundError):
    download("someone/notes", "a/note.txt", "0" * 40)
for ask in (hub.model_info, hub.list_repo_files, lambda name: download(name, "note.txt")):
    with pytest.raises(RepositoryNotFoundError):
        ask("someone/nothing")
"""


def test_the_client_finds_every_revision_and_nothing_unknown(server, tmp_path):
    run_client(ASK, server, tmp_path)
    assert [len(files) for files in server.revisions("someone/notes").values()] == [1, 2, 2, 1]
