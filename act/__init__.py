"Find the channels that carry an ability of a language model, and move only those."

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

# what a builder meets -> the module that has it, imported when the name is first asked for
_HOMES = dict(
    load_model='loading',
    load_ability='sources',
    Ability='abilities',
    localize='localize',
    attribute='attribute',
    ChannelScores='scores',
    top_p='masks',
    ChannelMask='masks',
    random_mask='masks',
    transfer='transfer',
    finetune='finetune',
    evaluate='evaluate',
)
__all__ = list(_HOMES)


class _Package(ModuleType):
    def __getattr__(self, name):
        if name not in _HOMES:
            raise AttributeError(f"module 'act' has no attribute {name!r}")
        value = getattr(importlib.import_module(f'act.{_HOMES[name]}'), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name, value):
        # a stage has the name of its module: `act.localize` is the function, whichever of the two was imported first
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self):
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
