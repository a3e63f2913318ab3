"""Every error a user can meet, as one tree. Each message says what is wrong and what to do.

SereError
+-- UsageError            bad option, file or value: nothing was started           (exit 2)
|   +-- PolicyError       a policy table that cannot mean anything
|   +-- SimilarityError   a similarity artefact that is broken or of another model
|   +-- ProfileError      a profile that is broken or made for something else
+-- UnsupportedError      a model, engine version or backend that cannot re-route
+-- ConflictError         a live change that lost against a newer one or another source
+-- UnauthorizedError     a live change without the token
+-- ReadOnlyError         a live change of an engine that allows none
"""

from __future__ import annotations


class SereError(Exception):
    """Root of all errors this project raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(SereError):
    """Bad input. Nothing was started or changed."""

    exit_code = 2


class PolicyError(UsageError):
    """The policy is not valid in itself (overlap, rho out of [0, 1], S above top-k)."""


class SimilarityError(UsageError):
    """The similarity artefact is truncated, of another schema, or made for another model."""


class ProfileError(UsageError):
    """The profile is broken, or its key does not match what is running."""


class UnsupportedError(SereError):
    """This model, engine version or kernel backend cannot be re-routed. The message names the way out."""


class ConflictError(SereError):
    """A live change was refused: stale generation, or another source owns the policy."""


class UnauthorizedError(SereError):
    """A live change was asked for without the engine's token."""


class ReadOnlyError(SereError):
    """A live change was asked of an engine for which no token is configured."""
