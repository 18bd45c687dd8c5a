"""The boundary of drawn and given tokens: the ids that follow a turn of the policy when an environment answers it.

What the policy has drawn is never rendered or tokenised again. Without a chat template, and where a turn ended with a
stop string, the answer is plain text that the policy goes on from. Otherwise it is a message of its own: the chat
template renders a conversation whose assistant says a sentinel, and what stands behind the sentinel is given: the end
of the assistant's turn, unless the policy has drawn it, the answer with its markers, and the beginning of the next
turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from grpo_core.config.sections import DataConfig
from grpo_core.data.encoding import apply_chat_template, encode_continuations
from grpo_core.sampling.turns import TurnEnd
from grpo_core.schema import ConfigError, summarize_error

SENTINEL = "sentinel-of-a-turn"
PROBE = "probe-of-an-answer"
CALL_ID = "call00000"  # nine letters and digits, which some templates ask for
CHARACTERS = 8  # of a token; the beginning of a long text is looked at first
SLACK = 16  # tokens by which the last word of such a beginning may differ from the text's
Message = dict[str, Any]


class Boundary:
    """The given ids of answers. `role` is that of an answer's messages; `tool` becomes `user` where it is refused.

    Raises:
        ConfigError: the chat template cannot be split at the end of a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        eos_ids: Collection[int],
        role: Literal["user", "tool"] = "user",
    ) -> None:
        self.tokenizer, self.config, self.eos_ids = tokenizer, config, frozenset(eos_ids)
        self.forms = (
            [self._make_user] if role == "user" else [self._make_tool, self._make_tool_with_id, self._make_user]
        )
        self.make_messages = self._make_user
        self.end_id: int | None = None  # with which the template ends a turn of the assistant
        if config.prompt == "chat":
            self._find_form()
            self.end_id = self._find_end()

    def encode(self, answers: Sequence[str], turn: str, ended_by: TurnEnd, last_id: int) -> list[int]:
        """Return the given ids of an answer, one text or several, to a turn with the text `turn` and the last id.

        Raises:
            ConfigError: the chat template refuses the answer.
        """
        if self.config.prompt != "chat" or ended_by == "stop":
            return self._tokenize("".join(answers), turn)
        ids = self._tokenize(self._render_behind_turn(answers), turn)
        has_end = ended_by == "eos" and ids[:1] in ([last_id], [self.end_id])
        return ids[1:] if has_end else ids

    def count(self, text: str) -> int:
        """Return the number of tokens of an answer's text, without markers."""
        return len(self._tokenize_plainly(text))

    def shorten(self, text: str, limit: int) -> str:
        """Return a text, or the beginning alone of one that has more than `limit` tokens by far, which saves time."""
        beginning = text[: CHARACTERS * (limit + SLACK)]
        is_longer = len(beginning) < len(text) and self.count(beginning) > limit + SLACK
        return beginning if is_longer else text

    def cut(self, text: str, limit: int) -> str:
        """Return the first `limit` tokens of an answer's text."""
        ids = self._tokenize_plainly(text)
        if len(ids) <= limit:
            return text
        return self.tokenizer.decode(ids[:limit], skip_special_tokens=False).rstrip("\N{REPLACEMENT CHARACTER}")

    def _tokenize(self, text: str, before: str) -> list[int]:
        return list(encode_continuations(self.tokenizer, [before], [text])[0]) if text else []

    def _tokenize_plainly(self, text: str) -> list[int]:
        return self.tokenizer([text], add_special_tokens=False, return_attention_mask=False)["input_ids"][0]

    def _render_behind_turn(self, answers: Sequence[str]) -> str:
        """Return what the template puts behind a turn of the assistant that is answered."""
        turns: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}]
        try:
            text = apply_chat_template(self.tokenizer, [*turns, *self.make_messages(answers)], self.config)
        except Exception as error:  # the template is a program of the model's author, which may raise anything
            raise ConfigError(f"the model's chat template refuses an answer: {summarize_error(error)}") from None
        _, sentinel, behind = text.partition(SENTINEL)
        if not sentinel:
            raise ConfigError("the model's chat template leaves out the assistant's turn that an answer follows")
        return behind

    def _find_form(self) -> None:
        """Choose the first form of an answer's messages that the template renders."""
        problem: ConfigError | None = None
        for make_messages in self.forms:
            self.make_messages = make_messages
            try:
                if PROBE in self._render_behind_turn([PROBE]):
                    return
                problem = problem or ConfigError("the model's chat template leaves out an answer to a turn")
            except ConfigError as error:
                problem = problem or error
        raise ConfigError(
            f"{problem}; environments and tools need a template that goes on after the assistant's turn, so set "
            f"data.chat_template to another Jinja file, or data.prompt to template"
        )

    def _find_end(self) -> int | None:
        """Return the token that ends a turn of the assistant in the template, if it ends the last one with a token."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}]
        try:
            text = apply_chat_template(self.tokenizer, turns, self.config, add_generation_prompt=False)
        except Exception:  # it refuses to end a conversation there
            return None
        closing = self._tokenize(text.partition(SENTINEL)[2], SENTINEL)[:1]
        following = self._tokenize(self._render_behind_turn([PROBE]), SENTINEL)[:1]
        return following[0] if all(map(self._is_special, [*closing, *following])) and closing and following else None

    def _is_special(self, token: int) -> bool:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).get(token)
        return token in self.eos_ids or bool(added and added.special)

    @staticmethod
    def _make_user(answers: Sequence[str]) -> list[Message]:
        return [{"role": "user", "content": "\n".join(answers)}]

    @staticmethod
    def _make_tool(answers: Sequence[str]) -> list[Message]:
        return [{"role": "tool", "content": text} for text in answers]

    @staticmethod
    def _make_tool_with_id(answers: Sequence[str]) -> list[Message]:
        return [{"role": "tool", "content": text, "name": "tool", "tool_call_id": CALL_ID} for text in answers]
