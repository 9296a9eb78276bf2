"Transfer: all channels at lam 1 give the donor bit for bit, lam 0 the target, all else stays; folders equal memory."

import shutil, pytest, torch
from safetensors.torch import load_file, save_file
from act import checkpoints
from act.checkpoints import Checkpoint
from act.fingerprints import fingerprint, weight_hash
from act.loading import load_model
from act.kit.errors import ActError
from act.masks import ChannelMask
from act.streaming import transfer_checkpoint
from act.transfer import RULES, blend, mask_slices, transfer
from conftest import tiny_model
from helpers import full, some


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def bits(folder):
    return {k: Checkpoint(folder).read(k) for k in Checkpoint(folder).tensors}


@pytest.mark.parametrize('tied', ['embedding', 'lm_head'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_identities_in_memory(family, dtype, tied):
    a, b = tiny_model(family, 0, dtype), tiny_model(family, 1, dtype)
    assert same(transfer(a, b, full(a, tied), 1.0), b)
    assert same(transfer(a, b, full(a, tied), 0.0), a)
    assert not same(a, b)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_identities_of_folders(family, dtype, checkpoint, tmp_path):
    a, b = (
        checkpoint('a', tiny_model(family, 0, dtype), max_shard_size='6KB'),
        checkpoint('b', tiny_model(family, 1, dtype)),
    )
    m = full(tiny_model(family))
    for lam, want in ((1.0, b), (0.0, a)):
        out = transfer_checkpoint(a, b, m, lam, tmp_path / f'out{lam}')
        x, y = bits(out), bits(want)
        assert x.keys() == y.keys()
        assert all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)
        assert Checkpoint(out).files == Checkpoint(a).files
        load_model(out)


def test_only_masked_entries_move_by_the_rule(family):
    a, b = tiny_model(family), tiny_model(family, 1)
    m, lam = some(a), 0.4
    new, old, donor = (dict(x.named_parameters()) for x in (transfer(a, b, m, lam), a, b))
    s = mask_slices(m)
    for name in old:
        want = old[name].detach().clone()
        if name in s:
            axis, chosen = s[name]
            i = chosen.nonzero()[:, 0]
            want.index_copy_(axis, i, (old[name] + lam * (donor[name] - old[name])).detach().index_select(axis, i))
        assert torch.allclose(new[name], want, atol=1e-7), name
        if name in s:
            assert torch.equal(
                new[name].index_select(axis, (~chosen).nonzero()[:, 0]),
                old[name].index_select(axis, (~chosen).nonzero()[:, 0]),
            )


def test_folders_equal_memory(family, checkpoint, tmp_path):
    a, b = tiny_model(family, 0, torch.bfloat16), tiny_model(family, 1, torch.bfloat16)
    m = some(a)
    out = transfer_checkpoint(checkpoint('a', a, max_shard_size='6KB'), checkpoint('b', b), m, 0.7, tmp_path / 'out')
    assert weight_hash(out) == weight_hash(transfer(a, b, m, 0.7))


@pytest.mark.parametrize(
    'dtypes',
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize('block', [64, 1000])
def test_blocks_do_not_matter_nor_does_the_type(dtypes, block, checkpoint, tmp_path, monkeypatch):
    a, b, c = tiny_model(dtype=dtypes[0]), tiny_model(seed=1, dtype=dtypes[1]), tiny_model(seed=2, dtype=dtypes[1])
    masks, lams = [some(a, 1), some(a, 2)], [0.7, 0.4]
    folders = checkpoint('a', a, max_shard_size='6KB'), [checkpoint('b', b), checkpoint('c', c)]
    monkeypatch.setattr(checkpoints, 'BLOCK', block)
    for rule in RULES:
        out = transfer_checkpoint(*folders, masks, lams, tmp_path / rule, rule=rule)
        want = transfer(a, [b.to(dtypes[0]), c.to(dtypes[0])], masks, lams, check=False, rule=rule)
        assert weight_hash(out) == weight_hash(want)
        assert (
            Checkpoint(out).tensors['model.norm.weight'].dtype
            == Checkpoint(folders[0]).tensors['model.norm.weight'].dtype
        )


def test_untouched_files_are_the_target_s_to_the_byte(pair, checkpoint, tmp_path):
    a, b = checkpoint('a', pair[0], max_shard_size='6KB'), checkpoint('b', pair[1])
    m = full(pair[0])
    only = ChannelMask({p: v & (p == 'model.norm') for p, v in m.data.items()}, m.map)
    out = transfer_checkpoint(a, b, only, 0.5, tmp_path / 'out')
    changed = [f for f in Checkpoint(a).files if (a / f).read_bytes() != (out / f).read_bytes()]
    assert changed == [Checkpoint(a).tensors['model.norm.weight'].file.name]
    assert len(Checkpoint(a).files) > 2


@pytest.mark.parametrize('who', ['a', 'b'])
def test_nan_is_found_on_its_way_and_leaves_nothing(pair, checkpoint, tmp_path, who):
    with torch.no_grad():
        pair['ab'.index(who)].model.layers[1].mlp.up_proj.weight[3, 4] = float('nan')
    a, b, m = checkpoint('a', pair[0]), checkpoint('b', pair[1]), full(pair[0])
    with pytest.raises(ActError, match='model.layers.1.mlp.up_proj.weight of a .* NaN'):
        transfer_checkpoint(a, b, m, 0.5, tmp_path / 'out')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']


def test_a_result_too_large_for_its_type_is_refused(checkpoint, tmp_path):
    a, b = tiny_model(dtype=torch.float16), tiny_model(seed=1, dtype=torch.float16)
    with pytest.raises(ActError, match='lam is too large for F16'):
        transfer_checkpoint(checkpoint('a', a), checkpoint('b', b), full(a), 1e7, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_mask_knows_its_models_by_fingerprint(pair, checkpoint, tmp_path):
    a, b, m = *pair, some(pair[0])
    m.meta.update(
        target_print=fingerprint(a), donor_print=fingerprint(b), target_hash='never read', donor_hash='never read'
    )
    out = transfer_checkpoint(checkpoint('a', a), checkpoint('b', b), m, 1.0, tmp_path / 'out')
    assert weight_hash(out) == weight_hash(transfer(a, b, m))
    with pytest.raises(ActError, match='another donor.*fingerprint'):
        transfer_checkpoint(tmp_path / 'a', checkpoint('x', tiny_model(seed=5)), m, 1.0, tmp_path / 'no')


def test_the_target_stays_as_it_is(pair):
    a, b = pair
    before = weight_hash(a), weight_hash(b)
    transfer(a, b, some(a), 0.5)
    assert (weight_hash(a), weight_hash(b)) == before


def test_abilities_of_one_donor_are_a_union_added_once(pair):
    a, b = pair
    m, n = some(a, 1), some(a, 2)
    assert (m & n).count
    assert same(transfer(a, b, [m, n], 0.5), transfer(a, b, m | n, 0.5))
    assert same(transfer(a, [b, b], [m, n], 0.5), transfer(a, b, m | n, 0.5))


def test_several_donors_add_their_own_differences_in_any_order(pair):
    a, b = pair
    c, m, n = tiny_model(seed=2), some(pair[0], 1), some(pair[0], 2)
    x, y = transfer(a, [b, c], [m, n], [0.5, 0.25]), transfer(a, [c, b], [n, m], [0.25, 0.5])
    assert same(x, y)
    k, i = 'model.layers.0.mlp.up_proj', (m & n)['model.layers.0.mlp.up_proj'].nonzero()[0, 0]
    w = [z.get_submodule(k).weight[i] for z in (a, b, c, x)]
    assert torch.allclose(w[3], w[0] + 0.5 * (w[1] - w[0]) + 0.25 * (w[2] - w[0]), atol=1e-6)


@pytest.mark.parametrize('rule', RULES)
def test_four_donors_in_any_order_to_the_bit(pair, rule):
    a, donors = pair[0], [tiny_model(seed=s) for s in (2, 3, 4, 5)]
    masks, lams = [some(a, s) for s in (1, 2, 3, 4)], [0.1, 0.3, 0.7, 1.0]
    whole = transfer(a, donors, masks, lams, rule=rule)
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        assert same(whole, transfer(a, *([x[i] for i in order] for x in (donors, masks, lams)), rule=rule))


def test_rules_by_hand():
    both = torch.tensor([True, False])
    move = lambda v, lam=1.0: (torch.tensor([[v]]), 0, both, lam)
    three = [move(3.0), move(1.0), move(-7.0, 0.5)]
    at = {r: blend(torch.tensor([[0.0], [5.0]]), three, r).flatten().tolist() for r in RULES}
    assert at == dict(sum=[0.5, 5.0], mean=[pytest.approx(0.5 / 3), 5.0], sign=[2.0, 5.0])


def test_an_unknown_rule_is_refused(pair):
    with pytest.raises(ActError, match='choose one of sum, mean, sign'):
        transfer(*pair, some(pair[0], 1), rule='median')


def test_several_donors_from_folders(pair, checkpoint, tmp_path):
    a, b = pair
    c, m, n = tiny_model(seed=2), some(a, 1), some(a, 2)
    out = transfer_checkpoint(
        checkpoint('a', a), [checkpoint('b', b), checkpoint('c', c)], [m, n], [0.5, 1.0], tmp_path / 'out'
    )
    assert weight_hash(out) == weight_hash(transfer(a, [b, c], [m, n], [0.5, 1.0]))


def test_lam_1_copies_bits_where_arithmetic_would_round():
    t, d = torch.tensor([[1e8]]), torch.tensor([[1.2345678]])
    assert (t + 1.0 * (d - t)).item() != d.item()
    assert blend(t, [(d, 0, torch.tensor([True]), 1.0)]).item() == d.item()


def test_a_stored_copy_of_tied_weights_is_moved_along(pair, checkpoint, tmp_path):
    a, b = (checkpoint(n, m) for n, m in zip('ab', pair))
    t = load_file(a / 'model.safetensors')
    t['lm_head.weight'] = t['model.embed_tokens.weight'].clone()
    save_file(t, a / 'model.safetensors', metadata=dict(format='pt'))
    out = bits(transfer_checkpoint(a, b, full(pair[0]), 1.0, tmp_path / 'out'))
    assert torch.equal(out['lm_head.weight'], out['model.embed_tokens.weight'])
    assert torch.equal(out['lm_head.weight'], bits(b)['model.embed_tokens.weight'])


@pytest.mark.parametrize('lam', [float('nan'), float('inf'), 'much', None, True])
def test_lam_must_be_finite(pair, lam):
    with pytest.raises(ActError, match='lam is'):
        transfer(*pair, some(pair[0]), lam)


def test_lists_must_go_together(pair):
    a, b = pair
    with pytest.raises(ActError, match='do not go together'):
        transfer(a, [b, b], [some(a)] * 3)
    with pytest.raises(ActError, match='two values of lam'):
        transfer(a, [b, b], [some(a), some(a, 1)], [0.1, 0.2])


def test_a_mask_of_another_model(pair):
    with pytest.raises(ActError, match='made for another model'):
        transfer(*pair, full(tiny_model('qwen3')))
    with pytest.raises(ActError, match='made for another model'):
        transfer(*pair, full(tiny_model('qwen2_untied')))


def test_a_mask_made_for_other_weights(pair, checkpoint, tmp_path):
    a, b = pair
    m = some(a)
    m.meta.update(target_hash=weight_hash(a), donor_hash=weight_hash(b))
    transfer(a, b, m)
    with pytest.raises(ActError, match='another donor'):
        transfer(a, tiny_model(seed=5), m)
    with pytest.raises(ActError, match='another target'):
        transfer_checkpoint(checkpoint('x', tiny_model(seed=5)), checkpoint('b', b), m, 1.0, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    transfer(a, tiny_model(seed=5), m, check=False)


def test_output_that_exists_and_disks_that_are_full(pair, checkpoint, tmp_path, monkeypatch):
    a, b, m = checkpoint('a', pair[0]), checkpoint('b', pair[1]), some(pair[0])
    (tmp_path / 'out').mkdir()
    with pytest.raises(ActError, match='exists already'):
        transfer_checkpoint(a, b, m, 1.0, tmp_path / 'out')
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ActError, match='no room on disk'):
        transfer_checkpoint(a, b, m, 1.0, tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
    assert not list(tmp_path.glob('.new*'))


def test_pairs_that_do_not_fit_are_refused_before_writing(pair, checkpoint, tmp_path):
    with pytest.raises(ActError, match='model_type'):
        transfer_checkpoint(
            checkpoint('a', pair[0]), checkpoint('b', tiny_model('llama3')), some(pair[0]), 1.0, tmp_path / 'out'
        )
    bad = checkpoint('c', pair[1])
    raw = (bad / 'model.safetensors').read_bytes()
    (bad / 'model.safetensors').write_bytes(raw[:-8])
    with pytest.raises(ActError, match='truncated'):
        transfer_checkpoint(checkpoint('a2', pair[0]), bad, some(pair[0]), 1.0, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_what_comes_along(pair, checkpoint, tmp_path):
    import json

    a, b, m = checkpoint('a', pair[0]), checkpoint('b', pair[1]), some(pair[0])
    out = transfer_checkpoint(a, b, m, 0.5, tmp_path / 'out')
    note = json.loads((out / 'act_transfer.json').read_text())
    assert note['moved'][0]['mask'] == m.hash
    assert note['moved'][0]['lam'] == 0.5
    assert note['provenance']['git']
    assert {'config.json', 'tokenizer.json', 'tokenizer_config.json'} <= {p.name for p in out.iterdir()}


def test_without_checks_a_mask_must_still_fit(pair, checkpoint, tmp_path):
    a, b = checkpoint('a', pair[0]), checkpoint('b', pair[1])
    for m in (full(tiny_model('qwen3')), full(tiny_model('qwen2_untied'))):
        with pytest.raises(ActError, match='made for another model'):
            transfer(*pair, m, check=False)
        with pytest.raises(ActError, match='made for another model'):
            transfer_checkpoint(a, b, m, 1.0, tmp_path / 'out', check=False)
    with pytest.raises(ActError, match='made for another model'):
        transfer(pair[0], tiny_model('qwen3'), full(pair[0]), check=False)
    assert not (tmp_path / 'out').exists()
