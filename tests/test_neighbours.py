"""Neighbours: mergekit writes what the transfer writes; training stays inside the mask.

Tables come back unchanged; lm_eval's numbers are ours.
"""

import copy, gc, importlib.util, json, os, re, subprocess, sys, weakref, pytest, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from act.abilities import Ability, Item
from act.sources import load_ability
from act.channels import ChannelMap, ModuleChannels, enumerate_channels
from act.loading import load_model, resolve
from act.kit.errors import ActError
from act.evaluate import evaluate
from act.masks import ChannelMask, top_p
from act.scores import ChannelScores
from act.commands.tools import act_mergekit, act_tasks
from act.tools.lm_eval import task_folder
from act.tools.mergekit import run_mergekit
from act.tools.peft import mask_gradients, peft_config
from act.streaming import transfer_checkpoint
from act.transfer import mask_slices
from conftest import tiny_model

mergekit = pytest.mark.skipif(
    importlib.util.find_spec('mergekit') is None, reason='mergekit is not installed (extra: baselines)'
)


def mask_of(model, p=0.3, seed=0, tied='embedding', only=None):
    "A random mask with channels of every kind of module, or of some."
    cm = enumerate_channels(model, tied)
    mask = ChannelMask.from_flat(torch.rand(cm.total, generator=torch.Generator().manual_seed(seed)) < p, cm)
    return mask if only is None else ChannelMask({m.path: mask[m.path] & (m.kind in only) for m in cm}, cm)


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8)


def same(a, b):
    "Two folders hold the same tensors: names, types, bits."
    x, y = ({k: v for f in sorted(Path(d).glob('*.safetensors')) for k, v in load_file(f).items()} for d in (a, b))
    return x.keys() == y.keys() and all(
        x[k].dtype == y[k].dtype and x[k].shape == y[k].shape and torch.equal(bits(x[k]), bits(y[k])) for k in x
    )


def recipe(path, target, donors, **more):
    "A YAML file (JSON is YAML) for mergekit."
    path.write_text(
        json.dumps(
            dict(
                merge_method='act',
                base_model=str(target),
                models=[dict(model=str(d), parameters=p) for d, p in donors],
                **more,
            )
        )
    )
    return path


def folders(checkpoint, *models, family='qwen2', **kw):
    return [checkpoint(f'{family}{i}', m, **kw) for i, m in enumerate(models)]


@mergekit
@pytest.mark.parametrize(
    'family, tied',
    [
        ('qwen2', 'embedding'),
        ('qwen2', 'lm_head'),
        ('qwen2_untied', 'embedding'),
        ('llama3', 'embedding'),
        ('qwen3', 'embedding'),
    ],
)
def test_mergekit_writes_what_the_transfer_writes(family, tied, checkpoint, tmp_path):
    t, d = folders(checkpoint, *(tiny_model(family, s, torch.bfloat16) for s in (0, 1)), family=family)
    mask = mask_of(tiny_model(family), tied=tied)
    assert all(mask[m.path].any() for m in mask.map)
    mask.save(tmp_path / 'm')
    for lam in (1, 0.3):
        ours = transfer_checkpoint(t, d, mask, lam, tmp_path / f'ours{lam}')
        theirs = run_mergekit(
            recipe(tmp_path / 'r.yaml', t, [(d, dict(mask=f'{tmp_path}/m', lam=lam))]),
            tmp_path / f'theirs{lam}',
            '--quiet',
        )
        assert same(ours, theirs)
        assert not same(t, theirs)
        a, b = (json.loads((f / 'act_transfer.json').read_text()) for f in (ours, theirs))
        assert {k: v for k, v in a.items() if k != 'provenance'} == {k: v for k, v in b.items() if k != 'provenance'}


@mergekit
def test_the_lab_by_its_names(tmp_path):
    mask = mask_of(load_model('lab/base')[0], 0.1)
    mask.save(tmp_path / 'm')
    transfer_checkpoint('lab/maths-en', 'lab/base', mask, 0.5, tmp_path / 'ours')
    r = recipe(tmp_path / 'r.yaml', 'lab/maths-en', [('lab/base', dict(mask=f'{tmp_path}/m', lam=0.5))])
    run_mergekit(r, tmp_path / 'theirs', '--quiet')
    assert same(tmp_path / 'ours', tmp_path / 'theirs')
    assert (tmp_path / 'theirs' / 'mergekit_config.yml').read_text() == r.read_text()
    assert (tmp_path / 'theirs' / 'tokenizer.json').exists()
    assert (tmp_path / 'theirs' / 'README.md').read_text().count('# theirs') == 1
    assert sorted(os.listdir(tmp_path)) == ['m', 'ours', 'r.yaml', 'theirs']
    load_model(tmp_path / 'theirs')


