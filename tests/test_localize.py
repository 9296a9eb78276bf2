"Localise: equal to brute force on every architecture, whatever the batches; bad models are named."

import importlib, json, os, signal, subprocess, sys
import pytest, torch
from act import hooks
from act.abilities import Ability, Item
from act.encoding import encode
from act.sources import load_ability
from act.channels import enumerate_channels
from act.kit.errors import ActError
from act.kit.files import exclusive
from act.localize import localize
from act.scores import ChannelScores
from helpers import TOY as ABILITY
from conftest import tiny_config, tiny_model

stage = importlib.import_module('act.localize')  # `act.localize` is the function


def brute(a, b, tok, tied='embedding', positions='read'):
    "One item at a time, no padding, all outputs kept, averaged at the end."
    cm, sums, n = enumerate_channels(a, tied), {}, 0
    for e in encode(ABILITY, tok, positions):
        outs = []
        for m in (a, b):
            seen = {}
            hooks = [
                m.get_submodule(p).register_forward_hook(lambda mod, i, o, p=p: seen.__setitem__(p, o))
                for p in cm.paths
            ]
            with torch.no_grad():
                m(torch.tensor([e.input_ids]))
            for h in hooks:
                h.remove()
            outs.append(seen)
        for m in cm:
            x, y = (o[m.path][0] for o in outs)
            heads_first = x.ndim == 3 and a.config.model_type == 'gemma3_text'
            d = ((x - y).transpose(0, 1) if heads_first else x - y).abs()[e.positions]
            sums[m.path] = sums.get(m.path, 0) + d.double().reshape(len(e.positions), -1, m.width).mean(1).sum(0)
        n += len(e.positions)
    return torch.cat([sums[p] / n for p in cm.paths])


