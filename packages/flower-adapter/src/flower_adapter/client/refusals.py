"""Answer the server with an error that tells nothing private.

Across the network go a code and a sentence. The exception with its traceback, which may name files,
sizes or characters of the client's data, goes to the client's log alone.
"""

import logging
import secrets
import traceback

from flwr.app import Context, Error, Message

from flower_adapter._flwr import ClientAppCallable, ErrorCode
from flower_adapter.printable import shown

_MOST_LINES, _LONGEST_LINE = 200, 500  # of a traceback in the log

# Flower's own logger, so that the lines appear in the client's log.
logger = logging.getLogger("flwr")


class Refusal(ValueError):
    """An error whose text goes to the server, so the text must hold nothing private.

    Raise it `from` another exception if there are details for the client's log.

    Attributes:
        code: one word for programs, such as "policy", "data" or "state".
        sentence: the reason in words.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(code, sentence)
        self.code = code
        self.sentence = sentence

    def __str__(self) -> str:
        return f"{self.code}: {self.sentence}"


def refusal_from(code: str, sentence: str, cause: Exception) -> Refusal:
    """Return the refusal that `raise Refusal(code, sentence) from cause` would raise."""
    refusal = Refusal(code, sentence)
    refusal.__cause__ = cause
    return refusal


def refuse(
    message: Message, error: Exception, code: int = ErrorCode.MOD_FAILED_PRECONDITION
) -> Message:
    """Log `error` with its traceback, and return an error reply.

    The reply holds the text of a `Refusal`. For any other exception it holds the name of the
    exception's class. A reference in the reply leads to the details in the client's log.
    """
    reference = secrets.token_hex(3)
    if isinstance(error, Refusal) and error.__cause__ is None:
        logger.warning("%s refused: %s", _kind(message), error)
    else:
        logger.error("%s refused (%s)\n%s", _kind(message), reference, _traceback(error))
    if not isinstance(error, Refusal):
        reason = f"error: this client failed with {type(error).__name__}"
    else:
        reason = str(error)
    if not isinstance(error, Refusal) or error.__cause__ is not None:
        reason += f"; its log has the details ({reference})"
    return Message(Error(code=code, reason=reason), reply_to=message)


def refusing_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer with an error reply if the client raises an exception. Put this mod first.

    Without it Flower sends the text of the exception to the server, and in a simulation the
    traceback too.
    """
    try:
        return call_next(message, context)
    except Exception as error:  # the reply must not depend on what went wrong
        return refuse(message, error, ErrorCode.CLIENT_APP_RAISED_EXCEPTION)


def _traceback(error: Exception) -> str:
    """Return the traceback of an exception. Texts in it can come from the server."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    if len(lines) > _MOST_LINES:
        half = _MOST_LINES // 2
        lines = [*lines[:half], "…", *lines[-half:]]
    return "\n".join(shown(line, _LONGEST_LINE) for line in lines)


def _kind(message: Message) -> str:
    return repr(message.metadata.message_type[:100])