@mergekit
@pytest.mark.parametrize('rule', ['sum', 'mean', 'sign'])
def test_several_donors_and_files(rule, checkpoint, tmp_path):
    t, d, e = folders(checkpoint, *(tiny_model('qwen2', s, torch.bfloat16) for s in range(3)))
    masks = [mask_of(tiny_model(), seed=s) for s in range(3)]
    for i, m in enumerate(masks):
        m.save(tmp_path / f'm{i}')
    transfer_checkpoint(t, [d, e], [masks[0] | masks[1], masks[2]], [0.7, 0.4], tmp_path / 'ours', rule=rule)
    r = recipe(
        tmp_path / 'r.yaml',
        t,
        [
            (d, dict(mask=f'{tmp_path}/m0,{tmp_path}/m1', lam=0.7)),
            (t, {}),
            (e, dict(mask=f'{tmp_path}/m2', lam='4e-1')),
        ],
        parameters=dict(rule=rule),
    )
    assert same(tmp_path / 'ours', run_mergekit(r, tmp_path / 'theirs', '--quiet'))


@mergekit
def test_a_donor_of_another_type_and_a_head_stored_twice(checkpoint, tmp_path):
    "The target's types stay, tensor by tensor; a tied head that is in the file as well follows the embedding."
    t, d = folders(checkpoint, tiny_model('qwen2', 0, torch.bfloat16), tiny_model('qwen2', 1))
    w = load_file(t / 'model.safetensors')
    w['lm_head.weight'] = w['model.embed_tokens.weight'].clone()
    w['model.norm.weight'] = w['model.norm.weight'].float()
    save_file(w, t / 'model.safetensors', dict(format='pt'))
    mask = mask_of(tiny_model())
    mask.save(tmp_path / 'm')
    r = recipe(tmp_path / 'r.yaml', t, [(d, dict(mask=f'{tmp_path}/m', lam=0.3))])
    assert same(
        transfer_checkpoint(t, d, mask, 0.3, tmp_path / 'ours'), run_mergekit(r, tmp_path / 'theirs', '--quiet')
    )
    out = load_file(tmp_path / 'theirs' / 'model.safetensors')
    assert out['model.norm.weight'].dtype == torch.float32
    assert torch.equal(out['lm_head.weight'], out['model.embed_tokens.weight'])
    assert not torch.equal(out['lm_head.weight'], w['lm_head.weight'])


@mergekit
def test_a_type_in_the_yaml_converts_first(checkpoint, tmp_path):
    pair = [tiny_model('llama3', s) for s in (0, 1)]
    t, d = folders(checkpoint, *pair, family='f')
    th, dh = folders(checkpoint, *(copy.deepcopy(m).bfloat16() for m in pair), family='h')
    mask = mask_of(pair[0])
    mask.save(tmp_path / 'm')
    r = recipe(tmp_path / 'r.yaml', t, [(d, dict(mask=f'{tmp_path}/m', lam=0.3))], dtype='bfloat16')
    assert same(
        transfer_checkpoint(th, dh, mask, 0.3, tmp_path / 'ours'), run_mergekit(r, tmp_path / 'theirs', '--quiet')
    )


@mergekit
def test_lambda_by_the_name_of_the_tensor(checkpoint, tmp_path):
    t, d = folders(checkpoint, *(tiny_model('llama3', s, torch.bfloat16) for s in (0, 1)))
    mask_of(tiny_model('llama3')).save(tmp_path / 'm')
    r = recipe(
        tmp_path / 'r.yaml', t, [(d, dict(mask=f'{tmp_path}/m', lam=[dict(filter='mlp', value=1.0), dict(value=0.0)]))]
    )
    a, b = (
        load_file(t / 'model.safetensors'),
        load_file(run_mergekit(r, tmp_path / 'out', '--quiet') / 'model.safetensors'),
    )
    assert {('.mlp.' in k) for k in a if not torch.equal(a[k], b[k])} == {True}


