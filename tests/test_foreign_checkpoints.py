"""Checkpoints of strangers: their code runs only with consent, and damaged settings allocate nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from modeling.configuration_rela import RelaConfig
from modeling.modeling_mdetr import MdetrModel
from modeling.modeling_rela import RelaModel
from modeling.modeling_vlt import VltModel
from tests import tiny_mdetr, tiny_rela, tiny_vlt
from training.families import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CANARY = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
raise SystemExit("the checkpoint's code ran")
"""


def save(family: str, folder: Path) -> PreTrainedModel:
    """Save a tiny model and its processor to `folder`."""
    torch.manual_seed(0)
    if family == "rela":
        model, processor = RelaModel(tiny_rela.tiny_config()), tiny_rela.tiny_processor()
    elif family == "mdetr":
        model, processor = MdetrModel(tiny_mdetr.tiny_config()), tiny_mdetr.tiny_processor()
    else:
        folder.mkdir(exist_ok=True)
        model, processor = VltModel(tiny_vlt.tiny_config()), tiny_vlt.tiny_processor(folder.parent)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", ["rela", "mdetr", "vlt"])
def test_code_in_a_checkpoint_does_not_run_without_consent(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save(family, folder)
    for path in folder.glob("*.py"):
        path.write_text(CANARY.replace("__file__", repr(str(folder / "x"))))
    loaded, processor = load_checkpoint(str(folder))
    assert type(loaded) is type(model) and type(processor).__module__.startswith("modeling.")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_a_foreign_auto_map_is_not_followed(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save("rela", folder)
    (folder / "canary.py").write_text(CANARY.replace("__file__", repr(str(folder / "x"))))
    classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")
    auto_map = dict.fromkeys(classes, "canary.Canary") | {"AutoTokenizer": ["canary.Canary", "canary.Canary"]}
    edit(folder / name, auto_map=auto_map)
    load_checkpoint(str(folder))
    assert not (folder / "ran").exists()


def test_a_tokenizer_of_its_own_needs_consent(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save("rela", folder)
    (folder / "canary.py").write_text(CANARY.replace("__file__", repr(str(folder / "x"))))
    auto_map = {"AutoTokenizer": ["canary.Canary", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="Canary", auto_map=auto_map)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_checkpoint(str(folder))
    assert not (folder / "ran").exists()
    with pytest.raises(SystemExit, match="code ran"):
        load_checkpoint(str(folder), trust_remote_code=True)
    assert (folder / "ran").exists(), "with consent it runs"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"hidden_size": 10**9}, "hidden_size=1000000000 in RelaConfig: choose 0 to 32768"),
        ({"depths": [1, 1, 1, 10**9]}, "depths=1000000000"),
        ({"depths": 2}, "depths=2"),
        ({"num_queries": -9}, "num_queries=-9"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 in RelaConfig: choose 1"),
        ({"hidden_size": "many"}, "hidden_size='many'"),
        ({"hidden_size": 1e30}, "hidden_size=1e[+]30"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000"),
        ({"text_config": {"vocab_size": 10**12}}, "vocab_size=1000000000000"),
        ({"text_config": 7}, "text_config=7"),
    ],
)
def test_damaged_numbers_in_a_configuration_are_one_error(fields: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RelaConfig(**fields)


def test_missing_weights_are_an_error_and_not_random_numbers(tmp_path: Path) -> None:
    save("rela", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = min(weights)
    del weights[name]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights, {name} first"):
        load_checkpoint(str(tmp_path / "model"))


def test_a_damaged_picture_size_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose sides up to 8192"):
        tiny_rela.tiny_processor({"height": 10**6, "width": 10**6})


@pytest.mark.slow
def test_damaged_tokenizers_and_settings_end_in_errors_and_never_in_a_signal(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save("rela", folder)
    code = """
import sys
from pathlib import Path
from training.families import load_checkpoint
folder = Path(sys.argv[1])
for name in ("tokenizer.json", "config.json", "model.safetensors", "processor_config.json"):
    whole = (folder / name).read_bytes()
    for damaged in (b"", b"{}", b"[" * 100_000, whole[: len(whole) // 2], b'{"added_tokens": 7}', b"\\xff\\xfe"):
        (folder / name).write_bytes(damaged)
        try:
            load_checkpoint(sys.argv[1])
            print(name, damaged[:20], "was read")
        except Exception as error:
            print(name, type(error).__name__)
    (folder / name).write_bytes(whole)
load_checkpoint(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 24
