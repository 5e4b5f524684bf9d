"""200 training steps of the original ReLA: `python -m tests.original_training --original FOLDER` writes the golden.

Forward pass, loss, parameter groups and gradient clipping are the original code (GRES.py, criterion.py, train_net.py),
whose imports of detectron2, fvcore, timm and torchvision are replaced; the hidden size of BERT, 768 in two files, is
made smaller. Weights are `made_weights`, batches are `made_batch`, and stochastic depth is drawn by `KeptSamples`: all
from numpy's frozen legacy stream. No drop-out in BERT. The schedule is detectron2's at the published warm-up factor 1,
its steps scaled from 150,000 to 200. fp64, because the original's fp32 differs from it by more than 0.1 % at once.
"""

import importlib
import json
import shutil
import sys
import tempfile
import types
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.original_rela import DropPath, OriginalRela, Sizes
from grefcoco_data.arguments import ArgumentParser
from grefcoco_data.atomic_files import write_text
from tests.made_weights import made_weights

GOLDEN = Path(__file__).parent / "goldens" / "rela" / "training.json"
STEPS, BATCH, SIDE, TOKENS, SEED = 200, 4, 64, 8, 21
DECAY_STEPS = [STEPS * step // 150_000 for step in (110_000, 140_000)]
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 60,
}
TEXT |= {"max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = Sizes(
    channels=16,
    depths=(1, 1, 2, 1),
    window_heads=(1, 2, 2, 4),
    window=4,
    pixel_layers=1,
    pixel_ffn=64,
    hidden=64,
    heads=4,
    region_layers=3,
    region_ffn=64,
    text=TEXT,
)


