#!/usr/bin/env python3
"""SIGTERM with 100 streams of 5 to 60 s, half of them over HTTP/2: all are complete, and the process
is gone 2 s after the last; meanwhile /readyz says 503, and who still comes in is served."""

import asyncio
import random
import signal
import time

from common import SLACK, Ask, Client, Gateway, Sim, http, main, one_group, percentile, upstream
from http2 import Http2Client

RATE = 5


async def body(run, given):
    streams, shortest, longest = (30, 2, 8) if given.short else (100, 5, given.seconds)
    lame_duck = 1 if given.short else 5
    sim = Sim(run, "gpu-1", "--rate", str(RATE), "--first-token", "20ms")
    config = {**one_group([upstream(sim)]), "shutdown": {"lame_duck": f"{lame_duck}s"}}
    gateway = Gateway(run, config)
    http1, http2 = Client(run, gateway.addr), Http2Client(run, gateway.addr)
    failures, ended = [], []

    async def stream(number, seconds):
        ask = Ask(run, stream=True, tokens=int(seconds * RATE))
        answer = await [http1, http2][number % 2].ask(ask, timeout=longest + 60)
        ended.append(time.monotonic())
        if fault := ask.fault_of(answer):
            failures.append((ask.request_id, number % 2, fault))

    async def whole(client):
        ask = Ask(run, tokens=4)
        answer = await client.ask(ask, timeout=30)
        if fault := ask.fault_of(answer):
            failures.append((ask.request_id, "not streamed", fault))
        return answer

    # A connection that is idle when the signal comes.
    idle = Client(run, gateway.addr)
    await whole(idle)
    lengths = [random.uniform(shortest, longest) for _ in range(streams)]
    asked = [asyncio.create_task(stream(*one)) for one in enumerate(lengths)]
    deadline = time.monotonic() + 10
    while (busy := in_flight(gateway)) < streams and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    run.figure("streams under way at SIGTERM", busy, busy == streams, f"{streams}")
    gateway.child.send_signal(signal.SIGTERM)
    told = time.monotonic()
    ready = f"http://127.0.0.1:{gateway.addr[1]}/readyz"
    while http(ready)[0] == 200:
        await asyncio.sleep(0.01)
    status, took = http(ready)[0], time.monotonic() - told
    run.figure("/readyz in the lame duck", status, status == 503, "503")
    run.figure("until it says so, s", took, took <= SLACK, f"<= {SLACK}")
    # Who still comes in is served.
    new = Client(run, gateway.addr)
    answer = await whole(new)
    close = answer.headers.get("connection")
    run.figure("connection: of its answer", close, close == "close", "close")
    await asyncio.sleep(lame_duck + 0.5)
    refused = http(ready)[0]
    run.figure("a newcomer after the lame duck", refused, refused == 0, "0 (refused)")
    answer = await whole(idle)
    close = answer.headers.get("connection")
    run.figure("connection: of the last answer to who was idle", close, close == "close", "close")
    await asyncio.gather(*asked)
    while gateway.alive() and time.monotonic() < max(ended) + 30:
        await asyncio.sleep(0.01)
    after = time.monotonic() - max(ended)
    run.figure("streams", len(ended), None, "")
    run.figure("longest s", percentile([end - told for end in ended], 1), None, "")
    run.figure("refused, failed or cut", len(failures), not failures, "0")
    run.fail("failed", failures)
    run.figure("exit after the last, s", after, after <= 2, "<= 2")
    code = gateway.child.poll()
    run.figure("exit status", code, code == 0, "0")
    log = gateway.log.read_text(errors="replace")
    run.figure("ERROR lines", log.count("ERROR"), "ERROR" not in log, "0")
    run.check_access_log({})
    for client in (http1, http2, idle, new):
        client.close()


def in_flight(gateway):
    return int(gateway.metrics().get("forebay_requests_in_flight", 0))


if __name__ == "__main__":
    main("drain", 60, 8, body)
