"""Servers that crash under the gateway: the client notices as little as can be."""

import openai
import pytest

from conftest import client_of
from servers import Gateway, LlamaCpp, Simulator, eventually, upstream
from tiny_model import SENTENCE

pytestmark = pytest.mark.gateway

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Say"}], "temperature": 0}


@pytest.fixture
def cluster(start, model, tmp_path):
    """Two llama.cpp servers to be killed, and a simulated Ollama to fall back to."""
    llamas = {name: start(LlamaCpp, name, model) for name in ("llama-1", "llama-2")}
    ollama = start(Simulator, "ollama")
    config = {
        "groups": {
            "gpus": {"local": True, "upstreams": [upstream(*pair) for pair in llamas.items()]},
            "ollama": {"local": True, "upstreams": [upstream("ollama", ollama, kind="ollama")]},
        },
        "routes": [{"model": "tiny", "groups": ["gpus"], "fallback": "ollama"}],
    }
    gateway = start(Gateway, config, tmp_path)
    with client_of(gateway) as client:
        yield client, llamas


def ask(client):
    """Returns text and headers of one answer."""
    answer = client.chat.completions.with_raw_response.create(**ASK)
    return answer.parse().choices[0].message.content, answer.headers


def test_a_killed_server_costs_no_request(cluster):
    client, llamas = cluster
    assert {ask(client)[1]["x-forebay-upstream"] for _ in range(4)} == set(llamas)
    llamas["llama-1"].kill()
    for _ in range(10):
        text, headers = ask(client)
        assert text == SENTENCE
        assert headers["x-forebay-upstream"] == "llama-2"
        assert headers.get("x-forebay-fallback") != "1"


def test_the_fallback_answers_when_every_server_is_killed(cluster):
    client, llamas = cluster
    for llama in llamas.values():
        llama.kill()
    for _ in range(3):
        text, headers = ask(client)
        assert text.startswith("ollama answers:")
        assert headers["x-forebay-upstream"] == "ollama"
        assert headers["x-forebay-group"] == "ollama"
        assert headers["x-forebay-fallback"] == "1"


def test_the_fallback_streams_when_every_server_is_killed(cluster):
    client, llamas = cluster
    for llama in llamas.values():
        llama.kill()
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith("ollama answers:")
    assert chunks[-1].choices[0].finish_reason


def test_a_server_that_comes_back_is_used_again(cluster, start, model):
    client, llamas = cluster
    for llama in llamas.values():
        llama.kill()
    assert ask(client)[1]["x-forebay-upstream"] == "ollama"
    start(LlamaCpp, "llama-2", model, port=llamas["llama-2"].port)
    eventually(
        lambda: ask(client)[1]["x-forebay-upstream"] == "llama-2", 90, "llama-2 is asked again"
    )


def test_a_stream_ends_in_an_error_when_every_server_that_could_go_on_is_killed(cluster):
    client, llamas = cluster
    stream = client.chat.completions.with_raw_response.create(
        **ASK, stream=True, max_tokens=8000, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream.parse())
    next(chunk for chunk in chunks if chunk.choices[0].delta.content)
    for llama in sorted(llamas.values(), key=lambda llama: llama.busy()):
        llama.kill()
    with pytest.raises(openai.APIError):
        for _ in chunks:
            pass