@mergekit
def test_recipes_that_cannot_be(checkpoint, tmp_path):
    t, d = folders(checkpoint, *(tiny_model('qwen2', s) for s in (0, 1)))
    other = checkpoint('other', tiny_model('llama3'))
    mask, m = mask_of(tiny_model()), f'{tmp_path}/m'
    mask.meta['target_print'] = 'x' * 64
    mask.save(m)
    mask_of(tiny_model('llama3')).save(tmp_path / 'm3')
    before = sorted(os.listdir(tmp_path)) + ['r.yaml']
    for donors, more, words in [
        ([(d, dict(mask=m))], {}, 'another target'),
        ([(d, dict(mask=m, weight=0.5))], {}, 'no parameter weight'),
        ([(d, {})], {}, 'has no mask'),
        ([], {}, 'no donor'),
        ([(d, dict(mask=m, lam='much'))], {}, "lam is 'much'"),
        ([(d, dict(mask=f'{m}0'))], {}, 'no mask file'),
        ([(d, dict(mask=m))], dict(parameters=dict(rule='best')), 'rule is'),
        ([(other, dict(mask=m))], {}, 'differ in'),
        ([(d, dict(mask=f'{tmp_path}/m3'))], {}, 'another model'),
        ([(d, dict(mask=m))], dict(base_model=None), 'needs base_model'),
        ([(d, dict(mask=m))], dict(models=None, slices=[]), 'not slices'),
    ]:
        path = recipe(tmp_path / 'r.yaml', t, donors)
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
        with pytest.raises(ActError, match=words):
            run_mergekit(path, tmp_path / 'out', '--quiet')
    path = recipe(tmp_path / 'r.yaml', t, [(d, dict(mask=m))])
    with pytest.raises(ActError, match='mergekit does not take'):
        run_mergekit(path, tmp_path / 'out', '--fast', check=False)
    assert sorted(os.listdir(tmp_path)) == sorted(before)
    run_mergekit(path, tmp_path / 'out', '--quiet', check=False)
    with pytest.raises(ActError, match='exists already'):
        run_mergekit(path, tmp_path / 'out', '--quiet', check=False)
    bad = ChannelMap(
        [ModuleChannels('model.norm', 'norm', None, 5, (('model.norm.weight', 0),))], None
    )  # the method itself, asked directly
    ChannelMask.from_flat(torch.ones(5, dtype=torch.bool), bad).save(tmp_path / 'bad')
    from mergekit.merge_methods import merge_tensors

    with pytest.raises(ActError, match='made for another model'):
        merge_tensors(
            [torch.zeros(3), torch.ones(3)],
            'act',
            base_index=0,
            name='model.norm.weight',
            parameters=dict(mask=f'{tmp_path}/bad'),
        )


@mergekit
def test_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    t, d = folders(checkpoint, *(tiny_model('qwen2', s) for s in (0, 1)))
    mask_of(tiny_model()).save(tmp_path / 'm')
    r = recipe(tmp_path / 'r.yaml', t, [(d, dict(mask=f'{tmp_path}/m', lam=0.5))])
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'act_mergekit',
            '--config',
            str(r),
            '--out',
            f'{tmp_path}/out',
            '--options=--quiet --no-write-model-card',
            '--dry_run',
        ],
    )
    assert not act_mergekit.main()
    assert not (tmp_path / 'out').exists()
    assert str(t) in capsys.readouterr().out
    sys.argv.pop()
    assert not act_mergekit.main()
    assert (tmp_path / 'out' / 'model.safetensors').exists()
    assert not (tmp_path / 'out' / 'README.md').exists()
    assert '->' in capsys.readouterr().out
    monkeypatch.setattr(sys, 'argv', ['act_mergekit', '--config', str(r), '--out', f'{tmp_path}/out'])
    assert act_mergekit.main() == 2
    assert 'exists already' in capsys.readouterr().err


@pytest.mark.slow
def test_without_mergekit_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'mergekit', None)
    with pytest.raises(ActError, match=r'pip install "act-transfer\[baselines\]"'):
        run_mergekit(tmp_path / 'r.yaml', tmp_path / 'out')
    assert (
        subprocess.run(
            [
                sys.executable,
                '-c',
                'import sys, act.tools.mergekit, act.tools.peft, act.tools.lm_eval, act.masks\n'
                "sys.exit('mergekit' in sys.modules or 'peft' in sys.modules)",
            ]
        ).returncode
        == 0
    )


ROWS = [dict(input_ids=torch.arange(3, 15) + i, labels=torch.arange(3, 15) + i) for i in range(8)]


