"""The processes of a test: model servers and gateways, each on its own ports.

**Invariant:** only processes that were started here are ever stopped, and all of them are.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Polls are this far apart; nothing is ever waited for blindly.
POLL_SECONDS = 0.02


def eventually(condition, within, what):
    """Returns the first true value of `condition()`, or fails after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(POLL_SECONDS)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url):
    """Returns status and body; status 0 means that nobody answered."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()
    except OSError:
        return 0, b""


def binary():
    """Returns the gateway's binary: `FOREBAY_BIN`, else what cargo built last for release or debug."""
    given = os.environ.get("FOREBAY_BIN")
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    candidates = [Path(given)] if given else [target / p / "forebay" for p in ("release", "debug")]
    for path in candidates:
        if path.is_file():
            return path.resolve()
    raise FileNotFoundError(f"no gateway to test, looked for: {', '.join(map(str, candidates))}")


class Process:
    """A child with a log file, ready once `ready_url` answers 200."""

    def __init__(self, name, command, ready_url, log_dir, env=None):
        self.name = name
        self.log = log_dir / f"{name}-{free_port()}.log"
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )
        try:
            eventually(lambda: self._ready(ready_url), 60, f"{name} answers {ready_url}")
        except BaseException:
            self.kill()
            print(self.log.read_text(errors="replace")[-4000:], file=sys.stderr)
            raise

    def _ready(self, url):
        assert self.child.poll() is None, f"{self.name} ended at once: {self.child.returncode}"
        return get(url)[0] == 200

    def kill(self):
        """Ends it the hard way: SIGKILL, as a crash would."""
        self._end(self.child.kill)

    def freeze(self):
        """SIGSTOP: its connections stay open, and nothing comes over them."""
        self.child.send_signal(signal.SIGSTOP)

    def thaw(self):
        """SIGCONT: it goes on where it was."""
        self.child.send_signal(signal.SIGCONT)

    def stop(self):
        """Asks it to end; kills it after 10 s."""
        # A frozen process would not hear it.
        self._end(lambda: (self.thaw(), self.child.send_signal(signal.SIGTERM)))

    def _end(self, how):
        if self.child.poll() is None:
            how()
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        self.child.stdin.close()


class LlamaCpp(Process):
    """A real llama.cpp server with the tiny model."""

    def __init__(self, name, model, log_dir, port=None, arguments=()):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, HERE / "llama_cpp.py", model, "--port", self.port, *arguments]
        super().__init__(name, command, f"{self.url}/health", log_dir)

    def busy(self):
        """Returns how many answers it is writing now."""
        status, body = get(f"{self.url}/slots")
        assert status == 200, f"{self.name} does not tell its slots: {status} {body}"
        return sum(slot["is_processing"] for slot in json.loads(body))


class Ollama(Process):
    """A stand-in for Ollama, before a real llama.cpp server."""

    def __init__(self, name, llama, log_dir, port=None, arguments=()):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, HERE / "ollama_standin.py", self.port, llama.url, *arguments]
        super().__init__(name, command, f"{self.url}/standin/state", log_dir)

    def state(self):
        """Returns what it saw: calls, loads, bodies, and how many it answered at once."""
        status, body = get(f"{self.url}/standin/state")
        assert status == 200, f"{self.name}: {status} {body}"
        return json.loads(body)

    def fault(self, **fault):
        """Sets what goes wrong with the next answer."""
        body = json.dumps(fault).encode()
        with urllib.request.urlopen(f"{self.url}/standin/fault", data=body, timeout=5) as answer:
            assert answer.status == 200


class Search(Process):
    """A stand-in for search engines."""

    def __init__(self, name, log_dir):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, HERE / "search_standin.py", port]
        super().__init__(name, command, f"{self.url}/standin/asked", log_dir)

    def asked(self):
        """Returns every query so far: engine, query, headers."""
        status, body = get(f"{self.url}/standin/asked")
        assert status == 200, f"{self.name}: {status} {body}"
        return json.loads(body)


class Simulator(Process):
    """`forebay sim`, a model server that only pretends."""

    def __init__(self, name, log_dir):
        self.url = f"http://127.0.0.1:{free_port()}"
        listen, control = self.url.removeprefix("http://"), f"127.0.0.1:{free_port()}"
        command = [binary(), "sim", "--listen", listen, "--control", control]
        command += ["--name", name, "--model", "tiny"]
        super().__init__(name, command, f"{self.url}/v1/models", log_dir)


class Gateway(Process):
    """`forebay run` with a configuration of its own; `config` is a mapping, since JSON is YAML."""

    def __init__(self, config, directory, log_dir, env=None):
        self.url = f"http://127.0.0.1:{free_port()}"
        self.admin_url = f"http://127.0.0.1:{free_port()}"
        config = {
            "listen": self.url.removeprefix("http://"),
            "admin": {"listen": self.admin_url.removeprefix("http://")},
            **config,
        }
        file = directory / "forebay.yaml"
        file.write_text(json.dumps(config, indent=2))
        command = [binary(), "run", "-c", file]
        super().__init__("gateway", command, f"{self.url}/readyz", log_dir, env)

    def stop(self):
        super().stop()
        assert self.child.returncode == 0, f"gateway ended with {self.child.returncode}"


def upstream(name, server, kind="llamacpp", **more):
    """Returns the configuration of an upstream that is `server`."""
    return {"name": name, "kind": kind, "url": f"{server.url}/v1", **more}
