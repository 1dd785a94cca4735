"""Errors that cross a package border. Each message says what to do."""


class HeadraceError(Exception):
    """Root of errors that a user can do something about."""


class ConfigError(HeadraceError):
    """A flag or a configuration is wrong; the message names it."""


class CheckpointError(HeadraceError):
    """A checkpoint cannot be served; the message names the file, architecture or tensor."""


class IncompatiblePeer(HeadraceError):
    """Two nodes must not hand KV to each other; the message names the field that differs."""


class TransferError(HeadraceError):
    """Bytes cannot be moved, or were not; the message names the transfer and both peers where there are any."""


class Overloaded(HeadraceError):
    """The service takes no more requests now."""


class RequestFailed(HeadraceError):
    """A request ended without a result; the message says why."""


class PushRefused(HeadraceError):
    """New weights cannot be taken, or were not; the old ones serve."""
