"""Hostile files: every parser makes something sound of a changed file or raises ActError.

What was once found is kept here by name.
"""

import json, pickle, struct, pytest, torch
from safetensors.torch import load_file, save_file
from act.abilities import Ability, Item, read_jsonl
from act.channels import ChannelMap
from act.checkpoints import Checkpoint
from act.headers import read_header
from act.loading import channels_of, load_model
from act.pairs import preflight
from act.kit.errors import ActError
from act.kit.records import JSON_LIMIT, parse_json, read_json
from act.apply import apply_delta
from act.deltas import Delta
from act.masks import ChannelMask
from act.scores import ChannelScores
from act.streaming import transfer_checkpoint
from conftest import tiny_model
from mutate import KINDS, attempt, channel_map, mutant, prepared, put_together, taken_apart, watched


@pytest.mark.parametrize('name', KINDS)
def test_changed_files_are_sound_or_refused(name, tmp_path):
    kind, sound, folder = prepared(name, tmp_path)
    seen = [attempt(kind, mutant(name, kind, sound, 0, i)[1], folder) for i in range(400)]
    assert seen.count('accepted') > 20
    assert seen.count('refused') > 200


def test_the_watch_sees_what_it_should(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'out').write_text('')
    for act in (
        lambda: open(tmp_path / 'out'),
        lambda: open(tmp_path / 'in/../out'),
        lambda: pickle.loads(b'cos\nsystem\n.'),
    ):
        with pytest.raises(AssertionError, match='touched'), watched(tmp_path / 'in'):
            act()


F = dict(dtype='F32', shape=[2], data_offsets=[0, 8])
G = dict(F, data_offsets=[8, 16])


def t(**kw):
    return json.dumps({'a': {**F, **kw}}).encode()


@pytest.mark.parametrize(
    'head, word',
    [
        (b'{"a": %b, "a": %b}' % (json.dumps(F).encode(), json.dumps(G).encode()), "'a' comes twice"),
        (t()[:-2] + b', "shape": [2]}}', "'shape' comes twice"),
        (json.dumps({'a': G}).encode(), 'starts at 8, not at 0'),
        (json.dumps({'a': F, 'b': dict(F, data_offsets=[12, 20])}).encode(), 'starts at 12, not at 8'),
        (json.dumps({'a': F, 'b': F}).encode(), 'overlap'),
        (t(), '8 bytes after the last tensor'),
        (t(dtype='I64', shape=[2], data_offsets=[0, 16]), 'has type I64: only F64, F32, F16, BF16'),
        (t(dtype='F8_E4M3', shape=[16], data_offsets=[0, 16]), 'has type F8_E4M3'),
        (t(dtype=['F32']), 'has type'),
        (t(data_offsets=[0.0, 8.0]), 'impossible'),
        (t(shape=[2.0]), 'impossible'),
        (t(shape=[True, 2]), 'impossible'),
        (t(shape='2'), 'impossible'),
        (t(shape=[1] * 70 + [2]), 'impossible'),
        (t(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), 'impossible'),
        (t(shape=[-1, -2]), 'impossible'),
        (t(data_offsets=[8, 0]), 'bytes for shape'),
        (t(shape=[int('9' * 4000)]), 'impossible'),
        (b'{"a": ' + b'9' * 5000 + b'}', 'digits'),
        (b'{"a": NaN}', 'not a finite number'),
        (b'[' * 100_000, 'nests too deeply'),
        (b'[' * 500 + b']' * 500, 'nests too deeply'),
        (b'[]', 'not an object'),
        (b'{"a": 0}', 'lacks type, shape or offsets'),
        (t().decode().encode('utf-16'), 'decode'),
        (b'\xef\xbb\xbf' + t(), 'BOM'),
        (b'{"\\ud800": 0}', 'surrogates'),
        (b'{"a\\n\\u001b[2J": %b}' % json.dumps(F).encode(), 'impossible name'),
        (b'{"%b": %b}' % (b'a' * 300, json.dumps(F).encode()), 'impossible name'),
        (
            b'{"__metadata__": [], "a": %b}' % json.dumps(dict(F, shape=[4], data_offsets=[0, 16])).encode(),
            'not text by name',
        ),
        (
            b'{"__metadata__": {"x": 1}, "a": %b}' % json.dumps(dict(F, shape=[4], data_offsets=[0, 16])).encode(),
            'not text by name',
        ),
    ],
)
def test_headers_that_lie(tmp_path, head, word):
    f = tmp_path / 'x.safetensors'
    f.write_bytes(put_together(head, bytes(16)))
    with pytest.raises(ActError, match=f'x.safetensors.*{word}'):
        read_header(f)


