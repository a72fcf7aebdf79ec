"""`python -m tests.ranks.program RANK RANKS`: a rank that does what its standard input tells, without any framework.

What the ranks have to tell each other before they are connected passes through the test, by standard output and input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from partita.ranks import liveness


def gather(value: Any) -> list[Any]:
    print(json.dumps(value), flush=True)
    told: list[Any] = json.loads(sys.stdin.readline())
    return told


def main() -> None:
    rank, ranks = int(sys.argv[1]), int(sys.argv[2])
    liveness.join(rank, ranks, gather)
    liveness.ME.stage = rank // 2
    print(json.dumps("joined"), flush=True)
    for line in sys.stdin:
        order = line.strip()
        if order == "raise":
            raise ValueError("this rank has had enough")
        if order == "broken":
            raise RuntimeError("[gloo] Connection closed by peer")
        if order == "fail":
            liveness.send_failure({"code": 2, "message": "it will not"})
            os._exit(2)
        if order == "crash":
            os._exit(3)
        if order == "end":
            return
        if order == "sleep":
            with liveness.doing("training step 7"), liveness.ME.over("an all-reduce"):
                print(json.dumps("asleep"), flush=True)
                time.sleep(60)


if __name__ == "__main__":
    main()
