"""The schema diffusion head: bidirectional blocks over a scaffold that read the prompt as injected keys and values.

Takes the base's hidden states of the prompt (once per request) and a scaffold with masked slots; gives
log-probabilities over
the base's vocabulary plus NULL. It owns no vocabulary matrix, never runs the base and knows no schema or sampling.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_smollm_diffusion import SmolLMDiffusionConfig

_TIME_FREQUENCIES = 64
_TIME_SCALE = 1000.0  # times in [0, 1] are stretched to the range that sinusoids resolve
_COPY_STRIDES = (1, 2, 4, 8)  # doubling strides: a match is carried over spans of up to 16 tokens
_COPY_WIDTH_DIVISOR = 4


@dataclass(frozen=True)
class PromptMemory:
    """What the head keeps of a prompt; computed once per request and unchanged over all denoising steps.

    Args:
        keys: per layer, [batch, heads, prompt, head_dim], rotated to their positions.
        values: per layer, [batch, heads, prompt, head_dim].
        copy_keys: [batch, prompt, copy_dim], what the pointer is matched with.
        copy_values: [batch, prompt, copy_dim], what the head learns of the token it points at.
        prompt_ids: long [batch, prompt].
        mask: bool [batch, prompt], False at padding.
        lengths: long [batch], real tokens per prompt.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    copy_keys: Tensor
    copy_values: Tensor
    prompt_ids: Tensor
    mask: Tensor
    lengths: Tensor

    def select(self, rows: Tensor) -> "PromptMemory":
        """Pick or repeat rows, for example to draft several calls over one prompt.

        Args:
            rows: long [rows], indices into the batch.
        """
        return PromptMemory(
            keys=tuple(layer[rows] for layer in self.keys),
            values=tuple(layer[rows] for layer in self.values),
            copy_keys=self.copy_keys[rows],
            copy_values=self.copy_values[rows],
            prompt_ids=self.prompt_ids[rows],
            mask=self.mask[rows],
            lengths=self.lengths[rows],
        )


