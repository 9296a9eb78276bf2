"Deltas: applied they give the transfer, undone the target, to the byte; anything else is refused before writing."

import subprocess, sys, pytest, torch
from safetensors.torch import load_file, save_file
from act import checkpoints, deltas
from act.checkpoints import Checkpoint
from act.fingerprints import weight_hash
from act.loading import load_model
from act.kit.errors import ActError
from act.apply import apply_delta
from act.deltas import Delta, make_delta
from act.masks import ChannelMask
from act.streaming import transfer_checkpoint
from act.transfer import RULES
from conftest import tiny_model
from helpers import files, full, some


@pytest.fixture
def made(checkpoint, tmp_path):
    "A pair of folders in bf16, a mask, the transfer's result and the delta."
    a, b = tiny_model(dtype=torch.bfloat16), tiny_model(seed=1, dtype=torch.bfloat16)
    fa, fb, m = checkpoint('a', a, max_shard_size='6KB'), checkpoint('b', b), some(a)
    return (
        fa,
        fb,
        m,
        transfer_checkpoint(fa, fb, m, 0.5, tmp_path / 'moved'),
        make_delta(fa, fb, m, 0.5, tmp_path / 'd.safetensors'),
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('tied', ['embedding', 'lm_head'])
def test_there_and_back_to_the_byte(family, dtype, tied, checkpoint, tmp_path, monkeypatch):
    a, b = tiny_model(family, 0, dtype), tiny_model(family, 1, dtype)
    fa, fb, m = checkpoint('a', a, max_shard_size='6KB'), checkpoint('b', b), full(a, tied)
    m = ChannelMask({p: v & (torch.arange(len(v)) % 3 == 0) for p, v in m.data.items()}, m.map)
    moved, d = transfer_checkpoint(fa, fb, m, 0.4, tmp_path / 'moved'), make_delta(fa, fb, m, 0.4, tmp_path / 'd')
    monkeypatch.setattr(checkpoints, 'BLOCK', 300)
    monkeypatch.setattr(deltas, 'BLOCK', 500)
    assert files(apply_delta(fa, d, tmp_path / 'applied')) == files(moved)
    assert files(apply_delta(moved, d, tmp_path / 'undone', undo=True)) == files(fa) != files(moved)
    assert weight_hash(apply_delta(load_model(fa)[0], d)) == weight_hash(moved)
    assert weight_hash(apply_delta(load_model(moved)[0], d, undo=True)) == weight_hash(fa)


@pytest.mark.parametrize('rule', RULES)
def test_several_donors_in_one_file(rule, checkpoint, tmp_path):
    a, b, c = (tiny_model(seed=s) for s in range(3))
    fa, donors, masks = checkpoint('a', a), [checkpoint('b', b), checkpoint('c', c)], [some(a, 1), some(a, 2)]
    d = make_delta(fa, donors, masks, [0.5, 1.0], tmp_path / 'd', rule=rule)
    assert files(apply_delta(fa, d, tmp_path / 'out')) == files(
        transfer_checkpoint(fa, donors, masks, [0.5, 1.0], tmp_path / 'moved', rule=rule)
    )
    assert [m['lam'] for m in Delta.load(d).meta['moved']] == [0.5, 1.0]
    assert Delta.load(d).mask.count == (masks[0] | masks[1]).count


def test_the_same_bytes_again_whatever_the_blocks(made, tmp_path, monkeypatch):
    a, b, m, _, d = made
    monkeypatch.setattr(deltas, 'BLOCK', 200)
    assert make_delta(a, b, m, 0.5, tmp_path / 'again').read_bytes() == d.read_bytes()


def test_other_shards_do_not_matter(made, checkpoint, tmp_path):
    a, _, _, moved, d = made
    one = checkpoint('one', load_model(a)[0])
    assert len(Checkpoint(a).files) > 2
    assert weight_hash(apply_delta(one, d, tmp_path / 'out')) == weight_hash(moved)
    assert Checkpoint(tmp_path / 'out').files == ['model.safetensors']


def test_a_mask_of_a_twentieth_makes_a_file_of_about_a_twentieth(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    for n, s in (('a', 0), ('b', 1)):
        torch.manual_seed(s)
        checkpoint(n, AutoModelForCausalLM.from_config(config))
    d = make_delta(tmp_path / 'a', tmp_path / 'b', some(load_model(tmp_path / 'a')[0], 1, 0.05), 0.5, tmp_path / 'd')
    assert 0.03 < d.stat().st_size / Checkpoint(tmp_path / 'a').nbytes < 0.07


def test_a_stored_copy_of_tied_weights_goes_along_and_comes_back(pair, checkpoint, tmp_path):
    a, b = (checkpoint(n, m) for n, m in zip('ab', pair))
    t = load_file(a / 'model.safetensors')
    t['lm_head.weight'] = t['model.embed_tokens.weight'].clone()
    save_file(t, a / 'model.safetensors', metadata=dict(format='pt'))
    d, moved = (
        make_delta(a, b, full(pair[0]), 0.5, tmp_path / 'd'),
        transfer_checkpoint(a, b, full(pair[0]), 0.5, tmp_path / 'moved'),
    )
    assert files(apply_delta(a, d, tmp_path / 'x')) == files(moved)
    assert files(apply_delta(moved, d, tmp_path / 'y', undo=True)) == files(a)


def refused(tmp_path, match, *args, **kw):
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ActError, match=match):
        apply_delta(*args, **kw)
    assert sorted(tmp_path.rglob('*')) == before


def test_one_other_number_is_enough_to_refuse(made, checkpoint, tmp_path):
    a, b, m, moved, d = made
    model = load_model(a)[0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[m['model.layers.1.mlp.up_proj'].nonzero()[0, 0], 3] += 0.5
    other = checkpoint('other', model)
    refused(
        tmp_path,
        'model.layers.1.mlp.up_proj.weight of .* is not what the delta was made for: apply it to',
        other,
        d,
        tmp_path / 'out',
    )
    refused(tmp_path, 'applied to it already', moved, d, tmp_path / 'out')
    refused(tmp_path, 'is not what the delta made', a, d, tmp_path / 'out', undo=True)
    refused(tmp_path, 'not what the delta was made for', model, d)
    refused(tmp_path, 'is stored as float32, the delta holds 16 bits', load_model(a, dtype='float32')[0], d)
    refused(tmp_path, 'made for another model', checkpoint('llama', tiny_model('llama3')), d, tmp_path / 'out')
    refused(tmp_path, 'exists already', a, d, moved)
    refused(tmp_path, 'where the result goes', a, d)
    refused(tmp_path, 'where the result goes', a, d, tmp_path / 'out', inplace=True)
    refused(tmp_path, 'only a folder of your own', 'lab/base', d, inplace=True)
    refused(tmp_path, 'there is no delta file', a, tmp_path / 'none', tmp_path / 'out')


def test_bits_that_were_damaged_on_the_way_do_not_get_through(made, tmp_path):
    a, _, _, moved, d = made
    t = next(iter(Delta.load(d).tensors.values()))
    raw = bytearray(d.read_bytes())
    raw[t.start + 1] ^= 8
    d.write_bytes(raw)
    refused(tmp_path, 'damaged', a, d, tmp_path / 'out')
    refused(tmp_path, 'damaged', a, d, inplace=True)


@pytest.mark.parametrize('shards', [{}, dict(max_shard_size='6KB')])
def test_in_place_and_back(pair, checkpoint, tmp_path, shards):
    a, b, m = checkpoint('a', pair[0], **shards), checkpoint('b', pair[1]), some(pair[0])
    d, moved = make_delta(a, b, m, 0.5, tmp_path / 'd'), transfer_checkpoint(a, b, m, 0.5, tmp_path / 'moved')
    (a / 'README.md').write_text('mine')
    before, names = files(a), sorted(p.name for p in a.iterdir())
    apply_delta(a, d, inplace=True)
    assert files(a) == files(moved)
    assert sorted(p.name for p in a.iterdir()) == sorted([*names, 'act_transfer.json'])
    apply_delta(a, d, undo=True, inplace=True)
    assert files(a) == before
    assert sorted(p.name for p in a.iterdir()) == names
    assert not list(tmp_path.glob('.*'))


@pytest.mark.slow
def test_killed_in_the_middle_of_an_exchange(made, tmp_path):
    a, b, m, moved, d = made
    code = f"""
import os, signal, sys
from act import apply
count, at, real = 0, int(sys.argv[1]), os.replace
def counted(x, y):
    global count
    if str(y).startswith('{a}') : count += 1
    if count > at: os.kill(os.getpid(), signal.SIGKILL)
    return real(x, y)
apply.os.replace = counted
apply.apply_delta('{a}', '{d}', inplace=True)
"""
    for at in (0, 1, 2):
        assert subprocess.run([sys.executable, '-c', code, str(at)]).returncode == -9
        with pytest.raises(ActError):
            Checkpoint(a)  # half of each is not to be read
        other = make_delta(moved, b, m, 0.3, tmp_path / f'other{at}')
        with pytest.raises(ActError, match='stopped half-way'):
            apply_delta(a, other, inplace=True)
        apply_delta(a, d, inplace=True)
        assert files(a) == files(moved)
        apply_delta(a, d, undo=True, inplace=True)
        assert not list(tmp_path.glob('.*'))


def test_killed_while_it_clears_up(made, tmp_path):
    a, _, _, moved, d = made
    code = f"""
import os, signal
from act import apply
real = apply.shutil.rmtree
def half(path, **kw):
    if os.path.exists(f'{{path}}/key') and '.partial' not in str(path):
        os.unlink(f'{{path}}/key')  # half of it is gone
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, **kw)
apply.shutil.rmtree = half
apply.apply_delta('{a}', '{d}', inplace=True)
"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    assert files(a) == files(moved)
    apply_delta(a, d, undo=True, inplace=True)
    assert weight_hash(a) != weight_hash(moved)
    assert not list(tmp_path.glob('.a.done'))
    assert not list(tmp_path.glob('.a.new'))


def test_commands(made, run, tmp_path):
    a, b, m, moved, d = made
    m.save(tmp_path / 'm.safetensors')
    code, out, _ = run(
        f'act_delta --target {a} --donor {b} --mask {tmp_path}/m.safetensors --lam .5 --out {tmp_path}/e'
    )
    assert not code
    assert 'Delta: ' in out
    again, first = Delta.load(tmp_path / 'e'), Delta.load(d)
    assert again.hash == first.hash
    assert {k: v for k, v in again.meta.items() if k != 'argv'} == first.meta
    assert not run(f'act_apply --target {a} --delta {d} --out {tmp_path}/x')[0]
    assert files(tmp_path / 'x') == files(moved)
    assert not run(f'act_undo --target {tmp_path}/x --delta {d} --in_place')[0]
    assert files(tmp_path / 'x') == files(a)
    code, _, err = run(f'act_undo --target {a} --delta {d}')
    assert code == 2
    assert '--in_place' in err
