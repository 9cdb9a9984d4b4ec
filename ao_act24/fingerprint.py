"""What compiled code depends on beyond the graph: our own sources."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def source_digest() -> str:
    """A hash of every source file of the package, kernels, gradients and fakes included.

    It names the nodes that the rewrite adds and is part of the pass's ``uuid``: torch's compile caches know nothing
    of a custom operator's Python gradient, and would run an old one after an upgrade.
    """
    from ao_act24 import kernels, passes  # which import this module

    digest = hashlib.sha256()
    # not ao_act24.__path__: above a clone that is a folder of our name, with nothing in it
    for package in [Path(str(file)).parent for file in (__file__, kernels.__file__, passes.__file__)]:
        for path in sorted(package.rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                digest.update(path.relative_to(package.parent).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
