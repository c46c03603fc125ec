"""The schema diffusion head: bidirectional blocks over a scaffold that read the prompt as injected keys and values.

Takes the base's hidden states of the prompt (once per request) and a scaffold with masked slots; gives
log-probabilities over the base's vocabulary plus NULL. It owns no vocabulary matrix, never runs the base and knows no
schema or sampling.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
_NO_NEIGHBOUR = -2  # stands for the token of a scaffold position that is not there, or not to be seen

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines of the rotary embedding, [batch, length, head_dim] each


@dataclass(frozen=True, eq=False)
class PromptMemory:
    """What the head keeps of a prompt; computed once per request and unchanged over all denoising steps.

    Args:
        keys: per layer, [batch, heads, prompt, head_dim], rotated to their positions.
        values: per layer, [batch, heads, prompt, head_dim].
        copy_keys: [batch, prompt, copy_dim], what the pointer is matched with.
        copy_values: [batch, prompt, copy_dim], what the head learns of the token it points at.
        prompt_ids: long [batch, prompt].
        mask: bool [batch, prompt], False at padding.
        lengths: long [batch], real tokens per prompt; the scaffold is placed behind them.
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
        return self._mapped(lambda states: states[rows], lambda ids: ids[rows], self.lengths[rows])

    def prefix(self, length: int) -> "PromptMemory":
        """The first positions of a single row, as views; a prompt that begins alike can go on from them.

        Args:
            length: positions to keep.

        Raises:
            ValueError: there are several rows, fewer positions, or padding among the positions.
        """
        rows, columns = self.mask.shape
        if rows != 1 or not 0 <= length <= columns or not bool(self.mask[:, :length].all()):
            raise ValueError(
                f"A prefix of {length} positions needs one row with as many positions and no padding among them; this "
                f"memory has {rows} rows and {columns} positions. Pick one row first, with select."
            )
        lengths = torch.full_like(self.lengths, length)
        return self._mapped(lambda states: states[..., :length, :], lambda ids: ids[:, :length], lengths)

    def extend(self, other: "PromptMemory") -> "PromptMemory":
        """Append further positions behind the prompt, row by row, for example those of a finished call.

        Args:
            other: as many rows, encoded with this memory's `lengths` as their offset. Both may be padded anywhere.

        Returns:
            The longer memory; where either was padded, real positions come first and padding last.

        Raises:
            ValueError: the two have different numbers of rows.
        """
        if len(self.mask) != len(other.mask):
            raise ValueError(
                f"A memory of {len(self.mask)} rows cannot be extended by one of {len(other.mask)} rows; give every "
                "row its part, one that is masked throughout where a row has nothing new."
            )
        joined = _joined([self, other], states_dim=-2, ids_dim=1, lengths=self.lengths + other.lengths)
        if bool(joined.mask.all()):
            return joined
        # Neighbours in the text must be neighbours in the memory, because a copied value runs along the prompt.
        order = (~joined.mask).long().argsort(dim=1, stable=True)[:, : int(joined.lengths.amax())]
        return joined._mapped(lambda states: _pick_positions(states, order), lambda ids: ids.gather(1, order))

    def without_prompt(self) -> "PromptMemory":
        """The same rows with nothing to be seen of the prompt, for classifier-free guidance; tensors are shared."""
        return replace(self, mask=torch.zeros_like(self.mask), lengths=torch.zeros_like(self.lengths))

    @staticmethod
    def stack(memories: "Sequence[PromptMemory]") -> "PromptMemory":
        """Rows of several memories as one batch, padded on the right to the longest.

        Args:
            memories: at least one, all of one head; each may have several rows.

        Raises:
            ValueError: there is none.
        """
        if not memories:
            raise ValueError("There is no memory to stack; give at least one.")
        columns = max(memory.mask.shape[1] for memory in memories)
        lengths = torch.cat([memory.lengths for memory in memories])
        return _joined([memory._padded(columns) for memory in memories], states_dim=0, ids_dim=0, lengths=lengths)

    def _padded(self, columns: int) -> "PromptMemory":
        """The same rows with padding on the right."""
        missing = columns - self.mask.shape[1]
        if missing == 0:
            return self
        return self._mapped(lambda states: F.pad(states, (0, 0, 0, missing)), lambda ids: F.pad(ids, (0, missing)))

    def _mapped(
        self, states: Callable[[Tensor], Tensor], ids: Callable[[Tensor], Tensor], lengths: Tensor | None = None
    ) -> "PromptMemory":
        """Change all states, [batch, ..., prompt, dim], and ids and mask, [batch, prompt]."""
        return PromptMemory(
            keys=tuple(states(layer) for layer in self.keys),
            values=tuple(states(layer) for layer in self.values),
            copy_keys=states(self.copy_keys),
            copy_values=states(self.copy_values),
            prompt_ids=ids(self.prompt_ids),
            mask=ids(self.mask),
            lengths=self.lengths if lengths is None else lengths,
        )


