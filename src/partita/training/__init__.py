"""What training needs on either engine: its settings, the schedule of a step, and which text each step sees."""

from partita.training.data import read_ids, row_starts
from partita.training.settings import StepReport, TrainSettings, schedule_of

__all__ = ["StepReport", "TrainSettings", "read_ids", "row_starts", "schedule_of"]
