"""What the scripts beside it share: processes, a strict client, load, and the invariants.

**Invariant:** only processes that were started here are ever signalled, and all of them end
with the script. Everything is on loopback, every port is free at its start.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "demo"
# What must never be seen outside the places that it is meant for.
SECRETS = {
    "the upstreams' key": "canary-upstream-7f3a91c2d4",
    "the admin key": "canary-admin-51b0c7e8aa",
    "a client's key": "canary-client-94dd20f1b3",
    "a prompt": "canary-prompt-0be6f2a977",
}
# A machine that is busy with other things may stop us this long.
SLACK = 2.0


# --- processes ---


def raise_fd_limit():
    """Raises the soft limit of open files, which children inherit; returns it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


_next_port = 10_000 + (os.getpid() * 257) % 20_000


def free_port():
    """Returns a port below those that the system hands out to clients."""
    import socket

    global _next_port
    while True:
        _next_port = 10_000 + (_next_port - 10_000 + 1) % 22_000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", _next_port))
            return _next_port


def http(url, method="GET", body=None, headers=None, timeout=5):
    """Asks over plain HTTP; returns status and body, status 0 if nobody answers."""
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()
    except OSError:
        return 0, b""


class Process:
    """A child with a log file; it is ready when `ready_url` answers."""

    def __init__(self, run, name, command, ready_url, env=None, nofile=None):
        self.run, self.name, self.command, self.ready_url = run, name, command, ready_url
        self.env = {**os.environ, **(env or {})}
        self.nofile = nofile
        self.log = run.folder / f"{name}.log"
        self.begin()
        self.wait_ready()
        run.processes.append(self)

    def begin(self):
        """Starts it, anew if it was killed; does not wait."""

        def limit():
            if self.nofile:
                resource.setrlimit(resource.RLIMIT_NOFILE, (self.nofile, self.nofile))

        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [str(part) for part in self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                preexec_fn=limit,
            )

    def wait_ready(self):
        deadline = time.monotonic() + 30
        while http(self.ready_url)[0] != 200:
            if self.child.poll() is not None or time.monotonic() > deadline:
                self.kill()
                sys.exit(f"{self.name} does not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.02)

    def alive(self):
        return self.child.poll() is None

    def kill(self):
        """SIGKILL, as a crash would."""
        if self.alive():
            self.child.kill()
            self.child.wait()

    def stop(self):
        """SIGTERM, and SIGKILL after 10 s."""
        if self.alive():
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def rss_kib(self):
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def fds(self):
        return len(os.listdir(f"/proc/{self.child.pid}/fd"))


class Adopted:
    """A process that a child of ours has started in its own place."""

    def __init__(self, pid):
        self.pid = pid

    def poll(self):
        """Returns None as long as it runs."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return 0
        return 0 if state == "Z" else None

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=10):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)


class Sim(Process):
    """`forebay sim`, on a port that survives its death."""

    def __init__(self, run, name, *options):
        self.port, control = free_port(), free_port()
        self.forgotten = 0
        self.control = f"http://127.0.0.1:{control}"
        self.base = f"http://127.0.0.1:{self.port}/v1"
        command = [run.binary, "sim", "--listen", f"127.0.0.1:{self.port}"]
        command += ["--control", f"127.0.0.1:{control}", "--name", name, "--model", MODEL]
        # Each request says how long its answer shall be.
        command += ["--tokens", "1000000", "--api-key", SECRETS["the upstreams' key"], *options]
        super().__init__(run, name, command, f"{self.control}/state")

    def fault(self, text):
        status, body = http(f"{self.control}/fault", "POST", text.encode())
        assert status == 200, body

    def heal(self):
        http(f"{self.control}/fault", "DELETE")

    def calls(self):
        """Returns the model calls that it has received, oldest first; checks it has kept all."""
        _, body = http(f"{self.control}/requests", timeout=60)
        seen = json.loads(body)
        kept_all = seen["kept"] + self.forgotten == seen["received"]
        assert kept_all, "the simulator keeps 10,000 requests, and had more"
        return [request for request in seen["requests"] if request["method"] == "POST"]

    def forget(self):
        """Makes room for more requests; call it when nobody asks."""
        http(f"{self.control}/requests", "DELETE")
        self.forgotten = json.loads(http(f"{self.control}/state")[1])["requests"]["received"]


def upstream(sim, **more):
    """Returns the configuration of an upstream that is this simulator."""
    return {"name": sim.name, "kind": "vllm", "url": sim.base, "key": "env:CANARY_UPSTREAM", **more}


def one_group(upstreams, **more):
    """Returns the configuration of one group with these upstreams, and a route for everything."""
    return {
        "groups": {"gpus": {"local": True, "upstreams": upstreams, **more}},
        "routes": [{"model": "*", "groups": ["gpus"]}],
    }


class Gateway(Process):
    """`forebay run`, with a configuration given as a mapping (JSON is YAML)."""

    def __init__(self, run, config, keys=None, env=None, nofile=None):
        self.addr = ("127.0.0.1", free_port())
        self.admin = f"http://127.0.0.1:{free_port()}"
        plugin = {"auth": "none"}
        if keys:
            entries = [{**key, "sha256": _sha256(key["sha256"])} for key in keys]
            (run.folder / "keys.yaml").write_text(json.dumps({"keys": entries}))
            plugin = {"auth": {"keys_file": "keys.yaml"}}
        config = {
            "listen": f"127.0.0.1:{self.addr[1]}",
            "admin": {"listen": self.admin.removeprefix("http://"), "key": "env:CANARY_ADMIN"},
            "log": {"format": "json"},
            "shutdown": {"lame_duck": "0s"},
            "plugins": [plugin],
            **config,
        }
        file = run.folder / "forebay.yaml"
        file.write_text(json.dumps(config, indent=2))
        env = {
            "CANARY_UPSTREAM": SECRETS["the upstreams' key"],
            "CANARY_ADMIN": SECRETS["the admin key"],
            **(env or {}),
        }
        url = f"http://127.0.0.1:{self.addr[1]}/readyz"
        super().__init__(run, "gateway", [run.binary, "run", "-c", file], url, env, nofile)
        run.gateway = self
        self.fds_before, self.rss_before = self.fds(), self.rss_kib()

    def adopt(self, pid):
        """Takes the process that took over for the gateway's."""
        if isinstance(self.child, subprocess.Popen):
            self.started = self.child
        self.child = Adopted(pid)

    def admin_get(self, path):
        return self.admin_ask("GET", path)

    def admin_ask(self, method, path):
        key = SECRETS["the admin key"]
        return http(f"{self.admin}{path}", method, headers={"authorization": f"Bearer {key}"})

    def metrics(self):
        """Returns every series with its value; the text is kept for the search for secrets."""
        status, body = self.admin_get("/metrics")
        assert status == 200, f"no metrics: {status}"
        text = body.decode()
        self.run.seen_texts["metrics"] = text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {series: float(value) for series, value in lines}

    def access_lines(self):
        """Returns the access log's records."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and "request_id" in record and "total_ms" in record:
                    found.append(record)
        return found


def _sha256(token):
    return hashlib.sha256(token.encode()).hexdigest()


# --- the text that a simulator says ---

WORDS = (
    "amber anchor basin beacon birch bridge brook canal cedar chalk cliff cloud coast copper "
    "coral crane delta drift dune ember estuary falcon fern field fjord flint forest gorge "
    "granite grove harbor heron hill inlet island juniper kelp lagoon lake lantern ledge marsh "
    "meadow mill moss oak orchard otter pebble pine plain pond quarry reef ridge river shore "
    "slate spring stone tide valley willow wind"
).split()
MASK = (1 << 64) - 1


def _fnv(state, data):
    for byte in data + b"\xff":
        state = ((state ^ byte) * 0x100000001B3) & MASK
    return state


def _mix(number):
    number = (number * 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


def told(question, tokens):
    """Returns what follows the simulator's name in its answer (docs/simulator.md)."""
    seed = _fnv(_fnv(0xCBF29CE484222325, MODEL.encode()), question.encode())
    words = [" answers:"]
    for word in range(2, tokens):
        end = "." if word % 12 == 11 else ""
        words.append(f" {WORDS[_mix((seed + word) & MASK) % 64]}{end}")
    return "".join(words)


# --- the client ---


@dataclass
class Answer:
    """One answer, as a strict client saw it."""

    request_id: str
    status: int = 0
    headers: dict = field(default_factory=dict)
    body: bytes = b""
    # Whether it ended as its framing said.
    complete: bool = False
    # What went wrong on the wire.
    broken: str = ""
    seconds: float = 0.0

    def events(self):
        return [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]

    def content(self):
        """Returns its text, streamed or not."""
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return json.loads(self.body)["choices"][0]["message"]["content"]
        parts = []
        for event in self.events():
            if event != "[DONE]":
                choices = json.loads(event).get("choices") or [{}]
                parts.append(choices[0].get("delta", {}).get("content") or "")
        return "".join(parts)


@dataclass
class Ask:
    """One request; its question is its own, so that no answer fits another."""

    run: object
    stream: bool = False
    tokens: int = 8
    key: str = SECRETS["a client's key"]
    headers: dict = field(default_factory=dict)
    model: str = MODEL

    def __post_init__(self):
        number = self.run.next_number()
        self.request_id = f"{self.run.name}-{number}"
        self.question = f"{SECRETS['a prompt']} {number} {random.getrandbits(32):08x}"

    def bytes(self):
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.question}],
            "max_tokens": self.tokens,
        }
        if self.stream:
            body["stream"] = True
        body = json.dumps(body).encode()
        head = {
            "host": "forebay.test",
            "content-type": "application/json",
            "content-length": len(body),
            "authorization": f"Bearer {self.key}",
            "x-request-id": self.request_id,
            **self.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        return f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + body

    def fault_of(self, answer):
        """Returns what is wrong with an answer that should be good; empty if nothing is."""
        if answer.status != 200 or not answer.complete:
            return f"{answer.status or answer.broken} {answer.broken} {answer.body[-200:]!r}"
        if answer.headers.get("x-request-id") != self.request_id:
            return f"another request's id: {answer.headers.get('x-request-id')}"
        if self.stream:
            events = answer.events()
            if not events or events[-1] != "[DONE]" or events.count("[DONE]") != 1:
                return f"no single end: {events[-2:]}"
            ids = {json.loads(event).get("id") for event in events[:-1]}
            if len(ids) != 1:
                return f"several ids: {ids}"
            finishes = [
                choice["finish_reason"]
                for event in events[:-1]
                for choice in json.loads(event).get("choices", [])
                if choice.get("finish_reason")
            ]
            if len(finishes) != 1:
                return f"finish reasons: {finishes}"
        text = answer.content()
        if not text.endswith(told(self.question, self.tokens)) or text.count("answers:") != 1:
            return f"not its text: {text!r} for {told(self.question, self.tokens)!r}"
        return ""


class Client:
    """Keeps connections as a good client does: one that was closed meanwhile costs nothing."""

    def __init__(self, run, addr, source=None):
        self.run, self.addr, self.source = run, addr, source
        self.idle = []
        # Kept connections that were closed when a request was on its way already.
        self.closed_under = 0

    async def ask(self, ask, timeout=60.0):
        """Sends one request and reads its answer; never raises."""
        begun = time.monotonic()
        answer = Answer(ask.request_id)
        try:
            async with asyncio.timeout(timeout):
                await self._exchange(ask.bytes(), answer)
        except TimeoutError:
            answer.broken = f"nothing complete in {timeout} s"
        except (OSError, ValueError, asyncio.IncompleteReadError) as why:
            answer.broken = f"{type(why).__name__}: {why}"
        answer.seconds = time.monotonic() - begun
        self.run.note(ask, answer)
        return answer

    async def _exchange(self, request, answer):
        while self.idle:
            reader, writer = self.idle.pop()
            if reader.at_eof() or writer.is_closing():
                writer.close()
                continue
            writer.write(request)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                return await self._answer(reader, writer, head, answer)
            # Closed by the gateway as we asked: not a byte of an answer came.
            writer.close()
            self.closed_under += 1
        local = (self.source, 0) if self.source else None
        reader, writer = await asyncio.open_connection(*self.addr, local_addr=local, limit=1 << 20)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await self._answer(reader, writer, head, answer)
        except BaseException:
            writer.close()
            raise

    async def _answer(self, reader, writer, head, answer):
        lines = head.decode("latin-1").split("\r\n")
        answer.status = int(lines[0].split(" ")[1])
        for line in lines[1:-2]:
            name, _, value = line.partition(":")
            answer.headers[name.lower()] = value.strip()
        body = bytearray()
        try:
            if answer.headers.get("transfer-encoding") == "chunked":
                while True:
                    size = int(await reader.readuntil(b"\r\n"), 16)
                    body += (await reader.readexactly(size + 2))[:size]
                    if size == 0:
                        break
            else:
                body += await reader.readexactly(int(answer.headers["content-length"]))
            answer.complete = True
        finally:
            answer.body = bytes(body)
        if answer.headers.get("connection") == "close":
            writer.close()
        else:
            self.idle.append((reader, writer))

    def close(self):
        for _, writer in self.idle:
            writer.close()
        self.idle.clear()


async def at_rate(rate, seconds, begin):
    """Calls `begin()` at even intervals, whatever becomes of earlier calls (an open loop);
    returns all results."""
    tasks, started = [], time.monotonic()
    for number in range(int(rate * seconds)):
        pause = started + number / rate - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        tasks.append(asyncio.ensure_future(begin()))
    return await asyncio.gather(*tasks)


async def keep_asking(until, begin):
    """Calls `begin()` again and again until a time (a closed loop); returns all results."""
    results = []
    while time.monotonic() < until:
        results.append(await begin())
    return results


def percentile(values, share):
    """Returns the smallest value that this share of all values does not exceed; 0 of none."""
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


# --- one run of a script ---


class Run:
    """What a script has started, seen and found."""

    def __init__(self, name, binary):
        self.name, self.binary = name, binary
        self.folder = Path(tempfile.mkdtemp(prefix=f"forebay-{name}-"))
        self.processes, self.gateway = [], None
        self.number = 0
        self.answered = []
        self.seen_texts = {}
        self.leaks = set()
        self.rows, self.figures, self.missed = [], {}, []

    def knows(self, key):
        """Tells whether the binary's configuration has a key."""
        schema = subprocess.run([self.binary, "schema"], capture_output=True, check=True).stdout
        return f'"{key}"'.encode() in schema

    def next_number(self):
        self.number += 1
        return self.number

    def note(self, ask, answer):
        """Keeps of an answer what the invariants need."""
        # Who is turned away at the door has no access line: nobody has read its request.
        if b'"too_many_connections"' not in answer.body:
            self.answered.append((ask.request_id, answer.status))
        text = answer.body + repr(answer.headers).encode()
        self.leaks.update(name for name, value in SECRETS.items() if value.encode() in text)

    def figure(self, name, value, good, wanted):
        """Adds a figure; `good` tells whether it is as `wanted`, None that nothing is."""
        self.figures[name] = value
        verdict = "" if good is None else ("ok" if good else "MISSED")
        self.rows.append((name, value, wanted, verdict))
        if good is False:
            self.missed.append(name)

    def fail(self, what, examples):
        """Tells some of what went wrong."""
        for example in list(examples)[:5]:
            print(f"  {what}: {example}", file=sys.stderr)

    async def check_invariants(self, sims=()):
        """Checks what must hold after every run (the gateway still runs)."""
        gateway = self.gateway
        self.figure("gateway alive", gateway.alive(), gateway.alive(), "True")
        if not gateway.alive():
            return
        busy = await self._settle(gateway)
        self.figure("in flight at the end", sum(busy.values()), not busy, "0")
        self.fail("still in flight", busy.items())
        metrics = gateway.metrics()
        panics = metrics.get("forebay_panics_total", 0.0)
        self.figure("panics", int(panics), panics == 0, "0")
        self.check_access_log(metrics)
        gateway.admin_get("/health")
        self.seen_texts["health"] = gateway.admin_get("/health")[1].decode()
        self.seen_texts["log"] = gateway.log.read_text(errors="replace")
        for place, text in self.seen_texts.items():
            found = (f"{name} in {place}" for name, value in SECRETS.items() if value in text)
            self.leaks.update(found)
        self.figure("secrets seen", len(self.leaks), not self.leaks, "0")
        self.fail("seen", self.leaks)
        self.figure("gateway RSS KiB", gateway.rss_kib(), None, "")
        self.figure("gateway fds, before/after", f"{gateway.fds_before}/{gateway.fds()}", None, "")

    async def _settle(self, gateway):
        """Waits until nothing is in flight; returns what still is after 10 s."""
        deadline = time.monotonic() + 10
        while True:
            busy = {
                series: value
                for series, value in gateway.metrics().items()
                if "in_flight" in series and value != 0
            }
            if not busy or time.monotonic() > deadline:
                return busy
            await asyncio.sleep(0.1)

    def check_access_log(self, metrics):
        """One line for every request that was answered, none twice."""
        dropped = metrics.get("forebay_log_lines_dropped_total", 0.0)
        ids = [line["request_id"] for line in self.gateway.access_lines()]
        once, twice = set(ids), len(ids) - len(set(ids))
        missing = [name for name, status in self.answered if status and name not in once]
        good = twice == 0 and len(missing) <= dropped
        value = f"{len(missing)}/{twice}"
        self.figure("access lines missing/double", value, good, "0/0")
        self.fail("no access line", missing)

    def close(self):
        for process in reversed(self.processes):
            process.kill()
        if self.missed:
            print(f"logs: {self.folder}", file=sys.stderr)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def print(self, seconds):
        width = max(len(row[0]) for row in self.rows)
        for name, value, wanted, verdict in self.rows:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            print(f"{name:<{width}}  {shown:>14}  {wanted:<14} {verdict}".rstrip())
        result = {
            "script": self.name,
            "ok": not self.missed,
            "seconds": seconds,
            "figures": self.figures,
            "missed": self.missed,
        }
        print(json.dumps(result))


def main(name, long_seconds, short_seconds, body, options=None):
    """Runs a script's `body(run, given)`, prints what it found, and exits 1 if a figure is
    missed."""
    arguments = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    arguments.add_argument("--seconds", type=float, help=f"default {long_seconds}")
    arguments.add_argument("--bin", default=ROOT / "target/release/forebay", help="the binary")
    arguments.add_argument("--short", action="store_true", help="the bounded form, as in CI")
    for option, more in (options or {}).items():
        arguments.add_argument(option, **more)
    given = arguments.parse_args()
    if given.seconds is None:
        given.seconds = short_seconds if given.short else long_seconds
    binary = Path(given.bin).resolve()
    if not binary.is_file():
        sys.exit(f"no binary: {binary}; cargo build --release")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    raise_fd_limit()
    run = Run(name, binary)
    try:
        asyncio.run(body(run, given))
        run.print(given.seconds)
    except BaseException:
        run.missed.append("the script itself")
        raise
    finally:
        run.close()
    sys.exit(1 if run.missed else 0)
