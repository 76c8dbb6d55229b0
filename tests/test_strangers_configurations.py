"""Hostile configurations: each is refused with one sentence, or gives a model that runs, in little memory."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.warm_python import warm_python

ROOT = Path(__file__).parents[1]
EXAMPLES = 200  # of each kind
SECONDS, MEMORY = 5, 2**30  # seconds for each example; bytes for all together
UNREADABLE = 128  # a model for images with a longer side is built, but not run
NUMBERS = [0, 1, 2, 3, 7, 48, 64, -1, 2**23, 2**31, 10**5, 10**6, 10**12, 10**30, -(10**9), 0.5, 1e308, -0.1]
DEEP = []
for _ in range(400):
    DEEP = [DEEP]
OTHERS = [
    *(float("nan"), float("inf"), True, False, None, "", "x" * 2000, "../../etc/passwd", "detris", "lora", "none"),
    *("eager", "sdpa", "flash_attention_2", "someone/kernel", "float16", "int8", "bert", "relu", "gelu", "clip"),
    *([], {}, [0], [0, 1], [10**9], list(range(3000)), {"a": {"b": [1]}}, {"quant_method": "bitsandbytes"}, DEEP),
]
UNKNOWN = (
    "num_labels id2label quantization_config attn_implementation _attn_implementation auto_map dtype torch_dtype "
    "to_dict grid_size check_fields _commit_hash architectures gradient_checkpointing pruned_heads output_attentions "
    "return_dict use_return_dict is_encoder_decoder chunk_size_feed_forward tp_plan fusion_config problem_type foo "
    "modules_to_save target_modules inference_mode auto_mapping base_model_name_or_path revision task_type peft_type"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "config.json of adapters"])
def test_configurations_are_refused_by_one_sentence_or_give_a_model_that_runs(file, tmp_path):
    # In another process, because it limits its own memory.
    run = subprocess.run(
        [warm_python(), __file__, file, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-6000:]
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert sum(outcomes.values()) >= EXAMPLES
    assert min(outcomes["refused"], outcomes["runs"]) > EXAMPLES // 20  # both happen often enough to be tested


def try_configurations(file: str, folder: Path) -> None:
    """Load a saved model with its configuration changed in many ways; print how many were refused and how many ran."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from helpers.models import BACKBONE_FIELDS, save_backbones, small_config, small_inputs, small_model
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from transformers.utils import logging

    from modeling_detris import DetrisForReferringSegmentation

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    fields = {"peft_method": "detris+lora", "lora_rank": 2, "feature_layers": [0]}
    fields |= {"vision_adapter_layers": [1], "text_adapter_layers": [0]}
    saved = folder / "saved"
    # As few layers as there can be, because hundreds of models are built.
    config = small_config(vision={"num_hidden_layers": 2}, **fields)
    config.text_config.num_hidden_layers = 1
    if file == "config.json":
        small_model(config).save_pretrained(saved)
    else:
        save_backbones(folder, config=config)
        backbones = str(folder / "vision"), str(folder / "text")
        DetrisForReferringSegmentation.from_backbones(*backbones, **BACKBONE_FIELDS | fields).save_adapter(saved)
    path = saved / file.split()[0]
    original = json.loads(path.read_text())
    DetrisForReferringSegmentation.from_pretrained(saved)(**small_inputs())

    places = [()] + [(name,) for name in ("vision_config", "text_config") if name in original]

    def keys(place: tuple[str, ...]) -> list[tuple[str, ...]]:
        values = original
        for key in place:
            values = values[key]
        return [(*place, key) for key in (*values, *UNKNOWN)]

    strangers = st.one_of(
        st.sampled_from(NUMBERS),
        st.sampled_from(OTHERS),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
            max_leaves=6,
        ),
    )
    changes = st.lists(
        st.tuples(st.sampled_from([key for place in places for key in keys(place)]), strangers),
        min_size=1,
        max_size=3,
    )
    outcomes = {"refused": 0, "runs": 0}

    @settings(
        max_examples=EXAMPLES,
        deadline=1000 * SECONDS,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(changes)
    def attempt(changes) -> None:
        changed = json.loads(json.dumps(original))
        for key, value in changes:
            values = changed
            for part in key[:-1]:
                values = values.get(part) if isinstance(values.get(part), dict) else {}
            values[key[-1]] = value
        path.write_text(json.dumps(changed))
        try:
            model = DetrisForReferringSegmentation.from_pretrained(saved)
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 3000, repr(str(error))
            outcomes["refused"] += 1
            return
        config = model.config
        if config.image_size <= UNREADABLE:
            inputs = small_inputs(size=config.image_size)
            inputs["input_ids"] = inputs["input_ids"][:, : config.max_text_length].clamp(
                max=config.text_config.vocab_size - 1
            )
            if config.output_attentions:  # only this attention returns its weights, as the model says otherwise
                model.set_attn_implementation("eager")
            logits = model(**inputs)[0]
            assert logits.shape == (2, 4 * config.grid_size, 4 * config.grid_size)
        outcomes["runs"] += 1

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    attempt()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        try_configurations(sys.argv[1], Path(scratch))
