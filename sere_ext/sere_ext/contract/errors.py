"""Every error that this project raises on purpose, as one tree, with its exit code and its HTTP status.

A message is one sentence or two: what is wrong, and what to do about it.

SereError
+-- UsageError                bad option, file or value; nothing was started
|   +-- PolicyError           a policy that cannot mean anything, or not on this model
|   +-- SimilarityError       a similarity file that is broken or of another model
|   +-- ProfileError          a profile that is broken or made for something else
|   +-- SpecError             a Kubernetes resource's spec that cannot be carried out
+-- UnsupportedError          a model, engine version or backend that cannot re-route
+-- ConflictError             a live change that lost against a newer one or another source
+-- UnauthorizedError         a live change without the token
+-- ReadOnlyError             a live change of an engine that allows none
+-- EngineCrashError          the tuner's engine died or hung
+-- BudgetExhaustedError      the tuner's budget ran out
+-- CannotCertifyError        the items cannot certify the limit
+-- DiskFullError             the tuner's study could not be written
+-- PublishError              the tuner's result could not be written to the API server
+-- ApiError                  the API server refused a request, or did not answer
+-- OperatorError             inside the operator
    +-- NoAnswerError         an engine pod gave no answer that can be used
    +-- LostLeaseError        the Lease could not be renewed
    +-- NotLeadingError       another replica leads
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """How the commands end, each with its meaning as help and documentation show it. The operator reads the tuner's from its pod."""

    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> ExitCode:  # without a meaning a code is looked up
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code

    DONE = 0, "done"
    FAILED = 1, "failed, the message says why"
    BAD_INPUT = 2, "bad input, nothing was started or changed"
    INFEASIBLE = 3, "no policy keeps the limits and is faster than exact routing, which stays"
    BUDGET = 4, "a budget ran out before anything was certified"
    CANNOT_CERTIFY = 5, "the items cannot certify the limit"
    UNPUBLISHED = 6, "the result could not be published, the same command again publishes it"
    STOPPED = 130, "stopped by Ctrl-C"


def exit_codes(*codes: ExitCode) -> str:
    """The sentence of a command's help: `Exit codes: 0 done; 1 failed, ...`."""
    return f"Exit codes: {'; '.join(f'{code.value} {code.meaning}' for code in codes)}."


class SereError(Exception):
    """Root of the tree.

    Seen by: whoever runs a command, as one line on stderr. Caught by: the commands' `main`, and whoever guards a border.
    """

    exit_code = ExitCode.FAILED


class UsageError(SereError):
    """Bad input; nothing was started or changed.

    Seen by: whoever gave the input. Caught by: the commands alone, since trying again cannot help.
    """

    exit_code = ExitCode.BAD_INPUT


class PolicyError(UsageError):
    """The policy is not valid in itself (overlap, rho out of [0, 1]) or on this model (S above top-k).

    Seen by: whoever wrote the policy, over HTTP too. Caught by: live control and the watcher, which keep the policy in force, and
    the tuner's search, which leaves the policy out.
    """


class SimilarityError(UsageError):
    """The similarity file is truncated, of another schema, or made for another model.

    Seen by: whoever named the file. Caught by: live control and the watcher, which keep the policy in force, and the operator,
    which writes it to the status.
    """


class ProfileError(UsageError):
    """The profile is broken, or its key does not match what is running.

    Seen by: whoever named the profile. Caught by: the operator, which writes it to the status.
    """


class SpecError(UsageError):
    """A resource's spec cannot be carried out. The message names the field.

    Seen by: the resource's owner, in its status. Caught by: the operator's plan.
    """


class UnsupportedError(SereError):
    """This model, engine version or kernel backend cannot re-route. The message names the way out.

    Seen by: whoever starts the engine. Caught by: clients of live control, which read it as "no engine with live control here".
    """


class ConflictError(SereError):
    """A live change was refused: its generation is stale, or another source owns the policy.

    Seen by: whoever asked for the change. Caught by: a client that reads the state and asks again.
    """


