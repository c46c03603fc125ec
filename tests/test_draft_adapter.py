"""The draft adapter changes drafts and nothing else; it trains with the head, and its files are those of peft."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import test_head_training as head_tests
import tiny_models
from loopback_hub import loopback_hub
from repo_package import load_repo_module
from test_batches import REQUESTS, TOOLS, replies
from test_compiled_decoding import COARSE
from test_generation import CLOSED, TIME, WEATHER, biased, counted_forwards, prompt_of, respond, tiny_model
from tiny_models import BASES, SmolLMDiffusionForCausalLM, drafted_over, random_ids, training_batch
from tiny_tokenizer import tiny_tokenizer
from training.adapter import AdapterRun, train_adapter
from training.head import train_head

peft = pytest.importorskip("peft", reason="needs the training extra")

candidates = load_repo_module("candidate_generation")
draft_adapter = load_repo_module("draft_adapter")
drafting = load_repo_module("drafting")
prompt_cache = load_repo_module("prompt_cache")
call_token_ids = load_repo_module("tokenization_utils").call_token_ids
one_request = head_tests.base  # a fixture: a random base, and one request to train on
FILES = [draft_adapter.CONFIG_FILE, draft_adapter.WEIGHTS_FILE]


def adapted(model: Any, **options: Any) -> Any:
    """The model with a random adapter whose effect is large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, that it has set fan_in_fan_out for the layers of gpt2
        model.add_draft_adapter(**{"r": 4, "lora_alpha": 16, "init_lora_weights": False, **options})
    return model


def weights_hash(module: torch.nn.Module) -> str:
    """Of the names and bits of all weights."""
    state = module.state_dict()
    return hashlib.sha256(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


@torch.no_grad()
def ar_states(model: Any, ids: Tensor) -> list[Tensor]:
    """Logits and hidden states of the base as it is used for everything but drafts."""
    output = model(ids, output_hidden_states=True)
    return [output.logits, *output.hidden_states]


@torch.no_grad()
def draft_states(model: Any, ids: Tensor) -> list[Tensor]:
    """The same in a draft pass."""
    with model.drafting_base():
        return ar_states(model, ids)


def all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


# ------------------------------------------------------------------------------------------------------------ the base


@pytest.mark.parametrize("base", BASES)
def test_outside_of_a_draft_pass_the_base_is_itself_bit_for_bit(base: str) -> None:
    model, ids = tiny_models.tiny_model(base), random_ids(2, 9)
    ar_states(model, ids)  # transformers leaves hooks of its own on the base
    hooks = [list(module._forward_hooks) for module in model.base.modules()]
    expected, weights, parts = ar_states(model, ids), weights_hash(model.base), dict(vars(model.base))
    adapted(model)
    assert model.has_draft_adapter
    assert all_equal(ar_states(model, ids), expected)
    with_adapter = draft_states(model, ids)
    # Embeddings are in front of every adapted layer, everything else behind one.
    assert torch.equal(with_adapter[1], expected[1])
    assert not any(torch.equal(one, two) for one, two in zip(with_adapter[2:], expected[2:], strict=True))
    assert all_equal(ar_states(model, ids), expected)
    assert weights_hash(model.base) == weights
    assert vars(model.base) == parts
    assert [list(module._forward_hooks) for module in model.base.modules()] == hooks


@pytest.mark.parametrize("base", BASES)
def test_a_draft_pass_computes_what_peft_computes(base: str, tmp_path: Path) -> None:
    model = adapted(tiny_models.tiny_model(base), rank_pattern={"0.*proj": 2}, use_rslora=True)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_config(model.config.text_config)
    plain.load_state_dict(model.base.state_dict())
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(draft_states(model, ids)[0], wrapped(ids).logits)


def test_a_fresh_adapter_changes_nothing_yet() -> None:
    model, ids = tiny_models.tiny_model(), random_ids(1, 9)
    model.add_draft_adapter()
    assert all_equal(draft_states(model, ids), ar_states(model, ids))


def test_a_pass_ends_with_its_block_even_by_an_error() -> None:
    model, ids = adapted(tiny_models.tiny_model()), random_ids(1, 9)
    expected, with_adapter = ar_states(model, ids), draft_states(model, ids)
    with model.drafting_base(), model.drafting_base():
        # A block in a block adds the adapter once.
        assert all_equal(ar_states(model, ids), with_adapter)
    with pytest.raises(ValueError), model.drafting_base():
        model.base(none="such")
    assert all_equal(ar_states(model, ids), expected)


def test_other_threads_see_the_base_without_it() -> None:
    model, ids = adapted(tiny_models.tiny_model()), random_ids(1, 9)
    expected, with_adapter = ar_states(model, ids), draft_states(model, ids)
    found: list[bool] = []

    def verify() -> None:
        torch.set_num_threads(1)
        found.extend(all_equal(ar_states(model, ids), expected) for _ in range(20))

    with model.drafting_base():
        thread = threading.Thread(target=verify)
        thread.start()
        while thread.is_alive():
            assert all_equal(ar_states(model, ids), with_adapter)
        thread.join()
    assert found == [True] * 20


def test_a_compiled_base_is_refused_for_it_would_keep_the_adapter() -> None:
    model = adapted(tiny_models.tiny_model())
    model.base.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="compile_decoding"), model.drafting_base():
        pass


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "plain LoRA .*use_dora"),
        ({"modules_to_save": ["lm_head"]}, "plain LoRA .*modules_to_save"),
        ({"bias": "all"}, "plain LoRA .*bias"),
        ({"init_lora_weights": "pissa"}, "'pissa' would read or change the base"),
        ({"target_modules": ["lm_head"]}, "'lm_head', which is not a linear layer in front of"),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens', which is not a linear layer"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"lora_config": {"r": 4}}, "peft.LoraConfig, not by dict"),
        ({"lora_config": peft.LoraConfig(), "r": 4}, r"options of one \(r\)"),
    ],
)
def test_an_adapter_that_is_more_than_lora_on_linear_layers_is_refused(options: dict[str, Any], message: str) -> None:
    model = tiny_models.tiny_model()
    weights = weights_hash(model)
    with pytest.raises(ValueError, match=message):
        model.add_draft_adapter(**options)
    assert not model.has_draft_adapter
    assert weights_hash(model) == weights


