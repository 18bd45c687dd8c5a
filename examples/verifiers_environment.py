"""An adapter: train on an environment of the library verifiers (0.1.14), whose own loop and rubric run unchanged.

The rows of an environment are written by
    python examples/verifiers_environment.py my_game > my_rows.jsonl
"""

import asyncio
import json
import sys
from functools import cache
from unittest.mock import patch

import verifiers
from verifiers import clients, types

from grpo_core import Reply, Turn

load = cache(patch("signal.signal", lambda *args: None)(verifiers.load_environment))  # signals are the trainer's


class Verifiers(clients.Client):  # also a model, whose requests wait until the policy has drawn the turn
    setup_client = to_native_tool = to_native_prompt = get_native_response = None
    raise_from_native_response = from_native_response = None

    def __init__(self, row: dict, seed: int, *, name: str = ""):
        self.name, self.row, self.rollout = name, json.loads(row["row"]), None
        self.requests, self.turns = asyncio.Queue(), asyncio.Queue()

    async def step(self, turn: Turn) -> Reply:
        if self.rollout is None:
            self.rollout = asyncio.create_task(load(self.name).rollout(self.row, self, "policy"))
            self.seen = await self.next_request()  # the prompt, to which the turn is the reply
        self.turns.put_nowait(turn)
        seen, self.seen = len(self.seen) + 1, await self.next_request()
        if self.seen is not None and turn.ended_by != "limit":
            return Reply("\n".join(str(message.content) for message in self.seen[seen:]))
        self.turns.put_nowait(None)  # ends a loop that asks for another turn
        if error := (state := await self.rollout)["error"]:
            raise error
        await load(self.name).rubric.score_rollout(state)
        return Reply(None, state["reward"])

    async def next_request(self):  # the messages to which the policy is to reply; None after the end of the loop
        request = asyncio.create_task(self.requests.get())
        await asyncio.wait({request, self.rollout}, return_when=asyncio.FIRST_COMPLETED)
        return await request if request.done() else request.cancel() and None

    async def get_response(self, prompt, *args, **kwargs):
        self.requests.put_nowait(prompt)
        if (turn := await self.turns.get()) is None:
            raise verifiers.OverlongPromptError("the completion has no room for another turn")
        message = types.ResponseMessage(content=turn.text, finish_reason="stop", is_truncated=turn.ended_by == "limit")
        return types.Response(id="", created=0, model="policy", message=message)

    async def close(self):
        return self.rollout and self.rollout.cancel()


for row in load(sys.argv[1]).get_dataset() if __name__ == "__main__" else ():
    print(json.dumps({"messages": row["prompt"], "row": json.dumps(row)}))
