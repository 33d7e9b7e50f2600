"""The idle flow with a typed config in every task, as a step that calls a program needs it."""

from idle_flow import OWN, IdleFlow, main


class TypedFlow(IdleFlow):
    """The chain of idle_flow.py."""

    def read(self):
        self.seed = self.cfg.seed


if __name__ == "__main__":
    main(TypedFlow, config=OWN)
