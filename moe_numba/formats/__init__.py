"""Weight formats: what the bytes of a stored weight mean. One file each.

A new format is a file here, its name in `config.DTYPES`, and products for its storage dtype in simd/products.py and
simd/outer.py.
"""

from .bfloat16 import BFLOAT16
from .float32 import FLOAT32
from .format import Format

#: Every format by its name in a config.
FORMATS: dict[str, Format] = {format_.name: format_ for format_ in (FLOAT32, BFLOAT16)}
