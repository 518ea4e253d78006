"""Package of the modules that travel with every model, such as `calm_transformers.model.modeling_calm`.

An installation has them in this folder. A checkout has only this file here and the modules at its root, which is a
model repository, too; `__path__` is extended by that root, so that the same imports find them there.
"""

from pathlib import Path

_root = Path(__file__).parents[2]
if (_root / "modeling_calm.py").is_file():
    __path__.append(str(_root))
