"""The files of this project that are uploaded with a model: each imports only files that stand above it."""

MODEL_CODE = [
    "configuration_detris.py",
    "adapters_detris.py",
    "adapter_layers_detris.py",
    "untrusted_pickles.py",
    "checkpoint_files.py",
    "official_layout.py",
    "peft_detris.py",
    "backbones_detris.py",
    "switching_detris.py",
    "pipeline_detris.py",
    "handler.py",
    "repository_files.py",
    "saving_detris.py",
    "sharing_detris.py",
    "gradient_checkpointing_detris.py",
    "input_checks_detris.py",
    "recording_detris.py",
    "modeling_detris.py",
]
# Those of the processor, and files that it shares with the model.
PROCESSOR_CODE = ["letterbox_detris.py", "images_detris.py", "processing_detris.py"]
