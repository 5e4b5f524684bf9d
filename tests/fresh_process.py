"""Loads a saved model by the auto classes and remote code in a process of its own, which knows nothing of this one."""

import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
folder, inputs, outputs = sys.argv[1:]
for auto in (AutoConfig, AutoImageProcessor, AutoProcessor):
    auto.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save(dict(model(**torch.load(inputs))), outputs)
"""


def outputs_elsewhere(folder: Path, inputs: dict[str, torch.Tensor], scratch: Path) -> dict[str, torch.Tensor]:
    """What the model saved in `folder` gives for `inputs` in a fresh process that runs in another folder."""
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir()
    torch.save(inputs, scratch / "inputs.pt")
    arguments = [str(x) for x in (folder, scratch / "inputs.pt", scratch / "outputs.pt")]
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=elsewhere, check=True)
    return torch.load(scratch / "outputs.pt")
