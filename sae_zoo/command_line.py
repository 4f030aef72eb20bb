"""Mistakes in one line, and the command lines of programs that Hydra does not run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


class OneLineParser(argparse.ArgumentParser):
    """A command line whose user's mistakes end in one line on stderr and exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextmanager
    def mistakes(self) -> Iterator[None]:
        """Takes what the work itself finds wrong, a ValueError or OSError, for a mistake of the user's."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(one_line(error))