def _joined(memories: "Sequence[PromptMemory]", states_dim: int, ids_dim: int, lengths: Tensor) -> "PromptMemory":
    """Concatenate memories along one dimension of their states, and of their ids and masks."""
    return PromptMemory(
        keys=tuple(torch.cat(layers, states_dim) for layers in zip(*(m.keys for m in memories), strict=True)),
        values=tuple(torch.cat(layers, states_dim) for layers in zip(*(m.values for m in memories), strict=True)),
        copy_keys=torch.cat([memory.copy_keys for memory in memories], states_dim),
        copy_values=torch.cat([memory.copy_values for memory in memories], states_dim),
        prompt_ids=torch.cat([memory.prompt_ids for memory in memories], ids_dim),
        mask=torch.cat([memory.mask for memory in memories], ids_dim),
        lengths=lengths,
    )


def _pick_positions(states: Tensor, order: Tensor) -> Tensor:
    """Reorder the positions of each row: [batch, ..., prompt, dim] by long [batch, picked]."""
    index = order.view(order.shape[0], *[1] * (states.ndim - 3), -1, 1)
    return states.take_along_dim(index, dim=-2)


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
        # Starts at zero: as the head that embeds the scaffold by itself.
        reads_base = config.scaffold_features == "base"
        features_width = len(config.feature_layers) * base_width
        self.scaffold_proj = _linear(features_width, width, init_scale=0.0) if reads_base else None
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
    def reads_scaffold(self) -> bool:
        """Whether it reads the base's hidden states at the masked scaffold."""
        return self.scaffold_proj is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the head computes in; inputs of the base are cast to it."""
        return self.feature_proj.weight.dtype

    def encode_prompt(
        self, features: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, offset: Tensor | None = None
    ) -> PromptMemory:
        """Fuse the base's hidden states of a prompt into keys and values for every layer of the head.

        Args:
            features: [batch, prompt, feature_layers * base_width], the chosen hidden states side by side.
            prompt_ids: long [batch, prompt].
            prompt_mask: bool [batch, prompt], False at padding, which may be on either side.
            offset: long [batch], how many real tokens stand in front of these, encoded before; None = nothing does.

        Returns:
            The memory that `forward` and `slot_log_probs` read.
        """
        features = self._normed_features(features, prompt_mask)
        fused = self.memory_norm(self.feature_proj(features))  # [batch, prompt, width]
        positions = real_positions(prompt_mask)
        rotation = self._rotation(positions if offset is None else positions + offset[:, None])
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
        self,
        scaffold_ids: Tensor,
        scaffold_mask: Tensor,
        memory: PromptMemory,
        time: Tensor,
        embedding_weight: Tensor,
        field_ids: Tensor | None = None,
        positions: Tensor | None = None,
        scaffold_features: Tensor | None = None,
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
            field_ids: long [batch, scaffold], which slot a position belongs to, numbered as they are read; -1 is fixed
                text. Only `config.field_mask` "full" does without.
            positions: long [batch, chosen], the scaffold positions to give out; None = all of them.
            scaffold_features: [batch, scaffold, feature_layers * base_width], the base's hidden states at the masked
                scaffold; read where `config.scaffold_features` is "base", which needs them.

        Returns:
            Hidden states [batch, chosen, width] and pointer log-probabilities, float32 [batch, chosen, prompt];
            both are for `slot_log_probs`.

        Raises:
            ValueError: the field mask needs `field_ids`, or they have another shape than the scaffold, or the base's
                features of the scaffold are missing.
        """
        hidden = self._embed(scaffold_ids, embedding_weight) + self._embed_time(time)[:, None]
        if self.scaffold_proj is not None:
            if scaffold_features is None:
                raise ValueError('With scaffold_features "base" the head needs the features of the scaffold.')
            hidden = hidden + self.scaffold_proj(self._normed_features(scaffold_features, scaffold_mask))
        rotation = self._rotation(memory.lengths[:, None] + real_positions(scaffold_mask))
        visible = self._visible(scaffold_ids, field_ids)
        bias = _attention_bias(memory.mask, scaffold_mask, visible, self.dtype)
        for layer, keys, values in zip(self.layers[:-1], memory.keys[:-1], memory.values[:-1], strict=True):
            hidden = layer(hidden, keys, values, bias, rotation)
        pointer, context = self.copy_reader(hidden, scaffold_ids, scaffold_mask, memory, visible)
        chosen = None
        if positions is not None:
            chosen = torch.arange(len(positions), device=positions.device)[:, None], positions
            pointer = pointer[chosen]
        hidden = self.layers[-1](hidden + context, memory.keys[-1], memory.values[-1], bias, rotation, chosen)
        return self.final_norm(hidden), pointer

    def _normed_features(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features of the base as the head reads them: [batch, length, feature_layers * base_width] in its dtype."""
        # Padding becomes zero in all that follows, so that no neighbour sees it, even where the base left NaN.
        features = features.to(self.dtype).masked_fill(~mask[..., None], 0.0)
        # Layers of a base differ in scale by orders of magnitude, so each is normalised by itself.
        per_layer = features.unflatten(-1, (len(self.config.feature_layers), -1))
        return self.feature_norm(per_layer).flatten(2)

    def _visible(self, scaffold_ids: Tensor, field_ids: Tensor | None) -> Tensor | None:
        """Which scaffold position (second axis) sees which (third): bool [batch, scaffold, scaffold]; None = all.

        Fixed text is seen by all and, unless all is visible, sees nothing else, so that it passes nothing on between
        slots. Source of "block_causal": D2F (arXiv 2508.09192).
        """
        field_mask = self.config.field_mask
        if field_mask == "full":
            return None
        if field_ids is None or field_ids.shape != scaffold_ids.shape:
            got = None if field_ids is None else tuple(field_ids.shape)
            raise ValueError(
                f"With field_mask {field_mask!r} the head needs field_ids of the scaffold's shape "
                f"{tuple(scaffold_ids.shape)}, got {got}; give each position the number of its slot, fixed text -1."
            )
        queries, keys = field_ids[:, :, None], field_ids[:, None]
        if field_mask == "block_causal":
            return keys <= queries
        return (keys < 0) | (keys == queries)

    def slot_log_probs(
        self,
        hidden: Tensor,
        pointer: Tensor,
        memory: PromptMemory,
        rows: Tensor,
        lm_head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Turn hidden states at chosen positions into log-probabilities of tokens.

        The base's own language-model head gives one distribution over the vocabulary and NULL, a pointer over the
        prompt's tokens another; a learned gate mixes them. Where there is no prompt, nothing is copied.

        Args:
            hidden: [..., width], from `forward`; every position costs vocabulary-sized work.
            pointer: [..., prompt], from `forward`.
            memory: the encoded prompt.
            rows: long, broadcast to [...], the row of the memory that a position belongs to.
            lm_head: the base's frozen output layer, [..., base_width] -> [..., vocab].

        Returns:
            Float32 log-probabilities [..., vocab + 2]; MASK (index vocab) is -inf, NULL is the last index.
        """
        language = self._language_log_probs(hidden, lm_head)
        gate = self.copy_gate(hidden).float()
        gate = torch.where((memory.lengths > 0)[rows][..., None], gate, torch.finfo(gate.dtype).min)
        kept, tokens = F.logsigmoid(-gate), memory.prompt_ids[rows].expand_as(pointer)
        written = language.gather(-1, tokens) + kept
        # A token may stand at several places of the prompt; one of them gets its whole probability.
        places = _token_places(memory.prompt_ids, language.shape[-1])[rows].expand_as(pointer)
        copied = torch.zeros_like(pointer).scatter_add(-1, places, pointer.exp())
        # The smallest normal number keeps the logarithm, and its gradient, finite where nothing is copied.
        log_copied = copied.clamp_min(torch.finfo(copied.dtype).tiny).log() + F.logsigmoid(gate)
        log_probs = language + kept if language.requires_grad else language.add_(kept)
        # log(a + b) = log(a) + softplus(log(b) - log(a)), which only the prompt's tokens need.
        return log_probs.scatter_add_(-1, tokens, F.softplus(log_copied - written))

    def _language_log_probs(self, hidden: Tensor, lm_head: Callable[[Tensor], Tensor]) -> Tensor:
        """Distribution of the base's output layer over vocabulary, MASK (impossible) and NULL, float32."""
        state = self.output_norm(self.output_proj(hidden))
        weight = getattr(lm_head, "weight", None)
        head_input = state.to(weight.dtype) if weight is not None and weight.is_floating_point() else state
        vocabulary = lm_head(head_input)[..., : self.config.mask_token_id]
        null = self.null_output(state).float()
        logits = torch.cat([vocabulary.float(), torch.full_like(null, -torch.inf), null], dim=-1)
        return logits.log_softmax(-1)

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

    def _rotation(self, positions: Tensor) -> Rotation:
        """Tables of the rotary embedding for positions, long [batch, length]."""
        head_dim = self.config.head_hidden_size // self.config.head_num_heads
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
        angles = positions[..., None].float() * self.rope_theta**-exponents
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1).to(self.dtype), torch.cat([-sin, sin], dim=-1).to(self.dtype)


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

    def prompt_keys_values(self, fused: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Project a fused prompt [batch, prompt, width] to this layer's keys and values [batch, heads, prompt,
        head_dim]."""
        keys, values = self.prompt_kv_proj(fused).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return rotate(self.prompt_key_norm(keys), rotation).transpose(1, 2), values.transpose(1, 2)

    def forward(
        self,
        hidden: Tensor,
        prompt_keys: Tensor,
        prompt_values: Tensor,
        bias: Tensor,
        rotation: Rotation,
        chosen: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Map [batch, scaffold, width] to the same shape, or to [batch, chosen, width] where only some are wanted.

        Args:
            hidden: the scaffold's states.
            prompt_keys, prompt_values: of this layer, out of the memory.
            bias: [batch, 1, 1 or scaffold, prompt + scaffold], added to the scores.
            rotation: of the scaffold's positions.
            chosen: rows [batch, 1] and positions [batch, chosen] to give out; None = all of them.
        """
        states = self.qkv_proj(self.attention_norm(hidden)).unflatten(-1, (3, self.num_heads, -1))
        queries = rotate(self.query_norm(states[:, :, 0]), rotation)
        keys = rotate(self.key_norm(states[:, :, 1]), rotation).transpose(1, 2)
        if chosen is not None:
            hidden, queries = hidden[chosen], queries[chosen]
            bias = bias if bias.shape[2] == 1 else bias[:, 0][chosen][:, None]
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            torch.cat([prompt_keys, keys], dim=-2),
            torch.cat([prompt_values, states[:, :, 2].transpose(1, 2)], dim=-2),
            attn_mask=bias.expand(-1, -1, queries.shape[1], -1),
        )
        hidden = hidden + self.attention_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.mlp_out(F.silu(gate) * up)


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

    def forward(
        self,
        hidden: Tensor,
        scaffold_ids: Tensor,
        scaffold_mask: Tensor,
        memory: PromptMemory,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Point from every scaffold position at prompt positions.

        Args:
            hidden: [batch, scaffold, width].
            scaffold_ids: long [batch, scaffold].
            scaffold_mask: bool [batch, scaffold], False at padding.
            memory: the encoded prompt.
            visible: bool [batch, scaffold, scaffold], which position sees which; None = all. What a position does not
                see neither matches nor carries a score to it.

        Returns:
            Log-probabilities over prompt positions, float32 [batch, scaffold, prompt], hugely negative at padding;
            and what is read there, [batch, scaffold, width].
        """
        hidden = self.norm(hidden)
        scaffold_ids = scaffold_ids.masked_fill(~scaffold_mask, _NO_NEIGHBOUR)
        scores = torch.matmul(self.query_proj(hidden), memory.copy_keys.transpose(1, 2)).float() * self.scale
        weights = self.neighbour_weights(hidden).float()
        for index, step in enumerate((1, -1)):
            match = neighbours_match(scaffold_ids, memory, step, visible)
            scores = scores + torch.where(match, weights[..., index, None], 0.0)
        scores = torch.where(memory.mask[:, None] & scaffold_mask[..., None], scores, 0.0)
        scores = self._carry(scores, self.stride_gates(hidden).float().sigmoid(), visible)
        # Masked before and after, because a row without any prompt would point everywhere.
        nowhere = torch.finfo(scores.dtype).min
        pointer = torch.where(memory.mask[:, None], scores, nowhere).log_softmax(-1)
        pointer = torch.where(memory.mask[:, None], pointer, nowhere)
        read = torch.matmul(pointer.exp().to(hidden.dtype), memory.copy_values)
        return pointer, self.context_out(read)

    def _carry(self, scores: Tensor, gates: Tensor, visible: Tensor | None) -> Tensor:
        """Add to each score [batch, scaffold, prompt] those in front of it on its diagonal, by the strides' gates."""
        for index, stride in enumerate(_COPY_STRIDES):
            if stride >= min(scores.shape[1:]):
                break
            gate = gates[:, stride:, index, None]
            if visible is not None:
                gate = gate * visible.diagonal(-stride, dim1=1, dim2=2)[..., None]
            scores = scores + F.pad(gate * scores[:, :-stride, :-stride], (stride, 0, stride, 0))
        return scores


def neighbours_match(scaffold_ids: Tensor, memory: PromptMemory, step: int, visible: Tensor | None = None) -> Tensor:
    """Whether a scaffold position's neighbour holds the same token as a prompt position's neighbour.

    Args:
        scaffold_ids: long [batch, scaffold], negative at padding.
        memory: gives the prompt's ids [batch, prompt].
        step: 1 compares left neighbours, -1 right ones.
        visible: bool [batch, scaffold, scaffold], which scaffold position sees which; None = all.

    Returns:
        Bool [batch, scaffold, prompt]; False where either has no neighbour, and where the scaffold's is not visible.
        MASK and NULL never match: no prompt holds them.
    """
    nothing = _NO_NEIGHBOUR + 1  # nothing on the one side does not match nothing on the other
    prompt_ids = memory.prompt_ids.masked_fill(~memory.mask, nothing)
    scaffold_neighbours = _shift(scaffold_ids, step, _NO_NEIGHBOUR)
    if visible is not None:
        seen = F.pad(visible.diagonal(-step, dim1=1, dim2=2), (1, 0) if step > 0 else (0, 1))
        scaffold_neighbours = scaffold_neighbours.masked_fill(~seen, _NO_NEIGHBOUR)
    return scaffold_neighbours[:, :, None] == _shift(prompt_ids, step, nothing)[:, None]


def real_positions(mask: Tensor) -> Tensor:
    """Number the real tokens of a row 0, 1, 2, ... wherever the padding is: bool [batch, length] -> long."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Apply the rotary embedding to [batch, length, heads, head_dim], halves convention (as Llama and SmolLM3)."""
    cos, signed_sin = (table[:, :, None] for table in rotation)
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, dims=-1), signed_sin)


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


