"Fine-tune: answers only, masked channels only, the same for the same seed, stopped in time."
import os, signal, subprocess, sys, pytest, torch
from pathlib import Path
from safetensors.torch import load_file
from act import checkpoints, core, finetune as ft
from act.abilities import Ability, Item, load_ability
from act.channels import enumerate_channels
from act.checkpoints import load_model, weight_hash
from act.core import ActError
from act.finetune import _collate, _examples, act_finetune, finetune
from act.masks import ChannelMask, random_mask
from act.transfer import mask_slices
from conftest import tiny_model

ABILITY = Ability('toy-en', [Item(f'{a} plus {b} is', f' {a+b}') for a in range(6) for b in range(4)], eos=True)
run = lambda model, tok, **kw: finetune(model, ABILITY, tok, **{**dict(steps=6, lr=1e-2, batch_size=4, progress=False), **kw})
def mask_of(model, p=.2): 
    cm = enumerate_channels(model)
    return random_mask(ChannelMask.from_flat(torch.arange(cm.total) < p*cm.total, cm), 1)

def test_labels_are_the_answer_and_the_end(tokenizer):
    x = _examples([ABILITY[:1]], tokenizer, False, None)[0]
    kept = [t for t in x['labels'] if t != -100]
    assert tokenizer.decode(kept[:-1]) == ' 0' and kept[-1] == tokenizer.eos_token_id and len(x['labels']) == len(x['input_ids'])

def test_no_end_is_taught_unless_the_ability_has_one(tokenizer):
    x = _examples([Ability('a', [Item('x', 'y')])], tokenizer, False, None)[0]
    assert tokenizer.eos_token_id not in x['labels']

def test_prompts_are_taught_when_asked(tokenizer):
    x = _examples([ABILITY[:1]], tokenizer, False, None, prompts=True)[0]
    assert x['labels'] == x['input_ids'] and x['labels'][-1] == tokenizer.eos_token_id
    assert weight_hash(run(tiny_model(), tokenizer, prompts=True).model) != weight_hash(run(tiny_model(), tokenizer).model)

def test_padding_is_not_taught(tokenizer):
    b = _collate([dict(input_ids=[5, 6, 7], labels=[-100, 6, 7]), dict(input_ids=[8], labels=[8])], 0)
    assert b['labels'].tolist() == [[-100, 6, 7], [8, -100, -100]] and b['attention_mask'].tolist() == [[1, 1, 1], [1, 0, 0]] and b['input_ids'][1].tolist() == [8, 0, 0]

def test_it_learns_and_leaves_the_given_model_alone(tokenizer):
    m = tiny_model()
    before = weight_hash(m)
    r = run(m, tokenizer, steps=40)
    assert sum(r.losses[-5:]) < .7*sum(r.losses[:5]) and weight_hash(m) == before != weight_hash(r.model) and len(r.losses) == 40 and r.tokens > 0

def test_the_same_seed_gives_the_same_bits(tokenizer):
    a, b, c = (weight_hash(run(tiny_model(), tokenizer, seed=s).model) for s in (1, 1, 2))
    assert a == b != c

def test_a_mask_keeps_everything_else_bit_for_bit(family, tokenizer):
    m = tiny_model(family)
    mask = mask_of(m)
    new, old, slices = dict(run(m, tokenizer, mask=mask).model.named_parameters()), dict(m.named_parameters()), mask_slices(mask)
    moved = 0
    for name in old:
        if name not in slices: assert torch.equal(new[name], old[name]); continue
        axis, chosen = slices[name]
        assert torch.equal(new[name].index_select(axis, (~chosen).nonzero()[:, 0]), old[name].index_select(axis, (~chosen).nonzero()[:, 0])), name
        moved += int((new[name] != old[name]).sum())
    assert moved > 0 and all(p.requires_grad for p in new.values())

def test_half_precision_is_trained_in_float32_and_comes_back_half(tokenizer):
    m = tiny_model(dtype=torch.bfloat16)
    mask = mask_of(m)
    r = run(m, tokenizer, mask=mask)
    assert r.model.dtype == torch.bfloat16 and weight_hash(r.model) != weight_hash(m)

def test_early_stopping_puts_the_best_weights_back(tokenizer):
    val = Ability('other-en', [Item('9 plus 9 is', ' 18'), Item('8 plus 9 is', ' 17')])
    r = run(tiny_model(), tokenizer, steps=60, lr=.05, validation=val, eval_steps=2, patience=2)
    best = min(l for _, l in r.eval_losses)
    assert len(r.losses) < 60 and dict(r.eval_losses)[r.best_step] == best
    again = finetune(r.model, ABILITY, tokenizer, steps=1, lr=1e-12, validation=val, eval_steps=1, progress=False)
    assert abs(again.eval_losses[0][1] - best) < 1e-4