def train(model, folder, steps=4, **kw):
    "AdamW with weight decay, through Trainer."
    args = TrainingArguments(
        folder,
        **{
            **dict(
                max_steps=steps,
                learning_rate=1e-2,
                weight_decay=0.5,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                use_cpu=True,
                report_to='none',
                save_strategy='no',
                disable_tqdm=True,
            ),
            **kw,
        },
    )
    Trainer(model, args, train_dataset=ROWS).train()


def moved(old, new, mask):
    "Parameters with entries that moved (inside the mask, outside of it), by bits."
    slices, inside, outside, named = mask_slices(mask), set(), set(), dict(new.named_parameters())
    for name, p in old.named_parameters():
        axis, chosen = slices.get(name, (0, torch.zeros(len(p), dtype=torch.bool)))
        differs = (p.detach().view(torch.int32) != named[name].detach().view(torch.int32)).movedim(axis, 0)
        if differs[chosen].any():
            inside.add(name)
        if differs[~chosen].any():
            outside.add(name)
    return inside, outside


@pytest.mark.parametrize(
    'family, tied',
    [('qwen2', 'embedding'), ('qwen2', 'lm_head'), ('qwen2_untied', 'embedding'), ('gemma3', 'embedding')],
)
def test_a_trainer_stays_inside_the_mask(family, tied, tmp_path):
    old = tiny_model(family)
    new, mask = copy.deepcopy(old), mask_of(old, tied=tied)
    mask = ChannelMask(
        {p: v & ('layers.1.mlp' not in p) for p, v in mask.data.items()}, mask.map
    )  # some parameters have no channel at all
    with mask_gradients(new, mask):
        train(new, tmp_path)
    inside, outside = moved(old, new, mask)
    # k biases shift all attention scores of a query alike: softmax gives them no gradient but rounding
    assert not outside
    assert inside >= {n for n in mask_slices(mask) if not n.endswith('k_proj.bias')}
    assert all(p.requires_grad for p in new.parameters())


def test_what_each_part_is_for(tmp_path):
    "Without the mask, without restoring, and after the block, entries outside do move: the test above can fail."
    old = tiny_model()
    mask = mask_of(old)
    new = copy.deepcopy(old)
    train(new, tmp_path)
    assert moved(old, new, mask)[1]
    new = copy.deepcopy(old)
    with mask_gradients(new, mask, keep=False):
        train(new, tmp_path)
    decayed = moved(old, new, mask)[1]
    assert decayed
    assert all(
        torch.allclose(
            dict(new.named_parameters())[n][~mask_slices(mask)[n][1]],
            p[~mask_slices(mask)[n][1]] * (1 - 1e-2 * 0.5 * 0.625) ** 4,
            rtol=0.02,
        )
        for n, p in old.named_parameters()
        if n in decayed and mask_slices(mask)[n][0] == 0
    )
    now = copy.deepcopy(new)
    train(new, tmp_path)
    assert moved(now, new, mask)[1]


def test_old_momentum_does_not_leak_out():
    model = tiny_model()
    mask, opt = mask_of(model), torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step():
        opt.zero_grad()
        model(**{k: v[None] for k, v in ROWS[0].items()}).loss.backward()
        opt.step()

    step()
    old = copy.deepcopy(model)
    with mask_gradients(model, mask):
        step()
        step()
    inside, outside = moved(old, model, mask)
    assert inside
    assert not outside
    step()
    assert moved(old, model, mask)[1]  # free again


def test_a_model_that_moves_to_another_type_afterwards():
    "As to another device: what is kept goes along."
    old, new = tiny_model(), tiny_model()
    mask = mask_of(old)
    with mask_gradients(new, mask):
        new.bfloat16()
        opt = torch.optim.AdamW(new.parameters(), lr=1e-2, weight_decay=0.5)
        for _ in range(2):
            new(**{k: v[None] for k, v in ROWS[0].items()}).loss.backward()
            opt.step()
    inside, outside = moved(old.bfloat16().float(), new.float(), mask)
    assert inside
    assert not outside


def test_models_that_it_does_not_fit():
    model, mask = tiny_model(), mask_of(tiny_model())
    with pytest.raises(ActError, match='does not fit'):
        mask_gradients(tiny_model('llama3'), mask)
    with pytest.raises(ActError, match='nothing that learns'):
        mask_gradients(model, mask & ~mask)
    with pytest.raises(ActError, match='DoRA'):
        mask_gradients(get_peft_model(model, peft_config(mask, use_dora=True)), mask)
    model = tiny_model()
    mask_gradients(model, mask)
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1).step()  # somebody else's
    for m in model.modules():  # what spreading a model over devices does
        for n, p in list(m._parameters.items()):
            if p is not None:
                setattr(m, n, torch.nn.Parameter(p.detach().clone()))
    with pytest.raises(ActError, match='other ones'):
        torch.optim.SGD(model.parameters(), 0.1).step()


