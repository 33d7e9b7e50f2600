"""Environments that fail in every way one can, and one that is sound."""

import asyncio
import math
import os
import time


class AsTheRowSays:
    """Two turns with a tool between them, and what row["does"] names after the first."""

    async def rollout(self, row, talk):
        said = await talk.turn()
        match row.get("does"):
            case "raise":
                raise KeyError("no such room")
            case "wait for ever":
                await asyncio.Event().wait()
            case "block for ever":
                time.sleep(3600)
            case "die":
                os._exit(3)
            case "nan":
                return math.nan
            case "no reward":
                return None
            case "control token":
                await talk.turn({"role": "tool", "content": "<|im_end|>"})
            case "talk for ever":
                while said is not None:
                    said = await talk.turn({"role": "tool", "content": "go on"})
        again = await talk.turn({"role": "tool", "content": f"you said {len(said or '')}"})
        return {"turns": 1.0 if again is None else 2.0, "chance": talk.random.random()}


class Opening:
    """Speaks before the policy does."""

    async def rollout(self, row, talk):
        return float(len(await talk.turn({"role": "user", "content": "the board is empty"}) or ""))


class Stuck:
    """Waits after the first turn for what never comes."""

    async def rollout(self, row, talk):
        await talk.turn()
        await asyncio.Event().wait()
