"""What the tests of fp8 on a CPU share: whether torchao's own dense FFNs run there."""

import pytest
import torch


def _by_rows() -> bool:
    one = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1)
    try:
        torch._scaled_mm(one, one.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


needs_scaled_mm = pytest.mark.skipif(not _by_rows(), reason="this torch has no _scaled_mm by rows on a CPU (2.11)")