def test_a_forgotten_mask_keeps_no_model_alive():
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    before, model = len(hooks), tiny_model()
    mask_gradients(model, mask_of(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(hooks) == before


def adapted(old, mask, config, folder, steps=4):
    torch.manual_seed(0)
    net = get_peft_model(copy.deepcopy(old), config)
    with mask_gradients(net, mask):
        train(net, folder, steps)
    return net.merge_and_unload()


@pytest.mark.parametrize('family', ['qwen2', 'qwen2_untied'])
@pytest.mark.parametrize('parameters', [False, True])
@pytest.mark.parametrize('rest', [False, True])
def test_an_adapter_stays_inside_the_mask(family, parameters, rest, tmp_path):
    old = tiny_model(family)
    mask = mask_of(old)
    mask = ChannelMask({p: v & ('layers.1.mlp.up' not in p) for p, v in mask.data.items()}, mask.map)
    inside, outside = moved(
        old, adapted(old, mask, peft_config(mask, r=2, parameters=parameters, rest=rest), tmp_path), mask
    )
    left = {'model.embed_tokens.weight'} if family == 'qwen2' else set()  # tied
    want = {n for n in mask_slices(mask) if n not in left and (rest or old.get_parameter(n).ndim > 1)}

    def without(names):
        "k biases get no gradient but rounding."
        return {n for n in names if not n.endswith('k_proj.bias')}

    assert not outside
    assert without(inside) == without(want)


def test_tied_rows_are_trainable_tokens(tmp_path):
    old = tiny_model()
    mask = mask_of(old, tied='lm_head', only=('lm_head', 'up'))
    config = peft_config(mask)
    assert config.trainable_token_indices == {'model.embed_tokens': mask['lm_head'].nonzero()[:, 0].tolist()}
    assert config.target_modules == {f'model.layers.{i}.mlp.up_proj' for i in range(2)}
    inside, outside = moved(old, adapted(old, mask, config, tmp_path), mask)
    assert not outside
    assert inside == set(mask_slices(mask))


def test_an_adapter_of_ones_own_is_frozen_where_the_mask_has_nothing(tmp_path):
    old = tiny_model()
    mask = mask_of(old, only=('q', 'norm'))
    net = get_peft_model(
        copy.deepcopy(old), LoraConfig(task_type='CAUSAL_LM', r=2, target_modules='all-linear', init_lora_weights=False)
    )  # B is random to begin with
    handle = mask_gradients(net, mask)
    assert {n.split('.')[6] for n, p in net.named_parameters() if p.requires_grad} == {'q_proj'}
    handle.remove()
    assert {n.split('.')[6] for n, p in net.named_parameters() if p.requires_grad} >= {'q_proj', 'k_proj', 'o_proj'}
    net = get_peft_model(
        copy.deepcopy(old), LoraConfig(task_type='CAUSAL_LM', r=2, target_modules=['q_proj'], init_lora_weights=False)
    )
    with mask_gradients(net, mask):
        train(net, tmp_path)
    inside, outside = moved(old, net.merge_and_unload(), mask)
    assert inside == {f'model.layers.{i}.self_attn.q_proj.weight' for i in range(2)}
    assert not outside


def test_a_mask_without_matrices():
    with pytest.raises(ActError, match='LoRA trains matrices'):
        peft_config(mask_of(tiny_model(), only=('norm', 'embedding')))
    assert peft_config(mask_of(tiny_model('qwen2_untied'), only=('norm', 'embedding'))).target_modules == {
        'model.embed_tokens'
    }


@pytest.fixture
def scores():
    cm = enumerate_channels(tiny_model('qwen3'))
    return ChannelScores.from_flat(torch.rand(cm.total, generator=torch.Generator().manual_seed(0)), cm)


def test_tables_come_back(scores, tmp_path):
    mask = top_p(scores, 0.2)
    table = scores.to_pandas(mask)
    assert list(table) == ['module', 'kind', 'layer', 'channel', 'score', 'chosen']
    assert list(mask.to_pandas()) == ['module', 'kind', 'layer', 'channel', 'chosen']
    row = table.iloc[scores.map.offsets['model.layers.1.mlp.up_proj'] + 5]
    assert (row.module, row.kind, row.layer, row.channel, row.score, row.chosen) == (
        'model.layers.1.mlp.up_proj',
        'up',
        1,
        5,
        scores['model.layers.1.mlp.up_proj'][5].item(),
        mask['model.layers.1.mlp.up_proj'][5].item(),
    )
    assert table.layer.isna().sum() == sum(m.width for m in scores.map if m.layer is None)
    data = scores.to_dataset(mask)
    data.to_parquet(tmp_path / 't.parquet')
    for t in (
        table,
        table.sample(frac=1, random_state=1),
        table.astype(dict(module=str, channel=float)),
        data,
        data.shuffle(seed=1),
        tmp_path / 't.parquet',
        str(tmp_path / 't.parquet'),
    ):
        assert torch.equal(ChannelScores.from_table(t, scores.map).flat(), scores.flat())
        assert ChannelMask.from_table(t, scores.map) == mask
    assert ChannelMask.from_table(table, scores.map, dict(made='by hand')).meta == dict(made='by hand')


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda t: t.drop(index=3), 'channel 3 of model.embed_tokens is missing'),
        (lambda t: t.iloc[[*range(len(t)), 2]], 'channel 2 of model.embed_tokens comes 2 times'),
        (
            lambda t: t.assign(module=t.module.astype(str).replace('model.norm', 'norm')),
            'of norm, which the model does not have',
        ),
        (lambda t: t.assign(channel=t.channel.where(t.index != 4, 999)), 'row 4 is channel 999 of model.embed_tokens'),
        (lambda t: t.assign(channel=t.channel.where(t.index != 4)), 'row 4 is channel nan'),
        (lambda t: t.assign(channel=t.channel.where(t.index != 4, 1.5)), 'row 4 is channel 1.5'),
        (lambda t: t.assign(score=t.score.where(t.index != 7, -1.0)), 'row 7 has score -1'),
        (lambda t: t.assign(score=t.score.where(t.index != 7)), 'row 7 has score nan'),
        (lambda t: t.assign(score=t.score.astype(float).where(t.index != 7, 1e300)), 'row 7 has score'),
        (lambda t: t.assign(score='high'), 'row 0 has score high'),
        (lambda t: t.drop(columns='channel'), 'no column channel'),
        (lambda t: t.drop(columns='score'), 'no column score'),
    ],
)
def test_tables_that_cannot_be(scores, change, words):
    with pytest.raises(ActError, match=words):
        ChannelScores.from_table(change(scores.to_pandas()), scores.map)