@pytest.mark.parametrize('n', [100_000_000, JSON_LIMIT + 1, 2**63, 2**64 - 1])
def test_a_header_that_claims_too_much_is_not_read(tmp_path, n):
    f = tmp_path / 'x.safetensors'
    with open(f, 'wb') as out:
        out.write(struct.pack('<Q', n))
        out.truncate(min(n + 8, 200_000_000))  # a file with holes
    with pytest.raises(ActError, match='its header claims'):
        read_header(f)


@pytest.fixture
def shards(checkpoint):
    folder = checkpoint('m', max_shard_size='5KB')
    return (
        folder,
        folder / 'model.safetensors.index.json',
        json.loads((folder / 'model.safetensors.index.json').read_text()),
        Checkpoint(folder).files,
    )


def test_a_tensor_in_two_shards_is_named(shards):
    folder, _, index, files = shards
    k = next(k for k, f in index['weight_map'].items() if f == files[0])
    save_file({**load_file(folder / files[1]), k: load_file(folder / files[0])[k]}, folder / files[1])
    with pytest.raises(ActError, match=f'{k} is in {files[0]} and in {files[1]}'):
        Checkpoint(folder)


@pytest.mark.parametrize(
    'name',
    [
        '/etc/passwd',
        '/etc/x.safetensors',
        '..\\x.safetensors',
        'x\0.safetensors',
        'a' * 300 + '.safetensors',
        'sub/x.safetensors',
        './x.safetensors',
        'pytorch_model.bin',
        '',
        None,
        3,
        ['x'],
        {},
    ],
)
def test_shards_of_other_names_are_not_looked_for(shards, name):
    folder, file, index, _ = shards
    index['weight_map']['model.norm.weight'] = name
    file.write_text(json.dumps(index))
    with watched(folder), pytest.raises(ActError, match='plain .safetensors file name'):
        Checkpoint(folder)


@pytest.mark.parametrize(
    'text, word',
    [
        ('[]', 'not a JSON object'),
        ('"x"', 'not a JSON object'),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' comes twice"),
        ('{"weight_map": ' + '{"a":' * 100_000, 'nests too deeply'),
        ('{"n": ' + '9' * 5000 + '}', 'digits'),
    ],
)
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors.index.json'])
def test_json_beside_the_weights(shards, name, text, word):
    (shards[0] / name).write_text(text)
    with pytest.raises(ActError, match=f'{name}.*{word}'):
        Checkpoint(shards[0])


@pytest.mark.parametrize('where', [[], {}, 'x', None, [['a', 'x.safetensors']]])
def test_an_index_without_a_map(shards, where):
    shards[1].write_text(json.dumps(dict(weight_map=where)))
    with pytest.raises(ActError, match='no weight_map'):
        Checkpoint(shards[0])


def test_a_folder_in_place_of_a_file(shards):
    for f in (shards[0] / 'config.json', shards[0] / shards[3][0], shards[1]):
        f.unlink()
        f.mkdir()
        with pytest.raises(ActError, match=f.name):
            Checkpoint(shards[0])
        f.rmdir()
        f.write_text('{}')


def test_links_to_shards_are_fine(shards, tmp_path):
    folder, _, _, files = shards
    for i, f in enumerate(files):
        (folder / f).rename(tmp_path / f'blob{i}')
        (folder / f).symlink_to(tmp_path / f'blob{i}')
    load_model(folder)


def test_missing_tensors_are_named(checkpoint, tmp_path):
    a, b = checkpoint('a'), checkpoint('b', tiny_model(seed=1))
    mask = ChannelMask.from_flat(torch.ones(preflight(a, b).channels, dtype=torch.bool), channels_of(a))
    for folder in (b, a):
        w = load_file(folder / 'model.safetensors')
        del w['model.layers.1.mlp.up_proj.weight']
        save_file(w, folder / 'model.safetensors', metadata=dict(format='pt'))
        for move in (preflight, lambda a, b: transfer_checkpoint(a, b, mask, 1.0, tmp_path / 'out')):
            with pytest.raises(ActError, match='model.layers.1.mlp.up_proj.weight'):
                move(a, b)


@pytest.mark.parametrize('value', [float('nan'), float('-inf')])
def test_no_half_written_model_of_weights_with_nan(checkpoint, tmp_path, value):
    a, b = checkpoint('a'), checkpoint('b', tiny_model(seed=1))
    cm = channels_of(a)
    w = load_file(b / 'model.safetensors')
    w['model.norm.weight'][3] = value
    save_file(w, b / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ActError, match='model.norm.weight'):
        transfer_checkpoint(
            a, b, ChannelMask.from_flat(torch.ones(cm.total, dtype=torch.bool), cm), 1.0, tmp_path / 'out'
        )
    assert not (tmp_path / 'out').exists()


# Masks and scores


