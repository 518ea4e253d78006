"""The files that travel with every model. In a checkout they stand at its root, which is a model repository, too."""

from pathlib import Path

_root = Path(__file__).parents[2]
if (_root / "modeling_calm.py").is_file():
    __path__.append(str(_root))