def test_a_mask_is_zeros_and_ones(scores):
    table = scores.to_pandas(top_p(scores, 0.2))
    assert (
        ChannelMask.from_table(table.assign(chosen=table.chosen.astype(int)), scores.map).count
        == top_p(scores, 0.2).count
    )
    with pytest.raises(ActError, match='row 0 has chosen 0.5'):
        ChannelMask.from_table(table.assign(chosen=0.5), scores.map)
    with pytest.raises(ActError, match='another model'):
        scores.to_pandas(mask_of(tiny_model()))


def test_millions_of_channels_are_not_looked_at_one_by_one():
    import time

    cm = ChannelMap(
        [
            ModuleChannels(
                f'model.layers.{i}.mlp.up_proj', 'up', i, 10_000, ((f'model.layers.{i}.mlp.up_proj.weight', 0),)
            )
            for i in range(200)
        ],
        None,
    )
    s, start = ChannelScores.from_flat(torch.arange(cm.total).float(), cm), time.process_time()
    assert torch.equal(ChannelScores.from_table(s.to_pandas(), cm).flat(), s.flat())
    assert time.process_time() - start < 10


@pytest.fixture
def lm_eval(tmp_path):
    "Run lm-eval's command line elsewhere, offline: `lm_eval(main, *options)` gives the samples of a task."

    def _run(main, *args, path=None):
        cwd = tmp_path / f'cwd{len(list(tmp_path.glob("cwd*")))}'
        cwd.mkdir()
        env = dict(
            os.environ,
            HF_HUB_OFFLINE='1',
            HF_DATASETS_OFFLINE='1',
            HF_HOME=str(tmp_path / 'cache'),
            OMP_NUM_THREADS='1',
            **(dict(PYTHONPATH=str(path)) if path else {}),
        )
        args = [
            'run',
            *map(str, args),
            '--batch_size',
            '64',
            '--device',
            'cpu',
            '--output_path',
            'out',
            '--log_samples',
        ]
        done = subprocess.run(
            [sys.executable, '-c', f'import sys; {main}', *args],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]

        def samples(task):
            (path,) = (cwd / 'out').rglob(f'samples_{task}_2*.jsonl')
            return sorted((json.loads(l) for l in path.read_text().splitlines()), key=lambda o: o['doc_id'])

        return samples

    return _run


