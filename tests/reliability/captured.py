"""What the scripts about capture share: a gateway that captures, and its files."""

import json
import re
from collections import Counter

from common import Gateway, one_group, upstream


def capturing(run, sim, **settings):
    """Starts a gateway that captures into `captures` beside its configuration."""
    return Gateway(run, config(sim, **settings))


def config(sim, **settings):
    plugins = [{"auth": "none"}, {"capture": {"dir": "captures", **settings}}]
    return {**one_group([upstream(sim)]), "plugins": plugins}


class Captured:
    """All lines of a folder."""

    def __init__(self, folder):
        self.bad = []
        # By the question, which is every request's own.
        self.answers, self.times = {}, Counter()
        for file in sorted(folder.glob("*.jsonl")):
            text = file.read_bytes()
            if text and not text.endswith(b"\n"):
                self.bad.append((file.name, "torn"))
            for line in text.split(b"\n")[:-1]:
                self._read(file, line)
        self.torn = len(list(folder.glob("*.torn*")))

    def _read(self, file, line):
        try:
            turns = json.loads(line)["conversations"]
            question, answer = turns[0]["value"], turns[1]["value"]
        except (ValueError, KeyError, IndexError, TypeError) as why:
            self.bad.append((file.name, why, line[:100]))
            return
        self.times[question] += 1
        self.answers[question] = answer

    def twice(self):
        return [question for question, times in self.times.items() if times > 1]


def totals(log):
    """Returns the sums that a gateway writes at its end, added up."""
    sums = Counter()
    for found in re.finditer(r"capture stopped: [^\n]*?captured=\d+[^\n\"]*", log):
        for name, value in re.findall(r"(\w+)=(\d+)", found.group(0)):
            sums[name] += int(value)
    return sums