def test_a_config_says_where_it_acts_and_is_left_as_it_is() -> None:
    model, config = tiny_models.tiny_model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=3)
    before = config.to_dict()
    model.add_draft_adapter(config)
    assert config.to_dict() == before
    layers = range(model.config.text_config.num_hidden_layers)
    assert list(model.draft_adapter.names) == [f"model.layers.{n}.self_attn.{p}_proj" for n in layers for p in "qv"]
    assert {tuple(layer.lora_A.weight.shape) for layer in model.draft_adapter.layers} == {(3, 32)}
    with pytest.raises(ValueError, match="already"):
        model.add_draft_adapter(config)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapted(tiny_models.tiny_model()).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        tiny_models.tiny_model().add_draft_adapter()
    with pytest.raises(ImportError, match="pip install peft"):
        SmolLMDiffusionForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------ training


def test_head_and_adapter_train_and_the_base_stays(tmp_path: Path) -> None:
    model, ids = adapted(tiny_models.tiny_model()).train(), random_ids(1, 9)
    expected, weights = ar_states(model, ids), weights_hash(model.base)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert not model.base.training
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = training_batch(model.config)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if name.startswith("draft_adapter.")} <= changed
    assert any(name.startswith("diffusion_head.") for name in changed)
    assert not any(name.startswith("base.") for name in changed)
    assert all(parameter.grad is None for parameter in model.base.parameters())
    assert weights_hash(model.base) == weights
    assert all_equal(ar_states(model, ids), expected)
    model.save_pretrained(tmp_path)
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path)
    assert weights_hash(loaded.base) == weights
    assert all_equal(ar_states(loaded, ids), expected)
    assert all(parameter.requires_grad for parameter in loaded.draft_adapter.parameters())
    assert not any(parameter.requires_grad for parameter in loaded.base.parameters())


