"""Two real llama.cpp servers that are killed and frozen while they answer."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from conftest import client_of
from servers import Gateway, LlamaCpp, eventually, free_port, get, upstream
from tiny_model import SENTENCE

pytestmark = pytest.mark.gateway

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Say"}], "temperature": 0}
# Several seconds of work for llama.cpp, however fast the machine.
LONG = {**ASK, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
# A frozen server is noticed after this, a busy one writes a token far sooner.
SILENCE_S = 2


def begin(start, model, tmp_path, **more):
    """Starts two servers to be harmed, and a gateway before them."""
    llamas = {name: start(LlamaCpp, name, model) for name in ("llama-1", "llama-2")}
    upstreams = [upstream(*pair, **more) for pair in llamas.items()]
    config = {
        "groups": {"gpus": {"local": True, "upstreams": upstreams}},
        "routes": [{"model": "tiny", "groups": ["gpus"]}],
    }
    return llamas, start(Gateway, config, tmp_path)


@pytest.fixture
def cluster(start, model, tmp_path):
    """A client that waits 60 s at most, servers, gateway."""
    llamas, gateway = begin(start, model, tmp_path)
    with client_of(gateway) as client:
        yield client.with_options(timeout=60), llamas, gateway


@pytest.fixture
def impatient(start, model, tmp_path):
    """The same, with a gateway that notices silence soon."""
    times = {"inter_token": f"{SILENCE_S}s", "first_token": f"{SILENCE_S}s"}
    llamas, gateway = begin(start, model, tmp_path, timeouts=times)
    with client_of(gateway) as client:
        yield client.with_options(timeout=60), llamas, gateway


def ask(client, **more):
    """Returns text and upstream of one answer."""
    answer = client.chat.completions.with_raw_response.create(**{**ASK, **more})
    return answer.parse().choices[0].message.content, answer.headers["x-forebay-upstream"]


def busy(llamas):
    """Returns the name of a server that is answering."""
    return next((name for name, llama in llamas.items() if llama.busy()), None)


def nothing_is_left(gateway):
    """No request is in flight, and nothing has panicked."""

    def settled():
        lines = get(f"{gateway.admin_url}/metrics")[1].decode().splitlines()
        series = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        busy = {name: value for name, value in series if "_in_flight" in name or "_panics" in name}
        return busy and all(float(value) == 0 for value in busy.values())

    eventually(settled, 10, "nothing is in flight")


def test_a_server_killed_inside_a_whole_answer_costs_nobody_anything(cluster):
    client, llamas, gateway = cluster
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client, **LONG)
        victim = eventually(lambda: busy(llamas), 10, "a server works on it")
        llamas[victim].kill()
        text, upstream_name = asked.result()
    assert upstream_name != victim
    assert text.startswith(SENTENCE)
    assert len(text) > 3000
    nothing_is_left(gateway)


def test_requests_in_flight_when_a_server_dies_are_all_answered(cluster):
    client, llamas, gateway = cluster
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, client, **{**LONG, "max_tokens": 600}) for _ in range(8)]
        eventually(llamas["llama-1"].busy, 10, "llama-1 works")
        llamas["llama-1"].kill()
        texts = [future.result()[0] for future in asked]
    assert all(text == texts[0] and text.startswith(SENTENCE) for text in texts)
    nothing_is_left(gateway)


def test_a_stream_whose_server_freezes_never_hangs(impatient):
    client, llamas, gateway = impatient
    stream = client.chat.completions.with_raw_response.create(**LONG, stream=True)
    victim = stream.headers["x-forebay-upstream"]
    text, chunks = "", iter(stream.parse())
    while len(text) < 200:
        text += next(chunks).choices[0].delta.content or ""
    llamas[victim].freeze()
    begun = time.monotonic()
    try:
        # The other server goes on where this one stopped …
        for chunk in chunks:
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        assert len(text) > 3000
    except openai.APIError as why:
        # … or the client is told; that the text is whole it must never think.
        assert "server" in str(why)
    assert time.monotonic() - begun < 30
    # What was sent is contiguous: the model says its sentence again and again.
    once = text[: len(SENTENCE)]
    assert once == SENTENCE
    assert text == (text[: text.index(SENTENCE, 1)] * (len(text) // 50 + 1))[: len(text)]

    # While it is frozen the other one serves, and afterwards both do.
    for _ in range(4):
        assert ask(client) == (SENTENCE, next(name for name in llamas if name != victim))
    llamas[victim].thaw()
    eventually(lambda: ask(client)[1] == victim, 90, f"{victim} is asked again")
    nothing_is_left(gateway)


def test_a_frozen_server_is_passed_over_before_the_first_token(impatient):
    client, llamas, gateway = impatient
    llamas["llama-1"].freeze()
    begun = time.monotonic()
    answers = [ask(client) for _ in range(12)]
    took = time.monotonic() - begun
    llamas["llama-1"].thaw()
    assert set(answers) == {(SENTENCE, "llama-2")}
    # Some have waited for it before it was known to be frozen; most have not.
    assert took < 8 * SILENCE_S
    nothing_is_left(gateway)


def test_a_server_that_freezes_inside_a_whole_answer_costs_nobody_anything(
    start, model, tmp_path
):
    checks = {"every": "500ms", "timeout": "1s"}
    llamas, gateway = begin(start, model, tmp_path, check=checks)
    with client_of(gateway) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client.with_options(timeout=120), **LONG)
        victim = eventually(lambda: busy(llamas), 10, "a server works on it")
        llamas[victim].freeze()
        try:
            text, upstream_name = asked.result()
        finally:
            llamas[victim].thaw()
    assert upstream_name != victim
    assert text.startswith(SENTENCE)
    assert len(text) > 3000
    nothing_is_left(gateway)


def test_a_restarted_server_is_used_again(cluster, start, model):
    client, llamas, gateway = cluster
    llamas["llama-1"].kill()
    assert {ask(client)[1] for _ in range(6)} == {"llama-2"}
    start(LlamaCpp, "llama-1", model, port=llamas["llama-1"].port)
    eventually(lambda: ask(client)[1] == "llama-1", 90, "llama-1 is asked again")
    assert ask(client)[0] == SENTENCE
    nothing_is_left(gateway)


def test_a_server_that_still_loads_is_left_out_until_it_is_ready(start, model, tmp_path):
    """llama.cpp answers 503 to everything while it reads its model."""
    ready = start(LlamaCpp, "ready", model)
    port = free_port()
    loading = Loading(port)
    config = {
        "groups": {
            "gpus": {
                "local": True,
                "upstreams": [
                    {"name": "loading", "kind": "llamacpp", "url": f"http://127.0.0.1:{port}/v1"},
                    upstream("ready", ready),
                ],
            }
        },
        "routes": [{"model": "tiny", "groups": ["gpus"]}],
    }
    try:
        with client_of(start(Gateway, config, tmp_path)) as client:
            for _ in range(6):
                assert ask(client) == (SENTENCE, "ready")
            loading.stop()
            start(LlamaCpp, "loading", model, port=port)
            eventually(lambda: ask(client)[1] == "loading", 90, "it is asked once it is ready")
    finally:
        loading.stop()


class Loading:
    """The port of a llama.cpp server whose model is too large to be read while a test waits."""

    ANSWER = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'

    def __init__(self, port):
        import http.server

        class Call(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.rfile.read(int(self.headers.get("content-length") or 0))
                self.send_response(503)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(Loading.ANSWER)))
                self.end_headers()
                self.wfile.write(Loading.ANSWER)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Call)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
