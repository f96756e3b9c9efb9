#!/usr/bin/env python3
"""Every second answer of all four upstreams is an error. They are not all left alone, at least
half of them go on, and retries do not multiply."""

import asyncio
import json
import random
from collections import Counter

from common import Ask, Client, Gateway, Sim, at_rate, main, one_group, upstream


def every_second(dice):
    """Returns a fault for each of the next requests: an error, or none that anybody notices."""
    kinds = {"status": 500}, {"per_write": 1}
    return [{"times": 1, **dice.choice(kinds)} for _ in range(5000)]


async def body(run, given):
    sims = [Sim(run, f"gpu-{number}") for number in (1, 2, 3, 4)]
    for sim in sims:
        sim.fault(json.dumps(every_second(random.Random(sim.name))))
    gateway = Gateway(run, one_group([upstream(sim) for sim in sims]))
    client = Client(run, gateway.addr)
    statuses, asked, left = Counter(), 0, []

    async def one():
        ask = Ask(run)
        answer = await client.ask(ask)
        fault = ask.fault_of(answer)
        statuses[200 if not fault else answer.status or answer.broken] += 1

    async def watch():
        while True:
            _, listed = await asyncio.to_thread(gateway.admin_get, "/upstreams")
            states = [one["state"] for one in json.loads(listed)["upstreams"]]
            left.append(sum(state in ("ready", "degraded") for state in states))
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    seconds = given.seconds
    while seconds > 0:
        await at_rate(50 if given.short else 200, min(seconds, 20), one)
        for sim in sims:
            asked += len(sim.calls())
            sim.forget()
        seconds -= 20
    watching.cancel()
    client.close()
    requests = statuses.total()
    share = asked / requests
    run.figure("requests", requests, None, "")
    # Of few requests, the one a second that is a last resort is a larger part.
    most = 1.25 if given.short else 1.2
    run.figure("upstreams saw, per request", share, round(share, 2) <= most, f"<= {most}")
    run.figure("answered with", dict(statuses), set(statuses) <= {200, 502, 503}, "200, 502, 503")
    run.figure("good answers, of all", statuses[200] / requests, None, "")
    run.figure("fewest upstreams in use, of 4", min(left), min(left) >= 2, ">= 2")
    await run.check_invariants(sims)


if __name__ == "__main__":
    main("half_errors", 60, 6, body)
