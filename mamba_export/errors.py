"""The exception tree. Every error a user can cause or meet carries an exit code and, where one exists, a hint.

::

    MambaExportError          exit 1   (a bug if raised directly)
    ├── UsageError            exit 2   an argument, a path or a data file is wrong
    │   └── OutputExistsError          the output is there already and --force was not given
    ├── CheckpointError       exit 3   the checkpoint is damaged or contradicts itself
    │   └── UnsupportedError           a sound checkpoint of a kind this version does not export
    ├── VerificationError     exit 4   the bundle does not compute what the checkpoint computes
    ├── BundleError           exit 3   a bundle is damaged, incomplete or of a newer schema
    └── EnvironmentProblem    exit 5   a package, a device or disk space is missing
        └── MissingExtraError          an optional dependency group is not installed
"""

from __future__ import annotations


class MambaExportError(Exception):
    """Base of all errors raised on purpose. ``hint`` says what to do next, in one line; every class has a default."""

    exit_code = 1
    default_hint: str | None = None

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint or self.default_hint


class UsageError(MambaExportError):
    exit_code = 2
    default_hint = "mamba-export COMMAND --help shows arguments and examples"


class OutputExistsError(UsageError):
    pass


class CheckpointError(MambaExportError):
    exit_code = 3
    default_hint = "the checkpoint is damaged or edited: compare it with its source, or copy it again"


class UnsupportedError(CheckpointError):
    pass


class VerificationError(MambaExportError):
    exit_code = 4


class BundleError(MambaExportError):
    exit_code = 3
    default_hint = "copy or export the bundle again"


class EnvironmentProblem(MambaExportError):
    exit_code = 5
    default_hint = "mamba-export doctor shows what this machine has"


class MissingExtraError(EnvironmentProblem):
    """An optional package is missing.

    Args:
        package: the import name that failed.
        extra: the extra of this project that installs it.
        purpose: what needed it, e.g. ``"export"``.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed",
            f'pip install "mamba-export[{extra}]"',
        )
        self.package = package
        self.extra = extra
