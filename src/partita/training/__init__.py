"""The parts of training that both engines share: settings, schedules, the data, checkpoints of a run."""

from partita.training.data import row_starts
from partita.training.follow import Follow, Profile
from partita.training.saving import SaveReport, Saves
from partita.training.settings import StepReport, TrainSettings, schedule_of

__all__ = ["Follow", "Profile", "SaveReport", "Saves", "StepReport", "TrainSettings", "row_starts", "schedule_of"]
