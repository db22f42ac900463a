"""What a client calls itself, the same in every run, unlike its node id."""

from flwr.app import ConfigRecord, Context, Message, MessageType

CLIENT = "client"
LABEL_ACTION = "label"
LABEL_QUERY = f"{MessageType.QUERY}.{LABEL_ACTION}"


def default_label(context: Context) -> str:
    """ "partition 0007" where the node has a partition id, else "node" and its id."""
    partition = context.node_config.get("partition-id")
    if partition is None:
        return f"node {context.node_id}"
    return f"partition {int(partition):04d}"


def label_record(label: str) -> ConfigRecord:
    """The record that carries `label` in a reply."""
    return ConfigRecord({"label": label})


def label_of(reply: Message) -> str | None:
    """The label that `reply` carries, if any."""
    if reply.has_error():
        return None
    record = reply.content.config_records.get(CLIENT)
    label = None if record is None else record.get("label")
    return label if isinstance(label, str) else None
