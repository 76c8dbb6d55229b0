"""What several test files need: no network, and CLIP tokenizers without it."""

import gzip
import importlib.metadata
import os
import shutil

import pytest
from helpers.pictures import SIDE
from helpers.runs import MODEL_CONFIG, SIZES
from helpers.tokenizers import build_clip_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"  # before a test imports any Hugging Face library, so transformers comes late below


@pytest.fixture(scope="session")
def clip_tokenizer():
    """The tokenizer of every CLIP model, from the merges that `open-clip-torch` (requirements-dev.txt) ships."""
    files = importlib.metadata.files("open-clip-torch")
    (vocabulary,) = [file for file in files if file.name == "bpe_simple_vocab_16e6.txt.gz"]
    lines = gzip.decompress(vocabulary.read_binary()).decode().split("\n")
    return build_clip_tokenizer([tuple(line.split()) for line in lines[1:48895]])


@pytest.fixture
def tiny_tokenizer():
    """A CLIP tokenizer of 517 symbols: bytes, three merges (512 … 514), start (515) and end (516)."""
    return build_clip_tokenizer([("a", "t</w>"), ("c", "at</w>"), ("d", "o")])


@pytest.fixture
def image_processor():
    """It warps images to squares of `SIDE` pixels."""
    from processing_detris import DetrisImageProcessor

    return DetrisImageProcessor(size={"height": SIDE, "width": SIDE})


@pytest.fixture
def processor(image_processor, tiny_tokenizer):
    """It knows the tiny tokenizer's symbols alone, and keeps 17 tokens of a phrase."""
    from processing_detris import DetrisProcessor

    return DetrisProcessor(image_processor, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_backbones(tmp_path_factory):
    """Folder with `vision` and `text`: random two-layer backbones, saved as Hugging Face saves them."""
    import torch
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    folder = tmp_path_factory.mktemp("backbones")
    tokenizer = build_clip_tokenizer([("e", "d</w>"), ("t", "h"), ("th", "e</w>")])
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    vision = Dinov2WithRegistersConfig(**size, mlp_ratio=2, image_size=40, patch_size=8, num_register_tokens=2)
    Dinov2WithRegistersModel(vision).save_pretrained(folder / "vision")
    text = CLIPTextConfig(
        **size,
        vocab_size=len(tokenizer),
        intermediate_size=64,
        projection_dim=32,
        max_position_embeddings=40,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return folder


@pytest.fixture
def refer(tmp_path):
    """A REFER folder in two parts: `refs` and `instances` to change, `load` to write them out and read them back."""
    from helpers.refer_folder import ReferFolder

    return ReferFolder(tmp_path / "refer")


@pytest.fixture(scope="module")
def official():
    """The checkpoint of the tiny official model: its tensors by their official names."""
    from helpers.models import official_figures, official_weights

    return official_weights(official_figures()[0]["shapes"])


@pytest.fixture(scope="module")
def converted(official):
    """The same checkpoint by our names."""
    from helpers.models import official_config

    from convert_detris_checkpoint import convert_state_dict

    return convert_state_dict(official, official_config())


@pytest.fixture
def in_time():
    """Whatever takes over ten seconds fails, also what waits for a pipe."""
    from helpers.refer_folder import not_waiting

    with not_waiting():
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Small products are slower on several threads, most of all when something else keeps the processor busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def gradio_folder(tmp_path_factory):
    """Where Gradio keeps what pages show; otherwise that stays in the machine's temporary folder."""
    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def model_arguments(tiny_backbones):
    return {
        "vision_backbone": str(tiny_backbones / "vision"),
        "text_backbone": str(tiny_backbones / "text"),
        "image_size": 32,
        "max_text_length": 24,
    }


@pytest.fixture(scope="session")
def config(model_arguments):
    """What an argument file for the tiny model holds."""
    return model_arguments | {
        "model_config": MODEL_CONFIG,
        "shapes_config": {"sizes": SIZES, "image_size": 48},
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "disable_tqdm": True,
        "report_to": "none",
    }


@pytest.fixture
def config_file(config, tmp_path):
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"output_dir": str(tmp_path / "run")}))
    return str(path)


@pytest.fixture(scope="session")
def shapes():
    import datasets

    from data.shapes import load_shapes

    splits = load_shapes(sizes=SIZES, image_size=48)
    return splits.cast_column("image", datasets.Image(decode=False))


