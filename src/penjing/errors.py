"""What can go wrong, as types: one family per cause, so that a caller can tell bad input from a bad result.

Every message names the thing (file, tensor, key), the rule it broke and what to do about it.
"""


class PenjingError(Exception):
    """Base of every error that Penjing raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 2


class RecipeError(PenjingError):
    """The recipe is not valid: unknown key, unknown method, a value outside its range."""


class PlanError(PenjingError):
    """Recipe, model and format do not fit together. Raised before any weight is read."""


class CheckpointError(PenjingError):
    """A model cannot be read: missing or truncated shard, a lying header, a pickle, NaN in a tensor."""


class CalibrationError(PenjingError):
    """Calibration or evaluation text is missing, empty or too short, or activations are not finite."""


class TrainingError(PenjingError):
    """Training went astray: a loss that is no number or runs away, batches that cannot be shared out to the devices."""


class TeacherError(PenjingError):
    """A teacher cannot be asked, refuses, or its recorded answers cannot be read."""


class FormatError(PenjingError):
    """A file format cannot hold or cannot decode what it was given."""


class OutputError(PenjingError):
    """The output directory cannot be used: not empty, not ours, full disk."""


class ResumeError(OutputError):
    """An interrupted run cannot be resumed because recipe, model, data or software changed; says which."""


class EngineError(PenjingError):
    """An inference engine does not take a model, or fails on it; says what the engine said."""


class MissingDependency(PenjingError):
    """An optional package is needed; the message is the one line that installs it."""


class VerificationError(PenjingError):
    """The written model, loaded back, is not the model that was in memory."""

    exit_code = 3


class QualityError(PenjingError):
    """The result loads but is worse than the recipe's `require` section allows."""

    exit_code = 4