def made_batch(step: int) -> dict[str, torch.Tensor]:
    """Images of noise with a brighter rectangle, the target of three of four sentences."""
    stream = np.random.RandomState(SEED + step)
    images = stream.randint(0, 200, (BATCH, 3, SIDE, SIDE))
    masks = np.zeros((BATCH, SIDE, SIDE), np.uint8)
    for b, (top, left) in enumerate(stream.randint(0, SIDE // 2, (BATCH, 2))):
        images[b, :, top : top + 30, left : left + 30] += 55
        masks[b, top : top + 30, left : left + 30] = b > 0
    lengths = stream.randint(3, TOKENS + 1, (BATCH, 1))
    return {
        "images": torch.from_numpy(images.astype(np.uint8)),
        "input_ids": torch.from_numpy(stream.randint(5, 60, (BATCH, TOKENS))),
        "attention_mask": torch.from_numpy((np.arange(TOKENS) < lengths).astype(np.int64)),
        "masks": torch.from_numpy(masks),
    }


class KeptSamples:
    """The samples that stochastic depth keeps, in the order in which they are asked for."""

    def __init__(self) -> None:
        self.stream = np.random.RandomState(SEED)

    def __call__(self, samples: int, probability: float, *device: torch.device) -> torch.Tensor:
        return torch.from_numpy((self.stream.random_sample(samples) < probability).astype(np.float32))


class _Stub(types.ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def original_modules(source: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """The original GRES.py and train_net.py, after `OriginalRela` has imported their parts."""
    detectron2 = ("config", "checkpoint", "data", "engine", "evaluation", "projects.deeplab", "solver.build", "utils")
    detectron2 += ("utils.comm", "utils.logger", "utils.memory", "modeling", "modeling.backbone", "structures")
    detectron2 += ("modeling.postprocessing",)
    for name in ("torchvision", "detectron2.projects", "detectron2.solver", *(f"detectron2.{x}" for x in detectron2)):
        contents = vars(sys.modules[name]) if name in sys.modules else {}
        sys.modules[name] = _Stub(name)
        vars(sys.modules[name]).update({key: value for key, value in contents.items() if not key.startswith("__")})
    sys.modules["torchvision"]._is_tracing = lambda: False
    registry = type("Registry", (), {"register": lambda self: lambda decorated: decorated})()
    sys.modules["detectron2.modeling"].META_ARCH_REGISTRY = registry
    tensors = types.SimpleNamespace(from_tensors=lambda x, divisor: types.SimpleNamespace(tensor=torch.stack(x)))
    sys.modules["detectron2.structures"].ImageList = tensors
    gres = importlib.import_module("gres_model.GRES")
    names = ("RefCOCOMapper", "ReferEvaluator", "add_maskformer2_config", "add_refcoco_config")
    vars(sys.modules["gres_model"]).update(dict.fromkeys(names))
    sys.path.insert(0, str(source))
    return gres, importlib.import_module("train_net")


def head(module: torch.nn.Module, features: dict, text: torch.Tensor, mask: torch.Tensor) -> dict:
    """`ReferringHead.layers` of referring_head.py."""
    mask_features, _, levels = module.pixel_decoder.forward_features(features)
    return module.predictor(levels, mask_features, text, None)


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, required=True, help="checkout of the original ReLA repository")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "original"
        shutil.copytree(options.original, source)
        for name in ("backbone/swin.py", "transformer_decoder/referring_transformer_decoder.py"):
            path = source / "gres_model" / "modeling" / name
            path.write_text(path.read_text().replace("768", str(TEXT["hidden_size"])))
        golden = train(source, getattr(torch, options.dtype))
    if options.dtype == "float64":
        write_text(GOLDEN, json.dumps(golden) + "\n")


def train(source: Path, dtype: torch.dtype) -> dict[str, object]:
    """Train the original network; what the golden holds."""
    parts = OriginalRela(source, SIZES)
    gres, train_net = original_modules(source)
    model = gres.GRES.__new__(gres.GRES)
    criterion = gres.ReferringCriterion({"loss_mask": 5.0}, ["masks"])
    parts.sem_seg_head.forward = partial(head, parts.sem_seg_head)
    gres.GRES.__init__(
        model, backbone=parts.backbone, sem_seg_head=parts.sem_seg_head, criterion=criterion, num_queries=100,
        object_mask_threshold=0.8, overlap_threshold=0.8, metadata=None, size_divisibility=32,
        sem_seg_postprocess_before_inference=True, pixel_mean=[123.675, 116.280, 103.530],
        pixel_std=[58.395, 57.120, 57.375], semantic_on=False, panoptic_on=False, instance_on=True,
        test_topk_per_image=100, lang_backbone=parts.text_encoder,
    )  # fmt: skip
    state = parts.state_dict()
    floats = {name: tuple(x.shape) for name, x in state.items() if x.is_floating_point()}
    initial = made_weights(floats, SEED)
    for name, value in initial.items():
        state[name].copy_(value)
    model.to(dtype).train()
    clipping = types.SimpleNamespace(ENABLED=True, CLIP_TYPE="full_model", CLIP_VALUE=0.01)
    solver = {"BASE_LR": 1e-5, "WEIGHT_DECAY": 0.05, "WEIGHT_DECAY_NORM": 0.0, "WEIGHT_DECAY_EMBED": 0.0}
    solver = types.SimpleNamespace(**solver, OPTIMIZER="ADAMW", CLIP_GRADIENTS=clipping)
    optimizer = train_net.Trainer.build_optimizer(types.SimpleNamespace(SOLVER=solver), model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    losses = []
    half_to_float = torch.Tensor.float

    def to_float(x: torch.Tensor) -> torch.Tensor:
        """The pixel decoder makes fp32 of half precision; fp64 stays."""
        return x if x.dtype == torch.float64 else half_to_float(x)

    with mock.patch.object(DropPath, "drawn", KeptSamples()), mock.patch.object(torch.Tensor, "float", to_float):
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = 1e-5 * 0.1 ** sum(step >= decay for decay in DECAY_STEPS)
            loss = model(original_inputs(made_batch(step)))["loss_mask"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            print(losses[-1], flush=True)
    named = dict(model.named_parameters())
    return {
        "losses": losses,
        "moved": sum(float((p.detach() - initial[name]).double().square().sum()) for name, p in named.items()) ** 0.5,
        "untrained": [name for name, p in named.items() if id(p) not in decays],
        "undecayed": [name for name, p in named.items() if decays.get(id(p)) == 0],
        "keys": "\n".join(f"{name}\t{','.join(map(str, shape))}" for name, shape in floats.items()),
    }


def original_inputs(batch: dict[str, torch.Tensor]) -> list[dict[str, object]]:
    """What the original mapper gives for each sentence."""
    rows = []
    for image, ids, words, mask in zip(*batch.values(), strict=True):
        instances = types.SimpleNamespace(gt_masks=mask[None], gt_classes=torch.zeros(1, dtype=torch.long))
        instances.to = lambda device, instances=instances: instances
        rows.append(
            {
                "image": image,
                "lang_tokens": ids[None],
                "lang_mask": words[None],
                "instances": instances,
                "empty": not bool(mask.any()),
                "gt_mask_merged": mask[None],
            }
        )
    return rows


if __name__ == "__main__":
    main()
