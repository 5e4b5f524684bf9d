"""Vision encoder: a trunk with language fusion after each stage; and a category head on language-free features."""

import torch
from torch import nn

from .configuration_rela import RelaConfig
from .convolution_rela import ConvTrunk, ResNetTrunk
from .fusion_rela import LanguageFusion, LanguageGate
from .image_index import per_sentence
from .swin_rela import SwinTrunk
from .towers_rela import AutoTrunk

TRUNKS = {"swin": SwinTrunk, "resnet": ResNetTrunk, "conv": ConvTrunk, "auto": AutoTrunk}


class VisionEncoder(nn.Module):
    """Features at strides 4, 8, 16 and 32, with the sentence fused in unless `language_fusion` is off.

    While every gate is closed, the trunk does not depend on the sentence and runs once per image. The gates are
    checked when weights are loaded and on `train()` and `eval()`: no training step opens a closed gate, because it has
    no gradient.
    """

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = TRUNKS[config.backbone](config)
        if config.backbone == "auto":
            config.stage_channels = self.trunk.channels
        text_channels = config.text_config.hidden_size
        fused = config.stage_channels if config.language_fusion else []
        gated = fused[:-1] if config.language_gate != "none" and config.backbone != "auto" else []
        self.fusions = nn.ModuleList(LanguageFusion(channels, text_channels) for channels in fused)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in fused)
        self.gates = nn.ModuleList(LanguageGate(channels) for channels in gated)
        self.gates_closed = not gated
        self.register_load_state_dict_post_hook(_after_loading)

    def forward(
        self,
        pixel_values: torch.Tensor,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Fused features, and the trunk's own where they are free of language.

        Args:
            pixel_values: (images, 3, height, width), normalised.
            text: (sentences, tokens, text channels).
            attention_mask: (sentences, tokens), 1 for words and 0 for padding.
            image_index: (sentences,) which image each sentence is about; None for one each.

        Returns:
            four (sentences, channels, height, width), or (images, ...) without language fusion; and four
            (images, height, width, channels), or None where open gates add the sentence to the trunk.
        """
        if not self.config.language_fusion:
            stages = self.stages(pixel_values)
            return [x.permute(0, 3, 1, 2) for x in stages], stages
        if self.gates_closed:
            stages = self.stages(pixel_values)
            fused = [
                fusion(x, text, attention_mask, image_index) for fusion, x in zip(self.fusions, stages, strict=True)
            ]
        else:
            stages, fused = None, self._fuse_through_gates(pixel_values, text, attention_mask, image_index)
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, fused, strict=True)], stages

    def stages(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The trunk alone: four (images, height, width, channels)."""
        if self.config.backbone == "auto":
            return self.trunk(pixel_values)
        x, outputs = self.trunk.stem(pixel_values), []
        for layer in self.trunk.layers:
            x = layer(x)
            outputs.append(x)
        return outputs

    def _fuse_through_gates(
        self,
        pixel_values: torch.Tensor,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        x, outputs = self.trunk.stem(pixel_values), []
        for layer, fusion, gate in zip(self.trunk.layers, self.fusions, [*self.gates, None], strict=True):
            x = layer(x)
            outputs.append(fusion(x, text, attention_mask, image_index))
            if gate is not None:
                x = gate(per_sentence(x, image_index), outputs[-1])
            image_index = None  # from the first gate on there is one x per sentence
        return outputs

    def check_gates(self) -> None:
        """Set `gates_closed`, unless weights are not here (on the meta device, or in another process's shard)."""
        if not any(parameter.is_meta or not parameter.numel() for parameter in self.gates.parameters()):
            closed = all(gate.closed for gate in self.gates)
            if closed != self.gates_closed:  # closed gates are not part of the graph
                self.gates.requires_grad_(not closed)
            self.gates_closed = closed

    def train(self, mode: bool = True) -> "VisionEncoder":
        self.check_gates()
        return super().train(mode)


def _after_loading(module: VisionEncoder, incompatible_keys: object) -> None:
    module.check_gates()


class CategoryHead(nn.Module):
    """Per-pixel category logits from the trunk's strides 4 and 8; class 0 is "no object"."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        self.fine = nn.Linear(config.stage_channels[0], config.num_categories + 1)
        self.coarse = nn.Linear(config.stage_channels[1], config.num_categories + 1)

    def forward(self, stages: list[torch.Tensor]) -> torch.Tensor:
        """Stage outputs (images, height, width, channels) -> (images, categories + 1, height / 4, width / 4)."""
        fine, coarse = self.fine(stages[0]).permute(0, 3, 1, 2), self.coarse(stages[1]).permute(0, 3, 1, 2)
        return fine + nn.functional.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
