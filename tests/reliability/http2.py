"""A client of HTTP/2 by prior knowledge, as small as it can be: one connection at a time, many
requests on it, and a new connection after a GOAWAY.

Fields of an answer are not decoded: 200 is one byte (RFC 7541, appendix A), and whose answer it
is shows in its text.
"""

import asyncio
import json
import struct
import time

from common import Answer

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
STATUS_200 = 0x88
# How many requests at once the gateway takes on a connection; it says so in its settings.
STREAMS_MAX = 100
# What the other side may send: more than any answer here.
WINDOW = 0x7FFF0000


class NotProcessed(Exception):
    """The connection went away before the request was looked at: it may be sent again."""


class Connection:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.next_id, self.leaving = 1, False
        self.streams = {}
        self.places = asyncio.Semaphore(STREAMS_MAX)
        settings = struct.pack(">HI", 4, WINDOW)
        update = struct.pack(">I", WINDOW - 65_535)
        writer.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(SETTINGS, 0, 0, settings)
            + frame(WINDOW_UPDATE, 0, 0, update)
        )
        self.reading = asyncio.create_task(self.read())

    async def exchange(self, ask, answer):
        async with self.places:
            if self.leaving:
                raise NotProcessed
            await self.exchange_now(ask, answer)

    async def exchange_now(self, ask, answer):
        number, self.next_id = self.next_id, self.next_id + 2
        body = {
            "model": ask.model,
            "messages": [{"role": "user", "content": ask.question}],
            "max_tokens": ask.tokens,
            **({"stream": True} if ask.stream else {}),
        }
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/v1/chat/completions",
            ":authority": "forebay.test",
            "content-type": "application/json",
            "authorization": f"Bearer {ask.key}",
            "x-request-id": ask.request_id,
        }
        head = b"".join(b"\0" + text(name) + text(value) for name, value in fields.items())
        done = asyncio.get_running_loop().create_future()
        self.streams[number] = (answer, bytearray(), done)
        self.writer.write(
            frame(HEADERS, END_HEADERS, number, head)
            + frame(DATA, END_STREAM, number, json.dumps(body).encode())
        )
        try:
            await done
        finally:
            self.streams.pop(number, None)
            if self.leaving and not self.streams:
                self.writer.close()

    async def read(self):
        why = "the connection ended"
        try:
            while True:
                head = await self.reader.readexactly(9)
                length, kind, flags = int.from_bytes(head[:3]), head[3], head[4]
                stream = int.from_bytes(head[5:]) & 0x7FFFFFFF
                self.take(kind, flags, stream, await self.reader.readexactly(length))
        except (OSError, asyncio.IncompleteReadError) as error:
            why = f"{type(error).__name__} inside the answer"
        finally:
            self.leaving = True
            for answer, body, done in list(self.streams.values()):
                answer.body = bytes(body)
                if not done.done():
                    done.set_exception(ValueError(why))
            self.writer.close()

    def take(self, kind, flags, number, payload):
        if kind == SETTINGS and not flags & ACK:
            self.writer.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self.writer.write(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self.leaving = True
            last = int.from_bytes(payload[:4]) & 0x7FFFFFFF
            for beyond in [beyond for beyond in self.streams if beyond > last]:
                done = self.streams[beyond][2]
                if not done.done():
                    done.set_exception(NotProcessed())
        if number not in self.streams:
            return
        answer, body, done = self.streams[number]
        if kind == HEADERS and not answer.status:
            answer.status = 200 if payload[0] == STATUS_200 else 1
        elif kind == DATA:
            body += payload
            if payload:
                update = struct.pack(">I", len(payload))
                self.writer.write(
                    frame(WINDOW_UPDATE, 0, 0, update) + frame(WINDOW_UPDATE, 0, number, update)
                )
        elif kind == RST_STREAM and not done.done():
            answer.body = bytes(body)
            done.set_exception(ValueError(f"reset: {int.from_bytes(payload)}"))
        if flags & END_STREAM and kind in (HEADERS, DATA) and not done.done():
            answer.body, answer.complete = bytes(body), True
            done.set_result(None)


class Http2Client:
    """Asks on one connection, and on another one when that goes away."""

    def __init__(self, run, addr):
        self.run, self.addr = run, addr
        self.connection, self.connecting = None, asyncio.Lock()
        self.connections = 0

    async def ask(self, ask, timeout=60.0):
        """Sends one request and reads its answer; never raises."""
        begun = time.monotonic()
        answer = Answer(ask.request_id)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        await (await self.connected()).exchange(ask, answer)
                        break
                    except NotProcessed:
                        continue
        except TimeoutError:
            answer.broken = f"nothing complete in {timeout} s"
        except (OSError, ValueError) as why:
            answer.broken = f"{type(why).__name__}: {why}"
        kind = "text/event-stream" if ask.stream else "application/json"
        answer.headers = {"x-request-id": ask.request_id, "content-type": kind}
        answer.seconds = time.monotonic() - begun
        self.run.note(ask, answer)
        return answer

    async def connected(self):
        async with self.connecting:
            if self.connection is None or self.connection.leaving:
                reader, writer = await asyncio.open_connection(*self.addr, limit=1 << 20)
                self.connection = Connection(reader, writer)
                self.connections += 1
            return self.connection

    def close(self):
        if self.connection:
            self.connection.writer.close()


def frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def text(value):
    """A string as HPACK writes it, without Huffman's code."""
    value = value.encode()
    if len(value) < 127:
        return bytes([len(value)]) + value
    rest, size = len(value) - 127, [127]
    while rest >= 128:
        size.append(rest % 128 + 128)
        rest //= 128
    return bytes([*size, rest]) + value
