"""Broken and hostile files: sound files of every kind, changed at random in their bytes, their JSON or their tensors.

`KINDS` is the table: a kind is a way to make sound files, the changes that suit its format, and a parser with what must
hold for everything it accepts. `attempt` gives one file to its parser.
"""

import contextlib, copy, json, random, shutil, struct, sys, time
from collections import namedtuple
from itertools import product
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from act.abilities import Ability, Item, read_jsonl
from act.channels import ChannelMap, ModuleChannels, table_row
from act.checkpoints import Checkpoint
from act.fingerprints import fingerprint
from act.pairs import check_finite
from act.kit.errors import PACKAGE, ActError
from act.kit.records import read_json, write_json
from act.apply import apply_delta
from act.deltas import Delta, make_delta
from act.masks import ChannelMask
from act.scores import ChannelScores
from act.transfer import mask_slices

# JSON that `json` would not write: literals, a key twice


class Raw(str):
    "Text that is written as it is."


class Pairs(tuple):
    "An object as (key, value) pairs: a key may come twice."


def text(o):
    "JSON of a tree with `Raw` and `Pairs` in it."
    if isinstance(o, Raw):
        return str(o)
    if isinstance(o, dict):
        o = Pairs(o.items())
    if isinstance(o, Pairs):
        return '{' + ', '.join(f'{json.dumps(k)}: {text(v)}' for k, v in o) + '}'
    return '[' + ', '.join(map(text, o)) + ']' if isinstance(o, list) else json.dumps(o)


def nested(n, pair='[]'):
    return Raw(pair[0] * n + pair[1] * n)


HOSTILE = [
    Raw('NaN'),
    Raw('Infinity'),
    Raw('-Infinity'),
    Raw('1e999'),
    Raw('9' * 5000),
    Raw('-0'),
    Raw('1e-999'),
    Raw('nul'),
    Raw('1,'),
    Raw('[' * 100_000),
    Raw('{"a":' * 100_000),
    *(nested(n) for n in (2, 50, 150, 900, 950, 980, 1000, 100_000)),
    0,
    1,
    -1,
    2,
    255,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**4000,
    0.5,
    1.0,
    -1.5,
    1e300,
    True,
    False,
    None,
    [],
    {},
    [[]],
    [0],
    [0, 0],
    [1, 2, 3],
    [None],
    ['a', 'b'],
    [['a', 0]],
    {'a': 1},
    '',
    ' ',
    'a',
    '0',
    '1',
    '\0',
    'a\0b',
    '\n',
    '\u2028',
    '\x85',
    '\x1b[2J',
    '\ud800',
    '\udfff\ud800',
    '\U0001f600',
    'ключ',
    '٣',
    '..',
    '../../etc/passwd',
    '/etc/passwd',
    '..\\..\\x',
    'C:\\x',
    'file:///etc/passwd',
    '~/x',
    'a' * 300,
    'a' * 100_000,
    '<script>alert(1)</script>',
    'F32',
    'F16',
    'BF16',
    'F64',
    'I64',
    'U8',
    'BOOL',
    'F8_E4M3',
    'F4',
    'f32',
    'embedding',
    'lm_head',
    'norm',
    'model.embed_tokens',
    'lm_head.weight',
    'model.layers.0.mlp.up_proj',
    'model.layers.٣.mlp.up_proj',
    'model.layers.00.mlp.up_proj',
    f'model.layers.{"9" * 4000}.mlp.up_proj',
    '__metadata__',
    'act-mask-1',
    'act-scores-1',
]
SHARDS = [
    '../outside.safetensors',
    '../../etc/passwd',
    '/etc/passwd',
    './model-1.safetensors',
    'sub/../model-1.safetensors',
    '..\\outside.safetensors',
    'C:\\x.safetensors',
    'model-1.safetensors\0',
    '\0.safetensors',
    'a\0/../model-1.safetensors',
    'a' * 300 + '.safetensors',
    'a' * 10_000 + '.safetensors',
    '.safetensors',
    '..safetensors',
    '...safetensors',
    '',
    '.',
    '..',
    '/',
    'model-1.safetensors/',
    'model-1.SAFETENSORS',
    'model-1.bin',
    'pytorch_model.bin',
    'model-2.safetensors',
    'absent.safetensors',
    'model-1.safetensors\n',
    '~/x.safetensors',
    '\ud800.safetensors',
    '模型.safetensors',
    '%2e%2e/x.safetensors',
    'con.safetensors',
    'folder.safetensors',
    None,
    3,
    True,
    1.5,
    [],
    ['model-1.safetensors'],
    {},
    {'a': 1},
]

