"""What the tests stand on: servers, a gateway in front of them, and clients.

With `FOREBAY_DIRECT=1` the clients ask llama.cpp itself and only the tests that need no
gateway run: what fails then is not the gateway's doing.
"""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import openai
import pytest

import servers
import tiny_model

DIRECT = bool(os.environ.get("FOREBAY_DIRECT"))


def pytest_configure(config):
    # Without this a SIGTERM would leave the children behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))


def pytest_collection_modifyitems(config, items):
    lacking = ["gateway"] if DIRECT else []
    if "FOREBAY_PROMTOOL" not in os.environ:
        lacking.append("promtool")
    left_out = [item for item in items if any(map(item.get_closest_marker, lacking))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_sessionfinish(session, exitstatus):
    """A run in which nothing was checked, or something was skipped, is no success."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed, skipped = (len(reporter.stats.get(key, [])) for key in ("passed", "skipped"))
    if exitstatus == 0 and (passed == 0 or skipped > 0):
        reporter.write_line(f"no success: passed={passed} skipped={skipped}", red=True)
        session.exitstatus = 1


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A directory for logs and files; `run` says where it is."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def model(work):
    file = work / "tiny.gguf"
    tiny_model.build(file, layers=4)
    return file


@pytest.fixture(scope="session")
def llamas(model, work):
    """Two real llama.cpp servers that live to the end; do not harm them."""
    started = []
    try:
        for name in ("llama-1", "llama-2"):
            started.append(servers.LlamaCpp(name, model, work))
        yield {server.name: server for server in started}
    finally:
        for server in started:
            server.stop()


@pytest.fixture
def start(work, tmp_path):
    """Starts servers of any kind for one test; they end with it."""
    started = []

    def begin(kind, *arguments, **more):
        started.append(kind(*arguments, log_dir=work, **more))
        return started[-1]

    yield begin
    for server in reversed(started):
        server.stop()


@pytest.fixture(scope="session")
def gateway(llamas, model, work, tmp_path_factory):
    """The gateway in front of both llama.cpp servers and one that serves embeddings."""
    if DIRECT:
        yield SimpleNamespace(url=llamas["llama-1"].url)
        return
    embedder = servers.LlamaCpp("embedder", model, work, arguments=["--embeddings"])
    try:
        gpus = [servers.upstream(name, server) for name, server in llamas.items()]
        config = {
            "groups": {
                "gpus": {"local": True, "upstreams": gpus},
                "vectors": {"upstreams": [servers.upstream("embedder", embedder)]},
            },
            "routes": [
                {"model": "tiny", "groups": ["gpus"]},
                {"model": "tiny-embed", "groups": ["vectors"]},
            ],
        }
        running = servers.Gateway(config, tmp_path_factory.mktemp("gateway"), log_dir=work)
        try:
            yield running
        finally:
            running.stop()
    finally:
        embedder.stop()


def client_of(server, api_key="any"):
    """Returns openai-python, changed in its `base_url` alone; it retries nothing by itself."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, timeout=30)


@pytest.fixture
def client(gateway):
    with client_of(gateway) as client:
        yield client


@pytest.fixture(scope="session")
def node_dir():
    """Where openai-node is installed; the `run` script says so."""
    return os.environ["FOREBAY_NODE_DIR"]


@pytest.fixture
def node(gateway, node_dir):
    """Runs one case of `openai_node.mjs` and returns what it printed."""

    def run(case):
        ended = subprocess.run(
            ["node", "openai_node.mjs", case, gateway.url],
            cwd=node_dir,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, f"{case}:\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    return run
