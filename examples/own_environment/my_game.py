"""An environment of your own: the policy and the game take turns until the game is over.

Named in config.yaml as my_game:Hangman. A row brings what the game needs; tokens of the game are read and not trained.
"""

MOST_TURNS = 6


class Hangman:
    """Guess the digits of a secret number, one a turn."""

    async def rollout(self, row: dict, talk) -> dict[str, float]:
        """One game; its reward is the sum of the parts."""
        secret, seen = row["secret"], set()
        message = []  # the row's own messages open the game
        for turn in range(MOST_TURNS):
            said = await talk.turn(*message)
            if said is None:  # no tokens are left, or the last turn was cut
                break
            seen |= set(said.strip()[:1])
            if set(secret) <= seen:
                return {"found": 1.0, "haste": 0.05 * (MOST_TURNS - 1 - turn)}
            message = [{"role": "user", "content": _shown(secret, seen)}]
        return {"found": len(set(secret) & seen) / len(set(secret)) - 0.5, "haste": 0.0}


def prompts(seed: int) -> list[dict]:
    """Games; `messages` opens one, `secret` is for the environment alone."""
    return [_game(f"{(seed + number * 37) % 1000:03d}", number) for number in range(64)]


def held_out(seed: int) -> list[dict]:
    """Games that training does not play."""
    return [_game(f"{number * 91 % 1000:03d}", number + 1000) for number in range(8)]


def demonstrations(seed: int) -> list[dict]:
    """Games played from the lowest digit up: how a turn looks."""
    return [_played(game) for game in prompts(seed + 1)]


def _game(secret: str, number: int) -> dict:
    opening = {"role": "user", "content": f"game {number}: {_shown(secret, set())}"}
    return {"messages": [opening], "secret": secret}


def _played(game: dict) -> dict:
    said, seen = list(game["messages"]), set()
    for digit in sorted(set(game["secret"])):
        if seen:
            said.append({"role": "user", "content": _shown(game["secret"], seen)})
        said.append({"role": "assistant", "content": digit})
        seen.add(digit)
    return {"messages": said}


def _shown(secret: str, seen: set[str]) -> str:
    return "".join(digit if digit in seen else "?" for digit in secret)