@pytest.fixture
def mask(tmp_path):
    cm = channel_map()
    return ChannelMask.from_flat(torch.arange(cm.total) % 3 == 0, cm, dict(ability='maths-es', tokens=7)).save(
        tmp_path / 'm.safetensors'
    )


def edit_map(f, change):
    head, body = taken_apart(f.read_bytes())
    d = json.loads(head['__metadata__']['map'])
    d = change(d) or d
    head['__metadata__']['map'] = d if isinstance(d, str) else json.dumps(d)
    f.write_bytes(put_together(head, body))


def first(**kw):
    return lambda d: d['modules'][0].update(kw)


@pytest.mark.parametrize(
    'change',
    [
        first(width=True),
        first(width=10**30),
        first(width=8.0),
        first(layer=False),
        first(params=[]),
        first(params=[['model.embed_tokens.weight', 0]]),
        first(params=[['model.embed_tokens.weight', 1]] * 2),
        first(params={'a': 1}),
        first(params=[['x']]),
        first(path='model.layers.٣.mlp.up_proj'),
        first(path='model.layers.00.mlp.up_proj'),
        first(path=f'model.layers.{"9" * 5000}.mlp.up_proj'),
        first(path='../x'),
        first(path=None),
        first(path=['x']),
        first(extra=1),
        first(kind='norm'),
        lambda d: d.update(modules=[]),
        lambda d: d.update(modules='x'),
        lambda d: d.update(modules=d['modules'] * 2),
        lambda d: d.update(tied='lm_head'),
        lambda d: d.update(tied=['embedding']),
        lambda d: '[]',
        lambda d: 'null',
        lambda d: ' ',
        lambda d: '[' * 100_000,
        lambda d: '{"tied": NaN}',
        lambda d: '{"tied": null, ' + json.dumps(d)[1:],
    ],
)
def test_maps_that_lie(mask, change):
    edit_map(mask, change)
    with pytest.raises(ActError, match='m.safetensors is not a usable mask'):
        ChannelMask.load(mask)


def test_one_storage_belongs_to_one_module():
    d = channel_map('lm_head').to_dict()
    d['modules'] = [
        dict(
            path='model.embed_tokens', kind='embedding', layer=None, width=8, params=(('model.embed_tokens.weight', 1),)
        ),
        *d['modules'],
    ]
    with pytest.raises(ActError, match='parameter twice'):
        ChannelMap.from_dict(d)


def test_what_a_map_says_in_floats_and_truths_is_not_kept():
    d = json.loads(json.dumps(channel_map().to_dict()))
    d['modules'][0]['params'][0][1] = True
    d['modules'][1]['layer'] = 0.0
    assert [(type(m.layer), type(m.params[0][1])) for m in list(ChannelMap.from_dict(d))[:2]] == [
        (type(None), int),
        (int, int),
    ]


@pytest.mark.parametrize(
    'meta',
    [
        '[1]',
        '"ab"',
        '5',
        'null',
        '{"tokens": "7"}',
        '{"tokens": true}',
        '{"ability": 3}',
        '{"target_print": 5}',
        '{"donor_hash": null}',
        '{"a": 1, "a": 2}',
        '[' * 100_000,
        '{"a": "\\ud800"}',
    ],
)
def test_metadata_that_lie(mask, meta):
    head, body = taken_apart(mask.read_bytes())
    head['__metadata__']['meta'] = meta
    mask.write_bytes(put_together(head, body))
    with pytest.raises(ActError, match='not a usable mask'):
        ChannelMask.load(mask)


def test_metadata_are_shown_as_text(mask):
    m = ChannelMask.load(mask)
    m.meta.update(ability='<script>alert(1)</script>', target='<b>')
    assert '<script' not in m._repr_html_()
    assert '<b>' not in m._repr_html_()


def test_scores_without_a_name_can_be_shown():
    cm = channel_map()
    assert 'channels' in repr(ChannelScores.from_flat(torch.ones(cm.total), cm, dict(tokens=3)))


def test_a_wide_mask_meets_the_model(checkpoint, tmp_path):
    a, b = checkpoint('a'), checkpoint('b', tiny_model(seed=1))
    d = channels_of(a).to_dict()
    d['modules'][3]['width'] += 1
    cm = ChannelMap.from_dict(d)
    f = ChannelMask.from_flat(torch.ones(cm.total, dtype=torch.bool), cm).save(tmp_path / 'wide.safetensors')
    with pytest.raises(ActError, match=f"does not fit {d['modules'][3]['path']}"):
        transfer_checkpoint(a, b, f, 1.0, tmp_path / 'out')


# Deltas


@pytest.fixture
def delta(tmp_path):
    kind, sound, folder = prepared('delta', tmp_path)
    (folder / kind.name).write_bytes(sound[0])
    return folder / kind.name


