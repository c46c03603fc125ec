"""The model: a frozen causal language model (`base`) and a schema diffusion head over its hidden states.

Without scaffold inputs `forward` is the base's, bit for bit; with them it gives the head's training loss. Loads and
saves self-contained checkpoints and head-only ones. Generation lives in its mixin; no schema is known here.
"""

import copy
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, logging

from .compiled_decoding import CompiledDecoding
from .configuration_smollm_diffusion import SmolLMDiffusionConfig
from .denoising_loss import (
    CleanCanvases,
    Noise,
    SchemaDiffusionOutput,
    Targets,
    canvas_counts,
    loss_normaliser,
    position_weights,
    row_weights,
    score,
)
from .diffusion_head import PromptMemory, SchemaDiffusionHead, init_head_weights
from .draft_adapter import ADAPTER_FOLDER, ADAPTER_PREFIX, DraftAdapter, lora_config_of, remove_saved
from .draft_policies import guided
from .generation_smollm_diffusion import SchemaGenerationMixin
from .noise_schedule import build_schedule, sample_mask, sample_times

logger = logging.get_logger(__name__)

HEAD_PREFIXES = ("diffusion_head.", "decision_head.")
# Where a checkpoint is looked up, as opposed to how its weights are placed; head-only loading needs the two apart.
_LOOKUP_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


# Masked scaffold and the base's features of it that were read last for a memory: the same in all steps of a draft.
_SCAFFOLDS_READ: WeakKeyDictionary[PromptMemory, tuple[Tensor, Tensor]] = WeakKeyDictionary()

_DTYPE_ARGUMENTS = ("dtype", "torch_dtype")


class SmolLMDiffusionPreTrainedModel(PreTrainedModel):
    """Names, flags and initial weights that transformers asks of a model class."""

    config: SmolLMDiffusionConfig
    config_class = SmolLMDiffusionConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HeadBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    # Attention of the base is the base's business: it checks the request again and refuses what it cannot do.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # Keeps the heads out of 4- and 8-bit quantisation and out of float16, and the probe, whose threshold was measured
    # in float32, out of bfloat16 too.
    _keep_in_fp32_modules = ["diffusion_head", "decision_head"]
    _keep_in_fp32_modules_strict = ["decision_head"]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the head's modules; the base is a model of its own and initialises itself."""
        init_head_weights(module, self.config.initializer_range)


