"""Code that runs where this repository is not to be seen."""

import os
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.warm_python import warm_python


def run_elsewhere(code: str, folder: Path, *arguments: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Run Python code in `folder`, in a process that cannot import this repository's modules.

    Args:
        code: finds `inputs` in `inputs.safetensors`, and writes its results into `results.safetensors`.
        arguments: what the code finds in `sys.argv`.

    Returns:
        The results.
    """
    folder.mkdir(exist_ok=True)
    save_file(inputs, folder / "inputs.safetensors")
    subprocess.run(
        [warm_python(), "-I", "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
        check=True,
    )
    return load_file(folder / "results.safetensors")
