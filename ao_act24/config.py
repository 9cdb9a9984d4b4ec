"""The one set of options, taken by every way in."""

from dataclasses import dataclass


def checked(config: object) -> "Act24Config":
    """``config``, or the default for None."""
    if config is None:
        return Act24Config()
    if not isinstance(config, Act24Config):
        raise TypeError(f"config must be an Act24Config, got {config!r}")
    return config


@dataclass(frozen=True)
class Act24Config:
    """Options of the rewrite.

    Attributes:
        emulate: run 2:4 also where it has no fast kernel (through the reference implementation, which computes what a
            kernel would), where it is slower than dense, and in training: for studying accuracy, not for speed. The
            CPU always runs the reference.
    """

    emulate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.emulate, bool):
            raise TypeError(f"emulate must be True or False, got {self.emulate!r}")
