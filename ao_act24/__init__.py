"""Linear → ReLU² → Linear in 2:4 activation sparsity, as a plugin for ``torch.compile``.

model = torch.compile(model, backend="ao_act24")     # a backend; nothing to import
ao_act24.sparsify_(model)                             # or in place, for eager use and any other backend
print(ao_act24.explain(model, *inputs))               # what is rewritten, what is not, and why
print(ao_act24.measure(model, *inputs))               # what it does to the model's numbers
schedule = ao_act24.Schedule()                        # training: dense for the first steps, then 2:4
"""

from pathlib import Path

import torch

_SUPPORTED = ((2, 11), (2, 14))
_version = tuple(int(part) for part in torch.__version__.split(".")[:2])
if not _SUPPORTED[0] <= _version < _SUPPORTED[1]:
    raise ImportError(f"ao_act24 supports torch >= 2.11 and < 2.14, got torch {torch.__version__}")

# In a source tree passes/ and kernels/ lie beside this package; installed, they lie in it.
_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels" / "layout.py").is_file():
    __path__.append(str(_root))

from ao_act24 import autograd, ops, ops_fp8  # noqa: E402
from ao_act24.backend import Act24Backend, Act24Pass  # noqa: E402
from ao_act24.config import Act24Config  # noqa: E402
from ao_act24.explain import explain  # noqa: E402
from ao_act24.graphs import CapturedGraphs, capture_graphs  # noqa: E402
from ao_act24.measure import Layer, Measurement, measure  # noqa: E402
from ao_act24.neuron_major import neuron_major_  # noqa: E402
from ao_act24.passes import Act24Warning, Report, Verdict  # noqa: E402
from ao_act24.phases import Schedule  # noqa: E402
from ao_act24.tensor import Sparse24Tensor  # noqa: E402
from ao_act24.transform import sparsify_, unsparsify_  # noqa: E402

__all__ = [
    "Act24Backend",
    "Act24Config",
    "Act24Pass",
    "Act24Warning",
    "CapturedGraphs",
    "Layer",
    "Measurement",
    "Report",
    "Schedule",
    "Sparse24Tensor",
    "Verdict",
    "autograd",
    "capture_graphs",
    "explain",
    "measure",
    "neuron_major_",
    "ops",
    "ops_fp8",
    "sparsify_",
    "unsparsify_",
]
