"""Configuration of the model: the config of its frozen base, nested, and the numbers of the diffusion head.

Takes keyword arguments or a `config.json`; gives validated, JSON-serialisable fields and the ids of the two head-owned
tokens.
It holds no generation settings (those live in the generation config) and builds no modules.
"""

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.smollm3 import SmolLM3Config

NOISE_SCHEDULES = ("log_linear", "cosine", "linear")
LOSS_WEIGHTINGS = ("schedule", "count", "none")
FIELD_MASKS = ("full", "block_causal", "isolated")
SCAFFOLD_FEATURES = ("head", "base")

# The Hub finds the classes through this map; AutoModel and AutoModelForCausalLM give the same class.
AUTO_MAP = {
    "AutoConfig": "configuration_smollm_diffusion.SmolLMDiffusionConfig",
    "AutoModel": "modeling_smollm_diffusion.SmolLMDiffusionForCausalLM",
    "AutoModelForCausalLM": "modeling_smollm_diffusion.SmolLMDiffusionForCausalLM",
}
# `transformers serve` looks this name up in transformers itself, so it must be a class that transformers has.
ARCHITECTURES = ["AutoModelForCausalLM"]

_FEATURE_LAYER_COUNT = 4
_INTERMEDIATE_MULTIPLE = 64


def spread_layers(num_hidden_layers: int, count: int = _FEATURE_LAYER_COUNT) -> tuple[int, ...]:
    """Choose evenly spread indices into a base's `hidden_states` tuple, the last one always included.

    Args:
        num_hidden_layers: layers of the base; its tuple has one entry more, index 0 being the embeddings.
        count: how many indices to choose at most.

    Returns:
        Strictly increasing indices in [1, num_hidden_layers].
    """
    return tuple(sorted({math.ceil(num_hidden_layers * part / count) for part in range(1, count + 1)}))


