"""Liveness: every rank monitors every other rank, outside the collectives, and ends when one is lost.

A rank that was killed, stopped or disconnected does not answer, and a rank that waits for it in a collective would wait
forever, or until the backend's own timeout. So each rank has a thread that sends heartbeats with the rank's activity:

    ranks that `partita` starts      send to the launcher, over the line (a socket) to it
    ranks of torchrun, mpirun, ...   send to the coordinator in rank 0, which answers

A receiver that gets nothing from a rank for `PARTITA_LOST_AFTER` seconds, or whose connection closes without a farewell, ends
the run. This package imports no framework.
"""

from partita.ranks.liveness.activity import ME, STARTING, Activity, doing, waits_in
from partita.ranks.liveness.heartbeat import (
    VERDICT_S,
    WORDS_S,
    attach,
    failure_was_printed,
    farewell,
    has_joined,
    is_echo,
    join,
    on_loss,
    send_failure,
    wait_for_verdict,
)
from partita.ranks.liveness.peer import LOST, LOST_AFTER, Lines, Peer, Uptime, beat_s, line_of, lost_after_s, silence

__all__ = [
    "LOST",
    "LOST_AFTER",
    "ME",
    "STARTING",
    "VERDICT_S",
    "WORDS_S",
    "Activity",
    "Lines",
    "Peer",
    "Uptime",
    "attach",
    "beat_s",
    "doing",
    "failure_was_printed",
    "farewell",
    "has_joined",
    "is_echo",
    "join",
    "line_of",
    "lost_after_s",
    "on_loss",
    "send_failure",
    "silence",
    "wait_for_verdict",
    "waits_in",
]
