#!/usr/bin/env python3
"""One of two upstreams is killed (SIGKILL) and started again every 2 s, under 50 streams and 100
requests a second: no client notices, every text is complete."""

import asyncio
import random
import time

from common import (
    Ask,
    Client,
    Gateway,
    Sim,
    at_rate,
    keep_asking,
    main,
    one_group,
    percentile,
    upstream,
)

# A stream lasts about 2 s, so that most of those at the victim are cut.
TOKENS, RATE = 40, 20


async def body(run, given):
    streams, rate = (12, 20) if given.short else (50, 100)
    options = ["--rate", str(RATE), "--first-token", "20ms"]
    sims = [Sim(run, f"gpu-{number}", *options) for number in (1, 2)]
    gateway = Gateway(run, one_group([upstream(sim) for sim in sims]))
    client = Client(run, gateway.addr)
    failures, seconds = [], {True: [], False: []}

    async def one(stream):
        ask = Ask(run, stream=stream, tokens=TOKENS if stream else 4)
        answer = await client.ask(ask)
        seconds[stream].append(answer.seconds)
        if fault := ask.fault_of(answer):
            failures.append((ask.request_id, stream, fault))

    async def streaming(until):
        # Not in step with the others.
        await asyncio.sleep(random.random() * TOKENS / RATE)
        await keep_asking(until, lambda: one(True))

    until = time.monotonic() + given.seconds
    killing = asyncio.create_task(kill(sims if given.both else sims[:1], until))
    loads = [streaming(until) for _ in range(streams)]
    await asyncio.gather(*loads, at_rate(rate, given.seconds, lambda: one(False)))
    deaths = await killing
    client.close()

    metrics = gateway.metrics()
    takeovers = sum(value for name, value in metrics.items() if "takeover" in name)
    run.figure("upstreams killed", deaths, None, "")
    run.figure("streams", len(seconds[True]), None, "")
    run.figure("requests not streamed", len(seconds[False]), None, "")
    run.figure("failures that a client saw", len(failures), not failures, "0")
    run.fail("failed", failures)
    run.figure("takeover series, sum", takeovers, None, "")
    run.figure("p99 s, not streamed", percentile(seconds[False], 0.99), None, "")
    run.figure("p99 s, streamed", percentile(seconds[True], 0.99), None, "")
    await run.check_invariants(sims)


async def kill(victims, until):
    """Kills and restarts a victim every 2 s; returns how often."""
    deaths = 0
    while time.monotonic() + 2 < until:
        victim = victims[deaths % len(victims)]
        await asyncio.sleep(1.5)
        victim.kill()
        deaths += 1
        await asyncio.sleep(0.5)
        victim.begin()
    return deaths


if __name__ == "__main__":
    both = {"--both": {"action": "store_true", "help": "both in turn, not always the same"}}
    main("kill_restart", 60, 8, body, both)