OURS, THEIRS = (
    'from act.commands.tools import act_lm_eval; sys.exit(act_lm_eval())',
    'from lm_eval.__main__ import cli_evaluate; cli_evaluate()',
)


@pytest.fixture
def tasks(tmp_path):
    "(abilities, folder of their tasks), moved since it was written."
    choices = Ability(
        'picked-en', [Item('The sun is a', a, choices=(' star', ' planet')) for a in (' star', ' planet')]
    )
    mine = tmp_path / 'mine.jsonl'
    mine.write_text(
        json.dumps(dict(prompt='Q: 二\n', answer='四 "4"')) + '\n' + json.dumps(dict(prompt='x', answer=' y')) + '\n'
    )
    abilities = [load_ability('lab/science-zh', n=8), load_ability(mine), choices]
    names = task_folder([abilities[0], mine, choices], tmp_path / 'a', write=12)
    assert names == ['act_science_zh', 'act_science_zh_generate', 'act_mine', 'act_mine_generate', 'act_picked_en']
    (tmp_path / 'a').rename(tmp_path / 'moved')
    return abilities, tmp_path / 'moved'


def logliks(samples, ability):
    return [
        float(o['filtered_resps'][a.choices.index(a.answer) if a.choices else 0][0]) for o, a in zip(samples, ability)
    ]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.slow
def test_lm_eval_with_our_model_gives_our_numbers(tasks, lm_eval, dtype):
    abilities, folder = tasks
    samples = lm_eval(
        OURS,
        '--model',
        'act',
        '--model_args',
        f'pretrained=lab/swahili,dtype={dtype}',
        '--tasks',
        'act',
        '--include_path',
        folder,
    )
    model, tok = load_model('lab/swahili', dtype=dtype)
    given, written = (evaluate(model, abilities, tok, generate=g, progress=False).items for g in (0, 12))
    for a, task in zip(abilities, ('act_science_zh', 'act_mine', 'act_picked_en')):
        want = given[given.ability == a.name]
        assert [int(o['acc']) for o in samples(task)] == want.correct.tolist()
        assert logliks(samples(task), a) == pytest.approx(want.loglik.tolist(), abs=1e-4 if dtype == 'float32' else 0.1)
    for a, task in zip(abilities, ('act_science_zh_generate', 'act_mine_generate')):
        want = written[written.ability == a.name]
        assert [int(o['exact_match']) for o in samples(task)] == want.correct.tolist()
        assert [o['resps'][0][0] for o in samples(task)] == want.text.tolist()
    assert 0 < given[given.ability == 'science-zh'].correct.mean() < 1
    assert 0 < written.correct.sum()


@pytest.mark.slow
def test_the_shipped_tasks_with_our_model_give_our_numbers(lm_eval):
    from act.harness import TASKS

    samples = lm_eval(
        OURS,
        '--model',
        'act',
        '--model_args',
        'pretrained=lab/maths-en,dtype=float32',
        '--tasks',
        'act_lab_science_el',
        '--include_path',
        TASKS,
    )('act_lab_science_el')
    ability = load_ability('lab/science-el')
    want = evaluate(
        load_model('lab/maths-en', dtype='float32')[0], ability, load_model('lab/maths-en')[1], progress=False
    ).items
    assert logliks(samples, ability) == pytest.approx(want.loglik.tolist(), abs=1e-4)
    assert [int(o['acc']) for o in samples] == want.correct.tolist()
    assert [o['bits_per_byte'] for o in samples] == pytest.approx(
        [-l / b / 0.6931471805599453 for l, b in zip(want.loglik, want.bytes)], abs=1e-4
    )


@pytest.mark.slow
def test_plain_lm_eval_runs_the_tasks_where_act_cannot_be_imported(tasks, lm_eval, tmp_path):
    abilities, folder = tasks
    (tmp_path / 'no' / 'act').mkdir(parents=True)
    (tmp_path / 'no' / 'act' / '__init__.py').write_text('raise ImportError("act is not here")')
    samples = lm_eval(
        THEIRS,
        '--model',
        'hf',
        '--model_args',
        f"pretrained={resolve('lab/science-zh')},dtype=float32",
        '--tasks',
        'act',
        '--include_path',
        folder,
        path=tmp_path / 'no',
    )
    model, tok = load_model('lab/science-zh', dtype='float32')
    given = evaluate(model, abilities, tok, eos=False, progress=False).items
    for a, task in zip(abilities, ('act_science_zh', 'act_mine', 'act_picked_en')):
        got, want = logliks(samples(task), a), given[given.ability == a.name].loglik.tolist()
        if a.name == 'mine':
            assert abs(got[0] - want[0]) > 0.1  # it counts the line end of the prompt as answer
        assert got[a.name == 'mine' :] == pytest.approx(want[a.name == 'mine' :], abs=1e-3)
    assert len(samples('act_science_zh_generate')) == 8


