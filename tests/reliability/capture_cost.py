#!/usr/bin/env python3
"""What capture costs: CPU per request and time to the first token, with it and without, in turns."""

import asyncio

from captured import config
from common import Ask, Client, Gateway, Run, Sim, at_rate, main, one_group, percentile, upstream

TOKENS = 24
ROUNDS = 6


class Side:
    """One of the two gateways."""

    def __init__(self, run, name, configuration):
        folder = run.folder / name
        folder.mkdir()
        # Its files are its own; the rest is the script's.
        own = Run.__new__(Run)
        own.__dict__.update(run.__dict__)
        own.folder = folder
        self.gateway = Gateway(own, configuration)
        self.client = Client(run, self.gateway.addr)
        self.cpu, self.requests, self.failed, self.seconds = [], 0, 0, []

    def first_tokens(self):
        metrics = self.gateway.metrics()
        of = "forebay_first_token_seconds"
        total = sum(value for name, value in metrics.items() if name.startswith(f"{of}_sum"))
        count = sum(value for name, value in metrics.items() if name.startswith(f"{of}_count"))
        return total, count


async def body(run, given):
    rate = 100 if given.short else given.rate
    sim = Sim(run, "gpu-1", "--first-token", "1ms")
    bare = {**one_group([upstream(sim)]), "plugins": [{"auth": "none"}], "log": {"access": False}}
    sides = {
        "off": Side(run, "off", bare),
        "on": Side(run, "on", {**config(sim), "log": {"access": False}}),
    }

    async def load(side, seconds):
        async def one():
            ask = Ask(run, stream=run.number % 2 == 0, tokens=TOKENS)
            answer = await side.client.ask(ask)
            side.failed += not (answer.complete and answer.status == 200)
            side.seconds.append(answer.seconds)

        before = side.gateway.cpu_seconds()
        done = await at_rate(rate, seconds, one)
        side.cpu.append((side.gateway.cpu_seconds() - before) / len(done))
        side.requests += len(done)

    for side in sides.values():
        await load(side, 1)
        side.cpu.clear()
        side.seconds.clear()
    begun = {name: side.first_tokens() for name, side in sides.items()}
    for number in range(2 if given.short else ROUNDS):
        # Neither is always the first.
        for side in list(sides.values())[:: 1 - 2 * (number % 2)]:
            await load(side, given.seconds)
        sim.forget()
    first = {}
    for name, side in sides.items():
        total, count = side.first_tokens()
        first[name] = 1000 * (total - begun[name][0]) / max(1, count - begun[name][1])
        run.figure(f"requests, capture {name}", side.requests, None, "")
        run.figure(f"failed, capture {name}", side.failed, side.failed == 0, "0")
    off, on = (sorted(sides[name].cpu)[len(sides[name].cpu) // 2] for name in ("off", "on"))
    run.figure("CPU µs a request, off (median of rounds)", off * 1e6, None, "")
    run.figure("CPU µs a request, on", on * 1e6, None, "")
    more = 100 * (on - off) / off
    run.figure("more CPU, %", more, None if given.short else more <= 15, "<= 15")
    run.figure("first token ms, off (mean)", first["off"], None, "")
    run.figure("first token ms, on", first["on"], None, "")
    for name, side in sides.items():
        run.figure(f"p99 s to the end, {name}", percentile(side.seconds, 0.99), None, "")
    metrics = sides["on"].gateway.metrics()
    dropped = sum(
        value
        for name, value in metrics.items()
        if name.startswith("forebay_capture_exchanges") and "dropped" in name
    )
    run.figure("dropped", dropped, dropped == 0, "0")
    for side in sides.values():
        side.client.close()


if __name__ == "__main__":
    rate = {"--rate": {"type": int, "default": 500, "help": "requests a second; default 500"}}
    main("capture_cost", 5, 2, body, rate)