class UnauthorizedError(SereError):
    """A live change was asked for without the engine's token.

    Seen by: whoever asked for the change. Caught by: nobody.
    """


class ReadOnlyError(SereError):
    """A live change was asked of an engine for which no token is configured.

    Seen by: whoever asked for the change. Caught by: nobody.
    """


class EngineCrashError(SereError):
    """The tuner's engine died or hung under a policy, which is suspected; the engine is gone.

    Seen by: whoever runs the tuner, where it crashes again and again. Caught by: the tuner's search and certificate, which start a
    new engine.
    """


class BudgetExhaustedError(SereError):
    """A budget ran out before anything was certified.

    Seen by: whoever runs the tuner. Caught by: the tuner, which writes what it found so far.
    """

    exit_code = ExitCode.BUDGET


class CannotCertifyError(SereError):
    """The items, the limit and the confidence do not allow a certificate. Nothing was spent.

    Seen by: whoever runs the tuner. Caught by: the tuner's command alone.
    """

    exit_code = ExitCode.CANNOT_CERTIFY


class DiskFullError(SereError):
    """There is no room to write in a study's folder. Everything that was finished is kept.

    Seen by: whoever runs the tuner. Caught by: the tuner's meter, where the engine must end all the same.

    Args:
        out: the study's folder.
        error: what the write said.
    """

    def __init__(self, out: Path, error: OSError) -> None:
        super().__init__(
            f"cannot write to {out}: {error.strerror}; make room there and run the same command again, which goes on from here"
        )


class PublishError(SereError):
    """The result could not be written to the API server. A finished study is published when the tuner is run again.

    Seen by: whoever reads the tuner's log. Caught by: nobody; the Job's next pod tries again.
    """

    exit_code = ExitCode.UNPUBLISHED


class ApiError(SereError):
    """The API server refused a request, or did not answer.

    Seen by: whoever runs `kubectl sere` or reads the operator's log. Caught by: the caller that expects this status, commands that
    go on with other objects, and the operator's reconciler, which looks again later.

    Args:
        what: the request, to complete "cannot ...".
        status: HTTP status; 0 where there was no answer.
        words: the server's own sentence, or why there was no answer.
        known: whether the answer is the API server's own (`kind: Status`); it is not where the server knows no such path.
    """

    def __init__(self, what: str, status: int, words: str, *, known: bool = True) -> None:
        self.status, self.words, self.known = status, words, known
        super().__init__(f"cannot {what} ({status}): {words}" if status else words)


class OperatorError(SereError):
    """An error inside the operator, met while it reconciles one resource.

    Seen by: whoever reads the operator's log. Caught by: the reconciler, which looks again later.
    """


class NoAnswerError(OperatorError):
    """An engine pod gave no answer that can be used. The message says what the pod did instead.

    Seen by: nobody. Caught by: the operator's prober, which takes it for no answer.
    """


class LostLeaseError(OperatorError):
    """The Lease could not be renewed in time: the operator stops writing and ends.

    Seen by: whoever reads the operator's log. Caught by: the operator's `main`, which ends the process.
    """


class NotLeadingError(OperatorError):
    """The Lease is not this replica's any more; nothing may be written.

    Seen by: nobody. Caught by: the reconciler and the operator's `main`.
    """


# HTTP statuses of live control. A class stands before its base classes.
_STATUS: tuple[tuple[type[SereError], int], ...] = (
    (UnauthorizedError, 401),
    (ReadOnlyError, 403),
    (ConflictError, 409),
    (PolicyError, 422),
    (SimilarityError, 422),
    (UnsupportedError, 503),
)


def status_of(error: SereError) -> int:
    """The HTTP status with which live control answers a refusal."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def error_of(status: int, name: str, message: str) -> SereError:
    """The error behind a refusal that came over HTTP or RPC.

    Args:
        status: HTTP status; decides where the name is not known.
        name: of the error's class, empty if the answer gave none.
        message: the refusal's sentence.
    """
    known = {kind.__name__: kind for kind, _ in _STATUS}
    kind = known.get(name) or next((kind for kind, its in _STATUS if its == status), SereError)
    return kind(message)