def _attention_bias(prompt_mask: Tensor, scaffold_mask: Tensor, visible: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of attention so that only what is there, and visible, is read.

    Returns:
        [batch, 1, 1 or scaffold, prompt + scaffold]. Finite, so that a query that sees nothing gets no NaN.
    """
    seen = torch.cat([prompt_mask, scaffold_mask], dim=-1)[:, None]
    if visible is not None:
        scaffold = visible & scaffold_mask[:, None]
        seen = torch.cat([prompt_mask[:, None].expand(-1, scaffold.shape[1], -1), scaffold], dim=-1)
    # Half of the range, so that a score that is added to it cannot leave it.
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min / 2)[:, None]


def _token_places(prompt_ids: Tensor, vocabulary: int) -> Tensor:
    """For each position one that holds the same token, the same for all that hold it: long [batch, prompt]."""
    columns = torch.arange(prompt_ids.shape[1], device=prompt_ids.device).expand_as(prompt_ids)
    table = prompt_ids.new_zeros(len(prompt_ids), vocabulary).scatter_(1, prompt_ids, columns)
    return table.gather(1, prompt_ids)


def _shift(tensor: Tensor, step: int, fill: float) -> Tensor:
    """Move the entries of [batch, length] by one to the right (step 1) or left (-1); what comes in is `fill`."""
    incoming = torch.full_like(tensor[:, :1], fill)
    parts = [incoming, tensor[:, :-1]] if step > 0 else [tensor[:, 1:], incoming]
    return torch.cat(parts, dim=1)