@pytest.mark.parametrize('positions', ['read', 'predict'])
def test_equals_brute_force(family, tokenizer, positions):
    a, b = tiny_model(family), tiny_model(family, 1)
    s = localize(a, b, ABILITY, tokenizer, positions, progress=False)
    assert torch.allclose(s.flat().double(), brute(a, b, tokenizer, positions=positions), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('family', ['qwen2', 'qwen3', 'gemma3'])
def test_the_other_tie_policy(family, tokenizer):
    a, b = tiny_model(family), tiny_model(family, 1)
    s = localize(a, b, ABILITY, tokenizer, tied='lm_head', progress=False)
    assert 'lm_head' in s.map
    assert torch.allclose(s.flat().double(), brute(a, b, tokenizer, 'lm_head'), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('family', ['qwen2', 'qwen3', 'gemma3'])
def test_batches_do_not_matter(family, tokenizer):
    a, b = tiny_model(family), tiny_model(family, 1)
    one, many = (localize(a, b, ABILITY, tokenizer, batch_tokens=n, progress=False).flat() for n in (1, 10_000))
    assert torch.allclose(one, many, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('family', ['qwen3', 'gemma3'])
def test_a_batch_as_wide_as_the_heads(family, tokenizer):
    "Four tokens and four heads: the axes of a per-head norm could be confused."
    a, b = tiny_model(family), tiny_model(family, 1)
    narrow = Ability('x', [Item('qz', 'jk')])
    assert len(encode(narrow, tokenizer)[0].input_ids) == 4
    wide = Ability('x', [Item('qz', 'jk'), Item('qzqzqzq', 'j')])
    s, both = (localize(a, b, o, tokenizer, batch_tokens=1, progress=False) for o in (narrow, wide[:1]))
    ids = torch.tensor([encode(narrow, tokenizer)[0].input_ids])
    path, outs = 'model.layers.0.self_attn.q_norm', []
    for m in (a, b):
        hook = m.get_submodule(path).register_forward_hook(lambda mod, i, o: outs.append(o))
        with torch.no_grad():
            m(torch.nn.functional.pad(ids, (0, 3)))
        hook.remove()
    d = (outs[0] - outs[1]).abs()
    d = d.transpose(1, 2) if d.shape[1] != 7 else d
    assert torch.allclose(s[path], d[0, 2:4].mean((0, 1)), rtol=1e-4)
    assert torch.equal(s.flat(), both.flat())


def test_two_models_with_the_same_weights_are_refused(tokenizer):
    with pytest.raises(ActError, match='have the same weights'):
        localize(tiny_model(), tiny_model(), ABILITY, tokenizer, progress=False)


def test_one_model_against_itself_is_refused(tokenizer):
    model = tiny_model()
    with pytest.raises(ActError, match='are the same model'):
        localize(model, model, ABILITY, tokenizer, progress=False)


def test_models_that_differ_only_where_no_token_is_read_are_refused(tokenizer):
    a, b = tiny_model('qwen2_untied'), tiny_model('qwen2_untied')
    with torch.no_grad():
        b.model.embed_tokens.weight[0] += 1  # the padding token
    with pytest.raises(ActError, match='do the same on every answer token'):
        localize(a, b, ABILITY, tokenizer, progress=False)


def test_a_change_that_the_fingerprint_misses_is_no_reason_to_refuse(tokenizer, monkeypatch):
    monkeypatch.setattr(stage, 'fingerprint', lambda m: 'the same')
    assert localize(tiny_model(), tiny_model(seed=1), ABILITY, tokenizer, progress=False).flat().any()


def test_it_is_symmetric(pair, tokenizer):
    a, b = pair
    assert torch.allclose(
        localize(a, b, ABILITY, tokenizer, progress=False).flat(),
        localize(b, a, ABILITY, tokenizer, progress=False).flat(),
    )


def test_an_embedding_column_is_the_mean_difference_of_its_entries(pair, tokenizer):
    a, b = pair
    ids = [e.input_ids[i] for e in encode(ABILITY, tokenizer) for i in e.answer]
    want = (a.model.embed_tokens.weight[ids] - b.model.embed_tokens.weight[ids]).abs().mean(0)
    assert torch.allclose(
        localize(a, b, ABILITY, tokenizer, progress=False)['model.embed_tokens'], want.detach(), rtol=1e-5
    )


def test_the_prompt_does_not_count_but_is_read(pair, tokenizer):
    a, b = pair
    run = lambda prompt: localize(a, b, Ability('x', [Item(prompt, 'four')]), tokenizer, progress=False)
    x, y = run('two plus '), run('ocho son ')
    assert torch.equal(x['model.embed_tokens'], y['model.embed_tokens'])
    assert not torch.allclose(x['model.norm'], y['model.norm'])


def test_folders_in_bf16_and_what_is_recorded(checkpoint, tokenizer, tmp_path):
    a, b = checkpoint('a', tiny_model(dtype=torch.bfloat16)), checkpoint('b', tiny_model(seed=1, dtype=torch.bfloat16))
    s = localize(a, b, ABILITY, progress=False)
    wide = localize(a, b, ABILITY, dtype='float32', progress=False)
    assert torch.allclose(s.flat(), wide.flat(), rtol=0.2, atol=0.05)
    assert s.flat().dtype == torch.float32
    assert s.meta['dtype'] == 'bfloat16'
    assert s.meta['tokens'] == sum(len(e.positions) for e in encode(ABILITY, tokenizer))
    assert s.meta['target_print'] != s.meta['donor_print']
    assert s.meta['ability_hash'] == ABILITY.hash
    assert 'torch' in s.meta['provenance']['versions']
    assert ChannelScores.load(s.save(tmp_path / 's.safetensors')).meta == s.meta


def test_infinite_activations_are_named(pair, tokenizer):
    a, b = pair
    with torch.no_grad():
        b.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(ActError, match=r'model.layers.1.mlp.\w+ hold NaN or infinity'):
        localize(a, b, ABILITY, tokenizer, progress=False)


def test_nan_weights_are_named(pair, tokenizer):
    a, b = pair
    with torch.no_grad():
        b.model.layers[0].self_attn.k_proj.bias[1] = float('nan')
    with pytest.raises(ActError, match='k_proj.bias'):
        localize(a, b, ABILITY, tokenizer, progress=False)


def test_a_tokenizer_with_too_many_ids(tokenizer):
    from transformers import AutoModelForCausalLM

    c = tiny_config('qwen2')
    c.vocab_size = 50
    small, other = (AutoModelForCausalLM.from_config(c).eval() for _ in range(2))
    with pytest.raises(ActError, match='outside the model.s vocabulary of 50'):
        localize(small, other, ABILITY, tokenizer, progress=False)


def test_no_hooks_stay_behind(pair, tokenizer):
    a, b = pair
    with pytest.raises(ActError):
        localize(a, b, Ability('x', [Item('abc', 'd')]), tokenizer, max_length=2, progress=False)
    localize(a, b, ABILITY, tokenizer, progress=False)
    assert not any(m._forward_hooks for x in pair for m in x.modules())


def test_a_device_map(checkpoint):
    a, b = checkpoint('a'), checkpoint('b', tiny_model(seed=1))
    plain = localize(a, b, ABILITY, progress=False)
    mapped = localize(a, b, ABILITY, device_map={'': 'cpu'}, progress=False)
    assert torch.equal(plain.flat(), mapped.flat())


@pytest.mark.parametrize('disk', [1, 10**9])
def test_one_model_at_a_time_gives_the_same_bits(family, checkpoint, tmp_path, disk, monkeypatch):
    loads, real = [], stage.load_model
    monkeypatch.setattr(stage, 'load_model', lambda m, *a: loads.append(m) or real(m, *a))
    a = checkpoint('a', tiny_model(family, dtype=torch.bfloat16))
    b = checkpoint('b', tiny_model(family, 1, dtype=torch.bfloat16))
    options = dict(progress=False, batch_tokens=12, disk=disk, state=tmp_path)
    side, turn = (localize(a, b, ABILITY, hold=h, **options) for h in ('both', 'one'))
    assert torch.equal(side.flat(), turn.flat())
    assert side.meta == turn.meta
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']
    assert loads[:2] == [a, b]
    assert loads[2:] == [a, b] if disk > 1 else len(loads) > 4


@pytest.mark.parametrize('free, hold', [(10**9, 'both'), (10**4, 'one')])
def test_two_models_that_do_not_fit_are_taken_in_turn(checkpoint, monkeypatch, free, hold):
    real, said = hooks.bar, []
    monkeypatch.setattr(hooks, 'bar', lambda **o: said.append(o['desc']) or real(**o))
    monkeypatch.setattr(hooks, 'free_memory', lambda device: free)
    assert localize(checkpoint('a'), checkpoint('b', tiny_model(seed=1)), ABILITY).hold == hold
    assert hooks.HOLD[hold] in said[-1]


def test_ways_to_hold_models_that_do_not_exist(checkpoint):
    with pytest.raises(ActError, match="choose 'both', 'one' or 'auto'"):
        localize(checkpoint('a'), checkpoint('b', tiny_model(seed=1)), ABILITY, hold='three')
    with pytest.raises(ActError, match='in memory are there already'):
        localize(tiny_model(), checkpoint('b', tiny_model(seed=1)), ABILITY, hold='one')


def test_the_order_of_the_items_does_not_matter(pair, tokenizer):
    items = list(ABILITY)
    x, y = (localize(*pair, Ability('a', o), tokenizer, batch_tokens=40, progress=False) for o in (items, items[::-1]))
    assert torch.equal(x.flat(), y.flat())


KILLED = """
import os, signal, sys
from act import hooks
from act.commands.way import act_localize

kill, batches, real = int(sys.argv[1]), [], hooks.Sums.done


def done(sums):
    real(sums)
    batches.append(sums.batches)
    if len(batches) == kill:
        os.kill(os.getpid(), signal.SIGKILL)


hooks.Sums.done = done
sys.argv = ['act_localize', *sys.argv[2:]]
act_localize.main()
"""


@pytest.mark.parametrize('hold', ['both', 'one'])
@pytest.mark.slow
def test_what_was_killed_goes_on_and_ends_with_the_same_bytes(checkpoint, tmp_path, hold, run, monkeypatch):
    a, b, data = checkpoint('a'), checkpoint('b', tiny_model(seed=1)), tmp_path / 'x.jsonl'
    items = [dict(prompt=f'{i} and {i} is' + ' so' * (i % 7), answer=f' {2 * i}') for i in range(40)]
    data.write_text('\n'.join(map(json.dumps, items)))
    once, again = tmp_path / 'once.safetensors', tmp_path / 'again.safetensors'
    options = f'--target {a} --donor {b} --ability {data} --batch_tokens 64 --save_seconds 0 --hold {hold} --out'
    assert run(f'act_localize {options} {once}')[0] == 0
    for kill in (2, 3):
        process = subprocess.run(
            [sys.executable, '-c', KILLED, str(kill), *options.split(), again],
            capture_output=True,
            env={**os.environ, 'TQDM_DISABLE': '1'},
        )
        assert process.returncode == -signal.SIGKILL
        assert not again.exists()
        assert (tmp_path / '.again.safetensors.partial').is_dir()
    real, batches = hooks.Sums.done, []
    monkeypatch.setattr(hooks.Sums, 'done', lambda sums: real(sums) or batches.append(sums.batches))
    assert run(f'act_localize {options} {again}')[0] == 0
    assert batches[0] == 6
    assert again.read_bytes() == once.read_bytes()
    assert not list(tmp_path.glob('.*'))


def test_two_processes_give_what_one_gives(launch, tmp_path):
    load_ability('lab/science-zh', 'localize', 60).save(tmp_path / 'x.jsonl')
    out = {n: tmp_path / f'{n}.safetensors' for n in (1, 2)}
    for n, file in out.items():
        done = launch(
            'act_localize',
            *(
                f'--target lab/maths-en --donor lab/base --ability {tmp_path}/x.jsonl --batch_tokens 512 --out {file}'
            ).split(),
            n=n,
        )
        assert done.returncode == 0 and done.stdout.count('ChannelScores') == 1, done.stderr[-2000:]
    one, two = (ChannelScores.load(f).flat() for f in out.values())
    assert torch.allclose(one, two, rtol=1e-6, atol=0)
    assert out[1].read_bytes() == out[2].read_bytes()


def test_two_processes_refuse_together(launch, tmp_path):
    with exclusive(tmp_path / 's'):
        done = launch(
            'act_localize',
            *f'--target lab/maths-en --donor lab/base --ability lab/science-zh --out {tmp_path}/s'.split(),
        )
    assert done.returncode
    assert done.stderr.count('another run is writing') == 1
    assert not (tmp_path / 's').exists()
