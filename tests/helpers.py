"What several test files use: the commands of the package, masks of a model, the bytes of a folder."

import configparser
import importlib
import shlex
import torch
from act.abilities import Ability, Item
from act.kit.command import check_given
from act.sources import load_ability
from act.channels import enumerate_channels
from act.finetune import finetune
from act.masks import ChannelMask, random_mask

# ---- items

TOY = Ability(
    'toy-en',
    [
        Item('two plus two is', ' four'),
        Item('cuatro y', ' cuatro son ocho'),
        Item('x', 'y'),
        Item('q 二加二', '等于四'),
    ],
)

# ---- commands

SETTINGS = configparser.ConfigParser(delimiters=['='])
SETTINGS.read('settings.ini')
SCRIPTS = dict(line.split('=') for line in SETTINGS['DEFAULT']['console_scripts'].split('\n'))
LM_EVAL = SCRIPTS.pop('act_lm_eval')  # has lm-eval's options; see test_neighbours


def function(name):
    "The function behind a command."
    module, entry = SCRIPTS[name].split(':')
    assert entry == f'{name}.main'
    return getattr(importlib.import_module(module), name)


def check_call(line):
    "A whole command line of ours: known options alone, and all that are required."
    name, *args = shlex.split(line)
    options, extra = function(name).parser().parse_known_args(args)
    assert not extra, line
    check_given(function(name), vars(options))


# ---- masks


def full(model, tied='embedding'):
    "A mask of all channels."
    channels = enumerate_channels(model, tied)
    return ChannelMask.from_flat(torch.ones(channels.total, dtype=torch.bool), channels)


def some(model, seed=0, p=0.3):
    "A random mask of a share of all channels."
    every = full(model)
    first = ChannelMask.from_flat(torch.arange(every.total) < p * every.total, every.map)
    return random_mask(first, seed)


# ---- files


def files(folder):
    "The bytes of the weights in a folder."
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.endswith(('.safetensors', '.index.json'))}


# ---- fine-tuning in every way that changes what is learned

HARD = dict(
    plain={},
    lora=dict(lora=dict(r=2, target_modules='all-linear')),
    masked=dict(mask=True),
    stopped=dict(validation=True, eval_steps=2, patience=2, lr=2e-3),
)


def hard(model, tok, mask, kind, **kw):
    "Fine-tune a model of the lab in one of the ways of HARD."
    kw = {**HARD[kind], **kw}
    if kw.pop('mask', 0):
        kw['mask'] = mask
    if kw.pop('validation', 0):
        kw['validation'] = load_ability('lab/science-zh', 'validation', 16)
    options = dict(steps=8, batch_size=4, progress=False)
    return finetune(model, load_ability('lab/science-zh', 'sft', 24), tok, **{**options, **kw})
