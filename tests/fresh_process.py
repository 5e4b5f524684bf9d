"""Load a saved model by the auto classes and remote code in a process that cannot import this repository."""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def outputs_elsewhere(folder: Path, inputs: dict[str, torch.Tensor], scratch: Path) -> dict[str, torch.Tensor]:
    """What the model saved in `folder` gives for `inputs` in a process of its own that runs in another folder."""
    from tests.processes import fork

    (scratch / "elsewhere").mkdir()
    torch.save(inputs, scratch / "inputs.pt")
    done = fork(save_outputs, folder, scratch)
    assert done.returncode == 0, done.stderr
    return torch.load(scratch / "outputs.pt")


def save_outputs(folder: Path, scratch: Path) -> None:
    """Write the model's outputs for `inputs.pt`; the processor must read boxes from them where there are some."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

    os.chdir(scratch / "elsewhere")
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "tests")]
    for auto in (AutoConfig, AutoImageProcessor):
        auto.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**torch.load(scratch / "inputs.pt"))
    if "pred_boxes" in outputs:
        processor.post_process_referring_detection(outputs)
    assert not {"modeling", "grefcoco_modeling", "grefcoco", "train"} & set(sys.modules), "this is not elsewhere"
    torch.save(dict(outputs), scratch / "outputs.pt")
