#!/usr/bin/env python3
"""Thousands of streams of one token a second each: what they cost, and that all are whole."""

import asyncio
import time

from common import Answer, Ask, Gateway, Sim, main, one_group, percentile, raise_fd_limit, upstream

PER_ADDRESS = 200


class Sink(asyncio.Protocol):
    """Sends one request and keeps what comes, with the time of each piece."""

    def __init__(self, request, timed):
        self.request, self.timed = request, timed
        self.data, self.gaps, self.last = bytearray(), [], None
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data):
        self.data += data
        if self.timed:
            now = time.monotonic()
            if self.last:
                self.gaps.append(now - self.last)
            self.last = now
        if data.endswith(b"0\r\n\r\n"):
            self.finish()

    def connection_lost(self, _):
        self.finish()

    def finish(self):
        if not self.ended.done():
            self.ended.set_result(None)


async def body(run, given):
    # Each stream costs the gateway two descriptors.
    count = 300 if given.short else min(10_000, (raise_fd_limit() - 500) // 2)
    rate = 5 if given.short else 1
    tokens = int(given.seconds * rate)
    sim = Sim(run, "gpu-1", "--rate", str(rate), "--first-token", "100ms")
    config = one_group([upstream(sim)])
    config["limits"] = {"connections": 2 * count}
    gateway = Gateway(run, config)
    before = gateway.rss_kib()
    loop, all_sinks = asyncio.get_running_loop(), []

    async def begin(number):
        ask = Ask(run, stream=True, tokens=tokens)
        address = f"127.1.{number // PER_ADDRESS // 250}.{number // PER_ADDRESS % 250 + 1}"
        _, sink = await loop.create_connection(
            lambda: Sink(ask.bytes(), timed=number % 100 == 0),
            *gateway.addr,
            local_addr=(address, 0),
        )
        all_sinks.append((ask, sink))

    for number in range(0, count, 20):
        await asyncio.gather(*(begin(number) for number in range(number, min(number + 20, count))))
        await asyncio.sleep(0.02)
    # A busy machine may need a moment to begin them all.
    busy, deadline = 0.0, time.monotonic() + given.seconds / 3
    while busy < count and time.monotonic() < deadline:
        busy = max(busy, gateway.metrics().get("forebay_requests_in_flight", 0.0))
        await asyncio.sleep(0.1)
    # All have begun: the middle of the run shows what they cost.
    cpu, begun = gateway.cpu_seconds(), time.monotonic()
    await asyncio.sleep(given.seconds / 3)
    cores = (gateway.cpu_seconds() - cpu) / (time.monotonic() - begun)
    rss, fds = gateway.rss_kib(), gateway.fds()
    deadline = time.monotonic() + given.seconds + 60
    for _, sink in all_sinks:
        await asyncio.wait([sink.ended], timeout=max(deadline - time.monotonic(), 0.1))
    wrong, gaps = [], []
    for ask, sink in all_sinks:
        answer = parse(ask, bytes(sink.data))
        run.note(ask, answer)
        if fault := ask.fault_of(answer):
            wrong.append((ask.request_id, fault))
        gaps += sink.gaps[2:-3]
        sink.transport.close()
    each = (rss - before) / count
    run.figure("streams at once", int(busy), busy >= 0.9 * count, f">= {0.9 * count:.0f}")
    run.figure("streams that were not whole", len(wrong), not wrong, "0")
    run.fail("wrong", wrong)
    run.figure("gateway RSS KiB then", rss, rss <= 1 << 20, "<= 1048576")
    run.figure("KiB per stream", each, None, "")
    run.figure("gateway fds then", fds, None, "")
    good = None if given.short else cores < 1
    run.figure("gateway CPU, cores", cores, good, "< 1")
    late = percentile(gaps, 0.99) - 1 / rate
    run.figure("p99 s that a token was late", late, None, "")
    await run.check_invariants([sim])


def parse(ask, data):
    """Returns the answer that these bytes are; they are complete or they are not."""
    answer = Answer(ask.request_id)
    head, _, rest = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if len(lines[0].split(" ")) < 2:
        return answer
    answer.status = int(lines[0].split(" ")[1])
    for line in lines[1:]:
        name, _, value = line.partition(":")
        answer.headers[name.lower()] = value.strip()
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        size = int(size, 16)
        answer.complete = size == 0
        body += rest[:size]
        rest = rest[size + 2 :]
    answer.body = bytes(body)
    return answer


if __name__ == "__main__":
    main("slow_streams", 45, 6, body)