def test_the_loss_reads_the_adapter_and_so_do_features() -> None:
    model = tiny_models.tiny_model()
    batch = training_batch(model.config)

    def loss() -> float:
        with torch.no_grad():
            return float(model(**batch, noise_generator=torch.Generator().manual_seed(0)).loss)

    without = loss()
    adapted(model)
    with_adapter = loss()
    assert with_adapter != without
    with torch.no_grad():
        features = model.base_features(batch["input_ids"], batch["attention_mask"])
        given = model(**batch, prompt_features=features, noise_generator=torch.Generator().manual_seed(0)).loss
    assert float(given) == pytest.approx(with_adapter)
    with pytest.raises(ValueError, match="prompt_features leave out the adapter"):
        model(**batch, prompt_features=features)
    model.draft_adapter.requires_grad_(False)
    assert model(**batch, prompt_features=features).loss.isfinite()


def test_dropout_of_the_adapter_is_for_training_only() -> None:
    model, ids = adapted(tiny_models.tiny_model(), lora_dropout=0.5), random_ids(1, 9)
    assert all_equal(draft_states(model, ids), draft_states(model, ids))
    expected = ar_states(model, ids)
    model.train()
    assert not all_equal(draft_states(model, ids), draft_states(model, ids))
    assert all_equal(ar_states(model, ids), expected)
    model.eval()
    assert all_equal(draft_states(model, ids), draft_states(model, ids))


# ---------------------------------------------------------------------------------------------------------- generation


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_verified_and_text_are_what_they_are_without_adapter(data: Any) -> None:
    """For any weights of the adapter, one row at a time and in batches."""
    rows = data.draw(st.integers(2, 4))
    requests = [data.draw(st.sampled_from(REQUESTS)) for _ in range(rows)]
    own = [data.draw(st.sampled_from(TOOLS)) for _ in range(rows - 1)] + [[WEATHER]]
    model = tiny_model(seed=data.draw(st.integers(0, 30)), scale=data.draw(st.sampled_from([2.0, 6.0])))
    options = {
        "max_tool_calls": data.draw(st.integers(1, 3)),
        "enable_thinking": data.draw(st.booleans()),
        "tool_call_threshold": data.draw(st.sampled_from([None, 0.0, 0.02])),
    }
    drafter = data.draw(st.sampled_from(["head", "lookup", "mixed"]))
    expected, _ = replies(model, requests, own, decoding="ar", **options)
    adapted(model)
    for decoding in ("ar", "verified"):
        assert replies(model, requests, own, decoding=decoding, drafter=drafter, **options)[0] == expected
    together, _ = replies(model, requests, own, decoding="diffusion", drafter=drafter, **options)
    for row, (text, tools) in enumerate(zip(requests, own, strict=True)):
        assert replies(model, [text], [tools], decoding="diffusion", drafter=drafter, **options)[0] == [together[row]]