class SchemaDiffusionHead(nn.Module):
    """Bidirectional denoiser over scaffold positions, conditioned on the prompt and on the fraction still masked.

    Args:
        config: gives the head's sizes, the base's width and the ids of MASK and NULL.
    """

    def __init__(self, config: SmolLMDiffusionConfig) -> None:
        super().__init__()
        text_config = config.get_text_config()
        base_width, width = text_config.hidden_size, config.head_hidden_size
        eps = getattr(text_config, "rms_norm_eps", 1e-6)
        self.config = config
        self.rope_theta = _rope_theta(text_config)

        self.feature_norm = nn.RMSNorm(base_width, eps=eps, elementwise_affine=False)
        self.feature_proj = _linear(len(config.feature_layers) * base_width, width)
        self.memory_norm = nn.RMSNorm(width, eps=eps)

        self.special_embeddings = nn.Embedding(2, base_width)  # rows: MASK, NULL
        self.input_norm = nn.RMSNorm(base_width, eps=eps)
        self.input_proj = _linear(base_width, width)
        self.time_in = _linear(2 * _TIME_FREQUENCIES, width, bias=True)
        self.time_out = _linear(width, width, bias=True)

        self.layers = nn.ModuleList(HeadBlock(config, eps) for _ in range(config.head_num_layers))
        self.final_norm = nn.RMSNorm(width, eps=eps)

        self.output_proj = _linear(width, base_width)
        self.output_norm = nn.RMSNorm(base_width, eps=eps)
        self.null_output = _linear(base_width, 1, bias=True, init_scale=0.0)
        self.copy_gate = _linear(width, 1, bias=True, init_scale=0.0)  # starts neutral: half language, half copying
        self.copy_reader = CopyReader(config, eps)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the head computes in; inputs of the base are cast to it."""
        return self.feature_proj.weight.dtype

    def encode_prompt(self, features: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> PromptMemory:
        """Fuse the base's hidden states of a prompt into keys and values for every layer of the head.

        Args:
            features: [batch, prompt, feature_layers * base_width], the chosen hidden states side by side.
            prompt_ids: long [batch, prompt].
            prompt_mask: bool [batch, prompt], False at padding, which may be on either side.

        Returns:
            The memory that `forward` and `slot_log_probs` read.
        """
        batch, length, _ = features.shape
        # Padding becomes zero in all that follows, so that no neighbour sees it, even where the base left NaN.
        features = features.to(self.dtype).masked_fill(~prompt_mask[..., None], 0.0)
        # Layers of a base differ in scale by orders of magnitude, so each is normalised by itself.
        per_layer = features.view(batch, length, len(self.config.feature_layers), -1)
        fused = self.memory_norm(self.feature_proj(self.feature_norm(per_layer).flatten(2)))  # [batch, prompt, width]
        rotation = self._rotation(real_positions(prompt_mask))
        copy_keys, copy_values = self.copy_reader.encode(fused)
        pairs = [layer.prompt_keys_values(fused, rotation) for layer in self.layers]  # type: ignore[operator]
        return PromptMemory(
            keys=tuple(key for key, _ in pairs),
            values=tuple(value for _, value in pairs),
            copy_keys=copy_keys,
            copy_values=copy_values,
            prompt_ids=prompt_ids,
            mask=prompt_mask,
            lengths=prompt_mask.sum(-1),
        )

    def forward(
        self, scaffold_ids: Tensor, scaffold_mask: Tensor, memory: PromptMemory, time: Tensor, embedding_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the blocks over a scaffold.

        The pointer is computed before the last block, which then sees where every position points, so that it can tell
        copying from writing and the end of a copied value from its middle.

        Args:
            scaffold_ids: long [batch, scaffold]; MASK and NULL have the two ids after the vocabulary.
            scaffold_mask: bool [batch, scaffold], False at padding.
            memory: the encoded prompt.
            time: float [batch], the fraction of slot positions that are still masked.
            embedding_weight: [vocab, base_width], the base's input embeddings, detached.

        Returns:
            Hidden states [batch, scaffold, width] and pointer log-probabilities, float32 [batch, scaffold, prompt];
            both are for `slot_log_probs`.
        """
        hidden = self._embed(scaffold_ids, embedding_weight) + self._embed_time(time)[:, None]
        positions = memory.lengths[:, None] + real_positions(scaffold_mask)
        rotation = self._rotation(positions)
        # Every query sees the same keys: the real prompt tokens and the real scaffold tokens. [batch, 1, 1, prompt +
        # scaffold]
        key_mask = torch.cat([memory.mask, scaffold_mask], dim=-1)[:, None, None]
        for index, layer in enumerate(self.layers):
            if index == len(self.layers) - 1:
                pointer, context = self.copy_reader(hidden, scaffold_ids, memory)
                hidden = hidden + context
            hidden = layer(hidden, memory.keys[index], memory.values[index], key_mask, rotation)
        return self.final_norm(hidden), pointer

    def slot_log_probs(
        self,
        hidden: Tensor,
        pointer: Tensor,
        slot_index: tuple[Tensor, Tensor],
        memory: PromptMemory,
        lm_head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Turn hidden states at chosen positions into log-probabilities of tokens.

        The base's own language-model head gives one distribution over the vocabulary and NULL, a pointer over the
        prompt's
        tokens another; a learned gate mixes them.

        Args:
            hidden: [batch, scaffold, width], from `forward`.
            pointer: [batch, scaffold, prompt], from `forward`.
            slot_index: rows and positions, two long tensors of one shape [...]; only these positions cost
                vocabulary-sized work.
            memory: the encoded prompt.
            lm_head: the base's frozen output layer, [..., base_width] -> [..., vocab].

        Returns:
            Float32 log-probabilities [..., vocab + 2]; MASK (index vocab) is -inf, NULL is the last index.
        """
        rows, positions = slot_index
        chosen = hidden[rows, positions]  # [..., width]
        language = self._language_log_probs(chosen, lm_head)
        copied = torch.zeros_like(language).scatter_add(-1, memory.prompt_ids[rows], pointer[rows, positions].exp())
        gate = self.copy_gate(chosen).float()
        # The smallest normal number keeps the logarithm, and its gradient, finite where nothing is copied.
        log_copied = copied.clamp_min(torch.finfo(copied.dtype).tiny).log() + F.logsigmoid(gate)
        mixed = torch.logaddexp(language + F.logsigmoid(-gate), log_copied)
        never = torch.zeros(mixed.shape[-1], dtype=torch.bool, device=mixed.device)
        never[self.config.mask_token_id] = True
        return mixed.masked_fill(never, -torch.inf)

    def _language_log_probs(self, chosen: Tensor, lm_head: Callable[[Tensor], Tensor]) -> Tensor:
        """Distribution of the base's output layer over vocabulary and NULL; MASK gets a large finite negative value."""
        state = self.output_norm(self.output_proj(chosen))
        weight = getattr(lm_head, "weight", None)
        head_input = state.to(weight.dtype) if weight is not None and weight.is_floating_point() else state
        vocabulary = lm_head(head_input).float()[..., : self.config.mask_token_id]
        null = self.null_output(state).float()
        impossible = torch.full_like(null, torch.finfo(torch.float32).min)
        return F.log_softmax(torch.cat([vocabulary, impossible, null], dim=-1), dim=-1)

    def _embed(self, ids: Tensor, embedding_weight: Tensor) -> Tensor:
        """Embed scaffold ids with the base's rows, and MASK and NULL with the head's own two."""
        first_special = self.config.mask_token_id
        special = ids >= first_special
        base = F.embedding(ids.masked_fill(special, 0), embedding_weight).to(self.dtype)
        own = self.special_embeddings((ids - first_special).clamp_min(0))
        return self.input_proj(self.input_norm(torch.where(special[..., None], own, base)))

    def _embed_time(self, time: Tensor) -> Tensor:
        """Sinusoids of the time through a small MLP: [batch] -> [batch, width]."""
        exponents = torch.arange(_TIME_FREQUENCIES, device=time.device, dtype=torch.float32) / _TIME_FREQUENCIES
        angles = time.float()[:, None] * _TIME_SCALE * 10000.0**-exponents
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.dtype)
        return self.time_out(F.silu(self.time_in(waves)))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding: long [batch, length] -> two [batch, 1, length, head_dim]."""
        head_dim = self.config.head_hidden_size // self.config.head_num_heads
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
        angles = positions[:, None, :, None].float() * self.rope_theta**-exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


class HeadBlock(GradientCheckpointingLayer):
    """Pre-norm block: attention of scaffold positions over prompt and scaffold, then a gated MLP."""

    def __init__(self, config: SmolLMDiffusionConfig, eps: float) -> None:
        super().__init__()
        width, inner = config.head_hidden_size, config.head_intermediate_size
        self.num_heads = config.head_num_heads
        head_dim = width // self.num_heads
        # Residual outputs start small, so that depth does not change the scale of the stream.
        residual_scale = 1 / math.sqrt(2 * config.head_num_layers)
        self.attention_norm = nn.RMSNorm(width, eps=eps)
        self.qkv_proj = _linear(width, 3 * width)
        self.prompt_kv_proj = _linear(width, 2 * width)
        # Prompt keys and scaffold keys come from different sources; norms put them on one scale.
        self.query_norm = nn.RMSNorm(head_dim, eps=eps)
        self.key_norm = nn.RMSNorm(head_dim, eps=eps)
        self.prompt_key_norm = nn.RMSNorm(head_dim, eps=eps)
        self.attention_out = _linear(width, width, init_scale=residual_scale)
        self.mlp_norm = nn.RMSNorm(width, eps=eps)
        self.gate_up_proj = _linear(width, 2 * inner)
        self.mlp_out = _linear(inner, width, init_scale=residual_scale)

    def prompt_keys_values(self, fused: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Project a fused prompt [batch, prompt, width] to this layer's keys and values [batch, heads, prompt,
        head_dim]."""
        keys, values = (self._split_heads(part) for part in self.prompt_kv_proj(fused).chunk(2, dim=-1))
        return rotate(self.prompt_key_norm(keys), rotation), values

    def forward(
        self,
        hidden: Tensor,
        prompt_keys: Tensor,
        prompt_values: Tensor,
        key_mask: Tensor,
        rotation: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Map [batch, scaffold, width] to the same shape; `key_mask` is bool [batch, 1, 1, prompt + scaffold]."""
        queries, keys, values = (
            self._split_heads(part) for part in self.qkv_proj(self.attention_norm(hidden)).chunk(3, dim=-1)
        )
        queries = rotate(self.query_norm(queries), rotation)
        keys = torch.cat([prompt_keys, rotate(self.key_norm(keys), rotation)], dim=-2)
        values = torch.cat([prompt_values, values], dim=-2)
        mask = key_mask.expand(-1, -1, queries.shape[-2], -1)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        hidden = hidden + self.attention_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.mlp_out(F.silu(gate) * up)

    def _split_heads(self, states: Tensor) -> Tensor:
        """[batch, length, width] -> [batch, heads, length, head_dim]."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class CopyReader(nn.Module):
    """Points from scaffold positions at prompt tokens.

    A value that is copied runs along a diagonal: if position p points at prompt token i, p + 1 points at i + 1. Scores
    are
    therefore carried along diagonals, in doubling strides, each with a gate of its own; and a committed neighbour that
    equals
    the neighbour of a prompt token raises that token's score.
    """

    def __init__(self, config: SmolLMDiffusionConfig, eps: float) -> None:
        super().__init__()
        width = config.head_hidden_size
        copy_width = max(1, width // _COPY_WIDTH_DIVISOR)
        self.scale = 1 / math.sqrt(copy_width)
        self.norm = nn.RMSNorm(width, eps=eps)
        self.key_value_proj = _linear(width, 2 * copy_width)
        self.query_proj = _linear(width, copy_width)
        self.context_out = _linear(copy_width, width)
        self.stride_gates = _linear(width, len(_COPY_STRIDES), bias=True, init_bias=-1.0)
        self.neighbour_weights = _linear(width, 2, bias=True, init_bias=1.0)  # left, right

    def encode(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Copy keys and values [batch, prompt, copy_dim] of a fused prompt [batch, prompt, width]."""
        keys, values = self.key_value_proj(fused).chunk(2, dim=-1)
        return keys, values

    def forward(self, hidden: Tensor, scaffold_ids: Tensor, memory: PromptMemory) -> tuple[Tensor, Tensor]:
        """Point from every scaffold position at prompt positions.

        Args:
            hidden: [batch, scaffold, width].
            scaffold_ids: long [batch, scaffold].
            memory: the encoded prompt.

        Returns:
            Log-probabilities over prompt positions, float32 [batch, scaffold, prompt], hugely negative at padding;
            and what is read there, [batch, scaffold, width].
        """
        hidden = self.norm(hidden)
        scores = torch.matmul(self.query_proj(hidden), memory.copy_keys.transpose(1, 2)).float() * self.scale
        weights = self.neighbour_weights(hidden).float()
        for index, step in enumerate((1, -1)):
            scores = scores + weights[..., index, None] * neighbours_match(scaffold_ids, memory, step)
        scores = scores.masked_fill(~memory.mask[:, None], 0.0)
        gates = self.stride_gates(hidden).float().sigmoid()
        for index, stride in enumerate(_COPY_STRIDES):
            scores = scores + gates[..., index, None] * _shift(_shift(scores, stride, dim=1), stride, dim=2)
        pointer = F.log_softmax(scores.masked_fill(~memory.mask[:, None], torch.finfo(scores.dtype).min), dim=-1)
        read = torch.matmul(pointer.exp().to(hidden.dtype), memory.copy_values)
        return pointer, self.context_out(read)


def neighbours_match(scaffold_ids: Tensor, memory: PromptMemory, step: int) -> Tensor:
    """Whether a scaffold position's neighbour holds the same token as a prompt position's neighbour.

    Args:
        scaffold_ids: long [batch, scaffold].
        memory: gives the prompt's ids [batch, prompt].
        step: 1 compares left neighbours, -1 right ones.

    Returns:
        Bool [batch, scaffold, prompt]; False where either has no neighbour. MASK and NULL never match: no prompt holds
        them.
    """
    nothing = -1
    prompt_ids = memory.prompt_ids.masked_fill(~memory.mask, nothing)
    scaffold_neighbours = _shift(scaffold_ids, step, dim=1, fill=nothing - 1)
    prompt_neighbours = _shift(prompt_ids, step, dim=1, fill=nothing)
    return scaffold_neighbours[:, :, None] == prompt_neighbours[:, None]


def real_positions(mask: Tensor) -> Tensor:
    """Number the real tokens of a row 0, 1, 2, ... wherever the padding is: bool [batch, length] -> long."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary embedding to [batch, heads, length, head_dim], halves convention (as Llama and SmolLM3)."""
    cos, sin = rotation
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def init_head_weights(module: nn.Module, std: float) -> None:
    """Set the initial weights of one module of the head.

    Goes through transformers' initialisers, which leave loaded weights alone. Only modules that own parameters are
    looked at,
    because transformers skips the others in remote code.

    Args:
        module: any submodule of the head.
        std: standard deviation of a projection whose scale is 1.
    """
    if isinstance(module, nn.RMSNorm):
        if module.weight is not None:
            init.ones_(module.weight)
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, mean=0.0, std=std * getattr(module, "init_scale", 1.0))
        if module.bias is not None:
            init.constant_(module.bias, getattr(module, "init_bias", 0.0))
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, mean=0.0, std=std)


def _linear(
    inputs: int, outputs: int, bias: bool = False, init_scale: float = 1.0, init_bias: float = 0.0
) -> nn.Linear:
    """A linear layer that carries what `init_head_weights` needs to know about it."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.init_scale, layer.init_bias = init_scale, init_bias  # type: ignore[assignment]
    return layer


def _rope_theta(text_config: object) -> float:
    """The base's rotary base frequency, where it has a single one."""
    parameters = getattr(text_config, "rope_parameters", None)
    theta = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return float(theta) if theta is not None else 10000.0


def _shift(tensor: Tensor, step: int, dim: int, fill: float = 0) -> Tensor:
    """Move entries `step` places up (or down, if negative) along `dim`; what comes in is `fill`."""
    length = tensor.shape[dim]
    step = max(-length, min(step, length))
    shape = list(tensor.shape)
    shape[dim] = abs(step)
    incoming = tensor.new_full(shape, fill)
    if step >= 0:
        return torch.cat([incoming, tensor.narrow(dim, 0, length - step)], dim=dim)
    return torch.cat([tensor.narrow(dim, -step, length + step), incoming], dim=dim)
