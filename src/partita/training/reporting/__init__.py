"""Where the numbers of a run go: JSON lines, TensorBoard, Weights & Biases."""

from partita.training.reporting.jsonl import JsonLines
from partita.training.reporting.kinds import REPORTERS, check_reporter, open_reporters
from partita.training.reporting.reporter import Reporter, metrics_of, recording
from partita.training.reporting.tensorboard import TensorBoard
from partita.training.reporting.wandb import Wandb

__all__ = [
    "REPORTERS", "JsonLines", "Reporter", "TensorBoard", "Wandb", "check_reporter", "metrics_of", "open_reporters", "recording",
]  # fmt: skip
