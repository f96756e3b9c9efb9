"""The first thing a new user does: `forebay demo`, and the lines it prints, pasted into a shell.

The demo runs on free ports here, which is the only difference.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from servers import ROOT, Process, binary, eventually, free_port, get

pytestmark = pytest.mark.gateway


class Demo(Process):
    def __init__(self, log_dir):
        self.listen, self.admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
        command = [binary(), "demo", "--listen", self.listen, "--admin", self.admin]
        super().__init__("demo", [*command, "--sim-port", "0"], f"http://{self.listen}/readyz", log_dir)
        self.commands = commands(self.log.read_text())
        (self.ask,) = self.printed(r"curl -si .*/chat/completions")
        self.stops, self.starts = self.printed(r"curl .*/stop$"), self.printed(r"curl .*/start$")

    def printed(self, pattern):
        return [command for command in self.commands if re.match(pattern, command, re.DOTALL)]


def commands(text, programs=("curl", "python3")):
    """Returns the shell commands in a text, each whole: `\\` and open quotes go on."""
    found, begun = [], None
    for line in text.splitlines():
        line = line.removeprefix("  ")
        if begun is None and line.split(" ")[0] in programs:
            begun = line
        elif begun is not None:
            begun += "\n" + line
        if begun is not None and is_whole(begun):
            found.append(begun)
            begun = None
    assert begun is None, f"never ends: {begun}"
    return found


def is_whole(command):
    if command.endswith("\\"):
        return False
    try:
        return bool(shlex.split(command))
    except ValueError:  # a quote is open
        return False


def shell(command):
    # `python3` is the one that has openai-python, as a reader's would be.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PATH": path},
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    return ended.stdout


def header(answer, name):
    """Returns a header of what `curl -i` printed, or None."""
    assert " 200" in answer.splitlines()[0], answer
    found = re.search(rf"^{name}: (.*?)\r?$", answer, re.MULTILINE | re.IGNORECASE)
    return found and found[1]


@pytest.fixture
def demo(start):
    return start(Demo)


def test_stopping_the_servers_one_by_one_ends_at_the_fallback(demo):
    first_stop, second_stop = demo.stops
    upstreams = {header(shell(demo.ask), "x-forebay-upstream") for _ in range(4)}
    assert upstreams == {"gpu-1", "gpu-2"}

    shell(first_stop)
    for _ in range(4):
        answer = shell(demo.ask)
        assert header(answer, "x-forebay-upstream") == "gpu-2"
        assert header(answer, "x-forebay-fallback") != "1"

    shell(second_stop)
    answer = shell(demo.ask)
    assert header(answer, "x-forebay-upstream") == "ollama"
    assert header(answer, "x-forebay-fallback") == "1"

    for line in demo.starts:
        shell(line)
    eventually(
        lambda: header(shell(demo.ask), "x-forebay-fallback") != "1", 90, "the servers are back"
    )


def test_every_line_that_it_prints_works(demo):
    others = [line for line in demo.commands if line not in demo.stops + demo.starts]
    assert len(others) >= 3
    for line in others:
        assert shell(line).strip(), line
    (stream,) = demo.printed(r"curl -sN ")
    assert shell(stream).rstrip().endswith("data: [DONE]")
    (python,) = demo.printed("python3 ")
    assert " answers: " in shell(python)


def test_the_readmes_lines_work_as_printed(demo):
    """In order, in the section that starts the demo; its ports are the default ones."""
    sections = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    (section,) = [s for s in sections if "cargo run --release -- demo" in s]
    control = [re.search(r"127\.0\.0\.1:\d+", line)[0] for line in demo.stops]
    ports = dict(zip(["7070", "7071", "7083", "7084"], [demo.listen, demo.admin, *control]))
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    lines = commands(fenced)
    assert lines, "the README shows no command to paste"
    for line in lines:
        line = re.sub(r"127\.0\.0\.1:(\d+)", lambda found: ports[found[1]], line)
        answer = shell(line)
        assert answer.strip() and '"error"' not in answer, f"{line}\n{answer}"


@pytest.mark.promtool
def test_the_metrics_are_as_prometheus_wants_them(demo):
    shell(demo.ask)
    shell(demo.stops[0])
    for _ in range(2):
        shell(demo.ask)
    status, metrics = get(f"http://{demo.admin}/metrics")
    assert status == 200 and b"forebay_requests_total" in metrics
    checked = subprocess.run(
        [os.environ["FOREBAY_PROMTOOL"], "check", "metrics"], input=metrics, capture_output=True
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
