"""openai-python through the gateway to an upstream that speaks Ollama's own API."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from conftest import client_of
from ollama_standin import CALL_A_TOOL, DIMENSIONS, vector
from servers import Gateway, LlamaCpp, Ollama, upstream
from test_openai_python import FORECAST, WEATHER, text_of
from tiny_model import SENTENCE

pytestmark = pytest.mark.gateway

QUESTION = [{"role": "user", "content": "What does the gateway do?"}]
ASK = {"model": "tiny", "messages": QUESTION, "temperature": 0}
# Nothing else may ever be called: other paths delete models, or load them from the internet.
ALLOWED = {
    "POST /api/chat",
    "POST /api/generate",
    "POST /api/embed",
    "GET /api/tags",
    "GET /api/ps",
    "POST /api/show",
    "GET /api/version",
}


def config_of(ollama, **more):
    local = {"local": True, "upstreams": [fallback(ollama, **more)]}
    return {"groups": {"ollama": local}, "routes": [{"model": "*", "groups": ["ollama"]}]}


def fallback(ollama, **more):
    return {"name": "ollama", "dialect": "ollama", "url": ollama.url, **more}


@pytest.fixture
def ollama(start, llamas):
    """A stand-in of the test's own; afterwards it has been asked for nothing that is not allowed."""
    running = start(Ollama, "ollama", llamas["llama-1"])
    yield running
    calls = set(running.state()["calls"])
    assert calls <= ALLOWED, f"called {calls - ALLOWED}"


@pytest.fixture
def through(ollama, start, tmp_path):
    """A client of a gateway before the stand-in."""
    with client_of(start(Gateway, config_of(ollama), tmp_path)) as client:
        yield client


def bodies(ollama):
    """The requests that it got, without those of checks."""
    return [body for body in ollama.state()["bodies"] if "messages" in body]


def test_a_chat_is_answered_in_openais_shape(through):
    answer = through.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == SENTENCE
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.completion_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_events_of_one_id_with_one_end(through):
    chunks = list(
        through.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    )
    assert text_of(chunks) == SENTENCE
    assert len({chunk.id for chunk in chunks}) == 1
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finishes[-1] == "stop"
    assert sum(finish is not None for finish in finishes) == 1
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 10
    assert chunks[-1].usage.completion_tokens > 10


def test_a_stream_hides_the_usage_that_nobody_asked_for(through):
    chunks = list(through.chat.completions.create(**ASK, stream=True))
    assert text_of(chunks) == SENTENCE
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_options_reach_the_model_in_ollamas_words(through, ollama):
    answer = through.chat.completions.create(
        **ASK, max_tokens=4, stop=["zebra"], seed=7, top_p=0.5
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4
    options = bodies(ollama)[-1]["options"]
    assert options["num_predict"] == 4
    assert options["stop"] == ["zebra"]
    assert options["seed"] == 7
    assert options["top_p"] == 0.5
    assert options["temperature"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_understood(through, ollama, stream):
    question = [{"role": "user", "content": f"{CALL_A_TOOL}: the weather in Graz"}]
    given = {"model": "tiny", "messages": question, "tools": [WEATHER], "temperature": 0}
    if stream:
        chunks = list(through.chat.completions.create(**given, stream=True))
        parts = [p for c in chunks if c.choices for p in c.choices[0].delta.tool_calls or []]
        call_id = parts[0].id
        name = parts[0].function.name
        arguments = "".join(part.function.arguments or "" for part in parts)
        finish = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
    else:
        choice = through.chat.completions.create(**given).choices[0]
        call = choice.message.tool_calls[0]
        call_id, name, arguments = call.id, call.function.name, call.function.arguments
        finish = choice.finish_reason
    assert finish == "tool_calls"
    assert name == "get_weather"
    assert set(json.loads(arguments)) == {"city", "days"}

    called = {"name": name, "arguments": arguments}
    history = [
        *question,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call_id, "type": "function", "function": called}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": "rain"},
    ]
    answer = through.chat.completions.create(**{**given, "messages": history, "tools": []})
    assert answer.choices[0].message.content == SENTENCE
    sent = bodies(ollama)[-1]["messages"]
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == json.loads(arguments)


def test_json_comes_in_the_shape_of_a_schema(through, ollama):
    shape = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": FORECAST}}
    answer = through.chat.completions.create(**ASK, response_format=shape)
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "degrees", "rain"}
    assert bodies(ollama)[-1]["format"] == FORECAST


def test_an_image_travels_as_base64_without_its_data_url(through, ollama):
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixel}"}},
    ]
    answer = through.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], temperature=0
    )
    assert answer.choices[0].message.content == SENTENCE
    sent = bodies(ollama)[-1]["messages"][0]
    assert sent["images"] == [pixel]
    assert sent["content"] == "What is this?"


def test_embeddings_are_those_of_each_text_in_order(through):
    texts = ["one", "two", "three"]
    answer = through.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [item.index for item in answer.data] == [0, 1, 2]
    for text, item in zip(texts, answer.data, strict=True):
        assert item.embedding == pytest.approx(vector(text))
    # openai-python asks for base64 by itself.
    assert len(through.embeddings.create(model="tiny", input="one").data[0].embedding) == DIMENSIONS


