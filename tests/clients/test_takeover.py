"""Servers that crash or stall in the middle of a stream: another goes on with the answer."""

import signal

import pytest

from conftest import client_of
from servers import Gateway, LlamaCpp, get, upstream

pytestmark = pytest.mark.gateway

TOKENS = 1500
# The model says its sentence again and again, so that there is time to harm its server.
ASK = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Say"}],
    "temperature": 0,
    "max_tokens": TOKENS,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def cluster(start, model, tmp_path):
    """Three llama.cpp servers to be harmed, and a gateway that waits a second for a token."""
    llamas = {name: start(LlamaCpp, name, model) for name in ("llama-1", "llama-2", "llama-3")}
    hasty = {"timeouts": {"inter_token": "1s"}}
    config = {
        "groups": {"gpus": {"upstreams": [upstream(*pair, **hasty) for pair in llamas.items()]}},
        "routes": [{"model": "tiny", "groups": ["gpus"]}],
    }
    gateway = start(Gateway, config, tmp_path)
    with client_of(gateway) as client:
        yield client, llamas, gateway


def read(chunks, count):
    """Returns the next `count` chunks with text."""
    found = []
    while len(found) < count:
        chunk = next(chunks)
        if chunk.choices and chunk.choices[0].delta.content:
            found.append(chunk)
    return found


def working(llamas):
    """Returns the names of the servers that write an answer now."""
    return [name for name, llama in llamas.items() if llama.child.poll() is None and llama.busy()]


def crash(llama):
    llama.kill()


def freeze(llama):
    llama.child.send_signal(signal.SIGSTOP)


# Each number is another place in the text: behind a word, a full stop, a line's end.
@pytest.mark.parametrize(
    ("harm", "before"), [(crash, 1), (crash, 15), (crash, 17), (freeze, 17), (freeze, 40)]
)
def test_the_answer_is_what_it_would_have_been(cluster, harm, before):
    client, llamas, gateway = cluster
    expected = client.chat.completions.create(**ASK)
    stream = client.chat.completions.with_raw_response.create(
        **ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = iter(stream.parse())
    heard = read(chunks, before)
    victim = llamas[stream.headers["x-forebay-upstream"]]
    harm(victim)
    try:
        heard += list(chunks)
    finally:
        victim.kill()
    texts = [chunk.choices[0].delta.content or "" for chunk in heard if chunk.choices]
    assert "".join(texts) == expected.choices[0].message.content
    assert len({chunk.id for chunk in heard}) == 1
    ends = [c.choices[0].finish_reason for c in heard if c.choices and c.choices[0].finish_reason]
    assert ends == ["length"]
    assert heard[-1].usage.completion_tokens == TOKENS == expected.usage.completion_tokens
    assert heard[-1].usage.prompt_tokens == expected.usage.prompt_tokens
    assert f'from="{victim.name}",result="continued"' in metrics(gateway)


def test_a_second_crash_is_not_noticed_either(cluster):
    client, llamas, gateway = cluster
    expected = client.chat.completions.create(**ASK).choices[0].message.content
    chunks = iter(client.chat.completions.create(**ASK, stream=True))
    heard = []
    for _ in range(2):
        heard += read(chunks, 30)
        (victim,) = working(llamas)
        llamas[victim].kill()
    heard += list(chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in heard if chunk.choices)
    assert text == expected
    assert metrics(gateway).count('result="continued"') == 2


def metrics(gateway):
    status, body = get(f"{gateway.admin_url}/metrics")
    assert status == 200
    return body.decode()
