"""Assisted generation gives the base's own reply, token for token, and needs fewer forwards where drafts are right."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, GenerationMixin
from transformers.generation.streamers import BaseStreamer

import schemas
from eval.gold_choices import gold_choices
from eval.oracle_drafter import OracleDrafter
from repo_package import ROOT, load_repo_module
from test_generation import TIME, WEATHER, biased, prompt_of, shared_model, tiny_model
from tiny_models import drafted_over
from tiny_tokenizer import tiny_tokenizer

candidates = load_repo_module("candidate_generation")
drafting = load_repo_module("drafting")
call_token_ids = load_repo_module("tokenization_utils").call_token_ids
SmolLMDiffusionForCausalLM = load_repo_module("modeling_smollm_diffusion").SmolLMDiffusionForCausalLM

TOOLS = [WEATHER, TIME]
ARGUMENTS = {"city": "New York", "days": 3, "unit": "celsius", "tags": ["a", "café"]}
OPENING = [*tiny_tokenizer()('<tool_call>\n{"name": "')["input_ids"]]
CALL = [*call_token_ids(tiny_tokenizer(), "get_weather", ARGUMENTS), tiny_tokenizer().eos_token_id]


class Counted:
    """Any drafter; counts how often it is asked."""

    def __init__(self, drafter: Any = None) -> None:
        self.drafter, self.tasks = drafter, list[Any]()

    def draft(self, task: Any) -> Any:
        self.tasks.append(task)
        if self.drafter is None:
            raise AssertionError("nothing is to be drafted")
        return (yield from self.drafter.draft(task))


def oracle(rate: float = 0.0, **arguments: Any) -> Counted:
    return Counted(OracleDrafter(lambda task: arguments or ARGUMENTS, rate))


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """Counts the base's forwards."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    hook = model.base.register_forward_hook(add)
    try:
        yield count
    finally:
        hook.remove()


def plain(model: Any, prompt: Tensor, **kwargs: Any) -> Any:
    """Transformers' greedy generation by the base."""
    return GenerationMixin.generate(model, prompt, **{"max_new_tokens": 80, "do_sample": False, **kwargs})


def assisted(model: Any, prompt: Tensor, drafter: Any = "head", **kwargs: Any) -> Any:
    options = {"max_new_tokens": 80, "do_sample": False, "tools": TOOLS, "tokenizer": tiny_tokenizer(), **kwargs}
    return model.assisted_generate(prompt, drafter=drafter, **options)


