#!/usr/bin/env python3
"""Connections that say nothing, or a byte of a header now and then, on fresh connections and on
kept ones, as many as there may be at all: good traffic is served whole, the slow ones are cut in
time, or to make room."""

import asyncio
import time

from common import (
    SLACK,
    Ask,
    Client,
    Gateway,
    Sim,
    at_rate,
    main,
    one_group,
    percentile,
    raise_fd_limit,
    upstream,
)

FIRST = b"GET /livez HTTP/1.1\r\nhost: forebay.test\r\n\r\n"
SLOW = b"POST /v1/chat/completions HTTP/1.1\r\nhost: forebay.test\r\nx-slow: "
# One address has no more than this, as many clients would.
PER_ADDRESS = 200


class Slow(asyncio.Protocol):
    """A connection of one kind; tells its age when it is cut."""

    def __init__(self, kind, cut):
        self.kind, self.cut = kind, cut
        self.begun = self.timer = None

    def connection_made(self, transport):
        self.transport = transport
        self.begun = time.monotonic()
        if self.kind == "kept":
            transport.write(FIRST)
        elif self.kind == "fresh":
            self.drip(SLOW)

    def data_received(self, data):
        # The first request of a kept connection was answered; what follows an error is its end.
        if self.kind == "kept" and self.timer is None and data.startswith(b"HTTP/1.1 200"):
            self.begun = time.monotonic()
            self.drip(SLOW)

    def drip(self, data=b"a"):
        self.transport.write(data)
        self.timer = asyncio.get_running_loop().call_later(2, self.drip)

    def connection_lost(self, _):
        if self.timer:
            self.timer.cancel()
        self.cut(self.kind, time.monotonic() - self.begun)


async def body(run, given):
    # A gateway takes no more connections than half of the files that it may open; those that
    # are cut and come back at once are, for a moment, two.
    most_allowed = raise_fd_limit() * 45 // 100
    count, deadline = (500, 2.0) if given.short else (min(10_000, most_allowed), 10.0)
    sim = Sim(run, "gpu-1")
    config = one_group([upstream(sim)])
    config["limits"] = {"header_timeout": f"{deadline:.0f}s", "connections": count}
    gateway = Gateway(run, config)
    loop, kinds = asyncio.get_running_loop(), ["idle", "fresh", "kept"]
    ages = {kind: [] for kind in kinds}
    open_now, most, refused, closing = set(), 0, 0, False

    def cut(kind, age):
        if not closing:
            ages[kind].append(age)

    async def hold(number):
        """Keeps one connection open, anew whenever it is cut."""
        nonlocal refused, most
        kind = kinds[number % 3]
        address = f"127.1.{number // PER_ADDRESS // 250}.{number // PER_ADDRESS % 250 + 1}"
        while not closing:
            ended = loop.create_future()

            def lost(kind, age, ended=ended):
                cut(kind, age)
                ended.done() or ended.set_result(None)

            try:
                transport, _ = await loop.create_connection(
                    lambda kind=kind, lost=lost: Slow(kind, lost),
                    *gateway.addr,
                    local_addr=(address, 0),
                )
            except OSError:
                refused += 1
                await asyncio.sleep(1)
                continue
            open_now.add(transport)
            most = max(most, len(open_now))
            await ended
            open_now.discard(transport)

    client = Client(run, gateway.addr)
    failures, seconds = [], []

    async def one():
        ask = Ask(run)
        answer = await client.ask(ask)
        client.close()
        seconds.append(answer.seconds)
        if fault := ask.fault_of(answer):
            failures.append((ask.request_id, fault))

    holders = []
    for number in range(count):
        holders.append(asyncio.create_task(hold(number)))
        if number % 50 == 49:
            await asyncio.sleep(0.02)
    cpu = gateway.cpu_seconds()
    begun = time.monotonic()
    await at_rate(20, given.seconds, one)
    cpu = (gateway.cpu_seconds() - cpu) / (time.monotonic() - begun)
    rss = gateway.rss_kib()
    closing = True
    for holder in holders:
        holder.cancel()
    for transport in open_now:
        transport.abort()
    await asyncio.gather(*holders, return_exceptions=True)

    run.figure("connections at once, most", most, most >= 0.9 * count, f">= {0.9 * count:.0f}")
    run.figure("gateway RSS KiB then", rss, None, "")
    run.figure("gateway CPU, cores", cpu, None, "")
    run.figure("could not connect", refused, None, "")
    run.figure("good requests", len(seconds), None, "")
    run.figure("good requests that failed", len(failures), not failures, "0")
    run.fail("failed", failures)
    run.figure("p99 s of good requests", percentile(seconds, 0.99), None, "")
    names = {"fresh": "slow header", "kept": "slow header, kept", "idle": "not a byte"}
    for kind, what in names.items():
        oldest = max(ages[kind], default=0.0)
        good = bool(ages[kind]) and oldest <= deadline + SLACK
        run.figure(f"{what}: cut", len(ages[kind]), None, "")
        run.figure(f"{what}: oldest s", oldest, good, f"<= {deadline + SLACK:.0f}")
    await run.check_invariants([sim])


if __name__ == "__main__":
    main("many_connections", 60, 6, body)
