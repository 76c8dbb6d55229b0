"""Processors saved and loaded: what a file may say, what `datasets` recognises, what loads without the repository."""

import json
import math
import os
import pickle
import re
import resource
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from helpers.pictures import SIDE, picture
from helpers.tokenizers import build_clip_tokenizer
from helpers.warm_python import warm_python
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from configuration_detris import MAX_IMAGE_SIZE
from processing_detris import DetrisImageProcessor, DetrisProcessor


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"size": MAX_IMAGE_SIZE + 1}, "size is 4097, .* at most 4,096"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": {"height": 10**9, "width": 10**9}}, "size is {'height': 1000000000"),
        ({"size": -56}, "size is -56"),
        ({"size": True}, "size is True"),
        ({"size": "56"}, "size is '56'"),
        ({"size": [56, 56]}, r"size is \[56, 56\]"),
        ({"size": {"height": 56, "width": 56, "shortest_edge": 7}}, "size is {'height'"),
        ({"size": math.nan}, "size is nan"),
        *(
            ({name: values}, f"{name} is .*give three numbers")
            for name in ("image_mean", "image_std")
            for values in (
                [],
                [0.5],
                [0.5] * 4,
                0.5,
                [0.5, math.nan, 0.5],
                [0.5, -0.1, 0.5],
                [0.5, 1.5, 0.5],
                ["a"] * 3,
            )
        ),
        ({"image_mean": [0.5, math.inf, 0.5]}, "image_mean is"),
        ({"image_mean": [True] * 3}, "image_mean is"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is .*from 0.00392 to 1"),
        ({"image_std": [0.5, 1e-40, 0.5]}, "image_std is"),
    ],
)
def test_numbers_that_are_none_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DetrisImageProcessor(**fields)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        DetrisImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        *(
            ({"mask_threshold": value}, "mask_threshold is")
            for value in (-1, 2, math.nan, math.inf, "0.35", None, True)
        ),
        *(
            ({"max_text_length": value}, "max_text_length is")
            for value in (0, -1, 1025, 10**9, 17.0, "17", None, True)
        ),
    ],
)
def test_fields_that_cannot_be_are_refused_when_made_and_when_loaded(processor, fields, message, tmp_path):
    parts = processor.image_processor, processor.tokenizer
    with pytest.raises(ValueError, match=message):
        DetrisProcessor(*parts, **fields)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)


def test_use_leaves_no_trace_in_fingerprints(processor, tmp_path):
    """`datasets` maps a set anew if the fingerprint of what is mapped changes."""

    rows = datasets.Dataset.from_dict({"text": ["a cat", "cat " * 50]})

    def prints():
        functions = processor, processor.__call__, processor.post_process_referring_segmentation
        mapped = rows.map(lambda row: {"input_ids": processor(text=row["text"]).input_ids[0]})
        return [mapped._fingerprint, *(Hasher.hash(function) for function in functions)]

    before = prints()
    copied = pickle.dumps(processor)
    processor(images=picture(), text="cat " * 50, segmentation_maps=np.ones((30, 44)))  # and warns that it cuts
    processor.tokenizer("cat " * 50, padding="max_length", truncation=True, max_length=9)
    processor.tokenizer.pad({"input_ids": [[1, 2], [3]]})
    processor.batch_decode([[64]])
    logits = SimpleNamespace(logits=torch.zeros(1, 8, 8))
    processor.post_process_referring_segmentation(logits, [(30, 44)])
    assert prints() == before
    processor.save_pretrained(tmp_path / "saved")
    assert prints() == before
    loaded = [AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True) for _ in range(2)]
    assert Hasher.hash(loaded[0]) == Hasher.hash(loaded[1])
    loaded[0].save_pretrained(tmp_path / "again")
    assert Hasher.hash(loaded[0]) == Hasher.hash(loaded[1])

    other = pickle.loads(copied)
    expected = processor(images=picture(), text="a cat")
    for name, values in other(images=picture(), text="a cat").items():
        np.testing.assert_array_equal(values, expected[name])
    other.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other/processor_config.json").read_text() == (
        tmp_path / "saved/processor_config.json"
    ).read_text()