def test_bits_of_another_shape_are_refused_before_they_meet_the_weights(delta):
    head, body = taken_apart(delta.read_bytes())
    k = next(k for k, t in head.items() if k.startswith('bits.') and t['shape'][1:] == [8])
    head[k]['shape'] = [head[k]['shape'][0], 2, 4]
    delta.write_bytes(put_together(head, body))
    with pytest.raises(ActError, match=f"{k.removeprefix('bits.')} of .* the delta holds bits of shape"):
        apply_delta(delta.with_name('target-embedding'), delta, delta.with_name('no'))
    assert not delta.with_name('no').exists()


@pytest.mark.parametrize('lam', ['9' * 4000, 'NaN', '"1"', 'null', 'true', '[]'])
def test_a_lam_that_is_no_number(delta, lam):
    head, body = taken_apart(delta.read_bytes())
    meta = json.loads(head['__metadata__']['meta'])
    meta['moved'][0]['lam'] = 0
    head['__metadata__']['meta'] = json.dumps(meta).replace('"lam": 0', f'"lam": {lam}')
    delta.write_bytes(put_together(head, body))
    with pytest.raises(ActError, match='d.safetensors is not a usable delta'):
        Delta.load(delta)


def test_a_delta_is_shown_as_text(delta):
    d = Delta.load(delta)
    d.meta['target'] = '<script>alert(1)</script>'
    assert '<script' not in d._repr_html_()


class Trap:
    def __reduce__(self):
        return (open, ('trapped', 'w'))


@pytest.mark.parametrize(
    'write',
    [
        lambda f: torch.save(Trap(), f),
        lambda f: torch.save(Trap(), f, _use_new_zipfile_serialization=False),
        lambda f: f.write_bytes(pickle.dumps(Trap())),
    ],
)
def test_pickles_are_never_opened(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    for name, read in (
        ('m.safetensors', ChannelMask.load),
        ('s.safetensors', ChannelScores.load),
        ('d.safetensors', Delta.load),
        ('x.safetensors', read_header),
        ('a.jsonl', read_jsonl),
        ('r.json', lambda f: read_json(f, 'toy-1', 'toy', 'act_toy')),
    ):
        write(tmp_path / name)
        with watched(tmp_path), pytest.raises(ActError, match=name):
            read(tmp_path / name)
    assert not (tmp_path / 'trapped').exists()


# Other JSON


def test_lines_end_where_json_says(tmp_path):
    a = Ability('x', [Item('a\u2028b\x85c\x0b\x1c', '\u2029d')])
    assert read_jsonl(a.save(tmp_path / 'x.jsonl')).hash == a.hash


@pytest.mark.parametrize(
    'line, word',
    [
        ('{"prompt": "a", "answer": "b", "answer": "c"}', 'comes twice'),
        ('{"prompt": "\\ud800", "answer": "b"}', 'surrogates'),
        ('{"prompt": "a", "answer": "b", "choices": ["b", null]}', 'list of texts'),
        ('{"prompt": "a", "answer": "b", "choices": "b"}', 'list of texts'),
        ('[' * 100_000, 'nests too deeply'),
        ('{"prompt": "a", "answer": "b", "n": ' + '9' * 5000 + '}', 'digits'),
        ('{"prompt": "a", "answer": "b", "n": NaN}', 'not a finite number'),
    ],
)
def test_lines_that_are_refused(tmp_path, line, word):
    (tmp_path / 'x.jsonl').write_text('{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(ActError, match=f'x.jsonl, line 2.*{word}'):
        read_jsonl(tmp_path / 'x.jsonl')


@pytest.mark.parametrize(
    'text, word',
    [
        ('{"format": "toy-1", "format": "toy-1"}', 'comes twice'),
        ('[' * 100_000, 'nests too deeply'),
        ('{"format": "toy-1", "a": "\\udfff"}', 'surrogates'),
        ('{"a": "' + ' ' * JSON_LIMIT + '"}', 'bytes of JSON'),
    ],
)
def test_results_that_are_refused(tmp_path, text, word):
    (tmp_path / 'r.json').write_text(text)
    with pytest.raises(ActError, match=f'r.json is not a readable toy .*{word}'):
        read_json(tmp_path / 'r.json', 'toy-1', 'toy', 'act_toy')


def test_numbers_that_json_does_not_have_pass_where_we_write_them(tmp_path):
    (tmp_path / 'r.json').write_text('{"format": "toy-1", "x": [NaN, 1e999]}')
    assert read_json(tmp_path / 'r.json', 'toy-1', 'toy', 'act_toy')['x'][1] == float('inf')
    for text in ('NaN', '[-Infinity]', '1e999'):
        with pytest.raises(ValueError, match='finite'):
            parse_json(text)
    assert parse_json('"\\ud83d\\ude00"') == '\U0001f600'
