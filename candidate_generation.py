"""Assisted generation: transformers' own speculative decoding, with drafted calls as its candidates.

Takes a model and tools; gives what transformers' `generate` gives. A `CandidateGenerator` recognises a call while the
base writes it and proposes the rest. The reply is the base's own, as without candidates: nothing constrains it, so that
a call of a base that writes faulty JSON stays faulty. For calls that cannot be malformed there is the model's own
`generate`.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedTokenizerFast
from transformers.generation.candidate_generator import CandidateGenerator

from .call_decoding import MAX_VAIN_DRAFTS, arguments_text, calls_of
from .diffusion_head import PromptMemory
from .drafting import Denoising, Drafter, DraftTask, HeadRequest, head_inputs
from .mixed_drafter import named_drafter
from .prompt_lookup import LookupDrafter
from .schema_scaffold import Scaffold, UnsupportedSchemaError, compile_scaffold
from .slot_grammar import Vocabulary
from .tokenization_utils import CALL_OPENING, call_segments, normalise_tools


class HeadCandidateGenerator(CandidateGenerator):
    """Proposes the rest of the call that the base is writing; for one reply.

    Behind the prompt that is the opening of a call, and as soon as the name leaves only one tool it is a draft of the
    whole call. Where the base takes another way than the draft, the rest is drafted again. The head reads what the
    base's own forwards computed for everything in front of the call, so that it costs no forward of the base; where the
    model has a draft adapter it costs one for each call, see the model's `draft_features`.

    Args:
        model: the model, whose head drafts.
        vocabulary: the tokens.
        tools: normalised tools; one whose schema is not supported is not drafted.
        drafter: who drafts.
        steps: denoising steps of the first draft of a call; later ones take one step.
    """

    requires_model_outputs = True

    def __init__(
        self, model: Any, vocabulary: Vocabulary, tools: Sequence[dict[str, Any]], drafter: Drafter, steps: int
    ) -> None:
        self.model = model
        self.config = model.config  # by which transformers sees that the tokens are the same
        self.vocabulary = vocabulary
        self.drafter = drafter
        self.steps = steps
        # By what stands between the opening of a call and its arguments.
        self.scaffolds = {_before_arguments(tool): _scaffold(tool) for tool in tools}
        self.head_reads = bool(tools) and not isinstance(drafter, LookupDrafter) and not model.has_draft_adapter
        self.real = torch.ones(0, dtype=torch.bool)  # bool [prompt], False at padding
        self.prompt: list[int] = []  # without padding
        self.columns = 0  # of which the base's states were taken
        self.memory: PromptMemory | None = None
        self.read = 0  # tokens in `memory`
        self.unread: list[Tensor] = []  # [n, features] each, of the tokens behind them
        self.call = -1  # number of the call that is being written
        self.drafts = 0  # for that call
        self.before: dict[str, Any] | None = None  # arguments of the last of them
        self.vain = 0  # in a row, of which the base took nothing
        self.asked = False  # whether the last candidates come from the drafter

    @property
    def model_kwargs_overrides(self) -> dict[str, Any]:
        """What the forwards of the model are asked for besides."""
        return {"output_hidden_states": True} if self.head_reads else {}

    def get_candidates(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Propose what may follow.

        Args:
            input_ids: long [1, tokens], prompt and reply so far.
            model_kwargs: of the generation; holds the prompt's attention mask.
            model_outputs: of the last forward.
            is_first_iteration: nothing was run yet, so that `input_ids` is the prompt.
            kwargs: not read.

        Returns:
            Long [1, tokens + candidates], maybe without any candidate; and None, since a draft is one text and no
            sample: transformers then takes candidates as long as they equal what the base chooses or draws.
        """
        if is_first_iteration:
            mask = (model_kwargs or {}).get("attention_mask")
            self.real = torch.ones_like(input_ids[0], dtype=torch.bool) if mask is None else mask[0].bool()
            self.prompt = input_ids[0, self.real].tolist()
        elif self.head_reads:
            self._take_states(model_outputs.hidden_states, input_ids.shape[1] - 1)
        reply = input_ids[0, len(self.real) :].tolist()
        self.asked = False
        tokens = self._continuation(reply)[: self._room(len(self.prompt) + len(reply))]
        return torch.cat([input_ids, input_ids.new_tensor([tokens], dtype=torch.long)], dim=1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Count drafts in vain.

        Args:
            input_ids, scores: not read.
            num_matches: how many candidates the base has taken.
        """
        if self.asked:
            self.vain = 0 if num_matches else self.vain + 1

    # --------------------------------------------------------------- candidates

    def _room(self, length: int) -> int | None:
        """How many candidates fit into the base's context, of which one more token comes out."""
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if context is None else max(0, context - length - 1)

    def _continuation(self, reply: list[int]) -> list[int]:
        """Tokens that may follow a reply."""
        vocabulary, opening = self.vocabulary, CALL_OPENING.encode()
        if not self.scaffolds:
            return []
        if not reply:
            return self._opening()
        starts = [place for place, token in enumerate(reply) if token == vocabulary.call_start]
        if not starts or vocabulary.call_end in reply[starts[-1] :]:
            return []
        if self.call != len(starts) - 1:
            self.call, self.drafts, self.vain, self.before = len(starts) - 1, 0, 0, None
        written = vocabulary.spell(reply[starts[-1] + 1 :])
        if not written.startswith(opening):
            return vocabulary.encode_bytes(opening[len(written) :]) if opening.startswith(written) else []
        named = written[len(opening) :]
        fitting = [name for name in self.scaffolds if name.startswith(named) or named.startswith(name)]
        if len(fitting) > 1:  # as good a guess as any, and right in what the names share
            return vocabulary.encode_bytes(fitting[0][len(named) :])
        if not fitting:
            return []
        scaffold = self.scaffolds[fitting[0]]
        if scaffold is None or self.vain >= MAX_VAIN_DRAFTS:
            return []
        return self._drafted(scaffold, written, reply, starts)

    def _opening(self) -> list[int]:
        return [self.vocabulary.call_start, *self.vocabulary.encode(CALL_OPENING)]

    def _drafted(self, scaffold: Scaffold, written: bytes, reply: list[int], starts: list[int]) -> list[int]:
        """Tokens that complete a call, and what the drafter expects behind it.

        Args:
            scaffold: its tool.
            written: the call so far, from behind `<tool_call>`.
            reply: the reply so far.
            starts: where its calls begin.
        """
        context = self.prompt + reply[: starts[0]]
        steps = 1 if self.drafts else self.steps
        self.drafts, self.asked = self.drafts + 1, True
        task = DraftTask(scaffold, arguments_text(written), context, self.call, steps, before=self.before)
        drafting = self.drafter.draft(task)
        try:
            request = next(drafting)
            self._remember(self.prompt + reply[: starts[-1]])
            while True:
                request = drafting.send(self._predict(request))
        except StopIteration as done:
            draft = done.value
        if draft is None:
            return []
        self.before = draft.arguments
        scaffolds = {known.tool: known for known in self.scaffolds.values() if known is not None}
        calls = calls_of(draft, self.vocabulary, scaffolds, scaffold, written)
        tokens = [token for call in calls for token in call]
        # Where one call followed another the next may follow too.
        return [*tokens, *self.vocabulary.encode("\n"), *self._opening()] if tokens and self.call else tokens

    # --------------------------------------------------------------- the head

    def _take_states(self, hidden_states: tuple[Tensor, ...], columns: int) -> None:
        """Keep what the last forward computed for tokens that stand; rejected candidates are at its end.

        Args:
            hidden_states: [1, n, width] per layer, from behind the columns that were taken before.
            columns: how many columns stand and were run, all but the last token.
        """
        features = self.model.prompt_features_of(hidden_states)[0, : columns - self.columns]
        if not self.columns:
            real = self.real.to(features.device)
            features = torch.cat([features[: len(real)][real], features[len(real) :]])
        self.unread.append(features)
        self.columns = columns

    def _remember(self, tokens: list[int]) -> None:
        """Let the head read what it has not read of the tokens in front of a call."""
        new = tokens[self.read :]
        if not new:
            return
        if self.model.has_draft_adapter:
            self.unread = [self.model.draft_features([tokens])[0][self.read :]]
        states = torch.cat(self.unread)
        ids = torch.tensor([new], device=states.device)
        memory = self.model.diffusion_head.encode_prompt(
            states[None, : len(new)], ids, torch.ones_like(ids, dtype=torch.bool), ids.new_tensor([self.read])
        )
        self.memory = memory if self.memory is None else self.memory.extend(memory)
        self.read, self.unread = len(tokens), [states[len(new) :]]

    def _predict(self, request: HeadRequest) -> Tensor:
        """The head's log-probabilities [n, vocab + 2]."""
        return self.model.draft_log_probs(self.memory, *head_inputs([request], self.model.device))[0]


def _before_arguments(tool: dict[str, Any]) -> bytes:
    """What stands in a call of a tool between the opening and the arguments."""
    _, _, name, arguments, *_ = call_segments(tool["function"]["name"], {})
    return (name + arguments.removesuffix("{}")).encode()


def _scaffold(tool: dict[str, Any]) -> Scaffold | None:
    try:
        return compile_scaffold(tool)
    except UnsupportedSchemaError:
        return None  # the base may call it all the same


def assisted_generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    tools: Sequence[Any] | None = None,
    drafter: str | Drafter | None = None,
    num_diffusion_steps: int | None = None,
    **kwargs: Any,
) -> Any:
    """Generate with transformers' assisted decoding: the base's own reply, with fewer forwards where it calls.

    Greedy decoding gives the tokens of the base alone, up to ties that a forward over several tokens rounds otherwise;
    sampling gives its distribution. Source: speculative decoding (arXiv 2211.17192).

    Args:
        model: the model.
        inputs: long [1, prompt], or `input_ids` among the keyword arguments.
        tokenizer: the tokenizer that made the prompt; None loads the one that lies beside the model.
        tools: tools as in the model's `generate`; None reads them out of the prompt's `<tools>` block.
        drafter: `"head"`, `"lookup"`, `"mixed"` or an object that drafts. Where it or the number of steps is not given,
            and for `remasking` and `draft_temperature` of the head, the generation config holds.
        num_diffusion_steps: denoising steps of the first draft of a call, 1 to 8.
        kwargs: as in transformers' `generate`, which warns of beams and leaves them out. Stop strings and stopping
            criteria of one's own are looked at after each forward, so a reply may run past them within what a forward
            accepted.

    Returns:
        What transformers' `generate` returns.

    Raises:
        ValueError: no tokens or tokenizer, faulty tools, an unknown drafter, or options that assisted decoding does not
            know: several rows, a prompt that is partly cached, those that constrain calls.
    """
    if kwargs.get("past_key_values") is not None:
        # transformers' assisted decoding runs the whole prompt behind it once more.
        raise ValueError("Assisted generation begins with the whole prompt: leave past_key_values out.")
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    tokenizer = tokenizer if tokenizer is not None else model._own_tokenizer()
    if ids is None or tokenizer is None:
        raise ValueError("Assisted generation needs the prompt's tokens and its tokenizer: pass input_ids, tokenizer.")
    ours = {"drafter": drafter, "num_diffusion_steps": num_diffusion_steps}
    options = model._call_options(kwargs.get("generation_config"), ours)
    given = model._tools_of_rows(None, tokenizer, ids)[0] if tools is None else normalise_tools(tools)
    vocabulary, drafter = model._vocabulary(tokenizer), options.drafter
    if isinstance(drafter, str):
        how = Denoising(options.remasking, options.draft_temperature)
        drafter = named_drafter(drafter, vocabulary, model.config, how)
    candidates = HeadCandidateGenerator(model, vocabulary, given, drafter, options.num_diffusion_steps)
    # transformers makes its candidate generators in one method and takes none from outside; a decoding loop of one's
    # own (custom_generate) would be a copy of its loop. So that method alone is replaced, on a shallow copy that shares
    # everything else with the model, which other threads may be using. Passed as the assistant, the generator makes
    # transformers check and prepare for assisted decoding.
    view = copy.copy(model)
    view._get_candidate_generator = lambda **_: candidates
    return GenerationMixin.generate(view, inputs, assistant_model=candidates, tokenizer=tokenizer, **kwargs)