def test_thinking_comes_as_reasoning(start, llamas, tmp_path):
    ollama = start(Ollama, "thinker", llamas["llama-1"], arguments=["--thinks"])
    with client_of(start(Gateway, config_of(ollama), tmp_path)) as client:
        message = client.chat.completions.create(**ASK, reasoning_effort="low").choices[0].message
        thought = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", "")
        assert thought
        assert thought + message.content == SENTENCE


def test_errors_are_openais(through, ollama):
    with pytest.raises(openai.NotFoundError) as unknown:
        through.chat.completions.create(**{**ASK, "model": "nope"})
    assert "127.0.0.1" not in str(unknown.value)
    ollama.fault(status=400, error="this model cannot do that")
    with pytest.raises(openai.BadRequestError) as refused:
        through.chat.completions.create(**ASK)
    assert "this model cannot do that" in str(refused.value)


def test_an_error_before_the_first_token_is_an_error_status(through, ollama):
    ollama.fault(status=500, error="llama runner process has terminated")
    with pytest.raises(openai.APIStatusError) as failed:
        through.chat.completions.create(**ASK, stream=True)
    assert failed.value.status_code >= 500
    assert "runner" not in str(failed.value)


def test_an_error_in_the_middle_of_a_stream_is_an_error_event(through, ollama):
    ollama.fault(error="llama runner process has terminated", after=3)
    with pytest.raises(openai.APIError):
        list(through.chat.completions.create(**ASK, stream=True))
    assert through.chat.completions.create(**ASK).choices[0].message.content == SENTENCE


def test_it_answers_one_at_a_time_and_all_are_served(through, ollama):
    def ask(_):
        return through.chat.completions.create(**ASK).choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(12))) == [SENTENCE] * 12
    assert ollama.state()["most"] == 1


def test_the_context_follows_the_prompt_in_few_sizes(through, ollama):
    def ask(words):
        question = [{"role": "user", "content": "stream " * words}]
        return through.chat.completions.create(**{**ASK, "messages": question}, max_tokens=8)

    for words in (5, 10, 20, 15):
        ask(words)
    assert len(ollama.state()["loads"]) == 1, "prompts of one size need one load"
    small = ollama.state()["context"]
    answer = ask(6000)
    assert answer.usage.prompt_tokens >= 6000, "the prompt was cut"
    large = ollama.state()["context"]
    assert large > small
    assert {small, large} <= {2**power for power in range(10, 21)}


def test_a_prompt_that_was_cut_is_reported(start, llamas, tmp_path):
    ollama = start(Ollama, "small", llamas["llama-1"])
    gateway = start(Gateway, config_of(ollama, num_ctx=2048), tmp_path)
    with client_of(gateway) as client:

        def ask(words):
            history = [{"role": "user", "content": "stream " * words}, *QUESTION]
            given = {**ASK, "messages": history, "max_tokens": 8}
            return client.chat.completions.with_raw_response.create(**given).headers

        assert "x-forebay-prompt-cut" not in ask(20)
        assert ask(5000)["x-forebay-prompt-cut"] == "1"


def test_a_prompt_of_the_old_kind_is_completed(through, ollama):
    answer = through.completions.create(model="tiny", prompt="What is it?", temperature=0)
    assert answer.choices[0].text == SENTENCE
    chunks = through.completions.create(model="tiny", prompt="What?", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == SENTENCE
    assert "POST /api/generate" in ollama.state()["calls"]


def test_an_answer_is_bounded_by_one_line(start, llamas, tmp_path):
    ollama = start(Ollama, "bounded", llamas["llama-1"])
    with client_of(start(Gateway, config_of(ollama, max_tokens=5), tmp_path)) as client:
        for more in ({}, {"max_tokens": 900}, {"max_completion_tokens": 900}):
            answer = client.chat.completions.create(**ASK, **more)
            assert answer.usage.completion_tokens == 5
            assert answer.choices[0].finish_reason == "length"
        assert client.chat.completions.create(**ASK, max_tokens=3).usage.completion_tokens == 3


def test_a_killed_llama_cpp_is_followed_by_the_fallback(start, model, llamas, tmp_path):
    gpu = start(LlamaCpp, "gpu", model)
    ollama = start(Ollama, "ollama", llamas["llama-1"])
    config = {
        "groups": {
            "gpus": {"local": True, "upstreams": [upstream("gpu", gpu)]},
            "ollama": {"local": True, "upstreams": [fallback(ollama)]},
        },
        "routes": [{"model": "tiny", "groups": ["gpus"], "fallback": "ollama"}],
    }
    with client_of(start(Gateway, config, tmp_path)) as client:

        def ask(**more):
            return client.chat.completions.with_raw_response.create(**ASK, **more)

        assert ask().headers["x-forebay-fallback"] == "0"
        gpu.kill()
        for _ in range(3):
            answer = ask()
            assert answer.headers["x-forebay-fallback"] == "1"
            assert answer.headers["x-forebay-upstream"] == "ollama"
            assert answer.parse().choices[0].message.content == SENTENCE
        streamed = ask(stream=True)
        assert streamed.headers["x-forebay-fallback"] == "1"
        assert text_of(list(streamed.parse())) == SENTENCE
