"""The exceptions that fusekit raises on purpose. Each says what is wrong, where, both values, and the way out."""


class FusekitError(Exception):
    """Base of every error that fusekit raises on purpose. Commands print it as one message and exit with status 1."""


class MergeError(FusekitError):
    """A merge cannot be carried out as asked: inputs, parameters, or the result are wrong."""


class RecipeError(FusekitError):
    """A recipe cannot be read or does not say anything that can be run."""


class AlignmentError(FusekitError):
    """Two tokenizers, or two tokenisations, cannot be aligned exactly."""


class StorageError(FusekitError):
    """An artifact on disk cannot be read, written or published."""


class DataError(FusekitError):
    """Rows of data, a chat template, or what they render to cannot be used as asked."""


class CaptureError(FusekitError):
    """What a model knows about examples of data cannot be captured."""


class ModelError(MergeError, CaptureError):
    """A model's files are missing, out of reach or damaged: whoever merges it or captures from it is told the same."""


class DistillationError(FusekitError):
    """Targets, losses or a training run are not what they have to be."""


class GenerationError(FusekitError):
    """Models, prompts or settings from which no text can be generated."""
