"""The parts of training that both engines share: settings, schedules, the order of the data, checkpoints of a run."""

from partita.training.data import read_ids, row_starts, texts
from partita.training.saving import SaveReport, Saves
from partita.training.settings import StepReport, TrainSettings, schedule_of

__all__ = ["SaveReport", "Saves", "StepReport", "TrainSettings", "read_ids", "row_starts", "schedule_of", "texts"]
