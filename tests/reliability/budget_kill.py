#!/usr/bin/env python3
"""The gateway is killed (SIGKILL) again and again while it counts what 300 keys use: what the store
has forgotten was answered less than a second before, and nothing is counted twice."""

import asyncio
import json
import random
import time

from common import Ask, Client, Gateway, Sim, main, one_group, upstream

RATE = 60
# So many that none asks twice between two kills: what is missing of a key is its last answer.
KEYS = 300


def used(gateway):
    """Returns how many requests of each key the gateway knows of, from its store."""
    deadline = time.monotonic() + 10
    while True:
        usage = json.loads(gateway.admin_get("/usage")[1])
        if usage["complete"] or time.monotonic() > deadline:
            return {key["key"]: key["month"]["requests"] for key in usage["keys"]}
        time.sleep(0.05)


async def body(run, given):
    kills = given.kills or (6 if given.short else 200)
    sim = Sim(run, "gpu-1", "--first-token", "1ms")
    names = [f"key-{number:03}" for number in range(KEYS)]
    tokens = {name: f"canary-budget-{random.getrandbits(64):016x}" for name in names}
    plugins = [{"auth": {"keys_file": "keys.yaml"}}, {"budget": {"month": {"tokens": "1000M"}}}]
    config = {**one_group([upstream(sim)]), "store": "sqlite:budget.db", "plugins": plugins}
    keys = [{"name": name, "sha256": token} for name, token in tokens.items()]
    gateway = Gateway(run, config, keys)
    client = Client(run, gateway.addr)
    asked, before, ages, twice, strangers, up = 0, {}, [], [], [], 0.0

    async def one(name, answered):
        ask = Ask(run, random.random() < 0.5, random.randrange(4, 60), tokens[name])
        answer = await client.ask(ask, timeout=10)
        if not ask.fault_of(answer):
            answered[name] = time.monotonic()

    async def life(seconds, end):
        """Asks for some time, then ends the gateway; returns what was answered, and when it ended."""
        nonlocal asked
        answered, tasks, due = {}, [], time.monotonic()
        until = due + seconds
        while due < until:
            tasks.append(asyncio.create_task(one(names[asked % KEYS], answered)))
            asked += 1
            due += 1 / RATE
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        ended = time.monotonic()
        await asyncio.to_thread(end)
        await asyncio.gather(*tasks)
        gateway.begin()
        await asyncio.to_thread(gateway.wait_ready)
        return answered, ended

    total, forgotten_after_stop = 0, 0
    for number in range(kills + 1):
        # The last one is asked to stop: nothing is lost then.
        is_last = number == kills
        seconds = 0.2 + random.random()
        answered, ended = await life(seconds, gateway.stop if is_last else gateway.kill)
        up += seconds
        total += len(answered)
        now = await asyncio.to_thread(used, gateway)
        missing = [name for name in answered if now.get(name, 0) <= before.get(name, 0)]
        if is_last:
            forgotten_after_stop = len(missing)
        else:
            ages += [ended - answered[name] for name in missing]
        for name in names:
            more = now.get(name, 0) - before.get(name, 0)
            if more > 1:
                twice.append(name)
            if more < 0:
                strangers.append(name)
        before = now
    client.close()
    gateway.stop()

    rate = total / up
    run.figure("kills", kills, None, "")
    run.figure("whole answers", total, None, "")
    run.figure("whole answers a second, while up", rate, rate >= 50, ">= 50")
    run.figure("counted", sum(before.values()), None, "")
    run.figure("counted twice", len(twice), not twice, "0")
    run.figure("forgotten though it was known", len(strangers), not strangers, "0")
    run.figure("forgotten", len(ages), None, "")
    oldest = max(ages, default=0.0)
    run.figure("oldest forgotten, s before a kill", oldest, oldest <= 1.0, "<= 1")
    run.figure("forgotten after SIGTERM", forgotten_after_stop, forgotten_after_stop == 0, "0")


if __name__ == "__main__":
    kills = {"--kills": {"type": int, "help": "how often; default 200, short 6"}}
    main("budget_kill", 0, 0, body, kills)
