#!/usr/bin/env python3
"""Every upstream fails. Retries do not multiply: the upstreams see at most 1.2 times what the
clients ask. And after the first byte of an answer nobody is asked again."""

import asyncio
from collections import Counter

from common import Ask, Client, Gateway, Sim, at_rate, main, one_group, upstream


async def body(run, given):
    await storm(run, given)
    await after_the_first_byte(run, given)


async def storm(run, given):
    """Everything is answered by 503."""
    rate = 50 if given.short else 200
    sims = [Sim(run, f"gpu-{number}") for number in (1, 2, 3)]
    for sim in sims:
        sim.fault("status=503")
    gateway = Gateway(run, one_group([upstream(sim) for sim in sims]))
    client = Client(run, gateway.addr)
    statuses, asked = Counter(), 0

    async def one():
        answer = await client.ask(Ask(run))
        statuses[answer.status or answer.broken] += 1

    # In parts, since a simulator remembers 10,000 requests.
    left = given.seconds
    while left > 0:
        await at_rate(rate, min(left, 20), one)
        for sim in sims:
            asked += len(sim.calls())
            sim.forget()
        left -= 20
    client.close()
    requests = statuses.total()
    share = asked / requests
    run.figure("requests, all failing", requests, None, "")
    run.figure("upstreams saw, per request", share, share <= 1.2, "<= 1.2")
    good = set(statuses) <= {502, 503}
    run.figure("answered with", dict(statuses), good, "502, 503")
    for sim in sims:
        sim.heal()
    healthy = 0
    for _ in range(130):
        ask = Ask(run)
        healthy = healthy + 1 if not ask.fault_of(await client.ask(ask)) else 0
        if healthy == 5:
            break
        await asyncio.sleep(1)
    client.close()
    run.figure("good again after they are", healthy == 5, healthy == 5, "True")
    await run.check_invariants(sims)
    gateway.stop()


async def after_the_first_byte(run, given):
    """Every stream dies in its middle; takeover is off."""
    sims = [Sim(run, f"dying-{number}", "--rate", "100") for number in (1, 2, 3)]
    for sim in sims:
        sim.fault("die_at=6")
    group = {"takeover": False} if run.knows("takeover") else {}
    gateway = Gateway(run, one_group([upstream(sim) for sim in sims], **group))
    client = Client(run, gateway.addr)
    begun = []

    async def one():
        ask = Ask(run, stream=True, tokens=20)
        answer = await client.ask(ask)
        if answer.status == 200:
            begun.append((ask, answer))

    await at_rate(20, 3 if given.short else 10, one)
    client.close()
    bodies = [call.get("body", "") for sim in sims for call in sim.calls()]
    wrong = []
    for ask, answer in begun:
        times = sum(ask.question in text for text in bodies)
        typed = "upstream_incomplete" in answer.events()[-1]
        # An upstream that died before its first token was asked in vain, and is no answer.
        if times != 1 or not typed:
            wrong.append((ask.request_id, times, answer.events()[-1]))
    run.figure("streams that began", len(begun), len(begun) > 0, "> 0")
    run.figure("asked again, or without their error", len(wrong), not wrong, "0")
    run.fail("wrong", wrong)
    await run.check_invariants(sims)


if __name__ == "__main__":
    main("all_failing", 60, 5, body)
