from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.config import DiffusionParams, SamplingParams
from serve_app.errors import from_validation
from serve_app.schemas import ChatRequest, CompletionRequest, choice_seed

USER = {"role": "user", "content": "hello"}


def refusal(model: type[ChatRequest] | type[CompletionRequest], body: Any) -> dict[str, Any]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    error: dict[str, Any] = from_validation(caught.value).body()["error"]
    return error


BAD = [
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": True}, "n"),
    ({"n": "3"}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ["x" * 257]}, "stop[0]"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": "\ud800"}, "stop"),
    ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"mode": "fast"}, "mode"),
    ({"mode": "ar", "ar_mode": "true"}, "ar_mode"),
    ({"mode": "diffusion", "ar_mode": True}, "ar_mode"),
    ({"diffusion": {"block_length": 5}}, "diffusion.block_length"),
    ({"diffusion": {"threshold": 1.1}}, "diffusion.threshold"),
    ({"diffusion": {"steps": -1}}, "diffusion.steps"),
    ({"diffusion": []}, "diffusion"),
    ({"model": "\udc00"}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    chat = refusal(ChatRequest, {"messages": [USER], **fields})
    completion = refusal(CompletionRequest, {"prompt": "hello", **fields})
    for error in (chat, completion):
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hello", "messages"),
        ([{}], "messages[0].role"),
        ([USER, {"role": "tool", "content": "x"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": "\ud83d"}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ],
)
def test_a_bad_message_is_named(messages: Any, param: str) -> None:
    assert refusal(ChatRequest, {"messages": messages})["param"] == param


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        (7, "prompt"),
        ([], "prompt"),
        (["a", 1], "prompt[1]"),
        ([1, True], "prompt[1]"),
        ([1, -1], "prompt[1]"),
        ([[]], "prompt[0]"),
        ([[1], "a"], "prompt[1]"),
        ([[1.5]], "prompt[0][0]"),
        (["a"] * 33, "prompt"),
    ],
)
def test_a_bad_prompt_is_named(prompt: Any, param: str) -> None:
    assert refusal(CompletionRequest, {"prompt": prompt})["param"] == param


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_has_four_forms(prompt: Any, prompts: list[str | list[int]]) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompts == prompts


def test_what_is_not_given_has_openais_defaults() -> None:
    request = ChatRequest.model_validate({"messages": [USER], "temperature": None, "stop": None, "n": None})
    assert request.sampling(seed=3, max_tokens=5) == SamplingParams(temperature=1.0, seed=3, max_tokens=5)
    assert request.choices == 1 and request.stops == () and not request.include_usage
    assert request.chosen_mode("quadratic_spec") == "quadratic_spec"
    default = DiffusionParams(0.7, 3, 16)
    assert request.diffusion_params(default) == default


def test_what_is_given_reaches_the_engine() -> None:
    request = ChatRequest.model_validate(
        {
            "messages": [USER],
            "temperature": 0,
            "top_p": 0.5,
            "top_k": -1,
            "min_p": 0.25,
            "stop_token_ids": [4, 5],
            "ignore_eos": True,
            "diffusion": {"steps": 0, "threshold": 0, "block_length": 8},
            "ar_mode": True,
            "max_tokens": 5,
            "max_completion_tokens": 6,
        }
    )
    assert request.sampling(1, 2) == SamplingParams(0.0, 0, 0.5, 0.25, 1, 2, (4, 5), True)
    assert request.diffusion_params(DiffusionParams(0.7, 3, 16)) == DiffusionParams(0.0, 0, 8)
    assert request.chosen_mode("diffusion") == "ar"
    assert request.answer_tokens == 6


def test_parts_of_a_message_join_and_a_developer_is_the_system() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest.model_validate({"messages": [{"role": "developer", "content": content}]})
    assert request.messages[0].plain() == {"role": "system", "content": "ab"}


def test_fields_without_effect_are_named() -> None:
    request = ChatRequest.model_validate(
        {
            "messages": [USER],
            "tools": [{"type": "function"}],
            "logit_bias": {"1": 2},
            "diffusion": {"colour": 1},
            "presence_penalty": 0.0,  # asks for nothing
            "logprobs": None,
            "user": "me",  # changes nothing
            "metadata": {"a": "b"},
            "e\r\nvil: 1": 1,
        }
    )
    assert request.ignored_params() == ["?", "diffusion.colour", "logit_bias", "tools"]


@given(st.integers(-(2**63), 2**63 - 1))
def test_choices_have_seeds_of_their_own(seed: int) -> None:
    seeds = [choice_seed(seed, choice) for choice in range(8)]
    assert len(set(seeds)) == 8
    assert all(0 <= each < 2**63 for each in seeds)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*ChatRequest.model_fields, "prompt", "tools"])


@settings(max_examples=200)
@given(st.dictionaries(fields, json_values, max_size=5))
def test_no_value_breaks_the_validation(body: dict[str, Any]) -> None:
    for model in (ChatRequest, CompletionRequest):
        try:
            model.model_validate({"messages": [USER], "prompt": "x", **body}).ignored_params()
        except ValidationError as error:
            refused = from_validation(error).body()["error"]
            assert len(refused["message"].encode()) < 2048


def test_ar_mode_false_asks_for_something_else_only_where_the_server_would_decode_ar() -> None:
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "ar_mode": False})
    assert request.chosen_mode("ar") == "auto"
    assert request.chosen_mode("diffusion") == "diffusion"