class SmolLMDiffusionForCausalLM(SchemaGenerationMixin, SmolLMDiffusionPreTrainedModel, GenerationMixin):
    """A causal language model whose tool calls are drafted by a masked-diffusion head.

    Args:
        config: a `SmolLMDiffusionConfig`.
    """

    base: Any  # any causal language model of transformers
    diffusion_head: SchemaDiffusionHead
    decision_head: nn.Linear | None  # base_width -> 1, the log-odds of P(call)
    draft_adapter: DraftAdapter | None  # acts on the base in the draft pass only
    compiled_decoding: CompiledDecoding | None = None  # what `compile_decoding` has set up

    def __init__(self, config: SmolLMDiffusionConfig) -> None:
        super().__init__(config)
        # transformers drops what it does not know of a config with this mark when it loads it, our options too.
        self.generation_config._from_model_config = False
        config.check_fields()
        self.base = AutoModelForCausalLM.from_config(config.text_config)
        self.diffusion_head = SchemaDiffusionHead(config)
        self.decision_head = nn.Linear(config.get_text_config().hidden_size, 1) if config.decision_head else None
        self.draft_adapter = None
        self.post_init()
        self.freeze_base()

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        scaffold_ids: Tensor | None = None,
        scaffold_mask: Tensor | None = None,
        slot_mask: Tensor | None = None,
        loss_weights: Tensor | None = None,
        field_ids: Tensor | None = None,
        slot_kinds: Tensor | None = None,
        kind_tokens: Tensor | None = None,
        soft_ids: Tensor | None = None,
        soft_probs: Tensor | None = None,
        noise_samples: int = 1,
        noise_times: Tensor | None = None,
        noise_mask: Tensor | None = None,
        own_mask: Tensor | None = None,
        noise_generator: torch.Generator | None = None,
        loss_normaliser: Tensor | None = None,
        prompt_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base, or, when a scaffold is given, compute the head's denoising loss.

        Args:
            input_ids: long [batch, prompt].
            attention_mask: [batch, prompt], 0 at padding; None = no padding.
            position_ids, past_key_values, inputs_embeds, labels, use_cache, logits_to_keep, output_hidden_states,
            kwargs:
                as in the base's own forward; handed on unchanged.
            scaffold_ids: long [batch, scaffold], the clean target: fixed text, values, NULL in the unused tails of
                slots.
            scaffold_mask: [batch, scaffold], 0 at padding; None = no padding.
            slot_mask: [batch, scaffold], 1 at positions that may be noised and are scored.
            loss_weights: float [batch, scaffold], factor of a position's cross-entropy, 0 leaves it out; None = 1.
            field_ids: long [batch, scaffold], the number of the slot that a position belongs to, -1 for fixed text;
                None will do where `config.field_mask` is "full".
            slot_kinds: long [batch, scaffold], rows of `kind_tokens`; needed where `config.constraint_loss_weight` > 0.
            kind_tokens: bool [kinds, vocab + 2], tokens that can occur in a slot of each kind.
            soft_ids, soft_probs: long and float [batch, scaffold, k], tokens that a teacher expects and how likely,
                mixed in by `config.distill_weight`; all probabilities 0 where it says nothing.
            noise_samples: noise draws per prompt that share one pass of the base; draws of one prompt stand side by
                side in what follows.
            noise_times, noise_mask: float [batch * noise_samples] and bool [batch * noise_samples, scaffold], the noise
                itself (see `noise_schedule.example_noise`); None = drawn here.
            own_mask: bool like `noise_mask`, positions that hold what the head drafts where they are masked too, in
                place of the gold token; as when it drafts, whatever stands there is context and not scored.
            noise_generator: source of the noise that is drawn here; None = torch's global one.
            loss_normaliser: scalar, what the summed loss is divided by; None = its own value for this batch.
            prompt_features: [batch, prompt, features], an earlier result of `base_features`; the base is then not run.

        Returns:
            The base's output, or a `SchemaDiffusionOutput`.

        Raises:
            ValueError: scaffold inputs are incomplete or do not fit together.
        """
        if scaffold_ids is None:
            return self._base_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                output_hidden_states=output_hidden_states,
                **kwargs,
            )
        if input_ids is None or slot_mask is None:
            raise ValueError(
                "Training on a scaffold needs input_ids (the prompt) and slot_mask; pass both with scaffold_ids."
            )
        if slot_mask.shape != scaffold_ids.shape or noise_samples < 1:
            raise ValueError(
                f"slot_mask {tuple(slot_mask.shape)} must have the shape of scaffold_ids {tuple(scaffold_ids.shape)}, "
                f"and noise_samples ({noise_samples}) must be at least 1."
            )
        real = torch.ones_like(slot_mask) if scaffold_mask is None else scaffold_mask
        clean = CleanCanvases(
            ids=scaffold_ids,
            mask=real.bool(),
            slots=slot_mask.bool() & real.bool(),
            weights=(torch.ones_like(scaffold_ids) if loss_weights is None else loss_weights).float(),
            fields=field_ids,
            kinds=slot_kinds,
            soft_ids=soft_ids,
            soft_probs=soft_probs,
        )
        self._check_targets(clean, kind_tokens)
        prompt_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.diffusion_head.reads_scaffold:
            features = self.scaffold_features(input_ids, prompt_mask.bool(), clean.ids, clean.mask, clean.slots)
            clean = replace(clean, features=features)
        if prompt_features is None:
            prompt_features = self.base_features(input_ids, prompt_mask, position_ids)
        elif torch.is_grad_enabled() and self._trains_states():
            raise ValueError("prompt_features leave out the adapter that is trained: pass the prompt alone.")
        memory = self.diffusion_head.encode_prompt(prompt_features, input_ids, prompt_mask.bool())
        if noise_samples > 1:
            rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(noise_samples)
            memory, clean = memory.select(rows), clean.select(rows)
        noise = self._noise(clean.slots, noise_times, noise_mask, own_mask, noise_generator)
        output = self._denoising_loss(memory, clean, noise, kind_tokens, loss_normaliser)
        return output if kwargs.get("return_dict") is not False else output.to_tuple()

    def _base_forward(self, **inputs: Any) -> Any:
        """Call the base with what was given; what is left at its default is not passed, as some bases lack it."""
        if isinstance(inputs["logits_to_keep"], int) and inputs["logits_to_keep"] == 0:
            del inputs["logits_to_keep"]
        return self.base(**{name: value for name, value in inputs.items() if value is not None})

    def _prompt_hidden_states(
        self, input_ids: Tensor | None, mask: Tensor, position_ids: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Hidden states of a prompt for the head; gradients are kept only if an adapter is trained."""
        if position_ids is None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp_min(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains_states()), self.drafting_base():
            output = self._base_forward(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=False,
                output_hidden_states=True,
                logits_to_keep=1,  # the vocabulary-sized logits of the prompt are not needed
            )
        return output.hidden_states

    def _trains_states(self) -> bool:
        """Whether something that the base's hidden states depend on is trained: an adapter."""
        parts = (self.base, self.draft_adapter)
        return any(parameter.requires_grad for part in parts if part is not None for parameter in part.parameters())

    # ------------------------------------------------------------------ the draft adapter

    def add_draft_adapter(self, lora_config: Any = None, **options: Any) -> None:
        """Add a LoRA adapter to the base that acts only where the head's features of a prompt come from; needs peft.

        The base's own forwards, and so routing, checks and text, stay what they are bit for bit. Drafting then takes
        one more forward of the base, over all that stands in front of a call; see `draft_features`.

        Args:
            lora_config: a `peft.LoraConfig`.
            options: fields of one, in place of it; without `target_modules` all linear layers are adapted.

        Raises:
            ImportError: peft is not installed.
            ValueError: there is an adapter already, or the config asks for more than plain LoRA on linear layers.
        """
        if self.draft_adapter is not None:
            raise ValueError("The model has a draft adapter already: train that, or load the model without one.")
        adapter = DraftAdapter(lora_config_of(lora_config, **options), self.config.text_config)
        if adapter.lora_config.base_model_name_or_path is None:
            adapter.lora_config.base_model_name_or_path = self.config.base_model_name_or_path
        self._set_draft_adapter(adapter)

    def _set_draft_adapter(self, adapter: DraftAdapter) -> None:
        """Take an adapter into use, beside the base and in the dtype of the head."""
        adapter.move_beside(self.base, like=next(self.diffusion_head.parameters()))
        self.draft_adapter = adapter.train(self.training)
        self.config.draft_adapter = True

    @property
    def has_draft_adapter(self) -> bool:
        """Whether the model has a draft adapter."""
        return self.draft_adapter is not None

    def drafting_base(self) -> AbstractContextManager[None]:
        """A context in which forwards of `base`, those of this thread, have the draft adapter, if there is one."""
        return nullcontext() if self.draft_adapter is None else self.draft_adapter.acting_on(self.base)

    @torch.no_grad()
    def draft_features(self, contexts: Sequence[Sequence[int]]) -> list[Tensor]:
        """What the head reads of contexts when it drafts, by one forward of the base with the draft adapter.

        It runs every token, since keys and values are kept of the base without adapter only: about 1.3 times what a
        prefill without a prompt cache takes (rank 16 on all layers, CPU), once for each call of a reply.

        Args:
            contexts: tokens of each row, at least one.

        Returns:
            [tokens, feature_layers * base_width] of each row.
        """
        rows = [torch.tensor(context, device=self.device) for context in contexts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        features = self.base_features(ids, mask)
        return [states[: len(row)] for states, row in zip(features, rows, strict=True)]

    # ------------------------------------------------------------------ the head's two calls

    def base_features(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Run the base over prompts for what the head reads of them, with the draft adapter if there is one.

        Args:
            input_ids: long [batch, prompt].
            attention_mask: [batch, prompt], 0 at padding.
            position_ids: long [batch, prompt]; None = real tokens are counted from 0.

        Returns:
            [batch, prompt, feature_layers * base_width], the `prompt_features` of a training forward.
        """
        return self.prompt_features_of(self._prompt_hidden_states(input_ids, attention_mask, position_ids))

    def scaffold_features(
        self, prompt_ids: Tensor, prompt_mask: Tensor, scaffold_ids: Tensor, scaffold_mask: Tensor, slots: Tensor
    ) -> Tensor:
        """Run the base over prompts and masked scaffolds for what the head reads of the scaffolds.

        No base has a token for MASK. What stands in for it is the mean of the embeddings of all tokens that its row
        shows: of the scale of its neighbours, and with no meaning of its own that a padding or end token would bring.

        Args:
            prompt_ids: long [batch, prompt].
            prompt_mask: bool [batch, prompt], False at padding.
            scaffold_ids: long [batch, scaffold]; what stands in slots is not read.
            scaffold_mask: bool [batch, scaffold], False at padding.
            slots: bool [batch, scaffold], all slot positions, masked or not.

        Returns:
            [batch, scaffold, feature_layers * base_width].
        """
        mask = torch.cat([prompt_mask, scaffold_mask], dim=1)
        shown = mask & torch.cat([torch.ones_like(prompt_mask), ~slots], dim=1)
        ids = torch.cat([prompt_ids, scaffold_ids], dim=1).masked_fill(~shown, 0)
        states = self.get_input_embeddings()(ids).detach()
        mean = (states * shown[..., None]).sum(1, keepdim=True) / shown.sum(1)[:, None, None].clamp_min(1)
        states = torch.where(shown[..., None], states, mean.to(states.dtype))
        hidden_states = self._prompt_hidden_states(None, mask.long(), None, inputs_embeds=states)
        return self.prompt_features_of(hidden_states)[:, prompt_ids.shape[1] :]

    def _draft_scaffold_features(
        self, key: PromptMemory, memory: PromptMemory, ids: Tensor, mask: Tensor, fields: Tensor | None
    ) -> Tensor | None:
        """The base's features of a scaffold that is being drafted, computed once for all steps; None where not read.

        Args:
            key: the memory that is the same object in all steps.
            memory: the memory whose rows are drafted.
            ids, mask, fields: long, bool and long [batch, scaffold].
        """
        if not self.diffusion_head.reads_scaffold:
            return None
        if fields is None:
            raise ValueError('With scaffold_features "base" a draft needs field_ids: they say where the slots are.')
        slots = fields >= 0
        shown = ids.masked_fill(slots, self.config.mask_token_id).masked_fill(~mask, -1)
        known = _SCAFFOLDS_READ.get(key)
        if known is not None and torch.equal(known[0], shown):
            return known[1]
        features = self.scaffold_features(memory.prompt_ids, memory.mask, ids, mask, slots).detach()
        _SCAFFOLDS_READ[key] = shown, features
        return features

    def prompt_features_of(self, hidden_states: tuple[Tensor, ...]) -> Tensor:
        """Pick the layers that the head reads out of the base's `hidden_states`, side by side.

        Args:
            hidden_states: one tensor [batch, prompt, base_width] per layer, embeddings first.

        Returns:
            [batch, prompt, feature_layers * base_width]; can be cached while base and draft adapter are frozen.
        """
        return torch.cat([hidden_states[index] for index in self.config.feature_layers], dim=-1)

    def prompt_memory(
        self,
        hidden_states: tuple[Tensor, ...],
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        offset: Tensor | None = None,
    ) -> PromptMemory:
        """Encode a prompt for drafting, once per request, or what has been added to it since.

        Args:
            hidden_states: as the base returns them with `output_hidden_states=True`.
            prompt_ids: long [batch, prompt].
            prompt_mask: [batch, prompt], 0 or False at padding, which may be on either side.
            offset: long [batch], how many real tokens stand in front of these: the `lengths` of the memory that the
                result will `extend`; None = nothing does.
        """
        features = self.prompt_features_of(hidden_states)
        return self.diffusion_head.encode_prompt(features, prompt_ids, prompt_mask.bool(), offset)

    def draft_log_probs(
        self,
        memory: PromptMemory,
        scaffold_ids: Tensor,
        scaffold_mask: Tensor,
        slot_positions: Tensor,
        time: Tensor,
        field_ids: Tensor | None = None,
        guidance_scale: float = 0.0,
    ) -> Tensor:
        """Predict tokens at chosen scaffold positions.

        Args:
            memory: from `prompt_memory`.
            scaffold_ids: long [batch, scaffold]; `config.mask_token_id` where a token is to be found.
            scaffold_mask: [batch, scaffold], 0 or False at padding.
            slot_positions: long [batch, positions], indices into the scaffold; pad rows with any valid index.
            time: float [batch], the fraction of slot positions that are still masked.
            field_ids: long [batch, scaffold], the number of the slot that a position belongs to, -1 for fixed text;
                None will do where `config.field_mask` is "full".
            guidance_scale: strength of classifier-free guidance (arXiv 2207.12598): away from what would be drafted
                without the prompt. Above 0 the head runs on twice the rows, still once.

        Returns:
            Float32 log-probabilities [batch, positions, vocab + 2]; MASK is -inf, NULL the last index.

        Raises:
            ValueError: the field mask or `config.scaffold_features` needs `field_ids`, or the scale is negative or not
                finite.
        """
        given = memory
        if guidance_scale != 0:
            memory = PromptMemory.stack([memory, memory.without_prompt()])
            scaffold_ids, scaffold_mask, slot_positions, time = (
                torch.cat([tensor, tensor]) for tensor in (scaffold_ids, scaffold_mask, slot_positions, time)
            )
            field_ids = None if field_ids is None else torch.cat([field_ids, field_ids])
        features = self._draft_scaffold_features(given, memory, scaffold_ids, scaffold_mask.bool(), field_ids)
        hidden, pointer = self.diffusion_head(
            scaffold_ids,
            scaffold_mask.bool(),
            memory,
            time,
            self._embedding_weight(),
            field_ids,
            slot_positions,
            features,
        )
        rows = torch.arange(len(scaffold_ids), device=scaffold_ids.device)[:, None]
        log_probs = self.diffusion_head.slot_log_probs(hidden, pointer, memory, rows, self.get_output_embeddings())
        if guidance_scale == 0:
            return log_probs
        conditional, unconditional = log_probs.chunk(2)
        return guided(conditional, unconditional, guidance_scale)

    def call_probability(self, logits: Tensor, hidden: Tensor | None, call_token: int) -> Tensor:
        """How likely a call is wanted behind a context: what the probe says, or, without one, the base.

        Args:
            logits: [rows, vocab] of the base behind the contexts.
            hidden: [rows, base_width], the base's last hidden state there; None asks the base and not the probe.
            call_token: id of `<tool_call>`, with which every call begins.

        Returns:
            Float32 [rows]: P(call) in [0, 1].
        """
        if self.decision_head is None or hidden is None:
            return logits.float().softmax(-1)[:, call_token]
        # In float32 whatever the model's dtype: the threshold was chosen on such scores.
        weight, bias = (part.to(hidden.device, torch.float32) for part in self.decision_head.parameters())
        return nn.functional.linear(hidden.float(), weight, bias)[:, 0].sigmoid()

    def set_decision_head(self, weight: Tensor | None, bias: float = 0.0) -> None:
        """Give the model a probe for P(call), in place of the one that it may have; it is saved with the model.

        Args:
            weight: float [base_width], applied to the base's last hidden state at the last token of a context; None
                leaves the model without a probe.
            bias: added to that; the sum is the log-odds of a call.

        Raises:
            ValueError: the weight does not fit the base.
        """
        if weight is None:
            self.decision_head, self.config.decision_head = None, False
            return
        width = self.config.get_text_config().hidden_size
        if tuple(weight.shape) != (width,):
            raise ValueError(f"The probe's weight has shape {tuple(weight.shape)}, the base needs ({width},).")
        self.config.decision_head = True
        self.decision_head = nn.Linear(width, 1, device=self.device)
        with torch.no_grad():
            self.decision_head.weight.copy_(weight[None])
            self.decision_head.bias.fill_(bias)
        self.freeze_base()

    def _embedding_weight(self) -> Tensor:
        weight = self.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def compile_decoding(self, **options: Any) -> "SmolLMDiffusionForCausalLM":
        """Write tool calls with compiled forwards from now on: of the head for drafts, of the base for their checks.

        Replies stay what they are, up to rounding. A shape is compiled when it is first met, which takes seconds to
        minutes; later requests of about the same size share it. Prompts and text are run as before, and so is, after
        one line in the log, whatever cannot be compiled: quantised bases, sliding windows, other devices than CPU and
        CUDA, a machine without a compiler. Hooks on modules inside base or head count from when a shape is compiled;
        add them before.

        Call it when the model is where it shall run, and again after a change of device, dtype, attention or adapters.

        Args:
            options: of `CompiledDecoding`: `backend`, `mode`, `buckets`, `max_graphs`.

        Returns:
            The model itself.

        Raises:
            ValueError: `max_graphs` is no positive number.
        """
        self.compiled_decoding = CompiledDecoding(self, **options)
        return self

    # ------------------------------------------------------------------ loss

    def _check_targets(self, clean: CleanCanvases, kind_tokens: Tensor | None) -> None:
        """Refuse targets that the objective lacks a part of."""
        if (clean.kinds is None or kind_tokens is None) and self.config.constraint_loss_weight > 0:
            raise ValueError(
                f"config.constraint_loss_weight is {self.config.constraint_loss_weight}, which needs slot_kinds and "
                "kind_tokens; pass both, or set the weight to 0."
            )
        if (clean.soft_ids is None) != (clean.soft_probs is None):
            raise ValueError("soft_ids and soft_probs belong together; pass both or none of them.")

    def _noise(
        self,
        slots: Tensor,
        times: Tensor | None,
        masked: Tensor | None,
        own: Tensor | None,
        generator: torch.Generator | None,
    ) -> Noise:
        """The noise that was given, checked, or fresh noise for slot positions (bool [rows, scaffold])."""
        if times is None and masked is None and own is None:
            schedule = build_schedule(self.config.noise_schedule, self.config.noise_eps)
            times = sample_times(len(slots), self.config.noise_eps, slots.device, generator)
            return Noise(times, sample_mask(slots, times, schedule, generator))
        if times is None or masked is None:
            raise ValueError("noise_times, noise_mask and own_mask belong together; pass both of the first or none.")
        shapes = [tuple(part.shape) for part in (times, masked, own) if part is not None]
        if shapes[0] != (len(slots),) or any(shape != tuple(slots.shape) for shape in shapes[1:]):
            raise ValueError(
                f"noise_times and the noise masks must be [batch * noise_samples] = [{len(slots)}] and "
                f"{list(slots.shape)}, got {', '.join(str(list(shape)) for shape in shapes)}."
            )
        masked = masked.bool() & slots
        return Noise(times, masked, None if own is None else own.bool() & slots & ~masked)

    def _denoising_loss(
        self,
        memory: PromptMemory,
        clean: CleanCanvases,
        noise: Noise,
        kind_tokens: Tensor | None,
        normaliser: Tensor | None,
    ) -> SchemaDiffusionOutput:
        """Predict what is masked, and score the predictions. Source: MDLM (arXiv 2406.07524)."""
        noisy_ids = clean.ids.masked_fill(noise.masked, self.config.mask_token_id)
        if noise.own is not None:
            noisy_ids = self._with_own_draft(memory, clean, noisy_ids, noise.own)
        chosen = noise.masked & (clean.weights > 0)  # vocabulary-sized work only where it counts
        log_probs = self._predict(memory, clean, noisy_ids, chosen)  # [chosen, vocab + 2]
        own_normaliser = loss_normaliser(self.config, clean.ids, clean.weights, clean.slots, noise.masked)
        weights = position_weights(self.config, clean.ids, clean.weights)
        weights = weights * row_weights(self.config, noise, clean.slots)[:, None]
        allowed = None
        if self.config.constraint_loss_weight > 0 and clean.kinds is not None and kind_tokens is not None:
            allowed = kind_tokens[clean.kinds[chosen]]
        targets = Targets(
            ids=clean.ids[chosen],
            weights=weights[chosen],
            normaliser=own_normaliser if normaliser is None else normaliser,
            allowed=allowed,
            soft_ids=None if clean.soft_ids is None else clean.soft_ids[chosen],
            soft_probs=None if clean.soft_probs is None else clean.soft_probs[chosen],
        )
        output = score(self.config, log_probs, targets)
        output.sums = {**(output.sums or {}), **canvas_counts(clean, noise, own_normaliser)}
        return output

    def _predict(self, memory: PromptMemory, clean: CleanCanvases, noisy_ids: Tensor, chosen: Tensor) -> Tensor:
        """Log-probabilities [n, vocab + 2] of the head at the chosen positions (bool [rows, scaffold])."""
        # The head is told the fraction that is really masked, because that is what it is told when it drafts.
        masked = ((noisy_ids == self.config.mask_token_id) & clean.slots).sum(-1)
        fraction = masked / clean.slots.sum(-1).clamp_min(1)
        hidden, pointer = self.diffusion_head(
            noisy_ids,
            clean.mask,
            memory,
            fraction,
            self._embedding_weight(),
            clean.fields,
            scaffold_features=clean.features,
        )
        rows, positions = chosen.nonzero(as_tuple=True)
        return self.diffusion_head.slot_log_probs(
            hidden[rows, positions], pointer[rows, positions], memory, rows, self.get_output_embeddings()
        )

    @torch.no_grad()
    def _with_own_draft(self, memory: PromptMemory, clean: CleanCanvases, noisy_ids: Tensor, own: Tensor) -> Tensor:
        """Put the head's best tokens at `own` (bool [rows, scaffold]), predicted while those are masked as well.

        When the head drafts, what is committed is its own and may be wrong; trained on gold context alone it would
        trust it blindly. Only masked positions are scored: a committed token is masked before it is predicted again.
        """
        rows = own.any(-1).nonzero()[:, 0]
        if len(rows) == 0:
            return noisy_ids
        earlier = noisy_ids.masked_fill(own, self.config.mask_token_id)
        log_probs = self._predict(memory.select(rows), clean.select(rows), earlier[rows], own[rows])
        return noisy_ids.masked_scatter(own, log_probs.argmax(-1))

    # ------------------------------------------------------------------ the base stays frozen

    def freeze_base(self) -> None:
        """Switch off gradients of the base; called after every way of building or loading the model.

        The probe's go with them: it is fitted on the base's hidden states, and no forward of the model uses it.
        """
        self.base.requires_grad_(False)
        if self.decision_head is not None:
            self.decision_head.requires_grad_(False)

    def train(self, mode: bool = True) -> "SmolLMDiffusionForCausalLM":
        """Set the mode of the head; the base stays in eval mode, so that its hidden states have no dropout."""
        super().train(mode)
        self.base.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The base's token embeddings."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base's token embeddings."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The base's language-model head."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the base's language-model head."""
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the base's vocabulary; the head has no vocabulary matrix, MASK and NULL move behind the last id."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.freeze_base()
        return embeddings

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a self-contained or a head-only checkpoint; of the latter, the base comes from where its config says.

        Args:
            pretrained_model_name_or_path: folder or repo.
            model_args, config, kwargs: as in transformers; `base_model_name_or_path` and `base_revision` override
                where the
                base of a head-only checkpoint is found.

        Raises:
            ValueError: weights of the head or of the draft adapter are missing or unknown, or the base's checkpoint
                does not fit the config.
            ImportError: the checkpoint has a draft adapter, and peft is not installed.
        """
        lookup = {name: kwargs[name] for name in _LOOKUP_ARGUMENTS if name in kwargs}
        # Any config object counts: remote code is imported once per entry file, so one class can exist twice.
        if isinstance(config, PreTrainedConfig):
            head_only = getattr(config, "head_only_checkpoint", False)
        elif pretrained_model_name_or_path is None:
            head_only = False
        else:
            fields, _ = SmolLMDiffusionConfig.get_config_dict(config or pretrained_model_name_or_path, **lookup)
            if fields.get("model_type") != SmolLMDiffusionConfig.model_type:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a checkpoint of type {fields.get('model_type')!r}, not of "
                    f"{SmolLMDiffusionConfig.model_type!r}; use {cls.__name__}.from_base to put a fresh head on it."
                )
            head_only = fields.get("head_only_checkpoint", False)
        source = pretrained_model_name_or_path
        if head_only:
            loaded = cls._from_head_only(source, config, lookup, **kwargs)
        else:
            loaded = _frozen(super().from_pretrained(source, *model_args, config=config, **kwargs))
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if source is not None and model.config.draft_adapter:
            model._set_draft_adapter(DraftAdapter.load(source, model.config.text_config, **lookup))
        return loaded

    @classmethod
    def from_base(
        cls, base_model_name_or_path: str | os.PathLike, *, revision: str | None = None, **kwargs: Any
    ) -> "SmolLMDiffusionForCausalLM":
        """Put a fresh head on any causal language model.

        Args:
            base_model_name_or_path: folder or repo of the base.
            revision: revision of that repo.
            kwargs: fields of `SmolLMDiffusionConfig` (such as `head_hidden_size`), and what transformers'
                `from_pretrained`
                takes (such as `dtype`, `device_map`, `quantization_config`).

        Returns:
            The model, its base frozen and its head freshly initialised.

        Raises:
            ValueError: the checkpoint lacks weights of the base.
        """
        known = set(inspect.signature(SmolLMDiffusionConfig.__init__).parameters) - {"self", "kwargs"}
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        lookup = {name: kwargs[name] for name in _LOOKUP_ARGUMENTS if name in kwargs}
        name = os.fspath(base_model_name_or_path)
        text_config = AutoConfig.from_pretrained(name, revision=revision, **lookup)
        # A base that was saved quantised says so in its own config, but transformers looks for it in the outer one.
        quantization = text_config.__dict__.pop("quantization_config", None)
        fields = {"text_config": text_config, "base_model_name_or_path": name, "base_revision": revision, **fields}
        config = SmolLMDiffusionConfig(**fields)
        if quantization is not None:
            config.quantization_config = quantization
        model, _ = cls._from_base_checkpoint(config, **kwargs)
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        head_only: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model with its code; a draft adapter goes to the folder `adapter/` in peft's format.

        Args:
            save_directory: folder to write to.
            head_only: write the head's weights alone; loading then fetches the base from
                `config.base_model_name_or_path`.
            is_main_process, state_dict, args, kwargs: as in transformers.

        Raises:
            ValueError: `head_only` without a base that could be found again.
        """
        if head_only and self.config.base_model_name_or_path is None:
            raise ValueError(
                "A head-only checkpoint needs config.base_model_name_or_path, the repo or folder of the base; set "
                "it, or save "
                "with head_only=False."
            )
        with self._saving(head_only, save_directory):
            # Written first, because what is uploaded is uploaded at the end of transformers' own saving.
            if self.draft_adapter is not None and is_main_process:
                self.draft_adapter.save(save_directory, state_dict)
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
            if self.draft_adapter is None and is_main_process:
                remove_saved(save_directory)

    def _upload_modified_files(
        self, working_dir: Any, repo_id: str, files_timestamps: dict[str, float], *args: Any, **kwargs: Any
    ) -> Any:
        """Upload what was saved; the adapter was written before transformers looked at the times of files."""
        if self.draft_adapter is not None:
            files_timestamps = {name: time for name, time in files_timestamps.items() if name != ADAPTER_FOLDER}
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)

    @contextmanager
    def _saving(self, head_only: bool, save_directory: str | os.PathLike) -> Iterator[None]:
        """Prepare config, key filter and code copying for one save, and put them back afterwards."""
        kept_keys: set[str] = set(getattr(self, "_keys_to_ignore_on_save", None) or ())
        kept_fields = dict(self.config.__dict__)
        text_config = self.config.text_config
        base_name = text_config.name_or_path
        auto_classes = {kind: kind._auto_class for kind in (type(self), type(self.config))}
        try:
            self.config.head_only_checkpoint, self.config.draft_adapter = head_only, self.has_draft_adapter
            if self.draft_adapter is not None:
                adapter_keys = {ADAPTER_PREFIX + key for key in self.draft_adapter.state_dict()}
                self._keys_to_ignore_on_save = kept_keys | adapter_keys
            if head_only:
                # The base is loaded from its own checkpoint, so how it is quantised is decided by the next load.
                self.config.__dict__.pop("quantization_config", None)
                self._keys_to_ignore_on_save = {key for key in self._saved_keys() if not key.startswith(HEAD_PREFIXES)}
            elif os.path.isdir(self.config.base_model_name_or_path or ""):
                # A checkpoint with its own base needs no folder of this machine, and nobody else has it.
                self.config.base_model_name_or_path, text_config.name_or_path = None, ""
            if os.path.realpath(save_directory) == os.path.dirname(os.path.realpath(__file__)):
                for kind in auto_classes:  # the code is there already, and copying a file onto itself fails
                    kind._auto_class = None
            yield
        finally:
            self._keys_to_ignore_on_save = kept_keys
            self.config.head_only_checkpoint = False
            self.config.base_model_name_or_path = kept_fields["base_model_name_or_path"]
            text_config.name_or_path = base_name
            if "quantization_config" in kept_fields:
                self.config.quantization_config = kept_fields["quantization_config"]
            for kind, auto_class in auto_classes.items():
                kind._auto_class = auto_class

    def _saved_keys(self) -> list[str]:
        """Names of all saved tensors; a quantised base has more of them than its state dict."""
        quantizer = getattr(self, "hf_quantizer", None)
        state = self.state_dict() if quantizer is None else quantizer.get_state_dict_and_metadata(self)[0]
        return list(state or self.state_dict())

    @classmethod
    def _from_head_only(cls, source: Any, config: Any, lookup: dict[str, Any], **kwargs: Any) -> Any:
        """Load the base from where the config says, then the head's weights from `source`, strictly."""
        wants_info = kwargs.pop("output_loading_info", False)
        if not isinstance(config, PreTrainedConfig):
            placement: dict[str, Any] = {name: kwargs.pop(name) for name in _DTYPE_ARGUMENTS if name in kwargs}
            config, kwargs = SmolLMDiffusionConfig.from_pretrained(
                config or source, return_unused_kwargs=True, **kwargs
            )
            kwargs.update(placement)
        config = copy.deepcopy(config)
        config.head_only_checkpoint = False  # true of the files, not of the model in memory
        weights_file = cached_file(source, SAFE_WEIGHTS_NAME, **lookup)
        # AutoModel puts the revision of the head's repo into `adapter_kwargs` too; the base's has no such commit.
        for name in ("revision", "subfolder", "code_revision", "adapter_kwargs"):
            kwargs.pop(name, None)
        model, info = cls._from_base_checkpoint(config, **kwargs)
        head_state = load_file(weights_file)
        model._load_head(head_state, source)
        model.config.name_or_path = model.name_or_path = str(source)
        try:
            model.generation_config = GenerationConfig.from_pretrained(source, **lookup)
        except OSError:
            logger.info("%s has no generation config; that of the base is used.", source)
        info["missing_keys"] = {key for key in info["missing_keys"] if not key.startswith(HEAD_PREFIXES)}
        return (model, info) if wants_info else model

    @classmethod
    def _from_base_checkpoint(
        cls, config: SmolLMDiffusionConfig, **kwargs: Any
    ) -> tuple["SmolLMDiffusionForCausalLM", dict[str, Any]]:
        """Load a plain base into the model; the head stays as initialised.

        Raises:
            ValueError: the checkpoint lacks weights of the base, or they have other shapes.
        """
        revision = {} if config.base_revision is None else {"revision": config.base_revision}
        kwargs.pop("output_loading_info", None)
        load = partial(super().from_pretrained, config.base_model_name_or_path, config=config, output_loading_info=True)
        with _quiet_loading():  # the report would list the whole head as missing
            model, info = load(**revision, **kwargs)
            if not model.state_dict().keys() - set(info["missing_keys"]):
                # Nothing was found, so this is a checkpoint of the body of the base alone, such as that of gpt2.
                body = model.base.base_model_prefix
                model, info = load(key_mapping={"^(.+)": rf"{body}.\1"}, **revision, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(HEAD_PREFIXES))
        if missing or info["mismatched_keys"]:
            raise ValueError(
                f"{config.base_model_name_or_path} does not hold the base that text_config describes: "
                f"{len(missing)} weights are "
                f"missing ({', '.join(missing[:3])}) and {len(info['mismatched_keys'])} have another shape. Use the "
                f"checkpoint of "
                f"a causal language model of type {config.text_config.model_type!r}, saved with its output layer."
            )
        return _frozen(model), info

    def _load_head(self, state: dict[str, Tensor], source: Any) -> None:
        """Copy the weights of the heads in; nothing may be missing, unknown or of another shape."""
        heads = {prefix: getattr(self, prefix.rstrip(".")) for prefix in HEAD_PREFIXES}
        own = {prefix + name for prefix, head in heads.items() if head is not None for name in head.state_dict()}
        missing, unexpected = sorted(own - state.keys()), sorted(state.keys() - own)
        if missing or unexpected:
            raise ValueError(
                f"The head-only checkpoint {source} does not fit its config: missing {missing[:3]} ({len(missing)} "
                f"in all), "
                f"unexpected {unexpected[:3]} ({len(unexpected)} in all). Save it again with head_only=True."
            )
        if self.decision_head is not None:
            self.decision_head.float()  # the base's checkpoint does not have it, so it was made in the base's dtype
        for prefix, head in heads.items():
            if head is not None:
                part = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
                head.load_state_dict(part)


def _frozen(loaded: Any) -> Any:
    """Freeze the base of a loaded model (it may come with loading info), because loading makes everything trainable."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.freeze_base()
    return loaded


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hold back transformers' warnings for the duration of a load whose result is checked by the caller."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


# Saving copies the code beside the weights, so that a saved folder loads by itself.
SmolLMDiffusionForCausalLM.register_for_auto_class("AutoModelForCausalLM")