@pytest.fixture
def make_trainer(model_arguments, shapes, tmp_path):
    """Builds a trainer over the first `rows` objects of train, or over those given; further arguments go to
    DetrisTrainingArguments."""
    import torch

    from train_hf import build_model
    from training.arguments import DetrisTrainingArguments, ModelArguments
    from training.trainer import DetrisTrainer

    def make(rows=20, model_config: dict | None = None, **arguments) -> DetrisTrainer:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "do_train": True,
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "report_to": "none",
        }
        args = DetrisTrainingArguments(**defaults | arguments)
        torch.manual_seed(args.seed)
        model, processor = build_model(
            ModelArguments(**model_arguments, model_config=MODEL_CONFIG | (model_config or {}))
        )
        train_rows = shapes["train"].take(rows) if isinstance(rows, int) else rows
        return DetrisTrainer(model, args, processor, train_rows, shapes["val"])

    return make


@pytest.fixture
def generalized(shapes):
    """The shapes with every other object's mask emptied, as of phrases that name nothing."""
    import datasets
    import numpy as np

    def empty(row: dict, index: int) -> dict:
        return {"mask": np.zeros_like(row["mask"]) if index % 2 else row["mask"]}

    return datasets.DatasetDict(
        {
            split: rows.map(empty, with_indices=True, features=rows.features, load_from_cache_file=False)
            for split, rows in shapes.items()
            if len(rows)
        }
    )


@pytest.fixture
def two_sets(shapes, monkeypatch):
    """Makes two data sets over the images a … f of the synthetic set, and gives their names as they are read."""
    import datasets

    rows = shapes["train"].map(
        lambda row: {"image": row["image"] | {"path": f"COCO_train2014_{row['image_id']:012d}.jpg"}}
    )
    numbers = dict(zip(dict.fromkeys(rows["image_id"]), "abcdef"))
    images = {
        letter: [index for index, image_id in enumerate(rows["image_id"]) if numbers.get(image_id) == letter]
        for letter in "abcdef"
    }
    sets = {
        ("refcoco+", "unc"): {"train": "abcd", "val": "e"},
        ("refcocog", "umd"): {"train": "cdef", "val": "a", "test": "b"},
    }
    read = []

    def load_refer(root: str, *name: str | None) -> datasets.DatasetDict:
        read.append(name[0])
        return datasets.DatasetDict(
            {split: rows.select(sum(map(images.get, letters), [])) for split, letters in sets[name[:2]].items()}
        )

    monkeypatch.setattr("data.opening.load_refer", load_refer)
    monkeypatch.setattr("data.opening.load_shapes", None)  # is not to be drawn in vain
    return rows, images, read


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with a training split of 38 rows in three files, images inside, and three rows of val."""
    from helpers.refer_folder import ReferFolder

    from data import prepare
    from data.sources import open_records

    folder = tmp_path_factory.mktemp("prepared")
    refer = ReferFolder(folder / "refer")
    refer.refs = [
        {**ref, "ref_id": number, "split": "val" if number % 14 == 2 else "train"}
        for number, ref in enumerate(refer.refs * 6)
    ]
    refer.refs = [ref for ref in refer.refs if ref["ref_id"] < 41]
    refer.write()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "ROWS_PER_FILE_OF_IMAGES", 15)
        prepare.prepare(
            open_records("refer", refer.root, "refcoco/unc"), folder / "out", num_proc=1, embed_images=True
        )
    shutil.rmtree(refer.root)
    return folder / "out"


@pytest.fixture(scope="session")
def segment_model(tmp_path_factory):
    from helpers.segmenting import save_segment_model

    folder = tmp_path_factory.mktemp("segment_model")
    save_segment_model(folder)
    return folder


@pytest.fixture(scope="session")
def segment_pipe(segment_model):
    from load_detris import load_pipeline

    return load_pipeline(str(segment_model), device="cpu")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_segment(segment_model, segment_pipe, place, monkeypatch):
    """Runs segment.py with a model that is loaded already, and returns its exit status."""
    import segment

    monkeypatch.setattr(segment, "load_pipeline", lambda *_: segment_pipe)
    return lambda *arguments: segment.main([*map(str, arguments), "--model", str(segment_model)])


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """The folder in which `datasets` keeps what it reads; it is empty."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def table_reads(tmp_path, monkeypatch):
    """Gives the indices of the records of tables that any process has read since it was last called."""
    from helpers.prepared import reads_of

    from data.tables import TableRecords

    yield from reads_of(TableRecords, tmp_path / "reads", monkeypatch)
