"""What the client's side of this package does with Flower's messages in more than one place."""

import logging

from flwr.app import ConfigRecord, Error, Message
from flwr.common.constant import ErrorCode

_logger = logging.getLogger("flwr")


def config_of(message: Message) -> ConfigRecord:
    """The config that the server sent along; an empty one if it sent none."""
    return next(iter(message.content.config_records.values()), ConfigRecord())


def error_for(error: Exception, code: int = ErrorCode.MOD_FAILED_PRECONDITION) -> Error:
    """An exception as Flower sends it: its class and its text."""
    return Error(code=code, reason=f"{type(error).__name__}: {error}")


def refusal(message: Message, error: Exception) -> Message:
    """An error reply with the class and the text of `error`, which is logged too."""
    answer = error_for(error)
    _logger.error("%s refused: %s", message.metadata.message_type, answer.reason)
    return Message(answer, reply_to=message)