@contextmanager
def widths(model: Any) -> Iterator[list[int]]:
    """Notes how many tokens each forward of the base runs."""
    noted = list[int]()
    hook = model.base.register_forward_hook(
        lambda _module, _inputs, kwargs, _output: noted.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield noted
    finally:
        hook.remove()


@pytest.fixture
def calling() -> Iterator[tuple[Any, Tensor]]:
    """A model whose base makes the call, and a prompt."""
    model, prompt = shared_model(), prompt_of(TOOLS)
    with gold_choices(model.base, prompt.shape[1], CALL):
        yield model, prompt


def test_right_drafts_save_almost_all_forwards(calling: tuple[Any, Tensor]) -> None:
    model, prompt = calling
    with forwards(model) as alone:
        reply = plain(model, prompt)
    drafter = oracle()
    with forwards(model) as helped:
        assert assisted(model, prompt, drafter).tolist() == reply.tolist()
    assert reply[0, prompt.shape[1] :].tolist() == CALL
    assert alone[0] == len(CALL)
    # The prompt with the opening, a guess of the name, which two tools share the beginning of, and the draft.
    assert helped[0] == 3
    assert len(drafter.tasks) == 1
    assert "_get_candidate_generator" not in vars(model), "the model is as it was"


def test_wrong_drafts_of_every_kind_change_nothing(calling: tuple[Any, Tensor]) -> None:
    model, prompt = calling
    expected = plain(model, prompt).tolist()
    for rate in (0.3, 1.0):
        assert assisted(model, prompt, oracle(rate)).tolist() == expected
    for drafter in ("head", "lookup", "mixed", oracle(city="Rome"), oracle(town="Rome")):
        assert assisted(model, prompt, drafter).tolist() == expected


def test_a_draft_that_goes_wrong_is_made_again_behind_the_correction(calling: tuple[Any, Tensor]) -> None:
    model, prompt = calling
    drafter = oracle(1.0)
    with forwards(model) as count:
        assisted(model, prompt, drafter)
    first, *again = drafter.tasks
    assert '{"city": "'.startswith(first.written)
    assert (first.steps, first.call) == (4, 0)
    assert len(again) == 5, "one for each value"
    assert all(task.written.startswith('{"city": "N') and task.steps == 1 for task in again)
    assert count[0] <= 8


@pytest.mark.parametrize("fits", [True, False])
def test_drafts_in_vain_are_given_up(fits: bool, calling: tuple[Any, Tensor]) -> None:
    """A drafter that insists on what the base does not want is asked a few times, not for every token."""
    model, prompt = calling

    class Stubborn:
        def draft(self, task: Any) -> Any:
            yield from ()
            written = task.written.removeprefix('{"city": "') if fits else ""
            return drafting.Draft({"city": f"{written}zzz"}, [], [])

    drafter = Counted(Stubborn())
    assert assisted(model, prompt, drafter).tolist() == plain(model, prompt).tolist()
    # Of the first draft the base takes the key.
    assert ['{"city": "' in task.written for task in drafter.tasks] == [False] + [True] * candidates.MAX_VAIN_DRAFTS


@pytest.mark.parametrize("bias", [{"<tool_call>": 1000.0}, {"<|im_end|>": -1000.0}, {}])
def test_whatever_a_random_base_writes_is_its_own(bias: dict[str, float]) -> None:
    for seed in range(2):
        model, prompt = tiny_model(seed), prompt_of(TOOLS)
        with biased(model, bias):
            expected = plain(model, prompt, max_new_tokens=40).tolist()
            for drafter in ("head", oracle(0.5)):
                assert assisted(model, prompt, drafter, max_new_tokens=40).tolist() == expected


@pytest.mark.parametrize("tools", [TOOLS, []])
def test_text_is_not_drafted_and_costs_what_it_cost(tools: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = shared_model(), prompt_of(tools or None)
    monkeypatch.setattr(model.diffusion_head, "encode_prompt", None)
    monkeypatch.setattr(model.diffusion_head, "forward", None)
    text = tiny_tokenizer()('It is {"name": "get_weather"} in Paris.')["input_ids"]
    with gold_choices(model.base, prompt.shape[1], [*text, tiny_tokenizer().eos_token_id]):
        with widths(model) as alone:
            expected = plain(model, prompt)
        for drafter in (Counted(), "head", "lookup"):
            with widths(model) as helped:
                assert assisted(model, prompt, drafter, tools=tools).tolist() == expected.tolist()
            # The opening of a call is tried once, in the forward that runs the prompt.
            assert helped[1:] == alone[1:]
            assert helped[0] - alone[0] == (len(OPENING) if tools else 0)


ODD_CALLS = (
    '{"name": "get_weather", "arguments": {"city":"New York","days":3}}',
    '{"name":"get_weather", "arguments": {"city": "New York"}}',
    '{"name": "get_weather", "arguments": {"days": 3, "city": "New York"}}',
    '{"name": "get_weather", "arguments": {"city": "New\\u0020York \\"caf\u00e9\\" \U0001f642", "x": [1, {"a": 2}]}}',
    '{"name": "get_weather", "arguments": {"city": 12, "days": "three", "unit": null, "tags": {}}}',
    '{"name": "get_weather", "arguments": [1, 2]}',
    '{"name": "get_weather", "arguments": {"city": "New York", "city": "Rome"}} and more',
    '{"name": "get_weather", "arguments": {"city": "a\nb',
    '{"name": "get_wealth", "arguments": {}}',
    '{"arguments": {"city": "New York"}, "name": "get_weather"}',
)


@pytest.mark.parametrize("text", ODD_CALLS)
def test_a_call_that_is_written_otherwise_or_wrongly_stays_as_it_is(text: str) -> None:
    model, prompt, tokenizer = shared_model(), prompt_of(TOOLS), tiny_tokenizer()
    tokens = tokenizer(f"<tool_call>\n{text}\n</tool_call>")["input_ids"] + [tokenizer.eos_token_id]
    with gold_choices(model.base, prompt.shape[1], tokens):
        for drafter in ("head", "lookup", oracle(1.0)):
            with forwards(model) as count:
                reply = assisted(model, prompt, drafter, max_new_tokens=200)
            assert reply[0, prompt.shape[1] :].tolist() == tokens
            assert count[0] <= len(tokens)


def test_every_call_of_a_reply_is_drafted() -> None:
    model, prompt = shared_model(), prompt_of(TOOLS)
    line_break = tiny_tokenizer()("\n")["input_ids"]
    first = call_token_ids(tiny_tokenizer(), "get_time", {"zone": 2})
    tokens = [*first, *line_break, *first, *line_break, *CALL]
    drafter = Counted(OracleDrafter(lambda task: ARGUMENTS if task.call == 2 else {"zone": 2}, 0.0))
    with gold_choices(model.base, prompt.shape[1], tokens), forwards(model) as count:
        reply = assisted(model, prompt, drafter, max_new_tokens=200)
    assert reply[0, prompt.shape[1] :].tolist() == tokens
    names = [(task.call, task.scaffold.tool) for task in drafter.tasks]
    assert names == [(0, "get_time"), (1, "get_time"), (2, "get_weather")]
    assert count[0] <= 10, "where one call followed another, the opening of the next comes with the draft"


def test_the_head_reads_all_that_stands_in_front_of_a_call() -> None:
    model, prompt, tokenizer = shared_model(), prompt_of(TOOLS), tiny_tokenizer()
    text, line_break = tokenizer("It is 12.5 degrees.")["input_ids"], tokenizer("\n")["input_ids"]
    first = call_token_ids(tokenizer, "get_time", {"zone": 2})
    reply = torch.tensor([[*text, *first, *line_break, *CALL]])
    with gold_choices(model.base, prompt.shape[1], reply[0].tolist()), drafted_over(model) as memories:
        whole = assisted(model, prompt, "head", max_new_tokens=200)
    assert whole.tolist() == torch.cat([prompt, reply], dim=1).tolist()
    lengths = [prompt.shape[1] + len(text), prompt.shape[1] + len(text) + len(first) + len(line_break)]
    assert list(dict.fromkeys(memory.mask.shape[1] for memory in memories)) == lengths
    for memory in memories:
        assert_memory(model, whole[:, : memory.mask.shape[1]], memory)


def test_calls_that_are_drafted_together_are_taken_together() -> None:
    model, prompt, tokenizer = shared_model(), prompt_of(TOOLS), tiny_tokenizer()

    class Both:
        def draft(self, task: Any) -> Any:
            yield from ()
            return drafting.Draft({"zone": 2}, [], [], following=[("get_weather", ARGUMENTS)])

    first, line_break = call_token_ids(tokenizer, "get_time", {"zone": 2}), tokenizer("\n")["input_ids"]
    tokens = [*first, *line_break, *CALL]
    with gold_choices(model.base, prompt.shape[1], tokens), forwards(model) as count:
        reply = assisted(model, prompt, drafter := Counted(Both()), max_new_tokens=200)
    assert reply[0, prompt.shape[1] :].tolist() == tokens
    assert len(drafter.tasks) == 1
    assert count[0] <= 4


def test_padding_makes_no_difference() -> None:
    """Neither to the reply nor to what the drafter and the head are given."""
    model, prompt = shared_model(), prompt_of(TOOLS)
    padded = torch.cat([prompt.new_full((1, 3), tiny_tokenizer().pad_token_id), prompt], dim=1)
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    drafter = oracle()
    with gold_choices(model.base, padded.shape[1], CALL), drafted_over(model) as memories:
        for one in (drafter, "head"):
            reply = assisted(model, padded, one, attention_mask=mask)
            assert reply[0, padded.shape[1] :].tolist() == CALL
    assert list(drafter.tasks[0].prompt_ids) == prompt[0].tolist()
    assert_memory(model, prompt, memories[0])


def test_the_head_reads_the_prompt_once_and_without_a_forward_of_the_base(calling: tuple[Any, Tensor]) -> None:
    model, prompt = calling
    with drafted_over(model) as memories, forwards(model) as count:
        assisted(model, prompt)
    assert_memory(model, prompt, memories[0])
    assert all(memory is memories[0] for memory in memories)
    assert count[0] < len(CALL)


def assert_memory(model: Any, tokens: Tensor, memory: Any) -> None:
    """It is as the model computes it for these tokens alone."""
    with torch.no_grad():
        states = model.base(
            input_ids=tokens, past_key_values=DynamicCache(), use_cache=True, output_hidden_states=True
        ).hidden_states
        expected = model.prompt_memory(states, tokens, torch.ones_like(tokens))
    assert memory.prompt_ids.tolist() == tokens.tolist()
    for one, other in zip((*memory.keys, *memory.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_tools_come_from_the_prompt_and_what_is_not_supported_is_not_drafted(calling: tuple[Any, Tensor]) -> None:
    model, prompt = calling
    expected = plain(model, prompt).tolist()
    drafter = oracle()
    assert assisted(model, prompt, drafter, tools=None).tolist() == expected
    assert drafter.tasks
    unsupported = schemas.tool({"type": "object", "properties": {"city": {"pattern": "(a)\\1"}}}, "get_weather")
    assert assisted(model, prompt, Counted(), tools=[unsupported, TIME]).tolist() == expected
    assert assisted(model, prompt, Counted(), tools=[]).tolist() == expected


def test_options_of_transformers_apply(calling: tuple[Any, Tensor]) -> None:
    model, prompt = calling

    class Kept(BaseStreamer):
        tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens.extend(value.flatten().tolist())

        def end(self) -> None:
            self.tokens.append(-1)

    output = assisted(model, prompt, oracle(), streamer=Kept(), return_dict_in_generate=True, output_logits=True)
    assert Kept.tokens == [*prompt[0].tolist(), *CALL, -1]
    assert len(output.logits) == len(CALL)
    assert assisted(model, prompt, oracle(), max_new_tokens=9)[0].tolist() == [*prompt[0].tolist(), *CALL[:9]]


@pytest.mark.parametrize(
    ("drafter", "tools", "asked"), [("head", TOOLS, True), ("lookup", TOOLS, None), ("head", [], None)]
)
def test_states_are_asked_for_only_where_the_head_may_read_them(
    drafter: str, tools: list[Any], asked: bool | None, calling: tuple[Any, Tensor]
) -> None:
    model, prompt = calling
    noted = set[bool | None]()
    hook = model.base.register_forward_pre_hook(
        lambda _module, _inputs, kwargs: noted.add(kwargs.get("output_hidden_states")), with_kwargs=True
    )
    assisted(model, prompt, drafter, tools=tools, max_new_tokens=9)
    hook.remove()
    assert noted == {asked}


def test_sampling_draws_from_the_base(calling: tuple[Any, Tensor]) -> None:
    model, prompt = calling
    reply = assisted(model, prompt, drafter := oracle(), do_sample=True, top_k=1)
    assert reply[0, prompt.shape[1] :].tolist() == CALL
    assert len(drafter.tasks) == 1


def test_sampling_has_the_distribution_of_the_base() -> None:
    """Whether the draft's first token is likely or not, and behind it too."""
    model, prompt, draws = tiny_model(scale=2.0), prompt_of(TOOLS), 200
    call = OPENING[0]
    with torch.no_grad():
        logits = model.base(input_ids=prompt).logits[0, -1]
        shift = float(logits.logsumexp(-1) - logits[call])
        after = torch.cat([prompt, torch.tensor([[call]])], dim=1)
        bias = {"<tool_call>": shift}  # about every second reply begins with a call
        with biased(model, bias):
            first = model.base(input_ids=prompt).logits[0, -1].softmax(-1)
            second = model.base(input_ids=after).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    with biased(model, bias):
        pairs = [
            assisted(model, prompt, oracle(), do_sample=True, top_k=0, max_new_tokens=2)[0, -2:].tolist()
            for _ in range(draws)
        ]
    for share, tokens in ((first, [one for one, _ in pairs]), (second, [two for one, two in pairs if one == call])):
        counted = torch.bincount(torch.tensor(tokens), minlength=len(share)) / len(tokens)
        # Five standard deviations of a share that is counted in so many draws.
        assert bool(((counted - share).abs() <= 5 * (share * (1 - share) / len(tokens)).sqrt() + 0.02).all())


def test_what_a_tokenizer_gives_can_be_passed_on(calling: tuple[Any, Tensor]) -> None:
    model, prompt = calling
    encoded = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    reply = candidates.assisted_generate(
        model, **encoded, tokenizer=tiny_tokenizer(), do_sample=False, max_new_tokens=80
    )
    assert reply[0, prompt.shape[1] :].tolist() == CALL


def test_wrong_options_are_refused() -> None:
    model, prompt = shared_model(), prompt_of(TOOLS)
    with pytest.raises(ValueError, match="head, lookup"):
        assisted(model, prompt, "n-gram")
    for options in ({"num_diffusion_steps": 0}, {"tool_choice": "required"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            assisted(model, prompt, **options)
    with pytest.raises(ValueError, match="pass input_ids"):
        candidates.assisted_generate(model, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="batch_size = 1"):
        assisted(model, prompt.repeat(2, 1))
    with pytest.raises(ValueError, match="leave past_key_values out"):
        assisted(model, prompt, past_key_values=DynamicCache())


def test_candidates_stay_inside_the_context() -> None:
    model, prompt = shared_model(), prompt_of(TOOLS)
    vocabulary = load_repo_module("slot_grammar").Vocabulary(tiny_tokenizer(), model.config.text_config.vocab_size)
    context = model.config.get_text_config().max_position_embeddings
    long = prompt[:, :1].expand(1, context - 4)
    one = candidates.HeadCandidateGenerator(model, vocabulary, [WEATHER], oracle(), 1)
    proposed, scores = one.get_candidates(long, model_kwargs={}, is_first_iteration=True)
    assert proposed.shape[1] == context - 1
    assert scores is None


def test_the_default_model_gives_its_own_greedy_reply_with_fewer_forwards() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    model = SmolLMDiffusionForCausalLM.from_pretrained(ROOT).eval()
    texts = ("What is the weather in Paris for 3 days?", "Tell me the time in zone 5", "Hello there")
    saved = 0
    for text in texts:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tools=TOOLS, add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        with forwards(model) as alone:
            expected = plain(model, prompt, max_new_tokens=60)
        with forwards(model) as helped:
            reply = assisted(model, prompt, tokenizer=tokenizer, max_new_tokens=60)
        assert reply.tolist() == expected.tolist()
        assert helped[0] <= alone[0]
        saved += alone[0] - helped[0]
    assert saved >= 20