def test_lora_is_merged_and_its_adapter_gives_the_same_model(tokenizer, tmp_path):
    from peft import PeftModel
    m = tiny_model('smollm2')
    r = run(m, tokenizer, lora=dict(r=2, target_modules='all-linear'), adapter=tmp_path/'adapter')
    merged = PeftModel.from_pretrained(tiny_model('smollm2'), tmp_path/'adapter').merge_and_unload()
    assert {k for k, _ in r.model.named_parameters()} == {k for k, _ in m.named_parameters()}
    assert all(torch.allclose(p, q, atol=2e-2) for p, q in zip(r.model.parameters(), merged.parameters())) and weight_hash(r.model) != weight_hash(m)
    assert torch.equal(r.model.model.embed_tokens.weight, m.model.embed_tokens.weight)

@pytest.mark.parametrize('kw, word', [(dict(steps=0), 'above zero'), (dict(lr=0), 'above zero'), (dict(lr=float('nan')), 'above zero'), (dict(batch_size=0), 'above zero'),
    (dict(adapter='x'), 'lora='), (dict(max_length=1), 'no answer tokens left')])
def test_settings_that_cannot_work(tokenizer, kw, word):
    with pytest.raises(ActError, match=word): run(tiny_model(), tokenizer, **kw)

def test_a_mask_refuses_what_would_change_other_channels(tokenizer):
    m = tiny_model()
    for kw in (dict(weight_decay=.1), dict(lora=dict(r=2))):
        with pytest.raises(ActError, match='neither LoRA nor weight decay'): run(m, tokenizer, mask=mask_of(m), **kw)

def test_nothing_to_learn_from(tokenizer):
    with pytest.raises(ActError, match='no abilities'): finetune(tiny_model(), [], tokenizer)

def test_two_processes_end_with_one_model(tmp_path, launch):
    done = launch('''
import sys
from act.abilities import load_ability
from act.checkpoints import load_model, weight_hash
from act.core import processes
from act.finetune import finetune
model, tok = load_model('lab/maths-en', dtype='float32')
report = finetune(model, load_ability('lab/science-zh', 'sft'), tok, steps=2, batch_size=4, progress=False)
open(f'{sys.argv[1]}/rank%dof%d' % processes(), 'w').write(f'{weight_hash(report.model)} {weight_hash(model)}')
''', tmp_path)
    files = sorted(tmp_path.glob('rank*'))
    assert [f.name for f in files] == ['rank0of2', 'rank1of2'], done.stderr[-2000:]
    (a, before), (b, _) = (f.read_text().split() for f in files)
    assert a == b != before

HARD = dict(plain={}, lora=dict(lora=dict(r=2, target_modules='all-linear')), masked=dict(mask=True), stopped=dict(validation=True, eval_steps=2, patience=2, lr=2e-3))
def hard(model, tok, mask, kind, batch_size=4, **kw):
    kw = {**HARD[kind], **kw}
    if kw.pop('mask', 0): kw['mask'] = mask
    if kw.pop('validation', 0): kw['validation'] = load_ability('lab/science-zh', 'validation', 16)
    return finetune(model, load_ability('lab/science-zh', 'sft', 24), tok, **{**dict(steps=8, batch_size=batch_size, progress=False), **kw})

