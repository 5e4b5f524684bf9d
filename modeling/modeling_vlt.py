"""VLT: one mask for what a sentence refers to in an image; the predecessor of ReLA. It cannot answer "no target".

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    outputs = model(**processor(images=[image], text=["the red square"], return_tensors="pt"))
    processor.post_process_referring_segmentation(outputs, target_sizes=[(480, 640)])

Source: "Vision-Language Transformer and Query Generation for Referring Segmentation" (ICCV 2021), its Keras code.
`convert_vlt` reads the order of the layers from here: convolutions and batch norms are created in that order.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .attention import Attention
from .configuration_vlt import VltConfig
from .image_index import per_sentence, refuse_data_parallel
from .loss_vlt import kernel_squares, mask_loss
from .pipeline_referring import ReferringPipeline  # noqa: F401 (registers the task and is saved with the model)

DARKNET_BLOCKS = (1, 2, 8, 8, 4)  # of the stages at strides 2 to 32
PIXEL_SIZE = 256  # channels before the last projection of the pixels, whatever the configuration says


@dataclass
class VltOutput(ModelOutput):
    """Outputs of `VltModel` for B sentences.

    Args:
        loss: `loss_terms` added, where labels were given.
        loss_terms: detached "mask" and "l2", the latter with its weight.
        pred_masks: (B, 1, image_size / 2, image_size / 2) logits.
    """

    loss: torch.Tensor | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    pred_masks: torch.Tensor | None = None


class VltPreTrainedModel(PreTrainedModel):
    """Initialisation as in Keras, and what transformers needs to know of the network."""

    config_class = VltConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | BatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, BatchNorm):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)


class VltModel(VltPreTrainedModel):
    """The whole network: DarkNet-53, a GRU, their fusion, generated queries, a transformer, and the mask layers."""

    def __init__(self, config: VltConfig) -> None:
        super().__init__(config)
        size, side = config.hidden_size, config.image_size // 16
        self.backbone = DarkNet(config.stem_channels)
        self.text_encoder = TextEncoder(config)
        self.fusion = Fusion(config)
        self.pyramid = Pyramid(config)
        self.query_net = QueryNet(config)
        self.query_projection = nn.Linear(side * side, size)
        self.word_projection = nn.Linear(config.text_size, size)
        self.query_attention = QueryAttention(config)
        self.encoder = nn.ModuleList(TransformerLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(TransformerLayer(config, True) for _ in range(config.decoder_layers))
        self.balance = Balance(size)
        self.pixel_projection = nn.Linear(size, side * side)
        self.mask_layers = nn.ModuleList(ConvNorm(config.num_queries if i == 0 else size, size) for i in range(6))
        self.mask_head = nn.Conv2d(size, 1, 3, padding=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        word_vectors: torch.Tensor,
        image_index: torch.Tensor | None = None,
        labels: dict[str, torch.Tensor] | None = None,
    ) -> VltOutput:
        """Masks for B sentences about a number of images.

        Args:
            pixel_values: (images, 3, image_size, image_size) letterboxed, 0..1.
            word_vectors: (B, words, word_size). As published, zeros after the last word are words like any other: a
                model expects as many of them as in its training.
            image_index: (B,) which image each sentence is about; None when sentence b is about image b.
            labels: "masks" (B, image_size / 2, image_size / 2), 0..1, and "no_target" (B,) bool; without "masks" there
                is no loss.

        Raises:
            ValueError: for images of another size, or sentences and images that are not one to one without
                `image_index`.
        """
        refuse_data_parallel(self)
        self._check_inputs(pixel_values, word_vectors, image_index)
        dtype = self.mask_head.weight.dtype
        features = (per_sentence(x, image_index) for x in self.backbone(pixel_values.to(dtype)))
        words, sentence = self.text_encoder(word_vectors.to(dtype))
        pred_masks = self.mask_head(self._mask_features(*features, words, sentence))
        if labels is None or "masks" not in labels:
            return VltOutput(pred_masks=pred_masks)
        terms = {
            "mask": mask_loss(pred_masks, labels["masks"], labels.get("no_target")),
            "l2": self.config.l2_weight * kernel_squares(self),
        }
        detached = {name: term.detach() for name, term in terms.items()}
        return VltOutput(loss=terms["mask"] + terms["l2"], loss_terms=detached, pred_masks=pred_masks)

    def _mask_features(
        self,
        fine: torch.Tensor,
        middle: torch.Tensor,
        coarse: torch.Tensor,
        words: torch.Tensor,
        sentence: torch.Tensor,
    ) -> torch.Tensor:
        """Features at strides 8, 16 and 32, of words and sentence -> (B, hidden, image_size / 2, image_size / 2)."""
        query_map, pixels = self.pyramid(self.fusion(coarse, sentence), middle, fine)
        side = pixels.shape[-1]
        queries = self.query_projection(self.query_net(query_map).flatten(2)).relu()  # (B, queries, hidden)
        queries = self.query_attention(queries, self.word_projection(words).relu())
        memory = add_positions(pixels.flatten(2).transpose(1, 2))  # (B, pixels, hidden)
        for layer in self.encoder:
            memory = layer(memory)
        responses = add_positions(queries)
        for layer in self.decoder:
            responses = layer(responses, memory)
        responses = responses * self.balance(responses, queries)
        x = self.pixel_projection(responses).relu().unflatten(-1, (side, side))  # (B, queries, side, side)
        for i, layer in enumerate(self.mask_layers):
            x = layer(enlarge(x) if i >= 3 else x)
        return x

    def _check_inputs(
        self, pixel_values: torch.Tensor, word_vectors: torch.Tensor, image_index: torch.Tensor | None
    ) -> None:
        shape, side = tuple(pixel_values.shape), self.config.image_size
        if shape[1:] != (3, side, side):
            raise ValueError(f"pixel_values of shape {shape}: this model reads (images, 3, {side}, {side})")
        if image_index is None and len(word_vectors) != len(pixel_values):
            raise ValueError(
                f"{len(word_vectors)} sentences in word_vectors and {len(pixel_values)} images in pixel_values: pass "
                "image_index, the position of each sentence's image"
            )


class BatchNorm(nn.Module):
    """Batch normalisation over all dimensions but the second, with Keras' constants.

    As in Keras 2.3, frozen weights keep the running statistics too, but training still normalises by the batch.
    (Keras' running variance of maps is larger by n / (n - 1.001) for n values a channel; this one is not.)
    """

    epsilon, momentum = 1e-3, 0.01

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frozen = self.training and not self.weight.requires_grad
        statistics = (None, None) if frozen else (self.running_mean, self.running_var)
        affine = (self.weight, self.bias)
        return nn.functional.batch_norm(x, *statistics, *affine, self.training, self.momentum, self.epsilon)


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, leaky ReLU. With a stride, padding is left and top only."""

    def __init__(self, in_channels: int, channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.padding = (1, 0, 1, 0) if stride > 1 else (kernel // 2,) * 4  # left, right, top, bottom
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, bias=False)
        self.norm = BatchNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return leaky(self.norm(self.conv(nn.functional.pad(x, self.padding))))


class Residual(nn.Sequential):
    """A 1 x 1 and a 3 x 3 convolution with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__(ConvNorm(channels, channels // 2, 1), ConvNorm(channels // 2, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class DarkNet(nn.Module):
    """DarkNet-53 and YOLOv3's first six convolutions above it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = ConvNorm(3, channels)
        self.stages = nn.ModuleList()
        for blocks in DARKNET_BLOCKS:
            down, channels = ConvNorm(channels, 2 * channels, stride=2), 2 * channels
            residuals = (Residual(channels) for _ in range(blocks))
            self.stages.append(nn.Sequential(down, *residuals))
        pairs = ((ConvNorm(channels, channels // 2, 1), ConvNorm(channels // 2, channels)) for _ in range(3))
        self.neck = nn.Sequential(*(layer for pair in pairs for layer in pair))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images, 3, height, width) -> feature maps at strides 8, 16 and 32."""
        x, maps = self.stem(pixel_values), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[2], maps[3], self.neck(x)


class Gru(nn.Module):
    """A GRU as Keras defines it: the reset gate acts on the state before the candidate's matrix, unlike torch's."""

    def __init__(self, in_size: int, size: int, dropout: float) -> None:
        super().__init__()
        self.input = nn.Linear(in_size, 3 * size)  # update gate, reset gate, candidate
        self.recurrent = nn.Linear(size, 3 * size, bias=False)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, words, in_size) -> (B, words, size); one dropout mask for all words of a sentence."""
        mask = nn.functional.dropout(torch.ones_like(x[:, :1]), self.dropout, self.training)
        gates, candidates = self.input(x * mask).tensor_split([2 * self.recurrent.in_features], dim=-1)
        gate_matrix, candidate_matrix = self.recurrent.weight.tensor_split([2 * self.recurrent.in_features])
        state, states = x.new_zeros(len(x), self.recurrent.in_features), []
        for gate, candidate in zip(gates.unbind(1), candidates.unbind(1)):
            update, reset = (gate + nn.functional.linear(state, gate_matrix)).sigmoid().chunk(2, dim=-1)
            new = (candidate + nn.functional.linear(reset * state, candidate_matrix)).tanh()
            state = update * state + (1 - update) * new
            states.append(state)
        return torch.stack(states, dim=1)


class TextEncoder(nn.Module):
    """A bidirectional GRU whose directions are added, and a sentence vector that weighs the words per channel."""

    def __init__(self, config: VltConfig) -> None:
        super().__init__()
        self.forward_gru = Gru(config.word_size, config.text_size, config.dropout)
        self.backward_gru = Gru(config.word_size, config.text_size, config.dropout)
        self.gate = nn.Linear(config.text_size, config.text_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, words, word_size) -> words (B, words, text_size) and sentences (B, text_size)."""
        words = self.forward_gru(x) + self.backward_gru(x.flip(1)).flip(1)
        weights = self.dropout(self.gate(words).tanh()).softmax(dim=1)
        return words, (words * weights).sum(dim=1)


class Fusion(nn.Module):
    """The stride-32 map times the sentence."""

    def __init__(self, config: VltConfig) -> None:
        super().__init__()
        channels = 32 * config.stem_channels
        self.image = Residual(channels)
        self.text = nn.Linear(config.text_size, channels)
        self.text_norm = BatchNorm(channels)
        self.norm = BatchNorm(channels)

    def forward(self, image: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
        """(B, channels, h, w) and (B, text_size) -> (B, channels, h, w)."""
        text = leaky(self.text_norm(self.text(sentence)))
        return leaky(self.norm(self.image(image) * text[:, :, None, None]))


class Pyramid(nn.Module):
    """Brings the maps of strides 8, 16 and 32 to stride 16: one map for the queries, one for the transformer."""

    def __init__(self, config: VltConfig) -> None:
        super().__init__()
        fine, half, fused = (n * config.stem_channels for n in (8, 16, 32))  # the stride-16 map has half of the fused
        self.middle = ConvNorm(half, half, 1)
        self.middle_mix = ConvNorm(fused + half, half, 1)
        self.fine = ConvNorm(fine, fine, 1)
        self.fine_mix = ConvNorm(half + fine, half, 1)
        self.narrow = ConvNorm(half, half // 2, 1)
        self.widen = ConvNorm(half // 2, half)
        self.coarse = ConvNorm(fused, half, 1)
        self.coarse_mix = ConvNorm(fused + half, PIXEL_SIZE, 1)
        self.project = ConvNorm(PIXEL_SIZE, config.hidden_size, 1)

    def forward(
        self, fused: torch.Tensor, middle: torch.Tensor, fine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps at strides 32, 16 and 8 -> (B, 16 stem_channels, h, w) and (B, hidden, h, w) at stride 16."""
        fused = enlarge(fused)
        middle = self.middle_mix(torch.cat([fused, self.middle(middle)], dim=1))
        fine = self.fine(nn.functional.avg_pool2d(fine, 2))
        query_map = self.fine_mix(torch.cat([middle, fine], dim=1))
        pixels = torch.cat([self.widen(self.narrow(query_map)), middle], dim=1)
        pixels = self.coarse_mix(torch.cat([fused, self.coarse(pixels)], dim=1))
        return query_map, self.project(pixels)


class QueryNet(nn.Module):
    """One map per query."""

    def __init__(self, config: VltConfig) -> None:
        super().__init__()
        channels = 16 * config.stem_channels + 6
        self.layers = nn.Sequential(*(ConvNorm(channels, channels) for _ in range(3)))
        self.head = nn.Conv2d(channels, config.num_queries, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 16 stem_channels, h, w) -> (B, queries, h, w); six more channels hold x, x, x, y, y, y in -1..1."""
        rows, columns = (torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[-2:])
        y, x_ = torch.meshgrid(rows, columns, indexing="ij")
        places = torch.stack([x_, x_, x_, y, y, y]).expand(len(x), -1, -1, -1)
        return self.head(self.layers(torch.cat([x, places], dim=1)))


class ReluAttention(Attention):
    """Attention with ReLU after each of its four projections, the default of keras-multi-head."""

    def __init__(self, config: VltConfig) -> None:
        super().__init__(config, config.hidden_size, config.num_attention_heads)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().forward(query, key, value, mask).relu()

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return super()._heads(x.relu())


class QueryAttention(nn.Module):
    """Queries attend to words. What they learn is added to the queries without position."""

    def __init__(self, config: VltConfig) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.attention = ReluAttention(config)

    def forward(self, queries: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """(B, queries, hidden) and (B, words, hidden) -> (B, queries, hidden)."""
        located, words = add_positions(queries), add_positions(words)
        key, value = self.key(words).relu(), self.value(words).relu()
        return queries + self.attention(self.query(located).relu(), key, value)


class TransformerLayer(nn.Module):
    """Self-attention, for queries attention to the pixels, and a feed-forward layer; each with post-norm.

    Among queries, self-attention is causal: query i sees queries 0 to i, as keras-transformer's decoder has it.
    """

    def __init__(self, config: VltConfig, decoder: bool = False) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attention, self.self_norm = ReluAttention(config), LayerNorm(size)
        self.cross_attention = ReluAttention(config) if decoder else None
        self.cross_norm = LayerNorm(size) if decoder else None
        self.fc1, self.fc2, self.ffn_norm = nn.Linear(size, size), nn.Linear(size, size), LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """(B, tokens, hidden), for queries with (B, pixels, hidden) -> (B, tokens, hidden)."""
        mask = None
        if memory is not None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None, None]
        x = self.self_norm(x + self.dropout(self.self_attention(x, x, x, mask)))
        if memory is not None:
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, memory, memory)))
        return self.ffn_norm(x + self.dropout(self.fc2(self.fc1(x).relu())))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with the epsilon of keras-layer-normalization."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=1e-14)


class Balance(nn.Module):
    """The weight of each query's response, 0..1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.response = nn.Linear(size, size), nn.Linear(size, size)
        self.both, self.score = nn.Linear(2 * size, size), nn.Linear(size, 1)

    def forward(self, responses: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """(B, queries, hidden) x 2 -> (B, queries, 1)."""
        both = torch.cat([self.response(responses).relu(), self.query(queries).relu()], dim=-1)
        return self.score(self.both(both).relu()).sigmoid()


def add_positions(x: torch.Tensor) -> torch.Tensor:
    """(B, tokens, channels) plus the position of each token, sine and cosine in turn."""
    steps = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    rates = 10000 ** (-torch.arange(0, x.shape[2], 2, device=x.device, dtype=torch.float32) / x.shape[2])
    angles = steps[:, None] * rates  # (tokens, channels / 2)
    return x + torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(x.dtype)


def leaky(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.leaky_relu(x, 0.1)


def enlarge(x: torch.Tensor) -> torch.Tensor:
    """(B, channels, h, w) -> (B, channels, 2 h, 2 w), each pixel repeated."""
    return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


VltModel.register_for_auto_class("AutoModel")
