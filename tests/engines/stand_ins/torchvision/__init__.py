"""A stand-in for torchvision, whose CPU build for this torch is not on PyPI: names that are imported, never called.

SGLang and transformers import them for models that see pictures; a text model uses none.
"""

import importlib.machinery
import sys
import types

__version__ = "0.28.0"


class _Name(type):
    """A class that any attribute can be read from, such as InterpolationMode.BICUBIC."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


for _name in ("io", "ops", "ops.boxes", "transforms", "transforms.functional", "transforms.v2"):
    _module = _Module(f"{__name__}.{_name}")
    _module.__spec__ = importlib.machinery.ModuleSpec(_module.__name__, None, is_package=True)
    sys.modules[_module.__name__] = _module
    _parent, _, _leaf = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _leaf, _module)
sys.modules[f"{__name__}.transforms.v2.functional"] = _Module(f"{__name__}.transforms.v2.functional")
