"""An environment with state: the policy guesses a number from 1 to 100, and hears whether it is higher or lower.

    python examples/guessing_game.py runs/guessing_game
    python -m grpo_core sft --config configs/experiments/guessing_game_sft.yaml
    python -m grpo_core train --config configs/experiments/guessing_game.yaml
    python -m grpo_core train --config configs/experiments/guessing_game_16.yaml

The first command plays a game and writes the data: numbers.jsonl, the 100 numbers, and random_guesses.jsonl, games for
the supervised start in which all guesses are random. docs/environments.md describes what an environment receives and
what it may return.
"""

import json
import math
import random
import sys
from pathlib import Path

from grpo_core import Reply, Turn

MOST = 100
MAX_GUESSES = 30
EXCLUDED_COST = 7.0  # of a guess that the answers have ruled out; no other costs more than 5.7


class GuessingGame:
    """One game. It remembers which numbers the answers have left.

    A guess among these numbers costs log2(1 + its distance from their middle). All others cost the same: if it depended
    on their distance, a ruled-out guess would be cheaper than a try at another first digit, and be guessed for ever.
    """

    def __init__(self, row: dict, seed: int):
        self.number = int(row["answer"])
        self.low, self.high = 1, MOST

    def step(self, turn: Turn) -> Reply:
        """Return "higher" or "lower" and the guess's reward; the game ends at the right guess."""
        text = turn.text.strip()
        if not (text.isascii() and text.isdigit()):
            return Reply("?\n", -8.0)
        guess = int(text)
        is_left = self.low <= guess <= self.high
        cost = math.log2(1 + abs(guess - (self.low + self.high) / 2)) if is_left else EXCLUDED_COST
        if guess == self.number:
            return Reply(None, -cost)
        if guess < self.number:
            self.low = max(self.low, guess + 1)
            return Reply("higher\n", -cost)
        self.high = min(self.high, guess - 1)
        return Reply("lower\n", -cost)


def write_rows(file: Path, rows: list[dict]) -> None:
    """Write rows as JSON Lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_random_game(draw: random.Random) -> str:
    """Return the text of a game whose guesses are random, whatever the answers are."""
    game, text = GuessingGame({"answer": draw.randint(1, MOST)}, 0), ""
    for number in range(MAX_GUESSES):
        guess = f"{draw.randint(1, MOST)}\n"
        reply = game.step(Turn(guess, text + guess, number, "stop"))
        text += guess + (reply.text or "")
        if reply.text is None:
            break
    return text


if __name__ == "__main__":
    game, low, high = GuessingGame({"answer": 37}, 0), 1, MOST
    for number in range(MAX_GUESSES):
        guess = str((low + high) // 2)
        reply = game.step(Turn(guess, guess, number, "stop"))
        print(guess, (reply.text or "right").strip())
        if reply.text is None:
            break
        low, high = (int(guess) + 1, high) if reply.text == "higher\n" else (low, int(guess) - 1)
    if len(sys.argv) > 1:
        folder, draw = Path(sys.argv[1]), random.Random(0)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "numbers.jsonl", [{"answer": number} for number in range(1, MOST + 1)])
        write_rows(folder / "random_guesses.jsonl", [{"answer": make_random_game(draw)} for _ in range(4000)])
