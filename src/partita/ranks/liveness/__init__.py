"""Peers: every rank knows of the others that they live, beside the collectives, and ends when one is lost.

A rank that was killed, stopped or cut off does not answer, and who waits for it in a collective would wait for ever, or for
as long as the backend's own timeout. So each rank has a thread that tells at intervals what the rank does:

    ranks that `partita` starts      tell the launcher, by the line (a socket) that it has given them
    ranks of torchrun, mpirun, ...   tell rank 0, which has a hub and answers

Who hears nothing of a rank for `PARTITA_LOST_AFTER` seconds, or sees its connection end without a farewell, ends the run.
No framework.
"""

from partita.ranks.liveness.activity import ME, Activity, doing, waits_in
from partita.ranks.liveness.heartbeat import attach, farewell, has_joined, is_echo, join, tell_failure, wait_for_verdict
from partita.ranks.liveness.peer import LOST, LOST_AFTER, Lines, Peer, Uptime, beat_s, line_of, lost_after_s, silence

__all__ = [
    "LOST",
    "LOST_AFTER",
    "ME",
    "Activity",
    "Lines",
    "Peer",
    "Uptime",
    "attach",
    "beat_s",
    "doing",
    "farewell",
    "has_joined",
    "is_echo",
    "join",
    "line_of",
    "lost_after_s",
    "silence",
    "tell_failure",
    "wait_for_verdict",
    "waits_in",
]