def test_a_spread_model_learns_the_same(tmp_path, launch):
    "Plain, with an adapter, masked, stopped early, and stopped by a crash and resumed: two processes with FSDP against one process with twice the batches a step. The second process never reads the weights."
    model, tok = load_model('lab/maths-en', dtype='float32')
    mask = mask_of(model)
    mask.save(tmp_path/'mask.safetensors')
    done = launch(f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from safetensors.torch import save_file
from act import finetune as ft
from act.core import processes
from act.masks import ChannelMask
from test_finetune import HARD, hard
to, mask = sys.argv[1], ChannelMask.load(sys.argv[1] + '/mask.safetensors')
def save(kind, name, **kw):
    model, tok = ft._load('lab/maths-en', None)
    report = hard(model.float(), tok, mask, kind, **kw)
    assert (report.model is None) == bool(processes()[0])
    if report.model is not None: save_file({{k: p.detach() for k, p in report.model.named_parameters()}}, f'{{to}}/{{name}}.safetensors', dict(steps=str(len(report.losses)), best=str(report.best_step)))
for kind in HARD: save(kind, kind)
step = ft._Watch.on_step_end
def crash(self, args, state, control, **kw):
    if state.global_step == 5: raise KeyboardInterrupt
    step(self, args, state, control, **kw)
ft._Watch.on_step_end = crash
try: save('stopped', 'again', state=to + '/state', save_steps=2)
except KeyboardInterrupt: ft._Watch.on_step_end = step
save('stopped', 'again', state=to + '/state', save_steps=2)
''', tmp_path, fsdp=True)
    assert done.returncode == 0, done.stderr[-3000:]
    new = {k: load_file(tmp_path/f'{k}.safetensors') for k in (*HARD, 'again')}
    for kind in HARD:
        one, old = dict(hard(model, tok, mask, kind, accumulate=2).model.named_parameters()), dict(model.named_parameters())
        assert one.keys() == new[kind].keys()
        moved = max((one[k] - old[k]).abs().max().item() for k in old)
        assert max((one[k] - t).abs().max().item() for k, t in new[kind].items()) < .01*moved, kind
    for name, p in model.named_parameters():
        axis, chosen = mask_slices(mask).get(name, (0, torch.zeros(len(p), dtype=bool)))
        outside = (~chosen).nonzero()[:, 0]
        assert torch.equal(new['masked'][name].index_select(axis, outside), p.index_select(axis, outside)), name
    assert [f.name.split('-')[-1] for f in (tmp_path/'state').glob('act-*')] and all(torch.equal(t, new['again'][k]) for k, t in new['stopped'].items())

def test_an_output_that_exists_stops_all_processes(tmp_path, launch):
    done = launch('act_finetune', '--model', 'lab/maths-en', '--ability', 'lab/science-zh', '--out', tmp_path, timeout=60)
    assert done.returncode and done.stderr.count('exists already') == 1 and done.stdout == ''

def test_version_1_of_fsdp_is_refused(tokenizer, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(ActError, match='--fsdp_version 2'): run(tiny_model(), tokenizer)

SMALL = dict(model='lab/maths-en', ability='lab/science-zh', n=24, steps=8, batch_size=4, save_steps=3)
KILLS = dict(step=("step = ft._Watch.on_step_end; ft._Watch.on_step_end = lambda self, a, state, *x, **k: die() if state.global_step == 5 else step(self, a, state, *x, **k)", 3),
             state=("settle = ft._settle; ft._settle = lambda new, done: die() if done.name.endswith('-6') else settle(new, done)", 3),
             model=("from act import checkpoints; checkpoints.write_json = die", 6))

@pytest.mark.parametrize('moment', KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, moment):
    code, start = KILLS[moment]
    code = f"import os, signal\nfrom act import finetune as ft\ndef die(*_, **k): os.kill(os.getpid(), signal.SIGKILL)\n{code}\nft.act_finetune(**{SMALL}, out={str(tmp_path/'out')!r})"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == -9
    assert set(os.listdir(tmp_path)) <= {'.out.partial', '.out.lock'}
    begin, steps = ft._Watch.on_train_begin, []
    monkeypatch.setattr(ft._Watch, 'on_train_begin', lambda self, a, state, *x, **k: (steps.append(state.global_step), begin(self, a, state, *x, **k))[0])
    for name in ('out', 'whole'): act_finetune(**SMALL, out=tmp_path/name)
    assert steps == [start, 0] and sorted(os.listdir(tmp_path)) == ['out', 'whole']
    assert (tmp_path/'out'/'model.safetensors').read_bytes() == (tmp_path/'whole'/'model.safetensors').read_bytes()

def test_another_setting_starts_anew(tokenizer, tmp_path, monkeypatch):
    kw = dict(state=tmp_path/'state', save_steps=2)
    run(tiny_model(), tokenizer, **kw)
    begin, steps = ft._Watch.on_train_begin, []
    monkeypatch.setattr(ft._Watch, 'on_train_begin', lambda self, a, state, *x, **k: (steps.append(state.global_step), begin(self, a, state, *x, **k))[0])
    for more in (dict(), dict(seed=1), dict(lr=2e-2), dict(mask=mask_of(tiny_model()))): run(tiny_model(), tokenizer, **kw, **more)
    run(tiny_model(seed=1), tokenizer, **kw)
    assert steps == [4, 0, 0, 0, 0] and len(list((tmp_path/'state').iterdir())) == 1

def test_a_second_run_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ft, 'load_model', lambda *_, **k: pytest.fail('too late'))
    code = f"from act.core import work_folder\nwith work_folder('{tmp_path}/out'): print('in', flush=True); input()"
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == 'in\n'
        with pytest.raises(ActError, match='another run is writing'): act_finetune(**SMALL, out=tmp_path/'out')
        first.communicate('\n')
    assert os.listdir(tmp_path) == []

@pytest.mark.parametrize('kw, size', [(dict(), '8m'), (dict(save_steps=0), '1m')])
def test_a_disk_that_fills_up(small_disk, monkeypatch, kw, size):
    disk = small_disk(size)
    with pytest.raises(ActError, match='no room on disk'): act_finetune(**{**SMALL, **kw}, out=disk/'out')
    assert os.listdir(disk) == []
    for m in (core, ft): monkeypatch.setattr(m, '_check_room', lambda *_: None)
    with pytest.raises(ActError, match='cannot write .*No space left'): act_finetune(**{**SMALL, **kw}, out=disk/'out')
    assert os.listdir(disk) == []

def test_a_disk_that_is_read_only(small_disk):
    with pytest.raises(ActError, match='is read-only'): act_finetune(**SMALL, out=small_disk('1m', readonly=True)/'out')
