"""What can go wrong in a run, by who has to act."""


class InputError(ValueError):
    """A configuration, a prompt file or an argument that cannot be used; the message says where and what to do."""


class RewardFailure(RuntimeError):
    """A reward failed too often in a row; the run stops with a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged."""