class SmolLMDiffusionConfig(PreTrainedConfig):
    """Everything that fixes the shape and the training objective of the model.

    Args:
        text_config: config of the frozen base, as an object or a dict with `model_type`; None = SmolLM3's defaults.
        head_hidden_size: width of the diffusion head.
        head_num_layers: bidirectional blocks of the head.
        head_num_heads: attention heads; the width per head must come out even, because of the rotary embedding.
        head_intermediate_size: width of the gated MLP; None = 8/3 of the head's width, rounded up to a multiple of 64.
        feature_layers: indices into the base's `hidden_states` tuple (0 = embeddings) that the head reads;
            None = four spread ones that end at the last.
        field_mask: what a position of a slot sees of the other slots: "full" (all of them), "block_causal" (those in
            front of it) or "isolated" (nothing). Unless it is "full", fixed text sees no slot.
        scaffold_features: "head" embeds the scaffold in the head alone; "base" also runs the base over prompt and
            masked scaffold, one more forward for each draft, and gives the head its hidden states there.
        string_budget: positions that the head drafts for a string value.
        number_budget: positions that the head drafts for a number.
        array_budget: items that the head drafts for an array.
        max_value_tokens: hard limit of one value in the autoregressive reference.
        max_call_tokens: length from which a call takes only what its schema requires, so that it comes to an end.
        noise_schedule: "log_linear", "cosine" or "linear".
        noise_eps: probability of a clean token at time 1, and the smallest time that is trained.
        loss_weighting: weight of a row's cross-entropy: "schedule" (likelihood bound), "count" (slots / masked slots)
            or "none".
        null_loss_weight: weight of the cross-entropy at positions whose target is NULL.
        null_prediction_penalty: weight of the probability of NULL at positions whose target is content.
        label_smoothing: part of the target distribution spread over all tokens.
        constraint_loss_weight: weight of -log(mass on tokens that can occur in a slot of the kind at hand).
        distill_weight: part of the cross-entropy that is taken with a teacher's distribution where one is given; the
            rest is taken with the gold token.
        initializer_range: standard deviation of the head's initial weights.
        decision_head: whether the model has a probe that says how likely a call is wanted; see `DecisionHead`.
        draft_adapter: whether the model has a LoRA adapter on its base, which acts in the draft pass only; it lies in
            `adapter/` beside the config.
        base_model_name_or_path: repo or folder of the base; a head-only checkpoint loads the base from it.
        base_revision: revision of that repo.
        head_only_checkpoint: whether the weights beside this config hold the head alone.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "smollm_diffusion"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        head_hidden_size: int = 2048,
        head_num_layers: int = 4,
        head_num_heads: int = 8,
        head_intermediate_size: int | None = None,
        feature_layers: tuple[int, ...] | list[int] | None = None,
        field_mask: str = "full",
        scaffold_features: str = "head",
        string_budget: int = 16,
        number_budget: int = 12,
        array_budget: int = 4,
        max_value_tokens: int = 256,
        max_call_tokens: int = 1024,
        noise_schedule: str = "log_linear",
        noise_eps: float = 1e-3,
        loss_weighting: str = "schedule",
        null_loss_weight: float = 0.1,
        null_prediction_penalty: float = 0.3,
        label_smoothing: float = 0.1,
        constraint_loss_weight: float = 0.0,
        distill_weight: float = 0.0,
        initializer_range: float = 0.02,
        decision_head: bool = False,
        draft_adapter: bool = False,
        base_model_name_or_path: str | None = None,
        base_revision: str | None = None,
        head_only_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        self.text_config = _text_config(text_config)
        self.head_hidden_size = head_hidden_size
        self.head_num_layers = head_num_layers
        self.head_num_heads = head_num_heads
        _check_positive_int("head_hidden_size", head_hidden_size)
        if head_intermediate_size is None:
            blocks = math.ceil(head_hidden_size * 8 / 3 / _INTERMEDIATE_MULTIPLE)
            head_intermediate_size = _INTERMEDIATE_MULTIPLE * blocks
        self.head_intermediate_size: int = head_intermediate_size
        if feature_layers is None:
            feature_layers = spread_layers(self.text_config.num_hidden_layers)
        self.feature_layers = tuple(feature_layers) if isinstance(feature_layers, list) else feature_layers
        self.field_mask = field_mask
        self.scaffold_features = scaffold_features
        self.string_budget = string_budget
        self.number_budget = number_budget
        self.array_budget = array_budget
        self.max_value_tokens = max_value_tokens
        self.max_call_tokens = max_call_tokens
        self.noise_schedule = noise_schedule
        self.noise_eps = noise_eps
        self.loss_weighting = loss_weighting
        self.null_loss_weight = null_loss_weight
        self.null_prediction_penalty = null_prediction_penalty
        self.label_smoothing = label_smoothing
        self.constraint_loss_weight = constraint_loss_weight
        self.distill_weight = distill_weight
        self.initializer_range = initializer_range
        self.decision_head = decision_head
        self.draft_adapter = draft_adapter
        self.base_model_name_or_path = base_model_name_or_path
        self.base_revision = base_revision
        self.head_only_checkpoint = head_only_checkpoint
        self.check_fields()

        self.auto_map = {**AUTO_MAP, **kwargs.pop("auto_map", {})}
        kwargs["architectures"] = list(ARCHITECTURES)
        super().__init__(**kwargs)

    @property
    def mask_token_id(self) -> int:
        """Id of MASK, the first id after the base's vocabulary; it follows the vocabulary when that is resized."""
        return self.get_text_config().vocab_size

    @property
    def null_token_id(self) -> int:
        """Id of NULL, which fills the unused tail of a slot."""
        return self.get_text_config().vocab_size + 1

    def check_fields(self) -> None:
        """Check every field and their combinations; called again when a model is built, as fields can be set later.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a field is out of range, or fields contradict each other.
        """
        for name in ("head_hidden_size", "head_num_layers", "head_num_heads", "head_intermediate_size"):
            _check_positive_int(name, getattr(self, name))
        for name in ("string_budget", "number_budget", "array_budget", "max_value_tokens", "max_call_tokens"):
            _check_positive_int(name, getattr(self, name))
        if self.head_hidden_size % (2 * self.head_num_heads):
            raise ValueError(
                f"head_hidden_size ({self.head_hidden_size}) must be a multiple of 2 * head_num_heads "
                f"({2 * self.head_num_heads}), because each head needs an even width; change one of the two."
            )
        for name in ("string_budget", "number_budget"):
            if getattr(self, name) > self.max_value_tokens:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) exceeds max_value_tokens ({self.max_value_tokens}), so the "
                    f"head would draft "
                    f"values that no decoding accepts; lower {name} or raise max_value_tokens."
                )
        self._check_feature_layers()
        self._check_objective()
        for name in ("base_model_name_or_path", "base_revision"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} must be a string or None, got {getattr(self, name)!r}.")
        for name in ("decision_head", "draft_adapter", "head_only_checkpoint"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if self.head_only_checkpoint and self.base_model_name_or_path is None:
            raise ValueError(
                "head_only_checkpoint is true but base_model_name_or_path is not set, so the base cannot be found; "
                "set it to the repo or folder of the base."
            )

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json.

        A model's save puts its own class name into `architectures`, and a load from the Hub points `auto_map` at the
        origin;
        both are restored, because the code is saved beside the weights.
        """
        self.check_fields()
        self.architectures = list(ARCHITECTURES)
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _check_feature_layers(self) -> None:
        layers = self.feature_layers
        if not isinstance(layers, tuple) or not all(_is_int(layer) for layer in layers):
            raise TypeError(f"feature_layers must be a list of layer indices, got {layers!r}.")
        last = self.text_config.num_hidden_layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > last:
            raise ValueError(
                f"feature_layers must be strictly increasing indices from 0 (embeddings) to {last} (the base's last "
                f"layer), "
                f"at least one; got {list(layers)}. Leave it out for four spread layers."
            )

    def _check_objective(self) -> None:
        choices = {
            "field_mask": FIELD_MASKS,
            "scaffold_features": SCAFFOLD_FEATURES,
            "noise_schedule": NOISE_SCHEDULES,
            "loss_weighting": LOSS_WEIGHTINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        _check_number("noise_eps", self.noise_eps, 0.0, 1.0, open_ends=True)
        _check_number("null_loss_weight", self.null_loss_weight, 0.0, math.inf)
        _check_number("null_prediction_penalty", self.null_prediction_penalty, 0.0, math.inf)
        _check_number("label_smoothing", self.label_smoothing, 0.0, 1.0)
        _check_number("constraint_loss_weight", self.constraint_loss_weight, 0.0, math.inf)
        _check_number("distill_weight", self.distill_weight, 0.0, 1.0)
        _check_number("initializer_range", self.initializer_range, 0.0, math.inf, open_ends=True)


def _text_config(text_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """Make the base's config out of what the caller gave."""
    if text_config is None:
        return SmolLM3Config()
    if isinstance(text_config, PreTrainedConfig):
        return text_config
    if not isinstance(text_config, dict):
        raise TypeError(f"text_config must be a config, a dict or None, got {type(text_config).__name__}.")
    fields = dict(text_config)
    model_type = fields.pop("model_type", SmolLM3Config.model_type)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise ValueError(
            f"text_config cannot be built for model_type {model_type!r}: {error} "
            "Use the model_type of a causal language model that the installed transformers knows."
        ) from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_positive_int(name: str, value: object) -> None:
    if not _is_int(value):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _check_number(name: str, value: object, low: float, high: float, open_ends: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    inside = low < value < high if open_ends else low <= value <= high
    if not inside or math.isinf(value) or math.isnan(value):
        ends = "strictly between" if open_ends else "between"
        raise ValueError(f"{name} must be {ends} {low} and {high}, got {value}.")


# Saving copies the code beside the config, so that a saved folder loads by itself.
SmolLMDiffusionConfig.register_for_auto_class()
