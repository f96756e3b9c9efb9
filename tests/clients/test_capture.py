"""What the gateway captures and exports, read by those it is for: Hugging Face `datasets`,
LLaMA-Factory's own parser, converter and formatters, and a reader like that of vLLM's benchmark."""

import json
import subprocess
import sys
import types
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest

from conftest import client_of
from servers import Gateway, Simulator, binary, eventually, upstream

pytestmark = pytest.mark.gateway

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhf"
    "DwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}


def ask(client, messages, **more):
    """Asks, streamed if `more` says so, and reads the answer to its end."""
    answer = client.chat.completions.create(model="tiny", messages=messages, **more)
    if more.get("stream"):
        list(answer)


def user(content):
    return {"role": "user", "content": content}


def calling(arguments):
    call = {"id": "1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": json.dumps(arguments)}
    return call


def talk(client):
    """Has every kind of exchange; returns how many lines they are."""
    ask(client, [user("Hello")], stream=True)
    ask(client, [{"role": "system", "content": "Be brief."}, user("Hi\u2028there\nü"), user("!")])
    ask(client, [user("Weather?")], tools=[TOOL], tool_choice="required")
    history = [
        user("Weather?"),
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Two places.",
            "tool_calls": [calling({"city": "Hanoi"}), calling({"city": "Jena", "unit": "K"})],
        },
        {"role": "tool", "tool_call_id": "1", "content": "31"},
        {"role": "tool", "tool_call_id": "1", "content": "280"},
    ]
    ask(client, history, tools=[TOOL], stream=True)
    image = {"type": "image_url", "image_url": {"url": PIXEL}}
    ask(client, [user([image, {"type": "text", "text": "What is an <image>?"}])])
    ask(client, [user("Twice")], n=2)
    ask(client, [{"role": "assistant", "content": "Welcome"}, user("Thanks")])
    client.completions.create(model="tiny", prompt="Once upon")
    client.responses.create(model="tiny", input="Hello")
    return 10


@pytest.fixture(scope="module")
def captured(work, tmp_path_factory):
    """The folder of a gateway that has captured, and how many lines are in it."""
    folder = tmp_path_factory.mktemp("capture")
    sim = Simulator("teller", work)
    try:
        config = {
            "plugins": [{"auth": "none"}, {"capture": {"dir": "captures"}}],
            "groups": {"gpus": {"upstreams": [upstream("teller", sim)]}},
            "routes": [{"model": "*", "groups": ["gpus"]}],
        }
        gateway = Gateway(config, folder, work)
        try:
            with client_of(gateway) as client:
                count = talk(client)
        finally:
            gateway.stop()
    finally:
        sim.stop()
    captures = folder / "captures"
    assert sum(len(lines(file)) for file in captures.glob("*.jsonl")) == count
    return captures, count


def lines(file):
    """Returns the records of a file, split as Python splits lines: at more than line feeds."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def export(*arguments):
    ended = subprocess.run(
        [binary(), "export", *arguments], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    return ended


def load(files, folder):
    files = [str(file) for file in files]
    return datasets.load_dataset("json", data_files=files, cache_dir=str(folder))["train"]


def test_captured_files_load_in_datasets(captured, tmp_path):
    captures, count = captured
    rows = load(sorted(captures.glob("*.jsonl")), tmp_path)
    assert len(rows) == count
    columns = {name: str(kind) for name, kind in rows.features.items()}
    assert set(columns) == {"id", "conversations", "system", "tools", "images", "meta"}
    assert all(isinstance(row["tools"], str) and isinstance(row["images"], list) for row in rows)
    assert rows[1]["conversations"][0]["value"] == "Hi\u2028there\nü\n\n!"


@pytest.fixture
def factory(monkeypatch):
    """LLaMA-Factory's own modules for data; what would import torch stands in by name alone."""
    root = Path(find_spec("llamafactory").submodule_search_locations[0])

    def package(name, path):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, module)
        return module

    package("llamafactory.data", root / "data")
    package("llamafactory.extras", root / "extras")
    constants = package("llamafactory.extras.constants", root)
    constants.DATA_CONFIG, constants.RUNNING_LOG = "dataset_info.json", "running_log.txt"
    misc = package("llamafactory.extras.misc", root)
    misc.use_modelscope = misc.use_openmind = lambda: False

    def load_module(name):
        full = f"llamafactory.data.{name}"
        monkeypatch.delitem(sys.modules, full, raising=False)
        return import_module(full)

    return load_module


