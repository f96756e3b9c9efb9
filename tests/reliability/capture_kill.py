#!/usr/bin/env python3
"""The gateway is killed (SIGKILL) again and again while it captures 60 requests a second: every
line is whole, none is there twice, and what is missing was answered less than a second before."""

import asyncio
import random
import time

from captured import Captured, capturing
from common import Ask, Client, Sim, main

RATE = 60


async def body(run, given):
    kills = given.kills or (6 if given.short else 1000)
    sim = Sim(run, "gpu-1", "--first-token", "1ms")
    gateway = capturing(run, sim)
    client = Client(run, gateway.addr)
    # Of every whole answer: when it was there, and what it said.
    answered, wrong, deaths, up = {}, [], [], 0.0
    tasks, over = set(), False

    async def one():
        ask = Ask(run, stream=random.random() < 0.5, tokens=random.randrange(4, 60))
        answer = await client.ask(ask, timeout=10)
        if not ask.fault_of(answer):
            answered[ask.question] = (time.monotonic(), answer.content())

    async def load():
        due = time.monotonic()
        while not over:
            task = asyncio.create_task(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due = max(due + 1 / RATE, time.monotonic() - 1)
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    loading = asyncio.create_task(load())
    for _ in range(kills):
        began = time.monotonic()
        await asyncio.sleep(0.2 + random.random())
        gateway.child.kill()
        deaths.append(time.monotonic())
        up += deaths[-1] - began
        gateway.child.wait()
        gateway.begin()
        await asyncio.to_thread(gateway.wait_ready)
    await asyncio.sleep(1)
    over = True
    await loading
    await asyncio.gather(*tasks)
    client.close()
    gateway.stop()

    captured = Captured(run.folder / "captures")
    missing = [question for question in answered if question not in captured.times]
    ages = []
    for question in missing:
        at = answered[question][0]
        ages.append(min((death - at for death in deaths if death >= at), default=3600.0))
    for question, (_, text) in answered.items():
        if captured.answers.get(question, text) != text:
            wrong.append(question)
    rate = len(answered) / (up + 1)
    run.figure("kills", len(deaths), None, "")
    run.figure("whole answers", len(answered), None, "")
    run.figure("whole answers a second, while up", rate, rate >= 50, ">= 50")
    run.figure("lines", sum(captured.times.values()), None, "")
    run.figure("torn lines set aside", captured.torn, None, "")
    run.figure("bad lines", len(captured.bad), not captured.bad, "0")
    run.fail("bad", captured.bad)
    run.figure("twice", len(captured.twice()), not captured.twice(), "0")
    run.figure("with other words", len(wrong), not wrong, "0")
    run.figure("missing", len(missing), None, "")
    oldest = max(ages, default=0.0)
    run.figure("oldest missing, s before a kill", oldest, oldest <= 1.0, "<= 1")


if __name__ == "__main__":
    kills = {"--kills": {"type": int, "help": "how often; default 1,000, short 6"}}
    main("capture_kill", 0, 0, body, kills)
