"""Language in the vision trunk: pixel-word attention on each stage's output, and the gate back into the trunk."""

import torch
from torch import nn
from transformers import initialization as init

from .image_index import per_sentence

EPSILON = 1e-5  # added to a variance before the division
LARGE_MAP = 2**19  # elements of one feature map above which a CPU works map by map


class LanguageFusion(nn.Module):
    """Pixel-word attention (LAVT's PWAM), one head: each pixel gathers words.

    What depends on the image alone is computed once per image and shared by its sentences.
    Source: `SpatialImageLanguageAttention` and `PWAM` of the original swin.py.
    """

    def __init__(self, channels: int, text_channels: int) -> None:
        super().__init__()
        self.vision = nn.Linear(channels, channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(text_channels, channels)
        self.value = nn.Linear(text_channels, channels)
        self.out = nn.Linear(channels, channels)
        self.project = nn.Linear(channels, channels)

    def forward(
        self,
        pixels: torch.Tensor,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor | None,
    ) -> torch.Tensor:
        """Fuse stage outputs with words.

        Args:
            pixels: (images, height, width, channels).
            text: (sentences, tokens, text channels).
            attention_mask: (sentences, tokens), 1 for words and 0 for padding.
            image_index: (sentences,) which image each sentence is about; None for one each.

        Returns:
            (sentences, height, width, channels).
        """
        height, width = pixels.shape[1:3]
        pixels = pixels.flatten(1, 2)
        vision, query = nn.functional.gelu(self.vision(pixels)), normalize_pixels(self.query(pixels))
        words = attention_mask[..., None].to(text.dtype)
        # The output projection is linear: applied to the few words instead of the many pixels, it gives the same.
        key, value = self.key(text) * words, self.out(self.value(text) * words)

        def of_image(x: torch.Tensor, sentences: slice) -> torch.Tensor:
            # per_sentence, because the gradients of x[image_index] are summed in no fixed order
            return x[sentences] if image_index is None else per_sentence(x, image_index[sentences])

        def fuse(sentences: slice) -> torch.Tensor:
            gathered = gather_words(of_image(query, sentences), key[sentences], value[sentences], words[sentences])
            return nn.functional.gelu(self.project(of_image(vision, sentences) * gathered.to(vision.dtype)))

        if one_by_one(vision, text.shape[0]):
            fused = torch.cat([fuse(slice(i, i + 1)) for i in range(len(text))])
        else:
            fused = fuse(slice(None))
        return fused.unflatten(1, (height, width))


def gather_words(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The mixture of words of each pixel, instance-normalised over the pixels, in fp32 at least.

    (batch, pixels, channels), (batch, tokens, channels) x 2, (batch, tokens, 1) -> (batch, pixels, channels).
    """
    # fp32: where all pixels mix the words alike, the normalisation enlarges rounding errors.
    with torch.autocast(query.device.type, enabled=False):
        key, value, words = full_precision(key), full_precision(value), full_precision(words)
        logits = query @ key.transpose(1, 2) * key.shape[-1] ** -0.5  # (batch, pixels, tokens)
        weights = (logits + (1e4 * words - 1e4).transpose(1, 2)).softmax(-1)
        # Instance normalisation of weights @ value, done on the few words: its mean over the pixels is mean @ value,
        # and the scale of a channel is multiplied into value before the product over all pixels.
        mean = weights.mean(dim=1, keepdim=True)
        weights, value = weights - mean, value - mean @ value
        # The variance of a channel over the pixels from the covariance of the words' weights, (tokens, tokens): no
        # product over pixels and channels.
        covariance = weights.transpose(1, 2) @ weights / weights.shape[1]
        variance = ((covariance @ value) * value).sum(1, keepdim=True).clamp(min=0)
        return weights @ (value * (variance + EPSILON).rsqrt())


class LanguageGate(nn.Module):
    """x + tanh(G2 relu(G1 fused)) * fused: adds the fused features to the trunk.

    With both weights zero, as published, both gradients are zero too and the gate never opens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(channels, channels, bias=False)
        self.outer = nn.Linear(channels, channels, bias=False)

    def forward(self, pixels: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
        return pixels + torch.tanh(self.outer(self.inner(fused).relu())) * fused

    def reset(self, published: bool) -> None:
        """Zero both weights as published, or the outer one alone so that the gate can learn."""
        init.zeros_(self.outer.weight)
        if published:
            init.zeros_(self.inner.weight)
        else:
            init.xavier_uniform_(self.inner.weight)

    @property
    def closed(self) -> bool:
        """Whether both weights are zero: the gate adds nothing and has no gradient."""
        return not (self.inner.weight.any() or self.outer.weight.any())


def normalize_pixels(x: torch.Tensor) -> torch.Tensor:
    """Instance normalisation without affine of (batch, pixels, channels) over the pixels, in fp32 at least."""
    x = full_precision(x)
    x = x - x.mean(dim=1, keepdim=True)
    variance = torch.linalg.vector_norm(x, dim=1, keepdim=True).square() / x.shape[1]
    return x * (variance + EPSILON).rsqrt()


def one_by_one(maps: torch.Tensor, batch: int) -> bool:
    """Whether to process a batch of `batch` maps as large as those of `maps` one by one, which is faster on a CPU.

    Tensors larger than the CPU's caches are allocated on new memory pages, which cost more than a batch saves. A
    compiler plans its memory itself.
    """
    large = maps.device.type == "cpu" and batch > 1 and maps[0].numel() >= LARGE_MAP
    return large and not torch.compiler.is_compiling()


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """Convert half precision to fp32; fp32 and fp64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