@pytest.mark.parametrize("change", [{"mask_threshold": 0.5}, {"max_text_length": 9}, {"image_mean": [0.5, 0.5, 0.5]}])
def test_what_changes_results_changes_the_fingerprint(processor, change):
    before = Hasher.hash(processor.__call__)
    for name, value in change.items():
        setattr(processor.image_processor if name.startswith("image") else processor, name, value)
    assert Hasher.hash(processor.__call__) != before


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**10), 10**10)
    | st.sampled_from([0, -1, 1, 17, 56, 10**9, 2**63, -(2**31)])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["56", "x" * 10**5, "../../etc", "__class__"]),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=8), part, max_size=3),
    max_leaves=6,
)
SIZES = ODD | st.fixed_dictionaries({"height": ODD, "width": ODD}) | st.integers(1, 300)
SOUND = {"size": {"height": SIDE, "width": SIDE}, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
KEYS = st.sampled_from(
    [
        "do_resize",
        "preprocess",
        "_letterbox_segmentation_maps",
        "_fixed_arguments",
        "save_pretrained",
        "to_dict",
        "auto_map",
        "__class__",
    ]
)
IMAGE_FIELDS = st.fixed_dictionaries(
    {},
    optional={"size": SIZES, "image_mean": ODD | st.lists(st.floats(0, 1), min_size=3, max_size=3), "image_std": ODD},
)
FIELDS = st.fixed_dictionaries({}, optional={"max_text_length": ODD, "mask_threshold": ODD, "tokenizer": ODD})
DEEP = "[" * 10**5
TINY_TOKENIZER = build_clip_tokenizer([("d", "o")])


@contextmanager
def a_gibibyte():
    """Fail if the code inside makes this process's highest use of memory grow by a gibibyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@settings(max_examples=300, deadline=5000, database=None, derandomize=True)
@given(
    IMAGE_FIELDS.map(lambda fields: SOUND | fields) | ODD,
    st.dictionaries(KEYS | st.text(max_size=8), ODD, max_size=1),
    FIELDS | ODD,
    st.sampled_from(["preprocessor_config.json", "processor_config.json"]),
)
def test_hostile_files_give_one_sentence_or_a_processor_that_works(tmp_path_factory, images, more, own, file):
    folder = tmp_path_factory.mktemp("hostile")
    images = images | more if isinstance(images, dict) else images
    own = own if file == "processor_config.json" else {}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(own))
    if file == "processor_config.json" and isinstance(own, dict):
        (folder / file).write_text(json.dumps(own | {"image_processor": images}))
    with a_gibibyte():
        assert_refused_or_works(folder)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "content", ["", "{", DEEP, '{"size": ' + DEEP, "\xff", '{"size": ' + "9" * 10**5 + "}", "null"]
)
def test_files_that_are_no_json_give_one_sentence(tmp_path, file, content):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / file).write_bytes(content.encode("latin1"))
    with a_gibibyte(), pytest.raises((ValueError, TypeError, OSError)) as error:
        load_both(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("content", ["[1]", '{"size"', "null"])
def test_a_broken_configuration_is_named_with_its_cause_and_a_remedy(tmp_path, content):
    for file, read in (
        ("preprocessor_config.json", DetrisImageProcessor.get_image_processor_dict),
        ("processor_config.json", DetrisProcessor.get_processor_dict),
    ):
        (tmp_path / file).write_text(content)
        with pytest.raises((ValueError, OSError), match=rf"{tmp_path}.*") as error:
            read(tmp_path)
        if type(error.value) is ValueError:
            assert re.fullmatch(r"The processor's .* no JSON object of fields \(.+\): save or d.*", str(error.value))


def load_both(folder):
    image_processor = DetrisImageProcessor.from_pretrained(folder)
    fields, _ = DetrisProcessor.get_processor_dict(folder)
    return DetrisProcessor.from_args_and_dict([image_processor, TINY_TOKENIZER], fields)


def assert_refused_or_works(folder):
    try:
        processor = load_both(folder)
    except (ValueError, TypeError, OSError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)[:2000]
        return
    out = processor(images=picture(), text="cat", segmentation_maps=np.ones((30, 44)), return_tensors="pt")
    side = processor.image_processor.size["height"]
    assert out.pixel_values.shape == (1, 3, side, side) and out.pixel_values.isfinite().all()
    (mask,) = processor.post_process_referring_segmentation(SimpleNamespace(logits=torch.ones(1, 8, 8)), [(30, 44)])
    assert mask.shape == (30, 44)
    processor.to_json_string()


@pytest.mark.slow
def test_saved_folder_loads_without_the_repository(processor, tmp_path):
    processor.max_text_length, processor.mask_threshold = 9, 0.4
    processor.save_pretrained(tmp_path / "saved")
    np.save(tmp_path / "image.npy", picture())
    script = """
import sys
import numpy as np
from transformers import AutoImageProcessor, AutoProcessor

image, texts = np.load("../image.npy"), ["cat", "a dog"]
processor = AutoProcessor.from_pretrained("../saved", trust_remote_code=True)
processor.save_pretrained("../again")
again = AutoProcessor.from_pretrained("../again", trust_remote_code=True)
for folder, loaded in (("../saved", processor), ("../again", again)):
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
    out = loaded(images=image, text=texts)
    alone = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert np.array_equal(alone(image).pixel_values, out.pixel_values)
    np.savez(f"{folder}.npz", threshold=loaded.mask_threshold, **out)
alone.save_pretrained("../images_only")
AutoImageProcessor.from_pretrained("../images_only", trust_remote_code=True)
"""
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run(
        [warm_python(), "-I", "-c", script], cwd=tmp_path / "empty", env=environment, check=True, timeout=300
    )
    expected = processor(images=picture(), text=["cat", "a dog"])
    assert expected.input_ids.shape == (2, 9)
    for file in ("saved.npz", "again.npz"):
        loaded = np.load(tmp_path / file)
        assert set(loaded) == {*expected, "threshold"} and loaded["threshold"] == 0.4
        for key, value in expected.items():
            np.testing.assert_array_equal(loaded[key], value)