@pytest.mark.slow
def test_our_model_says_what_is_wrong_in_one_line(monkeypatch, capsys):
    from act.commands.tools import act_lm_eval
    from act.harness import TASKS

    def run(*args):
        monkeypatch.setattr(
            sys,
            'argv',
            [
                'act_lm_eval',
                'run',
                '--model',
                'act',
                '--tasks',
                'act_lab_science_el',
                '--include_path',
                str(TASKS),
                '--limit',
                '2',
                *args,
            ],
        )
        return act_lm_eval(), capsys.readouterr().err.splitlines()[-1]

    for args, words in [
        (('--model_args', 'pretrained=lab/nobody'), 'error: no lab model'),
        (('--model_args', 'pretrained=lab/base,chat=True'), 'no chat template'),
        (('--model_args', 'pretrained=lab/base', '--batch_size', 'auto'), "error: batch_size is 'auto'"),
        (
            ('--model_args', 'pretrained=lab/base', '--apply_chat_template'),
            'error: lm-eval.s own chat templating is not used',
        ),
    ]:
        code, err = run(*args)
        assert code == 2
        assert re.search(words, err)


def test_the_tasks_command(tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['act_tasks', *map(str, args)])
        return act_tasks.main(), *capsys.readouterr()

    code, out, _ = run('--ability', 'lab/science-zh', '--n', 4, '--out', tmp_path / 't', '--dry_run')
    assert not code
    assert not list(tmp_path.iterdir())
    assert 'act_science_zh_generate.yaml' in out
    assert 'nothing was written' in out
    code, out, _ = run('--ability', 'lab/science-zh', '--n', 4, '--out', tmp_path / 't', '--write', 9)
    assert not code
    assert (
        'next: act_lm_eval run --model act --model_args pretrained=MODEL'
        f' --tasks act_science_zh,act_science_zh_generate --include_path {tmp_path}/t' in out
    )
    assert 'max_gen_toks: 9\n' in (tmp_path / 't' / 'act_science_zh_generate.yaml').read_text()
    assert (
        load_ability(tmp_path / 't' / 'act_science_zh.jsonl').hash == load_ability('lab/science-zh', n=4).hash
    )  # the items are an ability file again
    for args, words in [
        (('--ability', 'lab/science-zh', '--out', tmp_path / 't'), 'exists already'),
        (('--ability', 'lab/science-zh,lab/science-zh', '--out', tmp_path / 'u'), 'different names'),
        (('--ability', 'lab/none-xx', '--out', tmp_path / 'u'), 'no lab ability'),
        (('--ability', 'lab/science-zh', '--write', 0, '--out', tmp_path / 'u'), 'one token at least'),
    ]:
        code, _, err = run(*args)
        assert code == 2
        assert words in err
        assert os.listdir(tmp_path) == ['t']


@mergekit
@pytest.mark.parametrize(
    'change, words',
    [
        (lambda r: r.pop('base_model'), 'needs base_model'),
        (lambda r: r.pop('models'), 'a list of models'),
        (lambda r: r.update(models={}), 'a list of models'),
        (lambda r: r.update(parameters=['sum']), 'parameters'),
        (lambda r: r['models'][0].update(parameters='mask'), 'parameters'),
        (lambda r: r['models'][0].pop('model'), 'a list of models'),
        (lambda r: r.update(merge_method=['act']), 'merge_method'),
    ],
)
def test_a_recipe_of_another_shape_is_refused_in_one_line(checkpoint, tmp_path, change, words):
    t, d = folders(checkpoint, tiny_model('qwen2', 0), tiny_model('qwen2', 1))
    mask_of(tiny_model()).save(tmp_path / 'm')
    path = recipe(tmp_path / 'r.yaml', t, [(d, dict(mask=f'{tmp_path}/m'))])
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    with pytest.raises(ActError, match=words):
        run_mergekit(path, tmp_path / 'out', '--quiet')
