#!/usr/bin/env python3
"""Speaks Ollama's own API on loopback, and lets a real llama.cpp server do the thinking.

    ollama_standin.py PORT LLAMA_URL [--model tiny:latest] [--load-s 0.2] [--thinks]

Ollama itself runs llama.cpp's server as a child, so this is its outer layer: names with tags,
newline-delimited JSON, one answer at a time, a model that is loaded for one context size and
loaded again for another, and prompts that are silently cut to that size.

What it saw is told under `/standin/`, which no Ollama has: `GET /standin/state`, and
`POST /standin/fault` with `{"status": 500, "error": "…"}` (the next answer), or
`{"error": "…", "after": 3}` (a line in the middle of the next stream).

It ends when its standard input does.
"""

import argparse
import base64
import binascii
import datetime
import hashlib
import http.client
import ipaddress
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

VERSION = "0.33.0"
DEFAULT_CONTEXT = 4096
# A loopback Ollama answers only to names like these, against rebound DNS names.
LOCAL_NAMES = ("localhost", ".localhost", ".local", ".internal")
# A question with this in it makes the model call a tool; Ollama has no `tool_choice`.
CALL_A_TOOL = "use a tool"
DIMENSIONS = 16


class Refused(Exception):
    """An answer of Ollama's shape for errors: `{"error": "text"}`."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status, self.message = status, message


class Standin:
    """What all connections share."""

    def __init__(self, given):
        self.given = given
        llama = urlsplit(given.llama)
        self.llama = (llama.hostname, llama.port)
        self.lock = threading.Lock()
        # The model answers one request at a time; the others wait for as long as it takes.
        self.turn = threading.Lock()
        self.context = None
        self.fault = None
        self.seen = {"calls": Counter(), "loads": [], "bodies": [], "at_once": 0, "most": 0}

    def note(self, method, path):
        with self.lock:
            self.seen["calls"][f"{method} {path}"] += 1

    def state(self):
        with self.lock:
            return {**self.seen, "context": self.context}

    def take_fault(self, in_stream):
        with self.lock:
            if self.fault and ("after" in self.fault) == in_stream:
                taken, self.fault = self.fault, None
                return taken
        return None

    def model(self, body):
        """Returns the model's full name, or refuses."""
        name = body.get("model")
        if not name:
            raise Refused(400, "model is required")
        full = name if ":" in name else f"{name}:latest"
        if full != self.given.model:
            raise Refused(404, f"model '{name}' not found")
        return full

    def load(self, context):
        """Loads the model unless it is loaded for this context; returns how long it took."""
        begun = time.monotonic_ns()
        if self.context != context:
            time.sleep(self.given.load_s)
            with self.lock:
                self.context = context
                self.seen["loads"].append(context)
        return time.monotonic_ns() - begun

    def ask(self, path, body):
        """Posts to llama.cpp; returns the connection and its answer, of which nothing was read."""
        connection = http.client.HTTPConnection(*self.llama, timeout=600)
        try:
            connection.request(
                "POST", path, json.dumps(body), {"content-type": "application/json"}
            )
            answer = connection.getresponse()
        except OSError as why:
            raise Refused(500, f"llama runner process is gone: {why}") from why
        if answer.status != 200:
            error = json.loads(answer.read())["error"]
            connection.close()
            raise Refused(answer.status, error["message"])
        return connection, answer

    def count(self, text):
        """Returns how many tokens a text has."""
        connection, answer = self.ask("/tokenize", {"content": text})
        tokens = json.loads(answer.read())["tokens"]
        connection.close()
        return len(tokens)

    def cut(self, messages, context):
        """Returns the messages that fit: Ollama drops the oldest without a word, but neither
        system messages nor the last; a last one that is too long loses its beginning."""
        kept = list(messages)

        def size():
            # What the template adds to each is a few tokens.
            return sum(self.count(message.get("content") or "") + 4 for message in kept)

        while size() > context:
            oldest = next((m for m in kept[:-1] if m.get("role") != "system"), None)
            if oldest is None:
                break
            kept.remove(oldest)
        while kept and size() > context and len(kept[-1].get("content") or "") > 1:
            text = kept[-1]["content"]
            kept[-1] = {**kept[-1], "content": text[len(text) // 4 + 1 :]}
        return kept


def now():
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def for_llama(messages):
    """Translates messages from Ollama's shape, where a call's arguments are an object."""
    translated = []
    for message in messages:
        for image in message.get("images") or []:
            try:
                base64.b64decode(image, validate=True)
            except (binascii.Error, TypeError) as why:
                raise Refused(400, "illegal base64 data at input byte 0") from why
        copy = {"role": message.get("role"), "content": message.get("content") or ""}
        if calls := message.get("tool_calls"):
            copy["tool_calls"] = [
                {
                    "id": call.get("id", f"call_{number}"),
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        # An object it must be: Ollama refuses a string.
                        "arguments": json.dumps(dict(call["function"]["arguments"])),
                    },
                }
                for number, call in enumerate(calls)
            ]
        if message.get("role") == "tool":
            copy["tool_call_id"] = message.get("tool_call_id") or "call_0"
        translated.append(copy)
    return translated


class Call(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "", ""
    standin = None

    def log_message(self, *_):
        pass

    # --- reading ---

    def do_GET(self):
        self.handle_call("GET")

    def do_HEAD(self):
        self.handle_call("HEAD")

    def do_POST(self):
        self.handle_call("POST")

    def do_DELETE(self):
        self.handle_call("DELETE")

    def handle_call(self, method):
        path = self.path.split("?")[0]
        if path.startswith("/standin/"):
            return self.tell_standin(method, path)
        self.standin.note(method, path)
        raw = self.read_body()
        if not self.host_is_local():
            return self.send_plain(403, "")
        known = {
            "/": self.root,
            "/api/version": lambda _: self.send_json(200, {"version": VERSION}),
            "/api/tags": lambda _: self.send_json(200, {"models": [self.card()]}),
            "/api/ps": self.ps,
        }
        posts = {
            "/api/chat": self.chat,
            "/api/generate": self.generate,
            "/api/embed": self.embed,
            "/api/show": self.show,
        }
        if path not in known and path not in posts:
            return self.send_plain(404, "404 page not found")
        if (path in posts) != (method == "POST"):
            return self.send_plain(405, "405 method not allowed")
        try:
            if path in known:
                return known[path](None)
            return posts[path](self.parsed(raw))
        except Refused as why:
            return self.send_json(why.status, {"error": why.message})

    def read_body(self):
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def parsed(self, raw):
        if not raw:
            raise Refused(400, "missing request body")
        try:
            body = json.loads(raw)
        except ValueError as why:
            raise Refused(400, f"invalid character in the body: {why}") from why
        with self.standin.lock:
            self.standin.seen["bodies"].append(body)
        return body

    def host_is_local(self):
        name = urlsplit(f"//{self.headers.get('host', '')}").hostname or ""
        try:
            address = ipaddress.ip_address(name)
            return address.is_loopback or address.is_private
        except ValueError:
            return name.endswith(LOCAL_NAMES)

    # --- answers ---

    def send_plain(self, status, text, kind="text/plain"):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, status, value):
        self.send_plain(status, json.dumps(value, separators=(",", ":")), "application/json")

    def send_lines(self, lines):
        """Streams objects, one a line; an error after the first becomes a line of its own."""
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        fault, sent = self.standin.take_fault(in_stream=True), 0
        for line in lines:
            if fault and sent == fault["after"]:
                self.send_line({"error": fault["error"]})
                break
            self.send_line(line)
            sent += 1
        self.wfile.write(b"0\r\n\r\n")

    def send_line(self, value):
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.flush()

    # --- what Ollama has ---

    def root(self, _):
        self.send_plain(200, "Ollama is running")

    def card(self):
        name = self.standin.given.model
        return {
            "name": name,
            "model": name,
            "modified_at": "2026-08-21T18:48:22.123456789Z",
            "size": 5_000_000,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": {
                "parent_model": "",
                "format": "gguf",
                "family": "llama",
                "families": ["llama"],
                "parameter_size": "5.2M",
                "quantization_level": "F32",
            },
            "capabilities": ["completion", "tools"],
        }

    def ps(self, _):
        context = self.standin.context
        loaded = {"expires_at": now(), "size_vram": 0, "context_length": context}
        self.send_json(200, {"models": [{**self.card(), **loaded}] if context else []})

    def show(self, body):
        self.standin.model(body)
        info = {"general.architecture": "llama", "llama.context_length": 65_536}
        card = self.card()
        self.send_json(
            200,
            {
                "template": "",
                "details": card["details"],
                "model_info": info,
                "capabilities": card["capabilities"],
            },
        )

    def chat(self, body):
        self.answer(
            body,
            body.get("messages") or [],
            lambda text, more: {"message": {"role": "assistant", "content": text, **more}},
        )

    def generate(self, body):
        messages = [{"role": "user", "content": body["prompt"]}] if body.get("prompt") else []
        if messages and body.get("system"):
            messages.insert(0, {"role": "system", "content": body["system"]})
        self.answer(body, messages, lambda text, more: {"response": text, **more})

    def answer(self, body, messages, shape):
        """Answers a chat or a prompt; `shape` puts text and what comes with it into a line."""
        standin = self.standin
        standin.model(body)
        if fault := standin.take_fault(in_stream=False):
            raise Refused(fault["status"], fault["error"])
        if body.get("think") and not standin.given.thinks:
            raise Refused(400, f'"{body["model"]}" does not support thinking')
        options = body.get("options") or {}
        head = {"model": body["model"]}
        with standin.turn:
            with standin.lock:
                standin.seen["at_once"] += 1
                standin.seen["most"] = max(standin.seen["most"], standin.seen["at_once"])
            try:
                load_ns = standin.load(options.get("num_ctx") or DEFAULT_CONTEXT)
                if not messages:
                    line = {**head, "created_at": now(), **shape("", {})}
                    return self.send_json(200, {**line, "done": True, "done_reason": "load"})
                kept = standin.cut(messages, standin.context)
                connection, answer = standin.ask(
                    "/v1/chat/completions", self.request_for_llama(body, options, kept)
                )
                try:
                    lines = self.lines(answer, head, shape, load_ns, bool(body.get("think")))
                    if body.get("stream", True):
                        self.send_lines(lines)
                    else:
                        self.send_json(200, whole(lines))
                finally:
                    # Also when the client has gone: llama.cpp stops at its next token.
                    connection.close()
            finally:
                with standin.lock:
                    standin.seen["at_once"] -= 1
                    if body.get("keep_alive") in (0, "0", "0s"):
                        standin.context = None

    def request_for_llama(self, body, options, messages):
        request = {
            "messages": for_llama(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": options.get("temperature", 0.8),
        }
        for ours, theirs in (
            ("num_predict", "max_tokens"),
            ("stop", "stop"),
            ("seed", "seed"),
            ("top_p", "top_p"),
            ("top_k", "top_k"),
        ):
            if ours in options:
                request[theirs] = options[ours]
        if tools := body.get("tools"):
            request["tools"] = tools
            if CALL_A_TOOL in (messages[-1].get("content") or ""):
                request["tool_choice"] = "required"
        shape = body.get("format")
        if shape == "json":
            request["response_format"] = {"type": "json_object"}
        elif shape:
            schema = {"name": "answer", "schema": shape}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request

    def lines(self, answer, head, shape, load_ns, think):
        """Yields Ollama's lines for llama.cpp's events."""
        begun, calls, usage, finish = time.monotonic_ns(), {}, {}, "stop"
        thoughts = 3 if think else 0
        for event in answer:
            if not event.startswith(b"data: {"):
                continue
            event = json.loads(event[6:])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                finish = choice["finish_reason"] or finish
                delta = choice["delta"]
                for part in delta.get("tool_calls") or []:
                    call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
                    for key in call:
                        call[key] += part.get("function", {}).get(key) or ""
                if text := delta.get("content"):
                    if thoughts:
                        thoughts -= 1
                        said = shape("", {"thinking": text})
                    else:
                        said = shape(text, {})
                    yield {**head, "created_at": now(), **said, "done": False}
        if calls:
            made = [
                {
                    "id": f"call_{hashlib.sha256(os.urandom(8)).hexdigest()[:8]}",
                    "function": {
                        "index": index,
                        "name": call["name"],
                        "arguments": json.loads(call["arguments"]),
                    },
                }
                for index, call in calls.items()
            ]
            yield {**head, "created_at": now(), **shape("", {"tool_calls": made}), "done": False}
        took = time.monotonic_ns() - begun
        yield {
            **head,
            "created_at": now(),
            **shape("", {}),
            "done": True,
            "done_reason": "length" if finish == "length" else "stop",
            "total_duration": took + load_ns,
            "load_duration": max(load_ns, 1),
            "prompt_eval_count": usage.get("prompt_tokens", 0),
            "prompt_eval_duration": took // 4 + 1,
            "eval_count": usage.get("completion_tokens", 0),
            "eval_duration": took // 2 + 1,
        }

    def embed(self, body):
        standin = self.standin
        standin.model(body)
        if fault := standin.take_fault(in_stream=False):
            raise Refused(fault["status"], fault["error"])
        given = body.get("input")
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refused(400, "invalid input type")
        self.send_json(
            200,
            {
                "model": body["model"],
                "embeddings": [vector(text) for text in texts],
                "total_duration": 1_000_000,
                "load_duration": 1,
                "prompt_eval_count": sum(map(standin.count, texts)),
            },
        )

    # --- what no Ollama has ---

    def tell_standin(self, method, path):
        raw = self.read_body()
        if path == "/standin/fault" and method == "POST":
            with self.standin.lock:
                self.standin.fault = json.loads(raw)
        self.send_json(200, self.standin.state())


def whole(lines):
    """Returns the one object that a stream of lines amounts to."""
    text, thinking, calls = "", "", []
    for line in lines:
        message = line.get("message", line)
        text += message.get("content", message.get("response", ""))
        thinking += message.get("thinking", "")
        calls += message.get("tool_calls", [])
    message["content" if "message" in line else "response"] = text
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return line


def vector(text):
    """Returns a vector of length 1 that depends on the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    numbers = [byte - 127.5 for byte in digest[:DIMENSIONS]]
    length = math.sqrt(sum(number * number for number in numbers))
    return [number / length for number in numbers]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("port", type=int)
    arguments.add_argument("llama", help="the base URL of a llama.cpp server")
    arguments.add_argument("--model", default="tiny:latest", help="the only model, with its tag")
    arguments.add_argument("--load-s", type=float, default=0.2, help="how long loading takes")
    arguments.add_argument("--thinks", action="store_true", help="the model can think aloud")
    Call.standin = Standin(arguments.parse_args())
    server = ThreadingHTTPServer(("127.0.0.1", Call.standin.given.port), Call)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
