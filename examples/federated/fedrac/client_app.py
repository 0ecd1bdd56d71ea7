"""Flower's side of a client: passes the question to the node's trainer."""

from __future__ import annotations

from multiprocessing.connection import Client

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedrac.wire import NotOursError, Question, pack, unpack

REFUSED = 100  # the error code of an answer without factors; Flower's are below

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    try:
        question = unpack(Question, message.content)
        with Client(context.node_config["trainer"], "AF_UNIX") as trainer:
            trainer.send((question, message.metadata.run_id))
            answer = trainer.recv()
    except (NotOursError, EOFError, OSError) as error:
        answer = f"{type(error).__name__}: {error}"
    if isinstance(answer, str):
        return Message(Error(REFUSED, answer), reply_to=message)
    return Message(pack(answer), reply_to=message)
