#!/usr/bin/env python3
"""One of two upstreams refuses connections, or swallows them: one request may wait out a connect
timeout, once; after that nobody notices."""

import socket

from common import Ask, Client, Gateway, Sim, at_rate, free_port, main, one_group, upstream

# The connect timeout is 2 s; nothing else takes half of it.
SLOW = 1.0


class BlackHole:
    """A port whose connections are neither accepted nor refused: its backlog is full."""

    def __init__(self):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.port = self.listener.getsockname()[1]
        self.waiting = []
        for _ in range(4):
            stuffing = socket.socket()
            stuffing.setblocking(False)
            stuffing.connect_ex(("127.0.0.1", self.port))
            self.waiting.append(stuffing)

    def close(self):
        for open_socket in [*self.waiting, self.listener]:
            open_socket.close()


async def body(run, given):
    hole = BlackHole()
    try:
        # The black hole last: its gateway is the one whose invariants are checked.
        for kind, port in (("refusing", free_port()), ("black hole", hole.port)):
            await one_kind(run, given, kind, port)
    finally:
        hole.close()


async def one_kind(run, given, kind, port):
    good = Sim(run, f"good-{port}")
    dead = {"name": "dead", "kind": "vllm", "url": f"http://127.0.0.1:{port}/v1"}
    gateway = Gateway(run, one_group([dead, upstream(good)]))
    client = Client(run, gateway.addr)
    failures, seconds = [], []

    async def one():
        ask = Ask(run)
        answer = await client.ask(ask)
        seconds.append(answer.seconds)
        if fault := ask.fault_of(answer):
            failures.append((ask.request_id, fault))

    # One after the other: whoever is slow is slow because of the dead one.
    for _ in range(20):
        await one()
    first = sum(value > SLOW for value in seconds)
    seconds.clear()
    await at_rate(10 if given.short else 50, given.seconds / 2, one)
    later = sum(value > SLOW for value in seconds)
    client.close()
    wanted = 1 if kind == "black hole" else 0
    run.figure(f"{kind}: slow among the first 20", first, first <= wanted, f"<= {wanted}")
    run.figure(f"{kind}: requests afterwards", len(seconds), None, "")
    run.figure(f"{kind}: slow afterwards", later, later == 0, "0")
    run.figure(f"{kind}: failures", len(failures), not failures, "0")
    run.fail("failed", failures)
    await run.check_invariants()
    gateway.stop()


if __name__ == "__main__":
    main("dead_upstream", 120, 8, body)