# Changes of a tree


def hostile(rng):
    return copy.deepcopy(rng.choice(HOSTILE))


def hostile_key(rng):
    return rng.choice([h for h in HOSTILE if type(h) is str])


def places(o, parent=None, key=None):
    "(container, key) of every value in a tree, the root left out."
    if parent is not None:
        yield parent, key
    for k, v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ():
        yield from places(v, o, k)


def near(rng, v):
    "A value of the same type that is a little different."
    if isinstance(v, bool):
        return not v
    if isinstance(v, int):
        return rng.choice(
            [v + 1, v - 1, -v, 2 * v, v + 8, v + 0.5 if abs(v) < 2**60 else -1, float(min(v, 2**60)), bool(v), str(v)]
        )
    if isinstance(v, str):
        return rng.choice(
            [
                v[:-1],
                v + 'x',
                v.upper(),
                v[::-1],
                v + '\0',
                v.replace('.', '/'),
                v.replace('0', '1'),
                v.replace('q', 'k'),
            ]
        )
    if isinstance(v, list):
        return rng.choice([v + v[-1:], v[::-1], v[1:], [v], tuple(v) and v[0] if v else v])
    if isinstance(v, dict):
        return rng.choice([list(v), list(v.values()), [v], {k: v[k] for k in reversed(v)}])
    return rng.choice(['null', 0])


def change_tree(rng, tree):
    "One to three changes at random places."
    root = [tree]
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, key = rng.choice(list(places(root)))
        kind = rng.choice(['hostile', 'hostile', 'near', 'near', 'swap', 'drop', 'add', 'key', 'twice'])
        if kind == 'hostile':
            at[key] = hostile(rng)
        elif kind == 'near':
            at[key] = near(rng, at[key])
        elif kind == 'swap':
            to, k = rng.choice(list(places(root)))
            at[key] = copy.deepcopy(to[k])
        elif kind == 'drop' and at is not root:
            del at[key]
        elif kind == 'add' and isinstance(at[key], list):
            at[key] = at[key] + [hostile(rng)]
        elif kind == 'add' and isinstance(at[key], dict):
            at[key] = {**at[key], hostile_key(rng): rng.choice([hostile(rng), *at[key].values()])}
        elif kind == 'key' and isinstance(at, dict):
            at[rng.choice([near(rng, key), hostile_key(rng)])] = at.pop(key)
        elif kind == 'twice' and isinstance(at[key], dict) and at[key]:
            pairs = [*at[key].items()]
            at[key] = Pairs([*pairs, (rng.choice(pairs)[0], rng.choice([hostile(rng), *at[key].values()]))])
    return root[0]


def as_bytes(o):
    return text(o).encode('utf-8', 'surrogatepass')


def change_json(rng, raw, other):
    return as_bytes(change_tree(rng, json.loads(raw)))


def change_line(rng, raw, other):
    lines = raw.decode().split('\n')
    i = rng.choice([i for i, l in enumerate(lines) if l.strip()])
    lines[i] = text(change_tree(rng, json.loads(lines[i])))
    return '\n'.join(lines).encode('utf-8', 'surrogatepass')


def change_shards(rng, raw, other):
    d = json.loads(raw)
    for k in rng.sample(list(d['weight_map']), rng.choice([1, 1, 2, len(d['weight_map'])])):
        d['weight_map'][k] = copy.deepcopy(rng.choice(SHARDS))
    if rng.random() < 0.1:
        d['weight_map'] = rng.choice(
            [list(d['weight_map'].values()), list(d['weight_map'].items()), rng.choice(SHARDS)]
        )
    return as_bytes(d)


