"""openai-python through the gateway to real llama.cpp servers: only `base_url` differs."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from conftest import client_of
from servers import eventually
from tiny_model import SENTENCE

QUESTION = [{"role": "user", "content": "What does the gateway do?"}]
ASK = {"model": "tiny", "messages": QUESTION, "temperature": 0}
# 8,000 tokens take llama.cpp about ten seconds, unless it is told that nobody waits for them.
ASK_FOR_LONG = {**ASK, "max_tokens": 8000, "extra_body": {"ignore_eos": True}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of the next days.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
FORECAST = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "degrees": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        "rain": {"type": "boolean"},
    },
    "required": ["city", "degrees", "rain"],
    "additionalProperties": False,
}


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def idle_soon(llamas):
    """The gateway has one second to leave; a llama.cpp that is left stops at its next token."""
    eventually(lambda: not any(llama.busy() for llama in llamas.values()), 1.5, "llama.cpp stops")


def busy_soon(llamas):
    eventually(lambda: any(llama.busy() for llama in llamas.values()), 5, "llama.cpp works")


def test_a_chat_answers_what_the_server_answers_directly(client, llamas):
    answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == SENTENCE
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "tiny"
    with client_of(llamas["llama-1"]) as direct:
        same = direct.chat.completions.create(**ASK)
    assert answer.choices[0] == same.choices[0]
    assert answer.usage.completion_tokens == same.usage.completion_tokens


def test_a_stream_says_the_same_token_by_token(client):
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    assert text_of(chunks) == SENTENCE
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_tells_its_usage_if_it_is_asked_to(client):
    chunks = list(
        client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    )
    assert text_of(chunks) == SENTENCE
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 10
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_does_not_tell_its_usage_if_it_is_not_asked_to(client):
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    assert chunks and all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_required_tool_is_called_with_valid_arguments(client):
    answer = client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.id and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "z", "days": 1}


def test_a_tool_call_streams_in_pieces_that_fit_together(client):
    name, arguments, pieces, finish = "", "", 0, None
    for chunk in client.chat.completions.create(
        **ASK, tools=[WEATHER], tool_choice="required", stream=True
    ):
        finish = chunk.choices[0].finish_reason or finish
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.index == 0
            pieces += 1
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, finish) == ("get_weather", "tool_calls")
    assert pieces > 2
    assert json.loads(arguments) == {"city": "z", "days": 1}


def test_a_conversation_goes_on_after_a_tool_has_answered(client):
    asked = client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice="required")
    message = asked.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}
    answer = client.chat.completions.create(
        **{**ASK, "messages": [*QUESTION, message, result]}, tools=[WEATHER]
    )
    assert answer.choices[0].message.content == SENTENCE


def test_a_json_schema_shapes_the_answer(client):
    answer = client.chat.completions.create(
        **ASK,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "forecast", "strict": True, "schema": FORECAST},
        },
    )
    forecast = json.loads(answer.choices[0].message.content)
    assert forecast == {"city": "z", "degrees": [1, 1], "rain": True}


def test_a_question_in_any_script_arrives_whole(client, llamas):
    ask = {**ASK, "messages": [{"role": "user", "content": 'Grüße, 世界! 🦀 "\\u0000" \x01\u2028'}]}
    through = client.chat.completions.create(**ask)
    with client_of(llamas["llama-1"]) as direct:
        same = direct.chat.completions.create(**ask)
    assert through.usage.prompt_tokens == same.usage.prompt_tokens
    assert through.choices[0].message.content == SENTENCE


def test_eight_at_once_all_get_their_answer(client):
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(client.chat.completions.create, **ASK) for _ in range(8)]
        answers = [one.result() for one in asked]
    assert {answer.choices[0].message.content for answer in answers} == {SENTENCE}
    assert len({answer.id for answer in answers}) == 8


@pytest.mark.gateway
def test_eight_at_once_are_spread_over_both_servers(client):
    ask = client.chat.completions.with_raw_response.create
    with ThreadPoolExecutor(8) as threads:
        answers = [one.result() for one in [threads.submit(ask, **ASK) for _ in range(8)]]
    assert {answer.parse().choices[0].message.content for answer in answers} == {SENTENCE}
    upstreams = [answer.headers["x-forebay-upstream"] for answer in answers]
    assert sorted(upstreams) == ["llama-1"] * 4 + ["llama-2"] * 4


def test_the_async_client_streams_four_answers_at_once(gateway):
    async def one(client):
        stream = await client.chat.completions.create(**ASK, stream=True)
        return text_of([chunk async for chunk in stream])

    async def four():
        async with openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, timeout=30
        ) as client:
            return await asyncio.gather(*(one(client) for _ in range(4)))

    assert asyncio.run(four()) == [SENTENCE] * 4


def test_old_completions_answer_and_stream(client):
    ask = {"model": "tiny", "prompt": "Say", "temperature": 0}
    assert client.completions.create(**ask).choices[0].text == SENTENCE
    chunks = client.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == SENTENCE


def test_responses_answer(client):
    answer = client.responses.create(model="tiny", input="What does the gateway do?")
    assert answer.output_text == SENTENCE
    assert answer.status == "completed"


def test_responses_stream_their_named_events_to_the_end(client):
    events = list(client.responses.create(model="tiny", input="Say", stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == SENTENCE


@pytest.mark.gateway
def test_embeddings_answer_a_vector_for_each_input(client):
    answer = client.embeddings.create(model="tiny-embed", input=["one", "two"])
    assert [vector.index for vector in answer.data] == [0, 1]
    assert all(len(vector.embedding) == 512 for vector in answer.data)


def test_models_are_listed(client):
    assert "tiny" in {model.id for model in client.models.list()}


@pytest.mark.gateway
def test_a_model_is_described_by_its_name(client):
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


@pytest.mark.gateway
def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(**{**ASK, "model": "nope"})
    assert refused.value.code == "model_not_found"
    assert refused.value.request_id
    assert "nope" in refused.value.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": "many"},
        {"response_format": {"type": "nope"}},
        {"messages": "not a list"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_bad_parameter_is_a_bad_request(client, wrong):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{**ASK, **wrong})
    assert refused.value.status_code == 400
    assert refused.value.type == "invalid_request_error"


@pytest.mark.gateway
@pytest.mark.parametrize("stream", [False, True])
def test_the_servers_own_refusal_is_passed_on_in_openais_shape(client, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASK, response_format={"type": "nope"}, stream=stream)
    assert set(refused.value.body) >= {"message", "type", "param", "code"}
    assert refused.value.code is None or isinstance(refused.value.code, str)
    assert "response_format" in refused.value.message
    assert refused.value.request_id


@pytest.mark.parametrize("stream", [False, True])
def test_a_question_beyond_the_context_is_a_bad_request(client, stream):
    long = [{"role": "user", "content": "word " * 10_000}]
    with pytest.raises(openai.BadRequestError, match="context size") as refused:
        client.chat.completions.create(**{**ASK, "messages": long}, stream=stream)
    assert refused.value.status_code == 400


@pytest.mark.gateway
def test_the_servers_refusal_is_not_tried_again_elsewhere(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASK, response_format={"type": "nope"})
    assert refused.value.response.headers["x-forebay-attempts"] == "1"


@pytest.mark.gateway
@pytest.mark.parametrize("stream", [False, True])
def test_the_headers_tell_who_answered(client, stream):
    answer = client.chat.completions.with_raw_response.create(**ASK, stream=stream)
    assert answer.headers["x-request-id"]
    assert answer.headers["x-forebay-upstream"] in {"llama-1", "llama-2"}
    assert answer.headers["x-forebay-group"] == "gpus"
    assert answer.headers["x-forebay-attempts"] == "1"
    assert answer.headers.get("x-forebay-fallback") != "1"
    answer.http_response.read()


@pytest.mark.gateway
def test_a_request_id_of_the_client_is_kept(client):
    answer = client.chat.completions.with_raw_response.create(
        **ASK, extra_headers={"x-request-id": "client-check-1"}
    )
    assert answer.headers["x-request-id"] == "client-check-1"


# Only streams: llama.cpp finishes an answer that is not streamed even when nobody waits for it.
def test_a_cancelled_stream_stops_the_server(client, llamas):
    stream = client.chat.completions.create(**ASK_FOR_LONG, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    busy_soon(llamas)
    stream.close()
    idle_soon(llamas)


def test_a_hundred_and_fifty_requests_on_one_connection_all_succeed(client):
    """llama.cpp closes a connection after 100 requests; the gateway must not let it show."""
    for _ in range(150):
        answer = client.chat.completions.create(**{**ASK, "max_tokens": 1})
        assert answer.choices[0].message.content == "The"
