"""The examples run as they stand; the demo's model is made smaller here."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(code, folder):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_quickstart(tmp_path):
    code = (EXAMPLES / "quickstart.py").read_text()
    small = code.replace("128, 4, 4, 128, 8, 300", "32, 2, 2, 32, 4, 3")
    assert small != code
    out = run(small, tmp_path)
    assert "2 of 2 FFN-like sites run in 2:4" in out and "ao_act24.sparse_mm" in out and "model output error" in out
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


def test_huggingface(tmp_path):
    assert "are those of its reference" in run((EXAMPLES / "huggingface.py").read_text(), tmp_path)
