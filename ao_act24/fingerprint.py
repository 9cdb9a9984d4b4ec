"""What compiled code depends on beyond the graph: our own sources."""

import hashlib
from functools import cache
from pathlib import Path

import ao_act24


@cache
def source_digest() -> str:
    """A hash of every source file of the package, kernels, gradients and fakes included.

    It names the nodes that the rewrite adds and is part of the pass's ``uuid``: torch's compile caches know nothing
    of a custom operator's Python gradient, and would run an old one after an upgrade.
    """
    digest = hashlib.sha256()
    roots = [Path(root) for root in ao_act24.__path__]
    packages = [roots[0], *(path for root in roots for path in (root / "passes", root / "kernels") if path.is_dir())]
    for package in packages:
        for path in sorted(package.rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                digest.update(path.relative_to(package.parent).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