# Changes of bytes


def flip(rng, raw, other):
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if raw:
            raw[rng.randrange(min(len(raw), rng.choice([16, 200, len(raw)])))] ^= rng.choice(
                [1, 2, 128, 255, rng.randrange(1, 256)]
            )
    return bytes(raw)


def cut(rng, raw, other):
    a = rng.randrange(len(raw) + 1)
    return rng.choice(
        [raw[:a], raw[a:], raw[:a] + raw[rng.randrange(a, len(raw) + 1) :], raw[: rng.choice([0, 1, 7, 8, 9, 10])]]
    )


def insert(rng, raw, other):
    a, n = rng.randrange(len(raw) + 1), rng.choice([1, 1, 8, 100, 10_000])
    return (
        raw[:a]
        + rng.choice(
            [
                bytes(n),
                b'\xff' * n,
                rng.randbytes(n),
                b'[' * n,
                b'"' * n,
                b' ' * n,
                raw[a : a + n],
                b'\xef\xbb\xbf',
                b'\x80\x04K\x01.',
            ]
        )
        + raw[rng.choice([a, min(len(raw), a + n)]) :]
    )


def splice(rng, raw, other):
    return rng.choice(
        [raw[: rng.randrange(len(raw) + 1)] + other[rng.randrange(len(other) + 1) :], raw + other, other + raw]
    )


def recode(rng, raw, other):
    return raw.decode('utf-8', 'replace').encode(
        rng.choice(['utf-16', 'utf-16-le', 'utf-32', 'utf-8-sig', 'latin-1', 'utf-7']), 'replace'
    )


# Changes of a safetensors file


def taken_apart(raw):
    "(header, body) of a sound file."
    n = struct.unpack('<Q', raw[:8])[0]
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def put_together(head, body, pad=0):
    head = (head if isinstance(head, bytes) else as_bytes(head)) + b' ' * pad
    return struct.pack('<Q', len(head)) + head + body


def change_length(rng, raw, other):
    n = struct.unpack('<Q', raw[:8])[0]
    return (
        struct.pack(
            '<Q',
            rng.choice(
                [
                    0,
                    1,
                    2,
                    n - 1,
                    n + 1,
                    n - 8,
                    n + 8,
                    len(raw),
                    len(raw) - 8,
                    2 * n,
                    100_000_000,
                    100_000_001,
                    2**31,
                    2**32,
                    2**63 - 1,
                    2**63,
                    2**64 - 1,
                    rng.randrange(2**64),
                ]
            ),
        )
        + raw[8:]
    )


def change_header(rng, raw, other):
    head, body = taken_apart(raw)
    return put_together(change_tree(rng, head), body, rng.choice([0, 0, 1, 3]))


def change_metadata(rng, raw, other):
    "A change inside the JSON texts that the metadata hold."
    head, body = taken_apart(raw)
    m = head['__metadata__']
    k = rng.choice([k for k, v in m.items() if v[:1] in '{['])
    m[k] = text(change_tree(rng, json.loads(m[k])))
    return put_together(head, body)


def swap_parts(rng, raw, other):
    (a, x), (b, y) = taken_apart(raw), taken_apart(other)
    if rng.random() < 0.5:
        return put_together(a, y)
    a['__metadata__'] = b['__metadata__']
    return put_together(a, x)


SIZES = dict(F64=8, F32=4, F16=2, BF16=2, U8=1, BOOL=1, I8=1, I16=2, I32=4, I64=8, F8_E4M3=1, F8_E5M2=1)
VALUES = [
    b'\x02',
    b'\xff',
    struct.pack('<f', float('nan')),
    struct.pack('<f', float('inf')),
    struct.pack('<f', -1.0),
    struct.pack('<f', 3e38),
    b'\x80\x7f',
    b'\xc0\x7f',
    b'\x01\x00\x00\x80',
    struct.pack('<d', float('nan')),
]


