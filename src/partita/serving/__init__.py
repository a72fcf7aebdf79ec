"""Serving many requests at once with one split model: requests, the scheduler, and the loop that all ranks run in step.

Shared by both engines; imports neither. An engine provides `Rows`: "run these rows".
"""

from partita.serving.loop import Inbox, ServingLoop, Stats
from partita.serving.requests import Event, Finished, OnEvent, ServeRequest, ServeSettings, Token

__all__ = [
    "Event",
    "Finished",
    "Inbox",
    "OnEvent",
    "ServeRequest",
    "ServeSettings",
    "ServingLoop",
    "Stats",
    "Token",
]