def test_an_export_is_what_llama_factory_reads(captured, factory, tmp_path):
    captures, count = captured
    out = tmp_path / "set"
    export("--to", "llamafactory", "--out", out, captures)
    (attributes,) = factory("parser").get_dataset_list(["forebay"], str(out))
    assert attributes.load_from == "file"
    arguments = types.SimpleNamespace(media_dir=str(out))
    converter = factory("converter").SharegptDatasetConverter(attributes, arguments)
    rows = load([out / attributes.dataset_name], tmp_path / "cache")
    assert len(rows) == count
    converted = [converter(row) for row in rows]
    # What it cannot use it returns empty, with a warning.
    assert all(row["_prompt"] and len(row["_response"]) == 1 for row in converted)

    with_images = [row for row in converted if row["_images"]]
    assert len(with_images) == 1 and Path(with_images[0]["_images"][0]).read_bytes()[1:4] == b"PNG"
    for row in converted:
        texts = [message["content"] for message in row["_prompt"] + row["_response"]]
        assert sum(text.count("<image>") for text in texts) == len(row["_images"] or [])

    formatter = factory("formatter")
    calls = formatter.FunctionFormatter(slots=["{{content}}"], tool_format="qwen")
    tools = formatter.ToolFormatter(tool_format="default")
    functions = [
        message["content"]
        for row in converted
        for message in row["_prompt"] + row["_response"]
        if message["role"] == "function"
    ]
    assert len(functions) == 2
    said = [
        calls.apply(content=text, thought_words=("<think>\n", "\n</think>\n\n"))[0]
        for text in functions
    ]
    assert any("<think>\nTwo places.\n</think>\n\n" in text and "Jena" in text for text in said)
    assert sum("weather" in tools.apply(content=row["_tools"])[0] for row in converted if row["_tools"]) == 2


def test_lines_with_images_may_come_late(captured, tmp_path):
    """`datasets` guesses the columns from the first 10 MiB."""
    captures, count = captured
    late = tmp_path / "20260102_03.jsonl"
    plain = next(row for row in lines(next(captures.glob("*.jsonl"))) if not row["images"])
    plain["conversations"][0]["value"] = "x" * 10_000
    with late.open("w") as file:
        for _ in range(1500):
            file.write(json.dumps(plain) + "\n")
        for source in captures.glob("*.jsonl"):
            file.write(source.read_text())
    (tmp_path / "images").symlink_to(captures / "images")
    out = tmp_path / "set"
    export("--to", "llamafactory", "--out", out, late)
    rows = load([out / "forebay.jsonl"], tmp_path / "cache")
    assert len(rows) == 1500 + count


def test_an_array_is_what_vllms_benchmark_reads(captured, tmp_path):
    captures, count = captured
    out = tmp_path / "bench.json"
    export("--to", "sharegpt-json", "--out", out, captures)
    # As ShareGPTDataset does.
    entries = json.loads(out.read_text())
    entries = [entry for entry in entries if len(entry.get("conversations", [])) >= 2]
    assert len(entries) == count
    pairs = [(e["conversations"][0]["value"], e["conversations"][1]["value"]) for e in entries]
    assert pairs[0][0] == "Hello" and "teller answers:" in pairs[0][1]
    assert all(entry["conversations"][0]["from"] == "human" for entry in entries)
    assert not any("Be brief." in prompt for prompt, _ in pairs)


def test_plain_lines_are_what_unsloth_takes(captured, tmp_path):
    captures, _ = captured
    out = tmp_path / "plain.jsonl"
    export("--to", "sharegpt-plain", "--out", out, captures)
    rows = load([out], tmp_path / "cache")
    assert len(rows) == 7
    for row in rows:
        for turn in row["conversations"]:
            assert set(turn) == {"from", "value"}
            assert turn["from"] in {"system", "human", "gpt"} and isinstance(turn["value"], str)


def test_messages_are_what_openai_and_trl_take(captured):
    captures, count = captured
    ended = export("--to", "openai-jsonl", "--dedup", captures)
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(rows) <= count - 1, "the one with the image has no place"
    for row in rows:
        waiting = set()
        for message in row["messages"]:
            assert isinstance(message["content"], str)
            if message["role"] == "tool":
                waiting.remove(message["tool_call_id"])
                continue
            assert not waiting
            for call in message.get("tool_calls", []):
                json.loads(call["function"]["arguments"])
                waiting.add(call["id"])
        assert row["messages"][-1]["role"] == "assistant"
    parallel = [row for row in rows if any(len(m.get("tool_calls", [])) == 2 for m in row["messages"])]
    (row,) = parallel
    assert [m["content"] for m in row["messages"] if m["role"] == "tool"] == ["31", "280"]
    assert row["tools"][0]["function"]["name"] == "weather"
