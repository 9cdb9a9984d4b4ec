from pathlib import Path as _P
if (_P(__file__).parent.parent/"pyproject.toml").is_file(): __path__.append(str(_P(__file__).parent.parent))
from ao_act24 import ops, autograd
from ao_act24.config import Act24Config