def change_tensors(rng, raw, other):
    "Types, shapes, offsets, names and values of tensors; the file is otherwise sound."
    head, body = taken_apart(raw)
    parts = {
        k: [t['dtype'], t['shape'], body[slice(*t['data_offsets'])]] for k, t in head.items() if k != '__metadata__'
    }
    k = rng.choice(list(parts))
    kind = rng.choice(
        [
            'type',
            'recast',
            'shape',
            'grow',
            'empty',
            'extra',
            'missing',
            'rename',
            'values',
            'values',
            'order',
            'overlap',
            'gap',
            'reversed',
            'behind',
            'tail',
        ]
    )
    if kind == 'type':
        parts[k][0] = rng.choice(list(SIZES))
    if kind == 'recast':
        parts[k][0] = rng.choice(list(SIZES))
        parts[k][2] = bytes(SIZES[parts[k][0]] * max(1, torch.Size(parts[k][1]).numel()))
    if kind == 'shape':
        n = torch.Size(parts[k][1]).numel()
        parts[k][1] = rng.choice(
            [
                [n, 1],
                [1, n],
                [1] * 60 + [n],
                [1] * 70 + [n],
                [n // 2, 2],
                [n, 1, -1],
                [2**32, 2**32, n],
                [2**64, n],
                [0, n],
                [n, 2**62, 0],
                [-n, -1],
                [float(n)],
                [True] * n if n < 9 else [True, n],
                str(n),
                n,
            ]
        )
    if kind == 'grow':
        parts[k][1], parts[k][2] = (
            [parts[k][1][0] + 1, *parts[k][1][1:]] if parts[k][1] else [2],
            parts[k][2] + parts[k][2][: max(1, len(parts[k][2]) // max(1, (parts[k][1] or [1])[0]))],
        )
    if kind == 'empty':
        parts[k][1:] = rng.choice([[[0], b''], [[0, 2**40], b''], [[], parts[k][2][: SIZES[parts[k][0]]]]])
    if kind == 'extra':
        parts[rng.choice([hostile_key(rng), *taken_apart(other)[0]])] = list(parts[k])
    if kind == 'missing':
        del parts[k]
    if kind == 'rename':
        parts[near(rng, k)] = parts.pop(k)
    if kind == 'values' and len(parts[k][2]) > 8:
        v, i = rng.choice(VALUES), rng.randrange(len(parts[k][2]) // 8) * 8
        parts[k][2] = (parts[k][2][:i] + v + parts[k][2][i + len(v) :])[: len(parts[k][2])]
    if kind == 'order':
        parts = dict(rng.sample(list(parts.items()), len(parts)))
    out, new = {'__metadata__': head['__metadata__']} if '__metadata__' in head else {}, b''
    for n, (dtype, shape, data) in parts.items():
        out[n] = dict(dtype=dtype, shape=shape, data_offsets=[len(new), len(new) + len(data)])
        new += data
    if k in parts:
        a, b = out[k]['data_offsets']
        if kind == 'overlap':
            out[k]['data_offsets'] = rng.choice(
                [[0, b - a], [max(0, a - 4), max(0, a - 4) + b - a], out[rng.choice(list(parts))]['data_offsets']]
            )
        if kind == 'gap':
            new, out = (
                new[:a] + bytes(8) + new[a:],
                {
                    n: (
                        t
                        if n == '__metadata__' or t['data_offsets'][0] < a
                        else dict(t, data_offsets=[x + 8 for x in t['data_offsets']])
                    )
                    for n, t in out.items()
                },
            )
        if kind == 'reversed':
            out[k]['data_offsets'] = [b, a]
        if kind == 'behind':
            out[k]['data_offsets'] = [x + len(new) for x in (a, b)]
    if kind == 'tail':
        new += rng.choice([b'\0', bytes(100), raw])
    return put_together(out, new, rng.choice([0, 0, 1]))


def change_both(rng, raw, other):
    "A change of the map that the tensors follow, so that the two still agree."
    head, body = taken_apart(raw)
    d = json.loads(head['__metadata__']['map'])
    parts = {m['path']: body[slice(*head[m['path']]['data_offsets'])] for m in d['modules']}
    dtype, size = head[d['modules'][0]['path']]['dtype'], len(body) // sum(m['width'] for m in d['modules'])
    kind = rng.choice(['drop', 'none', 'twin', 'path', 'path', 'width', 'params', 'tied', 'order'])
    m = rng.choice(d['modules'])
    if kind == 'drop':
        d['modules'] = rng.sample(d['modules'], rng.randrange(len(d['modules']) + 1))
    if kind == 'none':
        d['modules'] = []
    if kind == 'twin':
        path, k, params = rng.choice(
            [
                ('lm_head', 'lm_head', [['model.embed_tokens.weight', 0]]),
                ('lm_head', 'lm_head', [['lm_head.weight', 0]]),
                ('model.embed_tokens', 'embedding', [['model.embed_tokens.weight', 1]]),
                ('model.layers.9.mlp.up_proj', 'up', [['model.norm.weight', 0]]),
                (m['path'], m['kind'], [[m['path'] + '.bias', 0]]),
            ]
        )
        d['modules'] = d['modules'] + [
            dict(
                path=path,
                kind=k,
                layer=9 if '.9.' in path else None if k in ('lm_head', 'embedding') else m['layer'],
                width=m['width'],
                params=params,
            )
        ]
    if kind == 'path':
        new = rng.choice(
            [
                near(rng, m['path']),
                hostile_key(rng),
                *(f'model.layers.{i}.mlp.up_proj' for i in ('7', '007', '٧', '99999', '100000', '7' * 25, '-7', '7.0')),
            ]
        )
        d['modules'] = [
            *(o for o in d['modules'] if o is not m),
            dict(
                m,
                path=new,
                kind='up',
                layer=(
                    7
                    if '7' in new and len(new) < 40
                    else (
                        int(new.split('.')[2])
                        if new.startswith('model.layers.') and new.split('.')[2].isdigit() and len(new) < 100
                        else m['layer']
                    )
                ),
                params=[[new + '.weight', 0]],
            ),
        ]
    if kind == 'width':
        m['width'] = rng.choice(
            [0, 1, m['width'] + 1, True, float(m['width']), str(m['width']), -1, None, [m['width']]]
        )
    if kind == 'params':
        m['params'] = rng.choice(
            [
                [],
                m['params'] * 2,
                [[n, bool(a)] for n, a in m['params']],
                [[n, float(a)] for n, a in m['params']],
                [[n, a + 1] for n, a in m['params']],
                [[n, -1] for n, a in m['params']],
                [[n] for n, _ in m['params']],
                dict(m['params']),
                [[n + 'x', a] for n, a in m['params']],
                [[m['path'] + '.bias', 0]],
            ]
        )
    if kind == 'tied':
        d['tied'] = rng.choice([None, 'embedding', 'lm_head', True, '', [], {}, 'both'])
    if kind == 'order':
        d['modules'] = rng.sample(d['modules'], len(d['modules']))
    new, out = b'', {'__metadata__': dict(head['__metadata__'], map=json.dumps(d))}
    for o in d['modules']:
        if o['path'] in out:
            continue
        w = max(0, int(o['width'])) if isinstance(o['width'], (int, float, str)) else 1
        out[o['path']] = dict(dtype=dtype, shape=[w], data_offsets=[len(new), len(new) + w * size])
        new += (parts.get(o['path'], b'') + bytes(w * size))[: w * size]
    return put_together(out, new)


BYTES = dict(flip=flip, cut=cut, insert=insert, splice=splice)
TENSORS = dict(BYTES, length=change_length, header=change_header, tensors=change_tensors, parts=swap_parts)

# The kinds

Kind = namedtuple(
    'Kind',
    'name make changes parse',
    # file name; make(folder) puts all that belongs together there and returns a list of sound files as bytes; changes
    # by name; parse(path) checks what it reads
)


def channel_map(tied='embedding', layers=2):
    "The map of a small model; with biases, as Qwen2 has them."
    width = dict(embedding=8, norm=8, q=8, k=4, v=4, o=8, gate=12, up=12, down=8, lm_head=30)
    layer = [
        *(f'self_attn.{k}_proj' for k in 'qkvo'),
        *(f'mlp.{k}_proj' for k in ('gate', 'up', 'down')),
        'input_layernorm',
        'post_attention_layernorm',
    ]
    paths = [
        'model.embed_tokens',
        *(f'model.layers.{i}.{p}' for i, p in product(range(layers), layer)),
        'model.norm',
        'lm_head',
    ]
    out = []
    for p in paths:
        kind, at, axes = table_row(p)
        if kind in ('embedding', 'lm_head') and tied and kind != tied:
            continue
        names = tuple((f'{p}.{n}', a) for n, a in axes if n == 'weight' or kind in 'qkv')
        out.append(
            ModuleChannels(
                p, kind, at, width[kind], (('model.embed_tokens.weight', 0),) if tied == kind == 'lm_head' else names
            )
        )
    return ChannelMap(out, tied)


def random_flat(cls, n, g):
    return torch.rand(n, generator=g) < 0.3 if cls is ChannelMask else torch.rand(n, generator=g)


def channels(cls):
    "The kind of a `ChannelData` class."

    def make(folder):
        out, g = [], torch.Generator().manual_seed(0)
        for tied, layers in (('embedding', 2), ('lm_head', 1), (None, 1)):
            cm = channel_map(tied, layers)
            x = cls.from_flat(
                random_flat(cls, cm.total, g),
                cm,
                dict(
                    ability='maths-es',
                    ability_hash='0' * 64,
                    target='a',
                    donor='b',
                    target_print='1' * 64,
                    donor_print='2' * 64,
                    tokens=1234,
                    items=20,
                    p=0.05,
                    rank='raw',
                    made='by hand',
                    max_length=None,
                ),
            )
            out.append(x.save(folder / 'sound').read_bytes())
        return out

    def parse(path):
        x = cls.load(path)
        assert x.map.total == len(x.flat()) > 0 and set(x.data) == set(x.map.paths)
        for m in x.map:
            v = x[m.path]
            assert (
                type(m.width) is int
                and tuple(v.shape) == (m.width,)
                and v.dtype == cls.dtype
                and (m.layer is None or type(m.layer) is int)
                and all(type(a) is int for _, a in m.params)
            )
            assert v.dtype is torch.bool or torch.isfinite(v).all() and (v >= 0).all()
        assert len({n for m in x.map for n, _ in m.params}) == sum(len(m.params) for m in x.map)
        with safe_open(path, 'pt') as f:
            assert all(torch.equal(f.get_tensor(p), x[p].to(f.get_tensor(p).dtype)) for p in x.map.paths) and len(
                f.keys()
            ) == len(x.map)
        assert repr(x) and len(x.frame()) == len(x.map)
        y = cls.load(x.save(path.with_name('again')))
        assert y.map == x.map and torch.equal(y.flat(), x.flat()) and json.dumps(y.meta) == json.dumps(x.meta)

    return Kind('x.safetensors', make, dict(TENSORS, metadata=change_metadata, both=change_both), parse)


def weights(seed, dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64)):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        'model.embed_tokens.weight': (30, 8),
        'model.layers.0.mlp.up_proj.weight': (12, 8),
        'model.layers.0.self_attn.q_proj.bias': (8,),
        'model.norm.weight': (8,),
        'scale': (),
        'none': (0, 8),
    }
    return {k: torch.randn(s, generator=g).to(dtypes[i % len(dtypes)]) for i, (k, s) in enumerate(shapes.items())}


def in_folder(folder, ck):
    assert (
        ck.files
        and all(t.file.parent == folder and t.file.name in ck.files for t in ck.tensors.values())
        and ck.nbytes >= 0
    )
    for n in ck.tensors:
        assert tuple(ck.read(n).shape) == ck.tensors[n].shape
    check_finite(folder)
    fingerprint(folder)


def make_weights(folder):
    (folder / 'config.json').write_text('{"model_type": "qwen2", "tie_word_embeddings": true}')
    out = []
    for i, dtypes in enumerate(
        [(torch.float32, torch.bfloat16, torch.float16, torch.float64), (torch.bfloat16,), (torch.float32,)]
    ):
        save_file(weights(i, dtypes), folder / 'sound', metadata=dict(format='pt', about='{"a": [1]}'))
        out.append((folder / 'sound').read_bytes())
    return out


def parse_weights(path):
    ck = Checkpoint(path.parent)
    in_folder(path.parent, ck)
    with safe_open(path, 'pt') as f:  # what is accepted here, others can load, and to the same values
        assert set(f.keys()) == set(ck.tensors)
        assert all(torch.equal(f.get_tensor(n), ck.read(n)) for n in ck.tensors)


def make_index(folder):
    (folder / 'config.json').write_text('{"model_type": "qwen2"}')
    parts = {'model-1.safetensors': weights(0), 'model-2.safetensors': {f'b.{k}': v for k, v in weights(1).items()}}
    for name, t in parts.items():
        save_file(t, folder / name)
    save_file(weights(2), folder.parent / 'outside.safetensors')
    (folder / 'folder.safetensors').mkdir(exist_ok=True)
    index = dict(metadata=dict(total_size=1000), weight_map={k: name for name, t in parts.items() for k in t})
    return [
        json.dumps(index).encode(),
        json.dumps(index, indent=2).encode(),
        json.dumps(dict(index, metadata={})).encode(),
    ]


def parse_index(path):
    in_folder(path.parent, Checkpoint(path.parent))


def make_config(folder):
    save_file(weights(0), folder / 'model.safetensors')
    return [
        json.dumps(
            dict(
                model_type='qwen2',
                hidden_size=8,
                rope_scaling=None,
                layer_types=['full_attention'] * 2,
                tie_word_embeddings=t,
                eos_token_id=[1, 2],
            )
        ).encode()
        for t in (True, False)
    ]


def make_result(folder):
    items = dict(ability=['a'] * 3, loglik=[-1.5, float('nan'), 0.0], correct=[True, False, True], bytes=[3, 4, 5])
    return [
        write_json(
            dict(format='act-eval-1', meta=dict(model='a', abilities=dict(a=dict(hash='0', items=3))), items=i),
            folder / 'sound',
        ).read_bytes()
        for i in (items, {})
    ]


def parse_result(path):
    d = read_json(path, 'act-eval-1', 'evaluation result', 'act_evaluate')
    assert type(d) is dict and d['format'] == 'act-eval-1'
    again = read_json(write_json(d, path.with_name('again')), 'act-eval-1', 'evaluation result', 'act_evaluate')
    assert json.dumps(d) == json.dumps(again)


def make_jsonl(folder):
    items = [
        Item('2+2=', '4'),
        Item('¿Cuánto?\n', ' dos\t'),
        Item('a\u2028b\x85', '\U0001f600'),
        Item('Which?', 'B. y', choices=('A. x', 'B. y')),
        Item('', 'x\\n"'),
    ]
    return [Ability('s-es', part).save(folder / 'sound').read_bytes() for part in (items, items[:1], items[3:])]


def parse_jsonl(path):
    a = read_jsonl(path)
    b = read_jsonl(a.save(path.with_name('again.jsonl')))
    assert a.hash == b.hash and [(i.prompt, i.answer, i.choices) for i in a] == [
        (i.prompt, i.answer, i.choices) for i in b
    ]
    assert all(type(s) is str for i in a for s in (i.prompt, i.answer, *i.choices)) and repr(a) and a._repr_html_()


def make_delta_files(folder):
    g, long = torch.Generator().manual_seed(0), dict(o=8, down=12)
    out = []
    for tied, dtype in (('embedding', torch.bfloat16), ('lm_head', torch.float32), (None, torch.float16)):
        cm = channel_map(tied, 1)
        shapes = {
            n: (
                (30, 8)
                if 'embed' in n or m.kind == 'lm_head'
                else (m.width,)
                if n.endswith('bias') or m.kind == 'norm'
                else (m.width, long.get(m.kind, 8))
            )
            for m in cm
            for n, _ in m.params
        }
        for name in (f'target-{tied}', 'donor'):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / 'config.json').write_text('{}')
            save_file(
                {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()},
                folder / name / 'model.safetensors',
            )
        out.append(
            make_delta(
                folder / f'target-{tied}',
                folder / 'donor',
                ChannelMask.from_flat(random_flat(ChannelMask, cm.total, g), cm),
                0.5,
                folder / 'sound',
                check=False,
            ).read_bytes()
        )
    return out


def parse_delta(path):
    d = Delta.load(path)
    assert d.mask.total == d.mask.map.total > 0 and repr(d) and len(d.hash) == 64
    slices = mask_slices(d.mask)
    assert set(d.tensors) == set(slices) == set(d.digests)
    for n, (axis, chosen) in slices.items():
        x = d.bits(n)
        assert not x.is_floating_point() and x.shape[axis] == chosen.sum() and len(d.digests[n]) == 2
    shutil.rmtree(path.with_name('out'), ignore_errors=True)
    out = Checkpoint(
        apply_delta(path.with_name(f'target-{d.mask.map.tied}'), d, path.with_name('out'))
    )  # a target for which it was not made is refused
    check_finite(out.folder)


JSON = dict(BYTES, recode=recode, json=change_json)
KINDS = dict(
    mask=channels(ChannelMask),
    score=channels(ChannelScores),
    delta=Kind('d.safetensors', make_delta_files, dict(TENSORS, metadata=change_metadata), parse_delta),
    weights=Kind('model.safetensors', make_weights, TENSORS, parse_weights),
    index=Kind('model.safetensors.index.json', make_index, dict(JSON, shards=change_shards), parse_index),
    config=Kind('config.json', make_config, JSON, parse_index),
    result=Kind('result.json', make_result, JSON, parse_result),
    jsonl=Kind('mine.jsonl', make_jsonl, dict(BYTES, recode=recode, json=change_line), parse_jsonl),
)

# Trying

_watch, OWN = (
    dict(folder=None, seen=[]),
    [Path(o).resolve() for o in (sys.prefix, sys.base_prefix, PACKAGE.parent, '/proc/cpuinfo')],
)  # what `provenance` reads


def _hook(event, args):
    folder = _watch['folder']
    if folder is None:
        return
    if event == 'open' and isinstance(args[0], (str, bytes, Path)):
        where = Path(args[0].decode() if isinstance(args[0], bytes) else args[0])
        if not any(where.resolve().is_relative_to(o) for o in (folder, *OWN)):
            _watch['seen'].append(f'{event} {where}')
    elif event in ('pickle.find_class', 'subprocess.Popen', 'os.system', 'os.exec', 'socket.connect'):
        _watch['seen'].append(event)


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(folder):
    "Nothing inside the block may open a file outside of `folder`, unpickle, start a process or connect."
    _watch.update(folder=Path(folder).resolve(), seen=[])
    try:
        yield
    finally:
        _watch['folder'] = None
    assert not _watch['seen'], f"touched {_watch['seen'][:3]}"


def prepared(name, folder):
    "(kind, its sound files) in a folder of its own; the sound files are parsed once, which also runs late imports."
    folder = Path(folder) / f'files-of-{name}'
    folder.mkdir(parents=True)
    kind = KINDS[name]
    sound = kind.make(folder)
    for raw in sound:
        (folder / kind.name).write_bytes(raw)
        kind.parse(folder / kind.name)
    return kind, sound, folder


def mutant(name, kind, sound, seed, i):
    "(name of the change, bytes) of file number `i`."
    rng = random.Random(f'{seed}/{name}/{i}')
    change = rng.choice(list(kind.changes))
    return change, kind.changes[change](rng, rng.choice(sound), rng.choice(sound))


SLOW = 2  # seconds that a parser may take


def attempt(kind, raw, folder):
    "Give a file to its parser: 'accepted' or 'refused'; any other outcome is an error."
    path, start = folder / kind.name, time.process_time()
    path.write_bytes(raw)
    with watched(folder):
        try:
            kind.parse(path)
            out = 'accepted'
        except ActError as e:
            assert any(n in str(e) for n in (path.name, folder.name)), f"no file is named: {e}"
            assert len(str(e)) < 2000, f'a message of {len(str(e))} characters'
            str(e).encode()
            out = 'refused'
    assert time.process_time() - start < SLOW, f'{time.process_time() - start:.1f} s'
    return out
