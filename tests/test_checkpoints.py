"Checkpoints: damaged and mismatched ones are refused by name; hashes name values."

import json, struct, pytest, torch
from act import checkpoints
from safetensors.torch import load_file, save_file
from act.checkpoints import Checkpoint
from act.fingerprints import fingerprint, weight_hash
from act.headers import read_header
from act.loading import load_model, resolve
from act.pairs import check_finite, preflight
from act.writer import save_model, write_like
from act.kit.errors import ActError
from conftest import tiny_model, toy_tokenizer


def edit(folder, change, name='model.safetensors'):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata=dict(format='pt'))


def test_hash_is_of_values_not_of_shards_or_precision(family, checkpoint):
    model = tiny_model(family, dtype=torch.bfloat16)
    one, many = checkpoint('one', model), checkpoint('many', model, max_shard_size='5KB')
    wide = checkpoint('wide', tiny_model(family, dtype=torch.bfloat16).float())
    assert len(Checkpoint(many).files) > 1
    loaded = load_model(one)[0], load_model(one, dtype='float32')[0]
    assert {weight_hash(m) for m in (one, many, wide, *loaded)} == {weight_hash(model)}


def test_hash_sees_one_changed_number(checkpoint):
    model = tiny_model()
    before = weight_hash(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert weight_hash(model) != before


def test_rows_are_the_tensors_rows(checkpoint):
    ck = Checkpoint(checkpoint('m', tiny_model(dtype=torch.bfloat16)))
    w = ck.read('model.layers.0.mlp.up_proj.weight')
    assert torch.equal(ck.rows('model.layers.0.mlp.up_proj.weight', [5, 0, 23]), w[[5, 0, 23]])
    assert ck.rows('model.layers.0.mlp.up_proj.weight', []).shape == (0, w.shape[1])


@pytest.mark.parametrize('shape', [(), (0, 4), (5, 0), (1, 300), (7, 11)])
def test_blocks_are_the_tensor(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(checkpoints, 'BLOCK', 100)
    x = torch.randn(shape)
    save_file({'x': x}, tmp_path / 'x.safetensors')
    t = read_header(tmp_path / 'x.safetensors')['x']
    assert torch.equal(checkpoints.rows_of(t), x)
    blocks = [checkpoints.rows_of(t, *block) for block in checkpoints.blocks_of(t)]
    assert torch.equal(torch.cat([b.reshape(-1) for b in blocks] or [x.reshape(-1)]), x.reshape(-1))


@pytest.mark.parametrize('block', [100, 1 << 20])
def test_written_like_the_source_it_is_the_source_to_the_byte(checkpoint, tmp_path, monkeypatch, block):
    monkeypatch.setattr(checkpoints, 'BLOCK', block)
    ck = Checkpoint(checkpoint('m', tiny_model(), max_shard_size='5KB'))
    (tmp_path / 'copy').mkdir()
    write_like(ck, tmp_path / 'copy')
    assert len(ck.files) > 1
    for f in (*ck.files, 'model.safetensors.index.json', 'config.json', 'tokenizer.json'):
        assert (tmp_path / 'copy' / f).read_bytes() == (ck.folder / f).read_bytes()
    load_model(tmp_path / 'copy')


@pytest.mark.parametrize(
    'change, word',
    [
        (lambda r, a, b: r[:-1], 'same shape'),
        (lambda r, a, b: r.double(), 'same shape'),
        (lambda r, a, b: r / 0, 'after the change'),
    ],
)
def test_a_change_that_cannot_be_is_refused(checkpoint, tmp_path, change, word):
    ck = Checkpoint(checkpoint('m'))
    (tmp_path / 'copy').mkdir()
    with pytest.raises(ActError, match=f'model.norm.weight.*{word}'):
        write_like(ck, tmp_path / 'copy', {'model.norm.weight': change})


def test_the_source_is_looked_at_on_its_way(checkpoint, tmp_path):
    folder = checkpoint('m')
    edit(folder, lambda t: t['model.layers.1.mlp.gate_proj.weight'].__setitem__((2, 3), float('nan')))
    (tmp_path / 'copy').mkdir()
    with pytest.raises(ActError, match='gate_proj.weight of m holds NaN'):
        write_like(Checkpoint(folder), tmp_path / 'copy')


def test_a_fingerprint_is_of_values_not_of_shards_or_precision(family, checkpoint):
    model = tiny_model(family, dtype=torch.bfloat16)
    same = (
        model,
        checkpoint('one', model),
        checkpoint('many', model, max_shard_size='5KB'),
        checkpoint('wide', tiny_model(family, dtype=torch.bfloat16).float()),
    )
    assert len({fingerprint(m) for m in same}) == 1
    assert fingerprint(tiny_model(family, 1)) != fingerprint(model)


def test_rows_out_of_range_are_refused(checkpoint):
    ck = Checkpoint(checkpoint('m'))
    for idx in ([-1], [0, 24]):
        with pytest.raises(ActError, match='which has 24'):
            ck.rows('model.layers.0.mlp.up_proj.weight', idx)


def test_a_truncated_file_is_named(checkpoint):
    folder = checkpoint('m')
    raw = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(raw[:-100])
    with pytest.raises(ActError, match='model.safetensors .*truncated'):
        Checkpoint(folder)
    (folder / 'model.safetensors').write_bytes(raw[:4])
    with pytest.raises(ActError, match='model.safetensors'):
        Checkpoint(folder)


def test_a_missing_shard_is_named(checkpoint):
    folder = checkpoint('m', max_shard_size='5KB')
    victim = Checkpoint(folder).files[1]
    (folder / victim).unlink()
    with pytest.raises(ActError, match=victim):
        Checkpoint(folder)


def test_an_index_that_leaves_its_folder_is_refused(checkpoint):
    folder = checkpoint('m', max_shard_size='5KB')
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    index['weight_map'][next(iter(index['weight_map']))] = '../other.safetensors'
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(ActError, match='plain .safetensors file name'):
        Checkpoint(folder)


def test_an_index_with_a_tensor_that_no_shard_has(checkpoint):
    folder = checkpoint('m', max_shard_size='5KB')
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    index['weight_map']['model.extra.weight'] = next(iter(index['weight_map'].values()))
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(ActError, match='model.extra.weight'):
        Checkpoint(folder)


def header(path, head, body=b''):
    raw = json.dumps(head).encode()
    path.write_bytes(struct.pack('<Q', len(raw)) + raw + body)


@pytest.mark.parametrize(
    'head, word',
    [
        (
            {
                'a': dict(dtype='F32', shape=[2], data_offsets=[0, 8]),
                'b': dict(dtype='F32', shape=[2], data_offsets=[4, 12]),
            },
            'overlap',
        ),
        ({'a': dict(dtype='F32', shape=[3], data_offsets=[0, 8])}, 'bytes for shape'),
        ({'a': dict(dtype='Q7', shape=[2], data_offsets=[0, 8])}, 'Q7'),
        ({'a': dict(shape=[2])}, 'lacks'),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, head, word):
    header(tmp_path / 'x.safetensors', head, b'\0' * 12)
    with pytest.raises(ActError, match=word):
        read_header(tmp_path / 'x.safetensors')


def test_pickled_weights_are_never_loaded(checkpoint):
    folder = checkpoint('m')
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n')
    with pytest.raises(ActError, match='pickle is never loaded'):
        load_model(folder)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_bad_number_is_named(checkpoint, value):
    folder = checkpoint('m')
    edit(folder, lambda t: t['model.layers.1.mlp.gate_proj.weight'].__setitem__((2, 3), value))
    with pytest.raises(ActError, match='model.layers.1.mlp.gate_proj.weight'):
        check_finite(folder)
    with pytest.raises(ActError, match='NaN or infinity'):
        preflight(checkpoint('good'), folder)


def test_a_pair_that_fits_is_described(checkpoint):
    r = preflight(checkpoint('a'), checkpoint('b', tiny_model(seed=1)))
    assert r.channels > 0
    assert r.model_type == 'qwen2'
    assert r.tied == 'embedding'
    assert '<table' in r._repr_html_()


@pytest.mark.parametrize('other, word', [('llama3', 'model_type'), ('qwen2_untied', 'untie')])
def test_pairs_of_two_kinds_are_refused(checkpoint, other, word):
    with pytest.raises(ActError, match=word):
        preflight(checkpoint('a'), checkpoint('b', tiny_model(other)))


def test_shapes_that_differ(checkpoint):
    a, b = checkpoint('a'), checkpoint('b', tiny_model(seed=1))

    def shrink(t):
        t['model.layers.0.mlp.up_proj.weight'] = t['model.layers.0.mlp.up_proj.weight'][:-1].clone()

    edit(b, shrink)
    with pytest.raises(ActError, match='up_proj'):
        preflight(a, b)


def test_tokenizers_that_differ(checkpoint, tmp_path):
    a, b = checkpoint('a'), checkpoint('b', tiny_model(seed=1))
    t = json.loads((b / 'tokenizer.json').read_text())
    merges = t['model']['merges']
    merges[0], merges[-1] = merges[-1], merges[0]
    (b / 'tokenizer.json').write_text(json.dumps(t))
    with pytest.raises(ActError, match='tokenizers'):
        preflight(a, b)


def test_models_in_memory_are_checked_too():
    preflight(tiny_model(), tiny_model(seed=1))
    with pytest.raises(ActError):
        preflight(tiny_model(), tiny_model('llama3'))


def test_saving_refuses_an_existing_folder(tmp_path):
    (tmp_path / 'o').mkdir()
    with pytest.raises(ActError, match='exists already'):
        save_model(tiny_model(), toy_tokenizer(), tmp_path / 'o')


def test_names_that_lead_nowhere():
    with pytest.raises(ActError, match='neither a folder nor a hub id'):
        resolve('/no/such/folder')
    with pytest.raises(ActError, match='pass the path of a local copy'):
        resolve('someone/no-such-model-xyz')
    with pytest.raises(ActError, match='maths-en'):
        resolve('lab/nobody')