def assert_adapted_memory(model: Any, memory: Any, tokens: list[int]) -> None:
    """The memory is of these tokens, of a draft pass over all of them."""
    ids = torch.tensor([tokens])
    with torch.no_grad(), model.drafting_base():
        states = model.base(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        expected = model.prompt_memory(states, ids, torch.ones_like(ids))
    assert memory.prompt_ids[0].tolist() == tokens
    for one, other in zip((*memory.keys, *memory.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def starts_of_calls(tokens: list[int], prompt: int) -> list[int]:
    call = tiny_tokenizer().convert_tokens_to_ids("<tool_call>")
    return [place for place, token in enumerate(tokens) if token == call and place >= prompt]


@pytest.mark.parametrize("decoding", ["verified", "diffusion"])
def test_the_head_reads_a_pass_over_all_in_front_of_each_call(decoding: str) -> None:
    """Each call costs one more forward of the base, none of them where nothing is drafted."""
    model, tools, prompt = adapted(tiny_model(seed=1)), [TIME, CLOSED], prompt_of([TIME, CLOSED])[0].tolist()
    with drafted_over(model) as memories, counted_forwards(model.base) as count, adapter_passes(model) as passes:
        reply = respond(model, tools, decoding=decoding, max_tool_calls=3)
    tokens = [*prompt, *reply.token_ids]
    starts = starts_of_calls(tokens, len(prompt))
    assert len(starts) == 3 == len(passes)
    seen = {memory.mask.shape[1]: memory for memory in memories}
    assert sorted(seen) == starts
    for start, memory in seen.items():
        assert_adapted_memory(model, memory, tokens[:start])
    assert reply.stats.base_forwards == count[0]
    assert reply.stats.seconds["adapter"] > 0


@contextmanager
def adapter_passes(model: Any) -> Iterator[list[Any]]:
    """Notes the rows of each draft pass."""
    noted, features = list[Any](), model.draft_features

    def draft_features(contexts: Any) -> Any:
        noted.append(contexts)
        return features(contexts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "draft_features", draft_features)
        yield noted


def test_where_nothing_is_drafted_the_adapter_costs_nothing() -> None:
    model = adapted(tiny_model(seed=3))
    with adapter_passes(model) as passes, biased(model, {"<tool_call>": -100.0}):
        assert respond(model, [WEATHER], tool_choice="auto", max_new_tokens=5).mode == "chat"
        respond(model, [WEATHER], decoding="ar")
        respond(model, [CLOSED], drafter="lookup")
    assert passes == []


def test_rows_that_draft_at_once_share_a_pass() -> None:
    model, own = adapted(tiny_model(seed=2)), [[WEATHER], [CLOSED], [TIME, WEATHER]]
    options: dict[str, Any] = {"tool_choice": "required", "max_tool_calls": 1}
    with adapter_passes(model) as passes:
        _, output = replies(model, list(REQUESTS[:3]), own, **options)
    assert len(passes) < 3
    assert sum(len(contexts) for contexts in passes) == sum("adapter" in stats.seconds for stats in output.stats) == 3


def test_a_prompt_cache_changes_no_reply_and_keeps_the_bases_own_states() -> None:
    model, own = adapted(tiny_model(seed=4)), [[WEATHER, CLOSED], [WEATHER, CLOSED], [TIME], []]
    for decoding in ("verified", "diffusion"):
        options = {"decoding": decoding, "max_tool_calls": 2}
        plain, _ = replies(model, list(REQUESTS), own, **options)
        cache = prompt_cache.PromptCache()
        replies(model, [REQUESTS[3]], [own[0]], prompt_cache=cache, **options)
        for _ in range(2):
            again, _ = replies(model, list(REQUESTS), own, prompt_cache=cache, **options)
            assert again == plain
        assert cache.stats.hits >= 2
        held = [entry for shelf in cache._shelves.values() for entry in shelf.entries]
        assert held
        assert all(entry.memory is None for entry in held)


def test_a_prompt_that_was_cached_before_the_adapter_came_serves_on() -> None:
    model, cache = tiny_model(seed=4), prompt_cache.PromptCache()
    respond(model, [WEATHER], prompt_cache=cache)
    adapted(model)
    expected = respond(model, [WEATHER], decoding="diffusion").token_ids
    with drafted_over(model) as memories:
        assert respond(model, [WEATHER], decoding="diffusion", prompt_cache=cache).token_ids == expected
    assert cache.stats.hits == 1
    assert_adapted_memory(model, memories[0], prompt_of([WEATHER])[0].tolist())


def test_compiled_decoding_gives_the_same_reply() -> None:
    model = adapted(tiny_model(seed=5))
    options = {"max_tool_calls": 2, "drafter": "head"}
    expected = respond(model, [CLOSED], **options).token_ids
    try:
        model.compile_decoding(backend="eager", buckets=COARSE)
        with adapter_passes(model) as passes:
            assert respond(model, [CLOSED], **options).token_ids == expected
        assert passes
        assert model.compiled_decoding.graphs >= 2  # of the base and of the head
        assert model.compiled_decoding.off == {}
    finally:
        torch._dynamo.reset()


def test_assisted_generation_gives_the_bases_own_reply() -> None:
    model, prompt = tiny_model(seed=6), prompt_of([CLOSED, TIME])
    options = {"tools": [CLOSED, TIME], "tokenizer": tiny_tokenizer(), "max_new_tokens": 40, "do_sample": False}
    with biased(model, {"<tool_call>": 1000.0}):
        expected = model.assisted_generate(prompt, drafter="lookup", **options)
        adapted(model)
        assert model.assisted_generate(prompt, drafter="head", **options).tolist() == expected.tolist()


def test_assisted_generation_drafts_over_a_pass_over_all_in_front_of_the_call() -> None:
    model, prompt, tokenizer = adapted(tiny_model(seed=6)), prompt_of([CLOSED, TIME]), tiny_tokenizer()
    vocabulary = model._vocabulary(tokenizer)
    head = drafting.HeadDrafter(vocabulary, model.config)
    generator = candidates.HeadCandidateGenerator(model, vocabulary, [CLOSED, TIME], head, 2)
    assert generator.model_kwargs_overrides == {}
    generator.get_candidates(prompt, {}, None, is_first_iteration=True)
    reply = list[int]()
    first = [*call_token_ids(tokenizer, "get_time", {"zone": 2}), *tokenizer("\n")["input_ids"]]
    for _ in range(2):
        begun = tokenizer('<tool_call>\n{"name": "check", "arg')["input_ids"]
        ids = torch.cat([prompt, torch.tensor([[*reply, *begun]])], dim=1)
        with drafted_over(model) as memories, adapter_passes(model) as passes, torch.no_grad():
            drafted, _ = generator.get_candidates(ids, {}, None)
            generator.get_candidates(ids, {}, None)  # a second draft of the same call reads nothing new
        assert drafted.shape[1] > ids.shape[1]
        assert len(passes) == 1
        for memory in memories:
            assert_adapted_memory(model, memory, [*prompt[0].tolist(), *reply])
        reply += first


def test_a_draft_pass_draws_no_random_numbers() -> None:
    """A request with an adapter draws what one without it draws."""
    model = tiny_model(seed=7)
    options = {"decoding": "verified", "do_sample": True, "max_tool_calls": 2}
    torch.manual_seed(3)
    expected = respond(model, [CLOSED, TIME], **options).token_ids
    adapted(model)
    torch.manual_seed(3)
    assert respond(model, [CLOSED, TIME], **options).token_ids == expected


# ------------------------------------------------------------------------------------------------- saving and loading


def test_saved_equals_loaded_and_names_stay_plain(tmp_path: Path) -> None:
    model, ids = tiny_models.tiny_model(), random_ids(2, 9)
    model.save_pretrained(tmp_path / "without")
    adapted(model).save_pretrained(tmp_path / "with")
    names = load_file(tmp_path / "with" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "without" / "model.safetensors").keys()
    assert not list(tmp_path.glob("*/adapter_config.json"))  # transformers would load the plain base
    assert sorted(path.name for path in (tmp_path / "with" / "adapter").iterdir()) == sorted(FILES)
    loaded, info = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "with", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all_equal(draft_states(loaded, ids), draft_states(model, ids))
    assert all_equal(ar_states(loaded, ids), ar_states(model, ids))
    assert not loaded.draft_adapter.training
    loaded.save_pretrained(tmp_path / "again")
    for name in FILES:
        saved = [(tmp_path / folder / "adapter" / name).read_bytes() for folder in ("with", "again")]
        assert saved[0] == saved[1]


def test_a_head_only_checkpoint_has_its_adapter(tmp_path: Path) -> None:
    tiny_models.tiny_model().base.save_pretrained(tmp_path / "base")
    head = {"head_hidden_size": 32, "head_num_layers": 2, "head_num_heads": 2}
    model = adapted(SmolLMDiffusionForCausalLM.from_base(tmp_path / "base", **head))
    model.save_pretrained(tmp_path / "head", head_only=True)
    assert all(name.startswith("diffusion_head.") for name in load_file(tmp_path / "head" / "model.safetensors"))
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "head")
    ids = random_ids(2, 9)
    assert all_equal(draft_states(loaded, ids), draft_states(model, ids))
    assert json.loads((tmp_path / "head/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )


def test_a_model_without_adapter_leaves_none_behind(tmp_path: Path) -> None:
    adapted(tiny_models.tiny_model()).save_pretrained(tmp_path)
    tiny_models.tiny_model().save_pretrained(tmp_path)
    assert not (tmp_path / "adapter").exists()
    assert not SmolLMDiffusionForCausalLM.from_pretrained(tmp_path).has_draft_adapter


def test_an_adapter_that_the_config_does_not_name_is_not_loaded_and_foreign_files_stay(tmp_path: Path) -> None:
    tiny_models.tiny_model().save_pretrained(tmp_path)
    adapted(tiny_models.tiny_model()).draft_adapter.save(tmp_path)
    assert not SmolLMDiffusionForCausalLM.from_pretrained(tmp_path).has_draft_adapter
    (tmp_path / "adapter" / "notes.txt").touch()
    tiny_models.tiny_model().save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["notes.txt"]


def test_the_adapter_has_the_dtype_of_the_head(tmp_path: Path) -> None:
    model = adapted(tiny_models.tiny_model()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / FILES[1]).values()} == {torch.bfloat16}
    ids = random_ids(1, 9)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.draft_adapter.parameters()} == {dtype}
        assert draft_states(loaded, ids)[0].dtype == dtype
    assert not all_equal(draft_states(loaded, ids), ar_states(loaded, ids))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / FILES[1])
    change(tensors)
    save_file(tensors, folder / FILES[1], metadata={"format": "pt"})


def without_weights(folder: Path) -> None:
    (folder / FILES[1]).rename(folder / "adapter_model.bin")


def without_config(folder: Path) -> None:
    (folder / FILES[0]).unlink()


def with_cut_weights(folder: Path) -> None:
    content = (folder / FILES[1]).read_bytes()
    (folder / FILES[1]).write_bytes(content[: len(content) // 2])


def with_cut_config(folder: Path) -> None:
    (folder / FILES[0]).write_text("{")


def with_one_missing(folder: Path) -> None:
    rewritten(folder, dict.popitem)


def with_one_more(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update(more=torch.zeros(1)))


def with_another_shape(folder: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = next(iter(tensors))
        tensors[name] = tensors[name][:, :-1].clone()

    rewritten(folder, cut)


def of_another_method(folder: Path) -> None:
    fields = json.loads((folder / FILES[0]).read_text())
    (folder / FILES[0]).write_text(json.dumps({**fields, "use_dora": True}))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (without_weights, "adapter_model.safetensors is missing.*never loaded"),
        (without_config, "adapter_config.json is missing"),
        (with_cut_weights, "adapter_model.safetensors is damaged"),
        (with_cut_config, "adapter_config.json does not describe"),
        (with_one_missing, "1 weights are missing, unknown"),
        (with_one_more, "1 weights are missing, unknown or of another shape, such as more"),
        (with_another_shape, "1 weights are missing, unknown or of another shape"),
        (of_another_method, "use_dora"),
    ],
)
def test_an_adapter_that_is_damaged_or_pickled_is_refused(
    fault: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    adapted(tiny_models.tiny_model()).save_pretrained(tmp_path)
    fault(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        SmolLMDiffusionForCausalLM.from_pretrained(tmp_path)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    adapted(tiny_models.tiny_model()).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_a_gathered_state_is_what_is_written(tmp_path: Path) -> None:
    """Of a model that is spread over processes, the trainer hands over the whole state."""
    model, other = adapted(tiny_models.tiny_model()), adapted(tiny_models.tiny_model())
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    ids = random_ids(1, 9)
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path)
    assert all_equal(draft_states(loaded, ids), draft_states(other, ids))


def test_uploading_a_saved_model_uploads_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[str] = []

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, operations: Any, **_: Any) -> None:
            uploaded.extend(operation.path_in_repo for operation in operations)

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: type("Anything", (), {"repo_id": "me/mine"})

    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.hf_api", Hub)
    model = adapted(tiny_models.tiny_model())
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/mine")
    model.push_to_hub("me/mine")
    assert [uploaded.count(f"adapter/{name}") for name in FILES] == [2, 2]


FROM_A_HUB = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 12)[None]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    states = [model(ids).logits]
    with model.drafting_base():
        states.append(model(ids).logits)
print(states[0].sum().item(), states[1].sum().item())
"""


@pytest.mark.slow
def test_remote_code_loads_it_from_a_hub(tmp_path: Path) -> None:
    model, ids = adapted(tiny_models.tiny_model()), torch.arange(3, 12)[None]
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "home").mkdir()
    with loopback_hub({"org/adapted": tmp_path / "saved"}) as (endpoint, requests):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", FROM_A_HUB, "org/adapted"],
            cwd=tmp_path / "home",
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [float(states[0].sum()) for states in (ar_states(model, ids), draft_states(model, ids))]
    assert [float(number) for number in done.stdout.split()] == pytest.approx(expected, rel=1e-5)
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for path in requests if "/resolve/" in path}
    assert {f"adapter/{name}" for name in FILES} <= fetched
    assert not [path for path in fetched if path.endswith((".bin", ".pkl", ".pt"))]


# ------------------------------------------------------------------------------------------------------ quantised bases


@pytest.mark.parametrize(
    "bits", [{"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, {"load_in_8bit": True}], ids=["4", "8"]
)
def test_over_a_quantised_base_head_and_adapter_train(bits: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    text_config = tiny_models.tiny_text_config()
    text_config.hidden_size, text_config.intermediate_size = 64, 128
    AutoModelForCausalLM.from_config(text_config).save_pretrained(tmp_path / "base")
    head = {"head_hidden_size": 64, "head_num_layers": 2, "head_num_heads": 2}
    model = SmolLMDiffusionForCausalLM.from_base(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**bits), **head
    )
    ids = random_ids(1, 9)
    expected = ar_states(model, ids)
    quantised = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    adapted(model).train()
    assert {parameter.dtype for parameter in model.draft_adapter.parameters()} == {torch.float32}
    before = [parameter.clone() for parameter in model.draft_adapter.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**training_batch(model.config)).loss.backward()
        optimizer.step()
    assert not any(map(torch.equal, before, model.draft_adapter.parameters()))
    assert all(torch.equal(tensor, quantised[name]) for name, tensor in model.base.state_dict().items())
    model.eval()
    assert all_equal(ar_states(model, ids), expected)
    model.save_pretrained(tmp_path / "saved")
    loaded = SmolLMDiffusionForCausalLM.from_pretrained(tmp_path / "saved")
    assert all_equal(draft_states(loaded, ids), draft_states(model, ids))


# ------------------------------------------------------------------------------------------------------------- the run


@pytest.mark.usefixtures("one_request")
def test_a_run_trains_head_and_adapter_and_saves_them_beside_the_base(tmp_path: Path) -> None:
    short = {"eval_steps": 2, "save_steps": 2, "acceptance_rows": 0, "max_steps": 2}
    train_head(head_tests.options(tmp_path, **short), tiny_tokenizer())
    head = tmp_path / "out" / "final"
    usual = vars(head_tests.options(tmp_path, **short))
    fields = {name: value for name, value in usual.items() if name in AdapterRun.__dataclass_fields__}
    fields |= {"output": tmp_path / "adapted", "model": str(head)}
    fields |= {"optimizer": "adamw", "lora_r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    train_adapter(AdapterRun(**fields), tiny_tokenizer())
    before, after = (
        SmolLMDiffusionForCausalLM.from_pretrained(folder) for folder in (head, tmp_path / "adapted/final")
    )
    assert (after.has_draft_adapter, before.has_draft_adapter) == (True, False)
    assert weights_hash(after.base.float()) == weights_hash(before.base.float())
    assert weights_hash(after.diffusion_head.float()) != weights_hash(before.diffusion_head.float())
    assert {name.rpartition(".")[2] for name in after.draft_adapter.names} == {"q_proj", "up_proj"}
    assert all(layer.scaling == 3 and layer.lora_B.weight.any() for layer in after.draft_adapter.layers)
    # Trained further it keeps its adapter.
    again = AdapterRun(**{**fields, "model": str(tmp_path / "adapted/final"), "output": tmp_path / "again"})
    further = train_adapter(again, tiny_tokenizer())
    assert further.draft_adapter.names == after.draft_adapter.names


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lora_r": 0}, "lora_r"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_a_run_that_cannot_be_is_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterRun(output=tmp_path, model="m", **wrong)
    with pytest.raises(ValueError, match="--model"):
        train_adapter(AdapterRun(output=tmp_path), tiny_tokenizer())
