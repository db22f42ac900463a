"""Log an error on the client, and build the error reply to the server."""

import logging

from flwr.app import Error, Message

from flower_adapter._flwr import ErrorCode

# Flower's own logger, so that the lines appear in the client's log.
logger = logging.getLogger("flwr")


def refuse(
    message: Message, error: Exception, code: int = ErrorCode.MOD_FAILED_PRECONDITION
) -> Message:
    """Log `error` with its traceback. Return an error reply with the class and text of `error`."""
    logger.error("%s refused", message.metadata.message_type, exc_info=error)
    return Message(Error(code=code, reason=f"{type(error).__name__}: {error}"), reply_to=message)
